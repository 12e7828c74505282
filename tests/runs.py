"""Small data, configurations and runs, for the tests of whatever trains or loads one."""

import dataclasses

import numpy as np
import torch

import ncfast
from ncfast import generate
from ncfast.config import make_config
from ncfast.data.stats import DataStats
from ncfast.training.stages import build_models, build_refiner

SMALL = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 8,
    "projector_dim": 32,
    "prior_dim": 32,
    "prior_layers": 1,
    "prior_head_dim": 16,
    "refiner": "none",
    "stretch": 0.0,
    "batch_size": 16,
    "stage2_batch_size": 16,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def waves(n=40, length=61, channels=1, seed=0):
    """Two classes that differ in frequency."""
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 2
    phase = generator.uniform(0, 2 * np.pi, (n, channels, 1))
    t = np.arange(length) / length
    x = (
        5
        + 3 * np.sin(2 * np.pi * (2 + 3 * y[:, None, None]) * t + phase)
        + 0.1 * generator.normal(size=(n, channels, length))
    )
    return x.astype(np.float32), np.array(["slow", "fast"])[y]


def train_arguments(data_file, out, *more):
    return ["--dataset", data_file, "--out", out, "--stage1-epochs", 4, "--stage2-epochs", 4, *FLAGS, *more]


def save_run(folder, seed=0, length=21, channels=1, names=("fast", "slow"), std=2.0, **options):
    """A model of random weights: what is drawn from it has no shape, but a right and a wrong place."""
    torch.manual_seed(seed)
    small = {"dim": 4, "residual_blocks": 1, "codebook_size": 8, "prior_dim": 8, "prior_layers": 1, "prior_head_dim": 8}
    config = make_config(**{**small, "decoding_steps": 3, "refiner": "none", "refiner_dim": 4, **options})
    counts = (30, 10, 7, 5, 3)[: len(names)]
    data = DataStats("Waves", "test", 40, channels, length, tuple(names), counts, (5.0,) * channels, (std,) * channels)
    config = dataclasses.replace(config, stage1_epochs=1, stage2_epochs=1, precision="fp32")
    vqvae, prior = build_models(config, data)
    vqvae.refiner = build_refiner(config, data)
    if vqvae.refiner is not None:
        torch.nn.init.normal_(vqvae.refiner.last.weight)  # untrained it moves nothing
    ncfast.NCVQVAE(config, data, vqvae, prior, torch.device("cpu")).save(folder)
    return folder


def generated_file(run, out, *more):
    """150 series of `python -m ncfast.generate`, opened."""
    arguments = ["--run", run, "--num-samples", 150, "--out", out, "--device", "cpu", "--seed", 2, *more]
    generate.main([str(argument) for argument in arguments])
    return ncfast.open_generated(out.with_suffix(".h5"))
