"""Data as users have them: read right, or refused in one line that names the option that settles it."""

import h5py
import numpy as np
import pytest
from runs import SMALL

from ncfast import fit, train
from ncfast.data import from_arrays, load_dataset
from ncfast.data.layout import Reading
from ncfast.errors import UserError

pd = pytest.importorskip("pandas")

RNG = np.random.default_rng(0)
N, L = 10, 12
# Smooth, as series are, and written with few digits, as people do.
X = np.round(np.cumsum(RNG.standard_normal((N, L)), axis=1), 4)
Y = np.array([1, 2, 3, 1, 2, 3, 1, 2, 3, 1])
NAMES = np.array(["walk", "run", "none"])[Y - 1]
MISSING_WORDS = np.array(["NA", "None", "null"])[Y - 1]
T = [f"t{i}" for i in range(L)]
CHANNELS = np.round(np.cumsum(RNG.standard_normal((N, 9, 128)), axis=2) + 30 * RNG.standard_normal((N, 9, 1)), 4)
UNEQUAL = CHANNELS[:2].copy()
UNEQUAL[1, :, 100:] = np.nan
GAPS = np.where(X > 3, np.nan, X)
LONG = np.round(np.cumsum(RNG.standard_normal((500, 28)), axis=0) + 10 * np.arange(28), 4)

NOISE = np.round(RNG.standard_normal((99, 9)), 3)


def text(folder, name, rows, header=None, sep=",", decimal="."):
    lines = ([sep.join(header)] if header else []) + [sep.join(map(cell, row)) for row in rows]
    (folder / name).write_text("\n".join(lines).replace(".", decimal) + "\n")
    return folder / name


def cell(value):
    return value if isinstance(value, str) else f"{value:.10g}"


def rows(*columns):
    """Columns and matrices side by side."""
    parts = [np.asarray(c, object).reshape(len(c), -1) for c in columns]
    return np.concatenate(parts, axis=1).tolist()


def without(row, column):
    """X with a gap."""
    x = X.copy()
    x[row, column] = np.nan
    return x


def check(data, x=X, y=Y):
    x = x if x.ndim == 3 else x[:, None]
    np.testing.assert_array_equal(data.X_train, x.astype(np.float32))
    found = None if data.y_train is None else [data.class_names[i] for i in data.y_train]
    assert found == (None if y is None else [str(label) for label in y])


