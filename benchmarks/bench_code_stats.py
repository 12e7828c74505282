"""code_stats against what PyTorch offers: a one-hot matrix product, index_add_ and scatter_add_.

`pytest benchmarks/ --benchmark-only` times each alone; `python benchmarks/bench_code_stats.py` lets them take turns and
prints one Markdown table. Expected of ours: one pass over the vectors and one over the sums, 4 (M + K) D bytes, at the
speed of memory; the one-hot product makes an M x K matrix and 2 M K D FLOPs of the same question.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from common import interleaved, machine, table
from torch import Tensor

from ncfast.ops import code_stats

SHAPES = [  # M, K, D
    (16384, 32, 64),
    (16384, 1024, 64),
    (8192, 16384, 256),
]
OURS = "ncfast"
Stats = tuple[Tensor, Tensor]  # counts [K], sums [K, D]


def data(M: int, K: int, D: int) -> Stats:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, D, generator=generator), torch.randint(0, K, (M,), generator=generator)


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


def measure(shape: tuple[int, int, int], seconds: float) -> list[list[str]]:
    """The rows of one shape."""
    M, K, D = shape
    z, indices = data(*shape)
    calls: dict[str, Callable[[], Stats]] = {
        name: lambda peer=peer: peer(z, indices, K) for name, peer in PEERS.items()
    }
    _, exact = index_add(z.double(), indices, K)
    errors = {name: (call()[1] - exact).abs().max().item() for name, call in calls.items()}
    times = interleaved(calls, seconds)
    return [
        [
            f"{M} x {K} x {D}",
            name,
            f"{time * 1e3:.2f}",
            f"{4 * (M + K) * D / time * 1e-9:.1f}",
            f"{time / times[OURS]:.2f}",
            f"{errors[name]:.0e}",
        ]
        for name, time in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="how long the peers take turns at one shape")
    parser.add_argument("--threads", type=int, help="threads of every peer (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"code_stats, float32, on {machine()}\n")
    columns = ["M x K x D", "", "median ms", "GB/s", "time / ours", "largest error"]
    print(table(columns, [row for shape in SHAPES for row in measure(shape, options.seconds)]))


if __name__ == "__main__":
    main()
