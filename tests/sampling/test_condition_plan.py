"""Conditions on their way out: which each series gets, and that the series follow them."""

import json

import numpy as np
import pytest
import torch
from runs import SMALL, save_run, waves

import ncfast
from ncfast.config import make_config
from ncfast.data.conditions import ConditionColumn
from ncfast.errors import UserError
from ncfast.models.prior import Prior
from ncfast.models.trained import read_config
from ncfast.sampling.condition_plan import ConditionPlan
from ncfast.sampling.maskgit import Sampler, SamplerOptimizations
from ncfast.training.run_folder import run_sha256
from ncfast.training.stage2 import stage2_losses

TINY = {**SMALL, "stage1_steps": 1, "stage2_steps": 1, "decoding_steps": 4, "device": "cpu", "quiet": True}
COLUMNS = (ConditionColumn("age", "number", 50.0, 10.0), ConditionColumn("sex", "category", categories=("f", "m")))
X, Y = waves(60, 32)
RNG = np.random.default_rng(0)
SEX = np.where(RNG.random(60) < np.where(Y == "slow", 0.8, 0.2), "f", "m")
AGE = np.where(SEX == "f", 30, 60) + RNG.integers(0, 5, 60)


@pytest.fixture(scope="module", params=["labelled", "unlabelled"])
def model(request):
    labels = Y if request.param == "labelled" else None
    with pytest.warns(UserWarning, match="condition age: a number"):
        return ncfast.fit(X, labels, conditions={"age": AGE, "sex": SEX}, **TINY)


def make_prior(columns=COLUMNS, classes=3):
    torch.manual_seed(0)
    return Prior(make_config(**SMALL), torch.randn(8, 8), 10, classes, columns, 5).eval().requires_grad_(False)


def some_conditions(rows):
    return torch.stack([torch.linspace(30, 70, rows), torch.arange(rows) % 2], 1).double()


def test_without_conditions_nothing_is_another():
    plain, conditional = make_prior(()), make_prior()
    assert plain.condition_embedding is None
    weights = conditional.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights.pop(name), value), name
    assert weights and all(name.startswith("condition_embedding.") for name in weights)


def test_each_condition_counts_and_none_is_learned_as_such():
    prior, labels = make_prior(), torch.zeros(4, dtype=torch.int64)
    rows = torch.tensor([[50, 0], [60, 0], [50, 1], [torch.nan, torch.nan]], dtype=torch.float64)
    embedded = prior.embed_classes(labels, rows)
    assert (torch.pdist(embedded) > 0.01).all()
    assert torch.equal(embedded[3], prior.embed_classes(labels)[3])
    prior.requires_grad_(True)
    prior.embed_classes(labels, rows).square().sum().backward()
    gradients = [p.grad for p in prior.condition_embedding.parameters()]
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("labels", [torch.arange(400) % 3, None], ids=["labelled", "unlabelled"])
def test_class_and_conditions_are_left_out_together_and_apart(labels, monkeypatch):
    prior, seen = make_prior(), {}
    monkeypatch.setattr(
        prior,
        "forward",
        lambda tokens, labels, conditions, drop: (
            seen.update(labels=labels, conditions=conditions) or torch.zeros(400, 10, 8)
        ),
    )
    tokens = torch.zeros(400, 10, dtype=torch.int64)
    config = make_config(**SMALL, class_dropout=0.3)
    stage2_losses(prior, tokens, labels, config, torch.Generator().manual_seed(0), conditions=some_conditions(400))
    unknown = seen["conditions"].isnan()
    kept = unknown == 0
    assert torch.equal(seen["conditions"][kept], some_conditions(400)[kept])
    parts = unknown if labels is None else torch.cat([(seen["labels"] == 3)[:, None], unknown], 1)
    k = parts.shape[1]
    expected = 0.3 + 0.7 * 0.3 * 0.5**k
    assert abs(parts.all(1).double().mean() - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5
    assert len({tuple(row) for row in parts.tolist()}) == 2**k


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.5}], ids=str)
@pytest.mark.parametrize("classes", [0, 3])
def test_tokens_are_the_same_whatever_is_left_out(options, classes):
    prior = make_prior(classes=classes).double()
    labels, sample, conditions = torch.arange(20) % (classes + 1), torch.arange(20), some_conditions(20)
    config = make_config(**SMALL, **options)

    def decode(savers, given=conditions):
        return Sampler(prior, config, savers).decode(labels, sample, 3, conditions=given)

    plain = decode(SamplerOptimizations.none())
    assert torch.equal(decode(SamplerOptimizations()), plain)
    assert not torch.equal(decode(SamplerOptimizations(), conditions.flip(0)), plain)
    if options:
        tokens = torch.full((20, 10), 8)
        both = prior(tokens, labels, conditions), prior(tokens, torch.full_like(labels, classes))
        one = Sampler(prior, make_config(**{**SMALL, **options, "decoding_steps": 1}))
        seen = torch.stack([one.decode(labels, sample + 20 * i, 0, conditions=conditions) for i in range(300)])
        p = (both[1] + 2.5 * (both[0] - both[1])).softmax(-1)  # [20, 10, 8]
        share = torch.nn.functional.one_hot(seen, 8).double().mean(0)
        assert ((share - p) / (p * (1 - p) / 300).sqrt().clamp(min=1e-3)).abs().max() < 6


