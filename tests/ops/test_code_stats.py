import math

import numpy as np
import pytest
import torch
from capture import replay_of
from implementations import GPU, Implementation, each, implementations, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.ops import code_stats, dispatch
from ncfast.ops.code_stats import why_not


def code_stats_sorted(*arguments, **options):
    """Triton as it does for many codes."""
    from ncfast.ops.triton import code_stats as kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FEW_CODES", 0)
        return code_stats(*arguments, **options)


def code_stats_sorted_by_library(*arguments, **options):
    """For very many."""
    from ncfast.ops.triton import code_stats as kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "MANY_CODES", 0)
        return code_stats_sorted(*arguments, **options)


IMPLEMENTATIONS = implementations(code_stats, why_not)
IMPLEMENTATIONS["triton-sorted"] = Implementation(code_stats_sorted, why_not, "triton", GPU)
every_implementation, every_cpp = each(IMPLEMENTATIONS), each(IMPLEMENTATIONS, "cpp")
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton")
# What overflows in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

NOWHERE = (-1, -(2**40), 2**40)  # and K itself: indices of vectors that count nowhere


def data(M, K, D, *, dtype=torch.float32, seed=0):
    """z [M, D] and indices [M], a tenth of which are out of range."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype)
    indices = torch.randint(0, K, (M,), generator=generator)
    nowhere = torch.tensor([*NOWHERE, K])[torch.randint(0, 4, (M,), generator=generator)]
    return z, torch.where(torch.rand(M, generator=generator) < 0.1, nowhere, indices)


class Oracle:
    """Counts and sums of z [M, D] by code in extended precision, of the codes that occur."""

    def __init__(self, z, indices, K):
        used = (indices >= 0) & (indices < K)
        rows = z[used].double().numpy().astype(np.longdouble)
        self.codes, place = np.unique(indices[used].numpy(), return_inverse=True)
        self.counts = np.bincount(place, minlength=len(self.codes))
        self.sums, self.sizes = np.zeros((2, len(self.codes), z.shape[-1]), np.longdouble)
        np.add.at(self.sums, place, rows)
        np.add.at(self.sizes, place, np.abs(rows))
        self.dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        # In whatever order n terms are summed, none passes through more than n - 1 roundings; one more per partial sum.
        unit = torch.finfo(self.dtype).eps / 2
        self.rounding = 1.01 * unit * (self.counts + 2)[:, None] * self.sizes

    def check(self, result):
        counts, sums = result
        assert counts.dtype == sums.dtype == self.dtype
        assert sums.shape == (*counts.shape, self.sums.shape[-1])
        counts, sums = counts.numpy().copy(), sums.numpy().copy()
        np.testing.assert_array_equal(counts[self.codes], self.counts)
        assert (np.abs(sums[self.codes] - self.sums) <= self.rounding).all()
        counts[self.codes], sums[self.codes] = 0, 0
        assert not counts.any() and not sums.any()  # NaN would count as any


SIZES_K, SIZES_D = (1, 5, 257, 3000), (1, 3, 16, 33, 64, 130, 257, 513)
INTERPRETED = ((1, 1), (1, 257), (5, 3), (5, 130), (5, 513), (257, 16))


@every_implementation
@pytest.mark.parametrize("D", SIZES_D)
@pytest.mark.parametrize("K", SIZES_K)
def test_odd_sizes(run, K, D):
    if run.slow and (K, D) not in INTERPRETED:
        pytest.skip("triton: the interpreter takes the small sizes")
    z, indices = data(500, K, D)
    for M in (1, 63, 500) if run.slow else (0, 1, 7, 63, 129, 500):
        Oracle(z[:M], indices[:M], K).check(run(z[:M], indices[:M], K))


@every_implementation
@pytest.mark.parametrize("K", [9000, 2**16, 2**16 + 1])
def test_many_codes(run, K):
    if run.slow and K > 9000:
        pytest.skip("triton: the interpreter takes the small sizes")
    z, indices = data(300 if run.slow else 5000, K, 5)
    Oracle(z, indices, K).check(run(z, indices, K))


@every_implementation
@pytest.mark.parametrize(("K", "D"), [(1, 1), (5, 3), (3, 0)])
def test_nothing_to_sum(run, K, D):
    for indices in (torch.empty(0, dtype=torch.int64), torch.full((9,), -1), torch.full((300,), K)):
        counts, sums = run(torch.ones(len(indices), D), indices, K)
        assert counts.tolist() == [0] * K
        assert sums.tolist() == [[0.0] * D] * K
    counts, sums = run(torch.ones(4, D), torch.zeros(4, dtype=torch.int64), K)
    assert counts.tolist() == [4] + [0] * (K - 1)
    assert sums.tolist() == [[4.0] * D] + [[0.0] * D] * (K - 1)


@every_implementation
@pytest.mark.parametrize("D", [1, 20])
def test_codes_with_about_as_many_rows_as_a_block(run, D):
    sizes = torch.tensor([0, 1, 127, 128, 129, 0, 255, 256, 257, 384, 385, 511, 512, 513, 1025, 3])
    for seed in range(1 if run.slow else 4):
        generator = torch.Generator().manual_seed(seed)
        # In one seed no row is out of range, so that the first code begins a block.
        outside = (seed > 0) * torch.tensor([40, 50])
        indices = torch.arange(len(sizes)).repeat_interleave(sizes)
        indices = torch.cat([torch.tensor([-1, len(sizes)]).repeat_interleave(outside), indices])
        indices = indices[torch.randperm(len(indices), generator=generator)]
        z = torch.randn(len(indices), D, generator=generator)
        Oracle(z, indices, len(sizes)).check(run(z, indices, len(sizes)))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [5, 70])
def test_dtypes(run, dtype, D):
    z, indices = data(400, 3, D, dtype=dtype)
    Oracle(z, indices, 3).check(run(z, indices, 3))


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value(run, dtype):
    K, D = (11, 97) if run.slow else (64, 1024)
    z = torch.arange(-(2**15), -(2**15) + K * D, dtype=torch.int32)
    z = (z * (2**16 // (K * D))).to(torch.int16).view(dtype).reshape(K, D)
    if run.slow and dtype == torch.bfloat16:
        z[z.abs() < torch.finfo(dtype).tiny] = 0  # the interpreter garbles the subnormals of bfloat16
    _, sums = run(z, torch.arange(K), K)
    np.testing.assert_array_equal(sums, z.float())  # subnormals, infinities and NaNs too


@every_implementation
def test_only_the_sums_of_its_own_code_are_not_finite(run):
    z, indices = data(400, 5, 20)
    z[indices == 3] = torch.nan
    z[(indices < 0) | (indices >= 5)] = torch.inf
    kept = torch.arange(5) != 3
    counts, sums = run(z, indices, 5)
    assert sums[3].isnan().all()
    z[indices == 3], z[(indices < 0) | (indices >= 5)] = 0, 0
    expected_counts, expected = run(z, indices, 5)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(sums[kept], expected[kept])


@every_implementation
def test_all_rows_on_one_code(run):
    z = (0.1 * torch.arange(1, 18)).expand(10_000, 17)  # [M, D]
    indices = torch.full((10_000,), 2)
    expected = z.double().sum(0).numpy()
    # One float32 accumulator is off by about 1e-4 here, always in the same direction.
    naive = np.cumsum(z.numpy(), axis=0, dtype=np.float32)[-1]
    assert np.abs(naive / expected - 1).max() > 5e-5
    counts, sums = run(z, indices, 4)
    assert counts.tolist() == [0, 0, 10_000, 0]
    np.testing.assert_allclose(sums[2], expected, rtol=1e-5)
    assert not sums[[0, 1, 3]].any()


@every_implementation
def test_low_precision_is_summed_in_float32(run):
    counts, sums = run(torch.ones(4097, 1).bfloat16(), torch.zeros(4097, dtype=torch.int64), 1)
    assert counts.item() == sums.item() == 4097


@every_implementation
@pytest.mark.parametrize("K", [5, 300])
def test_batches(run, K):
    parts = [data(300, K, 20, seed=seed) for seed in range(3)]
    parts[1][1].fill_(1)  # many rows on one code in one set, and none in the others
    z, indices = (torch.stack(tensors) for tensors in zip(*parts, strict=True))  # [H, M, D], [H, M]
    counts, sums = run(z, indices, K)
    assert counts.shape == (3, K) and sums.shape == (3, K, 20)
    for head, part in enumerate(parts):
        alone = run(*part, K)
        assert torch.equal(counts[head], alone[0]) and torch.equal(sums[head], alone[1])
    assert run(z[:0], indices[:0], K)[1].shape == (0, K, 20)
    assert not run(z[:, :0], indices[:, :0], K)[1].any()


@every_implementation
def test_non_contiguous(run):
    z, indices = data(200, 3, 6)
    expected = run(z, indices, 3)
    strided, strided_indices = torch.zeros(200, 12), torch.zeros(200, 2, dtype=torch.int64)
    strided[:, ::2], strided_indices[:, 1] = z, indices
    for z_view, index_view in (
        (z.T.contiguous().T, indices),
        (strided[:, ::2], indices),
        (z, strided_indices[:, 1]),
        (strided[:, ::2], strided_indices[:, 1]),
    ):
        assert not (z_view.is_contiguous() and index_view.is_contiguous())
        counts, sums = run(z_view, index_view, 3)
        assert torch.equal(counts, expected[0]) and torch.equal(sums, expected[1])
    counts, sums = run(z[:1].expand(9, 6), torch.tensor(1).expand(9), 3)
    Oracle(z[:1].expand(9, 6), torch.ones(9, dtype=torch.int64), 3).check((counts, sums))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("K", [3, 300])
def test_bitwise_the_same_every_time(run, K, dtype, threads):
    M, K, D = (300, min(K, 9), 40) if run.slow else (5000, K, 70)
    z, indices = data(M, K, D, dtype=dtype)
    answers = []
    for count in (1, 2, 3, 3):
        threads(count)
        answers.append(run(z, indices, K))
    for counts, sums in answers[1:]:
        assert torch.equal(counts, answers[0][0]) and torch.equal(sums, answers[0][1])


@every_implementation
@pytest.mark.parametrize(("M", "K"), [(0, 3), (20, 3), (400, 3), (7, 30), (400, 300)])
def test_every_element_is_written(run, M, K):
    z, indices = data(M, K, 20)
    with poisoned_memory():
        Oracle(z, indices, K).check(run(z, indices, K))


@every_implementation
def test_no_gradient_and_no_change_of_the_inputs(run):
    z, indices = data(40, 3, 5)
    z.requires_grad_()
    before = z.detach().clone(), indices.clone()
    counts, sums = run(z, indices, 3)
    assert not counts.requires_grad and not sums.requires_grad
    assert torch.equal(z, before[0]) and torch.equal(indices, before[1])


def test_sorted_by_a_library_for_triton():
    run = Implementation(code_stats_sorted_by_library, why_not, "triton", GPU)
    parts = [data(300, 20, 5, seed=seed) for seed in range(2)]
    parts[1][1].fill_(1)
    for z, indices in parts:
        for M in (1, 63, 300):
            Oracle(z[:M], indices[:M], 20).check(run(z[:M], indices[:M], 20))
    counts, sums = run(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)), 20)
    for head, (z, indices) in enumerate(parts):
        Oracle(z, indices, 20).check((counts[head], sums[head]))
    counts, sums = run(torch.ones(300, 5), torch.full((300,), -1), 20)
    assert not counts.any() and not sums.any()


@each(IMPLEMENTATIONS, "triton-sorted")
def test_counts_of_many_chunks(run, monkeypatch):
    """More than are added up at a time."""
    from ncfast.ops.triton import code_stats as kernels

    blocks = kernels.blocks_of_scan
    monkeypatch.setattr(kernels, "blocks_of_scan", lambda K: {**blocks(K), "BLOCK_C": 2})
    z, indices = data(1300, 20, 3)
    Oracle(z, indices, 20).check(run(z, indices, 20))


class LeftOut:
    """A kernel that is not compiled yet, while `engine.compile_ahead` runs."""

    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@each(IMPLEMENTATIONS, "triton-sorted")
@pytest.mark.parametrize(
    "names", ["rank", "scan", "order", "piece", "sum", "rank scan", "scan order", "rank scan order"]
)
def test_a_kernel_that_is_left_out_sends_no_other_astray(run, names, monkeypatch):
    from ncfast.ops.triton import code_stats as kernels

    made = []

    def guarded(*shape, device, dtype=torch.int64):
        """Zeros inside a tensor, whose other elements have to stay."""
        whole = torch.full(
            (math.prod(shape) + 2 * 512,), 0 if dtype == torch.int64 else -12345, dtype=dtype, device=device
        )
        made.append((whole, whole.clone()))
        return whole[512:-512].view(shape).zero_()

    monkeypatch.setattr(dispatch, "empty_indices", guarded)
    for name in names.split():
        monkeypatch.setattr(kernels, f"code_stats_{name}_kernel", LeftOut())
    z = torch.ones(2, 300, 4)
    z[:, 0] = torch.nan  # where a place points that nobody wrote
    indices = torch.tensor([-1, 0, 1, 2]).repeat_interleave(torch.tensor([1, 10, 10, 279])).expand(2, 300)
    _, sums = run(z, indices, 3)
    for whole, before in made:
        assert torch.equal(whole[:512], before[:512]) and torch.equal(whole[-512:], before[-512:])
    if names not in ("piece", "sum"):
        assert (sums <= 279).all()  # not NaN


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "K"), [(20_000, 4), (5000, 3000), (5000, 2**16 + 1)])
def test_no_synchronisation_and_a_cuda_graph(M, K):
    z, indices = (x.cuda() for x in data(M, K, 40))
    replay = replay_of(lambda: code_stats(z, indices, K, impl="triton"))
    _, sums = replay()
    z.mul_(2)
    assert torch.equal(replay()[1], 2 * sums)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GB of GPU memory")
    M, D, few = 2**31 // 64 + 500, 64, 300
    z = torch.zeros(M, D, dtype=torch.bfloat16, device="cuda")
    indices = torch.full((M,), -1, device="cuda")
    last, last_indices = data(few, 3, D, dtype=torch.bfloat16)
    z[-few:], indices[-few:] = last.cuda(), last_indices.cuda()
    Oracle(last, last_indices, 3).check(tuple(x.cpu() for x in code_stats(z, indices, 3, impl="triton")))


@needs_triton
def test_triton_kernels_compile_offline():
    from ncfast.ops.triton import code_stats as kernels

    indices = dict.fromkeys(("indices", "ends", "order"), "*i64")
    indices |= dict.fromkeys(("partial_counts", "ranks", "sizes", "before", "totals", "begins", "part_totals"), "*i32")
    types = {**indices, **dict.fromkeys(("partials", "counts", "sums"), "*fp32")}
    piece = {"PIECE": kernels.PIECE}
    jobs = [
        (name, {**types, "z": z}, {"D": 64, **each})
        for z in ("*fp32", "*bf16")
        for name, each in (
            ("code_stats_product_kernel", {**kernels.product_blocks(128, 64), "INTERPRETED": False}),
            ("code_stats_piece_kernel", piece | kernels.blocks_of_piece(64)),
            ("code_stats_sum_kernel", piece | kernels.sum_blocks(65536, 1024, 64)),
        )
    ]
    jobs += [("code_stats_add_kernel", types, {"D": 64, **kernels.ADD_BLOCKS})]
    for K in (1024, kernels.MANY_CODES):
        rank, scan = kernels.blocks_of_rank(K), kernels.blocks_of_scan(K)
        order = {"ROWS": rank["ROWS"], "BLOCK_K": scan["BLOCK_K"], "PARTS": K // scan["BLOCK_K"]}
        jobs += [
            ("code_stats_rank_kernel", types, rank),
            ("code_stats_scan_kernel", types, scan),
            ("code_stats_order_kernel", types, order | kernels.ORDER_BLOCKS),
        ]
    for used in compile_offline("ncfast.ops.triton.code_stats", jobs):
        assert used["stack"] == 0


@pytest.mark.parametrize(
    ("z", "indices", "num_codes", "options", "message"),
    [
        ((3, 2), (4,), 5, {}, r"z is \[M, D\] with indices \[M\], or .*; got \[3, 2\] and \[4\]"),
        ((2, 3, 2), (3,), 5, {}, r"got \[2, 3, 2\] and \[3\]"),
        ((3,), (), 5, {}, r"got \[3\] and \[\]"),
        ((1, 1, 3, 2), (1, 1, 3), 5, {}, r"got \[1, 1, 3, 2\] and \[1, 1, 3\]"),
        ((3, 2), (3,), 0, {}, "num_codes is 1 or more; got 0"),
        ((3, 2), (3,), 5, {"impl": "cuda"}, "has the implementations .* got impl='cuda'"),
    ],
)
def test_refuses_what_does_not_fit(z, indices, num_codes, options, message):
    with pytest.raises(ValueError, match=f"code_stats.*{message}"):
        code_stats(torch.zeros(z), torch.zeros(indices, dtype=torch.int64), num_codes, **options)


def test_refuses_dtypes_and_devices():
    z, indices = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"z is float32, float64, float16 or bfloat16; got torch.int64"):
        code_stats(z.long(), indices, 5)
    with pytest.raises(ValueError, match=r"indices are int64; got torch.int32"):
        code_stats(z, indices.int(), 5)
    with pytest.raises(ValueError, match="z is on meta and indices on cpu; move one"):
        code_stats(z.to("meta"), indices, 5)


def test_explicit_request_that_cannot_be_met():
    z, indices = torch.zeros(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"float64 input: Triton has no path|triton is not installed|off a GPU"):
        code_stats(z, indices, 5, impl="triton")
