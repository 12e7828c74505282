"""Runs whose series have a level and scale of their own, from training to files, and all that is done with them."""

import json
import shutil

import numpy as np
import pytest
import torch
from runs import FLAGS, SMALL, generated_file, waves

import ncfast
from ncfast import train
from ncfast.evaluation.decoding import trace_decoding
from ncfast.evaluation.material import Material
from ncfast.evaluation.protocol import measure
from ncfast.models.trained import read_config
from ncfast.sampling.series import SeriesSampler

RNG = np.random.default_rng(0)
SHAPES, Y = waves(40, 32, channels=2)
# Those of "fast" lie far below those of "slow"; the second channel has another unit.
LEVEL = (np.where(Y == "slow", 300, -300) + 100 * RNG.normal(size=40))[:, None, None]
X = (LEVEL * [[1.0], [0.01]] + (SHAPES - 5) * [[0.5], [0.005]]).astype(np.float32)
QUICK = {"quiet": True, "stage1_steps": 2, "stage2_steps": 2, "decoding_steps": 3, "device": "cpu", **SMALL}
REFINED = {**QUICK, "refiner": "flow", "refiner_dim": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "level"
    ncfast.fit(X, Y, out=folder, **REFINED)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return ncfast.load(run, device="cpu")


def weights(model):
    modules = [model.vqvae, model.prior]
    return {f"{i}.{name}": value for i, module in enumerate(modules) for name, value in module.state_dict().items()}


def test_levels_are_taken_apart_where_they_are_most_of_the_variance(model):
    assert model.config.level == "on" and len(model.data.levels) == 4
    assert model.data.conditions == () and model.sample_conditions(3) == {}
    flat = waves(40, 32)
    decided = ncfast.fit(*flat, **QUICK)
    assert decided.config.level == "off" and decided.data.levels == () and decided.prior.condition_embedding is None
    told = ncfast.fit(*flat, level="off", **QUICK)
    assert all(torch.equal(value, weights(told)[name]) for name, value in weights(decided).items())
    np.testing.assert_array_equal(decided.sample(9)[0], told.sample(9)[0])
    assert next(told.sample_batches(3)).levels is None


def test_series_have_the_level_of_their_class(model):
    x, y = model.sample(300, seed=1)
    own = x.mean(2)[:, 0]
    for name in ("slow", "fast"):
        real = X[name == Y].mean(2)[:, 0]
        assert abs(own[y == name].mean() - real.mean()) < 40 and real.min() - 5 < own[y == name].min()
        assert own[y == name].max() < real.max() + 5
    assert len(np.unique(own.round(2))) > 250  # not the 40 of the train set
    # Both channels at once: one is a hundredth of the other.
    np.testing.assert_allclose(x.mean(2)[:, 1], own / 100, atol=0.05)


def test_a_series_depends_on_its_index_alone(model):
    x, _ = model.sample(150, seed=3)
    batches = list(model.sample_batches(70, seed=3, start=50, batch_size=11))
    np.testing.assert_array_equal(np.concatenate([b.x for b in batches]), x[50:120])
    levels = np.concatenate([b.levels for b in batches])
    assert levels.shape == (70, 4) and levels.dtype == np.float64
    again = SeriesSampler(model, seed=3).again(np.array([51, 70, 119]))
    np.testing.assert_array_equal(again.x, x[[51, 70, 119]])
    np.testing.assert_array_equal(again.levels, levels[[1, 20, 69]])


def test_tokens_and_levels_decode_to_what_was_drawn(model):
    batch = next(model.sample_batches(40, seed=3, batch_size=40))
    np.testing.assert_array_equal(model.decode(batch.tokens[::-1], levels=batch.levels[::-1])[::-1], batch.x)
    assert (np.abs(batch.x.mean(2) - batch.levels[:, :2]) < np.exp(batch.levels[:, 2:])).all()
    with pytest.raises(ncfast.UserError, match=r"this model takes levels \[40, 4\], `levels` of a batch .* got none"):
        model.decode(batch.tokens)
    with pytest.raises(ncfast.UserError, match=r"this model takes levels \[40, 4\].* got the shape \[3, 4\]"):
        model.decode(batch.tokens, levels=batch.levels[:3])
    plain = ncfast.fit(*waves(40, 32), **QUICK)
    with pytest.raises(ncfast.UserError, match="this model takes no levels; got the shape"):
        plain.decode(np.zeros((1, plain.prior.num_tokens), int), levels=np.zeros((1, 2)))


def test_files_hold_levels(run, model, tmp_path):
    whole = generated_file(run, tmp_path / "whole.h5")
    assert whole.levels.shape == (150, 4) and whole.attributes["mean"] == pytest.approx(model.data.mean)
    sharded = generated_file(run, tmp_path / "sharded.h5", "--num-shards", 3)
    for name in ("x", "levels"):
        np.testing.assert_array_equal(getattr(sharded, name)[:], getattr(whole, name)[:])
    np.testing.assert_array_equal(whole.x[:], model.sample(150, seed=2)[0])
    sharded.verify(redraw=5)
    tokens = generated_file(run, tmp_path / "tokens.h5", "--tokens-only")
    np.testing.assert_array_equal(model.decode(tokens.tokens[:], levels=tokens.levels[:]), whole.x[:])
    half = generated_file(run, tmp_path / "half.h5", "--dtype", "float16")
    np.testing.assert_allclose(half.x[:], whole.x[:], rtol=1e-3)
    generated_file(run, tmp_path / "text.npz")
    assert np.load(tmp_path / "text.npz")["X"].shape == (150, 2, 32)


def test_resumed_and_read_again(run, model, tmp_path):
    np.savez(tmp_path / "prices.npz", X_train=X, y_train=Y, X_test=X[:6], y_test=Y[:6])
    options = ["--dataset", tmp_path / "prices.npz", *FLAGS, "--stage1-epochs=1", "--device=cpu"]
    options = [str(option) for option in options]
    for name, stage2 in (("longer", "1"), ("straight", "2")):
        train.main([*options, "--out", str(tmp_path / name), f"--stage2-epochs={stage2}"])
    train.main([*options, "--out", str(tmp_path / "longer"), "--stage2-epochs=2", "--resume"])
    config, data = read_config(tmp_path / "longer")
    assert config.level == "on" and data == read_config(tmp_path / "straight")[1]
    with pytest.raises(ncfast.UserError, match="level was 'on' and is 'off'"):
        train.main([*options, "--out", str(tmp_path / "longer"), "--stage2-epochs=2", "--resume", "--level=off"])
    model.save(tmp_path / "saved")
    np.testing.assert_array_equal(ncfast.load(tmp_path / "saved", device="cpu").sample(9)[0], model.sample(9)[0])
    mse = json.loads((tmp_path / "longer" / "metrics.json").read_text())["stage1"]["test_reconstruction_mse"]
    again = ncfast.load(tmp_path / "longer", device="cpu")
    missed = (again.reconstruct(X[:6]) - X[:6]) / np.array(again.data.std)[:, None]
    assert mse == pytest.approx(np.square(missed).mean(), rel=1e-3)


def test_what_is_decided_is_printed(tmp_path, capsys):
    np.save(tmp_path / "prices.npy", X)
    for level, line in (
        ("auto", "level      of each series apart: 100.0% of the variance"),
        ("off", "level      not apart: as --level says"),
    ):
        train.main(["--dataset", str(tmp_path / "prices.npy"), "--level", level, "--dry-run", *FLAGS])
        assert line in capsys.readouterr().out


def test_completion_keeps_what_was_observed_and_goes_on_near_its_level(model):
    gaps = X[:3].copy()
    gaps[:, :, 16:] = np.nan
    gaps[1, 1] = np.nan  # a channel of which nothing is known
    gaps[2] = np.nan
    x, _ = model.sample(9, context=gaps, seed=1)
    for k in range(9):
        observed = ~np.isnan(gaps[k % 3])
        np.testing.assert_array_equal(x[k][observed], gaps[k % 3][observed])
    assert np.isfinite(x).all()
    own = gaps[:2, 0, :16]
    apart = np.abs(x[:2, 0, 16:] - own.mean(1, keepdims=True)).max(1)
    assert (apart < 4 * own.std(1)).all()  # while levels lie 100 and more apart
    # Channel 1 has the level of the training series nearest by channel 0.
    nearest = np.abs(x[[1, 4, 7], 1].mean(1)[:, None] - X[:, 1].mean(1)).argmin(1)
    assert np.abs(X[nearest, 0].mean(1) - own[1].mean()).max() < 100
    assert len(np.unique(x[[2, 5, 8], 0].mean(1).round(1))) == 3  # drawn
    single = X[:1].copy()
    single[..., 1:] = np.nan
    x, _ = model.sample(1, context=single)
    assert x[0, 0].std() > 0.1 * X[0, 0].std()
    # Whatever stands where the mask says that nothing was observed.
    mask = np.arange(32) < 16
    junk = np.where(mask, X[:2], 1e9)
    np.testing.assert_array_equal(model.sample(context=junk, mask=mask)[0], model.sample(context=X[:2], mask=mask)[0])
    assert next(model.sample_batches(3, context=gaps)).conditions is None


def test_reconstruction_and_evaluation_are_in_the_units_of_the_train_set(model):
    test = ncfast.data.from_arrays(X, Y, X_test=X[:20] + 1, y_test=Y[:20])
    x_hat = model.reconstruct(X[:20] + 1)
    np.testing.assert_allclose(x_hat.mean(2), (X[:20] + 1).mean(2), atol=1)
    material = Material(model, test, quiet=True)
    coded = material.test_coded
    np.testing.assert_allclose(coded.reconstructed, material.stats.normalise(x_hat, "cpu"), atol=1e-5)
    missed = np.square((coded.reconstructed - material.test).numpy()).mean((1, 2))
    np.testing.assert_allclose(coded.time_error, missed, rtol=1e-3, atol=1e-9)
    stft = model.vqvae.stft
    error = (stft(coded.reconstructed) - stft(material.test)).square().mean((1, 2, 3))
    # The decoder's spectrogram need not be that of a series: no less, and of that order.
    assert (coded.spectrum_error > 0.9 * error.numpy()).all() and (coded.spectrum_error < 10 * error.numpy()).all()
    figures = measure(material, ["reconstruction"], [0])["measures"]
    assert figures[0]["value"] == pytest.approx(missed.mean(), rel=1e-3)
    trace = trace_decoding(model, "none", 0)
    batch = next(model.sample_batches(1, "none"))
    np.testing.assert_allclose(model.data.denormalise(trace.series[-1:], batch.levels), batch.x, rtol=1e-4, atol=1e-3)


def test_an_old_run_has_none(run, tmp_path):
    old = tmp_path / "old"
    made = ncfast.fit(*waves(40, 32), out=old, level="off", **QUICK)
    content = json.loads((old / "config.json").read_text())
    del content["config"]["level"], content["data"]["levels"]
    (old / "config.json").write_text(json.dumps(content))
    again = ncfast.load(old, device="cpu")
    assert again.config.level == "off" and again.data.levels == ()
    np.testing.assert_array_equal(again.sample(9)[0], made.sample(9)[0])
    damaged = shutil.copytree(run, tmp_path / "damaged")
    content = json.loads((damaged / "config.json").read_text())
    content["data"]["levels"] = content["data"]["levels"][:1]
    (damaged / "config.json").write_text(json.dumps(content))
    with pytest.raises(ncfast.UserError, match="levels of the data cannot be"):
        ncfast.load(damaged, device="cpu")


def test_with_conditions_of_the_user_gaps_and_unequal_lengths():
    ends = 20 + np.arange(40) % 13
    ragged = [x[:, :end].copy() for x, end in zip(X, ends, strict=True)]
    ragged[0][0, 3:6] = np.nan
    ragged[1][1] = np.nan
    with pytest.warns(UserWarning):
        model = ncfast.fit(ragged, conditions={"age": np.arange(40.0)}, **QUICK)
    assert model.config.level == "on" and [column.name for column in model.data.user_conditions] == ["age"]
    x, y = model.sample(90, seed=1)
    values = model.sample_conditions(90, seed=1)
    assert y is None and {*values} == {"age", "length"}
    np.testing.assert_array_equal(values["length"], ends[values["age"].astype(int)])
    for series, length in zip(x, values["length"], strict=True):
        assert np.isfinite(series[:, :length]).all() and np.isnan(series[:, length:]).all()
    # Near the level of the training series that the condition is of.
    own = np.nanmean(x[:, 0], 1)
    assert np.corrcoef(own, LEVEL[values["age"].astype(int), 0, 0])[0, 1] > 0.9
    given = next(model.sample_batches(4, seed=1, condition={"age": 3, "length": 20}))
    drawn = next(model.sample_batches(4, seed=1))
    assert given.conditions.tolist() == [[3.0]] * 4 and given.length.tolist() == [20] * 4
    np.testing.assert_array_equal(given.levels, drawn.levels)
    with pytest.raises(ncfast.UserError, match="no condition 'mean of channel 0'; this model knows age, length"):
        model.sample(1, condition={"mean of channel 0": 3})
    gaps = np.where(np.arange(32) < 9, X[:2], np.nan)
    batch = next(model.sample_batches(2, context=gaps, condition={"age": 3}))
    assert batch.conditions.tolist() == [[3.0]] * 2 and np.isfinite(batch.x).all() and batch.length is None
    assert next(model.sample_batches(2, context=gaps)).conditions is None
    short = model.reconstruct(ragged)
    np.testing.assert_allclose(np.nanmean(short[2], 1), np.nanmean(ragged[2], 1), atol=1)


def test_windows_of_a_long_table_and_half_precision():
    pandas = pytest.importorskip("pandas")
    walk = 50 + RNG.normal(size=(200, 2)).cumsum(0)
    with pytest.warns(UserWarning, match="windows of 16 rows"):
        model = ncfast.fit(pandas.DataFrame(walk, columns=["a", "b"]), window=16, level="on", **QUICK)
    assert model.sample(5)[0].shape == (5, 2, 16) and len(model.data.levels) == 4
    half = ncfast.fit(X[:, :1].astype(np.float16), **QUICK)
    assert half.config.level == "on" and np.isfinite(half.sample(5)[0]).all()
    with pytest.raises(ncfast.UserError, match="was trained without conditions"):
        half.sample(1, condition={"age": 3})


@pytest.mark.slow
def test_shapes_within_series_are_learned_beside_a_large_level():
    """A level of 100 times the deviation within a series: only apart from it the shape survives the codes."""
    rng = np.random.default_rng(1)
    t = np.arange(24)
    shape = rng.choice([-1, 1], (256, 1)) * np.sin(2 * np.pi * t / 24) + 0.2 * rng.normal(size=(256, 24))
    x = (100 * rng.normal(size=(256, 1)) + shape)[:, None].astype(np.float32)  # as of windows of a walk
    options = {**SMALL, "dim": 16, "codebook_size": 32, "halvings": 3, "batch_size": 64, "stage2_batch_size": 64}
    options |= {"ssl": "none", "learning_rate": 3e-3, "stage1_steps": 100, "stage2_steps": 300, "device": "cpu"}
    ratio = {}
    for level in ("on", "off"):
        model = ncfast.fit(x, level=level, quiet=True, **options)
        drawn = model.sample(256, choice_temperature=1.0, decoding_steps=5)[0]
        ratio[level] = np.median(drawn.std(2)) / np.median(x.std(2))
        if level == "on":
            assert drawn.mean(2).std() == pytest.approx(x.mean(2).std(), rel=0.2)
    assert 1 / 1.5 < ratio["on"] < 1.5 < ratio["off"], ratio
