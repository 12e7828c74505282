"""Every operation on inputs that hypothesis makes up: shapes, layouts, types and values, by every implementation here.

The examples are the same in every run. NCFAST_EXAMPLES=20 makes twenty times as many, for a longer hunt.

Bounds are those of rounding (Higham, Accuracy and stability of numerical algorithms, chapter 3): a sum of n terms in
any order is off by n units of roundoff of the sum of their sizes, and what is made of it by its condition times that.
What underflows is off by the smallest normal number at most.
"""

import math
import os

import loss_oracle
import numpy as np
import pytest
import test_batch_norm as of_batch_norm
import test_code_stats as of_code_stats
import test_fused_linear as of_fused_linear
import test_iter_norm as of_iter_norm
import test_layer_norm as of_layer_norm
import test_masked_attention as of_masked_attention
import test_nearest_code as of_nearest_code
import test_rotate_to_code as of_rotate_to_code
import test_thin_conv_transpose as of_thin_conv_transpose
import test_unmask_step as of_unmask_step
import torch
from implementations import each, implementations, isa

from ncfast.ops.gram import why_not_kernels

pytest.importorskip("hypothesis", reason="make gpu does without it")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, F64, F16, BF16)
HOST = ("reference", "cpp")  # the interpreter of Triton is too slow for this


def examples(count):
    """So many, the same every time, none stored."""
    count = max(1, round(count * float(os.environ.get("NCFAST_EXAMPLES", "1"))))
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def unit(dtype):
    return torch.finfo(dtype).eps / 2


def wide(dtype):
    """What is computed in."""
    return F64 if dtype == F64 else F32


def those_that_run(run, dtypes=DTYPES):
    run.skip_unless_it_runs(F32)
    return st.sampled_from([dtype for dtype in dtypes if run.why_not(dtype) is None])


sizes = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 33])
seeds = st.integers(0, 2**20)
SIZE = {  # of values of a kind, by type
    "huge": {F32: 1e15, F64: 1e100, F16: 1e2, BF16: 1e15},
    "tiny": {F32: 1e-15, F64: 1e-100, F16: 1e-3, BF16: 1e-15},
}
KINDS = ("normal", "huge", "tiny", "subnormal", "zeros", "equal rows", "few rows", "integers", "mixed rows", "offset")


@st.composite
def values(draw, shape, dtype=F32, kinds=KINDS):
    """A tensor whose rows are its last dimension."""
    kind, generator = draw(st.sampled_from(kinds)), torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(shape, generator=generator, dtype=F64)
    if kind in SIZE:
        x = x * SIZE[kind][dtype]
    elif kind == "subnormal":
        x = x * torch.finfo(dtype).tiny / 4
    elif kind == "zeros":
        x = x.clamp(0, 0)
    elif kind == "equal rows" and x.dim() > 1 and x.shape[-2] > 0:
        x = x[..., :1, :].expand_as(x)
    elif kind == "few rows" and x.dim() > 1 and x.shape[-2] > 0:
        x = x[..., torch.randint(0, min(3, x.shape[-2]), x.shape[-2:-1], generator=generator), :]
    elif kind == "integers":
        x = x.mul(2).round()
    elif kind == "mixed rows":
        powers = 2 if dtype == F16 else 6
        x = x * 10.0 ** torch.randint(-powers, powers + 1, (*x.shape[:-1], 1), generator=generator)
    elif kind == "offset":
        x = x + 30
    return x.to(dtype)


@st.composite
def laid_out(draw, x):
    """The same values, or those of the first row for all, elsewhere in memory."""
    layout = draw(st.sampled_from(["contiguous", "every second", "shifted", "transposed", "expanded"]))
    if layout == "every second":
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    if layout == "shifted" and x.dim() > 0:  # not aligned to a vector
        return torch.cat([x.flatten()[:1], x.flatten()])[1 if x.numel() else 0 :].view(x.shape)
    if layout == "transposed" and x.dim() > 1:
        a, b = draw(st.sampled_from([(0, 1), (0, -1), (-2, -1)]))
        return x.transpose(a, b).contiguous().transpose(a, b)
    if layout == "expanded" and x.dim() > 1 and x.shape[0] > 1:
        return x[:1].expand_as(x)
    return x


@st.composite
def tensors(draw, shape, dtype=F32, kinds=KINDS):
    return draw(laid_out(draw(values(shape, dtype, kinds))))


def leaf(x):
    """To be differentiated, with the layout it has."""
    return None if x is None else x.detach().requires_grad_()


def gradients(run, results, leaves, grads):
    with isa(run.isa):
        return torch.autograd.grad(results, leaves, grads)


def assert_within(actual, expected, bound, what=""):
    assert actual.shape == expected.shape, what
    error = (actual.detach().double() - expected.detach().double()).abs()
    assert (error <= bound).all(), f"{what}: {error.max()} of {torch.as_tensor(bound).max()}"


