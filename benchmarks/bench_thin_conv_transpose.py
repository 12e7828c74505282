"""thin_conv_transpose against cuDNN's or oneDNN's transposed convolution, as the last layer of a decoder.

Expected of ours on a GPU is the time of its launches, one forward and three backward: what it reads and writes is a few
MB.
"""

from collections.abc import Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import thin_conv_transpose

SHAPES = [  # B, groups, channels of a group (in and out), H, W
    (256, 1, 2, 5, 120),
    (256, 4, 2, 5, 120),
    (256, 1, 4, 5, 240),
    (256, 1, 6, 5, 240),
]
MODES = ("forward", "forward + backward")


class Call:
    """A peer with data of its own: x in bfloat16 and channels_last on a GPU, as autocast leaves it."""

    def __init__(self, peer: str, mode: str, shape: tuple, device: str = "cpu", seed: int = 0) -> None:
        B, self.groups, C, H, W = shape
        generator = torch.Generator().manual_seed(seed)

        def data(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        x = data(B, self.groups * C, H, W)
        if device == "cuda":
            x = x.to(torch.bfloat16, memory_format=torch.channels_last)
        parameters = (data(self.groups * C, C, 3, 4), data(self.groups * C))
        self.leaves = [part.requires_grad_() for part in (x, *parameters)]
        self.peer, self.mode, self.device = peer, mode, device
        with torch.no_grad():
            self.gradient = torch.randn_like(self.result())

    def result(self) -> Tensor:
        if self.peer != AUTOCAST:
            return thin_conv_transpose(*self.leaves, groups=self.groups, impl=PEERS[self.peer])
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return F.conv_transpose2d(*self.leaves, (1, 2), (1, 1), groups=self.groups)

    def __call__(self) -> Tensor | None:
        if self.mode == "forward":
            with torch.no_grad():
                self.result()
            return None
        return torch.autograd.grad(self.result(), self.leaves, self.gradient)[0]


AUTOCAST = "F.conv_transpose2d, on a GPU in bfloat16"
PEERS = {OURS: "auto", "F.conv_transpose2d in float32 (reference)": "reference", AUTOCAST: None}


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=lambda shape: "x".join(map(str, shape)))
def test_thin_conv_transpose(benchmark, shape, mode, peer):
    benchmark.group = f"thin_conv_transpose {shape} {mode}"
    benchmark(Call(peer, mode, shape))


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for shape in SHAPES:
        size = 4 * torch.Size(shape).numel()  # bytes of x in float32; y is twice as many
        for mode in MODES:
            seeds = range(copies(5 * size, device))
            calls = {name: [Call(name, mode, shape, device, seed) for seed in seeds] for name in PEERS}
            yield rows(" x ".join(map(str, shape)), timings(calls, seconds, device), mode)
