"""Counts and sums per code in Triton: the rows sorted by code, then summed in that order, without an atomic."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def code_stats_triton(z: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """z [H, M, D] float32, float16 or bfloat16, indices int64 [H, M], both contiguous -> counts [H, K], sums [H, K, D].

    A code with more than CHUNK rows is summed by several programs, each taking a fixed stretch of the sorted rows: all
    rows on one code are then no slower than rows spread evenly, and shapes alone decide the grid.
    """
    (H, M, D), K = z.shape, num_codes
    if H * M == 0:
        return z.new_zeros(H, K, dtype=torch.float32), z.new_zeros(H, K, D, dtype=torch.float32)
    # Rows of no code are sorted before the first or behind the last. 32 bits, as a radix sort's time goes with them.
    keys = indices.clamp(-1, K).to(torch.int32 if K < 2**31 else torch.int64)
    keys, order = keys.sort(dim=-1, stable=True)  # [H, M] each
    codes = torch.arange(K + 1, dtype=keys.dtype, device=z.device).repeat(H, 1)
    bounds = torch.searchsorted(keys, codes)  # int64 [H, K + 1]: code k has the sorted rows bounds[k] to bounds[k + 1]
    counts = torch.empty(H, K, dtype=torch.float32, device=z.device)
    sums = torch.empty(H, K, D, dtype=torch.float32, device=z.device)
    blocks = sum_blocks(D)
    chunks, d_blocks = triton.cdiv(M, CHUNK), max(1, triton.cdiv(D, blocks["BLOCK_D"]))
    partials = torch.empty(H, chunks, 2, D, dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        if M > CHUNK:
            code_stats_chunk_kernel[(H * chunks, d_blocks)](
                z, keys, order, bounds, partials, M, K, D, CHUNK=CHUNK, **blocks
            )
        code_stats_kernel[(H * K, d_blocks)](z, order, bounds, partials, counts, sums, M, K, D, CHUNK=CHUNK, **blocks)
    return counts, sums


# Rows that one program sums. Fewer would keep more of a GPU busy and leave more partial sums to add.
CHUNK = 128


def sum_blocks(D: int) -> dict:
    columns = min(max(triton.next_power_of_2(D), 16), 128)
    # Only sums here: fusion changes nothing, but newer Triton warns where nobody has said whether to fuse.
    return {"BLOCK_M": 32, "BLOCK_D": columns, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def sum_chunk(
    z,  # [M, D]
    order,  # [M]
    begin,
    end,
    d,  # [BLOCK_D]
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The float32 sum of z[order[begin:end], d]."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        row = tl.load(order + rows, mask=rows < end, other=0)
        mask = (rows < end)[:, None] & (d < D)[None, :]
        total += tl.load(z + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_chunk_kernel(
    z,  # [H, M, D]
    keys,  # [H, M], sorted
    order,  # [H, M]: the row of each sorted key
    bounds,  # [H, K + 1]
    partials,  # [H, chunks, 2, D]
    M,
    K,
    D,
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
    end = tl.minimum(begin + CHUNK, M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z += head * M * D
    keys += head * M
    order += head * M
    bounds += head * (K + 1)
    partials += tl.program_id(0).to(tl.int64) * 2 * D

    first = tl.load(keys + begin)
    if (first >= 0) & (first < K):
        code_begin, code_end = tl.load(bounds + first), tl.load(bounds + first + 1)
        if code_end - code_begin > CHUNK:
            total = sum_chunk(z, order, begin, tl.minimum(end, code_end), d, D, BLOCK_M, BLOCK_D)
            tl.store(partials + d, total, mask=d < D)
    last = tl.load(keys + end - 1)
    if (last > first) & (last >= 0) & (last < K):
        code_begin, code_end = tl.load(bounds + last), tl.load(bounds + last + 1)
        if code_end - code_begin > CHUNK:
            total = sum_chunk(z, order, code_begin, end, d, D, BLOCK_M, BLOCK_D)
            tl.store(partials + D + d, total, mask=d < D)


@triton.jit(do_not_specialize=["M", "K"])
def code_stats_kernel(
    z,  # [H, M, D]
    order,  # [H, M]
    bounds,  # [H, K + 1]
    partials,  # [H, chunks, 2, D]
    counts,  # [H, K]
    sums,  # [H, K, D]
    M,
    K,
    D,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program writes one code: the sum of its rows, or of its chunks if there are more than CHUNK rows."""
    head = (tl.program_id(0) // K).to(tl.int64)
    code = (tl.program_id(0) % K).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bounds += head * (K + 1) + code
    begin, end = tl.load(bounds), tl.load(bounds + 1)
    if tl.program_id(1) == 0:
        tl.store(counts + head * K + code, (end - begin).to(tl.float32))
    sums += (head * K + code) * D

    if end - begin <= CHUNK:
        total = sum_chunk(z + head * M * D, order + head * M, begin, end, d, D, BLOCK_M, BLOCK_D)
        tl.store(sums + d, total, mask=d < D)
    else:
        partials += head * tl.cdiv(M, CHUNK) * 2 * D
        end_chunk = tl.cdiv(end, CHUNK)
        # In float64, as with very many rows there are very many chunks.
        wide = tl.zeros([BLOCK_M, BLOCK_D], tl.float64)
        for first in range(begin // CHUNK, end_chunk, BLOCK_M):
            chunk = first + tl.arange(0, BLOCK_M)
            # In the chunk where it begins, a code holds the last row and, unless they begin together, not the first.
            part = chunk * 2 + (chunk * CHUNK < begin).to(tl.int64)
            mask = (chunk < end_chunk)[:, None] & (d < D)[None, :]
            wide += tl.load(partials + part[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float64)
        tl.store(sums + d, tl.sum(wide, axis=0).to(tl.float32), mask=d < D)
