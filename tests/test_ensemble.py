"""Several models at once: each member is its run alone, up to rounding."""

import json
import sys

import numpy as np
import pytest
import torch
from test_training import FLAGS, SMALL, assert_same_weights, program, waves
from torch import nn

import ncfast
import ncfast.train
from ncfast import cli, ensemble, training
from ncfast.config import make_config
from ncfast.data.facts import DataFacts
from ncfast.data.sources import from_arrays
from ncfast.engine import loop
from ncfast.engine.logging import RunLog, RunLogs
from ncfast.engine.loop import train_stage
from ncfast.nn.stacked import stack, unstack

SEEDS = [3, 1, 8]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    x, y = waves()
    np.savez(path, X_train=x, y_train=y, X_test=x[:10], y_test=y[:10])
    return path


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """In float64 rounding cannot hide a mistake; float32 takes the kernels that training takes."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def prepared(ssl, channels=1, **options):
    """Configuration, facts, series [N, C, L] and labels for two epochs of three steps, the last of another size."""
    x, y = waves(40, channels=channels)
    dataset = from_arrays(x, y)
    config = training.resolve_config(
        make_config(**{**SMALL, "ssl": ssl, "stage1_epochs": 2, "stage2_epochs": 2, **options}), dataset, CPU
    )
    data = DataFacts.of(dataset)
    return (
        config,
        data,
        data.normalise(dataset.X_train, CPU).to(torch.get_default_dtype()),
        torch.from_numpy(dataset.y_train),
    )


def new_vqvae(config, data):
    return training.new_vqvae(config, data).to(torch.get_default_dtype())  # its STFT, too


def run(stage, seed):
    log = RunLogs([None] * len(seed)) if isinstance(seed, list) else RunLog(None)
    return train_stage(stage, seed=seed, device=CPU, log=log, state_path=None, state=None, quiet=True).losses


def assert_members_equal(twin, modules):
    """To 1e-9 in float64. In float32 AdamW makes a step of what rounding leaves of a gradient that is zero, that of the
    shift after whitening, which the loss takes away again; everything else agrees.
    """
    double = torch.get_default_dtype() == torch.float64
    stacked = twin.state_dict()
    for e, module in enumerate(modules):
        for name, expected in module.state_dict().items():
            if not double and name.endswith("whiten.bias"):
                continue
            actual = stacked[name]
            actual = actual if actual.dim() == 0 else actual.reshape(len(modules), *expected.shape)[e]
            scale = 1e-9 if double else 1e-4
            torch.testing.assert_close(
                actual, expected, rtol=scale, atol=scale, msg=lambda text, where=f"{e} {name}": f"{where}: {text}"
            )


@pytest.mark.parametrize("ssl", ["none", "barlow", "vicreg", "vibcreg"])
def test_stage1_members_are_their_solo_runs(ssl, dtype):
    config, data, x, _ = prepared(ssl, channels=2, augment=("warp", "slice", "gauss"))
    configs = ensemble.member_configs(config, SEEDS)
    vqvaes = [new_vqvae(each, data) for each in configs]
    together = ensemble.stage1(configs, vqvaes, x, CPU)
    losses = run(together, SEEDS)
    solo = []
    for e, each in enumerate(configs):
        stage = training.stage1(each, new_vqvae(each, data), x, CPU)
        expected = run(stage, each.seed)
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert losses[name][e] == pytest.approx(value, rel=1e-9 if dtype == torch.float64 else 1e-4), name
        solo.append(stage.modules)
    assert_members_equal(together.modules, solo)
    before = new_vqvae(configs[0], data)
    assert not torch.equal(solo[0]["vqvae"].vq.codebook, before.vq.codebook)  # it trained
    unstack(together.modules["vqvae"], vqvaes)
    torch.testing.assert_close(vqvaes[2].vq.codebook, solo[2]["vqvae"].vq.codebook)


@pytest.mark.parametrize(("labelled", "masking"), [(True, "masked"), (False, "kept")])
def test_stage2_members_are_their_solo_runs(labelled, masking, dtype):
    config, data, x, labels = prepared("none", prior_layers=2, prior_ff_mult=2, masking=masking)
    labels = labels if labelled else None
    configs = ensemble.member_configs(config, SEEDS)
    vqvaes = [new_vqvae(each, data).eval() for each in configs]
    priors = [training.new_prior(each, vqvae, data) for each, vqvae in zip(configs, vqvaes, strict=True)]
    together = ensemble.stage2(configs, vqvaes, priors, x, labels, CPU)
    losses = run(together, SEEDS)
    solo = []
    for e, each in enumerate(configs):
        stage = training.stage2(each, vqvaes[e], training.new_prior(each, vqvaes[e], data), x, labels, CPU)
        expected = run(stage, each.seed)
        assert {name: losses[name][e] for name in losses} == pytest.approx(
            expected, rel=1e-9 if dtype == torch.float64 else 1e-4
        )
        solo.append(stage.modules)
    assert_members_equal(together.modules, solo)


def test_a_single_seed_is_an_ensemble_too():
    config, data, x, _ = prepared("vibcreg")
    vqvae = new_vqvae(config, data)
    losses = run(ensemble.stage1([config], [vqvae], x, CPU), [config.seed])
    expected = run(training.stage1(config, vqvae, x, CPU), config.seed)
    assert {name: value[0] for name, value in losses.items()} == pytest.approx(expected, rel=1e-4)


def test_layers_without_a_twin_are_refused():
    with pytest.raises(TypeError, match="no twin for GroupNorm"):
        stack([nn.Sequential(nn.GroupNorm(2, 4))] * 2, folded=True)
    with pytest.raises(TypeError, match="only follow moving averages"):
        stack([ncfast.VectorQuantize(4, 8, threshold_ema_dead_code=2)] * 2, folded=True)


def arguments(data_file, out, *more):
    return ["--dataset", data_file, "--out", out, "--stage1-epochs", 3, "--stage2-epochs", 3, *FLAGS, *more]


@pytest.fixture(scope="module")
def finished(data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("ensemble") / "runs"
    result = program("train", *arguments(data_file, out, "--seeds", "1,2"))
    assert result.returncode == 0, result.stderr
    return out


def test_program_writes_whole_runs_that_equal_solo_runs(finished, data_file, tmp_path):
    solo = tmp_path / "solo"
    assert program("train", *arguments(data_file, solo, "--seed", 2)).returncode == 0
    assert json.loads((finished / "seed2" / "config.json").read_text()) == json.loads(
        (solo / "config.json").read_text()
    )
    records = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in (finished / "seed2", solo)]
    for ours, theirs in zip(*records, strict=True):
        assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
        # A token drawn where two codes meet may be another one after stage 1 has been rounded otherwise.
        assert ours == pytest.approx(theirs, rel=1e-3 if ours["stage"] == 1 else 1e-2)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (finished / "seed2", solo)]
    for stage in ("stage1", "stage2"):
        for each in metrics:
            del each[stage]["seconds"]
        assert metrics[0][stage] == pytest.approx(metrics[1][stage], rel=1e-2)
    written = {path.name for path in solo.iterdir()} - {"state.pt"}
    for seed in (1, 2):
        assert {path.name for path in (finished / f"seed{seed}").iterdir()} == written
        assert np.isfinite(ncfast.load(finished / f"seed{seed}").sample(5)[0]).all()
    result = program("generate", "--run", finished / "seed1", "--num-samples", 5, "--out", tmp_path / "x.h5")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("stop", [(1, 2), (2, 1)])
def test_resumed_equals_uninterrupted(stop, finished, tmp_path, monkeypatch):
    config, _ = ncfast.ncvqvae.read_config(finished / "seed1")
    x, y = waves()
    dataset = from_arrays(x, y)
    how = {"out": tmp_path / "run", "device": CPU, "checkpoint_every": 1, "quiet": True}
    straight = ensemble.train_ensemble(config, [1, 2], dataset, **{**how, "out": tmp_path / "straight"})
    write = loop.write_state

    def interrupt(path, state):
        write(path, state)
        if (state["stage"], state["epoch"]) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "write_state", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensemble.train_ensemble(config, [1, 2], dataset, **how)
    monkeypatch.undo()
    ensemble.train_ensemble(config, [1, 2], dataset, resume=True, **how)
    for seed in (1, 2):
        assert_same_weights(tmp_path / "straight" / f"seed{seed}", tmp_path / "run" / f"seed{seed}")
        lines = (tmp_path / "run" / f"seed{seed}" / "log.jsonl").read_text().splitlines()
        assert [(r["stage"], r["epoch"]) for r in map(json.loads, lines)] == [(s, e) for s in (1, 2) for e in (1, 2, 3)]
    again = ensemble.train_ensemble(config, [1, 2], dataset, resume=True, **how)  # nothing is left to do
    for a, b in zip(straight, again, strict=True):
        np.testing.assert_array_equal(a.sample(3)[0], b.sample(3)[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1,2", "--seed", "3"], "--seed for one model or --seeds for several"),
        (["--seeds", "1,2,1"], "got 1 more than once"),
        (["--seeds", "1,x"], "such as 1,2,3,4; got '1,x'"),
        (["--seeds=-1,2"], "--seed is at least 0"),
        (["--seeds", "1,2"], "already holds runs; add --resume"),
        (["--seeds", "1,2,3", "--resume"], "was started with --seeds 1,2;"),
        (["--seeds", "1,2", "--resume", "--dim", "16"], "dim was 8 and is 16"),
        (["--seed", "1", "--resume"], "holds runs of several seeds"),
        (["--seed", "1", "--resume", "--out", "MEMBER"], "holds runs of several seeds"),
        (["--seeds", "1,2", "--out", "MEMBER"], "holds the run of one seed"),
    ],
)
def test_mistakes_are_one_line(more, message, finished, data_file, monkeypatch, capsys):
    more = [str(finished / "seed1") if each == "MEMBER" else each for each in more]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments(data_file, finished, *more))])
    with pytest.raises(SystemExit) as stop:
        cli.run(ncfast.train.main)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_divergence_names_the_seeds():
    config, data, x, _ = prepared("none", learning_rate=1e30)
    configs = ensemble.member_configs(config, [4, 5])
    vqvaes = [new_vqvae(each, data) for each in configs]
    with pytest.raises(ncfast.UserError, match=r"stage 1 of seed 4, 5 is no longer finite"):
        run(ensemble.stage1(configs, vqvaes, x, CPU), [4, 5])
