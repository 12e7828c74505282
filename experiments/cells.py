"""Cells of an experiment (a data set, a variant, a seed), shared among processes and GPUs under a limit of time.

A finished cell is a line of a file (`rows`), so that the same command goes on where the last one was stopped; a
training that was stopped goes on from its last checkpoint.
"""

import argparse
import contextlib
import datetime
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import ncfast
from experiments.rows import Cell, Row, add_row, identity, key_and_value, options_of, rows_of
from ncfast.cli.parser import end
from ncfast.cli.startup import choose_device
from ncfast.config import PRESETS, Config, make_config
from ncfast.data.dataset import Dataset
from ncfast.engine.checkpoint import read_json
from ncfast.engine.threads import in_threads
from ncfast.errors import UserError
from ncfast.evaluation.network_cache import default_folder
from ncfast.jobs.reproduction import is_trained, shortened
from ncfast.ncvqvae import NCVQVAE
from ncfast.training.fit import resolve_config, train
from ncfast.version import __version__

LONG = {"stage1_steps": 6000, "stage2_steps": 8000}
REVIVED = {"codebook_size": 512, "codebook_init": "kmeans", "dead_code_threshold": 1.0}
VARIANTS: dict[str, dict[str, Any]] = {  # options of `ncfast.fit`
    "default": {},
    "paper": {"preset": "paper"},
    "earlier": {  # what `default` was up to version 0.2.0
        "augment": ["gauss"],
        "view_weight": 0.1,
        "detail": 0.0,
        "class_dropout": 0.2,
        "refiner": "none",
        "stretch": 0.0,
        "stage1_steps": 2000,
        "stage2_steps": 2000,
        "decoding_steps": 20,
        "choice_temperature": 8.0,
    },
    "none": {"ssl": "none"},
    "long": LONG,
    "none-long": {"ssl": "none", **LONG},
    "none-512": {"ssl": "none", **REVIVED, **LONG},
}


def add_arguments(parser: argparse.ArgumentParser, variants: bool = True, data: bool = True) -> None:
    if data:
        parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the data sets")
    if variants:
        add_variants(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training and sampling [0]")
    parser.add_argument("--budget", type=float, default=1.0, metavar="X", help="share of each variant's epochs [1]")
    parser.add_argument("--devices", nargs="+", default=["auto"], help="cpu, or GPUs such as cuda:0 cuda:1 [auto]")
    add_streams(parser, jobs=1)
    parser.add_argument(
        "--minutes", type=float, default=8.0, metavar="M", help="what is not finished is stopped; 0: only print [8]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines or .csv, added to")
    parser.add_argument("--cache", type=Path, default=default_folder(), metavar="DIR", help="trained evaluators")


def add_streams(parser: argparse.ArgumentParser, jobs: int) -> None:
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help=f"processes on each device [{jobs}]")
    parser.add_argument(
        "--streams", type=int, default=1, metavar="S", help="trainings at a time in each process; they share a GPU [1]"
    )


def add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants", nargs="+", default=None, metavar="NAME", help=f"out of {', '.join(VARIANTS)} and of --variant"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,KEY=VALUE",
        help="one more: options of ncfast.fit, and preset; a list has + between its words. Repeatable",
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of every variant. Repeatable"
    )


