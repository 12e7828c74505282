"""Vector quantisation with a moving-average codebook (van den Oord et al., arXiv 1711.00937, appendix A.1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.ops import code_stats, nearest_code


class Quantized(NamedTuple):
    z_q: Tensor  # [B, n, D], straight-through: the value of the code, the gradient of z
    tokens: Tensor  # int64 [B, n]
    commitment_loss: Tensor  # scalar, float32
    perplexity: Tensor  # scalar: exp of the entropy of this batch's token frequencies


class VectorQuantize(nn.Module):
    """Nearest-code quantisation; in training mode the codebook follows the vectors by EMA.

    Buffers are shaped as in vector-quantize-pytorch: embed [1, K, D], embed_avg [1, K, D], cluster_size [1, K].

    Args:
        dim: D.
        codebook_size: K.
        decay: of the moving averages.
        eps: Laplace smoothing of the cluster sizes.
    """

    def __init__(self, dim: int, codebook_size: int, decay: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay = decay
        self.eps = eps
        embed = torch.randn(1, codebook_size, dim)
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("cluster_size", torch.zeros(1, codebook_size))

    @property
    def codebook(self) -> Tensor:
        """[K, D]."""
        return self.embed[0]

    def forward(self, z: Tensor) -> Quantized:
        """z [B, n, D] -> quantised vectors, tokens, commitment loss and perplexity."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            tokens = nearest_code(z, self.codebook)  # [B, n]
            z_q = F.embedding(tokens, self.codebook)
            commitment_loss = F.mse_loss(z, z_q)
            counts, sums = code_stats(z.flatten(0, -2), tokens.flatten(), self.codebook.shape[0])
            if self.training:
                self.update(counts, sums)
            frequency = counts / counts.sum()
            perplexity = torch.exp(-torch.special.xlogy(frequency, frequency).sum())
            return Quantized(z + (z_q - z).detach(), tokens, commitment_loss, perplexity)

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor) -> None:
        """One EMA step from the batch's counts [K] and sums [K, D]."""
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.cluster_size.shape[-1] * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed[..., None])
