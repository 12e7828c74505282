"""batch_norm in Triton, in two launches each way: sums over parts of the rows, then the merged sums applied.

A tensor is a matrix of rows (n, i, j) by channels, as torch.channels_last has it in memory; a view is a block of rows.
No launch stands between to merge the parts: every program of the second launch merges those of its own channels, which
takes it less time than a launch does, and adds in the same order as all the others.

Of a batch that is spread over processes there is a launch between, which merges the parts into this process's message;
the second launch then merges the messages of all processes. A message is [1 + views · 2 · C] float32: the number of a
view's rows, as the bits of an int32, and of each view two sums a channel as the parts have them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """More programs of the first launch read faster, but leave more parts for each of the second to merge, which
    therefore takes several tiles where there are many."""

    tile: int  # elements
    num_warps: int
    reduce_programs: int
    most_splits: int  # of a view's rows
    apply_programs: int = 264  # two for each multiprocessor


# Measured on an H100, bfloat16, LeakyReLU, forward and backward, before loops were pipelined: 256 x 64 x 5 x 15 takes
# 20 us with the small ones, 28 with the large ones; 256 x 64 x 5 x 125 takes 83 us with the large ones, 127 with the
# small ones. On an H200, three tiles under way and half as many programs of the second launch took the better ones from
# 21.8 to 18.5 us and from 100.6 to 82.7, with the same bits.
SMALL, LARGE = Blocks(2048, 4, 256, 64), Blocks(4096, 8, 512, 128)
LEAST_LARGE = 2**21  # elements of x
LARGEST_BLOCK_C = 64  # channels of a tile
MERGED_CHANNELS = 16  # of a program of the launch between
PIPELINED = tl.constexpr(3)  # tiles that a loop over rows has under way: it waits for memory and for nothing else
Exchange = Callable[[Tensor], Tensor]


def blocks_for(elements: int) -> Blocks:
    return LARGE if elements >= LEAST_LARGE else SMALL


def batch_norm_triton(
    x: Tensor,  # [N, C, H, W], as are y, activated and h where they are not empty
    residual: Tensor | None,
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    running_mean: Tensor | None,  # [C]
    running_var: Tensor | None,  # [C]
    views: int,
    momentum: float,
    eps: float,
    slope: float,
    then_slope: float | None,
    pad: bool,
    y: Tensor,  # [N, C, H, W] or [N, C, H + 2, W + 2]
    activated: Tensor,
    h: Tensor,
    saved: Tensor,  # [views, 2, C]
    exchange: Exchange | None = None,
) -> Tensor | None:
    """Fills y, activated, h and saved, and updates the running statistics; all but vectors in channels_last.

    exchange: this process's message [1 + views · 2 · C] -> those of all processes [processes, 1 + views · 2 · C], which
        are returned; None where this process has the whole batch.
    """
    N, C, H, W = x.shape
    rows, out_rows = N // views * H * W, N // views * y.shape[2] * y.shape[3]
    plan = Plan(rows, views, C)
    partials = torch.empty(views, 2, plan.splits, C, dtype=torch.float32, device=x.device)
    tiles = plan.tiles_per_program(out_rows)
    if C == 0:
        return None
    messages = None
    with torch.cuda.device_of(x):
        if rows > 0:
            launch_statistics(plan, x, residual, h, partials, rows)
        if exchange is not None:
            messages = exchange(message_of(plan, partials, views, rows, C))
        batch_norm_apply_kernel[plan.apply_grid(out_rows)](
            x if residual is None else h,
            partials if messages is None else messages,
            weight,
            bias,
            weight if running_mean is None else running_mean,
            weight if running_var is None else running_var,
            y,
            y if then_slope is None else activated,
            saved,
            views,
            rows,
            out_rows,
            H,
            W,
            C,
            plan.split,
            tiles,
            momentum,
            eps,
            slope,
            1.0 if then_slope is None else then_slope,
            running_mean is not None,
            then_slope is not None,
            pad,
            0 if messages is None else len(messages),
            BLOCK_S=plan.block_s if messages is None else triton.next_power_of_2(len(messages)),
            **plan.blocks,
        )
    return messages


def launch_statistics(plan: "Plan", x: Tensor, residual: Tensor | None, h: Tensor, partials: Tensor, rows: int) -> None:
    """Fills partials, and h if there is a residual. To be called within torch.cuda.device_of(x)."""
    batch_norm_statistics_kernel[plan.reduce_grid](
        x,
        x if residual is None else residual,
        x if residual is None else h,
        partials,
        rows,
        x.shape[1],
        plan.split,
        residual is not None,
        **plan.blocks,
    )


def message_of(
    plan: "Plan",
    partials: Tensor,  # [views, 2, splits, C]
    views: int,
    rows: int,
    C: int,
    gradients: tuple[Tensor, Tensor] | None = None,  # of weight and bias, [C] each, filled
) -> Tensor:
    """This process's message [1 + views · 2 · C]. To be called within torch.cuda.device_of(partials)."""
    if rows == 0:
        for gradient in gradients or ():
            gradient.zero_()
        return torch.zeros(1 + views * 2 * C, dtype=torch.float32, device=partials.device)
    message = torch.empty(1 + views * 2 * C, dtype=torch.float32, device=partials.device)
    grad_weight, grad_bias = gradients or (message, message)
    batch_norm_merge_kernel[(triton.cdiv(C, MERGED_CHANNELS),)](
        partials,
        message,
        grad_weight,
        grad_bias,
        views,
        rows,
        C,
        plan.split,
        gradients is not None,
        plan.block_s,
        MERGED_CHANNELS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return message


def batch_norm_backward_triton(
    grad_y: Tensor,  # [N, C, H, W] or [N, C, H + 2, W + 2]
    grad_activated: Tensor | None,  # [N, C, H, W], as h and grad_h
    h: Tensor,
    saved: Tensor,  # [views, 2, C]
    weight: Tensor,  # [C], as bias and their gradients
    bias: Tensor,
    views: int,
    slope: float,
    then_slope: float | None,
    pad: bool,
    grad_h: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    exchange: Exchange | None = None,
) -> None:
    """Fills grad_h, grad_weight and grad_bias; all but vectors in channels_last.

    exchange: as of `batch_norm_triton`; the gradients of weight and bias are then this process's share of them.
    """
    N, C, H, W = h.shape
    rows = N // views * H * W
    plan = Plan(rows, views, C)
    partials = torch.empty(views, 2, plan.splits, C, dtype=torch.float32, device=h.device)
    if C == 0:
        return
    inputs = (grad_y, grad_y if grad_activated is None else grad_activated, h, saved, weight, bias)
    slopes = (slope, 1.0 if then_slope is None else then_slope)
    flags = (grad_activated is not None, pad, 3 if H == 1 else 2, 3 if W == 1 else 2)
    messages = None
    with torch.cuda.device_of(h):
        if rows > 0:
            batch_norm_backward_sums_kernel[plan.reduce_grid](
                *inputs, partials, rows, H, W, C, plan.split, *slopes, *flags, **plan.blocks
            )
        if exchange is not None:
            messages = exchange(message_of(plan, partials, views, rows, C, (grad_weight, grad_bias)))
            if rows == 0:
                return
        batch_norm_backward_apply_kernel[plan.apply_grid(rows)](
            *inputs,
            partials if messages is None else messages,
            grad_h,
            grad_weight,
            grad_bias,
            views,
            rows,
            H,
            W,
            C,
            plan.split,
            plan.tiles_per_program(rows),
            *slopes,
            *flags,
            0 if messages is None else len(messages),
            BLOCK_S=plan.block_s if messages is None else triton.next_power_of_2(len(messages)),
            **plan.blocks,
        )


class Plan:
    """Which program takes what: `rows` of each view in `splits` parts of `split` rows, channels in blocks."""

    def __init__(self, rows: int, views: int, C: int) -> None:
        rows = max(1, rows)
        blocks = blocks_for(rows * views * C)
        block_c = max(1, min(triton.next_power_of_2(C), LARGEST_BLOCK_C))
        self.block_m = blocks.tile // block_c
        self.blocks = {"BLOCK_M": self.block_m, "BLOCK_C": block_c}
        self.blocks |= {"num_warps": blocks.num_warps, "enable_fp_fusion": True}
        self.others = (triton.cdiv(C, block_c), views)
        columns = max(1, self.others[0] * views)  # of programs
        self.apply_programs = max(1, blocks.apply_programs // columns)
        tiles = triton.cdiv(rows, self.block_m)
        splits = max(1, min(tiles, blocks.most_splits, blocks.reduce_programs // columns))
        self.split = triton.cdiv(tiles, splits) * self.block_m
        self.splits = triton.cdiv(rows, self.split)
        self.block_s = triton.next_power_of_2(self.splits)
        self.reduce_grid = (self.splits, *self.others)

    def tiles_per_program(self, rows: int) -> int:
        return max(1, triton.cdiv(triton.cdiv(rows, self.block_m), self.apply_programs))

    def apply_grid(self, rows: int) -> tuple[int, int, int]:
        # One program at least: it updates the running statistics, of a process without rows too.
        return (max(1, triton.cdiv(rows, self.tiles_per_program(rows) * self.block_m)), *self.others)


@triton.jit(do_not_specialize=["rows", "split"])
def batch_norm_statistics_kernel(
    x,  # [views * rows, C], as residual and h
    residual,
    h,
    partials,  # [views, 2, splits, C]: mean of each part, and the sum of squared deviations from it
    rows,
    C,
    split,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, splits, view = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, BLOCK_M)
    begin = part * split
    end = tl.minimum(begin + split, rows)
    # Welford's recursion in every lane of the tile: nothing has to be summed across threads before the end.
    mean = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    count = 0.0
    for first in tl.range(begin, end, BLOCK_M, num_stages=PIPELINED):
        row = first + lane
        inside = (row < end)[:, None] & (c < C)[None, :]
        at = (view * rows + row).to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            total = (value + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(h.dtype.element_ty)
            tl.store(h + at, total, mask=inside)
            value = total.to(tl.float32)
        count += 1.0
        change = tl.where(inside, value - mean, 0.0)
        mean += change * (1.0 / count)
        squares += change * (value - mean)
    length = end - begin
    counts = ((length - lane + BLOCK_M - 1) // BLOCK_M).to(tl.float32)[:, None]  # 0 for lanes behind the last row
    total_mean, total_squares = merge(counts, mean, squares, length)
    at = (view * 2 * splits + part) * C + c
    tl.store(partials + at, total_mean, mask=c < C)
    tl.store(partials + at + splits * C, total_squares, mask=c < C)


@triton.jit
def merge(counts, means, squares, length):  # [parts, 1], [parts, BLOCK_C] each
    """Mean and sum of squared deviations of the union (Chan, Golub and LeVeque 1983)."""
    mean = tl.sum(counts * means, axis=0) / length
    change = means - mean[None, :]
    return mean, tl.sum(squares + counts * change * change, axis=0)


@triton.jit
def load_partials(partials, view, splits, c, C, BLOCK_S: tl.constexpr):  # [views, 2, splits, C]
    s = tl.arange(0, BLOCK_S)
    inside = (s < splits)[:, None] & (c < C)[None, :]
    at = (view * 2 * splits + s)[:, None] * C + c[None, :]
    first = tl.load(partials + at, mask=inside, other=0.0)
    return first, tl.load(partials + at + splits * C, mask=inside, other=0.0)


@triton.jit
def view_statistics(partials, view, rows, split, c, C, BLOCK_S: tl.constexpr):
    """Mean and sum of squared deviations of a view, [BLOCK_C] each."""
    means, squares = load_partials(partials, view, (rows + split - 1) // split, c, C, BLOCK_S)
    counts = tl.minimum(tl.maximum(rows - tl.arange(0, BLOCK_S) * split, 0), split).to(tl.float32)
    return merge(counts[:, None], means, squares, rows)


@triton.jit(do_not_specialize=["views", "rows", "split"])
def batch_norm_merge_kernel(
    partials,  # [views, 2, splits, C]
    message,  # [1 + views * 2 * C]
    grad_weight,  # [C]
    grad_bias,  # [C]
    views,
    rows,
    C,
    split,
    SUMS: tl.constexpr,  # of the backward pass; else means and squares
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if tl.program_id(0) == 0:
        tl.store(message.to(tl.pointer_type(tl.int32), bitcast=True), rows)
    all_first = tl.zeros([BLOCK_C], tl.float32)
    all_second = tl.zeros([BLOCK_C], tl.float32)
    for view in range(0, views):
        if SUMS:
            first, second = view_sums(partials, view, rows, split, c, C, BLOCK_S)
            all_first += first
            all_second += second
        else:
            first, second = view_statistics(partials, view, rows, split, c, C, BLOCK_S)
        tl.store(message + 1 + view * 2 * C + c, first, mask=c < C)
        tl.store(message + 1 + (view * 2 + 1) * C + c, second, mask=c < C)
    if SUMS:
        tl.store(grad_bias + c, all_first, mask=c < C)
        tl.store(grad_weight + c, all_second, mask=c < C)


@triton.jit
def load_messages(messages, processes, view, views, c, C, BLOCK_S: tl.constexpr):  # [processes, 1 + views * 2 * C]
    """Rows of each process [BLOCK_S, 1], and its two vectors [BLOCK_S, BLOCK_C] each."""
    p = tl.arange(0, BLOCK_S)
    start = p * (1 + views * 2 * C)
    counts = tl.load(messages.to(tl.pointer_type(tl.int32), bitcast=True) + start, mask=p < processes, other=0)
    inside = (p < processes)[:, None] & (c < C)[None, :]
    at = (start + 1 + view * 2 * C)[:, None] + c[None, :]
    first = tl.load(messages + at, mask=inside, other=0.0)
    return counts.to(tl.float32)[:, None], first, tl.load(messages + at + C, mask=inside, other=0.0)


@triton.jit
def batch_statistics(
    parts, processes: tl.constexpr, view, views, rows, split, c, C, BLOCK_S: tl.constexpr
):  # partials, or the messages of so many processes
    """Rows of a view, their mean and sum of squared deviations [BLOCK_C] each, over all processes."""
    if processes == 0:
        number = rows.to(tl.float32)
        mean, squares = view_statistics(parts, view, rows, split, c, C, BLOCK_S)
    else:
        counts, means, each = load_messages(parts, processes, view, views, c, C, BLOCK_S)
        number = tl.sum(counts)
        mean, squares = merge(counts, means, each, number)
    return number, mean, squares


@triton.jit
def batch_sums(parts, processes: tl.constexpr, view, views, rows, split, c, C, BLOCK_S: tl.constexpr):
    """Rows of a view and its two sums, over all processes."""
    if processes == 0:
        number = rows.to(tl.float32)
        total, products = view_sums(parts, view, rows, split, c, C, BLOCK_S)
    else:
        counts, totals, each = load_messages(parts, processes, view, views, c, C, BLOCK_S)
        number = tl.sum(counts)
        total, products = tl.sum(totals, axis=0), tl.sum(each, axis=0)
    return number, total, products


@triton.jit
def leaky(value, slope):
    return tl.where(value > 0, value, value * slope)


@triton.jit(do_not_specialize=["views", "rows", "out_rows", "H", "W", "split", "tiles"])
def batch_norm_apply_kernel(
    h,  # [views * rows, C]
    parts,  # partials [views, 2, splits, C], or messages [processes, 1 + views * 2 * C]
    weight,  # [C]
    bias,  # [C]
    running_mean,  # [C]
    running_var,  # [C]
    y,  # [views * out_rows, C]
    activated,  # [views * rows, C]
    saved,  # [views, 2, C]
    views,
    rows,
    out_rows,
    H,
    W,
    C,
    split,
    tiles,  # of a program
    momentum,
    eps,
    slope,
    then_slope,
    RUNNING: tl.constexpr,
    THEN: tl.constexpr,
    PAD: tl.constexpr,
    PROCESSES: tl.constexpr,  # 0: this one has the whole batch
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, view = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    number, mean, squares = batch_statistics(parts, PROCESSES, view, views, rows, split, c, C, BLOCK_S)
    inverse = 1.0 / tl.sqrt_rn(squares / number + eps)
    if program == 0:
        tl.store(saved + view * 2 * C + c, mean, mask=c < C)
        tl.store(saved + (view * 2 + 1) * C + c, inverse, mask=c < C)
    if RUNNING:  # noqa: SIM102  known when compiling, the next is not
        if (program == 0) & (view == 0):
            new_mean = tl.load(running_mean + c, mask=c < C, other=0.0).to(tl.float32)
            new_var = tl.load(running_var + c, mask=c < C, other=0.0).to(tl.float32)
            for v in range(0, views):
                _, of_view, its_squares = batch_statistics(parts, PROCESSES, v, views, rows, split, c, C, BLOCK_S)
                new_mean += momentum * (of_view - new_mean)
                new_var += momentum * (its_squares / (number - 1) - new_var)
            tl.store(running_mean + c, new_mean, mask=c < C)
            tl.store(running_var + c, new_var, mask=c < C)

    scale = inverse * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for tile in tl.range(0, tiles, num_stages=PIPELINED):
        out_row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = out_row
        if PAD:
            n, rest = out_row // ((H + 2) * (W + 2)), out_row % ((H + 2) * (W + 2))
            i = tl.minimum(tl.maximum(rest // (W + 2) - 1, 0), H - 1)
            j = tl.minimum(tl.maximum(rest % (W + 2) - 1, 0), W - 1)
            row = (n * H + i) * W + j
        inside = (out_row < out_rows)[:, None] & (c < C)[None, :]
        at = (view * rows + row).to(tl.int64)[:, None] * C + c[None, :]
        out_at = (view * out_rows + out_row).to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        value = leaky((value - mean[None, :]) * scale[None, :] + shift[None, :], slope).to(y.dtype.element_ty)
        tl.store(y + out_at, value, mask=inside)
        if THEN:
            tl.store(activated + out_at, leaky(value.to(tl.float32), then_slope), mask=inside)


@triton.jit
def beyond(i, H, a: tl.constexpr):  # [BLOCK_M]
    """Where copy `a` of position i of 0 .. H - 1 is, relative to it, and whether there is one.

    0: its own place; 1: beyond the edge that it is on; 2: beyond the other edge, for H = 1.
    """
    if a == 0:
        offset, there = i * 0, i >= 0
    elif a == 1:
        offset, there = tl.where(i == 0, -1, 1), (i == 0) | (i == H - 1)
    else:
        offset, there = i * 0 + 1, i >= 0
    return offset, there


@triton.jit
def load_gradient(
    grad_y,  # [views * out_rows, C]
    grad_activated,  # [views * rows, C], as h
    h,
    mean,  # [1, BLOCK_C] each
    inverse,
    weight,
    bias,
    view,
    row,  # [BLOCK_M]
    c,  # [BLOCK_C]
    inside,  # [BLOCK_M, BLOCK_C]
    rows,
    H,
    W,
    C,
    slope,
    then_slope,
    THEN: tl.constexpr,
    PAD: tl.constexpr,
    COPIES_H: tl.constexpr,
    COPIES_W: tl.constexpr,
):
    """The gradient of what the LeakyReLU is taken of, and (h - mean) · inverse, [BLOCK_M, BLOCK_C] each."""
    at = (view * rows + row).to(tl.int64)[:, None] * C + c[None, :]
    normal = (tl.load(h + at, mask=inside, other=0.0).to(tl.float32) - mean) * inverse
    if PAD:
        # Gathered: an element sums the positions that copy it, its own and those beyond the edges that it is on.
        i, j = (row // W) % H, row % W
        own = ((view * (rows // W // H) + row // W // H) * (H + 2) + i + 1) * (W + 2) + j + 1
        gradient = tl.zeros(inside.shape, tl.float32)
        for a in tl.static_range(COPIES_H):
            for b in tl.static_range(COPIES_W):
                up, copies_up = beyond(i, H, a)
                left, copies_left = beyond(j, W, b)
                position = (own + up * (W + 2) + left).to(tl.int64)[:, None] * C + c[None, :]
                copies = inside & (copies_up & copies_left)[:, None]
                gradient += tl.load(grad_y + position, mask=copies, other=0.0).to(tl.float32)
    else:
        gradient = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    positive = normal * weight + bias > 0
    if THEN:
        second = tl.load(grad_activated + at, mask=inside, other=0.0).to(tl.float32)
        gradient += tl.where(positive, second, second * then_slope)
    return tl.where(positive, gradient, gradient * slope), normal


@triton.jit
def load_vectors(saved, weight, bias, view, c, C):  # [views, 2, C], [C] each
    """Mean, inverse deviation, weight and bias, [1, BLOCK_C] each."""
    mean = tl.load(saved + view * 2 * C + c, mask=c < C, other=0.0)
    inverse = tl.load(saved + (view * 2 + 1) * C + c, mask=c < C, other=0.0)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    return mean[None, :], inverse[None, :], w[None, :], b[None, :]


@triton.jit(do_not_specialize=["rows", "H", "W", "split"])
def batch_norm_backward_sums_kernel(
    grad_y,  # [views * out_rows, C]
    grad_activated,  # [views * rows, C], as h
    h,
    saved,  # [views, 2, C]
    weight,  # [C]
    bias,  # [C]
    partials,  # [views, 2, splits, C]: sums of the gradient, and of its products with the normalised h
    rows,
    H,
    W,
    C,
    split,
    slope,
    then_slope,
    THEN: tl.constexpr,
    PAD: tl.constexpr,
    COPIES_H: tl.constexpr,
    COPIES_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, splits, view = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, inverse, w, b = load_vectors(saved, weight, bias, view, c, C)
    begin = part * split
    end = tl.minimum(begin + split, rows)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in tl.range(begin, end, BLOCK_M, num_stages=PIPELINED):
        row = first + tl.arange(0, BLOCK_M)
        inside = (row < end)[:, None] & (c < C)[None, :]
        gradient, normal = load_gradient(
            grad_y,
            grad_activated,
            h,
            mean,
            inverse,
            w,
            b,
            view,
            row,
            c,
            inside,
            rows,
            H,
            W,
            C,
            slope,
            then_slope,
            THEN,
            PAD,
            COPIES_H,
            COPIES_W,
        )
        total += gradient
        products += gradient * normal
    at = (view * 2 * splits + part) * C + c
    tl.store(partials + at, tl.sum(total, axis=0), mask=c < C)
    tl.store(partials + at + splits * C, tl.sum(products, axis=0), mask=c < C)


@triton.jit
def view_sums(partials, view, rows, split, c, C, BLOCK_S: tl.constexpr):
    total, products = load_partials(partials, view, (rows + split - 1) // split, c, C, BLOCK_S)
    return tl.sum(total, axis=0), tl.sum(products, axis=0)


@triton.jit(do_not_specialize=["views", "rows", "H", "W", "split", "tiles"])
def batch_norm_backward_apply_kernel(
    grad_y,  # [views * out_rows, C]
    grad_activated,  # [views * rows, C], as h and grad_h
    h,
    saved,  # [views, 2, C]
    weight,  # [C], as bias and their gradients
    bias,
    parts,  # as of batch_norm_apply_kernel
    grad_h,
    grad_weight,
    grad_bias,
    views,
    rows,
    H,
    W,
    C,
    split,
    tiles,  # of a program
    slope,
    then_slope,
    THEN: tl.constexpr,
    PAD: tl.constexpr,
    COPIES_H: tl.constexpr,
    COPIES_W: tl.constexpr,
    PROCESSES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program, view = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    number, total, products = batch_sums(parts, PROCESSES, view, views, rows, split, c, C, BLOCK_S)
    if PROCESSES == 0:  # noqa: SIM102  of several, each has stored its own share
        if (program == 0) & (view == 0):
            all_total = tl.zeros([BLOCK_C], tl.float32)
            all_products = tl.zeros([BLOCK_C], tl.float32)
            for v in range(0, views):
                _, of_view, its_products = batch_sums(parts, PROCESSES, v, views, rows, split, c, C, BLOCK_S)
                all_total += of_view
                all_products += its_products
            tl.store(grad_bias + c, all_total, mask=c < C)
            tl.store(grad_weight + c, all_products, mask=c < C)

    mean, inverse, w, b = load_vectors(saved, weight, bias, view, c, C)
    mean_gradient, mean_product = (total / number)[None, :], (products / number)[None, :]
    for tile in tl.range(0, tiles, num_stages=PIPELINED):
        row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (c < C)[None, :]
        gradient, normal = load_gradient(
            grad_y,
            grad_activated,
            h,
            mean,
            inverse,
            w,
            b,
            view,
            row,
            c,
            inside,
            rows,
            H,
            W,
            C,
            slope,
            then_slope,
            THEN,
            PAD,
            COPIES_H,
            COPIES_W,
        )
        result = (gradient - mean_gradient - normal * mean_product) * (w * inverse)
        tl.store(grad_h + (view * rows + row).to(tl.int64)[:, None] * C + c[None, :], result, mask=inside)
