import numpy as np
import pytest
import torch

from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stretch import num_copies, stretch, stretched_copies
from ncfast.errors import UserError
from ncfast.training import fit

CPU = torch.device("cpu")


def test_equals_a_loop_over_series_in_float64():
    generator = np.random.default_rng(0)
    x, log_speed = generator.normal(size=(5, 2, 41)).cumsum(-1), 0.5 * generator.normal(size=(5, 4))
    expected = np.empty_like(x)
    for i in range(5):
        speed = np.interp(np.linspace(0, 3, 40), np.arange(4), np.exp(log_speed[i]))
        position = np.concatenate([[0], speed.cumsum()]) / speed.sum() * 40
        for c in range(2):
            moved = np.interp(position, np.arange(41), x[i, c])
            expected[i, c] = (moved - moved.mean()) / moved.std() * x[i, c].std() + x[i, c].mean()
    found = stretch(torch.from_numpy(x), torch.from_numpy(log_speed))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    for channel in range(2):
        assert np.corrcoef(found[0, channel], x[0, channel])[0, 1] > 0.5  # still that series


def test_one_speed_leaves_series_and_a_flat_series_stays_flat():
    x = torch.randn(3, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(stretch(x, torch.full((3, 4), 0.7)), x)
    assert torch.equal(stretch(torch.full((1, 1, 20), 3.0), torch.randn(1, 4)), torch.full((1, 1, 20), 3.0))


def test_copies():
    x = torch.randn(7, 2, 30).cumsum(-1)
    copies = stretched_copies(x, 4, 0.3, seed=1).unflatten(0, (4, 7))
    assert torch.equal(copies[0], x)
    distance = (copies[:, :, None] - x).square().mean((-1, -2))  # [copy, series, series]
    assert (distance.argmin(-1) == torch.arange(7)).all()  # each is a copy of the series at its place
    assert len({tuple(each.flatten().tolist()) for each in copies[:, 0]}) == 4
    assert torch.equal(copies.flatten(0, 1), stretched_copies(x, 4, 0.3, seed=1))
    assert [num_copies(n) for n in (1, 20, 25, 500, 10**6)] == [64, 50, 40, 4, 4]


def series(n, classes, length=32):
    x = np.random.default_rng(0).normal(size=(n, 1, length)).astype(np.float32)
    return from_arrays(x, np.arange(n) % classes if classes else None)


@pytest.mark.parametrize(
    ("n", "classes", "expected"), [(24, 2, 0.3), (26, 2, 0.0), (12, 0, 0.3), (13, 0, 0.0), (60, 5, 0.3)]
)
def test_few_series_a_class_are_stretched(n, classes, expected):
    assert fit.resolve_config(make_config(), series(n, classes), CPU).stretch == expected
    assert fit.resolve_config(make_config("paper"), series(n, classes), CPU).stretch == 0
    assert fit.resolve_config(make_config(stretch=0.1), series(n, classes), CPU).stretch == 0.1


def test_series_with_gaps_are_not():
    x = series(10, 2).X_train.copy()
    x[3, 0, 5:9] = np.nan
    dataset = from_arrays(x, np.arange(10) % 2)
    assert fit.resolve_config(make_config(), dataset, CPU).stretch == 0
    with pytest.raises(UserError, match="--stretch 0.2 makes copies of whole series, and .* has missing values"):
        fit.resolve_config(make_config(stretch=0.2), dataset, CPU)


def test_what_few_series_are_given_is_said():
    few, many = series(24, 2), series(26, 2)
    for dataset, options, expected in (
        (few, {}, 1),
        (few, {"stretch": 0.3}, 0),
        (few, {"stretch": 0.0}, 0),
        (many, {}, 0),
    ):
        given = make_config(**options)
        notes = fit.guesses(given, fit.resolve_config(given, dataset, CPU), dataset)
        assert [note.partition(";")[0] for note in notes] == [
            "few series: all stages train on 41 copies of each too, stretched in time"
        ] * expected


def test_epochs_are_of_all_copies():
    config = fit.resolve_config(make_config(stage1_steps=80), series(20, 2), CPU)
    assert config.stage1_epochs == 10  # 1000 copies in batches of 128


def test_every_stage_trains_on_the_copies(monkeypatch):
    """With the labels of their series; what a model remembers of its train set is of the series alone."""
    seen = {}

    def watched(make):
        def made(config, *arguments):
            stage = make(config, *arguments)
            seen[stage.number] = stage, arguments
            return stage

        return made

    for name in ("make_stage1", "make_stage2", "make_stage3"):
        monkeypatch.setattr(fit, name, watched(getattr(fit, name)))
    dataset = series(10, 2)
    options = dict(stage1_epochs=1, stage2_epochs=1, refiner_epochs=1, dim=8, residual_blocks=0, prior_dim=16)
    conditions = {"age": np.arange(10.0)}
    model = fit.fit(
        dataset.X_train,
        np.arange(10) % 2,
        conditions=conditions,
        quiet=True,
        projector_dim=16,
        prior_layers=1,
        **options,
    )
    assert [stage.num_series for stage, _ in seen.values()] == [640, 640, 640]
    _, x, labels, *_ = seen[2][1][1:]
    assert torch.equal(labels, (torch.arange(10) % 2).repeat(64)) and len(x) == 640
    assert model.data.num_series == 10 and len(model.prior.condition_embedding.rows) == 10
    assert model.prior.condition_embedding.rows[:, 0].tolist() == list(range(10))
