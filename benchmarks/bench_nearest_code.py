"""nearest_code against faiss and what PyTorch offers.

`pytest benchmarks/ --benchmark-only` times each alone; `python benchmarks/bench_nearest_code.py` lets them take turns
and prints one Markdown table. Packing the codebook counts for us; building its index does not count for faiss.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from common import fma_peak, interleaved, machine, table
from torch import Tensor

from ncfast.ops import nearest_code, nearest_code_reference

SHAPES = [  # M, K, D
    (16384, 512, 8),
    (16384, 1024, 16),
    (16384, 1024, 32),
    (16384, 32, 64),
    (16384, 1024, 64),
    (16384, 1024, 128),
    (8192, 1024, 256),
    (4096, 16384, 256),
    (1024, 262144, 16),
    (4096, 262144, 16),
]
OURS = "ncfast"
# PyTorch's [M, K] matrices beyond this are made for some rows at a time.
MATRIX_BYTES = 2**30


def data(M: int, K: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(M, D, generator=generator), torch.randn(K, D, generator=generator)


def row_blocks(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
    return z.split(max(1, MATRIX_BYTES // (4 * len(codebook))))


def ours(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: nearest_code(z, codebook)


def reference(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: nearest_code_reference(z[None], codebook[None])[0]


def faiss_flat(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = z.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def cdist_argmin(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cat([torch.cdist(block, codebook).argmin(-1) for block in row_blocks(z, codebook)])


def addmm_argmax(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    def call():
        bias = -0.5 * codebook.square().sum(-1)
        return torch.cat([torch.addmm(bias, block, codebook.T).argmax(-1) for block in row_blocks(z, codebook)])

    return call


PEERS = {
    OURS: ours,
    "faiss-cpu IndexFlatL2": faiss_flat,
    "torch.cdist + argmin": cdist_argmin,
    "torch.addmm + argmax": addmm_argmax,
    "ncfast, reference (float64)": reference,
}


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_nearest_code(benchmark, shape, peer):
    if peer.startswith("faiss"):
        pytest.importorskip("faiss")
    M, K, D = shape
    benchmark.group = f"nearest_code M={M} K={K} D={D}"
    benchmark(PEERS[peer](*data(*shape)))


def measure(shape: tuple[int, int, int], seconds: float) -> list[list[str]]:
    """The rows of one shape; peers that are not installed are left out."""
    M, K, D = shape
    z, codebook = data(*shape)
    calls = {}
    for name, peer in PEERS.items():
        try:
            calls[name] = peer(z, codebook)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}\n")
    exact = reference(z, codebook)()
    differing = {name: int((call() != exact).sum()) for name, call in calls.items()}
    peak = fma_peak()
    times = interleaved(calls, seconds)
    peak = peak and max(peak, fma_peak())
    chunked = " (in blocks of rows)" if len(row_blocks(z, codebook)) > 1 else ""
    rows = []
    for name, time in times.items():
        rate = 2 * M * K * D / time * 1e-9
        rows.append(
            [
                f"{M} x {K} x {D}",
                name + (chunked if name.startswith("torch") else ""),
                f"{time * 1e3:.2f}",
                f"{rate:.1f}",
                f"{100 * rate / peak:.0f}" if peak else "-",
                f"{time / times[OURS]:.2f}",
                str(differing[name]),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="how long the peers take turns at one shape")
    parser.add_argument("--threads", type=int, help="threads of every peer (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"nearest_code, float32, on {machine()}\n")
    columns = ["M x K x D", "", "median ms", "GFLOP/s", "% of FMA peak", "time / ours", "rows off float64's answer"]
    print(table(columns, [row for shape in SHAPES for row in measure(shape, options.seconds)]))


if __name__ == "__main__":
    main()
