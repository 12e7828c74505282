"""The training loop both stages share: epochs, batches, schedule, log, checkpoints, resuming."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ncfast.engine.checkpoint import drop_spare_state, write_state
from ncfast.engine.drawing import DrawingFrom
from ncfast.engine.logging import RunLog, progress_bar
from ncfast.engine.processes import ALONE, Processes
from ncfast.engine.step import Losses, TrainingStep
from ncfast.errors import UserError


def derived_seed(*words: int) -> int:
    """A 63-bit seed for (seed, stage[, epoch]): streams that share no number."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def seeded(*words: int) -> DrawingFrom:
    """Inside the block what is drawn on the CPU comes from that seed: for initial weights."""
    return DrawingFrom(torch.Generator().manual_seed(derived_seed(*words)))


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
        losses: rows of the train set [B], generator -> losses of that batch; "loss" is minimised.
        precision: of its products and convolutions (`engine.precision`).
        whole: of `modules` those that each of several processes computes from all rows (`engine.step`).
    """

    number: int
    name: str
    modules: nn.ModuleDict
    losses: Losses
    num_series: int
    batch_size: int
    epochs: int
    learning_rate: float
    weight_decay: float
    precision: str = "fp32"
    whole: nn.Module | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(batch_ends(self.num_series, self.batch_size))

    def learning_rates(self) -> list[float]:
        """Of every step."""
        steps = self.steps_per_epoch
        # The authors' scheduler also steps once between epochs, hence one step more in each.
        return [
            self.learning_rate * cosine((epoch * (steps + 1) + i) / (self.epochs * (steps + 1)))
            for epoch in range(self.epochs)
            for i in range(steps)
        ]


@dataclass(frozen=True)
class StageResult:
    """Where a stage ended: epochs and seconds over all its processes, and the last epoch's mean losses."""

    epochs: int
    seconds: float
    losses: dict[str, float]


def train_stage(
    stage: Stage,
    *,
    seed: int,
    device: torch.device,
    log: RunLog,
    run: str = "",
    state_path: Path | None,
    state: dict[str, Any] | None,
    checkpoint_every: int | None = None,
    graph: bool = True,
    quiet: bool = False,
    processes: Processes = ALONE,
) -> StageResult:
    """Trains `stage` to its last epoch, from `state` when there is one.

    Every epoch draws its random numbers from a seed of its own, so a run continued after any epoch computes what an
    uninterrupted one would.

    Args:
        log: takes what `StageResult.losses` holds.
        run: of which run the state is; it goes into it.
        state_path: where the state goes every `checkpoint_every` epochs and after the last; None keeps none.
        state: as read from there.
        checkpoint_every: None: checkpointing takes at most 5 % of the time.
        graph: on a GPU, make the step one CUDA graph.
        processes: those that train together, all with the same arguments, but for log, state_path and quiet.
    """
    step = TrainingStep(
        stage.losses,
        stage.modules,
        num_series=stage.num_series,
        weight_decay=stage.weight_decay,
        rates=stage.learning_rates(),
        precision=stage.precision,
        device=device,
        graph=graph,
        processes=processes,
        whole=stage.whole,
    )
    epoch, seconds, losses = 0, 0.0, {}
    if state is not None:
        try:
            stage.modules.load_state_dict(state["modules"])
            step.load_state_dict(state["optimizer"])
            epoch, seconds, losses = int(state["epoch"]), float(state["seconds"]), dict(state["losses"])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            why = str(error).splitlines()[-1].strip()
            raise UserError(
                f"{state_path} does not fit {stage.name} ({why}); restore it, or move it away to begin again"
            ) from error
    log.rewind(stage.number, epoch)

    per_epoch = stage.steps_per_epoch
    stage.modules.train()
    # The second is for a codebook that replaces its dead codes. The step may replace them.
    generators = [torch.Generator(device), torch.Generator(device)]
    begin = time.monotonic() - seconds
    shown = 0.0
    checkpoints = Checkpoints(state_path, checkpoint_every)
    with progress_bar(stage.name, stage.epochs * per_epoch, epoch * per_epoch, quiet=quiet) as bar:
        while epoch < stage.epochs:
            generators[0].manual_seed(derived_seed(seed, stage.number, epoch))
            generators[1].manual_seed(derived_seed(seed, stage.number, epoch, 1))
            step.begin_epoch()
            for i, rows in enumerate(batches(stage.num_series, stage.batch_size, generators[0], device)):
                step(epoch * per_epoch + i, rows, generators)
                bar.update(1)
                if time.monotonic() - shown > 1:  # reading the loss waits for the device
                    shown = time.monotonic()
                    loss = float(step.losses["loss"])
                    bar.set_postfix(epoch=f"{epoch + 1}/{stage.epochs}", loss=f"{loss:.4f}")
            epoch += 1
            losses = step.mean_losses()
            seconds = time.monotonic() - begin
            if not math.isfinite(losses["loss"]):
                raise UserError(
                    f"the loss of stage {stage.number} is no longer finite after epoch {epoch}; "
                    f"lower --learning-rate (now {stage.learning_rate:g})"
                )
            rate = step.rates[epoch * per_epoch - 1]
            log.write(stage.number, epoch, epoch * per_epoch, {**losses, "learning_rate": rate, "seconds": seconds})
            if checkpoints.due(epoch, epoch == stage.epochs):
                checkpoints.write(
                    {
                        "run": run,
                        "stage": stage.number,
                        "epoch": epoch,
                        "seconds": seconds,
                        "losses": losses,
                        "modules": stage.modules.state_dict(),
                        "optimizer": step.state_dict(),
                    }
                )
        if losses:
            bar.set_postfix(epoch=f"{epoch}/{stage.epochs}", loss=f"{losses['loss']:.4f}")
    if state_path is not None:
        drop_spare_state(state_path)
    return StageResult(epoch, seconds, losses)


class Checkpoints:
    """When the state goes to disk."""

    LARGEST_SHARE = 0.05  # of the time, when nobody says how often

    def __init__(self, path: Path | None, every: int | None) -> None:
        self.path = path
        self.every = every
        self.cost = 0.0  # seconds of the last one
        self.last = time.monotonic()

    def due(self, epoch: int, is_last: bool) -> bool:
        if self.path is None:
            return False
        if self.every is not None:
            return is_last or epoch % self.every == 0
        return is_last or (time.monotonic() - self.last) * self.LARGEST_SHARE >= self.cost

    def write(self, state: dict[str, Any]) -> None:
        begin = time.monotonic()
        write_state(self.path, state)
        self.last = time.monotonic()
        self.cost = self.last - begin
