"""Writing a shard: ncfast's writer (checksums, finite check, flush, rename) against plain h5py with the same arrays.

With `--run`, the whole pipeline instead: drawing series alone, writing them alone, and both at once as in
`ncfast.generate`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np
from common import table

from ncfast.cli.startup import choose_device
from ncfast.engine.background import Background
from ncfast.jobs.shards import Job
from ncfast.jobs.writer import ShardWriter
from ncfast.ncvqvae import load
from ncfast.sampling.series import Batch, SeriesSampler

BATCH = 4096


def make_batches(rows: int, length: int, tokens: int) -> list[Batch]:
    generator = np.random.default_rng(0)
    x = np.cumsum(generator.normal(size=(BATCH, 1, length)), -1).astype(np.float32)
    codes = generator.integers(0, 32, (BATCH, tokens)).astype(np.uint16)
    return [
        Batch(np.arange(first, first + BATCH), x, np.arange(BATCH, dtype=np.int64) % 2, codes)
        for first in range(0, rows, BATCH)
    ]


def write_ours(path: Path, batches: Iterable[Batch], job: Job) -> None:
    writer = ShardWriter(job.shard(0))
    with Background() as background:
        for batch in batches:
            background.call(writer.write, batch)
        background.call(writer.close)


def write_plain(path: Path, batches: list[Batch], job: Job, *, sync: bool) -> None:
    with h5py.File(path, "w") as file:
        for name, (shape, kind) in job.columns.items():
            rows = max(1, 2**20 // (np.dtype(kind).itemsize * int(np.prod(shape))))
            file.create_dataset(name, (job.rows, *shape), kind, chunks=(2 ** (rows.bit_length() - 1), *shape))
        for batch in batches:
            for name in job.columns:
                file[name][batch.index[0] : batch.index[-1] + 1] = getattr(batch, name)
    if sync:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32 * BATCH, help=f"a multiple of {BATCH} [{32 * BATCH}]")
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=75)
    parser.add_argument("--run", type=Path, help="folder of a run to draw from; then --length and --tokens are its own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write [the system's for temporary files]")
    options = parser.parse_args()
    if options.run is not None:
        compare_pipeline(options)
        return
    batches = make_batches(options.rows, options.length, options.tokens)
    ways = {
        "ncfast": write_ours,
        "h5py, then fsync": lambda *a: write_plain(*a, sync=True),
        "h5py, left to the page cache": lambda *a: write_plain(*a, sync=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for i in range(options.repeats):
            for name, write in ways.items():
                path = Path(folder) / f"{i}.h5"
                job = make_job(path, options.rows, options.length, options.tokens)
                begin = time.perf_counter()
                write(path, batches, job)
                seconds[name].append(time.perf_counter() - begin)
                path.unlink()
    show(seconds, "ncfast", job)


def compare_pipeline(options: argparse.Namespace) -> None:
    device, _ = choose_device(options.device)
    model = load(options.run, device)
    sampler = SeriesSampler(model, "none")
    seconds: dict[str, list[float]] = {"both": [], "drawing alone": [], "writing alone": []}
    batch_size = 4 * sampler.size
    list(sampler.batches(8 * sampler.size))  # compiles, captures
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for i in range(options.repeats):
            path = Path(folder) / f"{i}.h5"
            job = make_job(path, options.rows, model.data.length, model.vqvae.num_tokens, with_y=False)
            begin = time.perf_counter()
            batches = list(sampler.batches(options.rows, 0, batch_size))
            seconds["drawing alone"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            write_ours(path, batches, job)
            seconds["writing alone"].append(time.perf_counter() - begin)
            path.unlink()
            begin = time.perf_counter()
            write_ours(path, sampler.batches(options.rows, 0, batch_size), job)
            seconds["both"].append(time.perf_counter() - begin)
            path.unlink()
    show(seconds, "both", job)


def make_job(path: Path, rows: int, length: int, tokens: int, *, with_y: bool = True) -> Job:
    columns = {"x": ((1, length), "f4"), "tokens": ((tokens,), "u2"), "index": ((), "i8")}
    if with_y:
        columns["y"] = ((), "i8")
    return Job(path, rows, 1, columns, "none", ("a", "b") if with_y else (), {}, {})


def show(seconds: dict[str, list[float]], ours: str, job: Job) -> None:
    size = job.rows * job.row_bytes / 1e6
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [name, f"{median:.3f}", f"{size / median:.0f}", f"{job.rows / median:.0f}", f"{median / medians[ours]:.2f}"]
        for name, median in medians.items()
    ]
    print(f"{job.rows} series of {job.columns['x'][0][1]}, {size:.0f} MB\n")
    print(table(["", "s", "MB/s", "series/s", f"time / {ours}"], rows))


if __name__ == "__main__":
    main()
