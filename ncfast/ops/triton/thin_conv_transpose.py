"""thin_conv_transpose in Triton: one launch forward; one backward and one that merges its sums.

A program takes a block of positions (b, h, j) of x, counted through, and one channel or pair of channels: all loads of
a tap are then of neighbouring columns. Channels are few and x is small, so that what several programs read again is in
the cache. Row h and columns 2j and 2j + 1 of y belong to position (b, h, j): of the 4 taps along the width 1 and 3 fall
on even columns, 0 and 2 on odd ones. Backward the taps of a position meet columns 2j - 1 to 2j + 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": True}
BACKWARD = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}
MERGE = {"BLOCK": 256, "num_warps": 8, "enable_fp_fusion": True}
BACKWARD_PROGRAMS, MOST_PARTS = 768, 384


def thin_conv_transpose_triton(
    x: Tensor,  # [B, G·Cin, H, W], any strides
    weight: Tensor,  # [G·Cin, Cout, 3, 4]
    bias: Tensor | None,  # [G·Cout]
    groups: int,
    y: Tensor,  # [B, G·Cout, H, 2W]
) -> None:
    """Fills y; all but x are contiguous."""
    B, C, H, W = x.shape
    positions = B * H * W
    if positions == 0:
        return
    with torch.cuda.device_of(x):
        thin_conv_transpose_kernel[(triton.cdiv(positions, POSITIONS["BLOCK"]), y.shape[1])](
            x,
            weight,
            weight if bias is None else bias,
            y,
            positions,
            H,
            W,
            *x.stride(),
            C // groups,
            weight.shape[1],
            bias is not None,
            **POSITIONS,
        )


def thin_conv_transpose_backward_triton(
    grad_y: Tensor,  # [B, G·Cout, H, 2W]
    x: Tensor,  # [B, G·Cin, H, W], any strides
    weight: Tensor,  # [G·Cin, Cout, 3, 4]
    groups: int,
    grad_x: Tensor,  # [B, G·Cin, H, W], any strides
    grad_weight: Tensor,  # [G·Cin, Cout, 3, 4]
    grad_bias: Tensor,  # [G·Cout]
) -> None:
    """Fills grad_x, grad_weight and grad_bias; all but x and grad_x are contiguous."""
    B, C, H, W = x.shape
    Cin, Cout = C // groups, weight.shape[1]
    positions, pairs = B * H * W, C * Cout
    tiles = triton.cdiv(positions, BACKWARD["BLOCK"])
    parts = max(1, min(tiles, MOST_PARTS, BACKWARD_PROGRAMS // C))
    part = triton.cdiv(tiles, parts) * BACKWARD["BLOCK"]
    parts = max(1, triton.cdiv(positions, max(part, 1)))
    partials = torch.empty(pairs, parts, 16, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        thin_conv_transpose_backward_kernel[(parts, C)](
            grad_y,
            x,
            weight,
            grad_x,
            partials,
            positions,
            part,
            H,
            W,
            *x.stride(),
            *grad_x.stride(),
            Cin,
            Cout,
            **BACKWARD,
        )
        thin_conv_transpose_merge_kernel[(pairs,)](partials, grad_weight, grad_bias, parts, Cin, Cout, **MERGE)


@triton.jit
def locate(position, H, W):  # [BLOCK]
    """b (int64), h and j of positions counted through."""
    row = position // W
    return (row // H).to(tl.int64), row % H, position % W


@triton.jit(do_not_specialize=["positions", "H", "W", "x_b", "x_c", "x_h", "x_w"])
def thin_conv_transpose_kernel(
    x,  # [B, G·Cin, H, W]
    weight,  # [G·Cin, Cout, 3, 4]
    bias,  # [G·Cout]
    y,  # [B, G·Cout, H, 2W]
    positions,
    H,
    W,
    x_b,  # strides of x
    x_c,
    x_h,
    x_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel, channels = tl.program_id(1), tl.num_programs(1)
    g, co = channel // COUT, channel % COUT
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    b, h, j = locate(position, H, W)
    even = tl.zeros([BLOCK], tl.float32)
    odd = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CIN):
        ci = g * CIN + c
        taps = weight + (ci * COUT + co) * 12
        for kh in tl.static_range(3):
            i = h + 1 - kh
            there = inside & (i >= 0) & (i < H)
            at = x + b * x_b + ci.to(tl.int64) * x_c + i * x_h + j * x_w
            left = tl.load(at - x_w, mask=there & (j > 0), other=0.0).to(tl.float32)
            middle = tl.load(at, mask=there, other=0.0).to(tl.float32)
            right = tl.load(at + x_w, mask=there & (j + 1 < W), other=0.0).to(tl.float32)
            even += middle * tl.load(taps + kh * 4 + 1).to(tl.float32)
            even += left * tl.load(taps + kh * 4 + 3).to(tl.float32)
            odd += right * tl.load(taps + kh * 4).to(tl.float32)
            odd += middle * tl.load(taps + kh * 4 + 2).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + channel).to(tl.float32)
        even += shift
        odd += shift
    at = ((b * channels + channel) * H + h) * W + j  # pairs of columns
    both = at[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(y + both, tl.join(even, odd), mask=inside[:, None])


@triton.jit(
    do_not_specialize=["positions", "part", "H", "W", "x_b", "x_c", "x_h", "x_w", "out_b", "out_c", "out_h", "out_w"]
)
def thin_conv_transpose_backward_kernel(
    grad_y,  # [B, G·Cout, H, 2W]
    x,  # [B, G·Cin, H, W]
    weight,  # [G·Cin, Cout, 3, 4]
    grad_x,  # [B, G·Cin, H, W]
    partials,  # [G·Cin·Cout, parts, 16]: of the 12 taps; then of grad_y, at 13 even columns, at 14 odd ones
    positions,
    part,  # positions of a program
    H,
    W,
    x_b,  # strides of x
    x_c,
    x_h,
    x_w,
    out_b,  # strides of grad_x
    out_c,
    out_h,
    out_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ci = tl.program_id(1)
    g, out_channels = ci // CIN, tl.num_programs(1) // CIN * COUT
    kw = tl.arange(0, 4)
    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, positions)
    sums = ()  # of each co: rows of taps, then grad_y
    for _ in tl.static_range(COUT * 4):
        sums += (tl.zeros([BLOCK, 4], tl.float32),)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        b, h, j = locate(position, H, W)
        value = tl.load(x + b * x_b + ci.to(tl.int64) * x_c + h * x_h + j * x_w, mask=inside, other=0.0)
        value = value.to(tl.float32)[:, None]
        total = tl.zeros([BLOCK, 4], tl.float32)
        image = grad_y + ((b * out_channels + g * COUT) * H + h) * (2 * W) + 2 * j
        later = ()
        for co in tl.static_range(COUT):
            for kh in tl.static_range(3):
                there = inside & (h - 1 + kh >= 0) & (h - 1 + kh < H)
                at = image + (co * H + kh - 1) * (2 * W)
                first = tl.load(at - 1, mask=there & (j > 0), other=0.0)
                even = tl.load(at, mask=there, other=0.0)
                odd = tl.load(at + 1, mask=there, other=0.0)
                last = tl.load(at + 2, mask=there & (j + 1 < W), other=0.0)
                gradient = tl.join(tl.join(first, odd), tl.join(even, last)).reshape(BLOCK, 4)
                total += gradient * tl.load(weight + (ci * COUT + co) * 12 + kh * 4 + kw).to(tl.float32)[None, :]
                later += (sums[co * 4 + kh] + gradient * value,)
                if kh == 1:
                    middle = gradient
            later += (sums[co * 4 + 3] + middle,)
        sums = later
        at = grad_x + b * out_b + ci.to(tl.int64) * out_c + h * out_h + j * out_w
        tl.store(at, tl.sum(total, axis=1), mask=inside)
    for co in tl.static_range(COUT):
        at = partials + ((ci * COUT + co) * tl.num_programs(0) + tl.program_id(0)) * 16 + kw
        for row in tl.static_range(4):
            tl.store(at + row * 4, tl.sum(sums[co * 4 + row], axis=0))


@triton.jit(do_not_specialize=["parts"])
def thin_conv_transpose_merge_kernel(
    partials,  # [G·Cin·Cout, parts, 16]
    grad_weight,  # [G·Cin, Cout, 3, 4]
    grad_bias,  # [G·Cout]
    parts,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    ci, co = pair // COUT, pair % COUT
    tap = tl.arange(0, 16)
    total = tl.zeros([BLOCK, 16], tl.float32)
    for start in range(0, parts, BLOCK):
        p = start + tl.arange(0, BLOCK)
        at = (pair * parts + p)[:, None] * 16 + tap[None, :]
        total += tl.load(partials + at, mask=(p < parts)[:, None], other=0.0)
    sums = tl.sum(total, axis=0)
    tl.store(grad_weight + pair * 12 + tap, sums, mask=tap < 12)
    if ci % CIN == 0:
        tl.store(grad_bias + ci // CIN * COUT + co, tl.sum(tl.where((tap == 13) | (tap == 14), sums, 0.0)))
