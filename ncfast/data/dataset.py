"""The data set every program works on, and the checks that any series pass on their way into it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ncfast.errors import UserError

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled or unlabelled series of one length, in the units of their source.

    X_train is float32 [n_cases, n_channels, n_timepoints]; y_train is int64 [n_cases] in 0 .. C-1, or None without
    labels. X_test and y_test are the same or None. Class c was called `class_names[c]` in the source ("1", "-1",
    "Walking"); classes are those of the training labels, sorted (by value where all are numbers). `notes` are lines the
    user should read, such as what an incomplete file lacks. `source` is where the series came from.
    """

    name: str
    X_train: np.ndarray
    y_train: np.ndarray | None
    X_test: np.ndarray | None
    y_test: np.ndarray | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    source: str

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

    X: Any  # array-like [n, L] or [n, C, L], or a list of n series [L] or [C, L]
    labels: Any | None  # array-like [n]: integers, whole floats or strings
    where: str  # how an error names it: a file, or a file and a key


def from_arrays(X: Any, y: Any = None, X_test: Any = None, y_test: Any = None, name: str = "arrays") -> Dataset:
    """A data set from arrays in memory.

    Args:
        X: series, any real dtype, [n, L] (one channel) or [n, C, L]; NumPy, torch, pandas or nested lists.
        y: labels [n], integers or strings, or None.
        X_test, y_test: the same for the test split, or None.
        name: the data set's name.

    Raises:
        UserError: see `make_dataset`.
    """
    test = None if X_test is None else Split(X_test, y_test, "X_test")
    if X_test is None and y_test is not None:
        raise UserError("y_test was given without X_test: give both or neither")
    return make_dataset(Split(X, y, "X"), test, name=name, source="arrays")


def make_dataset(train: Split, test: Split | None, *, name: str, source: str, notes: Sequence[str] = ()) -> Dataset:
    """Check both splits and convert them.

    Raises:
        UserError: no series; not [n, L] or [n, C, L]; unequal lengths; values that are not real numbers, are NaN or
            infinite, or do not fit float32; all training values equal; labels that do not match the series in number,
            are missing or are not classes; a test split of another shape, or with classes that the training labels
            lack. Missing values are refused and not filled: a generator would learn the filling as if it were data.
    """
    X_train = series(train.X, train.where)
    X_test = None if test is None else series(test.X, test.where)
    if X_test is not None and X_test.shape[1:] != X_train.shape[1:]:
        raise UserError(
            f"{test.where}: the test series are {shape_text(X_test)} and the training series {shape_text(X_train)}; "
            "both splits need the same"
        )
    if X_train.min() == X_train.max():
        raise UserError(
            f"{train.where}: every value is {X_train.flat[0]:g}; there is nothing to learn in constant data"
        )
    constant = [c for c in range(X_train.shape[1]) if X_train[:, c].min() == X_train[:, c].max()]
    if constant:
        notes = (*notes, f"{train.where}: channel {', '.join(map(str, constant))} is constant over all training series")

    y_train, y_test, class_names = None, None, ()
    if train.labels is not None:
        names = label_names(train.labels, len(X_train), train.where)
        class_names = sorted_classes(names)
        y_train = encode(names, class_names)
    if test is not None and test.labels is not None:
        names = label_names(test.labels, len(X_test), test.where)
        if not class_names:
            raise UserError(f"{test.where}: the test series have labels and the training series have none; label both")
        unseen = sorted_classes(np.setdiff1d(names, class_names))
        if unseen:
            raise UserError(
                f"{test.where}: label {', '.join(map(repr, unseen[:5]))} does not occur in the training labels "
                f"({list_some(class_names)})"
            )
        y_test = encode(names, class_names)
    return Dataset(name, X_train, y_train, X_test, y_test, class_names, tuple(notes), source)


def series(X: Any, where: str) -> np.ndarray:
    """The series as float32 [n, C, L], contiguous, or a UserError."""
    X = to_numpy(X, where)
    if X.ndim not in (2, 3):
        raise UserError(f"{where}: series are [n, length] or [n, channels, length]; got the shape {list(X.shape)}")
    if X.dtype.kind not in "fiub":
        raise UserError(f"{where}: series are real numbers; got {X.dtype}; convert them to float32")
    if X.ndim == 2:
        X = X[:, None]
    if X.size == 0:
        raise UserError(f"{where}: no series; got {X.shape[0]} of {shape_text(X)}")
    check_values(X, where)
    return np.ascontiguousarray(X, dtype=np.float32)


