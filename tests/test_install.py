"""How the package is built and installed. With NCFAST_TEST_INSTALL=1 it is installed, in one way after the other:
minutes, fewer where ccache is; a C++ compiler and PyPI are needed."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(
    *("build", "dist", "runs", "*.egg-info", "*.so", "_build.json", "__pycache__", ".git", ".venv", ".*_cache")
)
VARIABLES = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CMAKE_ARGS", "NCFAST_CPP", "NCFAST_CUDA", "NCFAST_IMPL")
CHECK = "from ncfast import _C; print(_C.__file__, _C.build_info()['compiler'])"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in (*VARIABLES, "NCFAST_CUDA_ARCHITECTURES", "NCFAST_SANITIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def build(monkeypatch):
    """setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("ncfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(build, tmp_path):
    found = build.CMakeBuild(Distribution())
    found.build_temp = str(tmp_path / "temp")
    return found


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name=script, ...): these are all that PATH has, beside a shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**scripts):
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return folder

    monkeypatch.setenv("PATH", str(folder))
    return make


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree that was never built."""
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=LEFT_OUT))


def test_the_compiler_is_the_one_that_was_asked_for(build, programs, monkeypatch):
    assert build.find_compiler() is None and build.find_program("CXX", "nothing") is None
    folder = programs(**{"g++": "", "ccache": ""})
    assert build.find_compiler() == str(folder / "g++")
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert build.find_compiler() == str(folder / "ccache")
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(SystemExit, match=r"^ncfast: CXX=g\+\+-99 is not a program that can be run; unset it or corr"):
        build.find_compiler()
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(SystemExit, match="CUDACXX=/nowhere/nvcc is not a program"):
        build.find_nvcc()


def test_what_is_missing_is_one_line_that_says_what_to_install(build, command, programs, tmp_path, monkeypatch):
    paths = {"scripts": str(tmp_path / "none"), "include": str(tmp_path)}
    monkeypatch.setattr(build.sysconfig, "get_path", paths.get)
    assert command.build_cpp(tmp_path)["why"] == "no C++ compiler was found when it was installed"
    programs(**{"g++": ""})
    with pytest.raises(SystemExit, match=r"cmake and ninja are needed.*pip install cmake ninja, or set NCFAST_CPP=0"):
        command.build_cpp(tmp_path)
    programs(cmake="exit 3", ninja="")
    with pytest.raises(SystemExit, match=r"Python\.h is not here: .*apt install python3-dev.*, or set NCFAST_CPP=0"):
        command.build_cpp(tmp_path)
    (tmp_path / "Python.h").touch()
    with pytest.raises(SystemExit, match=r"the C\+\+ build failed \(see above; exit code 3\)"):
        command.build_cpp(tmp_path)


def test_cmake_and_ninja_beside_python_are_found(build, programs, tmp_path, monkeypatch):
    folder = programs(cmake="", ninja="")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build.sysconfig, "get_path", {"scripts": str(folder), "include": str(tmp_path)}.get)
    monkeypatch.setenv("PATH", "/nowhere")  # of an environment that was not activated
    assert build.find_build_tools() == (str(folder / "cmake"), str(folder / "ninja"))


def test_nothing_of_an_earlier_configuration_is_kept_but_what_was_compiled(command, programs, tmp_path, monkeypatch):
    log = tmp_path / "log"
    programs(cmake=f'echo "$@" >> "{log}"', ninja="")
    monkeypatch.setenv("CMAKE_ARGS", "-DONE=1 '-DTWO=a b'")
    folder = tmp_path / "temp" / "_C"
    (folder / "CMakeFiles/3.25.1").mkdir(parents=True)
    (folder / "CMakeFiles/_C.dir").mkdir()
    (folder / "CMakeCache.txt").write_text("CMAKE_MAKE_PROGRAM:FILEPATH=/tmp/pip-build-env-gone/ninja")
    command.cmake("_C", tmp_path, "-DOPTION=ON")
    assert [path.name for path in folder.rglob("*")] == ["CMakeFiles", "_C.dir"]
    configure, compile_ = log.read_text().splitlines()
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path}/bin/ninja" in configure and configure.endswith(
        "-DOPTION=ON -DONE=1 -DTWO=a b"
    )
    assert compile_ == f"--build {folder} --target _C"


def test_what_an_earlier_build_left_does_not_go_into_the_package(command, tmp_path, monkeypatch):
    command.inplace, command.build_lib = False, str(tmp_path)
    (tmp_path / "ncfast").mkdir()
    for name in ("_C_cuda.cpython-311-x86_64-linux-gnu.so", "_C.abi3.so", "_build.json"):
        (tmp_path / "ncfast" / name).touch()
    monkeypatch.setattr(command, "build_cpp", lambda package: {"built": False, "why": "no"})
    monkeypatch.setattr(command, "build_cuda", lambda package: {"built": False, "why": "no"})
    command.build_extensions()
    assert [path.name for path in (tmp_path / "ncfast").iterdir()] == ["_build.json"]


NVCC = {"10.2": "70 75", "11.0": "80", "11.8": "80 86 90", "12.4": "75 80 86 89 90", "13.0": "75 80 86 90 100 120"}


@pytest.mark.parametrize(
    ("release", "asked", "visible", "expected"),
    [
        ("13.0", "", "", ["80", "90a"]),
        ("13.0", "", "8.6\n9.0\n8.6", ["86", "90a"]),
        ("13.0", "", "7.5\n8.0", ["80"]),
        ("13.0", "90, 80;120", "8.6", ["80", "90a", "120"]),
        ("12.4", "", "12.0", ["80"]),  # its PTX runs there
        ("11.0", "", "8.6", ["80"]),
        ("10.2", "", "8.6", r"nvcc 10\.2 is too old for sm_86: install a newer CUDA"),
        ("11.8", "", "", ["80"]),
        ("11.8", "", "9.0", r"nvcc 11\.8 is too old for sm_90a: install a newer CUDA"),
        ("11.8", "80;90a", "", r"nvcc 11\.8 is too old for sm_90a"),
        ("13.0", "", "7.5", r"need compute capability 8\.0 \(sm_80\); asked for sm_75"),
        ("13.0", "75;80", "", r"need compute capability 8\.0"),
        ("13.0", "ampere", "", r"is a list such as .80;90a.; got 'ampere'"),
    ],
)
def test_cuda_architectures(build, monkeypatch, release, asked, visible, expected):
    listed = "\n".join(f"compute_{each}" for each in NVCC[release].split())
    answers = {"--version": f"release {release}, V{release}", "--list-gpu-arch": listed}
    monkeypatch.setattr(build, "output_of", lambda program, option, *_: answers.get(option, visible))
    monkeypatch.setenv("NCFAST_CUDA_ARCHITECTURES", asked)
    if isinstance(expected, list):
        assert build.cuda_architectures("nvcc") == expected
    else:
        with pytest.raises(build.CannotBuild, match=expected):
            build.cuda_architectures("nvcc")


@pytest.mark.parametrize(
    ("nvcc", "message"), [(None, "no nvcc was found"), ("exit 1", "nvcc --version does not say its release")]
)
def test_nvcc_that_is_absent_or_broken(build, command, programs, tmp_path, monkeypatch, nvcc, message):
    found = {"g++": "g++", "nvcc": programs(nvcc=nvcc) / "nvcc" if nvcc else None}
    monkeypatch.setattr(build, "find_program", lambda variable, *names: found["g++" if variable == "CXX" else "nvcc"])
    fact = command.build_cuda(tmp_path)
    assert not fact["built"] and message in fact["why"]
    monkeypatch.setenv("NCFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=f"^ncfast: NCFAST_CUDA=1, but .*{message}"):
        command.build_cuda(tmp_path)


def test_the_sdist_holds_all_that_a_build_and_the_tests_need(tree, tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("ncfast-*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    folders = ("csrc", "ncfast", "tests", "benchmarks", "experiments", "docs")
    needed = {str(path.relative_to(tree)) for each in folders for path in (tree / each).rglob("*") if path.is_file()}
    assert {name for name in needed if "__pycache__" not in name} <= held
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "Makefile", "constraints.txt"} <= held


@pytest.mark.parametrize("chosen", [False, True])
def test_programs_in_a_tree_that_was_never_built_say_so_once(tree, chosen):
    environment = os.environ | ({"NCFAST_CPP": "0"} if chosen else {})
    run = [sys.executable, "-m", "ncfast.info", "--device", "cpu"]
    done = subprocess.run(run, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "no: run from a source tree that was never built" in done.stdout
    if chosen:
        assert not done.stderr
    else:
        assert done.stderr.startswith("warning: ncfast runs without its C++ kernels") and done.stderr.count("\n") == 1
        assert f"Run `pip install -e .` in {tree}" in done.stderr


def way_in(test):
    asked = os.environ.get("NCFAST_TEST_INSTALL") == "1"
    reason = "minutes, and PyPI: NCFAST_TEST_INSTALL=1 runs it"
    return pytest.mark.slow(pytest.mark.skipif(not asked, reason=reason)(test))


def run(*command, cwd=None, fails=False, **environment):
    base = os.environ | {"NCFAST_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if ccache := shutil.which("ccache"):
        base |= {"CMAKE_ARGS": f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}", "CCACHE_NOHASHDIR": "1"}
        base |= {
            "CCACHE_BASEDIR": str(Path(tempfile.gettempdir()).resolve()),
            "CCACHE_SLOPPINESS": "include_file_mtime,include_file_ctime",
        }
    done = subprocess.run(command, cwd=cwd, env=base | environment, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python of an environment with what pyproject.toml asks for to build."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", str(folder))
    found = folder / "bin" / "python"
    run(str(found), "-m", "pip", "install", "setuptools>=77", "cmake>=3.20", "ninja", "build")
    return str(found)


@pytest.fixture
def pip(python, tmp_path):
    """pip(arguments, ...) without isolation, and what is installed then, seen from another folder."""

    def install(*arguments, **options):
        common = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--force-reinstall")
        text = run(python, *common, *map(str, arguments), **options)
        return text if options.get("fails") else run(python, "-c", CHECK, cwd=tmp_path).strip()

    return install


@way_in
def test_twice_in_a_row_with_build_isolation(python, tree):
    for _ in range(2):
        run(python, "-m", "pip", "install", "--no-deps", "--force-reinstall", ".", cwd=tree)
        assert "site-packages" in run(python, "-c", CHECK, cwd=tree.parent)


@way_in
def test_plain_and_editable_in_either_order(pip, tree):
    assert "site-packages" in pip(".", cwd=tree)
    assert f"{tree}/ncfast/_C" in pip("-e", ".", cwd=tree)
    assert "site-packages" in pip(".", cwd=tree)


@way_in
def test_sdist_and_a_wheel_from_it(python, pip, tree, tmp_path):
    run(python, "-m", "build", "--no-isolation", "-o", str(tmp_path / "dist"), cwd=tree)
    (wheel,) = (tmp_path / "dist").glob("*-cp310-abi3-*.whl")
    assert wheel.stat().st_size < 3e6
    assert "site-packages" in pip(wheel)


@way_in
def test_from_git(pip, tree):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        run("git", *command, cwd=tree)
    assert "site-packages" in pip(f"git+file://{tree}")


@way_in
def test_a_path_with_spaces_and_letters_beyond_ascii(pip, tree):
    assert "site-packages" in pip(tree.rename(tree.parent / "a tree, größer, 树"))


@way_in
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_tree_that_is_read_only(pip, tree):
    for path in [tree, *tree.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        assert "site-packages" in pip(tree)
    finally:
        for path in [tree, *tree.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


@way_in
def test_without_a_compiler(python, tree, tmp_path):
    (tmp_path / "empty").mkdir()
    command = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--force-reinstall", str(tree))
    run(python, *command, PATH=str(tmp_path / "empty"))
    code = "from ncfast.build import build_record; print(build_record()['cpp'])"
    assert "no C++ compiler was found when it was installed" in run(python, "-c", code, cwd=tmp_path)


@way_in
@pytest.mark.parametrize("nvcc", ["absent", "broken"])
def test_cuda_that_was_asked_for_and_is_not_there(pip, tree, tmp_path, nvcc):
    path = tmp_path / "nvcc"
    if nvcc == "broken":
        path.write_text("#!/bin/sh\nexit 1\n")
        path.chmod(0o755)
    text = pip(tree, fails=True, NCFAST_CUDA="1", CUDACXX=str(path))
    assert "ncfast: CUDACXX=" in text if nvcc == "absent" else "--version does not say its release" in text
    assert "Traceback" not in text


@way_in
def test_clang(pip, tree):
    clang = next((path for each in ("clang++", "clang++-14") if (path := shutil.which(each))), None)
    if clang is None:
        pytest.skip("clang is not installed")
    assert " clang " in pip(tree, CXX=clang)
