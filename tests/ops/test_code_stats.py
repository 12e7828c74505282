import numpy as np
import pytest
import torch

from ncfast.ops import code_stats


@pytest.mark.parametrize(("M", "K", "D"), [(0, 4, 3), (1, 1, 1), (63, 5, 7), (500, 32, 64)])
def test_counts_and_sums(M, K, D):
    generator = torch.Generator().manual_seed(M)
    z = torch.randn(M, D, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, K, (M,), generator=generator)
    counts, sums = code_stats(z, indices, K)
    np.testing.assert_array_equal(counts, np.bincount(indices, minlength=K))
    expected = np.zeros((K, D))
    for row, k in zip(z.numpy(), indices.tolist(), strict=True):
        expected[k] += row
    np.testing.assert_allclose(sums, expected, rtol=1e-12, atol=1e-12)


def test_low_precision_is_summed_in_float32():
    z = torch.full((4097, 1), 1.0).bfloat16()
    counts, sums = code_stats(z, torch.zeros(4097, dtype=torch.int64), 1)
    assert counts.item() == sums.item() == 4097


def test_refuses_shapes():
    with pytest.raises(ValueError, match="indices"):
        code_stats(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), 5)
