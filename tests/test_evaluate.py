"""The program: what it reads, writes and refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import ncfast
from ncfast import evaluate as program
from ncfast.config import make_config
from ncfast.data.sources import load_dataset
from ncfast.errors import UserError
from ncfast.evaluation import fcn_cache
from ncfast.models.trained import weights_sha256
from ncfast.training.fit import resolve_config, train

pytestmark = pytest.mark.usefixtures("narrow_fcn")

SMALL = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 8,
    "prior_dim": 32,
    "prior_layers": 1,
    "prior_head_dim": 16,
    "refiner_dim": 8,
    "decoding_steps": 4,
}
QUICK = ["--fcn-epochs=1", "--num-samples=20", "--repeats=2", "--device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data.npz, and a run on it."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    x, x_test = (rng.normal(size=(n, 1, 30)).cumsum(-1).astype(np.float32) for n in (20, 15))
    np.savez(folder / "data.npz", X_train=x, y_train=np.arange(20) % 2, X_test=x_test, y_test=np.arange(15) % 2)
    dataset = load_dataset(folder / "data.npz")
    config = make_config(ssl="none", stage1_epochs=1, stage2_epochs=1, **SMALL)
    device = torch.device("cpu")
    train(resolve_config(config, dataset, device), dataset, out=folder / "run", device=device, quiet=True)
    return folder


@pytest.fixture
def evaluated(folder, tmp_path, monkeypatch):
    def evaluated(*arguments):
        command = ["evaluate", "--run", folder / "run", "--cache", tmp_path / "cache", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        program.main()

    return evaluated


def test_writes_json_report_and_table(folder, evaluated, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    evaluated(*QUICK, "--seed=5")
    result = json.loads((folder / "run" / "evaluation.json").read_text())
    assert result["seeds"] == [5, 6] and result["num_samples"] == 20 and result["evaluator"]["epochs"] == 1
    assert result["run"] == {"folder": str(folder / "run"), "weights_sha256": weights_sha256(folder / "run")}
    printed = capsys.readouterr().out
    for figure in result["measures"]:
        assert figure["value"] is not None
        assert f"{figure['metric']} " in printed and f"{figure['value']:.4g}" in printed
    assert (folder / "run" / "report.html").stat().st_size > 100_000
    assert {path.name for path in folder.joinpath("run").iterdir()} >= {"evaluation.json", "report.html"}
    assert not [path for path in folder.joinpath("run").iterdir() if path.name.endswith(".tmp")]

    # The second time the evaluator comes from the cache, and all figures are the same.
    trained = []
    monkeypatch.setattr(fcn_cache, "train_fcn", lambda *a, **k: trained.append(a))
    (tmp_path / "other").mkdir()
    evaluated(*QUICK, "--seed=5", "--no-report", "--out", tmp_path / "other")
    again = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    assert again["measures"] == result["measures"] and not trained
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["evaluation.json"]


def test_chosen_measures_of_other_data(folder, evaluated, tmp_path, capsys):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 1, 30)).astype(np.float32), np.arange(20) % 2
    np.savez(tmp_path / "other.npz", X_train=x, y_train=y, X_test=x[:9], y_test=y[:9])
    evaluated(
        "--measures=mdd,acd", "--no-report", "--repeats=1", "--out", tmp_path, "--dataset", tmp_path / "other.npz"
    )
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert [figure["metric"] for figure in result["measures"]] == ["ACD", "ACD_train", "MDD", "MDD_train"]
    assert result["dataset"]["name"] == "other" and result["num_samples"] == 9 and result["evaluator"] is None
    assert not (tmp_path / "cache").exists()
    assert "not those that the run was trained on" in capsys.readouterr().out


def test_a_run_with_conditions(folder, evaluated, tmp_path, capsys):
    """Its condition columns are taken out of its data without a word."""
    rng = np.random.default_rng(1)
    pandas = pytest.importorskip("pandas")
    for split, n in (("TRAIN", 20), ("TEST", 15)):
        samples = {f"t{i}": column for i, column in enumerate(rng.normal(size=(30, n)))}
        pandas.DataFrame({"label": ["a", "b", "a"] * 5 + ["b"] * (n - 15), "age": np.arange(n), **samples}).to_csv(
            tmp_path / f"People_{split}.csv", index=False
        )
    dataset = load_dataset(tmp_path / "People_TRAIN.csv", condition_columns="age")
    config = make_config(ssl="none", stage1_epochs=1, stage2_epochs=1, **SMALL)
    device = torch.device("cpu")
    train(resolve_config(config, dataset, device), dataset, out=tmp_path / "run", device=device, quiet=True)
    evaluated("--run", tmp_path / "run", "--measures=mdd", "--no-report", "--repeats=1")
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result["dataset"]["length"] == 30 and result["measures"][0]["value"] is not None
    assert "not those that the run was trained on" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--measures=fod"], "no measure 'fod'"),
        (["--out=/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["--run=/nowhere"], "/nowhere does not exist"),
        (["--dataset=nothing.npz"], "no file or folder 'nothing.npz'"),
        (["--device=tpu"], "--device tpu"),
    ],
)
def test_mistakes(evaluated, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluated("--no-report", *arguments)


@pytest.mark.parametrize("package, module", [("matplotlib", "matplotlib.figure"), ("scikit-learn", "sklearn")])
def test_missing_packages_are_said_before_any_work(evaluated, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("ncfast.ncvqvae.load", None)
    with pytest.raises(UserError, match=rf"report needs {package}: pip install 'ncfast\[eval\]', or add --no-report"):
        evaluated("--measures=acd")


def test_the_data_are_read_as_the_run_read_them(tmp_path, monkeypatch, capsys):
    rows = np.random.default_rng(0).normal(size=(300, 2)).cumsum(0)
    np.savetxt(tmp_path / "R.csv", rows, delimiter=",", header="a,b", comments="", fmt="%.6f")
    dataset = load_dataset(tmp_path / "R.csv", window=24, stride=8)
    config = make_config(ssl="none", stage1_epochs=1, stage2_epochs=1, **SMALL)
    train(
        resolve_config(config, dataset, torch.device("cpu")), dataset, out=tmp_path / "run", device=torch.device("cpu")
    )
    command = ["evaluate", "--run", tmp_path / "run", "--cache", tmp_path / "cache", *QUICK, "--no-report"]
    command += ["--measures", "acd"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    program.main()
    printed = capsys.readouterr().out
    assert (
        "read as the run read it: --window 24 --stride 8 --test-share 0.2" in printed and "are not those" not in printed
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--window", "24", "--stride", "12"])
    program.main()
    printed = capsys.readouterr().out
    assert "read as the run" not in printed and "are not those that the run was trained on" in printed


def test_a_run_whose_data_is_gone(folder, evaluated, monkeypatch, tmp_path):
    monkeypatch.delenv("NCFAST_DATA", raising=False)
    moved = folder / "moved"
    moved.mkdir()
    (folder / "data.npz").rename(moved / "data.npz")
    try:
        with pytest.raises(UserError, match="give --dataset"):
            evaluated("--measures=acd", "--no-report", "--out", tmp_path, "--data-dir", tmp_path)
        evaluated("--measures=acd", "--no-report", "--out", tmp_path, "--data-dir", moved)  # by its name
        assert (tmp_path / "evaluation.json").exists()
    finally:
        (moved / "data.npz").rename(folder / "data.npz")
        moved.rmdir()


def test_a_run_on_arrays_does_not_keep_them(evaluated, folder, tmp_path):
    rng = np.random.default_rng(0)
    ncfast.fit(
        rng.normal(size=(9, 30)),
        ssl="none",
        quiet=True,
        out=tmp_path / "run",
        stage1_epochs=1,
        stage2_epochs=1,
        **SMALL,
    )
    with pytest.raises(UserError, match="trained on arrays"):
        evaluated("--run", tmp_path / "run", "--no-report")


@pytest.mark.parametrize("arguments", [["--run=/nowhere", "--no-report"], ["--run=x", "--repeats=0"]])
def test_errors_are_one_line_and_exit_code_2(arguments):
    command = [sys.executable, "-m", "ncfast.evaluate", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
