"""Reading what `python -m ncfast.generate` wrote."""

import json
import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch

from ncfast.data.conditions import LENGTH, ConditionColumn, decode_conditions
from ncfast.data.gaps import to_list
from ncfast.engine.checkpoint import reason
from ncfast.engine.device import kind
from ncfast.errors import UserError
from ncfast.jobs.shards import changed_column, manifest_path, open_hdf5, read_manifest, shard_path
from ncfast.jobs.writer import first_difference_of, runs

if TYPE_CHECKING:
    from ncfast.sampling.series import SeriesSampler


class Column:
    """One data set of the file, read when it is indexed: by slices and integers, or a sorted list of them."""

    def __init__(self, owner: "Generated", name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.owner = owner
        self.name = name
        self.shape = shape
        self.dtype = dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.owner.file()[self.name][index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def __repr__(self) -> str:
        return f"<{self.name} {self.dtype} {list(self.shape)}, on disk>"


class Generated(torch.utils.data.Dataset):
    """Generated series, lazily: nothing is in memory but what was asked for.

    A torch data set of (series float32 [C, L], class index int64), or of the series alone when they have no class, that
    may be given to a DataLoader with workers: each process opens the file for itself.

    Attributes:
        x: series in data units [n, C, L] float32 or float16; None in a file of tokens only (`NCVQVAE.decode`).
        y: class index int64 [n]; None for series without a class.
        tokens: uint16 [n, T].
        index: int64 [n], the number that the series is drawn from, with the seed.
        length: int64 [n], time points of each series, from where on x is NaN; None for series of one length.
        conditions: float64 [n, k], None for series without; `condition_values` gives them by name.
        levels: float64 [n, 2C], for `NCVQVAE.decode`; None of a run that does not draw them apart (`--level`).
        class_names: of the model.
        condition_columns: k of `ncfast.data.conditions.ConditionColumn`, in the order of `conditions`.
        attributes: what else the file says of itself: dataset, seed, config, weights_sha256, ...
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.opened: tuple[int, h5py.File] | None = None
        try:
            file = self.file()
            data_sets = all(isinstance(file[name], h5py.Dataset) for name in file)
            if not data_sets or not np.all(file.attrs.get("complete", False)) or "tokens" not in file:
                raise UserError(f"{path} is not complete, or not a file of `ncfast.generate`")
            attributes = {name: file.attrs[name] for name in file.attrs}
            columns = {name: Column(self, name, file[name].shape, file[name].dtype) for name in file}
        except FileNotFoundError:
            raise UserError(f"{path} does not exist{unfinished(self.path)}") from None
        except (OSError, KeyError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read ({reason(error)}); it is damaged or no HDF5 file") from error
        names = attributes.pop("class_names", ())
        self.class_names = () if isinstance(names, h5py.Empty) else tuple(map(str, names))
        self.attributes = attributes
        self.x, self.y = columns.get("x"), columns.get("y")
        self.tokens, self.index = columns["tokens"], columns["index"]
        self.conditions, self.length, self.levels = (columns.get(k) for k in ("conditions", "length", "levels"))
        try:
            described = json.loads(attributes.pop("condition_columns", "[]"))
            self.condition_columns = tuple(map(ConditionColumn.from_json, described))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} does not say what its conditions are ({error}); it is damaged") from error
        self.columns = tuple(columns)
        self.shards = [self.path.with_name(str(name)) for name in attributes.get("shards", ())]
        self.check_shards(contents=False)

    def check_shards(self, *, contents: bool) -> None:
        """HDF5 itself would read a missing shard as NaN, without a word."""
        rows = 0
        for path in self.shards or [self.path]:
            problem = None
            try:
                with open_hdf5(path) as file:
                    if file.attrs.get("job_sha256") != self.attributes.get("job_sha256"):
                        problem = "it is of another job"
                    elif not file.attrs.get("complete", False):
                        problem = "it is not complete"
                    elif self.shards and file.attrs["first"] != rows:
                        problem = "its series are others"
                    elif contents:
                        problem = changed_column(file, self.columns)
                    rows += len(file["tokens"])
            except FileNotFoundError:
                problem = "it is missing"
            except (OSError, KeyError, RuntimeError) as error:
                problem = reason(error)
            if problem is not None:
                raise UserError(f"{path} cannot be used: {problem}; run the command of `ncfast.generate` again")
        if rows != len(self.tokens):
            raise UserError(f"{self.path} has {len(self.tokens)} series and its shards {rows}; generate it again")

    def verify(self, redraw: int = 0, run: str | Path | None = None) -> None:
        """Reads everything and compares the checksums; with `redraw`, draws some series again and compares the bits.

        Args:
            redraw: how many series of each shard, spread over it. Each takes a forward pass of a whole chunk.
            run: folder of the run; None is where it was when the series were drawn.

        Raises:
            UserError: a file has changed, or a series is another one when drawn again; it says which. With `redraw`:
                the run is not there or another one, or this machine has no such device as drew the series.
        """
        self.check_shards(contents=True)
        if redraw < 0:
            raise UserError(f"redraw is 0 or more series of each shard; got {redraw}")
        if redraw and len(self):
            self.redraw(redraw, run)

    def redraw(self, count: int, run: str | Path | None) -> None:
        sampler = self.sampler(run)
        for path in self.shards or [self.path]:
            with open_hdf5(path) as file:
                rows = len(file["tokens"])
                if rows == 0:
                    continue
                first = int(file.attrs["first"])
                index = np.unique(np.linspace(first, first + rows - 1, min(count, rows)).astype(np.int64))
                different = first_difference_of(sampler.again(index), file, first, self.columns)
            if different is not None:
                then = ", ".join(str(self.attributes.get(name)) for name in ("device_name", "torch"))
                raise UserError(
                    f"{path}: {different} is another one when drawn again (then on {then}; now on "
                    f"{kind(sampler.model.device)}, {torch.__version__}): another kind of device or version of torch "
                    "may round otherwise; on the same, generate the file again"
                )

    def sampler(self, run: str | Path | None) -> "SeriesSampler":
        """How the series were drawn."""
        from ncfast.config import make_config, sampling_values
        from ncfast.models.trained import weights_sha256
        from ncfast.ncvqvae import load
        from ncfast.sampling.series import SeriesSampler

        attributes = self.attributes
        run = Path(attributes.get("run", "") if run is None else run)
        if not (run / "config.json").exists():
            raise UserError(f"the run that drew {self.path} is not in {run}; say where: verify(redraw=..., run=DIR)")
        if weights_sha256(run) != attributes["weights_sha256"]:
            raise UserError(f"{run} is not the run that drew {self.path}: its weights are others")
        model = load(run, str(attributes["device"]), str(attributes["precision"]))
        labels = str(attributes["labels"])
        labels = json.loads(labels) if labels[:1] in ("[", "{") else labels
        config = make_config(**json.loads(attributes["config"]))
        return SeriesSampler(
            model,
            labels,
            int(attributes["seed"]),
            condition=self.given_conditions(),
            decode=self.x is not None,
            **sampling_values(config),
        )

    def given_conditions(self) -> dict[str, np.ndarray] | None:
        """What was given when the series were drawn: of these conditions each series' own value, where its turn is."""
        given = json.loads(str(self.attributes.get("condition", "{}")))
        turn = np.argsort(self.index[:] % max(1, len(self)))  # the indices follow each other
        values = self.condition_values() | ({} if self.length is None else {LENGTH: self.length[:]})
        return {name: column[turn] for name, column in values.items() if name in given} or None

    def file(self) -> h5py.File:
        """Of this process: HDF5 handles do not survive a fork, and cannot be pickled."""
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = os.getpid(), open_hdf5(self.path)
        return self.opened[1]

    def close(self) -> None:
        if self.opened is not None and self.opened[0] == os.getpid():
            self.opened[1].close()
        self.opened = None

    def __enter__(self) -> "Generated":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: Any) -> Any:
        """One series and its class index; of a slice, indices int [m] or a mask bool [n], those of all as tensors."""
        if isinstance(i, slice | list) or np.ndim(i) > 0:
            x, y = self.read(rows_of(i, len(self)))
            return x if y is None else (x, y)
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"series {i} of {len(self)}")
        return self.__getitems__([i % len(self)])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """What a DataLoader asks for a batch: rows are read in the order of the file."""
        x, y = self.read(np.asarray(indices))
        return [*x] if y is None else [*zip(x, y, strict=True)]

    def read(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Series float32 [m, C, L] and class indices int64 [m], or None, of these rows int64 [m], in any order."""
        if self.x is None:
            raise UserError(f"{self.path} holds tokens only; `NCVQVAE.decode(tokens)` makes series of them")
        unique, places = np.unique(rows, return_inverse=True)
        x = torch.from_numpy(read_rows(self.x, unique).astype(np.float32, copy=False)[places])
        return x, None if self.y is None else torch.from_numpy(read_rows(self.y, unique)[places])

    def labels(self, index: Any = slice(None)) -> np.ndarray | None:
        """Class names of the series `index`; None for series without a class."""
        return None if self.y is None else np.array(self.class_names)[self.y[index]]

    def condition_values(self, index: Any = slice(None)) -> dict[str, np.ndarray]:
        """Conditions of the series `index`, by name: numbers, or names of categories; {} for series without."""
        if self.conditions is None:
            return {}
        return decode_conditions(self.condition_columns, np.atleast_2d(self.conditions[index]))

    def to_ntd(self, index: Any = slice(None)) -> np.ndarray:
        """Series with time first, float32 [n, L, C], as many other packages take them; NaN beyond the end of each."""
        return np.ascontiguousarray(self.series(index).swapaxes(1, 2), dtype=np.float32)

    def to_list(self, index: Any = slice(None)) -> list[np.ndarray]:
        """Each series to its own end, float32 [C, L_i]."""
        x = self.series(index).astype(np.float32, copy=False)
        return [*x] if self.length is None else to_list(x, np.atleast_1d(self.length[index]))

    def series(self, index: Any) -> np.ndarray:
        """x [m, C, L] of one index or several."""
        if self.x is None:
            raise UserError(f"{self.path} holds tokens only; `NCVQVAE.decode(tokens)` makes series of them")
        x = self.x[index]
        return x[None] if x.ndim == 2 else x

    def __repr__(self) -> str:
        return f"<{len(self)} generated series of {self.attributes.get('dataset')}, {self.path}>"


def rows_of(index: Any, n: int) -> np.ndarray:
    """The rows int64 [m], from 0, that an index of n rows stands for. Raises IndexError."""
    if isinstance(index, slice):
        return np.arange(*index.indices(n))
    rows = np.asarray(index)
    if rows.dtype == np.bool_ and rows.shape == (n,):
        return np.flatnonzero(rows)
    if rows.size == 0:
        return np.empty(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not -n <= rows.min() <= rows.max() < n:
        raise IndexError(f"series are taken by integers below {n}, a slice, or a mask [{n}]; got {index!r}")
    return rows.astype(np.int64) % n


def read_rows(column: Column, rows: np.ndarray) -> np.ndarray:
    """Rows in ascending order."""
    return np.concatenate([column[0:0], *(column[run] for run in runs(rows))])


def unfinished(path: Path) -> str:
    """A hint, when the job that writes `path` has begun."""
    try:
        count = read_manifest(manifest_path(path))["num_shards"]
    except UserError:
        return ""
    there = sum(shard_path(path, k, count).exists() for k in range(count))
    return f": its job has {there} of {count} shards; run the command of `ncfast.generate` again"


def open_generated(path: str | Path) -> Generated:
    """Opens a file that `python -m ncfast.generate` wrote, or one of its shards.

    Args:
        path: FILE.h5, plain or over shards, which lie beside it.

    Returns:
        A `Generated`: `.x[10:20]` reads these ten series, `len`, a torch data set, `.to_ntd()`, `.verify()`.

    Raises:
        UserError: no such file, one that is not complete, or shards that are missing, incomplete or of another job.
    """
    return Generated(path)
