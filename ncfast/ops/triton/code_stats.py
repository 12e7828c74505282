"""Counts and sums per code in Triton, in an order that shapes alone decide, without an atomic.

Few codes: each program multiplies a stretch of rows with their one-hot matrix. Many: the rows are sorted by code, by
counting, then summed in that order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops import dispatch

FEW_CODES = 128


def code_stats_triton(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """z [H, M, D] float32, float16 or bfloat16, indices int64 [H, M], contiguous -> counts [H, K], sums [H, K, D]."""
    (H, M, D), K = z.shape, num_codes
    make = torch.zeros if M == 0 else torch.empty
    counts = make(H, K, dtype=torch.float32, device=z.device)
    sums = make(H, K, D, dtype=torch.float32, device=z.device)
    if H * M > 0:
        (sum_by_product if K <= FEW_CODES else sum_sorted)(z, indices, counts, sums)
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
    """Counts and sums of one stretch of rows.

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
    """One program adds one code's counts and sums of all chunks, in float64 as there may be very many."""
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
    """Counts are taken of each RANK_ROWS rows or more, so that there are at most 16 of them for each row."""
    (H, M, D), K, device = z.shape, counts.shape[1], z.device
    rows = min(max(triton.next_power_of_2(K) // 16, RANK_ROWS), MOST_RANK_ROWS)
    chunks, sum_chunks = triton.cdiv(M, rows), triton.cdiv(M, CHUNK)
    ranks = dispatch.empty_indices(H, M, device=device, dtype=torch.int32)
    order = dispatch.empty_indices(H, M, device=device)
    totals = dispatch.empty_indices(H, K, device=device, dtype=torch.int32)
    sizes = torch.zeros(H, chunks, K, dtype=torch.int32, device=device)
    partials = torch.empty(H, sum_chunks, 2, D, dtype=torch.float32, device=device)
    blocks = sum_blocks(M, K, D)
    chunk_blocks = {name: size for name, size in blocks.items() if name != "BLOCK_K"} | {"BLOCK_M": 32}
    d_blocks = max(1, triton.cdiv(D, blocks["BLOCK_D"]))
    with torch.cuda.device_of(z):
        code_stats_rank_kernel[(H * triton.cdiv(M, RANK_BLOCKS["BLOCK_I"]),)](
            indices, ranks, sizes, M, K, rows, **RANK_BLOCKS
        )
        code_stats_scan_kernel[(H * triton.cdiv(K, SCAN_BLOCKS["BLOCK_K"]),)](
            sizes, totals, counts, chunks, K, **SCAN_BLOCKS
        )
        ends = totals.cumsum(-1)  # int64 [H, K]: code k has the sorted rows ends[k] - totals[k] to ends[k]
        code_stats_order_kernel[(H * triton.cdiv(M, ORDER_BLOCKS["BLOCK_M"]),)](
            indices, ranks, sizes, totals, ends, order, M, K, rows, **ORDER_BLOCKS
        )
        if M > CHUNK:
            code_stats_chunk_kernel[(H * sum_chunks, d_blocks)](
                z, indices, order, totals, ends, partials, M, K, D, CHUNK=CHUNK, **chunk_blocks
            )
        code_stats_sum_kernel[(H * triton.cdiv(K, blocks["BLOCK_K"]), d_blocks)](
            z, order, totals, ends, partials, sums, M, K, D, CHUNK=CHUNK, **blocks
        )


RANK_ROWS, MOST_RANK_ROWS = 128, 16384
RANK_BLOCKS = {"BLOCK_I": 64, "BLOCK_J": 64, "num_warps": 4, **FUSED}
SCAN_BLOCKS = {"BLOCK_C": 64, "BLOCK_K": 16, "num_warps": 4, **FUSED}
ORDER_BLOCKS = {"BLOCK_M": 256, "num_warps": 4, **FUSED}
# Rows that one program sums. Fewer would keep more of a GPU busy and leave more partial sums to add.
CHUNK = 128


def sum_blocks(M: int, K: int, D: int) -> dict:
    """A tile has 16 or 32 rows, of one code or of several that have few each."""
    columns = min(max(triton.next_power_of_2(D), 16), 128)
    tile = 32 if columns <= 64 else 16
    rows = min(max(triton.next_power_of_2(triton.cdiv(M, K)), 1), tile)
    return {"BLOCK_K": tile // rows, "BLOCK_M": rows, "BLOCK_D": columns, "num_warps": 4, **FUSED}


@triton.jit(do_not_specialize=["M", "K", "rows"])
def code_stats_rank_kernel(
    indices,  # [H, M]
    ranks,  # [H, M]: how many of the chunk's earlier rows have the row's code
    sizes,  # [H, chunks, K], zeros: how many rows of the chunk each code has
    M,
    K,
    rows,  # of a chunk: a multiple of BLOCK_I and BLOCK_J, at most MOST_RANK_ROWS
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program compares BLOCK_I rows with all of their chunk."""
    blocks = tl.cdiv(M, BLOCK_I)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first_row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_I
    chunk = first_row // rows
    begin = chunk * rows
    i = (first_row - begin).to(tl.int32) + tl.arange(0, BLOCK_I)
    indices += head * M
    code = used_codes(indices, begin + i, M, K)
    found = tl.zeros([BLOCK_J, BLOCK_I], tl.int32)  # earlier rows with the code, and 2^16 for each other, itself too
    for first in range(0, tl.minimum(rows, M - begin), BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        same = used_codes(indices, begin + j, M, K)[:, None] == code[None, :]
        found += tl.where(same, tl.where(j[:, None] < i[None, :], 1, 65536), 0)
    found = tl.sum(found, axis=0)
    rank = found & 65535
    tl.store(ranks + head * M + begin + i, rank, mask=begin + i < M)
    is_last = (found >> 16) == 1
    sizes += (head * tl.cdiv(M, rows) + chunk) * K
    tl.store(sizes + code, rank + 1, mask=is_last & (code >= 0))


@triton.jit(do_not_specialize=["chunks", "K"])
def code_stats_scan_kernel(
    sizes,  # [H, chunks, K]; becomes how many rows of earlier chunks each code has
    totals,  # [H, K]
    counts,  # [H, K]
    chunks,
    K,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    codes = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
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


@triton.jit(do_not_specialize=["M", "K", "rows"])
def code_stats_order_kernel(
    indices,  # [H, M]
    ranks,  # [H, M]
    before,  # [H, chunks, K]: how many rows of earlier chunks each code has
    totals,  # [H, K]
    ends,  # [H, K]
    order,  # [H, M]: the rows that count, sorted by code
    M,
    K,
    rows,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(M, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    code = used_codes(indices + head * M, row, M, K)
    used = code >= 0
    chunk = head * tl.cdiv(M, rows) + row // rows
    begin = tl.load(ends + head * K + code, mask=used, other=0) - tl.load(totals + head * K + code, mask=used, other=0)
    place = begin + tl.load(before + chunk * K + code, mask=used, other=0)
    place += tl.load(ranks + head * M + row, mask=used, other=0)
    # Always below M, but where a kernel before this one was left out (engine.compile_ahead).
    tl.store(order + head * M + place, row, mask=used & (place < M))


@triton.jit
def sum_rows(
    z,  # [M, D]
    order,  # [M]
    begin,
    end,
    d,  # [BLOCK_D]
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The float32 sum of z[order[begin:end], d]."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_M):
        place = first + tl.arange(0, BLOCK_M)
        row = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & (d < D)[None, :]
        total += tl.load(z + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_chunk_kernel(
    z,  # [H, M, D]
    indices,  # [H, M]
    order,  # [H, M]
    totals,  # [H, K]
    ends,  # [H, K]
    partials,  # [H, chunks, 2, D]
    M,
    K,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For codes with more than CHUNK rows, their sums over each CHUNK sorted rows.

    No more than two such codes have rows in a chunk: the one of its first row, and the one of its last.
    """
    chunks = tl.cdiv(M, CHUNK)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    begin = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z += head * M * D
    indices += head * M
    order += head * M
    totals += head * K
    ends += head * K
    partials += tl.program_id(0).to(tl.int64) * 2 * D

    end = tl.minimum(begin + CHUNK, tl.load(ends + K - 1))
    if begin < end:
        first = tl.load(indices + tl.load(order + begin))
        code_end = tl.load(ends + first)
        if tl.load(totals + first) > CHUNK:
            total = sum_rows(z, order, begin, tl.minimum(end, code_end), d, D, BLOCK_M, BLOCK_D)
            tl.store(partials + d, total, mask=d < D)
        last = tl.load(indices + tl.load(order + end - 1))
        size = tl.load(totals + last)
        if (last > first) & (size > CHUNK):
            total = sum_rows(z, order, tl.load(ends + last) - size, end, d, D, BLOCK_M, BLOCK_D)
            tl.store(partials + D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_sum_kernel(
    z,  # [H, M, D]
    order,  # [H, M]
    totals,  # [H, K]
    ends,  # [H, K]
    partials,  # [H, chunks, 2, D]
    sums,  # [H, K, D]
    M,
    K,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes BLOCK_K codes: the sum of each one's rows, or of its chunks if it has more than CHUNK rows."""
    blocks = tl.cdiv(K, BLOCK_K)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    codes = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z += head * M * D
    order += head * M
    size = tl.load(totals + head * K + codes, mask=codes < K, other=0)
    end = tl.load(ends + head * K + codes, mask=codes < K, other=0)
    begin = end - size
    is_large = size > CHUNK

    last = tl.where(is_large, begin, end)
    total = tl.zeros([BLOCK_K, BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, tl.max(last - begin, axis=0), BLOCK_M):
        place = begin[:, None] + first + tl.arange(0, BLOCK_M)[None, :]
        inside = place < last[:, None]
        row = tl.load(order + place, mask=inside, other=0)
        mask = inside[:, :, None] & (d < D)[None, None, :]
        total += tl.load(z + row[:, :, None] * D + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=1)  # [BLOCK_K, BLOCK_D]

    if tl.max(size, axis=0) > CHUNK:
        partials += head * tl.cdiv(M, CHUNK) * 2 * D
        begin_chunk = begin // CHUNK
        end_chunk = tl.where(is_large, tl.cdiv(end, CHUNK), begin_chunk)
        # In float64, as with very many rows there are very many chunks.
        wide = tl.zeros([BLOCK_K, BLOCK_M, BLOCK_D], tl.float64)
        for first in range(0, tl.max(end_chunk - begin_chunk, axis=0), BLOCK_M):
            chunk = begin_chunk[:, None] + first + tl.arange(0, BLOCK_M)[None, :]
            # In the chunk where it begins, a code holds the last row and, unless they begin together, not the first.
            part = chunk * 2 + (chunk * CHUNK < begin[:, None]).to(tl.int64)
            mask = (chunk < end_chunk[:, None])[:, :, None] & (d < D)[None, None, :]
            wide += tl.load(partials + part[:, :, None] * D + d[None, None, :], mask=mask, other=0.0)
        result = tl.where(is_large[:, None], tl.sum(wide, axis=1).to(tl.float32), result)
    mask = (codes < K)[:, None] & (d < D)[None, :]
    tl.store(sums + (head * K + codes)[:, None] * D + d[None, :], result, mask=mask)
