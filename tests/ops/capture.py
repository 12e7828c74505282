"""What a training or decoding step on a GPU needs of an operation: no wait for the device, and a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor


def replay_of(step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """A CUDA graph of step(), as a function that replays it and returns what it left.

    Checks on the way that step() waits for nothing, and that the graph gives its bits, twice.
    """
    expected = tuple(part.clone() for part in step())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    def replay() -> tuple[Tensor, ...]:
        for part in captured:
            part.detach().fill_(7)
        graph.replay()
        return tuple(part.clone() for part in captured)

    for _ in range(2):
        for ours, theirs in zip(replay(), expected, strict=True):
            assert torch.equal(ours, theirs)
    return replay
