"""Conditions on their way in: what a column is, where it may come from, what is refused."""

import dataclasses
import json

import h5py
import numpy as np
import pytest

from ncfast.data.conditions import ConditionColumn, decode_conditions, parse_conditions, read_conditions
from ncfast.data.layout import Reading
from ncfast.data.sources import from_arrays, load_dataset
from ncfast.data.stats import DataStats
from ncfast.data.windows import windows_of
from ncfast.errors import UserError

pandas = pytest.importorskip("pandas")
N, L = 20, 12
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, L)).cumsum(1)
Y = np.array(["a", "b"] * (N // 2))
AGE = RNG.integers(20, 80, N)
SEX = np.where(RNG.random(N) < 0.5, "f", "m")


def frame(rows=slice(None)):
    samples = {f"t{i}": X[rows, i] for i in range(L)}
    return pandas.DataFrame({"age": AGE[rows], "label": Y[rows], **samples, "sex": SEX[rows]})


def check(dataset, rows=slice(None)):
    assert dataset.X_train.shape == (len(AGE[rows]), 1, L)
    np.testing.assert_allclose(dataset.X_train[:, 0], X[rows], rtol=1e-6)
    age, sex = dataset.condition_columns
    assert (age.name, age.kind, sex.name, sex.kind, sex.categories) == ("age", "number", "sex", "category", ("f", "m"))
    assert age.mean == pytest.approx(AGE[rows].mean()) and age.std == pytest.approx(AGE[rows].std())
    values = decode_conditions(dataset.condition_columns, dataset.conditions_train)
    assert values["age"].tolist() == AGE[rows].tolist() and values["sex"].tolist() == SEX[rows].tolist()
    assert "condition sex: one of f, m" in dataset.notes


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz", "h5"])
def test_every_format_with_names_gives_the_same(tmp_path, ending):
    path = tmp_path / f"people.{ending}"
    arrays = {"X": X, "y": Y, "age": AGE, "sex": SEX}
    if ending == "csv":
        frame().to_csv(path, index=False)
    elif ending == "parquet":
        pytest.importorskip("pyarrow")
        frame().to_parquet(path)
    elif ending == "npz":
        np.savez(path, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array.astype("S") if array.dtype.kind == "U" else array
    dataset = load_dataset(path, condition_columns="age, sex")
    check(dataset)
    assert dataset.class_names == ("a", "b") and [dataset.class_names[c] for c in dataset.y_train] == Y.tolist()


def test_both_splits_and_what_the_test_split_lacks(tmp_path):
    first, last = slice(0, 12), slice(12, N)
    for rows, split in ((first, "TRAIN"), (last, "TEST")):
        frame(rows).to_csv(tmp_path / f"P_{split}.csv", index=False)
    dataset = load_dataset(tmp_path / "P_TRAIN.csv", condition_columns=["age", "sex"])
    check(dataset, first)
    assert dataset.conditions_test[:, 0].tolist() == AGE[last].tolist()

    splits = {"X_train": X[first], "X_test": X[last], "age_train": AGE[first], "sex_train": SEX[first]}
    np.savez(tmp_path / "P.npz", **splits, age_test=AGE[last], sex_test=["x", *SEX[last][1:]])
    dataset = load_dataset(tmp_path / "P.npz", condition_columns="age,sex")
    check(dataset, first)
    assert np.isnan(dataset.conditions_test[:, 1]).tolist() == [True] + [False] * 7
    assert any("1 test series have a condition that is missing or not in" in note for note in dataset.notes)
    np.savez(tmp_path / "P.npz", **splits)
    dataset = load_dataset(tmp_path / "P.npz", condition_columns="age,sex")
    assert dataset.conditions_test is None and any("have no age, sex" in note for note in dataset.notes)


def test_in_memory():
    table = pandas.DataFrame({"age": AGE, "sex": pandas.Categorical(SEX)})
    for conditions in (table, {"age": AGE.tolist(), "sex": SEX.astype(object)}):
        check(from_arrays(X, Y, conditions=conditions))
    numbers = from_arrays(X, conditions=np.stack([AGE, AGE**2], 1))
    assert [column.name for column in numbers.condition_columns] == ["condition0", "condition1"]
    smoker = from_arrays(X, conditions={"smoker": AGE > 50})
    assert smoker.condition_columns[0].categories == ("False", "True")
    assert from_arrays(X, Y).conditions_train is None and from_arrays(X, Y).condition_columns == ()


def test_windows_have_those_of_their_first_row():
    days = ["mon"] * 20 + ["tue"] * 20
    recording = pandas.DataFrame({"load": np.arange(40.0), "heat": np.arange(40.0) * 2, "day": days})
    dataset = windows_of(recording, 8, 4, condition_columns=["heat", "day"], test_share=0)
    assert dataset.n_channels == 1
    values = decode_conditions(dataset.condition_columns, dataset.conditions_train)
    first = dataset.X_train[:, 0, 0]
    assert values["heat"].tolist() == (2 * first).tolist()
    assert values["day"].tolist() == np.where(first < 20, "mon", "tue").tolist()
    assert any("are those of a window's first row" in note for note in dataset.notes)


@pytest.mark.parametrize(
    ("columns", "change", "message"),
    [
        ("ages", {}, r"ages is none of age, label, .*; did you mean age\?"),
        ("label", {}, None),  # it may be one, if it is none of the labels
        ("age", {"age": [np.nan, *AGE[1:]]}, "condition age of series 0 .* is missing"),
        ("sex", {"sex": [*SEX[:-1], ""]}, "condition sex of series 19 .* is missing"),
        ("sex", {"sex": [f"person {i}" for i in range(N)]}, "sex has 20 different texts in 20 series"),
        ("age", {"age": [np.inf, *AGE[1:]]}, "age is a finite number; got inf"),
    ],
)
def test_refused_of_a_table(columns, change, message):
    table = frame().assign(**change)
    left_out = ",".join({"age", "sex", "label"} - {columns} & {*table})
    reading = Reading("none", condition_columns=columns, index_column=left_out)
    if message is None:
        assert from_arrays(table, reading=reading).condition_columns[0].categories == ("a", "b")
        return
    with pytest.raises(UserError, match=message):
        from_arrays(table, reading=reading)


def test_refused_of_what_has_no_names(tmp_path):
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.ts").write_text("@univariate true\n@classLabel false\n@data\n1,2,3,4\n4,3,2,1\n")
    np.savetxt(tmp_path / "x.csv", X, delimiter=",")
    for name, message in (
        ("x.npy", "save the series with them as .npz"),
        ("x.ts", ".ts has none"),
        ("x.csv", "header"),
    ):
        with pytest.raises(UserError, match=message):
            load_dataset(tmp_path / name, condition_columns="age", header="no" if name == "x.csv" else None)
    with pytest.raises(UserError, match="give conditions="):
        from_arrays(X, reading=Reading(condition_columns="age"))
    with pytest.raises(UserError, match="20 series need 20 values of condition age, one each; got 19"):
        from_arrays(X, conditions={"age": AGE[1:]})
    with pytest.raises(UserError, match="label_column|another option names too"):
        frame().to_csv(tmp_path / "y.csv", index=False)
        load_dataset(tmp_path / "y.csv", condition_columns="label", label_column="label")


def test_values_of_a_user():
    age, sex = (ConditionColumn.of(name, values) for name, values in (("age", AGE), ("sex", SEX)))
    assert age.encode("63").tolist() == age.encode(63).tolist() == [63.0]
    assert sex.encode(["m", "f"]).tolist() == [1.0, 0.0] and sex.decode(np.array([1, np.nan])).tolist() == ["m", ""]
    for call, message in (
        (lambda: sex.encode("fm"), r"condition sex is one of f, m; got 'fm'; did you mean"),
        (lambda: age.encode("old"), "condition age is a number; got 'old'"),
        (lambda: age.encode([1, None]), "condition age of series 1 .* is missing"),
        (lambda: age.encode(np.zeros((2, 2))), r"one value for each series, \[n\]; got the shape \[2, 2\]"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_facts_survive_json_and_damage_is_told():
    facts = DataStats.of(from_arrays(X, Y, conditions={"age": AGE, "sex": SEX}))
    values = json.loads(json.dumps(dataclasses.asdict(facts)))
    assert DataStats.from_json(values) == facts
    for damage in ({"std": 0.0}, {"mean": "x"}, {"kind": "category"}, {"kind": "word"}, {"categories": None}):
        broken = {**values, "conditions": [{**values["conditions"][0], **damage}]}
        with pytest.raises(ValueError, match="condition"):
            DataStats.from_json(broken)
    with pytest.raises(ValueError, match="condition"):
        DataStats.from_json({**values, "conditions": 3})
    del values["conditions"]  # as of a run of an earlier version
    assert DataStats.from_json(values).conditions == ()


def test_words_of_a_command_line(tmp_path):
    assert parse_conditions(["age=63,sex=f", "place=a,b", "age=70"]) == {
        "age": ["63", "70"],
        "sex": ["f"],
        "place": ["a,b"],
    }
    for word in ("age", "=3", "age="):
        with pytest.raises(UserError, match="takes NAME=VALUE"):
            parse_conditions([word])
    frame()[["age", "sex"]].to_csv(tmp_path / "c.csv", index=False)
    (tmp_path / "c.json").write_text(json.dumps([{"age": int(a), "sex": s} for a, s in zip(AGE, SEX, strict=True)]))
    for name in ("c.csv", "c.json"):
        values = read_conditions(tmp_path / name)
        assert list(values["age"]) == AGE.tolist() and list(values["sex"]) == SEX.tolist()
    (tmp_path / "d.json").write_text("3")
    for name, message in (("d.json", "holds an object"), ("no.csv", "cannot be read"), ("c.doc", "is .csv")):
        with pytest.raises(UserError, match=message):
            read_conditions(tmp_path / name)
