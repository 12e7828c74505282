"""Reading series from files: tables, aeon/sktime .ts, .npy, .npz, HDF5 and MATLAB. No checks of the values here.

A text file or .npy holds one split, and its sibling the other: NAME_TRAIN.ts and NAME_TEST.ts. A .npz, HDF5 or MATLAB
file holds both. Every parser raises UserError for what it cannot read, with the file and, in text, the line.
"""

import dataclasses
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ncfast.data import tables
from ncfast.data.conditions import take_columns
from ncfast.data.dataset import Split
from ncfast.data.layout import GUESS, NONE, Reading, is_whole, refuse_label_column
from ncfast.data.tables import LABEL_WORDS, is_number, says, whole
from ncfast.engine.memory import check_fits
from ncfast.errors import UserError

ACCEPTED = (".h5", ".hdf5", ".npz", ".npy", ".ts", ".tsv", ".csv", ".txt", ".arff", ".parquet", ".mat")
HDF5 = (".h5", ".hdf5")
BOTH_SPLITS = (*HDF5, ".npz", ".mat")
SPLIT = re.compile(r"(.*[_-])?(train|test)", re.IGNORECASE)
ADJUSTED = "Missing_value_and_variable_length_datasets_adjusted"
# Names of arrays, without what lies between their words.
SERIES_KEYS = {
    "train": ("xtrain", "trainx", "traindata", "datatrain"),
    "test": ("xtest", "testx", "testdata", "datatest"),
}
LABEL_KEYS = {
    split: tuple(f"{a}{b}" for word in ("y", "labels", "label") for a, b in ((word, split), (split, word)))
    for split in ("train", "test")
}


def read_file(path: Path, reading: Reading = GUESS) -> tuple[Split, Split | None, list[str]]:
    """The training split, the test split or None, and notes for the user.

    Of a split file either sibling may be named; the test split may be missing.
    """
    suffix = path.suffix.lower()
    if suffix not in ACCEPTED and not (is_split(path) and suffix == ""):
        raise UserError(f"{path}: unsupported file type {suffix or '(none)'!r}; accepted are {', '.join(ACCEPTED)}")
    notes: list[str] = []
    try:
        if suffix not in tables.TEXT:
            reading.refuse(str(path), "header")
        if suffix in BOTH_SPLITS:
            train, test = (read_npz if suffix == ".npz" else read_mat if suffix == ".mat" else read_hdf5)(
                path, reading, notes
            )
            return train, test, notes
        train_path, test_path = siblings(path)
        train, roles = read_split(train_path, reading, notes)
        if test_path is None:
            return train, None, notes
        if not test_path.is_file():
            return train, None, [*notes, f"no test split: {test_path} does not exist"]
        if isinstance(roles, tables.Roles) and suffix in tables.TEXT:
            reading = Reading(header="yes" if roles.header else "no")
        return train, read_split(test_path, reading, notes, roles)[0], list(dict.fromkeys(notes))
    except MemoryError as error:
        raise UserError(f"{path}: {error}; it is damaged, or holds more than fits into memory: keep a part") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file (byte {error.start} is no UTF-8)") from error
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); is it damaged or incomplete?") from error


def read_split(path: Path, reading: Reading, notes: list[str], roles: Any = None) -> tuple[Split, Any]:
    """A file of one split and, of a table, what its columns are; roles: what those of the training split are."""
    suffix = path.suffix.lower()
    if suffix == ".ts":
        reading.refuse(str(path), "label_column", "index_column", "layout")
        reading.refuse_conditions(str(path), ".ts has none; save the series with them as .npz or .csv")
        split = read_ts(path, notes)
        return without(split) if reading.label_column == NONE else split, None
    labels = labels_beside(path, reading, notes)
    if suffix == ".npy":
        reading.refuse_conditions(str(path), ".npy has one array without a name; save the series with them as .npz")
        return Split(load_numpy(path), labels, str(path)), None
    if suffix == ".parquet":
        table = tables.read_parquet(path)
    elif suffix == ".arff":
        table = tables.read_arff(path)
    else:
        # The archives put the label first: .tsv in 2018, .txt of their web site, no ending in 2015.
        first = labels is None and (suffix == ".tsv" or (suffix != ".csv" and is_split(path)))
        table = tables.read_text(path, reading, notes, label_first=first, hint=equal_variant(path))
    return tables.split_of(table, reading, notes, labels=labels, roles=roles)


