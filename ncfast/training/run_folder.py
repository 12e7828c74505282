"""A run folder while it is trained: whether it may be written, its state, its metrics."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ncfast.config import Config, sampling_values
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import make_folder, read_json, read_state, write_json, write_state
from ncfast.engine.loop import StageResult
from ncfast.errors import UserError
from ncfast.models.trained import EARLIER, read_config, write_config

EPOCHS = ("stage1_epochs", "stage2_epochs", "refiner_epochs")  # of each stage; None of a refiner that there is not
LENGTHS = (*EPOCHS, "stage1_steps", "stage2_steps")  # options of how long a run is

# Of the data, which earlier versions did not have.
LATER_FACTS = ("missing", "shortest", "conditions", "reading", "levels")


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
    changed = {
        f.name: f"{f.name} was {getattr(old_config, f.name)!r} and is {getattr(config, f.name)!r}"
        for f in dataclasses.fields(Config)
        if getattr(old_config, f.name) != getattr(config, f.name)
    }
    fixed = [text for name, text in changed.items() if not may_change(name, old_config, config)]
    if fixed:
        raise UserError(f"{out} was started with other options ({'; '.join(fixed)}); use the same, or another --out")
    if old_data.identity != data.identity:
        raise UserError(
            f"{out} was trained on other data ({old_data.name}, {old_data.num_series} series); choose another --out"
        )
    read_metrics(out)  # what is damaged is better known before the training than after it
    if changed:
        change_options(out, old_config, config, data)
        print(f"warning: {out} goes on with other options: {'; '.join(changed.values())}", flush=True)


def may_change(name: str, old: Config, new: Config) -> bool:
    """Whether a run may go on with another value: of what only sampling uses, and of more epochs."""
    if name in LENGTHS:
        return all((getattr(new, each) or 0) >= (getattr(old, each) or 0) for each in EPOCHS)
    return name in sampling_values(new)


def change_options(out: Path, old: Config, new: Config, data: DataStats) -> None:
    """Writes the new options. A cosine over more epochs is taken up where the state is, at its rate there.

    Raises:
        UserError: more epochs of a stage whose state is not kept.
    """
    path = out / "state.pt"
    longer = [k for k, each in enumerate(EPOCHS, 1) if (getattr(new, each) or 0) > (getattr(old, each) or 0)]
    state = saved_state(out, torch.device("cpu"), run_sha256(old, data)) if path.exists() else None
    if longer and state is None and (out / "stage1.safetensors").exists():
        raise UserError(f"{out} has no state.pt to go on from with more epochs; choose another --out")
    ended = [k for k in longer if state is not None and k < state["stage"]]
    if ended:
        k, name = ended[0], EPOCHS[ended[0] - 1]
        raise UserError(
            f"stage {k} of {out} has ended, and only the state of stage {state['stage']} is kept: give "
            f"--{name.replace('_', '-')} {getattr(old, name)}, more epochs of stage {state['stage']}, or another --out"
        )
    if state is not None:
        write_state(path, {**state, "run": run_sha256(new, data)})  # of earlier versions, which counted all options
    write_config(out, new, data)


def run_sha256(config: Config, data: DataStats) -> str:
    """Equal for equal runs: data, and options but those with which a run may go on."""
    options = dataclasses.asdict(config)
    for name in (*LENGTHS, *sampling_values(config)):
        del options[name]
    return sha256_of(options, data)


def sha256_of(options: dict[str, Any], data: DataStats) -> str:
    # As of versions that lacked options, where these are as they were without.
    later = {name for name, value in EARLIER.items() if options.get(name) == value}
    if "refiner" in later:
        later |= {"refiner_dim", "refiner_temperature", "refiner_epochs", "refinements"}
    options = {name: value for name, value in options.items() if name not in later}
    known = {
        name: value for name, value in dataclasses.asdict(data.identity).items() if value or name not in LATER_FACTS
    }
    facts = [options, known]
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
        raise UserError(f"{path} is no state of a training; restore it, or move it away to begin again")
    if state["run"] not in (run, sha256_in(out)):
        raise UserError(f"{path} is of a run with other options or data; restore it, or move it away to begin again")
    return state


def sha256_in(out: Path) -> str:
    """Of the run in `out`, as versions before 0.2.0 wrote it into states: of all its options."""
    config, data = read_config(out)
    return sha256_of(dataclasses.asdict(config), data)


def stage_metrics(result: StageResult) -> dict[str, Any]:
    return {"epochs": result.epochs, "seconds": round(result.seconds, 1), **result.losses}


def record_metrics(out: Path, name: str, values: dict[str, Any]) -> None:
    write_json(out / "metrics.json", {**read_metrics(out), name: values})


def read_metrics(out: Path) -> dict[str, Any]:
    path = out / "metrics.json"
    metrics = read_json(path) if path.exists() else {}
    if not isinstance(metrics, dict):
        raise UserError(f"{path} holds no metrics of a run; move it away")
    return metrics
