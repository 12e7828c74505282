"""The paper's table: which cells there are, what is written, what is not done twice."""

import csv
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import threading

import numpy as np
import pytest
from runs import FLAGS, waves

import ncfast
from ncfast import reproduce
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.evaluation import comparison
from ncfast.jobs import reproduction as cells_module

pytestmark = pytest.mark.usefixtures("narrow_fcn")

TINY = [*FLAGS, "--stage1-epochs=3", "--stage2-epochs=4", "--fcn-epochs=2", "--decoding-steps=2"]


def cells(*arguments):
    return cells_module.make_cells(reproduce.make_parser().parse_args(["--datasets", "A", "B", *arguments]))


def test_cells_are_those_of_the_paper_and_named_ablations():
    made = cells("--seeds", "1,2")
    assert len(made) == 2 * 2 * (1 + 3 * 3)
    assert [cell.method for cell in made[:10]] == [
        "regular",
        *(f"{method}_{view}" for method in ("barlowtwins", "vibcreg", "vicreg") for view in ("gauss", "slice", "warp")),
    ]
    assert all(cell.config.stage1_epochs == 1000 and cell.config.masking == "masked" for cell in made)
    assert {cell.config.seed for cell in made[:10]} == {1}
    regular, *others = cells("--seeds", "1", "--authors-masking", "--views", "warp")[:4]
    assert regular.config.masking == "kept" and {cell.config.masking for cell in others} == {"masked"}
    every = (
        "--ablations",
        "authors-masking",
        "random-embeddings",
        "views",
        "--views",
        "warp",
        "--methods",
        "none",
        "barlow",
    )
    methods = {cell.method: cell.config for cell in cells("--seeds", "1", *every)}
    assert list(methods) == [
        "regular",
        "barlowtwins_warp",
        "regular+authors-masking",
        "regular+random-embeddings",
        "barlowtwins_warp+random-embeddings",
        "views_warp",
    ]
    assert methods["regular+authors-masking"].masking == "kept" and methods["views_warp"].ssl == "views"
    assert methods["barlowtwins_warp+random-embeddings"].embeddings == "random"


def test_methods_beside_the_papers_are_asked_for_by_name():
    made = cells("--seeds", "1", "--methods", "ntxent", "byol", "simsiam", "sigreg", "visreg", "--views", "gauss")
    names = [cell.method for cell in made[:5]]
    assert names == ["ntxent_gauss", "byol_gauss", "simsiam_gauss", "sigreg_gauss", "visreg_gauss"]
    assert [cell.config.ssl for cell in made[:5]] == [name.removesuffix("_gauss") for name in names]


def test_the_budget_is_a_share_of_the_epochs():
    config = cells("--seeds", "1")[0].config
    short = cells_module.shortened(config, 0.05)
    assert (short.stage1_epochs, short.stage2_epochs) == (50, 50)
    assert cells_module.shortened(short, 0.001).stage1_epochs == 1
    assert short.refiner_epochs is None  # the paper's have no refiner
    refined = dataclasses.replace(config, refiner="flow", refiner_epochs=200)
    assert cells_module.shortened(refined, 0.05).refiner_epochs == 10


def test_a_share_of_each_class_is_held_out():
    x, y = waves(40)
    dataset = from_arrays(x, np.where(np.arange(40) < 3, "rare", y), x[:5], y[:5])
    held = cells_module.hold_out(dataset, 0.25)
    assert len(held.X_train) + len(held.X_test) == 40
    both = np.concatenate([held.X_train, held.X_test])[:, 0]
    assert {row.tobytes() for row in both} == {row.tobytes() for row in x[:, 0]}
    counts = np.bincount(dataset.y_train)
    assert np.bincount(held.y_test).tolist() == [max(1, round(count / 4)) for count in counts]
    assert "held out" in held.notes[-1]


def test_what_is_held_out_keeps_its_conditions_and_lengths():
    x, y = waves(40)
    ends = 40 + np.arange(40) % 21
    listed = [series[:, :end] for series, end in zip(x, ends, strict=True)]
    dataset = from_arrays(listed, y, conditions={"end": ends})
    held = cells_module.hold_out(dataset, 0.25)
    for rows, lengths in (
        (held.conditions_train, held.lengths_train),
        (held.conditions_test, held.lengths_test),
    ):
        assert rows[:, 0].tolist() == lengths.tolist()
    assert DataStats.of(held).num_series == len(held.conditions_train) == 30


