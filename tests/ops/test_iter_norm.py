from typing import NamedTuple

import pytest
import torch
from capture import replay_of
from implementations import each, implementations, isa, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.ops import iter_norm
from ncfast.ops.iter_norm import why_not

IMPLEMENTATIONS = implementations(iter_norm, why_not)
every_implementation = each(IMPLEMENTATIONS)
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton")
# What overflows in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

EPS = 1e-5


def newton_schulz_oracle(x, groups, iterations, eps=EPS):
    """Group by group, as the algorithm is printed; with it the matrices that whiten."""
    N, D = x.shape
    d = D // groups
    blocks, whitening = [], []
    for g in range(groups):
        block = x[:, g * d : (g + 1) * d]
        block = block - block.mean(0)
        sigma = eps * torch.eye(d, dtype=x.dtype) + block.T @ block / N
        normalised = sigma / sigma.trace()
        P = torch.eye(d, dtype=x.dtype)
        for _ in range(iterations):
            P = 0.5 * (3 * P - P @ P @ P @ normalised)
        whitening.append((P / sigma.trace().sqrt()).T)
        blocks.append(block @ whitening[-1])
    return torch.cat(blocks, 1), torch.stack(whitening)


class Case(NamedTuple):
    x: torch.Tensor  # [N, D]
    grad_y: torch.Tensor  # [N, D]
    groups: int
    iterations: int = 3
    eps: float = EPS


def case(N, d, groups, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    x, grad_y = torch.randn(2, N, d * groups, generator=generator)
    mixing = torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator) / d**0.5
    return Case((x.view(N, groups, d) @ mixing).reshape(N, -1), grad_y, groups, **options)


def forward_and_backward(run, case):
    x = case.x.clone().requires_grad_()
    y = run(x, groups=case.groups, iterations=case.iterations, eps=case.eps)
    with isa(run.isa):
        (grad_x,) = torch.autograd.grad(y, x, case.grad_y.to(y.dtype))
    return y.detach(), grad_x


def check(run, case, value_rtol=1e-5, grad_rtol=1e-5):
    """Both against float64, group by group, relative to the largest element.

    The gradient is a difference: what whitening passes on, less what the change of the matrix takes back. Where nearly
    nothing remains, as for N = 2 or d = 1, its error is that of what was subtracted.
    """
    y, grad_x = forward_and_backward(run, case)
    assert y.dtype == torch.float32 and grad_x.dtype == case.x.dtype and y.shape == grad_x.shape == case.x.shape
    exact_x = case.x.double().requires_grad_()
    expected, whitening = newton_schulz_oracle(exact_x, case.groups, case.iterations, case.eps)
    (expected_grad,) = torch.autograd.grad(expected, exact_x, case.grad_y.double())

    def by_group(rows):
        return rows.detach().double().view(len(rows), case.groups, -1).transpose(0, 1)  # [groups, N, d]

    def largest(rows):
        return rows.abs().amax((1, 2))

    expected, expected_grad = by_group(expected), by_group(expected_grad)
    passed_on = largest(by_group(case.grad_y) @ whitening.detach())
    assert (largest(by_group(y) - expected) <= value_rtol * largest(expected)).all()
    error, bound = largest(by_group(grad_x) - expected_grad), grad_rtol * largest(expected_grad) + 1e-6 * passed_on
    assert (error <= bound).all(), f"{error} > {bound}"


@pytest.mark.parametrize(("N", "D", "groups"), [(7, 6, 1), (63, 12, 4), (129, 64, 8), (500, 10, 10)])
def test_value_and_gradient_in_float64(N, D, groups):
    x = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(D)).requires_grad_()
    weight = torch.linspace(-1, 1, N * D, dtype=torch.float64).view(N, D)
    expected, _ = newton_schulz_oracle(x, groups, 5)
    actual = iter_norm(x, groups=groups)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), x)[0],
        torch.autograd.grad((expected * weight).sum(), x)[0],
        rtol=1e-8,
        atol=1e-10,
    )


SIZES_N, SIZES_D = (2, 3, 63, 128, 500), (1, 2, 3, 17, 64, 100, 128)
INTERPRETED = ((2, 1), (3, 2), (63, 17), (3, 64), (63, 100))


