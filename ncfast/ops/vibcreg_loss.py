"""VIbCReg loss (Lee and Aune, arXiv 2109.00783): VICReg with a normalised, scale-free covariance."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gram import check_views, product_energy
from ncfast.ops.vicreg_loss import variance_hinge


def correlation_energy(z: Tensor, route: str) -> Tensor:
    """Mean over all D² entries of the squared off-diagonal correlations.  z [N, D]."""
    z = F.normalize(z - z.mean(0), dim=0)  # unit columns over the batch
    return (product_energy(z, z, route) - z.square().sum(0).square().sum()) / z.shape[1] ** 2


def vibcreg_loss_reference(
    za: Tensor, zb: Tensor, *, sim: float = 25.0, var: float = 25.0, cov: float = 100.0, route: str = "auto"
) -> Tensor:
    """sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(r(za) + r(zb)): the terms of both views are summed."""
    return (
        sim * F.mse_loss(za, zb)
        + var * (variance_hinge(za) + variance_hinge(zb))
        + cov * (correlation_energy(za, route) + correlation_energy(zb, route))
    )


def vibcreg_loss(
    za: Tensor,
    zb: Tensor,
    *,
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 100.0,
    convention: str = "ncvqvae",
    route: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """VIbCReg loss between two views; its projector ends in `iter_norm`.

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        sim, var, cov: weights of the invariance, variance and normalised-covariance terms.
        convention: "ncvqvae": terms of both views summed, MSE invariance, mean over all D² entries, cov 100 (the
            original publication has 200).
        route: "gram" (N x N), "direct" (D x D), or "auto": Gram when N <= 0.75 D. The value is the same.
        impl: "auto" or "reference".

    Returns:
        Scalar, float32 (float64 for float64 input), differentiable in both views, whatever the autocast state.

    Raises:
        ValueError: views that are not alike and [N >= 2, D]; an unknown convention, route or impl.
    """
    dispatch.choose("vibcreg_loss", impl, why_not(za.device))
    with torch.autocast(za.device.type, enabled=False):
        za, zb = check_views("vibcreg_loss", za, zb, convention)
        return vibcreg_loss_reference(za, zb, sim=sim, var=var, cov=cov, route=route)


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
