"""nearest_code where scores are off by nearly all that its error bounds allow: half of a bound would give wrong codes.

Each row has two codes that matter: B, the first, whose computed scores are as much too great as they can be, and A,
whose are too small; A is the nearest.
"""

import pytest
import torch
from implementations import each, implementations

from ncfast.ops import nearest_code
from ncfast.ops.nearest_code import why_not

IMPLEMENTATIONS = implementations(nearest_code, why_not, cuda=True)
B, A = 0, 1
M = 70


def accumulation(K, D):
    """float32 sums: the first product is large, and each other one is rounded away for A and up to a unit for B."""
    unit = 2.0**-13  # in the last place of sums from 1024 to 2048
    z = torch.ones(M, D)
    z[:, 0] = 1025 + torch.arange(M) / 64
    codebook = torch.zeros(K, D)
    # As many codes on either side, so that their mean is no centre to subtract.
    codebook[:, 0] = 0.9 * (1 - 2 * (torch.arange(K) % 2))
    codebook[[B, A], 0] = torch.tensor([1 - 0.1 * D * 2.0**-23, 1])
    codebook[[B, A], 1:] = torch.tensor([[0.51 * unit], [0.49 * unit]])
    return z, codebook


def rounded_to_half(rows, D):
    """Vectors [rows, D] with a sum just above 0, which is as far below 0 as can be when they are rounded to fp16."""
    unit = 2.0**-10  # of fp16 from 1 to 2
    sign = 1 - 2 * (torch.arange(D) % 2)
    units = 2 * sign - (torch.arange(D) < 0.49 * D * 0.96).int()  # what the rests add up to, taken away again
    vector = sign + unit * (units + 0.49)
    return torch.stack([vector[torch.randperm(D, generator=torch.Generator().manual_seed(i))] for i in range(rows)])


def rows_in_half(K, D):
    codebook = 1.25 * torch.ones(K, D)
    codebook[::2] *= -1  # all but A and B are farther away, and the mean is 0
    codebook[[B, A]] = torch.tensor([[-1.0], [1.0]])
    return rounded_to_half(M, D), codebook


def codes_in_half(K, D):
    codebook = 1.25 * (1 - 2.0 * (torch.arange(D) % 2)).expand(K, D).clone()
    codebook[::2] *= -1
    (codebook[A],) = rounded_to_half(1, D)
    codebook[B] = -codebook[A]
    return torch.ones(M, D) * 2.0 ** (torch.arange(M) % 7)[:, None], codebook


# Codebooks that a GPU keeps in shared memory, and that it streams; D that is no multiple of a tile.
SHAPES = [(40, 256), (64, 100), (40, 1024), (4096, 128), (40, 4096)]


@each(IMPLEMENTATIONS)
@pytest.mark.parametrize(("K", "D"), SHAPES)
@pytest.mark.parametrize("adversary", [accumulation, rows_in_half, codes_in_half])
def test_the_bound_holds_where_errors_are_largest(run, adversary, K, D):
    if run.slow and K * D > 40 * 256:
        pytest.skip("the interpreter is slow")
    z, codebook = adversary(K, D)
    assert (
        torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1) == A
    ).all()
    assert (run(z, codebook) == A).all()