@every_implementation
@pytest.mark.parametrize("d", SIZES_D)
@pytest.mark.parametrize("N", SIZES_N)
def test_odd_sizes(run, N, d):
    if run.slow and (N, d) not in INTERPRETED:
        pytest.skip("triton: the interpreter takes the small sizes")
    check(run, case(N, d, 1 if d > 64 else 3, iterations=5))


@each(IMPLEMENTATIONS, "reference", "cpp")
@pytest.mark.parametrize(("N", "d"), [(20, 130), (700, 5), (40, 257), (1024, 33)])
def test_more_than_a_block(run, N, d):
    check(run, case(N, d, 2, iterations=5))


@every_implementation
@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 7])
def test_iterations(run, iterations):
    for N, d in ((9, 5),) if run.slow else ((9, 5), (40, 20)):
        check(run, case(N, d, 2, iterations=iterations))


@every_implementation
@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_eps(run, eps):
    check(run, case(40, 5, 3, eps=eps))


@every_implementation
def test_whitens(run):
    N = 400 if run.slow else 4000
    x = torch.randn(N, 8, generator=torch.Generator().manual_seed(0)) @ (torch.eye(8) + 0.2)
    y = run(x, groups=2, iterations=12, eps=0.0)
    for block in y.split(4, 1):
        torch.testing.assert_close(block.T @ block / len(y), torch.eye(4), rtol=0, atol=1e-5)


@every_implementation
def test_constant_columns(run):
    plain = case(30, 6, 3)
    plain.x[:, 1], plain.x[:, 6:12] = 0.1, torch.linspace(-3, 3, 6)  # one of a group, and a whole group
    y, grad_x = forward_and_backward(run, plain)
    # What is left of a constant is its rounding; without eps it would be 0 / 0.
    assert y.isfinite().all() and grad_x.isfinite().all()
    assert y[:, 1].abs().max() < 1e-4 and y[:, 6:12].abs().max() < 1e-3
    # Where they are constant exactly, nothing is left to round.
    plain.x[:, 1], plain.x[:, 6:12] = 0.0, 2.0
    y, _ = forward_and_backward(run, plain)
    assert not y[:, 1].any() and not y[:, 6:12].any()
    check(run, plain._replace(x=plain.x[:, :6].contiguous(), grad_y=plain.grad_y[:, :6].contiguous(), groups=1))


@every_implementation
@pytest.mark.parametrize("scales", [(1, 1, 1, 1, 1), (1, 1e-1, 1e-2, 1e-3, 0), (30, 1, 1, 1, 1)])
@pytest.mark.parametrize("N", [3, 40])
def test_ill_conditioned(run, scales, N):
    if run.slow and N > 3:
        pytest.skip("triton: the interpreter takes the small size")
    # A direction of variance s² of the whole is multiplied by up to 1.5^5 = 7.6, and its rounding with it.
    plain = case(N, 5, 2, iterations=5)
    plain = plain._replace(x=plain.x * torch.tensor(scales, dtype=torch.float32).repeat(2))
    check(run, plain, grad_rtol=1e-4)


@every_implementation
def test_more_channels_than_rows(run):
    check(run, case(12, 30, 2, iterations=5), grad_rtol=1e-4)


@every_implementation
@pytest.mark.parametrize(("N", "d"), [(40, 10), (12, 30)])
def test_many_steps(run, N, d):
    """P³ S as it is printed turns to NaN here, even in float64: what rounding adds does not commute with S."""
    plain = case(N, d, 1, iterations=20, eps=1e-3)
    y, grad_x = forward_and_backward(run, plain)
    x = plain.x.double() - plain.x.double().mean(0)
    sizes, vectors = torch.linalg.eigh(x.T @ x / N + plain.eps * torch.eye(d))
    p = torch.ones_like(sizes)
    for _ in range(20):
        p = 1.5 * p - 0.5 * p**3 * sizes / sizes.sum()
    expected = x @ vectors @ torch.diag(p / sizes.sum().sqrt()) @ vectors.T
    # In float32 the smallest of these eigenvalues are known to 2^-24 of their sum: 1e-3 of themselves.
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)
    assert grad_x.isfinite().all()


