"""The data set every program works on, and the checks that any series pass on their way into it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ncfast.data.arrays import FLOAT32_MAX, label_text, list_some, numeric_values, sorted_classes, to_numpy
from ncfast.data.conditions import LENGTH, ConditionColumn, conditions_of_splits, named_columns
from ncfast.data.gaps import ends_with_nan, is_ragged, last_observed, padded
from ncfast.data.layout import (
    GUESS,
    NONE,
    Reading,
    label_ends,
    place_of,
    refuse_label_column,
    refuse_long_table,
    time_is_second,
)
from ncfast.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled or unlabelled series, in the units of their source.

    X_train is float32 [n_cases, n_channels, n_timepoints], NaN where a value is missing; y_train is int64 [n_cases] in
    0 .. C-1, or None without labels. lengths_train is int64 [n_cases] where series end before the longest (and X_train
    is NaN from there on), or None where all have one length. X_test, y_test and lengths_test are the same or None.
    Class c was called `class_names[c]` in the source ("1", "-1",
    "Walking"); classes are those of the training labels, sorted (by value where all are numbers). `notes` are lines the
    user should read, such as what an incomplete file lacks. `source` is where the series came from. conditions_train
    and conditions_test are float64 [n_cases, k], a column for each of `condition_columns` (`ncfast.data.conditions`),
    or None.
    """

    name: str
    X_train: np.ndarray
    y_train: np.ndarray | None
    X_test: np.ndarray | None
    y_test: np.ndarray | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    source: str
    lengths_train: np.ndarray | None = None
    lengths_test: np.ndarray | None = None
    conditions_train: np.ndarray | None = None
    conditions_test: np.ndarray | None = None
    condition_columns: tuple[ConditionColumn, ...] = ()
    reading: str = ""  # JSON: the options with which a file was read

    @property
    def n_channels(self) -> int:
        return self.X_train.shape[1]

    @property
    def length(self) -> int:
        return self.X_train.shape[2]

    @property
    def n_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names)


@dataclass(frozen=True)
class Split:
    """One part of a data set as it was read, before any check."""

    X: Any  # array-like [n, L] or [n, C, L], or a list of n series [L], [C, L] or [L, C]
    labels: Any | None  # array-like [n]: integers, whole floats or strings
    where: str  # how an error names it: a file, or a file and a key
    settled: bool = False  # whether the source itself says what its axes and columns are
    hint: str = ""  # what else there is, where values are missing or lengths unequal
    ends: bool | None = None  # whether NaN at the end of a series is its end; None where that is to be found out
    conditions: Mapping[str, Any] | None = None  # array-like [n] of each name


def from_arrays(
    X: Any,
    y: Any = None,
    X_test: Any = None,
    y_test: Any = None,
    name: str = "arrays",
    reading: Reading = GUESS,
    *,
    conditions: Any = None,
    conditions_test: Any = None,
) -> Dataset:
    """A data set from arrays in memory.

    Args:
        X: series, any real dtype, [n, L] (one channel) or [n, C, L]; NumPy, torch or nested lists; a list of series
            of unequal lengths, [L_i], [C, L_i] or [L_i, C]; or a table of pandas, polars or pyarrow, a row a series,
            whose columns are read as those of a file are (`ncfast.data.tables`). NaN, and what a masked array masks,
            is missing; where all NaN is at the ends of series, they end there.
        y: labels [n], integers or strings, or None.
        X_test, y_test: the same for the test split, or None.
        name: the data set's name.
        reading: what the columns and axes are, where the arrays do not tell.
        conditions: what is known of each series besides its class: a table, a dict of arrays [n] by name, or an array
            [n, k]; numbers, texts or truth values (`ncfast.data.conditions`).
        conditions_test: the same for the test split.

    Raises:
        UserError: see `make_dataset`.
    """
    if X_test is None and y_test is not None:
        raise UserError("y_test was given without X_test: give both or neither")
    reading.refuse("arrays", "header", *(["label_column"] if y is not None else []))
    notes: list[str] = []
    train, roles = split_of(X, y, "X", reading, notes)
    test = None if X_test is None else split_of(X_test, y_test, "X_test", reading, notes, roles)[0]
    if conditions is not None:
        if reading.condition_columns:
            raise UserError("give conditions or condition_columns, not both")
        train = dataclasses.replace(train, conditions=named_columns(conditions))
        if test is not None and conditions_test is not None:
            test = dataclasses.replace(test, conditions=named_columns(conditions_test, "conditions_test"))
    elif roles is None:
        reading.refuse_conditions("X", "an array has none: give conditions={name: values}")
    return make_dataset(train, test, name=name, source="arrays", notes=notes, reading=reading)


