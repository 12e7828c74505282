"""Which axis of an array is time, which column of a matrix holds labels: what the numbers can tell, and what not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from ncfast.errors import UserError

LAYOUTS = ("nctd", "ntd", "table")
NONE = "none"
LEAST_TIME = 8  # an axis of fewer samples is none of time, and of fewer than `LEAST_LAST` it cannot be
LEAST_LAST = 4


@dataclass(frozen=True)
class Reading:
    """What the user says of the data; None leaves it to be found out.

    Attributes:
        label_column: of a table or a matrix: a name or a place from 0 (-1 is the last); of a file of arrays: a name;
            "none" for series without labels.
        layout: "nctd" [series, channels, time], "ntd" [series, time, channels], "table": each row is a series.
        header: "yes" or "no": whether the first line of a text table has the columns' names.
        index_column: of a table, one to leave out, or several with commas between; "none" leaves none out.
        condition_columns: names of what is known of each series besides its class (`ncfast.data.conditions`): columns
            of a table, or arrays of a file of arrays; a text has commas between.
    """

    label_column: str | int | None = None
    layout: str | None = None
    header: str | None = None
    index_column: str | int | None = None
    condition_columns: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        names = self.condition_columns
        names = names.split(",") if isinstance(names, str) else names or ()
        object.__setattr__(self, "condition_columns", tuple(dict.fromkeys(str(name).strip() for name in names)))
        for name, words in (("layout", LAYOUTS), ("header", ("yes", "no"))):
            if getattr(self, name) not in (None, *words):
                raise UserError(f"--{name} is {' or '.join(words)}; got {getattr(self, name)!r}")

    def refuse_conditions(self, where: str, why: str) -> None:
        """Raises UserError for condition columns, where what is read has no columns of names."""
        if self.condition_columns:
            raise UserError(
                f"{where}: --condition-columns {','.join(self.condition_columns)} are columns of a table or arrays of "
                f"a file, and {why}"
            )

    def refuse(self, where: str, *names: str) -> None:
        """Raises UserError for options that mean nothing for what is read."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (name.endswith("column") and str(value) == NONE):
                option = "--" + name.replace("_", "-")
                raise UserError(f"{where}: {option} {value} means nothing here; leave it out")


def time_is_second(X: np.ndarray, layout: str | None, where: str, notes: list[str]) -> bool:  # [n, a, b]
    """Whether the axes are [series, time, channels], not [series, channels, time].

    Raises:
        UserError: neither their sizes nor the values tell; it names the option that does.
    """
    if layout == "table":
        raise UserError(f"{where}: --layout table is for rows of one table; got the shape {list(X.shape)}")
    n, a, b = X.shape
    if layout is not None or n == 0 or a < LEAST_TIME:
        return layout == "ntd"
    shape = f"{where}: the shape {list(X.shape)}"
    if b < LEAST_LAST:
        notes.append(f"{shape} was read as [series, time, channels] (--layout nctd reads it otherwise)")
        return True
    along_a, along_b = roughness(X, 1), roughness(X, 2)
    if a > b and along_b < along_a / 2:
        notes.append(f"{shape} was read as [series, channels, time] (--layout ntd reads it otherwise)")
        return False
    if a > b or (b < 4 * a and along_a < along_b / 2):
        why = "the second axis is longer" if a > b else "the second axis is smoother"
        raise UserError(
            f"{shape} may be [series, channels, time] or [series, time, channels] ({why} than the last): "
            "give --layout nctd (layout='nctd') or --layout ntd (layout='ntd')"
        )
    return False


def refuse_long_table(X: np.ndarray, layout: str | None, where: str) -> None:  # [n, m]
    """Raises UserError where the rows follow each other as time points do: the samples of one long series."""
    n, m = X.shape
    if layout is None and n > m > 0 and (m < LEAST_LAST or roughness(X, 0) < roughness(X, 1) / 4):
        raise UserError(
            f"{where}: the {n} rows of {m} look like time points of one long series, with its channels as columns: "
            "give --window N (window=N) to cut it into series of N, or --layout table (layout='table') if each row is "
            "one"
        )


def roughness(X: np.ndarray, axis: int) -> float:
    """Mean squared step along an axis: small along time. NaN where there is none."""
    X = X[:4096].astype(np.float64)
    with np.errstate(all="ignore"):
        steps = np.square(np.diff(X, axis=axis))
        return float(steps[np.isfinite(steps)].mean()) if np.isfinite(steps).any() else np.nan


class Ends(NamedTuple):
    column: int | None  # that holds labels, of a matrix whose other columns are samples
    unsure: list[int]  # that may hold labels or samples


def label_ends(first: list[np.ndarray], last: list[np.ndarray]) -> Ends:
    """Whether the first or the last column holds labels, each given with the neighbours inwards of it."""
    kinds = {0: end_kind(*first), -1: end_kind(*last)}
    labels = [place for place, kind in kinds.items() if kind == "labels"]
    if len(labels) == 1:
        return Ends(labels[0], [])
    return Ends(None, labels or [place for place, kind in kinds.items() if kind == "unsure"])


def end_kind(column: np.ndarray, neighbour: np.ndarray) -> Literal["labels", "unsure", "samples"]:
    """What a column at the end of a row holds. Labels are whole numbers that repeat, beside samples that are not whole.

    Whole numbers that repeat beside whole numbers may be either, and so may one number in all rows.
    """
    n = len(column)
    if n < 2 or not is_whole(column):
        return "samples"
    distinct = len(np.unique(column))
    if distinct == n or distinct > (n + 1) // 2 or np.array_equal(column, neighbour):
        return "samples"
    return "labels" if distinct > 1 and not is_whole(neighbour) else "unsure"


def is_whole(values: np.ndarray) -> bool:
    return bool((np.isfinite(values) & (values == np.round(values))).all())


def place_of(column: str | int, names: list[str] | None, count: int, option: str, where: str) -> int:
    """The place of a column that the user names, from 0: by its name, else by its number."""
    text = str(column)
    if names is not None:
        same = [i for i, name in enumerate(names) if name == text] or [
            i for i, name in enumerate(names) if name.lower() == text.lower()
        ]
        if len(same) > 1:
            raise UserError(f"{where}: {len(same)} columns are called {text!r}; give {option} its place, from 0")
        if same:
            return same[0]
    try:
        place = int(text)
    except ValueError:
        place = count
    if not -count <= place < count:
        known = f"of the columns {', '.join(names[:12])}" if names is not None else "without a header"
        raise UserError(f"{where}: {option} is a name or a place from 0 to {count - 1}, {known}; got {text!r}")
    return place % count


def refuse_label_column(what: str, column: str | int, where: str) -> NoReturn:
    raise UserError(
        f"{where}: {what}: give --label-column {column} (label_column={column!r}) if these are the labels, "
        "--label-column none if they are samples"
    )


GUESS = Reading()
