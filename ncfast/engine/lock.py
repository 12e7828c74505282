"""One process at a time in a folder."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ncfast.engine.checkpoint import reason
from ncfast.errors import UserError

try:
    import fcntl
except ImportError:  # not a Unix: there is no lock
    fcntl = None

NAME = ".lock"
# What a file system says that has no locks.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Inside the block this process has the folder, which is made if there is none, for itself.

    The system lets go of the lock when the process ends, however it ends, so a dead one locks nobody out; the file
    only says who it is. Where the file system has no locks, nothing is kept out.

    Raises:
        UserError: another process has it, or it cannot be written to.
    """
    path = folder / NAME
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = None if fcntl is None else acquire(path)
    except BlockingIOError:
        holder = " ".join(path.read_text(errors="replace").split()) if path.exists() else ""
        raise UserError(
            f"{folder} is being written by another process{holder and f' ({holder})'}; wait for its end, or choose "
            "another --out"
        ) from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {reason(error)}; choose another --out") from error
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the folder may be gone
                path.unlink(missing_ok=True)  # before the lock is let go: later it could be the next one's
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()


def acquire(path: Path) -> int:
    """An open descriptor that holds the lock. Raises BlockingIOError when another one does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
        # Whoever had it before may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)
