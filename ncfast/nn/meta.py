"""Modules without memory, for their sizes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """What is made inside the block is on the meta device: it has a shape and no numbers."""
    with torch.device("meta"), Shapes():
        yield


class Shapes(TorchFunctionMode):
    """Does itself what PyTorch does in Python of the meta device. For that it would import its compiler and SymPy, for
    a second or more."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.randn:
            return torch.empty(args)
        if function is torch.cat:
            first, *others = args[0]
            return first.new_empty(len(first) + sum(map(len, others)), *first.shape[1:])
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))
