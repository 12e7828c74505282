"""Generates a job: plans its shards, draws their series and writes them."""

import argparse
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ncfast.cli.startup import choose_device
from ncfast.cli.torchrun import local_rank
from ncfast.config import sampling_values
from ncfast.data.conditions import parse_conditions, read_conditions
from ncfast.engine.background import Background
from ncfast.engine.device import kind
from ncfast.engine.logging import progress_bar
from ncfast.engine.memory import check_fits, exhaustion_explained, human
from ncfast.errors import UserError
from ncfast.jobs.export import check_export, export, format_of
from ncfast.jobs.reader import open_generated
from ncfast.jobs.shards import FORMAT, Job, Shard, open_hdf5, read_manifest
from ncfast.jobs.writer import ShardWriter, claim, filters, finish, refuse_another
from ncfast.models.trained import weights_sha256
from ncfast.ncvqvae import NCVQVAE, load
from ncfast.sampling.class_plan import parse_labels
from ncfast.sampling.condition_plan import ConditionPlan
from ncfast.sampling.series import SeriesSampler
from ncfast.version import __version__

# Where nobody says how many: files of about this size, and a few for each process, so that all end about together.
SHARD_BYTES = 2**28
SHARDS_PER_PROCESS = 4
LEAST_CHUNKS = 100
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
MOST_COMPRESSION = 32  # of tokens among 2 codes it is 16


@exhaustion_explained("lower --batch-size, or end what else uses it")
def generate(arguments: argparse.Namespace) -> None:
    """What `python -m ncfast.generate` does with its arguments.

    Raises:
        UserError: a mistake in them, a job that cannot be done here, or one whose name belongs to another.
    """
    file_format, exported = format_of(arguments.out, arguments.format), arguments.out
    if file_format != "h5":
        arguments.out = exported.with_suffix(".h5")
        if arguments.tokens_only:
            raise UserError(f"{file_format} is for series; leave out --tokens-only, or choose h5")
    part, parts = choose_share(arguments)
    check(arguments, parts)
    device, device_reason = choose_device(arguments.device, local_rank())
    model = load(arguments.run, device, arguments.precision)
    options = sampling_values(model.config)
    given = {name: value for name, value in vars(arguments).items() if name in options}
    labels = parse_labels(arguments.labels, model.class_names)
    if isinstance(labels, str) and labels in model.class_names:
        print(f"warning: {labels!r} is a class too; --labels '{json.dumps([labels])}' draws it", flush=True)
    condition = given_conditions(arguments)
    sampler = SeriesSampler(
        model, labels, arguments.seed, condition=condition, decode=not arguments.tokens_only, **given
    )
    job = make_job(arguments, sampler, labels, parts)
    if file_format != "h5":
        check_export(
            file_format, model.data.channels, labelled="y" in job.columns, conditional="conditions" in job.columns
        )
    leads = part == 0 or arguments.shard is not None  # the others of torchrun leave the terminal to the first
    if leads:
        print_job(job, f"{device} ({device_reason}); {model.precision}", part, parts)
    if arguments.dry_run:
        return

    check_space(job)
    own = [job.shard(k) for k in range(part, job.shards, parts)]
    done = prepare(job, own, arguments.overwrite)
    todo = [shard for shard in own if shard.number not in done]
    if done and leads:
        print(f"kept       {len(done)} of {len(own)} shards that are complete", flush=True)
    batch_size = arguments.batch_size or 4 * sampler.size
    largest = min(batch_size, max((shard.rows for shard in todo), default=0))
    check_fits(largest * job.row_bytes, torch.device("cpu"), f"a batch of {largest} series", "lower --batch-size")
    progress = JobProgress(job, own, done, leads)
    begin = time.monotonic()
    with progress.bar:
        write_shards(sampler, todo, progress, batch_size, arguments.overwrite)
        progress.wait_for_others()
    rate = progress.rows / (time.monotonic() - begin)
    counts = finish(job)
    if counts is None:
        left = sum(not shard.path.exists() for shard in job.all_shards())
        if leads:
            print(f"wrote {len(todo)} shards; {left} of {job.shards} are left to other processes")
    elif leads:
        print(f"wrote {job.out}: {job_summary(job, counts)}" + (f"; {rate:,.0f} series/s" if rate else ""))
        if file_format != "h5":
            export(open_generated(job.out), exported, file_format)
            print(f"wrote {exported}")


