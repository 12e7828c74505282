"""Both stages end to end on small data: results, run folder, resuming, errors."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import FLAGS, SMALL, train_arguments, waves

import ncfast
from ncfast import train as train_program
from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import read_state
from ncfast.engine.loop import batch_ends
from ncfast.engine.processes import Processes
from ncfast.engine.threads import in_threads
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.protocol import evaluate
from ncfast.evaluation.published import ScoreRecipe
from ncfast.models.trained import read_config
from ncfast.training import fit, run_folder, stages
from ncfast.training.self_supervision import SSL_LOSSES

pytestmark = pytest.mark.usefixtures("narrow_fcn")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    x, y = waves()
    np.savez(path, X_train=x, y_train=y, X_test=x[:10], y_test=y[:10])
    return path


def program(name, *arguments, **options):
    command = [sys.executable, "-m", f"ncfast.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def weights(out):
    paths = {stage: Path(out) / f"stage{stage}.safetensors" for stage in (1, 2, 3)}
    return {stage: safetensors.torch.load_file(path) for stage, path in paths.items() if path.exists()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for stage in a:
        assert a[stage].keys() == b[stage].keys()
        for name, value in a[stage].items():
            assert torch.equal(value, b[stage][name]), f"stage {stage}: {name}"


@pytest.fixture(scope="module")
def finished_run(data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    result = program("train", *train_arguments(data_file, out))
    assert result.returncode == 0, result.stderr
    return out


def test_fit_learns_and_samples():
    x, y = waves()
    options = {**SMALL, "learning_rate": 4e-3, "augment": ("warp", "gauss"), "prior_dropout": 0.0}  # it is short
    model = ncfast.fit(x, y, ssl="vicreg", stage1_epochs=120, stage2_epochs=300, quiet=True, **options)
    assert np.square(model.reconstruct(x) - x).mean() < 0.3 * x.var()
    generated, labels = model.sample(64, labels=["slow", "fast"], seed=1)
    assert generated.shape == (64, 1, 61) and np.isfinite(generated).all()
    # In data units: the mean of the waves is 5.
    assert abs(generated.mean() - 5) < 1 and 0.5 < generated.std() / x.std() < 1.5
    # Each class has its own frequency: more power at 5 cycles than at 2 in the fast one, less in the slow one.
    power = np.square(np.abs(np.fft.rfft(generated[:, 0] - generated[:, 0].mean(1, keepdims=True))))
    assert ((power[:, 5] > power[:, 2]) == (labels == "fast")).mean() > 0.8


@pytest.mark.parametrize("ssl", ["none", "views", *SSL_LOSSES])
def test_every_ssl_method_trains(ssl):
    x, y = waves(20)
    model = ncfast.fit(x, y, ssl=ssl, stage1_epochs=5, stage2_epochs=1, quiet=True, **SMALL)
    assert np.isfinite(model.sample(3)[0]).all()


def test_unlabelled_and_multivariate():
    x, _ = waves(channels=3, length=50)
    model = ncfast.fit(x, stage1_epochs=1, stage2_epochs=1, quiet=True, **SMALL)
    generated, labels = model.sample(3)
    assert generated.shape == (3, 3, 50) and labels is None
    with pytest.raises(ncfast.UserError, match="without labels"):
        model.sample(3, labels="slow")


def test_bf16_trains_and_draws_in_float32_or_rounded(tmp_path):
    x, y = waves(length=64)
    options = dict(ssl="vicreg", stage1_epochs=20, stage2_epochs=100, quiet=True, **SMALL)
    full = ncfast.fit(x, y, **options)
    rounded = ncfast.fit(x, y, precision="bf16", out=tmp_path / "run", **options)
    assert (full.precision, rounded.precision) == ("fp32", "bf16")
    for model in (full, rounded):
        assert all(p.dtype == torch.float32 for m in (model.vqvae, model.prior) for p in m.parameters())
    errors = [float(np.square(model.reconstruct(x) - x).mean()) for model in (full, rounded)]
    assert 0.7 < errors[1] / errors[0] < 1.4
    losses = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < 0.8 * next(r for r in losses if r["stage"] == 2)["loss"]
    # The precision of drawing is a choice of its own; both give series of the data's scale.
    again, exact = ncfast.load(tmp_path / "run"), ncfast.load(tmp_path / "run", precision="fp32")
    assert again.precision == "bf16" and exact.precision == "fp32"
    np.testing.assert_array_equal(again.sample(8, seed=1)[0], rounded.sample(8, seed=1)[0])
    assert 0.5 < exact.sample(64, seed=1)[0].std() / again.sample(64, seed=1)[0].std() < 2


def test_same_seed_same_weights_and_the_callers_generator_is_left_alone():
    x, y = waves(20)
    options = dict(stage1_epochs=2, stage2_epochs=2, quiet=True, **SMALL)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a = ncfast.fit(x, y, seed=3, **options)
    torch.testing.assert_close(torch.rand(3), expected)
    b = ncfast.fit(x, y, seed=3, **options)
    c = ncfast.fit(x, y, seed=4, **options)
    for p, q, r in zip(a.prior.parameters(), b.prior.parameters(), c.prior.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.dim() < 2 or not torch.equal(p, r)


def test_sampling_does_not_depend_on_how_the_range_is_split(finished_run):
    model = ncfast.load(finished_run)
    whole, labels = model.sample(150, seed=9)
    parts = [model.sample(n, seed=9, start=start) for start, n in ((0, 1), (1, 69), (70, 80))]
    np.testing.assert_array_equal(whole, np.concatenate([x for x, _ in parts]))
    np.testing.assert_array_equal(labels, np.concatenate([y for _, y in parts]))
    assert not np.array_equal(whole[:5], model.sample(5, seed=10)[0])


def test_batches_hold_the_same_series_whatever_their_size(finished_run):
    model = ncfast.load(finished_run)
    whole = model.sample(150, seed=9)[0]
    for size in (1, 7, 64, 200):
        batches = list(model.sample_batches(150, seed=9, batch_size=size))
        assert [len(batch.x) for batch in batches] == [size] * (150 // size) + [150 % size] * (150 % size > 0)
        np.testing.assert_array_equal(np.concatenate([batch.x for batch in batches]), whole)
        np.testing.assert_array_equal(np.concatenate([batch.index for batch in batches]), np.arange(150))
    with pytest.raises(ncfast.UserError, match="batch size is at least 1; got 0"):
        model.sample_batches(5, batch_size=0)


def test_labels(finished_run):
    model = ncfast.load(finished_run)
    assert model.sample(3, labels="fast")[1].tolist() == ["fast"] * 3
    assert model.sample(4, labels=["slow", "fast"])[1].tolist() == ["slow", "fast"] * 2
    assert model.sample(labels={"slow": 2, "fast": 1})[1].tolist() == ["slow", "slow", "fast"]
    assert model.sample(4, labels="balanced")[1].tolist() == ["fast", "slow"] * 2
    x, y = model.sample(3, labels="none")
    assert x.shape == (3, 1, 61) and y is None
    x, y = model.sample(0)
    assert x.shape == (0, 1, 61)
    for options, message in (
        ({"n": 1, "labels": "medium"}, "no class 'medium'; this model knows fast, slow"),
        ({"n": 4, "labels": {"slow": 3}}, "sum to 3; got n=4 from start=0"),
        ({}, "say how many"),
        ({"n": -1}, "got -1"),
        ({"n": 1, "seed": 2**63}, r"below 2\*\*63"),
        ({"n": 1, "guidance": 3}, "no sampling option 'guidance'"),
        ({"n": 1, "temperature": -1.0}, "--temperature is at least"),
    ):
        with pytest.raises(ncfast.UserError, match=message):
            model.sample(**options)


def test_sampling_options_change_what_is_drawn(finished_run):
    model = ncfast.load(finished_run)

    def tokens(**options):
        return next(model.sample_batches(64, seed=1, batch_size=64, **options)).tokens

    np.testing.assert_array_equal(tokens(temperature=1.0), tokens())
    for option in ({"temperature": 0.3}, {"top_k": 1}, {"guidance_scale": 4.0}):
        assert not np.array_equal(tokens(**option), tokens()), option


def test_run_folder(finished_run):
    config = json.loads((finished_run / "config.json").read_text())
    assert config["config"]["stage1_epochs"] == 4 and config["data"]["class_names"] == ["fast", "slow"]
    lines = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [(s, e) for s in (1, 2) for e in (1, 2, 3, 4)]
    assert all(np.isfinite(line["loss"]) for line in lines)
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert metrics["stage1"]["test_reconstruction_mse"] > 0
    assert not list(finished_run.glob(".*"))  # nothing temporary is left
    if importlib.util.find_spec("matplotlib"):
        assert (finished_run / "samples.png").stat().st_size > 10_000
    if importlib.util.find_spec("tensorboard"):
        assert list((finished_run / "tb").glob("events*"))


def wait_for_epoch(process, out, stage, epoch):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = out / "log.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if any((r["stage"], r["epoch"]) >= (stage, epoch) for r in records):
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    raise AssertionError("the run did not get there")


def six_epochs(data_file):
    lengths = ["--stage1-epochs", 6, "--stage2-epochs", 6, "--refiner-epochs", 6, "--checkpoint-every", 1]
    return ["--dataset", data_file, *lengths, *FLAGS, "--refiner=flow", "--refiner-dim=8"]


@pytest.fixture(scope="module")
def straight(data_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    result = program("train", *six_epochs(data_file), "--out", out)
    assert result.returncode == 0
    assert "stage 3    6 epochs x 3 steps: the refiner" in result.stdout
    assert "columns    15 of 4 samples, for detail that 7 by the length would lose (--detail 0.2)" in result.stdout
    assert "stage 3 (refiner): 100%" in result.stderr
    return out


@pytest.mark.parametrize(
    ("stage", "epoch", "kill"), [(1, 2, signal.SIGKILL), (2, 2, signal.SIGINT), (3, 2, signal.SIGKILL)]
)
def test_killed_and_resumed_equals_uninterrupted(stage, epoch, kill, straight, data_file, tmp_path):
    arguments, broken = six_epochs(data_file), tmp_path / "broken"
    command = [sys.executable, "-m", "ncfast.train", *map(str, arguments), "--out", str(broken)]
    # A shell's background jobs ignore SIGINT, and what they start inherits that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    wait_for_epoch(process, broken, stage, epoch)
    process.send_signal(kill)
    _, stderr = process.communicate(timeout=60)
    if kill == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in stderr.splitlines()[-1]
    else:
        assert process.returncode == -signal.SIGKILL
    if process.returncode and not (broken / "stage3.safetensors").exists():
        logged = json.loads((broken / "log.jsonl").read_text().splitlines()[-1])
        state = read_state(broken / "state.pt", torch.device("cpu"))
        assert (state["stage"], state["epoch"]) >= (logged["stage"], logged["epoch"] - 1)  # at most one epoch is lost
    resumed = program("train", *arguments, "--out", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_weights(straight, broken)
    epochs = [(r["stage"], r["epoch"]) for r in map(json.loads, (broken / "log.jsonl").read_text().splitlines())]
    assert epochs == [(s, e) for s in (1, 2, 3) for e in range(1, 7)]


def test_a_run_with_a_refiner(straight, data_file, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stage3"]["epochs"] == 6 and metrics["stage3"]["loss"] > 0
    model, (x, _) = ncfast.load(out), waves(20)
    batch = next(model.sample_batches(40, seed=3, batch_size=40))
    np.testing.assert_array_equal(model.decode(batch.tokens[::-1])[::-1], batch.x)
    plain = next(model.sample_batches(40, seed=3, batch_size=40, refinements=0))
    np.testing.assert_array_equal(plain.tokens, batch.tokens)
    np.testing.assert_array_equal(model.decode(plain.tokens, refinements=0), plain.x)
    assert not np.array_equal(plain.x, batch.x)
    refiner, model.vqvae.refiner = model.vqvae.refiner, None
    np.testing.assert_array_equal(model.decode(plain.tokens), plain.x)
    model.vqvae.refiner = refiner
    completed = model.sample(context=np.where(np.arange(61) < 30, x, np.nan), seed=1)[0]
    np.testing.assert_array_equal(completed[..., :30], x[..., :30])
    model.save(tmp_path / "saved")
    assert_same_weights(out, tmp_path / "saved")
    np.testing.assert_array_equal(ncfast.load(tmp_path / "saved").sample(40, seed=3)[0], batch.x)
    # Training orders weights otherwise, and another order sums otherwise.
    assert all(p.is_contiguous() for p in model.vqvae.parameters())
    # More epochs of it, then too many of another stage.
    options = [*map(str, six_epochs(data_file)), "--out", str(out), "--resume"]
    train_program.main([*options, "--refiner-epochs=8"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["stage"] == 3] == [*range(1, 9)]
    with pytest.raises(ncfast.UserError, match="stage 2 of .* has ended, and only the state of stage 3 is kept: give"):
        train_program.main([*options, "--refiner-epochs=8", "--stage2-epochs=9"])
    with pytest.raises(ncfast.UserError, match="refiner_epochs was 8 and is 7"):
        train_program.main([*options, "--refiner-epochs=7"])
    (out / "stage3.safetensors").unlink()
    with pytest.raises(ncfast.UserError, match="has not finished stage 3; continue it with"):
        ncfast.load(out)


def test_a_run_of_a_version_without_the_later_options(data_file, tmp_path):
    """It draws the same series, and goes on."""
    later = {"codebook_levels", "detail", "samples_per_column", "prior_dropout", "token_temperature", "refinements"}
    later |= {"stretch", "level", "refiner", "refiner_dim", "refiner_temperature", "refiner_epochs", "decoding_order"}
    out = tmp_path / "run"
    flags = [f for f in FLAGS if "refiner" not in f]
    options = ["--preset=paper", "--dataset", str(data_file), *flags, "--out", str(out), "--stage1-epochs=2"]
    train_program.main([*options, "--stage2-epochs=2"])
    expected = ncfast.load(out).sample(20, seed=1)[0]
    content = json.loads((out / "config.json").read_text())
    content["config"] = {name: value for name, value in content["config"].items() if name not in later}
    (out / "config.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(ncfast.load(out).sample(20, seed=1)[0], expected)
    identity = dataclasses.asdict(read_config(out)[1].identity)
    for name in run_folder.LATER_FACTS:
        del identity[name]
    for of_all_options in (True, False):  # as 0.1.0 wrote it, and a version after it
        known = dict(content["config"])
        if not of_all_options:
            for name in ("stage1_epochs", "stage2_epochs", "stage1_steps", "stage2_steps", "decoding_steps"):
                del known[name]
            for name in ("choice_temperature", "guidance_scale", "temperature", "top_k", "unmasking"):
                del known[name]
        digest = hashlib.sha256(json.dumps([known, identity], sort_keys=True).encode()).hexdigest()
        again = shutil.copytree(out, tmp_path / f"again{of_all_options}")
        state = torch.load(again / "state.pt", weights_only=True)
        torch.save({**state, "run": digest}, again / "state.pt")
        train_program.main([*options, "--out", str(again), "--stage2-epochs=3", "--resume"])
        lines = [json.loads(line) for line in (again / "log.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines if line["stage"] == 2] == [1, 2, 3]


def test_a_run_goes_on_with_more_epochs_and_other_sampling(finished_run, data_file, tmp_path, capsys):
    out = shutil.copytree(finished_run, tmp_path / "run")
    options = ["--dataset", str(data_file), "--out", str(out), *FLAGS, "--resume", "--stage1-epochs=4"]
    before = weights(out)
    train_program.main([*options, "--stage2-epochs=4", "--temperature=0.5"])
    assert "goes on with other options: temperature was 1.0 and is 0.5" in capsys.readouterr().out
    assert_same_weights(finished_run, out)
    assert ncfast.load(out).config.temperature == 0.5
    # As version 0.1.0 left it: its states are of all options.
    config, data = read_config(out)
    state = torch.load(out / "state.pt", weights_only=True)
    torch.save({**state, "run": run_folder.sha256_of(dataclasses.asdict(config), data)}, out / "state.pt")
    train_program.main([*options, "--stage2-epochs=6", "--temperature=0.5"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["stage"] == 2] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(before[1][name], value) for name, value in weights(out)[1].items())
    assert any(not torch.equal(before[2][name], value) for name, value in weights(out)[2].items())
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for more, message in (
        (["--stage2-epochs=5", "--temperature=0.5"], "stage2_epochs was 6 and is 5"),
        (["--stage1-epochs=9", "--stage2-epochs=6"], "only the state of stage 2 is kept"),
    ):
        with pytest.raises(ncfast.UserError, match=message):
            train_program.main([*options, *more])
    (out / "state.pt").rename(tmp_path / "state.pt")
    with pytest.raises(ncfast.UserError, match="no state.pt to go on from with more epochs"):
        train_program.main([*options, "--stage2-epochs=9", "--temperature=0.5"])
    (tmp_path / "state.pt").rename(out / "state.pt")
    assert kept == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


MISTAKES = [
    (["--dataset", "NoSuchSet"], "no data set"),
    (["--dataset", "DATA", "--out", "RUN"], "already holds a run; add --resume"),
    (["--dataset", "DATA", "--out", "RUN", "--resume", "--dim", "16"], "other options (dim was 8 and is 16"),
    (["--dataset", "DATA", "--ssl", "moco"], "invalid choice"),
    (["--dataset", "DATA", "--augment", "gausss"], "gauss"),
    (["--dataset", "DATA", "--batch-size", "1"], "--batch-size is at least 2"),
    (["--dataset", "DATA", "--learning-rate", "nan"], "--learning-rate is at least 0"),
    (["--dataset", "DATA", "--n-fft", "6"], "multiple of 4"),
    (["--dataset", "DATA", "--n-fft", "64"], "at least n_fft = 64"),
    (["--dataset", "DATA", "--device", "tpu"], "--device tpu cannot be used"),
    ([], "--dataset"),
    (["--dataset", "DATA", "--out", "x", "--precision", "tf32", "--device", "cpu"], "TF32 is a format of"),
]


def mistaken(arguments, data_file, finished_run):
    """With the options of `finished_run`, but for those under test."""
    places = {"DATA": str(data_file), "RUN": str(finished_run)}
    arguments = [places.get(argument, argument) for argument in arguments]
    options = [*FLAGS, "--stage1-epochs=4", "--stage2-epochs=4"]
    return [*arguments, *(option for option in options if option.split("=")[0] not in arguments)]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(arguments, message, data_file, finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("NCFAST_DATA", "AEON_DATA"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(ncfast.UserError) as error:
        train_program.main(mistaken(arguments, data_file, finished_run))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("arguments", "message"), MISTAKES[1:4:2])
def test_mistakes_have_exit_code_2(arguments, message, data_file, finished_run, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(ncfast.__file__).parents[1])}
    result = program("train", *mistaken(arguments, data_file, finished_run), cwd=tmp_path, env=environment)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_damaged_runs_are_one_line(straight, tmp_path):
    for file in ("config.json", "stage1.safetensors", "stage2.safetensors", "stage3.safetensors"):
        broken = tmp_path / file
        broken.mkdir()
        for source in straight.glob("*.*"):
            if source.is_file():
                (broken / source.name).write_bytes(source.read_bytes())
        whole = (broken / file).read_bytes()
        (broken / file).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ncfast.UserError, match=file):
            ncfast.load(broken)
        (broken / file).unlink()
        with pytest.raises(ncfast.UserError, match="not the folder of a run|has not finished"):
            ncfast.load(broken)


def test_dry_run_writes_nothing(data_file, tmp_path):
    result = program("train", *train_arguments(data_file, tmp_path / "run"), "--dry-run")
    assert result.returncode == 0 and "40 series [1, 61], 2 classes" in result.stdout
    assert not (tmp_path / "run").exists()


def test_batches_cover_every_series_and_never_hold_one():
    assert batch_ends(257, 128) == [128, 257]
    assert batch_ends(256, 128) == [128, 256]
    assert batch_ends(130, 128) == [128, 130]
    assert batch_ends(20, 128) == [20]
    assert batch_ends(1, 128) == [1]


def test_divergence_is_reported_and_keeps_the_last_good_state(data_file, tmp_path):
    arguments = train_arguments(data_file, tmp_path / "run", "--learning-rate", "1e30")
    result = program("train", *arguments)
    assert result.returncode == 2
    assert "no longer finite" in result.stderr and "--learning-rate" in result.stderr


def test_codes_from_the_data_and_revived_ones_resume_as_they_were(data_file, tmp_path):
    """Both draw from torch's own generators."""
    more = ("--codebook-init", "kmeans", "--dead-code-threshold", "2", "--ssl", "views", "--augment", "warp")
    result = program("train", *train_arguments(data_file, tmp_path / "whole", *more))
    assert result.returncode == 0, result.stderr
    plain = program("train", *train_arguments(data_file, tmp_path / "plain", *more[4:]))
    assert plain.returncode == 0, plain.stderr
    books = [weights(tmp_path / name)[1]["vq._codebook.embed"] for name in ("whole", "plain")]
    assert not torch.equal(*books)
    command = [sys.executable, "-m", "ncfast.train"]
    command += map(str, train_arguments(data_file, tmp_path / "parts", *more, "--checkpoint-every", "1"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "parts" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    result = program("train", *train_arguments(data_file, tmp_path / "parts", *more, "--resume"))
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_views_only_reconstruct(data_file, tmp_path):
    model = ncfast.fit(*waves(20), ssl="views", stage1_epochs=1, stage2_epochs=1, quiet=True, out=tmp_path, **SMALL)
    logged = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert "reconstruction_view" in logged and "ssl" not in logged
    assert model.config.ssl == "views"
    parts = sum(logged[f"reconstruction_{part}"] for part in ("time", "spectrum", "view"))  # the view weighs 1
    assert logged["loss"] == pytest.approx(parts + logged["commitment"], rel=1e-5)


def test_halvings_set_the_width(tmp_path):
    model = ncfast.fit(*waves(20), halvings=3, stage1_epochs=1, stage2_epochs=1, quiet=True, **SMALL)
    assert model.vqvae.grid == (3, 61 >> 3)
    with pytest.raises(ncfast.UserError, match="--halvings 9 leaves nothing"):
        ncfast.fit(*waves(20), halvings=9, **SMALL)


def prepared(**options):
    """A resolved configuration, a data set and its facts."""
    dataset = from_arrays(*waves(20))
    config = fit.resolve_config(make_config(**{**SMALL, **options}), dataset, torch.device("cpu"))
    return config, dataset, DataStats.of(dataset)


def test_the_memory_asked_for_is_weights_moments_and_the_largest_tensors(monkeypatch):
    """Float32 weights, gradients and two moments: 16 bytes a number. Then 8 bytes, a value and its gradient, for each
    number of the first layer's output, 3 bins x 31 columns, and of the logits, 3 x 7 tokens.
    """
    config, dataset, data = prepared(ssl="barlow", batch_size=16, stage2_batch_size=12, codebook_size=10, detail=0.0)
    asked = []
    monkeypatch.setattr(fit, "check_fits", lambda needed, *_: asked.append(needed))
    fit.check_memory(config, dataset, torch.device("cpu"))
    vqvae = stages.new_vqvae(config, data)
    ssl, prior = stages.new_self_supervision(config), stages.new_prior(config, vqvae, data)
    a, b, c = (sum(t.numel() for t in [*m.parameters(), *m.buffers()]) for m in (vqvae, ssl, prior))
    assert asked == [16 * (a + b) + 8 * 16 * 8 * 3 * 31, 4 * a + 16 * c + 8 * 12 * 3 * 7 * 10]
    # Of the refiner the output of each of six blocks, 61 samples of 8 channels, and all series once decoded.
    asked.clear()
    config = dataclasses.replace(config, refiner="flow", refiner_dim=8)
    fit.check_memory(config, dataset, torch.device("cpu"))
    d = sum(t.numel() for t in stages.new_refiner(config, data).state_dict().values())
    assert 16 * d + 8 * 16 * 8 * 61 * 6 + 4 * 20 * 61 in asked and len(asked) == 3


@pytest.mark.parametrize(("kinds", "alike"), [(["A", "A"], True), (["A", "B"], False)])
def test_only_processes_of_one_kind_keep_a_projector_each_without_a_word(kinds, alike, monkeypatch):
    config, dataset, data = prepared(ssl="barlow")
    monkeypatch.setattr(Processes, "gathered", lambda *_: kinds)
    x = torch.from_numpy(dataset.X_train)
    stage = stages.make_stage1(config, stages.new_vqvae(config, data), x, torch.device("cpu"), Processes(0, 2))
    assert stage.whole is (stage.modules["ssl"] if alike else None)


def test_a_training_shows_its_progress_unless_quiet(capsys):
    config, dataset, _ = prepared(ssl="none", stage1_epochs=1, stage2_epochs=1)
    options = {"out": None, "device": torch.device("cpu")}
    fit.train(config, dataset, **options, quiet=True)
    assert capsys.readouterr().err == ""
    fit.train(config, dataset, **options)
    told = capsys.readouterr().err
    assert "stage 1 (VQVAE)" in told and "stage 2 (prior)" in told


@pytest.mark.slow
def test_a_training_survives_kills_at_any_moment(data_file, tmp_path):
    """NCFAST_KILLS=20 is the long version."""
    kills = int(os.environ.get("NCFAST_KILLS", 2))
    more = ("--stage1-epochs", 24, "--stage2-epochs", 24, "--ssl", "vibcreg")
    assert program("train", *train_arguments(data_file, tmp_path / "whole", *more)).returncode == 0
    generator = random.Random(0)
    command = [sys.executable, "-m", "ncfast.train"]
    command += map(str, train_arguments(data_file, tmp_path / "parts", *more, "--checkpoint-every", 1))
    log = tmp_path / "parts" / "log.jsonl"
    for _ in range(kills):
        resume = ["--resume"] if (tmp_path / "parts" / "config.json").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = len(log.read_text().splitlines()) if log.exists() else 0
        # Some 48 epochs for all kills together: each comes a few epochs after the last, at any moment of one.
        enough = before + 48 // (kills + 2)
        while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < enough):
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        assert process.poll() is None, process.stderr.read().decode()
        process.kill()
        process.communicate()
    result = program("train", *train_arguments(data_file, tmp_path / "parts", *more, "--resume"))
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    epochs = [(r["stage"], r["epoch"]) for r in map(json.loads, log.read_text().splitlines())]
    assert epochs == [(stage, epoch) for stage in (1, 2) for epoch in range(1, 25)]


@pytest.mark.slow
def test_trainings_in_threads_give_what_they_give_one_after_the_other(tmp_path):
    """Weights and measures, while another thread draws from torch's own generator and seeds it."""
    x, y = waves(60)
    dataset = from_arrays(x[:40], y[:40], x[40:], y[40:])
    small = {"stage1_epochs": 4, "stage2_epochs": 4, "decoding_steps": 2, **SMALL}
    dead = {"dead_code_threshold": 1.0, "codebook_init": "kmeans"}
    options = [
        {"ssl": "vicreg", "seed": 1, "precision": "bf16", **dead},
        {"ssl": "byol", "seed": 2, "refiner": "flow", "refiner_epochs": 2, "refiner_dim": 8},
        {"ssl": "barlow", "seed": 3, "precision": "bf16", **dead},
    ]

    def found(i, folder):
        config = fit.resolve_config(make_config(**small | options[i]), dataset, torch.device("cpu"))
        model = fit.train(config, dataset, out=folder / str(i), device=torch.device("cpu"), quiet=True)
        state = {**model.vqvae.state_dict(), **model.prior.state_dict()}
        names = ["reconstruction", "codebook", "fid", "cas", "context_fid"]
        scores = ScoreRecipe(repeats=1, encoder_steps=2)
        taken = {"recipe": Recipe(epochs=2), "cache": folder / "cache", "scores": scores, "quiet": True}
        measures = evaluate(model, dataset, measures=names, seeds=[7], **taken)["measures"]
        log = [json.loads(line) for line in (folder / str(i) / "log.jsonl").read_text().splitlines()]
        return state, [[line.get(key) for key in ("stage", "epoch", "loss")] for line in log], measures

    expected = [found(i, tmp_path / "serial") for i in range(3)]
    results, numbers, ended = {}, iter(range(4)), []

    def work():
        i = next(numbers)
        try:
            if i < 3:
                results[i] = found(i, tmp_path / "threads")
        finally:
            ended.append(i)
        while i == 3 and len(ended) < 4:
            torch.manual_seed(0)
            torch.randn(100)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that each comes between any two steps of the others
    try:
        in_threads(4, work, torch.device("cpu"))
    finally:
        sys.setswitchinterval(interval)
    for i in range(3):
        state, losses, measures = results[i]
        assert all(torch.equal(state[name], expected[i][0][name]) for name in expected[i][0])
        assert losses == expected[i][1] and measures == expected[i][2]
