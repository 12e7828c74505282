"""unmask_step against plain PyTorch: torch.multinomial and topk, and our reference.

Expected of ours: it reads the logits once, 4 B n K bytes, and takes about 45 float64 operations each, so on the CPU and
on GPUs it waits for arithmetic, not for memory. A middle step: half the positions are masked, a quarter stay so; what
is known is not drawn. The reference and multinomial draw all the same.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, copies, rows, timings
from torch import Tensor

from ncfast.ops import unmask_step

SHAPES = [(256, 75, 32), (256, 256, 1024)]  # B, n, K


def data(B: int, n: int, K: int, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Logits [B, n, K], tokens [B, n] of which half are masked, sample [B]."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(B, n, K, generator=generator)
    tokens = torch.randint(0, K, (B, n), generator=generator)
    tokens.scatter_(1, torch.rand(B, n, generator=generator).topk(n // 2).indices, K)
    return logits.to(device), tokens.to(device), torch.arange(B, device=device)


def step(impl: str) -> Callable:
    def run(logits: Tensor, tokens: Tensor, sample: Tensor) -> Tensor:
        options = {"seed": 1, "step": 3, "num_masked": tokens.shape[1] // 4, "choice_temperature": 2.0}
        return unmask_step(logits, tokens, sample, impl=impl, **options)[0]

    return run


def multinomial(logits: Tensor, tokens: Tensor, sample: Tensor) -> Tensor:
    """As NC-VQVAE has it, without its loop over the rows."""
    K = logits.shape[-1]
    p = logits.softmax(-1)
    drawn = torch.multinomial(p.view(-1, K), 1).view_as(tokens)
    masked = tokens == K
    tokens = torch.where(masked, drawn, tokens)
    p = p.gather(-1, tokens[..., None]).squeeze(-1)
    gumbel = -torch.log(-torch.log(torch.rand_like(p).clamp(min=1e-20)))
    confidence = torch.where(masked, torch.log(p + 1e-5) + 2.0 * gumbel, torch.inf)
    return tokens.scatter(1, confidence.topk(tokens.shape[1] // 4, largest=False).indices, K)


PEERS = {OURS: step("auto"), "reference": step("reference"), "multinomial + topk": multinomial}


def call(peer: Callable, shape: tuple[int, int, int], device: str, seed: int = 0) -> Callable[[], Tensor]:
    given = data(*shape, device, seed)
    return lambda: peer(*given)


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_unmask_step(benchmark, shape, peer):
    benchmark.group = f"unmask_step B={shape[0]} n={shape[1]} K={shape[2]}"
    benchmark(call(PEERS[peer], shape, "cpu"))


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    for shape in SHAPES:
        B, n, K = shape
        seeds = range(copies(4 * B * n * K, device))
        calls = {name: [call(peer, shape, device, seed) for seed in seeds] for name, peer in PEERS.items()}
        yield rows(f"{B} x {n} x {K}", timings(calls, seconds, device))
