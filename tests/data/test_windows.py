"""Windows cut from long recordings."""

import numpy as np
import pytest

import ncfast
from ncfast.data import load_dataset
from ncfast.data.windows import load_windows, windows_of

pandas = pytest.importorskip("pandas")


def recording(rows, channels=2, first=0):
    return (first + np.arange(rows))[:, None] + 1000.0 * np.arange(channels)


def starts(X):
    return X[:, 0, 0].tolist()


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (4, 1), (4, 3), (5, 5), (6, 10)])
def test_each_window_is_its_rows(window, stride):
    values = recording(50)
    made = windows_of(values, window, stride)
    for X, first, end in ((made.X_train, 0, 40), (made.X_test, 40, 50)):
        assert starts(X) == list(range(first, end - window + 1, stride))
        for each in X:
            at = int(each[0, 0])
            assert np.array_equal(each, values[at : at + window].T)
    assert made.notes[0].startswith(f"windows of {window} rows, one every {stride}: {len(made.X_train)} train and")


def test_a_recording_of_one_channel_without_a_test_split():
    made = windows_of(np.arange(10.0), 4, 2, test_share=0)
    assert made.X_train.shape == (4, 1, 4) and made.X_test is None


def frame(**columns):
    return pandas.DataFrame(columns)


X20 = np.arange(20.0)
HOURS = pandas.date_range("2020-01-01", periods=20, freq="h")


def test_a_table_has_a_time_and_recordings():
    site = ["a"] * 12 + ["b"] * 8
    table = frame(date=HOURS.astype(str), site=site, x=np.arange(20.0), y=np.arange(20) * 2)
    made = windows_of(table, 3, group_column="site", test_share=0.25)
    assert starts(made.X_train) == [*range(7), *range(12, 16)]  # rows 0 to 8 of a, 12 to 17 of b
    assert starts(made.X_test) == [9.0] and "of x, y" in made.notes[0]  # 9 to 11 of a; b has 2 left
    assert any("column date was taken for the time" in note for note in made.notes)
    shuffled = table.sample(frac=1, random_state=0)
    again = windows_of(shuffled, 3, group_column="site", test_share=0.25)
    assert sorted(map(bytes, again.X_train)) == sorted(map(bytes, made.X_train))
    assert any("sorted by date" in note for note in again.notes)


def test_a_number_of_the_row_is_no_channel():
    made = windows_of(pandas.DataFrame({"Unnamed: 0": range(20), "x": X20}), 3)
    assert made.n_channels == 1 and any("column Unnamed: 0 counts the rows" in note for note in made.notes)
    assert windows_of(pandas.DataFrame({"id": X20**2, "x": X20}), 3).n_channels == 2


def test_missing_values_and_uneven_steps_are_told():
    x = np.arange(20.0)
    x[5] = np.nan
    made = windows_of(frame(time=[*range(10), *range(20, 30)], x=x), 3, test_share=0)
    assert made.X_train.shape == (18, 1, 3) and np.isnan(made.X_train).sum() == 3 and made.lengths_train is None
    assert any("3 of 18 series have missing values, 5.6% of all" in note for note in made.notes)
    assert any("1 of 19 steps of time are not the usual one" in note for note in made.notes)
    x[6] = np.nan
    made = windows_of(frame(time=range(20), x=x), 3, test_share=0)
    assert len(made.X_train) == 16 and any("2 windows with less than half their values" in note for note in made.notes)


REFUSED = {
    "no window": ((X20, 0), {}, "--window and --stride are at least 1"),
    "no rows to train": ((X20, 17), {}, "no window of 17 rows .*longest recording has 20 rows.*lower --window"),
    "names for an array": ((X20, 3), {"time_column": "date"}, "an array has no columns"),
    "three axes": ((np.zeros((4, 3, 2)), 3), {}, r"a recording is \[T\] or \[T, C\]"),
    "a column that is not there": ((frame(x=X20), 3), {"group_column": "site"}, "--group-column site is none of"),
    "words": (
        (frame(x=X20, site=["a"] * 20), 3),
        {},
        "column site holds no numbers .'a'.; name it with --group",
    ),
    "two times": ((frame(a=HOURS, b=HOURS, x=X20), 3), {}, "a, b could all be the time; say which"),
    "no time": ((frame(a=["x"] * 20, x=X20), 3), {"time_column": "a"}, "row 0 of column a is no time"),
    "nothing left": ((frame(date=HOURS), 3), {}, "no column is left"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arguments, options, message = REFUSED[case]
    with pytest.raises(ncfast.UserError, match=message):
        windows_of(*arguments, **options)


TEXTS = {
    "a.csv": "date,x,y\n" + "".join(f"2020-01-{k + 1:02},{k},{1000 + k}\n" for k in range(20)),
    "a.tsv": "x\ty\n" + "".join(f"{k}\t{1000 + k}\n" for k in range(20)),
    "a.txt": "".join(f"{k};{1000 + k}\n" for k in range(20)),
}


@pytest.mark.parametrize("name", [*TEXTS, "a.npy", "a.parquet"])
def test_files(name, tmp_path):
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, recording(20))
    elif name == "a.parquet":
        pytest.importorskip("pyarrow")
        pandas.DataFrame(recording(20), columns=["x", "y"]).to_parquet(path)
    else:
        path.write_text(TEXTS[name])
    made = load_windows(path, 4, test_share=0.25)
    assert np.array_equal(made.X_train, windows_of(recording(20), 4, test_share=0.25).X_train)
    assert made.name == "a" and made.source == str(path)
    assert any("taken for a row" in note for note in made.notes) == (name == "a.txt")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"nothing")
    (tmp_path / "a.xyz").write_bytes(b"nothing")
    for name, message in (("b.csv", "does not exist"), ("a.npy", "cannot be read"), ("a.xyz", "--window takes a .csv")):
        with pytest.raises(ncfast.UserError, match=message):
            load_windows(tmp_path / name, 4)


def test_options_that_would_mean_nothing(tmp_path):
    (tmp_path / "a.csv").write_text(TEXTS["a.csv"])
    for options in ({"stride": 2}, {"group_column": "x"}, {"time_column": "date"}, {"test_share": 0.1}):
        with pytest.raises(ncfast.UserError, match="are for windows; add --window N"):
            load_dataset(tmp_path / "a.csv", **options)
    with pytest.raises(ncfast.UserError, match="--label-column x means nothing here"):
        load_dataset(tmp_path / "a.csv", window=4, label_column="x")
    for options in ({"stride": 2}, {"time_column": "date"}):
        with pytest.raises(ncfast.UserError, match="are for windows"):
            ncfast.fit(recording(20), **options)
    with pytest.raises(ncfast.UserError, match="leave out y"):
        ncfast.fit(recording(20), np.zeros(20), window=8)
