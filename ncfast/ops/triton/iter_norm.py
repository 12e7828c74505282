"""iter_norm in Triton: one program takes a group from its rows to its rows, one launch each way, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def iter_norm_triton(x: Tensor, groups: int, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, D] float32, contiguous, D / groups <= 128 -> y [N, D] and saved [groups, d + 2, d]."""
    (N, D), d = x.shape, x.shape[1] // groups
    y, saved = torch.empty_like(x), x.new_empty(groups, d + 2, d)
    if x.numel() > 0:
        tile = blocks(d)
        matrices = x.new_empty(groups, 3, tile["BLOCK_D"], tile["BLOCK_D"])
        with torch.cuda.device_of(x):
            iter_norm_kernel[(groups,)](x, y, saved, matrices, N, D, d, iterations, eps, **tile)
    return y, saved


def iter_norm_backward_triton(grad_y: Tensor, x: Tensor, saved: Tensor, groups: int, iterations: int) -> Tensor:
    """grad_y and x [N, D], saved [groups, d + 2, d], all float32 and contiguous -> grad_x [N, D]."""
    (N, D), d = x.shape, x.shape[1] // groups
    grad_x = torch.empty_like(x)
    if x.numel() > 0:
        tile = blocks(d)
        matrices = x.new_empty(groups, 7, tile["BLOCK_D"], tile["BLOCK_D"])
        grad_mean = x.new_empty(groups, 2, d)
        with torch.cuda.device_of(x):
            iter_norm_backward_kernel[(groups,)](
                grad_y, x, saved, grad_x, matrices, grad_mean, N, D, d, iterations, **tile
            )
    return grad_x


def blocks(d: int) -> dict:
    """Rows, inner columns and channels of a tile, and warps enough to hold [BLOCK_D, BLOCK_D] in registers."""
    columns = max(triton.next_power_of_2(d), 16)
    warps = {16: 2, 32: 4, 64: 8, 128: 16}[columns]
    # Enable FMA fusion explicitly: newer Triton turns it off, and unfused products halve the speed of the dot.
    return {"BLOCK_N": 32, "BLOCK_K": 16, "BLOCK_D": columns, "num_warps": warps, "enable_fp_fusion": True}


# A dot of whole matrices would hold every row of both operands in registers, far more than there are. So the matrices
# of a group are kept in memory, where the first-level cache has them, and products take them BLOCK_K columns at a time.


