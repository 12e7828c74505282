"""Layer normalisation with its neighbours: a sum over all series and a GELU before it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel

MAX_COLUMNS = 1024  # of a row that the Triton kernels hold in registers


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    add: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """F.layer_norm of gelu(x + add)."""
    dtype = x.dtype if dtype is None else dtype
    if add is not None:
        x = x + add.to(x.dtype)
    if gelu:
        x = F.gelu(x)
    if x.device.type != "cpu":  # where PyTorch takes float32 parameters beside float16 and bfloat16
        x = x.to(weight.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps).to(dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    add: Tensor | None = None,
    eps: float = 1e-5,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """weight · (h - mean(h)) / sqrt(var(h) + eps) + bias of h = gelu(x + add), each row by itself (Ba, Kiros and
    Hinton, Layer normalization, arXiv 1607.06450); the GELU and the sum may be left out.

    In Triton h and its statistics are float32 in any type, and under any autocast; var is the mean of squares of
    deviations, never a difference of squares; a row of the result is the same bits among any number of rows, and every
    sum has a fixed order. It takes one launch forward and two backward, and keeps nothing but x for the gradient.

    Args:
        x: [..., D], floating point.
        weight, bias: [D], both of x's type or both float32.
        add: [n, D] where x is [..., n, D], of x's type or float32.
        gelu: apply the exact GELU, z Φ(z).
        dtype: of the result; x's if None.
        impl: "auto" (Triton on a GPU, else the reference), "reference" (plain PyTorch) or "triton" (D <= 1024, not
            float64).

    Returns:
        [..., D]. Differentiable once in x, weight, bias and add; a second derivative is refused, except of the
        reference.

    Raises:
        ValueError: shapes, types or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(x, weight, bias, add)
    name = dispatch.choose("layer_norm", impl, why_not(x.device, x.dtype, x.shape[-1]))
    if name == "reference":
        return layer_norm_reference(x, weight, bias, add=add, eps=eps, gelu=gelu, dtype=dtype)
    tensors = [None if part is None else part.contiguous() for part in (x, weight, bias, add)]
    dtype = x.dtype if dtype is None else dtype
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in tensors):
        return LayerNorm.apply(*tensors, eps, gelu, dtype)
    return OPERATOR(*tensors, eps, gelu, dtype)


class LayerNorm(torch.autograd.Function):
    """x [..., n, D], weight and bias [D], add [n, D] or None, all contiguous -> [..., n, D] of type dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, add, eps: float, gelu: bool, dtype: torch.dtype) -> Tensor:
        x, weight, bias, add = (None if part is None else part.detach() for part in (x, weight, bias, add))
        ctx.save_for_backward(x, weight, add)
        ctx.eps, ctx.gelu = eps, gelu
        return OPERATOR(x, weight, bias, add, eps, gelu, dtype)

    @staticmethod
    @of_kernel("layer_norm")
    def backward(ctx, grad_y: Tensor):
        x, weight, add = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = BACKWARD_OPERATOR(grad_y.contiguous(), x, weight, add, ctx.eps, ctx.gelu)
        grad_add = None
        if add is not None and ctx.needs_input_grad[3]:
            grad_add = grad_x.reshape(x.shape[:-2].numel(), *add.shape).sum(0, dtype=torch.float32).to(add.dtype)
        return grad_x, grad_weight, grad_bias, grad_add, None, None, None


def check(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"layer_norm: x is [..., D], floating point; got {list(x.shape)}, {x.dtype}")
    D = x.shape[-1]
    if list(weight.shape) != [D] or list(bias.shape) != [D]:
        raise ValueError(
            f"layer_norm: weight and bias are [D] = [{D}]; got {list(weight.shape)} and {list(bias.shape)}"
        )
    if add is not None and (x.dim() < 2 or add.shape != x.shape[-2:]):
        raise ValueError(f"layer_norm: add is [n, D] and x [..., n, D]; got {list(add.shape)} and {list(x.shape)}")
    half = x.dtype in (torch.float16, torch.bfloat16)
    for name, part in {"weight": weight, "bias": bias, "add": add}.items():
        if part is None:
            continue
        fits = part.dtype == x.dtype or (half and part.dtype == torch.float32)
        if not fits or part.device != x.device:
            raise ValueError(
                f"layer_norm: x is {x.dtype} on {x.device} and {name} {part.dtype} on {part.device}; they are alike, "
                "or float32 beside float16 and bfloat16"
            )
    if weight.dtype != bias.dtype:
        raise ValueError(f"layer_norm: weight and bias are of one type; got {weight.dtype} and {bias.dtype}")


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, D: int = 1) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these.

    D: columns of x.
    """
    unfit = None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unfit = f"{dtype} input: only the reference has a path for it"
    elif D > MAX_COLUMNS:
        unfit = f"rows of {D} columns: the kernel takes up to {MAX_COLUMNS}"
    return dispatch.table(device, triton=unfit)


def empty_result(x, weight, bias, add, eps, gelu, dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def run_triton(*arguments) -> Tensor:
    y = empty_result(*arguments)
    dispatch.triton("layer_norm.layer_norm_triton")(*arguments[:-1], y)  # whose dtype is the last argument
    return y


def empty_gradients(grad_y, x, weight, add, eps, gelu) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


# All contiguous: x [..., n, D], weight and bias [D], add [n, D] -> y [..., n, D] of type dtype; and grad_y [..., n, D]
# of any type -> the gradients of x, which is that of add before its sum, of weight and of bias, as these.
OPERATOR = dispatch.operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor? add, float eps, bool gelu, ScalarType dtype) -> Tensor",
    empty_result,
    triton=run_triton,
)["triton"]
BACKWARD_OPERATOR = dispatch.operator(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? add, float eps, bool gelu) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    empty_gradients,
    triton=dispatch.triton("layer_norm.layer_norm_backward_triton", fills=empty_gradients),
)["triton"]
