from typing import NamedTuple

import numpy as np
import pytest
import torch
from capture import replay_of
from implementations import each, implementations, isa, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.ops import rotate_to_code
from ncfast.ops.rotate_to_code import why_not

IMPLEMENTATIONS = implementations(
    rotate_to_code, lambda device, z_dtype=torch.float32, codebook_dtype=None: why_not(device, z_dtype)
)
every_implementation, every_cpp = each(IMPLEMENTATIONS), each(IMPLEMENTATIONS, "cpp")
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton")
one_of_each = each(IMPLEMENTATIONS, "reference", "cpp-portable", "triton")
either_way = pytest.mark.parametrize("rotate", [True, False], ids=["rotate", "straight"])
# What overflows in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

FLOOR = 1e-6
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    z: torch.Tensor  # [M, D] or [H, M, D]
    codebook: torch.Tensor  # [K, D] or [H, K, D]
    indices: torch.Tensor  # [M] or [H, M]
    grad_q: torch.Tensor  # as z
    grad_loss: float = 1.7

    def rows(self, count):
        return self._replace(z=self.z[:count], indices=self.indices[:count], grad_q=self.grad_q[:count])


def case(M, K, D, *, dtype=torch.float32, heads=(), outside=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, codebook, grad_q = (torch.randn(*heads, rows, D, generator=generator, dtype=torch.float64) for rows in (M, K, M))
    codebook = codebook.to(torch.float64 if dtype == torch.float64 else torch.float32)
    indices = torch.randint(0, K, (*heads, M), generator=generator)
    nowhere = torch.tensor([-1, -(2**40), 2**40, K])[torch.randint(0, 4, (*heads, M), generator=generator)]
    indices = torch.where(torch.rand(*heads, M, generator=generator) < outside, nowhere, indices)
    return Case(z.to(dtype), codebook, indices, grad_q.to(dtype))


class Result(NamedTuple):
    q: torch.Tensor
    loss: torch.Tensor
    grad_z: torch.Tensor
    grad_codebook: torch.Tensor


def forward_and_backward(run, case, rotate):
    """Everything that comes out, on the CPU; the gradient is that of (q * grad_q).sum() + grad_loss * loss."""
    z, codebook = case.z.clone().requires_grad_(), case.codebook.clone().requires_grad_()
    q, loss = run(z, codebook, case.indices, rotate=rotate)
    with isa(run.isa):
        grads = torch.autograd.grad((q, loss), (z, codebook), (case.grad_q, loss.new_tensor(case.grad_loss)))
    return Result(q.detach(), loss.detach(), *grads)


def rotation_gradient(z, q, g):
    """λ Rᵀ g for rows z, q, g [..., D] from the docstring's formula, and a bound on its conditioning [..., 1].

    The bound times the unit roundoff is what rounded intermediates can change it by.
    """

    def norm(x):
        return np.sqrt(np.square(x).sum(-1, keepdims=True))

    norm_z, norm_q = norm(z), norm(q)
    u, v = z / np.maximum(norm_z, FLOOR), q / np.maximum(norm_q, FLOOR)
    s = u + v
    norm_s = np.maximum(norm(s), FLOOR)
    stretch = norm_q / np.maximum(norm_z, FLOOR)
    along_s, along_v = ((g * x).sum(-1, keepdims=True) for x in (s, v))
    rotated = stretch * (g - 2 * along_s * s / norm_s**2 + 2 * along_v * u)
    short = norm_z < FLOOR
    sensitivity = np.where(short, 1, stretch * (4 + 4 / norm_s)) * norm(g)
    return np.where(short, g, rotated), sensitivity


class Oracle:
    """Values and gradients in float64, or extended precision for float64 input, from the docstring's formulas."""

    def __init__(self, case, rotate):
        wide = np.longdouble if case.z.dtype == torch.float64 else np.float64
        heads, (K, D) = case.z.shape[:-2], case.codebook.shape[-2:]
        H = heads.numel()
        z = case.z.reshape(H, -1, D)
        self.dtype, self.shape = case.z.dtype, case.z.shape
        self.compute = torch.float64 if wide is np.longdouble else torch.float32
        indices = case.indices.reshape(H, -1)
        used = (indices >= 0) & (indices < K)  # [H, M]
        codebook = case.codebook.reshape(H, K, D).to(self.dtype)
        self.q = torch.zeros_like(z)
        for head in range(H):
            self.q[head, used[head]] = codebook[head, indices[head, used[head]]]

        x, q, g = (t.double().numpy().astype(wide) for t in (z, self.q, case.grad_q.reshape(z.shape)))
        used, indices = used.numpy(), indices.numpy()
        count = used.sum() * D
        inverse = 1 / wide(count) if count else wide(0)
        self.loss = np.square(x - q)[used].sum() * inverse
        unit = torch.finfo(self.compute).eps / 2
        steps = (8 + D / 8) * unit  # sums over D run in eight lanes or more
        self.loss_rounding = 4 * steps * self.loss

        commitment = 2 * case.grad_loss * inverse * (x - q)
        path, sensitivity = g, np.sqrt(np.square(g).sum(-1, keepdims=True))
        if rotate:
            path, sensitivity = rotation_gradient(x, q, g)
        self.grad_z = np.where(used[..., None], path + commitment, 0).reshape(self.shape)
        sizes = abs(2 * case.grad_loss * inverse) * (np.abs(x) + np.abs(q))  # of what the commitment is made from
        self.grad_rounding = (steps * (sensitivity + sizes)).reshape(self.shape)

        self.grad_codebook = np.zeros(codebook.shape, wide)
        self.codebook_sizes = np.zeros(codebook.shape, wide)
        for head in range(H):
            rows = used[head]
            np.add.at(self.grad_codebook[head], indices[head, rows], -commitment[head, rows])
            np.add.at(self.codebook_sizes[head], indices[head, rows], sizes[head, rows])
        self.grad_codebook, self.codebook_sizes = (
            t.reshape(case.codebook.shape) for t in (self.grad_codebook, self.codebook_sizes)
        )
        self.codebook_rounding = (16 + used.shape[1]) * unit * self.codebook_sizes
        self.q = self.q.reshape(self.shape)

    def check(self, result, *, interpreted=False):
        assert result.q.dtype == result.grad_z.dtype == self.dtype
        assert result.loss.dtype == self.compute and result.loss.shape == ()
        assert result.q.shape == result.grad_z.shape == self.shape
        assert torch.equal(result.q, self.q)
        assert abs(result.loss.numpy() - self.loss) <= self.loss_rounding
        self.check_grad_z(result.grad_z, interpreted=interpreted)
        rounding = self.codebook_rounding
        if self.dtype != self.compute:
            # The reference sends this gradient through the cast to the type of z, row by row.
            rounding = rounding + torch.finfo(self.dtype).eps * self.codebook_sizes + 2.0**-22
        error = np.abs(result.grad_codebook.double().numpy() - self.grad_codebook)
        assert (error <= rounding).all()

    def check_grad_z(self, grad_z, *, interpreted=False):
        rounding = self.grad_rounding
        if self.dtype != self.compute:
            # Rounded once to nearest; the interpreter of Triton truncates to bfloat16. And half a subnormal.
            eps = torch.finfo(self.dtype).eps * (1 if interpreted else 0.5)
            rounding = rounding + eps * (np.abs(self.grad_z) + rounding) + 2.0**-25
        error = np.abs(grad_z.double().numpy().astype(self.grad_z.dtype) - self.grad_z)
        assert (error <= rounding).all()


def check(run, case, rotate):
    run.skip_unless_it_runs(case.z.dtype)
    if run.slow and case.z.dtype == torch.bfloat16:
        case = case._replace(codebook=case.codebook.bfloat16().float())  # or the interpreter would truncate the codes
    Oracle(case, rotate).check(forward_and_backward(run, case, rotate), interpreted=run.slow)


def explicit_rotation(z, q):
    """λ R for vectors z and q [D], as a matrix."""
    u, v = z / np.linalg.norm(z), q / np.linalg.norm(q)
    w = (u + v) / np.linalg.norm(u + v)
    return (np.eye(len(z)) - 2 * np.outer(w, w) + 2 * np.outer(v, u)) * np.linalg.norm(q) / np.linalg.norm(z)


def test_the_expected_gradient_is_that_of_a_rotation():
    z, q, g = np.random.default_rng(0).standard_normal((3, 7, 9))
    expected, _ = rotation_gradient(z, q, g)
    for row in range(7):
        matrix = explicit_rotation(z[row], q[row])
        stretch = np.linalg.norm(q[row]) / np.linalg.norm(z[row])
        np.testing.assert_allclose(matrix @ z[row], q[row], atol=1e-12)
        np.testing.assert_allclose(matrix @ matrix.T, stretch**2 * np.eye(9), atol=1e-12)
        assert np.linalg.det(matrix) > 0
        np.testing.assert_allclose(expected[row], matrix.T @ g[row], atol=1e-12)


SIZES_K, SIZES_D = (1, 5, 257, 3000), (1, 3, 16, 33, 64, 130, 257, 513)
INTERPRETED = ((1, 1), (5, 3), (5, 130), (257, 33), (5, 513))


@every_implementation
@pytest.mark.parametrize("D", SIZES_D)
@pytest.mark.parametrize("K", SIZES_K)
def test_odd_sizes(run, K, D):
    if run.slow and (K, D) not in INTERPRETED:
        pytest.skip("triton: the interpreter takes the small sizes")
    whole = case(500, K, D)
    for turn, M in enumerate((0, 1, 7, 63) if run.slow else (0, 1, 7, 63, 129, 500)):
        check(run, whole.rows(M), rotate=True)
        if turn % 2 == 0:
            check(run, whole.rows(M), rotate=False)


@every_implementation
@either_way
@pytest.mark.parametrize("D", [1024, 1025, 3000])
def test_long_vectors(run, D, rotate):
    check(run, case(9, 4, D), rotate)


@every_implementation
@either_way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 7, 40])
def test_dtypes(run, dtype, rotate, D):
    check(run, case(150, 11, D, dtype=dtype), rotate)