@triton.jit
def dot(a, b):
    """TF32 would change what the iteration converges to."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_matrix(a, rows, columns, BLOCK_D: tl.constexpr):  # a [BLOCK_D, BLOCK_D]
    return tl.load(a + rows[:, None] * BLOCK_D + columns[None, :])


@triton.jit
def store_matrix(a, value, BLOCK_D: tl.constexpr):  # a [BLOCK_D, BLOCK_D]
    """All threads have read what it replaces before, and see it after."""
    i = tl.arange(0, BLOCK_D)
    tl.debug_barrier()
    tl.store(a + i[:, None] * BLOCK_D + i[None, :], value)
    tl.debug_barrier()


@triton.jit
def product(a, b, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):  # a, b [BLOCK_D, BLOCK_D]
    i = tl.arange(0, BLOCK_D)
    c = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for first in range(0, d, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        c += dot(load_matrix(a, i, k, BLOCK_D), load_matrix(b, k, i, BLOCK_D))
    return c


@triton.jit
def step(a, w, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """1.5 a - 0.5 a w"""
    i = tl.arange(0, BLOCK_D)
    c = product(a, w, d, BLOCK_K, BLOCK_D)
    return 1.5 * load_matrix(a, i, i, BLOCK_D) - 0.5 * c


@triton.jit
def step_change(a, da, w, dw, d, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """1.5 da - 0.5 (da w + a dw)"""
    i = tl.arange(0, BLOCK_D)
    c = product(da, w, d, BLOCK_K, BLOCK_D) + product(a, dw, d, BLOCK_K, BLOCK_D)
    return 1.5 * load_matrix(da, i, i, BLOCK_D) - 0.5 * c


@triton.jit
def load_group(x, rows, i, N, D, d):  # x [N, D]
    mask = (rows < N)[:, None] & (i < d)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * D + i[None, :], mask=mask, other=0.0)


@triton.jit
def load_centred(x, mean, rows, i, N, D, d):  # x [N, D], mean [2, d]
    """The rows without both parts of their mean, and zeros behind the last row."""
    shift, rest = tl.load(mean + i, mask=i < d, other=0.0), tl.load(mean + d + i, mask=i < d, other=0.0)
    centred = load_group(x, rows, i, N, D, d) - shift[None, :] - rest[None, :]
    return tl.where((rows < N)[:, None], centred, 0.0)


@triton.jit
def store_mean(x, mean, N, D, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # x [N, D], mean [2, d]
    """The mean as a sum of two: the second is what the rounding of the first misses, much for data far off zero."""
    i = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        total += load_group(x, first + tl.arange(0, BLOCK_N), i, N, D, d)
    shift = tl.sum(total, axis=0) / N
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        total += tl.where((rows < N)[:, None], load_group(x, rows, i, N, D, d) - shift[None, :], 0.0)
    tl.store(mean + i, shift, mask=i < d)
    tl.store(mean + d + i, tl.sum(total, axis=0) / N, mask=i < d)
    tl.debug_barrier()


@triton.jit
def store_group(x, rows, i, value, N, D, d):  # x [N, D]
    mask = (rows < N)[:, None] & (i < d)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * D + i[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["N", "iterations", "eps"])
def iter_norm_kernel(
    x,  # [N, D]
    y,  # [N, D]
    saved,  # [groups, d + 2, d]: covariance, and the mean as a sum of two rows
    matrices,  # [groups, 3, BLOCK_D, BLOCK_D], scratch
    N,
    D,
    d,
    iterations,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The recursion is that of csrc/cpu/iter_norm_kernel.h, which says why."""
    group = tl.program_id(0).to(tl.int64)
    x += group * d
    y += group * d
    saved += group * d * (d + 2)
    mean = saved + d * d
    SIZE: tl.constexpr = BLOCK_D * BLOCK_D
    w = matrices + group * 3 * SIZE
    v, p = w + SIZE, w + 2 * SIZE
    i = tl.arange(0, BLOCK_D)
    inside = (i < d)[:, None] & (i < d)[None, :]
    identity = tl.where(inside & (i[:, None] == i[None, :]), 1.0, 0.0)

    store_mean(x, mean, N, D, d, BLOCK_N, BLOCK_D)
    covariance = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_K):
        rows = load_centred(x, mean, first + tl.arange(0, BLOCK_K), i, N, D, d)
        covariance += dot(tl.trans(rows), rows)
    covariance = covariance / N + eps * identity
    tl.store(saved + i[:, None] * d + i[None, :], covariance, mask=inside)

    trace = tl.sum(tl.sum(covariance * identity, axis=1), axis=0)
    scaled = covariance * (1.0 / trace)
    store_matrix(w, scaled, BLOCK_D)
    result = 1.5 * identity - 0.5 * scaled
    if iterations == 0:
        result = identity
    store_matrix(p, result, BLOCK_D)
    for _ in range(1, iterations):
        store_matrix(v, step(w, w, d, BLOCK_K, BLOCK_D), BLOCK_D)
        store_matrix(w, step(v, w, d, BLOCK_K, BLOCK_D), BLOCK_D)
        store_matrix(p, step(p, w, d, BLOCK_K, BLOCK_D), BLOCK_D)

    scale = 1.0 / tl.sqrt_rn(trace)
    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        whitened = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first_k in range(0, d, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            whitened += dot(load_centred(x, mean, rows, k, N, D, d), load_matrix(p, k, i, BLOCK_D))
        store_group(y, rows, i, scale * whitened, N, D, d)


@triton.jit(do_not_specialize=["N", "iterations"])
def iter_norm_backward_kernel(
    grad_y,  # [N, D]
    x,  # [N, D]
    saved,  # [groups, d + 2, d]
    grad_x,  # [N, D]
    matrices,  # [groups, 7, BLOCK_D, BLOCK_D], scratch
    grad_mean,  # [groups, 2, d], scratch
    N,
    D,
    d,
    iterations,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of a polynomial of S is its derivative, so the recursion is walked forwards, with dw, dv and dp."""
    group = tl.program_id(0).to(tl.int64)
    grad_y += group * d
    x += group * d
    grad_x += group * d
    saved += group * d * (d + 2)
    mean = saved + d * d
    grad_mean += group * 2 * d
    SIZE: tl.constexpr = BLOCK_D * BLOCK_D
    w = matrices + group * 7 * SIZE
    v, p, g = w + SIZE, w + 2 * SIZE, w + 3 * SIZE
    dw, dv, dp = w + 4 * SIZE, w + 5 * SIZE, w + 6 * SIZE
    i = tl.arange(0, BLOCK_D)
    inside = (i < d)[:, None] & (i < d)[None, :]
    identity = tl.where(inside & (i[:, None] == i[None, :]), 1.0, 0.0)

    store_mean(grad_y, grad_mean, N, D, d, BLOCK_N, BLOCK_D)
    of_p = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    for first in range(0, N, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        centred = load_centred(x, mean, rows, i, N, D, d)
        of_p += dot(tl.trans(centred), load_centred(grad_y, grad_mean, rows, i, N, D, d))
    store_matrix(g, of_p, BLOCK_D)
    of_p += tl.load(g + i[None, :] * BLOCK_D + i[:, None])

    covariance = tl.load(saved + i[:, None] * d + i[None, :], mask=inside, other=0.0)
    trace = tl.sum(tl.sum(covariance * identity, axis=1), axis=0)
    scaled = covariance * (1.0 / trace)
    root = 1.0 / tl.sqrt_rn(trace)
    of_p = (0.5 * root) * of_p
    store_matrix(g, of_p, BLOCK_D)
    store_matrix(w, scaled, BLOCK_D)
    store_matrix(dw, of_p, BLOCK_D)
    result, change = 1.5 * identity - 0.5 * scaled, -0.5 * of_p
    if iterations == 0:
        result, change = identity, tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    store_matrix(p, result, BLOCK_D)
    store_matrix(dp, change, BLOCK_D)
    for _ in range(1, iterations):
        store_matrix(dv, step_change(w, dw, w, dw, d, BLOCK_K, BLOCK_D), BLOCK_D)
        store_matrix(v, step(w, w, d, BLOCK_K, BLOCK_D), BLOCK_D)
        next_dw = step_change(v, dv, w, dw, d, BLOCK_K, BLOCK_D)
        store_matrix(w, step(v, w, d, BLOCK_K, BLOCK_D), BLOCK_D)
        store_matrix(dw, next_dw, BLOCK_D)
        store_matrix(dp, step_change(p, dp, w, dw, d, BLOCK_K, BLOCK_D), BLOCK_D)
        store_matrix(p, step(p, w, d, BLOCK_K, BLOCK_D), BLOCK_D)

    # The last dp is the gradient of S = Σ / tr Σ. Its rounding is slightly asymmetric, and Σ and its gradient are not.
    change = 0.5 * (load_matrix(dp, i, i, BLOCK_D) + tl.load(dp + i[None, :] * BLOCK_D + i[:, None]))
    scaled = tl.load(saved + i[:, None] * d + i[None, :], mask=inside, other=0.0) * (1.0 / trace)
    through_trace = 0.5 * load_matrix(g, i, i, BLOCK_D) * load_matrix(p, i, i, BLOCK_D) + change * scaled
    of_covariance = change - tl.sum(tl.sum(through_trace, axis=1), axis=0) * identity
    store_matrix(dw, (2.0 / (N * trace)) * of_covariance, BLOCK_D)

    for first in range(0, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        through_p = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        through_covariance = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first_k in range(0, d, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            grad_rows = load_centred(grad_y, grad_mean, rows, k, N, D, d)
            through_p += dot(grad_rows, load_matrix(p, k, i, BLOCK_D))
            through_covariance += dot(load_centred(x, mean, rows, k, N, D, d), load_matrix(dw, k, i, BLOCK_D))
        store_group(grad_x, rows, i, root * through_p + through_covariance, N, D, d)
