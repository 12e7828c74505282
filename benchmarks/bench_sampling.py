"""Sampling at the FordA shape: 75 tokens of 32 codes, 4 layers 256 wide, 10 steps, decoded to series of 500 samples.

The peer is a transcription of the plain sampler: PyTorch's own layers and attention, all positions through all layers
in every step, two passes for a class even at guidance 1, torch.multinomial, and a loop over the rows that masks the
least confident tokens.

Expected of ours, a series: 2.17 MFLOP a token and pass for 76 tokens are 1.65 GFLOP in ten steps; the first step falls
away, the first layer's projections are looked up, and of the last layer three quarters go through masked positions
alone: 1.24 GFLOP are left.
"""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from common import OURS, rows, timings
from torch import Tensor
from torch.nn import functional as F

from ncfast.config import make_config
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE
from ncfast.sampling.maskgit import ChunkDecoder, Sampler, SamplerOptimizations, mask_schedule

LENGTH, TOKENS, CLASSES = 500, 75, 2
KINDS = {  # class of the series, guidance scale
    "unconditional": (CLASSES, 1.0),
    "one class, guidance 1": (0, 1.0),
    "one class, guidance 3": (0, 3.0),
}


class Models:
    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.config = make_config("paper")
        self.vqvae = VQVAE(self.config, 1, LENGTH).eval().to(device)
        codebook = torch.randn(self.config.codebook_size, self.config.dim)
        self.prior = Prior(self.config, codebook, TOKENS, CLASSES).eval().to(device)
        self.device = device


def plain_logits(prior: Prior, tokens: Tensor, labels: Tensor) -> Tensor:
    """The prior as its description reads, by PyTorch's layers."""
    x = prior.norm(F.embedding(tokens, prior.token_embedding) + prior.position_embedding)
    x = torch.cat([prior.class_embedding(labels)[:, None], x], dim=1)
    transformer = prior.transformer
    x = transformer.project_in(x) + transformer.position * transformer.position_scale
    for block in transformer.blocks:
        norm, attention = block.attention
        q, k, v = attention.qkv(F.rms_norm(x, x.shape[-1:], norm.weight, 1e-12)).unflatten(-1, (3, 2, -1)).unbind(2)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + attention.out(out.transpose(1, 2).flatten(2))
        norm, first, gelu, second = block.feed_forward
        x = x + second(gelu(first(F.rms_norm(x, x.shape[-1:], norm.weight, 1e-12))))
    x = transformer.project_out(F.rms_norm(x, x.shape[-1:], transformer.norm.weight, 1e-12))
    return prior.head(x[:, 1:])


@torch.no_grad()
def plain(models: Models, rows: int, label: int, guidance: float) -> Tensor:
    """-> x [rows, 1, 500]"""
    prior, config = models.prior, models.config
    steps, K = config.decoding_steps, config.codebook_size
    labels = torch.full((rows,), label, device=models.device)
    tokens = torch.full((rows, TOKENS), K, device=models.device)
    for step, count in enumerate(mask_schedule(TOKENS, steps)):
        logits = plain_logits(prior, tokens, labels)
        if label < CLASSES:
            without = plain_logits(prior, tokens, torch.full_like(labels, CLASSES))
            logits = without + guidance * (logits - without)
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.view(-1, K), 1).view(rows, TOKENS)
        masked = tokens == K
        tokens = torch.where(masked, drawn, tokens)
        chosen = p.gather(-1, tokens[..., None]).squeeze(-1)
        gumbel = -torch.log(-torch.log(torch.rand_like(chosen).clamp(min=1e-20)))
        temperature = config.choice_temperature * (1 - (step + 1) / steps)
        confidence = torch.where(masked, torch.log(chosen + 1e-5) + temperature * gumbel, torch.inf)
        for row in range(rows):
            tokens[row, confidence[row].topk(count, largest=False).indices] = K
    return models.vqvae.detokenize(tokens)


def ours(
    models: Models,
    rows: int,
    label: int,
    guidance: float,
    savers: SamplerOptimizations | None = None,
    precision: str = "fp32",
) -> Callable:
    """A call that makes `rows` series in chunks, as `generate` does."""
    config = dataclasses.replace(models.config, guidance_scale=guidance)
    chunk = min(rows, 64 if models.device == "cpu" else 1024)
    decoder = ChunkDecoder(models.vqvae, Sampler(models.prior, config, savers, precision=precision), graph=True)
    labels = torch.full((chunk,), label, device=models.device)

    def call() -> None:
        for first in range(0, rows, chunk):
            decoder(labels, torch.arange(first, first + chunk, device=models.device), 0)

    return call


def calls(models: Models, rows: int, label: int, guidance: float, all_savers: bool) -> dict[str, Callable]:
    peers = {OURS: ours(models, rows, label, guidance)}
    if models.device == "cuda":
        for precision in ("tf32", "bf16"):
            peers[f"{OURS}, {precision}"] = ours(models, rows, label, guidance, precision=precision)
    if all_savers:
        for field in dataclasses.fields(SamplerOptimizations):
            savers = SamplerOptimizations(**{field.name: False})
            peers[f"without {field.name}"] = ours(models, rows, label, guidance, savers)
    peers["without any of them"] = ours(models, rows, label, guidance, SamplerOptimizations.none())
    peers["plain sampler"] = lambda: plain(models, rows, label, guidance)
    return peers


@pytest.mark.benchmark(min_rounds=3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", [OURS, "plain sampler"])
def test_sampling(benchmark, kind, peer):
    benchmark.group = f"sampling 64 series, {kind}"
    benchmark(calls(Models("cpu"), 64, *KINDS[kind], False)[peer])


def cases(device: str, seconds: float) -> Iterator[list[dict]]:
    """Called as they are on a GPU: ours brings its own CUDA graph, the plain sampler waits for the GPU."""
    series = 256 if device == "cpu" else 4096
    models = Models(device)
    for kind, (label, guidance) in KINDS.items():
        peers = {name: [call] for name, call in calls(models, series, label, guidance, device == "cpu").items()}
        times = timings(peers, seconds, device, capture=False)
        rates = {name: series / time.seconds for name, time in times.items() if time.seconds}
        yield rows(f"{series} series, {kind}", times, unit="series/s", rate=rates)
