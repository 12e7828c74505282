"""Tables: a row a series, read by pandas from text, parquet or memory; what each column is, is told by `roles_of`.

pandas and not pyarrow or polars, because aeon, which brings the data sets, brings pandas already.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ncfast.data.arrays import list_some
from ncfast.data.conditions import take_columns
from ncfast.data.dataset import Split
from ncfast.data.layout import LEAST_LAST, NONE, Reading, label_ends, place_of, refuse_label_column, refuse_long_table
from ncfast.errors import UserError

TEXT = (".csv", ".tsv", ".txt", "")  # endings of text tables; the UCR archive of 2015 has none
MISSING = {"", "?", "na", "n/a", "nan", "null", "none", "<na>", "-nan"}
SAMPLE = 50  # lines that separator and header are told from
# Words of the names of columns. A name says what a column holds when it has one of these and else only such as qualify.
LABEL_WORDS = {"label", "labels", "class", "classes", "target", "targets", "category", "categories", "activity", "y"}
INDEX_WORDS = {
    "id",
    "ids",
    "index",
    "idx",
    "time",
    "timestamp",
    "date",
    "datetime",
    "row",
    "rownames",
    "nr",
    "no",
    "key",
}
INDEX_WORDS |= {"uid", "uuid", "file", "filename", "unnamed", "number"}
QUALIFIERS = {"true", "name", "names", "type", "code", "sample", "series", "case", "record", "the", "ts", "gt"}


@dataclass
class Table:
    """Columns as they were read: float64 where every cell is a number or missing, else text.

    names: of the columns, or None without a header. lines: where each row stands in its file, counted from 1.
    """

    where: str
    names: list[str] | None
    columns: list[np.ndarray]
    lines: Any
    label_first: bool = False  # by the convention of the UCR archive
    hint: str = ""

    def name(self, place: int) -> str | int:
        """What an option calls the column."""
        return self.names[place] if self.names and self.names.count(self.names[place]) == 1 else place


class Roles(NamedTuple):
    """What the columns of a table are."""

    width: int
    label: int | None
    left_out: tuple[int, ...]
    names: list[str] | None
    conditions: tuple[int, ...] = ()  # of those left out

    @property
    def header(self) -> bool:
        return self.names is not None


def pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError("tables are read by pandas: pip install 'ncfast[data]', or save arrays as .npz") from None
    return pandas


def split_of(
    table: Table, reading: Reading, notes: list[str], *, labels: Any = None, roles: Roles | None = None
) -> tuple[Split, Roles]:
    """The series and labels of a table.

    Args:
        labels: given besides; then none are looked for in the table.
        roles: those of the training split, which the test split shares.
    """
    if labels is not None:
        reading.refuse(table.where, "label_column")
    is_test = roles is not None
    roles = adapted(roles, table) if is_test else roles_of(table, reading, notes, labelled=labels is not None)
    rest = [i for i in range(len(table.columns)) if i != roles.label and i not in roles.left_out]
    for i in rest:
        if table.columns[i].dtype.kind == "U":
            refuse_text(table, i)
    n = len(table.columns[0]) if table.columns else 0
    X = np.column_stack([table.columns[i] for i in rest]) if rest and n else np.empty((n, len(rest)))
    if roles.label is not None:
        labels = [whole(str(label)) for label in table.columns[roles.label].tolist()]
    names = [table.names[i] for i in rest] if table.names else []
    conditions = {table.names[i]: table.columns[i] for i in roles.conditions}
    named = bool(names) and numbered(names) == "named"
    if not is_test and ((labels is None and not named) or X.shape[1] < LEAST_LAST):
        refuse_long_table(X, reading.layout, table.where)
    return Split(X, labels, table.where, settled=True, hint=table.hint, conditions=conditions), roles


def adapted(roles: Roles, table: Table) -> Roles:
    """For a test table, which may lack the labels."""
    width, names = len(table.columns), roles.names
    if roles.label is not None and width == roles.width - 1:
        names = names and names[: roles.label] + names[roles.label + 1 :]
        left_out, conditions = (tuple(i - (i > roles.label) for i in at) for at in (roles.left_out, roles.conditions))
        roles = roles._replace(label=None, left_out=left_out, conditions=conditions)
    if names and table.names and names != table.names and len(names) == width:
        odd = next(i for i in range(width) if names[i] != table.names[i])
        raise UserError(
            f"{table.where}: column {odd + 1} is {table.names[odd]!r}, and {names[odd]!r} in the training split; both "
            "have the same columns in the same order"
        )
    return roles


def refuse_text(table: Table, i: int) -> None:
    column = table.columns[i]
    faulty = [not is_number(cell) and cell.strip().lower() not in MISSING for cell in column.tolist()]
    row = faulty.index(True)
    advice = f"; --index-column {table.name(i)} leaves the column out" if all(faulty) and len(faulty) > 1 else ""
    raise UserError(
        f"{table.where}: line {table.lines[row]}, column {i + 1}: {str(column[row])[:60]!r} is not a number{advice}"
    )


# What the columns are


def roles_of(table: Table, reading: Reading, notes: list[str], *, labelled: bool) -> Roles:
    """What the columns are: by the user's word, by their names, by what they hold.

    Raises:
        UserError: a column that may be one thing or another, with the option that says which.
    """
    where, names, width = table.where, table.names, len(table.columns)
    if reading.layout in ("ntd", "nctd"):
        raise UserError(f"{where}: --layout {reading.layout} is for arrays of three axes, and this is a table")
    label = None
    if reading.condition_columns and names is None:
        raise UserError(
            f"{where}: --condition-columns (condition_columns) are names, and its columns have none; write them into "
            "the first line, or give --header yes"
        )
    conditions = take_columns(reading.condition_columns, names or [], where)
    left_out: list[int] = []
    if reading.label_column is not None and str(reading.label_column) != NONE:
        label = place_of(reading.label_column, names, width, "--label-column (label_column)", where)
    if reading.index_column is not None and str(reading.index_column) != NONE:
        asked = str(reading.index_column)
        several = [asked] if names is not None and asked in names else asked.split(",")
        left_out = [place_of(column, names, width, "--index-column (index_column)", where) for column in several]
        if label in left_out:
            raise UserError(f"{where}: --label-column and --index-column name the same column; name two")
    if {label, *left_out} & {*conditions}:
        raise UserError(f"{where}: --condition-columns names a column that another option names too; name it once")
    left_out += conditions
    if width < 2:
        return Roles(width, label, tuple(left_out), names)
    if str(reading.index_column) != NONE:
        left_out += index_columns(table, [label, *left_out], notes)
    free = [i for i in range(width) if i not in left_out and i != label]
    if names is not None:
        named = [i for i in free if says(names[i], LABEL_WORDS)]
        if labelled and named and reading.label_column is None:
            refuse_label_column(f"labels are given, and there is a column {names[named[0]]!r} too", NONE, where)
        elif label is None and reading.label_column is None:
            if len(named) > 1:
                raise UserError(
                    f"{where}: line 1 names {len(named)} label columns ({', '.join(names[i] for i in named)}); "
                    "keep one, or give --label-column NAME (label_column)"
                )
            label = named[0] if named else None
            notes += [f"column {names[i]!r} was taken for the labels" for i in named]
        elif label is not None and named:
            left_out += named
            notes.append(f"column {', '.join(repr(names[i]) for i in named)} was left out, beside the labels")
    free = [i for i in free if i not in left_out and i != label]
    if label is None and reading.label_column is None and not labelled:
        label = find_labels(table, free, notes)
        free = [i for i in free if i != label]
    if names is not None and reading.layout is None:
        check_names(table, free, label)
    return Roles(width, label, tuple(left_out), names, tuple(conditions))


def index_columns(table: Table, others: Sequence[int | None], notes: list[str]) -> list[int]:
    """Columns, none of `others`, that number or name the rows by their names; without a header, a first that counts."""
    found = []
    for i, column in enumerate(table.columns):
        if i in others:
            continue
        if table.names is not None and (table.names[i] == "" or says(table.names[i], INDEX_WORDS)):
            if len(np.unique(column)) < len(column) and not says(table.names[i] or "unnamed", {"unnamed"}):
                raise UserError(
                    f"{table.where}: column {table.names[i]!r} has a value several times, so it does not name the "
                    f"series: --index-column {table.name(i)} (index_column) leaves it out, --index-column none does not"
                )
            what = f"column {table.names[i]!r}" if table.names[i] else "the unnamed first column"
            notes.append(f"{what} was taken for a row index and left out")
            found.append(i)
        elif table.names is None and i == 0 and not table.label_first and counts(column):
            notes.append("the first column, which counts, was taken for a row index and left out")
            found.append(i)
    return found


def counts(column: np.ndarray) -> bool:
    n = len(column)
    return n > 2 and column.dtype.kind == "f" and column[0] in (0, 1) and bool((np.diff(column) == 1).all())


def says(name: str, words: set[str]) -> bool:
    """Whether a column's name has one of the words, and else only words that qualify it: class_label, targetClass."""
    parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    kind = [part for part in parts if part in words]
    if kind and kind[0] == "unnamed":
        return True
    more = words | QUALIFIERS | ({"id", "index", "no", "nr"} if "label" in words else set())
    return bool(kind) and all(part in more for part in parts)


