"""A training step: precision, state, and when it becomes a CUDA graph."""

import contextlib
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ncfast
from ncfast.engine import step as step_module
from ncfast.engine.precision import computing, resolve_precision
from ncfast.engine.step import TrainingStep
from ncfast.errors import UserError
from ncfast.training.self_supervision import SSL_LOSSES

CPU = torch.device("cpu")
N = 10


class Problem:
    """Linear regression with noise: the loss depends on rows and on the generator."""

    def __init__(self, steps, device=CPU, precision="fp32", graph=True):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(N, n, generator=generator).to(device) for n in (16, 8))
        self.modules = nn.Linear(16, 8, bias=False).to(device)
        with torch.no_grad():
            self.modules.weight.fill_(0.1)
        self.dtypes = set()
        self.step = TrainingStep(
            self.losses,
            self.modules,
            num_series=N,
            weight_decay=0.01,
            rates=[0.01 * (i + 1) for i in range(steps)],
            precision=precision,
            device=torch.device(device),
            graph=graph,
        )
        self.generators = [torch.Generator(device).manual_seed(1)]

    def losses(self, rows, generator):
        noise = torch.randn(len(rows), 8, generator=generator, device=rows.device)
        out = self.modules(self.x[rows])
        self.dtypes.add(out.dtype)
        loss = (out - self.y[rows] - 0.1 * noise).square().mean()
        return {"loss": loss, "twice": 2 * loss}

    def run(self, steps, first=0):
        """Epochs of two steps: 6 rows and 4."""
        for i in range(first, first + steps):
            if i % 2 == 0:
                self.step.begin_epoch()
            rows = torch.arange(6) if i % 2 == 0 else torch.arange(6, 10)
            self.step(i, rows.to(self.x.device), self.generators)
        return self.modules.weight.detach().clone()


def test_equals_adamw_written_out():
    problem = Problem(4)
    weight = problem.run(4)
    w, m, v = torch.full((8, 16), 0.1, dtype=torch.float64), 0.0, 0.0
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for i in range(4):
        rows = torch.arange(6) if i % 2 == 0 else torch.arange(6, 10)
        x, y = problem.x[rows].double(), problem.y[rows].double()
        residual = x @ w.T - y - 0.1 * torch.randn(len(rows), 8, generator=generator).double()
        total = (total if i % 2 else 0) + len(rows) / N * residual.square().mean()
        gradient = 2 * residual.T @ x / residual.numel()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rate = 0.01 * (i + 1)
        w = w * (1 - rate * 0.01)
        w = w - rate * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    torch.testing.assert_close(weight, w.float(), rtol=1e-5, atol=1e-6)
    losses = problem.step.mean_losses()
    assert losses["loss"] == pytest.approx(float(total), rel=1e-5) and losses["twice"] == 2 * losses["loss"]


