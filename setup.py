"""Drives CMake. What is built, what is not and why goes to ncfast/_build.json; `python -m ncfast.info` shows it.

NCFAST_CPP=0          pure-Python install (also chosen when there is no C++ compiler)
NCFAST_CUDA=auto|0|1  the CUDA module: when nvcc is found | never | or fail
NCFAST_SANITIZE=1     the C++ module under AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ARCHITECTURES = "80;90a"
# With debug information pybind11 does not strip the module: reports name lines.
SANITIZE = ("-DNCFAST_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")


def find_compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    names = [os.environ.get("CUDACXX", ""), "nvcc", f"{home}/bin/nvcc" if home else "", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


class CMakeBuild(build_ext):
    """Builds ncfast._C (C++) and, with nvcc, ncfast._C_cuda; either may be left out, with the reason recorded."""

    def build_extensions(self) -> None:
        package = Path(self.build_lib).resolve() / "ncfast"
        if self.inplace:
            package = Path(__file__).resolve().parent / "ncfast"
        package.mkdir(parents=True, exist_ok=True)
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
        if os.environ.get("NCFAST_CPP", "auto") == "0":
            return {"built": False, "why": "NCFAST_CPP=0 when it was installed"}
        compiler = find_compiler()
        if compiler is None:
            return {"built": False, "why": "no C++ compiler was found when it was installed"}
        sanitize = os.environ.get("NCFAST_SANITIZE", "0") == "1"
        try:
            self.cmake("_C", package, *(SANITIZE if sanitize else ()))
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"ncfast: {compiler} is here but the C++ build failed (see above; exit code {error.returncode}). "
                "To install without the C++ kernels, set NCFAST_CPP=0."
            ) from None
        return {"built": True, "why": f"compiled by {compiler}{' with sanitizers' if sanitize else ''}"}

    def build_cuda(self, package: Path) -> dict:
        wanted = os.environ.get("NCFAST_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"ncfast: NCFAST_CUDA is auto, 0 or 1; got {wanted!r}")
        if wanted == "0":
            return {"built": False, "why": "NCFAST_CUDA=0 when it was installed"}
        nvcc = find_nvcc()
        if nvcc is None or find_compiler() is None:
            why = f"no {'nvcc' if nvcc is None else 'C++ compiler'} was found when it was installed"
            if wanted == "1":
                raise SystemExit(f"ncfast: NCFAST_CUDA=1, but {why}; set CUDACXX to its path")
            return {"built": False, "why": why}
        try:
            self.cmake("_C_cuda", package, f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DNCFAST_CUDA=ON")
        except subprocess.CalledProcessError as error:
            if wanted == "1":
                raise SystemExit(f"ncfast: the CUDA build failed (see above; exit code {error.returncode})") from None
            return {"built": False, "why": f"{nvcc} was found, but the CUDA build failed when it was installed"}
        return {"built": True, "why": f"compiled by {nvcc} for sm_{CUDA_ARCHITECTURES.replace(';', ', sm_')}"}

    def cmake(self, target: str, package: Path, *options: str) -> None:
        build = Path(self.build_temp).resolve() / target
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(Path(__file__).resolve().parent),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_CUDA_ARCHITECTURES={CUDA_ARCHITECTURES}",
            *options,
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)


# The extension names no source: CMake knows them. It is here so that the wheel is tagged for this platform.
setup(ext_modules=[Extension("ncfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
