"""Cells of experiments: which they are, that finished ones are kept, what a failure or the end of the time does."""

import argparse
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import held_out, tsg
from experiments.cells import add_arguments, chosen_variants, identity, next_cell, rows_of, run, runs_of
from ncfast.data.sources import load_dataset
from ncfast.errors import UserError
from ncfast.jobs.reproduction import hold_out

CPU = torch.device("cpu")
TINY = {"ssl": "none", "dim": 8, "residual_blocks": 1, "codebook_size": 8, "prior_dim": 16, "prior_layers": 1}
TINY |= {"prior_head_dim": 8, "stage1_epochs": 1, "stage2_epochs": 1, "decoding_steps": 2}


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--data", "data", "--out", "out.jsonl", "--devices", "cpu", *map(str, arguments)])


def cells(names):
    return [{"set": name, "variant": "v", "options": {}, "seed": 0, "budget": 1.0} for name in names]


def toy(cell, device, *, log):
    """What a cell does by its name."""
    with open(log, "a") as file:
        file.write(f"{cell['set']}\n")
    if cell["set"] == "error":
        raise ValueError("it is broken")
    if cell["set"] == "crash":
        os._exit(7)
    if cell["set"] == "slow":
        time.sleep(600)
    return {"device": str(device)}


def test_variants_take_any_option_and_refuse_what_is_none():
    chosen = chosen_variants(
        parsed("--variants", "none", "real", "--variant", "mine:dim=16,augment=gauss+warp,preset=paper", "--option",
               "learning-rate=2e-3"),
        ["real"],
    )  # fmt: skip
    assert chosen == {
        "none": {"ssl": "none", "learning_rate": 2e-3},
        "real": {},
        "mine": {"dim": 16, "augment": ["gauss", "warp"], "preset": "paper", "learning_rate": 2e-3},
    }
    assert list(chosen_variants(parsed())) == ["default"] and list(chosen_variants(parsed("--variant", "a:"))) == ["a"]
    for text, message in (
        ("a:dmi=3", "did you mean 'dim'"),
        ("a:dim=x", "--dim is an integer"),
        ("a:dim", "an option is KEY=VALUE"),
        ("a:preset=best", "preset is one of"),
    ):
        with pytest.raises(UserError, match=message):
            chosen_variants(parsed("--variant", text))
    with pytest.raises(UserError, match="no variant 'nothing'; there are default"):
        chosen_variants(parsed("--variants", "nothing"))


def test_finished_cells_are_kept_and_failed_ones_are_tried_again(tmp_path, capfd):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    arguments = parsed("--out", out, "--jobs", 2)
    all_cells = cells(["a", "error", "crash", "b"])
    work = functools.partial(toy, log=log)
    rows = run(all_cells, work, arguments)
    assert [row["cell"]["set"] for row in rows] == ["a", "b"] and rows[0]["device"] == "cpu"
    printed = capfd.readouterr().out
    assert "error v seed 0 failed: ValueError: it is broken" in printed
    assert "crash v seed 0 failed: its process ended with code 7" in printed and "2 failed" in printed
    with open(out, "a") as file:
        file.write('{"cell": {"set"')  # of a program that was killed while it wrote
    again = run(cells(["a", "b", "c"]), work, arguments)
    assert [row["cell"]["set"] for row in again] == ["a", "b", "c"]
    assert sorted(log.read_text().split()) == ["a", "b", "c", "crash", "error"]
    assert len(rows_of(out)) == 3


def test_what_is_not_finished_in_time_is_stopped(tmp_path, capfd):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    begin = time.monotonic()
    rows = run(cells(["slow", "a"]), functools.partial(toy, log=log), parsed("--out", out, "--minutes", 0.1))
    assert not rows and time.monotonic() - begin < 60
    assert "2 cells are not finished" in capfd.readouterr().out


def test_a_cell_that_would_take_too_long_lets_others_go_before_it():
    first, second = cells(["long", "short"])
    rows = [{"cell": first | {"seed": 1}, "seconds": 100.0}, {"cell": first | {"seed": 2}, "seconds": 300.0}]
    assert next_cell([first, second], rows, 99.0) is second
    assert next_cell([first, second], rows, 101.0) is first
    assert next_cell([first], rows, 99.0) is None
    assert identity(first) != identity(second) == identity(dict(reversed(second.items())))


