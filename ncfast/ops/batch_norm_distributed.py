"""Batch normalisation of a batch that is spread over processes: each normalises its own rows by statistics of all.

Process r holds n_r rows of each view; the numbers may differ, and some may be 0. Every process of the group makes the
same calls in the same order, backward pass included. One message each way: forward count, mean and sum of squared
deviations, so that nothing is a difference of squares (Chan, Golub and LeVeque, Updating formulae and a pairwise
algorithm for computing sample variances, 1979), backward two sums a channel. No synchronisation with the host.

PyTorch's SyncBatchNorm does the same, of one view and on a GPU only. In Triton the kernels are those of one process,
with a third one that makes the message.
"""

import torch
from torch import Tensor, distributed

from ncfast.ops.collectives import gather
from ncfast.ops.gradients import of_kernel

OVER_ROWS = (1, 3, 4)  # of [views, n, C, H, W]: all but view and channel


class BatchNorm(torch.autograd.Function):
    """x [views·n_r, C, H, W] -> y as x, by the statistics of all processes, and the running statistics updated. The
    gradients of weight and bias are this process's share of them, to be added up over processes as those of any
    parameter."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, views, momentum, eps, group) -> Tensor:
        rows = by_view(x, views)
        number, mean, squares = combined(*moments(rows), group)
        scale = (squares / number + eps).rsqrt()  # [views, C]
        y = normalised(rows, mean, scale) * of_channels(weight.to(rows)) + of_channels(bias.to(rows))
        if running_mean is not None:
            variance = squares / (number - 1)
            for view in range(views):
                running_mean.lerp_(mean[view].to(running_mean), momentum)
                running_var.lerp_(variance[view].to(running_var), momentum)
        ctx.save_for_backward(x, weight, number, mean, scale)
        ctx.views, ctx.group = views, group
        return y.flatten(0, 1).to(x.dtype)

    @staticmethod
    @of_kernel("batch_norm over processes")
    def backward(ctx, grad_y: Tensor):
        x, weight, number, mean, scale = ctx.saved_tensors
        rows, grad = by_view(x, ctx.views), by_view(grad_y, ctx.views)
        x_hat = normalised(rows, mean, scale)
        sums = torch.stack([grad.sum(OVER_ROWS), (grad * x_hat).sum(OVER_ROWS)])  # [2, views, C]
        grad_bias, grad_weight = sums.sum(1).to(weight.dtype)
        distributed.all_reduce(sums, group=ctx.group)
        plain, projected = (of_channels(each) for each in sums / number)
        grad_x = (grad - plain - x_hat * projected) * of_channels(scale * weight.to(scale))
        return grad_x.flatten(0, 1).to(x.dtype), grad_weight, grad_bias, *[None] * 6


class TritonBatchNorm(torch.autograd.Function):
    """The same with the neighbours that `ops.batch_norm` has: x and residual in channels_last -> y, and LeakyReLU(y) or
    an empty one."""

    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, running_mean, running_var, views, momentum, eps, slope, then_slope, pad, group
    ) -> tuple[Tensor, Tensor]:
        from ncfast.ops.batch_norm import empty_results
        from ncfast.ops.triton.batch_norm import batch_norm_triton

        results = y, activated, h, saved = empty_results(x, residual, views, then_slope, pad)
        batch_norm_triton(
            *(x, residual, weight, bias, running_mean, running_var, views, momentum, eps, slope, then_slope, pad),
            *results,
            exchange=lambda message: gather(message[None], group),
        )
        ctx.save_for_backward(x if residual is None else h, saved, weight, bias)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.options, ctx.group = (views, slope, then_slope, pad), group
        if then_slope is None:
            ctx.mark_non_differentiable(activated)
        return y, activated

    @staticmethod
    @of_kernel("batch_norm over processes")
    def backward(ctx, grad_y: Tensor, grad_activated: Tensor):
        from ncfast.ops.triton.batch_norm import batch_norm_backward_triton

        h, saved, weight, bias = ctx.saved_tensors
        views, slope, then_slope, pad = ctx.options
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        second = None if then_slope is None else grad_activated.contiguous(memory_format=torch.channels_last)
        gradients = torch.empty_like(h), torch.empty_like(weight), torch.empty_like(bias)
        batch_norm_backward_triton(
            *(grad_y, second, h, saved, weight, bias, views, slope, then_slope, pad),
            *gradients,
            exchange=lambda message: gather(message[None], ctx.group),
        )
        grad_h, grad_weight, grad_bias = gradients
        of_residual = None if ctx.residual_dtype is None else grad_h.to(ctx.residual_dtype)
        return grad_h, of_residual, grad_weight, grad_bias, *[None] * 9


def by_view(x: Tensor, views: int) -> Tensor:
    """x [views·n, C, H, W] -> [views, n, C, H, W], float32 or better."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.unflatten(0, (views, x.shape[0] // views))


def of_channels(values: Tensor) -> Tensor:
    """[C] or [views, C] -> what broadcasts over [views, n, C, H, W]."""
    return values.view(-1, 1, values.shape[-1], 1, 1)


def normalised(rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (rows - of_channels(mean)) * of_channels(scale)


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [views, n, C, H, W] -> values a channel [1]; their mean and sum of squared deviations, [views, C] each."""
    views, n, C, H, W = rows.shape
    number = rows.new_full((1,), n * H * W)
    if rows.numel() == 0:  # a mean of nothing would be NaN
        return number, rows.new_zeros(views, C), rows.new_zeros(views, C)
    variance, mean = torch.var_mean(rows, OVER_ROWS, correction=0)
    return number, mean, variance * number


def combined(
    number: Tensor, mean: Tensor, squares: Tensor, group: distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The `moments` of all processes together, from each one's own."""
    shape = mean.shape
    packed = gather(torch.cat([number, mean.flatten(), squares.flatten()])[None], group)  # [processes, 1 + 2 views C]
    numbers, means, squares = packed.split([1, mean.numel(), mean.numel()], dim=1)
    number = numbers.sum()
    mean = (numbers * means).sum(0) / number
    squares = squares.sum(0) + (numbers * (means - mean).square()).sum(0)
    return number, mean.view(shape), squares.view(shape)
