"""Writes shards: each is whole or not there, and the last one makes the manifest and the file that shows them all."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ncfast.engine.checkpoint import (
    atomic_path,
    put_first,
    put_in_place,
    reason,
    remove_leftovers,
    temporary_path,
    write_json,
)
from ncfast.errors import UserError
from ncfast.jobs.shards import FORMAT, Job, Shard, open_hdf5, read_manifest
from ncfast.sampling.series import Batch

CHUNK_BYTES = 2**20
FLUSH_BYTES = 2**25
PUT_SECONDS = 5.0  # between the two steps of a name without hard links
# Of a data set that no shard is there for; a reader other than ours sees these.
FILL = {"x": np.nan, "tokens": 2**16 - 1, "index": -1, "y": -1, "conditions": np.nan, "length": -1, "levels": np.nan}


class Disk(io.FileIO):
    """A file that HDF5 believes to be always writable. It keeps the first error for us to raise.

    HDF5 cannot close a file that it cannot write to: it complains for each of its objects, and crashes at the end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(data) and self.error is None:
                done += super().write(data[done:])
        except OSError as error:
            self.error = error
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class ShardWriter:
    """Writes the batches of one shard, in order, and gives the file its name once it is whole.

    Checksums and the check for numbers that are not finite run beside HDF5, which would otherwise wait for them.
    """

    def __init__(self, shard: Shard, *, replace: bool = False) -> None:
        """replace: take the place of whatever has the name; otherwise only of a file of the same job."""
        self.shard = shard
        self.replace = replace
        self.temporary = temporary_path(shard.path)
        self.columns = shard.job.columns
        self.digests = {name: hashlib.sha256() for name in self.columns}
        self.counts = np.zeros(len(shard.job.class_names), np.int64)
        self.written = 0
        self.disk: Disk | None = None
        self.file: h5py.File | None = None
        self.pool = ThreadPoolExecutor(1)
        self.digesting: Future | None = None
        self.flusher = ThreadPoolExecutor(1)
        self.flushing: Future | None = None
        self.unflushed = 0  # bytes

    def write(self, batch: Batch) -> None:
        """Raises UserError when the disk does not take it, or when the series cannot be kept in the file's type."""
        with self.explained():
            if self.file is None:
                self.create()
            arrays = {name: stored(getattr(batch, name), kind) for name, (_, kind) in self.columns.items()}
            before, self.digesting = self.digesting, self.pool.submit(self.digest, arrays, batch)
            part = slice(self.written, self.written + len(batch.index))
            for name, array in arrays.items():
                self.file[name][part] = array
            # That of the batch before: HDF5 does not let go of the interpreter, so this one has hardly begun.
            if before is not None:
                before.result()
            self.disk.check()
            self.written += len(batch.index)
            self.flush_ahead(len(batch.index) * self.shard.job.row_bytes)

    def create(self) -> None:
        remove_leftovers(self.shard.path)
        self.disk = Disk(self.temporary)
        self.file = h5py.File(self.disk, "w", rdcc_nbytes=8 * CHUNK_BYTES)
        for name, (shape, kind) in self.columns.items():
            per_chunk = CHUNK_BYTES // max(1, np.dtype(kind).itemsize * int(np.prod(shape)))
            # A power of two, as the rows of a batch are: no chunk is written by halves.
            per_chunk = min(max(1, self.shard.rows), 2 ** max(0, per_chunk.bit_length() - 1))
            self.file.create_dataset(
                name,
                (self.shard.rows, *shape),
                kind,
                chunks=(per_chunk, *shape),
                **filters(self.shard.job.compression),
            )
        self.file.attrs.update(self.shard.attributes())

    def flush_ahead(self, size: int) -> None:
        """Has the system write what it holds while more is made: the flush at the end then has little to wait for."""
        self.unflushed += size
        if self.unflushed >= FLUSH_BYTES and (self.flushing is None or self.flushing.done()):
            self.check_flush()
            flush = getattr(os, "fdatasync", os.fsync)  # macOS and Windows have fsync alone
            self.flushing = self.flusher.submit(flush, self.disk.fileno())
            self.unflushed = 0

    def check_flush(self) -> None:
        """An error of the disk is told to one flush, and to no later one."""
        if self.flushing is not None:
            self.flushing.result()

    def digest(self, arrays: dict[str, np.ndarray], batch: Batch) -> None:
        for name, array in arrays.items():
            self.digests[name].update(array)
        if batch.y is not None:
            self.counts += np.bincount(batch.y, minlength=len(self.counts))
        # One infinity or NaN makes the sum one; the sum of large numbers may overflow, so then it is looked at closely.
        with np.errstate(over="ignore", invalid="ignore"):
            if "x" not in arrays or np.isfinite(arrays["x"].sum(dtype=np.float32)):
                return
        good = np.isfinite(self.within(arrays["x"], batch)).all(axis=(1, 2))
        if not good.all():
            row = int(np.argmin(good))
            kept = arrays["x"].dtype
            own = self.within(batch.x, batch)[row]
            if np.isfinite(own).all():
                largest = float(np.abs(own).max())
                raise UserError(
                    f"series {batch.index[row]} reaches {largest:g}, and {kept} ends at {np.finfo(kept).max:g}; "
                    "use --dtype float32"
                )
            raise UserError(f"series {batch.index[row]} is not finite: the model of this run has diverged")

    @staticmethod
    def within(x: np.ndarray, batch: Batch) -> np.ndarray:
        """x [B, C, L] with 0 beyond the end of each series, where NaN belongs."""
        if batch.length is None:
            return x
        return np.where(np.arange(x.shape[2]) < batch.length[:, None, None], x, x.dtype.type(0))

    def compare(self, again: Batch) -> None:
        """Reads series that were drawn again. Raises UserError when they are not what was written, bit for bit."""
        with self.explained():
            different = first_difference_of(again, self.file, self.shard.first, self.columns)
        if different is not None:
            raise UserError(
                f"{different} when drawn again is not what was written: the device, its driver or the disk is faulty; "
                "run the same command again, and if that repeats, on another device"
            )

    def close(self) -> None:
        """Completes the file. Raises UserError when the disk does not take it, or when another job has the name."""
        path = self.shard.path
        with self.explained():
            if self.file is None:
                self.create()
            if self.written != self.shard.rows:
                raise RuntimeError(f"{self.written} of {self.shard.rows} rows were written")
            if self.digesting is not None:
                self.digesting.result()
            for name, digest in self.digests.items():
                self.file.attrs[f"sha256_{name}"] = digest.hexdigest()
            if self.shard.job.class_names:
                self.file.attrs["counts"] = self.counts
            self.file.attrs["complete"] = True
            self.file.close()
            self.flusher.shutdown()  # before its descriptor goes
            self.check_flush()
            self.disk.check()
            self.disk.close()
            self.file = self.disk = None
            self.pool.shutdown()
            if not self.replace and path.exists() and self.shard.problem(contents=False) == "it is of another job":
                raise UserError(f"{path} has been written by another job meanwhile; choose another --out")
            put_in_place(self.temporary, path)

    def discard(self) -> None:
        """Leaves nothing behind of a file that is not complete."""
        self.pool.shutdown()
        self.flusher.shutdown()
        if self.file is not None:
            self.file.close()
        if self.disk is not None:
            self.disk.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # what HDF5 raises
            raise UserError(
                f"cannot write {self.shard.path}: {reason(error)}; free space or choose another folder, then run the "
                "same command again: shards that are complete are kept"
            ) from error


