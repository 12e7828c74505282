"""What the SSL losses share in Triton: the N x N Gram matrices of both views, and the gradient through them.

Each loss standardises the columns of both views in its own way, to S_a and S_b, takes the energy of their product from
K = S Sᵀ (see ncfast/ops/gram.py), and has a gradient that is, column by column, a combination of K S, S and a third
vector. What is its own is one kernel over blocks of columns, which leaves the loss of the columns by themselves, their
statistics and the coefficients of the gradient. The rest is here, and the same for all:

    forward:  the loss's own kernel; partial Gram matrices over stretches of D; their sums and energies; the loss
    backward: K S and the combination, by blocks of columns
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops.triton.tiles import load_tile

# `saved` is these of each view [2, ROWS, D], then K of each view [2, N, N].
MEAN = tl.constexpr(0)  # of z - z[0]: how far columns lie from the origin then costs them no digits
INVERSE = tl.constexpr(1)  # S = (z - z[0] - MEAN) INVERSE
OF_PRODUCT = tl.constexpr(2)  # gradient = OF_PRODUCT K S + (OF_OWN + OF_DOT <K S, S>) S + OF_THIRD third
OF_OWN = tl.constexpr(3)
OF_DOT = tl.constexpr(4)
OF_THIRD = tl.constexpr(5)
ROWS = tl.constexpr(6)


def gram_saved_numel(N: int, D: int) -> int:
    return 2 * ROWS.value * D + 2 * N * N


def column_buffers(z: Tensor) -> tuple[Tensor, Tensor]:
    """What a loss's own kernel writes: `saved`, of which it fills the columns, and `terms`, one of each program."""
    N, D = z.shape
    terms = torch.empty(triton.cdiv(D, COLUMN_BLOCKS["BLOCK_D"]), dtype=torch.float64, device=z.device)
    return torch.empty(gram_saved_numel(N, D), dtype=torch.float32, device=z.device), terms


def gram_loss(za: Tensor, zb: Tensor, saved: Tensor, terms: Tensor, of_energy: float, cross: bool) -> Tensor:
    """The sum of terms plus of_energy (<K_a, K_b> if cross, else <K_a, K_a> + <K_b, K_b>); leaves K in `saved`.

    za, zb [N, D] contiguous. To be called within torch.cuda.device_of(za).
    """
    N, D = za.shape
    block = gram_block(N)
    tiles, splits, split = gram_grid(N, D)
    parts = block * block // SUM_BLOCKS["BLOCK"]
    partials = torch.empty(2, tiles, splits, block, block, dtype=torch.float32, device=za.device)
    energies = torch.empty(tiles * parts, dtype=torch.float64, device=za.device)
    loss = torch.empty((), dtype=torch.float32, device=za.device)
    gram_kernel[(2 * tiles * splits,)](za, zb, saved, partials, splits, split, N, D, BLOCK=block, **GRAM_BLOCKS)
    gram_sum_kernel[(tiles * parts,)](partials, saved, energies, splits, N, D, CROSS=cross, BLOCK_N=block, **SUM_BLOCKS)
    gram_loss_kernel[(1,)](terms, energies, loss, len(terms), len(energies), of_energy, **LOSS_BLOCKS)
    return loss


def gram_backward(grad_loss: Tensor, za: Tensor, zb: Tensor, saved: Tensor, cross: bool) -> tuple[Tensor, Tensor]:
    """grad_loss scalar, za, zb [N, D] contiguous -> grad_za, grad_zb [N, D].

    With cross, K is the other view's and the third vector its S; without, K is a view's own and the third vector its
    difference from the other view.
    """
    N, D = za.shape
    grad_za, grad_zb = torch.empty_like(za), torch.empty_like(zb)
    blocks = backward_blocks(N)
    with torch.cuda.device_of(za):
        gram_backward_kernel[(2 * triton.cdiv(D, blocks["BLOCK_D"]),)](
            grad_loss, za, zb, saved, grad_za, grad_zb, N, D, CROSS=cross, **blocks
        )
    return grad_za, grad_zb


