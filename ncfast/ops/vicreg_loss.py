"""VICReg loss (Bardes et al., arXiv 2105.04906, eq. 1-6)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops.collectives import gathered_views
from ncfast.ops.gram import (
    VAR_REDUCTIONS,
    check_views,
    choose,
    define_operators,
    product_energy,
    resolve_convention,
    why_not_kernels,
)

CONVENTIONS = {
    "ncvqvae": {"sim": 25.0, "var": 25.0, "cov": 1.0, "eps": 1e-4, "var_reduction": "sum"},
    "facebook": {"sim": 25.0, "var": 25.0, "cov": 1.0, "eps": 1e-4, "var_reduction": "mean"},
    "lightly": {"sim": 25.0, "var": 25.0, "cov": 1.0, "eps": 1e-4, "var_reduction": "mean"},
    "solo": {"sim": 25.0, "var": 25.0, "cov": 1.0, "eps": 1e-4, "var_reduction": "sum"},
}


def variance_hinge(z: Tensor, eps: float) -> Tensor:
    """mean_i relu(1 - sqrt(var_i + eps)), var unbiased.  z [N, D]."""
    return F.relu(1 - (z.var(0) + eps).sqrt()).mean()


def covariance_energy(z: Tensor, route: str) -> Tensor:
    """Σ_{i≠j} S_ij² / D with S the unbiased covariance.  z [N, D]."""
    N, D = z.shape
    z = z - z.mean(0)
    variance = z.square().sum(0) / (N - 1)  # of the same centred z, so that rounding cancels against the energy's
    return (product_energy(z, z, route) / (N - 1) ** 2 - variance.square().sum()) / D


def vicreg_loss_reference(
    za: Tensor,
    zb: Tensor,
    *,
    sim: float = 25.0,
    var: float = 25.0,
    cov: float = 1.0,
    eps: float = 1e-4,
    var_reduction: str = "sum",
    route: str = "auto",
) -> Tensor:
    """sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(c(za) + c(zb)), the variance terms halved by "mean"."""
    var = var * VAR_REDUCTIONS[var_reduction]
    return (
        sim * F.mse_loss(za, zb)
        + var * (variance_hinge(za, eps) + variance_hinge(zb, eps))
        + cov * (covariance_energy(za, route) + covariance_energy(zb, route))
    )


def vicreg_loss(
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
    """VICReg loss between two views.

        L = sim·MSE(za, zb) + var·(v(za) + v(zb)) + cov·(c(za) + c(zb)),
        v = mean_i relu(1 - sqrt(var_i + eps)),   c = Σ_{i≠j} S_ij² / D,   variance and covariance S unbiased

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        sim, var, cov: weights of the invariance, variance and covariance terms: 25, 25 and 1 in every convention.
        eps: added to the variance: 1e-4 in every convention.
        var_reduction: the variance terms of the views are added ("sum"), or averaged ("mean").
        convention: what holds for the arguments not given: "ncvqvae" and "solo" add the variance terms, "facebook" and
            "lightly" average them.
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
        "vicreg_loss", convention, CONVENTIONS, sim=sim, var=var, cov=cov, eps=eps, var_reduction=var_reduction
    )
    check_var_reduction("vicreg_loss", options["var_reduction"])
    with torch.autocast(za.device.type, enabled=False):
        if group is not None:
            za, zb = gathered_views("vicreg_loss", za, zb, group, gradient, route)
        za, zb = check_views("vicreg_loss", za, zb)
        name = choose("vicreg_loss", impl, why_not(za.device, za.dtype), route, za)
        if name == "reference":
            return vicreg_loss_reference(za, zb, route=route, **options)
        options["var"] *= VAR_REDUCTIONS[options.pop("var_reduction")]
        return apply(name, za, zb, **options)


def check_var_reduction(operation: str, var_reduction: str) -> None:
    if var_reduction not in VAR_REDUCTIONS:
        raise ValueError(f"{operation}: var_reduction is {' or '.join(VAR_REDUCTIONS)}; got {var_reduction!r}")


why_not = why_not_kernels
# var is the weight after var_reduction.
apply = define_operators("vicreg_loss", "float sim, float var, float cov, float eps", vicreg_loss_reference)
