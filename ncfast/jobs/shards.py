"""What lies on disk of a job of generated series: shards and their names, a manifest, one file that shows them all.

A job of one shard is one plain file. A job of several writes, beside the file that was asked for:

- `NAME.manifest.json` first: what the job is, so that another one cannot mix its shards with these;
- `NAME-00003-of-00016.h5`, each under a temporary name until it is complete and flushed;
- when all are there, the manifest again, with the checksum of every shard, and last `NAME.h5`: virtual data sets.

A shard has `x` [n, C, L], `tokens` [n, T], `index` [n] and, for series with a class, `y` [n], for series with
conditions, `conditions` [n, k], for series of unequal lengths, `length` [n], from where on x is NaN, and of a run with
`--level on`, `levels` [n, 2C]; as attributes everything that a lone file needs to explain itself, and a sha256 of the
bytes of each data set, in row-major order.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ncfast.engine.checkpoint import read_json, reason
from ncfast.errors import UserError

FORMAT = 2
READ_BYTES = 2**26


def manifest_path(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.h5')}.manifest.json")


def shard_path(out: Path, k: int, count: int) -> Path:
    return out.with_name(f"{out.name.removesuffix('.h5')}-{k:05d}-of-{count:05d}.h5")


@dataclass(frozen=True)
class Job:
    """What the files hold, and what that depends on.

    Attributes:
        out: the file that was asked for.
        rows: series of all shards.
        shards: number of files.
        columns: of each data set the shape of a row and the type, such as {"x": ((1, 500), "f4")}.
        compression: "none", "lzf", "gzip" or "zstd".
        class_names: empty for series without a class.
        made_from: everything that decides what the series are, as JSON has it: equal ones make equal series.
        provenance: what is worth knowing besides; attributes of every file.
    """

    out: Path
    rows: int
    shards: int
    columns: dict[str, tuple[tuple[int, ...], str]]
    compression: str
    class_names: tuple[str, ...]
    made_from: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.made_from, sort_keys=True).encode()).hexdigest()

    @property
    def row_bytes(self) -> int:
        return sum(np.dtype(kind).itemsize * int(np.prod(shape)) for shape, kind in self.columns.values())

    @property
    def manifest(self) -> Path:
        return manifest_path(self.out)

    def shard(self, k: int) -> "Shard":
        # Even, and multiples of what a forward pass makes where there are enough.
        unit = 1024 if self.rows >= 1024 * self.shards else 1
        units = -(-self.rows // unit)
        first, end = (min(self.rows, unit * (units * i // self.shards)) for i in (k, k + 1))
        path = self.out if self.shards == 1 else shard_path(self.out, k, self.shards)
        return Shard(self, k, path, first, end - first)

    def all_shards(self) -> list["Shard"]:
        return [self.shard(k) for k in range(self.shards)]


@dataclass(frozen=True)
class Shard:
    job: Job
    number: int
    path: Path
    first: int
    rows: int

    def attributes(self) -> dict[str, Any]:
        return {**self.job.provenance, "shard": self.number, "num_shards": self.job.shards, "first": self.first}

    def problem(self, *, contents: bool) -> str | None:
        """Why the file is not this shard; None when it is. `contents` computes its checksums again."""
        try:
            with open_hdf5(self.path) as file:
                if file.attrs.get("job_sha256") != self.job.sha256:
                    return "it is of another job"
                if not file.attrs.get("complete", False) or file.attrs["first"] != self.first:
                    return "it is not complete"
                for name, (shape, kind) in self.job.columns.items():
                    if name not in file or file[name].shape != (self.rows, *shape) or file[name].dtype != kind:
                        return f"its {name} is not {kind} {[self.rows, *shape]}"
                return changed_column(file, self.job.columns) if contents else None
        except FileNotFoundError:
            return "it is not there"
        except (OSError, KeyError, RuntimeError) as error:
            return reason(error)


def open_hdf5(path: Path) -> h5py.File:
    """To read. Nobody writes to a file that has its name, so no lock is asked for, which some file systems lack."""
    return h5py.File(path, "r", locking=False)


def changed_column(file: h5py.File, columns: Any) -> str | None:
    """Compares the data with their checksums."""
    for name in columns:
        digest = hashlib.sha256()
        for block in blocks(file[name]):
            digest.update(block)
        if digest.hexdigest() != file.attrs[f"sha256_{name}"]:
            return f"its {name} has changed: the checksum is another one"
    return None


def blocks(data: h5py.Dataset) -> Iterator[np.ndarray]:
    rows = max(1, READ_BYTES // max(1, data.dtype.itemsize * int(np.prod(data.shape[1:]))))
    for first in range(0, len(data), rows):
        yield np.ascontiguousarray(data[first : first + rows])


def read_manifest(path: Path) -> dict[str, Any]:
    content = read_json(path)
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or not isinstance(content.get("made_from"), dict) or not isinstance(content.get("num_shards"), int):
        raise UserError(f"{path} is not the manifest of generated series, or of another version; move it away")
    return content
