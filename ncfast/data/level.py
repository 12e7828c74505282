"""Level and scale of each series, apart from its shape: its mean and standard deviation, channel by channel.

Everywhere a series' levels are one row of float64 [2C]: the mean of each channel in data units, then the logarithm of
the standard deviation of each. NaN is not known.
"""

from collections.abc import Sequence

import numpy as np

from ncfast.data.detail import MAX_SERIES

LEAST_SHARE = 0.9  # of the variance that lies between series, from where on `--level auto` takes levels apart
# Of a series over that of its channel: what is constant but for rounding is not blown up to unit variance.
LEAST_STD = 1e-4


def level_share(X: np.ndarray) -> float:
    """The share of the variance that lies between the means of series, 0 to 1: the mean of channels with variance.

    X: [N, C, L], NaN where missing; each channel has a value.
    """
    X = X[:: max(1, len(X) // MAX_SERIES)].astype(np.float64)
    total = np.nanvar(X, axis=(0, 2))  # [C]
    between = np.nanvar(mean_and_std(X)[0], axis=0)
    return float(np.mean(between[total > 0] / total[total > 0])) if (total > 0).any() else 0.0


def mean_and_std(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of what was observed of X float64 [N, C, L]: both [N, C], NaN where nothing was."""
    seen = ~np.isnan(X)
    with np.errstate(invalid="ignore"):
        mean = np.where(seen, X, 0).sum(2) / seen.sum(2)
        variance = np.square(np.where(seen, X - mean[..., None], 0)).sum(2) / seen.sum(2)
    return mean, np.sqrt(variance)


def levels_of(X: np.ndarray, std: Sequence[float]) -> np.ndarray:
    """Series [N, C, L] in data units, NaN where missing -> levels [N, 2C], NaN of a channel without a value.

    std: of each channel over the train set.
    """
    mean, own = mean_and_std(X.astype(np.float64))
    return np.concatenate([mean, np.log(np.maximum(own, LEAST_STD * np.asarray(std)))], 1)


def filled(levels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Levels [m, 2C] with those of the nearest row where one is NaN; a row of nothing but NaN stays as it is.

    rows: of the train set [N, 2C]. Distances are in standard deviations of the rows, over what both have.
    """
    levels = levels.copy()
    std = np.nanstd(rows, axis=0)
    points = rows / np.where(std > 0, std, 1)
    lacking = np.isnan(levels)
    for i in np.flatnonzero(lacking.any(1) & ~lacking.all(1)):
        squares = np.square(points - levels[i] / np.where(std > 0, std, 1))
        shared = (~np.isnan(squares)).sum(1)
        distance = np.nansum(squares, 1) / np.maximum(shared, 1) + np.where(shared, 0, 1e300)
        for c in np.flatnonzero(lacking[i]):
            levels[i, c] = rows[np.argmin(np.where(np.isnan(rows[:, c]), np.inf, distance)), c]
    return levels
