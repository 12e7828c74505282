"""What a run remembers of its training data, and the way to its units and back."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.data.arrays import FLOAT32_MAX
from ncfast.data.conditions import LENGTH, ConditionColumn, with_length
from ncfast.data.dataset import Dataset
from ncfast.data.gaps import interpolated
from ncfast.data.level import filled, levels_of

# Of a series, and number of its channels; no model of a longer one can be made in reasonable time.
MAX_LENGTH = 2**24


@dataclass(frozen=True)
class DataStats:
    """What a run remembers of its training data.

    mean and std are of each channel over the values of the train set, of which the share `missing` is missing. The
    shortest series has `shortest` time points, or 0 stands for series of one length. `conditions` are those of the
    prior: those of the user, and last the length of series that do not all have one. `levels` are what the prior is
    told besides, 2C or none (`ncfast.data.level`): then each series is normalised by its own mean and deviation.
    """

    name: str
    source: str
    num_series: int
    channels: int
    length: int
    class_names: tuple[str, ...]  # empty without labels
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    missing: float = 0.0
    shortest: int = 0
    conditions: tuple[ConditionColumn, ...] = ()
    reading: str = ""  # JSON: the options of `load_dataset` with which it was read, but for conditions
    levels: tuple[ConditionColumn, ...] = ()

    @property
    def has_gaps(self) -> bool:
        """Whether series have missing values or ends, so that the model is told what was observed."""
        return self.missing > 0 or self.shortest > 0

    @property
    def has_lengths(self) -> bool:
        """Whether series are drawn with an end of their own."""
        return self.shortest > 0 and self.conditions[-1:] != () and self.conditions[-1].name == LENGTH

    @property
    def user_conditions(self) -> tuple[ConditionColumn, ...]:
        """Without the length."""
        return self.conditions[:-1] if self.has_lengths else self.conditions

    @classmethod
    def of(cls, dataset: Dataset, *, level: bool = False) -> "DataStats":
        """level: whether each series is normalised by itself."""
        X = dataset.X_train.astype(np.float64)  # [N, C, L]
        counts = () if dataset.y_train is None else np.bincount(dataset.y_train, minlength=dataset.n_classes).tolist()
        gaps = np.isnan(X)
        mean, std = (np.nanmean, np.nanstd) if gaps.any() else (np.mean, np.std)
        lengths = dataset.lengths_train
        within = X.size if lengths is None else int(lengths.sum()) * X.shape[1]
        std = std(X, axis=(0, 2))
        stats = cls(
            name=dataset.name,
            source=dataset.source,
            num_series=X.shape[0],
            channels=X.shape[1],
            length=X.shape[2],
            class_names=tuple(dataset.class_names),
            class_counts=tuple(counts),
            mean=tuple(mean(X, axis=(0, 2)).tolist()),
            # A channel that never changes is only shifted.
            std=tuple(np.where(std > 0, std, 1.0).tolist()),
            notes=tuple(dataset.notes),
            missing=float(gaps.sum() - (X.size - within)) / within,
            shortest=0 if lengths is None else int(min(lengths.min(), X.shape[2] - 1)),
            conditions=with_length(dataset)[0],
            reading=dataset.reading,
        )
        return stats.with_levels(dataset.X_train) if level else stats

    def with_levels(self, X: np.ndarray) -> "DataStats":
        """The same of series that are each normalised by themselves; X [N, C, L], the train set."""
        names = [f"{what} of channel {c}" for what in ("mean", "log standard deviation") for c in range(self.channels)]
        rows = levels_of(X, self.std)
        columns = zip(names, filled(rows, rows).T, strict=True)
        return dataclasses.replace(self, levels=tuple(ConditionColumn.of(name, values) for name, values in columns))

    @classmethod
    def from_json(cls, values: Any) -> "DataStats":
        """What `dataclasses.asdict` gave, as JSON has it.

        Raises:
            ValueError: something is missing, or is not what it should be.
        """
        names = {f.name: f.default for f in dataclasses.fields(cls)}
        if isinstance(values, dict):  # what later versions added has a default
            added = {name: default for name, default in names.items() if default is not dataclasses.MISSING}
            values = {**added, **values}
        if not isinstance(values, dict) or set(values) != set(names):
            raise ValueError(f"facts of the data are {', '.join(names)}")
        stats = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
        stats = dataclasses.replace(
            stats,
            conditions=columns_of_json("conditions", stats.conditions),
            levels=columns_of_json("levels", stats.levels),
        )
        classes, channels = len(stats.class_names), stats.channels
        for name, right in (
            ("name", isinstance(stats.name, str)),
            ("source", isinstance(stats.source, str)),
            ("num_series", is_count(stats.num_series)),
            ("channels", is_count(stats.channels) and stats.channels <= MAX_LENGTH),
            ("length", is_count(stats.length) and stats.length <= MAX_LENGTH),
            ("class_names", is_row(stats.class_names, str, classes)),
            ("class_counts", is_row(stats.class_counts, int, classes) and all(map(is_count, stats.class_counts))),
            ("mean", is_row(stats.mean, int | float, channels) and all(map(is_finite, stats.mean))),
            ("std", is_row(stats.std, int | float, channels) and all(is_finite(s) and s > 0 for s in stats.std)),
            ("notes", is_row(stats.notes, str, len(stats.notes))),
            ("missing", isinstance(stats.missing, int | float) and 0 <= stats.missing < 1),
            ("reading", isinstance(stats.reading, str)),
            ("shortest", isinstance(stats.shortest, int) and 0 <= stats.shortest < stats.length),
            ("levels", len(stats.levels) in (0, 2 * channels) and all(each.kind == "number" for each in stats.levels)),
        ):
            if not right:
                raise ValueError(f"{name} of the data cannot be {str(getattr(stats, name))[:40]}")
        return stats

    @property
    def identity(self) -> "DataStats":
        """Without what may differ of the same data: where it was read, what was remarked, how it is normalised."""
        return dataclasses.replace(self, source="", notes=(), reading="", levels=())

    def levels_of(self, X: np.ndarray) -> np.ndarray | None:
        """Those of series [N, C, L], float64 [N, 2C], NaN where nothing was observed; None where they are not told."""
        return levels_of(X, self.std) if self.levels else None

    def told(self, dataset: Dataset) -> np.ndarray | None:
        """What the prior is told of each training series: conditions, then levels, float64 [N, k]; None of nothing."""
        rows, levels = with_length(dataset)[1], self.levels_of(dataset.X_train)
        if levels is None:
            return rows
        levels = filled(levels, levels)
        return levels if rows is None else np.concatenate([rows, levels], 1)

    def normalise(self, X: np.ndarray, device: torch.device) -> Tensor:
        """Data units -> zero mean and unit variance a channel, over the train set or, with `levels`, each series by
        itself, on `device`.  X [N, C, L]."""
        mean, std = (each.numpy() for each in self.moments(torch.device("cpu"), self.levels_of(X)))
        return torch.from_numpy(((X - mean) / std).astype(np.float32)).to(device)

    def normalise_observed(self, X: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """As `normalise`, with straight lines over NaN, and what was observed, bool [N, C, L].

        None instead for data without gaps, whose models take nothing else.
        """
        x = self.normalise(X, device)
        observed = ~x.isnan()
        if not observed.all():
            x = interpolated(x, observed)
        return x, observed if self.has_gaps else None

    def denormalise(self, x: Tensor, levels: np.ndarray | Tensor | None = None) -> np.ndarray:
        """Back to data units, in float64 on the way.  x [N, C, L], levels [N, 2C] where there are some -> float32."""
        mean, std = self.moments(x.device, levels)
        return (x.double() * std + mean).float().cpu().numpy()

    def moments(self, device: torch.device, levels: np.ndarray | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float64 [C, 1], or with levels [N, 2C] of each series
        [N, C, 1]."""
        if levels is not None:
            mean, log_std = torch.as_tensor(levels, device=device)[..., None].chunk(2, 1)
            return mean, log_std.exp()
        mean, std = (torch.tensor(v, dtype=torch.float64, device=device)[:, None] for v in (self.mean, self.std))
        return mean, std

    def units(self, device: torch.device, levels: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """What a normalised series is in units of the train set, shift + scale * x: float32 [N or 1, C, 1] both."""
        (mean, std), (own_mean, own_std) = self.moments(device), self.moments(device, levels)
        shift, scale = ((own_mean - mean) / std).float(), (own_std / std).float()
        return (shift, scale) if levels is not None else (shift[None], scale[None])


def columns_of_json(name: str, columns: Any) -> tuple[ConditionColumn, ...]:
    if not isinstance(columns, tuple):
        raise ValueError(f"{name} of the data are a list; got {str(columns)[:40]}")
    return tuple(map(ConditionColumn.from_json, columns))


def is_row(values: Any, kind: Any, length: int) -> bool:
    return isinstance(values, tuple) and len(values) == length and all(isinstance(value, kind) for value in values)


def is_count(value: Any) -> bool:
    """A size that a tensor may have, at least 1."""
    return isinstance(value, int) and 0 < value < 2**48


def is_finite(value: float) -> bool:
    """As float32, like the data."""
    return abs(value) <= FLOAT32_MAX
