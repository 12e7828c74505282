"""Shared test set-up."""

import os
import re
import tempfile

import pytest

# Where every core has a test process of its own, more threads would only wait for each other; programs that a test
# starts inherit it. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# What hypothesis keeps between runs (examples are not among it) stays out of the tree.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "ncfast-hypothesis"))

# Without a GPU the Triton kernels run in Triton's interpreter; the variable must be set before triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--shard", metavar="I/N", help="run every Nth test from the Ith on, counted from 0")


def runs_on_a_gpu(item):
    """Whether a test of the operations takes the GPU where there is one: its name says which kernels it runs."""
    name = f"{item.path.name}::{item.name}"
    on_the_host = r"offline|gpu_build|test_dispatch"
    return item.path.parent.name == "ops" and re.search("triton|cuda", name) and not re.search(on_the_host, name)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    if shard := config.getoption("--shard"):
        first, step = map(int, shard.split("/"))
        items[:] = items[first::step]
    if torch.cuda.is_available():
        for item in filter(runs_on_a_gpu, items):
            item.add_marker("gpu")
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch"))


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty filled with a value no operation returns, so that an element left unwritten shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min + 1)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def narrow_fcn():
    """The evaluator's network with a seventeenth of its products, for modules that ask little of it."""
    from ncfast.evaluation import fcn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcn, "LAYERS", ((16, 8), (32, 5), (128, 3)))
        yield