def test_published_windows_are_scaled_over_the_whole_file(tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 3)) * [1, 1e7, 1]
    np.savetxt(tmp_path / "stock_data.csv", rows, delimiter=",", header="a,b,c", comments="")
    x = tsg.windows_of_set("stocks", 24, tmp_path).X_train
    scaled = (rows - rows.min(0)) / (rows.max(0) - rows.min(0))
    assert x.shape == (17, 3, 24)
    np.testing.assert_allclose(x[5], scaled[5:29].T, atol=1e-6)
    sines = tsg.windows_of_set("sines", 10, tmp_path).X_train
    frequency, phase = np.random.RandomState(123).uniform(0, 0.1, (10000, 5, 2))[7, 3]
    np.testing.assert_allclose(sines[7, 3], (np.sin(frequency * np.arange(10) + phase) + 1) / 2, atol=1e-6)
    assert sines.shape == (10000, 5, 10)


def test_a_cell_of_the_published_table(tmp_path):
    rows = np.random.default_rng(0).normal(size=(60, 3)).cumsum(0)
    np.savetxt(tmp_path / "stock_data.csv", rows, delimiter=",", header="a,b,c", comments="")
    cell = {"set": "stocks", "length": 24, "variant": "tiny", "options": TINY, "seed": 0, "budget": 1.0}
    cell |= {"repeats": 2, "encoders": 1, "score_budget": 1e-3}
    folders = {"data": tmp_path, "runs": tmp_path / "runs", "cache": tmp_path / "cache"}
    made = [
        tsg.measured(cell | change, CPU, **folders) | {"cell": cell | change} for change in ({}, {"variant": "real"})
    ]
    assert json.loads(json.dumps(made)) == made
    assert made[0]["windows"] == 37 and made[0]["codes"] == 8 and len(made[1]["discriminative"]) == 2
    text = tsg.as_table(made)
    assert "| stocks 24 | ncfast tiny | 1 |" in text and "| stocks 24 | Diffusion-TS | published | .147±.025 |" in text


def test_a_cell_of_held_out_series(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = (rng.normal(size=(40, 24)) + 3 * y[:, None]).astype(np.float32)
    np.savez(tmp_path / "two.npz", X_train=x, y_train=y, X_test=x[:9] + 1, y_test=y[:9])
    cell = {
        "set": "two",
        "variant": "tiny",
        "options": TINY,
        "seed": 1,
        "budget": 1.0,
        "holdout": 0.25,
        "few": None,
        "draws": 1,
    }
    cell |= {"measures": ["reconstruction", "fid", "nndr"], "num_samples": 12, "fcn_epochs": 1}
    folders = {"data": tmp_path, "runs": tmp_path / "runs", "cache": tmp_path / "cache"}
    rows = []
    for change in ({}, {"holdout": None}, {"variant": "other"}, {"few": 8}):
        rows.append(held_out.measured(cell | change, CPU, **folders) | {"cell": cell | change, "seconds": 1.0})
    assert {"FID", "FID_reconstructed", "NNDR", "test_reconstruction_mse"} <= rows[0]["values"].keys()
    assert rows[0]["values"] != rows[1]["values"] and rows[0]["values"] == rows[2]["values"]
    assert len(list((tmp_path / "cache").glob("fcn-*.safetensors"))) == 3  # of each train set
    few = hold_out(load_dataset("two", tmp_path), 0.8)
    assert len(few.X_train) == 8 and rows[3]["values"] != rows[0]["values"]
    held = hold_out(load_dataset("two", tmp_path), 0.25)
    assert (len(held.X_train), len(held.X_test)) == (30, 10)
    text = held_out.as_table([rows[0], rows[2]])
    assert "| two | tiny | 1 |" in text and "| other | 1.000 | two 1.00 |" in text
    assert runs_of(Path("a/out.jsonl")) == Path("a/out.runs")
