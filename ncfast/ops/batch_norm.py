"""Batch normalisation of several views at once, with its neighbours in a convolutional network: residual sum before it,
LeakyReLU and replicate padding after it (Ioffe and Szegedy, Batch normalization, arXiv 1502.03167)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import batch_norm_distributed, dispatch
from ncfast.ops.gradients import of_kernel


def batch_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    views: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 1.0,
    then_slope: float | None = None,
    pad: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """F.batch_norm of each view, one after the other, between a sum and activations."""
    if residual is not None:
        x = x + residual.to(x.dtype)
    if 1 in x.shape and not x.is_contiguous():
        # The stride of a size of 1 may be anything, and PyTorch's gradient on the CPU then mistakes the layout.
        x = x.contiguous()
    normalised = [
        F.batch_norm(view, running_mean, running_var, weight, bias, True, momentum, eps) for view in x.chunk(views)
    ]
    y = normalised[0] if views == 1 else torch.cat(normalised)
    return activate_and_pad(y, slope, then_slope, pad)


def activate_and_pad(y: Tensor, slope: float, then_slope: float | None, pad: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What follows the normalisation: y [N, C, H, W] -> the results of `batch_norm`."""
    if slope != 1.0:
        y = F.leaky_relu(y, slope)
    if pad:
        y = F.pad(y, (1, 1, 1, 1), mode="replicate")
    return y if then_slope is None else (y, F.leaky_relu(y, then_slope))


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    views: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 1.0,
    then_slope: float | None = None,
    pad: bool = False,
    impl: str = "auto",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LeakyReLU(weight · (h - mean) / sqrt(var + eps) + bias) of h = x + residual, by the batch's own statistics.

    Views are consecutive blocks of rows of equal size. Each is normalised by its own statistics, as if this were called
    for one after the other; so is the order in which they enter the running statistics. In Triton statistics are
    float32, deviations from means never being differences of squares, and every sum has a fixed order: the same result
    bit for bit on every call. It takes two launches forward and two backward, and memory in torch.channels_last; other
    layouts are copied.

    Args:
        x: [views·B, C, H, W] with C >= 1 and B·H·W >= 2; float32, bfloat16, float16 (float64: reference).
        weight, bias: [C], floating point; float32 with x of any of these types.
        running_mean, running_var: [C], updated in place, or both None: r + momentum · (statistic - r), the variance
            being the unbiased one.
        residual: as x, of any floating-point type: rounded to that of x.
        views: number of views.
        slope: of the LeakyReLU for negative values, at least 0; 1 for none.
        then_slope: if given, a second result is wanted: LeakyReLU of the first with this slope.
        pad: the result is written with replicate padding of 1 on all four sides, [views·B, C, H + 2, W + 2]; not with
            `then_slope`.
        impl: "auto" (the fastest that can run the call), "reference" or "triton".
        group: None for the statistics of this process's rows; a process group (`torch.distributed.group.WORLD`) for
            those of the rows of all its processes, x being [views·n_r, C, H, W] with n_r >= 0 on each: see
            `batch_norm_distributed`, of the gradients too. Every process takes the same impl.

    Returns:
        y as x, or padded; with `then_slope` the pair (y, LeakyReLU(y)). Differentiable once in x, residual, weight and
        bias; a second derivative is refused, except of the reference.

    Raises:
        ValueError: shapes or options that do not fit; an unknown impl.
        RuntimeError: an `impl` asked for by name that cannot run here, with the reason.
    """
    # How many values a channel has on all processes together is known on none of them.
    least = 2 if group is None else 0
    check(x, weight, bias, running_mean, running_var, residual, views, slope, then_slope, pad, least)
    name = dispatch.choose("batch_norm", impl, why_not(x.device, x.dtype))
    if name == "reference" and group is not None:
        if residual is not None:
            x = x + residual.to(x.dtype)
        y = batch_norm_distributed.BatchNorm.apply(
            x, weight, bias, running_mean, running_var, views, momentum, eps, group
        )
        return activate_and_pad(y, slope, then_slope, pad)
    if name == "reference":
        return batch_norm_reference(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            residual,
            views=views,
            momentum=momentum,
            eps=eps,
            slope=slope,
            then_slope=then_slope,
            pad=pad,
        )
    x = x.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    arguments = x, residual, weight.contiguous(), bias.contiguous(), running_mean, running_var
    options = views, momentum, eps, slope, then_slope, pad
    if group is None:
        y, activated = BatchNorm.apply(*arguments, *options)
    else:
        y, activated = batch_norm_distributed.TritonBatchNorm.apply(*arguments, *options, group)
    return y if then_slope is None else (y, activated)


class BatchNorm(torch.autograd.Function):
    """x and residual [views·B, C, H, W] in channels_last, weight and bias [C] -> y and LeakyReLU(y) or an empty one."""

    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, running_mean, running_var, views, momentum, eps, slope, then_slope, pad
    ) -> tuple[Tensor, Tensor]:
        detached = [None if part is None else part.detach() for part in (x, residual, weight, bias)]
        y, activated, h, saved = OPERATOR(
            *detached, running_mean, running_var, views, momentum, eps, slope, then_slope, pad
        )
        ctx.save_for_backward(x if residual is None else h, saved, weight, bias)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.options = (views, slope, then_slope, pad)
        if then_slope is None:
            ctx.mark_non_differentiable(activated)
        return y, activated

    @staticmethod
    @of_kernel("batch_norm")
    def backward(ctx, grad_y: Tensor, grad_activated: Tensor):
        h, saved, weight, bias = ctx.saved_tensors
        views, slope, then_slope, pad = ctx.options
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        second = None if then_slope is None else grad_activated.contiguous(memory_format=torch.channels_last)
        grad_h, grad_weight, grad_bias = BACKWARD_OPERATOR(
            grad_y, second, h, saved, weight, bias, views, slope, then_slope, pad
        )
        of_residual = None if ctx.residual_dtype is None else grad_h.to(ctx.residual_dtype)
        return grad_h, of_residual, grad_weight, grad_bias, *[None] * 8


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    views: int,
    slope: float,
    then_slope: float | None,
    pad: bool,
    least: int,
) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"batch_norm: x is [N, C, H, W], floating point; got {list(x.shape)}, {x.dtype}")
    N, C, H, W = x.shape
    if views < 1 or N % views:
        raise ValueError(f"batch_norm: N is a multiple of views >= 1; got N = {N}, views = {views}")
    if C < 1:
        raise ValueError(f"batch_norm: x has 1 channel or more; got {list(x.shape)}")
    if N // views * H * W < least:
        raise ValueError(
            f"batch_norm: a channel of a view has 2 values or more; got {list(x.shape)} with views = {views}"
        )
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None and list(vector.shape) != [C]:
            raise ValueError(f"batch_norm: {name} is [C] = [{C}]; got {list(vector.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("batch_norm: running_mean and running_var are both given, or neither is")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"batch_norm: residual has the shape of x, {list(x.shape)}; got {list(residual.shape)}")
    if slope < 0 or (then_slope is not None and then_slope < 0):
        raise ValueError(f"batch_norm: slopes are at least 0; got {slope} and {then_slope}")
    if pad and then_slope is not None:
        raise ValueError("batch_norm: pad is for one result, without then_slope")
    for name, other in {**vectors, "residual": residual}.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"batch_norm: x is on {x.device} and {name} on {other.device}; they are together")


def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, str | None]:
    """Each implementation, fastest first, with None or the reason why it cannot run on these."""
    double = "float64 input: only the reference has a path for it" if dtype == torch.float64 else None
    return dispatch.table(device, triton=double)


def empty_results(
    x: Tensor, residual: Tensor | None, views: int, then_slope: float | None, pad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, LeakyReLU(y), x + residual and what the backward pass needs; empty where not wanted."""
    N, C, H, W = x.shape
    y = empty(x, N, C, H + 2 * pad, W + 2 * pad)
    activated = x.new_empty(0) if then_slope is None else empty(x, N, C, H, W)
    h = x.new_empty(0) if residual is None else empty(x, N, C, H, W)
    return y, activated, h, x.new_empty(views, 2, C, dtype=torch.float32)


def empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def forward_results(
    x, residual, weight, bias, running_mean, running_var, views, momentum, eps, slope, then_slope, pad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_results(x, residual, views, then_slope, pad)


def backward_results(grad_y, grad_activated, h, saved, weight, bias, *options) -> tuple[Tensor, Tensor, Tensor]:
    return empty(h, *h.shape), torch.empty_like(weight), torch.empty_like(bias)


# x and residual [N, C, H, W] in channels_last -> y as x or padded; LeakyReLU(y) if then_slope is given, else empty;
# x + residual if there is one, else empty; of each view mean and 1 / sqrt(var + eps), [views, 2, C] float32.
OPERATOR = dispatch.operator(
    "batch_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, SymInt views, float momentum, float eps, float slope, float? then_slope, bool pad) -> "
    "(Tensor y, Tensor activated, Tensor h, Tensor saved)",
    forward_results,
    triton=dispatch.triton("batch_norm.batch_norm_triton", fills=forward_results),
)["triton"]
BACKWARD_OPERATOR = dispatch.operator(
    "batch_norm_backward(Tensor grad_y, Tensor? grad_activated, Tensor h, Tensor saved, Tensor weight, "
    "Tensor bias, SymInt views, float slope, float? then_slope, bool pad) -> "
    "(Tensor grad_h, Tensor grad_weight, Tensor grad_bias)",
    backward_results,
    triton=dispatch.triton("batch_norm.batch_norm_backward_triton", fills=backward_results),
)["triton"]
