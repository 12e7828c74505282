"""Vectors drawn from a batch, to start codes from: without a host synchronisation, on one process or on many."""

import torch
from torch import Tensor, distributed
from torch.nn import functional as F


def draw_rows(z: Tensor, mask: Tensor | None, num: int, sync: bool) -> tuple[Tensor, Tensor | int, Tensor | None]:
    """`num` vectors of each set in random order, without replacement as far as there are so many.

    Args:
        z: vectors [H, M, D].
        mask: bool [H, M], the vectors that may be drawn; None for all.
        num: how many.
        sync: draw from the vectors of all processes, the same on each. Every process makes the same two all_reduce
            calls, of sizes that do not depend on its own number of vectors.

    Returns:
        rows [H, num, D]; how many of them are distinct vectors, those in front (an int or int64 [H, 1]; what follows
        has no meaning); and, unless that is certainly `num`, uniform random numbers [H, num], the same on each process.
    """
    if sync:
        return draw_rows_of_all_processes(z, mask, num)
    H, M, D = z.shape
    if mask is None:
        # One permutation a set, as vector-quantize-pytorch draws them: the same seed gives the same rows.
        order = torch.stack([torch.randperm(M, device=z.device)[:num] for _ in range(H)])
        available = M
    else:
        order = shuffled(z, mask)[:, :num]
        available = mask.sum(-1, keepdim=True)
    keys = None if mask is None and num <= M else torch.rand(H, num, device=z.device)
    order = F.pad(order, (0, num - order.shape[1]))
    return z.gather(1, order[..., None].expand(-1, -1, D)), available, keys


def draw_rows_of_all_processes(z: Tensor, mask: Tensor | None, num: int) -> tuple[Tensor, Tensor, Tensor]:
    (H, M, D), rank, world = z.shape, distributed.get_rank(), distributed.get_world_size()
    count = z.new_full((H, 1), M, dtype=torch.float64) if mask is None else mask.sum(-1, keepdim=True).double()
    # One message: how many vectors each process has, and random numbers of the first process for all.
    shared = count.new_zeros(H, world + 2 * num + 1)
    shared[:, rank : rank + 1] = count
    if rank == 0:
        shared[:, world:].uniform_()
    distributed.all_reduce(shared)
    counts, offset, keys, order_keys = shared.split([world, 1, num, num], dim=1)
    total, start = counts.sum(-1, keepdim=True), counts[:, :rank].sum(-1, keepdim=True)

    # Evenly spaced over all vectors, each process's own being shuffled, so that no two are the same; then shuffled too.
    slot = torch.arange(num, device=z.device)
    used = total.clamp(min=1, max=num)
    position = ((slot + offset) * (total / used)).floor()  # [H, num]
    position = position.gather(1, (order_keys + (slot >= used)).argsort(-1))
    own = position - start
    mine = (own >= 0) & (own < count)  # [H, num]
    rows = z.new_zeros(H, num, D)
    if M > 0:
        local = shuffled(z, mask).gather(1, own.clamp(0, M - 1).long())
        rows = torch.where(mine[..., None], z.gather(1, local[..., None].expand(-1, -1, D)), 0)
    distributed.all_reduce(rows)
    return rows, total.long(), keys


def shuffled(z: Tensor, mask: Tensor | None) -> Tensor:
    """Indices of the vectors in random order, those not in the mask last. int64 [H, M]."""
    keys = torch.rand(z.shape[:2], device=z.device)
    return (keys if mask is None else keys + ~mask).argsort(-1)


def all_reduce(*tensors: Tensor) -> list[Tensor]:
    """The sums over all processes, as one message."""
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(packed)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
