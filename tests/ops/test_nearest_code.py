import functools

import numpy as np
import pytest
import torch
from implementations import each, implementations

from ncfast.ops import dispatch, nearest_code
from ncfast.ops.nearest_code import why_not

IMPLEMENTATIONS = implementations(nearest_code, why_not, cuda=True)
every_implementation, every_cpp = each(IMPLEMENTATIONS), each(IMPLEMENTATIONS, "cpp")
# What overflows in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared_distances(z, codebook):
    """[M, K], as exact as numpy has it."""
    z, codebook = (x.double().numpy().astype(np.longdouble) for x in (z, codebook))
    distances = np.empty((len(z), len(codebook)), np.longdouble)
    for row, x in enumerate(z):
        distances[row] = np.square(x - codebook).sum(-1)
    return distances


class Oracle:
    """The answers for z [M, D] and codebook [K, D], all finite, from squared differences in extended precision."""

    def __init__(self, z, codebook, *, exact_ties=False):
        self.distances = squared_distances(z, codebook)  # [M, K]
        self.nearest = self.distances.argmin(-1)  # [M]
        self.least = self.distances.min(-1)  # [M]
        # What the same sums may be off by in float64, with |z·e| terms in place of differences.
        size = np.square(np.linalg.norm(z.double(), axis=-1) + np.linalg.norm(codebook.double(), axis=-1).max())
        self.rounding = (0 if exact_ties else 4 * (z.shape[-1] + 2) * 2.0**-53) * size  # [M]
        first = {}
        codes = (codebook.double().numpy() + 0.0).tolist()  # + 0.0: the two zeros are equal
        # The first code with the same values.
        self.first_equal = np.array([first.setdefault(tuple(code), k) for k, code in enumerate(codes)])  # [K]

    def check(self, indices, rows=slice(None)):
        indices = indices.numpy()
        distances, least, rounding = self.distances[rows], self.least[rows], self.rounding[rows]
        assert indices.dtype == np.int64 and indices.shape == least.shape
        assert ((indices >= 0) & (indices < distances.shape[1])).all()
        chosen = np.take_along_axis(distances, indices[:, None], 1)[:, 0]
        assert (chosen <= least + rounding).all()
        clear = (distances <= (least + rounding)[:, None]).sum(-1) == 1
        np.testing.assert_array_equal(indices[clear], self.nearest[rows][clear])
        np.testing.assert_array_equal(self.first_equal[indices], indices)
        if not rounding.any():
            np.testing.assert_array_equal(indices, self.nearest[rows])


def next_up(x, times):
    for _ in range(times):
        x = torch.nextafter(x, torch.full_like(x, torch.inf))
    return x