def test_conditions_are_drawn_jointly_and_with_the_class(model):
    values = model.sample_conditions(2000, seed=1)
    y = np.concatenate([b.y for b in model.sample_batches(2000, seed=1, decode=False)]) if model.class_names else None
    y = None if y is None else np.array(model.class_names)[y]
    pairs = {*zip(values["age"].tolist(), values["sex"].tolist(), strict=True)}
    assert pairs <= {*zip(AGE.tolist(), SEX.tolist(), strict=True)} and len(pairs) > 5
    for name in model.class_names or [None]:
        real, drawn = (SEX, values["sex"]) if name is None else (SEX[name == Y], values["sex"][y == name])
        p, n = (real == "f").mean(), len(drawn)
        assert abs((drawn == "f").mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    every = model.sample_conditions(2000, "none", seed=1)
    assert abs((every["sex"] == "f").mean() - (SEX == "f").mean()) < 0.05


def test_a_series_depends_on_its_conditions_and_index_alone(model):
    ages = [20.0, 40.0, 61.0]
    given = {"age": ages, "sex": "f"}
    x, _ = model.sample(150, seed=3, condition=given)
    values = model.sample_conditions(150, seed=3, condition=given)
    assert values["age"].tolist() == [ages[i % 3] for i in range(150)] and {*values["sex"]} == {"f"}
    parts = list(model.sample_batches(70, seed=3, start=50, batch_size=11, condition=given))
    assert np.array_equal(np.concatenate([part.x for part in parts]), x[50:120])
    assert np.concatenate([part.conditions for part in parts])[:, 0].tolist() == values["age"][50:120].tolist()
    # What is drawn, given to another call, makes the same series.
    drawn, _ = model.sample(70, seed=3)
    values = model.sample_conditions(70, seed=3)
    rows = np.concatenate([batch.conditions for batch in model.sample_batches(70, seed=3, decode=False)])
    assert rows[:, 0].tolist() == values["age"].tolist()
    assert model.sample_conditions(20, seed=3, start=50)["sex"].tolist() == values["sex"][50:].tolist()
    assert np.array_equal(model.sample(70, seed=3, condition=values)[0], drawn)
    assert not np.array_equal(model.sample(70, seed=3, condition={"age": 90})[0], drawn)


def test_a_model_reads_what_it_wrote(model, tmp_path):
    model.save(tmp_path)
    again = ncfast.load(tmp_path, device="cpu")
    assert again.data.conditions == model.data.conditions
    for name, value in again.sample_conditions(20).items():
        assert value.tolist() == model.sample_conditions(20)[name].tolist()
    assert np.array_equal(again.sample(20)[0], model.sample(20)[0])


def test_completion(model):
    gaps = X[:3].copy()
    gaps[..., 10:25] = np.nan
    assert next(model.sample_batches(6, context=gaps)).conditions is None
    batch = next(model.sample_batches(6, context=gaps, condition={"sex": ["f", "m"]}))
    assert batch.conditions[:, 1].tolist() == [0, 1] * 3 and np.isnan(batch.conditions[:, 0]).all()
    x, _ = model.sample(6, context=gaps, condition={"sex": ["f", "m"]})
    assert np.array_equal(x[..., :10], gaps[[0, 1, 2, 0, 1, 2], :, :10])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"aeg": 3}, "no condition 'aeg'; this model knows age, sex; did you mean age"),
        ({"sex": "x"}, "condition sex is one of f, m; got 'x'"),
        ({"age": []}, "condition age has no value"),
        ({"age": None}, "condition age is missing"),
        (3, "condition is a dict of values by name, or a table; got int"),
    ],
)
def test_refused(model, condition, message):
    with pytest.raises(UserError, match=message):
        model.sample(3, condition=condition)


