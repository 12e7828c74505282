"""Nearest code in Triton: float32 scores with an error bound, then float64 for the rows that the bound leaves open."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops import dispatch

# A row that awaits the float64 pass is marked in the output itself, so nothing is compacted and the host never waits.
AMBIGUOUS = tl.constexpr(-1)

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
    half_squares = torch.empty(H, K, dtype=torch.float32, device=z.device)
    rounding, underflow = error_terms(D)
    with torch.cuda.device_of(z):
        nearest_code_half_square_kernel[(triton.cdiv(H * K, HALF_SQUARE_BLOCKS["BLOCK_K"]),)](
            codebook, half_squares, H * K, D, **HALF_SQUARE_BLOCKS
        )
        nearest_code_score_kernel[(H * triton.cdiv(M, SCORE_BLOCKS["BLOCK_M"]),)](
            z, codebook, half_squares, indices, M, K, D, rounding, underflow, **SCORE_BLOCKS
        )
        nearest_code_rescore_kernel[(H * triton.cdiv(M, RESCORE_BLOCKS["BLOCK_M"]),)](
            z, codebook, indices, M, K, D, **RESCORE_BLOCKS
        )
    return indices


def error_terms(D: int) -> tuple[float, float]:
    """(rounding, underflow): a float32 score is within rounding·(|e|²/2 + |z||e|) + underflow of the exact one.

    A score is a sum of D products and the bias. In whichever order it is taken, no term passes through more than D + 2
    roundings of at most 2^-24 relative, and each underflow loses at most 2^-149.
    """
    rounding = 1.02 * (D + 4) * 2.0**-24 if D <= MAX_SCORED_DIM else math.inf
    return rounding, 1.02 * (2 * D + 4) * 2.0**-149


# Enable FMA fusion explicitly: newer Triton turns it off, and unfused products halve the speed of the dot.
FUSED = {"enable_fp_fusion": True}
HALF_SQUARE_BLOCKS = {"BLOCK_K": 16, "BLOCK_D": 64, "num_warps": 4, **FUSED}
SCORE_BLOCKS = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 3, **FUSED}
RESCORE_BLOCKS = {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 4, **FUSED}


@triton.jit(do_not_specialize=["num_codes"])
def nearest_code_half_square_kernel(
    codebook,  # [codes, D]
    half_squares,  # [codes]
    num_codes,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """|e|²/2 of every code: NaN marks a code with a NaN or an infinity, inf one whose square overflows float32."""
    codes = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    square = tl.zeros([BLOCK_K], tl.float64)
    for first_d in range(0, D, BLOCK_D):
        d = first_d + tl.arange(0, BLOCK_D)
        mask = (codes < num_codes)[:, None] & (d < D)[None, :]
        e = tl.load(codebook + codes[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float64)
        square += tl.sum(e * e, axis=1)
    half_square = tl.where(square < float("inf"), 0.5 * square, float("nan"))
    tl.store(half_squares + codes, half_square.to(tl.float32), mask=codes < num_codes)


@triton.jit(do_not_specialize=["M", "K"])
def nearest_code_score_kernel(
    z,  # [H, M, D]
    codebook,  # [H, K, D]
    half_squares,  # [H, K]
    indices,  # [H, M], AMBIGUOUS where the second pass decides
    M,
    K,
    D,
    rounding,
    underflow,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program takes BLOCK_M rows of one head past all codes and keeps the two best scores of each row."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    z_rows = z + (head * M + rows) * D
    codebook += head * K * D
    half_squares += head * K

    square = tl.zeros([BLOCK_M], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        d = first_d + tl.arange(0, BLOCK_D)
        z_tile = tl.load(z_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
        z_tile = z_tile.to(tl.float32)
        square += tl.sum(z_tile * z_tile, axis=1)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M], float("-inf"), tl.float32)
    index = tl.zeros([BLOCK_M], tl.int32)
    largest = tl.zeros([BLOCK_K], tl.float32)
    for first_code in range(0, K, BLOCK_K):
        codes = first_code + tl.arange(0, BLOCK_K)
        half_square = tl.load(half_squares + codes, mask=codes < K, other=float("nan"))
        usable = half_square == half_square
        largest = tl.maximum(largest, tl.where(usable, half_square, 0.0))
        bias = tl.where(usable, -half_square, float("-inf"))
        scores = tl.zeros([BLOCK_M, BLOCK_K], tl.float32) + bias[None, :]
        code_rows = codebook + codes.to(tl.int64) * D
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            z_tile = tl.load(z_rows[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)
            e_tile = tl.load(code_rows[None, :] + d[:, None], mask=usable[None, :] & (d < D)[:, None], other=0.0)
            # Triton's default here is TF32, whose error is thousands of times that of float32.
            scores = tl.dot(z_tile.to(tl.float32), e_tile, scores, input_precision="ieee")

        tile_best = tl.max(scores, axis=1)
        tile_index = tl.min(tl.where(scores == tile_best[:, None], codes[None, :], K), axis=1)
        others = tl.where(codes[None, :] == tile_index[:, None], float("-inf"), scores)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, tile_best))
        index = tl.where(tile_best > best, tile_index, index)
        best = tl.maximum(best, tile_best)

    bound = tl.max(largest, axis=0)
    # Added to a squared norm: more than its terms can have lost to underflow, so that no norm comes out too small.
    lost = SMALLEST_NORMAL * (D + 1)
    magnitude = bound + tl.sqrt(square + lost) * tl.sqrt(2 * bound + lost)
    error = rounding * magnitude + underflow
    # False for every NaN, and where a partial sum could have overflowed.
    certain = (magnitude < LARGEST_SAFE) & (best - second > 2 * error)
    tl.store(indices + head * M + rows, tl.where(certain, index, AMBIGUOUS).to(tl.int64), mask=row_mask)


@triton.jit(do_not_specialize=["M", "K"])
def nearest_code_rescore_kernel(
    z,  # [H, M, D]
    codebook,  # [H, K, D]
    indices,  # [H, M]
    M,
    K,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Replaces every AMBIGUOUS. All distances are summed in the same order: equal codes have bitwise equal ones."""
    row_blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // row_blocks).to(tl.int64)
    first_row = (tl.program_id(0) % row_blocks).to(tl.int64) * BLOCK_M
    z += head * M * D
    codebook += head * K * D
    indices += head * M + first_row

    rows = tl.arange(0, BLOCK_M)
    ambiguous = (tl.load(indices + rows, mask=first_row + rows < M, other=0) == AMBIGUOUS).to(tl.int32)
    if tl.max(ambiguous, axis=0) > 0:
        for row in range(BLOCK_M):
            if tl.max(tl.where(rows == row, ambiguous, 0), axis=0) > 0:
                z_row = z + (first_row + row) * D
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
                tl.store(indices + row, index.to(tl.int64))