def given_conditions(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Those of --condition-file and --condition; None without either."""
    given = {} if arguments.condition_file is None else read_conditions(arguments.condition_file)
    given |= parse_conditions(arguments.condition or [])
    return given or None


def choose_share(arguments: argparse.Namespace) -> tuple[int, int]:
    """Which part of how many this process has: --shard, or torchrun's, or all."""
    if local_rank() is None:
        return arguments.shard or (0, 1)
    if arguments.shard is not None:
        raise UserError("use torchrun or --shard, not both")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def check(arguments: argparse.Namespace, parts: int) -> None:
    """What can be told before anything is loaded."""
    if not arguments.out.parent.is_dir():
        raise UserError(f"the folder {arguments.out.parent} of --out does not exist; make it first")
    if arguments.out.is_dir():
        raise UserError(f"--out is a file; {arguments.out} is a folder")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size is at least 1; got {arguments.batch_size}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is at least 0 and below 2**63; got {arguments.seed}")
    if arguments.overwrite and parts > 1:
        raise UserError(
            "--overwrite is for one process: several would remove each other's shards; choose another --out"
        )
    if not arguments.dry_run and not os.access(arguments.out.parent, os.W_OK):
        raise UserError(f"the folder {arguments.out.parent} of --out cannot be written to; choose another --out")
    filters(arguments.compression)


def make_job(arguments: argparse.Namespace, sampler: SeriesSampler, labels: Any, parts: int) -> Job:
    model = sampler.model
    total = sampler.total()
    n = total if arguments.num_samples is None else arguments.num_samples
    if n is None:
        raise UserError('say how many: --num-samples N, or counts in --labels, such as "a:1000,b:500"')
    if n < 1 or (total is not None and n > total):
        most = "" if total is None else f" and at most {total}, which the counts of --labels sum to"
        raise UserError(f"--num-samples is at least 1{most}; got {n}")
    if n >= 2**62:
        raise UserError(f"--num-samples is below 2**62; got {n}")
    with_classes = sampler.plan.names_classes
    columns = {
        "x": ((model.data.channels, model.data.length), {"float32": "f4", "float16": "f2"}[arguments.dtype]),
        "tokens": ((model.vqvae.num_tokens,), "u2"),
        "index": ((), "i8"),
        "y": ((), "i8"),
    }
    if model.data.user_conditions:
        columns["conditions"] = ((len(model.data.user_conditions),), "f8")
    if model.data.has_lengths:
        columns["length"] = ((), "i8")
    if model.data.levels:
        columns["levels"] = ((len(model.data.levels),), "f8")
    columns = {k: v for k, v in columns.items() if (k != "x" or sampler.decode) and (k != "y" or with_classes)}
    made_from = {
        "weights_sha256": weights_sha256(arguments.run),
        "rows": n,
        "seed": arguments.seed,
        "labels": labels,
        "precision": model.precision,
        "device": model.device.type,  # another one rounds otherwise, and draws other series
        "columns": {name: [list(shape), kind] for name, (shape, kind) in columns.items()},
        "compression": arguments.compression,
        "config": dataclasses.asdict(sampler.config),
    }
    if sampler.conditions is not None:
        made_from["condition"] = described(sampler.conditions)
    job = Job(
        out=arguments.out,
        rows=n,
        shards=1,
        columns=columns,
        compression=arguments.compression,
        class_names=model.class_names if with_classes else (),
        made_from=json.loads(json.dumps(made_from)),  # as it will be read back
        provenance={},
    )
    job = dataclasses.replace(job, provenance=provenance(model, arguments.run, sampler, labels, job, made_from))
    shards = choose_num_shards(job, arguments.num_shards, parts, arguments.overwrite, sampler.size)
    return dataclasses.replace(job, shards=shards)


def described(conditions: ConditionPlan) -> dict[str, Any]:
    """The conditions given, as they are encoded: the value, several in a list, or the sha256 of many."""
    shown: dict[str, Any] = {}
    for i, values in conditions.given.items():
        few = values.tolist() if len(values) > 1 else float(values[0])
        shown[conditions.columns[i].name] = few if len(values) <= 100 else hashlib.sha256(values).hexdigest()
    return shown


def provenance(
    model: NCVQVAE, run: Path, sampler: SeriesSampler, labels: Any, job: Job, made_from: dict
) -> dict[str, Any]:
    """What a lone file needs to explain itself."""
    conditions: dict[str, str] = {}
    if sampler.conditions is not None:
        columns = [dataclasses.asdict(column) for column in model.data.user_conditions]
        conditions = {"condition_columns": json.dumps(columns), "condition": json.dumps(made_from["condition"])}
    return {
        **conditions,
        "format": FORMAT,
        "ncfast": __version__,
        "torch": str(torch.__version__),
        "device": str(model.device.type),
        "device_name": kind(model.device),
        "run": str(run.resolve()),
        "precision": model.precision,
        "dataset": model.data.name,
        "class_names": list(model.class_names) or h5py.Empty("S1"),
        "labels": labels if isinstance(labels, str) else json.dumps(labels),
        "seed": sampler.seed,
        "mean": model.data.mean,
        "std": model.data.std,
        "config": json.dumps(made_from["config"]),
        "weights_sha256": made_from["weights_sha256"],
        "job_sha256": job.sha256,
        "complete": False,
    }


def choose_num_shards(job: Job, asked: int | None, parts: int, overwrite: bool, chunk: int) -> int:
    """As asked; as the job was begun; or by size and number of processes.

    chunk: rows of a forward pass. A shard of fewer than `LEAST_CHUNKS`, one of which is drawn twice, is made for the
        sake of several processes only.
    """
    begun = None
    if job.manifest.exists() and not overwrite:
        manifest = read_manifest(job.manifest)
        refuse_another(job.manifest, manifest["made_from"], job)
        begun = manifest["num_shards"]
    if asked is not None:
        if not 1 <= asked <= min(job.rows, 99999):
            raise UserError(f"--num-shards is 1 to {min(job.rows, 99999)} for {job.rows} series; got {asked}")
        if begun is not None and asked != begun:
            raise UserError(f"{job.manifest} has {begun} shards; leave out --num-shards, or give the same")
        return asked
    if begun is not None:
        return begun
    most = max(1, job.rows // (LEAST_CHUNKS * chunk))
    by_size = min(most, -(-job.rows * job.row_bytes // SHARD_BYTES))
    by_processes = min(max(parts, min(most, SHARDS_PER_PROCESS * parts)), -(-job.rows // 1024)) if parts > 1 else 1
    return min(max(by_size, by_processes), job.rows, 99999)


def print_job(job: Job, device: str, part: int, parts: int) -> None:
    size = job.rows * job.row_bytes
    columns = ", ".join(f"{name} {list((job.rows, *shape))} {kind}" for name, (shape, kind) in job.columns.items())
    print(f"ncfast     {__version__}")
    print(f"device     {device}")
    print(f"series     {job.rows}: {columns}")
    print(f"size       {human(size)}, compression {job.compression}; {human(free_space(job))} free")
    several = f", of which part {part} of {parts}" if parts > 1 else ""
    print(f"shards     {job.shards}{several}")
    print(f"out        {job.out}", flush=True)


def free_space(job: Job) -> int:
    return shutil.disk_usage(job.out.parent).free


def check_space(job: Job) -> None:
    """Of all shards that are not there, whoever writes them."""
    missing = sum(shard.rows for shard in job.all_shards() if not shard.path.exists())
    needed, free = missing * job.row_bytes, free_space(job)
    if needed > free * (1 if job.compression == "none" else MOST_COMPRESSION):
        raise UserError(
            f"{job.out.parent} has {human(free)} free, and the job needs {human(needed)} more; free space, choose "
            "another folder, or see --dtype, --compression and --tokens-only"
        )


def prepare(job: Job, own: list[Shard], overwrite: bool) -> set[int]:
    """Numbers of the shards in `own` that are there already, whole.

    Raises:
        UserError: the name belongs to another job.
    """
    if overwrite:
        remove_job(job)
    if job.shards > 1:
        claim(job)
    if job.out.exists() and not same_job(job):
        raise UserError(
            f"{job.out} exists and is not of this job; add --overwrite to replace it, or choose another --out"
        )
    done = set()
    for shard in own:
        if not shard.path.exists():
            continue
        problem = shard.problem(contents=True)
        if problem is None:
            done.add(shard.number)
        else:
            print(f"warning: {shard.path} is written again: {problem}", flush=True)
    return done


def remove_job(job: Job) -> None:
    """What has this job's names, unless it is this very job: then the shards may be used.

    Raises:
        UserError: --out is a file that no job wrote.
    """
    if job.out.exists() and not is_generated(job.out):
        raise UserError(f"{job.out} is not a file of `ncfast.generate`, so --overwrite leaves it; choose another --out")
    manifest = job.manifest
    if manifest.exists():
        try:
            content = read_manifest(manifest)
            same = content["made_from"] == job.made_from and content["num_shards"] == job.shards
        except UserError:
            same = False
        if not same:
            stem = job.out.name.removesuffix(".h5")
            digits = "[0-9]" * 5
            for old in manifest.parent.glob(f"{glob.escape(stem)}-{digits}-of-{digits}.h5"):
                old.unlink()
            manifest.unlink()
    if job.out.exists() and not same_job(job):
        job.out.unlink()


def is_generated(path: Path) -> bool:
    """Whether it is, or was before it was damaged, a file of ours."""
    try:
        with open_hdf5(path) as file:
            return "job_sha256" in file.attrs
    except OSError:
        with open(path, "rb") as file:
            return file.read(8) == HDF5_SIGNATURE


def same_job(job: Job) -> bool:
    try:
        with open_hdf5(job.out) as file:
            return file.attrs.get("job_sha256") == job.sha256
    except OSError:
        return False


class JobProgress:
    """One bar for the job: what this process writes, and the shards of others as they appear."""

    INTERVAL = 5.0  # seconds between two looks

    def __init__(self, job: Job, own: list[Shard], done: set[int], leads: bool) -> None:
        mine = {shard.number for shard in own}
        self.others = [shard for shard in job.all_shards() if shard.number not in mine]
        if not leads or local_rank() is None:
            self.others = []  # a bar for this process alone
        total = sum(shard.rows for shard in (*own, *self.others))
        initial = sum(shard.rows for shard in own if shard.number in done) + self.appeared()
        self.rows = total - initial  # that are to come
        self.bar = progress_bar("generate", total, initial, unit="series", quiet=not leads)
        self.looked = time.monotonic()

    def appeared(self) -> int:
        there = [shard for shard in self.others if shard.path.exists()]
        self.others = [shard for shard in self.others if shard not in there]
        return sum(shard.rows for shard in there)

    def update(self, rows: int) -> None:
        if self.others and time.monotonic() - self.looked > self.INTERVAL:
            self.looked = time.monotonic()
            rows += self.appeared()
        self.bar.update(rows)

    def wait_for_others(self) -> None:
        """The first process of torchrun ends last; torchrun ends it when another one fails."""
        while self.others:
            self.bar.update(self.appeared())
            time.sleep(0.2)


def write_shards(
    sampler: SeriesSampler, todo: list[Shard], progress: JobProgress, batch_size: int, replace: bool
) -> None:
    """The model draws while a thread writes; a few batches lie between them."""
    with contextlib.ExitStack() as writers, Background() as background:
        for shard in todo:
            writer = ShardWriter(shard, replace=replace)
            writers.callback(writer.discard)  # after the thread has ended, whatever ended it
            for batch in sampler.batches(shard.rows, shard.first, batch_size):
                background.call(writer.write, batch)
                progress.update(len(batch.index))
            if shard.rows:
                background.call(writer.compare, sampler.again(probe(shard, sampler.size)))
            background.call(writer.close)


def probe(shard: Shard, size: int) -> np.ndarray:
    """Series of a shard that are drawn again before it gets its name: of one chunk, elsewhere in each shard."""
    chunks = range(shard.first // size, (shard.first + shard.rows - 1) // size + 1)
    chunk = chunks[int(0.618 * (shard.number + 1) * len(chunks)) % len(chunks)]
    first, end = max(shard.first, chunk * size), min(shard.first + shard.rows, (chunk + 1) * size)
    return np.arange(first, end)


def job_summary(job: Job, counts: dict[str, int]) -> str:
    shapes = {name: f"{list((job.rows, *shape))} {kind}" for name, (shape, kind) in job.columns.items()}
    main = "x" if "x" in shapes else "tokens"
    classes = "; " + ", ".join(f"class {k}: {v}" for k, v in counts.items()) if counts else ""
    return f"{main} {shapes[main]}{classes}"
