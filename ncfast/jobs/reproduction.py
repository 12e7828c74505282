"""The cells of the paper's table: which they are, training and measuring one, sharing them among processes."""

import argparse
import csv
import dataclasses
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

import ncfast
from ncfast.cli.flags import given_config_values, reading_options
from ncfast.cli.startup import choose_device
from ncfast.cli.torchrun import local_rank
from ncfast.config import METHODS, Config, make_config
from ncfast.data.dataset import Dataset
from ncfast.data.sources import load_dataset
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import atomic_path, read_json, write_json
from ncfast.engine.threads import in_threads
from ncfast.errors import UserError
from ncfast.evaluation.comparison import COLUMNS, as_markdown
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.network_cache import default_folder
from ncfast.evaluation.protocol import chosen, csv_rows, evaluate
from ncfast.models.trained import read_config
from ncfast.training.fit import resolve_config, train
from ncfast.training.run_folder import EPOCHS
from ncfast.version import __version__


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


def reproduce(arguments: argparse.Namespace, command_line: Sequence[str]) -> None:
    """What `python -m ncfast.reproduce` does with its arguments, which are those of `command_line`."""
    measures = chosen(arguments.measures)
    for name in ("repeats", "jobs", "streams"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is at least 1; got {getattr(arguments, name)}")
    cells = make_cells(arguments)
    if arguments.dry_run:
        for cell in cells:
            print(cell.folder(arguments.out))
        return
    if arguments.jobs > 1 and SHARED not in os.environ:
        run_jobs(arguments, command_line)
        print(f"wrote {arguments.out / 'results.csv'} and {arguments.out / 'table.md'}")
        return
    device = device_of_process(arguments.device)
    failed = work(cells, measures, device, arguments)
    write_results(cells, arguments, device)
    if failed:
        raise UserError(f"{len(failed)} of {len(cells)} cells failed, the first: {failed[0]}")
    if SHARED not in os.environ:
        print(f"wrote {arguments.out / 'results.csv'} and {arguments.out / 'table.md'}")


def device_of_process(name: str) -> torch.device:
    """Of several processes on a machine each takes the next GPU; they compute apart, so that several can share one."""
    if local_rank() is not None and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{local_rank() % torch.cuda.device_count()}"
    return choose_device(name)[0]


def work(cells: Sequence[Cell], measures: Sequence[str], device: torch.device, arguments: Any) -> list[str]:
    """Trains and measures cells that no other process has taken. Returns what went wrong."""
    datasets: dict[str, Dataset] = {}
    failed = []
    numbers = not_taken(len(cells))
    one_at_a_time = threading.Lock()

    def take() -> tuple[int, Dataset] | None:
        with one_at_a_time:
            i = next(numbers, None)
            if i is None:
                return None
            name = cells[i].dataset
            if name not in datasets:
                datasets.clear()  # cells of a data set follow each other
                datasets[name] = load(name, arguments)
            return i, datasets[name]

    def work_on_cells() -> None:
        while (taken := take()) is not None:
            i, dataset = taken
            cell = cells[i]
            begin = time.monotonic()
            try:
                result = train_and_measure(cell, dataset, measures, device, arguments)
            except UserError as error:
                failed.append(f"{cell.folder(arguments.out)}: {error}")
                name = f"{cell.dataset} {cell.method} seed {cell.config.seed}"
                print(f"[{i + 1}/{len(cells)}] {name} failed: {error}", flush=True)
                continue
            said = headline(result)
            seconds = time.monotonic() - begin
            name = f"{result['dataset']['name']} {cell.method} seed {cell.config.seed}"
            print(f"[{i + 1}/{len(cells)}] {name}: {said} ({seconds:.0f} s)", flush=True)
            with one_at_a_time:
                write_results(cells, arguments, device)

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // arguments.streams))
    in_threads(arguments.streams, work_on_cells, device)
    return failed


SHARED = "NCFAST_CELLS"  # in the environment of a process of --jobs: host and port of the store that counts cells
NEXT = "ncfast/cells"  # in that store: the next cell that nobody has taken


def not_taken(count: int) -> Iterator[int]:
    """Numbers 0 .. count - 1: all, or of several processes those that this one is the first to ask for."""
    if SHARED in os.environ:
        host, _, port = os.environ[SHARED].rpartition(":")
    elif local_rank() is not None:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    else:
        yield from range(count)
        return
    store = distributed.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
    key = f"{NEXT}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    while (i := store.add(key, 1) - 1) < count:
        yield i


def run_jobs(arguments: argparse.Namespace, command_line: Sequence[str]) -> None:
    """The same command in so many processes, which share the cells among them and, under torchrun, with other GPUs'.

    Raises:
        UserError: one of them has failed; each has said why.
    """
    environment, jobs = dict(os.environ), arguments.jobs
    if local_rank() is None:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment[SHARED] = f"127.0.0.1:{store.port}"
    else:
        environment[SHARED] = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // (jobs * arguments.streams))))
    command = [sys.executable, "-m", "ncfast.reproduce", *command_line]
    running = [subprocess.Popen(command, env=environment) for _ in range(jobs)]
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    if any(codes):
        failed = sum(code != 0 for code in codes)
        raise UserError(f"{failed} of {jobs} processes ended with an error; the same command again continues")


def make_cells(arguments: argparse.Namespace) -> list[Cell]:
    """Seed by seed, so that a table that is cut short has every method."""
    given = given_config_values(arguments)
    methods = settings(arguments.methods, arguments.views)
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


def settings(methods: Sequence[str], views: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of each method with each view, by the authors' names, such as "barlowtwins_warp"; "none" has no views."""
    chosen: dict[str, dict[str, Any]] = {}
    for ssl in methods:
        if ssl == "none":
            chosen[METHODS[ssl]] = {"ssl": ssl}
        else:
            chosen |= {f"{METHODS[ssl]}_{view}": {"ssl": ssl, "augment": [view]} for view in views}
    return chosen


def own(values: dict[str, Any]) -> dict[str, Any]:
    """What makes an ablation one, whatever was given for all cells."""
    return {name: values[name] for name in ("masking", "embeddings") if name in values}


def load(name: str, arguments: argparse.Namespace) -> Dataset:
    dataset = load_dataset(name, arguments.data_dir, **reading_options(arguments))
    return dataset if arguments.holdout is None else hold_out(dataset, arguments.holdout)


def hold_out(dataset: Dataset, part: float) -> Dataset:
    """The train split alone, a share of each class (one series at least) as its test split: for choosing by."""
    labels = np.zeros(len(dataset.X_train), np.int64) if dataset.y_train is None else dataset.y_train
    generator = np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == k))
        held[rows[: min(len(rows) - 1, max(1, round(part * len(rows))))]] = True
    y, known = dataset.y_train, dataset.conditions_train
    return dataclasses.replace(
        dataset,
        X_train=dataset.X_train[~held],
        y_train=None if y is None else y[~held],
        X_test=dataset.X_train[held],
        lengths_train=None if dataset.lengths_train is None else dataset.lengths_train[~held],
        lengths_test=None if dataset.lengths_train is None else dataset.lengths_train[held],
        y_test=None if y is None else y[held],
        conditions_train=None if known is None else known[~held],
        conditions_test=None if known is None else known[held],
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
    if not (folder / f"stage{2 if config.refiner == 'none' else 3}.safetensors").exists():
        return False
    old_config, old_data = read_config(folder)
    return old_config == config and old_data.identity == DataStats.of(dataset).identity


def shortened(config: Config, budget: float) -> Config:
    epochs = {name: getattr(config, name) for name in EPOCHS}
    shorter = {name: max(1, round(budget * value)) for name, value in epochs.items() if value is not None}
    return dataclasses.replace(config, **shorter)


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
        temporary.write_bytes(text.getvalue().encode())
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
        temporary.write_text(as_markdown(rows, notes, head), encoding="utf-8")
