"""Copies of few series, each stretched here and shortened there, so that a model does not learn them by heart.

A generator of 25 series can do little but give them back. Real series of a class rarely run at one speed, so a copy
whose time runs a little faster here and slower there is about as likely as the series it was made from. What it is
worth, on held-out series, is in docs/experiments.md.
"""

import torch
from torch import Tensor

from ncfast.data.augment import interpolate

KNOTS = 4  # of the speed over a series, with straight lines between them
LEAST_SERIES = 1000  # that copies make of few
FEWEST_COPIES, MOST_COPIES = 4, 64


def stretch(x: Tensor, log_speed: Tensor) -> Tensor:
    """Series read at another speed, the ends where they were, at their own level and scale.

    Args:
        x: [B, C, L], floating point, L >= 2.
        log_speed: of each series at evenly spaced times, the ends included [B, K]; the speed is linear between them.

    Returns:
        [B, C, L], each channel of each series with the mean and standard deviation that it has in x.
    """
    length, knots = x.shape[-1], log_speed.shape[1]
    time = torch.linspace(0, knots - 1, length - 1, dtype=torch.float64, device=x.device)
    speed = interpolate(log_speed.double().exp()[:, None], time.expand(len(x), -1))[:, 0]  # [B, L - 1]
    position = torch.nn.functional.pad(speed.cumsum(1), (1, 0))
    position = (position * ((length - 1) / position[:, -1:])).clamp(max=length - 1)
    stretched = interpolate(x, position)
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    centred = stretched - stretched.mean(-1, keepdim=True)
    # A series without change stays as it is: its scale over itself is rounding.
    scale = std / centred.std(-1, keepdim=True).clamp(min=1e-6)
    return centred * torch.where(std > 1e-6, scale, 1) + mean


def num_copies(num_series: int) -> int:
    """Of each series, itself among them."""
    return min(MOST_COPIES, max(FEWEST_COPIES, -(-LEAST_SERIES // num_series)))


def stretched_copies(x: Tensor, copies: int, strength: float, seed: int) -> Tensor:
    """Series [N, C, L] -> [copies * N, C, L]: themselves, then N copies that are stretched at random, and again.

    Args:
        strength: standard deviation of the log speed.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    others = x.repeat(copies - 1, 1, 1)
    log_speed = torch.randn(len(others), KNOTS, dtype=x.dtype, device=x.device, generator=generator)
    return torch.cat([x, stretch(others, strength * log_speed)])
