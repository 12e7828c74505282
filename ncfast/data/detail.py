"""How fine the detail of series is: what is lost where a stretch of samples is told by its mean."""

from typing import Any

import numpy as np

MAX_SERIES = 4096  # that are looked at, spread over the set


def variance_within(X: np.ndarray, size: int) -> float:
    """The share of the series' variance around their own means that lies within blocks of `size` samples.

    Args:
        X: [N, C, L], NaN where missing. Channels count alike; one without variance does not count.
        size: 1 or more; samples behind the last whole block are left out.

    Returns:
        0 to about 1; 1 where there is no whole block.
    """
    X = X[:: max(1, len(X) // MAX_SERIES)].astype(np.float64)
    count = X.shape[2] // size
    if count == 0:
        return 1.0
    with np.errstate(invalid="ignore"):
        X = X - mean(X, axis=2, keepdims=True)
        blocks = X[:, :, : count * size].reshape(*X.shape[:2], count, size)
        within = mean(np.square(blocks - mean(blocks, axis=3, keepdims=True)), axis=(0, 2, 3))  # [C]
        share = within / mean(np.square(X), axis=(0, 2))
        return float(mean(share)) if np.isfinite(share).any() else 0.0


def mean(x: np.ndarray, **options: Any) -> np.ndarray:
    """np.nanmean, which warns of nothing but NaN: to silence that is not up to a thread."""
    return np.nansum(x, **options) / np.sum(~np.isnan(x), **options)


def structure_within(X: np.ndarray, size: int) -> float:
    """`variance_within`, less what white noise adds to it: no code tells noise apart.

    White noise of variance v has v (1 - 1 / size) of it within blocks, half of it within pairs, and what lies within
    pairs is taken for noise.
    """
    noise = min(1.0, 2 * variance_within(X, 2))
    return variance_within(X, size) - noise * (1 - 1 / size)
