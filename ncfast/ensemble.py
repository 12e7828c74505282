"""Several runs at once: the same configuration from several seeds, as one stacked model. `--seeds` of the program.

Each member draws what its run alone would draw, so it ends where that run ends, up to rounding. Products, convolutions,
normalisations, codebooks and the optimiser take all members at once; random numbers, views and the SSL losses go member
by member.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncfast.config import Config, make_config
from ncfast.data.augment import Augment
from ncfast.data.facts import DataFacts
from ncfast.data.sources import Dataset
from ncfast.engine.checkpoint import read_json, write_json, write_tensors
from ncfast.engine.lock import sole_writer
from ncfast.engine.logging import RunLogs, member_values
from ncfast.engine.loop import Progress, Stage, train_stage
from ncfast.engine.memory import exhaustion_explained
from ncfast.engine.precision import computing
from ncfast.errors import UserError
from ncfast.ncvqvae import NCVQVAE, load_weights
from ncfast.nn.stacked import stack, unstack
from ncfast.stage1 import VQVAE, WITHOUT_LOSS, stage1_losses
from ncfast.stage2 import Prior, TokenDistribution, stage2_losses
from ncfast.training import (
    OUT_OF_MEMORY,
    new_prior,
    new_self_supervision,
    new_vqvae,
    on_device,
    prepare_folder,
    reconstruction,
    record_metrics,
    run_sha256,
    saved_state,
    stage,
    summary,
)


@exhaustion_explained(OUT_OF_MEMORY)
def train_ensemble(
    config: Config,
    seeds: Sequence[int],
    dataset: Dataset,
    *,
    out: Path | None,
    device: torch.device,
    resume: bool = False,
    checkpoint_every: int | None = None,
    graph: bool = True,
    quiet: bool = False,
) -> list[NCVQVAE]:
    """`training.train` for every seed, in one process; arguments as there.

    With `out`, every member has a run folder of its own, `out`/seed<seed>; the state of all is `out`/state.pt.

    Raises:
        UserError: a seed that comes twice; a folder that holds another run.
    """
    configs = member_configs(config, seeds)
    data = DataFacts.of(dataset)
    how = {"checkpoint_every": checkpoint_every, "graph": graph, "quiet": quiet}
    with contextlib.nullcontext() if out is None else sole_writer(out):
        if out is not None:
            prepare_folders(out, member_folders(out, configs), configs, data, resume)
        return train_stages(configs, dataset, data, out, device, how)


def train_stages(
    configs: Sequence[Config],
    dataset: Dataset,
    data: DataFacts,
    out: Path | None,
    device: torch.device,
    how: dict[str, Any],
) -> list[NCVQVAE]:
    """`train_ensemble` in a folder that is ready. how: arguments of `train_stage`."""
    seeds = [config.seed for config in configs]
    folders = [None] * len(configs) if out is None else member_folders(out, configs)
    run = run_sha256(configs, data)
    x = data.normalise(dataset.X_train, device)  # [N, C, L]
    labels = None if dataset.y_train is None else torch.from_numpy(dataset.y_train).to(device)
    state = None if out is None else saved_state(out, device, run)
    loop = {
        "seed": seeds,
        "run": run,
        "device": device,
        "state_path": None if out is None else out / "state.pt",
        **how,
    }

    with RunLogs(folders) as log, computing(configs[0].precision, device):
        vqvaes = [new_vqvae(each, data) for each in configs]
        if state is not None and state["stage"] == 2:
            for vqvae, folder in zip(vqvaes, folders, strict=True):
                load_weights(folder / "stage1.safetensors", vqvae.to(device).eval())
        else:
            first = stage1(configs, vqvaes, x, device)
            progress = train_stage(first, log=log, state=state, **loop)
            state = None
            unstack(first.modules["vqvae"], vqvaes)
            del first  # the projectors
            for e, (vqvae, folder) in enumerate(zip(vqvaes, folders, strict=True)):
                vqvae.to(device).eval()
                if folder is not None:
                    write_tensors(folder / "stage1.safetensors", vqvae.state_dict())
                    metrics = {**member_summary(progress, e), **reconstruction(vqvae, data, dataset)}
                    record_metrics(folder, "stage1", metrics)

        priors = [new_prior(each, vqvae, data) for each, vqvae in zip(configs, vqvaes, strict=True)]
        second = stage2(configs, vqvaes, priors, x, labels, device)
        progress = train_stage(second, log=log, state=state, **loop)
        unstack(second.modules["prior"], priors)
        if out is not None:
            for e, (prior, folder) in enumerate(zip(priors, folders, strict=True)):
                write_tensors(folder / "stage2.safetensors", prior.state_dict())
                record_metrics(folder, "stage2", member_summary(progress, e))
    return [NCVQVAE(*parts, device) for parts in zip(configs, [data] * len(seeds), vqvaes, priors, strict=True)]


def member_configs(config: Config, seeds: Sequence[int]) -> list[Config]:
    """The configuration of each member."""
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice or not seeds:
        got = f"{', '.join(map(str, twice))} more than once" if twice else "none"
        raise UserError(f"--seeds are different integers, such as 1,2,3,4; got {got}")
    for seed in seeds:
        make_config(seed=seed)  # refuses what is no seed
    if config.codebook_init != "random" or config.dead_code_threshold > 0:
        raise UserError(
            "--seeds stacks codebooks that draw nothing: train one --seed after the other, or leave out "
            "--codebook-init and --dead-code-threshold"
        )
    return [dataclasses.replace(config, seed=seed) for seed in seeds]


def member_folders(out: Path, configs: Sequence[Config]) -> list[Path]:
    return [out / f"seed{config.seed}" for config in configs]


def prepare_folders(
    out: Path, folders: Sequence[Path], configs: Sequence[Config], data: DataFacts, resume: bool
) -> None:
    """New folders for new runs, or the check that `out` holds these very runs."""
    seeds = [config.seed for config in configs]
    path = out / "seeds.json"
    if (out / "config.json").exists():
        raise UserError(f"{out} holds the run of one seed; choose another --out")
    if path.exists():
        if not resume:
            raise UserError(f"{out} already holds runs; add --resume to continue them, or choose another --out")
        old = read_json(path)
        if old != seeds:
            old = ",".join(map(str, old)) if isinstance(old, list) else old
            raise UserError(f"{out} was started with --seeds {old}; use the same, or another --out")
    else:
        for folder in folders:
            if (folder / "config.json").exists():
                raise UserError(f"{folder} already holds a run of its own; choose another --out")
        write_json(path, seeds)
    for folder, config in zip(folders, configs, strict=True):
        prepare_folder(folder, config, data, resume)


def member_summary(progress: Progress, e: int) -> dict[str, Any]:
    return summary(dataclasses.replace(progress, losses=member_values(progress.losses, e)))


def stage1(configs: Sequence[Config], vqvaes: Sequence[VQVAE], x: Tensor, device: torch.device) -> Stage:
    """Stage 1 of all members. `vqvaes` keep their weights: `unstack` writes the trained ones into them."""
    config = configs[0]
    modules = nn.ModuleDict({"vqvae": stack(vqvaes, folded=True)})
    augment = None if config.ssl == "none" else Augment(config.augment)
    if config.ssl not in WITHOUT_LOSS:
        modules["ssl"] = stack([new_self_supervision(each) for each in configs], folded=True)
    on_device(modules, device)
    ssl = None if config.ssl in WITHOUT_LOSS else modules["ssl"]

    def losses(rows: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        batch = x[rows]  # [E, B, C, L]
        view = None
        if augment is not None:
            view = fold(torch.stack([augment(own, each) for own, each in zip(batch, generators, strict=True)]))
        return stage1_losses(modules["vqvae"], ssl, fold(batch), view, config.view_weight)

    return stage(1, config, modules, losses, len(x))


def fold(x: Tensor) -> Tensor:
    """[E, B, C, L] -> [B, E·C, L]."""
    return x.transpose(0, 1).flatten(1, 2)


def stage2(
    configs: Sequence[Config],
    vqvaes: Sequence[VQVAE],
    priors: Sequence[Prior],
    x: Tensor,
    labels: Tensor | None,
    device: torch.device,
) -> Stage:
    """Stage 2 of all members; `priors` as `vqvaes` of stage 1."""
    config = configs[0]
    distributions = [TokenDistribution(vqvae, x) for vqvae in vqvaes]
    modules = nn.ModuleDict({"prior": stack(priors, folded=False)}).to(device)

    def losses(rows: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        drawn = zip(distributions, rows, generators, strict=True)
        tokens = torch.stack([distribution.draw(own, each) for distribution, own, each in drawn])  # [E, B, n]
        return stage2_losses(modules["prior"], tokens, None if labels is None else labels[rows], config, generators)

    return stage(2, config, modules, losses, len(x))
