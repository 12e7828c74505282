"""Augmented views of a batch of series, for the self-supervised branch of stage 1.

The operations and parameters are those of NC-VQVAE (arXiv 2408.16613).
Each is two functions: `window_warp(x, start, scale)` is the transform for given parameters, one row a series;
`random_window_warp(x, generator)` draws the parameters of the whole batch and applies it. The geometry (where, how far)
is one draw a series, shared by its channels; noise is drawn for every sample of every channel.

Not reproduced: the authors send every view through an STFT and back even when no time-frequency operation is listed,
which only rounds the series and leaves its last L mod 8 samples zero. A view here has L samples of signal.

Everything stays on the device and in fixed shapes, with no loop over series and no read-back, so that a CUDA graph can
hold it. Positions are float64: in float32 a long series would be read beside its samples.
"""

import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncfast.errors import UserError

MIN_LENGTH = 8


def window_warp(x: Tensor, start: Tensor, scale: Tensor, *, window: float = 0.4) -> Tensor:
    """Stretch or shrink one window in time, then bring the series back to its length.

    The w = round(window·L) samples from `start` are resampled linearly to m = int(w·scale) samples and put back in
    their place; the L - w + m samples are then resampled linearly to L. Both steps map end to end, as `np.interp` over
    `np.linspace(0, n - 1, m)` does. The two are composed: the warped series is never stored.

    Args:
        x: [B, C, L], floating point.
        start: first sample of the window, int64 [B], in [0, L - w].
        scale: length of the window after over before, float [B]; w·scale >= 1.
        window: length of the window as a fraction of L.

    Returns:
        [B, C, L], the dtype of x.
    """
    length = x.shape[-1]
    w = round(window * length)
    start = start[:, None]  # [B, 1]
    m = (w * scale.double()).floor()[:, None]  # [B, 1]

    def warped(j: Tensor) -> Tensor:
        """Samples j [B, L] of the series with its window resampled to m samples: [B, C, L]."""
        inside = start + (j - start) * (w - 1) / (m - 1).clamp(min=1)
        return interpolate(x, torch.where(j < start, j, torch.where(j < start + m, inside, j - m + w)))

    last = length - w + m - 1  # [B, 1], last sample of the warped series
    position = torch.arange(length, device=x.device) * last / (length - 1)  # [B, L]
    left = position.floor()
    fraction = (position - left).to(x.dtype)[:, None]
    return torch.lerp(warped(left), warped((left + 1).minimum(last)), fraction)


def random_window_warp(
    x: Tensor, generator: torch.Generator | None = None, *, window: float = 0.4, scale: tuple[float, float] = (0.9, 2.0)
) -> Tensor:
    """`window_warp` with start uniform in 0 .. L - w - 1 and scale uniform in [0.9, 2.0)."""
    u = uniform(x, 2, generator)
    low, high = scale
    start = integers(u[:, 0], x.shape[-1] - round(window * x.shape[-1]))
    return window_warp(x, start, low + (high - low) * u[:, 1], window=window)


