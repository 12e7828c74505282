"""Numbers that the method rests on, each as its source has it: a slip of one line shows here."""

import dataclasses
import math
import os
import socket
import time

import numpy as np
import pytest
import torch
from runs import save_run
from test_maskgit import make_sampler

import ncfast
from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine import checkpoint
from ncfast.engine.loop import Stage
from ncfast.evaluation import comparison
from ncfast.jobs import generation
from ncfast.jobs.shards import Job
from ncfast.jobs.writer import ShardWriter
from ncfast.ops.gram import resolve_route
from ncfast.sampling import maskgit as sampling
from ncfast.sampling.completion import Context
from ncfast.training import stage2
from ncfast.training.self_supervision import SSL_WEIGHTS


@pytest.mark.parametrize(("t", "masking", "masked"), [(0.0, "masked", 10), (0.5, "masked", 7), (0.5, "kept", 3)])
def test_a_batch_masks_as_many_tokens_as_the_cosine_says(t, masking, masked, monkeypatch):
    """floor(n cos(pi t / 2)) of each row (MaskGIT, section 3.1); of 10 tokens at t = 1/2 these are 7."""
    draws = iter([torch.tensor(t, dtype=torch.float64), torch.rand(6, 10)])
    monkeypatch.setattr(torch, "rand", lambda *_, **options: next(draws))
    mask = stage2.random_mask((6, 10), masking, torch.Generator(), torch.device("cpu"))
    assert (mask.sum(1) == masked).all()


def test_the_noise_of_the_choice_anneals_to_nothing(monkeypatch):
    """Of step t of T, counted from 0: choice temperature (1 - (t + 1) / T), none in the last."""
    seen = {}
    step = sampling.unmask_step

    def record(*args, **options):
        seen[options["step"]] = options["choice_temperature"]
        return step(*args, **options)

    monkeypatch.setattr(sampling, "unmask_step", record)
    sampler = make_sampler(savers=sampling.SamplerOptimizations.none(), decoding_steps=5, choice_temperature=4.0)
    sampler.decode(torch.zeros(2, dtype=torch.int64), torch.arange(2), 0)
    assert seen == pytest.approx({0: 3.2, 1: 2.4, 2: 1.6, 3: 0.8, 4: 0.0})


def test_the_schedule_of_ten_steps_is_the_papers():
    """floor(n cos(pi/2 (t + 1) / T)) tokens are masked after step t."""
    assert sampling.mask_schedule(76, 10) == [75, 72, 67, 61, 53, 44, 34, 23, 11, 0]


def test_the_learning_rate_is_the_cosine_of_the_authors_scheduler():
    """Which steps once more between epochs: of 2 epochs of 3 steps, steps 0 1 2 . 4 5 6 . of 8."""
    stage = Stage(1, "", torch.nn.ModuleDict(), None, 12, 4, 2, 0.1, 0.0)
    places = [0, 1, 2, 4, 5, 6]
    expected = [0.05 * (1 + math.cos(math.pi * place / 8)) for place in places]
    assert stage.learning_rates() == pytest.approx(expected, rel=1e-12)


def test_series_are_normalised_by_the_deviation_of_all_samples():
    x = np.random.default_rng(0).normal(3, 2, (5, 2, 9)).astype(np.float32)
    facts = DataStats.of(from_arrays(x))
    assert facts.mean == pytest.approx(x.astype(np.float64).mean((0, 2)), rel=1e-12)
    assert facts.std == pytest.approx(x.astype(np.float64).std((0, 2), ddof=0), rel=1e-12)


def test_weights_of_the_losses_are_the_authors():
    assert [SSL_WEIGHTS[ssl] for ssl in ("barlow", "vicreg", "vibcreg")] == [1.0, 0.01, 0.01]


@pytest.mark.parametrize(("rows", "route"), [(75, "gram"), (76, "direct")])
def test_the_gram_route_is_taken_up_to_three_quarters_of_the_dimensions(rows, route):
    assert resolve_route("auto", rows, 100) == route


def test_known_tokens_rest_on_seven_fills():
    assert Context.NUM_FILLS == 7


def test_more_is_better_of_scores_and_less_of_distances():
    better = {metric: more for _, metric, more in comparison.TABLES}
    assert all(better[name] for name in ("IS_mean", "CAS", "knn_accuracy", "svm_accuracy") if name in better)
    assert not any(better[name] for name in ("FID", "ACD", "MDD", "reconstruction_mse") if name in better)


@pytest.mark.parametrize(
    ("age", "host", "stays"), [(86_000, "elsewhere", True), (86_800, "elsewhere", False), (0, "here", False)]
)
def test_leftovers_of_the_dead_go_at_once_and_of_others_after_a_day(tmp_path, age, host, stays):
    host = socket.gethostname() if host == "here" else host
    leftover = tmp_path / f".x.h5.{host}.{2**22 + 1}.tmp"  # no such process
    leftover.touch()
    os.utime(leftover, (time.time() - age,) * 2)
    checkpoint.remove_leftovers(tmp_path / "x.h5")
    assert leftover.exists() == stays


def job(tmp_path, rows, shards, num_tokens=4):
    columns = {"tokens": ((num_tokens,), "u2"), "index": ((), "i8")}
    return Job(tmp_path / "x.h5", rows, shards, columns, "none", (), {"a": 1}, {"job_sha256": "x"})


@pytest.mark.parametrize(("rows", "firsts"), [(4096, [0, 1024, 2048]), (3071, [0, 1023, 2047])])
def test_shards_begin_where_a_forward_pass_does(tmp_path, rows, firsts):
    """At multiples of 1024 where each shard has as many."""
    assert [shard.first for shard in job(tmp_path, rows, 3).all_shards()] == firsts


@pytest.mark.parametrize(("free", "fits"), [(100, True), (99, False)])
def test_a_compressed_job_may_take_a_thirty_second_of_its_size(tmp_path, monkeypatch, free, fits):
    made = job(tmp_path, 200, 1)
    assert made.row_bytes == 16
    made = dataclasses.replace(made, compression="gzip")
    monkeypatch.setattr(generation, "free_space", lambda _: free)
    if fits:
        generation.check_space(made)
        return
    with pytest.raises(ncfast.UserError, match="needs 3.1 KiB more"):
        generation.check_space(made)


def test_a_flush_that_fails_gives_a_shard_no_name(tmp_path, monkeypatch):
    model = ncfast.load(save_run(tmp_path / "run"), "cpu")
    made = job(tmp_path, 64, 1, model.prior.num_tokens)
    batch = next(model.sample_batches(64, "none", batch_size=64))
    writer = ShardWriter(made.shard(0))
    monkeypatch.setattr("ncfast.jobs.writer.FLUSH_BYTES", 1)

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    try:
        with pytest.raises(ncfast.UserError, match="cannot write .*Input/output error"):
            writer.write(batch)
            writer.close()
    finally:
        writer.discard()
    assert not made.out.exists()


def test_presets_keep_the_papers_widths():
    paper = make_config("paper")
    assert (paper.projector_dim, paper.codebook_size, paper.n_fft, paper.decoding_steps) == (4096, 32, 8, 10)