@every_implementation
@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codebook_of_another_dtype(run, dtype, codebook_dtype):
    case_ = case(20, 5, 6, dtype=dtype)
    codebook = case_.codebook.bfloat16().to(codebook_dtype).requires_grad_()  # exact in most of them
    q, loss = run(case_.z, codebook, case_.indices)
    used = (case_.indices >= 0) & (case_.indices < 5)
    assert q.dtype == dtype and torch.equal(q[used], codebook[case_.indices[used]].to(dtype))
    with isa(run.isa):
        loss.backward()
    assert codebook.grad.dtype == codebook_dtype and codebook.grad.any()


@every_implementation
@either_way
def test_heads(run, rotate):
    heads = case(20, 5, 6, heads=(3,))
    check(run, heads, rotate)
    z, codebook, indices = heads.z, heads.codebook, heads.indices
    q, _ = run(z, codebook, indices, rotate=rotate)
    for head in range(3):
        assert torch.equal(q[head], run(z[head], codebook[head], indices[head], rotate=rotate)[0])
    q, loss = run(z[:0], codebook[:0], indices[:0])
    assert q.shape == (0, 20, 6) and loss == 0


@every_implementation
@either_way
def test_non_contiguous(run, rotate):
    plain = case(20, 5, 6)
    expected = forward_and_backward(run, plain, rotate)

    def strided(x):
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]

    for view in (
        plain._replace(z=strided(plain.z)),
        plain._replace(z=plain.z.T.contiguous().T),
        plain._replace(codebook=strided(plain.codebook), indices=strided(plain.indices)),
        plain._replace(grad_q=plain.grad_q.T.contiguous().T),
    ):
        assert not all(x.is_contiguous() for x in view[:4])
        z, codebook = view.z.detach().requires_grad_(), view.codebook.detach().requires_grad_()
        q, loss = run(z, codebook, view.indices, rotate=rotate)
        with isa(run.isa):
            grads = torch.autograd.grad((q, loss), (z, codebook), (view.grad_q, torch.tensor(view.grad_loss)))
        for ours, theirs in zip((q, loss, *grads), expected, strict=True):
            assert torch.equal(ours, theirs)
    # The gradient of a sum is expanded: all its rows are one.
    z = plain.z.clone().requires_grad_()
    with isa(run.isa):
        run(z, plain.codebook, plain.indices, rotate=rotate)[0].sum().backward()
    ones = plain._replace(grad_q=torch.ones(20, 6), grad_loss=0.0)
    assert torch.equal(z.grad, forward_and_backward(run, ones, rotate).grad_z)


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tiny", [1e-1, 1e-2, 1e-3, 1e-5, 1e-9, 0.0])
def test_code_opposite_to_the_vector(run, tiny, dtype):
    if dtype == torch.float32 and tiny < 1e-3:
        tiny = 0.0  # float32 cannot tell these vectors from opposite ones
    plain = case(40, 8, 12, dtype=dtype, outside=0)
    codes = plain.codebook[plain.indices]
    plain = plain._replace(z=(-(1 + tiny) * codes + tiny * plain.z).to(dtype))
    oracle = Oracle(plain, rotate=True)
    oracle.check(forward_and_backward(run, plain, rotate=True))
    # The bound is not idle: with |s| its worst is |s| / 1e-6 times smaller than the gradient itself.
    assert dtype == torch.float32 or (oracle.grad_rounding < 1e-6 * np.abs(oracle.grad_z).max()).all()


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_too_short_to_rotate_go_straight_through(run, dtype):
    run.skip_unless_it_runs(dtype)
    lengths = torch.tensor([0.0, 1e-30, 1e-7, 0.9e-6, 1.2e-6, 1e-3, 0.5], dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.ones(5, dtype=torch.float64), dim=0)
    z = (lengths[:, None] * direction).to(dtype)
    plain = case(len(lengths), 4, 5, dtype=dtype, outside=0)._replace(z=z)
    if dtype == torch.float16:  # its smallest numbers are around the floor
        plain = plain.rows(3)
    check(run, plain, rotate=True)
    straight = plain._replace(grad_loss=0.0).rows(3)
    assert torch.equal(forward_and_backward(run, straight, rotate=True).grad_z, straight.grad_q)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