def to_numpy(array: Any, where: str) -> np.ndarray:
    """The array; of objects, and one-dimensional, where NumPy cannot stack its items."""
    if hasattr(array, "detach"):  # a torch tensor, perhaps on a GPU
        array = array.detach().cpu()
    try:
        array = np.asarray(array)
    except ValueError:  # items of different shapes
        array = np.fromiter(array, dtype=object, count=len(array))
    except TypeError as error:
        raise UserError(f"{where}: expected an array; got {type(array).__name__} ({error})") from error
    if array.dtype == object and array.ndim == 1:
        try:
            lengths = {np.shape(item)[-1] for item in array if np.ndim(item)}
        except ValueError as error:
            raise UserError(f"{where}: the channels of one series have unequal lengths; they share one") from error
        if len(lengths) > 1:
            refuse_lengths(lengths, where)
    return array


def refuse_lengths(lengths: Iterable[int], where: str, hint: str = "") -> NoReturn:
    raise UserError(
        f"{where}: the series have unequal lengths, {min(lengths)} to {max(lengths)} time points; "
        f"crop, pad or resample them to one length first{hint}"
    )


def check_values(X: np.ndarray, where: str) -> None:  # [n, C, L]
    """Refuse NaN, infinity and what does not fit float32."""
    # One pass over clean data; the finer looks are taken only at data with a fault.
    with np.errstate(over="ignore", invalid="ignore"):
        if X.dtype.kind != "f" or (np.isfinite(X.max() - X.min()) and max(X.max(), -X.min()) <= FLOAT32_MAX):
            return
    missing = np.isnan(X)
    if missing.any():
        lengths = (~missing).any(1).sum(1)  # [n]
        if padded(missing) and 0 < lengths.min() < lengths.max():
            refuse_lengths(lengths.tolist(), where, " (NaN at the end of a series was taken for padding)")
        refuse_values(missing, "hold NaN (missing values)", "interpolate or drop them first", where)
    infinite = np.isinf(X)
    if infinite.any():
        refuse_values(infinite, "hold an infinity", "repair or drop them first", where)
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


def padded(missing: np.ndarray) -> bool:  # [n, C, L]
    """Whether values lack at the ends of series only and in all channels, as the UCR archive pads shorter series."""
    return bool((missing[:, :, 1:] >= missing[:, :, :-1]).all() and (missing == missing[:, :1]).all())


def label_names(labels: Any, n: int, where: str) -> np.ndarray:
    """The labels as strings [n]."""
    y = to_numpy(labels, where)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (n,):
        raise UserError(f"{where}: {n} series need {n} labels, one each; got labels of shape {list(y.shape)}")
    names = np.char.strip(np.array([label_text(label) for label in y.tolist()], dtype=str))
    if (names == "").any():
        raise UserError(
            f"{where}: label {int((names == '').argmax())} (counted from 0) is missing; label all series or none"
        )
    values = numeric_values(np.unique(names))
    if values is not None and (values != np.round(values)).any():
        odd = np.unique(names)[values != np.round(values)][0]
        raise UserError(
            f"{where}: labels are classes, whole numbers or strings; got {odd}; leave out the targets of a regression"
        )
    return names


def label_text(label: Any) -> str:
    """The label as a string: 1 for 1.0, nothing for None and NaN."""
    if isinstance(label, bytes):
        return label.decode(errors="backslashreplace")
    if label is None or label != label:
        return ""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def numeric_values(names: np.ndarray) -> np.ndarray | None:
    """The names' values, float64, where all are finite numbers."""
    try:
        values = names.astype(np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def sorted_classes(names: np.ndarray) -> tuple[str, ...]:
    """The distinct names: by value when all are numbers ("2" before "10"), else alphabetically."""
    distinct = np.unique(names)
    values = numeric_values(distinct)
    return tuple((distinct if values is None else distinct[np.argsort(values, kind="stable")]).tolist())


def encode(names: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """int64 [n]: the place of each name in class_names, which holds them all."""
    order = np.argsort(class_names)
    return order[np.searchsorted(class_names, names, sorter=order)].astype(np.int64)


def shape_text(X: np.ndarray) -> str:  # [n, C, L]
    channels = "1 channel" if X.shape[1] == 1 else f"{X.shape[1]} channels"
    return f"{channels} x {X.shape[2]} time points"


def list_some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
