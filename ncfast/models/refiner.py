"""The refiner of stage 3: a small flow that gives decoded series back what the codebook took.

Decoded series are means over what their tokens leave open, so they lack noise and fine detail. The refiner learns the
distribution of what is missing: a flow from x̂ + σ·noise to x (flow matching along straight lines, Lipman et al.,
arXiv 2210.02747; Liu et al., arXiv 2209.03003), trained on train series sent through stochastic codes, as NM-VQTSG
(arXiv 2501.17553) trains its neural mapper.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.ops import philox


class Refiner(nn.Module):
    """v(x, t, x̂): where a series between x̂ + σ·noise (t = 0) and real data (t = 1) moves, in units of σ."""

    KERNEL = 5
    DILATIONS = (1, 2, 4, 8, 16, 1)
    NUM_TIMES = 16  # sines and cosines of t

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("sigma", torch.ones(channels, 1))  # of x - x̂ over the train set
        self.first = nn.Conv1d(2 * channels, dim, self.KERNEL, padding=self.KERNEL // 2)
        self.time = nn.Linear(self.NUM_TIMES, len(self.DILATIONS) * dim)
        self.blocks = nn.ModuleList(RefinerBlock(dim, self.KERNEL, dilation) for dilation in self.DILATIONS)
        self.last = nn.Conv1d(dim, channels, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, x_hat: Tensor) -> Tensor:
        """x, x_hat [B, C, L], t [B] -> velocity [B, C, L] over sigma."""
        angles = t[:, None] * torch.pi * 2.0 ** torch.arange(self.NUM_TIMES // 2, device=t.device)
        times = self.time(torch.cat([angles.sin(), angles.cos()], 1)).unflatten(1, (len(self.blocks), -1))
        h = self.first(torch.cat([(x - x_hat) / self.sigma, x_hat], 1))
        for k, block in enumerate(self.blocks):
            h = block(h, times[:, k])
        return self.last(F.silu(h))

    def refine(self, x_hat: Tensor, noise: Tensor, steps: int) -> Tensor:
        """x_hat [B, C, L] and normal noise like it -> series [B, C, L], in `steps` steps of Euler."""
        x = x_hat + self.sigma * noise
        for step in range(steps):
            t = torch.full((len(x),), step / steps, device=x.device)
            x = x + self.sigma * self(x, t, x_hat).to(x.dtype) / steps
        return x


class RefinerBlock(nn.Module):
    """h + Conv(SiLU(GroupNorm(Conv(SiLU(h + time))))), [B, dim, L]."""

    def __init__(self, dim: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(dim, dim, kernel, padding=kernel // 2 * dilation, dilation=dilation)
        self.norm = nn.GroupNorm(1, dim)
        self.outer = nn.Conv1d(dim, dim, 1)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        inner = self.norm(self.inner(F.silu(h + time[..., None])))
        return h + self.outer(F.silu(inner))


def noise_of(tokens: Tensor, channels: int, length: int) -> Tensor:
    """Normal noise [B, channels, length] that depends on tokens [B, n] alone, so that they decode to one series."""
    place, zero = torch.arange(tokens.shape[1], device=tokens.device), torch.zeros_like(tokens)
    high, low, *_ = philox.philox4x32((tokens, place.expand_as(tokens), zero, zero), (0, 0))
    address = (high << 32 | low).sum(1)  # a hash of 64 bits
    position = torch.arange(channels * length, device=tokens.device)
    u, v = (
        philox.uniform(0, address[:, None], position, step=0, stream=stream) for stream in (philox.RADIUS, philox.ANGLE)
    )
    normal = (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()  # Box and Muller
    return normal.float().unflatten(1, (channels, length))
