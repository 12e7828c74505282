"""layer_norm against float64, by every implementation."""

import itertools

import pytest
import torch
from implementations import GPU, each, implementations, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.engine.cuda_graph import CudaGraph
from ncfast.ops import dispatch, layer_norm
from ncfast.ops.layer_norm import MAX_COLUMNS, why_not

IMPLEMENTATIONS = implementations(layer_norm, lambda device, *dtypes: why_not(device, *dtypes[:1]))
every_implementation = each(IMPLEMENTATIONS, "reference", "triton")
every_triton = each(IMPLEMENTATIONS, "triton")
# Overflow and NaN are NumPy's to report in the interpreter and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
ROWS = [(0,), (7,), (0, 7), (1, 1), (1, 7), (9, 7), (3, 2, 21)]  # 0, 1, 7, 63 and 126 of them
WIDTHS = [1, 7, 64, 100]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # of the norm of the difference


def data(rows, D, dtype=torch.float32, seed=0):
    """x, weight, bias and add; and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*rows, D), (D,), (D,), (*rows[-1:], D), (*rows, D))
    x, weight, bias, add, grad_y = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [2 * x + 1, weight, bias, add], grad_y


def everything(run, inputs, grad_y, **options):
    """The result and the gradients of the inputs: x, weight, bias and, unless it is None, add."""
    leaves = [None if part is None else part.detach().requires_grad_() for part in inputs]
    y = run(*leaves[:3], add=leaves[3], **options)
    return y, *torch.autograd.grad(y, [part for part in leaves if part is not None], grad_y.to(y.dtype))


def by_hand(x, weight, bias, add=None, *, eps, gelu=False, dtype=None):
    h = x if add is None else x + add
    h = 0.5 * h * torch.special.erfc(-h / 2**0.5) if gelu else h
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def assert_close(actual, expected, tolerance, absolute=1e-6):
    for ours, right in zip(actual, expected, strict=True):
        assert ours.shape == right.shape
        assert (ours.double() - right).norm() <= tolerance * right.norm() + absolute


@every_implementation
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_values_and_gradients(run, rows, D):
    inputs, grad_y = data(rows, D)
    # Where x is its own mean, what is divided by σ = sqrt(eps) cancels: PyTorch takes x / σ - mean / σ, and a
    # GPU fuses a product of the gradient with the difference that follows.
    absolute = 1e-4 if D == 1 else 1e-6
    for added, gelu in itertools.product([False, True], [False, True]):
        given = inputs if added else [*inputs[:3], None]
        exact = [None if part is None else part.double() for part in given]
        expected = everything(by_hand, exact, grad_y.double(), eps=1e-3, gelu=gelu)
        assert_close(everything(run, given, grad_y, eps=1e-3, gelu=gelu), expected, 2e-6, absolute)


@every_implementation
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_types(run, dtype, wide):
    """With parameters of x's type, or of float32; the result in x's type, or in what is asked for."""
    inputs, grad_y = data((5, 9), 64, dtype)
    inputs = [inputs[0], *(part.float() if wide else part for part in inputs[1:])]
    run.skip_unless_it_runs(dtype)
    for out in (None, torch.float32):
        expected = everything(by_hand, [part.double() for part in inputs], grad_y.double(), eps=1e-5, gelu=True)
        actual = everything(run, inputs, grad_y, eps=1e-5, gelu=True, dtype=out)
        assert [part.dtype for part in actual] == [out or dtype, *(part.dtype for part in inputs)]
        assert_close(actual, expected, 2 * TOLERANCE[dtype])


@every_triton
def test_statistics_are_float32(run):
    """A mean far from zero; a result in float32 shows no rounding to x's type on the way."""
    (x, weight, bias, _), _ = data((63,), 64, torch.bfloat16)
    x = x + 100
    expected = by_hand(x.double(), weight.double(), bias.double(), eps=1e-12, gelu=True)
    actual = run(x, weight, bias, eps=1e-12, gelu=True, dtype=torch.float32)
    assert_close([actual], [expected], 3e-6)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(run, dtype):
    """Autocast changes neither the type of the result nor, in Triton, a bit of it."""
    inputs, grad_y = data((5, 7), 64)
    plain = everything(run, inputs, grad_y, eps=1e-5, gelu=True)
    with torch.autocast(run.device, dtype):
        cast = everything(run, inputs, grad_y, eps=1e-5, gelu=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    half = [inputs[0].to(dtype), *inputs[1:]]
    with torch.autocast(run.device, dtype):
        assert run(*half[:3]).dtype == dtype and run(*half[:3], dtype=torch.float32).dtype == torch.float32


def test_the_reference_is_pytorchs():
    (x, weight, bias, add), _ = data((5, 7), 64)
    module = torch.nn.LayerNorm(64, eps=1e-12)
    module.weight.data, module.bias.data = weight, bias
    gelu = torch.nn.GELU()
    assert torch.equal(layer_norm(x, weight, bias, eps=1e-12), module(x))
    assert torch.equal(layer_norm(x, weight, bias, add=add, eps=1e-12, gelu=True), module(gelu(x + add)))
    if why_not(x.device)["reference"] is None:
        parts = [part.double().requires_grad_() for part in (x, weight, bias, add)]
        assert torch.autograd.gradcheck(lambda x, w, b, a: layer_norm(x, w, b, add=a, gelu=True), parts)


@every_triton
@pytest.mark.parametrize("eps", [1e-12, 0.0])
def test_every_element_is_written(run, eps):
    inputs, grad_y = data((7, 9), 45)
    with poisoned_memory():
        assert all(part.isfinite().all() for part in everything(run, inputs, grad_y, eps=eps, gelu=True))
        empty = everything(run, *data((0, 9), 45), eps=eps)
        assert all((part == 0).all() for part in empty)


@every_triton
def test_nan_and_infinity_stay_in_their_row(run):
    (x, weight, bias, _), _ = data((5,), 20)
    clean = run(x, weight, bias, gelu=True)
    x[1, 3], x[3, 0] = torch.nan, torch.inf
    out = run(x, weight, bias, gelu=True)
    assert out[[1, 3]].isnan().all() and torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


@every_triton
def test_a_row_is_the_same_bits_among_any_rows(run):
    (x, weight, bias, _), _ = data((131,), 64)
    whole = run(x, weight, bias, gelu=True)
    for rows in (1, 3, 32, 130):
        assert torch.equal(run(x[1 : 1 + rows], weight, bias, gelu=True), whole[1 : 1 + rows])


@every_triton
def test_a_program_takes_several_tiles(run, monkeypatch):
    """As it does of more rows than the interpreter has time for; twice the same bits."""
    from ncfast.ops.triton import layer_norm as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    for rows in ((131,), (9, 50)):  # the last tile, and the last program, are not full
        inputs, grad_y = data(rows, 100)
        expected = everything(by_hand, [part.double() for part in inputs], grad_y.double(), eps=1e-5, gelu=True)
        first, second = (everything(run, inputs, grad_y, eps=1e-5, gelu=True) for _ in range(2))
        assert_close(first, expected, 2e-6)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_triton
def test_widest_rows(run):
    inputs, grad_y = data((3, 3), MAX_COLUMNS)
    expected = everything(by_hand, [part.double() for part in inputs], grad_y.double(), eps=1e-5)
    assert_close(everything(run, inputs, grad_y, eps=1e-5), expected, 2e-6)


@every_implementation
def test_non_contiguous(run):
    inputs, grad_y = data((6, 8), 10)
    strided = [part.mT.contiguous().mT if part.dim() > 1 else torch.stack([part, part], 1)[:, 0] for part in inputs]
    assert not any(part.is_contiguous() for part in strided)
    expected = everything(run, inputs, grad_y)
    actual = everything(run, strided, grad_y.mT.contiguous().mT)
    assert_close(actual, [part.double() for part in expected], 2e-6)


@every_implementation
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_without_recompiling(run, autocast):
    run.skip_unless_it_runs(torch.float32)
    inputs, grad_y = data((5, 9), 20)
    inputs, grad_y = [part.to(run.device) for part in inputs], grad_y.to(run.device)
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    options = {"eps": 1e-6, "gelu": True, "impl": run.name}
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.autocast(run.device, torch.bfloat16, enabled=autocast),
    ):
        for _ in range(3):
            actual, expected = (everything(f, inputs, grad_y, **options) for f in (compiled, layer_norm))
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_why_triton_does_not_run():
    cpu = torch.device("cpu")
    if dispatch.why_not_triton(cpu):
        pytest.skip(dispatch.why_not_triton(cpu))
    assert why_not(cpu, torch.float32, MAX_COLUMNS)["triton"] is None
    assert next(iter(why_not(cpu))) == "reference" and next(iter(why_not(torch.device("cuda")))) == "triton"
    assert "only the reference" in why_not(cpu, torch.float64)["triton"]
    wide = torch.zeros(2, MAX_COLUMNS + 1)
    with pytest.raises(RuntimeError, match="rows of 1025 columns"):
        layer_norm(wide, wide[0], wide[0], impl="triton")


