"""Data as users have them: read right, or refused in one line that names the option that settles it."""

import h5py
import numpy as np
import pytest

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
T = [f"t{i}" for i in range(L)]
CHANNELS = np.round(np.cumsum(RNG.standard_normal((N, 9, 128)), axis=2) + 30 * RNG.standard_normal((N, 9, 1)), 4)
LONG = np.round(np.cumsum(RNG.standard_normal((500, 28)), axis=0) + 10 * np.arange(28), 4)


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
    "first cell empty": (rows(["", *X[1:, 0].astype(str)], X[:, 1:]), None, {}, "hold NaN.*series 0 at time point 0"),
    "first row NA": (rows(X[:, :1], ["NA", *X[1:, 1].astype(str)], X[:, 2:]), None, {}, "series 0 at time point 1"),
    "first row ?": (rows(X[:, :-1], ["?", *X[1:, -1].astype(str)]), None, {}, "unequal lengths, 11 to 12.*padding"),
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
    "a list of unequal ones": (([WIDE[0], WIDE[1, :100]], None), {}, "unequal lengths, 100 to 128"),
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
    "frame with gaps": ((pd.DataFrame(X, columns=T).astype("Float64").mask(X > 3), Y), {}, "hold NaN"),
    "frame by time": ((pd.DataFrame(LONG[:, :3], columns=["a", "b", "c"]), None), {}, "--layout table"),
    "masked": ((np.ma.masked_greater(X, 3), Y), {}, "hold NaN"),
    "masked integers": ((np.ma.masked_greater((10 * X).astype(int), 30), Y), {}, "hold NaN"),
    "list of masked": (([*np.ma.masked_greater(X, 3)], Y), {}, "hold NaN"),
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
