"""Batch norms of a batch that is spread over processes."""

import contextlib
from collections.abc import Iterator

from torch import distributed, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


@contextlib.contextmanager
def synchronised(module: nn.Module, group: distributed.ProcessGroup | None) -> Iterator[None]:
    """Inside the block, what the batch norms of `module` take from a batch in training is of the rows of all processes.

    The group goes again with the block, since a module with one can be neither copied nor saved. None changes nothing.
    VectorQuantize decides for itself: `sync_codebook`.
    """
    norms = [] if group is None else [each for each in module.modules() if isinstance(each, BatchNorm)]
    for norm in norms:
        norm.group = group
    try:
        yield
    finally:
        for norm in norms:
            del norm.group


def group_of(norm: BatchNorm) -> distributed.ProcessGroup | None:
    """Of the block that this runs in."""
    return getattr(norm, "group", None)
