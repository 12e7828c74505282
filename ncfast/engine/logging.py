"""Where a training loop writes: log.jsonl always, TensorBoard when it is installed, a progress bar on the terminal."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from ncfast.engine.checkpoint import atomic_path, reason
from ncfast.errors import UserError


class RunLog:
    """One JSON line an epoch in <folder>/log.jsonl and the same numbers in <folder>/tb/. No folder, no files."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None
        self.tensorboard = None
        if folder is None:
            return
        self.path = folder / "log.jsonl"
        self.open()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        # It waits for its thread, which looks again after flush_secs where Ctrl-C came between a value and its news.
        self.tensorboard = SummaryWriter(folder / "tb", flush_secs=2)

    def rewind(self, stage: int, epoch: int) -> None:
        """Drops the lines of epochs that a killed run logged but did not save: a resumed run writes them again."""
        if self.file is None:
            return
        with self.explained():
            lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if is_before(line, stage, epoch)]
        if kept == lines:
            return
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self.file.close()
        self.open()

    def open(self) -> None:
        with self.explained():
            self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - closed by __exit__

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {reason(error)}; free space or choose another folder, then continue "
                "the run with --resume"
            ) from error

    def write(self, stage: int, epoch: int, step: int, values: dict[str, float]) -> None:
        if self.file is not None:
            with self.explained():
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
            # After a write that failed it tries again, and would hide why.
            with contextlib.suppress(OSError) if kind else self.explained():
                self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def is_before(line: bytes, stage: int, epoch: int) -> bool:
    """Whether a line of the log is whole, and of this epoch or an earlier one."""
    try:
        record = json.loads(line)
        return line.endswith(b"\n") and (record["stage"], record["epoch"]) <= (stage, epoch)
    except (ValueError, TypeError, KeyError):  # the last line of a killed process, or not one of ours
        return False


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
