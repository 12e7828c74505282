"""AdamW of many parameters in one launch, by a table of where they are."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements of a program
BLOCKS = {"BLOCK": 1024, "num_warps": 8, "enable_fp_fusion": True}  # 4 elements of a thread: float32 in 16 bytes
COLUMNS = tl.constexpr(8)


def table_of(rows: list[tuple[Tensor | None, ...]]) -> tuple[Tensor, int]:
    """What the kernel reads, int64 on the CPU, and its number of programs: the programs' row and first element, and of
    each row the addresses of weight, moments, step, gradient and rounded weight, and its size, negative where the
    gradient is bfloat16.

    rows: weight, exp_avg, exp_avg_sq, step, gradient, rounded weight or None; all of a row have the same order in
        memory and begin at multiples of 16 bytes.
    """
    programs = [(row, first) for row, (weight, *_) in enumerate(rows) for first in range(0, weight.numel(), CHUNK)]
    table = torch.zeros(len(programs) + 4 * len(rows), 2, dtype=torch.int64)
    table[: len(programs)] = torch.tensor(programs).view(-1, 2)
    for cells, row in zip(table[len(programs) :].view(len(rows), 8), rows, strict=True):
        size = row[0].numel() if row[4].dtype == torch.float32 else -row[0].numel()
        cells[:7] = torch.tensor([0 if each is None else each.data_ptr() for each in row] + [size])
    return table, len(programs)


def adamw_triton(
    table: Tensor, programs: int, rate: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """table: as of `table_of`, on the device; rate: float32 []. The steps count this one."""
    if programs == 0:
        return
    beta1, beta2 = betas
    with torch.cuda.device_of(table):
        adamw_kernel[(programs,)](
            table,
            programs,
            rate,
            BETA1=beta1,
            BETA2=beta2,
            LOG_BETA1=math.log(beta1),
            LOG_BETA2=math.log(beta2),
            EPS=eps,
            DECAY=weight_decay,
            CHUNK=CHUNK,
            **BLOCKS,
        )


@triton.jit(do_not_specialize=["programs"])
def adamw_kernel(
    table,  # see `table_of`
    programs,
    rate,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.multiple_of(tl.load(table + 2 * tl.program_id(0) + 1), CHUNK)
    row = table + 2 * programs + COLUMNS * tl.load(table + 2 * tl.program_id(0))
    size = tl.load(row + 6)
    low = size < 0
    size = tl.abs(size)
    step = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32))).to(tl.float64)
    lr = tl.load(rate).to(tl.float64)
    scale = (lr / (1 - tl.exp(step * LOG_BETA1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(step * LOG_BETA2)).to(tl.float32)
    kept = (1 - lr * DECAY).to(tl.float32)
    for start in range(first, min(first + CHUNK, size), BLOCK):
        if start + BLOCK <= size:  # without a mask, so that loads are 16 bytes wide
            update(row, start, size, low, scale, root, kept, BETA1, BETA2, EPS, BLOCK, True)
        else:
            update(row, start, size, low, scale, root, kept, BETA1, BETA2, EPS, BLOCK, False)


@triton.jit
def update(
    row,
    start,
    size,
    low,
    scale,
    root,
    kept,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    weights, firsts, seconds = column(row, 0, tl.float32), column(row, 1, tl.float32), column(row, 2, tl.float32)
    place = start + tl.arange(0, BLOCK)
    mask = None if WHOLE else place < size
    if low:
        g = tl.load(column(row, 4, tl.bfloat16) + place, mask=mask).to(tl.float32)
    else:
        g = tl.load(column(row, 4, tl.float32) + place, mask=mask)
    m = BETA1 * tl.load(firsts + place, mask=mask) + (1 - BETA1) * g
    v = BETA2 * tl.load(seconds + place, mask=mask) + (1 - BETA2) * g * g
    w = kept * tl.load(weights + place, mask=mask) - scale * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + EPS)
    tl.store(firsts + place, m, mask=mask)
    tl.store(seconds + place, v, mask=mask)
    tl.store(weights + place, w, mask=mask)
    if tl.load(row + 5) != 0:
        tl.store(column(row, 5, tl.bfloat16) + place, w.to(tl.bfloat16), mask=mask)


@triton.jit
def column(row, number: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(row + number).to(tl.pointer_type(dtype)), 16)
