"""VIbCReg loss (Lee and Aune, arXiv 2109.00783): VICReg with a normalised, scale-free covariance."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops.collectives import gathered_views
from ncfast.ops.gram import check_views, choose, define_operators, product_energy, resolve_convention, why_not_kernels
from ncfast.ops.vicreg_loss import VAR_REDUCTIONS, check_var_reduction, variance_hinge

CONVENTIONS = {
    "ncvqvae": {"sim": 25.0, "var": 25.0, "cov": 100.0, "eps": 1e-4, "var_reduction": "sum"},
    "vibcreg": {"sim": 25.0, "var": 25.0, "cov": 200.0, "eps": 1e-4, "var_reduction": "sum"},
    "solo": {"sim": 25.0, "var": 25.0, "cov": 200.0, "eps": 1e-4, "var_reduction": "sum"},
}


def correlation_energy(z: Tensor, route: str) -> Tensor:
    """Mean over all D² entries of the squared off-diagonal correlations.  z [N, D]."""
    z = F.normalize(z - z.mean(0), dim=0)  # unit columns over the batch
    return (product_energy(z, z, route) - z.square().sum(0).square().sum()) / z.shape[1] ** 2


def vibcreg_loss_reference(
    za: Tensor,
    zb: Tensor,
    *,
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 100.0,
    eps: float = 1e-4,
    var_reduction: str = "sum",
    route: str = "auto",
) -> Tensor:
    """sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(r(za) + r(zb)), the variance terms halved by "mean"."""
    var = var * VAR_REDUCTIONS[var_reduction]
    return (
        sim * F.mse_loss(za, zb)
        + var * (variance_hinge(za, eps) + variance_hinge(zb, eps))
        + cov * (correlation_energy(za, route) + correlation_energy(zb, route))
    )


def vibcreg_loss(
    za: Tensor,
    zb: Tensor,
    *,
    sim: float | None = None,
    var: float | None = None,
    cov: float | None = None,
    eps: float | None = None,
    var_reduction: str | None = None,
    convention: str = "ncvqvae",
    route: str = "auto",
    impl: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
    gradient: str = "true",
) -> Tensor:
    """VIbCReg loss between two views; its projector ends in `iter_norm`.

        L = sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(r(za) + r(zb)),
        v as in VICReg,   r = mean over all D² entries of the squared off-diagonal correlations

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        sim, var, cov: weights of the invariance, variance and normalised-covariance terms.
        eps: added to the variance: 1e-4 in every convention.
        var_reduction: the variance terms of the views are added ("sum", in every convention), or averaged ("mean").
        convention: what holds for the arguments not given. Weights are 25, 25 and, in "ncvqvae", 100; in "vibcreg" (the
            publication's code) and "solo", 200.
        route: "gram" (N x N), "direct" (D x D), or "auto": Gram when N <= 0.75 D. The value is the same.
        impl: "auto" (the fastest that can run the call), "reference", "cpp" or "triton".
        group: None for the loss of this process's rows; a process group (`torch.distributed.group.WORLD`) for that of
            the rows of all its processes, za and zb being [n_r, D] with n_r >= 0 on each: see
            `collectives.gathered_views`.
        gradient: with a group, what the mean over its processes is, as DistributedDataParallel takes it: "true", the
            gradient of the whole batch, or "official", 1 / processes of it, as in the code of Barlow Twins.

    Returns:
        Scalar, float32 (float64 for float64 input), differentiable in both views, whatever the autocast state,
        twice too: a second derivative is the reference's.

    Raises:
        ValueError: views that are not alike and [N >= 2, D]; an unknown convention, var_reduction, route, impl or
            gradient; with a group, shards that do not fit together.
    """
    options = resolve_convention(
        "vibcreg_loss", convention, CONVENTIONS, sim=sim, var=var, cov=cov, eps=eps, var_reduction=var_reduction
    )
    check_var_reduction("vibcreg_loss", options["var_reduction"])
    with torch.autocast(za.device.type, enabled=False):
        if group is not None:
            za, zb = gathered_views("vibcreg_loss", za, zb, group, gradient, route)
        za, zb = check_views("vibcreg_loss", za, zb)
        name = choose("vibcreg_loss", impl, why_not(za.device, za.dtype), route, za)
        if name == "reference":
            return vibcreg_loss_reference(za, zb, route=route, **options)
        options["var"] *= VAR_REDUCTIONS[options.pop("var_reduction")]
        return apply(name, za, zb, **options)


why_not = why_not_kernels
# var is the weight after var_reduction.
apply = define_operators("vibcreg_loss", "float sim, float var, float cov, float eps", vibcreg_loss_reference)
