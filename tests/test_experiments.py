"""Cells of experiments: which they are, that finished ones are kept, what a failure or the end of the time does."""

import argparse
import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from experiments import augmentations, checks, claims, dependence, held_out, paper_table, pictures, table_time, tsg
from experiments.cells import (
    Worker,
    add_arguments,
    chosen_variants,
    configured,
    next_cell,
    provenance,
    run,
    runs_of,
    stop,
)
from experiments.rows import identity, rows_of
from ncfast.data.dataset import from_arrays
from ncfast.data.sources import load_dataset
from ncfast.errors import UserError
from ncfast.jobs.reproduction import hold_out

pytestmark = pytest.mark.usefixtures("narrow_fcn")

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
        atexit.register(Path("taken down").touch)
        tqdm([], disable=True)  # as a training's
        for _ in range(60000):
            time.sleep(0.01)
    if cell["set"].startswith("meet"):  # until all three are there
        end = time.monotonic() + 60
        while log.read_text().count("meet") < 3 and time.monotonic() < end:
            time.sleep(0.01)
    return {"device": str(device), "process": os.getpid(), "thread": threading.get_ident()}


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


def test_threads_of_a_process_have_a_cell_each(tmp_path, capfd):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    rows = run(
        cells(["meet1", "meet2", "meet3"]), functools.partial(toy, log=log), parsed("--out", out, "--streams", 3)
    )
    assert len({row["process"] for row in rows}) == 1 and len({row["thread"] for row in rows}) == 3
    assert sorted(log.read_text().split()) == ["meet1", "meet2", "meet3"]  # they begin at the same time


def test_what_fails_beside_others_is_done_again_by_itself(tmp_path, capfd):
    """An error or a crash of one cell costs no other its result."""
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    arguments = parsed("--out", out, "--streams", 3)
    rows = run(cells(["a", "crash", "error", "b", "c"]), functools.partial(toy, log=log), arguments)
    assert [row["cell"]["set"] for row in rows] == ["a", "b", "c"] and len(rows_of(out)) == 3
    printed = capfd.readouterr().out
    assert "error v seed 0 failed: ValueError: it is broken" in printed
    assert "crash v seed 0 failed beside others, and is done again: its process ended with code 7" in printed
    assert "crash v seed 0 failed: its process ended with code 7" in printed and "0 cells are not finished" in printed
    assert log.read_text().split().count("crash") == 2


def test_a_table_has_a_cell_once_and_no_line_that_was_cut(tmp_path, capfd):
    out, log = tmp_path / "out.csv", tmp_path / "log"
    options = {"preset": "paper", "augment": ["warp:0.5", "gauss"], "ssl_weight": 0.1, "ssl": "barlow", "dim": 16}
    both = [each | {"options": options, "few": None, "terms": {}, "measures": ["fid"]} for each in cells(["a", "b"])]
    work = functools.partial(toy_measures, log=log)
    rows = run(both, work, parsed("--out", out))
    assert [row["values"] for row in rows] == [{"FID": 0.25, "of a": 1.0}, {"FID": 0.25, "of b": 1.0}]
    read = rows_of(out)
    assert [identity(row["cell"]) for row in read] == [identity(cell) for cell in both]
    assert read[0]["cell"]["options"] == options and read[0]["values"] == {"FID": 0.25, "of a": 1.0}
    assert read[1]["machine"] == "CPU" and read[1]["torch"] == torch.__version__ and read[1]["seconds"] >= 0
    text = out.read_text()
    run(both, work, parsed("--out", out))
    assert out.read_text() == text and log.read_text().split() == ["a", "b"]
    out.write_text(text[:-1])  # of a copy that was cut: the last number may have lost digits
    assert [row["cell"]["set"] for row in rows_of(out)] == ["a"]
    run(both, work, parsed("--out", out))
    assert log.read_text().split() == ["a", "b", "b"] and len(rows_of(out)) == 2
    assert len(run([*both, both[0] | {"seed": 7}], work, parsed("--out", out, "--minutes", 0))) == 2  # only read
    out.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is no table of cells: it has the columns a, b"):
        rows_of(out)


