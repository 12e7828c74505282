"""Reading, checking and finding data sets: every format written here, every refusal by its words."""

import importlib.util
import os
import re
import sys
import time
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from ncfast.data import Dataset, from_arrays, load_dataset, sources
from ncfast.data.layout import Reading
from ncfast.data.stats import DataStats
from ncfast.errors import UserError

OWN = Path(os.environ.get("NCFAST_DATA") or Path(__file__).resolve().parents[2] / ".." / "shared" / "ucr")

needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon is not installed")


def own_file(name):
    path = OWN / name
    if not path.exists():
        pytest.skip(f"no {path}; set NCFAST_DATA to a folder with the UCR files")
    return path


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No data folder but those a test names, no aeon, no network."""
    for variable in ("NCFAST_DATA", "AEON_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sources, "has_aeon", lambda: False)
    monkeypatch.setattr(sources, "aeon_folders", lambda: [])
    monkeypatch.chdir(tmp_path)


def example(channels=1, n=6, length=10, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, channels, length)).astype(np.float32)
    return X, np.array(["2", "10", "-1"])[np.arange(n) % 3]


X, Y = example()
X2, Y2 = example(n=3, seed=1)


def same(data, X=X, y=(1, 2, 0) * 2, X_test=X2, y_test=(1, 2, 0), class_names=("-1", "2", "10")):
    assert isinstance(data, Dataset)
    assert data.X_train.dtype == np.float32 and data.X_train.flags.c_contiguous
    np.testing.assert_array_equal(data.X_train, X)
    assert data.class_names == class_names and data.n_classes == len(class_names)
    assert (data.n_channels, data.length) == X.shape[1:]
    if y is None:
        assert data.y_train is None
    else:
        assert data.y_train.dtype == np.int64 and data.y_train.tolist() == list(y)
    if X_test is None:
        assert data.X_test is None and data.y_test is None
    else:
        np.testing.assert_array_equal(data.X_test, X_test)
        assert data.y_test is None if y_test is None else data.y_test.tolist() == list(y_test)
    return True


def row(series, sep):
    return sep.join(repr(float(value)) for value in series)


def write_tsv(path, X, y):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{label}\t{row(x[0], chr(9))}\n" for x, label in zip(X, y, strict=True)))


def write_ts(path, X, y=None, header=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# a comment\n@problemName {path.stem}\n@univariate {str(X.shape[1] == 1).lower()}\n{header}"
    text += "@classLabel false\n" if y is None else f"@classLabel true {' '.join(sorted(set(y)))}\n"
    text += "@data\n"
    for i, x in enumerate(X):
        text += ":".join(row(channel, ",") for channel in x) + ("" if y is None else f":{y[i]}") + "\n"
    path.write_text(text)


def write_hdf5(path, attributes=(), **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs.update(dict(attributes))


def refused(*words):
    """The UserError is one line with all these words, in this order."""
    return pytest.raises(UserError, match=".*".join(words) + r"[^\n]*$")


# Formats


@pytest.mark.parametrize("given", ["M_TRAIN.tsv", "M_TEST.tsv", "M"])
def test_tsv(tmp_path, given):
    write_tsv(tmp_path / "M" / "M_TRAIN.tsv", X, [f"{float(y):.7e}" for y in Y])
    write_tsv(tmp_path / "M" / "M_TEST.tsv", X2, Y2)
    data = load_dataset(tmp_path / "M" / ("" if given == "M" else given))
    assert same(data)
    assert data.name == "M" and data.source.startswith(str(tmp_path / "M" / "M_T")) and data.notes == ()


@pytest.mark.parametrize("channels", [1, 3])
def test_ts(tmp_path, channels):
    X, Y = example(channels)
    X2, Y2 = example(channels, n=3, seed=1)
    write_ts(tmp_path / "M_TRAIN.ts", X, Y)
    write_ts(tmp_path / "M_TEST.ts", X2, Y2)
    assert same(load_dataset(tmp_path / "M_TRAIN.ts"), X=X, X_test=X2)


def test_ts_without_labels_or_test_split(tmp_path):
    write_ts(tmp_path / "M_TRAIN.ts", X)
    data = load_dataset(tmp_path / "M_TRAIN.ts")
    assert same(data, y=None, X_test=None, class_names=())
    assert len(data.notes) == 1 and "no test split" in data.notes[0] and "M_TEST.ts" in data.notes[0]


def test_ts_keeps_the_case_of_labels_and_leaves_out_regression_targets(tmp_path):
    write_ts(tmp_path / "a.ts", X, ["Walking", "Running"] * 3)
    assert load_dataset(tmp_path / "a.ts").class_names == ("Running", "Walking")
    write_ts(tmp_path / "b.ts", X, ["0.25", "0.5"] * 3, header="@targetLabel true\n")
    data = load_dataset(tmp_path / "b.ts")
    assert same(data, y=None, X_test=None, class_names=()) and "regression" in data.notes[0]


@pytest.mark.parametrize("suffix", [".h5", ".hdf5", ".npz"])
def test_hdf5_and_npz(tmp_path, suffix):
    path = tmp_path / f"M{suffix}"
    write = write_hdf5 if suffix != ".npz" else lambda path, **arrays: np.savez(path, **arrays)
    y, y2 = Y.astype(int), Y2.astype(int)
    write(path, X_train=X[:, 0], y_train=y, X_test=X2.astype(np.float64), y_test=y2.astype(float))
    assert same(load_dataset(path))
    write(path, x=X, y=y)
    assert same(load_dataset(path), X_test=None)
    write(path, X_train=X)
    assert same(load_dataset(path), y=None, X_test=None, class_names=())


def test_hdf5_attributes(tmp_path):
    codes = {"y_train": [1, 2, 0] * 2, "y_test": [1, 2, 0]}
    for names in ([-1, 2, 10], ["-1", "2", "10"]):
        write_hdf5(tmp_path / "M.h5", {"original_labels": names}, X_train=X, X_test=X2, **codes)
        assert same(load_dataset(tmp_path / "M.h5"))
    attributes = {"complete": False, "deviation": "train has 6 of 60 rows\nlost"}
    write_hdf5(tmp_path / "M.h5", attributes, X_train=X, y_train=["b", "a"] * 3)
    data = load_dataset(tmp_path / "M.h5")
    assert data.class_names == ("a", "b") and data.y_train.tolist() == [1, 0] * 3
    assert data.notes == (f"{tmp_path / 'M.h5'} is incomplete: train has 6 of 60 rows lost",)


def test_npy(tmp_path):
    np.save(tmp_path / "M.npy", X)
    assert same(load_dataset(tmp_path / "M.npy"), y=None, X_test=None, class_names=())
    for beside in ("M_y.npy", "M_labels.npy"):
        np.save(tmp_path / beside, Y)
        assert same(load_dataset(tmp_path / "M.npy"), X_test=None)
        (tmp_path / beside).unlink()


def test_csv(tmp_path):
    path = tmp_path / "M.csv"
    values = [row(x[0], ",") for x in X]
    path.write_text("\n".join(values))
    assert same(load_dataset(path), y=None, X_test=None, class_names=())
    names = ",".join(f"t{i}" for i in range(10))
    path.write_text("\n".join([names, *values]))
    assert same(load_dataset(path), y=None, X_test=None, class_names=())
    for column in ("label", "Class", "TARGET", "y"):
        path.write_text("\n".join([f"{names},{column}", *(f"{v},{y}" for v, y in zip(values, Y, strict=True))]))
        assert same(load_dataset(path), X_test=None)
    path.write_text("\n".join([f'"class",{names}', *(f'"{y}",{v}' for v, y in zip(values, Y, strict=True))]))
    assert same(load_dataset(path), X_test=None)


def test_csv_as_pandas_writes_it(tmp_path):
    path = tmp_path / "M.csv"
    values = [row(x[0], ",") for x in X]
    counted = ",".join(map(str, range(10)))
    path.write_text("\n".join([counted, *values]))
    assert same(load_dataset(path), y=None, X_test=None, class_names=())
    path.write_text("\n".join([f",{counted},label", *(f"{i},{v},{Y[i]}" for i, v in enumerate(values))]))
    data = load_dataset(path)
    assert same(data, X_test=None) and "row index" in data.notes[0]


def test_large_tsv_is_read_fast(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1000, 1, 500)).astype(np.float32)
    write_tsv(tmp_path / "M.tsv", X, ["1", "2"] * 500)
    assert (tmp_path / "M.tsv").stat().st_size > 9e6
    start = time.process_time()
    data = load_dataset(tmp_path / "M.tsv")
    assert time.process_time() - start < 3  # it takes 0.2 s
    np.testing.assert_array_equal(data.X_train, X)


# Arrays


def test_from_arrays():
    for series in (X, X[:, 0], X.tolist(), torch.from_numpy(X), [torch.from_numpy(x) for x in X], list(X)):
        assert same(from_arrays(series, Y, X2, Y2))
    assert same(from_arrays(X), y=None, X_test=None, class_names=())
    assert same(from_arrays(X, Y, X2), y_test=None)
    assert from_arrays(X, Y, name="mine").name == "mine"


def test_labels_of_any_type():
    for y in (Y.astype(int), Y.astype(float), Y.astype("S"), Y.astype(object), Y[:, None], torch.tensor(Y.astype(int))):
        assert same(from_arrays(X, y), X_test=None)
    assert from_arrays(X, list("cabcab")).class_names == ("a", "b", "c")
    assert from_arrays(X, [7] * 6).class_names == ("7",)


def test_values_keep_their_units():
    data = from_arrays(X.astype(np.float64) * 1e3 + 5)
    np.testing.assert_array_equal(data.X_train, (X.astype(np.float64) * 1e3 + 5).astype(np.float32))
    assert from_arrays((X * 100).astype(np.int16)).X_train.dtype == np.float32


def broken(value, dtype=np.float64):
    X_bad = X.astype(dtype)
    X_bad[2, 0, 4] = X_bad[5, 0, 1] = value
    return X_bad


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            (np.where(np.arange(6)[:, None, None] == 3, np.nan, X),),
            ("X: 1 of 6 series hold nothing but NaN.* series 3",),
        ),
        ((np.concatenate([X, X * np.nan], 1),), ("X: channel 1 has no value in any training series",)),
        ((X, None, np.full_like(X, np.nan)), ("X_test: 6 of 6 series hold nothing but NaN",)),
        ((X, None, broken(-np.inf)), ("X_test: 2 of 6 series hold an infinity", "series 2 at time point 4")),
        ((broken(1e39),), ("2 of 6 series hold a value beyond float32", "rescale")),
        ((X[:0],), ("X: no series", "0 of 1 channel x 10 time points")),
        ((X[0, 0],), ("X: series are", r"got the shape \[10\]")),
        ((X[None],), ("X: series are", r"got the shape \[1, 6, 1, 10\]")),
        ((X.astype(complex),), ("X: series are real numbers; got complex128",)),
        ((X.astype(object),), ("X: series are real numbers; got object",)),
        ((np.ones((4, 9)),), ("X: every value is 1;", "constant")),
        ((X, Y[:5]), ("X: 6 series need 6 labels", r"shape \[5\]")),
        ((X, np.eye(6)), ("X: 6 series need 6 labels", r"shape \[6, 6\]")),
        ((X, [0.5, 1, 2, 3, 4, 5]), ("X: labels are classes", "got 0.5", "regression")),
        ((X, [1, 2, 3, 4, 5, np.nan]), (r"X: label 5 \(counted from 0\) is missing",)),
        ((X, ["a", "b", "c", None, "", "a"]), (r"X: label 3 \(counted from 0\) is missing",)),
        ((X, Y, X2[:, :, :9], Y2), ("X_test: the test series are 1 channel x 9", "training series 1 channel x 10")),
        ((X, Y, example(2)[0], Y), ("X_test: the test series are 2 channels x 10", "training series 1 channel x 10")),
        ((X, None, X2, Y2), ("X_test: the test series have labels and the training series have none",)),
        ((X, Y, None, Y2), ("y_test was given without X_test",)),
    ],
)
def test_refused_arrays(arrays, words):
    with refused(*words):
        from_arrays(*arrays)


def test_one_constant_channel_is_noted():
    both = np.concatenate([X, np.ones_like(X)], axis=1)
    assert "channel 1 is constant" in from_arrays(both).notes[0]


# Refused files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.tsv", "1\t2\t3\n\n2\t4\tx5\n", ("a.tsv: line 3, column 3: 'x5' is not a number",)),
        ("a.csv", "1.5,2.5,7\n2.5,4\n", ("a.csv: lines of 2 to 3 cells", "read from .tsv with the label first")),
        ("a.tsv", "1,2,3\n", ("a.tsv: line 1 has no tab",)),
        ("a.tsv", "0.5\t2\t3\n1\t4\t5\n", ("a.tsv: labels are classes", "got 0.5")),
        ("a.tsv", "", ("a.tsv: no series",)),
        ("a.csv", "1,2\n3,4\n5,six\n", ("a.csv: line 3, column 2: 'six' is not a number",)),
        ("a.csv", "t,label\n1,a\n2\n", ("a.csv: line 3 has 1 cells and the header 2",)),
        ("a.csv", "y,label,t\n1,a,3\n", ("a.csv: line 1 names 2 label columns", "y, label")),
        ("a.ts", "1,2,3:1\n", ("a.ts: no @data line",)),
        ("a.ts", "@timeStamps true\n@data\n(0,1),(1,2):1\n", ("a.ts: series with time stamps",)),
        ("a.ts", "@classLabel true 1\n@data\n1,2,3\n", ("a.ts: line 3 has no ':' before a label",)),
        ("a.ts", "@data\n1,2:3,4:a\n1,2:a\n", ("a.ts: line 3 has 1 channels and the first series 2",)),
        (
            "a.ts",
            "@equalLength true\n@seriesLength 3\n@data\n1,2,3:a\n1,2:b\n",
            ("says @seriesLength 3.* have 2 or 3",),
        ),
        ("a.doc", "1 2 3", ("a.doc: unsupported file type '.doc'", ".h5, .hdf5, .npz, .npy, .ts, .tsv, .csv, .txt")),
        ("a_TEST.tsv", "1\t2\t3\n", ("a_TEST.tsv: this is a test split", "a_TRAIN.tsv")),
        ("a.h5", "no HDF5", ("a.h5: cannot be read", "damaged or incomplete")),
        ("a.npy", "no NumPy", ("a.npy: ", "no NumPy file")),
        ("a.npz", "", ("a.npz: cannot be read", "damaged or incomplete")),
    ],
)
def test_refused_text(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with refused(*words):
        load_dataset(tmp_path / name)


def test_refused_binaries(tmp_path):
    path = tmp_path / "M.h5"
    write_hdf5(path, X_train=np.random.default_rng(0).standard_normal((200, 100)))
    path.write_bytes(path.read_bytes()[:60_000])
    with refused("M.h5: cannot be read", "damaged or incomplete"):
        load_dataset(path)
    write_hdf5(path, series=X, labels=[1])
    with refused("M.h5: expected the arrays X_train, y_train, X_test, y_test", "found labels, series"):
        load_dataset(path)
    write_hdf5(path, {"original_labels": [1, 2]}, X_train=X, y_train=[1, 2] * 3)
    with refused("M.h5: X_train: the file names 2 classes, so labels are 0 .. 1; got 1 .. 2"):
        load_dataset(path)
    np.savez(tmp_path / "M.npz", X_train=X)
    (tmp_path / "M.npz").write_bytes((tmp_path / "M.npz").read_bytes()[:-40])
    with refused("M.npz: cannot be read", "damaged or incomplete"):
        load_dataset(tmp_path / "M.npz")
    np.savez(tmp_path / "M.npz", X_train=np.array([X[0], None], dtype=object))
    with refused("M.npz: holds Python objects"):
        load_dataset(tmp_path / "M.npz")
    np.save(tmp_path / "M.npy", np.array([X[0], None], dtype=object))
    with refused("M.npy: holds Python objects"):
        load_dataset(tmp_path / "M.npy")
    np.save(tmp_path / "M.npy", X)
    (tmp_path / "M.npy").write_bytes((tmp_path / "M.npy").read_bytes()[:-40])
    with refused("M.npy: cannot be read", "damaged or incomplete"):
        load_dataset(tmp_path / "M.npy")
    (tmp_path / "M.tsv").write_bytes(b"1\t2\t\xff\xfe")
    with refused("M.tsv: not a text file"):
        load_dataset(tmp_path / "M.tsv")


# What each holds: X_train, lengths_train and words of the notes.
NAN = np.nan
GAPPY = {
    "missing": (broken(NAN), broken(NAN), None, "X: 2 of 6 series have missing values, 3.3% of all"),
    "None": ([[1, None, 3], [4, 5, 6]], [[1, NAN, 3], [4, 5, 6]], None, "X: 1 of 2 series have missing values, 16.7%"),
    "None, unequal": ([[1, None, 3], [4, 5]], [[1, NAN, 3], [4, 5, NAN]], [3, 2], "1 of 2 .*, 20.0% of all"),
    "missing, also at an end": ([[NAN, 2, NAN], [1, 5, NAN]], [[NAN, 2, NAN], [1, 5, NAN]], None, "2 of 2 series"),
    "padded": ([[1, 2, NAN], [1, 5, 4]], [[1, 2, NAN], [1, 5, 4]], [2, 3], "2 to 3 time points (NaN at the end"),
    "a list": ([[1, 2], [1, 5, 4]], [[1, 2, NAN], [1, 5, 4]], [2, 3], "X: series of 2 to 3 time points: each is"),
    "a list with gaps": ([[NAN, 2], [1, NAN, 4]], [[NAN, 2, NAN], [1, NAN, 4]], [2, 3], "2 of 2 .*, 40.0% of all"),
    "padding of all": ([[1, 2, NAN], [1, 5, NAN]], [[1, 2], [1, 5]], None, ""),
    "a.tsv": ("1\t2\t3\n2\t\t3\n", [[2, 3], [NAN, 3]], None, "a.tsv: 1 of 2 series have missing values, 25.0%"),
    "b.tsv": ("1\t2\t3\n2\t4\n", [[2, 3], [4, NAN]], [2, 1], "b.tsv: series of 1 to 2 time points (NaN at the end"),
    "c.tsv": ("1\t2\tNaN\t4\n", [[2, NAN, 4]], None, "1 of 1 series have missing values, 33.3%"),
    "a.ts": ("@data\n1,?,3:a\n", [[1, NAN, 3]], None, "1 of 1 series"),
    "b.ts": ("@data\n1,2:a\n1,?,4:b\n", [[1, 2, NAN], [1, NAN, 4]], [2, 3], "2 to 3 time points: each .*20.0% of all"),
}


@pytest.mark.parametrize("name", GAPPY)
def test_missing_values_and_unequal_lengths(name, tmp_path):
    given, x, lengths, words = GAPPY[name]
    if isinstance(given, str):
        (tmp_path / name).write_text(given)
        data = load_dataset(tmp_path / name)
    else:
        data = from_arrays(given)
    np.testing.assert_array_equal(data.X_train, np.float32(x).reshape(len(x), 1, -1))
    assert (None if data.lengths_train is None else data.lengths_train.tolist()) == lengths
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), " ".join(data.notes))


def test_splits_of_unequal_lengths_share_the_longest():
    data = from_arrays([[1, 2], [1, 5, 4]], None, [[1, 2, 3, 4], [4]])
    np.testing.assert_array_equal(data.X_train[:, 0], [[1, 2, NAN, NAN], [1, 5, 4, NAN]])
    np.testing.assert_array_equal(data.X_test[:, 0], [[1, 2, 3, 4], [4, NAN, NAN, NAN]])
    assert data.lengths_test.tolist() == [4, 1]
    facts = DataStats.of(data)
    assert facts.length == 4 and facts.shortest == 2 and facts.missing == 0
    assert facts.mean == (2.6,) and facts.std == pytest.approx((np.std([1, 2, 1, 5, 4]),))


def test_where_only_test_series_are_shorter_training_ones_have_one_length():
    data = from_arrays([[1, 2, 3], [1, 5, 4]], None, [[1, 2], [4, 5, 6]])
    assert data.lengths_train is None and data.lengths_test.tolist() == [2, 3]
    assert data.notes == ("X_test: series of 2 to 3 time points: all of X have 3, and so have generated ones",)
    padded = np.where(np.arange(30) < 25, np.arange(30.0), NAN)
    data = from_arrays(np.arange(60.0).reshape(2, 1, 30), None, padded[None, None])
    assert data.lengths_train is None and data.lengths_test.tolist() == [25] and "NaN at the end" in data.notes[0]


def test_options_that_mean_nothing_for_a_list_are_refused():
    series = [np.arange(5.0), np.arange(7.0)]
    for option in ({"label_column": 0}, {"index_column": 0}):
        with pytest.raises(UserError, match="X: --.* 0 means nothing here; leave it out"):
            from_arrays(series, reading=Reading(**option))


def test_time_first_of_a_list_and_of_an_array_beside_it():
    """Training series as a list, test series as an array, both [time, channels]."""
    train = [np.arange(12.0).reshape(6, 2), np.arange(16.0).reshape(8, 2)]
    data = from_arrays(train, None, np.ones((3, 8, 2)), reading=Reading(layout="ntd"))
    assert data.X_train.shape == (2, 2, 8) and data.X_test.shape == (3, 2, 8)


@pytest.mark.filterwarnings("error")
def test_half_precision_with_gaps():
    x = np.array([[1, NAN, 60000], [-60000, 5, 6]], np.float16)
    np.testing.assert_array_equal(from_arrays(x).X_train[:, 0], x.astype(np.float32))


def test_an_array_of_lengths_is_no_labels(tmp_path):
    np.savez(tmp_path / "a.npz", X=[[1, 2, NAN], [1, 5, 4]], length=[2, 3])
    data = load_dataset(tmp_path / "a.npz")
    assert data.y_train is None and data.lengths_train.tolist() == [2, 3]
    assert any("left unread: length" in note for note in data.notes)


def test_unequal_lengths_point_at_the_equal_variant(tmp_path):
    (tmp_path / "M_TRAIN.ts").write_text("@data\n1,2,3:a\n1,2:b\n")
    write_ts(tmp_path / "M_eq_TRAIN.ts", X, Y)
    assert "M_eq, which is beside it, has one length" in " ".join(load_dataset(tmp_path / "M_TRAIN.ts").notes)
    assert same(load_dataset("M_eq", tmp_path), X_test=None)


# Names


def put(folder, n):
    """A data set of n series in `folder`: n tells where it was found."""
    write_hdf5(folder / "Mine.h5", X_train=example(n=n)[0])


def test_order_of_the_folders(alone, monkeypatch, tmp_path):
    folders = [tmp_path / name for name in ("given", "own", "aeon", "home/aeon_data", "bundled")]
    for n, folder in enumerate(folders, 3):
        put(folder, n)
    monkeypatch.setenv("NCFAST_DATA", str(folders[1]))
    monkeypatch.setenv("AEON_DATA", str(folders[2]))
    monkeypatch.setattr(sources, "aeon_folders", lambda: [folders[4]])
    for n, folder in enumerate(folders, 3):
        data = load_dataset("Mine", folders[0])
        assert len(data.X_train) == n and data.source == str(folder / "Mine.h5")
        (folder / "Mine.h5").unlink()


@pytest.mark.parametrize(
    "place",
    [
        "Mine.h5",
        "Mine.hdf5",
        "Mine.npz",
        "Mine.npy",
        "Mine_TRAIN.tsv",
        "Mine/Mine_TRAIN.ts",
        "Mine/Mine.npz",
        "UCRArchive_2018/Mine/Mine_TRAIN.tsv",
    ],
)
@pytest.mark.parametrize("name", ["Mine", "mine"])
def test_places_in_a_folder(alone, tmp_path, place, name):
    path = tmp_path / "data" / place
    path.parent.mkdir(parents=True)
    if path.suffix in (".tsv", ".ts"):
        (write_tsv if path.suffix == ".tsv" else write_ts)(path, X, Y)
    elif path.suffix == ".npy":
        np.save(path, X)
    elif path.suffix == ".npz":
        np.savez(path, X=X)
    else:
        write_hdf5(path, X=X)
    data = load_dataset(name, tmp_path / "data")
    np.testing.assert_array_equal(data.X_train, X)
    assert data.name == "Mine" and data.source == str(path)


def test_the_exact_case_wins(alone, tmp_path):
    write_hdf5(tmp_path / "MINE.h5", X=X)
    write_hdf5(tmp_path / "mine.h5", X=X2)
    assert len(load_dataset("mine", tmp_path).X_train) == 3
    assert len(load_dataset("MINE", tmp_path).X_train) == 6


def test_a_folder_here_is_a_data_set_only_if_it_holds_one(alone, tmp_path):
    (tmp_path / "Mine").mkdir()
    put(tmp_path / "data", 4)
    assert len(load_dataset("Mine", tmp_path / "data").X_train) == 4
    write_tsv(tmp_path / "Mine" / "other_TRAIN.tsv", X, Y)
    assert load_dataset("Mine", tmp_path / "data").name == "other"


def test_not_found(alone, monkeypatch, tmp_path):
    put(tmp_path, 4)
    words = ("no data set 'Minx'", r"did you mean Mine\?", "looked in", str(tmp_path), r"aeon_data \(missing\)")
    with refused(
        *words, r"put Minx.h5 \(X_train, y_train, X_test, y_test\) or Minx/Minx_TRAIN.tsv into", "pip install"
    ):
        load_dataset("Minx", tmp_path)
    with refused("no data set 'Minx'", r"data folder or \$NCFAST_DATA, or pip install 'ncfast\[data\]'"):
        load_dataset("Minx")
    with refused("the data folder '.*nowhere' does not exist"):
        load_dataset("Mine", tmp_path / "nowhere")
    with refused("no file or folder '.*Minx.h5'", r"did you mean Mine.h5\?"):
        load_dataset(tmp_path / "Minx.h5")
    with refused("no file or folder 'Minx.h5'"):
        load_dataset("Minx.h5")
    with refused("name of the data set is empty"):
        load_dataset(" ")


def test_a_folder_of_several_or_none(alone, tmp_path):
    put(tmp_path / "several", 3)
    write_tsv(tmp_path / "several" / "Yours" / "Yours_TRAIN.tsv", X, Y)
    write_tsv(tmp_path / "several" / "Theirs_TRAIN.tsv", X, Y)
    with refused("several: expected a folder that holds one", "found several: Mine, Theirs, Yours; name one"):
        load_dataset(f"{tmp_path}/several")
    (tmp_path / "none").mkdir()
    with refused("none: expected a folder that holds one", "found none"):
        load_dataset(f"{tmp_path}/none")


# aeon


@pytest.fixture
def fake_aeon(alone, monkeypatch, tmp_path):
    """aeon's two functions that a download uses; `calls` records, `fail` is raised half-way."""
    state = types.SimpleNamespace(calls=[], fail=None, cache=tmp_path / "cache")

    def load_classification(name, split, extract_path):
        state.calls.append(name)
        write_ts(Path(extract_path) / name / f"{name}_TRAIN.ts", X, Y)
        if state.fail:
            raise state.fail
        write_ts(Path(extract_path) / name / f"{name}_TEST.ts", X2, Y2)

    datasets = types.ModuleType("aeon.datasets")
    datasets.load_classification = load_classification
    names = types.ModuleType("aeon.datasets.tsc_datasets")
    names.tsc_zenodo = {"FordA": 1, "FordB": 2, "GunPoint": 3}
    monkeypatch.setitem(sys.modules, "aeon", types.ModuleType("aeon"))
    monkeypatch.setitem(sys.modules, "aeon.datasets", datasets)
    monkeypatch.setitem(sys.modules, "aeon.datasets.tsc_datasets", names)
    monkeypatch.setattr(sources, "has_aeon", lambda: True)
    monkeypatch.setenv("AEON_DATA", str(state.cache))
    return state


