"""A linear layer with its neighbours in a pre-norm transformer: RMS norm before it, GELU and residual after it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel

MAX_NORMED = 512  # columns that the Triton kernel holds, as it must to normalise them
LEAST_SHARED_MEMORY = 99 << 10  # of a program of it: what all GPUs from sm_80 on have


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
    return_x: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + gelu(rms_norm(x) Wᵀ + b); each part but W may be left out.

    The kernels pass over x and the result once, and keep no normalised x for the gradient. In C++ a row of the result
    is the same bits for any number of rows and threads. Under autocast all is computed in autocast's type, float64
    excepted; sums and the norm's statistics are float32 in any type.

    Args:
        x: [..., K], floating point.
        weight: [N, K], of x's type.
        bias: [N], of x's type, or float32 beside float16 and bfloat16.
        norm_weight: [K], as bias: x is first divided by sqrt(mean(x²) + norm_eps) of its row, then multiplied by this
            (Zhang and Sennrich, Root mean square layer normalization, arXiv 1910.07467).
        residual: [..., N], of x's type, added at the end.
        gelu: apply the exact GELU, y Φ(y).
        return_x: return x as well, to be used instead of x from there on: what comes to it in the backward pass, the
            Triton kernel adds to its own gradient of x, and autograd need not.
        impl: "auto", "reference" (plain PyTorch), "cpp" (float32) or "triton" (bfloat16 and float16; with a
            norm K <= 512). Float32 on a GPU is PyTorch's: its products in TF32 are faster.

    Returns:
        [..., N] in x's type, or in autocast's; with return_x this and x, in the same type. Differentiable in all
        tensors; a second derivative is refused, except of the reference.

    Raises:
        ValueError: shapes, types or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    parts = {"bias": bias, "norm_weight": norm_weight, "residual": residual}
    lower = autocast_dtype(x)
    if lower is None:
        y, x = run(x, weight, parts, norm_eps, gelu, return_x, impl, None)
    else:
        with torch.autocast(x.device.type, enabled=False):
            y, x = run(x, weight, parts, norm_eps, gelu, return_x, impl, lower)
    return (y, x) if return_x else y


def run(
    x: Tensor,
    weight: Tensor,
    parts: dict[str, Tensor | None],
    norm_eps: float,
    gelu: bool,
    return_x: bool,
    impl: str,
    lower: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """y and x of fused_linear. lower: autocast's type."""
    x, parts["residual"] = cast(x, lower), cast(parts["residual"], lower)
    check(x, weight, parts, lower)
    normed = parts["norm_weight"] is not None
    name = dispatch.choose("fused_linear", impl, why_not(x.device, x.dtype, x.shape[-1], normed=normed))
    if name != "triton":  # which takes parameters as they are, and so gives their gradients unrounded
        weight, *values = (None if part is None else part.to(x.dtype) for part in (weight, *parts.values()))
        parts = dict(zip(parts, values, strict=True))
    if name == "reference":
        return fused_linear_reference(x, weight, **parts, norm_eps=norm_eps, gelu=gelu), x
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in (x, weight, *parts.values())]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in contiguous):
        if name == "cpp":
            return FusedLinear.apply(*contiguous, norm_eps, gelu), x
        y, passed = FusedLinearTriton.apply(*contiguous, norm_eps, gelu, return_x)
        return y, passed if return_x else x
    if name == "triton":
        contiguous[1] = contiguous[1].to(x.dtype)
    return OPERATORS[name](*contiguous, norm_eps, gelu, False)[0], x


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast, where it is on, has for x: not for float64, which it leaves alone."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type not in ("cpu", "cuda"):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def cast(x: Tensor | None, lower: torch.dtype | None) -> Tensor | None:
    if x is None or lower is None or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(lower)


class FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, residual, norm_eps: float, gelu: bool) -> Tensor:
        detached = [None if part is None else part.detach() for part in (x, weight, bias, norm_weight, residual)]
        y, pre = OPERATOR(*detached, norm_eps, gelu, gelu)
        ctx.save_for_backward(x, weight, norm_weight, pre)
        ctx.norm_eps, ctx.gelu = norm_eps, gelu
        return y

    @staticmethod
    @of_kernel("fused_linear")
    def backward(ctx, grad_y: Tensor):
        x, weight, norm_weight, pre = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return FusedLinear.float32_backward(ctx, grad_y, x, weight, norm_weight, pre)

    @staticmethod
    def float32_backward(ctx, grad_y, x, weight, norm_weight, pre):
        grad_pre = torch.ops.aten.gelu_backward(grad_y, pre) if ctx.gelu else grad_y
        grad_pre = grad_pre.contiguous()
        grad_x = OPERATOR(grad_pre, weight.T.contiguous(), None, None, None, 0.0, False, False)[0]
        grad_norm_weight = None
        if norm_weight is not None:
            grad_x, grad_norm_weight, x = NORM_BACKWARD(grad_x, x, norm_weight, ctx.norm_eps)
        flat = grad_pre.flatten(0, -2) if grad_pre.dim() > 1 else grad_pre[None]  # [M, N]
        grad_weight = flat.T @ x.reshape(len(flat), x.shape[-1])  # no -1: there may be no rows
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        grad_residual = grad_y if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_residual, None, None


class FusedLinearTriton(torch.autograd.Function):
    """y and, with return_x, x. weight is of x's type or is rounded to it."""

    @staticmethod
    def forward(ctx, x, weight, bias, norm_weight, residual, norm_eps: float, gelu: bool, return_x: bool):
        ctx.weight_dtype = weight.dtype
        x, weight, bias, norm_weight, residual = (
            None if part is None else part.detach() for part in (x, weight, bias, norm_weight, residual)
        )
        weight = weight.to(x.dtype)
        y, pre = TRITON_OPERATOR(x, weight, bias, norm_weight, residual, norm_eps, gelu, gelu)
        ctx.save_for_backward(x, weight, bias, norm_weight, pre if gelu else None)
        ctx.norm_eps = norm_eps
        return y, x.view_as(x) if return_x else None

    @staticmethod
    @of_kernel("fused_linear")
    def backward(ctx, grad_y: Tensor, grad_passed: Tensor | None):
        x, weight, bias, norm_weight, pre = ctx.saved_tensors
        grad_x, grad_weight, grad_bias, grad_norm_weight = TRITON_BACKWARD(
            grad_y.contiguous(),
            None if grad_passed is None else grad_passed.contiguous(),
            x,
            weight,
            bias,
            norm_weight,
            pre,
            ctx.norm_eps,
            ctx.weight_dtype,
        )
        grad_bias = None if bias is None else grad_bias
        grad_norm_weight = None if norm_weight is None else grad_norm_weight
        grad_residual = grad_y if ctx.needs_input_grad[4] else None
        return grad_x, grad_weight, grad_bias, grad_norm_weight, grad_residual, None, None, None


def check(x: Tensor, weight: Tensor, parts: dict[str, Tensor | None], lower: torch.dtype | None = None) -> None:
    """lower: autocast's type, to which parameters may be rounded."""
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"fused_linear: x is [..., K] and weight [N, K]; got {list(x.shape)} and {list(weight.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"fused_linear: x is floating point; got {x.dtype}")
    N, K = weight.shape
    expected = {"bias": [N], "norm_weight": [K], "residual": [*x.shape[:-1], N]}
    half = x.dtype in (torch.float16, torch.bfloat16)
    for name, part in {"weight": weight, **parts}.items():
        if part is None:
            continue
        if name in expected and list(part.shape) != expected[name]:
            raise ValueError(f"fused_linear: {name} is {expected[name]}; got {list(part.shape)}")
        may_be_wide = half and part.dtype == torch.float32 and name in ("bias", "norm_weight")
        fits = part.dtype == x.dtype or may_be_wide or (lower is not None and cast(part, lower).dtype == x.dtype)
        if not fits or part.device != x.device:
            raise ValueError(
                f"fused_linear: x is {x.dtype} on {x.device} and {name} {part.dtype} on {part.device}; they are alike"
            )


