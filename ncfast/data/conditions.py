"""Conditions besides a class: a number or a category for each series, such as the age and the sex of who was measured.

Everywhere a series' conditions are one row of float64, a column each: a number as it is, a category as its place in
`ConditionColumn.categories`, NaN where it is not known. That is what `Dataset`, the prior and a file of series hold.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ncfast.data.arrays import FLOAT32_MAX, label_text, list_some, sorted_classes, to_numpy
from ncfast.data.layout import Reading
from ncfast.errors import UserError

if TYPE_CHECKING:
    from ncfast.data.dataset import Dataset, Split

MOST_CATEGORIES = 1000
LENGTH = "length"  # the condition that series of unequal lengths have without being given it


@dataclass(frozen=True)
class ConditionColumn:
    """One condition, as the training set has it.

    Attributes:
        kind: "number", or "category" for text and truth values.
        mean, std: of a number over the training set; std is 1 where it is the same for all.
        categories: sorted names, as those of classes.
    """

    name: str
    kind: Literal["number", "category"]
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, values: Any, where: str = "conditions") -> "ConditionColumn":
        """That of training values [n].

        Raises:
            UserError: a value is missing or infinite, or categories are too many to learn.
        """
        values = column_values(values, f"{where}: condition {name}")
        check_known(values, f"{where}: condition {name}")
        if values.dtype.kind == "f":
            std = float(values.std())
            return cls(name, "number", float(values.mean()), std if std > 0 else 1.0)
        categories = sorted_classes(values)
        if len(categories) > min(MOST_CATEGORIES, max(2, len(values) // 2)):
            raise UserError(
                f"{where}: condition {name} has {len(categories)} different texts in {len(values)} series, too few "
                "series of each to learn from: merge them, give numbers, or leave it out"
            )
        return cls(name, "category", categories=categories)

    @classmethod
    def from_json(cls, values: Any) -> "ConditionColumn":
        """What `dataclasses.asdict` gave, as JSON has it. Raises ValueError for anything else."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names or not isinstance(values["categories"], list | tuple):
            raise ValueError(f"a condition is {', '.join(sorted(names))}")
        column = cls(**{**values, "categories": tuple(values["categories"])})
        numbers = all(isinstance(v, int | float) and abs(v) <= FLOAT32_MAX for v in (column.mean, column.std))
        texts = [column.name, *column.categories]
        if not numbers or not column.std > 0 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"condition {column.name} cannot be {values}")
        if column.kind not in ("number", "category") or (column.kind == "category") != bool(column.categories):
            raise ValueError(f"condition {column.name} cannot be of the kind {column.kind} with these categories")
        return column

    def encode(self, values: Any, where: str = "condition", *, unseen: bool = False) -> np.ndarray:
        """Values of any type [n], or one alone -> float64 [n].

        Args:
            unseen: take a missing value and a category that the training set lacks for not known, NaN.

        Raises:
            UserError: such a value, a text that is no number, or an infinity.
        """
        where = f"{where} {self.name}"
        values = column_values(values, where)
        if not unseen:
            check_known(values, where)
        if self.kind == "number":
            try:
                numbers = values if values.dtype.kind == "f" else np.array([float(v or "nan") for v in values.tolist()])
            except ValueError:
                raise UserError(f"{where} is a number; got {str(values[0])!r}") from None
            check_known(numbers[~np.isnan(numbers)] if unseen else numbers, where)
            return numbers
        names = [label_text(value) for value in values.tolist()]
        place = {name: float(i) for i, name in enumerate(self.categories)}
        for name in [] if unseen else names:
            if name not in place:
                close = did_you_mean(name, self.categories)
                raise UserError(f"{where} is one of {list_some(self.categories, 20)}; got {name!r}{close}")
        return np.array([place.get(name, np.nan) for name in names])

    def decode(self, encoded: np.ndarray) -> np.ndarray:
        """float64 [n] -> numbers float64 [n], or categories as text [n]; NaN and "" where not known."""
        if self.kind == "number":
            return np.asarray(encoded, np.float64)
        names = np.array([*self.categories, ""])
        return names[np.where(np.isnan(encoded), len(self.categories), encoded).astype(np.int64)]

    def __str__(self) -> str:
        if self.kind == "category":
            return f"condition {self.name}: one of {list_some(self.categories)}"
        return f"condition {self.name}: a number, mean {self.mean:.4g}, standard deviation {self.std:.4g}"


