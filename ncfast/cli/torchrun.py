"""A program as several processes, started by torchrun: their process group, who prints, how an error ends them all."""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ncfast.cli.parser import end, print_error
from ncfast.engine.processes import ALONE, Processes, current_processes
from ncfast.errors import UserError

# Of one exchange. A process that ends takes the others with it sooner: gloo sees its connections close, and torchrun
# ends them. The longest wait without either is for the first process, which downloads data and writes files.
TIMEOUT = timedelta(minutes=10)
REPORTED = "ncfast/reported"  # in the store: how many processes have come to print the error that ends them
REPORT_WAIT = timedelta(seconds=10)
LOST = UserError(
    "another of the processes has ended, and so do all; what was saved is kept: the same command with --resume "
    "continues, with any number of processes"
)


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun started, in a process group inside the block; without torchrun this one, alone.

    Only the first prints and warns. A UserError ends each process that it reaches with exit code 2 and is printed once;
    a process that loses the others, one of which was killed or has failed, ends too, and one of them says so.
    """
    if local_rank() is None:
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # Gloo for CPU tensors, NCCL for CUDA tensors; it connects when the first of these are sent, from the GPU that the
    # program has made the current one by then.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    end_when_told(store)
    try:
        with silenced() if rank > 0 else contextlib.nullcontext():
            yield current_processes()
    except UserError as error:
        report(error, store, rank)
        end(2)
    except KeyboardInterrupt:
        if rank == 0:
            raise
        end(130)
    except RuntimeError as error:
        if not of_lost_connection(error):
            raise
        say_lost(store)
        end(2)
    gc.collect()  # CUDA graphs that hold messages; NCCL would wait for them
    distributed.destroy_process_group()


def local_rank() -> int | None:
    """This process's number on its machine; None unless torchrun started several."""
    if not distributed.is_available() or not distributed.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        return None
    return int(os.environ["LOCAL_RANK"])


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without output and warnings; errors are printed all the same."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def report(error: UserError, store: distributed.Store, rank: int) -> None:
    """Prints the error once, and returns after that: torchrun stops every process as soon as one has ended."""
    if rank > 0:
        with contextlib.suppress(RuntimeError):  # the first has no error, or is gone
            store.wait([REPORTED], REPORT_WAIT)
            return
    if store.add(REPORTED, 1) == 1:
        print_error(error)


def of_lost_connection(error: RuntimeError) -> bool:
    """Whether that is what an exchange raises when another process is gone."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error) or "Connection" in str(error)


SAYING = threading.Lock()


def say_lost(store: distributed.Store) -> None:
    """Prints `LOST`, if no process has printed anything. The main thread and that of `end_when_told` may both come."""
    with SAYING, contextlib.suppress(RuntimeError):  # the store may be gone too
        if store.add(REPORTED, 1) == 1:
            print(file=sys.stderr)  # a process that was killed has left its progress bar there
            print_error(LOST)


def end_when_told(store: distributed.Store) -> None:
    """Has SIGTERM, by which torchrun ends the processes that one has left alone, end this one at once.

    Python would run a handler only after a message that the lost process never answers. The byte that the interpreter
    writes as the signal comes is read by a thread of its own.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    store = store.clone()  # the other may be in use, waiting

    def wait() -> None:
        keep = writing  # as long as the thread lives
        while signal.SIGTERM not in reading.recv(64):
            pass
        say_lost(store)
        keep.close()
        end(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
