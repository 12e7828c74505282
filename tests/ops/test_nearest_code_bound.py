"""The error bounds of docs/nearest_code_cuda.md and of the Triton kernel, on emulations of tensor cores."""

import math
import re
from pathlib import Path

import pytest
import torch
from offline import needs_triton

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "nearest_code"
ROUNDING, KEYS, RESIDENT = ((SOURCES / name).read_text() for name in ("rounding.cuh", "group_keys.cuh", "resident.cuh"))


def constants(pattern, text):
    """The numbers of a line of the source, so that a change there is one here."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found]


SUM, SUM_MORE, SUM_UNIT = constants(
    r"return ([\d.]+)f \* float\(ceil_div\(D, 16\) \* 16 \+ (\d+)\) \* 0x1p(-\d+)f", ROUNDING
)
BIAS, BIAS_MORE, BIAS_UNIT, FAR = constants(
    r"\(chunks \* (\d+) \+ (\d+)\) \* 0x1p(-\d+)f \* \(magnitude.*\) \+ codes.bias \* 0x1p(-\d+)f", ROUNDING
)
SAMPLED, TOP = (int(constants(rf"int {name} = (\d+);", RESIDENT)[0]) for name in ("kSampledCodes", "kSampledTop"))
(WINDOW,) = map(float, re.findall(r"float window = ([\d.]+)f \* error", ROUNDING))
KEY, KEY_LEAST = constants(r"best - \(window \+ 0x1p(-\d+)f \* \(fabsf\(best\) \+ window\) \+ 0x1p(-\d+)f\)", KEYS)


def scale_exponents(largest, top=14):
    """[..] float64 powers of two that take `largest` to [2^top, 2^(top + 1))."""
    exponents = torch.where(largest > 0, top - torch.frexp(largest).exponent + 1, 0)
    return exponents.clamp(-126, 126)


def cut(x, unit):
    """Towards zero to a multiple of `unit`."""
    return torch.trunc(x / unit) * unit


def tensor_core_sum(z, e, block):
    """z·e [M, K] of fp16 z [M, D], e [K, D]: blocks are aligned with their largest term and cut to 24 bits."""
    total = torch.zeros(len(z), len(e), dtype=torch.float64)
    for first in range(0, z.shape[1], block):
        products = z[:, None, first : first + block] * e[None, :, first : first + block]  # [M, K, block]
        terms = torch.cat([products, total[..., None]], -1)
        largest = terms.abs().amax(-1, keepdim=True)
        unit = torch.exp2(torch.frexp(largest).exponent.double() - 24)
        total = cut(terms, unit).sum(-1)
        total = cut(total, torch.exp2(torch.frexp(total).exponent.double() - 24))
    return total


def emulate(z, codebook, block, mean=None, step=1):
    """(scores, exact scores, error bound), in the scaled units of each row: [M, K], [M, K], [M].

    Mean and scale are those of every `step`th code.
    """
    D = z.shape[1]
    mean = codebook[::step].mean(0) if mean is None else mean
    z_centred, e_centred = z - mean, codebook - mean  # float32
    b = scale_exponents(e_centred[::step].abs().max(), 14 if step == 1 else TOP)
    a = torch.minimum(scale_exponents(z_centred.abs().amax(1)), b + 100)  # [M]
    z_scaled, e_scaled = torch.ldexp(z_centred, a[:, None]), torch.ldexp(e_centred, b)
    z_half, e_half = z_scaled.half().double(), e_scaled.half().double()
    bias = -0.5 * e_scaled.square().sum(-1).double()  # [K], of float32 sums
    factor = torch.exp2((a - b).clamp(min=-100).double())  # [M]
    scores = (tensor_core_sum(z_half, e_half, block) + factor[:, None] * bias).float().double()

    exact_z, exact_e = z.double() - mean.double(), codebook.double() - mean.double()
    exact = torch.exp2((a[:, None] + b).double()) * (exact_z @ exact_e.T - 0.5 * exact_e.square().sum(-1))

    norm, rest = z_half.norm(dim=1), (z_half - z_scaled.double()).norm(dim=1)  # [M]
    e_rest = (e_half - e_scaled.double()).norm(dim=1).max()
    e_norm, e_bias = e_half.norm(dim=1).max() + e_rest, -bias.min()
    padded = math.ceil(D / 16) * 16
    bound = norm * e_rest + rest * e_norm + SUM * (padded + SUM_MORE) * 2.0**SUM_UNIT * norm * e_norm
    roundings = (math.ceil(D / 64) * BIAS + BIAS_MORE) * 2.0**BIAS_UNIT
    bound += roundings * (norm * e_norm + factor * e_bias) + 2.0**FAR * e_bias
    return scores, exact, WINDOW / 2 * bound


def group_keys(scores):
    """[M, K / 4] greatest scores of four codes, their last 3 of 24 bits replaced by a number, as float64 numbers."""
    greatest = scores.float().unflatten(1, (-1, 4)).amax(-1)
    numbers = torch.arange(greatest.shape[1], dtype=torch.int32) % 8
    return ((greatest.view(torch.int32) & ~7) | numbers).view(torch.float32).double()


def lowest_key(best, window):
    """In float32, as the kernel does it."""
    best, window = best.float(), window.float()
    return (best - (window + 2.0**KEY * (best.abs() + window) + 2.0**KEY_LEAST)).double()


def cut_terms(D=256):
    """z [1, D], codebook [2, D] with a mean of 0: one large product, and beside it terms that are cut away whole."""
    z = torch.full((D,), 5.65625)  # squared 31.99: just below the unit, 32, of 2^28 in 24 bits
    code = z.clone()
    z[0], code[0] = 2.0**14, 2.0**14 * (1 + 2.0**-10)
    return z[None], torch.stack([code, -code])


def next_up(x):
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def data(name, M=60, K=90, D=40):
    generator = torch.Generator().manual_seed(4)
    z, codebook = torch.randn(M, D, generator=generator), torch.randn(K, D, generator=generator)
    if name == "positive":  # every cut goes the same way
        z, codebook = z.abs() + 1, codebook.abs() + 1
    elif name.startswith("offset"):
        z, codebook = z + float(name[6:]), codebook + float(name[6:])
    elif name == "one_large_component":
        z[:, 0] *= 1e4
        codebook[:, 0] *= 1e4
    elif name == "one_large_code":
        codebook[3] *= 1e6
    elif name == "one_ulp":
        codebook[K // 2 :] = next_up(codebook[: K - K // 2])
        z = codebook[torch.arange(M) % K] + 1e-5 * z
    elif name == "duplicates":
        codebook = codebook[torch.arange(K) % 7]
    elif name in ("1e30", "1e-30"):
        z, codebook = z * float(name), codebook * float(name)
    elif name == "far_rows":
        z = z * 10.0 ** torch.linspace(-35, 35, M)[:, None]
    elif name == "wide":
        z = z * 10.0 ** torch.linspace(-10, 0, D)
    elif name == "vqgan_init":
        codebook = (torch.rand(K, D, generator=generator) * 2 - 1) / K
    return z, codebook


DATA = [
    *("gauss", "positive", "offset4", "offset1000", "one_large_component", "one_large_code", "one_ulp", "duplicates"),
    *("1e30", "1e-30", "far_rows", "wide", "vqgan_init"),
]


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("name", DATA)
def test_scores_are_within_the_bound(name, block):
    z, codebook = data(name)
    scores, exact, bound = emulate(z, codebook, block)
    assert (bound.isfinite() & (bound >= 0)).all()
    # What float64 itself may be off by, as the exact scores are formed from centred data.
    slack = 1e-14 * exact.abs().amax(-1)
    assert ((scores - exact).abs() <= (bound + slack)[:, None]).all()


def test_the_bound_of_the_sum_is_not_twice_what_it_must_be():
    z, codebook = cut_terms()
    scores, exact, bound = emulate(z, codebook, 4)
    error = (scores - exact).abs().amax()
    assert bound / 2 < error <= bound


@pytest.mark.parametrize("name", DATA)
def test_the_nearest_code_is_never_ruled_out(name):
    z, codebook = data(name)
    scores, exact, bound = emulate(z, codebook, 16)
    # By the scores: from rows that are far enough float64 distances to all codes are the same.
    nearest = exact.argmax(-1)
    reached = scores >= (scores.amax(-1) - 2 * bound)[:, None]
    assert reached.gather(1, nearest[:, None]).all()


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", DATA)
def test_the_group_of_the_nearest_code_is_never_ruled_out(name, fast):
    z, codebook = data(name, K=92)
    scores, exact, bound = emulate(z, codebook, 16)
    nearest = (scores if fast else exact).argmax(-1)
    window = torch.zeros_like(bound) if fast else 2 * bound
    keys = group_keys(scores)
    reached = keys >= lowest_key(keys.amax(-1), window)[:, None]
    assert reached.gather(1, nearest[:, None] // 4).all()


def test_keys_that_move_apart_by_all_that_they_can():
    unit = 2.0**-23
    scores = torch.full((1, 32), -1.0, dtype=torch.float64)
    scores[0, 31] = 1 + 16 * unit  # the greatest: its key is 7 units more
    scores[0, 0] = 1 + 7 * unit  # 9 units less; its key is 7 units less again
    keys = group_keys(scores)
    assert keys[0, 7] - keys[0, 0] == 23 * unit
    assert keys[0, 0] >= lowest_key(keys[0, 7], torch.tensor(9 * unit))


def test_keys_leave_few_more_rows_open():
    z, codebook = data("gauss", M=300, K=1024, D=64)
    scores, _, bound = emulate(z, codebook, 16)
    keys = group_keys(scores)
    by_score = scores.unflatten(1, (-1, 4)).amax(-1) >= (scores.amax(-1) - 2 * bound)[:, None]
    by_key = keys >= lowest_key(keys.amax(-1), 2 * bound)[:, None]
    assert ((by_key.sum(-1) > 1).double() - (by_score.sum(-1) > 1).double()).mean() < 0.01


def test_any_centre_will_do():
    z, codebook = data("offset4")
    for mean in (torch.zeros(40), codebook[0], 100 * codebook[1]):
        scores, exact, bound = emulate(z, codebook, 16, mean)
        assert ((scores - exact).abs() <= bound[:, None]).all()


@pytest.mark.parametrize("name", DATA)
def test_the_mean_and_the_scale_of_some_codes_will_do(name):
    z, codebook = data(name)
    if name == "one_large_code":
        codebook[3] *= 1e-5  # what fits beside the sample, which does not have it
    scores, exact, bound = emulate(z, codebook, 16, step=4)
    assert bound.isfinite().all()
    slack = 1e-14 * exact.abs().amax(-1)
    assert ((scores - exact).abs() <= (bound + slack)[:, None]).all()


@pytest.mark.parametrize("step", [1, 1024 // SAMPLED])
def test_the_bound_rules_most_codes_out(step):
    z, codebook = data("gauss", M=300, K=1024, D=64)
    scores, _, bound = emulate(z, codebook, 16, step=step)
    candidates = (scores >= (scores.amax(-1) - 2 * bound)[:, None]).sum(-1)
    assert (candidates > 1).double().mean() < 0.08
    assert candidates.max() < 5


def first_11_bits(x, half=0x1000):
    """float32 as two TF32 parts have it, or what a tensor core cuts off (`half` 0)."""
    return ((x.view(torch.int32) + half) & -0x2000).view(torch.float32)


def emulate_triton(z, codebook, block, block_d):
    """(scores, exact scores, error bound) of the Triton kernel: [M, K], [M, K], [M]."""
    from ncfast.ops.triton.nearest_code import error_terms

    scores = torch.zeros(len(z), len(codebook))
    for first in range(0, z.shape[1], block_d):
        z_tile, e_tile = z[:, first : first + block_d], codebook[:, first : first + block_d]
        z_high, e_high = first_11_bits(z_tile), first_11_bits(e_tile)
        z_low, e_low = (first_11_bits(rest, 0) for rest in (z_tile - z_high, e_tile - e_high))
        # One chain of sums.
        left, right = torch.cat([z_low, z_high, z_high], 1), torch.cat([e_high, e_low, e_high], 1)
        scores += tensor_core_sum(left.double(), right.double(), block).float()
    half_square = 0.5 * codebook.square().sum(-1)
    exact = z.double() @ codebook.double().T - 0.5 * codebook.double().square().sum(-1)
    products, squares, underflow = error_terms(z.shape[1], block_d)
    z_norm, e_norm = z.norm(dim=1), codebook.norm(dim=1).max()
    bound = products * z_norm * e_norm + squares * half_square.max() + underflow * (1 + z_norm + e_norm)
    return (scores - half_square).double(), exact, bound.double()


@needs_triton
@pytest.mark.parametrize("block_d", [16, 64])
@pytest.mark.parametrize("block", [4, 8])
@pytest.mark.parametrize("name", [name for name in DATA if name not in ("1e30", "1e-30", "far_rows")])
def test_scores_of_triton_are_within_the_bound(name, block, block_d):
    scores, exact, bound = emulate_triton(*data(name, D=48), block, block_d)
    assert ((scores - exact).abs() <= bound[:, None]).all()


@needs_triton
def test_the_bound_of_triton_leaves_few_rows_open_and_is_not_ten_times_what_it_must_be():
    scores, _, bound = emulate_triton(*data("gauss", M=3000, K=32, D=64), 8, 64)
    best, second = scores.topk(2).values.T
    assert (best - second <= 2 * bound).double().mean() < 0.003
    scores, exact, bound = emulate_triton(*(x[:, :64] for x in cut_terms()), 4, 64)
    assert bound / 10 < (scores - exact).abs().amax() <= bound
