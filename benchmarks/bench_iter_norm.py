"""iter_norm against PyTorch with autograd: our reference, and the algorithm step by step in batched products.

Expected of ours, for G groups of d channels and T steps, each product of matrices counted as the half that its symmetry
leaves: forward G (3 N d² + 3 (T - 1) d³) FLOPs and backward G (6 N d² + 9 (T - 1) d³), at half the speed of multiply-
adds. Autograd makes no use of the symmetry, and keeps some 3 T matrices a group.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor

from ncfast.ops import iter_norm

SHAPES = [(128, 4096, 64), (256, 2048, 64), (256, 8192, 64)]  # N, D, groups
ITERATIONS, EPS = 5, 1e-5
MODES = ("forward", "forward + backward")


def data(N: int, D: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [N, D] and a gradient of the result [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    x, gradient = torch.randn(2, N, D, generator=generator).to(device)
    return x.requires_grad_(), gradient


def ours(x: Tensor, groups: int) -> Tensor:
    return iter_norm(x, groups=groups, iterations=ITERATIONS, eps=EPS)


def reference(x: Tensor, groups: int) -> Tensor:
    return iter_norm(x, groups=groups, iterations=ITERATIONS, eps=EPS, impl="reference")


def step_by_step(x: Tensor, groups: int) -> Tensor:
    """arXiv 1904.03441, algorithm 1, in torch.bmm: P' = 1.5 P - 0.5 P³ S."""
    N, D = x.shape
    d = D // groups
    rows = x.T.reshape(groups, d, N)
    centred = rows - rows.mean(-1, keepdim=True)
    identity = torch.eye(d, dtype=x.dtype, device=x.device).expand(groups, d, d)
    covariance = torch.baddbmm(identity, centred, centred.transpose(1, 2), beta=EPS, alpha=1 / N)
    inverse_trace = (covariance * identity).sum((1, 2), keepdim=True).reciprocal()
    scaled = covariance * inverse_trace
    P = identity
    for _ in range(ITERATIONS):
        P = torch.baddbmm(P, torch.bmm(torch.bmm(P, P), P), scaled, beta=1.5, alpha=-0.5)
    return torch.bmm(P * inverse_trace.sqrt(), centred).reshape(D, N).T


PEERS = {
    OURS: ours,
    "autograd (reference)": reference,
    "autograd, step by step": step_by_step,
}


def call(
    peer: Callable, mode: str, N: int, D: int, groups: int, device: str = "cpu", seed: int = 0
) -> Callable[[], Tensor | None]:
    """Runs the peer in that mode; returns the gradient of x, if any."""
    x, gradient = data(N, D, device, seed)

    def forward():
        with torch.no_grad():
            peer(x, groups)

    def forward_backward():
        return torch.autograd.grad(peer(x, groups), x, gradient)[0]

    return forward if mode == "forward" else forward_backward


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_iter_norm(benchmark, shape, mode, peer):
    benchmark.group = f"iter_norm N={shape[0]} D={shape[1]} groups={shape[2]} {mode}"
    benchmark(call(PEERS[peer], mode, *shape))


def exact_gradient(N: int, D: int, groups: int, device: str) -> Tensor:
    x, gradient = data(N, D, device)
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(reference(x, groups), x, gradient.double())[0]


def flops(mode: str, N: int, D: int, groups: int) -> float:
    d = D // groups
    forward = groups * (3 * N * d**2 + 3 * (ITERATIONS - 1) * d**3)
    # The backward pass computes the products of the forward pass again.
    backward = groups * (6 * N * d**2 + 9 * (ITERATIONS - 1) * d**3)
    return forward if mode == "forward" else forward + backward


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for shape in SHAPES:
        N, D, groups = shape
        for mode in MODES:
            seeds = range(copies(8 * N * D, device))
            calls = {name: [call(peer, mode, *shape, device, seed) for seed in seeds] for name, peer in PEERS.items()}
            errors = {}
            if mode != "forward":
                exact = exact_gradient(*shape, device)
                size = exact.abs().max()
                errors = {name: ((each[0]() - exact).abs().max() / size).item() for name, each in calls.items()}
            times = timings(calls, seconds, device)
            rates = {name: flops(mode, *shape) / time.seconds * 1e-9 for name, time in times.items() if time.seconds}
            yield rows(f"{N} x {D} / {groups}", times, mode, error=errors, rate=rates)
