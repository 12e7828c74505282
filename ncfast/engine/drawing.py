"""Random numbers from a generator of one's own, for what takes no generator: torch's own are shared by all threads."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = {torch.rand, torch.randn, torch.randint, torch.randperm, Tensor.uniform_, Tensor.normal_}


class DrawingFrom(TorchFunctionMode):
    """Inside the block, in this thread, what names no generator draws from this one, the same numbers that torch's own
    would give from that seed."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        # The functions of torch.nn.init come with all their arguments.
        if (function in DRAWS or "generator" in options) and options.get("generator") is None:
            options = {**options, "generator": self.generator}
        return function(*arguments, **options)
