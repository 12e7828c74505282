"""Barlow Twins loss (Zbontar et al., arXiv 2103.03230, eq. 1)."""

import torch
from torch import Tensor

from ncfast.ops import dispatch
from ncfast.ops.gram import check_views, product_energy


def barlow_twins_loss_reference(za: Tensor, zb: Tensor, *, lambd: float = 0.005, route: str = "auto") -> Tensor:
    """[Σ_i (1 - C_ii)² + lambd Σ_{i≠j} C_ij²] / D with C = Âᵀ B̂ / N and Â = (z - mean) / (std + 1e-8), std unbiased."""
    N, D = za.shape
    za, zb = ((z - z.mean(0)) / (z.std(0) + 1e-8) for z in (za, zb))
    diagonal = (za * zb).sum(0) / N  # [D]
    energy = product_energy(za, zb, route) / N**2
    on_diagonal = (1 - diagonal).square().sum()
    return (on_diagonal + lambd * (energy - diagonal.square().sum())) / D


def barlow_twins_loss(
    za: Tensor,
    zb: Tensor,
    *,
    lambd: float = 0.005,
    convention: str = "ncvqvae",
    route: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """Barlow Twins loss between two views.

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        lambd: weight of the off-diagonal terms.
        convention: "ncvqvae": unbiased standard deviation plus 1e-8, C divided by N, the sum divided by D.
        route: "gram" (N x N), "direct" (D x D), or "auto": Gram when N <= 0.75 D. The value is the same.
        impl: "auto" or "reference".

    Returns:
        Scalar, float32 (float64 for float64 input), differentiable in both views, whatever the autocast state.

    Raises:
        ValueError: views that are not alike and [N >= 2, D]; an unknown convention, route or impl.
    """
    dispatch.choose("barlow_twins_loss", impl, why_not(za.device))
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("barlow_twins_loss", za, zb, convention)
        return barlow_twins_loss_reference(za, zb, lambd=lambd, route=route)


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
