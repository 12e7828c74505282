"""The published table of multivariate generators, with ours beside it: Context-FID and the scores of TimeGAN.

The protocol is that of Diffusion-TS (ICLR 2024), which took TimeGAN's: all windows of stride 1, scaled to 0..1 over the
whole file, are trained on and compared with as many generated ones. Sines are made; --data holds stock_data.csv and
ETTh1.csv, as the repositories of TimeGAN and Informer have them. The variant "real" compares the real windows with
themselves: halves for the first two scores, and for the third networks trained on them.
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import table
from experiments.cells import Cell, Row, add_arguments, chosen_variants, run, runs_of, trained
from ncfast.cli.parser import run as run_program
from ncfast.data.dataset import Dataset, from_arrays
from ncfast.data.layout import Reading
from ncfast.data.windows import load_windows
from ncfast.errors import UserError
from ncfast.evaluation.gru_scores import discriminative_scores, predictive_scores
from ncfast.evaluation.published import Interval, ScoreRecipe, to_unit_range
from ncfast.evaluation.ts2vec import cached_ts2vec, context_fid
from ncfast.ncvqvae import NCVQVAE

FILES = {"stocks": "stock_data.csv", "etth": "ETTh1.csv"}
SETS = ("sines", *FILES)
REAL = "real"
SCORES = ("context_fid", "discriminative", "predictive")
CODED = 2000  # windows of which tokens are counted

# Of Diffusion-TS (Yuan and Qiao, ICLR 2024), tables 1 and 2: the scores, each with its 95 % interval.
PUBLISHED: dict[tuple[str, int], dict[str, tuple[str, str, str]]] = {
    ("sines", 24): {
        "Diffusion-TS": (".006±.000", ".006±.007", ".093±.000"),
        "TimeGAN": (".101±.014", ".011±.008", ".093±.019"),
        "TimeVAE": (".307±.060", ".041±.044", ".093±.000"),
        "Diffwave": (".014±.002", ".017±.008", ".093±.000"),
        "DiffTime": (".006±.001", ".013±.006", ".093±.000"),
        "Cot-GAN": ("1.337±.068", ".254±.137", ".100±.000"),
        "Original": ("", "", ".094±.001"),
    },
    ("stocks", 24): {
        "Diffusion-TS": (".147±.025", ".067±.015", ".036±.000"),
        "TimeGAN": (".103±.013", ".102±.021", ".038±.001"),
        "TimeVAE": (".215±.035", ".145±.120", ".039±.000"),
        "Diffwave": (".232±.032", ".232±.061", ".047±.000"),
        "DiffTime": (".236±.074", ".097±.016", ".038±.001"),
        "Cot-GAN": (".408±.086", ".230±.016", ".047±.001"),
        "Original": ("", "", ".036±.001"),
    },
    ("etth", 24): {
        "Diffusion-TS": (".116±.010", ".061±.009", ".119±.002"),
        "TimeGAN": (".300±.013", ".114±.055", ".124±.001"),
        "TimeVAE": (".805±.186", ".209±.058", ".126±.004"),
        "Diffwave": (".873±.061", ".190±.008", ".130±.001"),
        "DiffTime": (".299±.044", ".100±.007", ".121±.004"),
        "Cot-GAN": (".980±.071", ".325±.099", ".129±.000"),
        "Original": ("", "", ".121±.005"),
    },
    ("etth", 64): {
        "Diffusion-TS": (".631±.058", ".106±.048", ".116±.000"),
        "TimeGAN": ("1.130±.102", ".227±.078", ".132±.008"),
        "TimeVAE": (".827±.146", ".171±.142", ".118±.004"),
        "Diffwave": ("1.543±.153", ".254±.074", ".133±.008"),
        "DiffTime": ("1.279±.083", ".150±.003", ".118±.004"),
        "Cot-GAN": ("3.008±.277", ".296±.348", ".135±.003"),
    },
    ("etth", 128): {
        "Diffusion-TS": (".787±.062", ".144±.060", ".110±.003"),
        "TimeGAN": ("1.553±.169", ".188±.074", ".153±.014"),
        "TimeVAE": ("1.062±.134", ".154±.087", ".113±.005"),
        "Diffwave": ("2.354±.170", ".274±.047", ".129±.003"),
        "DiffTime": ("2.554±.318", ".176±.015", ".120±.008"),
        "Cot-GAN": ("2.639±.427", ".451±.080", ".126±.001"),
    },
    ("etth", 256): {
        "Diffusion-TS": (".423±.038", ".060±.030", ".109±.013"),
        "TimeGAN": ("5.872±.208", ".442±.056", ".220±.008"),
        "TimeVAE": (".826±.093", ".178±.076", ".110±.027"),
        "Diffwave": ("2.899±.289", ".304±.068", ".132±.001"),
        "DiffTime": ("3.524±.830", ".243±.005", ".118±.003"),
        "Cot-GAN": ("4.075±.894", ".461±.010", ".129±.000"),
    },
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.tsg", description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="[all]")
    parser.add_argument("--lengths", nargs="+", type=int, default=[24], help="of the windows [24]")
    parser.add_argument("--repeats", type=int, default=5, help="networks of each GRU score [5]")
    parser.add_argument("--encoders", type=int, default=3, help="TS2Vec encoders of Context-FID [3]")
    parser.add_argument("--score-budget", type=float, default=1.0, metavar="X", help="share of the scores' steps [1]")
    add_arguments(parser)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.out.suffix == ".csv":
        raise UserError("--out of this program is a file of JSON lines")
    cells = [
        {
            "set": name,
            "length": length,
            "variant": variant,
            "options": options,
            "seed": seed,
            "budget": arguments.budget,
            "repeats": arguments.repeats,
            "encoders": arguments.encoders,
            "score_budget": arguments.score_budget,
        }
        for seed in arguments.seeds
        for length in arguments.lengths
        for variant, options in chosen_variants(arguments, [REAL]).items()
        for name in arguments.sets
    ]
    work = functools.partial(measured, data=arguments.data, runs=runs_of(arguments.out), cache=arguments.cache)
    print(as_table(run(cells, work, arguments)))


def windows_of_set(name: str, length: int, data: Path) -> Dataset:
    """All windows of stride 1 [n, C, length], in 0..1."""
    if name == "sines":  # TimeGAN's, with the seed of Diffusion-TS
        frequency, phase = np.moveaxis(np.random.RandomState(123).uniform(0, 0.1, (10000, 5, 2)), -1, 0)
        x = (np.sin(frequency[..., None] * np.arange(length) + phase[..., None]) + 1) / 2
        return from_arrays(x.astype(np.float32), name=name, reading=Reading(layout="nctd"))
    dataset = load_windows(data / FILES[name], length, test_share=0)
    return dataclasses.replace(dataset, X_train=to_unit_range(dataset.X_train, dataset.X_train), name=name)


def measured(cell: Cell, device: torch.device, *, data: Path, runs: Path, cache: Path) -> Row:
    dataset = windows_of_set(cell["set"], cell["length"], data)
    x = dataset.X_train
    row: Row = {"windows": len(x)}
    if cell["variant"] == REAL:
        half, other = np.array_split(x[np.random.default_rng(cell["seed"]).permutation(len(x))], 2)
        made = x
    else:
        model, row["training_seconds"] = trained(cell, dataset, device, runs)
        row |= facts(model, x)
        begin = time.monotonic()
        half, other = x, model.sample(len(x), seed=cell["seed"])[0]
        made = other
        row["sampling_seconds"] = round(time.monotonic() - begin, 2)
    recipe = ScoreRecipe()
    steps = [
        max(1, round(cell["score_budget"] * each)) for each in (recipe.discriminative_steps, recipe.predictive_steps)
    ]
    networks: dict[str, Any] = {"repeats": cell["repeats"], "seed": cell["seed"], "device": device}
    row["discriminative"] = discriminative_scores(half, other, steps=steps[0], **networks)
    row["predictive"] = predictive_scores(x, made, steps=steps[1], **networks)
    encoder_steps = None if cell["score_budget"] == 1 else max(1, round(cell["score_budget"] * 600))
    name = f"{cell['set']}{cell['length']}"
    encoders = (
        cached_ts2vec(x, seed, device, cache, name=name, steps=encoder_steps, quiet=True)
        for seed in range(cell["encoders"])
    )
    row["context_fid"] = [context_fid(encoder, half, other) for encoder in encoders]
    return row


def facts(model: NCVQVAE, x: np.ndarray) -> Row:
    """Of the codes: how many tokens a window is, how many codes are used, what is lost."""
    chosen = x[np.random.default_rng(0).permutation(len(x))[:CODED]]
    coded = model.data.normalise(chosen, model.device)
    scale = model.data.units(model.device, model.data.levels_of(chosen))[1]  # where levels are apart, of each window
    blocks = coded.split(model.chunk_size)
    with torch.no_grad():
        tokens = torch.cat([model.vqvae.tokenize(block) for block in blocks])
        rebuilt = torch.cat([model.vqvae.reconstruct(block) for block in blocks])
    return {
        "tokens": tokens.shape[1],
        "codes": model.config.codebook_size,
        "codes_used": len(tokens.unique()),
        "reconstruction_mse": float(((rebuilt - coded) * scale).square().mean()),
        "precision": model.precision,
    }


def as_table(rows: list[Row]) -> str:
    """Our variants, means ± 95 % intervals over seeds and repeats, and the published figures of each set and length."""
    columns = ["data", "method", "seeds", "Context-FID", "discriminative", "predictive"]
    columns += ["tokens", "codes used", "MSE", "training s"]
    lines = []
    for key in dict.fromkeys((row["cell"]["set"], row["cell"]["length"]) for row in rows):
        own = [row for row in rows if (row["cell"]["set"], row["cell"]["length"]) == key]
        data = f"{key[0]} {key[1]}"
        for variant in dict.fromkeys(row["cell"]["variant"] for row in own):
            group = [row for row in own if row["cell"]["variant"] == variant]
            cells = [data, f"ncfast {variant}" if variant != REAL else REAL, str(len(group))]
            cells += [shown(Interval.of([value for row in group for value in row[score]])) for score in SCORES]
            if variant != REAL:
                cells += [str(group[0]["tokens"]), f"{mean(group, 'codes_used'):.0f} of {group[0]['codes']}"]
                cells += [f"{mean(group, 'reconstruction_mse'):.3f}", f"{mean(group, 'training_seconds'):.0f}"]
            lines.append(cells + [""] * (len(columns) - len(cells)))
        for method, figures in PUBLISHED.get(key, {}).items():
            lines.append([data, method, "published", *figures, "", "", "", ""])
    return table(columns, lines)


def mean(rows: list[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def shown(interval: Interval) -> str:
    return f"{interval.mean:.3f}" + ("" if interval.half_width is None else f"±{interval.half_width:.3f}")


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
