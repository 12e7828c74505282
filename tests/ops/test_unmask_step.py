import functools
import importlib.util
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from capture import replay_of
from implementations import GPU, each, implementations, isa, poisoned_memory
from offline import compile_offline, needs_triton

from ncfast.ops import dispatch, philox, unmask_step
from ncfast.ops.unmask_step import why_not

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    from ncfast.ops.triton.philox import philox_impl
    from ncfast.ops.triton.philox import uniform as triton_uniform

    @triton.jit
    def philox_kernel(words, out):
        c0, c1, c2, c3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
        k0, k1 = tl.load(words + 4), tl.load(words + 5)
        c0, c1, c2, c3 = philox_impl(
            c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
        )
        tl.store(out, c0.to(tl.int64))
        tl.store(out + 1, c1.to(tl.int64))
        tl.store(out + 2, c2.to(tl.int64))
        tl.store(out + 3, c3.to(tl.int64))

    @triton.jit
    def uniform_kernel(seed, sample, step, positions, out, STREAM: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        u = triton_uniform(tl.load(seed), tl.load(sample), step, tl.load(positions + at), STREAM)
        tl.store(out + at, u)


IMPLEMENTATIONS = implementations(unmask_step, lambda device, dtype=torch.float32: why_not(device, dtype))
every_implementation = each(IMPLEMENTATIONS)
every_kernel = each(IMPLEMENTATIONS, "cpp", "triton")
one_of_each = each(IMPLEMENTATIONS, "reference", "cpp-portable", "triton")
either_convention = pytest.mark.parametrize("convention", ["paper", "google"])
# What overflows in the interpreter is NumPy's to report and the kernel's to expect.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

KNOWN_ANSWERS = [  # Random123, kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
known_answers = pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)


@known_answers
def test_philox_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == expected
    assert philox_words(counter, key) == expected  # the oracle's own


@known_answers
def test_philox_known_answers_in_cpp(counter, key, expected):
    module, reason = dispatch.load_module("_C")
    if module is None:
        pytest.skip(reason)
    assert tuple(module.philox4x32(counter, key)) == expected


@needs_triton
@known_answers
def test_philox_known_answers_in_triton(counter, key, expected):
    out = torch.zeros(4, dtype=torch.int64, device=GPU)
    philox_kernel[(1,)](torch.tensor([*counter, *key], device=GPU), out)
    assert tuple(out.tolist()) == expected


@needs_triton
@pytest.mark.parametrize("stream", [philox.TOKENS, philox.CONFIDENCE, philox.LABELS])
@pytest.mark.parametrize(
    ("seed", "sample", "step"), [(0, 0, 0), (7, 5, 3), (-3, 2**40 + 9, 65535), (2**62 + 11, 2**63 - 1, 40000)]
)
def test_uniform_in_triton(seed, sample, step, stream):
    positions = torch.arange(65536 - 64, 65536)
    out = torch.zeros(64, dtype=torch.float64, device=GPU)
    seeds, samples = (torch.tensor([x], device=GPU) for x in (seed, sample))
    uniform_kernel[(1,)](seeds, samples, step, positions.to(GPU), out, STREAM=stream, BLOCK=64)
    expected = philox.uniform(seed, torch.tensor(sample), positions, step=step, stream=stream)
    assert torch.equal(out.cpu(), expected)


def test_uniform_is_addressed_and_open():
    sample, position = torch.arange(2**33, 2**33 + 500), torch.arange(100)
    u = philox.uniform(7, sample[:, None], position, step=3, stream=philox.TOKENS)
    assert u.shape == (500, 100) and u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())
    part = philox.uniform(7, sample[123:124, None], position[40:50], step=3, stream=philox.TOKENS)
    torch.testing.assert_close(u[123:124, 40:50], part, rtol=0, atol=0)
    torch.testing.assert_close(
        u, philox.uniform(torch.tensor(7), sample[:, None], position, step=3, stream=philox.TOKENS), rtol=0, atol=0
    )
    for other in (
        philox.uniform(8, sample[:, None], position, step=3, stream=philox.TOKENS),
        philox.uniform(7, sample[:, None], position, step=4, stream=philox.TOKENS),
        philox.uniform(7, sample[:, None], position, step=3, stream=philox.CONFIDENCE),
        philox.uniform(7, sample[:, None] + 2**32, position, step=3, stream=philox.TOKENS),
    ):
        assert (u != other).float().mean() > 0.999


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def bound(degrees):
    """About the 99.95 % quantile of chi-square (Wilson and Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.29 * math.sqrt(2 / (9 * degrees))) ** 3


def test_streams_are_uniform_and_independent():
    sample, position = torch.arange(1000)[:, None], torch.arange(200)
    tokens, confidence = (
        philox.uniform(11, sample, position, step=2, stream=stream).flatten()
        for stream in (philox.TOKENS, philox.CONFIDENCE)
    )
    for u in (tokens, confidence, tokens * 2**16 % 1):  # the low bits as well
        assert chi_square(torch.bincount((u * 256).long(), minlength=256), len(u) / 256) < bound(255)
    neighbour = tokens.view(1000, 200).roll(1, dims=1).flatten()
    for other in (confidence, neighbour, tokens.view(1000, 200).roll(1, dims=0).flatten()):
        pairs = torch.bincount((tokens * 16).long() * 16 + (other * 16).long(), minlength=256)
        assert chi_square(pairs, len(tokens) / 256) < bound(255)


# The oracle: one position after another in Python numbers, with nothing of the package.


def philox_words(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def oracle_uniform(seed, sample, step, position, stream):
    counter = (sample % 2**32, (sample >> 32) % 2**32, step * 2**16 + position, stream * 2**24)
    return (philox_words(counter, (seed % 2**32, (seed >> 32) % 2**32))[0] + 0.5) / 2**32


def oracle_draw(scores, u, top_k):
    """The code and its probability, from scores (a list) in float64."""
    K = len(scores)
    if any(math.isnan(score) for score in scores) or max(scores) in (math.inf, -math.inf):
        return 0, None
    if top_k:
        kept = set(sorted(range(K), key=lambda k: (-scores[k], k))[:top_k])
        scores = [score if k in kept else -math.inf for k, score in enumerate(scores)]
    weights = [math.exp(score - max(scores)) for score in scores]
    total, cumulative = math.fsum(weights), 0.0
    for k, weight in enumerate(weights):
        cumulative += weight
        if cumulative > u * total:
            return k, weight / total
    raise AssertionError


def oracle(
    logits,
    tokens,
    sample,
    *,
    seed=0,
    step=0,
    num_masked=0,
    choice_temperature=0.0,
    positions=None,
    width=None,
    unconditional=None,
    guidance_scale=1.0,
    temperature=1.0,
    top_k=0,
    convention="paper",
):
    (B, m, K), n = logits.shape, tokens.shape[1]
    if width is None:
        width = n if isinstance(num_masked, torch.Tensor) else num_masked
    seed = int(seed)
    out, remaining = tokens.tolist(), []
    scores = logits.double().tolist()
    without = scores if unconditional is None else unconditional.double().tolist()
    for row in range(B):
        confidence = {}
        for j in range(m):
            position = j if positions is None else int(positions[row, j])
            if not 0 <= position < n or tokens[row, position] != K:
                continue
            mixed = scores[row][j]
            if unconditional is not None and guidance_scale != 1:
                mixed = [
                    c if c == u else u + guidance_scale * (c - u) for c, u in zip(mixed, without[row][j], strict=True)
                ]
            at = (seed, int(sample[row]), step, position)
            code, p = oracle_draw([score / temperature for score in mixed], oracle_uniform(*at, 0), top_k)
            out[row][position] = code
            if p is None:
                confidence[position] = -math.inf
            else:
                gumbel = -math.log(-math.log1p(-oracle_uniform(*at, 1)))
                confidence[position] = math.log(p + (1e-5 if convention == "paper" else 0))
                confidence[position] += choice_temperature * gumbel
        again = int(num_masked[row]) if isinstance(num_masked, torch.Tensor) else num_masked
        if convention == "paper" or again <= 0:
            masked = sorted(confidence, key=lambda position: (confidence[position], position))[: max(0, again)]
        else:
            again = max(1, min(again, len(confidence) - 1))
            ascending = [*sorted(confidence.values()), math.inf, math.inf]
            masked = [position for position in confidence if confidence[position] < ascending[again]]
        for position in masked:
            out[row][position] = K
        still = [position for position in range(n) if out[row][position] == K][:width]
        remaining.append(still + [n] * (width - len(still)))
    return torch.tensor(out).reshape(B, n), torch.tensor(remaining, dtype=torch.int64).reshape(B, width)


class Case(NamedTuple):
    logits: torch.Tensor  # [B, m, K]
    tokens: torch.Tensor  # [B, n]
    sample: torch.Tensor  # [B]
    unconditional: torch.Tensor  # [B, m, K]
    positions: torch.Tensor  # [B, m]


def case(B, n, K, *, m=None, seed=0, share=0.7, dtype=torch.float32, levels=None):
    """m < n: some positions are listed, and padding follows. levels: logits that are integers below it, for ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, n if m is None else m, K)
    logits, unconditional = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    if levels is not None:
        logits, unconditional = (torch.randint(0, levels, shape, generator=generator).float() for _ in range(2))
    tokens = torch.randint(0, K, (B, n), generator=generator)
    tokens[torch.rand(B, n, generator=generator) < share] = K
    sample = torch.randint(0, 2**62, (B,), generator=generator)
    positions = torch.rand(B, n + 2, generator=generator).argsort(1)[:, : shape[1]].sort(1).values.clamp(max=n)
    return Case(logits.to(dtype), tokens, sample, unconditional.to(dtype), positions)