# What the file holds, options, and either (series, labels, a word of the notes) or words of the refusal.
TABLES = {
    "label first": (rows(Y, X), None, {}, (X, Y, "taken for the labels")),
    "label last": (rows(X, Y), None, {}, (X, Y, "taken for the labels")),
    "text label first": (rows(NAMES, X), None, {}, (X, NAMES, "taken for the labels")),
    "text label last": (rows(X, NAMES), None, {}, (X, NAMES, "taken for the labels")),
    "kept as a sample": (rows(Y, X), None, {"label_column": "none"}, (np.c_[Y, X], None, "")),
    "by its place": (rows(X[:, :3], Y, X[:, 3:]), None, {"label_column": 3}, (X, Y, "")),
    "from the end": (rows(X, Y), None, {"label_column": -1}, (X, Y, "")),
    "both ends": (rows(Y, X, Y[::-1]), None, {}, "--label-column"),
    "whole numbers": (rows(Y, np.round(X) % 3), None, {}, "--label-column 0"),
    "whole samples": (rows(np.round(100 * X)), None, {}, (np.round(100 * X), None, "")),
    "one class": (rows(0 * Y, X), None, {}, "--label-column 0"),
    "ends alike": (rows(0 * Y, 0 * Y, X), None, {}, (np.c_[0 * Y, 0 * Y, X], None, "")),
    **{
        f"header {name}": (rows(X, Y), [*T, name], {}, (X, Y, "taken for the labels"))
        for name in ("labels", "class_label", "activity", "category", "target_class", "classLabel", "Target", "y")
    },
    "unknown text": (rows(X, NAMES), [*T, "gesture"], {}, (X, NAMES, "taken for the labels")),
    "unknown number": (rows(X, Y), [*T, "gesture"], {}, (X, Y, "gesture, whole numbers (1, 2, 3)")),
    "unknown samples": (rows(X, X[:, 0]), [*T, "age"], {}, "--label-column age.*--index-column age"),
    "unknown named": (rows(X, Y), [*T, "gesture"], {"label_column": "gesture"}, (X, Y, "")),
    "two text columns": (rows(NAMES, X, NAMES), ["a", *T, "b"], {}, "--label-column"),
    "file names": (rows([f"s{i}" for i in range(N)], X), ["what", *T], {}, "--index-column what"),
    "pandas of an array": (rows(Y, X), list(map(str, range(L + 1))), {}, (X, Y, "evenly spaced")),
    "named samples": (rows(Y, X), [f"t{i}" for i in range(L + 1)], {}, "--label-column t0"),
    "R": (rows(Y, X), [f"V{i}" for i in range(1, L + 2)], {}, (X, Y, "V1, whole numbers")),
    # Headers.
    "first cell empty": (rows(["", *X[1:, 0].astype(str)], X[:, 1:]), None, {},
                         (without(0, 0), None, "1 of 10 series")),
    "first row NA": (rows(X[:, :1], ["NA", *X[1:, 1].astype(str)], X[:, 2:]), None, {},
                     (without(0, 1), None, "1 of 10 series have missing values, 0.8%")),
    "first row ?": (rows(X[:, :-1], ["?", *X[1:, -1].astype(str)]), None, {},
                    (without(0, -1), None, "11 to 12 time points (NaN at the end of a series was")),
    "time axis": (rows(X), [f"{i / 100:g}" for i in range(L)], {}, (X, None, "evenly spaced")),
    "years and label": (rows(X, Y), [*map(str, range(2001, 2001 + L)), "label"], {}, (X, Y, "'label'")),
    "uneven times": (rows(X), [f"{1.5**i:g}" for i in range(L)], {}, "--header yes or --header no"),
    "uneven, yes": (rows(X), [f"{1.5**i:g}" for i in range(L)], {"header": "yes"}, (X, None, "")),
    "ramps": (rows([np.arange(L) * (i + 1.5) for i in range(N)]), None, {}, "--header"),
    "axis, no": ([list(range(L)), *X[1:].tolist()], None, {"header": "no"}, (np.vstack([range(L), X[1:]]), None, "")),
    "typo": ([["x5", *X[0, 1:]], *X[1:].tolist()], None, {}, "--header yes or --header no"),
    "typo below": ([*X[1:].tolist(), ["x5", *X[0, 1:]]], None, {}, "column 1: 'x5' is not a number"),
    **{
        f"index {name}": (rows(range(N), X), [name, *T], {}, (X, None, "row index"))
        for name in ("id", "index", "time", "sample_id", "Unnamed: 0", "", "Id", "series_id")
    },
    "index and label": (rows(range(N), Y, X), ["id", "label", *T], {}, (X, Y, "row index")),
    "index, no header": (rows(range(N), X), None, {}, (X, None, "row index")),
    "index and label, no header": (rows(range(1, N + 1), Y, X), None, {}, (X, Y, "row index")),
    "subject": (rows(Y, X), ["id", *T], {}, "--index-column id"),
    "subject left out": (rows(Y, X), ["subject", *T], {"index_column": "subject"}, (X, None, "")),
    "row names of R": (rows([f"r{i}" for i in range(N)], X), T, {}, (X, None, "row index")),
    "np.savetxt header": (rows(Y, X), [f"# label,{T[0]}", *T[1:]], {}, (X, Y, "comment")),
    # Rows that are time points.
    "long, names": (LONG[:, :5].tolist(), ["Open", "High", "Low", "Close", "Volume"], {}, "--layout table"),
    "long, dates": (rows([f"2016-07-01 {i:05d}" for i in range(500)], LONG[:, :3]), ["date", "OT", "HUFL", "HULL"], {},
                    "--layout table"),
    "long, none": (LONG.tolist(), None, {}, "--layout table"),
    "long, a row a series": (LONG.tolist(), None, {"layout": "table"}, (LONG, None, "")),
    "x, y, z": (LONG[:, :3].tolist(), ["x", "y", "z"], {}, "--layout table|classes"),
    "channels side by side": (rows(X, X), [*T, *[f"u{i}" for i in range(L)]], {}, "--layout table"),
    "months": (rows(X[:, :4]), ["jan", "feb", "mar", "apr"], {"layout": "table"}, (X[:, :4], None, "")),
    "columns out of order": (rows(X), sorted(T), {}, "numbered in order"),
    "one column": (LONG[:, :1].tolist(), None, {}, "--layout table"),
    "dates as names": (rows(X, NAMES), [*(f"2020-01-{i + 1:02d}" for i in range(L)), "k"], {}, (X, NAMES, "labels")),
    "booleans": (rows(X, (Y == 1).astype(str)), None, {}, (X, Y == 1, "taken for the labels")),
    "quoted": ([[f'"{cell(v)}"' for v in row] for row in rows(NAMES, X)], None, {}, (X, NAMES, "labels")),
    "two labels, one said": (rows(Y, NAMES, X), ["y", "y_name", *T], {"label_column": "y"}, (X, Y, "left out")),
    "class names NA and None": (rows(X, MISSING_WORDS), None, {}, (X, MISSING_WORDS, "taken for the labels")),
    "windows in a row": (LONG[np.arange(60)[:, None] + np.arange(20), 0].tolist(), None, {},
                         (LONG[np.arange(60)[:, None] + np.arange(20), 0], None, "")),
    "white noise": (NOISE.tolist(), None, {}, (NOISE, None, "")),
    "covariates": (rows(Y, X, X[:, :2]), ["y", *T, "age", "weight"], {}, "--index-column age,weight"),
    "without covariates": (rows(range(N), Y, X, X[:, :2]), ["id", "y", *T, "age", "kg"], {"index_column": "age,kg"},
                           (X, Y, "'y'")),
    "time, value, label": (rows(range(N), X[:, 0], Y), ["timestamp", "value", "label"], {}, "--layout table"),
    "a separator at the end": (rows(X, [""] * N), None, {}, (X, None, "empty last column")),
    # Options that mean nothing.
    "no such column": (rows(X), T, {"label_column": "q"}, "--label-column.*'q'"),
    "layout of arrays": (rows(X), T, {"layout": "ntd"}, "three axes"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tmp_path):
    content, header, options, expected = TABLES[name]
    path = text(tmp_path, "S_TRAIN.csv", content, header)
    judge(lambda: load_dataset(path, **options), expected)


def judge(read, expected):
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            read()
        return
    data = read()
    check(data, *expected[:2])
    notes = [note for note in data.notes if "no test split" not in note]
    assert expected[2] in " ".join(notes) and (notes or not expected[2])


# Arrays: options, series, labels, and what comes of it.
WIDE = CHANNELS.swapaxes(1, 2)  # [n, time, channels]
TALL = CHANNELS.reshape(10, 72, 16)
ARRAYS = {
    "as documented": ((CHANNELS, Y), {}, (CHANNELS, Y, "")),
    "time first": ((WIDE, Y), {}, r"\[10, 128, 9\].*--layout nctd.*--layout ntd"),
    "time first, said": ((WIDE, Y), {"layout": "ntd"}, (CHANNELS, Y, "")),
    "as documented, said": ((WIDE, None), {"layout": "nctd"}, (WIDE, None, "")),
    "time first, short": ((WIDE[:, :24].repeat(3, 2), None), {}, "smoother.*--layout"),
    "more channels than samples": ((TALL, None), {}, (TALL, None, "[series, channels, time]")),
    "one channel last": ((X[:, :, None], Y), {}, (X, Y, "[series, time, channels]")),
    "three channels last": ((WIDE[:, :, :3], Y), {}, (CHANNELS[:, :3], Y, "[series, time, channels]")),
    "a list of them": (([*WIDE], Y), {}, "--layout"),
    "a list of unequal ones": (([WIDE[0], WIDE[1, :100]], None), {}, (UNEQUAL, None, "series of 100 to 128")),
    "and as documented": (([CHANNELS[0], CHANNELS[1, :, :100]], None), {}, (UNEQUAL, None, "series of 100 to 128")),
    "of unequal channels": (([WIDE[0], WIDE[1, :100, :8]], None), {}, "unequal numbers of channels, 100 to 128.*ntd"),
    "one long series": ((LONG, None), {}, "--layout table"),
    "rows are series": ((LONG, None), {"layout": "table"}, (LONG, None, "")),
    "labels say so": ((LONG, np.arange(500) % 3), {}, (LONG, np.arange(500) % 3, "")),
    "labels among samples": ((np.c_[Y, X], None), {}, "--label-column 0"),
    "labels last": ((np.c_[X, Y], None), {"label_column": -1}, (X, Y, "")),
    "samples": ((np.c_[X, Y], None), {"label_column": "none"}, (np.c_[X, Y], None, "")),
    "both": ((X, Y), {"label_column": 0}, "label-column 0 means nothing"),
    "frame": ((pd.DataFrame(X, columns=T).assign(label=NAMES), None), {}, (X, NAMES, "'label'")),
    "frame and labels": ((pd.DataFrame(X, columns=T).assign(label=NAMES), NAMES), {}, "label-column none"),
    "frame without names": ((pd.DataFrame(X), Y), {}, (X, Y, "")),
    "frame with gaps": ((pd.DataFrame(X, columns=T).astype("Float64").mask(X > 3), Y), {}, (GAPS, Y, "missing values")),
    "frame of mixed names": ((pd.DataFrame(X).assign(label=NAMES), None), {}, (X, NAMES, "'label'")),
    "frame of series": ((pd.DataFrame({"dim_0": [pd.Series(x) for x in X]}), Y), {}, "cells hold arrays"),
    "layout of a matrix": ((X, Y), {"layout": "ntd"}, "--layout ntd means nothing"),
    "windows of TimeGAN": ((np.stack([LONG[i : i + 24] for i in range(0, 400, 20)]), None), {}, "smoother.*--layout"),
    "frame by time": ((pd.DataFrame(LONG[:, :3], columns=["a", "b", "c"]), None), {}, "--layout table"),
    "masked": ((np.ma.masked_greater(X, 3), Y), {}, (GAPS, Y, "missing values")),
    "masked integers": ((np.ma.masked_greater((10 * X).astype(int), 30), Y), {}, (
        np.where((10 * X).astype(int) > 30, np.nan, (10 * X).astype(int)), Y, "missing values")
    ),
    "list of masked": (([*np.ma.masked_greater(X, 3)], Y), {}, (GAPS, Y, "missing values")),
    "masked labels": ((X, np.ma.masked_equal(Y, 3)), {}, "label 2 .* is missing"),
    "offset": ((X + 1e8, Y), {}, "float32 can hardly tell apart; subtract the offset"),
    "dates": ((np.arange(N * L).reshape(N, L) % 97 + 1_700_000_000_000, Y), {}, "subtract the offset"),
    "spaces": ((X, [*NAMES[:-1], "walk "]), {}, (X, NAMES, "differ by spaces only")),
    "wrong layout": ((X, Y), {"layout": "ndt"}, "--layout is nctd or ntd or table; got 'ndt'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    (x, y), options, expected = ARRAYS[name]
    judge(lambda: from_arrays(x, y, reading=Reading(**options)), expected)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def hdf5(path, **arrays):
    """As MATLAB writes it: axes in reverse."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = np.asarray(array).T
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    return path


def matlab(path, **arrays):
    pytest.importorskip("scipy.io").savemat(path, arrays)
    return path


def beside(path, x, y, name="S_labels.csv"):
    if path.suffix == ".npy":
        np.save(path, x)
    else:
        text(path.parent, path.name, rows(x))
    if name.endswith(".npy"):
        np.save(path.with_name(name), y)
    else:
        path.with_name(name).write_text("\n".join(map(str, y)))
    return path


COLUMN = Y[:, None].astype(float)
FILES = {
    "labels": (lambda f: npz(f / "a.npz", X=X, labels=Y), {}, (X, Y, "the array labels was taken")),
    "target": (lambda f: npz(f / "a.npz", X=X, Target=Y), {}, (X, Y, "Target")),
    "train_labels": (lambda f: npz(f / "a.npz", train_data=X, train_labels=Y), {}, (X, Y, "")),
    "gesture": (lambda f: npz(f / "a.npz", X=X, gesture=Y), {}, "--label-column gesture"),
    "gesture, said": (lambda f: npz(f / "a.npz", X=X, gesture=Y), {"label_column": "gesture"}, (X, Y, "")),
    "none, said": (lambda f: npz(f / "a.npz", X=X, labels=Y), {"label_column": "none"}, (X, None, "unread: labels")),
    "more": (lambda f: npz(f / "a.npz", X=X, y=Y, fs=128.0), {}, (X, Y, "left unread: fs")),
    "npz, time first": (lambda f: npz(f / "a.npz", X=WIDE, y=Y), {}, "--layout ntd"),
    "npz, time first, said": (lambda f: npz(f / "a.npz", X=WIDE, y=Y), {"layout": "ntd"}, (CHANNELS, Y, "")),
    "HDF5 of MATLAB": (lambda f: hdf5(f / "a.h5", X=X, y=COLUMN), {}, (X, Y, "MATLAB")),
    "MATLAB 7.3": (lambda f: hdf5(f / "a.mat", X=CHANNELS, y=COLUMN.T), {}, (CHANNELS, Y, "MATLAB")),
    "MATLAB": (lambda f: matlab(f / "a.mat", X=X, labels=COLUMN), {}, (X, Y, "labels")),
    "MATLAB, cells": (lambda f: matlab(f / "a.mat", X=X, y=NAMES.astype(object)), {}, (X, NAMES, "")),
    "y_train": (lambda f: beside(f / "X_train.npy", X, Y, "y_train.npy"), {}, (X, Y, "y_train.npy")),
    "X and y": (lambda f: beside(f / "X.npy", X, NAMES, "y.npy"), {}, (X, NAMES, "y.npy")),
    "NAME_labels.csv": (lambda f: beside(f / "S.csv", X, NAMES), {}, (X, NAMES, "S_labels.csv")),
    "labels.csv of a .npy": (lambda f: beside(f / "S.npy", X, Y), {}, (X, Y, "S_labels.csv")),
    "by its folder": (lambda f: beside(f / "X_train.npy", X, Y, "y_train.npy").parent, {}, (X, Y, "y_train.npy")),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    write, options, expected = FILES[name]
    path = write(tmp_path)
    judge(lambda: load_dataset(path, **options), expected)


def ts(folder, header, *lines):
    path = folder / "S_TRAIN.ts"
    path.write_text("\n".join(["@problemName S", *header, "@data", *lines]) + "\n")
    return path


C0, C1 = "1,2,3,4,5", "2,4,3,1,5"
PAIR = np.array([[[1, 2, 3, 4, 5], [2, 4, 3, 1, 5]]] * 2)
HEADERS = {
    "no targets": (["@dimensions 2", "@targetLabel false"], [f"{C0}:{C1}"] * 2, (PAIR, None, "")),
    "as aeon writes it": (["@dimension 2", "@targetlabel false"], [f"{C0}:{C1}:"] * 2, (PAIR, None, "")),
    "nothing said": ([], [f"{C0}:{C1}"] * 2, (PAIR, None, "")),
    "nothing said, labels": ([], [f"{C0}:{C1}:a"] * 2, (PAIR, ["a", "a"], "")),
    "dimensions say so": (["@dimensions 1"], [f"{C0}:a", f"{C0}:b"], (PAIR[:, :1], ["a", "b"], "")),
    "labels lack": (["@dimensions 2", "@classLabel true a b"], [f"{C0}:{C1}"], "has 1 channels and the header says 2"),
    "too many": (["@dimensions 2", "@classLabel false"], [f"{C0}:{C1}:{C1}"], "has 3 channels and the header says 2"),
    "one of several": (
        ["@univariate true", "@classLabel false"],
        [f"{C0}:{C1}"],
        "has 2 channels and the header says 1",
    ),
    "length": (["@seriesLength 6", "@classLabel true a"], [f"{C0}:a"], "@seriesLength 6, and the series have 5"),
    "classes": (["@classLabel true a b"], [f"{C0}:a", f"{C0}:c"], "'c' is a label and not of the header"),
    "classes alike": (["@classLabel true 1.0 2"], [f"{C0}:1", f"{C1}:2.0"], (PAIR[:1].swapaxes(0, 1), [1, 2], "")),
    "contradiction": (["@dimensions 2", "@univariate true"], [C0], "@dimensions 2 and @univariate true"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_ts_files_are_believed(name, tmp_path):
    header, lines, expected = HEADERS[name]
    judge(lambda: load_dataset(ts(tmp_path, header, *lines)), expected)


@pytest.mark.parametrize("labels", [None, NAMES])
def test_what_aeon_writes_is_read(labels, tmp_path):
    datasets = pytest.importorskip("aeon.datasets")
    kind = {} if labels is None else {"label_type": "classification"}
    datasets.save_to_ts_file(CHANNELS, path=str(tmp_path), y=labels, problem_name="S_TRAIN", **kind)
    judge(lambda: load_dataset(tmp_path / "S_TRAIN.ts"), (CHANNELS, labels, ""))


SPLITS = {  # files of a training and a test split, and what is given to load
    "train.csv": ("train.csv", "test.csv", "S", rows(Y, X), rows(Y, X), ",", "."),
    "UCR 2015": ("S_TRAIN", "S_TEST", "S/S_TRAIN", rows(Y, X), rows(Y, X), ",", "."),
    "UCR 2015, folder": ("S_TRAIN", "S_TEST", "S", rows(Y, np.round(X)), rows(Y, np.round(X)), ",", "."),
    "UCR .txt": ("S_TRAIN.txt", "S_TEST.txt", "S/S_TEST.txt", rows(Y, X), rows(Y, X), "  ", "."),
    "without labels": ("train.csv", "test.csv", "S/test.csv", rows(Y, X), rows(X), ",", "."),
    "semicolons": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(Y, X), rows(Y, X), ";", "."),
    "decimal commas": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(Y, X), rows(Y, X), ";", ","),
    "decimal commas, tabs": ("S_TRAIN.txt", "S_TEST.txt", "S", rows(Y, X), rows(Y, X), "\t", ","),
    "decimal commas, spaces": ("S_TRAIN.txt", "S_TEST.txt", "S", rows(Y, X), rows(Y, X), " ", ","),
    "decimal commas, text": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(X, NAMES), rows(X, NAMES), " ", ","),
    "bars": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(Y, X), rows(Y, X), "|", "."),
    "spaces": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(NAMES, X), rows(NAMES, X), "   ", "."),
    "comma and space": ("S_TRAIN.csv", "S_TEST.csv", "S", rows(Y, X), rows(Y, X), ", ", "."),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits(name, tmp_path):
    train, test, given, content, tests, sep, decimal = SPLITS[name]
    (tmp_path / "S").mkdir()
    text(tmp_path / "S", train, content, None, sep, decimal)
    text(tmp_path / "S", test, tests, None, sep, decimal)
    (tmp_path / "S" / "README.txt").write_text("what this is\n")
    data = load_dataset(f"{tmp_path}/{given}")
    np.testing.assert_array_equal(data.X_train[:, 0], X.astype(np.float32) if "folder" not in name else np.round(X))
    np.testing.assert_array_equal(data.X_test, data.X_train)
    assert data.name == "S" and len(data.class_names) == 3 and set(data.y_train.tolist()) == {0, 1, 2}
    assert data.y_test is None if name == "without labels" else (data.y_test == data.y_train).all()
    noted = any("separated" in note for note in data.notes)
    assert noted == (decimal == "," or (train.endswith(".csv") and sep.strip() != ","))


def test_a_train_split_alone_is_noted(tmp_path):
    text(tmp_path, "train.csv", rows(Y, X))
    assert any("no test split" in note and "test.csv" in note for note in load_dataset(tmp_path).notes)


def test_what_excel_says_of_the_separator_is_no_series(tmp_path):
    path = text(tmp_path, "S.csv", rows(NAMES, X), None, ";", ",")
    path.write_text("sep=;\n" + path.read_text())
    check(load_dataset(path), y=NAMES)


def test_both_kinds_of_decimals_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("1,5;2.5;3\n1,4;2.4;4\n")
    with pytest.raises(UserError, match="'1,5' and '2.5'"):
        load_dataset(tmp_path / "a.csv")


def test_columns_in_another_order_are_refused(tmp_path):
    text(tmp_path, "train.csv", rows(Y, X), ["label", *T])
    text(tmp_path, "test.csv", rows(Y, X), ["label", *T[::-1]])
    with pytest.raises(UserError, match="column 2 is 't11', and 't0' in the training split"):
        load_dataset(tmp_path)


def test_arff(tmp_path):
    lines = [f"@attribute att{i} numeric" for i in range(L)] + ["@attribute target {walk,run,none}", "@data"]
    lines += [",".join(map(cell, row)) for row in rows(X, NAMES)]
    for name in ("S_TRAIN.arff", "S_TEST.arff"):
        (tmp_path / name).write_text("@relation S\n" + "\n".join(lines) + "\n")
    data = load_dataset(tmp_path / "S_TRAIN.arff")
    check(data, y=NAMES)
    assert (data.y_test == data.y_train).all()
    (tmp_path / "S_TRAIN.arff").write_text(
        "@relation S\n@attribute a relational\n@attribute b numeric\n@end a\n@data\n"
    )
    with pytest.raises(UserError, match="S_TRAIN.arff"):
        load_dataset(tmp_path / "S_TRAIN.arff")


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "S.parquet"
    try:
        pd.DataFrame(X, columns=T).assign(label=NAMES).to_parquet(path)
    except ImportError:
        path.touch()
        with pytest.raises(UserError, match="pip install pyarrow"):
            load_dataset(path)
    else:
        check(load_dataset(path), y=NAMES)
        path.write_bytes(path.read_bytes()[:99])
        with pytest.raises(UserError, match="S.parquet: cannot be read"):
            load_dataset(path)


@pytest.mark.parametrize("gap", ["end", "middle"])
def test_sets_with_gaps_of_the_archive_point_at_the_adjusted_ones(gap, tmp_path):
    values = rows(Y, X)
    values[1][5 if gap == "middle" else -1] = "NaN"
    adjusted = tmp_path / "Missing_value_and_variable_length_datasets_adjusted" / "S"
    for folder in (tmp_path / "S", adjusted):
        folder.mkdir(parents=True)
    for there in (False, True):
        if there:
            text(adjusted, "S_TRAIN.tsv", rows(Y, X), sep="\t")
        text(tmp_path / "S", "S_TRAIN.tsv", values, sep="\t")
        found = " ".join(load_dataset(tmp_path / "S").notes)
        assert "Missing_value_and_variable_length_datasets_adjusted" + "/S has it with equal" * there in found
        assert ("11 to 12 time points" if gap == "end" else "1 of 10 series have missing values") in found
    check(load_dataset(adjusted))


def test_a_test_class_that_training_lacks_does_not_stop_it():
    data = from_arrays(X, Y, X, np.where(Y == 3, 4, Y))
    assert len(data.X_test) == len(data.y_test) == 7 and "3 of 10 test series are left out" in data.notes[0]
    assert from_arrays(X, Y, X, Y + 9).X_test is None


def test_classes_of_one_name_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["X"], file["y"] = X, Y - 1
        file.attrs["class_names"] = ["a", "b", "a"]
    with pytest.raises(UserError, match="several classes are called 'a'"):
        load_dataset(tmp_path / "a.h5")


@pytest.mark.parametrize("files", [["GunPoint_TRAIN.tsv"], ["train.csv", "test.csv"], ["data.npy"], ["a.csv", "b.csv"]])
def test_a_folder_here_comes_before_names(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "GunPoint").mkdir()
    (tmp_path / "home").mkdir()
    np.save(tmp_path / "home" / "GunPoint.npy", 2 * X)
    note = load_dataset("GunPoint", tmp_path / "home").notes[0]
    assert "folder GunPoint here holds no data set" in note
    for name in files:
        if name.endswith(".npy"):
            np.save(tmp_path / "GunPoint" / name, X)
        else:
            text(tmp_path / "GunPoint", name, rows(NAMES, X), sep="\t" if name.endswith("tsv") else ",")
    if files == ["a.csv", "b.csv"]:
        with pytest.raises(UserError, match="found several: a, b; name one"):
            load_dataset("GunPoint", tmp_path / "home")
    else:
        np.testing.assert_array_equal(load_dataset("GunPoint", tmp_path / "home").X_train[:, 0], X.astype(np.float32))


def test_programs_and_fit_tell_what_was_decided(tmp_path, capsys):
    path = text(tmp_path, "S.csv", rows(Y, X, [7] * N), ["k", *T, "site"])
    options = ["--label-column", "k", "--index-column", "site", "--layout", "table", "--header", "yes"]
    train.main(["--dataset", str(path), "--dry-run", "--device", "cpu", *options])
    assert "10 series [1, 12], 3 classes" in capsys.readouterr().out
    train.main(["--dataset", str(text(tmp_path, "U.csv", rows(X, Y))), "--dry-run", "--device", "cpu"])
    assert "warning: column 12, whole numbers (1, 2, 3)" in capsys.readouterr().out
    frame = pd.DataFrame(X, columns=T).assign(label=NAMES, id=range(N))
    small = {**SMALL, "stage1_epochs": 1, "stage2_epochs": 1, "quiet": True, "device": "cpu"}
    with pytest.warns(UserWarning, match="'label' was taken for the labels"):
        model = fit(frame, **small)
    assert set(model.class_names) == {*NAMES} and model.data.length == L
    with pytest.raises(UserError, match="layout='ntd'"):
        fit(WIDE, Y, **small)
    assert fit(WIDE, Y, layout="ntd", **small).data.channels == 9
    assert fit(np.c_[X, Y], label_column=-1, **small).data.length == L


GARBAGE = {
    "empty": b"",
    "bytes": bytes(range(256)) * 4,
    "nulls": b"\0" * 300,
    "text": b'no data\n\n,,;\t\n"open',
    "one cell": b"5",
    "lines": b"\n\n \n",
    "comments": b"# a\n# b\n",
    "tags": b"@relation x\n@attribute a {b\n@data\n1",
    "commas": b",,,\n,,,\n",
    "wide": b"1,2\n" + b"3;" * 5000,
    "MATLAB": b"MATLAB 5.0 MAT-file" + b" " * 105 + b"\x00\x01IM" + b"\x0f" * 40,
}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", "", ".arff", ".mat", ".parquet", ".ts", ".npy", ".npz"])
@pytest.mark.parametrize("kind", GARBAGE)
def test_what_is_no_data_is_one_line(kind, suffix, tmp_path):
    path = tmp_path / f"S_TRAIN{suffix}"
    path.write_bytes(GARBAGE[kind])
    with pytest.raises(UserError) as error:
        load_dataset(path)
    assert str(tmp_path) in str(error.value) or "pyarrow" in str(error.value)
    path.rename(tmp_path / f"S{suffix}")
    with pytest.raises(UserError):
        load_dataset(tmp_path / f"S{suffix}")
