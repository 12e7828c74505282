"""The C++ kernels without Python: on this machine, and cross-compiled for aarch64 under an emulator."""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Compiler and emulator, and the instruction sets that must be among those compared.
MACHINES = {
    "this machine": (["c++"], [], "portable"),
    "aarch64": (["aarch64-linux-gnu-g++"], ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"], "neon, portable"),
}


def flags_of(source):
    """What CMakeLists.txt adds for one file."""
    text = (ROOT / "CMakeLists.txt").read_text()
    options = re.search(rf"{source.relative_to(ROOT)} PROPERTIES COMPILE_OPTIONS\s+\"\$<[^:]+:([^>]+)>\"", text)
    return options[1].split(";") if options else []


@functools.cache
def report(machine, folder):
    """What the program prints there, line by line."""
    compiler, emulator, _ = MACHINES[machine]
    for program in (compiler[0], *emulator[:1]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    folder = folder / machine.replace(" ", "-")
    folder.mkdir()

    def compile(source):
        into = folder / f"{source.stem}.o"
        command = [*compiler, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-pthread", "-fopenmp"]
        command += [*flags_of(source), f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(into)]
        subprocess.run(command, check=True)
        return str(into)

    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), Path(__file__).with_name("compare_isas.cpp")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    program = str(folder / "compare_isas")
    subprocess.run([*compiler, "-fopenmp", *objects, "-o", program], check=True)
    done = subprocess.run([*emulator, program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare_isas")


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_instruction_set_agrees_with_the_portable_one(machine, folder):
    isas, *families = report(machine, folder)
    assert isas.endswith(MACHINES[machine][2]) and len(families) == 8


@pytest.mark.slow
def test_exact_operations_have_the_same_bits_on_every_machine(folder):
    exact = [[line for line in report(machine, folder) if re.search("[0-9a-f]{16}$", line)] for machine in MACHINES]
    assert exact[0] == exact[1] and len(exact[0]) == 3
