"""fused_linear against float64, by every implementation."""

import itertools
import math

import numpy as np
import pytest
import torch
from implementations import GPU, each, implementations, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.engine.cuda_graph import CudaGraph
from ncfast.ops import dispatch, fused_linear
from ncfast.ops.fused_linear import (
    LEAST_SHARED_MEMORY,
    MAX_NORMED,
    why_not,
)

IMPLEMENTATIONS = implementations(fused_linear, lambda device, *dtypes: why_not(device, *dtypes[:1]))
every_implementation = each(IMPLEMENTATIONS)
every_cpp = each(IMPLEMENTATIONS, "cpp")
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton")
every_triton = each(IMPLEMENTATIONS, "triton")
# Overflow and NaN are NumPy's to report in the interpreter and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
SIZES = [(1, 1, 1), (7, 33, 5), (63, 17, 129), (129, 64, 31), (57, 500, 256), (500, 7, 63)]  # M, N, K


@pytest.fixture
def needs_cpp():
    if dispatch.why_not_cpp(torch.device("cpu")):
        pytest.skip(dispatch.why_not_cpp(torch.device("cpu")))


def data(M, N, K, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 1000 * M + N)
    x, weight, bias, norm_weight, residual = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((M, K), (N, K), (N,), (K,), (M, N))
    )
    return tuple(part.to(dtype) for part in (x, weight / K**0.5, bias, norm_weight, residual))


def combinations(run, size):
    """Which of bias, norm and residual are given, and whether there is a GELU."""
    all_or_none = run.slow and math.prod(size) > 10**5
    given = itertools.product([False, True], repeat=3)
    return itertools.product([(False,) * 3, (True,) * 3] if all_or_none else given, [False, True])


def oracle(x, weight, bias, norm_weight, residual, *, norm_eps, gelu):
    x, weight, bias, norm_weight, residual = (
        None if part is None else part.double().numpy() for part in (x, weight, bias, norm_weight, residual)
    )
    if norm_weight is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm_eps) * norm_weight
    y = x @ weight.T + (0 if bias is None else bias)
    if gelu:
        erf = torch.special.erf(torch.from_numpy(y / np.sqrt(2))).numpy()
        y = y * 0.5 * (1 + erf)
    return y + (0 if residual is None else residual)


@every_implementation
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_combination(run, size):
    x, weight, *parts = data(*size)
    for given, gelu in combinations(run, size):
        chosen = [part if keep else None for part, keep in zip(parts, given, strict=True)]
        actual = run(x, weight, *chosen, norm_eps=1e-3, gelu=gelu)
        expected = oracle(x, weight, *chosen, norm_eps=1e-3, gelu=gelu)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=2e-5, atol=2e-5)
        if size[2] > 1:
            assert np.linalg.norm(actual.numpy() - expected) < 1e-6 * np.linalg.norm(expected)


@every_cpp
def test_gelu_is_exact_in_its_tails(run):
    """x Φ(x) keeps its relative error where it is tiny, and is x or 0 far out."""
    x = torch.cat([torch.linspace(-9, 9, 20001), torch.tensor([0.0, -0.0, 40.0, -40.0, 1e30, -1e30])])[:, None]
    y = run(x, torch.ones(1, 1), gelu=True)[:, 0].double().numpy()
    z = x[:, 0].double()
    expected = (0.5 * z * torch.special.erfc(-z / 2**0.5)).numpy()
    # The exponent -x²/2 is a float32: its rounding is the relative error of a tail.
    tolerance = 4e-7 * np.maximum(1, z.numpy() ** 2)
    tolerance[np.abs(z.numpy()) > 9] = 1e-6
    assert (np.abs(y - expected) <= tolerance * np.abs(expected) + 1e-37).all()


@every_kernel
def test_nan_and_infinity_stay_in_their_row(run):
    x, weight, *parts = data(5, 40, 20)
    clean = run(x, weight, *parts, gelu=True)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    out = run(x, weight, *parts, gelu=True)
    assert out[1].isnan().all() and not out[3].isfinite().any()
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@every_cpp
def test_a_row_is_the_same_bits_among_any_rows_and_threads(run, threads):
    x, weight, *parts = data(131, 70, 64)
    whole = run(x, weight, *parts, gelu=True)
    for count, rows in itertools.product((1, 2, 3), (1, 3, 14, 56, 130)):
        threads(count)
        part = run(x[1 : 1 + rows], weight, *parts[:-1], parts[-1][1 : 1 + rows], gelu=True)
        assert torch.equal(part, whole[1 : 1 + rows])


