"""Checks of the paper's parts: weights of the SSL losses, embeddings, views, masking of the prior, probes.

weights     each weight of each loss, times --factors: where reconstruction collapses. Stage 1 alone.
embeddings  token embeddings of the prior that start as the codebook, or at random.
views       augmented views reconstructed with the paper's weight and not at all, with SSL and without.
masking     priors trained with 64 % of the tokens masked, and with 36 %, which the authors' plain model had.
probes      kNN and SVM of codes that stay as they are, and of codes that follow train and test series while these
            are probed, as the authors' do. Stage 1 alone.
"""

import argparse
import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.cells import add_arguments, run, runs_of, trained
from experiments.held_out import add_measuring, as_table, cell_of, data_of, figures, sizes_of
from experiments.rows import Cell, Row
from ncfast.cli.parser import run as run_program
from ncfast.config import PAPER_METHODS
from ncfast.data.dataset import Dataset
from ncfast.engine.precision import computing
from ncfast.evaluation.measures import knn_accuracy, svm_accuracy
from ncfast.evaluation.protocol import chosen
from ncfast.jobs.reproduction import settings
from ncfast.ncvqvae import NCVQVAE
from ncfast.reproduce import VIEWS
from ncfast.training.self_supervision import SSL_LOSSES, SSL_WEIGHTS

CHECKS = ("weights", "embeddings", "views", "masking", "probes")
STAGE1 = ("weights", "probes")  # checks that look at codes alone
# Weights within a loss that no option sets, in its convention "ncvqvae".
TERMS = {
    "barlow": {"lambd": 0.005},
    "vicreg": {"sim": 25.0, "var": 25.0, "cov": 1.0},
    "vibcreg": {"sim": 25.0, "var": 25.0, "cov": 100.0},
}
COLLAPSED = 2.0  # times the squared error of a plain VQVAE
PROBED = {  # columns of the check of probes
    "knn_accuracy_moving": "kNN, codes move",
    "svm_accuracy_moving": "SVM, codes move",
    "moved_reconstruction_mse": "MSE, codes have moved",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument(
        "--methods", nargs="+", default=list(PAPER_METHODS), choices=PAPER_METHODS, help="[the paper's]"
    )
    parser.add_argument("--views", nargs="+", default=["gauss"], choices=VIEWS, help="[gauss]")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.1, 10, 100], help="of weights [0.1 10 100]")
    add_arguments(parser, variants=False)
    add_measuring(parser, measures=chosen(None), num_samples=None)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    sizes_of(arguments)
    more = {}
    if arguments.check in STAGE1:
        arguments.measures = ["reconstruction", "codebook", "knn", "svm"]
        more = {"stage2_epochs": 1}
    variants = variants_of(arguments.check, arguments.methods, arguments.views, arguments.factors)
    cells = [
        cell_of(arguments, name, variant, {"preset": "paper", **options, **more}, seed, terms=terms)
        for name in arguments.sets
        for seed in arguments.seeds
        for variant, (options, terms) in variants.items()
    ]
    folders = {"data": arguments.data, "runs": runs_of(arguments.out), "cache": arguments.cache}
    rows = run(cells, functools.partial(measured, probe=arguments.check == "probes", **folders), arguments)
    print(as_table(rows, PROBED if arguments.check == "probes" else {}))
    for line in collapsed(rows):
        print(line)


def variants_of(
    check: str, methods: list[str], views: list[str], factors: list[float]
) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Options of each variant, and the weights within its loss; what "+" says is what differs from the name before."""
    chosen = settings(methods, views)
    variants: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    for name, options in chosen.items():
        variants[name] = (options, {})
        ssl = options["ssl"]
        if check == "embeddings":
            variants[f"{name}+random-embeddings"] = ({**options, "embeddings": "random"}, {})
        elif check == "masking":
            variants[f"{name}+kept"] = ({**options, "masking": "kept"}, {})
        elif check == "views" and ssl != "none":
            variants[f"{name}+view-weight-0"] = ({**options, "view_weight": 0.0}, {})
        elif check == "weights" and ssl != "none":
            for factor in factors:
                variants[f"{name}+weight-x{factor:g}"] = ({**options, "ssl_weight": factor * SSL_WEIGHTS[ssl]}, {})
                for term, value in TERMS[ssl].items():
                    variants[f"{name}+{term}-x{factor:g}"] = (options, {term: factor * value})
    if check == "views":
        variants |= {f"views_{view}": ({"ssl": "views", "augment": [view]}, {}) for view in views}
    return variants


def measured(cell: Cell, device: torch.device, *, probe: bool, data: Path, runs: Path, cache: Path) -> Row:
    dataset = data_of(cell, data)
    with loss_with(cell["terms"]):
        model, seconds = trained(cell, dataset, device, runs)
    row = {"training_seconds": seconds, **figures(model, dataset, cell, cache)}
    if probe:
        row["values"] |= probed_while_codes_move(model, dataset)
    return row


@contextlib.contextmanager
def loss_with(terms: dict[str, float]) -> Iterator[None]:
    """Losses that this thread computes in it have these weights within; other threads train other cells."""
    of_thread.terms = terms
    try:
        yield
    finally:
        of_thread.terms = {}


def with_terms(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *views: loss(*views, **getattr(of_thread, "terms", {}))


of_thread = threading.local()
SSL_LOSSES |= {ssl: with_terms(SSL_LOSSES[ssl]) for ssl in TERMS}


@torch.no_grad()
def probed_while_codes_move(model: NCVQVAE, dataset: Dataset) -> dict[str, float]:
    """The authors' probe after the last epoch: the network in training mode, train series first, then test series.

    Batch norms see batches of them and the codebook follows them, so that features are of codes that move. What that
    does to the model, which the authors' prior then learns from, is the squared error of test series afterwards.
    """
    vqvae = copy.deepcopy(model.vqvae).train()

    def pooled(X: np.ndarray) -> np.ndarray:  # [N, C, L] -> [N, D]
        batches = model.data.normalise(X, model.device).split(model.config.batch_size)
        return torch.cat([vqvae.quantize(vqvae.encode(vqvae.spectrum(x)))[0].mean(1) for x in batches]).cpu().numpy()

    with computing("fp32", model.device):
        features = pooled(dataset.X_train), dataset.y_train, pooled(dataset.X_test), dataset.y_test
        vqvae.eval()
        test = model.data.normalise(dataset.X_test, model.device).split(model.chunk_size)
        errors = torch.cat([(vqvae.reconstruct(x) - x).square().flatten(1).mean(1) for x in test])
    return {
        "knn_accuracy_moving": knn_accuracy(*features),
        "svm_accuracy_moving": svm_accuracy(*features),
        "moved_reconstruction_mse": float(errors.mean()),
    }


def collapsed(rows: list[Row]) -> Iterator[str]:
    """Where the reconstruction of a variant is much worse than a plain VQVAE's of that set and seed."""
    error = {
        (row["cell"]["set"], row["cell"]["seed"], row["cell"]["variant"]): row["values"]["test_reconstruction_mse"]
        for row in rows
        if "test_reconstruction_mse" in row["values"]
    }
    for (name, seed, variant), value in error.items():
        plain = error.get((name, seed, "regular"), np.inf)
        if value > COLLAPSED * plain:
            yield f"collapsed: {Path(name).stem} {variant} seed {seed}, {value / plain:.2g} times the error of regular"


if __name__ == "__main__":
    run_program(main, on_interrupt="interrupted; the same command goes on")