@each(of_nearest_code.IMPLEMENTATIONS, *HOST)
@examples(150)
@given(st.data())
def test_nearest_code(run, data):
    dtypes = those_that_run(run)
    heads = data.draw(st.sampled_from([None, None, 0, 1, 3]))
    K, D = max(1, data.draw(sizes)), data.draw(sizes)
    rows = (data.draw(sizes),) if heads is None or data.draw(st.booleans()) else (2, data.draw(sizes))
    lead = () if heads is None else (heads,)
    z = data.draw(tensors((*lead, *rows, D), data.draw(dtypes)))
    codebook = data.draw(tensors((*lead, K, D), data.draw(dtypes)))
    bad = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf]))
    broken_row, broken_code = bad is not None and z.numel() > 0, bad is not None and K > 1 and codebook.numel() > 0
    if broken_row:
        z = z.clone(memory_format=torch.contiguous_format)
        z.view(-1, D)[0, data.draw(st.integers(0, D - 1))] = bad
    if broken_code:
        codebook = codebook.clone(memory_format=torch.contiguous_format)
        codebook[..., data.draw(st.integers(0, K - 1)), data.draw(st.integers(0, D - 1))] = bad
    indices = run(z, codebook)
    assert indices.shape == z.shape[:-1] and indices.dtype == torch.int64
    for head in range(1 if heads is None else heads):
        ours, theirs = (z, codebook) if heads is None else (z[head], codebook[head])
        ours, found = ours.reshape(math.prod(rows), D), (indices if heads is None else indices[head]).flatten()
        finite, usable = ours.isfinite().all(-1), theirs.isfinite().all(-1)
        assert (found[~finite] == 0).all() and usable[found[finite]].all()
        if finite.any():
            # Index among the usable codes, whose order is kept.
            among = usable.cumsum(0)[found[finite]] - 1
            oracle = of_nearest_code.Oracle(ours[finite], theirs[usable])
            # Squares below the smallest number of float64 are no distances there.
            oracle.rounding = oracle.rounding + 4 * D * 5e-324
            oracle.check(among)


@each(of_code_stats.IMPLEMENTATIONS, *HOST)
@examples(150)
@given(st.data())
def test_code_stats(run, data):
    dtype = data.draw(those_that_run(run))
    lead = data.draw(st.sampled_from([(), (), (1,), (3,), (0,)]))
    M, K, D = data.draw(sizes), max(1, data.draw(sizes)), data.draw(sizes)
    z = data.draw(tensors((*lead, M, D), dtype))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    indices = torch.randint(-1, K + 1, (*lead, M), generator=generator)
    indices = indices * data.draw(st.sampled_from([1, 1, 0, -(2**40)]))
    indices = data.draw(laid_out(indices))
    bad = data.draw(st.sampled_from([None, None, math.nan, math.inf, -math.inf]))
    if bad is not None and z.numel() > 0:
        z = z.clone(memory_format=torch.contiguous_format)
        z.view(-1)[data.draw(st.integers(0, z.numel() - 1))] = bad
    counts, sums = run(z, indices, K)
    assert counts.dtype == sums.dtype == wide(dtype)
    assert counts.shape == (*lead, K) and sums.shape == (*lead, K, D)
    member = indices[..., None, :] == torch.arange(K)[:, None]  # [..., K, M]
    assert torch.equal(counts, member.sum(-1).to(counts.dtype))  # exact
    x = z.double().numpy().astype(np.longdouble)[..., None, :, :]
    terms = np.where(member.numpy()[..., None], x, 0)  # [..., K, M, D]
    with np.errstate(invalid="ignore"):
        expected, size = terms.sum(-2), np.abs(terms).sum(-2)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(sums.numpy()[~finite], expected[~finite].astype(np.float64))
    # Sums of n terms, and a rounding; sums of subnormals are exact.
    bound = (counts.numpy()[..., None] + 2) * unit(wide(dtype)) * size
    assert (np.abs(sums.numpy()[finite] - expected[finite]) <= bound[finite]).all()


@each(of_rotate_to_code.IMPLEMENTATIONS, *HOST)
@examples(150)
@given(st.data())
def test_rotate_to_code(run, data):
    dtype = data.draw(those_that_run(run))
    lead = data.draw(st.sampled_from([(), (), (1,), (3,)]))
    M, K, D = data.draw(sizes), max(1, data.draw(sizes)), max(1, data.draw(sizes))
    z, codebook = data.draw(tensors((*lead, M, D), dtype)), data.draw(tensors((*lead, K, D), wide(dtype)))
    if dtype == F16:
        codebook = codebook.clamp(-10, 10)
    # A vector about as long as the shortest that is rotated may fall on either side.
    lengths = z.double().norm(dim=-1)
    assume(not ((lengths > 0.999e-6) & (lengths < 1.001e-6)).any())
    generator = torch.Generator().manual_seed(data.draw(seeds))
    indices = data.draw(laid_out(torch.randint(-1, K + 1, (*lead, M), generator=generator)))
    grad_q = torch.randn((*lead, M, D), generator=generator, dtype=F64).to(dtype)
    case = of_rotate_to_code.Case(z, codebook, indices, grad_q)
    rotate = data.draw(st.booleans())
    oracle = of_rotate_to_code.Oracle(case, rotate)  # with the bound of its formula
    assume(dtype != F16 or (abs(oracle.grad_z) < 6e4).all())  # or it overflows
    underflow = torch.finfo(oracle.compute).tiny
    oracle.loss_rounding, oracle.grad_rounding = oracle.loss_rounding + underflow, oracle.grad_rounding + underflow
    oracle.codebook_rounding = oracle.codebook_rounding + underflow
    leaves = leaf(z), leaf(codebook)
    q, loss = run(*leaves, indices, rotate=rotate)
    grads = gradients(run, (q, loss), leaves, (grad_q, loss.new_tensor(case.grad_loss)))
    oracle.check(of_rotate_to_code.Result(q.detach(), loss.detach(), *grads))


