"""Variants of options on labelled sets, for choosing a default: FID, CAS, privacy and more on held-out train series.

The test split is not looked at unless --test asks for it. Each set has one evaluator for all variants and seeds.
"""

import argparse
import functools
import math
import statistics
from pathlib import Path

import torch

from benchmarks.common import table
from experiments.cells import Cell, Row, add_arguments, chosen_variants, run, runs_of, trained
from experiments.compare_variants import SHOWN, spread
from ncfast.cli.parser import run as run_program
from ncfast.data.sources import load_dataset
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.protocol import chosen, evaluate
from ncfast.jobs.reproduction import hold_out

MEASURES = ("reconstruction", "codebook", "knn", "fid", "is", "cas", "acd", "mdd", "nnd", "nndr", "mia")
COLUMNS = {**SHOWN, "FID_train": "FID of train", "NNDR": "NNDR", "MIA": "MIA"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.held_out", description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", required=True, help="names in --data, or files")
    parser.add_argument("--holdout", type=float, default=0.25, help="share of the train split to measure on [0.25]")
    parser.add_argument(
        "--few", type=int, metavar="N", help="train on so many series, measure on the rest of the split"
    )
    parser.add_argument("--test", action="store_true", help="train on the whole train split, measure on the test split")
    parser.add_argument("--measures", nargs="+", default=list(MEASURES), help=f"[{' '.join(MEASURES)}]")
    parser.add_argument("--num-samples", type=int, default=2000, help="series a comparison [2000]")
    parser.add_argument("--draws", type=int, default=1, help="sets of generated series of a run [1]")
    parser.add_argument("--fcn-epochs", type=int, metavar="N", help="epochs of each classifier [20, or 600 steps]")
    add_arguments(parser)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    cells = [
        {
            "set": name,
            "variant": variant,
            "options": options,
            "seed": seed,
            "budget": arguments.budget,
            "holdout": None if arguments.test else arguments.holdout,
            "few": None if arguments.test else arguments.few,
            "measures": chosen(arguments.measures),
            "num_samples": arguments.num_samples,
            "draws": arguments.draws,
            "fcn_epochs": arguments.fcn_epochs,
        }
        for seed in arguments.seeds
        for variant, options in chosen_variants(arguments).items()
        for name in arguments.sets
    ]
    work = functools.partial(measured, data=arguments.data, runs=runs_of(arguments.out), cache=arguments.cache)
    print(as_table(run(cells, work, arguments)))


def measured(cell: Cell, device: torch.device, *, data: Path, runs: Path, cache: Path) -> Row:
    dataset = load_dataset(cell["set"], data)
    if cell["few"] is not None:
        dataset = hold_out(dataset, max(0.0, 1 - cell["few"] / len(dataset.X_train)))
    elif cell["holdout"] is not None:
        dataset = hold_out(dataset, cell["holdout"])
    model, seconds = trained(cell, dataset, device, runs)
    result = evaluate(
        model,
        dataset,
        measures=cell["measures"],
        num_samples=cell["num_samples"],
        seeds=[1000 * cell["seed"] + i for i in range(cell["draws"])],
        recipe=Recipe(epochs=cell["fcn_epochs"]),
        cache=cache,
        quiet=True,
    )
    figures = {figure["metric"]: figure for figure in result["measures"] if figure["value"] is not None}
    return {
        "training_seconds": seconds,
        "values": {metric: figure["value"] for metric, figure in figures.items()},
        "evaluator": result["evaluator"],
        "precision": model.precision,
        "evaluation_seconds": result["seconds"],
    }


def as_table(rows: list[Row]) -> str:
    """Means over seeds of each set and variant, then of each variant how its FID compares with the first one's."""
    sets = list(dict.fromkeys(row["cell"]["set"] for row in rows))
    variants = list(dict.fromkeys(row["cell"]["variant"] for row in rows))
    fid: dict[tuple[str, str], float] = {}
    lines = []
    for name in sets:
        for variant in variants:
            group = [row for row in rows if (row["cell"]["set"], row["cell"]["variant"]) == (name, variant)]
            if not group:
                continue
            taken = {metric: [r["values"][metric] for r in group if metric in r["values"]] for metric in COLUMNS}
            cells = [spread(taken[metric]) for metric in COLUMNS]
            seconds = spread([row["training_seconds"] for row in group])
            lines.append([Path(name).stem, variant, str(len(group)), *cells, seconds])
            if taken["FID"]:
                fid[name, variant] = statistics.fmean(taken["FID"])
    text = table(["data", "variant", "seeds", *COLUMNS.values(), "training s"], lines)
    compared = []
    for variant in variants[1:]:
        common = [name for name in sets if {(name, variant), (name, variants[0])} <= fid.keys()]
        ratios = [math.log(fid[name, variant] / fid[name, variants[0]]) for name in common]
        if ratios:
            each = ", ".join(f"{Path(n).stem} {math.exp(r):.2f}" for n, r in zip(common, ratios, strict=True))
            compared.append([variant, f"{math.exp(statistics.fmean(ratios)):.3f}", each])
    if compared:
        text += "\n\n" + table(["variant", f"FID, ratio to {variants[0]}: geometric mean", "of each set"], compared)
    return text


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
