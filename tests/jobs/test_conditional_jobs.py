"""Conditions in files of generated series: written, read back, continued, exported."""

import json

import numpy as np
import pytest
from runs import SMALL, generated_file, waves

import ncfast

pandas = pytest.importorskip("pandas")
X, Y = waves(40, 21)
RNG = np.random.default_rng(0)
KNOWN = {"age": RNG.integers(20, 80, 40), "sex": RNG.choice(["f", "m"], 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "people"
    with pytest.warns(UserWarning, match="condition"):
        ncfast.fit(
            X, Y, conditions=KNOWN, out=folder, quiet=True, stage1_steps=1, stage2_steps=1, decoding_steps=3, **SMALL
        )
    return folder


@pytest.fixture
def written(run, tmp_path):
    return lambda name, *more: generated_file(run, tmp_path / name, *more)


def test_a_file_holds_what_sample_returns(run, written):
    model = ncfast.load(run, device="cpu")
    x, y = model.sample(150, seed=2)
    values = model.sample_conditions(150, seed=2)
    for more in ([], ["--num-shards", 3, "--overwrite"]):
        data = written("x.h5", *more)
        assert data.conditions.shape == (150, 2) and [c.name for c in data.condition_columns] == ["age", "sex"]
        assert np.array_equal(data.x[:], x) and data.labels().tolist() == y.tolist()
        read = data.condition_values()
        assert read["age"].tolist() == values["age"].tolist() and read["sex"].tolist() == values["sex"].tolist()
        assert data.condition_values(7)["age"].tolist() == [values["age"][7]]
        data.verify(redraw=3)


def test_what_was_given_is_in_the_file_and_draws_the_same_again(run, written, tmp_path):
    ages = [20, 30, 45, 70, 33, 21, 59]
    pandas.DataFrame({"age": ages}).to_csv(tmp_path / "ages.csv", index=False)
    data = written("x.h5", "--condition-file", tmp_path / "ages.csv", "--condition", "sex=f", "--num-shards", 3)
    values = data.condition_values()
    assert values["age"].tolist() == [ages[i % 7] for i in range(150)] and {*values["sex"]} == {"f"}
    assert json.loads(data.attributes["condition"]) == {"age": ages, "sex": 0.0}
    data.verify(redraw=3)
    shard = ncfast.open_generated(data.shards[1])
    shard.verify(redraw=3)
    again = ncfast.load(run, device="cpu").sample(150, seed=2, condition={"age": ages, "sex": "f"})[0]
    assert np.array_equal(data.x[:], again)


def test_another_condition_is_another_job(written):
    written("x.h5", "--condition", "age=63", "sex=f", "--num-shards", 2)
    written("x.h5", "--condition", "age=63,sex=f", "--num-shards", 2)  # goes on
    for more in (["--condition", "age=64", "sex=f"], ["--condition", "age=63"], []):
        with pytest.raises(ncfast.UserError, match="is of another job"):
            written("x.h5", "--num-shards", 2, *more)
    with pytest.raises(ncfast.UserError, match="condition is"):
        written("x.h5", "--num-shards", 2)
    with pytest.raises(ncfast.UserError, match="no condition 'ag'"):
        written("y.h5", "--condition", "ag=64")


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet"])
def test_exports_carry_them_and_are_read_back(written, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    data = written(f"x.{kind}")
    again = ncfast.data.load_dataset(tmp_path / f"x.{kind}", condition_columns="age,sex")
    np.testing.assert_array_equal(again.X_train, data.x[:])
    assert again.conditions_train.tolist() == data.conditions[:].tolist()
    assert again.class_names == data.class_names


def test_tsv_cannot_carry_them(written):
    with pytest.raises(ncfast.UserError, match="tsv has no names of columns"):
        written("x.tsv")
