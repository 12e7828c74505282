"""‖AᵀB‖² without the D x D product: the identity behind every SSL loss here, and what else the losses share.

‖AᵀB‖_F² = tr(AᵀB BᵀA) = <A Aᵀ, B Bᵀ>: two N x N Gram matrices in place of one D x D matrix. With N = 128 and D = 4096
that is 32 times fewer operations and no D x D memory (Garrido et al., arXiv 2206.02574, give the duality).
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel

# Beyond so many rows a loss on a GPU is bound by its matrix products, and PyTorch's are faster than Triton's.
MAX_TRITON_ROWS = 512
VAR_REDUCTIONS = {"sum": 1.0, "mean": 0.5}  # of the variance terms of the two views


def resolve_route(route: str, N: int, D: int) -> str:
    """ "gram" or "direct". Gram wins, and is also the more accurate one, while N is well below D."""
    if route == "auto":
        return "gram" if N <= 0.75 * D else "direct"
    if route not in ("gram", "direct"):
        raise ValueError(f"route is 'auto', 'gram' or 'direct'; got {route!r}")
    return route


def product_energy(a: Tensor, b: Tensor, route: str = "auto") -> Tensor:
    """‖aᵀ b‖_F², scalar.  a, b [N, D]."""
    if resolve_route(route, *a.shape) == "direct":
        return (a.T @ b).square().sum()
    gram_a = a @ a.T  # [N, N]
    gram_b = gram_a if b is a else b @ b.T
    return (gram_a * gram_b).sum()


def resolve_convention(operation: str, convention: str, conventions: dict[str, dict], **given: object) -> dict:
    """The convention's arguments, with those that were `given` (not None) in their place."""
    if convention not in conventions:
        raise ValueError(f"{operation}: convention is one of {', '.join(conventions)}; got {convention!r}")
    unset = {name: value for name, value in given.items() if value is not None}
    return {**conventions[convention], **unset}


