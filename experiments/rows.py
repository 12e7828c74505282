"""Finished cells of an experiment in a file: JSON lines, or a table (.csv) with a column for each fact and measure.

A row is {"cell": what was asked for, "values": measures by name, and facts of how it was done}. A line that was cut
short is dropped, so that its cell is done again.
"""

import contextlib
import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ncfast.config import Config
from ncfast.engine.checkpoint import atomic_path
from ncfast.errors import UserError

Cell = dict[str, Any]  # "set", "variant", "options", "seed", "budget" and what an experiment adds
Row = dict[str, Any]  # "cell", "seconds" and what an experiment measures

# Columns of a table in their order; every other column is a measure.
TEXT = ("set", "variant")
OPTIONS = ("options", "terms")
CELL = (*TEXT, "seed", "budget", *OPTIONS, "holdout", "few", "num_samples", "draws", "fcn_epochs", "measures", "length")
COUNTS = ("train", "test")
SECONDS = ("training_seconds", "evaluation_seconds", "seconds")
FACTS = (*COUNTS, "incomplete", *SECONDS, "number_format", "machine", "evaluator", "evaluator_accuracy")
FACTS += ("ncfast", "torch", "cuda", "commit", "date")
NUMBERS = {*COUNTS, *SECONDS, "evaluator_accuracy"}


def identity(cell: Cell) -> str:
    """What tells cells apart; what is None or empty says as much as what is not there."""
    return json.dumps({name: value for name, value in cell.items() if value not in (None, {}, [])}, sort_keys=True)


def key_and_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE -> its name and value; a list has + between its words."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"an option is KEY=VALUE; got {text!r}")
    key = key.strip().replace("-", "_")
    hints = {f.name: f.type for f in dataclasses.fields(Config)}
    if hints.get(key) == tuple[str, ...]:
        return key, value.split("+")
    with contextlib.suppress(json.JSONDecodeError):
        return key, json.loads(value)
    return key, value


def options_of(text: str) -> dict[str, Any]:
    """KEY=VALUE,KEY=VALUE -> options by name."""
    return dict(map(key_and_value, filter(None, text.split(","))))


def rows_of(out: Path) -> list[Row]:
    """What is finished.

    Raises:
        UserError: a table of something else.
    """
    if not out.exists():
        return []
    whole, _, _ = out.read_text(encoding="utf-8").rpartition("\n")  # without the line that is not ended
    if out.suffix == ".csv":
        lines = list(csv.reader(io.StringIO(whole)))
        if lines and not {"set", "variant", "seed"} <= set(lines[0]):
            raise UserError(f"{out} is no table of cells: it has the columns {', '.join(lines[0])}")
        header, *lines = lines or [[]]
        return [from_columns(dict(zip(header, line, strict=True))) for line in lines if len(line) == len(header)]
    rows = []
    for line in out.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def add_row(out: Path, row: Row, before: Iterable[Row]) -> None:
    """Keeps a row. A table is written anew with those `before` it, since a row may bring columns of its own."""
    if out.suffix != ".csv":
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    columns = [to_columns(each) for each in [*before, row]]
    there = dict.fromkeys(name for each in columns for name in each)
    header = [name for name in (*CELL, *FACTS) if name in there]
    header += [name for name in there if name not in header]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    with atomic_path(out) as temporary:
        temporary.write_bytes(text.getvalue().encode())


def to_columns(row: Row) -> dict[str, str]:
    columns = {name: as_text(value) for name, value in row["cell"].items()}
    facts = {name: value for name, value in row.items() if name not in ("cell", "values")}
    columns |= {name: short(value) if isinstance(value, float) else as_text(value) for name, value in facts.items()}
    columns |= {name: short(value) for name, value in row["values"].items()}
    return {name: text for name, text in columns.items() if text != ""}


def short(value: float) -> str:
    return f"{value:.6g}"


def as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "+".join(value)
    if isinstance(value, dict):
        return ",".join(f"{key}={as_text(each)}" for key, each in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def from_columns(columns: dict[str, str]) -> Row:
    row: Row = {"cell": {}, "values": {}}
    for name, text in columns.items():
        if text == "":
            continue
        if name in CELL:
            row["cell"][name] = cell_value(name, text)
        elif name in FACTS:
            row[name] = json.loads(text) if name in NUMBERS else text
        else:
            row["values"][name] = float(text)
    return row


def cell_value(name: str, text: str) -> Any:
    if name in TEXT:
        return text
    if name in OPTIONS:
        return options_of(text)
    return text.split("+") if name == "measures" else json.loads(text)
