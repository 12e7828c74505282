"""Missing values and unequal lengths: where series end, and what stands in for what was not observed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.errors import UserError


def is_ragged(X: Any) -> bool:
    """Whether X is a one-dimensional array of series, as they cannot be stacked."""
    return isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1 and any(np.ndim(item) for item in X)


def without_none(array: np.ndarray) -> np.ndarray:
    """NaN for None among numbers; other arrays as they are."""
    if array.dtype != object or not any(item is None for item in array.flat):
        return array
    numbers = all(item is None or isinstance(item, int | float | np.number) for item in array.flat)
    return array.astype(np.float64) if numbers else array


def padded(items: Sequence[Any], layout: str | None, where: str) -> np.ndarray:
    """float64 [n, C, L] of series [L_i], [C, L_i] or [L_i, C], with NaN from the end of each to that of the longest.

    Raises:
        UserError: series of different numbers of channels, or whose axes can be told apart by no size.
    """
    arrays = [without_none(np.asarray(item)) for item in items]
    arrays = [array[None] if array.ndim == 1 else array for array in arrays]
    odd = next((array for array in arrays if array.ndim != 2 or array.dtype.kind not in "fiub"), None)
    if odd is not None:
        raise UserError(
            f"{where}: each series is [time] or [channels, time] of numbers; got {odd.dtype} {list(odd.shape)}"
        )
    firsts, lasts = ({array.shape[axis] for array in arrays} for axis in (0, 1))
    if layout != "ntd" and len(firsts) == 1:
        pass
    elif layout != "nctd" and len(lasts) == 1:
        arrays = [array.T for array in arrays]
    else:
        raise UserError(
            f"{where}: the series have unequal numbers of channels, {min(firsts)} to {max(firsts)}; they share one "
            "(--layout ntd reads each as [time, channels])"
        )
    X = np.full((len(arrays), arrays[0].shape[0], max(array.shape[1] for array in arrays)), np.nan)
    for row, array in zip(X, arrays, strict=True):
        row[:, : array.shape[1]] = array
    return X


def ends_with_nan(X: np.ndarray) -> bool:  # [n, C, L]
    """Whether values lack at the ends of series only and in all channels, as the UCR archive pads shorter series."""
    missing = np.isnan(X)
    return bool((missing[:, :, 1:] >= missing[:, :, :-1]).all() and (missing == missing[:, :1]).all())


def last_observed(X: np.ndarray) -> np.ndarray:  # [n, C, L]
    """How many time points each series has up to the last with a value, int64 [n]; 0 for one without any."""
    seen = ~np.isnan(X).all(1)  # [n, L]
    return np.where(seen.any(1), X.shape[2] - seen[:, ::-1].argmax(1), 0).astype(np.int64)


def cut(x: np.ndarray, length: np.ndarray) -> np.ndarray:  # [n, C, L], int64 [n]
    """NaN from the end of each series on."""
    beyond = np.arange(x.shape[-1]) >= length[:, None, None]
    return np.where(beyond, x.dtype.type(np.nan), x)


def to_list(X: np.ndarray, length: np.ndarray | None = None) -> list[np.ndarray]:
    """Series of unequal lengths, as a list, of an array that is padded with NaN.

    Args:
        X: [n, C, L], NaN in all channels from the end of a series on.
        length: time points of each series, int [n]; None: up to the last with a value.

    Returns:
        [C, L_i] for each series, without what is beyond its end.
    """
    X = np.asarray(X)
    return [x[:, :end] for x, end in zip(X, last_observed(X) if length is None else length, strict=True)]


def interpolated(x: Tensor, observed: Tensor) -> Tensor:
    """Straight lines over the gaps, and the nearest value at the ends; zeros where a channel has nothing.  [m, C, L]"""
    L = x.shape[-1]
    position = torch.arange(L, device=x.device).expand_as(observed)
    # The nearest observed samples on both sides; at an end the same one twice.
    left = torch.where(observed, position, -1).cummax(-1).values
    right = torch.where(observed, position, L).flip(-1).cummin(-1).values.flip(-1)
    left, right = torch.where(left < 0, right, left), torch.where(right == L, left, right)
    nothing = left == L  # on either side
    left, right = left.clamp(0, L - 1), right.clamp(0, L - 1)
    known = torch.where(observed, x, 0)
    a, b = known.gather(-1, left), known.gather(-1, right)
    fraction = (position - left) / (right - left).clamp(min=1)
    return torch.where(observed, x, torch.where(nothing, 0, a + fraction.to(x.dtype) * (b - a)))