def test_the_authors_means_are_those_of_their_tables():
    means = comparison.authors()
    assert len({key[0] for key in means}) == 13 and len({key[1] for key in means}) == 7
    assert means["FordA", "regular", "FID"] == (pytest.approx(5.149, abs=1e-3), pytest.approx(3.065, abs=1e-3))
    assert means["ECG5000", "barlowtwins_warp", "knn_accuracy"][0] == pytest.approx(0.855, abs=5e-4)
    assert means["Symbols", "vibcreg_slice", "CAS"][0] == pytest.approx(0.974, abs=5e-4)


def test_the_table_has_means_and_differences():
    def row(method, run, value, metric="FID"):
        return dict(zip(comparison.COLUMNS, ("ECG5000", "stage2", method, run, metric, value), strict=True))

    rows = [row("regular", "seed1", 1.5), row("regular", "seed2", 2.5), row("vicreg_warp", "seed1", 1.0)]
    data = {"ECG5000": {"train": 500, "test": 4499, "notes": ["one row is missing"]}}
    page = comparison.as_markdown(rows, data, ["a head"])
    assert "| ECG5000 | regular | 2 ± 0.71 | 2 | 1.617 ± 0.062 | +0.383 |" in page
    assert "| ECG5000 | vicreg_warp | **1** | 1 |  |  |" in page
    assert "500 train, 4499 test series; one row is missing" in page and "CAS" not in page.split("##")[1]


