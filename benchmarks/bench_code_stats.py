"""code_stats against what PyTorch offers: a one-hot matrix product, index_add_ and scatter_add_.

Expected of ours: one pass over the vectors and one over the sums, 4 (M + K) D bytes, at the speed of memory; the one-
hot product makes an M x K matrix and 2 M K D FLOPs of the same question.
"""

import functools
from collections.abc import Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor

from ncfast.ops import code_stats

SHAPES = [  # M, K, D
    (16384, 32, 64),
    (16384, 1024, 64),
    (8192, 16384, 256),
]
CUDA_SHAPES = [(65536, 1024, 64), (65536, 16384, 256), *SHAPES]
Stats = tuple[Tensor, Tensor]  # counts [K], sums [K, D]


def data(M: int, K: int, D: int, device: str = "cpu", seed: int = 0) -> Stats:
    generator = torch.Generator().manual_seed(seed)
    z, indices = torch.randn(M, D, generator=generator), torch.randint(0, K, (M,), generator=generator)
    return z.to(device), indices.to(device)


def ours(z: Tensor, indices: Tensor, K: int) -> Stats:
    return code_stats(z, indices, K)


def one_hot(z: Tensor, indices: Tensor, K: int) -> Stats:
    hot = z.new_zeros(len(z), K).scatter_(1, indices[:, None], 1.0)  # [M, K]
    return hot.sum(0), hot.T @ z


def index_add(z: Tensor, indices: Tensor, K: int) -> Stats:
    counts = z.new_zeros(K).index_add_(0, indices, z.new_ones(len(z)))
    return counts, z.new_zeros(K, z.shape[1]).index_add_(0, indices, z)


def scatter_add(z: Tensor, indices: Tensor, K: int) -> Stats:
    counts = z.new_zeros(K).scatter_add_(0, indices, z.new_ones(len(z)))
    return counts, z.new_zeros(K, z.shape[1]).scatter_add_(0, indices[:, None].expand_as(z), z)


PEERS = {
    OURS: ours,
    "one-hot matrix product": one_hot,
    "index_add_": index_add,
    "scatter_add_": scatter_add,
}


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_code_stats(benchmark, shape, peer):
    M, K, D = shape
    benchmark.group = f"code_stats M={M} K={K} D={D}"
    benchmark(PEERS[peer], *data(*shape), K)


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for M, K, D in SHAPES if device == "cpu" else CUDA_SHAPES:
        inputs = [data(M, K, D, device, seed) for seed in range(copies(4 * M * D, device))]
        calls = {
            name: [functools.partial(peer, z, indices, K) for z, indices in inputs] for name, peer in PEERS.items()
        }
        z, indices = inputs[0]
        _, exact = index_add(z.double(), indices, K)
        errors = {name: (each[0]()[1] - exact).abs().max().item() for name, each in calls.items()}
        times = timings(calls, seconds, device)
        rates = {name: 4e-9 * (M + K) * D / time.seconds for name, time in times.items() if time.seconds}
        yield rows(f"{M} x {K} x {D}", times, unit="GB/s", error=errors, rate=rates)
