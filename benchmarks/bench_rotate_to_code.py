"""rotate_to_code, with its commitment loss, against plain PyTorch with autograd.

Expected of ours: forward reads z and its codes and writes q, 12 M D bytes; backward reads its gradient, z and q and
writes one, 16 M D; both at the speed of memory. Autograd in PyTorch makes some twenty tensors of M D elements on the
way.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor
from torch.nn import functional as F

from ncfast.ops import rotate_to_code

SHAPES = [(16384, 64), (8192, 256), (65536, 64)]  # M, D
K = 1024
MODES = ("forward", "forward + backward")


def data(M: int, D: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """z [M, D], codebook [K, D], indices [M] and a gradient of the codes [M, D]."""
    generator = torch.Generator().manual_seed(seed)
    z, codebook, gradient = (torch.randn(n, D, generator=generator).to(device) for n in (M, K, M))
    return z.requires_grad_(), codebook, torch.randint(0, K, (M,), generator=generator).to(device), gradient


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


def call(peer: Callable, mode: str, M: int, D: int, device: str = "cpu", seed: int = 0) -> Callable[[], Tensor | None]:
    """Runs the peer in that mode; returns the gradient of z, if any."""
    z, codebook, indices, gradient = data(M, D, device, seed)
    one = torch.ones((), device=device)

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


def exact_gradient(M: int, D: int, device: str) -> Tensor:
    z, codebook, indices, gradient = data(M, D, device)
    z = z.detach().double().requires_grad_()
    outputs = reference(z, codebook, indices)
    return torch.autograd.grad(outputs, z, (gradient.double(), torch.ones_like(outputs[1])))[0]


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for M, D in SHAPES:
        for mode in MODES:
            seeds = range(copies(8 * M * D, device))
            calls = {name: [call(peer, mode, M, D, device, seed) for seed in seeds] for name, peer in PEERS.items()}
            errors = {}
            if mode != "forward":
                exact = exact_gradient(M, D, device)
                size = exact.abs().max()
                errors = {name: ((each[0]() - exact).abs().max() / size).item() for name, each in calls.items()}
            times = timings(calls, seconds, device)
            least_bytes = (12 if mode == "forward" else 28) * M * D
            rates = {name: least_bytes / time.seconds * 1e-9 for name, time in times.items() if time.seconds}
            yield rows(f"{M} x {D}", times, mode, unit="GB/s", error=errors, rate=rates)