def test_download(fake_aeon):
    data = load_dataset("forda")
    assert same(data) and data.name == "FordA"
    assert data.source == str(fake_aeon.cache / "FordA" / "FordA_TRAIN.ts")
    load_dataset("FordA")
    assert fake_aeon.calls == ["FordA"]  # the second time it is there


def test_a_failed_download_is_one_line_and_leaves_nothing(fake_aeon):
    fake_aeon.fail = ValueError("Could not download\nfrom Zenodo")
    with refused(
        "no data set 'FordA', and downloading it failed", "Could not download from Zenodo", "looked in", "put"
    ):
        load_dataset("FordA")
    assert list(fake_aeon.cache.iterdir()) == []


def test_a_name_that_aeon_does_not_list_is_not_downloaded(fake_aeon):
    with refused("no data set 'FordC'", "did you mean Ford", "aeon's list of UCR/UEA sets"):
        load_dataset("FordC")
    assert fake_aeon.calls == []


@needs_aeon
@pytest.mark.parametrize(
    ("name", "shape", "n_test", "classes"),
    [
        ("GunPoint", (50, 1, 150), 150, ("1", "2")),
        ("OSULeaf", (200, 1, 427), 242, tuple("123456")),
        ("BasicMotions", (40, 6, 100), 40, ("Badminton", "Running", "Standing", "Walking")),
        ("JapaneseVowels_eq", (270, 12, 25), 370, tuple("123456789")),
    ],
)
def test_bundled_sets(monkeypatch, tmp_path, name, shape, n_test, classes):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NCFAST_DATA", raising=False)
    monkeypatch.delenv("AEON_DATA", raising=False)
    data = load_dataset(name)
    assert data.X_train.shape == shape and data.X_test.shape == (n_test, *shape[1:])
    assert data.class_names == classes and set(data.y_train.tolist()) == set(range(len(classes)))


