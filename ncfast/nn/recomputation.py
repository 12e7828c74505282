"""Gradient checkpointing runs a forward pass again in the backward pass; a module that moves then finds its old state.

`torch.utils.checkpoint` drops what a part of a model computes and computes it again when gradients are wanted. What
that part has written in the first pass it must neither read nor write in the second.
"""

import contextlib
import copy
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

MOST_PASSES = 16  # of one module between a forward pass and its backward pass; older ones are forgotten


class Pass(NamedTuple):
    """The state before a forward pass that may be computed again, and some of its input, to know it by."""

    shape: torch.Size
    sample: Tensor
    tensors: dict[str, Tensor | None]
    attributes: dict[str, object]


PASSES: WeakKeyDictionary[nn.Module, deque[Pass]] = WeakKeyDictionary()


def recomputable(state_of: Callable[[nn.Module], nn.Module], attributes: tuple[str, ...]) -> Callable:
    """Decorates a `forward(self, x, ...)`: within a backward pass it sees the state of its first run, and leaves none.

    Args:
        state_of: the module -> its part with the tensors that a forward pass writes; all its own buffers and parameters
            count.
        attributes: names of that part's plain attributes, not tensors, that a forward pass writes.
    """

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def wrapper(self: nn.Module, x: Tensor, *args, **kwargs):
            if torch.compiler.is_compiling():
                return forward(self, x, *args, **kwargs)
            if in_backward_pass():
                context = as_it_was(state_of(self), x)
            else:
                if may_be_recomputed(self):
                    remember(state_of(self), x, attributes)
                context = contextlib.nullcontext()
            with context:
                return forward(self, x, *args, **kwargs)

        return wrapper

    return decorate


def in_backward_pass() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def may_be_recomputed(module: nn.Module) -> bool:
    """Checkpointing hooks what is saved or, in its older way, runs without gradients; else nothing is paid for it."""
    if not torch.is_grad_enabled():
        return module.training and not torch.is_inference_mode_enabled()
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def sample_of(x: Tensor) -> Tensor:
    """64 of the values."""
    values = x.detach().reshape(-1)
    return values[:: max(1, len(values) // 64)].clone()


def own_tensors(module: nn.Module) -> dict[str, Tensor | None]:
    return {**module._parameters, **module._buffers}


def remember(module: nn.Module, x: Tensor, attributes: tuple[str, ...]) -> None:
    tensors = {name: None if each is None else each.detach().clone() for name, each in own_tensors(module).items()}
    passes = PASSES.setdefault(module, deque(maxlen=MOST_PASSES))
    values = {name: copy.copy(getattr(module, name)) for name in attributes}
    passes.append(Pass(x.shape, sample_of(x), tensors, values))


@contextlib.contextmanager
def as_it_was(module: nn.Module, x: Tensor) -> Iterator[None]:
    """The state before the pass over x, and afterwards the present one again.

    Raises:
        RuntimeError: no such pass is remembered.
    """
    passes = [each for each in PASSES.get(module, ()) if each.shape == x.shape]
    if not passes:
        raise RuntimeError(
            f"{type(module).__name__}: expected the input of one of the last {MOST_PASSES} forward passes, as gradient "
            f"checkpointing computes it again; got {list(x.shape)} within a backward pass; keep this module out of the "
            "checkpointed part"
        )
    then = passes[-1]
    if len(passes) > 1:  # a GPU is waited for, with several passes in a step alone
        sample = sample_of(x)
        distances = torch.stack([(each.sample - sample).abs().float().nan_to_num(0.0).sum() for each in passes])
        then = passes[-1 - int(distances.flip(0).argmin())]
    now = {name: getattr(module, name) for name in then.attributes}
    buffers, data = dict(module._buffers), {name: each.data for name, each in module._parameters.items()}
    try:
        for name, each in then.tensors.items():
            each = None if each is None else each.clone()  # it may be computed again once more
            if name in data:
                module._parameters[name].data = each
            else:
                module._buffers[name] = each
        for name, value in then.attributes.items():
            setattr(module, name, copy.copy(value))
        yield
    finally:
        module._buffers.update(buffers)
        for name, each in data.items():
            module._parameters[name].data = each
        for name, value in now.items():
            setattr(module, name, value)