@every_kernel
@pytest.mark.parametrize("norm_eps", [1e-12, 0])
def test_every_element_is_written(run, norm_eps):
    x, weight, *parts = data(19, 45, 8)
    parts = [part.requires_grad_() for part in (x, weight, *parts)]
    with poisoned_memory():
        out, passed = run(*parts, norm_eps=norm_eps, gelu=True, return_x=True)
        (out.sum() + passed.sum()).backward()
    assert out.isfinite().all() and all(part.grad.isfinite().all() for part in parts)


@every_implementation
def test_shapes(run):
    x, weight, bias, norm_weight, _ = data(24, 10, 6)
    flat = run(x, weight, bias, norm_weight)
    assert run(x.view(2, 3, 4, 6), weight, bias, norm_weight).equal(flat.view(2, 3, 4, 10))
    assert run(x[:0], weight, bias).shape == (0, 10) and run(x, weight[:0]).shape == (24, 0)
    assert run(x[0], weight).shape == (10,)
    assert run(x[:, :0], weight[:, :0], bias).equal(bias.expand(24, 10))


def test_non_contiguous_and_other_dtypes():
    x, weight, *parts = data(12, 9, 16)
    expected = fused_linear(x, weight, *parts)
    strided = [part.mT.contiguous().mT if part.dim() == 2 else part for part in (x, weight, *parts)]
    torch.testing.assert_close(fused_linear(*strided), expected)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 5e-2)):
        out = fused_linear(*(part.to(dtype) for part in (x, weight, *parts)))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


@every_implementation
@pytest.mark.parametrize("size", [*SIZES, (300, 8, 40)], ids=str)
def test_gradients(run, size):
    """Against autograd of the reference in float64, for every part alone and all together."""
    *inputs, grad_y = (*data(*size), data(*size, seed=1)[4])
    for given, gelu in combinations(run, size):
        chosen = [True, True, *given]
        ours, exact = ([part if keep else None for part, keep in zip(inputs, chosen, strict=True)] for _ in range(2))
        ours = [None if part is None else part.clone().requires_grad_() for part in ours]
        exact = [None if part is None else part.double().requires_grad_() for part in exact]
        run(*ours, norm_eps=1e-3, gelu=gelu).backward(grad_y)
        fused_linear(*exact, norm_eps=1e-3, gelu=gelu, impl="reference").backward(grad_y.double())
        for actual, expected in zip(ours, exact, strict=True):
            if actual is None:
                continue
            error = (actual.grad.double() - expected.grad).norm()
            assert error <= 2e-6 * expected.grad.norm() + 1e-6


@every_implementation
@pytest.mark.parametrize("size", [(0, 5, 3), (0, 5, 0), (4, 0, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_nothing(run, size, dtype):
    """Without rows, results or columns."""
    run.skip_unless_it_runs(dtype)
    leaves = [part.requires_grad_() for part in data(*size, dtype)]
    y = run(*leaves, gelu=True)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (size[0], size[1]) and y.isfinite().all()
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()


def test_gradcheck_of_the_reference():
    parts = [part.double().requires_grad_() for part in data(3, 4, 5)]
    assert torch.autograd.gradcheck(lambda *p: fused_linear(*p, gelu=True), parts)


@every_cpp
def test_gradient_is_the_same_bits_for_any_number_of_threads(run, threads):
    answers = []
    for count in (1, 2, 3):
        threads(count)
        x, weight, bias, norm_weight, residual = (part.requires_grad_() for part in data(600, 33, 64))
        run(x, weight, bias, norm_weight, residual).sum().backward()
        answers.append((x.grad, norm_weight.grad))
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0], other, strict=True))


