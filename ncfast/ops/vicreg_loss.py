"""VICReg loss (Bardes et al., arXiv 2105.04906, eq. 1-6)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gram import check_views, product_energy


def variance_hinge(z: Tensor) -> Tensor:
    """mean_i relu(1 - sqrt(var_i + 1e-4)), var unbiased.  z [N, D]."""
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def covariance_energy(z: Tensor, route: str) -> Tensor:
    """Σ_{i≠j} S_ij² / D with S the unbiased covariance.  z [N, D]."""
    N, D = z.shape
    z = z - z.mean(0)
    variance = z.square().sum(0) / (N - 1)  # of the same centred z, so that rounding cancels against the energy's
    return (product_energy(z, z, route) / (N - 1) ** 2 - variance.square().sum()) / D


def vicreg_loss_reference(
    za: Tensor, zb: Tensor, *, sim: float = 25.0, var: float = 25.0, cov: float = 1.0, route: str = "auto"
) -> Tensor:
    """sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(c(za) + c(zb)): the terms of both views are summed."""
    return (
        sim * F.mse_loss(za, zb)
        + var * (variance_hinge(za) + variance_hinge(zb))
        + cov * (covariance_energy(za, route) + covariance_energy(zb, route))
    )


def vicreg_loss(
    za: Tensor,
    zb: Tensor,
    *,
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 1.0,
    convention: str = "ncvqvae",
    route: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """VICReg loss between two views.

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        sim, var, cov: weights of the invariance, variance and covariance terms.
        convention: "ncvqvae": variance and covariance terms of both views summed (not halved), eps 1e-4, / D.
        route: "gram" (N x N), "direct" (D x D), or "auto": Gram when N <= 0.75 D. The value is the same.
        impl: "auto" or "reference".

    Returns:
        Scalar, float32 (float64 for float64 input), differentiable in both views, whatever the autocast state.

    Raises:
        ValueError: views that are not alike and [N >= 2, D]; an unknown convention, route or impl.
    """
    dispatch.choose("vicreg_loss", impl, why_not(za.device))
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("vicreg_loss", za, zb, convention)
        return vicreg_loss_reference(za, zb, sim=sim, var=var, cov=cov, route=route)


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
