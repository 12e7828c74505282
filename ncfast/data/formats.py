"""Reading series from files: UCR .tsv, aeon/sktime .ts, .csv, .npy, .npz and HDF5. No checks of the values here.

A text file or .npy holds one split, and its sibling the other: NAME_TRAIN.ts and NAME_TEST.ts. A .npz or HDF5 file
holds both. Every parser raises UserError for what it cannot read, with the file and, in text, the line.
"""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ncfast.data.dataset import Split, refuse_lengths
from ncfast.engine.memory import check_fits
from ncfast.errors import UserError

LABEL_COLUMNS = ("label", "class", "target", "y")
ACCEPTED = (".h5", ".hdf5", ".npz", ".npy", ".ts", ".tsv", ".csv")


def read_file(path: Path) -> tuple[Split, Split | None, list[str]]:
    """The training split, the test split or None, and notes for the user.

    Of a split file either sibling may be named; the test split may be missing.
    """
    suffix = path.suffix.lower()
    if suffix not in ACCEPTED:
        raise UserError(f"{path}: unsupported file type {suffix or '(none)'!r}; accepted are {', '.join(ACCEPTED)}")
    try:
        if suffix in BOTH_SPLITS:
            return BOTH_SPLITS[suffix](path)
        read = ONE_SPLIT[suffix]
        train_path, test_path = siblings(path)
        notes = []
        train = read(train_path, notes)
        if test_path is None:
            return train, None, notes
        if not test_path.is_file():
            return train, None, [*notes, f"no test split: {test_path} does not exist"]
        test = read(test_path, notes)
        return train, test, list(dict.fromkeys(notes))
    except MemoryError as error:
        raise UserError(f"{path}: {error}; it is damaged, or holds more than fits into memory: keep a part") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is no UTF-8)") from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); is it damaged or incomplete?") from error


def siblings(path: Path) -> tuple[Path, Path | None]:
    """The training file and the test file that `path` is one of; (path, None) where the name does not say."""
    match = re.fullmatch(r"(.*_)(train|test)", path.stem, re.IGNORECASE)
    if match is None:
        return path, None
    other = {"train": "test", "TRAIN": "TEST", "Train": "Test", "test": "train", "TEST": "TRAIN", "Test": "Train"}
    sibling = path.with_name(match[1] + other.get(match[2], match[2]) + path.suffix)
    if match[2].lower() == "train":
        return path, sibling
    if not sibling.is_file():
        raise UserError(f"{path}: this is a test split and its training split {sibling.name} is not beside it")
    return sibling, path


def dataset_name(path: Path) -> str:
    """FordA, from FordA.h5, FordA_TRAIN.tsv or a folder FordA."""
    return re.sub(r"_(train|test)$", "", path.stem if path.is_file() else path.name, flags=re.IGNORECASE)


def read_tsv(path: Path, notes: list[str]) -> Split:
    """The UCR archive's 2018 format: a line a series, its label first, tabs between."""
    numbers, lines = text_lines(path)
    labels, values = [], []
    for number, line in zip(numbers, lines, strict=True):
        label, _, rest = line.partition("\t")
        if not rest:
            raise UserError(f"{path}: line {number} has no tab; a .tsv line is label, tab, values with tabs between")
        labels.append(whole(label.strip()))
        values.append(rest)
    return Split(parse_numbers(values, numbers, "\t", path, first_column=2), labels, str(path))


def read_csv(path: Path, notes: list[str]) -> Split:
    """Comma separated, a line a series.

    With a header line, a column called label, class, target or y (in any case) holds the labels, and an unnamed first
    column, the row index that pandas writes, is ignored. Without a header every column is data. The first line is a
    header if a cell of it is not a number, or if it just counts 0, 1, 2 ... or 1, 2, 3 ..., as pandas numbers columns.
    """
    numbers, lines = text_lines(path)
    header = [cell.strip().strip('"') for cell in lines[0].split(",")] if lines else []
    counts = [str(i) for i in range(len(header) + 1)]
    counted = len(header) > 1 and header in (counts[:-1], counts[1:])
    if not counted and all(is_number(cell) for cell in header):
        return Split(parse_numbers(lines, numbers, ",", path), None, str(path))
    numbers, lines = numbers[1:], lines[1:]
    label_columns = [i for i, cell in enumerate(header) if cell.lower() in LABEL_COLUMNS]
    if len(label_columns) > 1:
        found = ", ".join(header[i] for i in label_columns)
        raise UserError(f"{path}: line 1 names {len(label_columns)} label columns ({found}); keep one")
    index = [0] if header[0] == "" and len(header) > 1 else []
    if index:
        notes.append("the unnamed first column was taken for a row index and left out")
    apart = sorted(label_columns + index, reverse=True)
    if not apart:
        return Split(parse_numbers(lines, numbers, ",", path), None, str(path))
    labels, values = [], []
    for number, line in zip(numbers, lines, strict=True):
        cells = line.split(",")
        if len(cells) != len(header):
            raise UserError(f"{path}: line {number} has {len(cells)} cells and the header {len(header)}")
        for i in apart:
            cell = cells.pop(i)
            if i in label_columns:
                labels.append(whole(cell.strip().strip('"')))
        values.append(",".join(cells))
    return Split(parse_numbers(values, numbers, ",", path), labels if label_columns else None, str(path))


