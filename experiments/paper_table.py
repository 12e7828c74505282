"""The paper's table: sets x {none, Barlow Twins, VIbCReg, VICReg} x views x seeds at the paper's epochs, and `default`.

A cell is a row of --out, a table with all measures and what they were measured with. Sets go from the smallest on, and
of a set all settings of a seed before the next seed, so that a table that is cut short says something. Each process
trains and measures: while one is on the processor with its measures, the others keep the GPU busy.
"""

import argparse
from pathlib import Path
from typing import Any

from experiments.cells import add_arguments, run
from experiments.held_out import add_measuring, cell_of, sizes_of, work_of
from experiments.rows import Cell, Row, rows_of
from ncfast.cli.parser import run as run_program
from ncfast.config import PAPER_METHODS
from ncfast.evaluation.comparison import COLUMNS, as_markdown
from ncfast.evaluation.protocol import chosen
from ncfast.jobs.reproduction import settings
from ncfast.reproduce import VIEWS

SETS = ("SonyAIBORobotSurface1", "Symbols", "ECG5000", "FordA", "TwoPatterns", "Wafer", "ElectricDevices")
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"preset": "paper", **values} for name, values in settings(list(PAPER_METHODS), VIEWS).items()},
    "default": {},
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.paper_table", description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME", help="[all]")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table, too")
    add_arguments(parser, variants=False)
    add_measuring(parser, measures=chosen(None), num_samples=None, sets=SETS)
    parser.set_defaults(seeds=[1, 2, 3, 4])
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    run(cells_of(arguments), work_of(arguments), arguments)
    rows = [row for row in rows_of(arguments.out) if row["cell"]["variant"] in SETTINGS]
    text = as_table([row for row in rows if row["cell"]["budget"] == arguments.budget])
    if arguments.markdown is not None:
        arguments.markdown.write_text(text, encoding="utf-8")
    print(text)


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    size = sizes_of(arguments)
    return [
        cell_of(arguments, name, variant, SETTINGS[variant], seed)
        for name in sorted(arguments.sets, key=size.__getitem__)
        for seed in arguments.seeds
        for variant in arguments.settings
    ]


def as_table(rows: list[Row]) -> str:
    """Markdown: a table for each measure, means ± standard deviations over seeds, the authors' beside them."""
    order = [*SETTINGS]
    rows = sorted(rows, key=lambda row: (order.index(row["cell"]["variant"]), row["cell"]["seed"]))
    figures = []
    notes: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = Path(row["cell"]["set"]).stem
        lacks = row.get("incomplete")
        notes[name] = {"train": row["train"], "test": row["test"], "notes": [f"incomplete: {lacks}"] if lacks else []}
        start = (name, "", row["cell"]["variant"], str(row["cell"]["seed"]))
        figures += [dict(zip(COLUMNS, (*start, *each), strict=True)) for each in row["values"].items()]
    for name in notes:
        if len({row.get("evaluator") for row in rows if Path(row["cell"]["set"]).stem == name}) > 1:
            notes[name]["notes"].append("more than one classifier was trained to measure with")
    notes = dict(sorted(notes.items(), key=lambda item: item[1]["train"]))
    hours = [sum(row[what] for row in rows) / 3600 for what in ("training_seconds", "evaluation_seconds")]
    head = [f"{len(rows)} cells, {hours[0]:.2f} hours of training and {hours[1]:.2f} of measuring, by process."]
    for what in ("machine", "number_format", "ncfast", "torch", "cuda", "commit"):
        each = sorted({row[what] for row in rows if what in row})
        head += [f"{what.replace('_', ' ')}: {', '.join(each)}."] if each else []
    budgets = sorted({row["cell"]["budget"] for row in rows})
    head.append(f"Share of the epochs: {', '.join(f'{budget:g}' for budget in budgets)}.")
    return as_markdown(figures, notes, [" ".join(head)])


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
