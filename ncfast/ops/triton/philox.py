"""Philox4x32-10 in Triton: the addresses of ncfast/ops/philox.py, the rounds of Triton's own generator."""

import triton
import triton.language as tl
from triton.language.random import philox_impl


@triton.jit
def uniform(
    seed,  # int64
    sample,  # int64
    step,
    position,  # a block
    STREAM: tl.constexpr,
):
    """Uniform float64 in (0, 1), never 0 or 1, shaped as `position`."""
    sample, seed = sample.to(tl.int64), seed.to(tl.int64)  # the interpreter makes small ones int32
    c2 = (position.to(tl.int64) | (step.to(tl.int64) << 16)).to(tl.uint32)
    c0 = tl.zeros_like(c2) + sample.to(tl.uint32)
    c1 = tl.zeros_like(c2) + (sample >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c2) + STREAM * 16777216
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word, _, _, _ = philox_impl(c0, c1, c2, c3, k0, k1)
    return (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
