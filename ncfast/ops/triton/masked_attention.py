"""masked_attention in Triton: one program takes a head of a sequence from its rows to its rows, one launch each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_NORM = tl.constexpr(1e-12)  # that of F.normalize
LOG2_E = tl.constexpr(1.4426950408889634)


def masked_attention_triton(
    qkv: Tensor,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    null_kv: Tensor | None,
    scale: float,
) -> Tensor:
    """qkv [B, S, 3, H, d], S and d <= 128, float32, float16 or bfloat16; key_mask [B, S] or lengths [B]; q_scale and
    k_scale [d], null_kv [2, H, d], float32; all contiguous -> [B, S, H, d] as qkv."""
    B, S, _, H, d = qkv.shape
    out = qkv.new_empty(B, S, H, d)
    if out.numel() > 0:
        options = given(key_mask, lengths, q_scale, null_kv)
        options |= blocks(S, d, qkv.dtype, backward=False, plain=q_scale is None and null_kv is None)
        with torch.cuda.device_of(qkv):
            masked_attention_kernel[(B * H,)](
                qkv, key_mask, lengths, q_scale, k_scale, null_kv, out, S, scale, H, d, **options
            )
    return out


def masked_attention_backward_triton(
    grad_out: Tensor,
    qkv: Tensor,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    null_kv: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, as it, and of q_scale, k_scale and null_kv, float32, empty where these are None."""
    B, S, _, H, d = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    # What all sequences share gets a gradient from each head of each, added up below in an order of PyTorch's that does
    # not change: of q_scale, of k_scale, of the null key and of its value.
    shared = (
        torch.zeros(B, H, 4, d, dtype=torch.float32, device=qkv.device)
        if q_scale is not None or null_kv is not None
        else None
    )
    if qkv.numel() > 0:
        options = given(key_mask, lengths, q_scale, null_kv)
        options |= blocks(S, d, qkv.dtype, backward=True, plain=q_scale is None and null_kv is None)
        with torch.cuda.device_of(qkv):
            masked_attention_backward_kernel[(B * H,)](
                grad_out, qkv, key_mask, lengths, q_scale, k_scale, null_kv, grad_qkv, shared, S, scale, H, d, **options
            )
    none = qkv.new_empty(0, dtype=torch.float32)
    if shared is None:
        return grad_qkv, none, none.clone(), none.clone()
    sums = shared.sum(0)  # [H, 4, d]
    grad_scales = sums[:, :2].sum(0) if q_scale is not None else none.expand(2, 0)
    grad_null_kv = sums[:, 2:].transpose(0, 1).contiguous() if null_kv is not None else none
    return grad_qkv, grad_scales[0].clone(), grad_scales[1].clone(), grad_null_kv


def given(key_mask: Tensor | None, lengths: Tensor | None, q_scale: Tensor | None, null_kv: Tensor | None) -> dict:
    return {
        "HAS_MASK": key_mask is not None,
        "HAS_LENGTHS": lengths is not None,
        "NORMALISED": q_scale is not None,
        "HAS_NULL": null_kv is not None,
    }


def blocks(S: int, d: int, dtype: torch.dtype, *, backward: bool, plain: bool) -> dict:
    """All keys of a head and some of its queries, few enough that scores, gradients and sums stay in registers.

    Of half precision as measured on an H100 at 16384 heads, S = 76, d = 64, where copying the same bytes takes 266 and
    467 us: 274 us forward (16 or 128 rows: 355), 847 us backward (64 rows: 958, 16: 987); 8 warps take 1.5 times as
    long, but normalised queries and keys, or a null key, do not fit into the registers of 4.
    """
    rows, columns = (max(triton.next_power_of_2(n), 16) for n in (S, d))
    single = dtype == torch.float32
    once = single and torch.backends.cuda.matmul.allow_tf32
    few = plain and (once or not single)
    most = (32 if once else 16) if single else 32 if backward or not plain else 64
    return {
        "BLOCK_M": min(rows, most),
        "BLOCK_S": rows,
        "BLOCK_D": columns,
        # Of float32, three products of TF32: within rounding of float32's own, as PyTorch's memory-efficient attention
        # has it; or one, where PyTorch's products may be that, too. In float32 itself a dot holds whole rows of both
        # operands in registers, some ten times what there is.
        "PRECISION": "ieee" if not single else "tf32" if once else "tf32x3",
        "num_warps": 8 if rows == 128 and not few else 4,
        # A second stage would prefetch into registers and shared memory that the first needs.
        "num_stages": 1,
        # Enable FMA fusion explicitly: newer Triton turns it off by default.
        "enable_fp_fusion": True,
    }


@triton.jit
def load_head(
    x, i, keep, stride: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr
):  # x [S, d], rows `stride` apart
    """The rows i that are kept; zeros for the others and beyond d."""
    c = tl.arange(0, BLOCK_D)
    return tl.load(x + i[:, None] * stride + c[None, :], mask=keep[:, None] & (c < d)[None, :], other=0.0)