def check_views(operation: str, za: Tensor, zb: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """The two views in float32 (float64 stays), after the checks that every SSL loss shares. `least` rows or more."""
    if za.dim() != 2 or za.shape != zb.shape:
        raise ValueError(f"{operation}: za and zb are [N, D] and alike; got {list(za.shape)} and {list(zb.shape)}")
    if za.shape[0] < least or za.shape[1] < 1:
        raise ValueError(
            f"{operation}: statistics over the batch need N >= {least} samples and D >= 1; got {list(za.shape)}"
        )
    if za.device != zb.device:
        raise ValueError(f"{operation}: za is on {za.device} and zb on {zb.device}; move one")
    if not (za.is_floating_point() and zb.is_floating_point()):
        raise ValueError(f"{operation}: za and zb are floating point; got {za.dtype} and {zb.dtype}")
    dtype = torch.float64 if torch.float64 in (za.dtype, zb.dtype) else torch.float32
    return za.to(dtype), zb.to(dtype)


def why_not_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each implementation of an SSL loss, fastest first, with None or the reason why it cannot run on these."""
    double = f"{dtype} input: the kernels are float32" if dtype == torch.float64 else None
    return {
        "cpp": dispatch.why_not_cpp(device) or double,
        # Under the interpreter Triton is a test fixture: right, but the slowest of all.
        **({"triton": dispatch.why_not_triton(device) or double} if device.type == "cuda" else {}),
        "reference": None,
        **({"triton": dispatch.why_not_triton(device) or double} if device.type != "cuda" else {}),
    }


def choose(operation: str, impl: str, why_not: dict[str, str | None], route: str, z: Tensor) -> str:
    """The implementation for views z [N, D]: kernels have the Gram route alone, and on a GPU win by fewer launches."""
    if resolve_route(route, *z.shape) == "direct":
        reason = f"the kernels take the N x N route, and this is route={route!r} with N, D = {tuple(z.shape)}"
        why_not = {name: reason if why is None and name != "reference" else why for name, why in why_not.items()}
    if z.shape[0] > MAX_TRITON_ROWS and "triton" in why_not:
        why_not["triton"] = why_not.pop("triton")  # last in the order
    return dispatch.choose(operation, impl, why_not)


def define_operators(stem: str, options: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers the kernels of a loss; returns `apply(implementation, za, zb, **options)`, a differentiable scalar.

    An implementation is a forward operator (za, zb, options) -> (loss, saved) and a backward operator
    (grad_loss, za, zb, saved, options) -> (grad_za, grad_zb), on contiguous float32 views [N, D]; `saved` is a float32
    vector of its own making. `reference` is the loss in plain PyTorch, for second derivatives.
    """

    def saved_numel_cpp(N: int, D: int) -> int:
        """GramShape::saved of csrc/cpu/gram.h, here again since N and D may be symbols."""
        padded = (N + 31) // 32 * 32
        return (2 * D + 2 * padded) * (padded + 16) + 6 * D

    def empty_results(za: Tensor, saved: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.empty(shape, dtype=torch.float32, device=za.device) for shape in ((), saved))

    def empty_results_cpp(za: Tensor, zb: Tensor, *options) -> tuple[Tensor, Tensor]:
        return empty_results(za, saved_numel_cpp(*za.shape))

    def empty_results_triton(za: Tensor, zb: Tensor, *options) -> tuple[Tensor, Tensor]:
        return empty_results(za, dispatch.triton(f"{stem}.{stem}_saved_numel")(*za.shape))

    def empty_gradients(grad_loss: Tensor, za: Tensor, zb: Tensor, saved: Tensor, *options) -> tuple[Tensor, Tensor]:
        return torch.empty_like(za), torch.empty_like(zb)

    def forward_cpp(za: Tensor, zb: Tensor, *options) -> tuple[Tensor, Tensor]:
        results = empty_results(za, getattr(dispatch.load_module("_C")[0], f"{stem}_saved_numel")(*za.shape))
        dispatch.native("_C", stem, za, zb, *za.shape, *options, torch.get_num_threads(), *results)
        return results

    def backward_cpp(grad_loss: Tensor, za: Tensor, zb: Tensor, saved: Tensor, *options) -> tuple[Tensor, Tensor]:
        inputs, threads = (grad_loss, za, zb, saved), torch.get_num_threads()
        gradients = empty_gradients(*inputs)
        dispatch.native("_C", f"{stem}_backward", *inputs, *za.shape, *options, threads, *gradients)
        return gradients

    forward = f"{stem}(Tensor za, Tensor zb, {options}) -> (Tensor, Tensor)"
    backward = f"{stem}_backward(Tensor grad_loss, Tensor za, Tensor zb, Tensor saved, {options}) -> (Tensor, Tensor)"
    forward_triton = dispatch.triton(f"{stem}.{stem}_triton")
    forwards = {
        **dispatch.operator(forward, empty_results_cpp, cpp=forward_cpp),
        **dispatch.operator(forward, empty_results_triton, triton=forward_triton),
    }
    backward_triton = dispatch.triton(f"{stem}.{stem}_backward_triton")
    backwards = dispatch.operator(backward, empty_gradients, cpp=backward_cpp, triton=backward_triton)
    operators = {name: (forwards[name], backwards[name]) for name in forwards}
    names = [option.split()[1] for option in options.split(",")]

    def apply(implementation: str, za: Tensor, zb: Tensor, **given) -> Tensor:
        values = [given[name] for name in names]
        again = functools.partial(reference, route="gram", **given)
        return GramLoss.apply(za.contiguous(), zb.contiguous(), operators[implementation], values, again)

    return apply


def gram_loss_again(ctx) -> tuple[tuple, tuple]:
    za, zb, _ = ctx.saved_tensors
    return (za, zb), (ctx.again(za, zb),)


class GramLoss(torch.autograd.Function):
    """The gradient of a loss whose kernels are `operators`, (forward, backward); `again` is its reference."""

    @staticmethod
    def forward(ctx, za: Tensor, zb: Tensor, operators: tuple, options: list, again: Callable[..., Tensor]) -> Tensor:
        loss, saved = operators[0](za.detach(), zb.detach(), *options)
        ctx.save_for_backward(za, zb, saved)
        ctx.operators, ctx.options, ctx.again = operators, options, again
        return loss

    @staticmethod
    @of_kernel("SSL loss", gram_loss_again)
    def backward(ctx, grad_loss: Tensor):
        grad_za, grad_zb = ctx.operators[1](grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad_za, grad_zb, None, None, None
