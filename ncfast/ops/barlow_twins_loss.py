"""Barlow Twins loss (Zbontar et al., arXiv 2103.03230, eq. 1)."""

import torch
from torch import Tensor

from ncfast.ops.collectives import gathered_views
from ncfast.ops.gram import check_views, choose, define_operators, product_energy, resolve_convention, why_not_kernels

# scale None: 1 / D.
CONVENTIONS = {
    "ncvqvae": {"lambd": 0.005, "ddof": 1, "eps": 0.0, "eps_std": 1e-8, "scale": None},
    "facebook": {"lambd": 0.0051, "ddof": 0, "eps": 1e-5, "eps_std": 0.0, "scale": 1.0},
    "lightly": {"lambd": 0.005, "ddof": 0, "eps": 1e-5, "eps_std": 0.0, "scale": 1.0},
    "solo": {"lambd": 0.005, "ddof": 0, "eps": 1e-5, "eps_std": 0.0, "scale": 0.025},
    "vibcreg": {"lambd": 0.005, "ddof": 1, "eps": 0.0, "eps_std": 0.0, "scale": 1.0},
}


def barlow_twins_loss_reference(
    za: Tensor,
    zb: Tensor,
    *,
    lambd: float = 0.005,
    ddof: int = 1,
    eps: float = 0.0,
    eps_std: float = 1e-8,
    scale: float | None = None,
    route: str = "auto",
) -> Tensor:
    """scale [Σ_i (1 - C_ii)² + lambd Σ_{i≠j} C_ij²], C = Âᵀ B̂ / N, Â = (z - mean) / (sqrt(var + eps) + eps_std)."""
    N, D = za.shape
    # Without eps a constant column has a deviation of 0, where torch.std has a gradient and the root has none.
    stds = (z.std(0, correction=ddof) if eps == 0 else (z.var(0, correction=ddof) + eps).sqrt() for z in (za, zb))
    za, zb = ((z - z.mean(0)) / (std + eps_std) for z, std in zip((za, zb), stds, strict=True))
    diagonal = (za * zb).sum(0) / N  # [D]
    energy = product_energy(za, zb, route) / N**2
    on_diagonal = (1 - diagonal).square().sum()
    return (1 / D if scale is None else scale) * (on_diagonal + lambd * (energy - diagonal.square().sum()))


def barlow_twins_loss(
    za: Tensor,
    zb: Tensor,
    *,
    lambd: float | None = None,
    ddof: int | None = None,
    eps: float | None = None,
    eps_std: float | None = None,
    scale: float | None = None,
    convention: str = "ncvqvae",
    route: str = "auto",
    impl: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
    gradient: str = "true",
) -> Tensor:
    """Barlow Twins loss between two views.

        L = scale [Σ_i (1 - C_ii)² + lambd Σ_{i≠j} C_ij²],
        C = Âᵀ B̂ / N,   Â = (z - mean) / (sqrt(var + eps) + eps_std)

    Args:
        za, zb: projections of the two views [N, D], N >= 2; any float dtype.
        lambd: weight of the off-diagonal terms.
        ddof: var divides by N - ddof: 1 or 0.
        eps, eps_std: added to the variance, and to the standard deviation.
        scale: factor of the whole; 1 / D in the convention "ncvqvae".
        convention: what holds for the arguments not given.

            ==========  ======  ====  =====  =======  =====
            convention  lambd   ddof  eps    eps_std  scale
            ==========  ======  ====  =====  =======  =====
            ncvqvae     0.005   1     0      1e-8     1/D
            facebook    0.0051  0     1e-5   0        1
            lightly     0.005   0     1e-5   0        1
            solo        0.005   0     1e-5   0        0.025
            vibcreg     0.005   1     0      0        1
            ==========  ======  ====  =====  =======  =====
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
        ValueError: views that are not alike and [N >= 2, D]; an unknown convention, route, impl or gradient;
            with a group, shards that do not fit together.
    """
    options = resolve_convention(
        "barlow_twins_loss", convention, CONVENTIONS, lambd=lambd, ddof=ddof, eps=eps, eps_std=eps_std, scale=scale
    )
    with torch.autocast(za.device.type, enabled=False):
        if group is not None:
            za, zb = gathered_views("barlow_twins_loss", za, zb, group, gradient, route)
        za, zb = check_views("barlow_twins_loss", za, zb)
        options["scale"] = 1 / za.shape[1] if options["scale"] is None else options["scale"]
        name = choose("barlow_twins_loss", impl, why_not(za.device, za.dtype), route, za)
        if name == "reference":
            return barlow_twins_loss_reference(za, zb, route=route, **options)
        return apply(name, za, zb, **options)


why_not = why_not_kernels
apply = define_operators(
    "barlow_twins_loss", "float lambd, int ddof, float eps, float eps_std, float scale", barlow_twins_loss_reference
)
