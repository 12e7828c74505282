"""Bidirectional transformer of the prior: pre-norm blocks (x-transformers' encoder, version 1.27)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.ops import fused_linear, masked_attention

Drop = Callable[[Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight. `apply_linear` takes it together with the layer that follows."""

    eps = 1e-12

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def apply_linear(
    layer: nn.Linear,
    x: Tensor,
    norm: RMSNorm | None = None,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    return_x: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """residual + gelu(layer(norm(x))); with return_x also x, for the end of the branch that starts here."""
    norm_weight = None if norm is None else norm.weight
    return fused_linear(
        x, layer.weight, layer.bias, norm_weight, residual, norm_eps=RMSNorm.eps, gelu=gelu, return_x=return_x
    )


class Attention(nn.Module):
    """Multi-head self-attention over all positions, no bias, no mask. `Block` applies the two products around it."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def attend(self, qkv: Tensor) -> Tensor:  # [..., S, 3 H d] -> [..., S, H d]
        packed = qkv.unflatten(-1, (3, self.heads, -1)).flatten(0, -5)  # [B, S, 3, H, d]
        return masked_attention(packed).reshape(*qkv.shape[:-1], qkv.shape[-1] // 3)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(RMSNorm(dim), Attention(dim, heads, head_dim))
        self.feed_forward = nn.Sequential(
            RMSNorm(dim), nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Linear(ff_mult * dim, dim)
        )

    def qkv(self, x: Tensor, *, return_x: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, S, dim] -> queries, keys and values [B, S, 3 H d]; with return_x also x."""
        norm, attention = self.attention
        return apply_linear(attention.qkv, x, norm, return_x=return_x)

    def attention_half(
        self, x: Tensor, qkv: Tensor | None = None, positions: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        """x + attention(norm(x)); arguments as for `forward`."""
        attention = self.attention[1]
        if qkv is None:
            qkv, x = self.qkv(x, return_x=True)
        attended = attention.attend(qkv)
        if positions is not None:
            x, attended = take_positions(x, positions), take_positions(attended, positions)
        return apply_linear(attention.out, attended if drop is None else drop(attended), residual=x)

    def feed_forward_half(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        """x + feed-forward(norm(x))."""
        norm, first, _, second = self.feed_forward
        hidden, x = apply_linear(first, x, norm, gelu=True, return_x=True)
        return apply_linear(second, hidden if drop is None else drop(hidden), residual=x)

    def forward(
        self, x: Tensor, qkv: Tensor | None = None, positions: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        """x [B, S, dim] -> [B, S, dim].

        Args:
            qkv: self.qkv(x), where it is known already.
            positions: int64 [B, m], the positions to return, [B, m, dim]; what follows the attention is computed there
                alone.
            drop: dropout, of what goes into the last product of either half.
        """
        return self.feed_forward_half(self.attention_half(x, qkv, positions, drop), drop)


def take_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [B, S, dim], positions int64 [B, m] -> [B, m, dim]."""
    B, S, dim = x.shape
    rows = positions + S * torch.arange(B, device=x.device)[:, None]
    return F.embedding(rows, x.reshape(B * S, dim))


class Transformer(nn.Module):
    """x [B, S, in_dim] -> [B, S, in_dim], with learned absolute positions for S = length."""

    def __init__(
        self, in_dim: int, dim: int, length: int, layers: int, heads: int, head_dim: int, ff_mult: int = 1
    ) -> None:
        super().__init__()
        self.project_in = nn.Linear(in_dim, dim, bias=False)
        self.position = nn.Parameter(torch.randn(length, dim))
        self.position_scale = dim**-0.5
        self.blocks = nn.Sequential(*[Block(dim, heads, head_dim, ff_mult) for _ in range(layers)])
        self.norm = RMSNorm(dim)
        self.project_out = nn.Linear(dim, in_dim, bias=False)

    def forward(self, x: Tensor, drop: Drop | None = None) -> Tensor:
        x = self.embed(x)
        return self.run(x if drop is None else drop(x), drop=drop)

    def embed(self, x: Tensor) -> Tensor:
        """x [B, S, in_dim] -> what the first block takes [B, S, dim]."""
        return apply_linear(self.project_in, x) + self.position * self.position_scale

    def run(
        self, x: Tensor, qkv: Tensor | None = None, positions: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        """The blocks and what follows them.

        Args:
            x: self.embed of the input [B, S, dim].
            qkv: of the first block [B, S, 3 H d], where it is known already.
            positions: int64 [B, m]: the positions to return [B, m, in_dim]; None returns all.
            drop: dropout in every block.
        """
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, qkv if i == 0 else None, positions if i == last else None, drop)
        return apply_linear(self.project_out, x, self.norm)
