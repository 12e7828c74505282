"""macOS, Windows and file systems that lack something: what they lack is taken away here."""

import errno
import fcntl
import os
import runpy
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from runs import FLAGS, save_run, waves

import ncfast
from ncfast import generate
from ncfast.engine import checkpoint, lock
from ncfast.jobs import writer

ROOT = Path(__file__).resolve().parents[1]

# A program that never touches what Windows does not have. What is below it (PyTorch, HDF5) has its own ways there.
WINDOWS = """
import os, signal, sys, types
import h5py, numpy, safetensors.torch, torch, tqdm, torch.nn.functional, torch.optim
for name in ("fork", "fdatasync", "killpg", "getuid", "sched_getaffinity", "sysconf", "uname", "pread"):
    delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "alarm", "pause"):
    delattr(signal, name)
os.kill = None
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
sys.platform = "win32"
import ncfast
from ncfast import evaluate, generate, info, reproduce, train
program, *arguments = sys.argv[1:]
getattr(ncfast, program).main(arguments)
"""


def no_link(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.slow
def test_training_and_drawing_take_nothing_that_windows_lacks(tmp_path):
    x, y = waves()
    np.savez(tmp_path / "waves.npz", X_train=x, y_train=y)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NCFAST_IMPL": "reference"}
    run = tmp_path / "run"
    data = ["--dataset", str(tmp_path / "waves.npz"), "--stage1-epochs=1", "--stage2-epochs=1", *FLAGS]
    for program, *arguments in (
        ("train", *data, "--out", str(run)),
        ("train", *data, "--out", str(run), "--resume"),
        ("generate", "--run", str(run), "--out", str(tmp_path / "one.h5"), "--num-samples=9"),
    ):
        command = [sys.executable, "-c", WINDOWS, program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert len(ncfast.open_generated(tmp_path / "one.h5")) == 9


@pytest.mark.parametrize("lacks", ["fdatasync", "link"])
def test_a_job_without_a_system_call_is_the_same_job(tmp_path, monkeypatch, lacks):
    run = save_run(tmp_path / "run")
    arguments = ["--run", str(run), "--num-samples", "90", "--num-shards", "3", "--out"]
    generate.main([*arguments, str(tmp_path / "with.h5")])
    monkeypatch.setattr(writer, "FLUSH_BYTES", 1)
    if lacks == "link":
        monkeypatch.setattr(os, "link", no_link)
    else:
        monkeypatch.delattr(os, lacks)
    generate.main([*arguments, str(tmp_path / "without.h5")])
    a, b = (ncfast.open_generated(tmp_path / f"{name}.h5") for name in ("with", "without"))
    np.testing.assert_array_equal(a.x, b.x)
    with pytest.raises(ncfast.UserError, match="seed is 0 there and 1 here"):
        generate.main([*arguments, str(tmp_path / "without.h5"), "--seed", "1"])


def test_without_hard_links_one_process_comes_first_and_the_others_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    monkeypatch.setattr(writer, "PUT_SECONDS", 0.05)
    first, second = (tmp_path / name for name in ("first", "second"))
    first.write_text("1")
    second.write_text("2")
    path = tmp_path / "path"
    checkpoint.put_first(first, path)
    with pytest.raises(FileExistsError):
        checkpoint.put_first(second, path)
    assert path.read_text() == "1"
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(ncfast.UserError, match="empty is empty: .* remove it"):
        writer.wait_for_contents(empty)
    monkeypatch.setattr(writer, "PUT_SECONDS", 60.0)
    later = threading.Timer(0.1, empty.write_text, ["3"])
    later.start()
    writer.wait_for_contents(empty)
    later.join()


def test_what_is_flushed_may_be_written_to(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(os, "fsync", lambda file: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    checkpoint.write_json(tmp_path / "x.json", {})
    assert modes[0] == os.O_RDWR


def test_no_process_is_sent_a_signal_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "kill")
    leftover = checkpoint.temporary_path(tmp_path / "x.h5")
    leftover.touch()
    checkpoint.remove_leftovers(tmp_path / "x.h5")
    assert leftover.exists()
    os.utime(leftover, (0, 0))
    checkpoint.remove_leftovers(tmp_path / "x.h5")
    assert not leftover.exists()


def test_one_process_at_a_time_has_a_folder_on_windows(tmp_path, monkeypatch):
    def locking(descriptor, mode, count):
        assert (mode, count) == (2, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) > 2**20
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
    with lock.sole_writer(tmp_path / "run"):
        with (
            pytest.raises(ncfast.UserError, match=rf"by another process \(process {os.getpid()} on"),
            lock.sole_writer(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run" / lock.NAME).stat().st_size < 1000
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("compiler", ["cl", None])
def test_an_install_on_windows_says_why_it_has_no_kernels(monkeypatch, compiler):
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr("shutil.which", lambda name, **_: name if name == compiler else None)
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("CXX", "NCFAST_CPP"):
        monkeypatch.delenv(name, raising=False)
    fact = runpy.run_path(str(ROOT / "setup.py"))["CMakeBuild"].build_cpp(None, None)
    assert not fact["built"] and ("Visual C++" if compiler else "no C++ compiler") in fact["why"]