def read_ts(path: Path, notes: list[str]) -> Split:
    """The aeon/sktime format: a header of @tags, @data, then a line a series, ":" between channels, the label last.

    Targets of a regression file (@targetLabel true) are left out, with a note.
    """
    numbers, lines = text_lines(path, comment="#")
    data = next((i for i, line in enumerate(lines) if line.lower() == "@data"), None)
    if data is None:
        raise UserError(f"{path}: no @data line; is this a .ts file?")
    header = {tag: values[:1] for tag, *values in (line.lower().split() for line in lines[:data])}
    numbers, lines = numbers[data + 1 :], lines[data + 1 :]
    if header.get("@timestamps") == ["true"]:
        raise UserError(f"{path}: series with time stamps (@timeStamps true) are not supported; save the values alone")
    regression = header.get("@targetlabel") == ["true"]
    # aeon takes a file that does not say for a labelled one.
    labelled = regression or header.get("@classlabel", ["true"]) == ["true"]
    labels, channels, n_channels = [], [], None
    for number, line in zip(numbers, lines, strict=True):
        *parts, label = line.split(":") if labelled else (*line.split(":"), "")
        if not parts:
            raise UserError(f"{path}: line {number} has no ':' before a label; without labels say @classLabel false")
        n_channels = n_channels or len(parts)
        if len(parts) != n_channels:
            raise UserError(f"{path}: line {number} has {len(parts)} channels and the first series {n_channels}")
        labels.append(whole(label.strip()))
        channels.extend(parts)
    if regression:
        notes.append("the targets of a regression were left out; the series have no classes")
    values = parse_numbers(channels, [n for n in numbers for _ in range(n_channels)], ",", path, missing="?")
    return Split(
        values.reshape(len(lines), n_channels or 1, values.shape[1]),
        labels if labelled and not regression else None,
        str(path),
    )


def read_npy(path: Path, notes: list[str]) -> Split:
    """NAME.npy holds the series; NAME_y.npy or NAME_labels.npy, where there is one, their labels."""
    beside = [path.with_name(path.stem + end + path.suffix) for end in ("_y", "_labels")]
    labels = next((load_numpy(other) for other in beside if other.is_file()), None)
    return Split(load_numpy(path), labels, str(path))


