"""What mkdocs does to the pages: the table of options is made from `ncfast.config`."""

import dataclasses
import types
import typing
from typing import Any

from ncfast.config import PRESETS, Config, is_optional, without_none

MARK = "<!-- options -->"
HEAD = "| option | type | default | `paper` | meaning |"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, options_tables()) if MARK in markdown else markdown


def options_tables() -> str:
    """One table for each group of options."""
    hints = typing.get_type_hints(Config)
    lines, group = [], ""
    for f in dataclasses.fields(Config):
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"### {group}", "", HEAD, "|---|---|---|---|---|"]
        paper = PRESETS["paper"].get(f.name)
        text = f.metadata["help"].replace("%%", "%").replace("|", "\\|")
        cells = (f"`{f.name}`", type_text(hints[f.name]), shown(f.default), "" if paper is None else shown(paper), text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def type_text(hint: Any) -> str:
    if is_optional(hint):
        return f"{type_text(without_none(hint))}, None"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(hint))
    return "names" if isinstance(hint, types.GenericAlias) else hint.__name__


def shown(value: Any) -> str:
    return f"`{' '.join(value) if isinstance(value, tuple) else value}`"
