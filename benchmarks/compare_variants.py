"""Which options make a better generator? Trains variants of a preset for as many steps and measures each.

To choose by: `--holdout 0.2` measures on a share of the train split and never looks at the test split. Variants of
sampling share the model of "base". docs/experiments.md has what came of it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from common import machine, table

from ncfast.cli import choose_device
from ncfast.config import make_config, sampling_config
from ncfast.data.dataset import Dataset
from ncfast.data.sources import load_dataset
from ncfast.evaluation import evaluate
from ncfast.evaluation.fcn_cache import default_folder
from ncfast.ncvqvae import NCVQVAE
from ncfast.reproduce import hold_out
from ncfast.training import resolve_config, train

REVIVED = {"codebook_init": "kmeans", "dead_code_threshold": 1.0}
TRAINING: dict[str, dict[str, Any]] = {
    "base": {},
    "ssl none": {"ssl": "none"},
    "views, no SSL": {"ssl": "views"},
    "barlow": {"ssl": "barlow"},
    "vibcreg": {"ssl": "vibcreg"},
    "gauss + warp": {"augment": ("gauss", "warp")},
    "64 codes": {"codebook_size": 64},
    "128 codes": {"codebook_size": 128},
    "k-means, revived": REVIVED,
    "64 codes, k-means, revived": {"codebook_size": 64, **REVIVED},
    "128 codes, k-means, revived": {"codebook_size": 128, **REVIVED},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "36 % masked": {"masking": "kept"},
    "random embeddings": {"embeddings": "random"},
    "wider prior": {"prior_ff_mult": 4},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature 0.9": {"temperature": 0.9},
    "temperature 1.1": {"temperature": 1.1},
    "choice temperature 1": {"choice_temperature": 1.0},
    "choice temperature 10": {"choice_temperature": 10.0},
    "5 steps": {"decoding_steps": 5},
    "20 steps": {"decoding_steps": 20},
    "google": {"unmasking": "google"},
    "guidance 1.5": {"guidance_scale": 1.5},
}
MEASURES = ("reconstruction", "codebook", "knn", "fid", "is", "cas", "acd", "mdd")
SHOWN = {
    "FID": "FID",
    "IS": "IS",
    "CAS": "CAS",
    "knn_accuracy": "kNN",
    "test_reconstruction_mse": "MSE",
    "test_perplexity": "perplexity",
    "ACD": "ACD",
    "MDD": "MDD",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--steps", type=int, default=1000, help="of each stage [1000]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--holdout", type=float, help="share of the train split to measure on [the test split]")
    parser.add_argument("--num-samples", type=int, default=1000, help="series a comparison [1000]")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"{', '.join([*TRAINING, *SAMPLING])} [all]")
    parser.add_argument("--measures", nargs="+", default=MEASURES, choices=MEASURES, help="[all of them]")
    parser.add_argument("--precision", help="[the device's]")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="of the models, for several processes [0/1]")
    parser.add_argument("--out", type=Path, help="JSON lines, added to")
    parser.add_argument("--table", type=Path, nargs="+", help="train nothing: print what these files hold")
    parser.add_argument("--device", default="auto")
    return parser


def measured(model: NCVQVAE, dataset: Dataset, options: argparse.Namespace, seed: int) -> dict[str, float]:
    result = evaluate(
        model,
        dataset,
        measures=options.measures,
        num_samples=options.num_samples,
        seeds=[seed],
        cache=default_folder(),
        quiet=True,
    )
    return {figure["metric"]: figure["value"] for figure in result["measures"] if figure["value"] is not None}


def main() -> None:
    options = make_parser().parse_args()
    if options.table:
        rows = [json.loads(line) for path in options.table for line in path.read_text().splitlines()]
        print(as_table(rows))
        return
    device, _ = choose_device(options.device)
    part, parts = map(int, options.part.split("/"))
    wanted = options.only or [*TRAINING, *SAMPLING]
    jobs = [
        (name, variant, seed)
        for seed in options.seeds
        for name in options.datasets
        for variant in TRAINING
        if variant in wanted or (variant == "base" and set(wanted) & set(SAMPLING))
    ]
    rows = []
    for name, variant, seed in jobs[part::parts]:
        dataset = load_dataset(name, options.data_dir)
        if options.holdout is not None:
            dataset = hold_out(dataset, options.holdout)
        steps = {"stage1_steps": options.steps, "stage2_steps": options.steps}
        values = {**steps, "stage1_epochs": None, "stage2_epochs": None, "precision": options.precision}
        config = make_config(options.preset, **values, **TRAINING[variant], seed=seed)
        begin = time.perf_counter()
        model = train(resolve_config(config, dataset, device), dataset, out=None, device=device, quiet=True)
        seconds = time.perf_counter() - begin
        made = {variant: model}
        if variant == "base":
            for other, sampling in SAMPLING.items():
                if other in wanted:
                    changed = sampling_config(model.config, sampling)
                    made[other] = NCVQVAE(changed, model.data, model.vqvae, model.prior, device)
        for label, each in made.items():
            values = measured(each, dataset, options, seed)
            row = {"dataset": dataset.name, "variant": label, "seed": seed, "seconds": seconds, "values": values}
            rows.append(
                row | {"options": {k: str(v) for k, v in vars(options).items()}, "machine": machine(device.type)}
            )
            print(f"{dataset.name} {label} seed {seed}: FID {values.get('FID', float('nan')):.3f}", flush=True)
            if options.out is not None:
                with open(options.out, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(as_table(rows))


def as_table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds, a row for each variant."""
    columns = ["data", "variant", "seeds", *SHOWN.values(), "training s"]
    keys = list(dict.fromkeys((row["dataset"], row["variant"]) for row in rows))
    order = [*TRAINING, *SAMPLING]
    keys.sort(key=lambda key: (key[0], order.index(key[1])))
    lines = []
    for name, variant in keys:
        group = [row for row in rows if (row["dataset"], row["variant"]) == (name, variant)]
        cells = [spread([row["values"][metric] for row in group if metric in row["values"]]) for metric in SHOWN]
        lines.append([name, variant, str(len(group)), *cells, spread([row["seconds"] for row in group])])
    return table(columns, lines)


def spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1g}"


if __name__ == "__main__":
    main()