def read_npz(path: Path) -> tuple[Split, Split | None, list[str]]:
    """Keys as in `both_splits`."""
    archive = load_numpy(path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: holds one bare array; save it as .npy, or with names as .npz")
    with archive:
        try:
            return *both_splits(archive, path), []
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: {numpy_reason(error)}") from error


def read_hdf5(path: Path) -> tuple[Split, Split | None, list[str]]:
    """Keys as in `both_splits`. Attributes, all optional:

    `original_labels` or `class_names`, what the labels 0 .. C-1 stand for; `complete` = False and `deviation`, that and
    how the file falls short of the published data set, which becomes a note.
    """
    try:
        with h5py.File(path, "r") as file:
            train, test = both_splits(file, path)
            attributes = dict(file.attrs)
    except (KeyError, RuntimeError) as error:  # what h5py raises for damage inside, besides OSError
        raise OSError(str(error)) from error
    names = attributes.get("original_labels", attributes.get("class_names"))
    if names is not None:
        names = np.asarray(names).ravel()
        train, test = named(train, names), test and named(test, names)
    notes = []
    if not np.all(attributes.get("complete", True)):
        deviation = attributes.get("deviation", "it does not say what is missing")
        deviation = deviation.decode() if isinstance(deviation, bytes) else str(deviation)
        notes.append(f"{path} is incomplete: {' '.join(deviation.split())}")
    return train, test, notes


def named(split: Split, names: np.ndarray) -> Split:
    """The split with the labels 0 .. C-1 replaced by what they stand for."""
    if split.labels is None:
        return split
    labels = np.asarray(split.labels)
    last = len(names) - 1
    if labels.dtype.kind not in "iu" or ((labels < 0) | (labels > last)).any():
        what = f"{labels.min()} .. {labels.max()}" if labels.dtype.kind in "iu" else str(labels.dtype)
        raise UserError(f"{split.where}: the file names {len(names)} classes, so labels are 0 .. {last}; got {what}")
    return Split(split.X, names[labels], split.where)


def both_splits(arrays: Mapping[str, Any], path: Path) -> tuple[Split, Split | None]:
    """Both splits from X_train, y_train, X_test, y_test, or one from X, y, in any case; only the first is needed."""
    keys = {key.lower(): key for key in arrays}

    def read(key: str) -> np.ndarray:
        array = arrays[key]
        if getattr(array, "shape", None) is None:
            raise UserError(
                f"{path}: {key} is no array but a group, or empty; series are an array [n, channels, length]"
            )
        # A file of HDF5 may promise far more than it holds.
        check_fits(array.nbytes, torch.device("cpu"), f"{path}: {key}", "keep a part of it")
        return np.asarray(array)

    def split(x: str, y: str) -> Split:
        return Split(read(keys[x]), read(keys[y]) if y in keys else None, f"{path}: {keys[x]}")

    if "x_train" in keys:
        return split("x_train", "y_train"), split("x_test", "y_test") if "x_test" in keys else None
    if "x" in keys:
        return split("x", "y"), None
    found = ", ".join(arrays) or "none"
    raise UserError(f"{path}: expected the arrays X_train, y_train, X_test, y_test (or X, y); found {found}")


def load_numpy(path: Path) -> np.ndarray | np.lib.npyio.NpzFile:
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {numpy_reason(error)}") from error


def numpy_reason(error: Exception) -> str:
    if "pickle" in str(error):
        return "holds Python objects or is no NumPy file; save plain arrays of one dtype (series of one length)"
    return f"cannot be read ({error}); is it damaged or incomplete?"


def text_lines(path: Path, comment: str | None = None) -> tuple[list[int], list[str]]:
    """The lines that say something, stripped, and their numbers, from 1."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    kept = [(i, line) for i, line in enumerate(lines, 1) if line and not (comment and line.startswith(comment))]
    return [i for i, _ in kept], [line for _, line in kept]


def parse_numbers(
    rows: Sequence[str],
    line_numbers: Sequence[int],
    delimiter: str,
    path: Path,
    *,
    first_column: int = 1,
    missing: str | None = None,
) -> np.ndarray:
    """float64 [n, L] from rows of cells; `missing` is a cell's other spelling of NaN."""
    if not rows:
        return np.empty((0, 0))
    lengths = {row.count(delimiter) + 1 for row in rows}
    if len(lengths) == 1:
        if missing:
            rows = [row.replace(missing, "nan") for row in rows]
        try:
            return np.loadtxt(rows, delimiter=delimiter, comments=None, ndmin=2)
        except ValueError:
            pass
    for number, row in zip(line_numbers, rows, strict=True):
        for column, cell in enumerate(row.split(delimiter), first_column):
            if cell.strip() != missing and not is_number(cell):
                what = f"{cell.strip()!r} is not a number" if cell.strip() else "the cell is empty"
                raise UserError(f"{path}: line {number}, column {column}: {what}")
    if len(lengths) > 1:
        equal = path.with_name(re.sub(r"_(?=train|test)", "_eq_", path.name, flags=re.IGNORECASE))
        hint = f", or use {dataset_name(equal)}, which is beside it" if equal != path and equal.is_file() else ""
        refuse_lengths(lengths, str(path), hint)
    return np.array([[float(cell) for cell in row.split(delimiter)] for row in rows], ndmin=2)


def is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def whole(label: str) -> str:
    """A class number as the archives mean it: -1 for -1.0 and -1.0000000e+00. Other labels stay as they are."""
    if re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", label) and float(label).is_integer():
        return str(int(float(label)))
    return label


ONE_SPLIT: dict[str, Callable[[Path, list[str]], Split]] = {
    ".ts": read_ts,
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".npy": read_npy,
}
BOTH_SPLITS: dict[str, Callable[[Path], tuple[Split, Split | None, list[str]]]] = {
    ".npz": read_npz,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
}