LOSS_KINDS = ("normal", "huge", "mixed rows", "tiny", "integers", "offset", "few rows", "subnormal")
LOSS_IMPLEMENTATIONS = {
    f"{name}-{id}": run
    for name, loss in loss_oracle.LOSSES.items()
    for id, run in implementations(loss, lambda device, *dtypes: why_not_kernels(device, *dtypes[:1])).items()
}


def check_loss(run, data, sizes_of_gradient):
    """`sizes_of_gradient(za, zb, options)`: the sizes that the loss and its gradients are sums of."""
    name = run.operation.__name__
    dtype = data.draw(those_that_run(run))
    N, D = max(2, data.draw(sizes)), max(1, data.draw(sizes))
    za = data.draw(values((N, D), dtype, ["normal", "integers", "offset"] if dtype == F16 else LOSS_KINDS))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    noise = data.draw(st.sampled_from([0.0, 0.3, 3.0])) * za.double().std(correction=0)
    zb = (za.double() + noise * torch.randn(N, D, generator=generator, dtype=F64)).to(dtype)
    za, zb = data.draw(laid_out(za)), data.draw(laid_out(zb))
    convention = data.draw(st.sampled_from(list(loss_oracle.CONVENTIONS[name])))
    options = loss_oracle.CONVENTIONS[name][convention]
    deviations = [z.double().std(0, correction=0) for z in (za, zb)]
    # A column of one value has no direction; its rounded mean gives it one.
    assume(all((s > 0).all() for s in deviations))
    if options["eps"] == 0 and options.get("eps_std") == 0:
        assume(all((s > 1e-15).all() for s in deviations))  # nothing keeps the squares from underflow
    far = max((z.double().abs() / s).max() for z, s in zip((za, zb), deviations, strict=True))
    assume(far < 1e4)
    of_loss, of_grads = sizes_of_gradient(za.double(), zb.double(), options)
    assume(of_loss < torch.finfo(wide(dtype)).max ** 0.9)  # VICReg's is a fourth power
    oracle = loss_oracle.Oracle(name, za, zb, options)
    route = data.draw(st.sampled_from(["gram", "direct", "auto"])) if run.name == "reference" else "gram"
    leaves = leaf(za), leaf(zb)
    loss = run(*leaves, convention=convention, route=route)
    assert loss.shape == () and loss.dtype == wide(dtype)
    upstream = torch.tensor(-1.5, dtype=loss.dtype)
    grads = gradients(run, loss, leaves, upstream)
    # Means and energies are sums over N and D, squared; centring adds how far columns are from the origin.
    rounding = 8 * (N + D + 16) * unit(wide(dtype)) * (1 + far)
    underflow = torch.finfo(wide(dtype)).tiny
    assert_within(loss, oracle.loss, rounding * of_loss + underflow, "loss")
    for grad, exact, size in zip(grads, oracle.grads, of_grads, strict=True):
        assert grad.dtype == dtype and grad.shape == exact.shape
        error = (grad.double() + 1.5 * exact).norm()  # as a whole: an element may cancel
        bound = 1.5 * (rounding * size + 2 * unit(dtype) * exact.norm()) + N * D * torch.finfo(dtype).tiny
        assert error <= bound, f"{error} > {bound}"


def invariance(za, zb, sim):
    N, D = za.shape
    return sim * (za - zb).square().mean(), 2 * sim * (za - zb).norm() / (N * D)


def hinge(z, var, eps):
    """The size of its gradient: var / (D (N - 1)) of the standardised view."""
    N, D = z.shape
    return var * ((z - z.mean(0)) / (z.var(0) + eps).sqrt()).norm() / (D * (N - 1))


def every_implementation_of(name):
    return each({id: run for id, run in LOSS_IMPLEMENTATIONS.items() if id.startswith(name) and "triton" not in id})


@every_implementation_of("barlow_twins_loss")
@examples(100)
@given(st.data())
def test_barlow_twins_loss(run, data):
    def sizes_of(za, zb, options):
        N, D = za.shape
        scale, lambd = 1 / D if options["scale"] is None else options["scale"], options["lambd"]
        stds = [(z.var(0, correction=options["ddof"]) + options["eps"]).sqrt() + options["eps_std"] for z in (za, zb)]
        a, b = ((z - z.mean(0)) / s for z, s in zip((za, zb), stds, strict=True))
        # C's elements are 1 at most, its norm D at most: the gradient is 2 / N (1 + 1 + lambd D) of the other view.
        of_grads = [2 * scale * (2 + lambd * D) / N * (x / s).norm() for x, s in ((b, stds[0]), (a, stds[1]))]
        # And, by the derivative of the deviation, as much along the view itself.
        of_grads = [
            g + 2 * scale * (2 + lambd * D) / N * (x / s).norm() for g, x, s in zip(of_grads, (a, b), stds, strict=True)
        ]
        return scale * (4 * D + lambd * D**2), of_grads

    check_loss(run, data, sizes_of)