def find_labels(table: Table, free: list[int], notes: list[str]) -> int | None:
    """The column of the labels by what it holds: text, or whole numbers that repeat beside samples that are not."""
    where, columns = table.where, table.columns
    if not free:
        return None
    if table.label_first and table.names is None:
        if counts(columns[free[0]]) and not re.search(r"_(train|test)(\.\w+)?$", where, re.IGNORECASE):
            refuse_label_column("the first column counts: --index-column 0 leaves it out", 0, where)
        return free[0]
    text = [i for i in free if columns[i].dtype.kind == "U" and not any(map(is_number, columns[i].tolist()))]
    if len(text) > 1 and len(columns[0]) > 1:
        which = ", ".join(str(table.name(i)) for i in text)
        raise UserError(
            f"{where}: columns {which} hold text, of which one may be labels: give --label-column NAME (label_column), "
            "and --index-column NAME (index_column) to leave one out"
        )
    if text and len(columns[0]) > 1:
        name = table.name(text[0])
        if len(np.unique(columns[text[0]])) == len(columns[0]):
            raise UserError(
                f"{where}: column {name} holds text, another one in each row: give --index-column {name} "
                f"(index_column) to leave it out, or --label-column {name} (label_column) if these are labels"
            )
        notes.append(f"column {name}, which holds text, was taken for the labels")
        return text[0]
    if len(free) < 3 or any(columns[i].dtype.kind == "U" for i in free):
        return None
    ends = label_ends([columns[i] for i in free[:2]], [columns[i] for i in free[:-3:-1]])
    chosen = table.names is not None and numbered([table.names[i] for i in free]) == "named"
    if ends.column is not None and not chosen:
        place = free[ends.column]
        values = list_some([whole(str(value)) for value in np.unique(columns[place]).tolist()])
        notes.append(
            f"column {table.name(place)}, whole numbers ({values}) beside samples that are not, was taken for the "
            "labels (--label-column none keeps it as samples)"
        )
        return place
    if ends.column is not None or (ends.unsure and not chosen):
        place = table.name(free[ends.unsure[0] if ends.column is None else ends.column])
        refuse_label_column(f"column {place} may hold labels or samples", place, where)
    return None


