"""Where a training loop writes: log.jsonl always, TensorBoard when it is installed, a progress bar on the terminal."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm


class RunLog:
    """One JSON line an epoch in <folder>/log.jsonl and the same numbers in <folder>/tb/. No folder, no files."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None
        self.tensorboard = None
        if folder is None:
            return
        self.path = folder / "log.jsonl"
        self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by __exit__
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.tensorboard = SummaryWriter(folder / "tb")

    def rewind(self, stage: int, epoch: int) -> None:
        """Drops the lines of epochs that a killed run logged but did not save: a resumed run writes them again."""
        if self.file is None:
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed process
                continue
            if (record["stage"], record["epoch"]) <= (stage, epoch):
                kept.append(line + "\n")
        self.file.truncate(0)
        self.file.write("".join(kept))

    def write(self, stage: int, epoch: int, step: int, values: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"stage": stage, "epoch": epoch, "step": step, **values}) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"stage{stage}/{name}", value, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


class RunLogs:
    """The logs of several models trained at once: a list of values has one for each, anything else holds for all."""

    def __init__(self, folders: Sequence[Path | None]) -> None:
        self.logs = [RunLog(folder) for folder in folders]

    def rewind(self, stage: int, epoch: int) -> None:
        for log in self.logs:
            log.rewind(stage, epoch)

    def write(self, stage: int, epoch: int, step: int, values: dict[str, float | list[float]]) -> None:
        for e, log in enumerate(self.logs):
            log.write(stage, epoch, step, member_values(values, e))

    def __enter__(self) -> "RunLogs":
        return self

    def __exit__(self, *exception: Any) -> None:
        for log in self.logs:
            log.__exit__(*exception)


def member_values(values: dict[str, float | list[float]], e: int) -> dict[str, float]:
    return {name: value[e] if isinstance(value, list) else value for name, value in values.items()}


def progress_bar(description: str, total: int, initial: int = 0, unit: str = "step", quiet: bool = False) -> Any:
    """A bar with rate and time left: redrawn on a terminal, a line now and then in a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        mininterval=interval,
        dynamic_ncols=True,
        disable=quiet,
        smoothing=0.1,
    )
