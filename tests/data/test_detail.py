import dataclasses

import numpy as np
import pytest
from runs import waves

from ncfast.config import make_config
from ncfast.data.detail import structure_within, variance_within
from ncfast.data.sources import from_arrays
from ncfast.training.fit import MAX_COLUMNS, chosen_halvings, columns_reason

WHITE = np.random.default_rng(0).normal(size=(200, 1, 128))


def test_shares_of_a_step_by_hand():
    """1 1 1 -1 has the mean 1/2 and deviations 1/2 1/2 1/2 -3/2: variance 3/4. Its second pair has deviations 1, -1."""
    x = np.array([[[1.0, 1, 1, -1]]])
    assert variance_within(x, 1) == 0
    assert variance_within(x, 2) == pytest.approx((0 + 0 + 1 + 1) / 4 / 0.75)
    assert variance_within(x, 4) == pytest.approx(1)
    assert variance_within(x, 5) == 1  # no whole block
    # Twice 2/3 would be more noise than there is variance, so it counts as 1.
    assert structure_within(x, 2) == pytest.approx(2 / 3 - 1 / 2)
    assert structure_within(x, 4) == pytest.approx(1 - 3 / 4)
    step = np.repeat([1.0, -1.0], 8)[None, None]  # without noise
    assert [structure_within(step, size) for size in (2, 8, 16)] == pytest.approx([0, 0, 1])


@pytest.mark.parametrize("size", [2, 8, 32, 128])
def test_white_noise_has_no_structure(size):
    assert abs(structure_within(WHITE, size)) < 0.02
    assert variance_within(WHITE, size) == pytest.approx(1 - 1 / size, abs=0.02)


def test_missing_values_and_flat_channels_do_not_count():
    x = np.repeat(np.tile([1.0, -1.0], 4), 4)[None, None]  # blocks of 4
    gaps = x.copy()
    gaps[..., ::3] = np.nan
    assert variance_within(gaps, 4) == pytest.approx(0) and variance_within(gaps, 8) == pytest.approx(1, abs=0.05)
    flat = np.concatenate([x, np.full_like(x, 3.0)], 1)
    for size in (2, 4, 8):
        assert variance_within(flat, size) == pytest.approx(variance_within(x, size))
    assert variance_within(np.full((2, 1, 8), 5.0), 4) == 0
    assert variance_within(np.full((2, 1, 8), np.nan), 4) == 0


def square(period, length, n=40):
    """Square waves of random phase: blocks of half a period tell them, blocks of a period do not."""
    phase = np.random.default_rng(0).integers(0, period, (n, 1, 1))
    return np.where((np.arange(length) + phase) // (period // 2) % 2, 1.0, -1.0).astype(np.float32)


@pytest.mark.parametrize(
    ("x", "options", "halvings"),
    [
        # By the length 8 columns of 16 samples.
        (square(64, 128), {}, 4),  # slow: columns of 16 samples tell all
        (square(16, 128), {}, 2),  # columns of 16 samples tell nothing, of 8 and of 4 more and more
        (square(16, 128), {"detail": 0.0}, 4),
        (square(16, 128), {"detail": 1.0}, 4),  # more than there is
        (square(4, 128), {}, 2),  # would be 64 columns of 2 samples, or more
        (square(16, 16), {}, 1),  # short: as fine as can be
        (WHITE.astype(np.float32), {}, 4),
        (square(16, 512), {}, 4),  # 32 columns; more are too many
        (square(16, 2048), {}, 5),  # long: 64 columns by the length already
        (square(16, 128), {"n_fft": 8, "detail": 0.0, "samples_per_column": 0}, 3),
    ],
)
def test_columns_are_as_short_as_tells_the_series_apart(x, options, halvings):
    config = make_config(**options)
    dataset = from_arrays(x, None)
    found = chosen_halvings(dataset, config)
    assert found == halvings
    by_length = chosen_halvings(dataset, make_config(**{**options, "detail": 0.0}))
    frames = 1 + dataset.length // (config.n_fft // 4)
    assert found <= by_length and (found == by_length or frames >> found <= MAX_COLUMNS)


def test_the_reason_is_said():
    dataset = from_arrays(*waves(20))
    for options, halvings, reason in (
        ({}, 3, "by the length"),
        ({"detail": 0.0}, None, "by the length"),
        ({}, 2, "for detail that 7 by the length would lose (--detail 0.2)"),
        ({"halvings": 2}, 2, "as --halvings says"),
    ):
        given = make_config(**options)
        assert columns_reason(given, dataclasses.replace(given, halvings=halvings), dataset) == reason
