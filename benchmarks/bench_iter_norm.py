"""iter_norm against PyTorch with autograd: our reference, and the algorithm step by step in batched products.

`pytest benchmarks/ --benchmark-only` times each alone; `python benchmarks/bench_iter_norm.py` lets them take turns and
prints one Markdown table. Expected of ours, for G groups of d channels and T steps, each product of matrices counted
as the half that its symmetry leaves: forward G (3 N d² + 3 (T - 1) d³) FLOPs and backward G (6 N d² + 9 (T - 1) d³),
at half the speed of multiply-adds. Autograd makes no use of the symmetry, and keeps some 3 T matrices a group.
"""

import argparse
from collections.abc import Callable

import pytest
import torch
from common import fma_peak, interleaved, machine, table
from torch import Tensor

from ncfast.ops import iter_norm

SHAPES = [(128, 4096, 64), (256, 2048, 64), (256, 8192, 64)]  # N, D, groups
ITERATIONS, EPS = 5, 1e-5
MODES = ("forward", "forward + backward")
OURS = "ncfast"


def data(N: int, D: int) -> tuple[Tensor, Tensor]:
    """x [N, D] and a gradient of the result [N, D]."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, N, D, generator=generator)
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


def call(peer: Callable, mode: str, N: int, D: int, groups: int) -> Callable[[], Tensor | None]:
    """Runs the peer in that mode; returns the gradient of x, if any."""
    x, gradient = data(N, D)

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


def exact_gradient(N: int, D: int, groups: int) -> Tensor:
    x, gradient = data(N, D)
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(reference(x, groups), x, gradient.double())[0]


def flops(mode: str, N: int, D: int, groups: int) -> float:
    d = D // groups
    forward = groups * (3 * N * d**2 + 3 * (ITERATIONS - 1) * d**3)
    # The backward pass computes the products of the forward pass again.
    backward = groups * (6 * N * d**2 + 9 * (ITERATIONS - 1) * d**3)
    return forward if mode == "forward" else forward + backward


def measure(shape: tuple[int, int, int], mode: str, seconds: float, peak: float | None) -> list[list[str]]:
    """The rows of one shape and mode."""
    N, D, groups = shape
    calls = {name: call(peer, mode, *shape) for name, peer in PEERS.items()}
    errors = {}
    if mode != "forward":
        exact = exact_gradient(*shape)
        errors = {name: f"{(run() - exact).abs().max() / exact.abs().max():.0e}" for name, run in calls.items()}
    times = interleaved(calls, seconds)
    rows = []
    for name, time in times.items():
        rate = flops(mode, *shape) / time * 1e-9
        of_peak = f"{100 * rate / peak:.0f} %" if peak and name == OURS else "-"
        relative = f"{time / times[OURS]:.2f}"
        rows.append(
            [f"{N} x {D} / {groups}, {mode}", name, f"{time * 1e3:.2f}", of_peak, relative, errors.get(name, "-")]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="how long the peers take turns at one shape")
    parser.add_argument("--threads", type=int, help="threads of every peer (default: torch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    peak = fma_peak()
    print(f"iter_norm, {ITERATIONS} steps, float32, on {machine()}; {peak or 0:.0f} GFLOP/s of multiply-adds\n")
    columns = ["N x D / groups", "", "median ms", "of peak", "time / ours", "largest error / largest gradient"]
    print(
        table(columns, [r for shape in SHAPES for mode in MODES for r in measure(shape, mode, options.seconds, peak)])
    )


if __name__ == "__main__":
    main()