def step(run, case, **options):
    """The operation on the run's device, unless an option names another tensor of the case."""
    options = {"seed": 0, "step": 0, "num_masked": 0} | options
    moved = {name: x.to(run.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return run(case.logits, case.tokens, case.sample, **moved)


def check(run, case, **options):
    tokens, positions = step(run, case, **options)
    expected_tokens, expected_positions = oracle(case.logits, case.tokens, case.sample, **options)
    assert tokens.dtype == positions.dtype == torch.int64
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(positions, expected_positions)


def variants(case):
    return {
        "plain": {},
        "noise": {"choice_temperature": 2.7},
        "temperature": {"temperature": 0.6, "choice_temperature": 1.0},
        "top_k": {"top_k": 2, "temperature": 1.3},
        "guidance": {"unconditional": case.unconditional, "guidance_scale": 2.3, "choice_temperature": 0.5},
        "all": {
            "unconditional": case.unconditional,
            "guidance_scale": -0.4,
            "temperature": 2.0,
            "top_k": 3,
            "choice_temperature": 4.0,
        },
    }


VARIANTS = tuple(variants(case(1, 1, 1)))


@every_implementation
@either_convention
@pytest.mark.parametrize("K", [1, 2, 5, 32, 33])
@pytest.mark.parametrize("n", [1, 7, 63, 129])
def test_odd_sizes(run, n, K, convention):
    if run.slow and n * K > 500:
        pytest.skip("triton: the interpreter takes the small sizes")
    plain = case(1 if run.slow else 3, n, K, seed=n)
    for num_masked in {0, 1, n // 2, n}:
        options = {"choice_temperature": 1.5} if num_masked % 2 else {}
        check(run, plain, seed=n, step=K, num_masked=num_masked, convention=convention, **options)


@every_implementation
@either_convention
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(run, variant, convention):
    plain = case(2 if run.slow else 20, 11, 6)
    options = {"seed": 3, "step": 5, "convention": convention} | variants(plain)[variant]
    for num_masked in (0, 1, 4, 11):
        check(run, plain, num_masked=num_masked, **options)


@every_implementation
@either_convention
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [0, 1, 6, 13])
def test_listed_positions(run, m, variant, convention):
    plain = case(2 if run.slow else 20, 13, 6, m=m, share=0.8)
    options = {"seed": 3, "convention": convention, "positions": plain.positions} | variants(plain)[variant]
    for num_masked in (0, 3):
        check(run, plain, num_masked=num_masked, width=13, **options)


@every_implementation
@either_convention
def test_nothing_but_padding(run, convention):
    plain = case(3, 0, 5, m=2)
    assert plain.positions.shape == (3, 2)
    check(run, plain, positions=plain.positions, num_masked=1, convention=convention)


@every_implementation
@either_convention
def test_num_masked_of_each_row(run, convention):
    plain = case(12, 9, 5)
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2**40, -1])
    check(run, plain, num_masked=counts, choice_temperature=1.0, convention=convention)
    check(run, plain, num_masked=counts, width=3, convention=convention)


