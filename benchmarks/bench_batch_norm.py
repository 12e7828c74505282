"""batch_norm with LeakyReLU, residual or padding against PyTorch's own operations, on two views, in channels_last.

Expected of ours on a GPU is the time of its reads and writes: forward two of x and one of y, backward two of x and of
the gradient and one of the result; below some 10 MB that of two launches each.
"""

from collections.abc import Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor

from ncfast.ops import batch_norm

SHAPES = [(256, 64, 5, 15), (256, 64, 5, 125)]  # of one tensor: N, C, H, W
VIEWS, SLOPE = 2, 0.01
KINDS = {  # what surrounds the norm, as in the encoder
    "LeakyReLU": {"slope": SLOPE},
    "LeakyReLU, padded": {"slope": SLOPE, "pad": True},
    "residual, both results": {"residual": True, "then_slope": SLOPE},
}
MODES = ("forward", "forward + backward")


class Call:
    """A peer with data of its own."""

    def __init__(self, impl: str, mode: str, shape: tuple, kind: str, device: str = "cpu", seed: int = 0) -> None:
        options = dict(KINDS[kind])
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(seed)

        def data(*size: int) -> Tensor:
            value = torch.randn(size, generator=generator).to(device)
            return value.to(dtype, memory_format=torch.channels_last) if len(size) == 4 else value

        C = shape[1]
        self.leaves = [data(*shape).requires_grad_(), data(C).requires_grad_(), data(C).requires_grad_()]
        self.running = [data(C), data(C).abs()]
        self.residual = data(*shape).requires_grad_() if options.pop("residual", False) else None
        if self.residual is not None:
            self.leaves.append(self.residual)
        self.options = {**options, "views": VIEWS, "impl": impl}
        self.mode = mode
        results = self.results()
        self.gradients = [data(*y.shape) for y in results]

    def results(self) -> tuple[Tensor, ...]:
        y = batch_norm(*self.leaves[:3], *self.running, self.residual, **self.options)
        return y if isinstance(y, tuple) else (y,)

    def __call__(self) -> Tensor | None:
        if self.mode == "forward":
            with torch.no_grad():
                self.results()
            return None
        return torch.autograd.grad(self.results(), self.leaves, self.gradients)[0]


PEERS = {OURS: "auto", "F.batch_norm a view (reference)": "reference"}


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES[:1], ids=lambda shape: "x".join(map(str, shape)))
def test_batch_norm(benchmark, shape, kind, mode, peer):
    benchmark.group = f"batch_norm {shape} {kind} {mode}"
    benchmark(Call(PEERS[peer], mode, shape, kind))


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for shape in SHAPES:
        size = 2 * torch.Size(shape).numel()
        for kind in KINDS:
            for mode in MODES:
                seeds = range(copies(4 * size, device))
                calls = {
                    name: [Call(impl, mode, shape, kind, device, seed) for seed in seeds]
                    for name, impl in PEERS.items()
                }
                yield rows(f"{' x '.join(map(str, shape))}, {kind}", timings(calls, seconds, device), mode)
