"""Bidirectional transformer of the prior: pre-norm blocks without dropout (x-transformers' encoder, version 1.27)."""

import torch
from torch import Tensor, nn

from ncfast.ops import masked_attention


class RMSNormFunction(torch.autograd.Function):
    """F.rms_norm with its gradient written out: the composite one takes three times as many passes over x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [..., dim], [dim]
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
        rstd = (mean_square + eps).rsqrt()
        normalised = x * rstd
        ctx.save_for_backward(normalised, rstd, weight)
        return normalised * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalised, rstd, weight = ctx.saved_tensors
        product = grad * normalised
        mean = (product @ weight)[..., None] / grad.shape[-1]
        grad_x = torch.addcmul(grad * weight, normalised, mean, value=-1) * rstd
        return grad_x, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, 1e-12)


class Attention(nn.Module):
    """Multi-head self-attention over all positions, no bias, no mask."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, dim]
        B, S, _ = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.heads, -1)
        return self.out(masked_attention(qkv).reshape(B, S, -1))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, dim: int, heads: int, head_dim: int, ff_mult: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(RMSNorm(dim), Attention(dim, heads, head_dim))
        self.feed_forward = nn.Sequential(
            RMSNorm(dim), nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Linear(ff_mult * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


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

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x) + self.position * self.position_scale
        return self.project_out(self.norm(self.blocks(x)))
