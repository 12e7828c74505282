"""layer_norm against PyTorch's, as the prior has it: of the tokens' embeddings, to which positions are added, and in
the head, after a GELU (64 series of 76 positions, 64 wide; on a GPU 256 of them, in float32 and in bfloat16).

On a CPU ours is PyTorch's. Expected of ours on a GPU is the time of its reads and writes: of x and y forward, of x and
two gradients backward; below some 10 MB that of the launches, one and two.
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, copies, rows, timings

from ncfast.ops import layer_norm, layer_norm_reference

N, D, EPS = 76, 64, 1e-12
BATCH = {"cpu": 64, "cuda": 256}
KINDS = {"tokens": ("add",), "head": ("gelu",), "alone": ()}
DTYPES = {"cpu": {"float32": torch.float32}, "cuda": {"float32": torch.float32, "bfloat16": torch.bfloat16}}
MODES = ("forward", "forward + backward")
PEERS = {OURS: layer_norm, "PyTorch": layer_norm_reference}


def peers(device: str) -> dict[str, Callable]:
    if device == "cpu":
        return PEERS
    torch._dynamo.reset()  # each case compiles anew, and there is a limit to how often one function may
    return PEERS | {"PyTorch, compiled": torch.compile(layer_norm_reference, dynamic=False)}


def call(
    peer: Callable, kind: str, mode: str, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32
) -> Callable[[], object]:
    generator, B = torch.Generator().manual_seed(seed), BATCH[device]
    x, weight, bias, add, grad_y = (
        torch.randn(shape, generator=generator).to(device) for shape in ((B, N, D), (D,), (D,), (N, D), (B, N, D))
    )
    leaves = [x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    options = {"eps": EPS, "gelu": "gelu" in KINDS[kind]}
    if "add" in KINDS[kind]:
        options["add"] = add.requires_grad_()
        leaves.append(add)
    grad_y = grad_y.to(dtype)

    def forward():
        with torch.no_grad():
            return peer(*leaves[:3], **options)

    def forward_backward():
        return torch.autograd.grad(peer(*leaves[:3], **options), leaves, grad_y)

    return forward if mode == "forward" else forward_backward


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm(benchmark, kind, mode, peer):
    benchmark.group = f"layer_norm, {kind}, {mode}"
    benchmark(call(PEERS[peer], kind, mode))


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for (precision, dtype), kind, mode in itertools.product(DTYPES[device].items(), KINDS, MODES):
        seeds = range(copies(2 * dtype.itemsize * BATCH[device] * N * D, device))
        calls = {
            name: [call(peer, kind, mode, device, seed, dtype) for seed in seeds]
            for name, peer in peers(device).items()
        }
        yield rows(f"{kind}, {BATCH[device]} x {N} x {D}, {precision}", timings(calls, seconds, device), mode)
