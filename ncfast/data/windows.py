"""Windows cut from long recordings: one table or array whose rows follow each other in time."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ncfast.data import tables
from ncfast.data.arrays import to_numpy
from ncfast.data.conditions import column_values, take_columns
from ncfast.data.dataset import Dataset, Split, make_dataset
from ncfast.data.layout import GUESS, Reading
from ncfast.errors import UserError

if TYPE_CHECKING:
    import pandas

TEST_SHARE = 0.2
LEAST_OBSERVED = 0.5  # share of a window's values
TIME_NAMES = ("time", "date", "datetime", "timestamp")
ROW_NAMES = ("", "id", "index", "row", "unnamed: 0")


def windows_of(
    table: Any,
    window: int,
    stride: int = 1,
    *,
    time_column: str | None = None,
    group_column: str | None = None,
    condition_columns: Sequence[str] = (),
    test_share: float = TEST_SHARE,
    name: str = "table",
    source: str = "table",
) -> Dataset:
    """A data set of windows, unlabelled: every `stride` rows one of `window` rows, each column a channel.

    The last `test_share` of each recording is the test split: no window lies in both, and none crosses from one
    recording to the next. A window with less than half its values is left out, with a note.

    Args:
        table: a DataFrame, or an array [T, C] or [T]; rows in order of time, but for a DataFrame with a time column.
        window: rows of a window, 1 or more.
        stride: rows from the start of one window to that of the next, 1 or more.
        time_column: orders the rows, and is no channel; None takes a column of times, or one of that name, if there is
            just one.
        group_column: rows of one value are one recording, and it is no channel.
        condition_columns: of a DataFrame: their values in a window's first row are its conditions, and they are no
            channels.
        test_share: 0 makes no test split.

    Raises:
        UserError: numbers that cannot be, columns that are not there or hold no numbers, recordings that are too short.
    """
    if window < 1 or stride < 1 or not 0 <= test_share < 1:
        raise UserError(
            f"--window and --stride are at least 1 and --test-share is from 0 to below 1; got {window}, {stride}, "
            f"{test_share:g}"
        )
    notes: list[str] = []
    if hasattr(table, "columns"):
        values, recordings, channels, known = from_frame(
            table, time_column, group_column, condition_columns, source, notes
        )
    else:
        if time_column is not None or group_column is not None or condition_columns:
            raise UserError(f"{source}: an array has no columns with names; give a DataFrame or leave the name out")
        values = to_numpy(table, source)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2 or values.dtype.kind not in "fiub":
            raise UserError(
                f"{source}: a recording is [T] or [T, C] of numbers; got {values.dtype} {list(values.shape)}"
            )
        recordings, channels, known = [np.arange(len(values))], None, {}
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    starts: tuple[list[int], list[int]] = ([], [])  # the first row of each
    dropped = short = 0
    lowest = LEAST_OBSERVED * window * values.shape[1]
    for rows in recordings:
        border = len(rows) - int(test_share * len(rows))
        splits = rows[:border], rows[border:]
        cut = [list(windows(values[part], window, stride)) for part in splits]
        short += not cut[0]
        for kept, firsts, part, made in zip(parts, starts, splits, cut, strict=True):
            seen = [i for i, each in enumerate(made) if np.isfinite(each).sum() >= lowest]
            dropped += len(made) - len(seen)
            kept += [made[i] for i in seen]
            firsts += [part[stride * i] for i in seen]
    if not parts[0]:
        longest = max(map(len, recordings), default=0)
        raise UserError(
            f"{source}: no window of {window} rows with at least half its values: the longest recording has {longest} "
            f"rows, of which the first {1 - test_share:g} trains; lower --window"
        )
    if short:
        notes.append(f"{short} of {len(recordings)} recordings are shorter than a window and train nothing")
    if dropped:
        notes.append(f"{dropped} windows with less than half their values were left out")
    counts = f"{len(parts[0])} train" + (f" and {len(parts[1])} test" if test_share else "")
    named = "" if channels is None else f" of {', '.join(channels)}"
    notes.insert(0, f"windows of {window} rows, one every {stride}: {counts}{named}")
    if known:
        notes.append(f"conditions ({', '.join(known)}) are those of a window's first row")
    train, test = (
        Split(np.stack(part), None, source, ends=False, conditions={k: column[firsts] for k, column in known.items()})
        if part
        else None
        for part, firsts in zip(parts, starts, strict=True)
    )
    return make_dataset(train, test, name=name, source=source, notes=notes)


def load_windows(path: Path, window: int, stride: int = 1, *, reading: Reading = GUESS, **options: Any) -> Dataset:
    """`windows_of` a file: a text table (.csv, .tsv, .txt), .parquet, or an array in .npy.

    Raises:
        UserError: a file that is not there or cannot be read; see `windows_of`.
    """
    notes: list[str] = []
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            table = np.load(path, allow_pickle=False)
        elif suffix in (".csv", ".tsv", ".txt", ".parquet"):
            table = read_table(path, reading, notes)
        else:
            raise UserError(f"--window takes a .csv, .tsv, .txt, .parquet or .npy file; got {path}")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ParserError is a ValueError
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    options["condition_columns"] = reading.condition_columns
    made = windows_of(table, window, stride, name=path.stem, source=str(path), **options)
    return dataclasses.replace(made, notes=(*notes, *made.notes))


def read_table(path: Path, reading: Reading, notes: list[str]) -> "pandas.DataFrame":
    """A DataFrame of the columns of a file."""
    if path.suffix.lower() == ".parquet":
        table = tables.read_parquet(path)
    else:
        table = tables.read_text(path, reading, notes, label_first=False)
        if table.names is None:
            notes.append(f"{path}: the first line holds numbers and was taken for a row, not for names")
    names = table.names or range(len(table.columns))
    return tables.pandas().DataFrame(dict(zip(map(str, names), table.columns, strict=True)))


def refuse_without_window(
    stride: int, time_column: str | None, group_column: str | None, test_share: float = TEST_SHARE
) -> None:
    """Raises UserError for options that mean nothing where no window is given."""
    if (stride, time_column, group_column, test_share) != (1, None, None, TEST_SHARE):
        raise UserError("--stride, --time-column, --group-column and --test-share are for windows; add --window N")


def windows(values: np.ndarray, window: int, stride: int) -> Iterator[np.ndarray]:  # [T, C]
    """Each [C, window]."""
    for first in range(0, len(values) - window + 1, stride):
        yield values[first : first + window].T


def from_frame(
    frame: "pandas.DataFrame",
    time_column: str | None,
    group_column: str | None,
    condition_columns: Sequence[str],
    source: str,
    notes: list[str],
) -> tuple[np.ndarray, list[np.ndarray], list[str], dict[str, np.ndarray]]:
    """Values float64 [T, C], the rows of each recording in order of time, the channels' names, and conditions [T]."""
    pandas = tables.pandas()
    frame = frame.reset_index(drop=True)
    frame.columns = [str(column) for column in frame.columns]
    for option, column in (("--time-column", time_column), ("--group-column", group_column)):
        if column is not None and column not in frame:
            raise UserError(f"{source}: {option} {column} is none of its columns ({', '.join(frame.columns)})")
    take_columns(condition_columns, list(frame), source)
    conditions = {name: column_values(frame[name], name) for name in condition_columns}
    frame = frame.drop(columns=[name for name in condition_columns if name not in (time_column, group_column)])
    times = None
    if time_column is None:
        found = [column for column in frame if column != group_column and is_time(frame[column], column)]
        if len(found) > 1:
            raise UserError(f"{source}: {', '.join(found)} could all be the time; say which with --time-column")
        time_column = found[0] if found else None
        if found:
            notes.append(f"column {time_column} was taken for the time (--time-column)")
    if time_column is not None:
        times = frame.pop(time_column)
        times = (
            times
            if pandas.api.types.is_numeric_dtype(times)
            else pandas.to_datetime(times, errors="coerce", format="mixed")
        )
        if times.isna().any():
            raise UserError(f"{source}: row {int(times.isna().argmax())} of column {time_column} is no time")
    groups = None if group_column is None else frame.pop(group_column)
    for column in [each for each in frame if each.lower() in ROW_NAMES]:
        if (frame[column].diff().iloc[1:] == 1).all():
            del frame[column]
            notes.append(f"column {column} counts the rows and was left out")
    words = [column for column in frame if not pandas.api.types.is_numeric_dtype(frame[column])]
    if words:
        raise UserError(
            f"{source}: column {words[0]} holds no numbers ({frame[words[0]].iloc[0]!r}); name it with --group-column "
            "or --time-column, or take it out"
        )
    if not len(frame.columns):
        raise UserError(f"{source}: no column is left to be a channel")
    rows = np.arange(len(frame))
    recordings = [rows] if groups is None else [rows[groups == value] for value in groups.dropna().unique()]
    if groups is not None and groups.isna().any():
        notes.append(f"{int(groups.isna().sum())} rows without a {group_column} were left out")
    if times is not None:
        recordings = [in_order(rows, times, time_column, notes) for rows in recordings]
    return frame.to_numpy(np.float64, na_value=np.nan), recordings, list(frame.columns), conditions


def is_time(column: "pandas.Series", name: str) -> bool:
    """By its type, by its name where it holds numbers, or because all its text is times."""
    pandas = tables.pandas()
    if pandas.api.types.is_datetime64_any_dtype(column):
        return True
    if pandas.api.types.is_numeric_dtype(column):
        return name.lower() in TIME_NAMES
    try:
        return not pandas.to_datetime(column, errors="raise", format="mixed").isna().any()
    except (ValueError, TypeError, OverflowError):
        return False


def in_order(rows: np.ndarray, times: "pandas.Series", name: str, notes: list[str]) -> np.ndarray:
    """The rows by time; notes say what was out of order, and where steps are not alike."""
    order = np.argsort(times.to_numpy()[rows], kind="stable")
    if (order != np.arange(len(rows))).any():
        notes.append(f"the rows were sorted by {name}")
    rows = rows[order]
    steps = np.diff(times.to_numpy()[rows])
    values, counts = np.unique(steps, return_counts=True)
    if len(values) > 1:
        odd = len(steps) - counts.max()
        notes.append(f"{odd} of {len(steps)} steps of {name} are not the usual one: windows count rows, not time")
    return rows
