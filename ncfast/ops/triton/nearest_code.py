"""Nearest code in Triton, in one launch: scores on tensor cores with an error bound, then float64 for open rows."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops import dispatch

# Up to this D the second-order terms of the rounding error stay within the 2 % added in `error_terms`.
MAX_SCORED_DIM = 65536

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LARGEST_SAFE = tl.constexpr(2.0**126)


def nearest_code_triton(z: Tensor, codebook: Tensor) -> Tensor:
    """z [H, M, D] float32, float16 or bfloat16, codebook [H, K, D] float32, both contiguous -> int64 [H, M]."""
    (H, M, D), K = z.shape, codebook.shape[1]
    indices = dispatch.empty_indices(H, M, device=z.device)
    if H * M == 0:
        return indices
    blocks = kernel_blocks(K, D)
    products, squares, underflow = error_terms(D, blocks["BLOCK_D"])
    with torch.cuda.device_of(z):
        nearest_code_kernel[(H * triton.cdiv(M, blocks["BLOCK_M"]),)](
            z, codebook, indices, M, products, squares, underflow, K=K, D=D, **blocks
        )
    return indices


def kernel_blocks(K: int, D: int) -> dict:
    return {
        "BLOCK_M": 64,
        "BLOCK_K": min(max(triton.next_power_of_2(K), 16), 64),
        # Beyond one tile of columns the next is loaded while this one is multiplied, which takes registers.
        "BLOCK_D": min(max(triton.next_power_of_2(D), 16), 64) if D <= 64 else 32,
        "num_warps": 4,
        "num_stages": 2,
        # Of a² + b² a compiler may fuse either product, and not the same one for every code: equal codes would differ.
        "enable_fp_fusion": False,
    }


def error_terms(D: int, block_d: int) -> tuple[float, float, float]:
    """(products, squares, underflow): a score z·e - |e|²/2 of the kernel is within

        products |z||e| + squares |e|²/2 + underflow (1 + |z| + |e|)

    of the exact one. In units of 2^-24, of what the products of |z||e| lose:

    - "tf32x3" splits a number in two of 11 bits: the second is at most 2^-11 of it, and what is cut from that 2^-22.
      Both cuts and the product of the two second parts, which is left out, are 2^-22 each: 12.
    - A tensor core aligns the terms of a block of k >= 4 products and the old sum with the largest, and cuts each, and
      the result, to 24 bits or more: (k + 2) 2 / k <= 3 for each product (docs/nearest_code_cuda.md). The terms with a
      second part come first and are 2^-11 of the others, so only the `block_d` others count; 16 more leave room for the
      rest.
    - Each block of `block_d` is added to the score, and one more rounding is that of the last difference.

    |e|² is a sum of D squares, each through at most D + 2 roundings. Where a number or a product is below 2^-126, a
    tensor core may take it for zero.
    """
    if D > MAX_SCORED_DIM:
        return math.inf, math.inf, math.inf
    unit = 1.02 * 2.0**-24
    return (12 + 3 * (block_d + 16) + D / block_d + 2) * unit, (D + 6) * unit, (6 * D + 4) * 2.0**-126


@triton.jit(do_not_specialize=["M"])
def nearest_code_kernel(
    z,  # [H, M, D]
    codebook,  # [H, K, D]
    indices,  # [H, M]
    M,
    products,
    squares,
    underflow,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program takes BLOCK_M rows of one head past all codes and keeps the two best scores of each row.

    K and D are constants, so that the loops of a small codebook are gone and its tile is read once.
    """
    row_blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    z += head * M * D
    codebook += head * K * D
    z_rows = z + rows * D

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_M], tl.int32)
    largest = tl.zeros([BLOCK_K], tl.float32)
    z_square = tl.zeros([BLOCK_M], tl.float32)
    for first_code in range(0, K, BLOCK_K):
        codes = first_code + tl.arange(0, BLOCK_K)
        code_rows = codebook + codes.to(tl.int64) * D
        scores = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        z_square = tl.zeros([BLOCK_M], tl.float32)
        e_square = tl.zeros([BLOCK_K], tl.float32)
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            z_tile = tl.load(z_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
            e_tile = tl.load(code_rows[:, None] + d[None, :], mask=(codes < K)[:, None] & (d < D)[None, :], other=0.0)
            z_tile = z_tile.to(tl.float32)
            scores += tl.dot(z_tile, tl.trans(e_tile), input_precision="tf32x3")
            z_square += tl.sum(z_tile * z_tile, axis=1)
            e_square += tl.sum(e_tile * e_tile, axis=1)
        # NaN: a code with a NaN. An infinite square, of an infinity or of large numbers, leaves every row open.
        usable = (codes < K) & (e_square == e_square)
        largest = tl.maximum(largest, tl.where(usable, 0.5 * e_square, 0.0))
        scores = tl.where(usable[None, :], scores - 0.5 * e_square[None, :], float("-inf"))

        tile_best = tl.max(scores, axis=1)
        tile_index = tl.min(tl.where(scores == tile_best[:, None], codes[None, :], K), axis=1)
        others = tl.where(codes[None, :] == tile_index[:, None], float("-inf"), scores)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, tile_best))
        index = tl.where(tile_best > best, tile_index, index)
        best = tl.maximum(best, tile_best)

    bound = tl.max(largest, axis=0)
    # Added to a squared norm: more than its terms can have lost to underflow, so that no norm comes out too small.
    lost = SMALLEST_NORMAL * (D + 1)
    z_norm, e_norm = tl.sqrt_rn(z_square + lost), tl.sqrt_rn(2 * bound + lost)
    magnitude = bound + z_norm * e_norm
    error = products * z_norm * e_norm + squares * bound + underflow * (1 + z_norm + e_norm)
    # False for every NaN, and where a number or a partial sum could have overflowed.
    certain = (magnitude < LARGEST_SAFE) & (best - second > 2 * error)

    place = tl.arange(0, BLOCK_M)
    still_open = row_mask & (certain == 0)
    row = tl.min(tl.where(still_open, place, BLOCK_M), axis=0)
    while row < BLOCK_M:
        nearest = nearest_in_float64(z + (first_row + row) * D, codebook, K, D, BLOCK_K, BLOCK_D)
        index = tl.where(place == row, nearest, index)
        row = tl.min(tl.where(still_open & (place > row), place, BLOCK_M), axis=0)
    tl.store(indices + head * M + rows, index.to(tl.int64), mask=row_mask)