def without(split: Split) -> Split:
    return dataclasses.replace(split, labels=None)


def is_split(path: Path) -> bool:
    return SPLIT.fullmatch(path.stem) is not None


def siblings(path: Path) -> tuple[Path, Path | None]:
    """The training file and the test file that `path` is one of; (path, None) where the name does not say."""
    match = SPLIT.fullmatch(path.stem)
    if match is None:
        return path, None
    other = {"train": "test", "TRAIN": "TEST", "Train": "Test", "test": "train", "TEST": "TRAIN", "Test": "Train"}
    sibling = path.with_name((match[1] or "") + other.get(match[2], match[2]) + path.suffix)
    if match[2].lower() == "train":
        return path, sibling
    if not sibling.is_file():
        raise UserError(f"{path}: this is a test split and its training split {sibling.name} is not beside it")
    return sibling, path


def dataset_name(path: Path) -> str:
    """FordA, from FordA.h5, FordA_TRAIN.tsv, FordA/train.csv or a folder FordA."""
    name = path.stem if path.is_file() else path.name
    match = SPLIT.fullmatch(name)
    name = name if match is None else (match[1] or "")[:-1]
    return name or path.absolute().parent.name


def label_files(path: Path) -> list[Path]:
    """Where the labels of the series in `path` may be: NAME_y, NAME_labels; y_train beside X_train."""
    names = [f"{path.stem}{end}" for end in ("_y", "_labels", "_label")]
    words = re.split(r"([_-])", path.stem)
    for i, word in enumerate(words):
        if word.lower() in ("x", "data", "series"):
            for other in ("y", "labels", "label") if word.islower() else ("y", "Y", "labels", "Labels", "label"):
                names.append("".join([*words[:i], other, *words[i + 1 :]]))
    return [path.with_name(name + suffix) for name in names for suffix in (path.suffix, ".npy", ".csv", ".txt")]


def labels_beside(path: Path, reading: Reading, notes: list[str]) -> Any:
    """The labels from a file beside that of the series; None where there is none, or where none are wanted."""
    file = next((file for file in label_files(path) if file.is_file()), None)
    if file is None:
        return None
    if reading.label_column is not None:
        notes.append(f"left unread: {file}")
        return None
    notes.append(f"the labels are those of {file}")
    if file.suffix == ".npy":
        return load_numpy(file)
    table = tables.read_text(file, Reading(header="no"), [], label_first=False)
    if len(table.columns) > 1:
        table = tables.read_text(file, GUESS, [], label_first=False)
        index = tables.index_columns(table, [], notes)
        table.columns = [column for i, column in enumerate(table.columns) if i not in index]
    if len(table.columns) != 1:
        raise UserError(
            f"{file}: expected one column, a label for each series of {path.name}; got {len(table.columns)}"
        )
    labels = [whole(str(label)) for label in table.columns[0].tolist()]
    headed = says(labels[0], LABEL_WORDS) or not (is_number(labels[0]) or not all(map(is_number, labels[1:])))
    return labels[headed:]


def equal_variant(path: Path) -> str:
    """A word on a variant of the data set beside it that has no missing values and one length."""
    equal = path.with_name(re.sub(r"_(?=train|test)", "_eq_", path.name, flags=re.IGNORECASE))
    if equal != path and equal.is_file():
        return f"; {dataset_name(equal)}, which is beside it, has one length"
    adjusted = path.absolute().parent.parent / ADJUSTED / path.absolute().parent.name
    if (adjusted / path.name).is_file():
        return f"; {adjusted} has it with equal lengths and without gaps"
    if adjusted.parent.is_dir() or path.suffix.lower() == ".tsv":
        return f"; the UCR archive of 2018 has such sets adjusted in {ADJUSTED}/"
    return ""


