"""The VICReg loss in Triton, by the N x N route; ncfast/ops/triton/gram.py says how."""

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

vicreg_loss_saved_numel = gram_saved_numel


def vicreg_loss_triton(za: Tensor, zb: Tensor, sim: float, var: float, cov: float, eps: float) -> tuple[Tensor, Tensor]:
    """za, zb float32 [N, D], N >= 2, both contiguous -> loss, scalar, and what the backward pass needs."""
    N, D = za.shape
    saved, terms = column_buffers(za)
    with torch.cuda.device_of(za):
        vicreg_kernel[(len(terms),)](za, zb, saved, terms, N, D, sim / (N * D), var / D, cov / D, eps, **COLUMN_BLOCKS)
        loss = gram_loss(za, zb, saved, terms, cov / (D * (N - 1) ** 2), cross=False)
    return loss, saved


def vicreg_loss_backward_triton(
    grad_loss: Tensor, za: Tensor, zb: Tensor, saved: Tensor, sim: float, var: float, cov: float, eps: float
) -> tuple[Tensor, Tensor]:
    return gram_backward(grad_loss, za, zb, saved, cross=False)


@triton.jit
def hinge(square, of_hinge, eps, N):
    """Of a column with sum of squares `square`: of_hinge relu(1 - std), and what z - mean is times in its gradient."""
    std = tl.sqrt(square / (N - 1) + eps)
    slope = tl.where((std < 1) & (std > 0), -of_hinge / ((N - 1) * std), 0.0)
    # A NaN is not below 1 and must not be lost.
    return tl.where(std >= 1, 0.0, of_hinge * (1 - std)), slope


@triton.jit
def store_gradient(saved, view, mean, variance, slope, of_difference, of_covariance, N, d, D):
    """S is the centred z."""
    of_product = 4 * of_covariance / (N - 1)
    store_column(saved, view, MEAN, mean, d, D)
    store_column(saved, view, INVERSE, tl.full(mean.shape, 1.0, tl.float32), d, D)
    store_column(saved, view, OF_PRODUCT, tl.zeros(mean.shape, tl.float32) + of_product / (N - 1), d, D)
    store_column(saved, view, OF_OWN, slope - of_product * variance, d, D)
    store_column(saved, view, OF_DOT, tl.zeros(mean.shape, tl.float32), d, D)
    store_column(saved, view, OF_THIRD, tl.zeros(mean.shape, tl.float32) + 2 * of_difference, d, D)


@triton.jit(do_not_specialize=["N"])
def vicreg_kernel(
    za,  # [N, D]
    zb,  # [N, D]
    saved,  # [2, ROWS, D], ...
    terms,  # [programs], float64
    N,
    D,
    of_difference,  # sim / (N D)
    of_hinge,  # var / D
    of_covariance,  # cov / D
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """terms: the invariance and variance terms, less the squared variances that the energy contains."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean_a, mean_b, square_a, square_b, _, difference = column_moments(za, zb, d, N, D, BLOCK_M, BLOCK_D)
    hinge_a, slope_a = hinge(square_a, of_hinge, eps, N)
    hinge_b, slope_b = hinge(square_b, of_hinge, eps, N)
    variance_a, variance_b = square_a / (N - 1), square_b / (N - 1)
    term = of_difference * difference + hinge_a + hinge_b
    term -= of_covariance * (variance_a * variance_a + variance_b * variance_b)
    tl.store(terms + tl.program_id(0), tl.sum(tl.where(d < D, term, 0.0), axis=0))
    store_gradient(saved, 0, mean_a, variance_a, slope_a, of_difference, of_covariance, N, d, D)
    store_gradient(saved, 1, mean_b, variance_b, slope_b, of_difference, of_covariance, N, d, D)