@every_implementation
@either_convention
def test_many_codes_and_positions(run, convention):
    for shape, m in (((1, 3, 300), None), ((1, 2, 1024), None), ((1, 300, 2), None), ((1, 1024, 3), 20)):
        if run.slow and shape[1] == 300:
            continue
        plain = case(*shape, m=m)
        listed = {} if m is None else {"positions": plain.positions}
        check(run, plain, num_masked=9, choice_temperature=1.0, convention=convention, **listed)
        check(run, plain, num_masked=1, top_k=max(1, shape[2] // 2), convention=convention, **listed)


@every_implementation
@either_convention
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(run, dtype, convention):
    plain = case(2 if run.slow else 20, 9, 7, dtype=dtype)
    check(run, plain, num_masked=4, convention=convention)
    check(run, plain, num_masked=4, convention=convention, **variants(plain)["all"])


@every_implementation
@pytest.mark.parametrize("value", [0, 5, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_seeds(run, value):
    plain = case(2, 6, 7)
    check(run, plain, seed=value, step=65535, num_masked=2, choice_temperature=1.0)
    if -(2**63) <= value < 2**63:
        check(run, plain, seed=torch.tensor(value), step=65535, num_masked=2, choice_temperature=1.0)


@every_implementation
@either_convention
@pytest.mark.parametrize("K", [2, 3])
def test_ties(run, K, convention):
    # Without noise positions of the same logits, in whatever order, and of equally likely codes are equally confident.
    plain = case(4 if run.slow else 40, 20, K, levels=2, share=0.9)
    for num_masked in (1, 5, 12):
        for extra in ({}, {"temperature": 0.7}, {"unconditional": plain.unconditional, "guidance_scale": 1.7}):
            check(run, plain, num_masked=num_masked, convention=convention, **extra)
    expected, _ = oracle(plain.logits, plain.tokens, plain.sample, num_masked=5, convention=convention)
    fewer = (expected == K).sum(1) < torch.minimum((plain.tokens == K).sum(1), torch.tensor(5))
    assert fewer.any() == (convention == "google")


@every_implementation
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6, 7])
def test_top_k_takes_the_lowest_of_equal_codes(run, top_k):
    plain = case(4 if run.slow else 40, 8, 6, levels=3)
    plain.logits[plain.logits == 0] *= -1  # -0 is 0
    check(run, plain, num_masked=3, top_k=top_k)
    drawn, _ = step(run, plain._replace(logits=torch.zeros_like(plain.logits)), top_k=top_k)
    assert (drawn[plain.tokens == 6] < top_k).all()


@every_implementation
@either_convention
@pytest.mark.parametrize("variant", VARIANTS)
def test_infinities_and_nans(run, variant, convention):
    plain = case(2 if run.slow else 10, 12, 5, share=0.9)
    nan, inf = torch.nan, torch.inf
    for logits in (plain.logits, plain.unconditional):
        logits[:, 1, 2] = -inf
        logits[:, 2, 1:] = -inf
        logits[:, 3] = -inf
        logits[:, 4] = nan
        logits[:, 5, 4] = nan
        logits[:, 6, 0] = -nan
        logits[:, 7, 3] = inf
        logits[:, 8, :2] = inf
        logits[:, 9, 0], logits[:, 9, 1] = inf, -inf
        logits[:, 10, 0], logits[:, 10, 1] = 1e38, -1e38
    for num_masked in (0, 2, 9):
        options = {"num_masked": num_masked, "convention": convention} | variants(plain)[variant]
        check(run, plain, **options)
    drawn, _ = step(run, plain, **variants(plain)[variant])
    unsound = torch.tensor([3, 4, 5, 6, 7, 8, 9])
    assert (drawn[:, unsound][plain.tokens[:, unsound] == 5] == 0).all()
    if variant == "plain":
        assert (drawn[:, 1][plain.tokens[:, 1] == 5] != 2).all()
        masked, _ = step(run, plain, num_masked=1)
        lowest = (plain.tokens[:, unsound] == 5).float().argmax(1)
        assert (masked[torch.arange(len(masked)), unsound[lowest]] == 5).all()


@every_implementation
def test_logits_that_are_not_drawn_may_hold_anything(run):
    plain = case(4, 10, 5, m=7)
    expected = step(run, plain, num_masked=3, positions=plain.positions, choice_temperature=1.0)
    listed = torch.where(plain.positions < 10, plain.positions, 0)
    drawn = (plain.positions < 10) & (plain.tokens.gather(1, listed) == 5)
    dirty = plain._replace(logits=torch.where(drawn[..., None], plain.logits, torch.nan))
    for ours, theirs in zip(
        step(run, dirty, num_masked=3, positions=plain.positions, choice_temperature=1.0), expected, strict=True
    ):
        assert torch.equal(ours, theirs)
    # Padding may be any number that is not a position.
    for padding in (-1, 11, 2**40, -(2**40)):
        positions = torch.where(plain.positions < 10, plain.positions, padding)
        assert torch.equal(step(run, dirty, num_masked=3, positions=positions, choice_temperature=1.0)[0], expected[0])


@every_implementation
def test_guidance_scale_one_ignores_the_unconditional_logits(run):
    plain = case(3, 8, 5)
    dirty = torch.full_like(plain.logits, torch.nan)
    assert torch.equal(step(run, plain, unconditional=dirty)[0], step(run, plain)[0])
    zero, _ = step(run, plain, unconditional=plain.unconditional, guidance_scale=0.0)
    assert torch.equal(zero, step(run, plain._replace(logits=plain.unconditional))[0])


@every_implementation
@either_convention
def test_known_tokens_stay_and_counts_are_exact(run, convention):
    B, n, K = 4 if run.slow else 50, 17, 5
    plain = case(B, n, K)
    plain.tokens[:, :8] %= K
    plain.tokens[:, 8:] = K
    out, positions = step(run, plain, num_masked=4, choice_temperature=2.0, convention=convention)
    assert torch.equal(out[:, :8], plain.tokens[:, :8])
    assert ((out == K).sum(1) == 4).all() and positions.shape == (B, 4)
    assert (out.gather(1, positions) == K).all() and (positions.diff(dim=1) > 0).all()
    known = plain._replace(tokens=out.remainder(K))
    unchanged, positions = step(run, known, num_masked=4, convention=convention)
    assert torch.equal(unchanged, known.tokens) and (positions == n).all()


@every_implementation
def test_googles_step_reveals_one_and_masks_one(run):
    plain = case(4, 6, 5)
    plain.tokens[:] = 5
    for num_masked, masked in ((1, 1), (4, 4), (5, 5), (6, 5), (60, 5)):
        out, _ = step(run, plain, num_masked=num_masked, convention="google")
        assert ((out == 5).sum(1) == masked).all()
    plain.tokens[:, 1:] = 0
    assert ((step(run, plain, num_masked=3, convention="google")[0] == 5).sum(1) == 1).all()
    assert (step(run, plain, num_masked=0, convention="google")[0] != 5).all()


@every_implementation
def test_a_row_does_not_depend_on_its_batch(run):
    plain = case(9, 12, 6)
    whole = step(run, plain, seed=1, num_masked=5, choice_temperature=3.0)
    for rows in (slice(4, 5), slice(6, 9), slice(0, 0)):
        part = step(run, Case(*(x[rows] for x in plain)), seed=1, num_masked=5, choice_temperature=3.0)
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[rows])


@every_implementation
def test_no_position_and_no_column(run):
    empty = case(3, 0, 4)
    out, positions = step(run, empty, num_masked=2)
    assert out.shape == (3, 0) and torch.equal(positions, torch.zeros(3, 2, dtype=torch.int64))
    plain = case(3, 5, 4)
    for width in (0, 1, 2, 9):
        check(run, plain, num_masked=2, width=width)


@every_implementation
def test_non_contiguous(run):
    plain = case(5, 8, 6, m=5)
    options = {"num_masked": torch.tensor([1, 2, 3, 2, 1]), "guidance_scale": 1.5, "choice_temperature": 1.0}
    expected = step(run, plain, unconditional=plain.unconditional, positions=plain.positions, **options)

    def strided(x):
        return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]

    view = Case(*(strided(x) for x in plain))
    assert not any(x.is_contiguous() for x in view)
    options["num_masked"] = strided(options["num_masked"])
    for ours, theirs in zip(
        step(run, view, unconditional=view.unconditional, positions=view.positions, **options), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


@every_implementation
def test_every_element_is_written(run):
    plain = case(4, 30, 6, m=9)
    with poisoned_memory():
        for options in ({}, {"positions": None}):
            options = {"positions": plain.positions} | options
            part = plain if options["positions"] is not None else case(4, 30, 6)
            for num_masked in (0, 4):
                check(run, part, num_masked=num_masked, width=40, top_k=2, **options)


@every_implementation
def test_inputs_stay_as_they_are(run):
    plain = case(4, 10, 6, m=8)
    before = Case(*(x.clone() for x in plain))
    for options in variants(plain).values():
        step(run, plain, num_masked=3, positions=plain.positions, **options)
    for now, then in zip(plain, before, strict=True):
        assert torch.equal(now, then)


@every_kernel
def test_the_same_whatever_the_threads(run, threads):
    plain = case(3 if run.slow else 600, 20, 9)
    answers = []
    for count in (1, 2, 3):
        threads(count)
        answers.append(step(run, plain, num_masked=7, choice_temperature=3.0))
    for answer in answers[1:]:
        for ours, theirs in zip(answer, answers[0], strict=True):
            assert torch.equal(ours, theirs)


@every_kernel
@either_convention
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_integers_as_the_reference(run, variant, convention):
    for shape in ((3, 20, 9),) if run.slow else ((2000, 30, 9), (40, 75, 32), (2, 40, 1024), (300, 5, 2)):
        plain = case(*shape)
        for num_masked in (0, shape[1] // 3):
            options = {"num_masked": num_masked, "seed": 17, "convention": convention} | variants(plain)[variant]
            expected = step(IMPLEMENTATIONS["reference"], plain, **options)
            for ours, theirs in zip(step(run, plain, **options), expected, strict=True):
                assert torch.equal(ours, theirs)


# The distribution: all steps of a toy prior against a sampler that draws as people write it.

TOY_K, TOY_N, TOY_STEPS, DRAWS = 3, 3, 5, 100_000


def toy_logits(tokens):
    """Logits [B, n, K] that depend on every token, float32 of numbers with few bits: exact on any device."""
    table = torch.randint(-8, 9, (TOY_N, TOY_K + 1, TOY_N, TOY_K), generator=torch.Generator().manual_seed(4)) / 8
    table = table.to(tokens.device)
    return sum(table[position, tokens[:, position]] for position in range(TOY_N)).float()


def toy_counts(google):
    counts = [math.floor(TOY_N * math.cos(math.pi / 2 * (t + 1) / TOY_STEPS)) for t in range(TOY_STEPS - 1)]
    return [*((max(1, count) if google else count) for count in counts), 0]


DISTRIBUTIONS = {
    "paper": {},
    "paper, no noise": {"choice": 0.0},
    "google": {"google": True},
    "google, no noise": {"google": True, "choice": 0.0},
    "temperature": {"temperature": 0.5},
    "google, temperature": {"google": True, "temperature": 1.7},
    "top-k": {"top_k": 2},
    "google, top-k": {"google": True, "top_k": 2},
    "guidance": {"guidance_scale": 1.8},
}


def plain_sample(draws, *, choice=4.0, google=False, temperature=1.0, top_k=0, guidance_scale=1.0):
    """torch.multinomial and topk, a row's number of masked tokens as the papers' codes have it."""
    generator = torch.Generator().manual_seed(99)
    tokens = torch.full((draws, TOY_N), TOY_K)
    for t, count in enumerate(toy_counts(google)):
        logits = toy_logits(tokens).double()
        logits = (0.5 * logits.flip(-1) + guidance_scale * (logits - 0.5 * logits.flip(-1))) / temperature
        if top_k:
            logits[logits < logits.topk(top_k).values[..., -1:]] = -torch.inf
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.view(-1, TOY_K), 1, generator=generator).view(draws, TOY_N)
        unknown = tokens == TOY_K
        tokens = torch.where(unknown, drawn, tokens)
        if t == TOY_STEPS - 1:
            return tokens
        p = p.gather(-1, tokens[..., None])[..., 0]
        noise = torch.distributions.Gumbel(0.0, 1.0).icdf(torch.rand(p.shape, generator=generator).double())
        confidence = torch.log(p if google else p + 1e-5) + choice * (1 - (t + 1) / TOY_STEPS) * noise
        confidence = torch.where(unknown, confidence, torch.inf)
        if google:
            length = (unknown.sum(1, keepdim=True) - 1).clamp(max=count).clamp(min=1)
            tokens = torch.where(confidence < confidence.sort().values.gather(1, length), TOY_K, tokens)
        elif count:
            tokens = tokens.scatter(1, confidence.topk(count, largest=False).indices, TOY_K)


def our_sample(run, draws, *, choice=4.0, google=False, temperature=1.0, top_k=0, guidance_scale=1.0):
    tokens, sample = torch.full((draws, TOY_N), TOY_K), torch.arange(draws)
    for t, count in enumerate(toy_counts(google)):
        logits = toy_logits(tokens)
        tokens, _ = run(
            logits,
            tokens,
            sample,
            seed=21,
            step=t,
            num_masked=count,
            choice_temperature=choice * (1 - (t + 1) / TOY_STEPS),
            unconditional=(0.5 * logits.flip(-1)).to(run.device),
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            convention="google" if google else "paper",
        )
    return tokens


def histogram(tokens):
    assert tokens.min() >= 0 and tokens.max() < TOY_K
    return torch.bincount((tokens * TOY_K ** torch.arange(TOY_N)).sum(1), minlength=TOY_K**TOY_N).double()


@functools.cache
def plain_histogram(name):
    return histogram(plain_sample(DRAWS, **DISTRIBUTIONS[name]))


def two_sample_chi_square(a, b):
    """Of histograms of the same total, and the bound that it keeps if they have the same distribution."""
    seen = a + b > 0
    return float(((a - b)[seen] ** 2 / (a + b)[seen]).sum()), bound(int(seen.sum()) - 1)


@each(IMPLEMENTATIONS, "reference", "cpp-avx2", "triton")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_series_have_the_distribution_of_a_plain_sampler(run, name, threads):
    if run.slow:
        pytest.skip("triton: too many draws for the interpreter, which gives the same integers")
    threads(1)  # these tensors are small: waking threads costs more than they save
    ours = histogram(our_sample(run, DRAWS, **DISTRIBUTIONS[name]))
    statistic, limit = two_sample_chi_square(ours, plain_histogram(name))
    assert statistic < limit


def test_the_distributions_differ():
    histograms = {name: plain_histogram(name) for name in DISTRIBUTIONS}
    for name, other in (
        ("paper", "google"),
        ("paper", "paper, no noise"),
        ("google", "google, no noise"),
        ("paper", "temperature"),
        ("paper", "top-k"),
        ("google", "google, top-k"),
        ("paper", "guidance"),
    ):
        statistic, limit = two_sample_chi_square(histograms[name], histograms[other])
        assert statistic > limit, (name, other)


@each(IMPLEMENTATIONS, "cpp", "triton")
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_series_are_the_same_integers(run, name, threads):
    threads(1)
    draws = 10 if run.slow else 5_000
    expected = our_sample(IMPLEMENTATIONS["reference"], draws, **DISTRIBUTIONS[name])
    assert torch.equal(our_sample(run, draws, **DISTRIBUTIONS[name]), expected)


@each(IMPLEMENTATIONS, "reference", "cpp", "triton")
def test_last_step_draws_from_the_softmax(run):
    B, n, K = 200 if run.slow else 40_000, 2, 4
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 3.0, -9.0, 0.0]])
    plain = Case(logits.expand(B, n, K), torch.full((B, n), K), torch.arange(B), None, None)
    drawn, _ = step(run, plain, seed=1)
    for position in range(n):
        p = logits[position].double().softmax(0).numpy()
        assert chi_square(np.bincount(drawn[:, position], minlength=K), B * p) < bound(3)