@every_implementation_of("vicreg_loss")
@examples(100)
@given(st.data())
def test_vicreg_loss(run, data):
    def sizes_of(za, zb, options):
        N, D = za.shape
        loss, grad = invariance(za, zb, options["sim"])
        traces = [z.var(0).sum() for z in (za, zb)]  # the covariance is no larger
        centred = [(z - z.mean(0)).norm() for z in (za, zb)]
        of_grads = [
            grad + hinge(z, options["var"], options["eps"]) + 8 * options["cov"] * trace * norm / (D * (N - 1))
            for z, trace, norm in zip((za, zb), traces, centred, strict=True)
        ]
        return loss + 2 * options["var"] + 2 * options["cov"] * sum(trace**2 for trace in traces) / D, of_grads

    check_loss(run, data, sizes_of)


@every_implementation_of("vibcreg_loss")
@examples(100)
@given(st.data())
def test_vibcreg_loss(run, data):
    def sizes_of(za, zb, options):
        D = za.shape[1]
        loss, grad = invariance(za, zb, options["sim"])
        of_grads = []
        for z in (za, zb):
            norms = (z - z.mean(0)).norm(dim=0).clamp_min(1e-12)
            correlations = 8 * options["cov"] / D * ((z - z.mean(0)) / norms**2).norm()  # whose matrix is D at most
            of_grads.append(grad + hinge(z, options["var"], options["eps"]) + correlations)
        return loss + 2 * options["var"] + 4 * options["cov"], of_grads

    check_loss(run, data, sizes_of)


@each(of_iter_norm.IMPLEMENTATIONS, *HOST)
@examples(100)
@given(st.data())
def test_iter_norm(run, data):
    dtype = data.draw(those_that_run(run))
    N, d, groups = max(2, data.draw(sizes)), data.draw(sizes), data.draw(st.sampled_from([1, 2, 3, 5]))
    iterations = data.draw(st.integers(0, 6))
    kinds = [kind for kind in KINDS if kind != "mixed rows"]
    x = data.draw(tensors((N, groups * d), dtype, kinds))
    eps = 1e-5
    generator = torch.Generator().manual_seed(data.draw(seeds))
    grad_y = torch.randn(N, groups * d, generator=generator, dtype=wide(dtype))
    x = leaf(x)
    y = run(x, groups=groups, iterations=iterations, eps=eps)
    (grad_x,) = gradients(run, y, x, grad_y)
    assert y.dtype == wide(dtype) and grad_x.dtype == dtype and y.shape == grad_x.shape == x.shape
    if d == 0:
        return
    exact_x = x.detach().double().requires_grad_()
    expected, whitening = of_iter_norm.newton_schulz_oracle(exact_x, groups, iterations, eps)
    (expected_grad,) = torch.autograd.grad(expected, exact_x, grad_y.double())
    for g in range(groups):
        part = slice(g * d, (g + 1) * d)
        block, W = exact_x.detach()[:, part], whitening[g].detach()
        centred = block - block.mean(0)
        trace = centred.square().sum() / N + d * eps
        P = torch.linalg.matrix_norm(W, 2) * trace.sqrt()
        # Each step multiplies what was rounded before by 3/2 at most; centring adds the size of the mean.
        rounding = 8 * (N + d + 16) * unit(wide(dtype)) * (iterations + 1) * 1.5**iterations
        off_origin = N**0.5 * block.mean(0).abs().max() / trace.sqrt()
        size = torch.linalg.matrix_norm(W, 2) * (centred.norm() + block.norm())
        underflow = torch.finfo(wide(dtype)).tiny
        assert_within(y[:, part], expected[:, part], rounding * size + underflow, "y")
        # What whitening passes on, and what the change of the matrix, of P³ twice over, takes back.
        size = grad_y[:, part].double().norm() * W.norm() * (1 + P**2) * (1 + off_origin)
        bound = rounding * size + 2 * unit(dtype) * expected_grad[:, part].abs() + torch.finfo(dtype).tiny
        assert_within(grad_x[:, part], expected_grad[:, part], bound, "grad_x")


