import ctypes
import json
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from ncfast import build
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
    monkeypatch.setattr(dispatch, "why_not_cuda_on", lambda device: None)
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


def test_the_build_record_is_that_of_the_build_or_say_that_there_was_none(tmp_path, monkeypatch):
    facts = {name: {"built": False, "why": name} for name in ("cpp", "cuda")}
    monkeypatch.setattr(build, "PACKAGE", tmp_path)
    read = build.build_record.__wrapped__
    assert all(not fact["built"] and "pip install -e ." in fact["why"] for fact in read().values())
    (tmp_path / "_build.json").write_text(json.dumps(facts))
    assert read() == facts


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 5), ["80", "90a"], None),  # a T4
        ((8, 0), ["80", "90a"], "cubin"),
        ((8, 9), ["80", "90a"], "cubin"),
        ((9, 0), ["80", "90a"], "cubin"),
        ((12, 0), ["80", "90a"], "ptx"),
        ((9, 0), ["80"], None),  # its kernels take wgmma
        ((8, 0), ["86"], None),
        ((8, 9), ["86", "90a"], "cubin"),
        ((8, 0), ["90a"], None),
        ((10, 0), ["90a"], None),
        ((12, 1), ["120"], "cubin"),
        ((10, 0), ["100a"], "cubin"),
        ((10, 3), ["100a"], None),
    ],
)
def test_which_gpus_run_what_was_compiled(capability, architectures, expected):
    assert dispatch.form_for(capability, architectures) == expected


@pytest.mark.gpu
def test_the_driver_tells_its_version():
    version = dispatch.driver_version()
    assert version >= tuple(map(int, torch.version.cuda.split(".")))[:1]  # torch runs, so it knows that generation


def test_a_driver_that_is_not_there_tells_nothing(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert dispatch.driver_version() is None


@pytest.mark.parametrize(
    ("capability", "driver", "expected"),
    [
        ((7, 5), 13000, "compiled for sm_80, sm_90a, and this GPU is sm_75: sm_80 is needed"),
        ((8, 6), 13000, None),
        ((8, 6), 12080, "the driver is for CUDA 12.8, and it was compiled by CUDA 13.1: update the driver"),
        ((12, 0), 13000, "the driver is for CUDA 13.0, and it was compiled by CUDA 13.1"),  # PTX of a newer CUDA
        ((12, 0), 13010, None),
    ],
)
def test_a_gpu_that_cannot_run_the_module_has_a_reason_and_another_implementation(
    capability, driver, expected, monkeypatch, recorded_build
):
    recorded_build(cuda={"built": True, "why": "", "architectures": ["80", "90a"], "release": [13, 1]})
    monkeypatch.setattr(dispatch, "why_not_cuda_here", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def version(address):
        address._obj.value = driver
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(cuDriverGetVersion=version))
    dispatch.why_not_cuda_on.cache_clear()
    found = dispatch.why_not_cuda(CUDA)
    dispatch.why_not_cuda_on.cache_clear()
    assert found == expected if expected is None else expected in found
    chosen = dispatch.choose("op", None, {"cuda": found, "triton": None, "reference": None})
    assert chosen == ("cuda" if expected is None else "triton")


def test_a_tree_that_was_never_built_warns_at_the_first_slow_call(monkeypatch):
    fact = {"built": False, "why": build.NEVER_BUILT}
    monkeypatch.setattr(build, "build_record", lambda: {"cpp": fact, "cuda": fact})
    monkeypatch.delenv("NCFAST_CPP", raising=False)
    slow = {"cpp": build.NEVER_BUILT, "reference": None}
    build.warn_if_never_built.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"several times slower: .* was never built\. Run `pip install -e \.` in"):
        dispatch.choose("op", None, slow)
    for variable, value in ((None, None), ("NCFAST_CPP", "0"), ("NCFAST_IMPL", "reference")):
        if variable:  # it was chosen
            monkeypatch.setenv(variable, value)
            build.warn_if_never_built.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dispatch.choose("op", None, slow) == "reference"
    build.warn_if_never_built.cache_clear()
