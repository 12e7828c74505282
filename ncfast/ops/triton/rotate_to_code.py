"""rotate_to_code in Triton: one pass over the rows each way, in float32 whatever the type of z."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_NORM = tl.constexpr(1e-6)
LEAST_NORM_SQUARED = tl.constexpr(1e-6 * 1e-6)


def rotate_to_code_triton(z: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z [H, M, D] float32, float16 or bfloat16, codebook float32 [H, K, D], indices int64 [H, M], all contiguous.

    Returns q [H, M, D] as z, the mean of (z - q)² over the rows that have a code, and one over its number of elements;
    the latter two float32 scalars, 0 when no row has a code.
    """
    (H, M, D), K = z.shape, codebook.shape[1]
    q = torch.empty_like(z)
    loss = torch.empty((), dtype=torch.float32, device=z.device)
    inverse_count = torch.empty_like(loss)
    blocks = row_blocks(D)
    programs = triton.cdiv(H * M, blocks["BLOCK_M"]) if D > 0 else 0
    errors = torch.empty(programs, dtype=torch.float32, device=z.device)
    used_rows = torch.empty(programs, dtype=torch.int32, device=z.device)
    with torch.cuda.device_of(z):
        if programs > 0:
            rotate_to_code_kernel[(programs,)](z, codebook, indices, q, errors, used_rows, H * M, M, K, D, **blocks)
        rotate_to_code_loss_kernel[(1,)](errors, used_rows, loss, inverse_count, programs, D, **LOSS_BLOCKS)
    return q, loss, inverse_count


def rotate_to_code_backward_triton(
    grad_q: Tensor,
    grad_loss: Tensor,
    z: Tensor,
    q: Tensor,
    indices: Tensor,
    inverse_count: Tensor,
    num_codes: int,
    rotate: bool,
) -> Tensor:
    """grad_q, z, q [H, M, D] of one type, indices [H, M], all contiguous; two float32 scalars -> grad_z [H, M, D]."""
    D, rows = z.shape[-1], indices.numel()
    grad_z = torch.empty_like(z)
    if grad_z.numel() == 0:
        return grad_z
    blocks = row_blocks(D)
    with torch.cuda.device_of(z):
        rotate_to_code_backward_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
            grad_q,
            grad_loss,
            z,
            q,
            indices,
            inverse_count,
            grad_z,
            rows,
            num_codes,
            D,
            ROTATE=rotate,
            ONE_TILE=blocks["BLOCK_D"] >= D,
            **blocks,
        )
    return grad_z


# Enable FMA fusion explicitly: newer Triton turns it off by default.
FUSED = {"enable_fp_fusion": True}
LOSS_BLOCKS = {"BLOCK": 2048, "num_warps": 8, **FUSED}