@each(IMPLEMENTATIONS, "cpp-portable", "triton")
@pytest.mark.parametrize("return_x", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_without_recompiling(run, return_x, autocast):
    if autocast and run.name == "cpp":
        pytest.skip("the kernel is float32")
    run.skip_unless_it_runs(torch.float16 if autocast else torch.float32)
    parts = [part.to(run.device) for part in data(8, 12, 6)]
    trained = [part.clone().requires_grad_() for part in parts]
    compiled = torch.compile(fused_linear, fullgraph=True, backend="aot_eager")

    def outputs(function, parts):
        with torch.autocast(run.device, torch.float16, enabled=autocast):
            out = function(*parts, gelu=True, return_x=return_x, impl=run.name)
        out = out if return_x else (out,)
        grads = torch.autograd.grad([x.float().square().sum() for x in out], parts) if parts[0].requires_grad else ()
        return *out, *grads

    for given in (parts, trained):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                for ours, plain in zip(outputs(compiled, given), outputs(fused_linear, given), strict=True):
                    assert torch.equal(ours, plain)


def gradients(run, inputs, grads_out, dtype=None, **options):
    """y, with return_x x, and the gradients of the inputs that are not None. dtype: of autocast."""
    leaves = [None if part is None else part.detach().clone().requires_grad_() for part in inputs]
    with torch.autocast(run.device, dtype or torch.bfloat16, enabled=dtype is not None):
        out = run(*leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    grads_out = [grad.to(y.dtype) for grad, y in zip(grads_out, out, strict=False)]
    return *out, *torch.autograd.grad(out, [part for part in leaves if part is not None], grads_out)


REFERENCE = IMPLEMENTATIONS["reference"]
# Of the norm of the difference from float64, over that of the result.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@every_triton
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "size", [(33, 40, 24), (70, 384, 256), (200, 64, 500), (130, 20, 600), (3, 0, 5), (0, 4, 5)], ids=str
)
def test_every_type_against_float64(run, dtype, size):
    run.skip_unless_it_runs(dtype)
    inputs, grads_out = data(*size, dtype), [x.to(dtype) for x in (data(*size, seed=1)[4], data(*size, seed=2)[0])]
    for given in ((1, 1, 1, 1, 1), (0, 1, 0, 0, 1), (1, 0, 1, 0, 0), (1, 0, 0, 1, 0), (0, 0, 0, 0, 1)):
        *kept, gelu, return_x = given
        if kept[1] and size[2] > MAX_NORMED:
            continue
        chosen = [part if keep else None for part, keep in zip(inputs, [1, 1, *kept], strict=True)]
        exact = [None if part is None else part.double() for part in chosen]
        options = {"norm_eps": 1e-3, "gelu": bool(gelu), "return_x": bool(return_x)}
        actual, expected = (
            gradients(run, chosen, grads_out, **options),
            gradients(REFERENCE, exact, grads_out, **options),
        )
        for ours, right in zip(actual, expected, strict=True):
            assert ours.dtype == dtype and ours.shape == right.shape
            assert (ours.double() - right).norm() <= TOLERANCES[dtype] * right.norm() + 1e-6


@every_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_and_norm_weight(run, dtype):
    run.skip_unless_it_runs(dtype)
    wide, grad_out = data(40, 24, 32), [data(40, 24, 32, seed=1)[4].to(dtype)]
    inputs = [part if i in (2, 3) else part.to(dtype) for i, part in enumerate(wide)]
    actual = gradients(run, inputs, grad_out, gelu=True)
    expected = gradients(REFERENCE, [part.double() for part in inputs], grad_out, gelu=True)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, torch.float32, torch.float32, dtype]
    for ours, right in zip(actual, expected, strict=True):
        assert (ours.double() - right).norm() <= TOLERANCES[dtype] * right.norm()


