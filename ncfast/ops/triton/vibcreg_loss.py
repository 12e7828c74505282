"""The VIbCReg loss in Triton, by the N x N route; ncfast/ops/triton/gram.py says how."""

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
from ncfast.ops.triton.vicreg_loss import hinge

vibcreg_loss_saved_numel = gram_saved_numel
LEAST_NORM = tl.constexpr(1e-12)  # a shorter column is divided by this, as torch.nn.functional.normalize does


def vibcreg_loss_triton(
    za: Tensor, zb: Tensor, sim: float, var: float, cov: float, eps: float
) -> tuple[Tensor, Tensor]:
    """za, zb float32 [N, D], N >= 2, both contiguous -> loss, scalar, and what the backward pass needs."""
    N, D = za.shape
    saved, terms = column_buffers(za)
    with torch.cuda.device_of(za):
        vibcreg_kernel[(len(terms),)](
            za, zb, saved, terms, N, D, sim / (N * D), var / D, cov / D**2, eps, **COLUMN_BLOCKS
        )
        loss = gram_loss(za, zb, saved, terms, cov / D**2, cross=False)
    return loss, saved


def vibcreg_loss_backward_triton(
    grad_loss: Tensor, za: Tensor, zb: Tensor, saved: Tensor, sim: float, var: float, cov: float, eps: float
) -> tuple[Tensor, Tensor]:
    return gram_backward(grad_loss, za, zb, saved, cross=False)


@triton.jit
def normalise(square):
    """Of a column with sum of squares `square`: 1 / its norm, and the sum of squares of what that makes of it."""
    inverse = (1 / tl.maximum(tl.sqrt(square), LEAST_NORM)).to(tl.float32)  # as S has it
    return inverse, square * inverse * inverse


@triton.jit
def store_gradient(saved, view, mean, square, inverse, diagonal, slope, of_difference, of_correlation, d, D):
    """A normalised column moves only across itself, and the diagonal's gradient, which lies along it, drops out."""
    of_product = 4 * of_correlation * inverse
    normalised = tl.sqrt(square) > LEAST_NORM
    store_column(saved, view, MEAN, mean, d, D)
    store_column(saved, view, INVERSE, inverse, d, D)
    store_column(saved, view, OF_PRODUCT, of_product, d, D)
    store_column(saved, view, OF_OWN, slope / inverse - tl.where(normalised, 0.0, of_product * diagonal), d, D)
    store_column(saved, view, OF_DOT, tl.where(normalised, -of_product / diagonal, 0.0), d, D)
    store_column(saved, view, OF_THIRD, tl.zeros(mean.shape, tl.float32) + 2 * of_difference, d, D)


@triton.jit(do_not_specialize=["N"])
def vibcreg_kernel(
    za,  # [N, D]
    zb,  # [N, D]
    saved,  # [2, ROWS, D], ...
    terms,  # [programs], float64
    N,
    D,
    of_difference,  # sim / (N D)
    of_hinge,  # var / D
    of_correlation,  # cov / D²
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """terms: the invariance and variance terms, less the diagonal of the correlations that the energy contains."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mean_a, mean_b, square_a, square_b, _, difference = column_moments(za, zb, d, N, D, BLOCK_M, BLOCK_D)
    hinge_a, slope_a = hinge(square_a, of_hinge, eps, N)
    hinge_b, slope_b = hinge(square_b, of_hinge, eps, N)
    inverse_a, diagonal_a = normalise(square_a)
    inverse_b, diagonal_b = normalise(square_b)
    term = of_difference * difference + hinge_a + hinge_b
    term -= of_correlation * (diagonal_a * diagonal_a + diagonal_b * diagonal_b)
    tl.store(terms + tl.program_id(0), tl.sum(tl.where(d < D, term, 0.0), axis=0))
    store_gradient(saved, 0, mean_a, square_a, inverse_a, diagonal_a, slope_a, of_difference, of_correlation, d, D)
    store_gradient(saved, 1, mean_b, square_b, inverse_b, diagonal_b, slope_b, of_difference, of_correlation, d, D)
