"""AdamW in one launch, and the rounded weights that it keeps."""

import copy

import pytest
import torch
from implementations import GPU
from offline import compile_offline, needs_triton
from torch import nn
from torch.nn import functional as F

from ncfast.engine.adamw import AdamW, RoundedWeights
from ncfast.engine.step import TrainingStep
from ncfast.ops import dispatch

pytestmark = needs_triton
OPTIONS = {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}
SHAPES = [(), (1,), (5,), (70, 300), (8, 4, 3, 3), (16385,)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(GPU, dtype) for shape in SHAPES]
    return [nn.Parameter(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x) for x in made]


def gradient(parameter, seed):
    """Of all sizes, and in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (12 * torch.rand(parameter.shape, generator=generator) - 9)
    return (sizes * torch.randn(parameter.shape, generator=generator)).to(GPU)


@pytest.mark.parametrize("low", [False, True])
def test_equals_float64(low):
    ours, exact = parameters(), parameters(torch.float64)
    optimizer = AdamW(ours, lr=torch.tensor(0.01, device=GPU), **OPTIONS)
    reference = torch.optim.AdamW(exact, lr=0.01, **OPTIONS)
    for step in range(4):
        if step == 2:  # what torch's keeps goes on here, and the other way round
            states = copy.deepcopy((reference.state_dict(), optimizer.state_dict()))
            optimizer.load_state_dict(states[0] | {"param_groups": states[1]["param_groups"]})
            reference.load_state_dict(states[1] | {"param_groups": states[0]["param_groups"]})
        for i, (p, q) in enumerate(zip(ours, exact, strict=True)):
            g = gradient(p, 10 * step + i)
            if low and i % 2:
                optimizer.copies[p] = torch.zeros_like(p, dtype=torch.bfloat16)
                optimizer.copies[p].grad = g = g.bfloat16()
            elif low and i == 4:  # both take part
                optimizer.copies[p] = torch.zeros_like(p, dtype=torch.bfloat16)
                p.grad, optimizer.copies[p].grad = g, torch.full_like(p, 0.5, dtype=torch.bfloat16)
                g = g + 0.5
            else:
                p.grad = g
            q.grad = g.double()
        optimizer.update()
        reference.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in ours) and all(c.grad is None for c in optimizer.copies.values())
    for p, q in zip(ours, exact, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=2e-7)
        if p in optimizer.copies:  # the interpreter cuts
            torch.testing.assert_close(optimizer.copies[p].float(), p, rtol=2**-7, atol=0)
            assert GPU == "cpu" or torch.equal(optimizer.copies[p], p.bfloat16())
        assert float(optimizer.state[p]["step"]) == 4


def test_parameters_without_a_gradient_stay():
    ours = parameters()
    before = [p.detach().clone() for p in ours]
    optimizer = AdamW(ours, lr=torch.tensor(0.01, device=GPU), **OPTIONS)
    optimizer.update()
    ours[2].grad = torch.ones_like(ours[2])
    optimizer.update()
    changed = [not torch.equal(p, b) for p, b in zip(ours, before, strict=True)]
    assert changed == [False, False, True, False, False, False]


def test_rounded_weights_give_the_bits_of_autocast():
    linear, conv = nn.Linear(12, 8).to(GPU), nn.Conv1d(8, 4, 3).to(GPU)
    other = nn.Linear(4, 4).to(GPU)  # of another optimiser
    x = torch.randn(5, 12, device=GPU)
    optimizer = AdamW([*linear.parameters(), *conv.parameters()], lr=1e-3)

    def loss():
        with torch.autocast(GPU, torch.bfloat16):
            y = other(conv(linear(x)[..., None].expand(-1, -1, 3))[..., 0])
        return y.float().square().sum() + linear.weight.sum() + F.linear(x, linear.weight).sum()  # without autocast

    loss().backward()
    expected = [p.grad for p in optimizer.param_groups[0]["params"]]
    optimizer.zero_grad()
    with RoundedWeights(optimizer):
        value = loss()
    value.backward()
    assert value.dtype == torch.float32 and len(optimizer.copies) == 4 and other.weight.grad is not None
    assert torch.equal(optimizer.copies[linear.weight].grad + linear.weight.grad, expected[0])
    for p, g in list(zip(optimizer.param_groups[0]["params"], expected, strict=True))[1:]:
        assert p.grad is None and optimizer.copies[p].grad.dtype == torch.bfloat16
        assert torch.equal(optimizer.copies[p].grad.float(), g)


def step_of(modules, x, precision, **options):
    return TrainingStep(
        lambda rows, generator: {"loss": modules(x[rows]).float().square().mean()},
        modules,
        num_series=len(x),
        weight_decay=0.1,
        rates=[0.01] * 100,
        precision=precision,
        device=torch.device(GPU),
        **options,
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_takes_it_and_notices_weights_that_were_loaded(monkeypatch, precision):
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    modules = nn.Linear(6, 3).to(GPU)
    x = torch.randn(4, 6, device=GPU)
    step = step_of(modules, x, precision)
    rows, generators = torch.arange(4, device=GPU), [torch.Generator(GPU)]
    step(0, rows, generators)
    assert isinstance(step.optimizer, AdamW) and len(step.optimizer.copies) == (2 if precision == "bf16" else 0)
    with torch.no_grad():
        modules.weight.zero_()
        modules.bias.fill_(2)
    step.begin_epoch()
    step(1, rows, generators)
    assert float(step.losses["loss"]) == 4


def test_a_captured_update_finds_its_table_when_it_is_replayed(monkeypatch):
    """As a capture does it, where there is none: the launch comes after `fill_tables`."""
    ours, expected = parameters(), parameters()
    launches = []
    import ncfast.ops.triton.adamw as kernels

    launch = kernels.adamw_triton
    optimizers = [AdamW(each, lr=torch.tensor(0.01, device=GPU), **OPTIONS) for each in (ours, expected)]
    for p, q in zip(ours, expected, strict=True):
        p.grad = q.grad = torch.empty_like(p).copy_(gradient(p, 1))
    optimizers[1].update()
    with monkeypatch.context() as patch:
        for name in ("is_available", "is_current_stream_capturing"):
            patch.setattr(torch.cuda, name, lambda: True)
        patch.setattr(kernels, "adamw_triton", lambda *arguments: launches.append(arguments))
        with pytest.raises(RuntimeError, match="make_room"):  # only what is older than a graph keeps its memory
            optimizers[0].update()
        optimizers[0].make_room()
        room = optimizers[0].room
        optimizers[0].update()
    assert launches[0][0].data_ptr() == room.data_ptr() and len(launches[0][0]) <= len(room)
    optimizers[0].fill_tables()
    launch(*launches[0])
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_equal_eager_ones(precision):
    """With batches of two sizes, thus two graphs, and activations that leave their memory to what comes later."""
    x = torch.randn(96, 64, device=GPU)
    generators, ends = [torch.Generator(GPU)], []
    for graph in (False, True):
        torch.manual_seed(0)
        modules = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6))).to(GPU)
        step = step_of(modules, x, precision, graph=graph)
        assert isinstance(step.optimizer, AdamW)
        for i in range(16):
            step(i, torch.arange(64 if i % 2 else 32, device=GPU), generators)
        assert len(step.graphs) == (2 if graph else 0)
        ends.append([p.detach() for p in modules.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def test_triton_kernel_compiles_offline():
    from ncfast.ops.triton.adamw import BLOCKS

    constants = {"BETA1": 0.9, "BETA2": 0.999, "LOG_BETA1": -0.1, "LOG_BETA2": -0.001, "EPS": 1e-8, "DECAY": 1e-3}
    job = ("adamw_kernel", {"table": "*i64", "rate": "*fp32"}, {**constants, "CHUNK": 16384, **BLOCKS})
    (used,) = compile_offline("ncfast.ops.triton.adamw", [job])
    assert used["stack"] == 0
