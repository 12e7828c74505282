"""unmask_step in Triton: the whole step in one launch, a program a row, float64 from the logits on."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ncfast.ops import dispatch
from ncfast.ops import philox as streams
from ncfast.ops.triton.philox import uniform

TOKENS, CONFIDENCE = tl.constexpr(streams.TOKENS), tl.constexpr(streams.CONFIDENCE)
LOG2_E = tl.constexpr(float.fromhex("0x1.71547652b82fep+0"))
LN_2_HIGH = tl.constexpr(float.fromhex("0x1.62e42feep-1"))
LN_2_LOW = tl.constexpr(float.fromhex("0x1.a39ef35793c76p-33"))
ROUND = tl.constexpr(1.5 * 2.0**52)
INTEGER = tl.constexpr(2.0**52)


def unmask_step_triton(
    scale: float,
    logits: Tensor,
    unconditional: Tensor | None,
    tokens: Tensor,
    sample: Tensor,
    positions: Tensor | None,
    seeds: Tensor | None,
    counts: Tensor | None,
    seed: int,
    step: int,
    num_masked: int,
    width: int,
    choice_temperature: float,
    guidance_scale: float,
    temperature: float,
    top_k: int,
    google: bool,
) -> tuple[Tensor, Tensor]:
    """All contiguous: logits and unconditional [B, m, K], tokens int64 [B, n], sample [B], positions int64 [B, m].

    `seeds` (one int64) and `counts` (int64 [B]) take the place of `seed` and `num_masked`; `scale` is what the
    likeliest code weighs. Returns tokens [B, n] and the positions [B, width] that are still masked.
    """
    (B, m, K), n = logits.shape, tokens.shape[1]
    out = dispatch.empty_indices(*tokens.shape, device=tokens.device)
    remaining = dispatch.empty_indices(B, width, device=tokens.device)
    if B == 0:
        return out, remaining
    confidence = torch.empty(B, m, dtype=torch.float64, device=logits.device)
    with torch.cuda.device_of(logits):
        unmask_step_kernel[(B,)](
            logits,
            unconditional,
            tokens,
            sample,
            positions,
            seeds,
            counts,
            confidence,
            out,
            remaining,
            m,
            n,
            K,
            width,
            seed >> 32,
            (seed + 2**31) % 2**32 - 2**31,
            step,
            num_masked,
            top_k,
            scale,
            choice_temperature,
            guidance_scale,
            temperature,
            GOOGLE=google,
            RANK=counts is not None or num_masked > 0,
            NOISE=choice_temperature != 0,
            TEMPERED=temperature != 1,
            TOP_K=0 < top_k < K,
            **blocks(m, K),
        )
    return out, remaining


def blocks(m: int, K: int) -> dict:
    """Positions and codes of a tile, and positions that are ranked or passed at once.

    Measured on an H200, all positions drawn, this and a tile of 512 with 8 warps and passes of 64 and 256: 1024 x 75 x
    32, 81 and 97 us; 1024 x 75 x 128, 194 and 368; the other way round 256 x 256 x 64, 328 and 160. On an H100, 256 x
    256 x 1024: a tile of 2048 with 4 warps 823 us, of 4096 with 8 warps 1270.
    """
    codes = max(triton.next_power_of_2(K), 16)
    tile, rank, passed, warps = 2048, 64, 256, 4
    if codes < 256:
        tile, rank, passed, warps = (256, 32, 128, 2) if m <= 128 else (512, 64, 256, 8)
    return {
        "BLOCK_M": max(1, min(tile // codes, triton.next_power_of_2(max(m, 1)))),
        "BLOCK_K": codes,
        "BLOCK_RANK": rank,
        "BLOCK_N": passed,
        "num_warps": warps,
        # A fused multiply-add rounds otherwise than the C++ kernel.
        "enable_fp_fusion": False,
    }


@triton.jit
def exponential(x):
    """exp(x) for x <= 0, operation by operation as in csrc/cpu/unmask_step_kernel.h: change both."""
    x = tl.where(x < -40.0, -40.0, x)
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = (x - n * LN_2_HIGH) - n * LN_2_LOW
    p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    # n stands in the low bits of `shifted`; what is above them leaves at the top.
    power = ((shifted.to(tl.int64, bitcast=True) + 1023) << 52).to(tl.float64, bitcast=True)
    return p * power


@triton.jit
def keep_highest(scores, top_k):
    """All but the `top_k` highest scores of each row become -infinity; of equal ones the first stay."""
    scores = tl.where(scores == 0, 0.0, scores)  # -0 is 0
    bits = scores.to(tl.int64, bitcast=True)
    # Integers that are ordered as the numbers are.
    key = tl.where(bits < 0, ~bits, bits ^ (-9223372036854775807 - 1)).to(tl.uint64, bitcast=True)
    last = tl.zeros([scores.shape[0]], tl.uint64)  # the top_k-th of them, bit by bit
    bit = tl.full([scores.shape[0]], 9223372036854775808, tl.uint64)
    for _ in range(64):
        candidate = last | bit
        enough = tl.sum((key >= candidate[:, None]).to(tl.int32), axis=1) >= top_k
        last = tl.where(enough, candidate, last)
        bit = bit >> 1
    above, level = key > last[:, None], key == last[:, None]
    room = top_k - tl.sum(above.to(tl.int32), axis=1)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=1) <= room[:, None]))
    return tl.where(kept, scores, float("-inf"))


@triton.jit
def load_positions(positions, tokens, j, m, n, K):
    """The positions of entries j of a row, and which of them are drawn."""
    position = j.to(tl.int64) if positions is None else tl.load(positions + j, mask=j < m, other=-1)
    real = (j < m) & (position >= 0) & (position < n)
    return position, real & (tl.load(tokens + position, mask=real, other=-1) == K)


@triton.jit(do_not_specialize=["m", "n", "K", "width", "seed_high", "seed_low", "step", "num_masked", "top_k"])
def unmask_step_kernel(
    logits,  # [B, m, K]
    unconditional,  # [B, m, K], or None
    tokens,  # [B, n]
    sample,  # [B]
    positions,  # [B, m], or None
    seeds,  # 1, or None
    counts,  # [B], or None
    confidence,  # [B, m]: scratch
    out,  # [B, n]
    remaining,  # [B, width]
    m,
    n,
    K,
    width,
    seed_high,  # in halves: Triton's interpreter takes what lies between 2^31 and 2^32 for another type
    seed_low,
    step,
    num_masked: tl.int64,
    top_k,
    scale: tl.float64,
    choice_temperature: tl.float64,
    guidance_scale: tl.float64,
    temperature: tl.float64,
    GOOGLE: tl.constexpr,
    RANK: tl.constexpr,  # whether any position is masked again
    NOISE: tl.constexpr,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tokens, out, remaining = tokens + row * n, out + row * n, remaining + row * width
    logits, confidence = logits + row * m * K, confidence + row * m
    if unconditional is not None:
        unconditional += row * m * K
    if positions is not None:
        positions += row * m
    index = tl.load(sample + row)
    seed = (seed_high.to(tl.int64) << 32) | seed_low.to(tl.uint32).to(tl.int64)
    if seeds is not None:
        seed = tl.load(seeds)
    if counts is not None:
        num_masked = tl.load(counts + row)

    for first in range(0, n, BLOCK_N):
        p = first + tl.arange(0, BLOCK_N)
        tl.store(out + p, tl.load(tokens + p, mask=p < n), mask=p < n)
    # Between one pass and the next the threads hand each other numbers through memory.
    tl.debug_barrier()

    num_drawn = 0
    k = tl.arange(0, BLOCK_K)
    for first in range(0, m, BLOCK_M):
        j = first + tl.arange(0, BLOCK_M)
        position, drawn = load_positions(positions, tokens, j, m, n, K)
        at = j[:, None] * K + k[None, :]
        mask = drawn[:, None] & (k < K)[None, :]
        scores = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float64)
        if unconditional is not None:
            other = tl.load(unconditional + at, mask=mask, other=float("-inf")).to(tl.float64)
            # -infinity on both sides is no NaN.
            scores = tl.where(scores == other, scores, other + guidance_scale * (scores - other))
        if TEMPERED:
            scores = scores / temperature
        top = tl.max(scores, axis=1)
        nans = tl.sum((scores != scores).to(tl.int32), axis=1)
        sound = (nans == 0) & (top > float("-inf")) & (top < float("inf"))
        if TOP_K:
            scores = keep_highest(scores, top_k)
        weights = exponential(scores - tl.where(sound, top, 0.0)[:, None]) * scale
        whole = (weights + INTEGER) - INTEGER
        # Sums of such integers are exact in any order.
        total = tl.sum(whole, axis=1)
        threshold = uniform(seed, index, step, position, TOKENS) * total
        code = tl.sum((tl.cumsum(whole, axis=1) <= threshold[:, None]).to(tl.int32), axis=1)
        code = tl.where(sound, code, 0)
        tl.store(out + position, code.to(tl.int64), mask=drawn)
        if RANK:
            probability = tl.sum(tl.where(k[None, :] == code[:, None], weights, 0.0), axis=1) / total
            probability = tl.where(sound, probability, 1.0)
            sureness = tl.log(probability if GOOGLE else probability + 1e-5)
            if NOISE:
                # 1 - u is exact, so its logarithm is as good as log1p(-u).
                u = uniform(seed, index, step, position, CONFIDENCE)
                sureness += choice_temperature * -tl.log(-tl.log(1.0 - u))
            sureness = tl.where(sound, sureness, float("-inf"))
            tl.store(confidence + j, tl.where(drawn, sureness, float("inf")), mask=j < m)
            num_drawn += tl.sum(drawn.to(tl.int32), axis=0)

    if RANK:
        again = num_masked
        if GOOGLE:
            again = tl.where(num_masked > 0, tl.maximum(tl.minimum(num_masked, num_drawn - 1), 1), 0)
        tl.debug_barrier()
        for first in range(0, m, BLOCK_RANK):
            i = first + tl.arange(0, BLOCK_RANK)
            mine = tl.load(confidence + i, mask=i < m, other=float("inf"))
            # How many are no more confident, itself included; of equal ones, in the paper's way, those not after it.
            rank = tl.zeros([BLOCK_RANK], tl.int32)
            for start in range(0, m, BLOCK_RANK):
                j = start + tl.arange(0, BLOCK_RANK)
                theirs = tl.load(confidence + j, mask=j < m, other=float("inf"))
                before = theirs[None, :] == mine[:, None]
                if not GOOGLE:
                    before = before & (j[None, :] <= i[:, None])
                before = before | (theirs[None, :] < mine[:, None])
                rank += tl.sum(before.to(tl.int32), axis=1)
            position, drawn = load_positions(positions, tokens, i, m, n, K)
            tl.store(out + position, tl.zeros([BLOCK_RANK], tl.int64) + K, mask=drawn & (rank <= again))

    tl.debug_barrier()
    count = 0
    for first in range(0, n, BLOCK_N):
        p = first + tl.arange(0, BLOCK_N)
        still = (tl.load(out + p, mask=p < n, other=-1) == K).to(tl.int32)
        column = count + tl.cumsum(still, axis=0) - 1
        tl.store(remaining + column, p.to(tl.int64), mask=(still > 0) & (column < width))
        count += tl.sum(still, axis=0)
    for first in range(0, width, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        tl.store(remaining + column, tl.zeros([BLOCK_N], tl.int64) + n, mask=(column >= count) & (column < width))
