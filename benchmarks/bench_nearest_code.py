"""nearest_code against faiss, flash-kmeans and what PyTorch offers.

Packing the codebook counts for us; building its index does not count for faiss.

With `--device cuda` a call is one of several in a CUDA graph, each with its own vectors: the host's time and a warm
cache do not count. Expected of our exact mode on an H100: 65536 x 16384 x 256 is 550 GFLOP of fp16, 0.7 ms at the 800
TFLOP/s of a large product; its reads take 30 µs. At 65536 x 1024 x 64 the products (10 µs), reading z (6 µs), the
maximum of the scores (10 µs) and packing and copying the codebook (6 µs) are of one size: at best 20 to 30 µs.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, Timing, copies, reason, rows, timings
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
CUDA_SHAPES = [
    (65536, 1024, 64),
    (65536, 16384, 256),
    (65536, 32, 64),
    (16384, 1024, 64),
    (65536, 1024, 128),
    (16384, 16384, 8),
    (65536, 8192, 32),
    (4096, 16384, 256),
    (65536, 262144, 16),
]
# PyTorch's [M, K] matrices beyond this are made for some rows at a time.
MATRIX_BYTES = 2**30


def data(M: int, K: int, D: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(rows, D, generator=generator, device=device) for rows in (M, K))


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


def ours_fast(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    return lambda: nearest_code(z, codebook, precision="fast")


def vq_formula(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """As vector-quantize-pytorch computes it."""

    def nearest(block: Tensor) -> Tensor:
        squares = block.square().sum(-1)[:, None] + codebook.square().sum(-1)
        return (-(squares - 2 * block @ codebook.T).clamp(min=0).sqrt()).argmax(-1)

    return lambda: torch.cat([nearest(block) for block in row_blocks(z, codebook)])


def addmm_tf32(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    @contextlib.contextmanager
    def tf32():
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return tf32()(addmm_argmax(z, codebook))


def flash_kmeans(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """As its `predict` calls it: |z|^2 is part of the call."""
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    return lambda: assign(z[None], codebook[None], (z**2).sum(-1)[None])[0].long()


CUDA_PEERS = {
    OURS: ours,
    "ncfast, precision='fast'": ours_fast,
    "flash-kmeans (TF32)": flash_kmeans,
    "torch.cdist + argmin": cdist_argmin,
    "torch.addmm + argmax": addmm_argmax,
    "torch.addmm + argmax, TF32": addmm_tf32,
    "torch, vector-quantize-pytorch's formula": vq_formula,
}
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


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for M, K, D in CUDA_SHAPES if device == "cuda" else SHAPES:
        codebook = data(M, K, D, device)[1]
        # A long call passes over more than a GPU's cache holds anyway.
        repeats = copies(4 * M * D, device) if M * K <= 2**30 else 1
        inputs = [data(M, K, D, device, seed)[0] for seed in range(repeats)]
        chunked = " (in blocks of rows)" if len(row_blocks(inputs[0], codebook)) > 1 else ""
        calls, missing = {}, {}
        for name, peer in (CUDA_PEERS if device == "cuda" else PEERS).items():
            name += chunked if name.startswith("torch") else ""
            try:
                calls[name] = [peer(z, codebook) for z in inputs]
            except ImportError as error:
                missing[name] = Timing(None, reason(error))
        exact = reference(inputs[0], codebook)()
        differing = {}
        for name, each in list(calls.items()):
            try:
                differing[name] = int((each[0]() != exact).sum())
            except Exception as error:  # a peer's compiler may not know this GPU or this torch
                if name == OURS:
                    raise
                missing[name] = Timing(None, reason(error))
                del calls[name]
        del exact
        times = timings(calls, seconds, device)
        rates = {name: 2e-9 * M * K * D / time.seconds for name, time in times.items() if time.seconds}
        yield rows(f"{M} x {K} x {D}", times | missing, error=differing, rate=rates)
