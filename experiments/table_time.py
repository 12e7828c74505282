"""How many hours the paper's table takes: every set's shape for some seconds, with several processes on each device.

All trainings at a time take the same stage of the same set, as they do in the table, where the cells of a set follow
each other. They begin together once their steps are CUDA graphs, and go on for a while with all that belongs to
an epoch: its log, its losses, its checkpoints. Then each measures its model. Random series of the same shape stand for
a set that is not in --data. Where the time is up, a set takes its figures from the one most like it: a step's as they
are, those of measuring by the number of values.
"""

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed

from benchmarks.common import table
from experiments.cells import Worker, add_streams, sigterm_as_exit, stop
from experiments.rows import Cell, Row, options_of
from ncfast.cli.parser import run as run_program
from ncfast.config import Config, make_config
from ncfast.data.dataset import Dataset
from ncfast.data.sources import from_arrays, load_dataset
from ncfast.engine.logging import RunLog
from ncfast.engine.loop import Stage, batch_ends, train_stage
from ncfast.engine.step import TrainingStep
from ncfast.errors import UserError
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.material import Material
from ncfast.evaluation.protocol import chosen, measure
from ncfast.jobs.reproduction import settings
from ncfast.ncvqvae import NCVQVAE
from ncfast.reproduce import VIEWS
from ncfast.training.fit import resolve_config, stats_of
from ncfast.training.stages import make_stage1, make_stage2, new_prior, new_vqvae


class Shape(NamedTuple):
    train: int
    test: int
    length: int
    classes: int

    @property
    def values(self) -> int:
        return (self.train + self.test) * self.length


SETS = {  # the most steps first
    "ElectricDevices": Shape(8926, 7711, 96, 7),
    "FordB": Shape(3636, 810, 500, 2),
    "FordA": Shape(3601, 1320, 500, 2),
    "Wafer": Shape(1000, 6164, 152, 2),
    "TwoPatterns": Shape(1000, 4000, 128, 4),
    "StarLightCurves": Shape(1000, 8236, 1024, 3),
    "UWaveGestureLibraryAll": Shape(896, 3582, 945, 8),
    "ShapesAll": Shape(600, 600, 512, 60),
    "ECG5000": Shape(500, 4500, 140, 5),
    "Mallat": Shape(55, 2345, 1024, 8),
    "Symbols": Shape(25, 995, 398, 6),
    "SonyAIBORobotSurface1": Shape(20, 601, 70, 2),
    "SonyAIBORobotSurface2": Shape(27, 953, 65, 2),
}
PLAIN, SSL, PRIOR = "regular", "vibcreg_warp", "stage 2"  # of the losses and views those whose steps take longest
KINDS = settings(["none", "vibcreg"], VIEWS)
STAGES_SHARE = 0.6  # of the time; what is left is for measuring
AT_LEAST, AT_MOST = 0.3, 3.0  # seconds of steps of a stage


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.table_time", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, metavar="M", help="all that it takes [5]")
    parser.add_argument("--devices", nargs="+", default=["auto"], help="cpu, or GPUs such as cuda:0 cuda:1 [auto]")
    add_streams(parser, jobs=4)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of those sets that are at hand")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, metavar="NAME", help="[all 13]")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="cells of each setting [4]")
    parser.add_argument("--ssl-settings", type=int, default=6, metavar="N", help="beside the plain one [6]")
    parser.add_argument("--measures", nargs="+", help="[those of reproduce]")
    parser.add_argument("--fcn-epochs", type=int, metavar="N", help="epochs of each classifier [20, or 600 steps]")
    parser.add_argument(
        "--options", type=options_of, default={}, metavar="KEY=VALUE,...", help="beside --preset paper, of ncfast.fit"
    )
    return parser


