import json
import os
import subprocess
import sys

import pytest
import torch

from ncfast.ops import dispatch, nearest_code, nearest_code_reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TABLE = {"cuda": "no CUDA device is visible", "cpp": None, "reference": None}


@pytest.fixture(autouse=True)
def no_preference(monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT", "auto")


@pytest.mark.parametrize("impl", [None, "auto"])
def test_auto_takes_the_first_that_can(impl):
    assert dispatch.choose("op", impl, TABLE) == "cpp"
    assert dispatch.choose("op", impl, {**TABLE, "cuda": None}) == "cuda"
    assert dispatch.choose("op", impl, {**TABLE, "cpp": "not built"}) == "reference"


def test_explicit_request():
    assert dispatch.choose("op", "reference", TABLE) == "reference"
    with pytest.raises(RuntimeError, match=r"^op: impl='cuda' cannot run this call: no CUDA device is visible$"):
        dispatch.choose("op", "cuda", TABLE)
    with pytest.raises(
        ValueError, match=r"^op has the implementations cuda, cpp, reference \(or auto\); got impl='fast'$"
    ):
        dispatch.choose("op", "fast", TABLE)
    with pytest.raises(ValueError, match="got impl='triton'"):
        dispatch.choose("op", "triton", TABLE)  # a name, but not of this operation


def test_preference_binds_the_operations_that_have_it(monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT", "reference")
    assert dispatch.choose("op", "auto", TABLE) == "reference"
    assert dispatch.choose("op", "cpp", TABLE) == "cpp"  # an explicit request is stronger
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    assert dispatch.choose("op", "auto", TABLE) == "cpp"
    monkeypatch.setattr(dispatch, "DEFAULT", "cuda")
    with pytest.raises(RuntimeError, match="impl='cuda' cannot run this call: no CUDA device is visible"):
        dispatch.choose("op", "auto", TABLE)


def test_preference_that_is_no_implementation(monkeypatch):
    monkeypatch.setattr(dispatch, "DEFAULT", "cpu")
    with pytest.raises(ValueError, match="NCFAST_IMPL is one of auto, reference, cpp, cuda, triton; got 'cpu'"):
        dispatch.choose("op", "auto", TABLE)
    assert dispatch.choose("op", "reference", TABLE) == "reference"


def test_preference_comes_from_the_environment():
    program = "from ncfast.ops import dispatch; print(dispatch.choose('op', 'auto', {'cpp': None, 'reference': None}))"
    for value, expected in (("reference", "reference"), ("auto", "cpp")):
        environment = {**os.environ, "NCFAST_IMPL": value}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_reasons_name_what_is_in_the_way(monkeypatch):
    assert "on cuda, and this is the CPU implementation" in dispatch.why_not_cpp(CUDA)
    monkeypatch.setattr(dispatch, "why_not_cuda_here", lambda: None)
    assert "on cpu, and this is the CUDA implementation" in dispatch.why_not_cuda(CPU)
    assert dispatch.why_not_cuda(CUDA) is None
    monkeypatch.setattr(dispatch, "why_not_triton_here", lambda: None)
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: False)
    assert "off a GPU Triton runs only under TRITON_INTERPRET=1" in dispatch.why_not_triton(CPU)
    assert dispatch.why_not_triton(CUDA) is None
    monkeypatch.setattr(dispatch, "triton_interpreted", lambda: True)
    assert dispatch.why_not_triton(CPU) is None
    monkeypatch.setattr(dispatch, "why_not_triton_here", lambda: "triton is not installed")
    assert dispatch.why_not_triton(CUDA) == "triton is not installed"


def test_missing_module_leaves_a_working_package(monkeypatch):
    reason = "no compiler was found when it was installed"
    monkeypatch.setattr(dispatch, "load_module", lambda name: (None, reason))
    z, codebook = torch.randn(7, 5), torch.randn(9, 5)
    assert torch.equal(nearest_code(z, codebook), nearest_code_reference(z[None], codebook[None])[0])
    with pytest.raises(RuntimeError, match=f"nearest_code: impl='cpp' cannot run this call: {reason}"):
        nearest_code(z, codebook, impl="cpp")


@pytest.fixture
def recorded_build(monkeypatch):
    """Pretends that setup.py recorded these facts."""

    def record(**facts):
        monkeypatch.setattr(dispatch, "build_record", lambda: facts)

    dispatch.load_module.cache_clear()
    yield record
    dispatch.load_module.cache_clear()


def test_module_that_was_not_built(recorded_build):
    recorded_build(cpp={"built": False, "why": "NCFAST_CPP=0 when it was installed"})
    assert dispatch.load_module("_C") == (None, "NCFAST_CPP=0 when it was installed")


def test_module_that_does_not_load(recorded_build, monkeypatch):
    def fail(name):
        raise ImportError(f"{name}: wrong Python")

    recorded_build(cpp={"built": True, "why": ""}, cuda={"built": True, "why": ""})
    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    for name in ("_C", "_C_cuda"):
        module, reason = dispatch.load_module(name)
        assert module is None
        assert f"ncfast.{name} was built but does not load (ncfast.{name}: wrong Python); reinstall" in reason


def test_build_record_are_those_of_the_build_or_say_that_there_was_none(tmp_path, monkeypatch):
    facts = {name: {"built": False, "why": name} for name in ("cpp", "cuda")}
    (tmp_path / "ops").mkdir()
    monkeypatch.setattr(dispatch, "__file__", str(tmp_path / "ops" / "dispatch.py"))
    read = dispatch.build_record.__wrapped__
    assert all(not fact["built"] and "pip install -e ." in fact["why"] for fact in read().values())
    (tmp_path / "_build.json").write_text(json.dumps(facts))
    assert read() == facts
