"""fused_linear in Triton: norm, product, bias, GELU and residual in one launch; so is all of the gradient that is rows.

A program takes whole rows of x: the norm is what happens before the product, the rest what happens after it, and memory
is passed over once. What is left of the gradient are sums over all rows: of the weight, PyTorch's matrix product; of
the bias and the norm's weight, sums over a program's rows, which a second launch adds up in an order of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops.triton.tiles import INVERSE_SQRT_2_PI, gauss, load_row, load_tile, store_tile, sum_kernel

WHOLE_ROW = 512  # columns of x that a program holds at most; a norm needs all of them
SUM_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 4}


def forward_blocks(N: int, K: int, large: bool) -> dict:
    """Rows and columns of a product, and among how many programs the columns of a row are divided (SPLITS).

    large: 227 KB of shared memory a program (sm_90), else 99 KB will do.
    """
    if K > WHOLE_ROW:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLITS": triton.cdiv(N, 64), **launch(4, 3)}
    depth = power_of_2(K)
    # The weights of two products, one of them on its way, are what takes shared memory.
    columns = 64 if large else 32
    rows = 32 if depth == WHOLE_ROW else 64
    return {"BLOCK_M": rows, "BLOCK_N": min(columns, power_of_2(N)), "BLOCK_K": depth, "SPLITS": 1, **launch(4, 2)}


def backward_blocks(N: int, K: int, normed: bool, large: bool) -> dict:
    """Rows of a program, columns of grad_y that a product takes (BLOCK_N), and columns of x (BLOCK_K): if normed, all.

    large: as for forward_blocks.
    """
    depth = power_of_2(K) if normed else min(power_of_2(K), 256)
    rows = 32 if depth > 256 else 64
    columns = 64 if depth <= 256 and large else 32
    # On an H100, 19456 x 256 x 256, norm, bias and GELU, bfloat16, forward and backward take 121 us, with 16 warps 152,
    # with 32 rows 132 (4 warps) or 204 (8).
    return {"BLOCK_M": rows, "BLOCK_N": min(columns, power_of_2(N)), "BLOCK_K": depth, **launch(8, 2)}


def launch(warps: int, stages: int) -> dict:
    # Enable FMA fusion explicitly: newer Triton turns it off by default.
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def power_of_2(n: int) -> int:
    return max(triton.next_power_of_2(n), 16)


def is_large(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 227 << 10


def fused_linear_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    norm_eps: float,
    gelu: bool,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """All contiguous: x [..., K], weight [N, K] and residual [..., N] of one type, bfloat16 or float16 (interpreted
    float32); bias [N] and norm_weight [K] of that or float32 -> y [..., N], and what the GELU was taken of or empty."""
    (N, K), M = weight.shape, x.shape[:-1].numel()
    y = x.new_empty(*x.shape[:-1], N)
    pre = torch.empty_like(y) if keep_pre else x.new_empty(0)
    if y.numel() > 0:
        blocks = forward_blocks(N, K, is_large(x.device))
        with torch.cuda.device_of(x):
            fused_linear_kernel[(triton.cdiv(M, blocks["BLOCK_M"]) * blocks["SPLITS"],)](
                x,
                weight,
                bias,
                norm_weight,
                residual,
                y,
                pre if keep_pre else None,
                M,
                norm_eps,
                N,
                K,
                GELU=gelu,
                **blocks,
            )
    return y, pre


def fused_linear_backward_triton(
    grad_y: Tensor,
    grad_passed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    pre: Tensor | None,
    norm_eps: float,
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, to which grad_passed [..., K] is added; of weight [N, K], in weight_dtype; and of bias and
    norm_weight, as these, empty where they are None. grad_y [..., N] and pre, where there is a GELU, are as x."""
    (N, K), M = weight.shape, x.shape[:-1].numel()
    normed = norm_weight is not None
    blocks = backward_blocks(N, K, normed, is_large(x.device))
    if pre is None and bias is not None:
        # Loads on their way into shared memory would be for a product and a sum at once, which on an H100 (Triton 3.6)
        # gave wrong sums.
        blocks["num_stages"] = 1
    count = triton.cdiv(M, blocks["BLOCK_M"])
    grad_x = torch.empty_like(x)
    grad_pre = grad_y if pre is None else torch.empty_like(grad_y)
    normalised = torch.empty_like(x) if normed else x
    none = x.new_empty(0)
    grad_bias = none if bias is None else torch.empty_like(bias)
    grad_norm_weight = none.clone() if norm_weight is None else torch.empty_like(norm_weight)
    bias_sums, norm_sums = (
        None if part is None else x.new_empty(count, len(part), dtype=torch.float32) for part in (bias, norm_weight)
    )
    with torch.cuda.device_of(x):
        if M > 0:
            fused_linear_backward_kernel[(count * triton.cdiv(max(K, 1), blocks["BLOCK_K"]),)](
                grad_y,
                grad_passed,
                pre,
                weight,
                x if normed else None,
                norm_weight,
                None if pre is None else grad_pre,
                grad_x,
                normalised if normed else None,
                bias_sums,
                norm_sums,
                M,
                norm_eps,
                N,
                K,
                **blocks,
            )
        widest = max(0 if sums is None else sums.shape[1] for sums in (bias_sums, norm_sums))
        if widest > 0:
            sum_kernel[(triton.cdiv(widest, SUM_BLOCKS["BLOCK_N"]), 2)](
                bias_sums,
                norm_sums,
                None if bias is None else grad_bias,
                None if norm_weight is None else grad_norm_weight,
                len(bias_sums if norm_sums is None else norm_sums),
                N,
                K,
                **SUM_BLOCKS,
            )
    grad_weight = product(grad_pre.view(M, N).T, normalised.view(M, K)).to(weight_dtype)
    return grad_x, grad_weight, grad_bias, grad_norm_weight


