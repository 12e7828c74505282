"""A function of tensors as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class CudaGraph:
    """Captures a function once and replays it: one launch for all its kernels.

    The function must do the same work every time: fixed shapes, no host synchronisation, no random generator. What it
    returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor) -> None:
        """inputs: examples on the GPU; later ones have the same shapes and types.

        Raises:
            RuntimeError: the function cannot be captured.
        """
        self.inputs = [value.clone() for value in inputs]
        # Lazily made handles, workspaces and compiled kernels must be there before the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.outputs