@triton.jit
def nearest_in_float64(
    z_row,  # [D]
    codebook,  # [K, D]
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All distances are summed in the same order, and nothing is fused: equal codes have bitwise equal ones."""
    nearest = tl.full([], float("inf"), tl.float64)
    index = tl.full([], 0, tl.int32)
    for first_code in range(0, K, BLOCK_K):
        codes = first_code + tl.arange(0, BLOCK_K)
        code_rows = codebook + codes.to(tl.int64) * D
        distance = tl.zeros([BLOCK_K], tl.float64)
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            mask = (codes < K)[:, None] & (d < D)[None, :]
            e = tl.load(code_rows[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float64)
            x = tl.load(z_row + d, mask=d < D, other=0.0).to(tl.float64)
            difference = x[None, :] - e
            distance += tl.sum(difference * difference, axis=1)
        # A NaN or an infinity, in the row or in the code, is never nearer; without any other it stays 0.
        distance = tl.where((codes < K) & (distance < float("inf")), distance, float("inf"))
        tile_nearest = tl.min(distance, axis=0)
        tile_index = tl.min(tl.where(distance == tile_nearest, codes, K), axis=0)
        index = tl.where(tile_nearest < nearest, tile_index, index)
        nearest = tl.minimum(nearest, tile_nearest)
    return index