def chosen_variants(arguments: argparse.Namespace, more: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Options of each variant, in the order asked for; those of --variant are asked for by being there.

    Args:
        more: names that are no variants of training; they have no options.

    Raises:
        UserError: an unknown variant or option, or a value that it cannot have.
    """
    known = dict(VARIANTS)
    own = []
    for text in arguments.variant:
        name, _, options = text.partition(":")
        known[name] = options_of(options)
        own.append(name)
    for_all = dict(map(key_and_value, arguments.option))
    asked = [*(arguments.variants if arguments.variants is not None else [] if own else ["default"]), *own]
    chosen: dict[str, dict[str, Any]] = {}
    for name in asked:
        if name in more:
            chosen[name] = {}
        elif name in known:
            chosen[name] = {**known[name], **for_all}
            configured(chosen[name], seed=0)
        else:
            raise UserError(f"no variant {name!r}; there are {', '.join([*known, *more])}, or make one with --variant")
    return chosen


def configured(options: dict[str, Any], seed: int) -> Config:
    options = dict(options)
    preset = options.pop("preset", "default")
    if preset not in PRESETS:
        raise UserError(f"preset is one of {', '.join(PRESETS)}; got {preset!r}")
    return make_config(preset, **options, seed=seed)


def trained(cell: Cell, dataset: Dataset, device: torch.device, runs: Path) -> tuple[NCVQVAE, float]:
    """The model of a cell and the seconds that its training took; goes on with one that was stopped."""
    options = cell["options"]
    if device.type == "cuda":
        options = {"precision": "bf16", **options}
    config = shortened(resolve_config(configured(options, cell["seed"]), dataset, device), cell["budget"])
    folder = run_folder(cell, runs)
    if is_trained(folder, config, dataset):
        model = ncfast.load(folder, device)
    else:
        model = train(config, dataset, out=folder, device=device, resume=True, quiet=True)
    return model, sum(values["seconds"] for values in read_json(folder / "metrics.json").values())


def run_folder(cell: Cell, runs: Path) -> Path:
    return runs / hashlib.sha256(identity(cell).encode()).hexdigest()[:16]


def runs_of(out: Path) -> Path:
    """Where the trainings of a file of results have their folders."""
    return out.with_suffix(".runs")


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """SIGTERM, which `timeout` sends, ends the block as Ctrl-C does, so that its processes do not go on alone."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@sigterm_as_exit()
def run(cells: Sequence[Cell], work: Callable[[Cell, torch.device], Row], arguments: argparse.Namespace) -> list[Row]:
    """Rows of all cells that are finished, in their order, when all are or the time is up.

    Cells begin in their order, but for those that will take longer than what is left, by what another cell of that
    set has taken.

    What fails beside other cells of its process is done again by itself, as it may have been the fault of another.

    Args:
        work: what to do with a cell; a process calls it with one after the other, in each of its threads.
    """
    begin = time.monotonic()
    deadline = begin + 60 * arguments.minutes
    out: Path = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix != ".csv" and out.exists() and not out.read_bytes().endswith(b"\n"):
        with open(out, "a") as file:
            file.write("\n")
    rows = {identity(row["cell"]): row for row in rows_of(out)}
    todo = [cell for cell in cells if identity(cell) not in rows]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them finished before", flush=True)
    workers: list[Worker] = []
    again: list[Cell] = []  # that failed beside others
    failed = 0
    try:
        devices = [device for _ in range(arguments.jobs) for device in arguments.devices]
        devices = devices[: len(todo) if arguments.minutes else 0]
        workers = [Worker(work, device, len(devices), arguments.streams) for device in devices]
        while time.monotonic() < deadline:
            for i, worker in enumerate(workers):
                if worker.has_failed and not worker.cells:
                    worker.connection.close()
                    workers[i] = Worker(work, worker.device, len(workers), arguments.streams)
            for _ in range(arguments.streams):
                for worker in workers:
                    if again and not worker.cells:
                        worker.take(again.pop(0), alone=True)
                    elif worker.has_room():
                        worker.take(next_cell(todo, rows.values(), deadline - time.monotonic()))
            busy = [worker for worker in workers if worker.cells]
            if not busy:
                break
            wait([worker.connection for worker in busy], timeout=max(0.0, deadline - time.monotonic()))
            for cell, row, error, alone in (each for worker in busy for each in worker.answers()):
                said = f"[{time.monotonic() - begin:4.0f} s] {label(cell)}"
                if row is None:
                    failed += alone
                    again += [] if alone else [cell]
                    print(f"{said} failed{'' if alone else ' beside others, and is done again'}: {error}", flush=True)
                    continue
                add_row(out, row, rows.values())
                rows[identity(cell)] = row
                shutil.rmtree(run_folder(cell, runs_of(out)), ignore_errors=True)
                print(f"{said}: {row['seconds']:.0f} s", flush=True)
    finally:
        stop(workers)
    finished = [rows[identity(cell)] for cell in cells if identity(cell) in rows]
    left = len(cells) - len(finished) - failed
    if left or failed:
        print(f"{left} cells are not finished and {failed} failed: the same command goes on", flush=True)
    return finished


def next_cell(todo: list[Cell], rows: Any, left: float) -> Cell | None:
    """Takes the first that is expected to be finished in the seconds that are left."""
    fastest: dict[tuple[Any, ...], float] = {}
    for row in rows:
        kind = kind_of(row["cell"])
        fastest[kind] = min(row["seconds"], fastest.get(kind, row["seconds"]))
    for i, cell in enumerate(todo):
        if fastest.get(kind_of(cell), 0.0) <= left:
            return todo.pop(i)
    return None


def kind_of(cell: Cell) -> tuple[Any, ...]:
    return cell["set"], cell.get("length"), cell["variant"]


def label(cell: Cell) -> str:
    return " ".join(str(cell[name]) for name in ("set", "length", "variant") if name in cell) + f" seed {cell['seed']}"


class Worker:
    """A process on a device that is given cells, as many at a time as it has threads.

    Attributes:
        cells: those that it has.
        alone: it has one, and is to get no other beside it.
        has_failed: one of its cells, so that it is to get no more: a GPU may not be usable after that.
    """

    def __init__(self, work: Callable[[Cell, torch.device], Row], device: str, workers: int, streams: int = 1) -> None:
        self.device = device
        self.streams = streams
        self.cells: list[Cell] = []
        self.alone = self.has_failed = False
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        threads = max(1, len(os.sched_getaffinity(0)) // (workers * streams))
        self.process = context.Process(target=serve, args=(work, device, threads, streams, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def has_room(self) -> bool:
        return not self.has_failed and len(self.cells) < (1 if self.alone else self.streams)

    def take(self, cell: Cell | None, alone: bool = False) -> None:
        if cell is not None:
            self.cells.append(cell)
            self.alone = alone or self.streams == 1
            with contextlib.suppress(OSError):  # the answer will say that the process has ended
                self.connection.send(cell)

    def answers(self) -> Iterator[tuple[Cell, Row | None, str, bool]]:
        """What has come: a cell, its row or what went wrong, and whether it was alone; all where the process has
        ended."""
        if not self.connection.poll():
            return
        try:
            answers = [self.connection.recv()]
        except (EOFError, ConnectionError):
            self.process.join()
            answers = [(cell, None, f"its process ended with code {self.process.exitcode}") for cell in self.cells]
        for cell, row, error in answers:
            self.cells.remove(cell)
            self.has_failed |= row is None
            yield cell, row, error, self.alone


def stop(workers: Sequence[Worker], seconds: float = 10) -> None:
    """Ends their processes, within that time."""
    for worker in workers:
        worker.process.terminate()
    end = time.monotonic() + seconds
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))
        worker.process.kill()


def end_with_parent() -> None:
    """A program that is killed cannot end its processes, and they would go on to the end of their cells."""
    multiprocessing.parent_process().join()
    os._exit(1)


def serve(
    work: Callable[[Cell, torch.device], Row], device: str, threads: int, streams: int, connection: Connection
) -> None:
    """What a process of `run` does, until the other end is closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is open is closed
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is of several processes too, and would be left behind with a warning
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    where = choose_device(device)[0]
    receiving, sending = threading.Lock(), threading.Lock()

    def work_on_cells() -> None:
        while True:
            with receiving:
                while not connection.poll(0.1):  # a thread that waits inside a call cannot be interrupted
                    pass
                cell = connection.recv()
            begin = time.monotonic()
            try:
                row = {"cell": cell, **work(cell, where)}
            except Exception as error:  # whatever it is, other cells go on
                if not isinstance(error, UserError):
                    traceback.print_exc()
                answer = cell, None, f"{type(error).__name__}: {error}"
            else:
                seconds = round(time.monotonic() - begin, 1)
                answer = cell, {**row, "seconds": seconds, "machine": name_of(where), **provenance()}, ""
            with sending:
                connection.send(answer)

    try:
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            in_threads(streams, work_on_cells, where)
    except SystemExit:
        end(1)  # at once: what is open is closed, and other threads may be inside a library


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def provenance() -> Row:
    """Versions, the commit of this program and the day. $NCFAST_COMMIT says it of a copy that knows no better."""
    versions = {"ncfast": __version__, "torch": torch.__version__, "cuda": torch.version.cuda}
    return {**versions, "commit": commit(), "date": datetime.date.today().isoformat()}


def commit() -> str | None:
    """Of what runs; "+" says that it has been changed since."""
    if told := os.environ.get("NCFAST_COMMIT"):
        return told
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    try:
        head = git("rev-parse", "--short=10", "HEAD").stdout.strip()
        changed = head and git("diff", "--quiet", "HEAD", "--", "ncfast", "csrc", "experiments").returncode
    except OSError:  # there is no git
        head = ""
    return head + "+" * bool(changed) if head else None