# Triton's default is TF32 once, whose error is thousands of times that of float32. Three times, its error is float32's.
PRECISION = tl.constexpr("tf32x3")

# Enable FMA fusion explicitly: newer Triton turns it off.
FUSED = {"enable_fp_fusion": True}
# The fastest of those measured on an H200 at 128 x 4096. With GRAM_BLOCKS K takes 10 us, with 128 columns 30, as a
# pipeline of 2 stages 13.
COLUMN_BLOCKS = {"BLOCK_M": 64, "BLOCK_D": 16, "num_warps": 2, **FUSED}
GRAM_BLOCKS = {"BLOCK_D": 64, "num_warps": 4, "num_stages": 1, **FUSED}
SUM_BLOCKS = {"BLOCK": 64, "BLOCK_SPLITS": 8, "num_warps": 2, **FUSED}
LOSS_BLOCKS = {"BLOCK": 1024, "num_warps": 8, **FUSED}

# Programs that the Gram matrices are divided among, if D allows: two for each multiprocessor of a large GPU. Not of the
# GPU at hand, so that results are the same on any.
GRAM_PROGRAMS = 256
LEAST_SPLIT = 64  # columns; fewer would cost more in partial sums than they save


def gram_block(N: int) -> int:
    """Rows and columns of a tile of K."""
    return min(max(triton.next_power_of_2(N), 16), 64)