def check_names(table: Table, free: list[int], label: int | None) -> None:
    """Raises UserError for columns that are not the samples of one series, by their names."""
    names = [table.names[i] for i in free]
    if len(names) < 2 or numbered(names):
        return  # a rising number says where each sample is
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(stem(name), []).append(name)
    largest = max(groups.values(), key=len)
    odd = [name for name in names if name not in largest]
    if 0 < 2 * len(odd) < len(largest):
        first = f"--label-column {odd[0]} (label_column), " if label is None else ""
        raise UserError(
            f"{table.where}: there are columns besides the samples {largest[0]} to {largest[-1]}: give {first}"
            f"--index-column {','.join(odd)} (index_column) to leave out, --condition-columns {','.join(odd)} "
            "(condition_columns) to learn what depends on them, or --layout table (layout='table') for more samples"
        )
    raise UserError(
        f"{table.where}: the columns ({list_some(names, 5)}) are not samples numbered in order, so rows may be series "
        "or the time points of one long series: give --layout table (layout='table') if each row is a series; "
        "--window N (window=N) to cut one long series into windows"
    )


def numbered(names: list[str]) -> str:
    """What names say: "plain" for numbers or dates, "named" for one word and rising numbers, else nothing."""
    if all(re.fullmatch(r"[-+\d.:/ TZeE]*\d[-+\d.:/ TZeE]*", name) for name in names):
        return "plain"
    if len({stem(name) for name in names}) > 1:
        return ""
    numbers = [re.findall(r"\d+(?:\.\d+)?", name) for name in names]
    values = [float(found[-1]) if found else np.nan for found in numbers]
    if not (np.diff(values) > 0).all():
        return ""
    # R and pandas name columns so when nobody does.
    return "plain" if stem(names[0]).lower() in ("v#", "x#", "col#", "column#", "f#", "var#", "c#") else "named"


