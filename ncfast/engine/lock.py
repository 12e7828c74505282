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
except ImportError:  # Windows
    fcntl = None
    import msvcrt

NAME = ".lock"
FAR = 2**30  # of the byte that is locked on Windows, where nobody else can then read it, as the text before it
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
        descriptor = acquire(path)
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
        if fcntl is None:  # a file that is open, such as the next one's, cannot be removed there
            os.close(descriptor)
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink(missing_ok=True)  # before the lock is let go: later it could be the next one's
        if fcntl is not None:
            os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it holds a run
                folder.rmdir()


def acquire(path: Path) -> int:
    """An open descriptor that holds the lock. Raises BlockingIOError when another one does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            take(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
        # Whoever had it before may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if fcntl is None or os.path.samestat(os.stat(path), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)


def take(descriptor: int) -> None:
    """Raises BlockingIOError when another process has the lock."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(descriptor, FAR, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
    os.lseek(descriptor, 0, os.SEEK_SET)
