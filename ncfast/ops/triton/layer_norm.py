"""layer_norm in Triton: whole rows in registers, so that memory is passed over once each way.

What the gradient needs of the forward pass it computes again: the rows must be read anyway, and the statistics take no
memory. A program adds up what its rows give to the gradients of weight and bias, and a second launch adds up the
programs, in an order of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops.triton.tiles import INVERSE_SQRT_2_PI, gauss, load_row, load_tile, store_tile, sum_kernel

TILE, LARGEST_BLOCK_M = 2048, 128
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
PROGRAMS = 1024  # of the backward pass: more would leave the second launch more to add than they save
SUM_BLOCKS = {"BLOCK_M": 256, "BLOCK_N": 8, "num_warps": 4}


def blocks(D: int, warps: int) -> dict:
    """Rows and columns of a tile; they depend on no number of rows, nor does a row's result."""
    depth = max(triton.next_power_of_2(D), 16)
    rows = min(TILE // depth, LARGEST_BLOCK_M)
    # Enable FMA fusion explicitly: newer Triton turns it off by default.
    return {"BLOCK_M": rows, "BLOCK_D": depth, "num_warps": warps, "enable_fp_fusion": True}


def layer_norm_triton(
    x: Tensor,  # [..., n, D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    add: Tensor | None,  # [n, D]
    eps: float,
    gelu: bool,
    y: Tensor,  # [..., n, D]
) -> None:
    """Fills y. All contiguous, of float32, bfloat16 or float16."""
    if y.numel() == 0:
        return
    M, D = x.shape[:-1].numel(), x.shape[-1]
    tile = blocks(D, FORWARD_WARPS)
    with torch.cuda.device_of(x):
        layer_norm_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x, add, weight, bias, y, M, 1 if add is None else len(add), eps, D, GELU=gelu, **tile
        )


def layer_norm_backward_triton(
    grad_y: Tensor,  # [..., n, D]
    x: Tensor,  # [..., n, D]
    weight: Tensor,  # [D]
    add: Tensor | None,  # [n, D]
    eps: float,
    gelu: bool,
    grad_x: Tensor,  # [..., n, D]
    grad_weight: Tensor,  # [D]
    grad_bias: Tensor,  # [D]
) -> None:
    """Fills the gradients of x, weight and bias. All contiguous, of float32, bfloat16 or float16."""
    M, D = x.shape[:-1].numel(), x.shape[-1]
    if D == 0:
        return
    tile = blocks(D, BACKWARD_WARPS)
    tiles = triton.cdiv(triton.cdiv(M, tile["BLOCK_M"]), PROGRAMS)  # of a program
    count = triton.cdiv(M, tiles * tile["BLOCK_M"]) if M > 0 else 0
    sums = torch.empty(2, count, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if count > 0:
            layer_norm_backward_kernel[(count,)](
                grad_y,
                x,
                add,
                weight,
                grad_x,
                sums[0],
                sums[1],
                M,
                1 if add is None else len(add),
                tiles,
                eps,
                D,
                GELU=gelu,
                **tile,
            )
        sum_kernel[(triton.cdiv(D, SUM_BLOCKS["BLOCK_N"]), 2)](
            sums[0], sums[1], grad_bias, grad_weight, count, D, D, **SUM_BLOCKS
        )


@triton.jit
def load_sum(x, add, i, j, M, n, D: tl.constexpr):  # x [M, D], add [n, D] or None
    """x + add, float32 [BLOCK_M, BLOCK_D], zeros beyond D."""
    z = load_tile(x, i, j, M, D).to(tl.float32)
    if add is not None:
        z += load_tile(add, i % n, j, n, D).to(tl.float32)
    return z


@triton.jit
def centre(h, j, D: tl.constexpr):  # h [BLOCK_M, BLOCK_D], zeros beyond D
    """Deviations from the mean of each row, zeros beyond D."""
    return tl.where((j < D)[None, :], h - (tl.sum(h, axis=1) / D)[:, None], 0.0)


@triton.jit
def inverse_deviation(centred, eps, D: tl.constexpr):  # centred [BLOCK_M, BLOCK_D]
    return 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / D + eps)


@triton.jit(do_not_specialize=["M", "n"])
def layer_norm_kernel(
    x,  # [M, D]
    add,  # [n, D] or None
    weight,  # [D]
    bias,  # [D]
    y,  # [M, D]
    M,
    n,
    eps,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_D)
    h = load_sum(x, add, i, j, M, n, D)
    if GELU:
        _, cdf = gauss(h)
        h *= cdf
    centred = centre(h, j, D)
    scale = inverse_deviation(centred, eps, D)[:, None] * load_row(weight, j, D)[None, :]
    store_tile(y, centred * scale + load_row(bias, j, D)[None, :], i, j, M, D)


@triton.jit(do_not_specialize=["M", "n", "tiles"])
def layer_norm_backward_kernel(
    grad_y,  # [M, D]
    x,  # [M, D]
    add,  # [n, D] or None
    weight,  # [D]
    grad_x,  # [M, D]
    bias_sums,  # [programs, D]
    weight_sums,  # [programs, D]
    M,
    n,
    tiles,
    eps,
    D: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With r = (h - mean) / σ and g = grad_y weight: grad_weight = Σ grad_y r, grad_bias = Σ grad_y,
    grad_h = (g - mean(g) - r mean(g r)) / σ."""
    j = tl.arange(0, BLOCK_D)
    of_weight = load_row(weight, j, D)[None, :]
    bias_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tl.program_id(0) * tiles * BLOCK_M
    for tile in range(0, tiles):
        i = first + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        z = load_sum(x, add, i, j, M, n, D)
        grad = load_tile(grad_y, i, j, M, D).to(tl.float32)
        h = z
        if GELU:
            bell, cdf = gauss(z)
            h = z * cdf
        centred = centre(h, j, D)
        # Rows beyond M have no deviation, which without eps would become NaN and reach the sums.
        inverse = tl.where(i < M, inverse_deviation(centred, eps, D), 0.0)[:, None]
        normal = centred * inverse
        bias_sum += grad
        weight_sum += grad * normal
        grad *= of_weight
        along = tl.sum(grad * normal, axis=1) / D
        grad = inverse * (grad - (tl.sum(grad, axis=1) / D)[:, None] - along[:, None] * normal)
        if GELU:
            grad *= cdf + z * bell * INVERSE_SQRT_2_PI
        store_tile(grad_x, grad, i, j, M, D)
    out = tl.program_id(0).to(tl.int64) * D + j
    tl.store(bias_sums + out, tl.sum(bias_sum, axis=0), mask=j < D)
    tl.store(weight_sums + out, tl.sum(weight_sum, axis=0), mask=j < D)
