"""Run the paper's table again: python -m ncfast.reproduce --datasets ECG5000 TwoPatterns

Every cell is a data set, a method, its views and a seed: both stages are trained, then measured. A cell that is done is
not done again, so the same command continues what was interrupted; torchrun shares the cells among processes.
"""

import argparse
import csv
import dataclasses
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ncfast
from ncfast.cli import Parser, choose_device, run
from ncfast.config import PRESETS, Config, add_config_arguments, given_config_values, make_config
from ncfast.data.dataset import Dataset
from ncfast.data.facts import DataFacts
from ncfast.data.sources import load_dataset
from ncfast.engine.checkpoint import atomic_path, read_json, write_json
from ncfast.errors import UserError
from ncfast.evaluation.comparison import COLUMNS, as_markdown
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.fcn_cache import default_folder
from ncfast.evaluation.protocol import MEASURES, chosen, csv_rows, evaluate
from ncfast.launch import local_rank
from ncfast.ncvqvae import read_config
from ncfast.training import resolve_config, train
from ncfast.version import __version__

PAPER = (
    *("ElectricDevices", "FordB", "FordA", "Wafer", "TwoPatterns", "StarLightCurves", "UWaveGestureLibraryAll"),
    *("ECG5000", "ShapesAll", "Mallat", "Symbols", "SonyAIBORobotSurface1", "SonyAIBORobotSurface2"),
)
METHODS = {
    "none": "regular",
    "barlow": "barlowtwins",
    "vibcreg": "vibcreg",
    "vicreg": "vicreg",
}  # --ssl: the authors' name
VIEWS = ("gauss", "slice", "warp")
ABLATIONS = ("authors-masking", "random-embeddings", "views")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m ncfast.reproduce",
        description="Train and measure data sets x methods x views x seeds: results.csv, and table.md beside the "
        "authors' means. The same command continues.",
    )
    parser.add_argument("--datasets", nargs="+", default=PAPER, metavar="NAME", help="names or files [the paper's 13]")
    parser.add_argument("--data-dir", help="folder where a name is looked up first")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="values of --ssl [all]")
    parser.add_argument(
        "--views", nargs="+", default=list(VIEWS), metavar="RECIPE", help="of the SSL methods [all three]"
    )
    parser.add_argument("--seeds", type=integers, default=[1, 2, 3, 4], metavar="N,N,...", help="runs a cell [1,2,3,4]")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="values of all options not given [paper]")
    parser.add_argument("--budget", type=share, default=1.0, metavar="X", help="share of the epochs, up to 1 [1]")
    parser.add_argument(
        "--authors-masking",
        action="store_true",
        help="train the prior of `none` with 36 %% of the tokens masked, as the authors did; else all priors alike",
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        default=[],
        choices=ABLATIONS,
        help="more cells: `none` with the authors' masking; every method with random token embeddings; views "
        "reconstructed without an SSL loss",
    )
    parser.add_argument(
        "--holdout",
        type=share,
        metavar="X",
        help="measure on this share of the train split, and leave the test split alone",
    )
    parser.add_argument("--measures", type=words, metavar="A,B,...", help=f"out of {', '.join(MEASURES)} [all]")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="draws of series a run [1, as the authors]")
    parser.add_argument("--fcn-epochs", type=int, metavar="N", help="epochs of each classifier [20, or 600 steps]")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder of trained evaluators")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="[runs/reproduce]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument("--dry-run", action="store_true", help="print the cells, do nothing")
    add_config_arguments(parser, default="of the preset", without=("ssl", "augment", "seed"))
    return parser


def integers(text: str) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values) or min(values) < 0:
        raise argparse.ArgumentTypeError(f"different integers with commas between them, such as 1,2,3,4; got {text!r}")
    return values


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0, at most 1; got {text!r}")
    return value


@dataclass(frozen=True)
class Cell:
    """One run of the table.

    Attributes:
        method: as the authors name theirs, such as "barlowtwins_warp"; an ablation has "+" and its name.
        config: not resolved yet.
    """

    dataset: str
    method: str
    config: Config

    def folder(self, out: Path) -> Path:
        return out / Path(self.dataset).stem / self.method / f"seed{self.config.seed}"


