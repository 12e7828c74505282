"""Writing a shard: ncfast's writer (checksums, finite check, flush, rename) against plain h5py with the same arrays."""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
from common import table

from ncfast.drawing import Batch
from ncfast.engine.background import Background
from ncfast.shards import Job, ShardWriter

BATCH = 4096


def make_batches(rows: int, length: int, tokens: int) -> list[Batch]:
    generator = np.random.default_rng(0)
    x = np.cumsum(generator.normal(size=(BATCH, 1, length)), -1).astype(np.float32)
    codes = generator.integers(0, 32, (BATCH, tokens)).astype(np.uint16)
    return [
        Batch(np.arange(first, first + BATCH), x, np.arange(BATCH, dtype=np.int64) % 2, codes)
        for first in range(0, rows, BATCH)
    ]


def write_ours(path: Path, batches: list[Batch], job: Job) -> None:
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
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32 * BATCH, help=f"a multiple of {BATCH} [{32 * BATCH}]")
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=75)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write [the system's for temporary files]")
    options = parser.parse_args()
    columns = {
        "x": ((1, options.length), "f4"),
        "tokens": ((options.tokens,), "u2"),
        "index": ((), "i8"),
        "y": ((), "i8"),
    }
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
                job = Job(path, options.rows, 1, columns, "none", ("a", "b"), {}, {})
                begin = time.perf_counter()
                write(path, batches, job)
                seconds[name].append(time.perf_counter() - begin)
                path.unlink()
    size = options.rows * Job(Path(), 1, 1, columns, "none", (), {}, {}).row_bytes / 1e6
    ours = statistics.median(seconds["ncfast"])
    rows = [
        [name, f"{size / statistics.median(values):.0f}", f"{statistics.median(values) / ours:.2f}"]
        for name, values in seconds.items()
    ]
    print(f"{options.rows} series of {options.length}, {size:.0f} MB\n")
    print(table(["writer", "MB/s", "time / ours"], rows))


if __name__ == "__main__":
    main()
