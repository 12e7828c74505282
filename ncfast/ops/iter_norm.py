"""Iterative whitening of a batch (Huang et al., Iterative Normalization, arXiv 1904.03441, algorithm 1)."""

import torch
from torch import Tensor

from ncfast.ops import dispatch


def iter_norm_reference(x: Tensor, *, groups: int = 64, iterations: int = 5, eps: float = 1e-5) -> Tensor:
    """x [N, D] -> [N, D]: each group of D / groups channels is centred and multiplied by about Σ^-1/2."""
    N, D = x.shape
    d = D // groups
    x = (x - x.mean(0)).T.reshape(groups, d, N)
    identity = torch.eye(d, dtype=x.dtype, device=x.device)
    covariance = torch.baddbmm(eps * identity.expand(groups, d, d), x, x.mT, alpha=1 / N)  # [groups, d, d]
    # Newton-Schulz converges for eigenvalues in (0, 1]: divide by the trace, undo it at the end.
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    scaled = covariance / trace
    P = identity.expand(groups, d, d)
    for _ in range(iterations):
        P = torch.baddbmm(P, P @ P @ P, scaled, beta=1.5, alpha=-0.5)
    whitened = (P / trace.sqrt()) @ x
    return whitened.reshape(D, N).T


def iter_norm(x: Tensor, *, groups: int = 64, iterations: int = 5, eps: float = 1e-5, impl: str = "auto") -> Tensor:
    """Whitens the batch within groups of channels by Newton-Schulz iteration.

    Args:
        x: activations [N, D], N >= 2; any float dtype. D is a multiple of `groups`; contiguous channels form a group.
        groups: number of groups, each whitened on its own.
        iterations: Newton-Schulz steps (T in the paper).
        eps: added to the diagonal of each biased covariance.
        impl: "auto" or "reference".

    Returns:
        [N, D], float32 (float64 for float64 input), differentiable.

    Raises:
        ValueError: a shape that does not fit.
    """
    dispatch.choose("iter_norm", impl, why_not(x.device))
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"iter_norm: x is [N, D] with N >= 2; got {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"iter_norm: D is a multiple of groups; got D = {x.shape[1]}, groups = {groups}")
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        return iter_norm_reference(x, groups=groups, iterations=iterations, eps=eps)


def why_not(device: torch.device) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run there."""
    return {"reference": None}