@every_implementation
@pytest.mark.parametrize("return_x", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(run, dtype, return_x):
    """Computed in autocast's type, with gradients in the parameters' own; float64 is left as it is."""
    name = "auto" if run.name == "cpp" else run.name  # the kernel is float32, so another takes the call
    run = run._replace(name=name, table=lambda device, *dtypes: {"auto": None} | why_not(device, dtype))
    inputs, grads_out = data(40, 24, 32), [data(40, 24, 32, seed=1)[4], data(40, 24, 32, seed=2)[0]]
    actual = gradients(run, inputs, grads_out, dtype, gelu=True, return_x=return_x)
    expected = gradients(REFERENCE, [part.double() for part in inputs], grads_out, gelu=True, return_x=return_x)
    results = 1 + return_x
    assert all(y.dtype == dtype for y in actual[:results]) and all(x.dtype == torch.float32 for x in actual[results:])
    for ours, right in zip(actual, expected, strict=True):
        assert (ours.double() - right).norm() <= 2 * TOLERANCES[dtype] * right.norm()
    x, *others = inputs
    assert gradients(run, [x.to(dtype), *others], grads_out, dtype, gelu=True)[0].dtype == dtype
    if run.name != "triton":
        assert gradients(run, [part.double() for part in inputs], grads_out, dtype)[0].dtype == torch.float64


def test_autocast_does_not_reach_a_float32_backward_pass(needs_cpp):
    inputs, grad_out = data(7, 5, 6), data(7, 5, 6, seed=1)[4]
    inputs = [part.requires_grad_() for part in inputs]
    expected = torch.autograd.grad(fused_linear(*inputs, gelu=True), inputs, grad_out)
    out = fused_linear(*inputs, gelu=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out, inputs, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_implementation
def test_x_is_returned_with_its_gradient(run):
    inputs, grads_out = data(21, 9, 12), [data(21, 9, 12, seed=1)[4], data(21, 9, 12, seed=2)[0]]
    _, x, of_x, *_ = gradients(run, inputs, grads_out, gelu=True, return_x=True)
    assert torch.equal(x, inputs[0])
    expected = gradients(run, inputs, grads_out, gelu=True)[1] + grads_out[1]
    torch.testing.assert_close(of_x, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(*inputs, return_x=True)[1], inputs[0])  # nothing to differentiate


@every_triton
def test_gradient_is_the_same_bits_twice(run):
    inputs, grad_out = data(300, 40, 64), [data(300, 40, 64, seed=1)[4]]
    first, second = (gradients(run, inputs, grad_out, gelu=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_why_triton_does_not_run():
    cpu = torch.device("cpu")
    if dispatch.why_not_triton(cpu):
        pytest.skip(dispatch.why_not_triton(cpu))
    assert why_not(cpu, torch.float32, MAX_NORMED)["triton"] is None
    assert why_not(cpu, torch.float32, MAX_NORMED + 1, normed=False)["triton"] is None
    assert "up to 512" in why_not(cpu, torch.float32, MAX_NORMED + 1)["triton"]
    assert "no path" in why_not(cpu, torch.float64)["triton"]
    x, weight, _, norm_weight, _ = data(2, 3, MAX_NORMED + 1)
    with pytest.raises(RuntimeError, match="a norm of 513 columns"):
        fused_linear(x, weight, None, norm_weight, impl="triton")


@pytest.mark.gpu
def test_float32_on_a_gpu_is_left_to_pytorch():
    table = why_not(torch.device("cuda"))
    assert "faster" in table["triton"]
    assert next(name for name, why in table.items() if why is None) == "reference"


@pytest.mark.gpu
def test_captured_by_a_cuda_graph():
    inputs = [part.cuda().requires_grad_() for part in data(300, 40, 64)]
    grad_out = torch.ones(300, 40, dtype=torch.bfloat16, device=GPU)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            y, x = fused_linear(*inputs, gelu=True, return_x=True, impl="triton")
        return y, *torch.autograd.grad((y, x), inputs, (grad_out, torch.ones_like(x)))

    expected = step()
    inputs = [
        part.detach().requires_grad_() for part in inputs
    ]  # the others' gradients are for the stream of their first
    graph = CudaGraph(step, device=GPU)
    for _ in range(2):
        captured = graph()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))


OFFLINE = [  # N, K, bias, norm, residual and GELU
    (384, 256, "norm"),
    (256, 256, "bias norm gelu"),
    (256, 128, "residual"),
    (512, 512, "bias norm gelu"),
    (100, 700, "bias gelu"),
]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_kernels_compile_offline(capability):
    from ncfast.ops.triton.fused_linear import SUM_BLOCKS, backward_blocks, forward_blocks

    large = capability == 90
    wide = dict.fromkeys(("bias", "norm_weight", "bias_sums", "norm_sums", "grad_bias", "grad_norm_weight"), "*fp32")
    tensors = ("x", "weight", "residual", "y", "pre", "grad_y", "grad_passed", "grad_pre", "grad_x", "normalised")
    jobs = [("sum_kernel", wide, {"N": 256, "K": 384, **SUM_BLOCKS})]
    for N, K, parts in OFFLINE:
        types = wide | {"norm_eps": "fp32"} | dict.fromkeys(tensors, "*bf16")
        shared = {"N": N, "K": K}
        without = {
            "bias": ("bias", "bias_sums"),
            "norm": ("norm_weight", "x", "normalised", "norm_sums", "grad_passed"),
            "residual": ("residual",),
            "gelu": ("pre", "grad_pre"),
        }
        absent = dict.fromkeys(name for part, names in without.items() if part not in parts for name in names)
        forward = {name: value for name, value in absent.items() if name in ("bias", "norm_weight", "residual", "pre")}
        backward = {name: value for name, value in absent.items() if name not in ("bias", "residual")}
        forward |= {"GELU": "gelu" in parts, **shared, **forward_blocks(N, K, large)}
        backward |= shared | backward_blocks(N, K, "norm" in parts, large)
        jobs += [("fused_linear_kernel", types, forward), ("fused_linear_backward_kernel", types, backward)]
    used = compile_offline("ncfast.ops.triton.fused_linear", jobs, capability)
    for job, of in zip(jobs, used, strict=True):
        assert of["shared"] <= (227 << 10 if large else LEAST_SHARED_MEMORY), job
        # A row with its gradient does not quite fit into registers: of 256 it is still the faster way (H100).
        if job[2]["K"] <= 256:
            assert of["stack"] <= 128, job


TRITON_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, r"x is \[..., K\] and weight \[N, K\]; got \[2, 5\] and \[4, 3\]"),
        ({"bias": torch.zeros(5)}, r"bias is \[4\]; got \[5\]"),
        ({"norm_weight": torch.zeros(4)}, r"norm_weight is \[5\]; got \[4\]"),
        ({"residual": torch.zeros(4)}, r"residual is \[2, 4\]; got \[4\]"),
        ({"weight": torch.zeros(4, 5).double()}, "weight torch.float64 on cpu; they are alike"),
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, "x is floating point; got torch.int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear(**({"x": torch.zeros(2, 5), "weight": torch.zeros(4, 5)} | change))
