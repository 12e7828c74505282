"""fused_linear against PyTorch's layers one after the other, at the layers of the prior.

On a CPU 64 series of 76 positions, float32; on a GPU 256 of them, in bfloat16 and in float32 as TF32.

Expected of ours: 2 M N K operations forward and 6 M N K with the gradients, near the peak of the multiply-adds; PyTorch
adds passes over x and the result for the norm, the GELU and the residual. On a GPU the passes are the time: 2 M (K + N)
bytes of bfloat16, more for residual and GELU, and some three times that with the gradients, at the memory's speed.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import fused_linear

M = 64 * 76
CUDA_M = 256 * 76
LAYERS = {  # N, K, and which of norm, bias, GELU and residual
    "norm, queries keys values": (384, 256, "norm"),
    "attention's output, residual": (256, 128, "residual"),
    "norm, first of feed-forward, GELU": (256, 256, "norm bias gelu"),
    "second of feed-forward, residual": (256, 256, "bias residual"),
}
CUDA_LAYERS = {**LAYERS, "in": (256, 64, ""), "norm, out": (64, 256, "norm")}
PRECISIONS = {"cpu": {"": torch.float32}, "cuda": {"bfloat16": torch.bfloat16, "TF32": torch.float32}}
MODES = ("forward", "forward + backward")


def data(
    layer: str, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], bool]:
    """Arguments of fused_linear, and whether there is a GELU."""
    N, K, parts = CUDA_LAYERS[layer]
    M = row_count(device)
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (M, K), "weight": (N, K)}
    shapes |= {"bias": (N,)} if "bias" in parts else {}
    shapes |= {"norm_weight": (K,)} if "norm" in parts else {}
    shapes |= {"residual": (M, N)} if "residual" in parts else {}
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    tensors["weight"] /= K**0.5
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}, "gelu" in parts


def row_count(device: str) -> int:
    return CUDA_M if device == "cuda" else M


def pytorch(x, weight, bias=None, norm_weight=None, residual=None, *, gelu=False) -> Tensor:
    if norm_weight is not None:
        x = F.rms_norm(x, x.shape[-1:], norm_weight, 1e-12)
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else y + residual


PEERS = {OURS: fused_linear, "PyTorch": pytorch}


def peers(device: str) -> dict[str, Callable]:
    if device == "cpu":
        return PEERS
    torch._dynamo.reset()  # each case compiles anew, and there is a limit to how often one function may
    return PEERS | {"PyTorch, compiled": torch.compile(pytorch, dynamic=False)}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def call(
    peer: Callable, layer: str, mode: str, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    tensors, gelu = data(layer, device, seed, dtype)
    gradient = torch.randn(row_count(device), CUDA_LAYERS[layer][0], device=device, dtype=dtype)

    def forward():
        with torch.no_grad():
            return peer(**tensors, gelu=gelu)

    def forward_backward():
        return torch.autograd.grad(peer(**tensors, gelu=gelu), list(tensors.values()), gradient)

    return forward if mode == "forward" else forward_backward


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
def test_fused_linear(benchmark, layer, mode, peer):
    benchmark.group = f"fused_linear, {layer}, {mode}"
    benchmark(call(PEERS[peer], layer, mode))


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    layers, M = CUDA_LAYERS if device == "cuda" else LAYERS, row_count(device)
    for (precision, dtype), (layer, (N, K, _)) in itertools.product(PRECISIONS[device].items(), layers.items()):
        for mode in MODES:
            with tf32(precision == "TF32"):
                seeds = range(copies(dtype.itemsize * M * (N + K), device))
                calls = {
                    name: [call(peer, layer, mode, device, seed, dtype) for seed in seeds]
                    for name, peer in peers(device).items()
                }
                times = timings(calls, seconds, device)
            flop = (2 if mode == "forward" else 6) * M * N * K
            rates = {name: flop / time.seconds * 1e-9 for name, time in times.items() if time.seconds}
            yield rows(f"{layer}, {precision}" if precision else layer, times, mode, rate=rates)
