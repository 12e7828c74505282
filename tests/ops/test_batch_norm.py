import itertools
from typing import NamedTuple

import pytest
import torch
from capture import replay_of
from implementations import each, implementations, poisoned_memory
from offline import compile_offline, needs_triton
from torch import nn
from torch.nn import functional as F

from ncfast.ops import batch_norm
from ncfast.ops.batch_norm import why_not

IMPLEMENTATIONS = implementations(batch_norm, why_not)
every_implementation = each(IMPLEMENTATIONS, "reference", "triton")
triton_only = each(IMPLEMENTATIONS, "triton")

NAMES = ("weight", "bias", "running_mean", "running_var", "residual")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    x: torch.Tensor  # [views·B, C, H, W]
    vectors: dict[str, torch.Tensor]
    residual: torch.Tensor | None
    options: dict


def case(shape, *, residual=False, running=True, dtype=torch.float32, seed=0, scale=2.0, offset=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    C = shape[1]

    def randn(*size):
        return torch.randn(size, generator=generator)

    vectors = {"weight": randn(C), "bias": randn(C)}
    if running:
        vectors |= {"running_mean": randn(C), "running_var": randn(C).abs()}
    x = (scale * randn(*shape) + offset).to(dtype)
    return Case(x, vectors, scale * randn(*shape).to(dtype) if residual else None, options)


def oracle(x, weight, bias, running_mean, running_var, residual, views=1, slope=1.0, then_slope=None, pad=False):
    """nn.BatchNorm2d called once a view, in order; all in float64."""
    norm = nn.BatchNorm2d(x.shape[1]).double()
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    norm.running_mean, norm.running_var = running_mean, running_var
    h = x if residual is None else x + residual
    y = torch.cat([norm(view) for view in h.chunk(views)])
    y = torch.where(y > 0, y, slope * y)
    if pad:  # not by F.pad
        i, j = (torch.arange(-1, size + 1).clamp(0, size - 1) for size in y.shape[2:])
        y = y[:, :, i][:, :, :, j]
    results = (y,) if then_slope is None else (y, torch.where(y > 0, y, then_slope * y))
    return results, (norm.weight, norm.bias)


def gradients_of(results, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(y.shape, generator=generator).to(y.dtype) for y in results]


def everything(run, case):
    """By name: the results, the running statistics after them, and all gradients."""
    x = case.x.clone().requires_grad_()
    vectors = {name: value.clone() for name, value in case.vectors.items()}
    leaves = {"x": x, "weight": vectors["weight"].requires_grad_(), "bias": vectors["bias"].requires_grad_()}
    if case.residual is not None:
        leaves["residual"] = case.residual.clone().requires_grad_()
    run.skip_unless_it_runs(x.dtype)
    # Running statistics are updated in place, so they are moved before the call.
    moved = {name: value.to(run.device) for name, value in vectors.items()}
    results = run(x, **moved, residual=leaves.get("residual"), **case.options)
    results = results if isinstance(results, tuple) else (results,)
    found = dict(zip(("y", "activated"), results, strict=False))
    found |= {name: value.cpu() for name, value in moved.items() if name.startswith("running")}
    gradients = torch.autograd.grad(results, leaves.values(), gradients_of(results))
    return {name: value.detach() for name, value in found.items()} | {
        f"grad_{name}": value for name, value in zip(leaves, gradients, strict=True)
    }


def expected_of(case):
    vectors = {name: value.double() for name, value in case.vectors.items()}
    x = case.x.double().requires_grad_()
    residual = None if case.residual is None else case.residual.double().requires_grad_()
    running = [vectors[name].clone() if name in vectors else None for name in NAMES[2:4]]
    results, parameters = oracle(x, vectors["weight"], vectors["bias"], *running, residual, **case.options)
    leaves = {"x": x, "weight": parameters[0], "bias": parameters[1]}
    leaves |= {} if residual is None else {"residual": residual}
    gradients = [g.to(case.x.dtype).double() for g in gradients_of([y.to(case.x.dtype) for y in results])]
    found = dict(zip(("y", "activated"), results, strict=False))
    found |= {name: value for name, value in zip(NAMES[2:4], running, strict=True) if value is not None}
    found |= {
        f"grad_{name}": value
        for name, value in zip(leaves, torch.autograd.grad(results, leaves.values(), gradients), strict=True)
    }
    return {name: value.detach() for name, value in found.items()}


def check(run, case, rtol=None):
    """Relative to the largest element."""
    actual, expected = everything(run, case), expected_of(case)
    rtol = rtol or TOLERANCE[case.x.dtype]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        ours = actual[name]
        per_channel = name.startswith("running") or name in ("grad_weight", "grad_bias")
        assert ours.dtype == (torch.float32 if per_channel else case.x.dtype), name
        assert ours.shape == value.shape, name
        error, size = (ours.double() - value).abs().max(), value.abs().max().clamp(min=1)
        assert error <= rtol * size, f"{name}: {error} of {size}"


OPTIONS = [
    {},
    {"slope": 0.01},
    {"slope": 0.0, "residual": True},
    {"slope": 0.01, "pad": True},
    {"pad": True, "residual": True, "running": False},
    {"then_slope": 0.2, "residual": True},
    {"slope": 0.01, "then_slope": 0.01},
]


@every_implementation
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("views", [1, 2, 3])
def test_options(run, views, options):
    check(run, case((6, 3, 5, 7), views=views, **options))


@every_implementation
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 2),
        (4, 5, 1, 1),
        (4, 5, 1, 6),
        (4, 5, 6, 1),
        (6, 7, 2, 2),
        (2, 63, 3, 5),
        (14, 129, 5, 3),
        (2, 500, 1, 3),
    ],
)
@pytest.mark.parametrize(
    "options", [{"slope": 0.1, "pad": True}, {"then_slope": 0.1, "residual": True}, {"slope": 0.0}], ids=str
)
def test_odd_sizes(run, shape, options):
    # Of two values the gradient of x is a difference of which next to nothing remains.
    check(run, case(shape, views=2, **options), rtol=1e-4)


