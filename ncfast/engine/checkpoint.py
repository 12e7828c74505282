"""Files that are either the old one or the new one, whole: written to a temporary name, flushed, renamed."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ncfast.errors import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    return _read(path, lambda: json.loads(path.read_text()))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return _read(path, lambda: safetensors.torch.load_file(path, device=str(device)))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Training state: nested dicts and lists of tensors and numbers. Meant to be cheap enough for every epoch.

    A process killed at any moment leaves the old state or the new one at `path`. A spare file is overwritten in place
    and changes places with it: pages that the system already holds take a fifth of the time of new ones.
    """
    spare = path.with_name(f".{path.name}.spare")
    previous = path.with_name(f".{path.name}.previous")
    checksums = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)  # half of the time of a write to memory-cached pages
        with open(spare, "r+b" if spare.exists() else "w+b", buffering=0) as file:
            torch.save(state, file)
            file.truncate()
        previous.unlink(missing_ok=True)
        if path.exists():
            with contextlib.suppress(OSError):  # a file system without hard links has no spare next time
                os.link(path, previous)
        os.replace(spare, path)
        if previous.exists():
            os.replace(previous, spare)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free space or choose another folder") from error
    finally:
        torch.serialization.set_crc32_options(checksums)


def drop_spare_state(path: Path) -> None:
    """Gives back the disk space that `write_state` keeps beside `path`."""
    for suffix in ("spare", "previous"):
        path.with_name(f".{path.name}.{suffix}").unlink(missing_ok=True)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Never runs code from the file."""
    return _read(path, lambda: torch.load(path, map_location=device, weights_only=True))


def _read(path: Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is this the folder of a run?") from None
    except Exception as error:  # each format has errors of its own for a damaged file
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({first_line}); the file is damaged or of another format") from error