def test_code_that_is_zero_gives_no_gradient_but_the_losses(run, dtype):
    plain = case(20, 2, 6, dtype=dtype)
    plain = plain._replace(codebook=torch.zeros_like(plain.codebook))
    check(run, plain, rotate=True)
    without_loss = forward_and_backward(run, plain._replace(grad_loss=0.0), rotate=True)
    assert not without_loss.grad_z.any()  # λ = 0
    zeros = plain._replace(z=torch.zeros_like(plain.z))
    check(run, zeros, rotate=True)


@every_implementation
@either_way
def test_no_row_has_a_code(run, rotate):
    for M in (0, 1, 150):
        nowhere = case(M, 3, 5, outside=2)
        result = forward_and_backward(run, nowhere, rotate)
        assert result.loss == 0
        assert not result.q.any() and not result.grad_z.any() and not result.grad_codebook.any()
    z, codebook = torch.zeros(4, 0, requires_grad=True), torch.zeros(3, 0, requires_grad=True)
    q, loss = run(z, codebook, torch.zeros(4, dtype=torch.int64), rotate=rotate)
    assert q.shape == (4, 0) and loss == 0
    with isa(run.isa):
        grads = torch.autograd.grad((q.sum(), loss), (z, codebook))
    assert [grad.shape for grad in grads] == [(4, 0), (3, 0)]


