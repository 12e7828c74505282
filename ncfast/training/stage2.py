"""Stage 2: what trains the prior, its masks and its loss (NC-VQVAE; MaskGIT, arXiv 2202.04200)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.engine.precision import computing
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE


class TokenDistribution:
    """Categorical(softmax(-|z - e_k|²)) of every training token by the frozen encoder: computed once, drawn each step.

    The encoder never runs in the training loop, and the tokens have the distribution they would have if it did.
    """

    MAX_BYTES = 2**31

    def __init__(self, model: VQVAE, x: Tensor, batch_size: int = 256) -> None:
        """x [N, C, L], normalised. `model` is in eval mode."""
        self.codebook = model.vq.codebook.double()
        # Probabilities are what each step needs; where they would take too much memory, the latents stand in for them.
        self.stores_latents = 4 * len(x) * model.num_tokens * len(self.codebook) > self.MAX_BYTES
        blocks = []
        with torch.no_grad(), computing("fp32", x.device):
            for block in x.split(batch_size):
                z = model.encode(model.stft(block))
                blocks.append(z if self.stores_latents else self.cumulative(z))
        self.stored = torch.cat(blocks)  # [N, n, K], or latents [N, n, D]

    def cumulative(self, z: Tensor) -> Tensor:
        """Latents [B, n, D] -> cumulative probabilities float32 [B, n, K]."""
        # |z|² is the same for all codes, so it leaves the softmax unchanged.
        scores = 2 * z.double() @ self.codebook.T - self.codebook.square().sum(-1)
        return scores.softmax(-1).cumsum(-1).float()

    def draw(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """rows int64 [B] -> tokens [B, n]."""
        cdf = self.cumulative(self.stored[rows]) if self.stores_latents else self.stored[rows]
        u = torch.rand(cdf.shape[:-1], device=cdf.device, generator=generator)[..., None] * cdf[..., -1:]
        return (cdf <= u).sum(-1).clamp_(max=cdf.shape[-1] - 1)


def random_mask(shape: tuple[int, int], masking: str, generator: torch.Generator, device: torch.device) -> Tensor:
    """bool [B, n] of shape (B, n): floor(n cos(π t / 2)) random positions of each row, masked or kept; t ~ U(0, 1) is
    one for the batch."""
    t = torch.rand((), device=device, generator=generator, dtype=torch.float64)
    drawn = torch.floor(shape[1] * torch.cos(0.5 * torch.pi * t))
    rank = ranks(torch.rand(shape, device=device, generator=generator))
    return rank < drawn if masking == "masked" else rank >= drawn


def ranks(x: Tensor) -> Tensor:
    """How many of the same row come before each, equal ones in their order: int64 [..., n] of x [..., n]."""
    if x.device.type == "cpu" or x.shape[-1] > 256:
        return x.argsort(dim=-1, stable=True).argsort(dim=-1)
    # On a GPU a sort is many launches, and so short a row is compared with itself sooner.
    before = x[..., None, :] < x[..., None]
    equal = (x[..., None, :] == x[..., None]).tril(-1)
    return (before | equal).sum(-1)


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
    mask = random_mask(tokens.shape, config.masking, generator, tokens.device)
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
    logits = prior(masked, labels[local_slice], conditions)
    each = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none").view_as(tokens)
    loss = each.mean() if each.numel() else each.sum()
    return {"loss": loss if loss_weight == 1 else loss_weight * loss, "masked_share": mask.float().mean()}
