"""Variants of options on labelled sets, for choosing a default: FID, CAS, privacy and more on held-out train series.

The test split is not looked at unless --test asks for it. Each set has one evaluator for all variants and seeds.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import table
from experiments.cells import Cell, Row, add_arguments, chosen_variants, run, runs_of, trained
from ncfast.cli.parser import run as run_program
from ncfast.data.dataset import Dataset
from ncfast.data.sources import load_dataset
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.protocol import chosen, evaluate
from ncfast.jobs.reproduction import hold_out
from ncfast.ncvqvae import NCVQVAE

MEASURES = ("reconstruction", "codebook", "knn", "fid", "is", "cas", "acd", "mdd", "nnd", "nndr", "mia")
COLUMNS = {
    "FID": "FID",
    "FID_reconstructed": "FID of reconstruction",
    "IS": "IS",
    "CAS": "CAS",
    "knn_accuracy": "kNN",
    "svm_accuracy": "SVM",
    "test_reconstruction_mse": "MSE",
    "test_perplexity": "perplexity",
    "ACD": "ACD",
    "MDD": "MDD",
    "NND": "NND",
    "FID_train": "FID of train",
    "NNDR": "NNDR",
    "MIA": "MIA",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.held_out", description=__doc__.splitlines()[0])
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--holdout", type=float, default=0.25, help="share of the train split to measure on [0.25]")
    split.add_argument("--few", type=int, metavar="N", help="train on so many series, measure on the rest of the split")
    split.add_argument("--test", action="store_true", help="train on the whole train split, measure on the test split")
    add_arguments(parser)
    add_measuring(parser, measures=MEASURES, num_samples=2000)
    return parser


def add_measuring(
    parser: argparse.ArgumentParser,
    measures: Sequence[str],
    num_samples: int | None,
    sets: Sequence[str] | None = None,
) -> None:
    parser.add_argument("--sets", nargs="+", required=sets is None, default=sets, help="names in --data, or files")
    parser.add_argument("--measures", nargs="+", default=list(measures), help=f"[{' '.join(measures)}]")
    size = "as many as there are test series" if num_samples is None else num_samples
    parser.add_argument("--num-samples", type=int, default=num_samples, help=f"series a comparison [{size}]")
    parser.add_argument("--draws", type=int, default=1, help="sets of generated series of a run [1]")
    parser.add_argument("--fcn-epochs", type=int, metavar="N", help="epochs of each classifier [20, or 600 steps]")


def main() -> None:
    arguments = make_parser().parse_args()
    sizes_of(arguments)
    held = {} if arguments.test else {"holdout": arguments.holdout, "few": arguments.few}
    cells = [
        cell_of(arguments, name, variant, options, seed, **held)
        for seed in arguments.seeds
        for variant, options in chosen_variants(arguments).items()
        for name in arguments.sets
    ]
    print(as_table(run(cells, work_of(arguments), arguments)))


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """Train series of each set; raises UserError where there is no such set, before anything is trained."""
    return {name: len(load_dataset(name, arguments.data).X_train) for name in arguments.sets}


def cell_of(
    arguments: argparse.Namespace, name: str, variant: str, options: dict[str, Any], seed: int, **more: Any
) -> Cell:
    """A cell that is measured on the test split, unless `more` says what is held out."""
    cell = {"set": name, "variant": variant, "options": options, "seed": seed, "budget": arguments.budget}
    cell |= {"measures": chosen(arguments.measures), "num_samples": arguments.num_samples}
    return cell | {"draws": arguments.draws, "fcn_epochs": arguments.fcn_epochs} | more


def work_of(arguments: argparse.Namespace) -> Callable[[Cell, torch.device], Row]:
    return functools.partial(measured, data=arguments.data, runs=runs_of(arguments.out), cache=arguments.cache)


def measured(cell: Cell, device: torch.device, *, data: Path, runs: Path, cache: Path) -> Row:
    dataset = data_of(cell, data)
    model, seconds = trained(cell, dataset, device, runs)
    return {"training_seconds": seconds, **figures(model, dataset, cell, cache)}


def data_of(cell: Cell, data: Path) -> Dataset:
    dataset = load_dataset(cell["set"], data)
    if cell.get("few") is not None:
        return hold_out(dataset, max(0.0, 1 - cell["few"] / len(dataset.X_train)))
    return dataset if cell.get("holdout") is None else hold_out(dataset, cell["holdout"])


def figures(model: NCVQVAE, dataset: Dataset, cell: Cell, cache: Path) -> Row:
    """Measures of a trained model, and what they rest on."""
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
    taken = {figure["metric"]: figure["value"] for figure in result["measures"] if figure["value"] is not None}
    row: Row = {
        "values": taken,
        "number_format": model.precision,  # a measure is called precision
        "evaluation_seconds": round(sum(result["seconds"].values()), 1),
        "train": result["dataset"]["train"],
        "test": result["dataset"]["test"],
    }
    lacks = [note.partition(" is incomplete: ")[2] for note in dataset.notes]  # without the file's place
    row["incomplete"] = "; ".join(filter(None, lacks)) or None
    if (evaluator := result["evaluator"]) is not None:
        row |= {"evaluator": evaluator["sha256"][:12], "evaluator_accuracy": evaluator["test_accuracy"]}
    return row


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1g}"


def as_table(rows: list[Row], more: dict[str, str] | None = None) -> str:
    """Means over seeds of each set and variant, then of each variant how its FID compares with the first one's.

    more: measures besides COLUMNS, and what their columns are called.
    """
    shown = {
        name: title for name, title in {**COLUMNS, **(more or {})}.items() if any(name in r["values"] for r in rows)
    }
    sets = list(dict.fromkeys(row["cell"]["set"] for row in rows))
    variants = list(dict.fromkeys(row["cell"]["variant"] for row in rows))
    fid: dict[tuple[str, str], float] = {}
    lines = []
    for name in sets:
        for variant in variants:
            group = [row for row in rows if (row["cell"]["set"], row["cell"]["variant"]) == (name, variant)]
            if not group:
                continue
            taken = {metric: [r["values"][metric] for r in group if metric in r["values"]] for metric in shown}
            cells = [spread(taken[metric]) for metric in shown]
            seconds = spread([row["training_seconds"] for row in group])
            lines.append([Path(name).stem, variant, str(len(group)), *cells, seconds])
            if taken.get("FID"):
                fid[name, variant] = statistics.fmean(taken["FID"])
    text = table(["data", "variant", "seeds", *shown.values(), "training s"], lines)
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
