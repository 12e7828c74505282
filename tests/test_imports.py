"""What programs and the package import: torch takes seconds, and what torch can import takes more."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import FLAGS, waves

import ncfast
from ncfast.config import IMPLEMENTATIONS, MEASURES, make_config
from ncfast.data.sources import from_arrays
from ncfast.data.stats import DataStats
from ncfast.evaluation import protocol
from ncfast.models.trained import build_models
from ncfast.nn.meta import without_memory
from ncfast.ops import dispatch
from ncfast.training.self_supervision import SelfSupervision

PACKAGE = Path(ncfast.__file__).parent
PROGRAMS = ("train", "generate", "evaluate", "reproduce", "info")
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "matplotlib", "sklearn", "tensorboard", "aeon", "triton")


def imported(code, folder):
    """Modules that are there after `code`."""
    path = folder / "modules"
    report = f"import atexit, sys; atexit.register(lambda: open({str(path)!r}, 'w').write(' '.join(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", f"{report}\n{code}"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return set(path.read_text().split())


def test_the_package_imports_nothing_before_it_is_asked(tmp_path):
    modules = imported("import ncfast; ncfast.__version__; dir(ncfast)", tmp_path)
    assert not {"torch", "numpy", "h5py"} & modules
    modules = imported("from ncfast import VectorQuantize, nearest_code", tmp_path)
    assert "torch" in modules and not {"h5py", *HEAVY} & modules


def test_everything_public_is_there():
    for name in ncfast.__all__:
        assert getattr(ncfast, name) is not None and name in dir(ncfast)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ncfast.nothing  # noqa: B018


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing(program, tmp_path):
    code = f"import sys; sys.argv[1:] = ['--help']; from ncfast import {program}; {program}.main()"
    modules = imported(code, tmp_path)
    assert not {"torch", "numpy", "h5py"} & modules


@pytest.mark.slow
def test_programs_import_no_compiler(tmp_path):
    import numpy as np

    x, y = waves()
    np.savez(tmp_path / "waves.npz", X_train=x, y_train=y, X_test=x, y_test=y)
    run = str(tmp_path / "run")
    arguments = ["--dataset", str(tmp_path / "waves.npz"), "--ssl", "vibcreg", "--out", run, "--device", "cpu", *FLAGS]
    arguments += ["--stage1-epochs", "1", "--stage2-epochs", "1"]
    code = f"from ncfast import train; train.print_plan = train.write_picture = lambda *_: ''; train.main({arguments})"
    modules = imported(code, tmp_path)
    assert "torch" in modules and not {"torch._dynamo", "torch._inductor", "sympy"} & modules
    arguments = ["--run", run, "--num-samples", "9", "--out", str(tmp_path / "x.h5"), "--device", "cpu"]
    modules = imported(f"from ncfast import generate; generate.main({arguments})", tmp_path)
    assert "h5py" in modules and not set(HEAVY) & modules
    arguments = ["evaluate", "--run", run, "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    arguments += ["--measures", "fid", "--num-samples", "9", "--repeats", "1", "--fcn-epochs", "1"]
    modules = imported(f"import sys; from ncfast import evaluate; sys.argv = {arguments}; evaluate.main()", tmp_path)
    assert "torch.optim.adamw" in modules and not {"torch._dynamo", "torch._inductor", "sympy"} & modules


def test_measures_are_those_of_the_help():
    assert tuple(protocol.MEASURES) == MEASURES


@pytest.mark.parametrize("ssl", ["barlow", "vibcreg", "byol"])
@pytest.mark.parametrize("options", [{}, {"codebook_init": "kmeans", "embeddings": "random"}, {"halvings": 2}])
def test_modules_without_memory_have_the_shapes_of_those_with(ssl, options):
    config = make_config(ssl=ssl, dim=8, projector_dim=32, **options)
    data = DataStats.of(from_arrays(*waves()))

    def make():
        return *build_models(config, data), SelfSupervision(config)

    with without_memory():
        bare = make()
    for one, other in zip(bare, make(), strict=True):
        tensors = dict(one.named_parameters()) | dict(one.named_buffers())
        expected = dict(other.named_parameters()) | dict(other.named_buffers())
        assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
            name: (value.shape, value.dtype) for name, value in expected.items()
        }
        assert all(value.device == torch.device("meta") for value in tensors.values())


def test_rooms_are_there_without_importing_them_first(tmp_path):
    code = "import ncfast; ncfast.evaluation.evaluate, ncfast.nn.ssl_losses.VICRegLoss, ncfast.ops.vicreg_loss"
    assert "ncfast.evaluation.protocol" in imported(code, tmp_path)
    with pytest.raises(AttributeError, match=r"'ncfast.nn' has no attribute 'nothing'"):
        ncfast.nn.nothing  # noqa: B018


@pytest.mark.parametrize("program", ["info", "train"])
@pytest.mark.parametrize(("variable", "message"), [("NCFAST_IMPL", "auto, reference, cpp"), ("NCFAST_ISA", "portable")])
def test_a_word_that_names_nothing_is_one_line(program, variable, message, monkeypatch):
    if variable == "NCFAST_ISA" and dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip("needs the C++ module")
    arguments = [] if program == "info" else ["--dataset", "GunPoint", "--dry-run"]
    command = [sys.executable, "-m", f"ncfast.{program}", "--device", "cpu", *arguments]
    monkeypatch.setenv(variable, "fastest")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"error: {variable} is one of ") and message in result.stderr


def test_implementations_have_the_same_names_everywhere():
    assert dispatch.NAMES == IMPLEMENTATIONS


LEVELS = (
    ("ops",),
    ("nn",),
    ("models", "hub"),
    ("sampling",),
    ("ncvqvae",),
    ("training", "evaluation", "cli"),
    ("jobs", "estimator"),
    ("train", "generate", "evaluate", "reproduce", "info", "__init__", "__main__"),
)
SERVE_ALL_BUT_OPS_AND_NN = ("data", "engine")
SERVE_ALL = ("build", "config", "errors", "options", "version")


def imports_of(path):
    """Rooms and top modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ncfast"):
            names = [node.module] if "." in node.module else [f"ncfast.{alias.name}" for alias in node.names]
            yield from (name.split(".")[1] for name in names)


def test_imports_point_one_way():
    level = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in set(imports_of(path)) - {room, *SERVE_ALL}:
            if other in SERVE_ALL_BUT_OPS_AND_NN:
                right = room not in ("ops", "nn")
            elif room in SERVE_ALL_BUT_OPS_AND_NN:
                right = other in ("ops", "data", "engine")
            else:
                right = room in level and level.get(other, 99) < level[room]
            if not right:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_no_module_imports_itself_through_others():
    """At import, that is: an import within a function is made when all are there."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(("ncfast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        found = graph.setdefault(name, set())
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ncfast"):
                found.add(node.module)
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    # A package that is still being imported is there for its own modules.
    graph = {
        name: {other for other in found & graph.keys() if not name.startswith(f"{other}.")}
        for name, found in graph.items()
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())
