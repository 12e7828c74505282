"""Stage 2: a MaskGIT prior over stage-1 tokens, and iterative decoding (NC-VQVAE; MaskGIT, arXiv 2202.04200)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.config import Config
from ncfast.nn.transformer import Transformer
from ncfast.ops import unmask_step
from ncfast.stage1 import VQVAE


class Prior(nn.Module):
    """Logits of every token given the unmasked ones and a class.

    Token id K is the mask; class id C is "no class".
    """

    def __init__(self, config: Config, codebook: Tensor, num_tokens: int, num_classes: int) -> None:
        """codebook: of stage 1 [K, D]; the token embeddings start there unless config.embeddings is "random"."""
        super().__init__()
        K, D = codebook.shape
        self.num_codes = K
        self.num_tokens = num_tokens
        self.num_classes = num_classes
        tokens = codebook.detach().clone() if config.embeddings == "learned" else torch.randn(K, D)
        self.token_embedding = nn.Parameter(torch.cat([tokens, torch.randn(1, D)]))  # [K + 1, D]
        self.position_embedding = nn.Parameter(torch.randn(num_tokens, D))
        self.norm = nn.LayerNorm(D, eps=1e-12)
        self.class_embedding = nn.Embedding(num_classes + 1, D)
        self.transformer = Transformer(
            D,
            config.prior_dim,
            num_tokens + 1,
            config.prior_layers,
            config.prior_heads,
            config.prior_head_dim,
            config.prior_ff_mult,
        )
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12), nn.Linear(D, K))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens [B, n] in 0..K, labels [B] in 0..C -> logits [B, n, K]."""
        x = self.norm(F.embedding(tokens, self.token_embedding) + self.position_embedding)
        x = torch.cat([self.class_embedding(labels)[:, None], x], dim=1)  # [B, 1 + n, D]
        return self.head(self.transformer(x)[:, 1:])

    def guided_logits(self, tokens: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """u + s (c - u): c with the label, u without. One pass when they are the same thing."""
        if guidance_scale == 1 or self.num_classes == 0:
            return self(tokens, labels)
        both = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        conditional, unconditional = self(tokens.repeat(2, 1), both).chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)


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
        with torch.no_grad():
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
    """bool [B, n]: floor(n cos(π t / 2)) random positions of each row, one t ~ U(0, 1) a batch, masked or kept."""
    B, n = shape
    t = torch.rand((), device=device, generator=generator, dtype=torch.float64)
    drawn = torch.floor(n * torch.cos(0.5 * torch.pi * t))
    rank = torch.rand(B, n, device=device, generator=generator).argsort(1).argsort(1)
    return rank < drawn if masking == "masked" else rank >= drawn


def stage2_losses(
    prior: Prior, tokens: Tensor, labels: Tensor | None, config: Config, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cross-entropy over all positions of one batch.  tokens [B, n], labels [B] or None."""
    mask = random_mask(tuple(tokens.shape), config.masking, generator, tokens.device)
    no_class = torch.full(tokens.shape[:1], prior.num_classes, device=tokens.device)
    if labels is None:
        labels = no_class
    else:
        dropped = torch.rand(labels.shape, device=labels.device, generator=generator) < config.class_dropout
        labels = torch.where(dropped, no_class, labels)
    logits = prior(torch.where(mask, prior.num_codes, tokens), labels)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    return {"loss": loss, "masked_share": mask.float().mean()}


def mask_schedule(num_tokens: int, steps: int) -> list[int]:
    """How many tokens stay masked after each step: floor(n cos(π/2 · (t + 1) / T)), 0 after the last."""
    counts = [math.floor(num_tokens * math.cos(0.5 * math.pi * (t + 1) / steps)) for t in range(steps)]
    return [*counts[:-1], 0]


@torch.no_grad()
def decode_iteratively(
    prior: Prior,
    labels: Tensor,
    sample: Tensor,
    *,
    seed: int,
    steps: int,
    choice_temperature: float,
    guidance_scale: float,
) -> Tensor:
    """Tokens of new series, from all-masked in `steps` steps.

    Args:
        labels: class of each row, int64 [B] in 0..C; C is "no class".
        sample: global index of each row, int64 [B]; with the seed it decides the row's random numbers.

    Returns:
        int64 [B, n] in 0..K-1.
    """
    tokens = torch.full((labels.shape[0], prior.num_tokens), prior.num_codes, device=labels.device)
    for step, num_masked in enumerate(mask_schedule(prior.num_tokens, steps)):
        tokens = unmask_step(
            prior.guided_logits(tokens, labels, guidance_scale),
            tokens,
            sample,
            seed=seed,
            step=step,
            num_masked=num_masked,
            choice_temperature=choice_temperature * (1 - (step + 1) / steps),
        )
    return tokens
