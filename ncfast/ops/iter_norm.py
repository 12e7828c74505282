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
    triton = dispatch.why_not_triton(device) or double or large
    return {
        "cpp": dispatch.why_not_cpp(device) or double,
        # Under the interpreter Triton is a test fixture: right, but the slowest of all.
        **({"triton": triton} if device.type == "cuda" else {}),
        "reference": None,
        **({"triton": triton} if device.type != "cuda" else {}),
    }


def _cpp(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    y, saved = _fake(x, groups, iterations, eps)
    module, _ = dispatch.load_module("_C")
    module.iter_norm(
        x.data_ptr(),
        *x.shape,
        groups,
        iterations,
        eps,
        torch.get_num_threads(),
        y.data_ptr(),
        saved.data_ptr(),
    )
    return y, saved


def _cpp_backward(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int, eps: float) -> Tensor:
    grad_x = torch.empty_like(x)
    module, _ = dispatch.load_module("_C")
    module.iter_norm_backward(
        grad_y.data_ptr(),
        x.data_ptr(),
        saved.data_ptr(),
        *x.shape,
        groups,
        iterations,
        torch.get_num_threads(),
        grad_x.data_ptr(),
    )
    return grad_x


def _triton(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    from ncfast.ops.triton.iter_norm import iter_norm_triton

    return iter_norm_triton(x, groups, iterations, eps)


def _triton_backward(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int, eps: float) -> Tensor:
    from ncfast.ops.triton.iter_norm import iter_norm_backward_triton

    return iter_norm_backward_triton(grad_y, x, saved, groups, iterations)


def _fake(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    d = x.shape[1] // groups
    return torch.empty_like(x), x.new_empty(groups, d + 2, d)


def _fake_backward(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(x)


OPERATORS, BACKWARD_OPERATORS = {}, {}
for _name, _forward, _backward, _keys in (
    ("cpp", _cpp, _cpp_backward, ("CPU",)),
    ("triton", _triton, _triton_backward, ("CUDA", "CPU")),
):
    # x [N, D] float32, contiguous -> y as x; of each group the covariance and, as a sum of two rows, the mean:
    # [groups, d + 2, d]
    dispatch.library.define(
        f"iter_norm_{_name}(Tensor x, SymInt groups, SymInt iterations, float eps) -> (Tensor y, Tensor saved)"
    )
    dispatch.library.define(
        f"iter_norm_backward_{_name}(Tensor grad_y, Tensor x, Tensor saved, SymInt groups, SymInt iterations, "
        "float eps) -> Tensor grad_x"
    )
    for _key in _keys:
        dispatch.library.impl(f"iter_norm_{_name}", _forward, _key)
        dispatch.library.impl(f"iter_norm_backward_{_name}", _backward, _key)
    torch.library.register_fake(f"ncfast::iter_norm_{_name}", _fake, lib=dispatch.library)
    torch.library.register_fake(f"ncfast::iter_norm_backward_{_name}", _fake_backward, lib=dispatch.library)
    OPERATORS[_name] = getattr(torch.ops.ncfast, f"iter_norm_{_name}").default
    BACKWARD_OPERATORS[_name] = getattr(torch.ops.ncfast, f"iter_norm_backward_{_name}").default
