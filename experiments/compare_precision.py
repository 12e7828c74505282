"""Does rounding cost quality? Trains the same runs in every precision of the device and prints one Markdown table.

Each figure is a mean over seeds ± its standard deviation, and all of them are computed in float32, on the test set:

- MSE: of the reconstruction, in normalised units.
- NLL: of the prior, of masked test tokens, half of them masked at random; in nats.
- perplexity: of the codes of the test set.
- tokens: total variation distance between generated and training tokens, mean over positions; sampled in
  the precision of the run. It also has the noise of two finite sets, as the column of real test tokens shows.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import machine, table
from ncfast.cli.startup import choose_device
from ncfast.config import Config, make_config
from ncfast.data.sources import Dataset, load_dataset
from ncfast.engine.precision import PRECISIONS, computing, why_not
from ncfast.ncvqvae import NCVQVAE
from ncfast.training.fit import resolve_config, train


@torch.no_grad()
def tokenize(model: NCVQVAE, x: Tensor) -> Tensor:
    return torch.cat([model.vqvae.tokenize(block) for block in x.split(256)])


@torch.no_grad()
def negative_log_likelihood(model: NCVQVAE, tokens: Tensor, labels: Tensor) -> float:
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).to(tokens.device) < 0.5
    total = 0.0
    for own, mask, label in zip(tokens.split(256), masked.split(256), labels.split(256), strict=True):
        logits = model.prior(torch.where(mask, model.prior.num_codes, own), label)
        total += float(F.cross_entropy(logits[mask], own[mask], reduction="sum"))
    return total / int(masked.sum())


def total_variation(a: Tensor, b: Tensor, num_codes: int) -> float:
    """Tokens [N, n] and [M, n] -> mean over positions."""
    p, q = (F.one_hot(tokens, num_codes).float().mean(0) for tokens in (a, b))
    return float((p - q).abs().sum(-1).mean() / 2)


def measure(config: Config, dataset: Dataset, device: torch.device) -> dict[str, float]:
    begin = time.perf_counter()
    model = train(config, dataset, out=None, device=device, quiet=True)
    seconds = time.perf_counter() - begin
    generated = torch.cat(
        [torch.from_numpy(batch.tokens.astype("int64")) for batch in model.sample_batches(2048, seed=config.seed)]
    )
    with computing("fp32", device), torch.no_grad():
        train_x, test_x = (model.data.normalise(x, device) for x in (dataset.X_train, dataset.X_test))
        train_tokens, test_tokens = tokenize(model, train_x).cpu(), tokenize(model, test_x)
        rebuilt = torch.cat([model.vqvae.detokenize(tokens) for tokens in test_tokens.split(256)])
        K = config.codebook_size
        p = test_tokens.flatten().bincount(minlength=K) / test_tokens.numel()
        labels = torch.full((len(test_x),), model.prior.num_classes, device=device)
        if dataset.y_test is not None:
            labels = torch.from_numpy(dataset.y_test).to(device)
        return {
            "MSE": float(F.mse_loss(rebuilt, test_x)),
            "NLL": negative_log_likelihood(model, test_tokens, labels),
            "perplexity": float(torch.special.entr(p).sum().exp()),
            "tokens": total_variation(generated, train_tokens, K),
            "tokens, test": total_variation(test_tokens.cpu(), train_tokens, K),
            "seconds": seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", required=True, help="names or paths, as ncfast.train takes them")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--ssl", default="vicreg")
    parser.add_argument("--steps", type=int, default=2000, help="of each stage [2000]")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each precision [3]")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, _ = choose_device(options.device)
    print(f"{machine(device.type)}; {options.steps} steps a stage, ssl {options.ssl}, {options.seeds} seeds\n")
    columns = None
    for name in options.datasets:
        dataset = load_dataset(name, options.data_dir)
        for precision in PRECISIONS:
            if why_not(precision, device) is not None:
                continue
            steps = {"stage1_steps": options.steps, "stage2_steps": options.steps}
            epochs = {"stage1_epochs": None, "stage2_epochs": None}
            config = make_config("paper", ssl=options.ssl, precision=precision, **steps, **epochs)
            config = resolve_config(config, dataset, device)
            runs = [measure(dataclasses.replace(config, seed=seed), dataset, device) for seed in range(options.seeds)]
            line = [dataset.name, precision, *(spread([run[column] for run in runs]) for column in runs[0])]
            if columns is None:
                columns = ["data", "precision", *runs[0]]
                print(table(columns, [line]), flush=True)
            else:
                print("| " + " | ".join(line) + " |", flush=True)


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}"


if __name__ == "__main__":
    main()
