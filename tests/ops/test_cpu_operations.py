"""What `make sanitize` runs refuses a module that no sanitizer watches."""

import subprocess
import sys
from pathlib import Path

import pytest

from ncfast.ops import dispatch


def test_a_module_without_sanitizers_is_refused():
    module, reason = dispatch.load_module("_C")
    if module is None:
        pytest.skip(reason)
    if b"__asan_init" in Path(module.__file__).read_bytes():
        pytest.skip("this module has sanitizers")
    program = Path(__file__).with_name("cpu_operations.py")
    done = subprocess.run([sys.executable, program, "iter_norm"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "built without sanitizers; see `make sanitize`" in done.stderr and "calls" not in done.stdout