@pytest.mark.gpu
def test_captured_by_a_cuda_graph():
    inputs, grad_y = data((300, 7), 64)
    inputs, grad_y = [part.to(GPU) for part in inputs], grad_y.to(GPU)
    inputs = [part.requires_grad_() for part in inputs]

    def step():
        y = layer_norm(*inputs[:3], add=inputs[3], gelu=True)
        return y, *torch.autograd.grad(y, inputs, grad_y)

    expected = step()
    inputs = [
        part.detach().requires_grad_() for part in inputs
    ]  # the others' gradients are for the stream of their first
    graph = CudaGraph(step, device=GPU)
    for _ in range(2):
        captured = graph()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.layer_norm import BACKWARD_WARPS, FORWARD_WARPS, blocks

    types = dict.fromkeys(("weight", "bias", "add", "bias_sums", "weight_sums"), "*fp32") | {"eps": "fp32"}
    jobs = []
    for dtype, D, gelu in itertools.product(("*fp32", "*bf16"), (64, 100, MAX_COLUMNS), (False, True)):
        tensors = types | dict.fromkeys(("x", "y", "grad_y", "grad_x"), dtype)
        constants = {"D": D, "GELU": gelu} | ({} if gelu else {"add": None})
        jobs.append(("layer_norm_kernel", tensors, constants | blocks(D, FORWARD_WARPS)))
        jobs.append(("layer_norm_backward_kernel", tensors, constants | blocks(D, BACKWARD_WARPS)))
    used = compile_offline("ncfast.ops.triton.layer_norm", jobs)
    for job, of in zip(jobs, used, strict=True):
        assert of["stack"] == 0, job


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, dtype=torch.int64)}, r"x is \[..., D\], floating point; got \[2, 5\], torch.int64"),
        ({"x": torch.zeros(())}, r"x is \[..., D\], floating point; got \[\], torch.float32"),
        ({"weight": torch.zeros(4)}, r"weight and bias are \[D\] = \[5\]; got \[4\] and \[5\]"),
        ({"bias": torch.zeros(2, 5)}, r"weight and bias are \[D\] = \[5\]; got \[5\] and \[2, 5\]"),
        ({"add": torch.zeros(5)}, r"add is \[n, D\] and x \[..., n, D\]; got \[5\] and \[2, 5\]"),
        ({"weight": torch.zeros(5).double()}, "weight torch.float64 on cpu; they are alike"),
        ({"bias": torch.zeros(5).half()}, "bias torch.float16 on cpu; they are alike"),
        ({"x": torch.zeros(2, 5).half(), "bias": torch.zeros(5).half()}, "of one type; got torch.float32 and torch.f"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(**({"x": torch.zeros(2, 5), "weight": torch.zeros(5), "bias": torch.zeros(5)} | change))
