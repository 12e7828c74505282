"""The prior of stage 2: a bidirectional transformer over tokens (MaskGIT, arXiv 2202.04200)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.nn.embedding import embedding
from ncfast.nn.transformer import Transformer
from ncfast.ops import layer_norm


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
        tokens = codebook.detach().clone() if config.embeddings == "learned" else torch.randn(K, D).to(codebook)
        self.token_embedding = nn.Parameter(torch.cat([tokens, torch.randn(1, D).to(tokens)]))  # [K + 1, D]
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

    def forward(self, tokens: Tensor, labels: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """tokens [B, n] in 0..K, labels [B] in 0..C -> logits [B, n, K]. drop: dropout."""
        x = torch.cat([self.embed_classes(labels)[..., None, :], self.embed_tokens(tokens)], dim=-2)  # [B, 1 + n, D]
        return self.predict(self.transformer(x, drop)[..., 1:, :])

    def predict(self, x: Tensor) -> Tensor:
        """What the transformer returns [..., D] -> logits [..., K], float32 or better under any autocast."""
        first, _, norm, last = self.head
        x = apply_layer_norm(norm, first(x), gelu=True, dtype=last.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return last(x)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] in 0..K -> [B, n, D]."""
        return apply_layer_norm(self.norm, embedding(tokens, self.token_embedding), add=self.position_embedding)

    def embed_classes(self, labels: Tensor) -> Tensor:
        """labels [B] in 0..C -> [B, D]."""
        return self.class_embedding(labels)


def apply_layer_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    *,
    add: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(gelu(x + add)) in dtype, x's if None: x [..., n, D], add [n, D]."""
    return layer_norm(x, norm.weight, norm.bias, add=add, eps=norm.eps, gelu=gelu, dtype=dtype)