def stem(name: str) -> str:
    """The name without its last number."""
    return re.sub(r"\d+(?:\.\d+)?(?=\D*$)", "#", name)


# Text


def read_text(path: Path, reading: Reading, notes: list[str], *, label_first: bool, hint: str = "") -> Table:
    """A text table: separated by commas, semicolons, tabs or spaces, with decimal points or commas.

    Raises:
        UserError: lines of unequal numbers of cells; a first line that may be a header or a series.
    """
    lines = [(i, line) for i, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1) if line.strip()]
    if lines and re.fullmatch(r"sep=.\s*", lines[0][1]):
        del lines[0]  # a word for Excel
    comments = []
    while lines and lines[0][1].lstrip()[0] in "#%":
        comments.append(lines.pop(0)[1].lstrip()[1:].strip())
    if not lines:
        return Table(str(path), None, [], [], label_first)
    sep, decimal = separator([line for _, line in lines[:SAMPLE]], path)
    if path.suffix.lower() == ".tsv" and sep != "\t":
        raise UserError(f"{path}: line {lines[0][0]} has no tab; a .tsv line is label, tab, values with tabs between")
    if decimal == "," or (path.suffix.lower() == ".csv" and sep != ","):
        between = {"\t": "tabs", " ": "spaces"}.get(sep, repr(sep))
        notes.append(f"cells are separated by {between}, with a decimal {'comma' if decimal == ',' else 'point'}")
    rows = [cells(line, sep) for _, line in lines[: SAMPLE + 1]]
    names = None
    if comments:
        last = cells(comments.pop(), sep)
        if len(last) == len(rows[0]) and reading.header != "no":
            names = last  # as np.savetxt(header=...) writes it
            notes.append("the comment before the first line was taken for a header")
        else:
            comments.append(sep.join(last))
    if comments:
        notes.append(f"{len(comments)} lines of comment at the beginning were left out")
    if names is None:
        if reading.header == "yes":
            first_is_header = True
        else:
            first_is_header = reading.header is None and is_header(
                rows[0], rows[1:], decimal, path, numbers=not label_first
            )
        if first_is_header:
            names = [cell.strip() for cell in rows[0]]
            if reading.header is None and not any(is_text(name, decimal) for name in names):
                notes.append("the first line, evenly spaced numbers, was taken for a header (--header no: a series)")
            lines = lines[1:]
            if lines and len(cells(lines[0][1], sep)) == len(names) + 1:  # as R writes the names of rows
                names = ["", *names]
    columns, numbers = parse(lines, sep, decimal, names, path, label_first)
    if lines and len(columns) < width(lines[0][1], sep):
        notes.append("the empty last column was left out")
    return Table(str(path), names, columns, numbers, label_first, hint)


def parse(
    lines: list[tuple[int, str]],
    sep: str,
    decimal: str,
    names: list[str] | None,
    path: Path,
    label_first: bool,
) -> tuple[list[np.ndarray], list[int]]:
    """Columns, and the numbers of their lines."""
    if not lines:
        return [np.empty(0) for _ in names or []], []
    widths = [width(line, sep) for _, line in lines]
    if names is not None and set(widths) != {len(names)}:
        odd = next(i for i, count in enumerate(widths) if count != len(names))
        raise UserError(f"{path}: line {lines[odd][0]} has {widths[odd]} cells and the header {len(names)}")
    if len(set(widths)) > 1:
        if not label_first:
            raise UserError(
                f"{path}: lines of {min(widths)} to {max(widths)} cells; series of unequal lengths are read from .tsv "
                "with the label first, from .ts, or from .npz with NaN behind each"
            )
        lines = [(n, line + f"{sep}nan" * (max(widths) - w)) for (n, line), w in zip(lines, widths, strict=True)]
        widths = [max(widths)] * len(lines)
    frame = pandas().read_csv(
        io.StringIO("\n".join(line.strip(" \r") for _, line in lines)),
        sep=r"\s+" if sep == " " else sep,
        decimal=decimal,
        header=None,
        names=range(widths[0]),
        index_col=False,
        na_filter=False,
        skipinitialspace=True,
        float_precision="round_trip",  # else the last bit may be another
        low_memory=False,
    )
    columns = [column_of(frame[i].to_numpy(), decimal) for i in frame]
    numbers = [number for number, _ in lines]
    if sep != " " and len(columns) > 1 and (names is None or not names[-1]):
        last = columns[-1]
        if last.dtype.kind == "f" and np.isnan(last).all() and all(line.rstrip().endswith(sep) for _, line in lines):
            del columns[-1]  # every line ends in a separator
            if names is not None:
                del names[-1]
    return columns, numbers