@each(of_masked_attention.IMPLEMENTATIONS, *HOST)
@examples(120)
@given(st.data())
def test_masked_attention(run, data):
    dtype = data.draw(those_that_run(run))
    B, S, H, d = (data.draw(x) for x in (st.integers(0, 3), sizes, st.integers(0, 3), sizes))
    learned_kind = data.draw(st.sampled_from(of_masked_attention.LEARNED))
    kinds = ["normal", "equal rows", "few rows", "integers"]
    if "normalised" not in learned_kind:  # zeros and what has no finite square have no direction
        kinds += ["tiny", "zeros", "subnormal"]
    qkv = data.draw(tensors((B, S, 3, H, d), dtype, kinds))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    keys, learned = {}, {}
    which = data.draw(st.sampled_from(of_masked_attention.KEYS))
    if which == "mask":
        keys["key_mask"] = data.draw(laid_out(torch.rand(B, S, generator=generator) < 0.5))
    if which == "lengths":
        keys["lengths"] = torch.randint(0, S + 3, (B,), generator=generator)
    if "normalised" in learned_kind:
        assume((qkv.double().norm(dim=-1) > 0.1).all())
        learned = {name: torch.randn(d, generator=generator, dtype=wide(dtype)) for name in ("q_scale", "k_scale")}
    if "null" in learned_kind:
        learned["null_kv"] = torch.randn(2, H, d, generator=generator, dtype=wide(dtype))
        assume("normalised" not in learned_kind or (learned["null_kv"].norm(dim=-1) > 0.1).all())
    scale = data.draw(st.sampled_from([None, 0.5, 3.0]))
    grad_out = torch.randn(B, S, H, d, generator=generator, dtype=F64).to(dtype)
    leaves = {"qkv": leaf(qkv)} | {name: leaf(x) for name, x in learned.items()}
    out = run(leaves["qkv"], **keys, **{name: leaves[name] for name in learned}, scale=scale)
    assert out.shape == (B, S, H, d) and out.dtype == dtype
    grads = dict(zip(leaves, gradients(run, out, list(leaves.values()), grad_out), strict=True))
    if qkv.numel() == 0:
        assert all((grad == 0).all() for grad in grads.values())
        return
    case = of_masked_attention.Case(qkv, keys, learned, grad_out, scale)
    expected = of_masked_attention.oracle(case)
    u, scale = unit(dtype), d**-0.5 if scale is None else scale
    lengths = [
        torch.cat([t.double().norm(dim=-1).flatten() for t in parts]).max()
        for parts in (
            (qkv[:, :, part], *([learned["null_kv"][part - 1]] if part and "null_kv" in learned else []))
            for part in range(3)
        )
    ]
    q, k, v = lengths
    if "q_scale" in learned:
        q, k = (learned[name].double().abs().max() for name in ("q_scale", "k_scale"))
    # Scores are sums over d; the error of one is, by exp, the relative one of a weight, and weights sum to 1.
    of_weights = 2 * (2 * d + 16) * u * scale * q * k + (2 * S + 16) * u
    underflow = torch.finfo(dtype).tiny
    assert_within(out, torch.from_numpy(expected.out), 2 * of_weights * v + underflow, "out")
    # The gradient of a score: as large as that of a weight, twice (softmax takes its mean off).
    g = grad_out.double().norm(dim=-1).max()
    of_score = 4 * scale * g * v
    sizes_of = {"qkv": S * max(of_score * q, of_score * k, g)}
    if "q_scale" in learned:  # divided by the length, at least 0.1, and all rows added up
        sizes_of = {"qkv": S * max(10 * 2 * of_score * q * k, g)}
        sizes_of |= dict.fromkeys(("q_scale", "k_scale"), B * H * S * S * of_score * max(q, k))
    sizes_of["null_kv"] = B * sizes_of["qkv"]
    for name, grad in grads.items():
        assert grad.dtype == leaves[name].dtype
        # Of the type of qkv also where what is learned is float32: the reference casts it.
        bound = 4 * (of_weights + (2 * d + S + 16) * u) * sizes_of[name] + underflow
        assert_within(grad, torch.from_numpy(expected.grads[name]), bound, name)


@each(of_unmask_step.IMPLEMENTATIONS, *HOST)
@examples(120)
@given(st.data())
def test_unmask_step(run, data):
    """The integers of the oracle, exactly."""
    dtype = data.draw(those_that_run(run))
    B, n, K = data.draw(st.integers(0, 4)), data.draw(sizes), max(1, data.draw(sizes))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    positions, m = None, n
    if data.draw(st.booleans()):
        m = data.draw(st.integers(0, n + 2))
        chosen = torch.rand(B, n + 2, generator=generator).argsort(1)[:, :m].sort(1).values
        positions = data.draw(laid_out(chosen.where(chosen < n, torch.full_like(chosen, n))))
    kinds = [kind for kind in KINDS if kind not in ("offset", "mixed rows")]
    logits, unconditional = (data.draw(tensors((B, m, K), dtype, kinds)) for _ in range(2))
    for bad in data.draw(st.lists(st.sampled_from([-math.inf, -math.inf, math.inf, math.nan]), max_size=3)):
        if logits.numel() > 0:
            hit = torch.rand(logits.shape, generator=generator) < data.draw(st.sampled_from([0.05, 0.5, 1.0]))
            logits = logits.masked_fill(hit, bad)
            if data.draw(st.booleans()):
                unconditional = unconditional.masked_fill(hit, bad)
    tokens = torch.randint(0, K, (B, n), generator=generator)
    tokens[torch.rand(B, n, generator=generator) < data.draw(st.sampled_from([0.0, 0.6, 1.0]))] = K
    sample = torch.randint(0, 2**62, (B,), generator=generator)
    num_masked = data.draw(st.integers(0, n + 1))
    if data.draw(st.booleans()):
        num_masked = torch.randint(-1, n + 2, (B,), generator=generator)
    seed = data.draw(st.sampled_from([0, 7, -3, 2**63 - 1]))
    options = {
        "seed": torch.tensor(seed) if data.draw(st.booleans()) else seed,
        "step": data.draw(st.sampled_from([0, 5, 2**16 - 1])),
        "num_masked": num_masked,
        "choice_temperature": data.draw(st.sampled_from([0.0, 1.5, 4.5])),
        "positions": positions,
        "width": data.draw(st.sampled_from([None, 0, 1, n, n + 3])),
        "unconditional": data.draw(st.sampled_from([None, unconditional])),
        # Powers of two: equal scores stay equal.
        "guidance_scale": data.draw(st.sampled_from([1.0, 2.0, -0.5])),
        "temperature": data.draw(st.sampled_from([0.5, 1.0, 4.0])),
        "top_k": data.draw(st.sampled_from([0, 1, 2, K, K + 3])),
        "convention": data.draw(st.sampled_from(["paper", "google"])),
    }
    found = run(data.draw(laid_out(logits.clone())) if B == 1 else logits, tokens, sample, **options)
    for ours, theirs in zip(found, of_unmask_step.oracle(logits, tokens, sample, **options), strict=True):
        assert ours.dtype == torch.int64 and torch.equal(ours, theirs)


