"""A transposed convolution of few channels that doubles the width, in float32: the last layer of a decoder."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import dispatch
from ncfast.ops.gradients import of_kernel

KERNEL, STRIDE, PADDING = (3, 4), (1, 2), (1, 1)
MOST_CHANNELS = 6  # of a group, in or out; the kernels spell out loops over them, and with many more would spill


def thin_conv_transpose_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
    """F.conv_transpose2d of what is widened to float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv_transpose2d(
            x.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            stride=STRIDE,
            padding=PADDING,
            groups=groups,
        )
    return y.contiguous()


def thin_conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, groups: int = 1, impl: str = "auto"
) -> Tensor:
    """F.conv_transpose2d(x, weight, bias, stride=(1, 2), padding=(1, 1), groups=groups) in float32, for few channels.

    y[b, co, h, c] = bias[co] + Σ weight[ci, co, kh, kw] · x[b, ci, i, j] over ci of co's group and all taps and
    positions with i - 1 + kh = h and 2j - 1 + kw = c (Dumoulin and Visin, A guide to convolution arithmetic for deep
    learning, arXiv 1603.07285, section 4): of the 4 taps along the width, 2 apply to a column. Products and sums are
    float32 under any autocast, which rounds nothing here. In Triton every sum has a fixed order, so the result is the
    same bit for bit on every call; it takes one launch forward and two backward. The reference on a GPU is subject to
    torch.backends.cudnn.allow_tf32.

    Args:
        x: [B, G·Cin, H, W] in any memory format, H and W at least 1; float32, bfloat16, float16 (float64: reference).
        weight: [G·Cin, Cout, 3, 4], floating point.
        bias: [G·Cout], floating point.
        groups: G.
        impl: "auto" (the fastest that can run the call), "reference" or "triton" (Cin and Cout at most 6).

    Returns:
        [B, G·Cout, H, 2W], contiguous, float32, or float64 for such an x. Differentiable once in x, weight and bias; a
        second derivative is refused, except of the reference. Gradients have the types of what they are taken for, and
        that of x its memory format.

    Raises:
        ValueError: shapes, types or devices that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    check(x, weight, bias, groups)
    name = dispatch.choose("thin_conv_transpose", impl, why_not(x.device, x.dtype, most_channels(weight, groups)))
    if name == "reference":
        return thin_conv_transpose_reference(x, weight, bias, groups=groups)
    return ThinConvTranspose.apply(x, weight.contiguous(), None if bias is None else bias.contiguous(), groups)


class ThinConvTranspose(torch.autograd.Function):
    """x [B, G·Cin, H, W], weight [G·Cin, Cout, 3, 4], bias [G·Cout] or None -> y [B, G·Cout, H, 2W] float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups = groups
        ctx.bias_dtype = None if bias is None else bias.dtype
        return OPERATOR(x.detach(), weight.detach(), None if bias is None else bias.detach(), groups)

    @staticmethod
    @of_kernel("thin_conv_transpose")
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = BACKWARD_OPERATOR(grad_y.contiguous(), x, weight, ctx.groups)
        return grad_x, grad_weight, None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype), None


def check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    if x.dim() != 4 or not x.is_floating_point() or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(
            "thin_conv_transpose: x is [B, C, H, W], floating point, H and W at least 1; "
            f"got {list(x.shape)}, {x.dtype}"
        )
    C = x.shape[1]
    if groups < 1 or C < 1 or C % groups:
        raise ValueError(f"thin_conv_transpose: x has a multiple of groups >= 1 channels; got {C}, groups = {groups}")
    if weight.dim() != 4 or weight.shape[0] != C or weight.shape[1] < 1 or tuple(weight.shape[2:]) != KERNEL:
        raise ValueError(f"thin_conv_transpose: weight is [C, Cout, 3, 4], C = {C}; got {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [groups * weight.shape[1]]:
        raise ValueError(
            f"thin_conv_transpose: bias is [G·Cout] = [{groups * weight.shape[1]}]; got {list(bias.shape)}"
        )
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and (other.device != x.device or not other.is_floating_point()):
            raise ValueError(
                f"thin_conv_transpose: {name} is floating point, on {x.device} as x is; "
                f"got {other.dtype} on {other.device}"
            )


def most_channels(weight: Tensor, groups: int) -> int:  # [G·Cin, Cout, 3, 4]
    return max(weight.shape[0] // groups, weight.shape[1])


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 1) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these.

    channels: the larger of Cin and Cout.
    """
    unfit = None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        unfit = f"{dtype} input: only the reference has a path for it"
    elif channels > MOST_CHANNELS:
        unfit = f"{channels} channels in a group: the kernel takes up to {MOST_CHANNELS}"
    return dispatch.table(device, triton=unfit)


def takes_triton(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether `thin_conv_transpose` on its own would choose Triton for x [B, G·Cin, H, W], weight [G·Cin, Cout, 3, 4]:
    where it would not, a layer that may follow autocast is the better choice."""
    table = why_not(x.device, x.dtype, most_channels(weight, groups))
    return table["triton"] is None and dispatch.choose("thin_conv_transpose", "auto", table) == "triton"


def empty_result(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    B, _, H, W = x.shape
    return x.new_empty(B, groups * weight.shape[1], H, 2 * W, dtype=torch.float32)


def empty_gradients(grad_y: Tensor, x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(grad_y.shape[1], dtype=torch.float32)


# x [B, G·Cin, H, W] with any strides, weight [G·Cin, Cout, 3, 4] and bias [G·Cout] contiguous -> y [B, G·Cout, H, 2W].
OPERATOR = dispatch.operator(
    "thin_conv_transpose(Tensor x, Tensor weight, Tensor? bias, SymInt groups) -> Tensor",
    empty_result,
    triton=dispatch.triton("thin_conv_transpose.thin_conv_transpose_triton", fills=empty_result),
)["triton"]
# grad_y as y -> the gradients of x and weight, each as it is, and of a bias, [G·Cout] float32.
BACKWARD_OPERATOR = dispatch.operator(
    "thin_conv_transpose_backward(Tensor grad_y, Tensor x, Tensor weight, SymInt groups) -> "
    "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    empty_gradients,
    triton=dispatch.triton("thin_conv_transpose.thin_conv_transpose_backward_triton", fills=empty_gradients),
)["triton"]