def column_of(values: np.ndarray, decimal: str = ".") -> np.ndarray:
    """float64 where every cell is a number or missing, else text."""
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    if values.dtype.kind == "b":
        return values.astype(str)
    text = np.array(["" if value is None or value != value else str(value).strip() for value in values.tolist()], str)
    try:
        values = np.array([number(cell, decimal) for cell in text.tolist()], np.float64)
    except ValueError:
        return text
    # Without a number in it, words for "missing" may as well be names of classes.
    return text if np.isnan(values).all() and len({*text.tolist()} - {"", "NaN", "nan"}) > 1 else values


def number(cell: str, decimal: str = ".") -> float:
    """Raises ValueError for what is neither a number nor missing."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return np.nan
    if "_" in cell:
        raise ValueError
    return float(cell.replace(",", ".") if decimal == "," else cell)


def is_number(cell: str, decimal: str = ".") -> bool:
    try:
        return not np.isnan(number(cell, decimal))
    except ValueError:
        return False


def is_text(cell: str, decimal: str = ".") -> bool:
    return not is_number(cell, decimal) and cell.strip().lower() not in MISSING


def cells(line: str, sep: str) -> list[str]:
    if sep == " ":
        return [cell.strip("\"'") for cell in line.split()]
    return next(csv.reader([line.strip(" \r")], delimiter=sep, skipinitialspace=True))


def width(line: str, sep: str) -> int:
    return len(cells(line, sep)) if sep == " " or '"' in line else line.count(sep) + 1


def separator(sample: list[str], path: Path) -> tuple[str, str]:
    """What lies between cells, and what before decimals."""
    comma = re.compile(r"[-+]?\d+(,\d+)?([eE][-+]?\d+)?")
    for sep in ("\t", ";", "|"):
        if all(sep in line for line in sample):
            found = [cell.strip() for line in sample for cell in cells(line, sep)]
            with_comma = [cell for cell in found if "," in cell and comma.fullmatch(cell)]
            with_point = [cell for cell in found if "." in cell and is_number(cell)]
            if with_comma and with_point:
                raise UserError(
                    f"{path}: {with_comma[0]!r} and {with_point[0]!r} are both in it; write all decimals in one way"
                )
            return sep, "," if with_comma else "."
    spaced = [line.split() for line in sample]
    body = [cell for line in spaced[1:] or spaced for cell in line]
    if all(len(line) > 1 for line in spaced) and not any(cell.strip(",") != cell for cell in body):
        if not any("," in line for line in sample):
            return " ", "."
        if sum(bool(comma.fullmatch(cell)) for cell in body) >= len(body) - len(spaced):  # all but labels
            return " ", ","
    return ",", "."


def is_header(first: list[str], rest: list[list[str]], decimal: str, path: Path, *, numbers: bool) -> bool:
    """Whether the first line has the names of the columns.

    Text above numbers is a name. Numbers are a header when they are evenly spaced, as those of a time axis, and those
    of the other lines are not. A missing value is no name. numbers: whether a header may be of numbers alone.
    """
    text = [i for i, cell in enumerate(first) if is_text(cell, decimal)]
    values = [number(cell, decimal) for cell in first if is_number(cell, decimal)]
    above = [i for i in text if any(i < len(row) and is_number(row[i], decimal) for row in rest)]
    refusal = UserError(
        f"{path}: the first line may be a header or a series ({list_some([cell.strip() for cell in first], 4)}): "
        "give --header yes or --header no (header)"
    )
    if len(text) + len(values) < len([cell for i, cell in enumerate(first) if i or cell.strip()]):
        if above:
            raise refusal
        return False  # it lacks values, which names do not
    if text and not values:
        return True
    if text and (is_axis(values) or not above):
        return is_axis(values)
    if text:
        raise refusal
    if not numbers or not rest:
        return False
    others = [[number(cell, decimal) for cell in row if is_number(cell, decimal)] for row in rest]
    if is_axis(values):
        if any(is_axis(row) for row in others):
            raise refusal
        return True
    if len(values) >= 8 and rises(values) and others and not any(map(rises, others)) and rises(values[1:]):
        raise refusal
    return False


def is_axis(values: list[float]) -> bool:
    """Whether the numbers are evenly spaced, and too many for chance: a time axis, or columns that are counted."""
    if values in ([*map(float, range(len(values)))], [*map(float, range(1, len(values) + 1))]):
        return len(values) > 2
    steps = np.diff(values)
    return len(values) >= 8 and bool((steps > 0).all() and np.ptp(steps) <= 0.02 * steps.mean())


def rises(values: list[float]) -> bool:
    return bool((np.diff(values) > 0).all())


def whole(label: str) -> str:
    """A class number as the archives mean it: -1 for -1.0 and -1.0000000e+00. Other labels stay as they are."""
    if re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", label) and float(label).is_integer():
        return str(int(float(label)))
    return "" if label == "nan" else label


# Tables in memory and in binary files


def read_parquet(path: Path) -> Table:
    try:
        frame = pandas().read_parquet(path)
    except ImportError:
        raise UserError(f"{path}: parquet is read by pyarrow: pip install pyarrow") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); is it damaged?") from error
    except Exception as error:  # pyarrow's own, which are none of Python's
        if type(error).__module__.startswith("pyarrow"):
            raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); is it damaged?") from error
        raise
    return of_frame(frame, str(path))


def read_arff(path: Path) -> Table:
    """The WEKA format, as the UCR archive has it: numbers, and a nominal attribute for the labels."""
    try:
        from scipy.io import arff
    except ImportError:
        raise UserError(f"{path}: .arff is read by scipy: pip install 'ncfast[data]'") from None
    try:
        with open(path, encoding="utf-8-sig") as file:
            records, meta = arff.loadarff(file)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: {error}; of several channels or with text, use the .ts file of the data set"
        ) from error
    except (arff.ArffError, ValueError, StopIteration, IndexError) as error:
        raise UserError(f"{path}: cannot be read ({str(error) or type(error).__name__}); is it damaged?") from error
    names = list(meta.names())
    if any(records[name].dtype.kind not in "fS" for name in names):
        raise UserError(f"{path}: it has several channels, or text; take the .ts file of the data set instead")
    columns = [
        records[name].astype(np.float64) if records[name].dtype.kind == "f" else np.char.decode(records[name], "utf-8")
        for name in names
    ]
    nominal = [i for i, kind in enumerate(meta.types()) if kind == "nominal"]
    if len(nominal) == 1 and not says(names[nominal[0]], LABEL_WORDS):
        names[nominal[0]] = "class"
    return Table(str(path), names, columns, list(range(1, len(records) + 1)))


def of_frame(frame: Any, where: str) -> Table:
    """The columns of a table of pandas, polars or pyarrow; names that only count are none."""
    keys = list(frame.columns if not hasattr(frame, "column_names") else frame.column_names)
    if len(set(keys)) < len(keys):
        raise UserError(f"{where}: columns have the same name; give each its own")
    columns = [frame_column(frame[key], where) for key in keys]
    names = None if all(isinstance(key, int | np.integer) for key in keys) else [str(key) for key in keys]
    return Table(where, names, columns, range(len(columns[0]) if columns else 0))


def frame_column(column: Any, where: str) -> np.ndarray:
    values = column.to_numpy()
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    if values.dtype.kind in "bM":
        return values.astype(str)
    if any(np.ndim(value) for value in values.tolist()):
        raise UserError(f"{where}: its cells hold arrays; give an array [n, channels, length]")
    values = [None if value is None or value is pandas().NA or value != value else value for value in values.tolist()]
    if all(value is None or isinstance(value, int | float | np.number) for value in values):
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return np.array(["" if value is None else str(value) for value in values], str)
