"""A linear layer with its neighbours in a pre-norm transformer: RMS norm before it, GELU and residual after it."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.ops import dispatch


def fused_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_eps: float = 1e-12,
    gelu: bool = False,
) -> Tensor:
    """residual + gelu(rms_norm(x) Wᵀ + b)."""
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight, norm_eps)
    y = F.linear(x, weight, bias)
    if gelu:
        y = F.gelu(y)
    return y if residual is None else residual + y


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    norm_eps: float = 1e-12,
    gelu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """residual + gelu(rms_norm(x) Wᵀ + b); each part but W may be left out.

    The C++ kernel passes over x and the result once, and keeps no normalised x for the gradient. A row of its result is
    the same bits for any number of rows and threads.

    Args:
        x: [..., K], floating point.
        weight: [N, K], bias: [N], of x's type.
        norm_weight: [K]: x is first divided by sqrt(mean(x²) + norm_eps) of its row, then multiplied by this
            (Zhang and Sennrich, Root mean square layer normalization, arXiv 1910.07467).
        residual: [..., N], added at the end.
        gelu: apply the exact GELU, y Φ(y).
        impl: "auto", "reference" (plain PyTorch) or "cpp" (float32).

    Returns:
        [..., N] in x's type. Differentiable in all tensors; a second derivative is refused, except of the reference.

    Raises:
        ValueError: shapes, types or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    parts = {"bias": bias, "norm_weight": norm_weight, "residual": residual}
    check(x, weight, parts)
    name = dispatch.choose("fused_linear", impl, why_not(x.device, x.dtype))
    if name == "reference":
        return fused_linear_reference(x, weight, bias, norm_weight, residual, norm_eps=norm_eps, gelu=gelu)
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in (x, weight, *parts.values())]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in contiguous):
        return FusedLinear.apply(*contiguous, norm_eps, gelu)
    return OPERATOR(*contiguous, norm_eps, gelu, False)[0]


class FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, residual, norm_eps: float, gelu: bool) -> Tensor:
        detached = [None if part is None else part.detach() for part in (x, weight, bias, norm_weight, residual)]
        y, pre = OPERATOR(*detached, norm_eps, gelu, gelu)
        ctx.save_for_backward(x, weight, norm_weight, pre)
        ctx.norm_eps, ctx.gelu = norm_eps, gelu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, weight, norm_weight, pre = ctx.saved_tensors
        grad_pre = torch.ops.aten.gelu_backward(grad_y, pre) if ctx.gelu else grad_y
        grad_pre = grad_pre.contiguous()
        grad_x = OPERATOR(grad_pre, weight.T.contiguous(), None, None, None, 0.0, False, False)[0]
        grad_norm_weight = None
        if norm_weight is not None:
            grad_x, grad_norm_weight, x = NORM_BACKWARD(grad_x, x, norm_weight, ctx.norm_eps)
        flat = grad_pre.flatten(0, -2) if grad_pre.dim() > 1 else grad_pre[None]  # [M, N]
        grad_weight = flat.T @ x.reshape(len(flat), -1)
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        grad_residual = grad_y if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_residual, None, None


def check(x: Tensor, weight: Tensor, parts: dict[str, Tensor | None]) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"fused_linear: x is [..., K] and weight [N, K]; got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"fused_linear: x is floating point; got {x.dtype}")
    N, K = weight.shape
    expected = {"bias": [N], "norm_weight": [K], "residual": [*x.shape[:-1], N]}
    for name, part in {"weight": weight, **parts}.items():
        if part is None:
            continue
        if name in expected and list(part.shape) != expected[name]:
            raise ValueError(f"fused_linear: {name} is {expected[name]}; got {list(part.shape)}")
        if part.dtype != x.dtype or part.device != x.device:
            raise ValueError(
                f"fused_linear: x is {x.dtype} on {x.device} and {name} {part.dtype} on {part.device}; they are alike"
            )


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    unfit = f"{dtype} input: the kernel is float32" if dtype != torch.float32 else None
    return {"cpp": dispatch.why_not_cpp(device) or unfit, "reference": None}


def _cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    gelu: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    y, pre = _fake(x, weight, bias, norm_weight, residual, norm_eps, gelu, keep_pre)
    addresses = [0 if part is None else part.data_ptr() for part in (x, weight, bias, norm_weight, residual)]
    N, K = weight.shape
    module, _ = dispatch.load_module("_C")
    module.fused_linear(
        *addresses,
        x.shape[:-1].numel(),
        N,
        K,
        norm_eps,
        gelu,
        torch.get_num_threads(),
        y.data_ptr(),
        pre.data_ptr() if keep_pre else 0,
    )
    return y, pre


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    gelu: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


def _norm_backward(grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_norm_weight, normalised = _fake_norm_backward(grad_out, x, norm_weight, norm_eps)
    module, _ = dispatch.load_module("_C")
    module.rms_norm_backward(
        grad_out.data_ptr(),
        x.data_ptr(),
        norm_weight.data_ptr(),
        x.shape[:-1].numel(),
        x.shape[-1],
        norm_eps,
        torch.get_num_threads(),
        grad_x.data_ptr(),
        grad_norm_weight.data_ptr(),
        normalised.data_ptr(),
    )
    return grad_x, grad_norm_weight, normalised


def _fake_norm_backward(
    grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(norm_weight), torch.empty_like(x)


# All contiguous, float32: x [..., K], weight [N, K], bias [N], norm_weight [K], residual [..., N] -> y [..., N], and
# what the GELU was taken of, [..., N] or empty.
dispatch.library.define(
    "fused_linear_cpp(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? residual, float norm_eps, "
    "bool gelu, bool keep_pre) -> (Tensor, Tensor)"
)
dispatch.library.impl("fused_linear_cpp", _cpp, "CPU")
torch.library.register_fake("ncfast::fused_linear_cpp", _fake, lib=dispatch.library)
OPERATOR = torch.ops.ncfast.fused_linear_cpp.default

# grad_out and x [..., K], norm_weight [K] -> the gradients of x and norm_weight, and the normalised x [..., K].
dispatch.library.define(
    "rms_norm_backward_cpp(Tensor grad_out, Tensor x, Tensor norm_weight, float norm_eps) -> (Tensor, Tensor, Tensor)"
)
dispatch.library.impl("rms_norm_backward_cpp", _norm_backward, "CPU")
torch.library.register_fake("ncfast::rms_norm_backward_cpp", _fake_norm_backward, lib=dispatch.library)
NORM_BACKWARD = torch.ops.ncfast.rms_norm_backward_cpp.default
