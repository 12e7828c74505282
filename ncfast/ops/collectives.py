"""What operations over the processes of a group send, and the gradients of that.

A value that every process has alike and goes on to compute alike has the whole gradient on each of them already
(`Total`); one that each process uses on its own rows gets the sum of what these contribute (`Spread`).
"""

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class Total(torch.autograd.Function):
    """Sum over the processes. They go on alike, so each has the whole gradient of it already."""

    @staticmethod
    def forward(ctx, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad, None


class Spread(torch.autograd.Function):
    """Identity. Each process uses the value on its own rows, so the gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def gather(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """x [n, ...] of every process, contiguous and of one shape, in order of rank: [processes · n, ...]."""
    gathered = x.new_empty(distributed.get_world_size(group) * x.shape[0], *x.shape[1:])
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # renamed in 2.13
    gather(gathered, x, group=group)
    return gathered
