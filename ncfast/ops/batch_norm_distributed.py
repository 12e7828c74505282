"""Batch normalisation of a batch that is spread over processes: each normalises its own rows by statistics of all.

Process r holds n_r rows of each view; the numbers may differ, and some may be 0. Every process of the group makes the
same calls in the same order, backward pass included. One message each way: forward count, mean and sum of squared
deviations, so that nothing is a difference of squares (Chan, Golub and LeVeque, Updating formulae and a pairwise
algorithm for computing sample variances, 1979), backward two sums a channel. No synchronisation with the host.

PyTorch's SyncBatchNorm does the same, of one view and on a GPU only.
"""

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from ncfast.ops.collectives import gather

OVER_ROWS = (1, 3, 4)  # of [views, n, C, H, W]: all but view and channel


def batch_norm_distributed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    group: distributed.ProcessGroup,
    views: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """weight · (x - mean) / sqrt(var + eps) + bias, by mean and variance of the rows of all processes of a group.

    Args:
        x: this process's rows of all views [views·n_r, C, H, W], n_r >= 0, view after view; any float dtype, and a
            channel of a view has 2 values or more on all processes together.
        weight, bias: [C].
        running_mean, running_var: [C] or both None; every process updates its own, to the same values.
        group: the processes; NCCL for CUDA tensors, gloo for CPU tensors.
        views, momentum, eps: as of `batch_norm`.

    Returns:
        y as x, computed in float32 (float64 for float64 input). Differentiable once in x, weight and bias: with l_r the
        loss of process r, the rows get the gradient of Σ l_r. Those of weight and bias are this process's share of it,
        to be added up over processes as those of any parameter.
    """
    y, mean, variance = BatchNorm.apply(x, weight, bias, views, eps, group)
    if running_mean is not None:
        with torch.no_grad():
            for view in range(views):
                running_mean.lerp_(mean[view].to(running_mean), momentum)
                running_var.lerp_(variance[view].to(running_var), momentum)
    return y


class BatchNorm(torch.autograd.Function):
    """x [views·n_r, C, H, W] -> y as x; of each view mean and unbiased variance [views, C], without a gradient."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, views: int, eps: float, group: distributed.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = by_view(x, views)
        number, mean, squares = combined(*moments(rows), group)
        scale = (squares / number + eps).rsqrt()  # [views, C]
        y = normalised(rows, mean, scale) * of_channels(weight.to(rows)) + of_channels(bias.to(rows))
        unbiased = squares / (number - 1)
        ctx.save_for_backward(x, weight, number, mean, scale)
        ctx.views, ctx.group = views, group
        ctx.mark_non_differentiable(mean, unbiased)
        return y.flatten(0, 1).to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, *_):
        x, weight, number, mean, scale = ctx.saved_tensors
        rows, grad = by_view(x, ctx.views), by_view(grad_y, ctx.views)
        x_hat = normalised(rows, mean, scale)
        sums = torch.stack([grad.sum(OVER_ROWS), (grad * x_hat).sum(OVER_ROWS)])  # [2, views, C]
        grad_bias, grad_weight = sums.sum(1).to(weight.dtype)
        distributed.all_reduce(sums, group=ctx.group)
        plain, projected = (of_channels(each) for each in sums / number)
        grad_x = (grad - plain - x_hat * projected) * of_channels(scale * weight.to(scale))
        return grad_x.flatten(0, 1).to(x.dtype), grad_weight, grad_bias, None, None, None


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
