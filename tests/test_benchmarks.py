"""What benchmarks/run.py collects, writes and exits with, as far as a machine without a GPU can tell."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"

GOOD = """
from common import Timing, rows

def cases(device, seconds):
    times = {"ncfast": Timing(0.002, "graph"), "slow | peer": Timing(0.006, "eager: it waits"),
             "absent": Timing(None, "not installed")}
    yield rows("7 x 8", times, "forward", mib={"ncfast": 12.4}, rate={"ncfast": 8.0},
               error={"ncfast": 3e-7, "slow | peer": 5})
"""
BAD = GOOD + "    raise ValueError('something broke')\n"
OURS_MISSING = "from common import Timing, rows\n\ndef cases(device, seconds):\n"
OURS_MISSING += "    yield rows('7', {'ncfast': Timing(None, 'no kernel'), 'peer': Timing(1.0, 'graph')})\n"
LONG = GOOD.replace("    yield", "    while not __import__('time').sleep(0.4):\n        yield")
STUCK = GOOD + "    __import__('time').sleep(600)\n"


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("run")


@pytest.fixture
def stubs(runner, monkeypatch, tmp_path):
    """stubs(name=source, ...): these are the benchmarks."""

    def make(**sources):
        for name, source in sources.items():
            (tmp_path / f"bench_{name}.py").write_text(source)
        monkeypatch.setattr(runner, "BENCHMARKS", dict.fromkeys(sources, 1))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    return make


def program(*arguments):
    command = [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_a_failed_benchmark_is_a_row_and_the_others_run(runner, stubs, tmp_path, capsys):
    stubs(bad=BAD, good=GOOD)
    out = tmp_path / "new folder" / "gpu.json"
    with pytest.raises(SystemExit) as exit:
        runner.main(["--device", "cpu", "--out", str(out)])
    assert exit.value.code == 1
    report = json.loads(out.read_text())
    peers = ["ncfast", "slow | peer", "absent"]
    assert [row.get("peer") for row in report["rows"]] == [*peers, None, *peers]
    assert report["rows"][3] == {"benchmark": "bad", "failed": "exit code 1: ValueError: something broke"}
    assert report["rows"][5]["ratio"] == pytest.approx(3.0) and report["rows"][6]["seconds"] is None
    assert report["versions"]["torch"] == torch.__version__ and report["machine"] and report["tests"] is None
    # The table is made of the JSON, and nothing is left of how they were written.
    text = out.with_suffix(".md").read_text()
    assert text == runner.markdown(report) + "\n" and text in capsys.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["gpu.json", "gpu.md"]
    assert "| good | 7 x 8 | forward | ncfast | 2 | 1.00 | 8 GFLOP/s | 12 | 3e-07 | graph |" in text
    assert r"| good | 7 x 8 | forward | slow \| peer | 6 | 3.00 | - | - | 5 | eager: it waits |" in text
    assert "| good | 7 x 8 | forward | absent | - | - | - | - | - | not installed |" in text
    assert "- failed: bad: exit code 1: ValueError: something broke" in text


def test_an_operation_of_ours_that_does_not_run_is_a_failure(runner, stubs, tmp_path):
    stubs(ours_missing=OURS_MISSING)
    with pytest.raises(SystemExit):
        runner.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert rows[-1]["failed"] == "ncfast did not run: no kernel" and rows[1]["peer"] == "peer"


@pytest.mark.slow
def test_time_is_kept(runner, stubs):
    stubs(long=LONG, stuck=STUCK)
    options = runner.make_parser().parse_args(["--device", "cpu"])
    with runner.Worker("long", options) as long, runner.Worker("stuck", options) as stuck:
        rows = long.measure(1.0, 100.0)
        assert rows[-1] == {"benchmark": "long", "note": "its time was over: not all cases"}
        assert rows[0]["peer"] == "ncfast"
        begin = time.monotonic()
        *_, absent, failed = stuck.measure(3.0, 6.0)
        assert time.monotonic() - begin < 20
        assert absent["peer"] == "absent"  # what it had measured stays
        assert failed["failed"] == "killed after 6 s; its share was 3 s"
    assert stuck.process.returncode is not None and not stuck.log.exists()


def test_a_worker_that_never_has_its_turn_is_ended(runner, stubs):
    stubs(good=GOOD)
    with runner.Worker("good", runner.make_parser().parse_args(["--device", "cpu"])) as worker:
        pass
    assert worker.process.returncode is not None


def test_shares(runner, monkeypatch):
    monkeypatch.setattr(runner, "BENCHMARKS", {"a": 1, "b": 3})
    least = runner.LEAST_SHARE
    assert runner.share(["a", "b"], 2 * least + 8) == least + 2
    assert runner.share(["b"], least + 5) == least + 5
    assert runner.share(["b"], -100.0) == least  # the time is over, but each gets its first case


def test_failed_tests_are_in_the_report(runner, tmp_path):
    (tmp_path / "x.xml").write_text(
        "<testsuite><testcase classname='a' name='b'/><testcase classname='a' name='c'><skipped/></testcase>"
        "<testcase classname='a' name='d'><failure message='assert 1 == 2&#10;more'/></testcase></testsuite>"
    )
    counted = {"passed": 0, "skipped": 0, "failed": [], "seconds": 1.0}
    runner.count_tests(runner.ElementTree.parse(tmp_path / "x.xml"), counted)
    assert counted == {"passed": 1, "skipped": 1, "failed": ["a::d: assert 1 == 2"], "seconds": 1.0}
    report = runner.provenance(runner.make_parser().parse_args(["--device", "cpu"])) | {"tests": counted}
    assert runner.failures(report) == ["test a::d: assert 1 == 2"]
    assert "GPU tests: 1 passed, 1 failed, 1 skipped in 1 s" in runner.markdown(report)


def test_every_benchmark_of_an_operation_is_in_the_list(runner):
    there = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert set(runner.BENCHMARKS) == there
    for name in there:
        assert callable(importlib.import_module(f"bench_{name}").cases)


def test_from_end_to_end(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "LEAST_SHARE", 0.01)  # one case: there is always one
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = ["unmask_step", "--seconds", "0.01", "--minutes", "0.001"]
    runner.main(["--device", "cpu", *options, "--out", str(tmp_path / "gpu.json")])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row.get("peer") for row in rows] == ["ncfast", "reference", "multinomial + topk", None]
    assert rows[0]["seconds"] > 0 and rows[0]["ratio"] == 1 and rows[0]["case"] == "256 x 75 x 32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("option", ["--check", "--tests"])
def test_without_a_gpu_it_says_so(option, tmp_path):
    done = program(option, "--out", tmp_path / "gpu.json")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: --device cuda needs an NVIDIA GPU") and done.stderr.count("\n") == 1


def test_every_benchmark_and_experiment_imports():
    """What they take from the package is there: nothing else runs them all."""
    code = "import importlib, pathlib, sys; sys.path.insert(0, 'benchmarks')\n"
    for folder, name in (("benchmarks", "path.stem"), ("experiments", "'experiments.' + path.stem")):
        code += f"for path in pathlib.Path('{folder}').glob('*.py'): path.stem == 'conftest' or "
        code += f"importlib.import_module({name})\n"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_operations_are_left_to_pytorch_by_their_names(runner):
    from ncfast.info import OPERATIONS
    from ncfast.ops import dispatch

    training = importlib.import_module("bench_training")
    names = {name for stage in training.HAND_WRITTEN.values() for each in stage.values() for name in each}
    assert names - {"adamw"} <= set(OPERATIONS)  # which the step chooses
    able = {"cpp": None, "reference": None}
    with training.left_to_pytorch(("batch_norm",)):
        assert dispatch.choose("batch_norm", "auto", able) == "reference"
        assert dispatch.choose("layer_norm", "auto", able) == "cpp"
    assert dispatch.choose("batch_norm", "auto", able) == "cpp"