def toy_measures(cell, device, *, log):
    toy(cell, device, log=log)
    return {"values": {"FID": 0.25, f"of {cell['set']}": 1.0}}


def test_what_is_not_finished_in_time_is_stopped(tmp_path, capfd):
    out, log = tmp_path / "out.jsonl", tmp_path / "log"
    begin = time.monotonic()
    rows = run(cells(["slow", "a"]), functools.partial(toy, log=log), parsed("--out", out, "--minutes", 0.1))
    assert not rows and time.monotonic() - begin < 60
    assert "2 cells are not finished" in capfd.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
@pytest.mark.parametrize(("streams", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGKILL)])
def test_no_process_is_left_behind(tmp_path, streams, number):
    program = (
        "import functools, test_experiments as t; t.run(t.cells(['slow']), functools.partial(t.toy, log='log'), "
        f"t.parsed('--out', 'out.jsonl', '--streams', {streams}))"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment, stderr=printed)
    end = time.monotonic() + 120
    while not (tmp_path / "log").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    begin = time.monotonic()
    assert process.wait(60) == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number) and children
    while any(Path("/proc", child).exists() for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [child for child in children if Path("/proc", child).exists()]
    assert time.monotonic() - begin < 8  # none had to be killed
    # A thread that is inside a library while the interpreter is taken down may abort the process.
    assert not (tmp_path / "taken down").exists()
    if number == signal.SIGTERM:
        assert "leaked" not in (tmp_path / "printed").read_text()


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


def test_cells_of_the_papers_table_go_from_the_smallest_set_on_and_seed_by_seed(tmp_path):
    for name, count in (("large", 30), ("small", 8)):
        x, y = np.random.default_rng(0).normal(size=(count, 24)), np.arange(count) % 2
        np.savez(tmp_path / f"{name}.npz", X_train=x, y_train=y, X_test=x, y_test=y)
    parser = paper_table.make_parser()
    given = ["--data", str(tmp_path), "--out", "t.csv", "--sets", "large", "small"]
    order = [(cell["set"], cell["seed"], cell["variant"]) for cell in paper_table.cells_of(parser.parse_args(given))]
    names = list(paper_table.SETTINGS)
    assert len(names) == 11 and names[0] == "regular" and names[-1] == "default"
    assert order == [(s, seed, name) for s in ("small", "large") for seed in (1, 2, 3, 4) for name in names]
    cell = paper_table.cells_of(parser.parse_args(given))[1]
    assert cell["options"] == {"preset": "paper", "ssl": "barlow", "augment": ["gauss"]} and cell["num_samples"] is None
    row = {"cell": cell | {"set": "ECG5000"}, "values": {"FID": 2.0}, "train": 500, "test": 4499, "incomplete": "one"}
    row |= {"training_seconds": 3600.0, "evaluation_seconds": 900.0, "machine": "a card"}
    text = paper_table.as_table([row, row | {"cell": row["cell"] | {"seed": 2}, "values": {"FID": 3.0}}])
    assert "| ECG5000 | barlowtwins_gauss | **2.5 ± 0.71** | 2 | 2.472 ± 0.25 | +0.0283 |" in text
    assert (
        "2 cells, 2.00 hours of training and 0.50 of measuring" in text and "4499 test series; incomplete: one" in text
    )


def test_claims_are_tested_over_pairs_and_over_sets():
    assert claims.wilcoxon([1, 2, 3, -4]) == pytest.approx(14 / 16)  # 7 of 16 sign patterns have a rank sum up to 4
    assert claims.rank_biserial([1, 2, 3, -4]) == pytest.approx((1 + 2 + 3 - 4) / 10)
    assert claims.rank_biserial([0, 5, 5, -1]) == pytest.approx((2.5 + 2.5 - 1) / 6)
    assert (claims.wilcoxon([0, 0]), claims.rank_biserial([])) == (1.0, 0.0)
    assert claims.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    values = {}
    for name in "abcde":
        for seed in (1, 2):
            values[name, seed, "regular"] = {"FID": 4.0, "knn_accuracy": 0.5}
            values[name, seed, "barlowtwins_warp"] = {"FID": 1.0 * seed, "knn_accuracy": 0.5 + 0.1 * seed}
            values[name, seed, "regular+kept"] = {"FID": 4.0}
    ratios = claims.effects_of(values, claims.Claim("", "FID", False, ratio=True), "barlowtwins_warp", "regular")
    result = claims.Result.of(ratios)
    assert np.exp(result.effect) == pytest.approx(2**-1.5) and (result.pairs, result.ups, result.downs) == (10, 0, 10)
    assert result.sets == 5 and result.p_sets == pytest.approx(2 / 2**5)
    text = claims.as_table(values)
    assert "| SSL: FID down | barlowtwins_warp | x 0.354 | 10 of 10 | -1.00 |" in text
    assert "| SSL: kNN up | barlowtwins_warp | +0.15 | 10 of 10 | +1.00 |" in text
    assert "| 36 % masked: FID up | regular+kept | x 1 | 0 of 10 | +0.00 | 1 | 5 | 1 | 1 |" in text
    values["a", 1, "views_warp"] = {"FID": 1.0}  # what is no setting of the table has no place in a diagram
    values["f", 1, "regular"] = {"FID": 1.0}  # nor has a set that lacks some
    variants, scores = claims.scores_of(values, "FID")
    assert variants == ["regular", "barlowtwins_warp"] and scores.tolist() == [[4.0, 1.5]] * 5
    text = claims.as_table(values)
    assert "| views alone: FID down | views_warp | x 0.25 | 1 of 1 |" in text
    assert "| SSL above views: FID down | barlowtwins_warp | x 1 | 0 of 1 |" in text
    assert "| SSL above views: kNN" not in text
    theirs = claims.as_table(claims.values_of_authors())
    assert "| SSL: kNN up | barlowtwins_slice | +0.121 | 11 of 13 |" in theirs  # as counted from their files
    assert "| SSL: FID down | barlowtwins_gauss | x 0.764 | 8 of 13 |" in theirs


def test_a_table_adds_what_the_one_before_has_not_measured():
    cell = {"set": "a", "seed": 1, "variant": "regular"}
    tables = {"FID": 1.0, "knn_accuracy": 0.5}, {"knn_accuracy": 0.7, "knn_accuracy_moving": 0.6}
    values = claims.values_of([{"cell": cell, "values": each} for each in tables])
    assert values == {("a", 1, "regular"): {"FID": 1.0, "knn_accuracy": 0.5, "knn_accuracy_moving": 0.6}}


def test_pictures_show_means_over_seeds_against_the_plain_model(tmp_path):
    values = {
        ("a", 1, "regular"): {"FID": 1.0, "svm_accuracy": 0.5},
        ("a", 2, "regular"): {"FID": 3.0, "svm_accuracy": 0.7},
        ("a", 1, "default"): {"FID": 0.5, "svm_accuracy": 0.9},
        ("a", 1, "regular+kept"): {"FID": 9.0, "svm_accuracy": 0.1},
        ("b", 1, "default"): {"FID": 7.0},  # nothing to hold it against
    }
    assert pictures.changes_of(values, "FID", ratio=True) == {"a": {"default": 0.25}}
    assert pictures.changes_of(values, "svm_accuracy", ratio=False) == {"a": {"default": pytest.approx(0.3)}}
    pytest.importorskip("matplotlib")
    text = pictures.draw(values, {}, "FID", tmp_path).read_text()
    assert "<!-- default -->" in text and text == pictures.draw(values, {}, "FID", tmp_path).read_text()
    text = pictures.draw_views({"flip:1": {"a": [0.1]}, "slope:1": {"a": [0.2], "b": [-0.1]}}, tmp_path).read_text()
    assert all(f"<!-- {name} -->" in text for name in ("flip:1", "slope:1", "a", "b"))
    assert "| `default`: FID down | default | x 0.5 | 1 of 1 |" in claims.as_table(values)


def test_a_copy_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("NCFAST_COMMIT", "0123456789")
    assert provenance()["commit"] == "0123456789"


def test_checks_vary_what_they_are_called_after():
    def variants(check, methods=("none", "vicreg")):
        return checks.variants_of(check, list(methods), ["gauss"], [10.0])

    assert variants("masking")["regular+kept"] == ({"ssl": "none", "masking": "kept"}, {})
    assert variants("embeddings")["vicreg_gauss+random-embeddings"][0]["embeddings"] == "random"
    views = variants("views")
    assert views["vicreg_gauss+view-weight-0"][0]["view_weight"] == 0 and views["views_gauss"][0]["ssl"] == "views"
    assert "regular+view-weight-0" not in views
    weights = variants("weights")
    assert weights["vicreg_gauss+weight-x10"][0]["ssl_weight"] == pytest.approx(0.1)
    assert weights["vicreg_gauss+cov-x10"] == (views["vicreg_gauss"][0], {"cov": 10.0}) and len(weights) == 6


@pytest.mark.parametrize("ssl", ["barlow", "vicreg", "vibcreg"])
def test_weights_within_a_loss_are_those_of_the_check_and_then_the_papers_again(ssl):
    a, b = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    loss = checks.SSL_LOSSES[ssl]
    before, seen = loss(a, b), []
    with checks.loss_with(checks.TERMS[ssl]):
        assert torch.equal(loss(a, b), before)
    with checks.loss_with({next(iter(checks.TERMS[ssl])): 1000.0}):
        assert loss(a, b) > before
        other = threading.Thread(target=lambda: seen.append(loss(a, b)))  # trains another cell meanwhile
        other.start()
        other.join()
    assert torch.equal(loss(a, b), before) and torch.equal(seen[0], before)


def test_views_of_every_strength_and_what_a_set_is_like():
    made = augmentations.variants_of(["flip", "slope"], [0.5, 1], True, "barlow")
    assert list(made) == [
        "regular",
        "flip:0.5",
        "flip:1",
        "slope:0.5",
        "slope:1",
        "flip:0.5+slope:0.5",
        "flip:1+slope:1",
    ]
    assert made["flip:1+slope:1"] == {"ssl": "barlow", "augment": ["flip:1", "slope:1"]}
    with pytest.raises(UserError, match="at most 2"):
        augmentations.variants_of(["flip"], [3.0], False, "barlow")
    rng, t, y = np.random.default_rng(0), np.arange(128), np.arange(200) % 2
    noise = rng.normal(size=(200, 128))
    tone = np.sin(2 * np.pi * (t / 8 + rng.random((200, 1))))
    sets = {"noise": noise, "tone": tone, "walk": noise.cumsum(1), "level": noise + 9 * y[:, None]}
    sets["shape"] = 0.1 * noise + np.where(y[:, None] == 1, 1, -1) * np.sin(2 * np.pi * t / 32)
    known = {name: augmentations.properties(from_arrays(x, y, name=name)) for name, x in sets.items()}
    assert known["tone"]["centroid"] == pytest.approx(1 / 8, abs=1e-3) and known["tone"]["flatness"] < 0.01
    assert known["noise"]["centroid"] == pytest.approx(0.25, abs=0.01) and known["noise"]["flatness"] > 0.5
    assert known["walk"]["drift"] > 0.7 > 0.1 > known["noise"]["drift"]
    assert known["level"]["classes by level"] > 0.99 and known["level"]["classes by shape"] < 0.05
    assert known["shape"]["classes by shape"] > 0.9 and known["shape"]["classes by level"] < 0.05
    cell = {"seed": 1, "set": "noise", "budget": 1.0}
    rows = [
        {
            "cell": cell | {"set": name, "variant": variant},
            "values": {"knn_accuracy": value, "test_reconstruction_mse": 2 * value},
        }
        for name, values in {"noise": (0.5, 0.8), "tone": (0.5, 0.4), "walk": (0.5, 0.6)}.items()
        for variant, value in zip(("regular", "flip:1"), values, strict=True)
    ] + [{"cell": cell | {"variant": "slope:1"}, "values": {}}]
    rows += [{"cell": cell | {"variant": "slope:1", "budget": 0.5}, "values": {"knn_accuracy": 0.9}}]  # no plain one
    found = augmentations.gains(rows)
    assert found.keys() == {"flip:1"} and found["flip:1"]["noise"] == pytest.approx([0.3])
    assert augmentations.gains(rows, "test_reconstruction_mse")["flip:1"]["noise"] == pytest.approx([1.6])
    text = augmentations.correlation_table(
        found, {name: {"p": p} for name, p in zip(found["flip:1"], (3, 1, 2), strict=True)}
    )
    assert "| flip:1 | 3 | +1.00 (p 0) |" in text


def gained(gains, seed=1):
    """Rows of plain models with a kNN of 0.5, and of views with these gains above it: view -> set -> gain."""
    cell = {"seed": seed, "budget": 1.0}
    values = {name: 0.0 for each in gains.values() for name in each}
    return [
        {"cell": {**cell, "set": name, "variant": view}, "values": dict.fromkeys(augmentations.ACCURACIES, 0.5 + gain)}
        for view, each in {"regular": values, **gains}.items()
        for name, gain in each.items()
    ]


def test_shares_of_sets_and_views_and_what_pairs_add():
    sets = {"a": 0.0, "b": 0.1, "c": 0.2}
    views = {"flip:1": 0.0, "slope:1": 0.05, "random_crop:1": 0.1}
    rows = gained({view: {name: x + y for name, y in sets.items()} for view, x in views.items()})
    rows += gained({"flip:1+slope:1": {"a": 0.045, "b": 0.165}, "flip:1+random_crop:1": {"a": 0.0402}})
    found = {measure: augmentations.gains(rows, measure) for measure in augmentations.ACCURACIES}
    # Of another seed: its pairs are compared with its own views.
    rows += gained({"flip:1": {"b": 0.3}, "slope:1": {"b": 0.4}, "flip:1+slope:1": {"b": 0.41}}, seed=2)
    shares = augmentations.share_table(found, ["knn_accuracy"])
    assert "| gain of kNN, one operation | 3 | 3 | 0.80 | 0.20 | 0.00 | 0.05 |" in shares
    pairs = augmentations.pair_table(rows, ["svm_accuracy"])
    # a: 0.045 - 0.025, 0.0402 - 0.05, above the better -0.005, -0.0598; b: 0.165 - 0.125, 0.41 - 0.35 and 0.015, 0.01
    assert "| gain of SVM, a | +0.005 | -0.032 | 0 of 2 |" in pairs
    assert "| gain of SVM, b | +0.050 | +0.012 | 2 of 2 |" in pairs
    known = {name: {"p": -y} for name, y in sets.items()}
    text = augmentations.correlation_table(found["knn_accuracy"], known)
    assert "| mean of the views of one operation | 3 | -1.00" in text


@pytest.mark.parametrize("lag", [1, 4, 16])
def test_real_series_have_the_dependence_and_shuffled_ones_have_not(lag):
    first, second = dependence.signs(dependence.dataset_of(lag).X_train, lag)
    assert dependence.bits(first, second) > 0.98 and 0.45 < first.mean() < 0.55
    assert dependence.bits(first, np.random.default_rng(0).permutation(second)) < 0.01
    at_another_lag = dependence.signs(dependence.dataset_of(lag).X_train, lag + 3)[1]
    assert dependence.bits(first, at_another_lag) < 0.2
    assert dependence.bits(first, ~first) == pytest.approx(dependence.bits(first, first)) == pytest.approx(1, abs=0.01)
    agree = np.array([True] * 3 + [False] * 5), np.array([True] * 3 + [False] * 4 + [True])
    by_hand = 3 / 8 * np.log2(3 * 8 / (3 * 4)) + 1 / 8 * np.log2(1 * 8 / (5 * 4)) + 4 / 8 * np.log2(4 * 8 / (5 * 4))
    assert dependence.bits(*agree) == pytest.approx(by_hand)


def test_a_cell_of_the_dependence(tmp_path, monkeypatch):
    monkeypatch.setattr(dependence, "TRAIN", 32)
    monkeypatch.setattr(dependence, "TEST", 40)
    for preset, window in (("paper", 8), ("default", 4)):
        options = dependence.with_columns({**TINY, "preset": preset, "refiner": "none"})
        cell = {"set": "lag4", "variant": preset, "options": options, "seed": 0, "budget": 1.0}
        row = dependence.measured(cell, CPU, runs=tmp_path) | {"cell": cell}
        assert row["values"]["columns"] == 32 and configured(options, 0).n_fft == window
        assert row["values"]["bits_test"] > 0.8 > 0.3 > row["values"]["bits_shuffled"]
    assert "| lag4 | default | 1 |" in dependence.as_table([row])


def costs_of(plain, ssl, prior, start, **more):
    """Of a set: seconds of an epoch of each, and before the first step of each."""
    stages = {table_time.PLAIN: plain, table_time.SSL: ssl, table_time.PRIOR: prior}
    return stages | {f"start of {name}": start for name in stages} | more


def test_hours_of_the_table_by_hand():
    config = configured({"preset": "paper"}, seed=0)
    known = {"machine": "GPU", "source": "data", "ncfast": "1", "torch": "2"}
    found = {
        "ECG5000": costs_of(0.2, 0.4, 0.1, 3.0, evaluator=30.0, measures=50.0, **known),  # 4 / 2 steps an epoch
        "FordA": costs_of(5.8, 8.7, 3.0, 4.0, **{**known, "source": "random"}),  # 29 / 15 steps
    }
    costs = table_time.complete(found, config)
    assert list(costs) == list(table_time.SETS) and len(costs) == 13
    ecg = costs["ECG5000"]
    assert table_time.cell_seconds(ecg, table_time.PLAIN, config) == pytest.approx(3 + 200 + 3 + 100 + 50)
    assert table_time.cell_seconds(ecg, table_time.SSL, config) == pytest.approx(3 + 400 + 3 + 100 + 50)
    hours = table_time.set_hours(ecg, config, at_a_time=8, seeds=4, ssl_settings=6)
    assert hours == pytest.approx((4 * (356 + 6 * 556) / 8 + 30) / 3600)
    # Wafer is most like ECG5000: its steps take as long, of which there are 8 and 4, and it has more values to measure.
    wafer, more = costs["Wafer"], (1000 + 6164) * 152 / ((500 + 4500) * 140)
    assert wafer[table_time.SSL] == pytest.approx(0.1 * 8) and wafer[table_time.PRIOR] == pytest.approx(0.05 * 4)
    assert wafer["measures"] == pytest.approx(50 * more) and wafer["start of stage 2"] == 3.0
    # FordB is most like FordA, whose series were not measured.
    assert costs["FordB"][table_time.PLAIN] == pytest.approx(5.8) and costs["FordB"]["start of stage 2"] == 4.0
    assert costs["FordB"]["evaluator"] == pytest.approx(30 * (3636 + 810) * 500 / (5000 * 140))
    assert {name: steps[table_time.PLAIN] for name in costs if (steps := table_time.steps_of(name, config))} == {
        **{"ElectricDevices": 70, "FordB": 29, "FordA": 29, "Wafer": 8, "TwoPatterns": 8, "StarLightCurves": 8},
        **{"UWaveGestureLibraryAll": 7, "ShapesAll": 5, "ECG5000": 4, "Mallat": 1, "Symbols": 1},
        **{"SonyAIBORobotSurface1": 1, "SonyAIBORobotSurface2": 1},
    }
    arguments = table_time.make_parser().parse_args(["--devices", "cuda:0", "cuda:1"])
    text = table_time.as_text(costs, found, config, arguments)
    assert f"| ECG5000 | 4 / 2 | 50.00 | 100.00 | 50.00 | 6.0 | 30.0 | 50.0 | 5.9 | 9.3 | 28 | {hours:.2f} |" in text
    assert "| FordA | 29 / 15 | 200.00 | 300.00 | 200.00 | 8.0 | ~" in text and "| FordB | 29 / 15 | ~200.00" in text
    total = sum(table_time.set_hours(cost, config, 8, 4, 6) for cost in costs.values())
    assert f"364 cells, 1000 + 1000 epochs: {total:.1f} hours with 4 processes on each of 2 x GPU" in text
    assert "random series for FordA" in text and "without measuring" not in text
    found["ECG5000"].pop("measures")
    text = table_time.as_text(table_time.complete(found, config), found, config, arguments)
    assert "| ~0.0 | ~0.0 | ~5.1 |" in text and "without measuring" in text
    with pytest.raises(UserError, match="no stages were measured"):
        table_time.complete({}, config)


def test_a_set_that_was_not_measured_takes_the_costs_of_the_one_most_like_it():
    config = configured({"preset": "paper"}, seed=0)
    found = {
        "ECG5000": costs_of(4.0, 4.0, 2.0, 1.0, evaluator=7.0, measures=70.0),
        "FordA": costs_of(29.0, 29.0, 15.0, 2.0),
        "FordB": costs_of(58.0, 58.0, 15.0, 3.0),  # of the same shape as FordA, as far as steps go
        "StarLightCurves": costs_of(24.0, 24.0, 15.0, 4.0, evaluator=1.0, measures=9236.0),
    }
    costs = table_time.complete(found, config)
    assert costs["FordB"][table_time.PLAIN] == 58.0 and costs["FordA"][table_time.PLAIN] == 29.0
    # Steps of 55 series of Mallat are like FordA's of 128 that are half as long.
    assert costs["Mallat"]["start of stage 2"] == 2.0 and costs["Mallat"][table_time.PLAIN] == 1.0
    # Those of ShapesAll are like FordA's too, but all its values are as many as those of ECG5000.
    assert costs["ShapesAll"]["start of stage 2"] == 2.0
    assert costs["ShapesAll"]["measures"] == pytest.approx(70 * 614_400 / 700_000)
    assert costs["UWaveGestureLibraryAll"]["measures"] == pytest.approx(4478 * 945 / 1024)


def test_epochs_are_timed_from_when_all_processes_have_met(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(table_time.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(table_time, "meet", lambda cell, where: clock.__setitem__(0, clock[0] + 50))  # the others' time
    monkeypatch.setattr(table_time, "train_stage", lambda *_, log, **__: epochs(log))

    def epochs(log):
        for epoch in range(1, 1000):
            clock[0] += 9.0 if epoch == 1 else 2.0
            log.write(1, epoch, epoch, {})

    cell = {"set": "a", "seed": 0, "window": 7.0}
    costs = table_time.timed("regular", None, 95.0, cell, CPU)
    assert costs == {"regular": 2.0, "start of regular": 5 + 9 - 2.0} and clock[0] == 100 + 9 + 50 + 4 * 2
    clock[0] = 100.0  # on a GPU only the fourth step of a batch size is a graph
    costs = table_time.timed("regular", None, 95.0, cell, torch.device("cuda"))
    assert costs == {"regular": 2.0, "start of regular": 5 + 9 - 2.0} and clock[0] == 100 + 9 + 3 * 2 + 50 + 4 * 2


@pytest.mark.parametrize("name, error, seconds", [("error", UserError, 120), ("slow", TimeoutError, 1)])
def test_processes_that_wait_for_each_other_do_not_wait_for_ever(tmp_path, name, error, seconds):
    workers = [Worker(functools.partial(toy, log=tmp_path / "log"), "cpu", 1)]
    begin = time.monotonic()
    try:
        with pytest.raises(error, match=f"stages of {name}"):
            table_time.together(workers, {"what": "stages", "set": name, "trainings": 1}, begin + seconds)
    finally:
        stop(workers)
    assert time.monotonic() - begin < 60


@pytest.mark.slow
def test_the_time_of_the_table_from_end_to_end(monkeypatch, capfd):
    options = ",".join(f"{key}={value}" for key, value in TINY.items() if not key.endswith("epochs") and key != "ssl")
    arguments = [
        "--minutes",
        "1.5",
        "--devices",
        "cpu",
        "--jobs",
        "2",
        "--sets",
        "SonyAIBORobotSurface1",
        "--fcn-epochs=1",
    ]
    arguments += [
        "--measures",
        "fid",
        "cas",
        "--options",
        f"{options},stage1_epochs=900,stage2_epochs=800,projector_dim=16",
    ]
    monkeypatch.setattr(sys, "argv", ["table_time", *arguments])
    table_time.main()
    printed = capfd.readouterr().out
    assert "SonyAIBORobotSurface1 (random), stages" in printed and "stopped" not in printed
    line = next(line for line in printed.splitlines() if line.startswith("| SonyAIBORobotSurface1"))
    assert "~" not in line and all(float(each) > 0 for each in line.split("|")[3:6])
    assert "364 cells, 900 + 800 epochs" in printed and "2 processes on each of 1 x CPU" in printed
