"""The encoder's loss against loops, its distance on sets that differ in a known way, its cache."""

import numpy as np
import pytest
import torch

from ncfast.evaluation import ts2vec
from ncfast.evaluation.ts2vec import TS2Vec, cached_ts2vec, context_fid, contrast, hierarchical_loss, train_ts2vec


def waves(n, seed, level=0.5):
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, (n, 2, 1))
    return (level + 0.4 * np.sin(0.5 * np.arange(16) + phase)).astype(np.float32)


def views(B, L, D=5):
    return np.random.default_rng(0).normal(size=(2, B, L, D))


def loss_by_loops(groups):
    """groups: pairs of matrices [M, D], row i of the one the other view of row i of the other."""
    losses = []
    for one, other in groups:
        both = [*one, *other]
        M = len(one)
        for i, code in enumerate(both):
            others = [j for j in range(2 * M) if j != i]
            exponentials = {j: np.exp(code @ both[j]) for j in others}
            losses.append(-np.log(exponentials[(i + M) % (2 * M)] / sum(exponentials.values())))
    return np.mean(losses)


def test_contrast_is_that_of_loops():
    one, other = views(3, 4)
    taken = contrast(torch.from_numpy(one), torch.from_numpy(other))
    assert taken.item() == pytest.approx(loss_by_loops(zip(one, other, strict=True)), rel=1e-9)
    assert contrast(torch.ones(3, 1, 5), torch.ones(3, 1, 5)) == 0


@pytest.mark.parametrize(("B", "L"), [(3, 7), (1, 4), (4, 1)])
def test_loss_is_that_of_every_level(B, L):
    one, other = views(B, L)
    expected, levels = 0.0, 0
    a, b = one, other
    while True:
        by_time = [(a[:, t], b[:, t]) for t in range(a.shape[1])]
        expected += 0.5 * loss_by_loops(by_time) if B > 1 else 0
        expected += 0.5 * loss_by_loops(zip(a, b, strict=True)) if a.shape[1] > 1 else 0
        levels += 1
        if a.shape[1] == 1:
            break
        half = a.shape[1] // 2
        a, b = (z[:, : 2 * half].reshape(B, half, 2, -1).max(2) for z in (a, b))
    taken = hierarchical_loss(torch.from_numpy(one), torch.from_numpy(other))
    assert taken.item() == pytest.approx(expected / levels, rel=1e-9)


@pytest.fixture(scope="module")
def encoder():
    return train_ts2vec(waves(60, 0), 8, 0)


def test_a_code_is_the_largest_over_time_and_depends_on_no_neighbour(encoder):
    x = waves(300, 1)
    codes = encoder.describe(x)
    assert codes.shape == (300, 320)
    with torch.no_grad():
        own = encoder(torch.from_numpy(x[290:291].transpose(0, 2, 1).copy()))
    np.testing.assert_allclose(codes[290], own.numpy().max(1)[0], rtol=1e-4, atol=1e-6)


def test_distance_grows_with_what_was_done_to_the_series(encoder):
    real = waves(100, 1)
    same, alike, shifted, far = (
        context_fid(encoder, real, x)
        for x in (real[::-1], waves(100, 2), waves(100, 2, level=0.7), waves(100, 2, level=1.5))
    )
    assert same == pytest.approx(0, abs=1e-6)
    assert same < alike < 0.7 * shifted and shifted < 0.7 * far


def test_training_depends_on_its_seed_alone():
    x = waves(20, 0)
    state = torch.get_rng_state()
    first, again, other = train_ts2vec(x, 1, 5), train_ts2vec(x, 1, 5), train_ts2vec(x, 1, 6)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.project.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    few = train_ts2vec(x[:3, :, :2], 2, 0)  # fewer series than a batch, the shortest length
    assert np.isfinite(few.describe(x[:3, :, :2])).all()


def test_weights_are_the_mean_over_all_steps(monkeypatch):
    x, seen = waves(20, 0), []
    step = torch.optim.AdamW.step

    def watched(self, *arguments):
        if not seen:
            seen.append(self.param_groups[0]["params"][0].detach().clone())
        result = step(self, *arguments)
        seen.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    model = train_ts2vec(x, 4, 0)
    assert len(seen) == 5
    torch.testing.assert_close(model.project.weight.detach(), torch.stack(seen).mean(0))


def test_cache_trains_once_for_each_of_data_steps_and_seed(tmp_path, monkeypatch):
    trained = []

    def made(x, steps, seed, device, *, title):
        trained.append((steps, seed))
        torch.manual_seed(seed)
        return TS2Vec(x.shape[1])

    monkeypatch.setattr(ts2vec, "train_ts2vec", made)
    x = waves(20, 0)

    def cached(x=x, seed=0, steps=None):
        return cached_ts2vec(x, seed, "cpu", tmp_path, name="waves", steps=steps, quiet=True)

    first, again = cached(), cached()
    assert trained == [(200, 0)]
    np.testing.assert_array_equal(first.describe(x), again.describe(x))
    cached(seed=1), cached(steps=7), cached(x=x + 1)
    assert trained == [(200, 0), (200, 1), (7, 0), (200, 0)]
    assert ts2vec.steps_for(np.zeros((1000, 5, 24))) == 600
