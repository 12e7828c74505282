"""On a machine with two GPUs: what runs on the second is what the first computes, whichever is the current one."""

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import gpu_operations
import h5py
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import SMALL, train_arguments, waves
from test_distributed import METHODS, assert_close_states, trained

import ncfast
from ncfast.data.sources import from_arrays
from ncfast.evaluation.protocol import evaluate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FIRST, SECOND = "cuda:0", "cuda:1"
ON_BOTH = pytest.mark.parametrize("current", [0, 1])


@pytest.fixture(autouse=True)
def current_device():
    """No call leaves another device current."""
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    x, y = waves(41)
    ncfast.fit(x, y, out=out, device=FIRST, quiet=True, ssl="vicreg", stage1_epochs=4, stage2_epochs=4, **SMALL)
    return out


def equal(a, b):
    """Arrays, tensors and nested sequences of these, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return len(a) == len(b) and all(map(equal, a, b))


def test_operations_and_gradients():
    found = []
    for device in (FIRST, SECOND):
        found.append({})
        for name, implementation, call, _ in gpu_operations.calls(device):
            implementation, *isa = implementation.split()
            os.environ["NCFAST_CUDA_ISA"] = isa[0] if isa else ""
            found[-1][name, implementation, str(isa)] = call(implementation)
    del os.environ["NCFAST_CUDA_ISA"]
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        assert equal(found[0][name], found[1][name]), name


@pytest.mark.parametrize("options", [{"kmeans_init": True}, {"threshold_ema_dead_code": 2}, {"rotation_trick": True}])
def test_vector_quantize(options):
    results = []
    for device in (FIRST, SECOND):
        torch.manual_seed(0)
        vq = ncfast.VectorQuantize(16, 32, **options).to(device)
        z = torch.randn(4, 100, 16, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        torch.manual_seed(2)
        for _ in range(3):
            quantised, indices, loss = vq(z)
        (gradient,) = torch.autograd.grad(quantised.square().sum() + loss, z)
        results.append([quantised.detach(), indices, loss.detach(), gradient, *vq.state_dict().values()])
    assert equal(*results)


@ON_BOTH
def test_a_model_samples_decodes_and_reconstructs(run, current):
    results = []
    with torch.cuda.device(current):
        for device in (FIRST, SECOND):
            model = ncfast.load(run, device)
            n = 7 * model.chunk_size + 5  # with a CUDA graph, and the host a chunk behind
            x, y = model.sample(n, seed=3)
            batch = next(model.sample_batches(n, seed=3, batch_size=n))
            completed, _ = model.sample(9, context=x[:3], mask=np.arange(x.shape[-1]) < 20)
            results.append([x, y, batch.tokens, model.decode(batch.tokens), model.reconstruct(x[:100]), completed])
            assert equal(results[-1][0], results[-1][3])
    assert equal(*results) and all(np.isfinite(part).all() for part in results[0] if part.dtype.kind == "f")


@ON_BOTH
@pytest.mark.parametrize("ssl", ["none", "vibcreg"])
def test_training(ssl, current):
    x, y = waves(41)
    options = {"ssl": ssl, "quiet": True, "stage1_epochs": 12, "stage2_epochs": 12, **SMALL}
    states, before = [], torch.cuda.get_rng_state_all()
    with torch.cuda.device(current):
        for device in (FIRST, SECOND):
            model = ncfast.fit(x, y, device=device, **options)
            states.append([*model.vqvae.state_dict().values(), *model.prior.state_dict().values()])
    assert equal(*states)
    assert equal(before, torch.cuda.get_rng_state_all())  # training draws nothing from the caller's generators


def test_evaluation(run, tmp_path):
    x, y = waves(41)
    dataset = from_arrays(x, y, x[:20], y[:20])
    results = [
        evaluate(ncfast.load(run, device), dataset, seeds=[0], num_samples=50, cache=tmp_path / device[-1], quiet=True)
        for device in (FIRST, SECOND)
    ]
    figures = [[figure["value"] for figure in result["measures"]] for result in results]
    assert figures[0] == figures[1]


def program(name, *arguments, processes=1, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "-m", f"ncfast.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def generated(run, out, *arguments, **options):
    """Columns of a job of 20,000 series."""
    result = program("generate", "--run-dir", run, "--num-samples", 20_000, "--out", out, *arguments, **options)
    assert result.returncode == 0, result.stderr
    with h5py.File(out) as file:
        return {name: file[name][:] for name in file}


def test_jobs_write_what_the_first_gpu_draws(run, tmp_path):
    expected = generated(run, tmp_path / "first.h5", "--device", FIRST)
    assert np.isfinite(expected["x"]).all() and not (expected["x"] == 0).all((1, 2)).any()
    for name, found in {
        "second": generated(run, tmp_path / "second.h5", "--device", SECOND),
        "both": generated(run, tmp_path / "both.h5", processes=2),
    }.items():
        assert found.keys() == expected.keys()
        for column in expected:
            assert np.array_equal(found[column], expected[column]), (name, column)


def train_all(rank, folder):
    """On each of two processes: every SSL method twice, and once with and without a CUDA graph."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    device = torch.device("cuda", rank)
    results = {ssl: [trained(ssl, 41, torch.float32, device=device) for _ in range(2)] for ssl in METHODS}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that a step could not be captured
        results["graph"] = [
            trained("vibcreg", 41, torch.float32, device=device, steps=120, graph=graph) for graph in (True, False)
        ]
    torch.save(results, f"{folder}/{rank}.pt")
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(train_all, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_equal_states(a, b):
    for stage in (1, 2):
        for name, value in a[stage].items():
            assert torch.equal(value, b[stage][name]), (stage, name)


@pytest.mark.parametrize("ssl", METHODS)
def test_two_processes_train_the_model_of_one(ranks, ssl):
    (first, again), (other, _) = ranks[0][ssl], ranks[1][ssl]
    assert_equal_states(first, again)
    assert_equal_states(first, other)
    assert_close_states(first, trained(ssl, 41, torch.float32, device=torch.device(FIRST)), 1e-5, 1e-4)


def test_a_graph_of_two_processes_takes_the_same_steps(ranks):
    assert_equal_states(*ranks[0]["graph"])


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "waves.npz"
    x, y = waves(41)
    np.savez(path, X_train=x, y_train=y, X_test=x[:10], y_test=y[:10])
    return path


def test_a_killed_process_ends_both_and_one_gpu_continues(data_file, tmp_path):
    out = tmp_path / "run"
    arguments = [*train_arguments(data_file, out), "--stage1-epochs", 3000, "--checkpoint-every", 1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "ncfast.train", *map(str, arguments)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not ((out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 50):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"ncfast.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--resume" in lines[0], errors
    epochs = len((out / "log.jsonl").read_text().splitlines())
    result = program("train", *arguments, "--resume")
    assert result.returncode == 0, result.stderr
    assert len((out / "log.jsonl").read_text().splitlines()) > epochs
