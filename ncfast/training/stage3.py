"""Stage 3: what trains the refiner, its loss (flow matching, arXiv 2210.02747)."""

import torch
from torch import Tensor

from ncfast.models.refiner import Refiner


def stage3_losses(
    refiner: Refiner,
    x: Tensor,
    x_hat: Tensor,
    generator: torch.Generator,
    observed: Tensor | None = None,
    local_slice: slice = slice(None),
) -> dict[str, Tensor]:
    """Mean squared error of the velocity at a random time, in units of sigma.

    Args:
        x: real series, normalised [B, C, L].
        x_hat: the same through the codebook.
        observed: bool like x, of series with gaps: what counts.
        local_slice: the rows that this process computes; see `training.stage2.stage2_losses`.
    """
    t = torch.rand(len(x), dtype=x.dtype, device=x.device, generator=generator)
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    t, noise, x, x_hat = (each[local_slice] for each in (t, noise, x, x_hat))
    target = (x - x_hat) / refiner.sigma - noise
    start = x_hat + refiner.sigma * noise
    error = refiner(torch.lerp(start, x, t[:, None, None]), t, x_hat) - target
    if observed is not None:
        error = torch.where(observed[local_slice], error, 0)
    return {"loss": error.square().mean() if error.numel() else error.sum()}
