"""The flags of a program that are made from the configuration."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

from ncfast.config import Config, is_optional, without_none


def add_config_arguments(
    parser: argparse.ArgumentParser, group: str | None = None, default: str = "", without: Sequence[str] = ()
) -> None:
    """One flag a field, grouped; only flags that were given appear in the parsed namespace.

    Args:
        group: of the fields; None takes all.
        default: what --help names as the default, in place of the field's own.
        without: fields that get no flag.
    """
    hints = typing.get_type_hints(Config)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in dataclasses.fields(Config):
        name = f.metadata["group"]
        if group not in (None, name) or f.name in without:
            continue
        flags = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        hint = without_none(hints[f.name]) if is_optional(hints[f.name]) else hints[f.name]
        kwargs: dict[str, Any] = {"help": f.metadata["help"], "default": argparse.SUPPRESS}
        if typing.get_origin(hint) is Literal:
            kwargs["choices"] = typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            kwargs |= {"nargs": "+", "metavar": "NAME"}
        else:
            kwargs["type"] = hint
            kwargs["metavar"] = "X" if kwargs["type"] is float else "N"
        shown = default or (" ".join(f.default) if isinstance(f.default, tuple) else f.default)
        if shown is not None:
            kwargs["help"] += f" [{shown}]"
        flags.add_argument("--" + f.name.replace("_", "-"), **kwargs)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """How the data are read where they do not tell: `ncfast.data.layout.Reading`."""
    parser.add_argument("--data-dir", help="folder where a name is looked up first")
    reading = parser.add_argument_group("Reading the data", "Found out where not given; what is ambiguous is refused.")
    reading.add_argument(
        "--label-column",
        metavar="NAME|INDEX|none",
        help="the labels: a column of a table, by name or place (from 0; -1 is the last), or an array of a file of "
        "arrays; none: no labels",
    )
    reading.add_argument(
        "--layout",
        choices=("nctd", "ntd", "table"),
        help="axes of arrays: nctd is [series, channels, time], ntd [series, time, channels]; table: each row of a "
        "table is a series, whatever its columns are called",
    )
    reading.add_argument(
        "--header", choices=("yes", "no"), help="whether the first line of a text table has the names of its columns"
    )
    reading.add_argument(
        "--index-column",
        metavar="NAME|INDEX|none",
        help="a column of a table to leave out, or several with commas between; none: leave none out",
    )
    reading.add_argument(
        "--condition-columns",
        metavar="NAME,NAME",
        help="what is known of each series besides its class, numbers or categories: columns of a table or arrays of a "
        "file; of windows, the value in the first row",
    )

    windows = parser.add_argument_group("Windows", "The file is a long recording: rows in order of time.")
    windows.add_argument("--window", type=int, metavar="N", help="rows of a series, which each column is a channel of")
    windows.add_argument("--stride", type=int, metavar="N", help="rows between the starts of two [1]")
    windows.add_argument("--time-column", metavar="NAME", help="orders the rows [a column of times, if there is one]")
    windows.add_argument("--group-column", metavar="NAME", help="rows of one value are one recording [one for all]")
    windows.add_argument(
        "--test-share", type=float, metavar="X", help="last part of each recording, to test with [0.2]"
    )


READING = ("label_column", "layout", "header", "index_column", "condition_columns")
WINDOWS = ("window", "stride", "time_column", "group_column", "test_share")


def reading_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `ncfast.data.load_dataset`, those that were given."""
    values = {name: getattr(arguments, name) for name in (*READING, *WINDOWS)}
    return {name: value for name, value in values.items() if value is not None}


def given_config_values(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(Config)}
    return {name: value for name, value in vars(arguments).items() if name in names}
