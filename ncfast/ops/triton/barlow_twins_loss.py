"""The Barlow Twins loss in Triton, by the N x N route; ncfast/ops/triton/gram.py says how."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops.triton.gram import (
    COLUMN_BLOCKS,
    INVERSE,
    MEAN,
    OF_DOT,
    OF_OWN,
    OF_PRODUCT,
    OF_THIRD,
    column_buffers,
    column_moments,
    gram_backward,
    gram_loss,
    gram_saved_numel,
    store_column,
)

barlow_twins_loss_saved_numel = gram_saved_numel


def barlow_twins_loss_triton(
    za: Tensor, zb: Tensor, lambd: float, ddof: int, eps: float, eps_std: float, scale: float
) -> tuple[Tensor, Tensor]:
    """za, zb float32 [N, D], N >= 2, both contiguous -> loss, scalar, and what the backward pass needs."""
    N, D = za.shape
    saved, terms = column_buffers(za)
    with torch.cuda.device_of(za):
        barlow_twins_kernel[(len(terms),)](
            za, zb, saved, terms, N, D, N - ddof, lambd, eps, eps_std, scale, 2 * lambd * scale / N**2, **COLUMN_BLOCKS
        )
        loss = gram_loss(za, zb, saved, terms, lambd * scale / N**2, cross=True)
    return loss, saved


def barlow_twins_loss_backward_triton(
    grad_loss: Tensor,
    za: Tensor,
    zb: Tensor,
    saved: Tensor,
    lambd: float,
    ddof: int,
    eps: float,
    eps_std: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return gram_backward(grad_loss, za, zb, saved, cross=True)


@triton.jit
def store_gradient(saved, view, mean, std, inverse, c, degrees, lambd, scale, of_product, N, d, D):
    """With the loss's gradient G = of_product K S + of_c S_other / N in S, that in z is G / s, less what <G, S> takes
    off through the deviation."""
    of_c = scale * (2 * (c - 1) - 2 * lambd * c)
    # Where all rows are equal the deviation is at its minimum: no gradient through it.
    through_std = tl.where(std > 0, 1 / (degrees * std), 0.0)
    store_column(saved, view, MEAN, mean, d, D)
    store_column(saved, view, INVERSE, inverse, d, D)
    store_column(saved, view, OF_PRODUCT, of_product * inverse, d, D)
    store_column(saved, view, OF_OWN, -of_c * c * through_std, d, D)
    store_column(saved, view, OF_DOT, -of_product * through_std, d, D)
    store_column(saved, view, OF_THIRD, of_c / N * inverse, d, D)


@triton.jit(do_not_specialize=["N", "degrees"])
def barlow_twins_kernel(
    za,  # [N, D]
    zb,  # [N, D]
    saved,  # [2, ROWS, D], ...
    terms,  # [programs], float64
    N,
    D,
    degrees,  # N - ddof
    lambd,
    eps,
    eps_std,
    scale,
    of_product,  # 2 lambd scale / N²
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """terms: scale Σ_i [(1 - C_ii)² - lambd C_ii²]."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean_a, mean_b, square_a, square_b, product, _ = column_moments(za, zb, d, N, D, BLOCK_M, BLOCK_D)
    std_a, std_b = tl.sqrt(square_a / degrees + eps), tl.sqrt(square_b / degrees + eps)
    # As S has them, in float32.
    inverse_a, inverse_b = (1 / (std_a + eps_std)).to(tl.float32), (1 / (std_b + eps_std)).to(tl.float32)
    c = product * inverse_a * inverse_b / N
    term = tl.where(d < D, scale * ((1 - c) * (1 - c) - lambd * c * c), 0.0)
    tl.store(terms + tl.program_id(0), tl.sum(term, axis=0))
    store_gradient(saved, 0, mean_a, std_a, inverse_a, c, degrees, lambd, scale, of_product, N, d, D)
    store_gradient(saved, 1, mean_b, std_b, inverse_b, c, degrees, lambd, scale, of_product, N, d, D)
