"""Levels that are drawn: between a training series and one of its five nearest of its class."""

import numpy as np
import pytest
import torch

from ncfast.config import make_config
from ncfast.data.conditions import ConditionColumn
from ncfast.models.prior import Prior
from ncfast.sampling import level_plan
from ncfast.sampling.condition_plan import ConditionPlan
from ncfast.sampling.level_plan import LevelPlan

RNG = np.random.default_rng(0)
LEVELS = RNG.normal(size=(40, 4)) * [100, 3, 0.1, 1]
CLASSES = np.arange(40) % 3
CLASSES[7] = 3  # alone
SAMPLE = torch.arange(2000)


def make_plan(**options):
    """Of a prior that has a condition, `number`, which is the place of the training series, and levels."""
    columns = [ConditionColumn(name, "number") for name in ("number", "a", "b", "c", "d")]
    torch.manual_seed(0)
    small = {"dim": 8, "prior_dim": 8, "prior_layers": 1, "prior_head_dim": 8}
    prior = Prior(make_config(**small), torch.randn(8, 8), 10, 4, columns, 40)
    rows = np.column_stack([np.arange(40.0), LEVELS])
    prior.condition_embedding.remember(torch.from_numpy(rows), torch.from_numpy(CLASSES))
    return ConditionPlan(prior.condition_embedding, options.pop("given", None), 4, num_levels=4, **options)


def nearest(i):
    """The other rows of the class, nearest first."""
    points = LEVELS / LEVELS.std(0)
    others = [j for j in range(40) if j != i and CLASSES[j] == CLASSES[i]]
    return sorted(others, key=lambda j: ((points[i] - points[j]) ** 2).sum())


def test_levels_lie_between_a_training_series_and_a_near_one_of_its_class():
    labels = SAMPLE % 5  # 4 is no class
    drawn = make_plan()(SAMPLE, labels, 3).numpy()
    seen, weights = {}, []
    for label, (row, *levels) in zip(labels.tolist(), drawn, strict=True):
        i = int(row)
        assert label in (CLASSES[i], 4)
        if i == 7:  # no other of its class
            np.testing.assert_array_equal(levels, LEVELS[7])
            continue
        found = []
        for j in nearest(i)[:5]:
            along = (levels - LEVELS[i]) / (LEVELS[j] - LEVELS[i])
            if np.ptp(along) < 1e-6 and 0 <= along[0] <= 1:
                found.append((j, along[0]))
        assert len(found) == 1, (i, levels)
        seen.setdefault(i, set()).add(found[0][0])
        weights.append(found[0][1])
    assert all(len(near) == 5 for near in seen.values()) and len(seen) == 39
    quantiles = np.quantile(weights, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(quantiles, [0.1, 0.5, 0.9], atol=0.05)  # uniform


def test_a_sample_has_its_levels_wherever_it_is_drawn(monkeypatch):
    plan, labels = make_plan(), SAMPLE % 5
    whole = plan(SAMPLE, labels, 3)
    assert torch.equal(plan(SAMPLE[70:75], labels[70:75], 3), whole[70:75])
    assert not torch.equal(plan(SAMPLE, labels, 4), whole)
    monkeypatch.setattr(level_plan, "BLOCK", 100)  # two series at once
    assert torch.equal(plan(SAMPLE, labels, 3), whole)
    # A condition that is given changes neither the others nor the levels.
    given = make_plan(given={"number": 3.5})(SAMPLE, labels, 3)
    assert torch.equal(given[:, 1:], whole[:, 1:]) and (given[:, 0] == 3.5).all()


def test_levels_of_what_is_completed():
    own = np.array([[1.0, 2, 3, 4], [np.nan] * 4, [LEVELS[5, 0], np.nan, LEVELS[5, 2], LEVELS[5, 3]]])
    plan = make_plan(draw=False, levels=own)
    assert plan.known == [1, 2, 3, 4] and [column.name for column in plan.columns] == ["number"]
    rows = plan(SAMPLE[:30], torch.full((30,), 4), 3).numpy()
    assert np.isnan(rows[:, 0]).all()
    np.testing.assert_array_equal(rows[::3, 1:], np.tile(own[0], (10, 1)))
    np.testing.assert_array_equal(rows[2::3, 1:], np.tile(LEVELS[5], (10, 1)))
    # Where nothing was observed they are drawn, as of new series.
    drawn = make_plan()(SAMPLE[:30], torch.full((30,), 4), 3).numpy()
    np.testing.assert_array_equal(rows[1::3, 1:], drawn[1::3, 1:])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_few_training_series(n):
    levels = torch.from_numpy(LEVELS[:n])
    drawn = LevelPlan(levels, torch.zeros(n, dtype=torch.int64))(SAMPLE % n, SAMPLE, 0)
    assert drawn.isfinite().all()
    assert (drawn >= levels.min(0).values - 1e-9).all() and (drawn <= levels.max(0).values + 1e-9).all()
    assert len(drawn.unique(dim=0)) == (1 if n == 1 else len(drawn))