def amplitude_resize(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply every series by its factor. x [B, C, L], factor [B] -> [B, C, L]."""
    return x * factor.to(x.dtype)[:, None, None]


def random_amplitude_resize(x: Tensor, generator: torch.Generator | None = None, *, std: float = 0.2) -> Tensor:
    """`amplitude_resize` by 1 + N(0, std²), one factor a series."""
    return amplitude_resize(x, 1 + std * normal(x, (x.shape[0],), generator))


def slice_and_shuffle(x: Tensor, cuts: Tensor, order: Tensor) -> Tensor:
    """Cut every series into S + 1 segments and put them together in another order.

    Args:
        x: [B, C, L].
        cuts: first sample of each segment but the first, int64 [B, S], in [0, L], in any order; equal cuts leave an
            empty segment between them.
        order: the segments in their new order, a permutation of 0 .. S, int64 [B, S + 1].

    Returns:
        [B, C, L], the samples of x in another order.
    """
    length = x.shape[-1]
    cuts = cuts.sort(dim=1).values
    begin = torch.nn.functional.pad(cuts, (1, 0))  # [B, S + 1]
    size = torch.nn.functional.pad(cuts, (0, 1), value=length) - begin
    begin, size = begin.gather(1, order), size.gather(1, order)
    end = size.cumsum(1)
    # The slot a sample falls into is the number of slots that end at or before it: empty slots are passed over.
    t = torch.arange(length, device=x.device).expand(x.shape[0], -1)  # [B, L]
    slot = (t[:, :, None] >= end[:, None, :-1]).sum(-1)
    return take(x, t + (begin - end + size).gather(1, slot))


def random_slice_and_shuffle(x: Tensor, generator: torch.Generator | None = None, *, num_cuts: int = 3) -> Tensor:
    """`slice_and_shuffle` with cuts uniform in 0 .. L - 1, with replacement, and a uniform permutation."""
    u = uniform(x, 2 * num_cuts + 1, generator)
    return slice_and_shuffle(x, integers(u[:, :num_cuts], x.shape[-1]), u[:, num_cuts:].argsort(dim=1))


def gaussian_noise(x: Tensor, noise: Tensor) -> Tensor:
    """Add the noise. x [B, C, L], noise [B, C, L] -> [B, C, L]."""
    return x + noise


def random_gaussian_noise(x: Tensor, generator: torch.Generator | None = None, *, std: float = 0.05) -> Tensor:
    """`gaussian_noise` from N(0, std²), independent at every sample of every channel; std in units of x."""
    return gaussian_noise(x, std * normal(x, x.shape, generator))


def flip(x: Tensor, reverse: Tensor) -> Tensor:
    """Reverse the marked series in time. x [B, C, L], reverse bool [B] -> [B, C, L]."""
    return torch.where(reverse[:, None, None], x.flip(-1), x)


def random_flip(x: Tensor, generator: torch.Generator | None = None, *, probability: float = 0.5) -> Tensor:
    """`flip` of each series with that probability; in time, not in sign."""
    return flip(x, uniform(x, 1, generator)[:, 0] < probability)


def slope(x: Tensor, rate: Tensor) -> Tensor:
    """Add the linear trend rate·t, t = 0 .. L - 1 in samples. x [B, C, L], rate [B] -> [B, C, L]."""
    trend = rate[:, None] * torch.arange(x.shape[-1], device=x.device)  # [B, L]
    return x + trend.to(x.dtype)[:, None]


def random_slope(x: Tensor, generator: torch.Generator | None = None, *, rate: float = 0.005) -> Tensor:
    """`slope` with a rate uniform in ±0.005 a sample, one a series."""
    return slope(x, rate * (2 * uniform(x, 1, generator)[:, 0] - 1))


def noise_window(x: Tensor, noise: Tensor, start: Tensor, *, window: float = 0.4) -> Tensor:
    """Add the noise inside the round(window·L) samples from `start` and nothing outside.

    x [B, C, L], noise [B, C, L], start int64 [B] -> [B, C, L].
    """
    t = torch.arange(x.shape[-1], device=x.device)
    start = start[:, None]
    inside = (t >= start) & (t < start + round(window * x.shape[-1]))  # [B, L]
    return torch.where(inside[:, None], x + noise, x)


def random_noise_window(
    x: Tensor, generator: torch.Generator | None = None, *, window: float = 0.4, std: float = 0.05
) -> Tensor:
    """`noise_window` with noise from N(0, std²) and start uniform in 0 .. L - w - 1."""
    start = integers(uniform(x, 1, generator)[:, 0], x.shape[-1] - round(window * x.shape[-1]))
    return noise_window(x, std * normal(x, x.shape, generator), start, window=window)


def magnitude_warp(x: Tensor, knots: Tensor) -> Tensor:
    """Multiply every series by a smooth curve: the natural cubic spline through its knots.

    x [B, C, L], knots [B, K], the curve's values at K evenly spaced times, the ends included -> [B, C, L].
    """
    curve = knots.to(x.dtype) @ natural_spline_matrix(knots.shape[1], x.shape[-1], x.dtype, x.device)  # [B, L]
    return x * curve[:, None]


def random_magnitude_warp(
    x: Tensor, generator: torch.Generator | None = None, *, num_knots: int = 4, std: float = 0.2
) -> Tensor:
    """`magnitude_warp` with knots from N(1, std²), one curve a series."""
    return magnitude_warp(x, 1 + std * normal(x, (x.shape[0], num_knots), generator))


def crop(x: Tensor, start: Tensor, *, fraction: float = 0.4) -> Tensor:
    """Keep the w = L - round(fraction·L) samples from `start`, resampled linearly, end to end, to L samples.

    x [B, C, L], start int64 [B] in [0, L - w] -> [B, C, L].
    """
    length = x.shape[-1]
    w = length - round(fraction * length)
    step = torch.arange(length, device=x.device, dtype=torch.float64) * (w - 1) / (length - 1)  # [L]
    return interpolate(x, start[:, None] + step)


def random_crop(x: Tensor, generator: torch.Generator | None = None, *, fraction: float = 0.4) -> Tensor:
    """`crop` with start uniform in 0 .. L - w, the last window included."""
    start = integers(uniform(x, 1, generator)[:, 0], round(fraction * x.shape[-1]) + 1)
    return crop(x, start, fraction=fraction)


@functools.cache
def natural_spline_matrix(num_knots: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[K, L]: row k is, at t = 0 .. L - 1, the natural cubic spline that is 1 at knot k and 0 at the others."""
    distance = np.abs(np.linspace(0, num_knots - 1, length) - np.arange(num_knots)[:, None])  # in knot spacings
    hat = np.maximum(1 - distance, 0)
    # Second derivatives at the inner knots: s[k-1] + 4 s[k] + s[k+1] = 6 (y[k-1] - 2 y[k] + y[k+1]); zero at the ends.
    inner = num_knots - 2
    system = 4 * np.eye(inner) + np.eye(inner, k=1) + np.eye(inner, k=-1)
    difference = np.eye(inner, num_knots) - 2 * np.eye(inner, num_knots, k=1) + np.eye(inner, num_knots, k=2)
    second = np.zeros((num_knots, num_knots))
    second[1:-1] = np.linalg.solve(system, 6 * difference)
    return torch.as_tensor(hat + second.T @ (hat**3 - hat) / 6, dtype=dtype, device=device)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, C, L] at the times index int64 [B, M], the same for all channels: [B, C, M]."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def interpolate(x: Tensor, position: Tensor) -> Tensor:
    """x [B, C, L] at the times position float64 [B, M] in [0, L - 1], linearly: [B, C, M]."""
    left = position.long()
    right = (left + 1).clamp(max=x.shape[-1] - 1)
    return torch.lerp(take(x, left), take(x, right), (position - left).to(x.dtype)[:, None])