@triton.jit
def store_head(
    x, value, i, keep, stride: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr
):  # x [S, d], rows `stride` apart
    c = tl.arange(0, BLOCK_D)
    mask = keep[:, None] & (c < d)[None, :]
    tl.store(x + i[:, None] * stride + c[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(x, d: tl.constexpr, BLOCK_D: tl.constexpr):  # x [d]
    c = tl.arange(0, BLOCK_D)
    return tl.load(x + c, mask=c < d, other=0.0)


@triton.jit
def store_vector(x, value, d: tl.constexpr, BLOCK_D: tl.constexpr):  # x [d]
    c = tl.arange(0, BLOCK_D)
    tl.store(x + c, value, mask=c < d)


@triton.jit
def inverse_norms(x):
    return 1 / tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), LEAST_NORM)


@triton.jit
def normalise(x, scale):
    """x [R, D] / |x| * scale [D], in float32, rounded to the type of x."""
    wide = x.to(tl.float32)
    return (wide * inverse_norms(wide)[:, None] * scale[None, :]).to(x.dtype)


@triton.jit
def normalise_backward(x, scale, grad):
    """The gradients of x [R, D] and of scale [D] from that of normalise(x, scale).

    n = x / |x|, y = n scale:   grad_scale = Σ grad_y n,   grad_x = (grad_y scale - n (n · grad_y scale)) / |x|
    """
    wide = x.to(tl.float32)
    inverse = inverse_norms(wide)
    n = wide * inverse[:, None]
    of_n = grad * scale[None, :]
    # A row shorter than the least norm is divided by a constant.
    along = tl.where(inverse < 1 / LEAST_NORM, tl.sum(n * of_n, axis=1), 0.0)
    return inverse[:, None] * (of_n - along[:, None] * n), tl.sum(grad * n, axis=0)