@every_kernel
@pytest.mark.parametrize("offset", [30.0, 1e5])
def test_data_far_off_zero(run, offset):
    """A mean rounded to float32 would be off by up to 2^-24 of the offset: 0.4 % of a deviation at the last."""
    plain = case(63, 17, 2)
    plain = plain._replace(x=plain.x + offset * torch.linspace(-1, 1, 34))
    check(run, plain)


@every_implementation
@pytest.mark.parametrize("scale", [1e-2, 1e4])
def test_scale(run, scale):
    plain = case(63, 17, 2)
    check(run, plain._replace(x=scale * plain.x))


@every_implementation
def test_groups_do_not_touch_each_other(run):
    plain = case(20, 5, 4, iterations=2)
    expected = forward_and_backward(run, plain)
    spoilt = plain._replace(x=plain.x.clone(), grad_y=plain.grad_y.clone())
    spoilt.x[3, 7], spoilt.grad_y[4, 11] = torch.nan, torch.inf
    y, grad_x = forward_and_backward(run, spoilt)
    assert y[:, 5:10].isnan().all() and grad_x[:, 5:10].isnan().all()
    for ours, theirs in ((y[:, :5], expected[0][:, :5]), (y[:, 10:], expected[0][:, 10:])):
        assert torch.equal(ours, theirs)
    for kept in (slice(0, 5), slice(15, 20)):
        assert torch.equal(grad_x[:, kept], expected[1][:, kept])


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_cast_to_float32(run, dtype):
    plain = case(30, 6, 2, iterations=2)
    half = plain._replace(x=plain.x.to(dtype))
    y, grad_x = forward_and_backward(run, half)
    expected_y, expected_grad = forward_and_backward(run, plain._replace(x=half.x.float()))
    assert grad_x.dtype == dtype
    assert torch.equal(y, expected_y) and torch.equal(grad_x, expected_grad.to(dtype))


@every_implementation
def test_is_float32_under_autocast(run):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = run(x, groups=4)
    with torch.autocast(run.device, torch.bfloat16):
        y = run(x, groups=4)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@every_implementation
def test_non_contiguous(run):
    plain = case(20, 5, 2)
    expected = forward_and_backward(run, plain)

    def strided(x):
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]

    for view in (
        plain._replace(x=strided(plain.x)),
        plain._replace(x=plain.x.T.contiguous().T),
        plain._replace(grad_y=plain.grad_y.T.contiguous().T),
    ):
        assert not (view.x.is_contiguous() and view.grad_y.is_contiguous())
        x = view.x.detach().requires_grad_()
        y = run(x, groups=2, iterations=3)
        with isa(run.isa):
            (grad_x,) = torch.autograd.grad(y, x, view.grad_y)
        # The reference hands strides on to torch's products, which may then add in another order.
        for ours, theirs in zip((y, grad_x), expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, **({"rtol": 0, "atol": 1e-5} if run.name == "reference" else EXACT)
            )
    # The gradient of a sum is expanded: all its elements are one.
    x = plain.x.clone().requires_grad_()
    with isa(run.isa):
        run(x, groups=2, iterations=3).sum().backward()
    ones = plain._replace(grad_y=torch.ones(20, 10))
    torch.testing.assert_close(x.grad, forward_and_backward(run, ones)[1], rtol=0, atol=1e-6)


EXACT = {"rtol": 0, "atol": 0}


@every_kernel
@pytest.mark.parametrize("d", [3, 64])
def test_bitwise_the_same_every_time(run, d, threads):
    plain = case(20, d, 1, iterations=2) if run.slow else case(130, d, 13)
    answers = []
    for count in (1, 2) if run.slow else (1, 2, 3, 3):
        threads(count)
        answers.append(forward_and_backward(run, plain))
    for answer in answers[1:]:
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert torch.equal(ours, theirs)


@every_kernel
@pytest.mark.parametrize(("N", "d"), [(2, 1), (21, 17), (40, 64)])
def test_every_element_is_written(run, N, d):
    with poisoned_memory():
        check(run, case(N, d, 2, iterations=2))


