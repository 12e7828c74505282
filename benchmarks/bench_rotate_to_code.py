"""rotate_to_code, with its commitment loss, against plain PyTorch with autograd.

`pytest benchmarks/ --benchmark-only` times each alone; `python benchmarks/bench_rotate_to_code.py` lets them take turns
and prints one Markdown table. Expected of ours: forward reads z and its codes and writes q, 12 M D bytes; backward
reads its gradient, z and q and writes one, 16 M D; both at the speed of memory. Autograd in PyTorch makes some twenty
tensors of M D elements on the way.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from common import interleaved, machine, table
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import rotate_to_code

SHAPES = [(16384, 64), (8192, 256), (65536, 64)]  # M, D
K = 1024
MODES = ("forward", "forward + backward")
OURS = "ncfast"


def data(M: int, D: int) -> tuple[Tensor, ...]:
    """z [M, D], codebook [K, D], indices [M] and a gradient of the codes [M, D]."""
    generator = torch.Generator().manual_seed(0)
    z, codebook, gradient = (torch.randn(rows, D, generator=generator) for rows in (M, K, M))
    return z.requires_grad_(), codebook, torch.randint(0, K, (M,), generator=generator), gradient


def ours(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_to_code(z, codebook, indices)


def reference(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_to_code(z, codebook, indices, impl="reference")


def outer_products(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """arXiv 2410.06424, section 4.2, as it stands: q = λ (z - 2 w wᵀ z + 2 v uᵀ z)."""
    q = F.embedding(indices, codebook)  # [M, D]
    norm_z, norm_q = (x.norm(dim=-1, keepdim=True).clamp(min=1e-6) for x in (z.detach(), q))
    u, v = z.detach() / norm_z, q / norm_q
    w = F.normalize(u + v, dim=-1, eps=1e-6)
    row = z[:, None]  # [M, 1, D]
    rotated = row - 2 * (row @ w[:, :, None]) @ w[:, None] + 2 * (row @ u[:, :, None]) @ v[:, None]
    return rotated[:, 0] * (norm_q / norm_z), F.mse_loss(z, q)


PEERS = {
    OURS: ours,
    "autograd (reference)": reference,
    "autograd, outer products": outer_products,
}


def call(peer: Callable, mode: str, M: int, D: int) -> Callable[[], Tensor | None]:
    """Runs the peer in that mode; returns the gradient of z, if any."""
    z, codebook, indices, gradient = data(M, D)
    one = torch.ones(())

    def forward():
        with torch.no_grad():
            peer(z, codebook, indices)

    def forward_backward():
        return torch.autograd.grad(peer(z, codebook, indices), z, (gradient, one))[0]

    return forward if mode == "forward" else forward_backward


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rotate_to_code(benchmark, shape, mode, peer):
    benchmark.group = f"rotate_to_code M={shape[0]} D={shape[1]} {mode}"
    benchmark(call(PEERS[peer], mode, *shape))


def exact_gradient(M: int, D: int) -> Tensor:
    z, codebook, indices, gradient = data(M, D)
    z = z.detach().double().requires_grad_()
    outputs = reference(z, codebook, indices)
    return torch.autograd.grad(outputs, z, (gradient.double(), torch.ones_like(outputs[1])))[0]


def measure(shape: tuple[int, int], mode: str, seconds: float) -> list[list[str]]:
    """The rows of one shape and mode."""
    M, D = shape
    calls = {name: call(peer, mode, M, D) for name, peer in PEERS.items()}
    errors = {}
    if mode != "forward":
        exact = exact_gradient(M, D)
        errors = {name: f"{(run() - exact).abs().max() / exact.abs().max():.0e}" for name, run in calls.items()}
    least_bytes = (12 if mode == "forward" else 28) * M * D
    times = interleaved(calls, seconds)
    return [
        [
            f"{M} x {D}, {mode}",
            name,
            f"{time * 1e3:.2f}",
            f"{least_bytes / time * 1e-9:.1f}",
            f"{time / times[OURS]:.2f}",
            errors.get(name, "-"),
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
    print(f"rotate_to_code, K = {K}, float32, on {machine()}\n")
    columns = ["M x D", "", "median ms", "GB/s", "time / ours", "largest error / largest gradient"]
    rows = [row for shape in SHAPES for mode in MODES for row in measure(shape, mode, options.seconds)]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