def split_of(X: Any, y: Any, where: str, reading: Reading, notes: list[str], roles: Any = None) -> tuple[Split, Any]:
    """A split and, of a table, what its columns were taken for; roles: what those of the training split were."""
    if not hasattr(X, "columns") and not hasattr(X, "column_names"):
        return Split(X, y, where), None
    from ncfast.data import tables

    return tables.split_of(tables.of_frame(X, where), reading, notes, labels=y, roles=roles)


def make_dataset(
    train: Split,
    test: Split | None,
    *,
    name: str,
    source: str,
    notes: Sequence[str] = (),
    reading: Reading = GUESS,
) -> Dataset:
    """Check both splits and convert them.

    Raises:
        UserError: no series; not [n, L] or [n, C, L], or axes and labels that can be taken for something else; values
            that are not real numbers, are infinite, or do not fit float32; a series, or a channel of all training
            series, without a value; all training values equal; labels that do not match the series in number, are
            missing or are not classes; a test split of another shape. Test series of classes that the training labels
            lack are left out, with a note.
    """
    notes = list(notes)
    train, test = arrange(train, test, reading, notes)
    splits = [split for split in (train, test) if split is not None]
    arrays, lengths = with_ends(
        [series(split.X, split.where, gaps=True, layout=reading.layout) for split in splits], splits, notes
    )
    (X_train, X_test), (lengths_train, lengths_test) = ([*part, None][:2] for part in (arrays, lengths))
    if X_test is not None and X_test.shape[1:] != X_train.shape[1:]:
        raise UserError(
            f"{test.where}: the test series are {shape_text(X_test)} and the training series {shape_text(X_train)}; "
            "both splits need the same"
        )
    lowest, highest = (bound(X_train, axis=(0, 2)) for bound in (np.nanmin, np.nanmax))  # [C]
    if lowest.min() == highest.max():
        raise UserError(f"{train.where}: every value is {lowest[0]:g}; there is nothing to learn in constant data")
    constant = np.flatnonzero(lowest == highest).tolist()
    if constant:
        notes.append(f"{train.where}: channel {', '.join(map(str, constant))} is constant over all training series")

    condition_columns, conditions_train, conditions_test = conditions_of_splits(
        train, test, len(X_train), 0 if X_test is None else len(X_test), notes
    )
    if lengths_train is not None and any(column.name == LENGTH for column in condition_columns):
        raise UserError(
            f"{train.where}: the series have unequal lengths, which are a condition called {LENGTH!r} without being "
            f"given; leave out your condition {LENGTH!r}, or give it another name"
        )
    y_train, y_test, class_names = None, None, ()
    if train.labels is not None:
        names = label_names(train.labels, len(X_train), train.where, notes)
        class_names = sorted_classes(names)
        y_train = encode(names, class_names)
    if test is not None and test.labels is not None:
        names = label_names(test.labels, len(X_test), test.where, notes)
        if not class_names:
            raise UserError(f"{test.where}: the test series have labels and the training series have none; label both")
        known = np.isin(names, class_names)
        if not known.all():
            unseen = list_some([repr(label) for label in sorted_classes(names[~known])], 5)
            notes.append(
                f"{test.where}: {(~known).sum()} of {len(names)} test series are left out, since their label {unseen} "
                f"does not occur in the training labels ({list_some(class_names)})"
            )
            X_test, names = X_test[known], names[known]
            lengths_test = None if lengths_test is None else lengths_test[known]
        y_test = encode(names, class_names)
        conditions_test = None if conditions_test is None else conditions_test[known]
        if not known.any():
            X_test = y_test = lengths_test = conditions_test = None
    return Dataset(
        name,
        X_train,
        y_train,
        X_test,
        y_test,
        class_names,
        tuple(dict.fromkeys(notes)),
        source,
        lengths_train,
        lengths_test,
        conditions_train,
        conditions_test,
        condition_columns,
    )