@functools.cache
def data(name, M=129, K=257, D=33):
    """z [M, D] and codebook [K, D], float32, and their oracle."""
    generator = torch.Generator().manual_seed(1)
    z, codebook = torch.randn(M, D, generator=generator), torch.randn(K, D, generator=generator)
    some = torch.randint(0, K, (M,), generator=generator)
    exact_ties = False
    if name == "trained":
        z = codebook[some] + 0.3 * z
    elif name.startswith("offset"):
        z, codebook = z + float(name[6:]), codebook + float(name[6:])
    elif name == "far_codes":
        codebook = codebook + 100
    elif name == "sphere":
        z, codebook = (torch.nn.functional.normalize(x, dim=-1) for x in (z, codebook))
    elif name == "duplicates":
        codebook = codebook[torch.randint(0, K // 3 + 1, (K,), generator=generator)]
    elif name == "one_code_repeated":
        codebook = codebook[:1].repeat(K, 1)
    elif name == "one_ulp":
        # Neighbours of a few codes, one to three representable numbers away in one component each.
        codebook = codebook[torch.arange(K) % 5].clone()
        column = torch.randint(0, D, (K,), generator=generator)
        for k in range(5, K):
            codebook[k, column[k]] = next_up(codebook[k, column[k]], 1 + k % 3)
        z = codebook[some] + 1e-4 * z
    elif name == "vqgan_init":
        codebook = (torch.rand(K, D, generator=generator) * 2 - 1) / K
    elif name == "outlier":
        codebook[K // 2] = 1e15
    elif name == "mixed_scales":
        # Squares overflow float32 for some codes, and those are the nearest of some rows.
        codebook = codebook * 10.0 ** torch.linspace(-19, 19, K)[:, None]
        z = codebook[some] * (1 + 1e-3 * z)
    elif name == "near_max":
        # What a kernel that shifts the data to their centre would make infinite.
        codebook = 2e38 + 1e36 * codebook
        codebook[1::50] = -3e38
        z = codebook[some] + 1e36 * z
        z[::4] = -3e38
    elif name in ("huge", "tiny", "subnormal"):
        scale = {"huge": 1e30, "tiny": 1e-30, "subnormal": 1e-39}[name]
        z, codebook = z * scale, codebook * scale
    elif name == "integers":
        z, codebook = (torch.randint(-1, 2, x.shape, generator=generator).float() for x in (z, codebook))
        exact_ties = True
    elif name == "zeros":
        z, codebook, exact_ties = torch.zeros(M, D), torch.zeros(K, D), True
    else:
        assert name == "gauss"
    return z, codebook, Oracle(z, codebook, exact_ties=exact_ties)


HARD = [
    *("gauss", "trained", "offset4", "offset1000", "far_codes", "sphere", "duplicates", "one_code_repeated", "one_ulp"),
    *("vqgan_init", "outlier", "mixed_scales", "near_max", "huge", "tiny", "subnormal", "integers", "zeros"),
]


@every_implementation
@pytest.mark.parametrize("name", HARD)
def test_hard_data(run, name):
    z, codebook, oracle = data(name, M=40, K=70, D=20) if run.slow else data(name)
    oracle.check(run(z, codebook))


@every_implementation
@pytest.mark.parametrize("name", HARD)
def test_hard_data_with_fewer_codes_than_lanes(run, name):
    z, codebook, oracle = data(name, M=20, K=3, D=5)
    oracle.check(run(z, codebook))


def test_hard_data_is_hard():
    """Where the float32 formula fails, so would a kernel that trusted it."""
    for name in ("one_ulp", "offset1000", "huge"):
        z, codebook, oracle = data(name)
        naive = torch.addmm(-0.5 * codebook.square().sum(-1), z, codebook.T).argmax(-1)
        with pytest.raises(AssertionError):
            oracle.check(naive)
    z, codebook, oracle = data("integers")
    assert ((oracle.distances == oracle.least[:, None]).sum(-1) > 1).any()


@every_implementation
@pytest.mark.parametrize("K", [6, 64])
def test_distances_that_differ_by_less_than_float32_scores_can_tell(run, K):
    heads, D = (4, 200) if run.slow else (40, 600)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(heads, 1, D, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(heads, K, D, generator=generator), dim=-1)
    codebook = z + 5 * direction  # [heads, K, D], at distances that only their rounding tells apart
    indices = run(z, codebook)
    naive = torch.baddbmm(-0.5 * codebook.square().sum(-1)[:, None], z, codebook.mT).argmax(-1)
    assert (naive != indices).any()
    for head in range(heads):
        Oracle(z[head], codebook[head]).check(indices[head])


ODD_K, ODD_D = (1, 5, 31, 1031), (1, 2, 3, 17, 64, 100)


@every_implementation
@pytest.mark.parametrize("D", ODD_D)
@pytest.mark.parametrize("K", ODD_K)
def test_odd_sizes(run, K, D):
    if run.slow and (K, D) not in ((1, 1), (5, 3), (31, 17), (31, 64)):
        pytest.skip("triton: the interpreter takes the small sizes")
    z, codebook, oracle = data("gauss", M=500, K=K, D=D)
    for M in (0, 1, 7, 63) if run.slow else (0, 1, 7, 63, 129, 500):
        oracle.check(run(z[:M], codebook), slice(M))


@every_implementation
@pytest.mark.parametrize(("M", "K", "D"), [(30, 300, 513), (3, 5000, 8), (1, 2, 3000)])
def test_long_codes_and_many_codes(run, M, K, D):
    if run.slow:
        M, K = min(M, 4), min(K, 130)
    z, codebook, oracle = data("gauss", M=M, K=K, D=D)
    oracle.check(run(z, codebook))


@every_implementation
def test_zero_dimensions(run):
    # All codes are at distance 0.
    assert run(torch.zeros(5, 0), torch.zeros(3, 0)).tolist() == [0] * 5


@every_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_row_that_is_not_finite(run, bad):
    z, codebook = randn(20, 9), randn(33, 9, seed=1)
    expected = run(z, codebook)
    z[::3, 4] = bad
    expected[::3] = 0
    assert torch.equal(run(z, codebook), expected)
    codebook[0, 0] = torch.nan
    assert not run(z, codebook)[::3].any()


@every_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_code_that_is_not_finite(run, bad):
    z, codebook = randn(20, 9), randn(33, 9, seed=1)
    spoilt = torch.zeros(33, dtype=torch.bool)
    spoilt[[0, 7, 32]] = True
    kept = torch.arange(33)[~spoilt]
    expected = kept[run(z, codebook[~spoilt])]
    # It would be the nearest of all, but for one component.
    codebook[spoilt] = z[:3]
    codebook[spoilt, 8] = bad
    assert torch.equal(run(z, codebook), expected)
    assert not run(z, torch.full_like(codebook, bad)).any()


@every_implementation
def test_non_contiguous(run):
    z, codebook, oracle = data("gauss", M=42, K=31, D=6)
    transposed = z.T.contiguous().T
    strided = torch.zeros(42, 12)
    strided[:, ::2] = z
    for view in (transposed, strided[:, ::2]):
        assert not view.is_contiguous()
        oracle.check(run(view, codebook))
        oracle.check(run(z, codebook.T.contiguous().T))
    assert torch.equal(run(z[:1].expand(5, 6), codebook), run(z[:1], codebook).expand(5))
    assert torch.equal(run(z.reshape(2, 3, 7, 6), codebook), run(z, codebook).reshape(2, 3, 7))
    assert run(z[0], codebook).shape == ()


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@every_implementation
@pytest.mark.parametrize("codebook_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(run, dtype, codebook_dtype):
    M, K, D = (20, 31, 11) if run.slow else (129, 257, 33)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype)
    codebook = torch.randn(K, D, generator=generator, dtype=torch.float64).to(codebook_dtype)
    Oracle(z, codebook).check(run(z, codebook))


@every_implementation
@pytest.mark.parametrize("offset", [0, 50])  # far from the origin a kernel may shift the data
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value(run, dtype, offset):
    z = torch.arange(-(2**15), 2**15, 97 if run.slow else 1, dtype=torch.int16).view(dtype)[:, None]  # [M, 1]
    codebook = offset + torch.linspace(-3, 3, 31)[:, None]
    indices = run(z, codebook)
    finite = z.isfinite().all(-1)
    assert not indices[~finite].any()
    Oracle(z[finite], codebook).check(indices[finite])


@every_implementation
def test_float64_is_not_rounded_to_float32(run):
    codebook = 1 + 1e-7 * torch.arange(40, dtype=torch.float64)[:, None]  # [K, 1]
    z = codebook[[3, 0, 39, 17]] + 1e-9
    assert run(z, codebook).tolist() == [3, 0, 39, 17]


@every_cpp
def test_float64_distances_decide_where_scores_cancel(run):
    codebook = 1 + 1e-12 * torch.arange(40, dtype=torch.float64)[:, None]  # [K, 1]
    z = codebook[[3, 0, 39, 17]] + 1e-14
    assert run(z, codebook).tolist() == [3, 0, 39, 17]


@every_implementation
def test_float64_that_overflows_is_still_answered(run):
    z, codebook = (1e200 * randn(n, 5, seed=n).double() for n in (6, 9))
    indices = run(z, codebook)
    assert ((indices >= 0) & (indices < 9)).all()


@every_cpp
def test_float64_code_whose_square_overflows(run):
    codebook = torch.tensor([[1.0], [1.35e154], [-3.0]], dtype=torch.float64)
    z = torch.tensor([[1.2e154], [0.0], [-2.0]], dtype=torch.float64)
    assert run(z, codebook).tolist() == [1, 0, 2]


@every_implementation
@pytest.mark.parametrize("shape", [(24,), (4, 6), ()])
def test_batched_codebooks(run, shape):
    z, codebook = randn(3, *shape, 10), randn(3, 31, 10, seed=1)
    indices = run(z, codebook)
    assert indices.shape == (3, *shape)
    for head in range(3):
        assert torch.equal(indices[head], run(z[head], codebook[head]))


@every_implementation
def test_empty_batch(run):
    assert run(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0,)
    assert run(torch.zeros(2, 0, 4), torch.zeros(3, 4)).shape == (2, 0)
    assert run(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)).shape == (2, 0)
    assert run(torch.zeros(0, 5, 4), torch.zeros(0, 3, 4)).shape == (0, 5)


@every_implementation
def test_every_index_is_written(run, poisoned_empty):
    z, codebook, oracle = data("gauss", M=40, K=31, D=20)
    oracle.check(run(z, codebook))
    z[5] = torch.nan
    try:
        assert run(z, codebook)[5] == 0
    finally:
        data.cache_clear()


@every_implementation
def test_precision_fast_is_accepted(run):
    z, codebook, oracle = data("trained", M=40, K=31, D=20)
    oracle.check(run(z, codebook, precision="fast"))


@every_implementation
def test_no_gradient_and_no_change_of_the_inputs(run):
    z, codebook = randn(9, 4).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
    before = z.detach().clone(), codebook.detach().clone()
    assert not run(z, codebook).requires_grad
    assert torch.equal(z, before[0]) and torch.equal(codebook, before[1])


@every_cpp
@pytest.mark.parametrize("name", ["gauss", "one_ulp", "duplicates", "offset1000"])
def test_thread_count_does_not_matter(run, name, threads):
    z, codebook, _ = data(name, M=500, K=1031, D=17)
    for M in (1, 15, 500):
        answers = []
        for count in (1, 2, 3, 7):
            threads(count)
            answers.append(run(z[:M], codebook))
        assert all(torch.equal(answer, answers[0]) for answer in answers)


@every_cpp
def test_flushed_subnormals_do_not_matter(run):
    z, codebook, oracle = data("subnormal")
    half = torch.arange(1, 1024, dtype=torch.int16).view(torch.float16)[:, None]  # the subnormals of float16
    half_codes = torch.linspace(0, 6e-5, 31)[:, None]
    expected = run(half, half_codes)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        indices, half_indices = run(z, codebook), run(half, half_codes)
    finally:
        torch.set_flush_denormal(False)
    oracle.check(indices)
    assert torch.equal(half_indices, expected)


def test_unknown_isa_names_the_available_ones(monkeypatch):
    module, reason = dispatch.load_module("_C")
    if module is None:
        pytest.skip(reason)
    monkeypatch.setenv("NCFAST_ISA", "mmx")
    with pytest.raises(
        ValueError, match=f"NCFAST_ISA=mmx is not available; this machine has {', '.join(module.isas())}"
    ):
        nearest_code(torch.zeros(1, 1), torch.zeros(1, 1), impl="cpp")


@pytest.mark.parametrize(
    ("z", "codebook", "options", "message"),
    [
        ((2, 3), (4, 3), {"precision": "double"}, "precision is 'exact' or 'fast'; got 'double'"),
        ((2, 3), (4, 3), {"impl": "numpy"}, "has the implementations .* got impl='numpy'"),
        ((2, 3), (3,), {}, r"codebook is \[K, D\] or \[H, K, D\]; got \[3\]"),
        ((2, 3), (1, 1, 4, 3), {}, r"codebook is \[K, D\] or \[H, K, D\]; got \[1, 1, 4, 3\]"),
        ((), (4, 3), {}, r"D = 3; got z \[\]"),
        ((3,), (2, 4, 3), {}, r"D = 3; got z \[3\]"),
        ((2, 5), (4, 3), {}, r"D = 3; got z \[2, 5\]"),
        ((3, 2, 5), (2, 4, 5), {}, r"with 2 codebooks z is \[2, ..., D\]; got \[3, 2, 5\]"),
        ((2, 3), (0, 3), {}, "the codebook holds no code"),
    ],
)
def test_refuses_what_does_not_fit(z, codebook, options, message):
    with pytest.raises(ValueError, match=f"nearest_code.*{message}"):
        nearest_code(torch.zeros(z), torch.zeros(codebook), **options)


def test_refuses_dtypes_and_devices():
    z, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"z is float32, float64, float16 or bfloat16; got torch.int64"):
        nearest_code(z.long(), codebook)
    with pytest.raises(ValueError, match=r"codebook is float32, float64, float16 or bfloat16; got torch.complex64"):
        nearest_code(z, codebook.cfloat())
    with pytest.raises(ValueError, match="z is on meta and the codebook on cpu; move one"):
        nearest_code(z.to("meta"), codebook)


def test_explicit_request_that_cannot_be_met():
    z, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match="nearest_code: impl='cuda' cannot run this call: "):
        nearest_code(z, codebook, impl="cuda")
    with pytest.raises(
        RuntimeError, match=r"float64 input: Triton has no exact path|triton is not installed|off a GPU"
    ):
        nearest_code(z.double(), codebook, impl="triton")
