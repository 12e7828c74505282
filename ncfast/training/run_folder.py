"""A run folder while it is trained: whether it may be written, its state, its metrics."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ncfast.config import Config
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import make_folder, read_json, read_state, write_json
from ncfast.engine.loop import StageResult
from ncfast.errors import UserError
from ncfast.models.trained import read_config, write_config


def prepare_run(out: Path, config: Config, data: DataStats, resume: bool) -> None:
    """A new folder for a new run, or the check that `out` holds this very run."""
    for folder in (out, out.parent) if out.name.startswith("seed") else (out,):
        if (folder / "seeds.json").exists():  # of `train --seeds` of earlier versions
            raise UserError(f"{folder} holds runs of several seeds, which cannot be continued; choose another --out")
    make_folder(out)
    if not (out / "config.json").exists():
        write_config(out, config, data)
        return
    if not resume:
        raise UserError(f"{out} already holds a run; add --resume to continue it, or choose another --out")
    old_config, old_data = read_config(out)
    changed = [
        f"{f.name} was {getattr(old_config, f.name)!r} and is {getattr(config, f.name)!r}"
        for f in dataclasses.fields(Config)
        if getattr(old_config, f.name) != getattr(config, f.name)
    ]
    if changed:
        raise UserError(f"{out} was started with other options ({'; '.join(changed)}); use the same, or another --out")
    if old_data.identity != data.identity:
        raise UserError(
            f"{out} was trained on other data ({old_data.name}, {old_data.num_series} series); choose another --out"
        )
    read_metrics(out)  # what is damaged is better known before the training than after it


def run_sha256(config: Config, data: DataStats) -> str:
    """Equal for equal runs: options and data."""
    facts = [dataclasses.asdict(config), dataclasses.asdict(data.identity)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def saved_state(out: Path, device: torch.device, run: str) -> dict[str, Any] | None:
    """What `train_stage` goes on from, where a run was started before.

    Raises:
        UserError: a file that is damaged, or of another run than this one.
    """
    path = out / "state.pt"
    if not path.exists():
        return None
    state = read_state(path, device)
    if not isinstance(state, dict) or not {"stage", "epoch", "run"} <= state.keys():
        raise UserError(f"{path} is no state of a training; restore it, or remove it to begin again")
    if state["run"] != run:
        raise UserError(f"{path} is of a run with other options or data; restore it, or remove it to begin again")
    return state


def stage_metrics(result: StageResult) -> dict[str, Any]:
    return {"epochs": result.epochs, "seconds": round(result.seconds, 1), **result.losses}


def record_metrics(out: Path, name: str, values: dict[str, Any]) -> None:
    write_json(out / "metrics.json", {**read_metrics(out), name: values})


def read_metrics(out: Path) -> dict[str, Any]:
    path = out / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds no metrics of a run; remove it")
    return metrics
