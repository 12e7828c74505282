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

# Of a series, and number of its channels; no model of a longer one can be made in reasonable time.
MAX_LENGTH = 2**24


@dataclass(frozen=True)
class DataStats:
    """What a run remembers of its training data.

    mean and std are of each channel over the values of the train set, of which the share `missing` is missing. The
    shortest series has `shortest` time points, or 0 stands for series of one length. `conditions` are those of the
    prior: those of the user, and last the length of series that do not all have one.
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
    def of(cls, dataset: Dataset) -> "DataStats":
        X = dataset.X_train.astype(np.float64)  # [N, C, L]
        counts = () if dataset.y_train is None else np.bincount(dataset.y_train, minlength=dataset.n_classes).tolist()
        gaps = np.isnan(X)
        mean, std = (np.nanmean, np.nanstd) if gaps.any() else (np.mean, np.std)
        lengths = dataset.lengths_train
        within = X.size if lengths is None else int(lengths.sum()) * X.shape[1]
        std = std(X, axis=(0, 2))
        return cls(
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
        if not isinstance(stats.conditions, tuple):
            raise ValueError(f"conditions of the data are a list; got {str(stats.conditions)[:40]}")
        stats = dataclasses.replace(stats, conditions=tuple(map(ConditionColumn.from_json, stats.conditions)))
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
        ):
            if not right:
                raise ValueError(f"{name} of the data cannot be {str(getattr(stats, name))[:40]}")
        return stats

    @property
    def identity(self) -> "DataStats":
        """Without what may differ of the same data: where it was read, and what was remarked."""
        return dataclasses.replace(self, source="", notes=(), reading="")

    def normalise(self, X: np.ndarray, device: torch.device) -> Tensor:
        """Data units -> zero mean and unit variance a channel (over the train set), on `device`.  X [N, C, L]."""
        mean, std = (np.array(v)[:, None] for v in (self.mean, self.std))
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

    def denormalise(self, x: Tensor) -> np.ndarray:
        """Back to data units, in float64 on the way.  x [N, C, L] -> float32."""
        mean, std = self.moments(x.device)
        return (x.double() * std + mean).float().cpu().numpy()

    def moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float64 [C, 1]."""
        mean, std = (torch.tensor(v, dtype=torch.float64, device=device)[:, None] for v in (self.mean, self.std))
        return mean, std


def is_row(values: Any, kind: Any, length: int) -> bool:
    return isinstance(values, tuple) and len(values) == length and all(isinstance(value, kind) for value in values)


def is_count(value: Any) -> bool:
    """A size that a tensor may have, at least 1."""
    return isinstance(value, int) and 0 < value < 2**48


def is_finite(value: float) -> bool:
    """As float32, like the data."""
    return abs(value) <= FLOAT32_MAX
