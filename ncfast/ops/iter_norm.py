"""Iterative whitening of a batch (Huang et al., Iterative Normalization, arXiv 1904.03441, algorithm 1)."""

import torch
from torch import Tensor

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel


def iter_norm_reference(x: Tensor, *, groups: int = 64, iterations: int = 5, eps: float = 1e-5) -> Tensor:
    """x [N, D] -> [N, D]: each group of D / groups channels is centred and multiplied by about Σ^-1/2."""
    N, D = x.shape
    d = D // groups
    x = (x - x.mean(0)).T.reshape(groups, d, N)
    identity = torch.eye(d, dtype=x.dtype, device=x.device)
    covariance = torch.baddbmm(eps * identity.expand(groups, d, d), x, x.mT, alpha=1 / N)  # [groups, d, d]
    return (inverse_root(covariance, iterations) @ x).reshape(D, N).T


def inverse_root(covariance: Tensor, iterations: int) -> Tensor:
    """About covariance^-1/2, by Newton-Schulz iteration.  [groups, d, d]"""
    # It converges for eigenvalues in (0, 1]: divide by the trace, undo it at the end.
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    # P' = 1.5 P - 0.5 P³ S through W = P² S: as many products, and what rounding adds, which does not commute with S,
    # grows no faster than P does. Printed as P³ S it can double every step.
    W = covariance / trace
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    P = 1.5 * identity - 0.5 * W if iterations > 0 else identity.expand_as(covariance)
    for _ in range(1, iterations):
        V = torch.baddbmm(W, W, W, beta=1.5, alpha=-0.5)
        W = torch.baddbmm(V, V, W, beta=1.5, alpha=-0.5)
        P = torch.baddbmm(P, P, W, beta=1.5, alpha=-0.5)
    return P / trace.sqrt()


def iter_norm(
    x: Tensor,
    *,
    groups: int = 64,
    iterations: int = 5,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Whitens the batch within groups of channels by Newton-Schulz iteration.

    In C++ and Triton a group is computed from beginning to end by one thread or one program: the result is the same bit
    for bit on every call, whatever the number of threads.

    Args:
        x: activations [N, D], N >= 2; any float dtype. D is a multiple of `groups`; contiguous channels form a group.
        groups: number of groups, each whitened on its own.
        iterations: Newton-Schulz steps (T in the paper), 0 or more.
        eps: added to the diagonal of each biased covariance.
        impl: "auto" (the fastest that can run the call), "reference", "cpp" or "triton".

    Returns:
        [N, D], float32 (float64 for float64 input). Differentiable, twice too: a second derivative is the reference's.

    Raises:
        ValueError: a shape or a number of iterations that does not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    if x.dim() != 2 or x.shape[0] < 2:
        raise ValueError(f"iter_norm: x is [N, D] with N >= 2; got {list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"iter_norm: D is a multiple of groups; got D = {x.shape[1]}, groups = {groups}")
    if iterations < 0:
        raise ValueError(f"iter_norm: iterations is 0 or more; got {iterations}")
    name = dispatch.choose("iter_norm", impl, why_not(x.device, x.dtype, x.shape[1] // groups))
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        if name == "reference":
            return iter_norm_reference(x, groups=groups, iterations=iterations, eps=eps)
        return IterNorm.apply(x.contiguous(), groups, iterations, eps, name)


def iter_norm_again(ctx) -> tuple[tuple, tuple]:
    x, _ = ctx.saved_tensors
    groups, iterations, eps = ctx.arguments
    return (x,), (iter_norm_reference(x, groups=groups, iterations=iterations, eps=eps),)


class IterNorm(torch.autograd.Function):
    """The gradient of an operator `name`; x [N, D] float32, contiguous."""

    @staticmethod
    def forward(ctx, x: Tensor, groups: int, iterations: int, eps: float, name: str) -> Tensor:
        y, saved = OPERATORS[name](x.detach(), groups, iterations, eps)
        ctx.save_for_backward(x, saved)
        ctx.arguments, ctx.name = (groups, iterations, eps), name
        return y

    @staticmethod
    @of_kernel("iter_norm", iter_norm_again)
    def backward(ctx, grad_y: Tensor):
        x, saved = ctx.saved_tensors
        return BACKWARD_OPERATORS[ctx.name](grad_y.contiguous(), x, saved, *ctx.arguments), None, None, None, None


LARGEST_TRITON_GROUP = 128  # channels: a program holds the group's matrices, and they are square


def why_not(
    device: torch.device, dtype: torch.dtype = torch.float32, channels_per_group: int = 1
) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    double = "float64 input: only the reference has a path for it" if dtype == torch.float64 else None
    large = None
    if channels_per_group > LARGEST_TRITON_GROUP:
        large = f"a group of {channels_per_group} channels: Triton takes up to {LARGEST_TRITON_GROUP}"
    return dispatch.table(device, cpp=double, triton=double or large)


def empty_results(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[1] // groups
    return torch.empty_like(x), x.new_empty(groups, d + 2, d)


def empty_gradient(grad_y: Tensor, x: Tensor, *others) -> Tensor:
    return torch.empty_like(x)


def run_cpp(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    results = empty_results(x, groups, iterations, eps)
    dispatch.native("_C", "iter_norm", x, *x.shape, groups, iterations, eps, torch.get_num_threads(), *results)
    return results


def run_cpp_backward(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int, eps: float) -> Tensor:
    grad_x, threads = torch.empty_like(x), torch.get_num_threads()
    dispatch.native("_C", "iter_norm_backward", grad_y, x, saved, *x.shape, groups, iterations, threads, grad_x)
    return grad_x


def run_triton_backward(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int, eps: float) -> Tensor:
    return dispatch.triton("iter_norm.iter_norm_backward_triton")(grad_y, x, saved, groups, iterations)


# x [N, D] float32, contiguous -> y as x; of each group the covariance and, as a sum of two rows, the mean:
# [groups, d + 2, d]
OPERATORS = dispatch.operator(
    "iter_norm(Tensor x, SymInt groups, SymInt iterations, float eps) -> (Tensor y, Tensor saved)",
    empty_results,
    cpp=run_cpp,
    triton=dispatch.triton("iter_norm.iter_norm_triton"),
)
BACKWARD_OPERATORS = dispatch.operator(
    "iter_norm_backward(Tensor grad_y, Tensor x, Tensor saved, SymInt groups, SymInt iterations, float eps) -> "
    "Tensor grad_x",
    empty_gradient,
    cpp=run_cpp_backward,
    triton=run_triton_backward,
)