def row_blocks(D: int) -> dict:
    """Rows and columns of a tile: 2048 elements, so that three of them and the results stay in registers."""
    columns = min(max(triton.next_power_of_2(D), 16), 1024)
    return {"BLOCK_M": 2048 // columns, "BLOCK_D": columns, "num_warps": 4, **FUSED}


@triton.jit(do_not_specialize=["rows", "M", "K"])
def rotate_to_code_kernel(
    z,  # [H, M, D]
    codebook,  # [H, K, D]
    indices,  # [H, M]
    q,  # [H, M, D]
    errors,  # [programs]: the sum of (z - q)² over the rows of each
    used_rows,  # [programs]: how many of those have a code
    rows,  # H M
    M,
    K,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(indices + row, mask=row < rows, other=-1)
    used = (index >= 0) & (index < K)
    code = row // M * K + index  # int64, only read where used
    square = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_d in range(0, D, BLOCK_D):
        d = first_d + tl.arange(0, BLOCK_D)
        of_row = row[:, None] * D + d[None, :]
        mask = used[:, None] & (d < D)[None, :]
        q_tile = tl.load(codebook + code[:, None] * D + d[None, :], mask=mask, other=0.0).to(q.dtype.element_ty)
        tl.store(q + of_row, q_tile, mask=(row < rows)[:, None] & (d < D)[None, :])
        difference = tl.load(z + of_row, mask=mask, other=0.0).to(tl.float32) - q_tile.to(tl.float32)
        square += difference * difference
    tl.store(errors + tl.program_id(0), tl.sum(tl.sum(square, axis=1), axis=0))
    tl.store(used_rows + tl.program_id(0), tl.sum(used.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["programs", "D"])
def rotate_to_code_loss_kernel(
    errors,  # [programs]
    used_rows,  # [programs]
    loss,  # scalar
    inverse_count,  # scalar
    programs,
    D,
    BLOCK: tl.constexpr,
):
    """One program adds up what the others left, in a fixed order."""
    error = tl.zeros([BLOCK], tl.float64)
    used = tl.zeros([BLOCK], tl.int64)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        error += tl.load(errors + program, mask=program < programs, other=0.0).to(tl.float64)
        used += tl.load(used_rows + program, mask=program < programs, other=0).to(tl.int64)
    elements = (tl.sum(used, axis=0) * D).to(tl.float64)
    inverse = tl.where(elements > 0, 1.0 / tl.maximum(elements, 1.0), 0.0)
    tl.store(loss, (tl.sum(error, axis=0) * inverse).to(tl.float32))
    tl.store(inverse_count, inverse.to(tl.float32))


@triton.jit
def load_used(array, row, used, d, D):
    """array[row, d] in float32, zeros in rows without a code."""
    mask = used[:, None] & (d < D)[None, :]
    return tl.load(array + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "K"])
def rotate_to_code_backward_kernel(
    grad_q,  # [rows, D]
    grad_loss,  # scalar
    z,  # [rows, D]
    q,  # [rows, D]
    indices,  # [rows]
    inverse_count,  # scalar
    grad_z,  # [rows, D]
    rows,
    K,
    D,
    ROTATE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_z is a combination of g, z, q and their bisector, with coefficients from products over the row; they are
    derived in csrc/cpu/rotate_to_code_kernel.h."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.load(indices + row, mask=row < rows, other=-1)
    used = (index >= 0) & (index < K)
    commitment = 2 * tl.load(grad_loss) * tl.load(inverse_count)
    of_g = tl.full([BLOCK_M], 1.0, tl.float32)
    of_z = tl.zeros([BLOCK_M], tl.float32) + commitment

    if ONE_TILE:
        d = tl.arange(0, BLOCK_D)
        g_tile = load_used(grad_q, row, used, d, D)
        z_tile = load_used(z, row, used, d, D)
        q_tile = load_used(q, row, used, d, D)

    scale = tl.zeros([BLOCK_M], tl.float32)
    of_s = scale
    if ROTATE:
        if ONE_TILE:
            zz, qq = tl.sum(z_tile * z_tile, axis=1), tl.sum(q_tile * q_tile, axis=1)
            gq = tl.sum(g_tile * q_tile, axis=1)
        else:
            zz = tl.zeros([BLOCK_M], tl.float32)
            qq, gq = zz, zz
            for first_d in range(0, D, BLOCK_D):
                d = first_d + tl.arange(0, BLOCK_D)
                z_tile = load_used(z, row, used, d, D)
                q_tile = load_used(q, row, used, d, D)
                zz += tl.sum(z_tile * z_tile, axis=1)
                qq += tl.sum(q_tile * q_tile, axis=1)
                gq += tl.sum(load_used(grad_q, row, used, d, D) * q_tile, axis=1)
        norm_z, norm_q = tl.sqrt_rn(zz), tl.sqrt_rn(qq)
        inverse_z, inverse_q = 1 / tl.maximum(norm_z, LEAST_NORM), 1 / tl.maximum(norm_q, LEAST_NORM)
        # The bisector z + scale q is summed as it stands: from products it would cancel where q points away from z.
        scale = norm_z * inverse_q
        if ONE_TILE:
            s_tile = z_tile + scale[:, None] * q_tile
            ss, gs = tl.sum(s_tile * s_tile, axis=1), tl.sum(g_tile * s_tile, axis=1)
        else:
            ss = tl.zeros([BLOCK_M], tl.float32)
            gs = ss
            for first_d in range(0, D, BLOCK_D):
                d = first_d + tl.arange(0, BLOCK_D)
                s_tile = load_used(z, row, used, d, D) + scale[:, None] * load_used(q, row, used, d, D)
                ss += tl.sum(s_tile * s_tile, axis=1)
                gs += tl.sum(load_used(grad_q, row, used, d, D) * s_tile, axis=1)
        stretch = norm_q * inverse_z
        # A row shorter than the floor has no direction to rotate.
        turns = norm_z >= LEAST_NORM
        of_g = tl.where(turns, stretch, of_g)
        of_z += tl.where(turns, 2 * stretch * gq * inverse_q * inverse_z, 0.0)
        of_s = tl.where(turns, -2 * stretch * gs / tl.maximum(ss, zz * LEAST_NORM_SQUARED), 0.0)

    if ONE_TILE:
        gradient = of_g[:, None] * g_tile + of_z[:, None] * z_tile - commitment * q_tile
        gradient += of_s[:, None] * (z_tile + scale[:, None] * q_tile)
        # A loss gradient that is not finite must not reach the rows without a code.
        gradient = tl.where(used[:, None], gradient, 0.0).to(grad_z.dtype.element_ty)
        tl.store(grad_z + row[:, None] * D + d[None, :], gradient, mask=(row < rows)[:, None] & (d < D)[None, :])
    else:
        for first_d in range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            z_tile = load_used(z, row, used, d, D)
            q_tile = load_used(q, row, used, d, D)
            gradient = of_g[:, None] * load_used(grad_q, row, used, d, D) + of_z[:, None] * z_tile - commitment * q_tile
            gradient += of_s[:, None] * (z_tile + scale[:, None] * q_tile)
            gradient = tl.where(used[:, None], gradient, 0.0).to(grad_z.dtype.element_ty)
            tl.store(grad_z + row[:, None] * D + d[None, :], gradient, mask=(row < rows)[:, None] & (d < D)[None, :])