def first_difference_of(batch: Batch, file: h5py.File, first: int, columns: Any) -> str | None:
    """Which of the series in `batch` the file, whose first series is number `first`, has otherwise; None: none."""
    rows = batch.index - first
    for name in columns:
        data = file[name]
        kept = np.concatenate([data[run] for run in runs(rows)])
        equal = kept.view(np.uint8).reshape(len(rows), -1) == stored(getattr(batch, name), data.dtype).view(
            np.uint8
        ).reshape(len(rows), -1)
        if not equal.all():
            return f"{name} of series {batch.index[np.argmin(equal.all(1))]}"
    return None


def runs(rows: np.ndarray) -> list[slice]:
    """Rows in ascending order, a run of neighbours at a time: HDF5 takes long over a list."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]


def stored(array: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # it is looked for in the result
        return np.ascontiguousarray(array, dtype=kind)


def filters(compression: str) -> dict[str, Any]:
    """For create_dataset. Bytes of numbers are shuffled first: those of one rank are alike.

    Raises:
        UserError: zstd without hdf5plugin.
    """
    if compression == "none":
        return {}
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 1, "shuffle": True}
    if compression == "lzf":
        return {"compression": "lzf", "shuffle": True}
    try:
        import hdf5plugin
    except ImportError:
        raise UserError(
            "--compression zstd needs hdf5plugin: pip install hdf5plugin (so does whoever reads the file)"
        ) from None
    return {"compression": hdf5plugin.Zstd(clevel=3), "shuffle": True}


def claim(job: Job) -> None:
    """Writes the job's manifest, if this is its first process.

    Raises:
        UserError: the name belongs to another job.
    """
    content = {
        "format": FORMAT,
        "file": job.out.name,
        "job_sha256": job.sha256,
        "made_from": job.made_from,
        "rows": job.rows,
        "num_shards": job.shards,
        "complete": False,
    }
    temporary = temporary_path(job.manifest)
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        put_first(temporary, job.manifest)
    except FileExistsError:
        wait_for_contents(job.manifest)
        refuse_another(job.manifest, read_manifest(job.manifest)["made_from"], job)
    except OSError as error:
        raise UserError(f"cannot write {job.manifest}: {reason(error)}; choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def wait_for_contents(path: Path) -> None:
    """Of a file that another process has just put there by `put_first`."""
    end = time.monotonic() + PUT_SECONDS
    while not path.stat().st_size and time.monotonic() < end:
        time.sleep(0.01)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: the process that made it was killed; remove it and run the command again")


def refuse_another(path: Path, made_from: dict[str, Any], job: Job) -> None:
    """Raises UserError when what lies at `path` was made from something else; it says what differs."""
    for name in (*job.made_from, *made_from):
        ours, theirs = job.made_from.get(name), made_from.get(name)
        if ours != theirs:
            if name == "config":
                name, ours, theirs = first_difference(ours, theirs)
            raise UserError(
                f"{path} is of another job ({name} is {shorten(theirs)} there and {shorten(ours)} here); "
                "choose another --out, or --overwrite it"
            )


def first_difference(ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    ours, theirs = (value if isinstance(value, dict) else {} for value in (ours, theirs))
    name = next(name for name in (*ours, *theirs) if ours.get(name) != theirs.get(name))
    return name, ours.get(name), theirs.get(name)


def shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def finish(job: Job) -> dict[str, int] | None:
    """When all shards are there: manifest and virtual file. Returns series by class; None while a shard is missing."""
    shards = job.all_shards()
    if any(not shard.path.exists() for shard in shards):
        return None
    table = []
    totals = np.zeros(len(job.class_names), np.int64)
    for shard in shards:
        problem = shard.problem(contents=False)
        if problem is not None:
            raise UserError(f"{shard.path} cannot be used: {problem}; move it away and run the same command again")
        with open_hdf5(shard.path) as file:
            counts = file.attrs["counts"] if job.class_names else totals
            checksums = {name: file.attrs[f"sha256_{name}"] for name in job.columns}
        totals += counts
        table.append({"file": shard.path.name, "first": shard.first, "rows": shard.rows, "sha256": checksums})
    if job.shards > 1:
        content = {**read_manifest(job.manifest), "complete": True, "shards": table}
        write_json(job.manifest, content)
        write_virtual(job, totals)
    return dict(zip(job.class_names, totals.tolist(), strict=True))


def write_virtual(job: Job, counts: np.ndarray) -> None:
    """Names of shards are relative: the files can be moved together."""
    with atomic_path(job.out) as temporary, Disk(temporary) as disk:
        with h5py.File(disk, "w") as file:
            describe_virtual(job, counts, file)
        disk.check()


def describe_virtual(job: Job, counts: np.ndarray, file: h5py.File) -> None:
    for name, (shape, kind) in job.columns.items():
        layout = h5py.VirtualLayout((job.rows, *shape), kind)
        for shard in job.all_shards():
            if shard.rows:
                source = h5py.VirtualSource(shard.path.name, name, (shard.rows, *shape))
                layout[shard.first : shard.first + shard.rows] = source
        file.create_virtual_dataset(name, layout, fillvalue=FILL[name])
    file.attrs.update(job.provenance)
    file.attrs["shards"] = [shard.path.name for shard in job.all_shards()]
    if job.class_names:
        file.attrs["counts"] = counts
    file.attrs["complete"] = True
