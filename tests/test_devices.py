"""Nothing depends on which GPU is the current one: what can be shown without a GPU. test_two_gpus.py has the rest."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import save_run

import ncfast
from ncfast.engine import device as device_module
from ncfast.sampling import series as sampling_series

PACKAGE = Path(ncfast.__file__).parent
SECOND = torch.device("cuda", 1)


class OnSecondGpu:
    """A tensor there whose copies never come."""

    device = SECOND

    def __init__(self, *shape, dtype=torch.float32):
        self.shape, self.dtype = torch.Size(shape), dtype

    def is_floating_point(self):
        return self.dtype.is_floating_point


@pytest.fixture
def recorded(monkeypatch):
    """Streams on which events are recorded."""
    streams = []

    class Event:
        def record(self, stream):
            streams.append(stream)

        def synchronize(self):
            pass

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **options: empty(*args, **options).fill_(0))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda host, x, non_blocking: host)
    return streams


def test_results_are_waited_for_on_their_own_device_and_show_when_they_have_not_come(recorded):
    results = OnSecondGpu(4, dtype=torch.int64), OnSecondGpu(4, 3, dtype=torch.int64), OnSecondGpu(4, 1, 5)
    chunk = sampling_series.Chunk(0, slice(1, 4), *results)
    assert recorded == ["stream of cuda:1"]
    labels, tokens, x = chunk.arrays()
    assert (labels == -1).all() and (tokens == -1).all() and np.isnan(x).all()


def test_series_that_never_came_are_refused(tmp_path, request):
    drawn = sampling_series.SeriesSampler(ncfast.load(save_run(tmp_path / "run")))
    request.getfixturevalue("recorded")
    n = drawn.model.prior.num_tokens
    chunk = sampling_series.Chunk(
        64,
        slice(0, 64),
        OnSecondGpu(64, dtype=torch.int64),
        OnSecondGpu(64, n, dtype=torch.int64),
        OnSecondGpu(64, 1, 21),
        None,
    )
    with pytest.raises(ncfast.UserError, match="series 64 has a token that does not exist .*has not computed it"):
        drawn.arrived(chunk)


@pytest.mark.parametrize("named", [("token", 8), ("class", 3)])
def test_each_value_is_looked_at(named, tmp_path):
    drawn = sampling_series.SeriesSampler(ncfast.load(save_run(tmp_path / "run")))
    what, end = named
    index, values = np.arange(100, 103), np.full((3, 2), end - 1)
    drawn.check(index, what, values, end)
    for wrong in (-1, end):
        values[1, 1] = wrong
        with pytest.raises(ncfast.UserError, match=f"series 101 has a {what} that does not exist"):
            drawn.check(index, what, values, end)


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda size, device: asked.append(device))
    assert device_module.usable_device("cuda") == SECOND == asked[0]


def calls(tree):
    """Calls with the functions and `with` blocks around them."""

    def visit(node, around):
        if isinstance(node, ast.Call):
            yield node, around
        inside = [*around, node] if isinstance(node, ast.FunctionDef | ast.With) else around
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return visit(tree, [])


# What takes the current device when it is called without one.
NEEDS_DEVICE = {
    *("torch.cuda.synchronize", "torch.cuda.current_stream", "torch.cuda.Stream", "torch.cuda.get_device_name"),
    *("torch.cuda.get_device_properties", "torch.cuda.get_device_capability", "torch.cuda.mem_get_info"),
    *("torch.cuda.memory_reserved", "torch.cuda.device", "torch.cuda.set_device", "torch.cuda.get_rng_state"),
}
# What does so whatever it is called with.
NEVER = {"torch.manual_seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all"}
CURRENT = {"torch.cuda.current_device": ["engine/device.py"]}  # where "cuda" gets its number


def is_without_device(call, name):
    function = ast.unparse(call.func)
    if function in NEVER or (function in CURRENT and name not in CURRENT[function]):
        return True
    if function in NEEDS_DEVICE or function.endswith((".record", ".cuda")):
        return not call.args
    if function in ("torch.device", "torch.Generator"):
        return len(call.args) == 1 and ast.unparse(call.args[0]) == "'cuda'"
    return any(keyword.arg == "device" and ast.unparse(keyword.value) == "'cuda'" for keyword in call.keywords)


def is_guarded(around):
    """Within torch.cuda.device_of, or in a function whose description says that it is called there."""
    return any(
        "device_of" in (ast.unparse(node.items[0]) if isinstance(node, ast.With) else ast.get_docstring(node) or "")
        for node in around
    )


def test_no_event_stream_launch_or_synchronisation_is_without_its_device():
    wrong, launches = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for call, around in calls(ast.parse(path.read_text())):
            launch = isinstance(call.func, ast.Subscript) and name.startswith("ops/triton/")
            launches += launch
            if is_without_device(call, name) or (launch and not is_guarded(around)):
                wrong.append(f"{name}:{call.lineno}: {ast.unparse(call)[:60]}")
    assert wrong == []
    assert launches > 25