@pytest.mark.slow
def test_from_end_to_end_and_again(tmp_path, capsys):
    x, y = waves(60)
    data = tmp_path / "Waves.npz"
    np.savez(data, X_train=x[:40], y_train=y[:40], X_test=x[40:], y_test=y[40:])
    out = tmp_path / "table"
    arguments = ["--datasets", data, "--methods", "none", "vicreg", "--views", "warp", "--seeds", "1,2", "--out", out]
    arguments += ["--cache", tmp_path / "cache", *TINY]
    arguments = list(map(str, arguments))
    reproduce.main(arguments)
    first = (out / "results.csv").read_text()
    rows = list(csv.DictReader(first.splitlines()))
    assert list(rows[0]) == list(comparison.COLUMNS)
    assert {(row["method"], row["run_id"]) for row in rows} == {
        (method, f"seed{seed}") for method in ("regular", "vicreg_warp") for seed in (1, 2)
    }
    assert {"FID", "IS_mean", "CAS", "knn_accuracy", "svm_accuracy", "training_time", "ACD"} <= {
        r["metric"] for r in rows
    }
    fids = [float(row["value"]) for row in rows if row["metric"] == "FID" and row["method"] == "regular"]
    assert f"{statistics.fmean(fids):.4g} ± {statistics.stdev(fids):.2g}" in (out / "table.md").read_text()
    folders = [out / "Waves" / method / f"seed{seed}" for method in ("regular", "vicreg_warp") for seed in (1, 2)]
    assert all((folder / "evaluation.json").exists() and not (folder / "state.pt").exists() for folder in folders)
    assert ncfast.load(folders[3]).config.augment == ("warp",)
    # One that is lost is made again, the same; the others are not touched.
    before = [(folder / "evaluation.json").stat().st_mtime_ns for folder in folders]
    lost = json.loads((folders[2] / "evaluation.json").read_text())
    for file in folders[2].iterdir():
        if file.is_file():
            file.unlink()
    reproduce.main(arguments)
    assert [(f / "evaluation.json").stat().st_mtime_ns == time for f, time in zip(folders, before, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    again = json.loads((folders[2] / "evaluation.json").read_text())
    assert [figure["value"] for figure in again["measures"]] == [figure["value"] for figure in lost["measures"]]
    # Where only the figures are lost, nothing is trained.
    weights = folders[2] / "stage2.safetensors"
    written = weights.stat().st_mtime_ns
    (folders[2] / "evaluation.json").unlink()
    reproduce.main(arguments)
    assert weights.stat().st_mtime_ns == written
    again = json.loads((folders[2] / "evaluation.json").read_text())
    assert [figure["value"] for figure in again["measures"]] == [figure["value"] for figure in lost["measures"]]
    # Other options in the same folder: the run is refused, by name, and what is there stays.
    with pytest.raises(ncfast.UserError, match="cells failed, the first: .*regular/seed1"):
        reproduce.main([*arguments, "--dim=4"])
    assert capsys.readouterr().out.count("failed") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        ([], ["--jobs", "2"]),
        ([], ["--streams", "3"]),
        ([], ["--jobs", "2", "--streams", "2"]),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
    ],
)
def test_processes_and_threads_share_the_cells(tmp_path, launcher, more):
    x, y = waves(60)
    np.savez(tmp_path / "Waves.npz", X_train=x[:40], y_train=y[:40], X_test=x[40:], y_test=y[40:])
    out = tmp_path / "table"
    arguments = [
        "--datasets",
        tmp_path / "Waves.npz",
        "--methods",
        "none",
        "vicreg",
        "--views",
        "warp",
        "--seeds",
        "1,2",
    ]
    arguments += ["--out", out, "--cache", tmp_path / "cache", "--measures", "fid", *TINY]
    arguments += more
    command = [sys.executable, *launcher, "-m", "ncfast.reproduce", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    # Each by one process. Their lines may share one where both write at once.
    assert sorted(re.findall(r"\[(\d)/4\] Waves", result.stdout)) == ["1", "2", "3", "4"], result.stdout
    with open(out / "results.csv") as file:
        assert sum(row["metric"] == "FID" for row in csv.DictReader(file)) == 4


def test_a_cell_that_fails_leaves_the_other_threads(tmp_path, monkeypatch, capsys):
    """They take what is left, as other processes would; the table has all but those that failed."""
    x, y = waves(60)
    np.savez(tmp_path / "Waves.npz", X_train=x[:40], y_train=y[:40], X_test=x[40:], y_test=y[40:])
    train, here = cells_module.train, threading.Barrier(2)

    def broken(config, *arguments, **options):
        if config.seed < 3:
            here.wait(60)  # two cells at a time
        if config.seed == 2:
            raise ncfast.UserError("it is broken")
        return train(config, *arguments, **options)

    monkeypatch.setattr(cells_module, "train", broken)
    out = tmp_path / "table"
    arguments = ["--datasets", tmp_path / "Waves.npz", "--methods", "none", "--seeds", "1,2,3,4", "--streams", "2"]
    arguments += ["--out", out, "--cache", tmp_path / "cache", "--measures", "acd", *TINY]
    with pytest.raises(ncfast.UserError, match="1 of 4 cells failed, the first: .*seed2: it is broken"):
        reproduce.main(list(map(str, arguments)))
    with open(out / "results.csv") as file:
        runs = {row["run_id"] for row in csv.DictReader(file) if row["metric"] == "ACD"}
    assert runs == {"seed1", "seed3", "seed4"}
    monkeypatch.setattr(cells_module, "train", train)
    reproduce.main(list(map(str, arguments)))  # goes on
    assert "seed 2: " in capsys.readouterr().out and len(list(out.glob("*/*/*/evaluation.json"))) == 4


@pytest.mark.slow
def test_a_job_that_fails_is_told_by_it_and_counted(tmp_path):
    arguments = ["--datasets", str(tmp_path / "missing.npz"), "--methods", "none", "--seeds", "1", "--jobs", "2"]
    command = [sys.executable, "-m", "ncfast.reproduce", *arguments, "--out", str(tmp_path / "table")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "missing.npz" in errors[0], result.stderr
    assert errors[1:] == ["error: 1 of 2 processes ended with an error; the same command again continues"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs is at least 1"),
        (["--streams", "0"], "--streams is at least 1"),
        (["--seeds", "1,1"], "different integers"),
        (["--budget", "0"], "above 0, at most 1"),
        (["--holdout", "x"], "above 0, at most 1"),
        (["--methods", "moco"], "invalid choice"),
        (["--measures", "elegance"], "no measure 'elegance'"),
        (["--repeats", "0"], "--repeats is at least 1"),
        (["--datasets", "NoSuchSet", "--measures", "acd"], "no data set"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NCFAST_DATA", str(tmp_path))
    monkeypatch.setenv("AEON_DATA", str(tmp_path))
    with pytest.raises(ncfast.UserError, match=message):
        reproduce.main([*arguments, "--out", str(tmp_path / "out")])
