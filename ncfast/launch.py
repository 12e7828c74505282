"""A program as several processes, started by torchrun: their process group, who prints, how an error ends them all."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta

from torch import distributed
from torch.distributed.rendezvous import rendezvous

from ncfast.cli import print_error
from ncfast.engine.processes import ALONE, Processes, current_processes
from ncfast.errors import UserError

# Of one exchange. A process that ends takes the others with it sooner: gloo sees its connections close, and torchrun
# ends them. The longest wait without either is for the first process, which downloads data and writes files.
TIMEOUT = timedelta(minutes=10)
REPORTED = "ncfast/reported"  # in the store: whether a process has printed the error that ends them
REPORT_WAIT = timedelta(seconds=10)


@contextlib.contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun started, in a process group inside the block; without torchrun this one, alone.

    Only the first prints and warns. A UserError ends each process that it reaches with exit code 2 and is printed once;
    a process that loses the others by it ends as they do.
    """
    if local_rank() is None:
        yield ALONE
        return
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # Without a backend: gloo for CPU tensors, NCCL for CUDA tensors.
    distributed.init_process_group(store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        with silenced() if rank > 0 else contextlib.nullcontext():
            yield current_processes()
    except UserError as error:
        report(error, store, rank)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            raise
        sys.exit(130)
    except RuntimeError:
        # What an exchange raises when another process is gone.
        if store.check([REPORTED]):
            sys.exit(2)
        raise
    finally:
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
    print_error(error)
    store.set(REPORTED, "")
