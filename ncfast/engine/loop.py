"""The training loop both stages share: epochs, batches, schedule, log, checkpoints, resuming."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncfast.engine.checkpoint import drop_spare_state, write_state
from ncfast.engine.logging import RunLog, RunLogs, progress_bar
from ncfast.errors import UserError

Step = Callable[[Tensor, torch.Generator | list[torch.Generator]], dict[str, Tensor]]


def derived_seed(*words: int) -> int:
    """A 63-bit seed for (seed, stage[, epoch]): streams that share no number."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def batches(num_series: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """One epoch of shuffled row indices. A single left-over row joins the batch before it: alone it has no variance."""
    rows = torch.randperm(num_series, generator=generator, device=device)
    ends = batch_ends(num_series, batch_size)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield rows[start:end]


def batch_ends(num_series: int, batch_size: int) -> list[int]:
    ends = [*range(batch_size, num_series, batch_size), num_series]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1:
        del ends[-2]
    return ends


def cosine(progress: float) -> float:
    """1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass
class Stage:
    """One stage of training.

    Attributes:
        number: 1 or 2.
        modules: everything with parameters or buffers.
        step: rows of the train set [B], generator -> losses of that batch; "loss" is minimised. For E models trained
            at once: rows [E, B], E generators -> losses [E] each.
    """

    number: int
    name: str
    modules: nn.ModuleDict
    step: Step
    num_series: int
    batch_size: int
    epochs: int
    learning_rate: float
    weight_decay: float

    @property
    def steps_per_epoch(self) -> int:
        return len(batch_ends(self.num_series, self.batch_size))


@dataclass(frozen=True)
class Progress:
    """Where a stage ended: epochs and seconds over all its processes, and the last epoch's mean losses."""

    epochs: int
    seconds: float
    losses: dict[str, float] | dict[str, list[float]]  # one for each of several models


def train_stage(
    stage: Stage,
    *,
    seed: int | Sequence[int],
    device: torch.device,
    log: RunLog | RunLogs,
    state_path: Path | None,
    state: dict[str, Any] | None,
    checkpoint_every: int = 1,
    quiet: bool = False,
) -> Progress:
    """Trains `stage` to its last epoch, from `state` when there is one.

    Every epoch draws its random numbers from a seed of its own, so a run continued after any epoch computes what an
    uninterrupted one would.

    Args:
        seed: one for each model where the stage trains several at once, each with the random numbers of a run alone.
        log: takes what `Progress.losses` holds.
        state_path: where the state goes every `checkpoint_every` epochs and after the last; None keeps none.
        state: as read from there.
    """
    parameters = list(stage.modules.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, fused=device.type in ("cpu", "cuda")
    )
    epoch, seconds, losses = 0, 0.0, {}
    if state is not None:
        stage.modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, seconds, losses = state["epoch"], state["seconds"], state["losses"]
    log.rewind(stage.number, epoch)

    per_epoch = stage.steps_per_epoch
    stage.modules.train()
    several = not isinstance(seed, int)
    seeds = seed if several else [seed]
    generators = [torch.Generator(device) for _ in seeds]
    begin = time.monotonic() - seconds
    shown = 0.0
    with progress_bar(stage.name, stage.epochs * per_epoch, epoch * per_epoch, quiet=quiet) as bar:
        while epoch < stage.epochs:
            for each, generator in zip(seeds, generators, strict=True):
                generator.manual_seed(derived_seed(each, stage.number, epoch))
            totals: dict[str, Tensor] = {}
            orders = [batches(stage.num_series, stage.batch_size, generator, device) for generator in generators]
            for i, members_rows in enumerate(zip(*orders, strict=True)):
                rows = torch.stack(members_rows) if several else members_rows[0]
                # The authors' scheduler also steps once between epochs, hence one step more in each.
                rate = stage.learning_rate * cosine((epoch * (per_epoch + 1) + i) / (stage.epochs * (per_epoch + 1)))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                batch_losses = stage.step(rows, generators if several else generators[0])
                batch_losses["loss"].sum().backward()  # members share no parameter: each gets its own gradient
                optimizer.step()
                batch_losses = {name: value.detach() for name, value in batch_losses.items()}
                share = rows.shape[-1] / stage.num_series
                for name, value in batch_losses.items():
                    totals[name] = totals.get(name, 0.0) + share * value
                bar.update(1)
                if time.monotonic() - shown > 1:  # reading the loss waits for the device
                    shown = time.monotonic()
                    bar.set_postfix(
                        epoch=f"{epoch + 1}/{stage.epochs}", loss=f"{float(batch_losses['loss'].mean()):.4f}"
                    )
            epoch += 1
            losses = {name: total.tolist() for name, total in totals.items()}
            seconds = time.monotonic() - begin
            lost = [
                str(each)
                for each, loss in zip(seeds, np.atleast_1d(losses["loss"]), strict=True)
                if not np.isfinite(loss)
            ]
            if lost:
                of_seeds = f" of seed {', '.join(lost)}" if several else ""
                raise UserError(
                    f"the loss of stage {stage.number}{of_seeds} is no longer finite after epoch {epoch}; "
                    f"lower --learning-rate (now {stage.learning_rate:g})"
                )
            log.write(stage.number, epoch, epoch * per_epoch, {**losses, "learning_rate": rate, "seconds": seconds})
            if state_path is not None and (epoch % checkpoint_every == 0 or epoch == stage.epochs):
                write_state(
                    state_path,
                    {
                        "stage": stage.number,
                        "epoch": epoch,
                        "seconds": seconds,
                        "losses": losses,
                        "modules": stage.modules.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                )
        if losses:
            bar.set_postfix(epoch=f"{epoch}/{stage.epochs}", loss=f"{np.mean(losses['loss']):.4f}")
    if state_path is not None:
        drop_spare_state(state_path)
    return Progress(epoch, seconds, losses)