def product(a: Tensor, b: Tensor) -> Tensor:  # [N, M], [M, K] -> [N, K], float32
    """Added up in float32, the partial sums of a divided M as well, whatever PyTorch's settings allow."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


@triton.jit
def inverse_rms(x, norm_eps, K: tl.constexpr):  # x float32 [BLOCK_M, BLOCK_K], zeros beyond K
    return 1 / tl.sqrt_rn(tl.sum(x * x, axis=1) / (K if K > 0 else 1) + norm_eps)


@triton.jit(do_not_specialize=["M"])
def fused_linear_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N] or None
    norm_weight,  # [K] or None
    residual,  # [M, N] or None
    y,  # [M, N]
    pre,  # [M, N] or None: y before the GELU and the residual
    M,
    norm_eps,
    N: tl.constexpr,
    K: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    COLUMNS: tl.constexpr = tl.cdiv(tl.cdiv(N, SPLITS), BLOCK_N) * BLOCK_N
    WHOLE: tl.constexpr = K <= BLOCK_K
    i = tl.program_id(0) // SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if WHOLE:
        rows = load_tile(x, i, k, M, K)
        if norm_weight is not None:
            wide = rows.to(tl.float32)
            wide = wide * inverse_rms(wide, norm_eps, K)[:, None] * load_row(norm_weight, k, K)[None, :]
            rows = wide.to(x.dtype.element_ty)
    begin = tl.program_id(0) % SPLITS * COLUMNS
    for first in range(0, COLUMNS, BLOCK_N):
        n = begin + first + tl.arange(0, BLOCK_N)
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if WHOLE:
            z = tl.dot(rows, tl.trans(load_tile(weight, n, k, N, K)), z, input_precision="ieee")
        else:
            for depth in range(0, K, BLOCK_K):
                part, of_weight = load_tile(x, i, depth + k, M, K), load_tile(weight, n, depth + k, N, K)
                z = tl.dot(part, tl.trans(of_weight), z, input_precision="ieee")
        if bias is not None:
            z += load_row(bias, n, N)[None, :]
        if pre is not None:
            store_tile(pre, z, i, n, M, N)
        if GELU:
            _, cdf = gauss(z)
            z = z * cdf
        if residual is not None:
            z += load_tile(residual, i, n, M, N).to(tl.float32)
        store_tile(y, z, i, n, M, N)


@triton.jit(do_not_specialize=["M"])
def fused_linear_backward_kernel(
    grad_y,  # [M, N]
    grad_passed,  # [M, K] or None: added to grad_x
    pre,  # [M, N], or None: no GELU
    weight,  # [N, K]
    x,  # [M, K], or None: no norm
    norm_weight,  # [K] or None, as x
    grad_pre,  # [M, N] or None, as pre
    grad_x,  # [M, K]
    normalised,  # [M, K] or None, as x: what the weight was multiplied with
    bias_sums,  # [blocks of rows, N] or None
    norm_sums,  # [blocks of rows, K] or None, as x
    M,
    norm_eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With n = x / rms(x) and grad the gradient of n norm_weight: grad_norm_weight = Σ grad n,
    grad_x = (grad norm_weight - n mean(n grad norm_weight)) / rms(x)."""
    SPLITS: tl.constexpr = tl.cdiv(K if K > 0 else 1, BLOCK_K)
    block, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = split * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        g = load_tile(grad_y, i, n, M, N)
        wide = g.to(tl.float32)
        if pre is not None:
            z = load_tile(pre, i, n, M, N).to(tl.float32)
            bell, cdf = gauss(z)
            wide *= cdf + z * bell * INVERSE_SQRT_2_PI
            g = wide.to(grad_y.dtype.element_ty)
        if split == 0:
            if pre is not None:
                store_tile(grad_pre, g, i, n, M, N)
            if bias_sums is not None:
                tl.store(bias_sums + block.to(tl.int64) * N + n, tl.sum(wide, axis=0), mask=n < N)
        grad = tl.dot(g, load_tile(weight, n, k, N, K), grad, input_precision="ieee")
    if norm_weight is not None:
        rows = load_tile(x, i, k, M, K).to(tl.float32)
        # Rows beyond M are zeros, which without norm_eps would become NaN and reach the sums.
        inverse = tl.where(i < M, inverse_rms(rows, norm_eps, K), 0.0)[:, None]
        rows *= inverse
        scale = load_row(norm_weight, k, K)[None, :]
        store_tile(normalised, rows * scale, i, k, M, K)
        tl.store(norm_sums + block.to(tl.int64) * K + k, tl.sum(grad * rows, axis=0), mask=k < K)
        grad *= scale
        along = tl.sum(grad * rows, axis=1) / (K if K > 0 else 1)
        grad = inverse * (grad - along[:, None] * rows)
    if grad_passed is not None:
        grad += load_tile(grad_passed, i, k, M, K).to(tl.float32)
    store_tile(grad_x, grad, i, k, M, K)