def why_not(
    device: torch.device, dtype: torch.dtype = torch.float32, K: int = 1, *, normed: bool = True
) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these.

    K: columns of x; normed: whether it is normalised.
    """
    unfit_cpp = f"{dtype} input: the kernel is float32" if dtype != torch.float32 else None
    unfit = None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unfit = f"{dtype} input: Triton has no path for it"
    elif dtype == torch.bfloat16 and device.type != "cuda":
        unfit = "bfloat16 input: Triton's interpreter takes it for integers where it multiplies"
    elif normed and K > MAX_NORMED:
        unfit = f"a norm of {K} columns: the kernel takes up to {MAX_NORMED}"
    elif device.type == "cuda" and dtype == torch.float32:
        unfit = "float32 input: PyTorch's products are faster"
    elif device.type == "cuda" and dispatch.shared_memory_of(device) < LEAST_SHARED_MEMORY:
        there = dispatch.shared_memory_of(device)
        unfit = f"the kernel needs {LEAST_SHARED_MEMORY} bytes of shared memory; {device} has {there}"
    return dispatch.table(device, cpp=unfit_cpp, triton=unfit)


def empty_results(x, weight, bias, norm_weight, residual, norm_eps, gelu, keep_pre) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return tuple(torch.empty(each, dtype=x.dtype, device=x.device) for each in (shape, shape if keep_pre else 0))


def run_cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    gelu: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight, bias, norm_weight, residual)
    shape = (*x.shape[:-1], weight.shape[0])
    y, pre = torch.empty(shape), torch.empty(shape if keep_pre else 0)
    sizes, threads = (x.shape[:-1].numel(), *weight.shape), torch.get_num_threads()
    dispatch.native("_C", "fused_linear", *inputs, *sizes, norm_eps, gelu, threads, y, pre if keep_pre else None)
    return y, pre


def empty_norm_gradients(grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(norm_weight), torch.empty_like(x)


def run_norm_backward(grad_out: Tensor, x: Tensor, norm_weight: Tensor, norm_eps: float) -> tuple[Tensor, ...]:
    results = empty_norm_gradients(grad_out, x, norm_weight, norm_eps)
    sizes, threads = (x.shape[:-1].numel(), x.shape[-1]), torch.get_num_threads()
    dispatch.native("_C", "rms_norm_backward", grad_out, x, norm_weight, *sizes, norm_eps, threads, *results)
    return results


def run_triton_backward(grad_y: Tensor, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # A backward pass may run where autocast is on, and the product of grad_weight would be cast.
    with torch.autocast(grad_y.device.type, enabled=False):
        return dispatch.triton("fused_linear.fused_linear_backward_triton")(grad_y, *others)


def empty_gradients(
    grad_y, grad_passed, x, weight, bias, norm_weight, pre, norm_eps, weight_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vectors = (x.new_empty(0) if part is None else torch.empty_like(part) for part in (bias, norm_weight))
    return torch.empty_like(x), torch.empty_like(weight, dtype=weight_dtype), *vectors


# All contiguous: x [..., K], weight [N, K], bias [N], norm_weight [K], residual [..., N] -> y [..., N], and what the
# GELU was taken of, [..., N] or empty. Of cpp float32; of triton one type, bias and norm_weight maybe float32.
OPERATORS = dispatch.operator(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? residual, "
    "float norm_eps, bool gelu, bool keep_pre) -> (Tensor, Tensor)",
    empty_results,
    cpp=run_cpp,
    triton=dispatch.triton("fused_linear.fused_linear_triton"),
)
OPERATOR, TRITON_OPERATOR = OPERATORS["cpp"], OPERATORS["triton"]

# grad_out and x [..., K], norm_weight [K] -> the gradients of x and norm_weight, and the normalised x [..., K].
NORM_BACKWARD = dispatch.operator(
    "rms_norm_backward(Tensor grad_out, Tensor x, Tensor norm_weight, float norm_eps) -> (Tensor, Tensor, Tensor)",
    empty_norm_gradients,
    cpp=run_norm_backward,
)["cpp"]

# grad_y [..., N]; grad_passed [..., K], which is added to the gradient of x; the forward pass's inputs; pre [..., N],
# what the GELU was taken of, None without one -> the gradients of x, of weight in weight_dtype, and of bias and
# norm_weight, empty where these are None.
TRITON_BACKWARD = dispatch.operator(
    "fused_linear_backward(Tensor grad_y, Tensor? grad_passed, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? norm_weight, Tensor? pre, float norm_eps, ScalarType weight_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    empty_gradients,
    triton=run_triton_backward,
)["triton"]