@every_implementation
@pytest.mark.parametrize("options", [{"slope": 0.1, "pad": True}, {"then_slope": 0.1, "residual": True}], ids=str)
def test_many_parts_and_tiles(run, options, monkeypatch):
    if run.slow:
        from ncfast.ops.triton import batch_norm as kernels

        monkeypatch.setattr(kernels, "LARGEST_BLOCK_C", 16)
        monkeypatch.setattr(kernels, "blocks_for", lambda elements: kernels.Blocks(64, 4, 20, 64, 12))
    check(run, case((6, 20, 5, 9), views=2, **options))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[2:], ids=str)
def test_half_precision(run, dtype, options):
    # Magnitudes with short mantissas, so that the sum is exact and the same sign is taken on both sides.
    plain = case((6, 3, 5, 7), views=2, dtype=dtype, **options)
    eighths = [None if part is None else (8 * part).round() / 8 for part in (plain.x, plain.residual)]
    check(run, Case(eighths[0], plain.vectors, eighths[1], plain.options))


@every_implementation
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_data_far_off_zero(run, offset):
    """E[x²] - E[x]² would have lost all digits of the variance at the last."""
    check(run, case((6, 5, 5, 7), views=2, offset=offset, scale=1.0), rtol=1e-6 * offset)


@every_implementation
def test_constant_channel(run):
    plain = case((4, 3, 2, 5), slope=0.1, views=2)
    plain.x[:, 1] = 3.0
    found = everything(run, plain)
    bias = plain.vectors["bias"][1]
    torch.testing.assert_close(found["y"][:, 1], F.leaky_relu(bias, 0.1).expand(4, 2, 5))
    assert all(value.isfinite().all() for value in found.values())


@every_implementation
def test_views_do_not_touch_each_other(run):
    plain = case((6, 3, 2, 5), views=3)
    expected = everything(run, plain)["y"]
    plain.x[2] = torch.nan
    y = everything(run, plain)["y"]
    assert y[2:4].isnan().all() and torch.equal(y[:2], expected[:2]) and torch.equal(y[4:], expected[4:])


