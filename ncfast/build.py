"""What setup.py recorded of the build, and the word of a tree that was never built."""

import functools
import json
import os
import sys
import warnings
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NEVER_BUILT = "run from a source tree that was never built: pip install -e ."


@functools.cache
def build_record() -> dict:
    """{"cpp": {"built": bool, "why": str}, "cuda": {...}}; of a CUDA module architectures and nvcc's release too."""
    path = PACKAGE / "_build.json"
    if not path.exists():
        fact = {"built": False, "why": NEVER_BUILT}
        return {"cpp": fact, "cuda": fact}
    return json.loads(path.read_text())


@functools.cache
def warn_if_never_built(program: bool = False) -> None:
    """Warns, once in a process: a source tree in the current folder hides the package that was installed.

    program: on stderr, in the words of a program.
    """
    wanted = os.environ.get("NCFAST_CPP") != "0" and os.environ.get("NCFAST_IMPL") != "reference"
    if not wanted or build_record()["cpp"]["why"] != NEVER_BUILT:
        return
    text = (
        f"ncfast runs without its C++ kernels, several times slower: {PACKAGE} is a source tree that was never built. "
        f"Run `pip install -e .` in {PACKAGE.parent}, or work in another folder if ncfast is installed"
    )
    if not program:
        warnings.warn(text, RuntimeWarning, stacklevel=5)  # the caller of the operation
    elif os.environ.get("RANK", "0") == "0":  # of several processes one says it
        print(f"warning: {text}", file=sys.stderr, flush=True)
    warnings.filterwarnings("ignore", "ncfast runs without its C.. kernels", RuntimeWarning)
