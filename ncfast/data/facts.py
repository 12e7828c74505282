"""What a run remembers of its training data, and the way to its units and back."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ncfast.data.dataset import Dataset


@dataclass(frozen=True)
class DataFacts:
    """What a run remembers of its training data."""

    name: str
    source: str
    num_series: int
    channels: int
    length: int
    class_names: tuple[str, ...]  # empty without labels
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]  # of each channel over the train set
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset) -> "DataFacts":
        X = dataset.X_train.astype(np.float64)  # [N, C, L]
        counts = () if dataset.y_train is None else np.bincount(dataset.y_train, minlength=dataset.n_classes).tolist()
        std = X.std(axis=(0, 2))
        return cls(
            name=dataset.name,
            source=dataset.source,
            num_series=X.shape[0],
            channels=X.shape[1],
            length=X.shape[2],
            class_names=tuple(dataset.class_names),
            class_counts=tuple(counts),
            mean=tuple(X.mean(axis=(0, 2)).tolist()),
            # A channel that never changes is only shifted.
            std=tuple(np.where(std > 0, std, 1.0).tolist()),
            notes=tuple(dataset.notes),
        )

    @property
    def identity(self) -> "DataFacts":
        """Without what may differ of the same data: where it was read, and what was remarked."""
        return dataclasses.replace(self, source="", notes=())

    def normalise(self, X: np.ndarray, device: torch.device) -> Tensor:
        """Data units -> zero mean and unit variance a channel (over the train set), on `device`.  X [N, C, L]."""
        mean, std = (np.array(v)[:, None] for v in (self.mean, self.std))
        return torch.from_numpy(((X - mean) / std).astype(np.float32)).to(device)

    def denormalise(self, x: Tensor) -> np.ndarray:
        """Back to data units, in float64 on the way.  x [N, C, L] -> float32."""
        mean, std = self.moments(x.device)
        return (x.double() * std + mean).float().cpu().numpy()

    def moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, float64 [C, 1]."""
        mean, std = (torch.tensor(v, dtype=torch.float64, device=device)[:, None] for v in (self.mean, self.std))
        return mean, std
