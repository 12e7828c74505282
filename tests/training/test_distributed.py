"""Training over several processes: against one process with the same batches. One gloo process a rank."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from processes import on_processes
from runs import SMALL, train_arguments, waves
from torch import distributed

import ncfast
from ncfast import train
from ncfast.cli.startup import choose_device
from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine.logging import RunLog
from ncfast.engine.loop import batch_ends, train_stage
from ncfast.engine.precision import computing
from ncfast.engine.processes import ALONE, Processes, current_processes
from ncfast.errors import UserError
from ncfast.nn.synchronised import synchronised
from ncfast.training import fit, stages

CPU = torch.device("cpu")
METHODS = ("none", "barlow", "vicreg", "vibcreg", "byol", "sigreg")
STEPS = 9  # three epochs
OPTIONS = {**SMALL, "refiner": "flow", "refiner_dim": 8}
# Warped views at full weight magnify what float32 rounds to 3e-5 in so many steps; in float64 they are equal to 1e-10.
LIGHT_VIEWS = {"view_weight": 0.1, "augment": "gauss"}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 129])
def test_slices_cover_the_batch_and_weigh_as_one(rows, size):
    each = [Processes(rank, size) for rank in range(size)]
    taken = [list(range(rows)[process.local_slice(rows)]) for process in each]
    assert [row for part in taken for row in part] == list(range(rows))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert [process.loss_weight(rows) * rows / size for process in each] == pytest.approx([len(part) for part in taken])


def test_one_process_is_alone():
    assert (
        current_processes() == ALONE
        and ALONE.is_first
        and ALONE.local_slice(5) == slice(0, 5)
        and ALONE.loss_weight(5) == 1
    )
    assert ALONE.on_every_rank(lambda: 3) == ALONE.on_rank0(lambda: 3) == 3


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("auto", "cuda"):
        assert choose_device(name, 1)[0] == torch.device("cuda:1") == current[-1]
    assert choose_device("cpu", 1)[0] == CPU
    with pytest.raises(UserError, match="torch sees 2 GPUs for 3 processes or more"):
        choose_device("auto", 2)
    with pytest.raises(UserError, match="--device cuda:0: of several processes"):
        choose_device("cuda:0", 1)


def trained(ssl, num_series, dtype, later=True, device=CPU, steps=STEPS, graph=True):
    """Weights, buffers and mean losses of so many steps of each stage; over the processes there are.

    later: stages 2 and 3 too, which have nothing of the SSL method.
    """
    processes = current_processes()
    dataset = from_arrays(*waves(num_series))
    epochs = -(-steps // len(batch_ends(num_series, SMALL["batch_size"])))
    lengths = {"stage1_epochs": epochs, "stage2_epochs": epochs, "refiner_epochs": epochs}
    views = LIGHT_VIEWS if dtype == torch.float32 else {}
    config = make_config(ssl=ssl, precision="fp32", **lengths, **OPTIONS, **views)
    config, data = fit.resolve_config(config, dataset, device), DataStats.of(dataset)
    x, labels = data.normalise(dataset.X_train, device).to(dtype), torch.from_numpy(dataset.y_train).to(device)
    loop = {"seed": 0, "device": device, "state_path": None, "state": None, "quiet": True, "processes": processes}
    loop |= {"graph": graph, "log": RunLog(None)}

    with computing("fp32", device):
        first = stages.make_stage1(config, stages.new_vqvae(config, data), x, device, processes)
        first.modules.to(dtype)
        with synchronised(first.modules["vqvae"], processes.group):
            losses = train_stage(first, **loop).losses
        results = {1: {**on_cpu(first.modules.state_dict()), **tensors(losses)}}
        if not later:
            return results
        # Another VQVAE, the same for all, as the tokens that are drawn are discontinuous in its weights.
        vqvae = stages.new_vqvae(config, data).to(device, dtype).eval()
        prior, refiner = stages.new_prior(config, vqvae, data), stages.new_refiner(config, data)
        second = stages.make_stage2(config, vqvae, prior, x, labels, device, processes)
        third = stages.make_stage3(config, vqvae, refiner, x, device, processes)
        for number, stage in ((2, second), (3, third)):
            stage.modules.to(dtype)
            losses = train_stage(stage, **loop).losses
            results[number] = {**on_cpu(stage.modules.state_dict()), **tensors(losses)}
    return results


def on_cpu(state):
    return {name: value.cpu() for name, value in state.items()}


def tensors(losses):
    return {f"losses.{name}": torch.tensor(value, dtype=torch.float64) for name, value in losses.items()}


def several_trained(cases):
    return [trained(*case) for case in cases]


def assert_close_states(found, expected, tolerance, projector_tolerance=None):
    """Largest differences, over the largest value of a tensor where that is above 1."""
    assert found.keys() == expected.keys()
    for stage in expected:
        assert found[stage].keys() == expected[stage].keys()
        for name, value in expected[stage].items():
            of_projector = projector_tolerance is not None and name.startswith("ssl.")
            if of_projector and name.endswith("whiten.bias"):
                continue  # no loss depends on it: its gradient is rounding, and Adam makes whole steps of that
            value, other = value.double(), found[stage][name].double()
            scale = max(1.0, float(value.abs().max()))
            difference = float((other - value).abs().max())
            limit = scale * (projector_tolerance if of_projector else tolerance)
            assert difference <= limit, f"stage {stage}, {name}: {difference} of {scale}"


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    # The last batch of an epoch is 4 + 5 rows. Some gradients of the projector are so small that Adam magnifies their
    # rounding: float64 shows that it is that. Of float32 one method has all that there is.
    limits = {(ssl, 41, torch.float64, ssl == "vibcreg"): (1e-10,) for ssl in METHODS}
    limits |= {("vibcreg", 41, torch.float32): (1e-5, 1e-4)}
    ranks = on_processes(2, tmp_path, several_trained, list(limits))
    for (case, tolerances), first, second in zip(limits.items(), *ranks, strict=True):
        print(case)  # shown where it fails
        expected = trained(*case)
        assert_close_states(first, expected, *tolerances)
        assert all(torch.equal(first[stage][name], second[stage][name]) for stage in first for name in first[stage])


@pytest.mark.slow
def test_slices_may_be_empty(tmp_path):
    # The last batch of an epoch is 0 + 1 + 1 rows. Of 2 rows batch norm makes +1 and -1, whose gradients are all but
    # rounding: float32 would show nothing.
    case = ("vibcreg", 34, torch.float64)  # it has everything that has a process group
    expected = trained(*case)
    for (found,) in on_processes(3, tmp_path, several_trained, [case]):
        assert_close_states(found, expected, 1e-7)


class Stopped(Exception):
    pass


def fit_until(out, stop, resume):
    """`train` as the program calls it, ended as (stage, epoch) is logged: before its state is saved."""

    def write(log, stage, epoch, *values):
        original(log, stage, epoch, *values)
        if (stage, epoch) == stop:
            raise Stopped

    dataset = from_arrays(*waves(41))
    config = make_config(ssl="vicreg", stage1_epochs=4, stage2_epochs=4, refiner_epochs=4, **OPTIONS, **LIGHT_VIEWS)
    config = fit.resolve_config(config, dataset, CPU)
    original = RunLog.write
    RunLog.write = write
    try:
        model = fit.train(config, dataset, out=out, device=CPU, resume=resume, checkpoint_every=1, quiet=True)
        return model.vqvae.state_dict_of_stage1(), model.prior.state_dict(), model.vqvae.refiner.state_dict()
    except Stopped:
        return None
    finally:
        RunLog.write = original


@pytest.mark.slow
def test_other_numbers_of_processes_continue_a_run(tmp_path):
    expected = fit_until(tmp_path / "whole", None, False)
    out = tmp_path / "parts"
    for world, stop, resume in ((2, (1, 3), False), (1, (2, 2), True), (2, (3, 2), True), (3, None, True)):
        if world == 1:
            assert fit_until(out, stop, resume) is None
            continue
        folder = tmp_path / f"ranks{world}{stop}"
        folder.mkdir()
        ends = on_processes(world, folder, fit_until, out, stop, resume)
        assert all((end is None) == (stop is not None) for end in ends)
    # Every process has the model, and the first one's is on disk.
    saved = [safetensors.torch.load_file(out / f"stage{stage}.safetensors") for stage in (1, 2, 3)]
    for states in (saved, *ends):
        for state, target in zip(states, expected, strict=True):
            for name, value in target.items():
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [(s, e) for s in (1, 2, 3) for e in (1, 2, 3, 4)]
    whole = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole], rel=1e-5)
    assert not list(out.glob("*.tmp"))


def mistakes(out):
    """The errors of calls that one process alone would have got wrong."""
    rank = current_processes().rank
    x, y = waves(20)
    options = {"stage1_epochs": 1, "stage2_epochs": 1, "quiet": True, **SMALL}
    messages = []
    for more in ({"batch_size": 2, "stage2_batch_size": 1}, {"seed": rank}, {"out": out}):
        with pytest.raises(UserError) as error:
            ncfast.fit(x, y, **{**options, **more})
        messages.append(str(error.value))
    return messages


def left_group(folder, backend):
    """What one group, which has that name, and then another tell; and whether the first is kept once it was left."""
    rank, world = distributed.get_rank(), weakref.ref(distributed.group.WORLD)
    importlib.import_module("torch._dynamo")  # as PyTorch's optimisers do
    with mock.patch.object(distributed, "get_backend", lambda: backend):
        processes = current_processes()
        told, values = processes.gathered(rank), weakref.ref(processes.values)
        assert (values() is world()) == (backend == "gloo") and values() is current_processes().values
        options = {"stage1_epochs": 1, "stage2_epochs": 1, "quiet": True, **SMALL}
        ncfast.fit(*waves(20), **options)
        with pytest.raises(UserError) as error:  # its frames live as long as this, with all that they hold
            ncfast.fit(*waves(20), **options, seed=rank)
    distributed.destroy_process_group()
    kept = world() is not None or values() is not None
    assert "different options" in str(error.value)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/second", rank=rank, world_size=2)
    return told, current_processes().gathered(10 + rank), kept


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_group_that_is_left_is_let_go(tmp_path, backend):
    assert on_processes(2, tmp_path, left_group, tmp_path, backend) == [([0, 1], [10, 11], False)] * 2


@pytest.mark.slow
def test_every_process_raises_what_one_finds(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    for messages in on_processes(2, tmp_path, mistakes, tmp_path / "run"):
        assert "--stage2-batch-size 1 is of all processes together, and there are 2" in messages[0]
        assert "different options or data" in messages[1]
        assert "already holds a run; add --resume" in messages[2]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    x, y = waves(41)
    np.savez(path, X_train=x, y_train=y, X_test=x[:10], y_test=y[:10])
    return path


def torchrun(*arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*command, "-m", "ncfast.train", *map(str, arguments)]


def program(*arguments, **options):
    return subprocess.run(torchrun(*arguments, **options), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_torchrun_trains_prints_and_logs_once(data_file, tmp_path):
    out = tmp_path / "run"
    result = program(*train_arguments(data_file, out))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("data ") for line in lines) == sum(line.startswith("run: ") for line in lines) == 1
    assert "processes  2, each with its rows of every batch" in lines
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in log] == [(s, e) for s in (1, 2) for e in (1, 2, 3, 4)]
    assert len(re.findall(r"stage 1 \(VQVAE\): 100%[^\r\n]*12/12", result.stderr)) >= 1
    x, _ = ncfast.load(out).sample(3)
    assert x.shape == (3, 1, 61) and np.isfinite(x).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "missing.npz"], "no file or folder 'missing.npz'"),
        (["--colour", "red"], "unrecognized arguments: --colour red; see `python -m ncfast.train --help`"),
        (["--stage2-batch-size", "1"], "--stage2-batch-size 1 is of all processes together"),
    ],
)
def test_a_mistake_is_one_line_of_all_processes(data_file, tmp_path, more, message):
    result = program(*train_arguments(data_file, tmp_path / "run", *more))
    assert_one_error(result, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others(data_file, tmp_path):
    out = tmp_path / "run"
    (out / ".state.pt.spare").mkdir(parents=True)  # where the first process, which alone writes, puts a state
    result = program(*train_arguments(data_file, out, "--checkpoint-every", 1))
    assert_one_error(result, f"cannot write {out / 'state.pt'}: Is a directory")
    assert len((out / "log.jsonl").read_text().splitlines()) == 1


def assert_one_error(result, message):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    # What follows is torchrun's report: the first to end, upon which it stops the others, ends with 2.
    assert re.search(r"exitcode *: 2 ", result.stderr) and str(Path(ncfast.__file__).parent) not in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes by /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_and_one_continues(data_file, tmp_path, killed):
    out = tmp_path / "run"
    arguments = train_arguments(data_file, out, "--stage1-epochs", 50, "--checkpoint-every", 1)
    running = subprocess.Popen(torchrun(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not ((out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 1):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        workers = [
            int(pid)
            for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            if b"ncfast.train" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        os.kill(workers[killed], signal.SIGKILL)
        _, errors = running.communicate(timeout=90)
        assert running.returncode != 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        running.kill()
        running.wait()
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "another of the processes has ended" in lines[0] and "--resume" in lines[0], errors
    assert str(Path(ncfast.__file__).parent) not in errors  # no traceback of ours
    done = len((out / "log.jsonl").read_text().splitlines())
    train.main([*map(str, arguments), "--resume"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert 1 < done < 50 and [line["epoch"] for line in log if line["stage"] == 1] == list(range(1, 51))


def test_processes_that_one_has_left_end_though_they_wait():
    """As in NCCL, of which the interpreter sees nothing: SIGTERM comes while the main thread waits inside a call."""
    code = """
import os, sys, threading, time
from torch import distributed
from ncfast.cli.torchrun import end_when_told
store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
end_when_told(store)
print("ready", flush=True)
store.wait(["never"])  # in C++
"""
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout.readline() == "ready\n"
        time.sleep(0.5)
        running.send_signal(signal.SIGTERM)
        _, errors = running.communicate(timeout=10)
    finally:
        running.kill()
    assert running.returncode == 128 + signal.SIGTERM and errors.startswith(
        "\nerror: another of the processes has ended"
    )
