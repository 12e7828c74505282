"""Do generated series keep what depends on something far away? Synthetic sets with a known dependence.

The first bump of a series, up or down by chance, decides the second, --lags columns of tokens later: 1, 4, 16. All else
is noise and a slow wave. Both are read from series by a matched filter; in bits, how much one says of the other (1 in
the data) is taken of test series, of the same through the codebook, and of generated ones.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import table
from experiments.cells import add_arguments, chosen_variants, configured, run, runs_of, trained
from experiments.held_out import spread
from experiments.rows import Cell, Row
from ncfast.cli.parser import run as run_program
from ncfast.data.dataset import Dataset, from_arrays
from ncfast.data.layout import Reading
from ncfast.errors import UserError
from ncfast.evaluation.material import Material

LENGTH = 128
COLUMN = 4  # samples: the halvings of `with_columns` leave 32 columns
FIRST = 8  # where the first bump begins
WIDTH = 8  # of a bump, in samples
BUMP = 2 * np.sin(np.pi * (np.arange(WIDTH) + 0.5) / WIDTH)
TRAIN, TEST = 1000, 2000
SHOWN = {
    "bits_test": "bits, test",
    "bits_shuffled": "bits, shuffled",
    "bits_reconstructed": "bits, through the codebook",
    "bits": "bits, generated",
    "agreement": "agreement, generated",
    "up": "first up, generated",
    "columns": "columns",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.dependence", description=__doc__.splitlines()[0])
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 4, 16], help="columns between the bumps [1 4 16]")
    add_arguments(parser, data=False)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if not all(lag >= 1 and places(lag)[1] + WIDTH <= LENGTH for lag in arguments.lags):
        raise UserError(f"lags are 1 to {(LENGTH - FIRST - 2 * WIDTH) // COLUMN + 1} columns; got {arguments.lags}")
    cells = [
        {
            "set": f"lag{lag}",
            "variant": variant,
            "options": with_columns(options),
            "seed": seed,
            "budget": arguments.budget,
        }
        for seed in arguments.seeds
        for variant, options in chosen_variants(arguments).items()
        for lag in arguments.lags
    ]
    print(as_table(run(cells, functools.partial(measured, runs=runs_of(arguments.out)), arguments)))


def dataset_of(lag: int, seed: int = 0) -> Dataset:
    """TRAIN and TEST series [n, 1, LENGTH] whose bumps are `lag` columns apart."""
    generator = np.random.default_rng(seed)
    n = TRAIN + TEST
    sign = generator.choice([-1.0, 1.0], n)[:, None]
    t = np.arange(LENGTH)
    wave = np.sin(2 * np.pi * (t / LENGTH + generator.random((n, 1))))
    x = 0.5 * wave + 0.2 * generator.normal(size=(n, LENGTH))
    for place in places(lag):
        x[:, place : place + WIDTH] += sign * BUMP
    x = x[:, None].astype(np.float32)
    return from_arrays(x[:TRAIN], X_test=x[TRAIN:], name=f"lag{lag}", reading=Reading(layout="nctd"))


def places(lag: int) -> tuple[int, int]:
    """First samples of both bumps: from the last column of one to the first of the other it is `lag` columns."""
    return FIRST, FIRST + WIDTH + COLUMN * (lag - 1)


def signs(x: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether both bumps of series [n, 1, LENGTH] go up, bool [n] each."""
    first, second = (x[:, 0, place : place + WIDTH] @ BUMP > 0 for place in places(lag))
    return first, second


def bits(first: np.ndarray, second: np.ndarray) -> float:
    """Mutual information of two bits, bool [n] each, by their frequencies."""
    joint = np.histogram2d(first, second, bins=2, range=[[0, 1], [0, 1]])[0] / len(first)
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    return float(sum(p * np.log2(p / q) for p, q in zip(joint.flat, apart.flat, strict=True) if p > 0))


def with_columns(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a grid whose columns are COLUMN samples."""
    hop = configured(options, seed=0).n_fft // 4
    return {"halvings": round(math.log2(COLUMN / hop)), **options}


def measured(cell: Cell, device: torch.device, *, runs: Path) -> Row:
    lag = int(cell["set"].removeprefix("lag"))
    dataset = dataset_of(lag)
    model, seconds = trained(cell, dataset, device, runs)
    material = Material(model, dataset, quiet=True)
    test = signs(material.test.numpy(), lag)
    made = signs(material.generated(cell["seed"]).x.numpy(), lag)
    shuffled = np.random.default_rng(cell["seed"]).permutation(test[1])
    values = {
        "bits_test": bits(*test),
        "bits_shuffled": bits(test[0], shuffled),
        "bits_reconstructed": bits(*signs(material.test_coded.reconstructed.numpy(), lag)),
        "bits": bits(*made),
        "agreement": float((made[0] == made[1]).mean()),
        "up": float(made[0].mean()),
        "columns": float(model.vqvae.grid[1]),
    }
    return {"training_seconds": seconds, "values": values, "number_format": model.precision}


def as_table(rows: list[Row]) -> str:
    keys = dict.fromkeys((row["cell"]["set"], row["cell"]["variant"]) for row in rows)
    lines = []
    for key in keys:
        group = [row for row in rows if (row["cell"]["set"], row["cell"]["variant"]) == key]
        lines.append([*key, str(len(group)), *(spread([row["values"][name] for row in group]) for name in SHOWN)])
    return table(["data", "variant", "seeds", *SHOWN.values()], lines)


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
