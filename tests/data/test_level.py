"""Levels of series: what they are, how series are without them and with them again, when they are taken apart."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from runs import SMALL

from ncfast.config import make_config
from ncfast.data.level import LEAST_STD, filled, level_share, levels_of
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.training.fit import guesses, level_reason, resolve_config, stats_of

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
NAN = np.nan
# Prices: two channels of other units, whose level is some hundred times what changes within a series.
LEVEL = np.exp(RNG.normal(5, 1, (50, 1, 1))) * np.array([[[1.0], [1e-3]]])
X = (LEVEL * (1 + 0.01 * RNG.normal(size=(50, 2, 24)).cumsum(2))).astype(np.float32)


def test_series_without_their_levels_and_back():
    data = DataStats.of(from_arrays(X), level=True)
    levels, double = data.levels_of(X), X.astype(np.float64)
    np.testing.assert_allclose(levels[:, :2], double.mean(2), rtol=1e-12)
    np.testing.assert_allclose(np.exp(levels[:, 2:]), double.std(2), rtol=1e-12)
    x = data.normalise(X, CPU)
    expected = (double - double.mean(2, keepdims=True)) / double.std(2, keepdims=True)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(data.denormalise(x, levels), X, rtol=2e-7)
    for name, column, values in zip(("mean", "mean", "log", "log"), data.levels, levels.T, strict=True):
        assert column.name.startswith(name) and column.kind == "number"
        assert (column.mean, column.std) == pytest.approx((values.mean(), values.std()))
    # In units of the train set they are as without levels.
    plain = DataStats.of(from_arrays(X))
    shift, scale = data.units(CPU, levels)
    np.testing.assert_allclose(shift + scale * x, plain.normalise(X, CPU), atol=1e-6)
    assert [each.tolist() for each in plain.units(CPU, None)] == [[[[0.0], [0.0]]], [[[1.0], [1.0]]]]


def test_missing_values_and_a_single_series_of_another_scale():
    x = X.copy()
    x[RNG.random(x.shape) < 0.3] = NAN
    x[3, 0] = NAN  # nothing of it
    x[4, 1] = 0.25  # constant
    data = DataStats.of(from_arrays(x), level=True)
    levels = data.levels_of(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nothing but NaN
        mean, std = np.nanmean(x.astype(np.float64), 2), np.nanstd(x.astype(np.float64), 2)
    std[4, 1] = LEAST_STD * data.std[1]
    np.testing.assert_allclose(levels, np.concatenate([mean, np.log(std)], 1), rtol=1e-9)
    u, observed = data.normalise_observed(x, CPU)
    assert u.isfinite().all() and (u[3, 0] == 0).all() and (u[4, 1] == 0).all()
    np.testing.assert_allclose(data.denormalise(u, levels)[observed], x[observed], rtol=1e-6)
    told = data.told(from_arrays(x))
    assert np.isfinite(told).all()
    np.testing.assert_array_equal(told[~np.isnan(levels)], levels[~np.isnan(levels)])


def test_what_is_not_known_is_that_of_the_nearest_row():
    rows = np.array([[0.0, 0, 0, 0], [10, 1, 5, 2], [20, 2, 9, 4], [NAN, 3, 9, NAN]])
    given = np.array([[NAN, 0.9, NAN, 2.1], [19.0, NAN, 6, NAN], [NAN, 3.1, NAN, NAN], [NAN] * 4, [1, 2, 3, 4]])
    found = filled(given, rows)
    # Of the third the nearest row by far is the last, which has no first value: that is of the next nearest.
    expected = [[10, 0.9, 5, 2.1], [19, 2, 6, 4], [20, 3.1, 9, 4], [NAN] * 4, [1, 2, 3, 4]]
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(given[0, 0])  # as it was


@pytest.mark.parametrize(("within", "share"), [(0.33, 0.9018), (0.34, 0.8964)])
def test_the_share_of_levels_and_what_is_made_of_it(within, share):
    """Means of variance 1, and within each series a square wave of variance within^2."""
    level = np.repeat([1.0, -1.0], 10)[:, None, None]
    x = level + within * np.array([1.0, -1.0] * 8)
    x = np.concatenate([x, 100 + 7 * x, np.full_like(x, 3)], 1)  # a constant channel does not count
    assert share == pytest.approx(1 / (1 + within**2), abs=1e-4)
    assert level_share(x) == pytest.approx(1 / (1 + within**2))
    gaps = np.where(np.arange(16) < 12, x, NAN)
    assert level_share(gaps) == pytest.approx(level_share(x))
    dataset = from_arrays(x)
    decided = "on" if share >= 0.9 else "off"
    given = make_config(**SMALL)
    config = resolve_config(given, dataset, CPU)
    assert (given.level, config.level) == ("auto", decided)
    assert level_reason(given, dataset) == (
        f"{share:.1%} of the variance lies between the means of series (--level auto)"
    )
    said = [note.partition(":")[0] for note in guesses(given, config, dataset)]
    assert said == ["the level and scale of each series are drawn apart"] * (decided == "on")
    assert len(stats_of(config, dataset).levels) == (6 if decided == "on" else 0)
    for level in ("on", "off"):
        told = make_config(**SMALL, level=level)
        assert resolve_config(told, dataset, CPU).level == level and level_reason(told, dataset) == "as --level says"
    assert make_config("paper").level == "off"


def test_one_series_and_normalised_ones_have_no_level():
    assert level_share(X[:1]) == 0
    z = (X - X.mean(2, keepdims=True)) / X.std(2, keepdims=True)
    assert level_share(z) < 1e-6


def test_facts_with_levels_survive_json_and_name_the_same_data():
    plain, data = DataStats.of(from_arrays(X)), DataStats.of(from_arrays(X), level=True)
    values = json.loads(json.dumps(dataclasses.asdict(data)))
    assert DataStats.from_json(values) == data != plain
    assert data.identity == plain.identity
    for levels in (values["levels"][:3], 3, [{**values["levels"][0], "kind": "category", "categories": ["a"]}] * 4):
        with pytest.raises(ValueError, match="levels of the data"):
            DataStats.from_json({**values, "levels": levels})
    del values["levels"]  # as a version without them
    assert DataStats.from_json(values) == plain


def test_levels_of_large_and_tiny_numbers():
    for factor in (1e-30, 1e30):
        x = (X * factor).astype(np.float32)
        data = DataStats.of(from_arrays(x), level=True)
        u = data.normalise(x, CPU)
        np.testing.assert_allclose(u, DataStats.of(from_arrays(X), level=True).normalise(X, CPU), atol=1e-3)
        np.testing.assert_allclose(data.denormalise(u, data.levels_of(x)), x, rtol=1e-6)
    assert levels_of(np.full((2, 1, 9), 4.0), [2.0])[0].tolist() == pytest.approx([4, np.log(2 * LEAST_STD)])
