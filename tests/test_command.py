"""The command `ncfast`, as the shell starts it."""

import subprocess
import sys

import pytest

from ncfast.__main__ import PROGRAMS


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "ncfast", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_gets_its_own_arguments(name):
    done = command(name, "--nothing-like-this")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"see `python -m ncfast.{name} --help`\n")


def test_without_a_program_it_lists_them():
    for arguments in ((), ("--help",)):
        done = command(*arguments)
        assert done.returncode == 0 and all(f"  {name} " in done.stdout for name in PROGRAMS)
    done = command("trian")
    assert done.returncode == 2 and "invalid choice: 'trian'" in done.stderr and done.stderr.count("\n") == 1


def test_a_reader_that_ends_early_is_no_error():
    line = f"{sys.executable} -m ncfast info | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True)
    assert done.stdout.startswith("ncfast ") and done.stderr == ""