def decode_conditions(columns: Sequence[ConditionColumn], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows float64 [n, k] -> the values of each condition by its name [n]."""
    return {column.name: column.decode(rows[:, i]) for i, column in enumerate(columns)}


def conditions_of_splits(
    train: "Split", test: "Split | None", n_train: int, n_test: int, notes: list[str]
) -> tuple[tuple[ConditionColumn, ...], np.ndarray | None, np.ndarray | None]:
    """The columns, and the conditions of both splits float64 [n, k]; none of either where the training split has none.

    Raises:
        UserError: numbers of values that do not fit the series; see `ConditionColumn.of`.
    """
    if not train.conditions:
        return (), None, None
    columns = []
    for name, values in train.conditions.items():
        check_count(name, values, n_train, train.where)
        columns.append(ConditionColumn.of(name, values, train.where))
        notes.append(str(columns[-1]))
    rows = np.column_stack([c.encode(train.conditions[c.name], train.where) for c in columns])
    if test is None:
        return tuple(columns), rows, None
    given = test.conditions or {}
    lacking = [column.name for column in columns if column.name not in given]
    if lacking:
        notes.append(f"{test.where}: the test series have no {', '.join(lacking)}, and so no conditions")
        return tuple(columns), rows, None
    for name, values in given.items():
        check_count(name, values, n_test, test.where)
    test_rows = np.column_stack([c.encode(given[c.name], test.where, unseen=True) for c in columns])
    if np.isnan(test_rows).any():
        count = int(np.isnan(test_rows).any(1).sum())
        notes.append(f"{test.where}: {count} test series have a condition that is missing or not in the training split")
    return tuple(columns), rows, test_rows


def with_length(dataset: "Dataset") -> tuple[tuple[ConditionColumn, ...], np.ndarray | None]:
    """What the prior is told of the training series: its columns, and rows float64 [n, k], None without any.

    Where series end before the longest, the last column is their length: it is learned and drawn as a condition is.
    """
    columns, rows = tuple(dataset.condition_columns), dataset.conditions_train
    if dataset.lengths_train is None:
        return columns, rows
    lengths = dataset.lengths_train.astype(np.float64)
    rows = lengths[:, None] if rows is None else np.column_stack([rows, lengths])
    return (*columns, ConditionColumn.of(LENGTH, lengths)), rows


def check_count(name: str, values: Any, n: int, where: str) -> None:
    count = len(column_values(values, f"{where}: condition {name}"))
    if count != n:
        raise UserError(f"{where}: {n} series need {n} values of condition {name}, one each; got {count}")


def check_known(values: np.ndarray, what: str) -> None:
    """Raises UserError for missing and infinite values; it names the row."""
    missing = values == "" if values.dtype.kind == "U" else np.isnan(values)
    if missing.any():
        row = f" of series {int(missing.argmax())} (counted from 0)" if len(values) > 1 else ""
        raise UserError(f"{what}{row} is missing; fill it in, or leave out such series or the condition")
    if values.dtype.kind == "f" and (np.abs(values) > FLOAT32_MAX).any():
        raise UserError(f"{what} is a finite number; got {values[np.abs(values) > FLOAT32_MAX][0]:g}")


def column_values(values: Any, what: str) -> np.ndarray:
    """float64 [n] where all values are numbers or missing, else text [n], "" where missing; one value alone is [1]."""
    array = np.atleast_1d(to_numpy(values.to_numpy() if hasattr(values, "to_numpy") else values, what))
    array = array.ravel() if array.ndim == 2 and 1 in array.shape else array
    if array.ndim != 1:
        raise UserError(f"{what} has one value for each series, [n]; got the shape {list(array.shape)}")
    if array.dtype.kind in "iuf":
        return array.astype(np.float64)
    items = [None if str(item).strip() in ("", "nan", "<NA>", "NaT", "?") else item for item in array.tolist()]
    if all(item is None or (isinstance(item, int | float | np.number) and item is not bool(item)) for item in items):
        return np.array([np.nan if item is None else item for item in items], np.float64)
    return np.array([label_text(item).strip() for item in items], str)


def named_columns(conditions: Any, what: str = "conditions") -> dict[str, Any]:
    """Values by name, of a mapping, a table of pandas, polars or pyarrow, or an array [n, k] (condition0, ...)."""
    if isinstance(conditions, Mapping):
        columns = dict(conditions)
    elif hasattr(conditions, "columns") or hasattr(conditions, "column_names"):
        keys = conditions.columns if not hasattr(conditions, "column_names") else conditions.column_names
        columns = {key: conditions[key] for key in keys}
    else:
        array = to_numpy(conditions, what)
        if array.ndim not in (1, 2):
            raise UserError(
                f"{what} are a table, a dict of arrays [n] by name, or an array [n, k]; got {list(array.shape)}"
            )
        array = array[:, None] if array.ndim == 1 else array
        columns = {f"condition{i}": array[:, i] for i in range(array.shape[1])}
    if not all(str(name).strip() for name in columns):
        raise UserError(f"{what} have names; one is empty")
    return {str(name): values for name, values in columns.items()}


def take_columns(names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """The places of the columns of these names. Raises UserError for one that is not there, or there twice."""
    places = []
    for name in names:
        same = [i for i, other in enumerate(known) if other == name]
        if len(same) != 1:
            problem = "is there several times" if same else f"is none of {list_some(known, 12)}"
            raise UserError(
                f"{where}: --condition-columns (condition_columns) {name} {problem}{did_you_mean(name, known)}"
            )
        places += same
    return places


def did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(close)}?" if close and name not in known else ""


# Of a command line


def parse_conditions(words: Sequence[str]) -> dict[str, list[str]]:
    """--condition age=63 sex=f, or age=63,sex=f; a name that comes several times has its values in turn."""
    given: dict[str, list[str]] = {}
    for part in [part for word in words for part in re.split(r",(?=[^,=]+=)", word)]:
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UserError(f"--condition takes NAME=VALUE, such as age=63; got {part!r}")
        given.setdefault(name.strip(), []).append(value.strip())
    return given


def read_conditions(path: Path) -> dict[str, Any]:
    """Values by name, of JSON (an object of values or lists, or a list of objects) or a table, a row a series.

    Raises:
        UserError: a file that is not there, cannot be read or holds something else.
    """
    from ncfast.data import tables

    try:
        if path.suffix.lower() == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
                names = dict.fromkeys(name for row in content for name in row)
                content = {name: [row.get(name) for row in content] for name in names}
            if not isinstance(content, dict):
                raise UserError(f"{path} holds an object of names and values, or a list of such; got something else")
            return content
        if path.suffix.lower() == ".parquet":
            table = tables.read_parquet(path)
        elif path.suffix.lower() in (".csv", ".tsv", ".txt"):
            table = tables.read_text(path, Reading(header="yes"), [], label_first=False)
        else:
            raise UserError(f"--condition-file is .csv, .tsv, .txt, .parquet or .json; got {path}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not table.names:
        raise UserError(f"{path}: its columns have no names; write them into the first line")
    return dict(zip(table.names, table.columns, strict=True))