def main(command_line: list[str] | None = None) -> None:
    arguments = make_parser().parse_args(command_line)
    measures = chosen(arguments.measures)
    if arguments.repeats < 1:
        raise UserError(f"--repeats is at least 1; got {arguments.repeats}")
    cells = make_cells(arguments)
    rank, size = (0, 1) if local_rank() is None else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if arguments.dry_run:
        for cell in cells:
            print(cell.folder(arguments.out))
        return
    device, _ = choose_device(arguments.device)
    if device.type == "cuda" and local_rank() is not None:  # cells are apart: several can share a GPU
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
    datasets: dict[str, Dataset] = {}
    failed = []
    for i in range(rank, len(cells), size):
        cell = cells[i]
        if cell.dataset not in datasets:
            datasets = {cell.dataset: load(cell.dataset, arguments)}  # cells of a data set follow each other
        begin = time.monotonic()
        try:
            result = train_and_measure(cell, datasets[cell.dataset], measures, device, arguments)
        except UserError as error:
            failed.append(f"{cell.folder(arguments.out)}: {error}")
            print(
                f"[{i + 1}/{len(cells)}] {cell.dataset} {cell.method} seed {cell.config.seed} failed: {error}",
                flush=True,
            )
            continue
        said = headline(result)
        seconds = time.monotonic() - begin
        name = f"{result['dataset']['name']} {cell.method} seed {cell.config.seed}"
        print(f"[{i + 1}/{len(cells)}] {name}: {said} ({seconds:.0f} s)", flush=True)
        write_results(cells, arguments, device)
    write_results(cells, arguments, device)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed, the first: {failed[0]}")
    print(f"wrote {arguments.out / 'results.csv'} and {arguments.out / 'table.md'}")


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a table that is cut short has every method."""
    given = given_config_values(arguments)
    methods: dict[str, dict[str, Any]] = {}
    for ssl in arguments.methods:
        for view in arguments.views if ssl != "none" else [None]:
            name = METHODS[ssl] if view is None else f"{METHODS[ssl]}_{view}"
            methods[name] = {"ssl": ssl} if view is None else {"ssl": ssl, "augment": (view,)}
    if arguments.authors_masking and "regular" in methods:
        methods["regular"]["masking"] = "kept"
    more = {}
    if "authors-masking" in arguments.ablations:
        more["regular+authors-masking"] = {"ssl": "none", "masking": "kept"}
    if "random-embeddings" in arguments.ablations:
        more |= {f"{name}+random-embeddings": {**values, "embeddings": "random"} for name, values in methods.items()}
    if "views" in arguments.ablations:
        more |= {f"views_{view}": {"ssl": "views", "augment": (view,)} for view in arguments.views}
    return [
        Cell(dataset, method, make_config(arguments.preset, **{**values, **given, **own(values), "seed": seed}))
        for dataset in arguments.datasets
        for seed in arguments.seeds
        for method, values in (methods | more).items()
    ]


def own(values: dict[str, Any]) -> dict[str, Any]:
    """What makes an ablation one, whatever was given for all cells."""
    return {name: values[name] for name in ("masking", "embeddings") if name in values}


def load(name: str, arguments: argparse.Namespace) -> Dataset:
    dataset = load_dataset(name, arguments.data_dir)
    return dataset if arguments.holdout is None else hold_out(dataset, arguments.holdout)


def hold_out(dataset: Dataset, part: float) -> Dataset:
    """The train split alone, a share of each class (one series at least) as its test split: for choosing by."""
    labels = np.zeros(len(dataset.X_train), np.int64) if dataset.y_train is None else dataset.y_train
    generator = np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == k))
        held[rows[: min(len(rows) - 1, max(1, round(part * len(rows))))]] = True
    y = dataset.y_train
    return dataclasses.replace(
        dataset,
        X_train=dataset.X_train[~held],
        y_train=None if y is None else y[~held],
        X_test=dataset.X_train[held],
        y_test=None if y is None else y[held],
        notes=(*dataset.notes, f"{held.sum()} of its train series held out, to measure on"),
    )


def train_and_measure(
    cell: Cell, dataset: Dataset, measures: Sequence[str], device: torch.device, arguments: Any
) -> dict[str, Any]:
    """Trains and measures one cell, or finds that this was done."""
    folder = cell.folder(arguments.out)
    config = shortened(resolve_config(cell.config, dataset, device), arguments.budget)
    recipe = Recipe(epochs=arguments.fcn_epochs)
    asked = {
        "config": jsonable(dataclasses.asdict(config)),
        "measures": list(measures),
        "repeats": arguments.repeats,
        "recipe": dataclasses.asdict(recipe),
        "holdout": arguments.holdout,
    }
    path = folder / "evaluation.json"
    if path.exists():
        result = read_json(path)
        if result.get("asked") == asked:
            return result
    if is_trained(folder, config, dataset):
        model = ncfast.load(folder, device)
    else:
        model = train(config, dataset, out=folder, device=device, resume=True, quiet=True)
    result = evaluate(
        model,
        dataset,
        measures=measures,
        seeds=[config.seed * 1000 + i for i in range(arguments.repeats)],
        recipe=recipe,
        cache=arguments.cache or default_folder(),
        quiet=True,
    )
    seconds = {stage: values["seconds"] for stage, values in read_json(folder / "metrics.json").items()}
    result |= {"asked": asked, "training_seconds": seconds}
    write_json(path, result)
    (folder / "state.pt").unlink(missing_ok=True)  # half a gigabyte with the projector's moments
    return result


def is_trained(folder: Path, config: Config, dataset: Dataset) -> bool:
    """Whether only the measures are missing."""
    if not (folder / "stage2.safetensors").exists():
        return False
    old_config, old_data = read_config(folder)
    return old_config == config and old_data.identity == DataFacts.of(dataset).identity


def shortened(config: Config, budget: float) -> Config:
    epochs = {name: max(1, round(budget * getattr(config, name))) for name in ("stage1_epochs", "stage2_epochs")}
    return dataclasses.replace(config, **epochs)


def jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def headline(result: dict[str, Any]) -> str:
    shown = {"FID": "FID", "IS": "IS", "CAS": "CAS", "knn_accuracy": "kNN"}
    values = {figure["metric"]: figure["value"] for figure in result["measures"]}
    return ", ".join(f"{name} {values[key]:.3g}" for key, name in shown.items() if values.get(key) is not None)


def found(cells: Sequence[Cell], out: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        path = cell.folder(out) / "evaluation.json"
        if path.exists():
            yield cell, read_json(path)


def write_results(cells: Sequence[Cell], arguments: argparse.Namespace, device: torch.device) -> None:
    """results.csv in the layout of the authors' result files, and table.md; of all cells there are so far."""
    rows: list[dict[str, Any]] = []
    notes: dict[str, Any] = {}
    for cell, result in found(cells, arguments.out):
        run_id = f"seed{cell.config.seed}"
        rows += csv_rows(result, cell.method, run_id)
        name = result["dataset"]["name"]
        seconds = result["training_seconds"]["stage1"]
        rows.append(dict(zip(COLUMNS, (name, "stage1", cell.method, run_id, "training_time", seconds), strict=True)))
        notes[name] = result["dataset"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(arguments.out / "results.csv") as temporary:
        temporary.write_text(text.getvalue())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    head = [
        f"ncfast {__version__}, torch {torch.__version__}, {where}; preset {arguments.preset}, "
        + (f"{arguments.budget:g} of its epochs" if arguments.budget < 1 else "all of its epochs")
        + (", the authors' masking" if arguments.authors_masking else ", one masking for all priors")
        + f"; {arguments.repeats} draw{'s' * (arguments.repeats > 1)} of series a run"
    ]
    if arguments.holdout is not None:
        head.append("Measured on held-out train series, so not to be held against the authors' figures.")
    given = given_config_values(arguments)
    if given:
        head.append("Options: " + ", ".join(f"{name} {value}" for name, value in given.items()))
    with atomic_path(arguments.out / "table.md") as temporary:
        temporary.write_text(as_markdown(rows, notes, head))


if __name__ == "__main__":
    run(main, on_interrupt="interrupted; the same command again continues")
