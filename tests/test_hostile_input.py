"""Bad input, at every door: one line that says what, where and what to do; exit code 2; nothing good is lost."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from runs import FLAGS, SMALL, save_run, waves

import ncfast
from ncfast import generate, info, ops, train
from ncfast.cli import parser as cli
from ncfast.engine import lock
from ncfast.engine.logging import RunLog
from ncfast.engine.memory import exhaustion_explained
from ncfast.jobs import writer
from ncfast.ops import dispatch
from ncfast.training import fit as training

OPTIONS = {**SMALL, "stage1_epochs": 1, "stage2_epochs": 1, "quiet": True}
X, Y = waves(12, 32)
TRAIN = [*FLAGS, "--stage1-epochs=1", "--stage2-epochs=1"]
HUGE = 10**400
NAN, INF = float("nan"), float("inf")


class Evil:
    """Unpickled, it makes a folder where it stands."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "waves", refiner="flow")


@pytest.fixture(scope="module")
def model(run):
    return ncfast.load(run)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for variable in ("NCFAST_DATA", "AEON_DATA"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    yield
    assert not (tmp_path / "here" / "pwned").exists(), "code from a file was run"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refusal(capsys, main, *arguments):
    """What a program, run in this process, says before it exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit, mock.patch.object(cli, "end", sys.exit):
        cli.run(lambda: main([str(argument) for argument in arguments]))
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert exit.value.code == 2
    lines = [line for line in told if line and "%|" not in line]  # without progress bars
    assert len(lines) == 1 and lines[0].startswith("error: "), told
    return told[-1]


def data_file(folder):
    np.savez(folder / "waves.npz", X_train=X, y_train=Y)
    return folder / "waves.npz"


# Functions.


@pytest.mark.parametrize(
    ("series", "labels", "message"),
    [
        (X * NAN, Y, "hold nothing but NaN"),
        (np.where(np.arange(12)[:, None, None] == 5, NAN, X), Y, "hold nothing but NaN"),
        (X * INF, Y, "hold an infinity"),
        (X.astype(np.float64) * 1e300, Y, "beyond float32"),
        (X * 0 + 3, Y, "nothing to learn in constant data"),
        (X[:0], Y[:0], "no series"),
        (X[:, :, :0], Y, "no series"),
        (X[:1], Y[:1], "needs at least 2"),
        (X[:, :, :5], Y, "at least 8 samples"),
        (X[:, :, :3], Y, "n_fft"),
        (X[0, 0], Y, "got the shape [32]"),
        (X[None], Y, "got the shape"),
        (X.astype(object), Y, "real numbers; got object"),
        (X.astype(str), Y, "real numbers; got <U"),
        (X * 1j, Y, "real numbers; got complex"),
        ([[1.0], [1.0, 2.0]], None, "n_fft"),
        ([[1.0, 2.0], []], None, "hold nothing but NaN"),
        ([np.ones((2, 9)), np.ones((3, 8))], None, "unequal numbers of channels"),
        (None, None, "got the shape []"),
        ({"a": 1}, None, "got the shape []"),
        (torch.eye(12).to_sparse(), None, "expected an array"),
        (X, Y[:5], "12 series need 12 labels"),
        (X, np.zeros((12, 3)), "12 series need 12 labels"),
        (X, np.full(12, NAN), "is missing"),
        (X, [None, *Y[1:]], "label 0"),
        (X, np.linspace(0, 1, 12), "targets of a regression"),
    ],
)
def test_fit_refuses_data(series, labels, message):
    with pytest.raises(ncfast.UserError) as error:
        ncfast.fit(series, labels, **OPTIONS)
    assert message in str(error.value)


@pytest.mark.parametrize("scale", [1e30, 3e37, 1e-30, 1e-44])
def test_numbers_of_any_size_train(scale):
    series = (X * scale).astype(np.float32)
    model = ncfast.fit(series, Y, **OPTIONS)
    assert np.isfinite(model.sample(3)[0]).all() and np.isfinite(model.reconstruct(series)).all()


def test_one_series_and_one_class_train():
    assert ncfast.fit(X[:1], Y[:1], **{**OPTIONS, "ssl": "none"}).sample(2)[1].tolist() == [Y[0]] * 2
    assert ncfast.fit(X, np.full(12, b"\xff"), **OPTIONS).class_names == ("\\xff",)


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0},
        {"dim": 10**9},
        {"dim": 2**16},
        {"projector_dim": 2**20},
        {"prior_dim": 2**16},
        {"prior_layers": 10**9},
        {"residual_blocks": 10**9},
        {"codebook_size": 10**9},
        {"n_fft": 10**6},
        {"n_fft": 6},
        {"batch_size": "a"},
        {"batch_size": 1.5},
        {"stage1_epochs": -1},
        {"stage2_epochs": 10**18},
        {"stage1_steps": 10**18, "stage1_epochs": None},
        {"learning_rate": INF},
        {"weight_decay": HUGE},
        {"weight_decay": "1"},
        {"ssl_weight": NAN},
        {"seed": -1},
        {"seed": 2**63},
        {"augment": 5},
        {"augment": None},
        {"augment": ("nope",)},
        {"augment": ("warp:9",)},
        {"ssl": 5},
        {"ssl": ["vicreg"]},
        {"precision": "fp8"},
        {"device": "tpu"},
        {"device": None},
        {"preset": "none"},
        {"dims": 3},
    ],
    ids=str,
)
def test_fit_refuses_options(options):
    with pytest.raises(ncfast.UserError, match=next(iter(options)).replace("_", ".") + "|memory|augment|learning.rate"):
        ncfast.fit(X, Y, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2.5}, "n is an integer"),
        ({"n": "a"}, "n is an integer"),
        ({"n": 10**30}, "n is an integer"),
        ({"n": 10**15}, "of memory"),
        ({"n": 3, "seed": 2.5}, "seed is an integer"),
        ({"n": 3, "seed": -1}, "seed is an integer"),
        ({"n": 3, "start": 2**70}, "start is an integer"),
        ({"n": 3, "start": 2**62 - 1}, "last index"),
        ({"n": 3, "labels": {"fast": 10**30}}, "2**62"),
        ({"n": 3, "labels": {"fast": 1.5}}, "is an integer"),
        ({"n": 3, "labels": []}, "no class"),
        ({"n": 3, "labels": 7}, "no class '7'"),
        ({"n": 3, "labels": np.array([["fast"]])}, "no class"),
        ({"n": 3, "top_k": 10**30}, "--top-k"),
        ({"n": 3, "temperature": NAN}, "--temperature"),
        ({"n": 3, "guidance_scale": HUGE}, "--guidance-scale"),
        ({"n": 3, "decoding_steps": 10**9}, "--decoding-steps"),
        ({"n": 3, "context": "abc"}, "real numbers"),
        ({"n": 3, "context": np.full(21, "a")}, "real numbers"),
        ({"n": 3, "context": np.ones(21) * 1j}, "real numbers"),
        ({"n": 3, "context": np.full(21, 1e300)}, "beyond float32"),
        ({"n": 3, "context": np.ones(5)}, "context is"),
        ({"n": 3, "context": [[1, 2], [3]]}, "unequal lengths"),
        ({"n": 3, "context": np.ones(21), "mask": "x"}, "mask is bool"),
        ({"n": 3, "context": np.ones(21), "mask": np.ones((0, 21), bool)}, "mask has the shape"),
        ({"n": 3, "context": np.full(21, NAN), "mask": np.ones(21, bool)}, "NaN or infinity"),
        ({"n": 3, "mask": np.ones(21, bool)}, "give the context"),
    ],
    ids=str,
)
def test_sampling_refuses(arguments, message, model):
    with pytest.raises(ncfast.UserError) as error:
        model.sample(**arguments)
    assert message in str(error.value)


def test_batches_reconstruct_decode_and_save_refuse(model, run, tmp_path):
    series = np.ones((2, 1, 21), np.float32)
    tokens = np.zeros((2, model.prior.num_tokens), np.int64)
    before = contents(run)
    for call in (
        *(lambda size=size: model.sample_batches(3, batch_size=size) for size in (0, -1, 2.5, "a", 10**30)),
        *(
            lambda x=x: model.reconstruct(x)
            for x in (series * NAN, series * INF, series[..., :5], series[:0], series.astype(str), series * 1j, 5, None)
        ),
        *(
            lambda t=t: model.decode(t)
            for t in (tokens - 1, tokens + 8, tokens * 1.0, tokens[0], tokens[:, :3], tokens.astype(object), "a", None)
        ),
        lambda: model.decode(np.full_like(tokens, 2**64 - 1, dtype=np.uint64)),
        lambda: model.decode([[1], [1, 2]]),
        lambda: model.reconstruct([[1], [1, 2]]),
        lambda: model.save(run / "config.json"),
        lambda: model.save("/proc/none"),
        lambda: model.save("a" * 5000),
    ):
        with pytest.raises(ncfast.UserError):
            call()
    assert contents(run) == before


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "", None])
def test_load_refuses_devices(device, run):
    with pytest.raises(ncfast.UserError, match="cannot be used"):
        ncfast.load(run, device)


# Runs that are damaged.


def damage_config(*path, value):
    def change(data):
        content = place = json.loads(data)
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
        return json.dumps(content).encode()

    return change


def damage_tensors(function):
    return lambda data: safetensors.torch.save({k: function(v) for k, v in safetensors.torch.load(data).items()})


DAMAGE = {
    "nothing": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "garbage": lambda data: bytes(range(256)) * 4,
    "pickle": lambda data: pickle.dumps(Evil()),
}
DAMAGED_CONFIG = {
    **DAMAGE,
    "list": lambda data: b"[]",
    "null": lambda data: b"null",
    "deep": lambda data: b"[" * 100_000,
    "digits": lambda data: b"9" * 5000,
    **{
        f"{'.'.join(path)} {str(value)[:20]}": damage_config(*path, value=value)
        for path, values in {
            ("format",): (2, "x", None),
            ("config",): ([], 5),
            ("config", "dim"): ("a", 5, 10**9, 2**16, HUGE, None),
            ("config", "n_fft"): (10, 10**6),
            ("config", "codebook_levels"): (0, 2),
            ("config", "refiner"): ("x", None),
            ("config", "refiner_dim"): (0, 5, 2**8),
            ("config", "prior_layers"): (10**9,),
            ("config", "weight_decay"): (HUGE, NAN),
            ("config", "unknown"): (1,),
            ("data",): ([], {}),
            ("data", "length"): (0, -5, 3, 24, "a", 10**12, 10**30),
            ("data", "channels"): (0, 2, 10**9),
            ("data", "mean"): ([], 5, ["a"], [NAN], [1e300]),
            ("data", "std"): ([0], [-1], [1e300], [HUGE]),
            ("data", "class_names"): ("ab", ["a"], [1, 2], 5),
            ("data", "class_counts"): ([1], ["a", "b"], [0, 0], [-5, 1], [HUGE, 1]),
            ("data", "num_series"): ("x", -1),
            ("data", "conditions"): (5, "ab", [5], [{}], [{"name": "age"}]),
        }.items()
        for value in values
    },
}
DAMAGED_TENSORS = {
    **DAMAGE,
    "header": lambda data: b"\xff" * 8 + data[8:],
    "NaN": damage_tensors(lambda v: v * NAN),
    "shapes": damage_tensors(lambda v: v[None].contiguous()),
    "names": lambda data: safetensors.torch.save({"other": torch.ones(3)}),
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *(("config.json", damage) for damage in DAMAGED_CONFIG),
        *((f"stage{k}.safetensors", damage) for k in (1, 2, 3) for damage in DAMAGED_TENSORS),
    ],
)
def test_a_damaged_run_is_one_line(file, damage, run, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / "broken")
    change = (DAMAGED_CONFIG if file == "config.json" else DAMAGED_TENSORS)[damage]
    (broken / file).write_bytes(change((broken / file).read_bytes()))
    before = contents(broken)
    with pytest.raises(ncfast.UserError, match="config.json|safetensors") as error:
        ncfast.load(broken)
    line = refusal(capsys, generate.main, "--run", broken, "--num-samples", 3, "--out", tmp_path / "x.h5")
    assert line == f"error: {error.value}"
    assert contents(broken) == before and not (tmp_path / "x.h5").exists()


def test_weights_too_large_to_draw_with_are_told(run, tmp_path, capsys):
    broken = shutil.copytree(run, tmp_path / "broken")
    path = broken / "stage1.safetensors"
    path.write_bytes(damage_tensors(lambda v: v * 0 + 3e38 if v.is_floating_point() else v)(path.read_bytes()))
    line = refusal(capsys, generate.main, "--run", broken, "--num-samples", 3, "--out", tmp_path / "x.h5")
    assert "not finite" in line and not (tmp_path / "x.h5").exists()


# Data files.


def hdf5(fill):
    def write(path):
        with h5py.File(path, "w") as file:
            fill(file)

    return write


def npy_of_shape(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00v\x00" + header.encode() + b"0" * 99


def text(x):
    return "\n".join(f"1\t{a}\t{b}" for a, b in x).encode()


FILES = {
    "empty.npz": b"",
    "garbage.npz": bytes(range(256)),
    "half.npz": lambda path: path.write_bytes(data_file(path.parent).read_bytes()[:-600]),
    "keys.npz": lambda path: np.savez(path, a=X),
    "pickle.npz": lambda path: np.savez(path, X_train=np.array([Evil()], object)),
    "labels.npz": lambda path: np.savez(path, X_train=X, y_train=np.array([Evil()] * 12, object)),
    "pickle.npy": lambda path: np.save(path, np.array([Evil()], object), allow_pickle=True),
    "bare.npy": pickle.dumps(Evil()),
    "promise.npy": npy_of_shape((10**12, 1000)),
    "short.npy": npy_of_shape((10, 1000)),
    "half.h5": lambda path: (hdf5(lambda f: f.create_dataset("X", data=X))(path), os.truncate(path, 2500)),
    "garbage.h5": bytes(range(256)),
    "promise.h5": hdf5(lambda f: f.create_dataset("X", (10**9, 10**4), "f4", chunks=(1, 1000))),
    "group.h5": hdf5(lambda f: f.create_group("X")),
    "null.h5": hdf5(lambda f: f.create_dataset("X", data=h5py.Empty("f4"))),
    "link.h5": hdf5(lambda f: f.__setitem__("X", h5py.ExternalLink("none.h5", "x"))),
    "ragged.h5": hdf5(lambda f: f.create_dataset("X", (3,), h5py.vlen_dtype("f4"))),
    "compound.h5": hdf5(lambda f: f.create_dataset("X", data=np.zeros((3, 9), [("a", "f4")]))),
    "garbage.tsv": bytes(range(256)),
    "words.tsv": text([("a", "b"), ("c", "d")]),
    "nan.tsv": text([("nan", "nan"), (2, 3)]),
    "large.tsv": text([(1, "1e999"), (2, 3)]),
    "ragged.csv": b"5,2\n1,2,3\n",
    "nul.csv": b"\0" * 100,
    "empty.ts": b"",
    "data.ts": b"@data\n\n",
    "data.txt": b"1",
}


@pytest.mark.parametrize("name", FILES)
def test_training_refuses_files(name, tmp_path, capsys):
    path = tmp_path / name
    FILES[name](path) if callable(FILES[name]) else path.write_bytes(FILES[name])
    before = path.read_bytes()
    line = refusal(capsys, train.main, "--dataset", path, "--out", tmp_path / "run", *TRAIN)
    assert str(path) in line
    assert path.read_bytes() == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage", ["nothing", "half", "garbage", "pickle", "another file", "foreign", "no tokens", "a folder"]
)
def test_open_generated_refuses(damage, run, tmp_path):
    path = tmp_path / "x.h5"
    generate.main(["--run", str(run), "--num-samples", "9", "--out", str(path)])
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    elif damage == "another file":
        hdf5(lambda f: f.create_dataset("x", data=X))(path)
    elif damage == "foreign":
        hdf5(lambda f: (f.attrs.update(complete=True), f.create_group("tokens")))(path)
    elif damage == "no tokens":
        with h5py.File(path, "r+") as file:
            del file["tokens"]
    else:
        path = tmp_path
    with pytest.raises(ncfast.UserError, match=path.name):
        ncfast.open_generated(path)


# Programs: flags, folders, full disks.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--num-samples", "0"], "--num-samples"),
        (["--num-samples", "1.5"], "--num-samples"),
        (["--num-samples", 10**15, "--num-shards", 9], "free"),
        (["--num-samples", 10**15, "--compression", "lzf", "--num-shards", 9], "free"),
        (["--num-samples", 10**30], "--num-samples"),
        (["--num-shards", 10**9], "--num-shards"),
        (["--seed", "-1"], "--seed"),
        (["--temperature", "nan"], "--temperature"),
        (["--labels", "other"], "no class 'other'"),
        (["--labels", "fast:" + "9" * 30], "2**62"),
        (["--condition", "age"], "NAME=VALUE"),
        (["--condition", "age=63"], "trained without conditions"),
        (["--condition-file", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--condition-file", "/proc/self/mem.json"], "cannot be read"),
        (["--condition-file", "kept"], "--condition-file is"),
        (["--device", "tpu"], "--device tpu"),
        (["--run", "a" * 5000], "no config.json|too long"),
        (["--run", "nowhere"], "not the folder of a run"),
        (["--out", "a" * 300 + ".h5"], "too long"),
        (["--out", "nowhere/x.h5"], "does not exist"),
        (["--out", "/proc/x.h5"], "/proc"),
        (["--out", "kept"], "--out"),
        (["--out", "kept", "--overwrite"], "--overwrite leaves it"),
        (["--no-such-flag"], "--help"),
    ],
    ids=str,
)
def test_generating_refuses(flags, message, run, capsys):
    Path("kept").write_text("of the user")
    line = refusal(capsys, generate.main, "--run", run, "--num-samples", 3, "--out", "x.h5", *flags)
    assert any(part in line for part in message.split("|"))
    assert contents(".") == {Path("kept"): b"of the user"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage1-epochs", "-1"], "--stage1-epochs"),
        (["--seed", "-1"], "--seed"),
        (["--learning-rate", "inf"], "--learning-rate"),
        (["--codebook-size", 10**9], "--codebook-size"),
        (["--dim", "0"], "--dim"),
        (["--dim", 2**16], "lower --dim"),
        (["--projector-dim", 2**20, "--dry-run"], "--projector-dim"),
        (["--n-fft", 10**6], "--n-fft"),
        (["--checkpoint-every", "0"], "--checkpoint-every"),
        (["--device", "tpu"], "--device tpu"),
        (["--out", "kept"], "kept"),
        (["--out", "kept/x"], "kept"),
        (["--out", "/proc/x"], "/proc/x"),
        (["--out", "/sys/x"], "/sys/x"),
        (["--out", "a" * 300], "too long"),
        (["--data-dir", "nowhere", "--dataset", "Name"], "nowhere"),
        (["--dataset", ""], "empty"),
        (["--condition-columns", "age"], "age is none of"),
        (["--dataset", "b" * 5000 + "/x"], "too long"),
    ],
    ids=str,
)
def test_training_refuses_flags(flags, message, tmp_path, capsys):
    Path("kept").write_text("of the user")
    line = refusal(capsys, train.main, "--dataset", data_file(tmp_path), "--out", "run", *TRAIN, *flags)
    assert message in line
    assert contents(".") == {Path("kept"): b"of the user"} and not Path("run").exists()


def test_a_batch_of_everything_is_no_mistake(run, tmp_path):
    arguments = ["--run", run, "--num-samples", 3, "--out", tmp_path / "x.h5", "--batch-size", 10**12]
    generate.main([str(argument) for argument in arguments])
    ncfast.fit(X, Y, **{**OPTIONS, "batch_size": 10**12})


def test_info_refuses(capsys):
    assert "--device tpu" in refusal(capsys, info.main, "--device", "tpu")
    assert "--help" in refusal(capsys, info.main, "more")


def test_out_of_memory_is_one_line_and_a_bug_is_not():
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    libraries = [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("NCCL error: ... Last error:\nCuda failure 2 'out of memory'"),
    ]
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), cpu, *libraries):
        with pytest.raises(ncfast.UserError, match="out of memory; lower --dim"), exhaustion_explained("lower --dim"):
            raise error
    for bug in (
        RuntimeError("shapes differ"),
        RuntimeError("CUBLAS_STATUS_INVALID_VALUE"),
        TypeError("x"),
        OSError("no file is named"),
    ):
        with pytest.raises(type(bug)):
            cli.run(lambda bug=bug: exhaustion_explained("")(raised)(bug))


@pytest.mark.parametrize(("error", "code"), [("KeyboardInterrupt", 130), ("UserError('it is')", 2)])
def test_a_program_that_is_stopped_takes_nothing_down(error, code):
    """A thread that is inside a library's C++ while the interpreter goes aborts the process: exit code -6."""
    program = f"""
import atexit
from ncfast.cli.parser import run
from ncfast.errors import UserError
def main():
    raise {error}
atexit.register(print, "taken down")
run(main)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "")
    assert len(result.stderr.splitlines()) == 1


def raised(error):
    raise error


# Runs that go on, and what happens to their folder meanwhile.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A data file and a run folder whose training was interrupted after the first stage."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = ["--dataset", str(data_file(folder)), "--out", str(folder / "run"), *TRAIN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "new_prior", lambda *_: raised(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)
    assert (folder / "run" / "state.pt").exists()
    return folder


@pytest.fixture
def resumed(stopped, tmp_path):
    """A copy of the folder, and the command that goes on in it."""
    folder = shutil.copytree(stopped, tmp_path / "stopped")
    return folder / "run", ["--dataset", folder / "waves.npz", "--out", folder / "run", *TRAIN, "--resume"]


def state_with(**changes):
    def change(data):
        Path("state.pt").write_bytes(data)
        state = torch.load("state.pt", weights_only=True)
        torch.save({**state, **changes}, "state.pt")
        data = Path("state.pt").read_bytes()
        Path("state.pt").unlink()
        return data

    return change


DAMAGED_STATE = {
    **DAMAGE,
    "zipped pickle": lambda data: (torch.save({"stage": Evil()}, "s"), Path("s").read_bytes(), Path("s").unlink())[1],
    "no state": lambda data: (torch.save({"a": 1}, "s"), Path("s").read_bytes(), Path("s").unlink())[1],
    "another run": state_with(run="0" * 64),
    "modules": state_with(modules={}),
    "shapes": state_with(modules={"vqvae.encoder.0.0.weight": torch.ones(3)}),
    "optimizer": state_with(optimizer=5),
    "epoch": state_with(epoch="x"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATE)
def test_a_damaged_state_is_one_line(damage, resumed, capsys):
    folder, command = resumed
    path = folder / "state.pt"
    path.write_bytes(DAMAGED_STATE[damage](path.read_bytes()))
    before = contents(folder)
    assert "state.pt" in refusal(capsys, train.main, *command)
    after = {name: data for name, data in contents(folder).items() if "tb" not in name.parts}
    assert after == {name: data for name, data in before.items() if "tb" not in name.parts}


@pytest.mark.parametrize("file", ["config.json", "metrics.json", "log.jsonl"])
def test_other_damaged_files_of_a_run(file, resumed, capsys):
    folder, command = resumed
    (folder / file).write_bytes(b"\xff\xfe 1\n[5]\n{}\n")
    if file == "log.jsonl":  # of which whole lines are kept, and nothing depends on them
        train.main([str(argument) for argument in command])
        assert [json.loads(line)["stage"] for line in (folder / file).read_text().splitlines()] == [2]
        return
    before = contents(folder)
    assert file in refusal(capsys, train.main, *command)
    assert contents(folder) == before


def test_a_second_training_in_one_folder_is_refused(tmp_path, capsys):
    arguments = ["--dataset", data_file(tmp_path), "--out", tmp_path / "run", *TRAIN]
    with lock.sole_writer(tmp_path / "run"):
        before = contents(tmp_path / "run")
        for more in ([], ["--resume"]):
            assert f"process {os.getpid()} on " in refusal(capsys, train.main, *arguments, *more)
        with pytest.raises(ncfast.UserError, match="another process"):
            ncfast.fit(X, Y, out=tmp_path / "run", **OPTIONS)
        assert contents(tmp_path / "run") == before
    assert not (tmp_path / "run").exists()
    train.main([str(argument) for argument in arguments])
    assert not list((tmp_path / "run").glob(".*"))


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from ncfast.engine import lock\n"
        "with lock.sole_writer(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(ncfast.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=environment, check=False)
    assert (tmp_path / "run" / lock.NAME).exists()
    with lock.sole_writer(tmp_path / "run"):
        assert f"process {os.getpid()} on" in (tmp_path / "run" / lock.NAME).read_text()
    assert not (tmp_path / "run" / lock.NAME).exists()


def open_full_device(log):
    log.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115 - closed by the log


@pytest.mark.parametrize("when", ["log", "state", "weights"])
def test_a_full_disk_ends_a_training_in_one_line(when, resumed, capsys, monkeypatch):
    folder, command = resumed
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before = contents(folder)
    if when == "log":
        monkeypatch.setattr(RunLog, "open", open_full_device)
    elif when == "state":
        monkeypatch.setattr("ncfast.engine.checkpoint.torch.save", lambda *_: raised(full))
    else:
        monkeypatch.setattr("ncfast.engine.checkpoint.safetensors.torch.save_file", lambda *_: raised(full))
    line = refusal(capsys, train.main, *command)
    assert "No space left" in line and "free space" in line
    monkeypatch.undo()
    for name in ("config.json", "stage1.safetensors", *(["state.pt"] if when != "weights" else [])):
        assert (folder / name).read_bytes() == before[Path(name)], name
    train.main([str(argument) for argument in command])
    assert (folder / "stage2.safetensors").exists()


def test_a_folder_that_vanishes_ends_the_job_in_one_line(run, resumed, tmp_path, capsys, monkeypatch):
    folder, command = resumed
    new_prior = training.new_prior
    monkeypatch.setattr(training, "new_prior", lambda *a: (shutil.rmtree(folder), new_prior(*a))[1])
    assert f"cannot write {folder}" in refusal(capsys, train.main, *command)

    out = tmp_path / "out"
    out.mkdir()
    write = writer.ShardWriter.write
    monkeypatch.setattr(writer.ShardWriter, "write", lambda *a: (write(*a), shutil.rmtree(out, ignore_errors=True)))
    line = refusal(capsys, generate.main, "--run", run, "--num-samples", 9, "--out", out / "x.h5")
    assert "cannot write" in line and str(out) in line


# Operations and modules. What is out of range, where that is defined, is skipped: see the operations' docstrings.


def call_unmask_step(**changes):
    arguments = {"logits": torch.randn(2, 5, 7), "tokens": torch.full((2, 5), 7), "sample": torch.arange(2)}
    return ops.unmask_step(**{**arguments, "seed": 1, "step": 0, "num_masked": 2, **changes})


Z, CODES, INDEX = torch.randn(6, 4), torch.randn(3, 4), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.nearest_code(Z, CODES[:, :3]),
        lambda: ops.nearest_code(Z, CODES[:0]),
        lambda: ops.nearest_code(Z.int(), CODES),
        lambda: ops.nearest_code(Z * 1j, CODES),
        lambda: ops.nearest_code(Z.to("meta"), CODES),
        lambda: ops.code_stats(Z, INDEX[:5], 3),
        lambda: ops.code_stats(Z, INDEX.int(), 3),
        lambda: ops.code_stats(Z, INDEX, -1),
        lambda: ops.rotate_to_code(Z, CODES, INDEX[:, None]),
        lambda: ops.rotate_to_code(Z, CODES, INDEX.float()),
        lambda: call_unmask_step(tokens=torch.full((2, 4), 7)),
        lambda: call_unmask_step(tokens=torch.full((2, 5), 7.0)),
        lambda: call_unmask_step(sample=torch.arange(3)),
        lambda: call_unmask_step(positions=torch.zeros(2, 9, dtype=torch.int64)),
        lambda: call_unmask_step(num_masked=-1),
        lambda: call_unmask_step(width=-1),
        lambda: call_unmask_step(step=2**40),
        lambda: call_unmask_step(logits=torch.randn(2, 5, 0)),
        lambda: ops.masked_attention(torch.randn(2, 5, 2, 8)),
        lambda: ops.masked_attention(torch.randn(2, 5, 3, 2, 8), lengths=torch.tensor([1])),
        lambda: ops.iter_norm(torch.randn(8, 6), groups=0),
        lambda: ops.vicreg_loss(torch.randn(1, 6), torch.randn(1, 6)),
        lambda: ops.vibcreg_loss(torch.randn(8, 6), torch.randn(4, 6)),
        lambda: ops.barlow_twins_loss(torch.randn(8, 6).int(), torch.randn(8, 6).int()),
        lambda: ops.fused_linear(torch.randn(8, 6), torch.randn(3, 5)),
        lambda: ncfast.VectorQuantize(4, 5)(torch.randn(2, 5, 7)),
        lambda: ncfast.VectorQuantize(4, 5)(torch.randn(4)),
        lambda: ncfast.VectorQuantize(4, 5)(torch.ones(2, 5, 4).int()),
        lambda: ncfast.VectorQuantize(0, 5),
        lambda: ncfast.VectorQuantize(4, -5),
        lambda: ncfast.VectorQuantize(4, 5, heads=0),
    ],
)
def test_operations_refuse(call):
    with pytest.raises((ValueError, AssertionError)) as error:
        call()
    assert str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_indices_out_of_range_are_skipped(impl):
    for index in (-1, 3, 2**62, -(2**63)):
        bad = torch.full((6,), index)
        counts, sums = ops.code_stats(Z, bad, 3, impl=impl)
        assert not counts.any() and not sums.any()
        q, loss = ops.rotate_to_code(Z, CODES, bad, impl=impl)
        assert not q.any() and loss == 0
    tokens = torch.full((2, 5), 100)
    assert torch.equal(call_unmask_step(tokens=tokens, impl=impl)[0], tokens)
    positions = torch.tensor([[-5, 2**62], [-(2**63), 99]])
    out, _ = call_unmask_step(positions=positions, logits=torch.randn(2, 2, 7), impl=impl)
    assert (out == 7).all()
    lengths = ops.masked_attention(torch.ones(2, 5, 3, 2, 8), lengths=torch.tensor([99, -5]), impl=impl)
    assert lengths.isfinite().all()


@pytest.mark.skipif(dispatch.load_module("_C")[0] is None, reason="the C++ module is not built")
def test_the_compiled_module_refuses_what_numbers_can_show():
    module, _ = dispatch.load_module("_C")
    z, indices = Z.data_ptr(), INDEX.data_ptr()
    counts, sums = torch.empty(3, dtype=torch.int64), torch.empty(3, 4)
    good = [z, 0, indices, 1, 6, 3, 4, 1, counts.data_ptr(), sums.data_ptr()]
    module.code_stats(*good)
    for place, value, message in (
        (0, 0, "null pointer"),
        (2, indices + 1, "not aligned"),
        (1, 4, "element type"),
        (1, -1, "element type"),
        (4, -6, "negative size"),
        (6, -4, "negative size"),
    ):
        with pytest.raises(ValueError, match=message):
            module.code_stats(*good[:place], value, *good[place + 1 :])
    with pytest.raises(TypeError):
        module.code_stats(Z, 0, INDEX, 1, 6, 3, 4, 1, counts, sums)
    with pytest.raises(TypeError, match="expected 10 arguments; got 9"):
        module.code_stats(*good[:-1])
    for place, value in ((0, -1), (0, 2**64), (4, 2**63), (7, 2**31)):
        with pytest.raises(OverflowError):
            module.code_stats(*good[:place], value, *good[place + 1 :])