def read_ts(path: Path, notes: list[str]) -> Split:
    """The aeon/sktime format: a header of @tags, @data, then a line a series, ":" between channels, the label last.

    Targets of a regression file (@targetLabel true) are left out, with a note. Where the header says nothing of labels,
    the number of channels tells, or whether what comes last can be a channel.
    """
    numbers, lines = text_lines(path, comment="#")
    data = next((i for i, line in enumerate(lines) if line.lower() == "@data"), None)
    if data is None:
        raise UserError(f"{path}: no @data line; is this a .ts file?")
    header = {tag.lower(): values for tag, *values in (line.split() for line in lines[:data])}
    said = {tag: values[0].lower() for tag, values in header.items() if values}
    numbers, lines = numbers[data + 1 :], lines[data + 1 :]
    if said.get("@timestamps") == "true":
        raise UserError(f"{path}: series with time stamps (@timeStamps true) are not supported; save the values alone")
    regression = said.get("@targetlabel") == "true"
    labelled = regression or said.get("@classlabel") == "true"
    expected = channels_said(said, path)
    if not labelled and "@classlabel" not in said and "@targetlabel" not in said and lines:
        # aeon takes a file that does not say for a labelled one.
        parts = lines[0].split(":")
        labelled = parts[-1] != "" and len(parts) != expected and parts[-1].count(",") < max(1, parts[0].count(","))
    labels, channels, n_channels = [], [], expected
    for number, line in zip(numbers, lines, strict=True):
        *parts, label = line.split(":") if labelled else (*line.removesuffix(":").split(":"), "")
        if not parts:
            raise UserError(f"{path}: line {number} has no ':' before a label; without labels say @classLabel false")
        n_channels = n_channels or len(parts)
        if len(parts) != n_channels:
            other = f"the header says {expected}" if expected else f"the first series {n_channels}"
            how = "besides a label" if labelled else "and no label"
            raise UserError(f"{path}: line {number} has {len(parts)} channels and {other} ({how}); mend either")
        labels.append(whole(label.strip()))
        channels.extend(parts)
    if regression:
        notes.append("the targets of a regression were left out; the series have no classes")
    elif labelled:
        check_classes(header.get("@classlabel", [])[1:], labels, path)
    values = parse_channels(channels, [n for n in numbers for _ in range(n_channels or 1)], path)  # [n·C, L]
    length = said.get("@serieslength", "")
    if said.get("@equallength") != "false" and length.isdecimal() and len(lines):
        found = {row.count(",") + 1 for row in channels}
        if found != {int(length)}:
            found = " or ".join(map(str, sorted({min(found), max(found)})))
            raise UserError(f"{path}: the header says @seriesLength {length}, and the series have {found}; mend either")
    return Split(
        values.reshape(len(lines), n_channels or 1, values.shape[1]),
        labels if labelled and not regression else None,
        str(path),
        settled=True,
        hint=equal_variant(path),
        ends=len({row.count(",") for row in channels}) > 1 or None,
    )


def channels_said(said: Mapping[str, str], path: Path) -> int | None:
    """How many channels the header of a .ts file says; None where it does not."""
    count = said.get("@dimensions", said.get("@dimension"))
    single = said.get("@univariate") == "true"
    if count is None:
        return 1 if single else None
    if not count.isdecimal() or int(count) < 1 or (single and int(count) > 1):
        raise UserError(f"{path}: the header says @dimensions {count}{' and @univariate true' * single}; mend it")
    return int(count)


def check_classes(listed: Sequence[str], labels: Sequence[str], path: Path) -> None:
    known = {whole(name).lower() for name in listed}
    other = sorted({label for label in labels if label.lower() not in known})
    if listed and other:
        raise UserError(
            f"{path}: {other[0]!r} is a label and not of the header's @classLabel ({', '.join(listed)}); mend either"
        )