@every_implementation
def test_residual_of_another_type(run):
    plain = case((4, 3, 5, 7), residual=True, dtype=torch.bfloat16)
    found = everything(run, plain._replace(residual=plain.residual.float()))
    expected = everything(run, plain)
    assert found["grad_residual"].dtype == torch.float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=0, atol=0)


@every_implementation
def test_layouts(run):
    plain = case((4, 6, 5, 7), residual=True, views=2, slope=0.1)
    expected = everything(run, plain)
    views = (
        plain.x.to(memory_format=torch.channels_last),
        plain.x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([plain.x, plain.x], -1)[..., 0],
    )
    for x in views:
        leaf = x.detach().requires_grad_()
        vectors = {name: value.clone() for name, value in plain.vectors.items()}
        y = run(leaf, **vectors, residual=plain.residual, **plain.options)
        (grad_x,) = torch.autograd.grad(y, leaf, gradients_of([y])[0].transpose(0, 2).contiguous().transpose(0, 2))
        torch.testing.assert_close(y.detach(), expected["y"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_x, expected["grad_x"], rtol=1e-5, atol=1e-5)
    x = plain.x.clone().requires_grad_()  # a gradient that is expanded
    run(x, **plain.vectors, residual=plain.residual, **plain.options).sum().backward()
    assert x.grad.isfinite().all()


@every_implementation
@pytest.mark.parametrize("shape", [(1, 2, 1, 3), (3, 2, 1, 3), (3, 2, 5, 1), (3, 2, 1, 1), (1, 2, 5, 3)], ids=str)
def test_layouts_with_a_size_of_one(run, shape):
    """Whose stride says nothing: a layout can be taken for another."""
    plain = case(shape)
    for order in itertools.permutations(range(4)):
        x = plain.x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
        check(run, plain._replace(x=x))


@every_implementation
def test_autocast_keeps_the_type(run):
    for dtype in (torch.float32, torch.bfloat16):
        plain = case((4, 3, 5, 7), dtype=dtype, slope=0.1, running=False)
        with torch.autocast(run.device, torch.bfloat16):
            y = run(plain.x, **plain.vectors, **plain.options)
        assert y.dtype == dtype


@triton_only
@pytest.mark.parametrize("options", [{"slope": 0.1, "pad": True}, {"then_slope": 0.1, "residual": True}], ids=str)
def test_every_element_is_written_and_the_same_every_time(run, options):
    plain = case((6, 17, 5, 7), views=2, **options)
    with poisoned_memory():
        check(run, plain)
        first, second = everything(run, plain), everything(run, plain)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@every_implementation
def test_inputs_stay_as_they_are(run):
    plain = case((4, 3, 5, 7), residual=True, then_slope=0.1)
    before = [plain.x.clone(), plain.residual.clone()]
    everything(run, plain)
    assert torch.equal(plain.x, before[0]) and torch.equal(plain.residual, before[1])
    y, activated = run(plain.x, **plain.vectors, residual=plain.residual, **plain.options)
    assert not y.requires_grad and not activated.requires_grad


@pytest.mark.parametrize("options", [{"slope": 0.1, "pad": True}, {"then_slope": 0.1}], ids=str)
def test_gradcheck_of_the_reference(options):
    plain = case((4, 2, 2, 3), residual=True, running=False)
    leaves = [part.double().requires_grad_() for part in (plain.x, *plain.vectors.values(), plain.residual)]

    def function(x, weight, bias, residual):
        return batch_norm(x, weight, bias, residual=residual, views=2, impl="reference", **options)

    assert torch.autograd.gradcheck(function, leaves)


@triton_only
@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_is_used(run, used):
    plain = case((4, 3, 5, 7), residual=True, running=False, then_slope=0.1)
    gradients = []
    for x, call in ((plain.x, run), (plain.x.double(), IMPLEMENTATIONS["reference"])):
        leaf = x.clone().requires_grad_()
        vectors = {name: value.to(x.dtype) for name, value in plain.vectors.items()}
        result = call(leaf, **vectors, residual=plain.residual.to(x.dtype), then_slope=0.1)[used]
        gradients.append(torch.autograd.grad(result.square().sum(), leaf)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_no_synchronisation_and_a_cuda_graph():
    plain = case((16, 64, 5, 15), residual=True, dtype=torch.bfloat16, running=False)
    x, residual = plain.x.cuda(), plain.residual.cuda()
    weight, bias = (value.cuda() for value in plain.vectors.values())

    def step():
        leaf = x.detach().requires_grad_()
        y, activated = batch_norm(leaf, weight, bias, residual=residual, views=2, then_slope=0.01, impl="triton")
        return (y, activated, *torch.autograd.grad((y, activated), leaf, (y.detach(), y.detach())))

    replay_of(step)


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.batch_norm import Plan

    plan = Plan(9600, 2, 64)
    types = dict.fromkeys(("x", "residual", "h", "y", "activated", "grad_y", "grad_activated", "grad_h"), "*bf16")
    types |= dict.fromkeys(("partials", "weight", "bias", "running_mean", "running_var", "saved"), "*fp32")
    types |= dict.fromkeys(("grad_weight", "grad_bias", "parts", "message"), "*fp32")
    types |= dict.fromkeys(("momentum", "eps", "slope", "then_slope"), "fp32")
    jobs = []
    for pad in (False, True):
        flags = {"THEN": not pad, "PAD": pad}
        copies = {"COPIES_H": 2, "COPIES_W": 2}
        jobs += [
            ("batch_norm_statistics_kernel", types, {**plan.blocks, "RESIDUAL": not pad}),
            ("batch_norm_backward_sums_kernel", types, {**plan.blocks, **flags, **copies}),
            ("batch_norm_merge_kernel", types, {"SUMS": pad, "BLOCK_S": plan.block_s, "BLOCK_C": 16, "num_warps": 4}),
        ]
        for processes, parts in ((0, plan.block_s), (2, 2)):
            merged = {**plan.blocks, **flags, "PROCESSES": processes, "BLOCK_S": parts}
            jobs += [
                ("batch_norm_apply_kernel", types, {**merged, "RUNNING": True}),
                ("batch_norm_backward_apply_kernel", types, {**merged, **copies}),
            ]
    used = compile_offline("ncfast.ops.triton.batch_norm", jobs)
    assert all(each["stack"] == 0 for each in used)  # all in registers


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 3, 5), {}, r"\[N, C, H, W\]"),
        ((4, 3, 2, 2), {"views": 3}, "multiple of views"),
        ((4, 3, 2, 2), {"views": 0}, "multiple of views"),
        ((4, 0, 2, 2), {}, "1 channel or more"),
        ((2, 3, 1, 1), {"views": 2}, "2 values or more"),
        ((0, 3, 1, 1), {}, "2 values or more"),
        ((4, 2, 2, 2), {}, r"weight is \[C\] = \[2\]"),
        ((4, 3, 2, 2), {"running_mean": torch.zeros(3)}, "both given"),
        ((4, 3, 2, 2), {"residual": torch.zeros(4, 3, 2, 1)}, "shape of x"),
        ((4, 3, 2, 2), {"slope": -0.1}, "at least 0"),
        ((4, 3, 2, 2), {"then_slope": 0.1, "pad": True}, "without then_slope"),
        ((4, 3, 2, 2), {"impl": "cpp"}, "has the implementations .* got impl='cpp'"),
    ],
)
def test_refuses_what_does_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=f"batch_norm.*{message}"):
        batch_norm(torch.zeros(shape), torch.ones(3), torch.zeros(3), **options)


def test_explicit_request_that_cannot_be_met():
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64 input: only the reference|not installed|off a GPU"):
        batch_norm(x, ones, ones, impl="triton")
    assert batch_norm(x, ones, ones).dtype == torch.float64  # auto passes it over