@every_implementation
@either_way
def test_rows_without_a_code_may_hold_anything(run, rotate):
    plain = case(40, 3, 5)
    nowhere = (plain.indices < 0) | (plain.indices >= 3)
    expected = forward_and_backward(run, plain, rotate)
    spoilt = plain._replace(z=plain.z.clone(), grad_q=plain.grad_q.clone())
    spoilt.z[nowhere] = torch.tensor([torch.nan, torch.inf, 1.0, -torch.inf, 0.0])
    spoilt.grad_q[nowhere] = torch.nan
    for ours, theirs in zip(forward_and_backward(run, spoilt, rotate), expected, strict=True):
        assert torch.equal(ours, theirs)
    # Nor do they get what the code that stands in for theirs, or the loss, may hold.
    unused_code = plain._replace(codebook=plain.codebook.clone(), indices=torch.where(nowhere, -1, 1))
    unused_code.codebook[[0, 2]] = torch.nan
    result = forward_and_backward(run, unused_code._replace(grad_loss=torch.inf), rotate)
    assert result.loss.isfinite() and result.q.isfinite().all()
    assert not result.q[nowhere].any() and not result.grad_z[nowhere].any()


@every_implementation
def test_loss_is_the_mean_over_rows_with_a_code(run):
    z, codebook = torch.tensor([[1.0, 2.0], [5.0, 5.0], [-3.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert run(z, codebook, torch.tensor([0, -1, 1]))[1] == (1 + 9) / 4
    assert run(z, codebook, torch.tensor([0, 2, 7]))[1] == 1 / 2


@every_implementation
def test_loss_of_many_rows(run):
    plain = case(3000 if run.slow else 60_000, 7, 4)
    wide = Oracle(plain.rows(len(plain.z)), rotate=False)
    _, loss = run(plain.z, plain.codebook, plain.indices)
    assert abs(loss.item() / wide.loss - 1) < 1e-6


@pytest.mark.parametrize("programs", [0, 1, 2048, 5000])
def test_triton_adds_up_what_any_number_of_programs_left(programs):
    run = IMPLEMENTATIONS["triton"]
    run.skip_unless_it_runs(torch.float32)
    from ncfast.ops.triton.rotate_to_code import LOSS_BLOCKS, rotate_to_code_loss_kernel

    generator = torch.Generator().manual_seed(0)
    errors, used_rows = torch.rand(programs, generator=generator), torch.randint(1, 9, (programs,), generator=generator)
    loss, inverse_count = torch.full((2, 1), torch.nan, device=run.device)
    partials = errors.to(run.device), used_rows.int().to(run.device)
    rotate_to_code_loss_kernel[(1,)](*partials, loss, inverse_count, programs, 7, **LOSS_BLOCKS)
    elements = 7 * used_rows.sum().item()
    assert inverse_count.item() == pytest.approx(1 / elements if elements else 0, rel=1e-6)
    assert loss.item() == pytest.approx(errors.double().sum().item() / max(elements, 1), rel=1e-6)


@every_implementation
@pytest.mark.parametrize("wanted", ["z", "codebook"])
@pytest.mark.parametrize("output", ["q", "loss"])
def test_gradient_of_one_output_to_one_input(run, output, wanted):
    plain = case(20, 5, 6)
    part = plain._replace(grad_loss=0.0) if output == "q" else plain._replace(grad_q=torch.zeros(20, 6))
    expected = getattr(forward_and_backward(run, part, rotate=True), f"grad_{wanted}")
    if (output, wanted) == ("q", "codebook"):
        assert not expected.any()
        return
    inputs = {"z": plain.z, "codebook": plain.codebook}
    inputs[wanted] = inputs[wanted].clone().requires_grad_()
    q, loss = run(inputs["z"], inputs["codebook"], plain.indices)
    with isa(run.isa):
        if output == "q":
            q.backward(plain.grad_q)
        else:
            (plain.grad_loss * loss).backward()
    assert torch.equal(inputs[wanted].grad, expected)


@every_implementation
@either_way
def test_gradcheck_of_the_loss(run, rotate):
    plain = case(7, 3, 4, dtype=torch.float64)
    run.skip_unless_it_runs(torch.float64)
    z, codebook = plain.z.requires_grad_(), plain.codebook.requires_grad_()

    def loss(z, codebook):
        return run(z, codebook, plain.indices, rotate=rotate)[1]

    with isa(run.isa):
        assert torch.autograd.gradcheck(loss, (z, codebook))


@every_kernel
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_autograd_through_the_reference(run, rotate, dtype):
    plain = case(150, 11, 20, dtype=dtype)
    expected = forward_and_backward(IMPLEMENTATIONS["reference"], plain, rotate)
    for ours, theirs in zip(forward_and_backward(run, plain, rotate), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


@every_kernel
def test_codebook_may_change_before_the_backward_pass(run):
    plain = case(20, 5, 6)
    expected = forward_and_backward(run, plain, rotate=True).grad_z
    z, codebook = plain.z.clone().requires_grad_(), plain.codebook.to(run.device, copy=True)
    q, loss = run(z, codebook, plain.indices)
    codebook.fill_(torch.nan)  # as an EMA step does
    with isa(run.isa):
        torch.autograd.backward((q, loss), (plain.grad_q, loss.new_tensor(plain.grad_loss)))
    assert torch.equal(z.grad, expected)


@every_implementation
def test_inputs_stay_as_they_are(run):
    plain = case(20, 5, 6)
    before = Case(*(x.clone() for x in plain[:4]))
    forward_and_backward(run, plain, rotate=True)
    q, loss = run(plain.z, plain.codebook, plain.indices)
    assert not q.requires_grad and not loss.requires_grad
    for now, then in zip(plain[:4], before[:4], strict=True):
        assert torch.equal(now, then)


@every_kernel
@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bitwise_the_same_every_time(run, rotate, dtype, threads):
    plain = case(*(60, 5, 20) if run.slow else (3000, 50, 70), dtype=dtype)
    run.skip_unless_it_runs(dtype)
    answers = []
    for count in (1, 2, 3, 3):
        threads(count)
        answers.append(forward_and_backward(run, plain, rotate))
    for answer in answers[1:]:
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert torch.equal(ours, theirs)


@every_implementation
@either_way
@pytest.mark.parametrize("M", [0, 150])
def test_every_element_is_written(run, rotate, M):
    with poisoned_memory():
        check(run, case(M, 5, 20, outside=0.3), rotate)


def compiled_step(run, rotate, **options):
    """(q * grad_q).sum() + loss, its gradients, and q, by a compiled function of the case on the run's device."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, **options)
    def compiled(z, codebook, indices, grad_q):
        q, loss = rotate_to_code(z * 1, codebook, indices, rotate=rotate, impl=run.name)
        return (q * grad_q).sum() + loss, q + 0

    def step(case):
        z, codebook, indices, grad_q = (x.to(run.device, copy=True) for x in case[:4])
        total, q = compiled(z.requires_grad_(), codebook.requires_grad_(), indices, grad_q)
        total.backward()
        return q.cpu(), z.grad.cpu(), codebook.grad.cpu()

    return step


@pytest.mark.slow
@one_of_each
def test_compiles_with_inductor(run):
    run.skip_unless_it_runs(torch.float32)
    plain = case(12, 5, 6)._replace(grad_loss=1.0)
    with isa(run.isa):
        q, grad_z, grad_codebook = compiled_step(run, True)(plain)
    expected = forward_and_backward(run, plain, rotate=True)
    torch.testing.assert_close(q, expected.q)
    torch.testing.assert_close(grad_z, expected.grad_z)
    torch.testing.assert_close(grad_codebook, expected.grad_codebook)


@pytest.mark.gpu
def test_no_synchronisation_and_a_cuda_graph():
    plain = case(5000, 40, 40)
    z, codebook, indices, grad_q = (x.cuda() for x in plain[:4])

    def step():
        x, codes = z.detach().requires_grad_(), codebook.detach().requires_grad_()
        q, loss = rotate_to_code(x, codes, indices, impl="triton")
        return (q, loss, *torch.autograd.grad((q, loss), (x, codes), (grad_q, torch.ones_like(loss))))

    replay_of(step)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 48 * 2**30:
        pytest.skip("needs 48 GB of GPU memory")
    few = case(300, 5, 64, dtype=torch.bfloat16)
    M = 2**31 // 64 + 500
    z, grad_q = (torch.zeros(M, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    indices = torch.full((M,), -1, device="cuda")
    z[-300:], grad_q[-300:], indices[-300:] = few.z.cuda(), few.grad_q.cuda(), few.indices.cuda()
    z.requires_grad_()
    q, loss = rotate_to_code(z, few.codebook.cuda(), indices, impl="triton")
    (grad_z,) = torch.autograd.grad((q, loss), z, (grad_q, loss.new_tensor(few.grad_loss)))
    oracle = Oracle(few, rotate=True)
    assert torch.equal(q[-300:].cpu(), oracle.q) and not q[:-300].any()
    assert abs(loss.item() - oracle.loss) <= oracle.loss_rounding
    oracle.check_grad_z(grad_z[-300:].cpu())
    assert not grad_z[:-300].any()


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton.rotate_to_code import LOSS_BLOCKS, row_blocks

    types = {"codebook": "*fp32", "indices": "*i64", "errors": "*fp32", "used_rows": "*i32"}
    types |= {"loss": "*fp32", "grad_loss": "*fp32", "inverse_count": "*fp32"}
    jobs = [("rotate_to_code_loss_kernel", types, LOSS_BLOCKS)]
    for dtype, D, rotate in (("*fp32", 64, 1), ("*bf16", 3000, 1), ("*fp16", 64, 0)):
        typed = types | dict.fromkeys(("z", "q", "grad_q", "grad_z"), dtype)
        blocks = {**row_blocks(D), "ROTATE": rotate, "ONE_TILE": int(D <= 1024)}
        jobs += [("rotate_to_code_kernel", typed, row_blocks(D)), ("rotate_to_code_backward_kernel", typed, blocks)]
    compile_offline("ncfast.ops.triton.rotate_to_code", jobs)


@pytest.mark.parametrize(
    ("z", "codebook", "indices", "options", "message"),
    [
        ((2, 3), (4, 3), (3,), {}, r"z is \[M, D\] with indices \[M\], or .*; got \[2, 3\] and \[3\]"),
        ((3,), (4, 3), (), {}, r"got \[3\] and \[\]"),
        ((2, 3), (4, 5), (2,), {}, r"codebook is \[K, D\] for z \[M, D\], .*; got \[4, 5\] with z \[2, 3\]"),
        ((2, 3), (1, 4, 3), (2,), {}, r"got \[1, 4, 3\] with z \[2, 3\]"),
        ((1, 2, 3), (4, 3), (1, 2), {}, r"got \[4, 3\] with z \[1, 2, 3\]"),
        ((2, 2, 3), (3, 4, 3), (2, 2), {}, r"got \[3, 4, 3\] with z \[2, 2, 3\]"),
        ((2, 3), (0, 3), (2,), {}, "the codebook holds no code"),
        ((2, 3), (4, 3), (2,), {"impl": "cuda"}, "has the implementations .* got impl='cuda'"),
    ],
)
def test_refuses_what_does_not_fit(z, codebook, indices, options, message):
    with pytest.raises(ValueError, match=f"rotate_to_code.*{message}"):
        rotate_to_code(torch.zeros(z), torch.zeros(codebook), torch.zeros(indices, dtype=torch.int64), **options)


def test_refuses_dtypes_and_devices():
    z, codebook, indices = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"z is float32, float64, float16 or bfloat16; got torch.int64"):
        rotate_to_code(z.long(), codebook, indices)
    with pytest.raises(ValueError, match=r"codebook is float32, float64, float16 or bfloat16; got torch.complex64"):
        rotate_to_code(z, codebook.cfloat(), indices)
    with pytest.raises(ValueError, match=r"indices are int64; got torch.int32"):
        rotate_to_code(z, codebook, indices.int())
    with pytest.raises(ValueError, match="z is on cpu, the codebook on meta and indices on cpu; move them"):
        rotate_to_code(z, codebook.to("meta"), indices)


def test_explicit_request_that_cannot_be_met():
    z, codebook, indices = torch.zeros(2, 3).double(), torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"float64 input: Triton has no path|triton is not installed|off a GPU"):
        rotate_to_code(z, codebook, indices, impl="triton")
