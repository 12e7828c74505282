"""thin_conv_transpose in Triton: one launch forward; one for the gradient of x and two for those of weight and bias.

A program takes a block of positions (b, h, j) of x, counted through, and one channel or pair of channels: all loads of
a tap are then of neighbouring columns. Channels are few and x is small, so that what several programs read again is in
the cache. Row h and columns 2j and 2j + 1 of y belong to position (b, h, j): of the 4 taps along the width 1 and 3 fall
on even columns, 0 and 2 on odd ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": True}
SUMS = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}
MERGE = {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": True}
SUMS_PROGRAMS, MOST_PARTS = 1024, 256


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
    tiles = triton.cdiv(positions, SUMS["BLOCK"])
    parts = max(1, min(tiles, MOST_PARTS, SUMS_PROGRAMS // pairs))
    part = triton.cdiv(tiles, parts) * SUMS["BLOCK"]
    parts = max(1, triton.cdiv(positions, max(part, 1)))
    partials = torch.empty(pairs, parts, 16, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if positions > 0:
            thin_conv_transpose_grad_x_kernel[(triton.cdiv(positions, POSITIONS["BLOCK"]), C)](
                grad_y, weight, grad_x, positions, H, W, *grad_x.stride(), Cin, Cout, **POSITIONS
            )
        thin_conv_transpose_sums_kernel[(parts, pairs)](
            grad_y, x, partials, positions, part, H, W, *x.stride(), Cin, Cout, **SUMS
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


@triton.jit(do_not_specialize=["positions", "H", "W", "x_b", "x_c", "x_h", "x_w"])
def thin_conv_transpose_grad_x_kernel(
    grad_y,  # [B, G·Cout, H, 2W]
    weight,  # [G·Cin, Cout, 3, 4]
    grad_x,  # [B, G·Cin, H, W]
    positions,
    H,
    W,
    x_b,  # strides of grad_x
    x_c,
    x_h,
    x_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ci = tl.program_id(1)
    g, out_channels = ci // CIN, tl.num_programs(1) // CIN * COUT
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < positions
    b, h, j = locate(position, H, W)
    total = tl.zeros([BLOCK], tl.float32)
    for co in tl.static_range(COUT):
        taps = weight + (ci * COUT + co) * 12
        for kh in tl.static_range(3):
            i = h - 1 + kh
            there = inside & (i >= 0) & (i < H)
            at = grad_y + ((b * out_channels + g * COUT + co) * H + i) * (2 * W) + 2 * j
            first = tl.load(at - 1, mask=there & (j > 0), other=0.0)
            even = tl.load(at, mask=there, other=0.0)
            odd = tl.load(at + 1, mask=there, other=0.0)
            last = tl.load(at + 2, mask=there & (j + 1 < W), other=0.0)
            total += first * tl.load(taps + kh * 4).to(tl.float32)
            total += even * tl.load(taps + kh * 4 + 1).to(tl.float32)
            total += odd * tl.load(taps + kh * 4 + 2).to(tl.float32)
            total += last * tl.load(taps + kh * 4 + 3).to(tl.float32)
    tl.store(grad_x + b * x_b + ci.to(tl.int64) * x_c + h * x_h + j * x_w, total, mask=inside)


@triton.jit(do_not_specialize=["positions", "part", "H", "W", "x_b", "x_c", "x_h", "x_w"])
def thin_conv_transpose_sums_kernel(
    grad_y,  # [B, G·Cout, H, 2W]
    x,  # [B, G·Cin, H, W]
    partials,  # [G·Cin·Cout, parts, 16]: of the 12 taps; then of grad_y's even and odd columns
    positions,
    part,  # positions of a program
    H,
    W,
    x_b,  # strides of x
    x_c,
    x_h,
    x_w,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(1)
    ci, co = pair // COUT, pair % COUT
    g, out_channels = ci // CIN, tl.num_programs(1) // CIN
    # Rows 12 and 13 multiply by 1 what taps (1, 1) and (1, 2) fall on, so that their sums are the bias's gradient.
    tap = tl.arange(0, 16)
    of_bias = tap >= 12
    kh = tl.where(of_bias, 1, tap // 4)
    kw = tl.where(of_bias, tap - 11, tap % 4)
    begin = tl.program_id(0) * part
    end = tl.minimum(begin + part, positions)
    total = tl.zeros([16, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < end
        b, h, j = locate(position, H, W)
        value = tl.load(x + b * x_b + ci.to(tl.int64) * x_c + h * x_h + j * x_w, mask=inside, other=0.0)
        i = h[None, :] + kh[:, None] - 1
        column = 2 * j[None, :] + kw[:, None] - 1
        there = inside[None, :] & (tap < 14)[:, None] & (i >= 0) & (i < H) & (column >= 0) & (column < 2 * W)
        image = grad_y + (b * out_channels + g * COUT + co) * H * (2 * W)
        gradient = tl.load(image[None, :] + (i * (2 * W) + column), mask=there, other=0.0)
        total += gradient * tl.where(of_bias[:, None], 1.0, value.to(tl.float32)[None, :])
    tl.store(partials + (pair * tl.num_programs(0) + tl.program_id(0)) * 16 + tap, tl.sum(total, axis=1))


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
        tl.store(grad_bias + ci // CIN * COUT + co, tl.sum(tl.where(tap >= 12, sums, 0.0)))
