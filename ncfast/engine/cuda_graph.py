"""Functions of tensors as CUDA graphs: one launch for all kernels of a call."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ncfast.engine.device import current

# Graphs that nobody needs any more. PyTorch keeps a list of all, which a thread that captures writes to, so that no
# other may take a graph away at that moment, least of all where Python happens to collect it.
RETIRED: list[Any] = []


class CudaGraph:
    """Captures a function once and replays it: one launch for all its kernels.

    The function must do the same work every time: fixed shapes, no host synchronisation, random numbers from
    `generators` alone. What it returns is overwritten by the next call. Where there are other threads, it is made
    inside `engine.precision.computing`.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __init__(
        self,
        function: Callable[..., Any],
        *inputs: Tensor,
        warm_ups: int = 2,
        generators: Sequence[torch.Generator] = (),
        device: torch.device | str | None = None,
    ) -> None:
        """
        Args:
            inputs: examples on one GPU, which need not be the current one; later ones have the same shapes and types.
            warm_ups: calls before the capture, which itself computes nothing. 0 for a function that changes its
                surroundings, and that the caller has called on `capture_stream` before.
            device: of a function without inputs.
            generators: a replay draws from them what a call would.

        Raises:
            RuntimeError: the function cannot be captured. A generator cannot be used after that.
        """
        self.inputs = [value.clone() for value in inputs]
        device = inputs[0].device if inputs else torch.empty(0, device=device).device
        stream = capture_stream(device)
        with current(device):
            # Lazily made handles, workspaces and compiled kernels must be there before the capture.
            with on_stream(stream):
                for _ in range(warm_ups):
                    function(*self.inputs)
            self.graph = torch.cuda.CUDAGraph()
            for generator in generators:
                self.graph.register_generator_state(generator)
            # Other threads, which train or watch over NCCL, may go on with what a capture forbids.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
            # Where a capture begins, it sets the counters of the generators on its stream, and each replay sets them on
            # the current one: a replay that overtook the capture would draw the numbers of another step.
            torch.cuda.current_stream(device).wait_stream(stream)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value)
        self.graph.replay()
        return self.outputs

    def __del__(self) -> None:
        RETIRED.append(self.graph)


class on_stream:
    """Work inside comes after what the current stream holds, and what that stream is given later comes after it."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self.context = torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(self.outer)
        self.context.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.context.__exit__(*exception)
        self.outer.wait_stream(self.stream)


OF_THREAD = threading.local()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's stream of warm-ups and captures on a GPU. One for all of them, since gradients of a tensor stay on
    the stream of the first; not that of other threads, since products captured on one stream share a workspace."""
    streams = OF_THREAD.__dict__
    if device.index not in streams:
        streams[device.index] = torch.cuda.Stream(device)
    return streams[device.index]
