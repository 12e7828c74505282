"""Trained networks on disk, so that runs on one data set are measured by one and the same, trained once."""

import contextlib
import hashlib
import json
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from ncfast.engine.checkpoint import read_json, read_tensors, write_json, write_tensors
from ncfast.errors import UserError

FORMAT = 1

Network = TypeVar("Network", bound=nn.Module)
BEING_MADE: defaultdict[Path, Any] = defaultdict(threading.RLock)  # another thread that wants the same waits


def default_folder() -> Path:
    """$XDG_CACHE_HOME/ncfast, or ~/.cache/ncfast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ncfast"


def trained_once(
    what: str,
    make: Callable[[], Network],
    train: Callable[[], Network],
    *,
    key: str,
    folder: Path | None,
    name: str,
    facts: dict[str, Any],
) -> tuple[Network, str]:
    """A network and the hash of key and weights: from `folder`, or trained and kept there.

    Files that are damaged, or hold something other than what their name says, are warned of and written again.

    Args:
        what: the kind of network, such as "fcn": the first part of the files' names.
        make: an untrained network, on the CPU, to hold the stored weights.
        train: the trained network.
        key: a hash of everything that the network is made from (`fingerprint`).
        folder: made when it is missing; None keeps nothing.
        name: of the data set, the second part of the files' names; decides nothing.
        facts: for people who read the record; "seed" is the third part of the files' names.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder is None:
        model = train()
        return model, weights_sha256(key, model)
    stem = f"{what}-{''.join(c if c.isalnum() else '-' for c in name)}-seed{facts['seed']}-{key[:16]}"
    with BEING_MADE[folder / stem]:
        # The record is written last: where it is, the weights are whole.
        if (folder / f"{stem}.json").exists():
            try:
                return read(folder, stem, key, make())
            except UserError as error:
                warnings.warn(f"the {what} network is trained again: {error}", RuntimeWarning, stacklevel=3)
        try:  # before any time is spent
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another --cache") from error
        model = train()
        if (folder / f"{stem}.json").exists():
            # Another process was first. On a GPU the two need not be equal to the last bit, and one is to measure all.
            with contextlib.suppress(UserError):
                return read(folder, stem, key, make())
        sha256 = weights_sha256(key, model)
        write_tensors(folder / f"{stem}.safetensors", model.state_dict())
        write_json(folder / f"{stem}.json", {"format": FORMAT, "key": key, "sha256": sha256, "name": name, **facts})
        return model, sha256


def read(folder: Path, stem: str, key: str, model: Network) -> tuple[Network, str]:
    """`model` with the weights of the files, and their hash.

    Raises:
        UserError: the files are not those of `key`, or have changed since they were written.
    """
    record = read_json(folder / f"{stem}.json")
    weights = folder / f"{stem}.safetensors"
    try:
        model.load_state_dict(read_tensors(weights))
    except RuntimeError as error:
        raise UserError(f"{weights} holds other tensors than the network's") from error
    sha256 = weights_sha256(key, model)
    expected = {"format": FORMAT, "key": key, "sha256": sha256}
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in expected.items()):
        raise UserError(f"{weights} and its .json do not belong together, or are of other data")
    return model, sha256


def fingerprint(record: dict[str, Any], *arrays: np.ndarray) -> str:
    """A hash of what a network is made from: numbers and words, and arrays in their own bytes."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **record}).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def weights_sha256(key: str, model: nn.Module) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    return digest.hexdigest()
