"""Triton kernels compiled at once, on all cores, in place of one after the other where each is first launched.

A fresh machine compiles some sixty variants of the kernels for a training, a third of a second each. Which ones, shows
when the step has run once; so it runs once without them: a launch that would have to compile is left out and noted.
Child processes then compile what was noted, into Triton's cache on disk, where the launches proper find it.
"""

import contextlib
import gc
import json
import os
import signal
import time
import warnings
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

from ncfast.ops import dispatch

TIMEOUT = 60.0  # seconds; what has not been compiled by then is compiled where it is launched
LEAST = 2  # variants that are worth child processes


def compile_ahead(function: Callable[[], Any], device: torch.device) -> None:
    """Runs function() once, whose results mean nothing, and compiles the kernels that it lacked.

    Where all kernels are on disk already it is an ordinary call, a warm-up. Without a GPU it does nothing. Indices that
    a kernel would have written are zeros, so that what they are used for finds something.
    """
    if device.type != "cuda" or not hasattr(os, "fork"):
        return
    from triton import knobs

    missing: dict[str, tuple] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles; True has it leave compilation and launch out."""
        try:
            variant = variant_of(fn.jit_function, compile)
            if is_on_disk(*variant):
                return False
            missing.setdefault(compile["specialization_data"], variant)
            return True
        except Exception:  # another Triton, whose insides are not as they were: it compiles as it always did
            return False

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook, dispatch.kernels_left_out = note, True
    try:
        function()
    finally:
        knobs.runtime.jit_cache_hook, dispatch.kernels_left_out = before, False
    if len(missing) >= LEAST:
        in_children(list(missing.values()))


def variant_of(kernel: Any, compile: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Source, target, backend and options, as Triton's `compile` takes them."""
    from triton.compiler import ASTSource

    _, _, target, backend, *_ = kernel.device_caches[compile["device"]]
    options = json.loads(compile["specialization_data"])["options"]
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    source = ASTSource(kernel, compile["signature"], compile["constants"], compile["configs"][0])
    return source, target, backend, options


def is_on_disk(source: Any, target: Any, backend: Any, options: dict[str, Any]) -> bool:
    from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, get_cache_manager

    parsed = backend.parse_options({**options, **source.parse_options()})
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    cache = get_cache_manager(sha256(key.encode()).hexdigest())
    return f"{source.name[:150]}.json" in (cache.get_group(f"{source.name[:150]}.json") or {})


def in_children(variants: list[tuple]) -> None:
    """Each child takes its share. They are forked, so that they have all modules, and leave the GPU alone."""
    children = min(len(variants), len(os.sched_getaffinity(0)))
    pids = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, none of which holds what a child needs
        for child in range(children):
            pid = os.fork()
            if pid == 0:
                compile_and_exit(variants[child::children])
            pids.append(pid)
    end = time.monotonic() + TIMEOUT
    while pids and time.monotonic() < end:
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        time.sleep(0.005)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def compile_and_exit(variants: list[tuple]) -> None:
    gc.disable()  # what it would find may be of the GPU
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(BaseException):
        from triton import compile
        from triton.backends.nvidia import driver

        for source, target, _, options in variants:
            kernel = compile(source, target=target, options=options)
            with contextlib.suppress(Exception):
                driver.CudaLauncher(kernel.src, kernel.metadata)  # in Triton 3.6 a C module of its own
    os._exit(0)
