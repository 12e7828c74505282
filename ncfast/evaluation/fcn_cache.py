"""The classifier of a data set, trained once (`network_cache`)."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncfast.evaluation.fcn import FCN, LAYERS, Recipe, train_fcn
from ncfast.evaluation.network_cache import fingerprint, trained_once


class Evaluator(NamedTuple):
    """A classifier and what names it: figures of evaluators with different hashes do not compare."""

    model: FCN
    sha256: str  # of data, recipe, seed and weights
    seed: int
    epochs: int


def cached_fcn(
    x: Tensor,
    y: np.ndarray,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    folder: Path | None,
    *,
    name: str,
    quiet: bool = False,
) -> Evaluator:
    """The classifier of these series, recipe and seed: from `folder`, or trained and kept there.

    Args:
        x, y, num_classes, recipe, seed, device: as `train_fcn` takes them.
        folder, name: as `trained_once` takes them.
        quiet: no progress bar.

    Raises:
        UserError: the folder cannot be written.
    """
    record = {
        "shape": list(x.shape),
        "classes": num_classes,
        "layers": LAYERS,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
    }
    epochs = recipe.epochs_for(len(x))
    model, sha256 = trained_once(
        "fcn",
        lambda: FCN(x.shape[1], num_classes),
        lambda: train_fcn(x, y, num_classes, recipe, seed, device, title="" if quiet else f"FCN ({name})"),
        key=fingerprint(record, x.cpu().numpy().astype("<f4"), y.astype("<i8")),
        folder=folder,
        name=name,
        facts={"seed": seed, "epochs": epochs, "recipe": dataclasses.asdict(recipe)},
    )
    return Evaluator(model.to(device).eval(), sha256, seed, epochs)
