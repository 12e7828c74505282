"""Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011): random numbers by address.

A number depends on the seed and on where it is used (sample, step, position, stream), never on the order of the draws,
the batch size or the device.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# Streams: independent numbers for different uses at one address.
TOKENS, CONFIDENCE, LABELS, CONDITIONS, RADIUS, ANGLE = range(6)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds. Words are int64 tensors in 0..2³²-1, of shapes that broadcast; four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products with the multipliers less 2³² stay within 63 bits: torch.compile makes C++ of this, where an overflow
        # would be undefined. Their lower halves are the same, and c is what the upper ones lack.
        p0, p1 = c0 * (MULTIPLIERS[0] - 2**32), c2 * (MULTIPLIERS[1] - 2**32)
        c0, c1, c2, c3 = ((p1 >> 32) + c2) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) + c0) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed: int | Tensor, sample: Tensor, position: Tensor, *, step: int, stream: int) -> Tensor:
    """Uniform float64 in (0, 1), never 0 or 1.

    Args:
        seed: 64 bits; a tensor is int64 without dimensions.
        sample: global sample index, int64, broadcast against `position`.
        position: token position below 2¹⁶, int64; below 2³² where step is 0.
        step: decoding step below 2¹⁶.
        stream: one of the streams above.
    """
    sample, position = torch.broadcast_tensors(sample, position)
    counter = (sample & WORD, (sample >> 32) & WORD, position | (step << 16), torch.full_like(position, stream << 24))
    word = philox4x32(counter, (seed & WORD, (seed >> 32) & WORD))[0]
    return (word.double() + 0.5) * 2.0**-32
