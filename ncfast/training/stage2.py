"""Stage 2: what trains the prior, its masks and its loss (NC-VQVAE; MaskGIT, arXiv 2202.04200)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.engine.precision import computing
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE


class TokenDistribution:
    """Categorical(softmax(-|z - e_k|² / τ)) of every training token by the frozen encoder, drawn each step.

    The encoder never runs in the training loop, and the tokens have the distribution they would have if it did. z is
    what the tokens drawn of coarser levels leave.
    """

    MAX_BYTES = 2**31

    def __init__(
        self,
        model: VQVAE,
        x: Tensor,
        observed: Tensor | None = None,
        temperature: float = 1.0,
        batch_size: int = 256,
    ) -> None:
        """
        Args:
            model: in eval mode.
            x: normalised [N, C, L].
            observed: bool like x, of series with gaps.
            temperature: τ; 0 takes the nearest codes.
            batch_size: rows a forward pass of the encoder.
        """
        self.codebooks = [vq.codebook.double() for vq in model.levels]
        self.temperature = temperature
        # Probabilities are what each step needs; where they would take too much memory, or there are several levels,
        # the latents stand in for them.
        size = 4 * len(x) * model.num_tokens * len(self.codebooks[0])
        self.stores_latents = len(self.codebooks) > 1 or size > self.MAX_BYTES
        blocks = []
        with torch.no_grad(), computing("fp32", x.device):
            for first in range(0, len(x), batch_size):
                rows = slice(first, first + batch_size)
                z = model.encode(model.spectrum(x[rows], None if observed is None else observed[rows]))
                blocks.append(z if self.stores_latents else self.cumulative(z))
        self.stored = torch.cat(blocks)  # [N, n, K], or latents [N, n, D]

    def cumulative(self, z: Tensor, level: int = 0) -> Tensor:
        """Latents [B, n, D] -> cumulative probabilities float32 [B, n, K]."""
        codebook = self.codebooks[level]
        # |z|² is the same for all codes, so it leaves the softmax unchanged.
        scores = 2 * z.double() @ codebook.T - codebook.square().sum(-1)
        # The finer levels make up for a coarse code that is not the nearest.
        temperature = 0 if level else self.temperature
        if temperature != 1:
            scores = scores / max(temperature, 1e-9)
        return scores.softmax(-1).cumsum(-1).float()

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """rows int64 [B] -> tokens [B, levels * n]."""
        if not self.stores_latents:
            return drawn(self.stored[rows], generator)
        residual, tokens = self.stored[rows], []
        for level, codebook in enumerate(self.codebooks):
            token = drawn(self.cumulative(residual, level), generator)
            if level + 1 < len(self.codebooks):
                residual = residual - F.embedding(token, codebook).to(residual)
            tokens.append(token + level * len(codebook) if level else token)
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, 1)


def drawn(cdf: Tensor, generator: torch.Generator) -> Tensor:
    """Cumulative probabilities [B, n, K] -> codes [B, n]."""
    u = torch.rand(cdf.shape[:-1], device=cdf.device, generator=generator)[..., None] * cdf[..., -1:]
    return (cdf <= u).sum(-1).clamp_(max=cdf.shape[-1] - 1)


def random_mask(
    shape: tuple[int, int], masking: str, generator: torch.Generator, device: torch.device, levels: int = 1
) -> Tensor:
    """bool [B, levels * n] of that shape: floor(levels n cos(π t / 2)) random positions of each row, masked or kept;
    t ~ U(0, 1) is one for the batch. No token is masked before all of finer levels."""
    t = torch.rand((), device=device, generator=generator, dtype=torch.float64)
    drawn = torch.floor(shape[1] * torch.cos(0.5 * torch.pi * t))
    order = torch.rand(shape, device=device, generator=generator)
    if levels > 1:
        level = torch.arange(levels, device=device).repeat_interleave(shape[1] // levels)
        order = order + (levels - 1 - level if masking == "masked" else level)
    rank = ranks(order)
    return rank < drawn if masking == "masked" else rank >= drawn


def ranks(x: Tensor) -> Tensor:
    """How many of the same row come before each, equal ones in their order: int64 [..., n] of x [..., n]."""
    if x.device.type == "cpu" or x.shape[-1] > 256:
        return x.argsort(dim=-1, stable=True).argsort(dim=-1)
    # On a GPU a sort is many launches, and so short a row is compared with itself sooner.
    before = x[..., None, :] < x[..., None]
    equal = (x[..., None, :] == x[..., None]).tril(-1)
    return (before | equal).sum(-1)


class Dropout:
    """x / (1 - p) where a coin of probability 1 - p says so, else 0: x is of own rows, coins are drawn for all."""

    def __init__(self, p: float, generator: torch.Generator, num_rows: int, local_slice: slice) -> None:
        self.p, self.generator, self.num_rows, self.local_slice = p, generator, num_rows, local_slice

    def __call__(self, x: Tensor) -> Tensor:
        kept = coins(1 - self.p, (self.num_rows, *x.shape[1:]), self.generator, x)
        return x * kept[self.local_slice] * (1 / (1 - self.p))


def coins(p: float, shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """Zeros and ones of that shape, of the type and on the device of `like`; ones with probability p > 0."""
    if like.device.type != "cpu":
        return like.new_empty(shape).bernoulli_(p, generator=generator)
    # PyTorch's generator takes as long for a number of 64 bits as for one coin, and 16 bits are enough for that.
    n = math.prod(shape)
    numbers = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return (numbers.view(torch.int16)[:n] <= round(p * 2**16) - 2**15 - 1).view(shape).to(like.dtype)


def stage2_losses(
    prior: Prior,
    tokens: Tensor,
    labels: Tensor | None,
    config: Config,
    generator: torch.Generator,
    local_slice: slice = slice(None),
    loss_weight: float = 1.0,
    conditions: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy over all positions of one batch.

    A share `class_dropout` of the series is learned without class and conditions. Of the others with conditions a share
    as large lacks some: each of them, and the class, with probability 1/2; so that each may be left out later.

    Args:
        tokens: [B, n].
        labels: [B], or None.
        local_slice: the rows that this process computes, where a batch is spread over several (`engine.processes`).
            Random numbers are drawn for all rows, so that they do not depend on the number of processes.
        loss_weight: of these rows.
        conditions: float64 [B, k], or None.
    """
    mask = random_mask(tokens.shape, config.masking, generator, tokens.device, config.codebook_levels)
    no_class = torch.full(tokens.shape[:1], prior.num_classes, device=tokens.device)
    if labels is None and conditions is None:
        labels = no_class
    else:
        labels = no_class if labels is None else labels
        dropped = torch.rand(labels.shape, device=labels.device, generator=generator) < config.class_dropout
        if conditions is not None:
            shape = 2 + conditions.shape[1], len(labels)
            u = torch.rand(shape, device=labels.device, generator=generator)
            lost = dropped | ((u[0] < config.class_dropout) & (u[1:] < 0.5))  # [1 + k, B]
            dropped, conditions = lost[0], conditions.masked_fill(lost[1:].T, torch.nan)[local_slice]
        labels = torch.where(dropped, no_class, labels)
    masked, tokens = torch.where(mask, prior.num_codes, tokens)[local_slice], tokens[local_slice]
    drop = None
    if config.prior_dropout > 0:
        drop = Dropout(config.prior_dropout, generator, len(mask), local_slice)
    logits = prior(masked, labels[local_slice], conditions, drop)
    each = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)
    loss = each.mean() if each.numel() else each.sum()
    return {"loss": loss if loss_weight == 1 else loss_weight * loss, "masked_share": mask.float().mean()}