@needs_aeon
@pytest.mark.parametrize(
    ("name", "shape", "shortest"),
    [("JapaneseVowels", (270, 12, 29), 7), ("PickupGestureWiimoteZ", (50, 1, 361), 29)],
)
def test_bundled_sets_of_unequal_length(name, shape, shortest, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = load_dataset(name, tmp_path)
    assert data.X_train.shape == shape and data.lengths_train.min() == shortest
    # Each ends with a value and has none behind it.
    last = data.lengths_train - 1
    assert not np.isnan(data.X_train[np.arange(len(last)), 0, last]).any()
    assert np.isnan(data.X_train[:, 0]).sum() == (shape[2] - data.lengths_train).sum()


# Real files


def test_incomplete_forda_is_used_with_a_note():
    own_file("FordA.h5")
    data = load_dataset("FordA", OWN)
    assert data.X_train.shape == (577, 1, 500) and data.class_names == ("-1", "1")
    if len(data.X_train) < 3601:
        assert len(data.notes) == 1 and "577 of 3601" in data.notes[0] and "\n" not in data.notes[0]


@pytest.mark.parametrize("name", ["GunPoint", "SyntheticControl"])
def test_the_archive_equals_the_hdf5_file(name):
    binary, text = load_dataset(own_file(f"{name}.h5")), load_dataset(own_file(f"UCRArchive_2018/{name}"))
    for field in ("X_train", "y_train", "X_test", "y_test"):
        np.testing.assert_array_equal(getattr(binary, field), getattr(text, field))
    assert binary.class_names == text.class_names and binary.name == text.name == name


@needs_aeon
def test_aeon_gunpoint_equals_the_archive(monkeypatch, tmp_path):
    archive = load_dataset(own_file("UCRArchive_2018/GunPoint"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NCFAST_DATA", raising=False)
    bundled = load_dataset("GunPoint")
    assert "aeon" in bundled.source
    np.testing.assert_allclose(bundled.X_train, archive.X_train, atol=1e-5)
    np.testing.assert_array_equal(bundled.y_test, archive.y_test)
