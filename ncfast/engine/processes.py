"""Several processes that train one model: each computes a slice of every batch's rows.

The batch is that of one process, and so is what comes of it, up to rounding: every process draws the random numbers of
the whole batch, statistics are of all its rows (`nn.synchronised`), and the loss is the mean of the processes' losses,
each multiplied by its `loss_weight`. What is cheaper to compute than to send, each process computes from all rows
(`all_rows`). All hold the same weights and take the same steps; the first one writes and shows.

Tensors travel by the default group: NCCL between GPUs, so that a step with its messages can be one CUDA graph, gloo
between CPUs. Other values travel by gloo.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ncfast.errors import UserError
from ncfast.ops.collectives import GatheredRows

if distributed.is_available():
    # Defaults of its functions are the default group of when it is imported, which they keep: before there is one.
    import torch.distributed.nn.functional

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    No group is kept here: an object like this lives on in the frames of an error, and with it the group, beyond
    `destroy_process_group`. Its threads let go of their tensors with Python's lock held, and one that asks for it while
    Python ends aborts the process.

    Attributes:
        rank: its number, counted from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """Of all of them; None of one process alone, for which nothing below sends anything."""
        return None if self.is_alone else distributed.group.WORLD

    @property
    def values(self) -> distributed.ProcessGroup | None:
        """The group by which `gathered` sends."""
        return None if self.is_alone else _twins.get(self.group, self.group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    def local_slice(self, rows: int) -> slice:
        """This process's rows of a batch: slices differ by one row at most, and some are empty of fewer than `size`."""
        return slice(self.rank * rows // self.size, (self.rank + 1) * rows // self.size)

    def loss_weight(self, rows: int) -> float:
        """This process's number of rows over the processes' mean number.

        With means over rows weighted so, the mean of the processes' losses is the loss of the batch.
        """
        own = self.local_slice(rows)
        return (own.stop - own.start) * self.size / rows

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites each by its mean over the processes, in one message.

        For gradients DistributedDataParallel would do the same during the backward pass, but only of a module whose
        `forward` makes the loss, where here encoder, decoder and codebook are called apart; and of what is averaged
        here, 2 to 8 MB, there is nothing to hide behind the backward pass.
        """
        packed = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(packed, group=self.group)
        packed /= self.size
        parts = packed.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(like) for part, like in zip(parts, tensors, strict=True)])

    def all_rows(self, own: Tensor, rows: int) -> Tensor:
        """Of a batch of that many rows this process's own [n_r, D] -> all [rows, D], the same on each process.

        With the gradient that `average_` takes: the mean over the processes is that of the whole batch, for what is
        computed alike on all of them from here on.
        """
        slices = (Processes(rank, self.size).local_slice(rows) for rank in range(self.size))
        return GatheredRows.apply(own, [part.stop - part.start for part in slices], self.group, self.size)

    def can_be_captured(self, device: torch.device) -> bool:
        """Whether messages between these devices may be part of a CUDA graph."""
        return self.is_alone or self.group._get_backend(device).name() == "nccl"

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """function() on every process; a UserError on any of them is raised on all, since nobody waits for the others
        in vain then."""
        if self.is_alone:
            return function()
        result, error = None, None
        try:
            result = function()
        except UserError as raised:
            error = str(raised)
        errors = [each for each in self.gathered(error) if each is not None]
        if errors:
            raise UserError(errors[0])
        return result

    def on_rank0(self, function: Callable[[], T]) -> T | None:
        """function() on the first process while the others wait, None on them; errors as of `on_every_rank`."""
        return self.on_every_rank(function if self.is_first else lambda: None)

    def check_alike(self, what: str, value: Any) -> None:
        """Raises UserError on every process unless all have the same value."""
        if not self.is_alone and any(other != value for other in self.gathered(value)):
            raise UserError(f"the processes that train together have different {what}; start all of them alike")

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank. They are pickled: small ones."""
        values = [None] * self.size
        distributed.all_gather_object(values, value, group=self.values)
        return values


ALONE = Processes()
# Of a default group whose backend is not gloo, its twin, as long as the default group lives.
_twins: weakref.WeakKeyDictionary[distributed.ProcessGroup, distributed.ProcessGroup] = weakref.WeakKeyDictionary()


def current_processes() -> Processes:
    """Those of the default process group, where there is one of several. All of them make the first call together."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return ALONE
    world = distributed.group.WORLD
    if distributed.get_backend() != "gloo" and world not in _twins:
        # Pickled values in tensors of a GPU would depend on the current one, and on NCCL being there.
        _twins[world] = distributed.new_group(backend="gloo")
    return Processes(distributed.get_rank(), distributed.get_world_size())
