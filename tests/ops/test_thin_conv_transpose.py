from typing import NamedTuple

import pytest
import torch
from capture import replay_of
from implementations import each, implementations, poisoned_memory
from offline import compile_offline, needs_triton
from torch.nn import functional as F

from ncfast.ops import thin_conv_transpose
from ncfast.ops.thin_conv_transpose import MOST_CHANNELS, takes_triton, why_not

IMPLEMENTATIONS = implementations(thin_conv_transpose, why_not)
every_implementation = each(IMPLEMENTATIONS, "reference", "triton")
triton_only = each(IMPLEMENTATIONS, "triton")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SUMS_TOLERANCE = 1e-5  # of the gradients that are sums over all positions, in float32


class Case(NamedTuple):
    x: torch.Tensor  # [B, groups·Cin, H, W]
    weight: torch.Tensor  # [groups·Cin, Cout, 3, 4]
    bias: torch.Tensor | None  # [groups·Cout]
    groups: int
    grad_y: torch.Tensor  # [B, groups·Cout, H, 2W]


def case(B, H, W, channels=(2, 2), groups=1, dtype=torch.float32, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Cin, Cout = channels

    def randn(*size):
        return torch.randn(size, generator=generator)

    x, weight = randn(B, groups * Cin, H, W).to(dtype), randn(groups * Cin, Cout, 3, 4)
    vector, grad_y = randn(groups * Cout) if bias else None, randn(B, groups * Cout, H, 2 * W)
    return Case(x, weight, vector, groups, grad_y)


def everything(call, case):
    """y and the gradients of x, weight and bias, by name."""
    leaves = {"x": case.x, "weight": case.weight} | ({} if case.bias is None else {"bias": case.bias})
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    y = call(**leaves, groups=case.groups)
    gradients = torch.autograd.grad(y, leaves.values(), case.grad_y.to(y.dtype))
    return {"y": y.detach()} | {name: value for name, value in zip(leaves, gradients, strict=True)}


def called(run):
    run.skip_unless_it_runs(torch.float32)
    return lambda x, **others: run(x, **others)


def exact(x, weight, bias=None, groups=1):
    return F.conv_transpose2d(x, weight, bias, (1, 2), (1, 1), groups=groups)


def doubled(case):
    return Case(*[part.double() if isinstance(part, torch.Tensor) else part for part in case])


def check(run, case):
    """Relative to the largest element."""
    actual, expected = everything(called(run), case), everything(exact, doubled(case))
    assert actual["y"].dtype == torch.float32 and actual["y"].is_contiguous()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        ours = actual[name]
        assert ours.shape == value.shape, name
        dtype = torch.float32 if name == "y" else getattr(case, name).dtype
        assert ours.dtype == dtype, name
        if value.numel() > 0:
            rtol = max(TOLERANCE[dtype], SUMS_TOLERANCE if name in ("weight", "bias") else 0)
            error, size = (ours.double() - value).abs().max(), value.abs().max().clamp(min=1)
            assert error <= rtol * size, f"{name}: {error} of {size}"


@every_implementation
@pytest.mark.parametrize("B", [0, 1, 3])
@pytest.mark.parametrize("H", [1, 5])
@pytest.mark.parametrize("W", [1, 2, 7, 120])
def test_odd_sizes(run, B, H, W):
    check(run, case(B, H, W))


@every_implementation
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("channels", [(1, 1), (2, 2), (1, 3), (3, 2), (4, 4), (1, 6), (6, 1)])
def test_channels_and_groups(run, channels, groups):
    check(run, case(2, 3, 7, channels, groups))


@every_implementation
def test_most_channels(run):
    check(run, case(2, 3, 7, (MOST_CHANNELS, MOST_CHANNELS)))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(run, dtype):
    half = case(3, 5, 7, groups=3, dtype=dtype)
    check(run, half)
    check(run, half._replace(weight=half.weight.to(dtype), bias=half.bias.to(dtype)))


@every_implementation
def test_without_bias(run):
    check(run, case(2, 5, 7, bias=False))


@every_implementation
def test_only_the_bias_wants_a_gradient(run):
    plain = case(2, 5, 7)
    bias = plain.bias.requires_grad_()
    called(run)(plain.x, weight=plain.weight, bias=bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full([2], 2.0 * 5 * 14))


@triton_only
def test_many_parts_and_tiles(run, monkeypatch):
    if run.slow:
        from ncfast.ops.triton import thin_conv_transpose as kernels

        for name, block in (("POSITIONS", 32), ("BACKWARD", 16), ("MERGE", 4)):
            monkeypatch.setitem(getattr(kernels, name), "BLOCK", block)
        monkeypatch.setattr(kernels, "MOST_PARTS", 7)
    check(run, case(3, 5, 33))
    check(run, case(2, 3, 33, groups=3))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats(run, dtype):
    plain = case(3, 5, 7, groups=3, dtype=dtype)
    expected = everything(called(run), plain)
    for x in (
        plain.x.to(memory_format=torch.channels_last),
        plain.x.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([plain.x, plain.x], -1)[..., 0],
    ):
        grad_y = plain.grad_y.to(memory_format=torch.channels_last)
        found = everything(called(run), plain._replace(x=x, grad_y=grad_y))
        assert found["y"].is_contiguous()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
    x = plain.x[:1].expand(3, -1, -1, -1).detach().requires_grad_()  # shared rows, and a gradient that is expanded
    called(run)(x, weight=plain.weight, groups=3).sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all()


@triton_only
def test_gradient_has_the_layout_of_x(run):
    plain = case(3, 5, 7, dtype=torch.bfloat16)
    x = plain.x.to(memory_format=torch.channels_last)
    grad_x = everything(called(run), plain._replace(x=x))["x"]
    assert grad_x.is_contiguous(memory_format=torch.channels_last)


@every_implementation
def test_autocast_rounds_nothing(run):
    for dtype in (torch.float32, torch.bfloat16):
        plain = case(2, 5, 7, dtype=dtype)
        with torch.autocast(run.device, torch.bfloat16):
            check(run, plain)


@every_implementation
def test_positions_do_not_touch_beyond_the_taps(run):
    plain = case(3, 5, 7)
    expected = everything(called(run), plain)["y"]
    plain.x[1, :, 2, 3] = torch.nan
    touched = torch.zeros(3, 2, 5, 14, dtype=torch.bool)
    touched[1, :, 1:4, 5:9] = True
    y = everything(called(run), plain)["y"]
    assert torch.equal(y.isnan(), touched) and torch.equal(y[~touched], expected[~touched])


@triton_only
@pytest.mark.parametrize("B", [0, 3])
def test_every_element_is_written_and_the_same_every_time(run, B):
    plain = case(B, 5, 33, groups=3)
    with poisoned_memory():
        check(run, plain)
        first, second = everything(called(run), plain), everything(called(run), plain)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gradcheck_of_the_reference():
    plain = doubled(case(2, 2, 3, groups=2))
    leaves = [part.requires_grad_() for part in (plain.x, plain.weight, plain.bias)]
    assert torch.autograd.gradcheck(lambda *parts: thin_conv_transpose(*parts, groups=2), leaves)


@pytest.mark.gpu
def test_no_synchronisation_and_a_cuda_graph():
    plain = case(256, 5, 120, dtype=torch.bfloat16)
    x, weight, bias, grad_y = (part.cuda() for part in (plain.x, plain.weight, plain.bias, plain.grad_y))

    def step():
        leaves = [part.detach().requires_grad_() for part in (x, weight, bias)]
        y = thin_conv_transpose(*leaves, impl="triton")
        return (y, *torch.autograd.grad(y, leaves, grad_y))

    replay_of(step)


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.thin_conv_transpose import BACKWARD, MERGE, POSITIONS

    types = dict.fromkeys(("x", "grad_x"), "*bf16")
    types |= dict.fromkeys(("weight", "bias", "y", "grad_y", "partials", "grad_weight", "grad_bias"), "*fp32")
    jobs = []
    for Cin, Cout in ((2, 2), (4, 4), (MOST_CHANNELS, MOST_CHANNELS)):
        channels = {"CIN": Cin, "COUT": Cout}
        jobs += [
            ("thin_conv_transpose_kernel", types, {**POSITIONS, **channels, "BIAS": True}),
            ("thin_conv_transpose_backward_kernel", types, {**BACKWARD, **channels}),
            ("thin_conv_transpose_merge_kernel", types, {**MERGE, **channels}),
        ]
    used = compile_offline("ncfast.ops.triton.thin_conv_transpose", jobs)
    assert all(each["stack"] == 0 for each in used)  # all in registers


@pytest.mark.parametrize(
    ("x", "weight", "bias", "options", "message"),
    [
        ((2, 2, 3), (2, 2, 3, 4), [2], {}, r"x is \[B, C, H, W\]"),
        ((2, 2, 0, 3), (2, 2, 3, 4), [2], {}, "at least 1"),
        ((2, 2, 3, 0), (2, 2, 3, 4), [2], {}, "at least 1"),
        ((2, 0, 3, 3), (0, 2, 3, 4), [2], {}, "multiple of groups"),
        ((2, 2, 3, 3), (2, 2, 3, 4), [6], {"groups": 3}, "multiple of groups"),
        ((2, 2, 3, 3), (2, 2, 3, 4), [2], {"groups": 0}, "multiple of groups"),
        ((2, 2, 3, 3), (3, 2, 3, 4), [2], {}, r"weight is \[C, Cout, 3, 4\], C = 2"),
        ((2, 2, 3, 3), (2, 2, 4, 3), [2], {}, r"weight is \[C, Cout, 3, 4\]"),
        ((2, 2, 3, 3), (2, 2, 3, 4), [2], {"groups": 2}, r"bias is \[G·Cout\] = \[4\]"),
        ((2, 2, 3, 3), (2, 2, 3, 4), [2], {"impl": "cpp"}, "has the implementations .* got impl='cpp'"),
    ],
)
def test_refuses_what_does_not_fit(x, weight, bias, options, message):
    with pytest.raises(ValueError, match=f"thin_conv_transpose.*{message}"):
        thin_conv_transpose(torch.zeros(x), torch.zeros(weight), torch.zeros(bias), **options)


def test_explicit_request_that_cannot_be_met():
    plain = doubled(case(2, 3, 5))
    with pytest.raises(RuntimeError, match="float64 input: only the reference|not installed|off a GPU"):
        thin_conv_transpose(plain.x, plain.weight, impl="triton")
    y = thin_conv_transpose(plain.x, plain.weight)  # auto passes it over
    assert torch.equal(y, exact(plain.x, plain.weight))
    many = case(2, 3, 5, channels=(2, 7))
    with pytest.raises(RuntimeError, match="takes up to 6|not installed|off a GPU"):
        thin_conv_transpose(many.x, many.weight, impl="triton")
    torch.testing.assert_close(thin_conv_transpose(many.x, many.weight), exact(many.x, many.weight))
    assert not takes_triton(plain.x, plain.weight, 1) and not takes_triton(many.x, many.weight, 1)