def test_noise_changes_what_is_kept_and_fades():
    plain = case(200, 20, 4, share=2)
    masks = [
        step(IMPLEMENTATIONS["reference"], plain, num_masked=10, choice_temperature=noise)[0] == 4
        for noise in (0.0, 4.0, 1e-9)
    ]
    assert (masks[0] != masks[1]).any(1).float().mean() > 0.9
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, r"logits are \[B, m, K\].*\[2, 4\]"),
        ({"logits": torch.zeros(2, 3)}, r"\[B, m, K\]"),
        ({"logits": torch.zeros(2, 3, 0)}, "1 code or more"),
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, "float32, float64, float16 or bfloat16; got torch.int64"),
        ({"sample": torch.zeros(3, dtype=torch.int64)}, r"sample \[B\]"),
        ({"sample": torch.zeros(2)}, "sample is int64"),
        ({"tokens": torch.zeros(2, 3)}, "tokens is int64"),
        ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, r"positions \[B, m\]"),
        ({"positions": torch.zeros(2, 3)}, "positions is int64"),
        ({"unconditional": torch.zeros(2, 3, 5)}, "unconditional is like logits"),
        ({"unconditional": torch.zeros(2, 3, 4).double()}, "unconditional is like logits"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, "seed that is a tensor has no dimensions"),
        ({"seed": torch.tensor(0.0)}, "seed is int64"),
        ({"seed": torch.tensor(0, device="meta")}, "seed on meta; move them to one device"),
        ({"num_masked": torch.zeros(3, dtype=torch.int64)}, r"num_masked is a number, or \[B\]"),
        ({"num_masked": torch.zeros(2)}, "num_masked is int64"),
        ({"num_masked": -1}, "num_masked is 0 or more; got -1"),
        ({"step": 65536}, "step is in 0..65535"),
        ({"step": -1}, "step is in 0..65535"),
        ({"width": -1}, "width is 0 or more"),
        ({"choice_temperature": -0.5}, "choice_temperature is 0 or more"),
        ({"choice_temperature": math.nan}, "choice_temperature is 0 or more"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"guidance_scale": math.inf}, "guidance_scale is finite"),
        ({"top_k": -1}, "top_k is 0"),
        ({"convention": "muse"}, "convention is paper or google; got 'muse'"),
        ({"impl": "cuda"}, "unmask_step has the implementations"),
    ],
)
def test_errors(change, message):
    arguments = {
        "logits": torch.zeros(2, 3, 4),
        "tokens": torch.full((2, 3), 4),
        "sample": torch.arange(2),
        "seed": 0,
        "step": 0,
        "num_masked": 0,
    } | change
    with pytest.raises(ValueError, match=message):
        unmask_step(**arguments)