@each(of_fused_linear.IMPLEMENTATIONS, *HOST)
@examples(120)
@given(st.data())
def test_fused_linear(run, data):
    dtype = data.draw(those_that_run(run))
    lead = data.draw(st.sampled_from([(), (0,), (1,), (7,), (2, 3), (17,), (33,)]))
    N, K = data.draw(sizes), data.draw(sizes)
    kinds = [kind for kind in KINDS if kind != "offset"]
    generator = torch.Generator().manual_seed(data.draw(seeds))

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

    def maybe(x):
        return x if data.draw(st.booleans()) else None

    inputs = {
        "x": data.draw(tensors((*lead, K), dtype, kinds)),
        "weight": data.draw(laid_out(randn(N, K))),
        "bias": maybe(randn(N)),
        "norm_weight": maybe(data.draw(laid_out(randn(K)))),
        "residual": maybe(data.draw(laid_out(randn(*lead, N)))),
    }
    norm_eps, gelu = data.draw(st.sampled_from([1e-3, 1e-12])), data.draw(st.booleans())
    norm_eps = max(norm_eps, 1e-3) if dtype == F16 else norm_eps  # rows of zeros: gradients overflow
    if inputs["norm_weight"] is not None:  # PyTorch's gradient of a norm has its third power
        inputs["x"] = inputs["x"].clamp(*((-1e9, 1e9) if dtype != F16 else (-1e4, 1e4)))
    leaves = {name: leaf(x) for name, x in inputs.items() if x is not None}
    y = run(**leaves, norm_eps=norm_eps, gelu=gelu)
    assert y.shape == (*lead, N) and y.dtype == dtype
    grad_y = randn(*lead, N)
    grads = dict(zip(leaves, gradients(run, y, list(leaves.values()), grad_y), strict=True))

    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    x, weight, bias, norm_weight, residual = (exact.get(name) for name in inputs)
    r = torch.ones(*lead, 1, dtype=F64)
    normed = norm_weight is not None and K > 0
    h = x if norm_weight is None else x * norm_weight
    if normed:
        r = (x.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        h = x * r * norm_weight
    pre = h @ weight.T + (0 if bias is None else bias)
    z = 0.5 * pre * torch.special.erfc(-pre / 2**0.5) if gelu else pre
    expected = z if residual is None else z + residual
    expected_grads = dict(zip(exact, torch.autograd.grad(expected, list(exact.values()), grad_y.double()), strict=True))
    # From here on sizes: the sum over K, the mean square, and a few roundings to the type.
    with torch.no_grad():
        u = 4 * unit(dtype) + 2 * (K + N + 16) * unit(wide(dtype))
        size, g = h.abs() @ weight.abs().T + (0 if bias is None else bias.abs()), grad_y.double().abs()
        underflow = torch.finfo(dtype).tiny * (1 + K)
        off = 1.13 * u * size  # the slope of the GELU is 1.13 at most, its second derivative 0.8
        bound = off + 4 * u * (z.abs() + expected.abs()) + underflow
        if not (size < 1e4).all() and dtype == F16:
            return  # may overflow
        assert_within(y, expected, bound, "y")
        of_pre = g * (u * size.clamp(max=40) if gelu else 0) + 3 * u * g  # beyond 40 the slope is 0 or 1
        to_h, off_h = 1.13 * g @ weight.abs(), of_pre @ weight.abs() + 1.13 * u * g @ weight.abs()
        rows = math.prod(lead)
        unit_x = x.abs() * r
        if not normed:
            bounds = {"x": off_h, "norm_weight": torch.zeros(K)}
        else:
            w = norm_weight.abs()
            along = (unit_x * w * (4 * u * to_h + off_h)).mean(-1, keepdim=True)
            bounds = {"x": r * (w * (4 * u * to_h + off_h) + unit_x * along)}
            flat = (unit_x * (4 * u * to_h + off_h)).reshape(rows, K)
            bounds["norm_weight"] = flat.sum(0) * (1 + len(flat))
        flat_g, flat_off = g.reshape(rows, N), of_pre.reshape(rows, N)
        total = flat_off + (4 + rows) * u * 1.13 * flat_g
        bounds |= {"weight": total.T @ h.abs().reshape(rows, K), "bias": total.sum(0), "residual": torch.zeros(())}
        for name, grad in grads.items():
            value = expected_grads[name]
            assert grad.dtype == dtype
            bound = bounds[name] + 2 * unit(dtype) * value.abs() + underflow * (1 + r.max() if r.numel() else 1)
            assert_within(grad, value, bound, name)


def standardised(h, rounding, eps):
    """Of groups h [groups, n]: 1 / sqrt(var + eps), and the largest element over the deviation, mean included [groups].

    A rounding of h moves the mean, the deviation and the element: by it times u of u, and by u more of what is made
    of them.
    """
    if h.numel() == 0:
        return h.new_zeros(h.shape[0]), h.new_zeros(h.shape[0])
    r = (h.var(1, correction=0) + eps).rsqrt()
    u = h.abs().amax(1) * r
    assume((u * rounding < 0.1).all())  # else nothing is left of the deviations
    return r, u


@each(of_batch_norm.IMPLEMENTATIONS, "reference")
@examples(120)
@given(st.data())
def test_batch_norm(run, data):
    dtype = data.draw(those_that_run(run, (F32, F16, BF16)))
    views, B, C = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    H, W = (data.draw(st.sampled_from([1, 2, 3, 7])) for _ in range(2))
    assume(B * H * W >= 2)
    kinds = [kind for kind in KINDS if kind not in ("huge", "mixed rows")]
    x = data.draw(tensors((views * B, C, H, W), dtype, kinds))
    residual = data.draw(tensors((views * B, C, H, W), dtype, kinds)) if data.draw(st.booleans()) else None
    generator = torch.Generator().manual_seed(data.draw(seeds))
    vectors = {name: torch.randn(C, generator=generator) for name in ("weight", "bias")}
    if data.draw(st.booleans()):
        vectors |= {"running_mean": torch.randn(C, generator=generator), "running_var": torch.ones(C)}
    options = {"views": views} | data.draw(
        st.sampled_from([{}, {"slope": 0.01}, {"slope": 0.0, "pad": True}, {"pad": True}, {"then_slope": 0.2}])
    )
    case = of_batch_norm.Case(x, vectors, residual, options)
    actual, expected = of_batch_norm.everything(run, case), of_batch_norm.expected_of(case)
    assert actual.keys() == expected.keys()
    n = B * H * W
    rounding = 3 * (n + 16) * unit(F32) + 3 * unit(dtype)
    h = x.double() if residual is None else x.double() + residual.double()
    top = (x.double().abs() + (0 if residual is None else residual.double().abs())).amax((0, 2, 3))  # [C]
    groups = h.reshape(views, B, C, H * W).permute(0, 2, 1, 3).reshape(views * C, n)
    r, u = (part.reshape(views, C).amax(0) for part in standardised(groups, rounding, 1e-5))
    u = u.maximum(top * r)
    assume((u * rounding < 0.1).all())
    w, b = (vectors[name].double().abs() for name in ("weight", "bias"))
    off = rounding * (2 * w * u * (1 + u) + b)  # [C]
    # Where y changes its sign the slope does: its gradients are then either.
    slopes = options.get("slope", 1.0) != 1.0 or "then_slope" in options
    kink = slopes and (expected["y"].abs() <= off[:, None, None]).any()
    g = 45 if options.get("pad") else 10  # gradients of results are below 5, and up to nine of them meet in one element
    bounds = {
        "y": off,
        "activated": off,
        "running_mean": rounding * (top + 3),
        "running_var": rounding * (top**2 + 3),
        "grad_x": 2 * rounding * r * w * g * (2 + u**2) * (1 + u),
        "grad_weight": rounding * views * n * g * 2 * u * (1 + u),
        "grad_bias": rounding * views * n * g * torch.ones(C),
    }
    bounds["grad_residual"] = bounds["grad_x"]
    for name, value in expected.items():
        if not (kink and name.startswith("grad")):
            bound = bounds[name] if value.dim() == 1 else bounds[name][:, None, None]
            assert_within(actual[name], value, bound + 2 * torch.finfo(dtype).tiny, name)


@each(of_layer_norm.IMPLEMENTATIONS, "reference")
@examples(120)
@given(st.data())
def test_layer_norm(run, data):
    dtype = data.draw(those_that_run(run))
    lead = data.draw(st.sampled_from([(0,), (1,), (7,), (0, 3), (2, 3), (3, 1, 5)]))
    D = data.draw(sizes)
    kinds = [kind for kind in KINDS if kind != "huge"]
    x = data.draw(tensors((*lead, D), dtype, kinds))
    generator = torch.Generator().manual_seed(data.draw(seeds))
    weight, bias = (torch.randn(D, generator=generator, dtype=F64).to(dtype) for _ in range(2))
    if dtype != F64 and data.draw(st.booleans()):
        weight, bias = weight.float(), bias.float()
    add = data.draw(tensors((lead[-1], D), dtype, ["normal", "offset", "tiny"])) if data.draw(st.booleans()) else None
    gelu, eps = data.draw(st.booleans()), data.draw(st.sampled_from([1e-5, 1e-3]))
    grad_y = torch.randn(*lead, D, generator=generator, dtype=F64).to(dtype)
    leaves = {name: leaf(part) for name, part in (("x", x), ("weight", weight), ("bias", bias), ("add", add))}
    leaves = {name: part for name, part in leaves.items() if part is not None}
    y = run(**leaves, gelu=gelu, eps=eps)
    assert y.dtype == dtype and y.shape == x.shape
    grads = dict(zip(leaves, gradients(run, y, list(leaves.values()), grad_y), strict=True))
    exact = {name: part.detach().double().requires_grad_() for name, part in leaves.items()}
    expected = of_layer_norm.by_hand(**exact, eps=eps, gelu=gelu)
    values_of = torch.autograd.grad(expected, list(exact.values()), grad_y.double())

    rounding = 3 * (D + 16) * unit(wide(dtype)) + 6 * unit(dtype)
    with torch.no_grad():
        z = exact["x"] + exact.get("add", 0)
        h = 0.5 * z * torch.special.erfc(-z / 2**0.5) if gelu else z
        rows = math.prod(lead)
        r, u = (part.reshape(*lead, 1) for part in standardised(h.reshape(rows, D), rounding, eps))
        # The sum is rounded before the GELU shrinks it.
        top = exact["x"].abs() + (exact["add"].abs() if add is not None else 0)
        top = top.amax(-1, keepdim=True) if D else r
        u = u.maximum(top * r)
        assume((u * rounding < 0.1).all())
        w, b, g = exact["weight"].abs(), exact["bias"].abs(), grad_y.double().abs()
        assert_within(y, expected, rounding * (2 * w * u * (1 + u) + b) + torch.finfo(dtype).tiny, "y")
        wg = (w * g).amax(-1, keepdim=True) if D else r
        of_x = r * wg * (2 + u**2)
        off_x = 1.13 * 2 * rounding * of_x * (1 + u) + gelu * of_x * rounding * (1 + top.clamp(max=40))
        off_x = off_x.expand(*lead, D)
        bounds = {
            "x": off_x,
            "weight": (rounding * (1 + rows) * g * 2 * u * (1 + u)).reshape(rows, D).sum(0),
            "bias": (rounding * (1 + rows) * g).reshape(rows, D).sum(0),
        }
        if add is not None:
            series = rows // max(1, lead[-1]) + 1
            bounds["add"] = (off_x + series * rounding * of_x).reshape(-1 if D * lead[-1] else 0, lead[-1], D).sum(0)
    for (name, grad), value in zip(grads.items(), values_of, strict=True):
        assert grad.dtype == leaves[name].dtype
        assert_within(grad, value, bounds[name] + 2 * torch.finfo(dtype).tiny, name)


@each(of_thin_conv_transpose.IMPLEMENTATIONS, "reference")
@examples(120)
@given(st.data())
def test_thin_conv_transpose(run, data):
    dtype = data.draw(those_that_run(run))
    groups, Cin, Cout = (data.draw(st.integers(1, 3)) for _ in range(3))
    B, H, W = data.draw(st.integers(0, 3)), max(1, data.draw(sizes)), max(1, data.draw(sizes))
    x = data.draw(tensors((B, groups * Cin, H, W), dtype))
    weight = data.draw(tensors((groups * Cin, Cout, 3, 4), wide(dtype), ["normal", "tiny", "zeros", "integers"]))
    bias = data.draw(tensors((groups * Cout,), wide(dtype))) if data.draw(st.booleans()) else None
    generator = torch.Generator().manual_seed(data.draw(seeds))
    grad_y = torch.randn(B, groups * Cout, H, 2 * W, generator=generator, dtype=wide(dtype))
    case = of_thin_conv_transpose.Case(x, weight, bias, groups, grad_y)
    actual = of_thin_conv_transpose.everything(of_thin_conv_transpose.called(run), case)
    doubled = of_thin_conv_transpose.doubled(case)
    expected = of_thin_conv_transpose.everything(of_thin_conv_transpose.exact, doubled)
    # All of it is linear: sizes are the same sums of what has no sign.
    positive = [part.abs() if isinstance(part, torch.Tensor) else part for part in doubled]
    size = of_thin_conv_transpose.everything(of_thin_conv_transpose.exact, of_thin_conv_transpose.Case(*positive))
    terms = {"y": 6 * Cin + 1, "x": 6 * Cout, "weight": B * H * W, "bias": B * H * 2 * W}
    assert actual["y"].dtype == wide(dtype) and actual["y"].is_contiguous() and actual["x"].dtype == dtype
    for name, value in expected.items():
        kept = dtype if name == "x" else wide(dtype)
        bound = (terms[name] + 2) * unit(wide(dtype)) * size[name] + 2 * unit(kept) * value.abs()
        assert_within(actual[name], value, bound + torch.finfo(kept).tiny, name)