def test_continues_from_a_state():
    straight = Problem(8)
    expected = straight.run(8)
    first, second = Problem(8), Problem(8)
    first.run(3)
    second.modules.load_state_dict(first.modules.state_dict())
    state = first.step.state_dict()
    # As a GPU would have written it: what a group says about its device is not restored.
    state["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(5.0)}
    second.step.load_state_dict(state)
    second.generators = first.generators
    assert torch.equal(second.run(5, first=3), expected)


class Replay:
    """Stands for a CUDA graph where there is none."""

    made = 0

    def __init__(self, function, *inputs, warm_ups, generators):
        Replay.made += 1
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


@pytest.fixture
def no_streams(monkeypatch):
    monkeypatch.setattr(step_module, "capture_stream", lambda device: None)
    monkeypatch.setattr(step_module, "on_stream", lambda stream: contextlib.nullcontext())


def test_continues_from_moments_that_lie_otherwise():
    """As those of version 0.1.0, of which a fused AdamW would take each for that of another weight."""

    def step_of(conv):
        def losses(rows, generator):
            return {"loss": conv(x[rows]).square().mean()}

        options = dict(num_series=N, weight_decay=0.01, rates=[0.01] * 4, precision="fp32", device=CPU)
        return TrainingStep(losses, conv, **options)

    x = torch.randn(N, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    first, second = (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last) for _ in range(2))
    steps = step_of(first), step_of(second)
    for i in range(2):
        steps[0](i, torch.arange(N), [torch.Generator()])
    second.load_state_dict(first.state_dict())
    state = steps[0].state_dict()
    state["state"] = {
        key: {name: value.clone(memory_format=torch.contiguous_format) for name, value in own.items()}
        for key, own in state["state"].items()
    }
    steps[1].load_state_dict(state)
    for i in range(2, 4):
        for step in steps:
            step(i, torch.arange(N), [torch.Generator()])
    assert torch.equal(first.weight, second.weight)


def test_each_batch_size_becomes_a_graph_after_a_few_steps(no_streams, monkeypatch):
    monkeypatch.setattr(step_module, "CudaGraph", Replay)
    expected = Problem(60).run(60)
    Replay.made = 0
    problem = Problem(60)
    problem.step.wants_graph = True  # there is no GPU
    problem.run(2 * TrainingStep.EAGER_STEPS)
    assert Replay.made == 0
    assert torch.equal(problem.run(60 - 6, first=6), expected)
    assert Replay.made == 2 and sorted(problem.step.graphs) == [4, 6]


def test_no_graph_for_a_handful_of_steps(no_streams, monkeypatch):
    monkeypatch.setattr(step_module, "CudaGraph", Replay)
    Replay.made = 0
    problem = Problem(30)  # 27 follow, half of them of each size
    problem.step.wants_graph = True
    problem.run(30)
    assert Replay.made == 0


def test_what_cannot_be_captured_goes_on_with_a_warning(no_streams, monkeypatch):
    def refuse(function, *inputs, generators, **options):
        generators[0].manual_seed(99)  # as a broken capture leaves it
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(step_module, "CudaGraph", refuse)
    expected = Problem(60).run(60)
    problem = Problem(60)
    problem.step.wants_graph = True
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*operation not permitted when stream is capturing"):
        assert torch.equal(problem.run(60), expected)


def test_bf16_rounds_products_but_no_weights():
    full, rounded = Problem(8), Problem(8, precision="bf16")
    expected, weight = full.run(8), rounded.run(8)
    assert full.dtypes == {torch.float32} and rounded.dtypes == {torch.bfloat16}
    assert weight.dtype == torch.float32
    assert 0 < (weight - expected).abs().max() < 0.02


def test_precision_of_a_device():
    assert resolve_precision(None, CPU) == "fp32" and resolve_precision("bf16", CPU) == "bf16"
    assert resolve_precision("tf32", CPU, fall_back=True) == "fp32"
    with pytest.raises(UserError, match="--precision tf32: TF32 is a format of NVIDIA GPUs, and the device is cpu"):
        resolve_precision("tf32", CPU)
    with pytest.raises(UserError, match="there are fp32, tf32, bf16"):
        resolve_precision("fp8", CPU)


@pytest.mark.gpu
def test_precision_rounds_products_and_convolutions_and_leaves_no_trace():
    device = torch.device("cuda")
    x = torch.randn(256, 256, device=device)
    image, kernel = torch.randn(8, 64, 32, 32, device=device), torch.randn(64, 64, 3, 3, device=device)
    exact = x.double() @ x.double(), torch.nn.functional.conv2d(image.double(), kernel.double())
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    for precision, low, high in (("fp32", 0, 1e-5), ("tf32", 1e-5, 1e-2)):
        with computing(precision, device):
            results = x @ x, torch.nn.functional.conv2d(image, kernel)
        for result, target in zip(results, exact, strict=True):
            assert low < (result - target).norm() / target.norm() < high
    after = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    assert before == after


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_takes_the_steps_of_single_launches(precision):
    graphed, eager = (Problem(60, "cuda", precision, graph=graph) for graph in (True, False))
    for first in (0, 30):
        for problem in (graphed, eager):
            problem.generators[0].manual_seed(first)  # as every epoch does
        assert torch.equal(graphed.run(30, first), eager.run(30, first))
        assert graphed.step.mean_losses() == eager.step.mean_losses()
    assert sorted(graphed.step.graphs) == [4, 6] and not eager.step.graphs


@pytest.mark.gpu
def test_what_waits_for_the_gpu_goes_on_without_a_graph():
    problem, expected = Problem(60, "cuda"), Problem(60, "cuda", graph=False)
    losses = problem.step.compute_losses

    def waiting(rows, generator):
        made = losses(rows, generator)
        float(made["loss"].detach())
        return made

    problem.step.compute_losses = waiting
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        weight = problem.run(60)
    assert torch.equal(weight, expected.run(60))


SMALL = {"dim": 16, "residual_blocks": 1, "codebook_size": 8, "projector_dim": 64, "prior_dim": 32, "prior_layers": 2}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("ssl", "precision"),
    [*itertools.product(["none", *SSL_LOSSES], ["tf32"]), ("vicreg", "bf16"), ("visreg", "bf16")],
)
def test_whole_runs_are_the_same_bits_with_graphs_and_without(ssl, precision):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(40, 1, 64)).astype(np.float32), np.arange(40) % 2
    options = dict(ssl=ssl, precision=precision, stage1_epochs=40, stage2_epochs=40, batch_size=16, **SMALL)
    options |= {"stage2_batch_size": 16, "augment": ("warp", "slice"), "device": "cuda", "quiet": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training without a CUDA graph")
        graphed, eager, again = (ncfast.fit(x, y, graph=graph, **options) for graph in (True, False, True))
    for other in (eager, again):
        for a, b in ((graphed.vqvae, other.vqvae), (graphed.prior, other.prior)):
            for name, value in a.state_dict().items():
                assert torch.equal(value, b.state_dict()[name]), name
