"""Rows of several processes on all of them, with a gradient.

A loss over a batch that is spread over processes is the ordinary loss of the gathered rows: each process computes it
from all rows, as one process would, and takes the gradient of its own.
"""

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.ops.gram import check_views, resolve_route


def gather(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """x [n, ...] of every process, contiguous and of one shape, in order of rank: [processes · n, ...]."""
    gathered = x.new_empty(distributed.get_world_size(group) * x.shape[0], *x.shape[1:])
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # renamed in 2.13
    gather(gathered, x, group=group)
    return gathered


class GatheredRows(torch.autograd.Function):
    """x [n_r, D] of every process -> [Σ n_r, D], in order of rank.

    All processes go on alike from there, so that each has the whole gradient of all rows, and takes that of its own
    without another message, times `factor`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], group: distributed.ProcessGroup, factor: float) -> Tensor:
        ctx.counts, ctx.rank, ctx.factor = counts, distributed.get_rank(group), factor
        longest = max(counts)
        rows = gather(F.pad(x, (0, 0, 0, longest - len(x))).contiguous(), group)  # messages have one size
        if min(counts) == longest:
            return rows
        return torch.cat([part[:count] for part, count in zip(rows.split(longest), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad.split(ctx.counts)[ctx.rank] * ctx.factor, None, None, None


def gathered_views(
    operation: str, za: Tensor, zb: Tensor, group: distributed.ProcessGroup, gradient: str, route: str
) -> tuple[Tensor, Tensor]:
    """The views of all processes of a group [N, D] each, from each one's own [n_r, D], n_r >= 0; float32 or float64.

    The numbers of rows are read on the host. Every process of the group makes the call, passes the same gradient on to
    what it computes from the result, and has views that require gradients on all processes or on none.

    Args:
        operation: for errors.
        gradient: with L the loss of all rows, a process's own rows get W ∂L/∂z_r of W processes ("true"), so that the
            mean over processes that DistributedDataParallel takes is the gradient of the whole batch; or ∂L/∂z_r
            ("official"), 1/W of it after that mean: what facebookresearch/barlowtwins, whose all_reduce of C autograd
            does not see, trains with. (facebookresearch/vicreg: "true".)

    Raises:
        ValueError: views that are not alike; D or precision that differ between processes, or N < 2 (on every process);
            an unknown gradient or route.
    """
    if gradient not in ("true", "official"):
        raise ValueError(f"{operation}: gradient is 'true' or 'official'; got {gradient!r}")
    resolve_route(route, 1, 1)  # a wrong word must not wait for an exchange that the others never join
    za, zb = check_views(operation, za, zb, least=0)
    rank, world = distributed.get_rank(group), distributed.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{operation}: this process is not in group; call it on the members of group alone")
    # What would otherwise hang or mix up rows is exchanged first, so that every process raises the same error.
    shapes = torch.zeros(world, 3, dtype=torch.int64, device=za.device)
    shapes[rank] = torch.tensor([*za.shape, za.itemsize])
    distributed.all_reduce(shapes, group=group)
    counts, dims, itemsizes = shapes.T.tolist()
    if len(set(dims)) > 1:
        raise ValueError(f"{operation}: za and zb have the same D on every process; got D = {dims}")
    if len(set(itemsizes)) > 1:
        raise ValueError(f"{operation}: za and zb are float64 on every process or on none; got both")
    if sum(counts) < 2:
        raise ValueError(
            f"{operation}: statistics over the batch need N >= 2 samples; all processes have {sum(counts)}"
        )
    both = GatheredRows.apply(torch.cat([za, zb], 1), counts, group, world if gradient == "true" else 1)
    return both.chunk(2, 1)
