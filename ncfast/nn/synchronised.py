"""Normalisations and losses of a batch that is spread over processes."""

import contextlib
from collections.abc import Iterator

from torch import distributed, nn


@contextlib.contextmanager
def synchronised(module: nn.Module, group: distributed.ProcessGroup | None) -> Iterator[None]:
    """Inside the block, what layers of `module` take from a batch in training is of the rows of all processes.

    Batch norms, and layers that have an attribute `group` (`projector.IterNorm`, `stage1.SelfSupervision`), find it
    there; it goes again with the block, since a module with a process group can be neither copied nor saved. None
    changes nothing. VectorQuantize decides for itself: `sync_codebook`.
    """
    layers = [] if group is None else [each for each in module.modules() if is_synchronised(each)]
    for layer in layers:
        layer.group = group
    try:
        yield
    finally:
        for layer in layers:
            del layer.group


def is_synchronised(layer: nn.Module) -> bool:
    return isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) or hasattr(layer, "group")


def group_of(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> distributed.ProcessGroup | None:
    """Of the block that this runs in."""
    return getattr(norm, "group", None)
