"""Files that are either the old one or the new one, whole: written to a temporary name, flushed, renamed."""

import contextlib
import glob
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ncfast.errors import UserError

WITHOUT_CHECKSUMS = threading.Lock()  # whether torch.save writes them is said for all threads


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Raises:
        UserError: it cannot be written. What was at `path` is still there.
    """
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # of what went wrong the error above tells
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def put_in_place(temporary: Path, path: Path) -> None:
    """Contents first, then the name, then the folder that has the name: what a power cut leaves is old or new."""
    with open(temporary, "r+b") as file:  # Windows flushes only what may be written to
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # not every file system takes it
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def put_first(temporary: Path, path: Path) -> None:
    """Gives the file its name, which no file has yet: of several processes one comes first.

    Raises:
        FileExistsError: another was first. Where the system has no hard links its file may be empty for a moment.
    """
    try:
        os.link(temporary, path)  # unlike a rename, it does not replace
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as exFAT, has names that only one can make
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(temporary, path)


def remove_leftovers(path: Path) -> None:
    """Temporary files for `path` of processes that were killed: this host's dead ones, and any untouched for a day."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, _, pid = leftover.name[len(path.name) + 2 : -len(".tmp")].rpartition(".")
        with contextlib.suppress(OSError, ValueError):
            dead = host == socket.gethostname() and not is_running(int(pid))
            if dead or time.time() - leftover.stat().st_mtime > 86400:
                leftover.unlink()


def is_running(pid: int) -> bool:
    if sys.platform == "win32":  # signal 0 is Ctrl-C there; True leaves the file to its age
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def reason(error: BaseException) -> str:
    """One line. HDF5 puts the system's message at the end of a long story."""
    told = re.search(r"error message = '([^']+)'", str(error))
    if told:
        return told.group(1)
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def make_folder(path: Path) -> None:
    """Raises UserError when there is none and none can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {path}: {reason(error)}; choose another folder") from error


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
    try:
        with open(spare, "r+b" if spare.exists() else "w+b", buffering=0) as file:
            with without_checksums():
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
        raise UserError(f"cannot write {path}: {reason(error)}; free space or choose another folder") from error


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """They take half of the time of a write to memory-cached pages."""
    with WITHOUT_CHECKSUMS:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            yield
        finally:
            torch.serialization.set_crc32_options(before)


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
