"""The same work in several threads of this process, on one device."""

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch

from ncfast.engine.device import current
from ncfast.errors import UserError

MOST = 16  # on a GPU: PyTorch hands out 32 streams in turn, and each thread has another one for captures


def in_threads(count: int, work: Callable[[], None], device: torch.device) -> None:
    """work() in so many threads at once; of one it is called here.

    On a GPU each thread has a stream of its own for all that it does, so that kernels of several run at the same time.
    They come after what the caller's stream holds, and what that is given later comes after them.

    An error ends its thread and leaves the others; the first is raised when all have ended. What interrupts the caller,
    Ctrl-C or a signal that raises, interrupts the threads too.
    """
    if count == 1:
        work()
        return
    on_gpu = device.type == "cuda"
    if on_gpu and count > MOST:
        raise UserError(f"--streams is at most {MOST} on a GPU; got {count}")
    streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(count)]
    outer = torch.cuda.current_stream(device) if on_gpu else None
    errors: list[BaseException] = []
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def run(stream: torch.cuda.Stream | None) -> None:
        try:
            with current(device), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                work()
        except BaseException as error:  # the caller's to deal with
            errors.append(error)
        finally:
            ended.put(None)

    threads = [threading.Thread(target=run, args=(stream,), daemon=True) for stream in streams]
    try:
        for thread, stream in zip(threads, streams, strict=True):
            if on_gpu:
                stream.wait_stream(outer)
            thread.start()
        for _ in threads:
            ended.get()  # up to Python 3.12 a join() that is interrupted takes its thread for ended
    except BaseException:
        interrupt([thread for thread in threads if thread.is_alive()])
        raise
    if errors:
        raise errors[0]
    for stream in streams if on_gpu else ():
        outer.wait_stream(stream)


def interrupt(threads: Sequence[threading.Thread], seconds: float = 5.0) -> None:
    """Raises KeyboardInterrupt in each, and waits so long for their ends; one inside a long call may outlive that."""
    for thread in threads:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
