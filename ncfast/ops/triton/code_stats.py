"""Counts and sums per code in Triton, in an order that shapes and indices alone decide, without an atomic.

Few codes and few rows: each program multiplies a chunk of rows with their one-hot matrix. Otherwise the rows are sorted
by code, by counting or, for very many codes, by PyTorch, and summed piece by piece of that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops import dispatch

# Products hold the sums of so many codes in registers; with more rows times codes than that, sorting takes less time.
FEW_CODES, FEW_COMPARISONS = 128, 2**21
# Above it the counts of all chunks would take more than 256 bytes for each row.
MANY_CODES = 2**16


def code_stats_triton(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """z [H, M, D] float32, float16 or bfloat16, indices int64 [H, M], contiguous -> counts [H, K], sums [H, K, D]."""
    (H, M, D), K = z.shape, num_codes
    make = torch.zeros if M == 0 else torch.empty
    counts = make(H, K, dtype=torch.float32, device=z.device)
    sums = make(H, K, D, dtype=torch.float32, device=z.device)
    if H * M > 0:
        multiplied = K <= FEW_CODES and M * K <= FEW_COMPARISONS
        (sum_by_product if multiplied else sum_sorted)(z, indices, counts, sums)
    return counts, sums


def sum_by_product(z: Tensor, indices: Tensor, counts: Tensor, sums: Tensor) -> None:
    (H, M, D), K = z.shape, counts.shape[1]
    blocks = product_blocks(K, D)
    rows = rows_of_a_program(M, K, blocks["BLOCK_M"])
    chunks = triton.cdiv(M, rows)
    partial_counts = torch.empty(H, chunks, K, dtype=torch.int32, device=z.device)
    partials = torch.empty(H, chunks, K, D, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        code_stats_product_kernel[(H * chunks, max(1, triton.cdiv(D, blocks["BLOCK_D"])))](
            z, indices, partial_counts, partials, M, K, D, rows, **blocks
        )
        code_stats_add_kernel[(H * K, max(1, triton.cdiv(D, ADD_BLOCKS["BLOCK_D"])))](
            partial_counts, partials, counts, sums, chunks, K, D, **ADD_BLOCKS
        )


# Sums only, in most kernels: fusion changes nothing, but newer Triton warns where nobody has said whether to fuse.
FUSED = {"enable_fp_fusion": True}
ADD_BLOCKS = {"BLOCK_C": 64, "BLOCK_D": 16, "num_warps": 4, **FUSED}
MOST_CHUNKS = 256


def product_blocks(K: int, D: int) -> dict:
    size = {"BLOCK_K": max(triton.next_power_of_2(K), 16), "BLOCK_D": min(max(triton.next_power_of_2(D), 16), 64)}
    warps = 4 if K <= 64 else 8  # the sums are in registers
    return {"BLOCK_M": 64, **size, "INTERPRETED": dispatch.triton_interpreted(), "num_warps": warps, **FUSED}


def rows_of_a_program(M: int, K: int, block: int) -> int:
    """So many that there are no more partial sums than vectors."""
    return triton.cdiv(max(K, triton.cdiv(M, MOST_CHUNKS)), block) * block


@triton.jit
def used_codes(indices, rows, M, K):  # indices [M]
    """The codes of these rows, -1 for a row that counts nowhere."""
    code = tl.load(indices + rows, mask=rows < M, other=-1)
    return tl.where((code >= 0) & (code < K), code, -1).to(tl.int32)


@triton.jit
def fits_a_product(x):
    """Neither infinite nor NaN, which would spoil other codes' sums, nor so far from 1 that a part of x could be."""
    size = tl.abs(x)
    return (size == 0) | ((size >= 2.0**-100) & (size <= 2.0**120))