def read_npz(path: Path, reading: Reading, notes: list[str]) -> tuple[Split, Split | None]:
    """Keys as in `both_splits`."""
    archive = load_numpy(path)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: holds one bare array; save it as .npy, or with names as .npz")
    with archive:
        try:
            return both_splits(archive, path, reading, notes)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: {numpy_reason(error)}") from error


def read_mat(path: Path, reading: Reading, notes: list[str]) -> tuple[Split, Split | None]:
    """A file of MATLAB; keys as in `both_splits`."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: .mat is read by scipy: pip install 'ncfast[data]'") from None
    if h5py.is_hdf5(path):  # since version 7.3
        return read_hdf5(path, reading, notes)
    try:
        arrays = {name: array for name, array in loadmat(path).items() if not name.startswith("__")}
    except Exception as error:  # scipy raises many kinds for damage
        raise UserError(f"{path}: cannot be read ({error}); is it damaged or no MATLAB file?") from error
    for name, array in arrays.items():
        if array.dtype == object and all(np.size(item) == 1 for item in array.ravel()):  # a cell array of strings
            arrays[name] = np.array([np.asarray(item).ravel()[0] for item in array.ravel()])
    return both_splits(arrays, path, reading, notes)


def read_hdf5(path: Path, reading: Reading, notes: list[str]) -> tuple[Split, Split | None]:
    """Keys as in `both_splits`. Attributes, all optional:

    `original_labels` or `class_names`, what the labels 0 .. C-1 stand for; `complete` = False and `deviation`, that and
    how the file falls short of the published data set, which becomes a note.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            train, test = both_splits(file, path, reading, notes)
            attributes = dict(file.attrs)
    except (KeyError, RuntimeError) as error:  # what h5py raises for damage inside, besides OSError
        raise OSError(str(error)) from error
    names = attributes.get("original_labels", attributes.get("class_names"))
    if names is not None and not isinstance(names, h5py.Empty):
        names = np.asarray(names).ravel()
        texts = [label_name(name) for name in names.tolist()]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        if twice:
            raise UserError(f"{path}: several classes are called {twice[0]!r}; give each a name of its own")
        train, test = named(train, names), test and named(test, names)
    if not np.all(attributes.get("complete", True)):
        deviation = attributes.get("deviation", "it does not say what is missing")
        deviation = deviation.decode() if isinstance(deviation, bytes) else str(deviation)
        notes.append(f"{path} is incomplete: {' '.join(deviation.split())}")
    return train, test


def label_name(name: Any) -> str:
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip()


def named(split: Split, names: np.ndarray) -> Split:
    """The split with the labels 0 .. C-1 replaced by what they stand for."""
    if split.labels is None:
        return split
    labels = np.asarray(split.labels)
    last = len(names) - 1
    if labels.dtype.kind not in "iu" or ((labels < 0) | (labels > last)).any():
        what = f"{labels.min()} .. {labels.max()}" if labels.dtype.kind in "iu" else str(labels.dtype)
        raise UserError(f"{split.where}: the file names {len(names)} classes, so labels are 0 .. {last}; got {what}")
    return dataclasses.replace(split, labels=names[labels])