@every_implementation
def test_inputs_stay_as_they_are(run):
    plain = case(20, 5, 2)
    before = plain.x.clone(), plain.grad_y.clone()
    forward_and_backward(run, plain)
    assert not run(plain.x, groups=2).requires_grad
    assert torch.equal(plain.x, before[0]) and torch.equal(plain.grad_y, before[1])


@every_implementation
def test_no_channels(run):
    x = torch.zeros(4, 0, requires_grad=True)
    y = run(x, groups=2)
    assert y.shape == (4, 0)
    with isa(run.isa):
        assert torch.autograd.grad(y.sum(), x)[0].shape == (4, 0)


def test_second_derivative_of_the_reference():
    x = case(7, 3, 1).x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: iter_norm(x, groups=1, iterations=3, impl="reference"), (x,))


def compiled_step(run, **options):
    """y and the gradient, by a compiled function of the case on the run's device."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, **options)
    def compiled(x, grad_y):
        y = iter_norm(x * 1, groups=3, impl=run.name)
        return (y * grad_y).sum(), y + 0

    def step(case):
        x = case.x.to(run.device, copy=True).requires_grad_()
        total, y = compiled(x, case.grad_y.to(run.device))
        total.backward()
        return y.detach().cpu(), x.grad.cpu()

    return step


@pytest.mark.slow
@each(IMPLEMENTATIONS, "cpp-portable")
def test_compiles_with_inductor(run):
    run.skip_unless_it_runs(torch.float32)
    plain = case(12, 4, 3, iterations=5)
    with isa(run.isa):
        result = compiled_step(run)(plain)
    for ours, theirs in zip(result, forward_and_backward(run, plain), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
def test_no_synchronisation_and_a_cuda_graph():
    plain = case(128, 64, 16)
    x, grad_y = plain.x.cuda(), plain.grad_y.cuda()

    def step():
        leaf = x.detach().requires_grad_()
        y = iter_norm(leaf, groups=16, impl="triton")
        return (y, *torch.autograd.grad(y, leaf, grad_y))

    replay_of(step)


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.iter_norm import blocks

    types = dict.fromkeys(("x", "y", "saved", "matrices", "grad_y", "grad_x", "grad_mean"), "*fp32") | {"eps": "fp32"}
    jobs = [("iter_norm_kernel", types, blocks(64)), ("iter_norm_backward_kernel", types, blocks(64))]
    compile_offline("ncfast.ops.triton.iter_norm", jobs)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8), {"groups": 2}, "N >= 2"),
        ((4, 8), {"groups": 3}, "multiple"),
        ((4, 8), {"groups": 0}, "multiple"),
        ((4, 2, 2), {"groups": 1}, r"\[N, D\]"),
        ((4, 8), {"groups": 2, "iterations": -1}, "0 or more; got -1"),
        ((4, 8), {"groups": 2, "impl": "cuda"}, "has the implementations .* got impl='cuda'"),
    ],
)
def test_refuses_what_does_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=f"iter_norm.*{message}"):
        iter_norm(torch.zeros(shape), **options)


def test_explicit_request_that_cannot_be_met():
    x = torch.randn(4, 2, dtype=torch.float64)
    for impl in ("cpp", "triton"):
        with pytest.raises(
            RuntimeError, match=r"float64 input: only the reference|not installed|off a GPU|never built|_C"
        ):
            iter_norm(x, groups=1, impl=impl)
    assert iter_norm(x, groups=1).dtype == torch.float64  # auto passes them over


def test_triton_refuses_large_groups():
    for device in ("cpu", "cuda"):
        reason = why_not(torch.device(device), torch.float32, 129)["triton"]
        assert "a group of 129 channels: Triton takes up to 128" in reason or "triton" in reason.lower()
    x = torch.randn(4, 129)
    with pytest.raises(RuntimeError, match=r"a group of 129 channels|not installed|off a GPU"):
        iter_norm(x, groups=1, impl="triton")
    assert iter_norm(x, groups=1).shape == (4, 129)
