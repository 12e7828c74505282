"""Drives CMake. What is built, what is not and why goes to ncfast/_build.json; `python -m ncfast.info` shows it.

NCFAST_CPP=0          pure-Python install (also chosen when there is no C++ compiler)
NCFAST_CUDA=auto|0|1  the CUDA module: when nvcc is found | never | or fail
NCFAST_CUDA_ARCHITECTURES="80;90a"  what it is compiled for; not set, the GPUs that nvidia-smi shows, or else these
CXX, CUDACXX, CMAKE_ARGS  as CMake's users know them
NCFAST_SANITIZE=1     the C++ module under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`
"""

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = "set NCFAST_CPP=0 to install without the C++ kernels"
# With debug information CMakeLists.txt does not strip the module: reports name lines.
SANITIZE = ("-DNCFAST_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
CPP = os.environ.get("NCFAST_CPP", "auto") != "0"
# One build serves every Python, except on Windows, where a module is linked to one, and for a Python without GIL.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED") and not (CPP and sys.platform == "win32")


class CannotBuild(Exception):
    """Why a module cannot be built, and what to do."""


def find_program(variable: str, *names: str) -> str | None:
    """The path of the program that an environment variable names, or else of the first of the names that is there."""
    if asked := shlex.split(os.environ.get(variable, "")):  # "ccache g++" is two words
        if path := shutil.which(asked[0]):
            return path
        raise SystemExit(f"ncfast: {variable}={asked[0]} is not a program that can be run; unset it or correct it")
    return next((path for name in names if (path := shutil.which(name))), None)


def find_compiler() -> str | None:
    return find_program("CXX", "c++", "g++", "clang++", "cl")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return find_program("CUDACXX", "nvcc", *([f"{home}/bin/nvcc"] if home else []), "/usr/local/cuda/bin/nvcc")


def find_build_tools() -> tuple[str, str]:
    """CMake and ninja: of PATH, where pip puts those that pyproject.toml names, or beside this Python."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    found = [shutil.which(name, path=path) for name in ("cmake", "ninja")]
    if None in found:
        raise CannotBuild(f"cmake and ninja are needed, and one is not here: pip install cmake ninja, or {WITHOUT}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        raise CannotBuild(
            f"{header} is not here: install Python's headers (Debian, Ubuntu: apt install python3-dev; Fedora: "
            f"dnf install python3-devel), or {WITHOUT}"
        )
    return found[0], found[1]


def output_of(*command: str) -> str:
    """What a program prints, or "" when it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def cuda_release(nvcc: str) -> tuple[int, int]:
    match = re.search(r"release (\d+)\.(\d+)", output_of(nvcc, "--version"))
    if match is None:
        raise CannotBuild(f"{nvcc} --version does not say its release: reinstall CUDA or set CUDACXX to another nvcc")
    return int(match[1]), int(match[2])


def number(architecture: str) -> int:
    return int(architecture.removesuffix("a"))


def cuda_architectures(nvcc: str) -> list[str]:
    """Compute capabilities to compile for, such as 80 and 90a, in ascending order.

    The kernels need 8.0, and on 9.0 what only 90a has. The lowest is kept as PTX too, which newer GPUs can run.
    """
    asked = re.findall(r"[^;,\s]+", os.environ.get("NCFAST_CUDA_ARCHITECTURES", ""))
    visible = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    wanted = asked or [major + minor for major, minor in re.findall(r"(\d+)\.(\d)", visible)] or ["80", "90a"]
    if wrong := [each for each in wanted if not re.fullmatch(r"\d+a?", each)]:
        raise CannotBuild(f'NCFAST_CUDA_ARCHITECTURES is a list such as "80;90a"; got {wrong[0]!r}')
    wanted = sorted({"90a" if each == "90" else each for each in wanted}, key=number)
    fit = [each for each in wanted if number(each) >= 80]
    if not fit or (asked and fit != wanted):
        raise CannotBuild(f"the CUDA kernels need compute capability 8.0 (sm_80); asked for sm_{', sm_'.join(wanted)}")
    release = cuda_release(nvcc)
    listed = set(re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")))
    known = [each for each in fit if str(number(each)) in listed and (each != "90a" or release >= (12, 0))]
    left_out = [each for each in fit if each not in known]
    if left_out:
        text = "nvcc {}.{} is too old for sm_{}".format(*release, ", sm_".join(left_out))
        if left_out != ["90a"]:  # sm_80 serves all but 9.0: its own generation, and newer ones by PTX
            known = sorted({*known, "80"}, key=number)
        if asked or not known or "80" not in listed:
            raise CannotBuild(f"{text}: install a newer CUDA")
        print(f"ncfast: {text}; compiled for sm_{', sm_'.join(known)}", file=sys.stderr)
    return known


class Build(build):
    def run(self) -> None:
        # Modules that have been renamed since, or a kernel module that is not wanted any more, would go into the wheel.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds ncfast._C (C++) and, with nvcc, ncfast._C_cuda; either may be left out, with the reason recorded."""

    def build_extensions(self) -> None:
        package = ROOT / "ncfast" if self.inplace else Path(self.build_lib).resolve() / "ncfast"
        package.mkdir(parents=True, exist_ok=True)
        for old in [*package.glob("_C*"), *package.glob("_build.json")]:
            old.unlink()
        facts = {"cpp": self.build_cpp(package), "cuda": self.build_cuda(package)}
        (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")
        for name, fact in facts.items():
            print(f"ncfast: {name}: {'built' if fact['built'] else 'not built'} ({fact['why']})", file=sys.stderr)

    def run(self) -> None:  # setuptools would copy extensions that are not built for every install
        self.build_extensions()

    def copy_extensions_to_source(self) -> None:
        pass

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "ncfast"
        return [str(path) for path in package.glob("_C*")] + [str(package / "_build.json")]

    def build_cpp(self, package: Path) -> dict:
        if not CPP:
            return {"built": False, "why": "NCFAST_CPP=0 when it was installed"}
        compiler = find_compiler()
        if compiler is None:
            return {"built": False, "why": "no C++ compiler was found when it was installed"}
        if sys.platform == "win32" and not os.environ.get("CXX"):
            why = "not tried with Visual C++, for which they are not written; to try clang, install with CXX=clang++"
            return {"built": False, "why": f"the C++ kernels were {why}"}
        sanitize = os.environ.get("NCFAST_SANITIZE", "0") == "1"
        try:
            self.cmake("_C", package, *(SANITIZE if sanitize else ()))
        except CannotBuild as error:
            raise SystemExit(f"ncfast: {error}") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"ncfast: {compiler} is here but the C++ build failed (see above; exit code {error.returncode}). "
                f"Mend that, or {WITHOUT}."
            ) from None
        return {"built": True, "why": f"compiled by {compiler}{' with sanitizers' if sanitize else ''}"}

    def build_cuda(self, package: Path) -> dict:
        wanted = os.environ.get("NCFAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"ncfast: NCFAST_CUDA is auto, 0 or 1; got {wanted!r}")
        if wanted == "0":
            return {"built": False, "why": "NCFAST_CUDA=0 when it was installed"}
        try:
            nvcc = find_nvcc()
            if nvcc is None or find_compiler() is None:
                raise CannotBuild(f"no {'nvcc' if nvcc is None else 'C++ compiler'} was found when it was installed")
            architectures = cuda_architectures(nvcc)
            # PTX of the lowest, so that newer GPUs run it too; that of 90a would run on 9.0 alone.
            names = [each + "-real" * (i > 0 or each.endswith("a")) for i, each in enumerate(architectures)]
            self.cmake(
                "_C_cuda",
                package,
                f"-DCMAKE_CUDA_COMPILER={nvcc}",
                "-DNCFAST_CUDA=ON",
                f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(names)}",
            )
        except CannotBuild as error:
            if wanted == "1":
                raise SystemExit(f"ncfast: NCFAST_CUDA=1, but {error}") from None
            return {"built": False, "why": str(error)}
        except subprocess.CalledProcessError as error:
            if wanted == "1":
                raise SystemExit(f"ncfast: the CUDA build failed (see above; exit code {error.returncode})") from None
            return {"built": False, "why": f"{nvcc} was found, but the CUDA build failed when it was installed"}
        why = f"compiled by {nvcc} for sm_{', sm_'.join(architectures)}"
        return {"built": True, "why": why, "architectures": architectures, "release": cuda_release(nvcc)}

    def cmake(self, target: str, package: Path, *options: str) -> None:
        cmake, ninja = find_build_tools()
        # For an editable install build_temp is new each time: a change of one file would compile them all.
        build = (ROOT / "build" / "editable" if self.inplace else Path(self.build_temp).resolve()) / target
        build.mkdir(parents=True, exist_ok=True)
        # CMake keeps the paths of compilers and ninja, which pip may have deleted since; what was compiled stays.
        # (--fresh, of CMake 3.24, deletes that too.)
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNCFAST_ABI3={'ON' if ABI3 else 'OFF'}",
            *options,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", target], check=True)


def long_description() -> str:
    """The README without the picture and the links that only lead somewhere in the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[.*?<!-- --8<-- \[end:picture\] -->\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n", "", text)
    return re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"\1", text)


def options() -> dict:
    found = {"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {}
    if not os.access(ROOT, os.W_OK):  # setuptools writes into the tree otherwise
        folder = tempfile.mkdtemp(prefix="ncfast-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        found |= {"build": {"build_base": folder}, "egg_info": {"egg_base": folder}}
    return found


if __name__ == "__main__":  # tests import what is above
    # The extension names no source: CMake knows them. It is here so that the wheel is tagged for this platform.
    setup(
        long_description=long_description(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("ncfast._C", sources=[])],
        cmdclass={"build": Build, "build_ext": CMakeBuild},
        options=options(),
    )
