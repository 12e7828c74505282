"""Generated series in the formats of others: a table of text, NumPy's archive, Parquet."""

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from ncfast.config import FILE_FORMATS
from ncfast.data.conditions import LENGTH
from ncfast.engine.checkpoint import atomic_path
from ncfast.errors import UserError
from ncfast.jobs.reader import Generated

if TYPE_CHECKING:
    import pandas

BLOCK_VALUES = 2**22  # of one piece that is held in memory


def format_of(path: Path, asked: str | None = None) -> str:
    """The format that is asked for, or that of the suffix; HDF5 without one.

    Raises:
        UserError: a suffix of no format, or of another one than is asked for.
    """
    suffix = path.suffix.lower().lstrip(".")
    suffix = "h5" if suffix in ("", "hdf", "hdf5") else suffix
    if asked is None:
        if suffix not in FILE_FORMATS:
            raise UserError(
                f"no format has the suffix of {path.name}; there are {', '.join(FILE_FORMATS)}, or give --format"
            )
        return suffix
    if path.suffix and suffix in FILE_FORMATS and suffix != asked:
        raise UserError(f"--format {asked} and the name {path.name} do not fit; leave one out")
    return asked


def check_export(kind: str, channels: int, labelled: bool, conditional: bool = False) -> None:
    """What can be told before anything is drawn.

    Raises:
        UserError: a layout that the format does not have, or a package that is not installed.
    """
    if kind == "tsv" and channels > 1:
        raise UserError(f"tsv has one channel, and these series have {channels}; choose csv, npz or parquet")
    if kind == "tsv" and not labelled:
        raise UserError("a line of tsv begins with a label, and these series have none; choose csv, npz or parquet")
    if kind == "tsv" and conditional:
        raise UserError("tsv has no names of columns, and these series have conditions; choose csv, npz or parquet")
    for package in {"csv": ("pandas",), "tsv": ("pandas",), "parquet": ("pandas", "pyarrow")}.get(kind, ()):
        needed(package)


def export(data: Generated, path: Path, kind: str) -> None:
    """Writes all series, whole or not at all, in a format that `check_export` has let pass.

    csv and parquet have a row a series (label, t0, t1, ...), or with several channels a row a time point (series,
    label, time, c0, c1, ...); without classes no label. Where series have ends of their own, `length` is a column, or
    an array [n]; cells beyond the end are empty, NaN in tsv and npz, and of rows that are time points there are none.
    tsv is that of the UCR archive, without a header: label first,
    one channel. npz has X [n, C, L] and, with classes, y, their names. A condition is a column, or an array [n], of its
    name, after "condition_" where another one has that name.

    Raises:
        UserError: what the disk refuses.
    """
    write = {"csv": write_text, "tsv": write_text, "npz": write_npz, "parquet": write_parquet}[kind]
    try:
        with atomic_path(path) as temporary:
            write(data, temporary, kind)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error


def conditions_of(data: Generated, rows: slice, taken: Iterable[str], *, lengths: bool = True) -> dict[str, np.ndarray]:
    """The length of each series, where they are unequal, and values of each condition [B] by the name of its column."""
    taken = {*taken}
    values = data.condition_values(rows)
    named = {f"condition_{name}" if name in taken else name: column for name, column in values.items()}
    return {LENGTH: data.length[rows], **named} if lengths and data.length is not None else named


def blocks(data: Generated) -> Iterator[tuple[slice, np.ndarray, np.ndarray | None]]:
    """Rows, their series [B, C, L] and the names of their classes [B]."""
    names = np.array(data.class_names)
    size = max(1, BLOCK_VALUES // max(1, int(np.prod(data.x.shape[1:]))))
    for first in range(0, len(data), size):
        rows = slice(first, min(first + size, len(data)))
        yield rows, data.x[rows].astype(np.float32), None if data.y is None else names[data.y[rows]]


def frames(data: Generated, kind: str) -> Iterator["pandas.DataFrame"]:
    """The table of each block."""
    library = needed("pandas")
    _, channels, length = data.x.shape
    for rows, x, labels in blocks(data):
        if channels == 1:
            frame = library.DataFrame(x[:, 0], columns=[f"t{t}" for t in range(length)])
            known = conditions_of(data, rows, ["label", *frame.columns], lengths=kind != "tsv")
            frame = library.concat([library.DataFrame(known), frame], axis=1) if known else frame
            if labels is not None:
                frame.insert(0, "label", labels)
        else:
            columns = {"series": np.repeat(np.arange(rows.start, rows.stop), length)}
            if labels is not None:
                columns["label"] = np.repeat(labels, length)
            names = ["series", "label", "time", *(f"c{c}" for c in range(channels))]
            columns |= {name: np.repeat(v, length) for name, v in conditions_of(data, rows, names).items()}
            columns["time"] = np.tile(np.arange(length), len(x))
            columns |= {f"c{c}": x[:, c].ravel() for c in range(channels)}
            frame = library.DataFrame(columns)
            if data.length is not None:
                frame = frame[frame["time"] < frame[LENGTH]]
        yield frame


def write_text(data: Generated, path: Path, kind: str) -> None:
    # Nine digits give every float32 back.
    separator, with_header = ("\t", False) if kind == "tsv" else (",", True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        for k, frame in enumerate(frames(data, kind)):
            frame.to_csv(
                file,
                sep=separator,
                header=with_header and k == 0,
                index=False,
                float_format="%.9g",
                na_rep="NaN" if kind == "tsv" else "",
            )


def write_npz(data: Generated, path: Path, kind: str) -> None:
    arrays = {"X": data.x[:]}
    if data.y is not None:
        arrays["y"] = np.array(data.class_names)[data.y[:]]
    arrays |= conditions_of(data, slice(None), ["X", "y"])
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def write_parquet(data: Generated, path: Path, kind: str) -> None:
    arrow, parquet = needed("pyarrow"), needed("pyarrow.parquet")
    with contextlib.ExitStack() as ends:
        writer = None
        for frame in frames(data, kind):
            table = arrow.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                writer = ends.enter_context(parquet.ParquetWriter(str(path), table.schema))
            writer.write_table(table)


def needed(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise UserError(f"this format needs {name}: pip install {name}, or choose npz") from None
