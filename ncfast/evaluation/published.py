"""What the published scores share: how long their networks train, the range of the series, the interval of repeats."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class ScoreRecipe:
    """The protocol of TimeGAN and Diffusion-TS; fewer steps or repeats are for trying things out.

    Attributes:
        repeats: independent networks of each score.
        discriminative_steps, predictive_steps: of each of their networks.
        encoder_steps: of TS2Vec; None for as many as its authors take.
    """

    repeats: int = 5
    discriminative_steps: int = 2000
    predictive_steps: int = 5000
    encoder_steps: int | None = None


class Interval(NamedTuple):
    """Mean of repeats and half of its 95 % interval, as the papers print them."""

    mean: float
    half_width: float | None  # None for a single repeat

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        n = len(values)
        if n < 2:
            return cls(float(np.mean(values)), None)
        return cls(float(np.mean(values)), t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5)


def t_quantile(degrees: int, share: float = 0.95) -> float:
    """q with P(|t| < q) = share for Student's t. With t = sqrt(degrees) tan(a) its density is cos(a)^(degrees - 1)."""
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return float(np.sqrt(degrees) * np.tan(np.interp(share, mass / mass[-1], angles)))


def to_unit_range(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Each channel scaled so that the train series fill 0..1.  x [N, C, L], train [M, C, L] -> float32 [N, C, L]."""
    low, high = (bound.astype(np.float64) for bound in (train.min((0, 2)), train.max((0, 2))))
    width = np.where(high > low, high - low, 1.0)
    return ((x - low[:, None]) / width[:, None]).astype(np.float32)
