"""Discriminative and predictive score against the cell's formula in NumPy and sets whose distance is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from ncfast.evaluation.gru_scores import BatchedGRU, discriminative_scores, predictive_scores
from ncfast.evaluation.published import Interval, to_unit_range


def waves(n, seed, channels=3, length=12, level=0.5):
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, (n, channels, 1))
    return (level + 0.4 * np.sin(0.5 * np.arange(length) + phase)).astype(np.float32)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("inputs", [1, 4])
def test_the_cell_is_tensorflows(inputs):
    model = BatchedGRU(2, inputs, seed=3).double()
    with torch.no_grad():  # biases that would show
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    x = np.random.default_rng(0).normal(size=(2, 5, 6, inputs))
    every = model(torch.from_numpy(x), every_step=True).detach().numpy()
    last = model(torch.from_numpy(x)).detach().numpy()
    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    for network in range(2):
        gates, gates_bias, candidate, candidate_bias, head, head_bias = (w[network] for w in weights)
        units = candidate.shape[1]
        assert units == max(1, inputs // 2)
        for series in range(5):
            h = np.zeros(units)
            for t in range(6):
                now = x[network, series, t]
                both = sigmoid(np.concatenate([now, h]) @ gates + gates_bias[0])
                r, u = both[:units], both[units:]
                c = np.tanh(np.concatenate([now, r * h]) @ candidate + candidate_bias[0])
                h = u * h + (1 - u) * c
                assert every[network, series, t] == pytest.approx((h @ head + head_bias[0]).item(), rel=1e-9)
            assert last[network, series, 0] == pytest.approx(every[network, series, -1], rel=1e-12)


def test_repeats_are_networks_of_their_own():
    model = BatchedGRU(3, 4, seed=0)
    x = torch.rand(3, 7, 5, 4, generator=torch.Generator().manual_seed(0))
    model(x)[1].sum().backward()
    assert model.gates.grad[1].abs().sum() > 0
    assert not model.gates.grad[0].any() and not model.gates.grad[2].any()
    assert not torch.equal(model.gates[0], model.gates[1])


def test_halves_of_a_set_look_alike_and_other_sets_do_not():
    a, b = (waves(400, seed, channels=8, length=6) for seed in (0, 1))
    alike = discriminative_scores(a, b, repeats=3, steps=100)
    assert len(alike) == 3 and np.mean(alike) < 0.12
    apart = discriminative_scores(a, waves(300, 2, channels=8, length=6, level=2.5), repeats=3, steps=300)
    assert np.mean(apart) > 0.45 and max(apart) <= 0.5
    assert discriminative_scores(a, b, repeats=2, steps=5, seed=4) == discriminative_scores(
        a, b, repeats=2, steps=5, seed=4
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_learnt_from_other_values_are_worse(channels):
    real, alike, other = (waves(200, seed, channels, level=level) / 3 for seed, level in ((0, 0.5), (1, 0.5), (1, 2.5)))
    right = predictive_scores(real, alike, repeats=2, steps=300)
    assert np.mean(right) < 0.7 * np.mean(predictive_scores(real, other, repeats=2, steps=300))
    assert right == predictive_scores(real, alike, repeats=2, steps=300)


def test_a_prediction_without_training_has_the_error_of_its_outputs():
    """0 steps: the mean over series and times of |sigmoid(output) - next value of the last channel|."""
    real = waves(30, 0)
    model = BatchedGRU(1, 2, seed=0, units=1)
    x = torch.from_numpy(real.transpose(0, 2, 1).copy())
    outputs = torch.stack([model(x[None, :, : t + 1, :2])[0, :, 0] for t in range(11)], 1).detach()
    expected = (outputs.sigmoid() - x[:, 1:, 2]).abs().mean().item()
    assert predictive_scores(real, real, repeats=1, steps=0) == [pytest.approx(expected, rel=1e-6)]


def test_few_series_and_one_channel_have_scores():
    few = waves(5, 0, channels=1)
    for scores in (discriminative_scores(few, few[:2], repeats=2, steps=2), predictive_scores(few, few, steps=2)):
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("n", [2, 3, 5, 10, 40])
def test_interval_is_that_of_student(n):
    values = np.random.default_rng(n).normal(size=n).tolist()
    mean, half = Interval.of(values)
    low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-5)
    assert Interval.of([3.0]) == (3.0, None)


def test_unit_range_is_of_each_channel_of_the_train_set():
    train = np.stack([waves(9, 0)[:, 0] * 100 - 7, np.full((9, 12), 3.0)], 1)
    scaled = to_unit_range(train, train)
    assert scaled.min() == 0 and scaled.max() == 1 and (scaled[:, 1] == 0).all()
    np.testing.assert_allclose(to_unit_range(train + 1, train)[:, 1], 1)