def with_ends(
    arrays: list[np.ndarray], splits: list[Split], notes: list[str]
) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The series [n, C, L] of each split, of one length L, and where each of them ends: None where all end there.

    Series end where a list of unequal ones says so, or where all NaN of both splits is at the ends of series. Other NaN
    is missing.
    """
    has_nan = [bool(np.isnan(X).any()) for X in arrays]
    if not any(has_nan):
        return arrays, [None] * len(arrays)
    ragged = any(split.ends or is_ragged(split.X) for split in splits)
    ends = ragged or (splits[0].ends is None and all(map(ends_with_nan, arrays)))
    lengths = [last_observed(X) for X in arrays]
    for X, count, split in zip(arrays, lengths, splits, strict=True):
        if (count == 0).any():
            refuse_values(np.isnan(X) & (count == 0)[:, None, None], "hold nothing but NaN", "drop them", split.where)
    nothing = np.flatnonzero(np.isnan(arrays[0]).all((0, 2)))
    if len(nothing):
        raise UserError(f"{splits[0].where}: channel {nothing[0]} has no value in any training series; leave it out")
    hint = splits[0].hint
    if ends:
        longest = max(int(count.max()) for count in lengths)
        arrays = [
            np.pad(X[..., :longest], ((0, 0), (0, 0), (0, max(0, longest - X.shape[2]))), constant_values=np.nan)
            for X in arrays
        ]
        if all((count == longest).all() for count in lengths):
            ends = False
        else:
            how = "" if ragged else " (NaN at the end of a series was taken for its end)"
            shortest = min(int(count.min()) for count in lengths)
            alike = bool((lengths[0] == longest).all())
            then = f"all of {splits[0].where} have {longest}, and so have generated ones"
            then = then if alike else "each is learned and generated with its own end"
            notes.append(f"{splits[alike].where}: series of {shortest} to {longest} time points{how}: {then}{hint}")
    inside = [
        np.isnan(X) & (np.arange(X.shape[2]) < count[:, None, None] if ends else True)
        for X, count in zip(arrays, lengths, strict=True)
    ]
    for X, count, gaps, split in zip(arrays, lengths, inside, splits, strict=True):
        if gaps.any():
            values = int(count.sum()) * X.shape[1] if ends else X.size
            notes.append(
                f"{split.where}: {gaps.any((1, 2)).sum()} of {len(X)} series have missing values, "
                f"{gaps.sum() / values:.1%} of all: losses count what was observed{'' if ends else hint}"
            )
    return arrays, [count if ends and (count < longest).any() else None for count in lengths]


def arrange(train: Split, test: Split | None, reading: Reading, notes: list[str]) -> tuple[Split, Split | None]:
    """Both splits with their series as [n, L] or [n, C, L], and labels that lay among the samples taken out."""
    if train.settled:
        return train, test
    splits = [
        dataclasses.replace(split, X=to_numpy(split.X, split.where, ragged=True)) for split in (train, test) if split
    ]
    X = splits[0].X
    if X.dtype.kind not in "fiub":  # series of unequal lengths; others are refused
        reading.refuse(train.where, "index_column", *(["label_column"] if train.labels is None else []))
        if reading.layout == "ntd":
            splits = [dataclasses.replace(s, X=s.X.swapaxes(1, 2)) if s.X.ndim == 3 else s for s in splits]
        return splits[0], [*splits, None][1]
    if X.ndim == 3:
        reading.refuse(train.where, "index_column", *(["label_column"] if train.labels is None else []))
        if time_is_second(X, reading.layout, train.where, notes):
            splits = [dataclasses.replace(s, X=s.X.swapaxes(1, 2)) if s.X.ndim == 3 else s for s in splits]
    elif X.ndim == 2:
        reading.refuse(train.where, "index_column", *(["layout"] if reading.layout != "table" else []))
        column = label_place(X, train, reading)
        if column is not None:
            splits = [without_labels(split, column, X.shape[1]) for split in splits]
        if splits[0].labels is None:
            refuse_long_table(splits[0].X, reading.layout, train.where)
    return splits[0], [*splits, None][1]


def label_place(X: np.ndarray, train: Split, reading: Reading) -> int | None:  # [n, m]
    """The column of a matrix that the user calls labels. Raises UserError for one that looks like them."""
    asked = reading.label_column
    if train.labels is not None:
        return None
    if asked is not None and str(asked) != NONE:
        return place_of(asked, None, X.shape[1], "--label-column (label_column)", train.where)
    if asked is None and X.shape[1] > 1:
        ends = label_ends([X[:, 0], X[:, 1]], [X[:, -1], X[:, -2]])
        if ends.column is not None:
            refuse_label_column(f"column {ends.column} looks like labels among the samples", ends.column, train.where)
    return None


def without_labels(split: Split, column: int, width: int) -> Split:
    if split.labels is not None or split.X.ndim != 2 or split.X.shape[1] != width:
        return split
    return dataclasses.replace(split, X=np.delete(split.X, column, axis=1), labels=split.X[:, column])


def series(X: Any, where: str, *, gaps: bool = False, layout: str | None = None) -> np.ndarray:
    """The series as float32 [n, C, L], contiguous, or a UserError; with `gaps` NaN where a value is missing."""
    X = to_numpy(X, where, ragged=gaps)
    if is_ragged(X):
        X = padded(X, layout, where)
    if X.ndim not in (2, 3):
        raise UserError(f"{where}: series are [n, length] or [n, channels, length]; got the shape {list(X.shape)}")
    if X.dtype.kind not in "fiub":
        raise UserError(f"{where}: series are real numbers; got {X.dtype}; convert them to float32")
    if X.ndim == 2:
        X = X[:, None]
    if X.size == 0:
        raise UserError(f"{where}: no series; got {X.shape[0]} of {shape_text(X)}")
    check_values(X, where, gaps)
    converted = np.ascontiguousarray(X, dtype=np.float32)
    if X.dtype not in (np.float32, np.float16):
        check_precision(X, converted, where)
    return converted


def check_precision(X: np.ndarray, converted: np.ndarray, where: str) -> None:  # [n, C, L]
    """Refuses numbers that float32 makes equal though they differ, such as small changes on a large offset."""
    for c in range(X.shape[1]):
        if np.isnan(X[:, c]).all():
            continue  # which is refused, or another's to refuse
        low, high = float(np.nanmin(X[:, c])), float(np.nanmax(X[:, c]))
        # What float32 rounds off of the largest number, against how far the numbers lie apart.
        if high > low and float(np.spacing(np.float32(max(-low, high)))) > (high - low) / 256:
            raise UserError(
                f"{where}: channel {c} lies between {low:.9g} and {high:.9g}, which float32 can hardly tell apart; "
                "subtract the offset first"
            )


def check_values(X: np.ndarray, where: str, gaps: bool = False) -> None:  # [n, C, L]
    """Refuse NaN unless there may be gaps, infinity and what does not fit float32."""
    # One pass over clean data; the finer looks are taken only at data with a fault.
    with np.errstate(over="ignore", invalid="ignore"):
        if X.dtype.kind != "f" or (np.isfinite(X.max() - X.min()) and max(X.max(), -X.min()) <= FLOAT32_MAX):
            return
    missing = np.isnan(X)
    if missing.any() and not gaps:
        refuse_values(missing, "hold NaN (missing values)", "interpolate or drop them first", where)
    infinite = np.isinf(X)
    if infinite.any():
        refuse_values(infinite, "hold an infinity", "repair or drop them first", where)
    if X.dtype == np.float16:
        return
    large = np.abs(X) > FLOAT32_MAX
    if large.any():
        refuse_values(large, f"hold a value beyond float32 ({FLOAT32_MAX:.1e})", "rescale the data first", where)


def refuse_values(faulty: np.ndarray, what: str, advice: str, where: str) -> NoReturn:  # bool [n, C, L]
    rows = faulty.any((1, 2))  # [n]
    first = int(rows.argmax())
    t = int(faulty[first].any(0).argmax())
    raise UserError(
        f"{where}: {rows.sum()} of {len(faulty)} series {what}, the first is series {first} at time point {t} "
        f"(counted from 0); {advice}"
    )


def label_names(labels: Any, n: int, where: str, notes: list[str]) -> np.ndarray:
    """The labels as strings [n]."""
    y = to_numpy(labels, where)
    if y.ndim == 2 and 1 in y.shape:
        y = y.ravel()
    if y.shape != (n,):
        raise UserError(f"{where}: {n} series need {n} labels, one each; got labels of shape {list(y.shape)}")
    written = np.array([label_text(label) for label in y.tolist()], dtype=str)
    names = np.char.strip(written)
    merged = {name for name in names[names != written].tolist() if len({*written[names == name].tolist()}) > 1}
    if merged:
        notes.append(
            f"{where}: labels that differ by spaces only are one class: {', '.join(map(repr, sorted(merged)))}"
        )
    if (names == "").any():
        raise UserError(
            f"{where}: label {int((names == '').argmax())} (counted from 0) is missing; label all series or none"
        )
    values = numeric_values(np.unique(names))
    if values is not None and (values != np.round(values)).any():
        odd = np.unique(names)[values != np.round(values)][0]
        raise UserError(
            f"{where}: labels are classes, whole numbers or strings; got {odd}; leave out the targets of a regression "
            "(of a table: --label-column none, and --index-column NAME where the column holds no samples)"
        )
    return names


def encode(names: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """int64 [n]: the place of each name in class_names, which holds them all."""
    order = np.argsort(class_names)
    return order[np.searchsorted(class_names, names, sorter=order)].astype(np.int64)


def shape_text(X: np.ndarray) -> str:  # [n, C, L]
    channels = "1 channel" if X.shape[1] == 1 else f"{X.shape[1]} channels"
    return f"{channels} x {X.shape[2]} time points"
