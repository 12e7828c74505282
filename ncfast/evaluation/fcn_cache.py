"""Trained classifiers on disk, so that runs on one data set are measured by one and the same, trained once."""

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ncfast.engine.checkpoint import read_json, read_tensors, write_json, write_tensors
from ncfast.errors import UserError
from ncfast.evaluation.fcn import FCN, LAYERS, Recipe, train_fcn

FORMAT = 1


class Evaluator(NamedTuple):
    """A classifier and what names it: figures of evaluators with different hashes do not compare."""

    model: FCN
    sha256: str  # of data, recipe, seed and weights
    seed: int
    epochs: int


def default_folder() -> Path:
    """$XDG_CACHE_HOME/ncfast, or ~/.cache/ncfast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncfast"


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

    Files that are damaged, or hold something other than what their name says, are warned of and written again.

    Args:
        x, y, num_classes, recipe, seed, device: as `train_fcn` takes them.
        folder: made when it is missing; None keeps nothing.
        name: of the data set, the first part of the files' names; decides nothing.
        quiet: no progress bar.

    Raises:
        UserError: the folder cannot be written.
    """
    key = fingerprint(x, y, num_classes, recipe, seed)
    stem = f"fcn-{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}-{key[:16]}"
    epochs = recipe.epochs_for(len(x))

    def stored() -> Evaluator:
        model, sha256 = read(folder, stem, key, FCN(x.shape[1], num_classes))
        return Evaluator(model.to(device).eval(), sha256, seed, epochs)

    # The record is written last: where it is, the weights are whole.
    if folder is not None and (folder / f"{stem}.json").exists():
        try:
            return stored()
        except UserError as error:
            warnings.warn(f"the classifier is trained again: {error}", RuntimeWarning, stacklevel=2)
    if folder is not None:
        try:  # before any time is spent
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --cache") from error
    model = train_fcn(x, y, num_classes, recipe, seed, device, title="" if quiet else f"FCN ({name})")
    if folder is not None and (folder / f"{stem}.json").exists():
        # Another process was first. On a GPU the two need not be equal to the last bit, and one is to measure all.
        with contextlib.suppress(UserError):
            return stored()
    sha256 = fcn_sha256(key, model)
    if folder is not None:
        write_tensors(folder / f"{stem}.safetensors", model.state_dict())
        record = {"format": FORMAT, "key": key, "sha256": sha256, "name": name, "seed": seed, "epochs": epochs}
        write_json(folder / f"{stem}.json", {**record, "recipe": dataclasses.asdict(recipe)})
    return Evaluator(model, sha256, seed, epochs)


def read(folder: Path, stem: str, key: str, model: FCN) -> tuple[FCN, str]:
    """`model` with the weights of the files, and their hash.

    Raises:
        UserError: the files are not those of `key`, or have changed since they were written.
    """
    record = read_json(folder / f"{stem}.json")
    weights = folder / f"{stem}.safetensors"
    try:
        model.load_state_dict(read_tensors(weights))
    except RuntimeError as error:
        raise UserError(f"{weights} holds other tensors than the classifier's") from error
    sha256 = fcn_sha256(key, model)
    expected = {"format": FORMAT, "key": key, "sha256": sha256}
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in expected.items()):
        raise UserError(f"{weights} and its .json do not belong together, or are of other data")
    return model, sha256


def fingerprint(x: Tensor, y: np.ndarray, num_classes: int, recipe: Recipe, seed: int) -> str:
    """A hash of everything that a classifier is made from."""
    record = {
        "format": FORMAT,
        "shape": list(x.shape),
        "classes": num_classes,
        "layers": LAYERS,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(record).encode())
    digest.update(np.ascontiguousarray(x.cpu().numpy(), dtype="<f4"))
    digest.update(np.ascontiguousarray(y, dtype="<i8"))
    return digest.hexdigest()


def fcn_sha256(key: str, model: FCN) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()))
    return digest.hexdigest()
