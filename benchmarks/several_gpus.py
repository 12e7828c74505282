"""A training step over several GPUs: torchrun --nproc-per-node 2 benchmarks/several_gpus.py

The first process alone takes steps of `--batch-size`; then all together take steps of that batch and of one so many
times as large. Shapes, precision and graph are those of `ncfast.train`; medians of the wall time of `--steps` steps.
"""

import argparse
import itertools
import statistics
import time

import numpy as np
import torch
from common import table

from ncfast.cli.startup import choose_device
from ncfast.cli.torchrun import launched, local_rank
from ncfast.config import make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.engine.device import kind
from ncfast.engine.precision import computing
from ncfast.engine.processes import ALONE, Processes
from ncfast.engine.step import TrainingStep
from ncfast.nn.synchronised import synchronised
from ncfast.training import fit, stages

LENGTH, CLASSES, SERIES = 500, 2, 3601  # FordA
ROUNDS = 7


def step_seconds(number: int, options: argparse.Namespace, batch: int, device: torch.device, processes: Processes):
    """Median seconds of a step, and whether it is a CUDA graph."""
    x = np.random.default_rng(0).normal(size=(SERIES, LENGTH)).astype(np.float32)
    dataset = from_arrays(x, np.arange(SERIES) % CLASSES)
    batches = {"batch_size": batch, "stage2_batch_size": batch}
    config = make_config(options.preset, ssl=options.ssl, precision=options.precision, **batches)
    config, data = fit.resolve_config(config, dataset, device), DataStats.of(dataset)
    series, labels = data.normalise(dataset.X_train, device), torch.from_numpy(dataset.y_train).to(device)
    vqvae = stages.new_vqvae(config, data).to(device).eval()
    if number == 1:
        stage = stages.make_stage1(config, vqvae, series, device, processes)
    else:
        prior = stages.new_prior(config, vqvae, data)
        stage = stages.make_stage2(config, vqvae, prior, series, labels, device, processes)
    stage.modules.train()
    step = TrainingStep(
        stage.losses,
        stage.modules,
        num_series=SERIES,
        weight_decay=stage.weight_decay,
        rates=[stage.learning_rate] * 10**6,
        precision=stage.precision,
        device=device,
        processes=processes,
        whole=stage.whole,
    )
    generators = [torch.Generator(device).manual_seed(0)]
    rows = torch.randperm(SERIES, generator=torch.Generator().manual_seed(0))[:batch].to(device)
    seconds = []
    with computing(config.precision, device), synchronised(vqvae, processes.group if number == 1 else None):
        for taken in range(options.steps * ROUNDS + 10):
            if taken >= 10 and (taken - 10) % options.steps == 0:
                wait(device)
                seconds.append(time.perf_counter())
            step(taken, rows, generators)
        wait(device)
        seconds.append(time.perf_counter())
    times = [(end - begin) / options.steps for begin, end in itertools.pairwise(seconds)]
    return statistics.median(times), bool(step.graphs)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line(number: int, gpus: int, batch: int, seconds: float, graph: bool, one: float) -> list:
    return [
        f"stage {number}",
        str(gpus),
        str(batch),
        f"{1e3 * seconds:.2f}",
        f"{seconds / one:.2f}",
        "yes" if graph else "no",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--ssl", default="vicreg")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu is for trying this out [cuda]")
    options = parser.parse_args()
    rank = local_rank() or 0
    alone = {}
    if rank == 0:  # the others wait for it; before there is a group, of which a codebook would make use
        device, _ = choose_device(options.device)
        alone = {number: step_seconds(number, options, options.batch_size, device, ALONE) for number in (1, 2)}
    lines = [line(number, 1, options.batch_size, *of_one, of_one[0]) for number, of_one in alone.items()]
    with launched() as processes:
        device, _ = choose_device(options.device, local_rank())
        for number in (1, 2) if not processes.is_alone else ():
            for factor in (1, processes.size):
                batch = factor * options.batch_size
                measured = step_seconds(number, options, batch, device, processes)
                if processes.is_first:
                    lines.append(line(number, processes.size, batch, *measured, alone[number][0]))
        if processes.is_first:
            print(f"{kind(device)}, torch {torch.__version__}, {options.ssl}, {options.precision}")
            print(table(["stage", "GPUs", "batch", "median ms", "of one GPU", "graph"], lines))


if __name__ == "__main__":
    main()