@triton.jit
def kept_keys(key_mask, lengths, b, j, S, HAS_MASK: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    keep = j < S
    if HAS_MASK:
        keep = keep & (tl.load(key_mask + b * S + j, mask=keep, other=0) != 0)
    if HAS_LENGTHS:
        keep = keep & (j < tl.load(lengths + b))
    return keep


@triton.jit
def softmax(q, k, null_k, keep, scale, HAS_NULL: tl.constexpr, PRECISION: tl.constexpr):
    """The weights [M, S] and those of the null key [M], both before normalisation, and one over their sums."""
    # In units of log2, as the hardware has it.
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
    scores = tl.where(keep[None, :], scores, float("-inf"))
    most = tl.max(scores, axis=1)
    null_weight = tl.zeros_like(most)
    if HAS_NULL:
        null_score = tl.sum(q.to(tl.float32) * null_k, axis=1) * (scale * LOG2_E)
        most = tl.maximum(most, null_score)
        null_weight = tl.exp2(null_score - most)
    most = tl.where(most == float("-inf"), 0.0, most)  # no key: weights of 0, not NaN
    weights = tl.exp2(scores - most[:, None])
    total = tl.sum(weights, axis=1) + null_weight
    return weights, null_weight, tl.where(total == 0, 0.0, 1 / total)


@triton.jit(do_not_specialize=["S"])
def masked_attention_kernel(
    qkv,  # [B, S, 3, H, d]
    key_mask,  # [B, S] or None
    lengths,  # [B] or None
    q_scale,  # [d] or None
    k_scale,  # [d] or None
    null_kv,  # [2, H, d] or None
    out,  # [B, S, H, d]
    S,
    scale,
    H: tl.constexpr,
    d: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_NULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    row: tl.constexpr = H * d
    head = qkv + b * S * 3 * row + h * d
    j = tl.arange(0, BLOCK_S)
    keep = kept_keys(key_mask, lengths, b, j, S, HAS_MASK, HAS_LENGTHS)
    k = load_head(head + row, j, keep, 3 * row, d, BLOCK_D)
    v = load_head(head + 2 * row, j, keep, 3 * row, d, BLOCK_D)
    if NORMALISED:
        k = normalise(k, load_vector(k_scale, d, BLOCK_D))
    null_k, null_v = tl.zeros([1, BLOCK_D], tl.float32), tl.zeros([1, BLOCK_D], tl.float32)
    if HAS_NULL:
        null_k = load_vector(null_kv + h * d, d, BLOCK_D)[None, :]
        null_v = load_vector(null_kv + row + h * d, d, BLOCK_D)[None, :]
        if NORMALISED:
            null_k = normalise(null_k, load_vector(k_scale, d, BLOCK_D))
    for first in range(0, S, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        q = load_head(head, i, i < S, 3 * row, d, BLOCK_D)
        if NORMALISED:
            q = normalise(q, load_vector(q_scale, d, BLOCK_D))
        weights, null_weight, inverse = softmax(q, k, null_k, keep, scale, HAS_NULL, PRECISION)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        if HAS_NULL:
            result += null_weight[:, None] * null_v
        store_head(out + b * S * row + h * d, result * inverse[:, None], i, i < S, row, d, BLOCK_D)


@triton.jit(do_not_specialize=["S"])
def masked_attention_backward_kernel(
    grad_out,  # [B, S, H, d]
    qkv,  # [B, S, 3, H, d]
    key_mask,  # [B, S] or None
    lengths,  # [B] or None
    q_scale,  # [d] or None
    k_scale,  # [d] or None
    null_kv,  # [2, H, d] or None
    grad_qkv,  # [B, S, 3, H, d]
    shared,  # [B, H, 4, d] or None
    S,
    scale,
    H: tl.constexpr,
    d: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    NORMALISED: tl.constexpr,
    HAS_NULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    row: tl.constexpr = H * d
    head, grad_head = qkv + b * S * 3 * row + h * d, grad_qkv + b * S * 3 * row + h * d
    own = shared
    if NORMALISED or HAS_NULL:
        own = shared + (b * H + h) * 4 * d
    j = tl.arange(0, BLOCK_S)
    keep = kept_keys(key_mask, lengths, b, j, S, HAS_MASK, HAS_LENGTHS)
    k = load_head(head + row, j, keep, 3 * row, d, BLOCK_D)
    v = load_head(head + 2 * row, j, keep, 3 * row, d, BLOCK_D)
    if NORMALISED:
        k = normalise(k, load_vector(k_scale, d, BLOCK_D))
    null_k, null_v = tl.zeros([1, BLOCK_D], tl.float32), tl.zeros([1, BLOCK_D], tl.float32)
    if HAS_NULL:
        null_k = load_vector(null_kv + h * d, d, BLOCK_D)[None, :]
        null_v = load_vector(null_kv + row + h * d, d, BLOCK_D)[None, :]
        if NORMALISED:
            null_k = normalise(null_k, load_vector(k_scale, d, BLOCK_D))
    grad_k, grad_v = tl.zeros([BLOCK_S, BLOCK_D], tl.float32), tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    grad_null_k, grad_null_v = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    grad_q_scale = tl.zeros([BLOCK_D], tl.float32)

    for first in range(0, S, BLOCK_M):
        i = first + tl.arange(0, BLOCK_M)
        q = load_head(head, i, i < S, 3 * row, d, BLOCK_D)
        g = load_head(grad_out + b * S * row + h * d, i, i < S, row, d, BLOCK_D)
        if NORMALISED:
            q = normalise(q, load_vector(q_scale, d, BLOCK_D))
        weights, null_weight, inverse = softmax(q, k, null_k, keep, scale, HAS_NULL, PRECISION)
        weights *= inverse[:, None]
        grad_v = tl.dot(tl.trans(weights.to(g.dtype)), g, grad_v, input_precision=PRECISION)
        of_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        mean = tl.sum(weights * of_weights, axis=1)
        if HAS_NULL:
            null_weight *= inverse
            of_null = tl.sum(g.to(tl.float32) * null_v, axis=1)
            mean += null_weight * of_null
            of_null = null_weight * (of_null - mean)
            grad_null_v += tl.sum(null_weight[:, None] * g.to(tl.float32), axis=0)
            grad_null_k += tl.sum(of_null[:, None] * q.to(tl.float32), axis=0)
        of_scores = (weights * (of_weights - mean[:, None])).to(q.dtype)
        grad_k = tl.dot(tl.trans(of_scores), q, grad_k, input_precision=PRECISION)
        grad_q = tl.dot(of_scores, k, input_precision=PRECISION)
        if HAS_NULL:
            grad_q += of_null[:, None] * null_k
        grad_q *= scale
        if NORMALISED:
            q = load_head(head, i, i < S, 3 * row, d, BLOCK_D)
            grad_q, grad_scale = normalise_backward(q, load_vector(q_scale, d, BLOCK_D), grad_q)
            grad_q_scale += grad_scale
        store_head(grad_head, grad_q, i, i < S, 3 * row, d, BLOCK_D)

    store_head(grad_head + 2 * row, grad_v, j, j < S, 3 * row, d, BLOCK_D)
    grad_k *= scale
    grad_null_k *= scale
    if NORMALISED:
        k = load_head(head + row, j, keep, 3 * row, d, BLOCK_D)
        grad_k, grad_k_scale = normalise_backward(k, load_vector(k_scale, d, BLOCK_D), grad_k)
        if HAS_NULL:
            null_k = load_vector(null_kv + h * d, d, BLOCK_D)[None, :]
            grad_null, grad_scale = normalise_backward(null_k, load_vector(k_scale, d, BLOCK_D), grad_null_k[None, :])
            grad_null_k = tl.sum(grad_null, axis=0)
            grad_k_scale += grad_scale
        store_vector(own, grad_q_scale, d, BLOCK_D)
        store_vector(own + d, grad_k_scale, d, BLOCK_D)
    if HAS_NULL:
        store_vector(own + 2 * d, grad_null_k, d, BLOCK_D)
        store_vector(own + 3 * d, grad_null_v, d, BLOCK_D)
    store_head(grad_head + row, grad_k, j, j < S, 3 * row, d, BLOCK_D)