def test_what_a_kernel_cannot_take():
    plain = case(2, 3, 4, dtype=torch.float64)
    if why_not(torch.device("cpu"))["cpp"] is None:
        with pytest.raises(RuntimeError, match="float64 logits: the kernel is float32"):
            unmask_step(plain.logits, plain.tokens, plain.sample, seed=0, step=0, num_masked=0, impl="cpp")
    assert why_not(torch.device("cuda"), torch.float32, 4097)["triton"] is not None


@one_of_each
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_and_only_once(run, backend):
    run.skip_unless_it_runs(torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(logits, tokens, sample, seed):
        out, positions = unmask_step(
            logits * 1,
            tokens,
            sample,
            seed=seed,
            step=3,
            num_masked=4,
            choice_temperature=1.0,
            impl=run.name,
        )
        return out + 0, positions + 0

    with isa(run.isa):
        for turn in range(3):
            plain = case(3, 9, 5, seed=turn)
            given = (x.to(run.device) for x in (*plain[:3], torch.tensor(turn)))
            with torch._dynamo.config.patch(error_on_recompile=turn > 0):
                ours = compiled(*given)
            expected = step(run, plain, seed=turn, step=3, num_masked=4, choice_temperature=1.0)
            for a, b in zip(ours, expected, strict=True):
                assert torch.equal(a.cpu(), b)


@pytest.mark.gpu
@either_convention
def test_no_synchronisation_and_a_cuda_graph(convention):
    plain = Case(*(x.cuda() for x in case(50, 40, 32, m=30)))
    seed, counts = torch.tensor(5, device="cuda"), torch.arange(50, device="cuda") % 20
    sample = plain.sample.clone()

    def call():
        return unmask_step(
            plain.logits,
            plain.tokens,
            sample,
            seed=seed,
            step=1,
            num_masked=counts,
            choice_temperature=2.0,
            positions=plain.positions,
            unconditional=plain.unconditional,
            guidance_scale=1.5,
            convention=convention,
            impl="triton",
        )

    replay, expected = replay_of(call), call()
    seed.fill_(6)
    sample += 1
    replayed = replay()
    for ours, theirs in zip(replayed, call(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(replayed[0], expected[0])


@pytest.mark.gpu
@either_convention
def test_a_gpu_gives_the_integers_of_a_cpu(convention):
    for shape in ((256, 75, 32), (16, 256, 1024), (4000, 20, 7)):
        plain = case(*shape)
        for options in variants(plain).values():
            options = {"num_masked": shape[1] // 3, "seed": 8, "convention": convention} | options
            expected = step(IMPLEMENTATIONS["reference"], plain, **options)
            for name in ("reference", "triton"):
                on_gpu = IMPLEMENTATIONS[name]._replace(device="cuda")
                for ours, theirs in zip(step(on_gpu, plain, **options), expected, strict=True):
                    assert torch.equal(ours, theirs)


@needs_triton
def test_triton_compiles_offline():
    from ncfast.ops.triton.unmask_step import blocks

    types = {
        **dict.fromkeys(("logits", "unconditional"), "*fp32"),
        **dict.fromkeys(("tokens", "sample", "positions", "seeds", "counts", "out", "remaining"), "*i64"),
        "confidence": "*fp64",
        "num_masked": "i64",
        **dict.fromkeys(("scale", "choice_temperature", "guidance_scale", "temperature"), "fp64"),
    }
    bfloat16 = types | dict.fromkeys(("logits", "unconditional"), "*bf16")
    absent = dict.fromkeys(("unconditional", "positions", "seeds", "counts"))
    flags = {"GOOGLE": False, "RANK": True, "NOISE": True, "TEMPERED": False, "TOP_K": False}
    jobs = [
        ("unmask_step_kernel", types, {**absent, **flags, **blocks(75, 32)}),
        ("unmask_step_kernel", types, {**flags, "GOOGLE": True, "TEMPERED": True, "TOP_K": True, **blocks(256, 1024)}),
        ("unmask_step_kernel", bfloat16, {**absent, **flags, "RANK": False, **blocks(7, 2)}),
    ]
    compile_offline("ncfast.ops.triton.unmask_step", jobs)