def gram_grid(N: int, D: int) -> tuple[int, int, int]:
    """(tiles, splits, split): tiles on and below the diagonal, as K is symmetric, and D in stretches of `split`."""
    rows = triton.cdiv(N, gram_block(N))
    tiles = rows * (rows + 1) // 2
    splits = max(1, min(GRAM_PROGRAMS // (2 * tiles), triton.cdiv(D, LEAST_SPLIT)))
    split = triton.cdiv(triton.cdiv(D, splits), GRAM_BLOCKS["BLOCK_D"]) * GRAM_BLOCKS["BLOCK_D"]
    return tiles, triton.cdiv(D, split), split


def backward_blocks(N: int) -> dict:
    """A program has all N rows of its columns: up to 128 in one tile, which then stays in registers."""
    one_tile = N <= 128
    rows = max(triton.next_power_of_2(N), 16) if one_tile else 64
    return {
        "ONE_TILE": one_tile,
        "BLOCK_M": rows,
        "BLOCK_N": 32,
        "BLOCK_D": 32,
        "num_warps": 4,
        "num_stages": 2,
        **FUSED,
    }


@triton.jit
def standardise_rows(z, row, d, origin, mean, inverse, N, D):
    """S [BLOCK_M, BLOCK_D], zeros in rows outside."""
    centred = (load_tile(z, row, d, N, D) - origin[None, :]) - mean[None, :]
    return tl.where((row < N)[:, None], centred * inverse[None, :], 0.0)


@triton.jit
def load_column(saved, view, which, d, D):
    return tl.load(saved + (view * ROWS + which) * D + d, mask=d < D, other=0.0)


@triton.jit
def store_column(saved, view, which, value, d, D):
    tl.store(saved + (view * ROWS + which) * D + d, value.to(tl.float32), mask=d < D)


@triton.jit
def sum_rows(tile):
    return tl.sum(tile.to(tl.float64), axis=0)


@triton.jit
def column_moments(
    za,  # [N, D]
    zb,  # [N, D]
    d,  # [BLOCK_D]
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of each column: MEAN of both views, then the sums over rows of c_a², c_b², c_a c_b (c = z - mean), (z_a - z_b)².

    In two passes, as squares of values that are not yet centred would cancel. The sums are float64: from the energy,
    which holds the columns' squares too, they are subtracted.
    """
    origin_a = tl.load(za + d, mask=d < D, other=0.0)
    origin_b = tl.load(zb + d, mask=d < D, other=0.0)
    sum_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_b = sum_a
    for first in range(0, N, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = (row < N)[:, None]
        sum_a += tl.where(inside, load_tile(za, row, d, N, D) - origin_a[None, :], 0.0)
        sum_b += tl.where(inside, load_tile(zb, row, d, N, D) - origin_b[None, :], 0.0)
    mean_a = (sum_rows(sum_a) / N).to(tl.float32)
    mean_b = (sum_rows(sum_b) / N).to(tl.float32)

    rest_a = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    rest_b, square_a, square_b, product, difference = rest_a, rest_a, rest_a, rest_a, rest_a
    for first in range(0, N, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = (row < N)[:, None]
        a, b = load_tile(za, row, d, N, D), load_tile(zb, row, d, N, D)
        difference += (a - b) * (a - b)
        a = tl.where(inside, (a - origin_a[None, :]) - mean_a[None, :], 0.0)
        b = tl.where(inside, (b - origin_b[None, :]) - mean_b[None, :], 0.0)
        rest_a += a
        rest_b += b
        square_a += a * a
        square_b += b * b
        product += a * b
    # What rounding left of the mean.
    left_a, left_b = sum_rows(rest_a) / N, sum_rows(rest_b) / N
    squares_a = sum_rows(square_a) - N * left_a * left_a
    squares_b = sum_rows(square_b) - N * left_b * left_b
    # Rounding can make the least of squares negative. Not tl.maximum, which would lose a NaN.
    squares_a, squares_b = tl.where(squares_a < 0, 0.0, squares_a), tl.where(squares_b < 0, 0.0, squares_b)
    products = sum_rows(product) - N * left_a * left_b
    return mean_a + left_a, mean_b + left_b, squares_a, squares_b, products, sum_rows(difference)


@triton.jit
def tile_of(index, N, BLOCK: tl.constexpr):
    """(i, j), j <= i, of the index-th tile on or below the diagonal: a long row and a short one make up one width."""
    rows = tl.cdiv(N, BLOCK)
    odd = rows % 2
    width = rows + 1 - odd
    pair = index // width
    place = index % width
    long = place < rows - pair
    return tl.where(long, rows - 1 - pair, pair - odd), tl.where(long, place, place - (rows - pair))


@triton.jit(do_not_specialize=["splits", "split", "N"])
def gram_kernel(
    za,  # [N, D]
    zb,  # [N, D]
    saved,  # [2, ROWS, D], ...
    partials,  # [2, tiles, splits, BLOCK, BLOCK]
    splits,
    split,  # columns of a stretch, a multiple of BLOCK_D
    N,
    D,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of one view's K, over one stretch of columns."""
    rows = tl.cdiv(N, BLOCK)
    tiles = rows * (rows + 1) // 2
    tile = tl.program_id(0) // splits
    view = tile // tiles
    i, j = tile_of(tile % tiles, N, BLOCK)
    row_i = i * BLOCK + tl.arange(0, BLOCK)
    row_j = j * BLOCK + tl.arange(0, BLOCK)
    z = za if view == 0 else zb

    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin = tl.program_id(0) % splits * split
    for first_d in range(begin, tl.minimum(begin + split, D), BLOCK_D):
        d = first_d + tl.arange(0, BLOCK_D)
        origin = tl.load(z + d, mask=d < D, other=0.0)
        mean, inverse = load_column(saved, view, MEAN, d, D), load_column(saved, view, INVERSE, d, D)
        s_i = standardise_rows(z, row_i, d, origin, mean, inverse, N, D)
        s_j = standardise_rows(z, row_j, d, origin, mean, inverse, N, D)
        total = tl.dot(s_i, tl.trans(s_j), total, input_precision=PRECISION)
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(partials + tl.program_id(0).to(tl.int64) * BLOCK * BLOCK + place, total)


@triton.jit
def sum_of_partials(partials, first, splits, place, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """The float64 sum of partials[first:first + splits, place], in a fixed order."""
    total = tl.zeros([SPLITS, BLOCK], tl.float64)
    for number in range(0, splits, SPLITS):
        split = number + tl.arange(0, SPLITS)
        at = (first + split)[:, None] * (BLOCK_N * BLOCK_N) + place[None, :]
        total += tl.load(partials + at, mask=(split < splits)[:, None], other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["splits", "N"])
def gram_sum_kernel(
    partials,  # [2, tiles, splits, BLOCK_N, BLOCK_N]
    saved,  # [2, ROWS, D], [2, N, N]
    energies,  # [tiles, BLOCK_N BLOCK_N / BLOCK], float64
    splits,
    N,
    D,
    CROSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """BLOCK elements of a tile of both K, their mirror images above the diagonal, and their share of the energy."""
    parts = BLOCK_N * BLOCK_N // BLOCK
    rows = tl.cdiv(N, BLOCK_N)
    tiles = rows * (rows + 1) // 2
    tile = tl.program_id(0) // parts
    place = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    first = tile.to(tl.int64) * splits
    k_a = sum_of_partials(partials, first, splits, place, BLOCK, BLOCK_N, BLOCK_SPLITS)
    first += tiles.to(tl.int64) * splits
    k_b = sum_of_partials(partials, first, splits, place, BLOCK, BLOCK_N, BLOCK_SPLITS)

    i, j = tile_of(tile, N, BLOCK_N)
    row = (i * BLOCK_N + place // BLOCK_N).to(tl.int64)
    column = (j * BLOCK_N + place % BLOCK_N).to(tl.int64)
    # An element has one writer, and its mirror image the same one: K is symmetric to the last bit.
    mine = (row < N) & (column <= row)
    energy = k_a * k_b if CROSS else k_a * k_a + k_b * k_b
    energy = tl.where(mine, tl.where(row == column, 1.0, 2.0) * energy, 0.0)
    tl.store(energies + tl.program_id(0), tl.sum(energy, axis=0))
    gram_a = saved + 2 * ROWS * D
    gram_b = gram_a + N.to(tl.int64) * N
    tl.store(gram_a + row * N + column, k_a.to(tl.float32), mask=mine)
    tl.store(gram_a + column * N + row, k_a.to(tl.float32), mask=mine)
    tl.store(gram_b + row * N + column, k_b.to(tl.float32), mask=mine)
    tl.store(gram_b + column * N + row, k_b.to(tl.float32), mask=mine)


@triton.jit(do_not_specialize=["num_terms", "num_energies"])
def gram_loss_kernel(
    terms,  # [num_terms], float64
    energies,  # [num_energies], float64
    loss,  # scalar
    num_terms,
    num_energies,
    of_energy,
    BLOCK: tl.constexpr,
):
    """One program adds up what the others left, in a fixed order."""
    term = tl.zeros([BLOCK], tl.float64)
    energy = tl.zeros([BLOCK], tl.float64)
    for first in range(0, num_terms, BLOCK):
        number = first + tl.arange(0, BLOCK)
        term += tl.load(terms + number, mask=number < num_terms, other=0.0)
    for first in range(0, num_energies, BLOCK):
        number = first + tl.arange(0, BLOCK)
        energy += tl.load(energies + number, mask=number < num_energies, other=0.0)
    total = tl.sum(term, axis=0) + of_energy * tl.sum(energy, axis=0)
    tl.store(loss, total.to(tl.float32))


@triton.jit
def gram_times_columns(
    gram,  # [N, N]
    z,  # [N, D]
    row,  # [BLOCK_M]
    d,  # [BLOCK_D]
    origin,
    mean,
    inverse,
    N,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(K S)[row, d]."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = load_tile(gram, row, column, N, N)
        s = standardise_rows(z, column, d, origin, mean, inverse, N, D)
        total = tl.dot(k, s, total, input_precision=PRECISION)
    return total


@triton.jit
def combine(
    product,  # [BLOCK_M, BLOCK_D]: (K S)[row, d]
    z,  # [N, D]
    other,  # [N, D]
    grad,  # [N, D]
    row,
    d,
    origin,
    mean,
    inverse,
    other_origin,
    other_mean,
    other_inverse,
    of_product,
    of_own,
    of_third,
    N,
    D,
    CROSS: tl.constexpr,
):
    """Writes grad[row, d]."""
    s = standardise_rows(z, row, d, origin, mean, inverse, N, D)
    if CROSS:
        third = standardise_rows(other, row, d, other_origin, other_mean, other_inverse, N, D)
    else:
        third = load_tile(z, row, d, N, D) - load_tile(other, row, d, N, D)
    gradient = of_product[None, :] * product + of_own[None, :] * s + of_third[None, :] * third
    mask = (row < N)[:, None] & (d < D)[None, :]
    tl.store(grad + row.to(tl.int64)[:, None] * D + d[None, :], gradient, mask=mask)


@triton.jit
def gram_backward_kernel(
    grad_loss,  # scalar
    za,  # [N, D]
    zb,  # [N, D]
    saved,  # [2, ROWS, D], [2, N, N]
    grad_za,  # [N, D]
    grad_zb,  # [N, D]
    N,
    D,
    CROSS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program has BLOCK_D columns of one view with all their rows, as <K S, S> is a sum over these."""
    view = tl.program_id(0) % 2
    d = tl.program_id(0) // 2 * BLOCK_D + tl.arange(0, BLOCK_D)
    if view == 0:
        z, other, grad = za, zb, grad_za
    else:
        z, other, grad = zb, za, grad_zb
    gram_view = 1 - view if CROSS else view
    gram = saved + 2 * ROWS * D + gram_view * N.to(tl.int64) * N
    origin = tl.load(z + d, mask=d < D, other=0.0)
    other_origin = tl.load(other + d, mask=d < D, other=0.0)
    mean, other_mean = load_column(saved, view, MEAN, d, D), load_column(saved, 1 - view, MEAN, d, D)
    inverse, other_inverse = load_column(saved, view, INVERSE, d, D), load_column(saved, 1 - view, INVERSE, d, D)
    of_loss = tl.load(grad_loss)
    of_product = of_loss * load_column(saved, view, OF_PRODUCT, d, D)
    of_own, of_dot = of_loss * load_column(saved, view, OF_OWN, d, D), of_loss * load_column(saved, view, OF_DOT, d, D)
    of_third = of_loss * load_column(saved, view, OF_THIRD, d, D)

    if ONE_TILE:
        row = tl.arange(0, BLOCK_M)
        product = gram_times_columns(gram, z, row, d, origin, mean, inverse, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
        dot = tl.sum(product * standardise_rows(z, row, d, origin, mean, inverse, N, D), axis=0)
        of_own += of_dot * dot
        combine(
            product,
            z,
            other,
            grad,
            row,
            d,
            origin,
            mean,
            inverse,
            other_origin,
            other_mean,
            other_inverse,
            of_product,
            of_own,
            of_third,
            N,
            D,
            CROSS,
        )
    else:
        dots = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, N, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            product = gram_times_columns(gram, z, row, d, origin, mean, inverse, N, D, BLOCK_M, BLOCK_N, BLOCK_D)
            dots += product * standardise_rows(z, row, d, origin, mean, inverse, N, D)
            mask = (row < N)[:, None] & (d < D)[None, :]
            tl.store(grad + row.to(tl.int64)[:, None] * D + d[None, :], product, mask=mask)
        of_own += of_dot * tl.sum(dots, axis=0)
        # K S waits where its gradient goes, and may be read back by other threads than wrote it.
        tl.debug_barrier()
        for first in range(0, N, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            combine(
                load_tile(grad, row, d, N, D),
                z,
                other,
                grad,
                row,
                d,
                origin,
                mean,
                inverse,
                other_origin,
                other_mean,
                other_inverse,
                of_product,
                of_own,
                of_third,
                N,
                D,
                CROSS,
            )