def test_a_run_without_conditions(tmp_path):
    run = save_run(tmp_path / "run")
    model = ncfast.load(run, device="cpu")
    with pytest.raises(UserError, match="was trained without conditions"):
        model.sample(3, condition={"age": 3})
    assert next(model.sample_batches(3)).conditions is None and model.sample_conditions(3) == {}
    # As a version without conditions wrote it, and as it called the run in its states.
    config, data = read_config(run)
    known = run_sha256(config, data)
    content = json.loads((run / "config.json").read_text())
    del content["data"]["conditions"]
    (run / "config.json").write_text(json.dumps(content))
    assert read_config(run)[1] == data and run_sha256(*read_config(run)) == known
    assert np.array_equal(ncfast.load(run, device="cpu").sample(5)[0], model.sample(5)[0])


def test_a_class_that_the_plan_counts_from_none():
    embedding = make_prior(classes=3).condition_embedding
    rows = torch.tensor([[1, 0], [2, 0], [3, 0], [4, 0], [5, 0]], dtype=torch.float64)
    embedding.remember(rows, torch.tensor([2, 0, 2, 1, 0]))
    plan = ConditionPlan(embedding, None, 3)
    sample = torch.arange(300)
    for label, ages in ((0, {2, 5}), (1, {4}), (2, {1, 3}), (3, {1, 2, 3, 4, 5})):
        assert {*plan(sample, torch.full((300,), label), 0)[:, 0].tolist()} == ages
    assert torch.equal(plan(sample[7:9], sample[7:9] % 3, 5), plan(sample, sample % 3, 5)[7:9])


@pytest.mark.slow
def test_series_follow_their_conditions():
    """The level follows a number and the shape a category, as closely as in the data."""
    rng = np.random.default_rng(0)
    n, length = 256, 24
    level, sex = rng.normal(10, 2, n), rng.choice(["f", "m"], n)
    t = np.arange(length) / length
    shape = np.where((sex == "f")[:, None], np.sin(2 * np.pi * t), np.cos(4 * np.pi * t))
    real = (level[:, None] + 1.5 * shape + 0.2 * rng.normal(size=(n, length)))[:, None]
    options = {**SMALL, "dim": 16, "codebook_size": 32, "batch_size": 64, "stage2_batch_size": 64}
    with pytest.warns(UserWarning, match="condition"):
        model = ncfast.fit(
            real,
            conditions={"level": level, "sex": sex},
            ssl="none",
            stage1_steps=150,
            stage2_steps=600,
            learning_rate=3e-3,
            choice_temperature=1.0,
            device="cpu",
            quiet=True,
            **options,
        )

    def followed(x, level, sex):
        x = x[:, 0]
        is_sine = (x * np.sin(2 * np.pi * t)).mean(1) > 1.5 / 4
        return np.corrcoef(x.mean(1), level)[0, 1], ((sex == "f") == is_sine).mean()

    expected = followed(real, level, sex)
    x, values = model.sample(512, seed=1)[0], model.sample_conditions(512, seed=1)
    np.testing.assert_allclose(followed(x, values["level"], values["sex"]), expected, atol=0.05)
    asked = np.linspace(6, 14, 256)
    x, _ = model.sample(256, condition={"level": asked, "sex": "f"})
    np.testing.assert_allclose(followed(x, asked, np.repeat("f", 256)), expected, atol=0.05)
    slope = np.polyfit(asked, x[:, 0].mean(1), 1)[0]
    assert abs(slope - 1) < 0.1