@sigterm_as_exit()
def main() -> None:
    arguments = make_parser().parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    config = make_config("paper", **arguments.options)
    asked = {"measures": chosen(arguments.measures), "options": arguments.options, "fcn_epochs": arguments.fcn_epochs}
    asked["data"] = arguments.data
    asked["window"] = min(AT_MOST, max(AT_LEAST, 60 * arguments.minutes / (12 * len(arguments.sets))))
    devices = [device for _ in range(arguments.jobs) for device in arguments.devices]
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    asked |= {"port": store.port, "trainings": len(devices) * arguments.streams}
    workers = [Worker(measured, device, len(devices), arguments.streams) for device in devices]
    costs: dict[str, Row] = {}
    try:
        for name in arguments.sets:
            if deadline - time.monotonic() < (1 - STAGES_SHARE) * 60 * arguments.minutes:
                break
            costs[name] = together(workers, {"what": "stages", "set": name, **asked}, deadline)
        # From the middle one on, which the others can be told by; the smallest, which weigh least, come last.
        by_size = sorted(costs, key=lambda name: SETS[name].values)
        for name in [*by_size[len(by_size) // 2 :], *by_size[: len(by_size) // 2][::-1]]:
            costs[name] |= together(workers, {"what": "evaluation", "set": name, **asked}, deadline)
    except (TimeoutError, UserError) as error:
        print(f"stopped: {error}", flush=True)
    finally:
        stop(workers)
    print(as_text(complete(costs, config), costs, config, arguments))


def together(workers: Sequence[Worker], cell: Cell, deadline: float) -> Row:
    """Means over the trainings at a time, each of which does the cell.

    Raises:
        TimeoutError: the time is up.
        UserError: one of them has failed; the others wait for it.
    """
    begin = time.monotonic()
    for seed in range(cell["trainings"]):
        workers[seed % len(workers)].take({**cell, "seed": seed})
    rows = []
    while len(rows) < cell["trainings"]:
        busy = [worker for worker in workers if worker.cells]
        if not wait([worker.connection for worker in busy], timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError(f"the time is up, in {cell['what']} of {cell['set']}")
        for _, row, error, _ in (each for worker in busy for each in worker.answers()):
            if row is None:
                raise UserError(f"{cell['what']} of {cell['set']}: {error}")
            rows.append(row)
    row = {**rows[0], **mean([each["costs"] for each in rows])}
    said = ", ".join(f"{key} {value:.3g}" for key, value in row["costs"].items() if value >= 0.002)
    print(f"{cell['set']} ({row['source']}), {cell['what']}, {time.monotonic() - begin:.0f} s: {said}", flush=True)
    return row


def mean(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(each[key] for each in costs) / len(costs) for key in costs[0]}


# Of a process, from its stages to its evaluation, by set and seed.
MODELS: dict[tuple[str, int], tuple[NCVQVAE, Dataset, str]] = {}


def measured(cell: Cell, device: torch.device) -> Row:
    """What a process does with a cell: seconds by name."""
    key = cell["set"], cell["seed"]
    if cell["what"] == "stages":
        costs = stages(cell, device)
        return {"costs": costs, "source": MODELS[key][2]}
    model, dataset, source = MODELS.pop(key)
    return {"costs": evaluation(cell, model, dataset), "source": source}


def stages(cell: Cell, device: torch.device) -> dict[str, float]:
    """Of each stage the seconds of an epoch, and those before its first step and until its steps are at full speed."""
    dataset, source = dataset_of(cell["set"], cell["data"])
    costs: dict[str, float] = {}
    for kind in (SSL, PLAIN):
        begin = time.monotonic()
        options = {**KINDS[kind], **cell["options"], "seed": cell["seed"]}
        config = resolve_config(make_config("paper", **options), dataset, device)
        data = stats_of(config, dataset)
        x, observed = data.normalise_observed(dataset.X_train, device)
        vqvae = new_vqvae(config, data)
        first = make_stage1(config, vqvae, x, device, observed=observed)
        costs |= timed(kind, first, begin, cell, device)
    begin = time.monotonic()
    labels = torch.from_numpy(dataset.y_train).to(device)
    prior = new_prior(config, vqvae.eval(), data)
    second = make_stage2(config, vqvae, prior, x, labels, device, observed=observed)
    costs |= timed(PRIOR, second, begin, cell, device)
    MODELS[cell["set"], cell["seed"]] = NCVQVAE(config, data, vqvae, prior, device), dataset, source
    return costs


def timed(name: str, stage: Stage, begin: float, cell: Cell, device: torch.device) -> dict[str, float]:
    # After so many epochs the steps of every batch size are graphs.
    skipped = TrainingStep.EAGER_STEPS + 1 if device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as folder:
        log = Watch(Path(folder), skipped, lambda: meet(cell, f"{cell['set']} {name}"), cell["window"])
        with log, contextlib.suppress(Enough):
            state = Path(folder) / "state.pt"
            train_stage(stage, seed=cell["seed"], device=device, log=log, state_path=state, state=None, quiet=True)
    if len(log.ends) < 2:
        raise UserError(f"{stage.name} has {stage.epochs} epochs, and takes {skipped + 1} or more to be timed")
    epoch = (log.ends[-1] - log.ends[0]) / (len(log.ends) - 1)
    return {f"start of {name}": max(0.0, log.ready - begin - skipped * epoch), name: epoch}


class Enough(Exception):
    """Ends a stage that has been timed."""


class Watch(RunLog):
    """A stage's log that takes the time: from after `skipped` epochs, when all have met, for so many seconds.

    Attributes:
        ready: when this training came there.
        ends: of the epochs that are timed, after the time when they began.
    """

    def __init__(self, folder: Path, skipped: int, meet: Callable[[], None], seconds: float) -> None:
        super().__init__(folder)
        self.skipped, self.meet, self.seconds = skipped, meet, seconds
        self.ends: list[float] = []

    def write(self, stage: int, epoch: int, step: int, values: dict[str, float]) -> None:
        super().write(stage, epoch, step, values)
        if epoch == self.skipped:
            self.ready = time.monotonic()
            self.meet()
        if epoch >= self.skipped:
            self.ends.append(time.monotonic())
            if self.ends[-1] - self.ends[0] >= self.seconds:
                raise Enough


def meet(cell: Cell, where: str) -> None:
    """Waits until all trainings have come there."""
    if cell["trainings"] == 1:
        return
    store = distributed.TCPStore("127.0.0.1", cell["port"], is_master=False, wait_for_workers=False)
    store.add(where, 1)
    while store.add(where, 0) < cell["trainings"]:
        time.sleep(0.001)


def evaluation(cell: Cell, model: NCVQVAE, dataset: Dataset) -> dict[str, float]:
    """Seconds of the evaluator, which a set has once, and of the measures, which each cell has."""
    material = Material(model, dataset, recipe=Recipe(epochs=cell["fcn_epochs"]), quiet=True)
    meet(cell, f"{cell['set']} evaluator")
    begin = time.monotonic()
    material.evaluator  # noqa: B018 - made when it is first asked for
    evaluator = time.monotonic() - begin
    meet(cell, f"{cell['set']} measures")
    begin = time.monotonic()
    seconds = measure(material, cell["measures"], [1000 * cell["seed"]])["seconds"]
    return {"evaluator": evaluator, "measures": time.monotonic() - begin, **seconds}


def dataset_of(name: str, data: Path | None) -> tuple[Dataset, str]:
    """The set, or random series of its shape, of which each class has a course of its own; and which it is."""
    if data is not None and any(data.glob(f"{name}*")):
        return load_dataset(name, data), "data"
    shape = SETS[name]
    random = np.random.default_rng(0)
    courses = random.normal(size=(shape.classes, shape.length)).cumsum(1)
    courses /= courses.std(1, keepdims=True)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.arange(n) % shape.classes
        return (courses[y] + random.normal(size=(n, shape.length))).astype(np.float32), y

    return from_arrays(*split(shape.train), *split(shape.test), name=name), "random"


def steps_of(name: str, config: Config) -> dict[str, int]:
    """Steps of an epoch of each stage."""
    n = SETS[name].train
    first, second = (len(batch_ends(n, size)) for size in (config.batch_size, config.stage2_batch_size))
    return {PLAIN: first, SSL: first, PRIOR: second}


def complete(costs: dict[str, Row], config: Config) -> dict[str, Row]:
    """Costs of all sets, from the most similar ones where they were not measured.

    Raises:
        UserError: no stages were measured.
    """
    if not costs:
        raise UserError("no stages were measured; give more --minutes, or fewer --sets")
    evaluated = [name for name in costs if "measures" in costs[name]]
    step_size = {name: min(shape.train, config.batch_size) * shape.length for name, shape in SETS.items()}
    values = {name: shape.values for name, shape in SETS.items()}
    whole: dict[str, Row] = {}
    for name in SETS:
        steps = steps_of(name, config)
        like = nearest(name, list(costs), step_size)
        found = {f"start of {stage}": costs[like][f"start of {stage}"] for stage in steps}
        found |= {stage: costs[like][stage] / steps_of(like, config)[stage] * steps[stage] for stage in steps}
        found |= {"evaluator": 0.0, "measures": 0.0}
        if evaluated:
            like = nearest(name, evaluated, values)
            found |= {what: costs[like][what] * values[name] / values[like] for what in ("evaluator", "measures")}
        whole[name] = found
    return whole


def nearest(name: str, others: Sequence[str], size: dict[str, int]) -> str:
    return min(others, key=lambda other: (other != name, abs(math.log(size[other] / size[name]))))


def cell_seconds(cost: Row, kind: str, config: Config) -> float:
    """Of one cell."""
    first = cost[f"start of {kind}"] + config.stage1_epochs * cost[kind]
    return first + cost[f"start of {PRIOR}"] + config.stage2_epochs * cost[PRIOR] + cost["measures"]


def set_hours(cost: Row, config: Config, at_a_time: int, seeds: int, ssl_settings: int) -> float:
    """Of all cells of a set. Each process trains an evaluator, as none is there when they begin."""
    seconds = cell_seconds(cost, PLAIN, config) + ssl_settings * cell_seconds(cost, SSL, config)
    return (seeds * seconds / at_a_time + cost["evaluator"]) / 3600


def as_text(costs: dict[str, Row], found: dict[str, Row], config: Config, arguments: Any) -> str:
    """A table of all sets and a line of all; what was not measured has a ~."""
    at_a_time = arguments.jobs * arguments.streams * len(arguments.devices)
    cells = arguments.seeds * (1 + arguments.ssl_settings)
    lines, total = [], 0.0
    for name, cost in costs.items():
        steps = steps_of(name, config)
        stages_marked, marked = ("" if what in found.get(name, ()) else "~" for what in (PRIOR, "measures"))
        hours = set_hours(cost, config, at_a_time, arguments.seeds, arguments.ssl_settings)
        total += hours
        each = [f"{stages_marked}{1000 * cost[stage] / steps[stage]:.2f}" for stage in (PLAIN, SSL, PRIOR)]
        starts = sum(cost[f"start of {stage}"] for stage in (PLAIN, PRIOR))
        each += [f"{stages_marked}{starts:.1f}", f"{marked}{cost['evaluator']:.1f}", f"{marked}{cost['measures']:.1f}"]
        either = stages_marked or marked
        each += [f"{either}{cell_seconds(cost, kind, config) / 60:.1f}" for kind in (PLAIN, SSL)]
        lines.append([name, f"{steps[PLAIN]} / {steps[PRIOR]}", *each, str(cells), f"{either}{hours:.2f}"])
    titles = ["data", "steps an epoch", "plain, ms a step", "SSL", "stage 2", "start, s", "evaluator, s", "measures, s"]
    titles += ["plain cell, min", "SSL cell, min", "cells", "hours"]
    row = next(iter(found.values()))
    versions = ", ".join(f"{name} {row[name]}" for name in ("ncfast", "torch", "cuda", "commit") if row.get(name))
    said = (
        f"{len(costs) * cells} cells, {config.stage1_epochs} + {config.stage2_epochs} epochs: {total:.1f} hours with "
    )
    streams = f" of {arguments.streams} streams" * (arguments.streams > 1)
    said += f"{arguments.jobs} processes{streams} on each of {len(arguments.devices)} x {row['machine']} ({versions})"
    random = [name for name, each in found.items() if each["source"] == "random"]
    said += f"; random series for {', '.join(random)}" if random else ""
    if not any("measures" in each for each in found.values()):
        said += "; without measuring, for which there was no time"
    return f"{table(titles, lines)}\n\n{said}"


if __name__ == "__main__":
    run_program(main)
