"""Which options make a better generator? Trains variants of a preset for as many epochs and measures each.

To choose by: `--holdout 0.25` measures on a share of the train split and never looks at the test split. Variants of the
prior have the codes of "base", variants of sampling its whole model. docs/experiments.md has what came of it.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine, table
from experiments.lost_networks import TwoBands, WithWideDecoder
from ncfast.cli.flags import add_config_arguments, given_config_values
from ncfast.cli.startup import choose_device
from ncfast.config import PRESETS, Config, make_config, sampling_config
from ncfast.data.dataset import Dataset
from ncfast.data.sources import load_dataset
from ncfast.data.stats import DataStats
from ncfast.engine.logging import RunLog
from ncfast.engine.loop import Stage, train_stage
from ncfast.engine.precision import computing
from ncfast.evaluation import evaluate
from ncfast.evaluation.network_cache import default_folder
from ncfast.jobs.reproduction import hold_out, shortened
from ncfast.models.vqvae import VQVAE
from ncfast.ncvqvae import NCVQVAE
from ncfast.nn.encoder_decoder import num_downsampling_blocks
from ncfast.training.fit import resolve_config
from ncfast.training.stages import make_stage1, make_stage2, new_prior, seeded

REVIVED = {"codebook_init": "kmeans", "dead_code_threshold": 1.0}
# Options, and what no option says: "network", "halvings_more".
CODES: dict[str, dict[str, Any]] = {
    "base": {},
    "ssl none": {"ssl": "none"},
    "views, no SSL": {"ssl": "views"},
    "barlow": {"ssl": "barlow"},
    "vibcreg": {"ssl": "vibcreg"},
    "gauss + warp": {"augment": ("gauss", "warp")},
    "view weight 1": {"view_weight": 1.0},
    "projector 1024": {"projector_dim": 1024},
    "projector 512": {"projector_dim": 512},
    "128 codes": {"codebook_size": 128},
    "512 codes": {"codebook_size": 512},
    "128 codes, k-means, revived": {"codebook_size": 128, **REVIVED},
    "codebook decay 0.99": {"codebook_decay": 0.99},
    "dim 128": {"dim": 128},
    "n_fft 4": {"n_fft": 4},
    "n_fft 16": {"n_fft": 16},
    "a halving more": {"halvings_more": 1},
    "a halving less": {"halvings_more": -1},
    "a halving less, 128 codes": {"halvings_more": -1, "codebook_size": 128},
    "two bands": {"network": TwoBands},
    "wide decoder": {"network": WithWideDecoder},
    "learning rate 2e-3": {"learning_rate": 2e-3},
}
# Options, and "epochs", a multiple, and "average", the decay of a moving average that takes the weights' place.
PRIORS: dict[str, dict[str, Any]] = {
    "half of the epochs": {"epochs": 0.5},
    "2x the epochs": {"epochs": 2},
    "4x the epochs": {"epochs": 4},
    "feed-forward 4x": {"prior_ff_mult": 4},
    "4 heads": {"prior_heads": 4},
    "2 layers": {"prior_layers": 2},
    "width 128": {"prior_dim": 128},
    "learning rate 3e-4": {"learning_rate": 3e-4},
    "weight decay 0.05": {"weight_decay": 0.05},
    "class dropout 0.1": {"class_dropout": 0.1},
    "36 % masked": {"masking": "kept"},
    "random embeddings": {"embeddings": "random"},
    "averaged weights": {"average": 0.999},
}
TWENTY = {"decoding_steps": 20, "choice_temperature": 6.0}
SAMPLING: dict[str, dict[str, Any]] = {
    **{
        f"{steps} steps, choice {choice:g}": {"decoding_steps": steps, "choice_temperature": choice}
        for steps, choices in {5: (4.0,), 10: (1.0, 8.0), 20: (4.0, 6.0, 8.0, 12.0), 30: (10.0,), 40: (10.0,)}.items()
        for choice in choices
    },
    "40 steps, any order": {"decoding_steps": 40, "choice_temperature": 1e6},
    "20 steps, choice 6, temperature 0.9": {**TWENTY, "temperature": 0.9},
    "20 steps, choice 6, temperature 1.1": {**TWENTY, "temperature": 1.1},
    "20 steps, choice 6, top 8": {**TWENTY, "top_k": 8},
    "google": {"unmasking": "google"},
    "guidance 1.5": {"guidance_scale": 1.5},
    "guidance 2": {"guidance_scale": 2.0},
}
MEASURES = ("reconstruction", "codebook", "knn", "fid", "is", "cas", "acd", "mdd", "nnd")
OF_CODES = ("reconstruction", "codebook", "knn")
SHOWN = {
    "FID": "FID",
    "FID_reconstructed": "FID of reconstruction",
    "IS": "IS",
    "CAS": "CAS",
    "knn_accuracy": "kNN",
    "test_reconstruction_mse": "MSE",
    "test_perplexity": "perplexity",
    "ACD": "ACD",
    "MDD": "MDD",
    "NND": "NND",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=[])
    parser.add_argument("--data-dir")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="what the variants vary [paper]")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the preset's epochs [0.5]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--holdout", type=float, help="share of the train split to measure on [the test split]")
    parser.add_argument("--num-samples", type=int, default=2000, help="series a comparison [2000]")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*CODES, *PRIORS, *SAMPLING],
        metavar="VARIANT",
        help=f"{'; '.join([*CODES, *PRIORS, *SAMPLING])} [all]".replace("%", "%%"),
    )
    parser.add_argument("--measures", nargs="+", default=MEASURES, choices=MEASURES, help="[all of them]")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of the codes, for several processes [0/1]")
    parser.add_argument("--out", type=Path, help="JSON lines, added to")
    parser.add_argument("--table", type=Path, nargs="+", help="train nothing: print what these files hold")
    parser.add_argument("--device", default="auto")
    add_config_arguments(parser, default="of the preset", without=("seed",))
    return parser


def main() -> None:
    options = make_parser().parse_args()
    if options.table:
        rows = [json.loads(line) for path in options.table for line in path.read_text().splitlines()]
        print(as_table(rows))
        return
    device, _ = choose_device(options.device)
    part, parts = map(int, options.part.split("/"))
    wanted = options.only or [*CODES, *PRIORS, *SAMPLING]
    jobs = [
        (name, variant, seed)
        for seed in options.seeds
        for variant in CODES
        for name in options.datasets
        if variant in wanted or (variant == "base" and set(wanted) & {*PRIORS, *SAMPLING})
    ]
    rows = []
    for name, variant, seed in jobs[part::parts]:
        dataset = load_dataset(name, options.data_dir)
        if options.holdout is not None:
            dataset = hold_out(dataset, options.holdout)
        for label, model, seconds in trained(variant, wanted, dataset, seed, options, device):
            measures = [m for m in options.measures if label in CODES or m not in OF_CODES]
            values = measured(model, dataset, measures, options.num_samples, seed)
            row = {"dataset": dataset.name, "variant": label, "seed": seed, "seconds": seconds, "values": values}
            given = {k: str(v) for k, v in vars(options).items()}
            rows.append(row | {"options": given, "machine": machine(device.type)})
            print(f"{dataset.name} {label} seed {seed}: FID {values.get('FID', float('nan')):.3f}", flush=True)
            if options.out is not None:
                with open(options.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(as_table(rows))


def trained(
    variant: str, wanted: list[str], dataset: Dataset, seed: int, options: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, NCVQVAE, float]]:
    """Label, model and seconds of training: of the variant and, after "base", of those that share its codes."""
    values = dict(CODES[variant])
    network, more = values.pop("network", VQVAE), values.pop("halvings_more", 0)
    values = {**given_config_values(options), **values}
    config = make_config(options.preset, **values, seed=seed)
    if more:
        halvings = num_downsampling_blocks(dataset.length, config.n_fft, config.samples_per_column) + more
        config = dataclasses.replace(config, halvings=max(1, halvings))
    config = shortened(resolve_config(config, dataset, device), options.budget)
    data = DataStats.of(dataset)
    x = data.normalise(dataset.X_train, device)
    labels = None if dataset.y_train is None else torch.from_numpy(dataset.y_train).to(device)

    def run(stage: Stage) -> float:
        begin = time.perf_counter()
        with RunLog(None) as log, computing(config.precision, device):
            train_stage(stage, seed=seed, device=device, log=log, state_path=None, state=None, quiet=True)
        return time.perf_counter() - begin

    with seeded(seed, 1):
        vqvae = network(config, data.channels, data.length)
    first = make_stage1(config, vqvae, x, device)
    seconds = run(first)
    del first  # the projector
    vqvae.eval()

    def with_prior(config: Config, average: float | None = None) -> tuple[NCVQVAE, float]:
        prior = new_prior(config, vqvae, data)
        stage = make_stage2(config, vqvae, prior, x, labels, device)
        if average is None:
            taken = run(stage)
        else:
            averages = MovingAverages(prior, average)
            taken = run(averages.following(stage))
            averages.put_in_place()
        return NCVQVAE(config, data, vqvae, prior, device), taken

    base, taken = with_prior(config)
    yield variant, base, seconds + taken
    if variant != "base":
        return
    for label in [each for each in PRIORS if each in wanted]:
        own = dict(PRIORS[label])
        epochs, average = own.pop("epochs", 1), own.pop("average", None)
        changed = dataclasses.replace(config, **own, stage2_epochs=max(1, round(config.stage2_epochs * epochs)))
        other, taken = with_prior(changed, average)
        yield label, other, seconds + taken
    for label in [each for each in SAMPLING if each in wanted]:
        yield label, NCVQVAE(sampling_config(config, SAMPLING[label]), data, vqvae, base.prior, device), 0.0


class MovingAverages:
    """Of a model's parameters."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float) -> None:
        self.parameters = list(model.parameters())
        self.averages = [parameter.clone() for parameter in self.parameters]
        self.decay = decay

    def following(self, stage: Stage) -> Stage:
        """The stage, whose steps also move the averages."""

        def losses(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            now = [parameter.detach() for parameter in self.parameters]
            torch._foreach_lerp_(self.averages, now, 1 - self.decay)
            return stage.losses(rows, generator)

        return dataclasses.replace(stage, losses=losses)

    @torch.no_grad()
    def put_in_place(self) -> None:
        torch._foreach_copy_(self.parameters, self.averages)


def measured(model: NCVQVAE, dataset: Dataset, measures: list[str], num_samples: int, seed: int) -> dict[str, float]:
    result = evaluate(
        model, dataset, measures=measures, num_samples=num_samples, seeds=[seed], cache=default_folder(), quiet=True
    )
    return {figure["metric"]: figure["value"] for figure in result["measures"] if figure["value"] is not None}


def as_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, a row for each variant."""
    columns = ["data", "variant", "seeds", *SHOWN.values(), "training s"]
    keys = list(dict.fromkeys((row["dataset"], row["variant"]) for row in rows))
    order = [*CODES, *PRIORS, *SAMPLING]
    keys.sort(key=lambda key: (key[0], order.index(key[1])))
    lines = []
    for name, variant in keys:
        group = [row for row in rows if (row["dataset"], row["variant"]) == (name, variant)]
        cells = [spread([row["values"][metric] for row in group if metric in row["values"]]) for metric in SHOWN]
        seconds = "-" if variant in SAMPLING else spread([row["seconds"] for row in group])
        lines.append([name, variant, str(len(group)), *cells, seconds])
    return table(columns, lines)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1g}"


if __name__ == "__main__":
    main()