@triton.jit
def product(hot, part, total, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # where a dot takes the bits of bfloat16 for integers
        return tl.dot(hot.to(tl.float32), part.to(tl.float32), total, input_precision="ieee")
    return tl.dot(hot.to(tl.bfloat16), part, total)


@triton.jit(do_not_specialize=["M", "K", "rows"])
def code_stats_product_kernel(
    z,  # [H, M, D]
    indices,  # [H, M]
    partial_counts,  # [H, chunks, K]
    partials,  # [H, chunks, K, D]
    M,
    K,
    D: tl.constexpr,
    rows,  # of a program: a multiple of BLOCK_M
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Counts and sums of one chunk of rows.

    A float32 number is exactly the sum of three of bfloat16. A tensor core cuts what it adds up where IEEE rounds, so
    each tile has sums of its own, small parts first, which are added in float32.
    """
    chunks = tl.cdiv(M, rows)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    begin = (tl.program_id(0) % chunks).to(tl.int64) * rows
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    codes = tl.arange(0, BLOCK_K)
    z += head * M * D
    indices += head * M

    count = tl.zeros([BLOCK_K], tl.int32)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for first in range(begin, tl.minimum(begin + rows, M), BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        code = used_codes(indices, row, M, K)
        hot = codes[:, None] == code[None, :]  # [BLOCK_K, BLOCK_M]
        count += tl.sum(hot.to(tl.int32), axis=1)
        x = tl.load(z + row[:, None] * D + d[None, :], mask=(code >= 0)[:, None] & (d < D)[None, :], other=0.0)
        fits = fits_a_product(x.to(tl.float32))
        rest = tl.where(fits, x.to(tl.float32), 0.0)
        high = rest.to(tl.bfloat16)
        tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        if x.dtype != tl.bfloat16:
            rest -= high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            if x.dtype == tl.float32:
                tile = product(hot, (rest - middle.to(tl.float32)).to(tl.bfloat16), tile, INTERPRETED)
            tile = product(hot, middle, tile, INTERPRETED)
        total += product(hot, high, tile, INTERPRETED)
        if tl.min(tl.min(fits.to(tl.int32), axis=1), axis=0) == 0:
            for i in range(first, tl.minimum(first + BLOCK_M, M)):
                x_i = tl.load(z + i * D + d, mask=d < D, other=0.0).to(tl.float32)
                left_out = tl.where(fits_a_product(x_i), 0.0, x_i)
                total += tl.where((codes == tl.load(indices + i))[:, None], left_out[None, :], 0.0)

    chunk = tl.program_id(0).to(tl.int64) * K + codes
    if tl.program_id(1) == 0:
        tl.store(partial_counts + chunk, count, mask=codes < K)
    tl.store(partials + chunk[:, None] * D + d[None, :], total, mask=(codes < K)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["chunks", "K"])
def code_stats_add_kernel(
    partial_counts,  # [H, chunks, K]
    partials,  # [H, chunks, K, D]
    counts,  # [H, K]
    sums,  # [H, K, D]
    chunks,
    K,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program adds one code's counts and sums of all chunks, in float64."""
    head = (tl.program_id(0) // K).to(tl.int64)
    code = (tl.program_id(0) % K).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.zeros([BLOCK_C], tl.float64)
    total = tl.zeros([BLOCK_C, BLOCK_D], tl.float64)
    for first in range(0, chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        place = (head * chunks + chunk) * K + code
        mask = (chunk < chunks)[:, None] & (d < D)[None, :]
        count += tl.load(partial_counts + place, mask=chunk < chunks, other=0)
        total += tl.load(partials + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(counts + head * K + code, tl.sum(count, axis=0).to(tl.float32))
    tl.store(sums + (head * K + code) * D + d, tl.sum(total, axis=0).to(tl.float32), mask=d < D)


def sum_sorted(z: Tensor, indices: Tensor, counts: Tensor, sums: Tensor) -> None:
    """Whichever kernels `engine.compile_ahead` leaves out, the others read and write inside their tensors."""
    (H, M, D), K = z.shape, counts.shape[1]
    totals, ends, order = (sorted_by_counting if K <= MANY_CODES else sorted_by_library)(indices, counts)
    pieces, piece_blocks, blocks = triton.cdiv(M, PIECE), blocks_of_piece(D), sum_blocks(M, K, D)
    partials = torch.empty(H, pieces, 2, D, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        if M > PIECE:
            code_stats_piece_kernel[(H * pieces, max(1, triton.cdiv(D, piece_blocks["BLOCK_D"])))](
                z, indices, order, totals, ends, partials, M, K, D, PIECE=PIECE, **piece_blocks
            )
        code_stats_sum_kernel[(H * triton.cdiv(K, blocks["BLOCK_K"]), max(1, triton.cdiv(D, blocks["BLOCK_D"])))](
            z, order, totals, ends, partials, sums, M, K, D, PIECE=PIECE, **blocks
        )


def sorted_by_counting(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Writes counts. Returns how many rows each code has, int32 [H, K], where they end in the order, int64 [H, K], and
    the order, int64 [H, M]: the rows that count, sorted by code, before what nobody reads.
    """
    (H, M), K, device = indices.shape, counts.shape[1], indices.device
    rank_blocks, scan_blocks = blocks_of_rank(K), blocks_of_scan(K)
    rows, part = rank_blocks["ROWS"], scan_blocks["BLOCK_K"]
    chunks, parts = triton.cdiv(M, rows), triton.cdiv(K, part)
    ranks, sizes, totals, begins, part_totals = (
        dispatch.empty_indices(H, size, device=device, dtype=torch.int32) for size in (M, chunks * K, K, K, parts)
    )
    ends, order = (dispatch.empty_indices(H, size, device=device) for size in (K, M))
    with torch.cuda.device_of(indices):
        code_stats_rank_kernel[(H * chunks,)](indices, ranks, sizes, M, K, **rank_blocks)
        code_stats_scan_kernel[(H * parts,)](sizes, totals, counts, begins, part_totals, chunks, K, **scan_blocks)
        scanned = (indices, ranks, sizes, totals, begins, part_totals)
        code_stats_order_kernel[(H * triton.cdiv(M, ORDER_BLOCKS["BLOCK_M"]),)](
            *scanned, ends, order, M, K, rows, part, PARTS=triton.next_power_of_2(parts), **ORDER_BLOCKS
        )
    return totals, ends, order


def sorted_by_library(indices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `sorted_by_counting` does."""
    (H, _), K = indices.shape, counts.shape[1]
    codes, order = torch.where((indices >= 0) & (indices < K), indices, K).sort(dim=-1, stable=True)
    ends = torch.searchsorted(codes, torch.arange(K, device=codes.device).repeat(H, 1), right=True)
    totals = ends.diff(dim=-1, prepend=ends.new_zeros(H, 1)).int()
    counts.copy_(totals)
    return totals, ends, order


# Rows that one program sums. Fewer would keep more of a GPU busy and leave more partial sums to add.
PIECE = 128
ORDER_BLOCKS = {"BLOCK_M": 256, "num_warps": 4, **FUSED}


def blocks_of_rank(K: int) -> dict:
    """The more codes, the more rows to a chunk: at most 64 counts for each row, as there are at most MANY_CODES."""
    rows = min(max(triton.next_power_of_2(K) // 32, 256), 1024)
    return {"ROWS": rows, "num_warps": min(rows // 64, 8), **FUSED}


def blocks_of_scan(K: int) -> dict:
    """At most 1024 parts, whose totals each program of the next kernel adds up."""
    codes = max(8, triton.next_power_of_2(K) // 1024)
    return {"BLOCK_C": 2048 // codes, "BLOCK_K": codes, "num_warps": 4, **FUSED}


def blocks_of_piece(D: int) -> dict:
    return {"BLOCK_D": min(max(triton.next_power_of_2(D), 16), 64), "num_warps": 4, **FUSED}


def sum_blocks(M: int, K: int, D: int) -> dict:
    """A tile has 16 or 32 rows, of one code or of several that have few each."""
    columns = min(max(triton.next_power_of_2(D), 16), 128)
    tile = 32 if columns <= 64 else 16
    rows = min(max(triton.next_power_of_2(triton.cdiv(M, K)), 1), tile)
    warps = 2 if columns <= 64 else 4
    return {"BLOCK_K": tile // rows, "BLOCK_M": rows, "BLOCK_D": columns, "num_warps": warps, **FUSED}


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_rank_kernel(
    indices,  # [H, M]
    ranks,  # [H, M]: how many of the chunk's earlier rows have the row's code
    sizes,  # [H, chunks, K]: how many rows of the chunk each code has
    M,
    K,
    ROWS: tl.constexpr,  # of a chunk
):
    """One program sorts the rows of a chunk by code."""
    chunks = tl.cdiv(M, ROWS)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    place = tl.arange(0, ROWS)
    sizes += (head * chunks + chunk) * K
    code = used_codes(indices + head * M, chunk * ROWS + place, M, K)
    for first in range(0, K, ROWS):
        tl.store(sizes + first + place, tl.zeros([ROWS], tl.int32), mask=first + place < K)
    tl.debug_barrier()  # below, other threads of the program write to some of the same places

    key = tl.sort((code + 1) * ROWS + place)
    code = key // ROWS - 1
    is_first = (place == 0) | (tl.gather(key, tl.maximum(place - 1, 0), axis=0) // ROWS - 1 != code)
    is_last = (place == ROWS - 1) | (tl.gather(key, tl.minimum(place + 1, ROWS - 1), axis=0) // ROWS - 1 != code)
    rank = place - tl.associative_scan(tl.where(is_first, place, 0), 0, larger)
    row = chunk * ROWS + key % ROWS
    tl.store(ranks + head * M + row, rank, mask=row < M)
    tl.store(sizes + code, rank + 1, mask=is_last & (code >= 0))


@triton.jit(do_not_specialize=["chunks", "K"])
def code_stats_scan_kernel(
    sizes,  # [H, chunks, K]; becomes how many rows of earlier chunks each code has
    totals,  # [H, K]
    counts,  # [H, K]
    begins,  # [H, K]: how many rows the part's earlier codes have
    part_totals,  # [H, parts]: how many rows each BLOCK_K codes have
    chunks,
    K,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    parts = tl.cdiv(K, BLOCK_K)
    head = (tl.program_id(0) // parts).to(tl.int64)
    codes = (tl.program_id(0) % parts) * BLOCK_K + tl.arange(0, BLOCK_K)
    sizes += head * chunks * K
    total = tl.zeros([BLOCK_K], tl.int32)
    for first in range(0, chunks, BLOCK_C):
        chunk = (first + tl.arange(0, BLOCK_C)).to(tl.int64)
        places = sizes + chunk[:, None] * K + codes[None, :]
        mask = (chunk < chunks)[:, None] & (codes < K)[None, :]
        size = tl.load(places, mask=mask, other=0)
        tl.store(places, total[None, :] + tl.cumsum(size, axis=0) - size, mask=mask)
        total += tl.sum(size, axis=0)
    tl.store(totals + head * K + codes, total, mask=codes < K)
    tl.store(counts + head * K + codes, total.to(tl.float32), mask=codes < K)
    tl.store(begins + head * K + codes, tl.cumsum(total, axis=0) - total, mask=codes < K)
    tl.store(part_totals + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_order_kernel(
    indices,  # [H, M]
    ranks,  # [H, M]
    before,  # [H, chunks, K]: how many rows of earlier chunks each code has
    totals,  # [H, K]
    begins,  # [H, K]: how many rows the part's earlier codes have
    part_totals,  # [H, parts]
    ends,  # [H, K]: code k has the sorted rows ends[k] - totals[k] to ends[k]
    order,  # [H, M]: the rows that count, sorted by code
    M,
    K,
    ROWS: tl.constexpr,  # of a chunk
    BLOCK_K: tl.constexpr,  # codes of a part
    PARTS: tl.constexpr,  # a power of 2, at least how many there are
    BLOCK_M: tl.constexpr,
):
    """Each program adds up the parts before, and writes `ends` of some codes and `order` of its rows."""
    blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    parts = tl.cdiv(K, BLOCK_K)
    part = tl.arange(0, PARTS)
    size = tl.load(part_totals + head * parts + part, mask=part < parts, other=0).to(tl.int64)
    part_begin = tl.cumsum(size, axis=0) - size

    for first in range(block * BLOCK_M, K, blocks * BLOCK_M):
        code = first + tl.arange(0, BLOCK_M)
        inside = code < K
        end = tl.gather(part_begin, tl.where(inside, code, 0) // BLOCK_K, axis=0)
        end += tl.load(begins + head * K + code, mask=inside, other=0)
        end += tl.load(totals + head * K + code, mask=inside, other=0)
        tl.store(ends + head * K + code, end, mask=inside)

    row = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    code = used_codes(indices + head * M, row, M, K)
    used = code >= 0
    chunk = head * tl.cdiv(M, ROWS) + row // ROWS
    place = tl.gather(part_begin, tl.where(used, code, 0) // BLOCK_K, axis=0)
    place += tl.load(begins + head * K + code, mask=used, other=0)
    place += tl.load(before + chunk * K + code, mask=used, other=0)
    place += tl.load(ranks + head * M + row, mask=used, other=0)
    # Always below M, but where a kernel before this one was left out.
    tl.store(order + head * M + place, row, mask=used & (place < M))


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_piece_kernel(
    z,  # [H, M, D]
    indices,  # [H, M]
    order,  # [H, M]
    totals,  # [H, K]
    ends,  # [H, K]
    partials,  # [H, pieces, 2, D]
    M,
    K,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For codes with more than PIECE rows, their sums over each PIECE sorted rows.

    No more than two such codes have rows in a piece: the one of its first row, and the one of its last.
    """
    pieces = tl.cdiv(M, PIECE)
    head = (tl.program_id(0) // pieces).to(tl.int64)
    begin = (tl.program_id(0) % pieces).to(tl.int64) * PIECE
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    indices += head * M
    order += head * M
    totals += head * K
    ends += head * K

    end = tl.minimum(begin + PIECE, tl.load(ends + K - 1))
    if begin < end:
        first, last = tl.load(indices + tl.load(order + begin)), tl.load(indices + tl.load(order + end - 1))
        first_size, last_size = tl.load(totals + first), tl.load(totals + last)
        if (first_size > PIECE) | (last_size > PIECE):
            place = begin + tl.arange(0, PIECE)
            of_first = place < tl.minimum(tl.load(ends + first), end)
            of_last = (place >= tl.load(ends + last) - last_size) & (place < end)
            row = tl.load(order + place, mask=of_first | of_last, other=0)
            mask = (of_first | of_last)[:, None] & (d < D)[None, :]
            x = tl.load(z + (head * M + row)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            part = partials + tl.program_id(0).to(tl.int64) * 2 * D + d
            tl.store(part, tl.sum(tl.where(of_first[:, None], x, 0.0), axis=0), mask=d < D)
            tl.store(part + D, tl.sum(tl.where(of_last[:, None], x, 0.0), axis=0), mask=d < D)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_sum_kernel(
    z,  # [H, M, D]
    order,  # [H, M]
    totals,  # [H, K]
    ends,  # [H, K]
    partials,  # [H, pieces, 2, D]
    sums,  # [H, K, D]
    M,
    K,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_K codes: the sum of each one's rows, or of its pieces if it has more than PIECE rows."""
    blocks = tl.cdiv(K, BLOCK_K)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    codes = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z += head * M * D
    order += head * M
    size = tl.load(totals + head * K + codes, mask=codes < K, other=0)
    end = tl.load(ends + head * K + codes, mask=codes < K, other=0)
    begin = tl.maximum(end - size, 0)  # below only where the kernel that writes `ends` was left out (compile_ahead)
    is_large = size > PIECE

    last = tl.where(is_large, begin, end)
    total = tl.zeros([BLOCK_K, BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, tl.max(last - begin, axis=0), BLOCK_M):
        place = begin[:, None] + first + tl.arange(0, BLOCK_M)[None, :]
        inside = place < last[:, None]
        row = tl.load(order + place, mask=inside, other=0)
        mask = inside[:, :, None] & (d < D)[None, None, :]
        total += tl.load(z + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=1)  # [BLOCK_K, BLOCK_D]

    if tl.max(size, axis=0) > PIECE:
        partials += head * tl.cdiv(M, PIECE) * 2 * D
        first_piece = begin // PIECE
        end_piece = tl.where(is_large, tl.cdiv(end, PIECE), first_piece)
        # In float64, as with very many rows there are very many pieces.
        wide = tl.zeros([BLOCK_K, BLOCK_M, BLOCK_D], tl.float64)
        for first in range(0, tl.max(end_piece - first_piece, axis=0), BLOCK_M):
            piece = first_piece[:, None] + first + tl.arange(0, BLOCK_M)[None, :]
            # In the piece where it begins, a code holds the last row and, unless they begin together, not the first.
            part = piece * 2 + (piece * PIECE < begin[:, None]).to(tl.int64)
            mask = (piece < end_piece[:, None])[:, :, None] & (d < D)[None, None, :]
            wide += tl.load(partials + part[:, :, None] * D + d[None, None, :], mask=mask, other=0.0)
        result = tl.where(is_large[:, None], tl.sum(wide, axis=1).to(tl.float32), result)
    mask = (codes < K)[:, None] & (d < D)[None, :]
    tl.store(sums + (head * K + codes)[:, None] * D + d[None, :], result, mask=mask)