def both_splits(
    arrays: Mapping[str, Any], path: Path, reading: Reading, notes: list[str]
) -> tuple[Split, Split | None]:
    """Both splits from X_train, y_train, X_test, y_test, or one from X, y, in any case; only the first is needed.

    Labels may also be called labels, target or the like, or as `label_column` says. Conditions are NAME_train and
    NAME_test, or NAME. What is left unread is noted.
    """
    keys: dict[str, str] = {}
    for key in arrays:
        keys.setdefault(plain(key), key)

    def find(*names: str) -> str | None:
        return next((keys[name] for name in names if name in keys), None)

    def condition_key(name: str, split: str) -> str | None:
        word = plain(name)
        return find(f"{word}{split}", f"{split}{word}", *([word] if split == "train" else []))

    def read(key: str) -> np.ndarray:
        array = arrays[key]
        if getattr(array, "shape", None) is None:
            raise UserError(
                f"{path}: {key} is no array but a group, or empty; series are an array [n, channels, length]"
            )
        # A file of HDF5 may promise far more than it holds.
        check_fits(array.nbytes, torch.device("cpu"), f"{path}: {key}", "keep a part of it")
        if "MATLAB_class" not in getattr(array, "attrs", {}):
            return np.asarray(array)
        if h5py.check_ref_dtype(array.dtype) is not None:
            raise UserError(f"{path}: {key} is a cell array of MATLAB; save numbers, or save with -v7")
        notes.append(f"{path}: {key} was written by MATLAB, which stores its axes in reverse; they were put back")
        return np.asarray(array).T

    train = find(*SERIES_KEYS["train"]) or find("x", "data")
    if train is None:
        found = ", ".join(arrays) or "none"
        raise UserError(f"{path}: expected the arrays X_train, y_train, X_test, y_test (or X, y); found {found}")
    test = find(*SERIES_KEYS["test"])
    X = read(train)
    asked = None if reading.label_column is None else str(reading.label_column)
    is_key = asked is not None and find(plain(asked))
    labels = is_key or None
    if asked is None:
        labels = find(*LABEL_KEYS["train"]) or find("y") or labels_called(arrays, test, notes)
    test_labels = find(*LABEL_KEYS["test"]) if test and asked != NONE else None
    conditions = {name: key for name in reading.condition_columns if (key := condition_key(name, "train"))}
    test_conditions = {name: key for name in conditions if (key := condition_key(name, "test"))}
    take_columns([name for name in reading.condition_columns if name not in conditions], [*arrays], str(path))
    taken = {train, labels, test, test_labels, *conditions.values(), *test_conditions.values()}
    rest = [key for key in arrays if key not in taken]
    if labels is None and asked is None:
        for key in rest:
            if plain(key) not in ("length", "lengths") and could_be_labels(arrays[key], len(X)):
                refuse_label_column(f"the array {key} may hold labels", key, str(path))
    if rest:
        notes.append(f"{path}: left unread: {', '.join(map(str, rest))}")

    def split(X: np.ndarray, key: str, labels: str | None, conditions: dict[str, str]) -> Split:
        values = {name: read(key) for name, key in conditions.items()}
        return Split(X, None if labels is None else read(labels), f"{path}: {key}", conditions=values)

    train_split = split(X, train, labels, conditions)
    return train_split, None if test is None else split(read(test), test, test_labels, test_conditions)


def plain(key: str) -> str:
    """Without what lies between its words."""
    return re.sub(r"[\W_]", "", key).lower()


def labels_called(arrays: Mapping[str, Any], test: str | None, notes: list[str]) -> str | None:
    """The one array whose name says that it holds labels."""
    found = [key for key in arrays if says(key, LABEL_WORDS)]
    if len(found) != 1 or test is not None:
        return None
    notes.append(f"the array {found[0]} was taken for the labels")
    return found[0]


def could_be_labels(array: Any, n: int) -> bool:
    shape = getattr(array, "shape", None)
    if shape is None or array.size != n or max(shape, default=0) != n:
        return False
    return array.dtype.kind not in "fc" or is_whole(np.asarray(array))


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


def parse_channels(rows: Sequence[str], line_numbers: Sequence[int], path: Path) -> np.ndarray:
    """float64 [n, L] from rows of numbers with commas between; NaN where a ? stands and behind shorter rows."""
    if not rows:
        return np.empty((0, 0))
    counts = [row.count(",") + 1 for row in rows]
    longest = max(counts)
    filled = [row.replace("?", "nan") + ",nan" * (longest - count) for row, count in zip(rows, counts, strict=True)]
    try:
        return np.loadtxt(filled, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        reason = error
    for line, row in zip(line_numbers, rows, strict=True):
        for column, cell in enumerate(row.split(","), 1):
            if cell.strip() != "?" and not is_number(cell):
                what = f"{cell.strip()!r} is not a number" if cell.strip() else "the cell is empty"
                raise UserError(f"{path}: line {line}, column {column}: {what}")
    raise UserError(f"{path}: {reason}")
