"""Rows of a table, with a gradient that is the same bits every time."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ncfast.ops import code_stats


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of a table: ids [...] of table [K, D] -> [..., D]."""
    # On a GPU PyTorch adds up the gradients of a row in no fixed order.
    return TakeRows.apply(ids, table) if table.device.type == "cuda" else F.embedding(ids, table)


class TakeRows(torch.autograd.Function):
    """ids [...], table [K, D] -> [..., D]. The gradient of a row is the sum over its places: `code_stats`."""

    @staticmethod
    def forward(ctx, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows = len(table)
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        _, sums = code_stats(grad.flatten(0, -2), ids.flatten(), ctx.num_rows)
        return None, sums.to(grad.dtype)