def uniform(x: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
    """float32 [B, columns] in [0, 1), on the device of x."""
    return torch.rand(x.shape[0], columns, generator=generator, device=x.device)


def normal(x: Tensor, shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Standard normal, of that shape, on the device and in the dtype of x."""
    return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)


def integers(u: Tensor, high: int) -> Tensor:
    """int64 uniform in 0 .. high - 1, from u uniform in [0, 1); u·high may round up to high."""
    return (u * high).long().clamp(max=high - 1)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "window_warp": random_window_warp,
    "amplitude_resize": random_amplitude_resize,
    "slice_and_shuffle": random_slice_and_shuffle,
    "gaussian_noise": random_gaussian_noise,
    "flip": random_flip,
    "slope": random_slope,
    "noise_window": random_noise_window,
    "magnitude_warp": random_magnitude_warp,
    "random_crop": random_crop,
}

# What a strength s makes of the arguments of `OPERATIONS`; 1 leaves the paper's.
STRENGTHS: dict[str, Callable[[float], dict[str, Any]]] = {
    "window_warp": lambda s: {"scale": (1 - 0.1 * s, 1 + s)},
    "amplitude_resize": lambda s: {"std": 0.2 * s},
    "slice_and_shuffle": lambda s: {"num_cuts": max(1, round(3 * s))},
    "gaussian_noise": lambda s: {"std": 0.05 * s},
    "flip": lambda s: {"probability": 0.5 * s},
    "slope": lambda s: {"rate": 0.005 * s},
    "noise_window": lambda s: {"std": 0.05 * s},
    "magnitude_warp": lambda s: {"std": 0.2 * s},
    "random_crop": lambda s: {"fraction": 0.4 * s},
}
MAX_STRENGTH = 2.0  # flips all series, and leaves a fifth of each after a crop

MOVES_SAMPLES = {"window_warp", "slice_and_shuffle", "flip", "random_crop"}  # the others change them where they are

# The recipes of the paper's results.
RECIPES: dict[str, tuple[str, ...]] = {
    "gauss": ("gaussian_noise",),
    "slice": ("slice_and_shuffle",),
    "warp": ("window_warp", "amplitude_resize"),
}


class Augment:
    """A view of a batch: the named operations, in order, each of them always applied.

    Args:
        operations: names of `OPERATIONS` and `RECIPES`, in any mixture; one name may be given as a plain string. A name
            may have a strength behind it, above 0 and at most 2: "window_warp:0.5" warps half as far as the paper's,
            "warp:2" is a recipe of twice the paper's. It multiplies the standard deviation of noise and factors, how
            far a window is stretched, the number of cuts (rounded, 1 at least), the rate of the slope, the share that a
            crop leaves out and the probability of a flip.

    Raises:
        UserError: an unknown name, or a strength that is none.

    The same generator state gives the same view of the same batch, on one device type. In a CUDA graph, pass None (the
    default generator) or a generator registered with the graph, after a warm-up call, as capture asks for anyway;
    `torch.compile` traces the default generator only.
    """

    def __init__(self, operations: Sequence[str]):
        names = (operations,) if isinstance(operations, str) else tuple(operations)
        chosen = [(each, strength) for name in names for each, strength in expand(name)]
        self.operations = tuple(name if strength == 1 else f"{name}:{strength:g}" for name, strength in chosen)
        self.steps = [
            (name, functools.partial(OPERATIONS[name], **STRENGTHS[name](strength))) for name, strength in chosen
        ]

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:  # x [B, C, L] -> [B, C, L]
        if x.dim() != 3 or x.shape[-1] < MIN_LENGTH or not x.is_floating_point():
            raise ValueError(
                f"Augment: x is floating point [B, C, L] with L >= {MIN_LENGTH}; got {x.dtype} {list(x.shape)}"
            )
        for _, step in self.steps:
            x = step(x, generator)
        return x

    def with_observed(
        self, x: Tensor, observed: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The view of x and what of it was observed, bool like x: samples that move take with them whether they were.

        What lies between samples was observed if both were.
        """
        for name, step in self.steps:
            if name not in MOVES_SAMPLES:
                x = step(x, generator)
                continue
            x, seen = step(torch.cat([x, observed.to(x)], 1), generator).chunk(2, 1)
            observed = seen > 1 - 1e-5
        return x, observed

    def __repr__(self) -> str:
        return f"Augment({list(self.operations)})"


def expand(text: str) -> list[tuple[str, float]]:
    """The operations that NAME or NAME:STRENGTH stands for, each with its strength."""
    name, colon, number = str(text).partition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:
        strength = 0.0
    if not 0 < strength <= MAX_STRENGTH:
        raise UserError(
            f"an augmentation's strength is above 0 and at most {MAX_STRENGTH:g}, such as {name}:0.5; got {text!r}"
        )
    if name in RECIPES or name in OPERATIONS:
        return [(each, strength) for each in RECIPES.get(name, (name,))]
    known = [*RECIPES, *OPERATIONS]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    raise UserError(
        f"no augmentation {name!r}{meant}: recipes {', '.join(RECIPES)}; operations {', '.join(OPERATIONS)}"
    )
