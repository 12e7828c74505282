"""The sampler: the same tokens whatever it leaves out, and the distribution of a plain one."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ncfast.config import make_config
from ncfast.data.conditions import ConditionColumn
from ncfast.engine.precision import autocast, computing
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE
from ncfast.sampling.maskgit import ChunkDecoder, Sampler, SamplerOptimizations, mask_schedule
from ncfast.sampling.order import halton_order

SMALL = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 5,
    "prior_dim": 16,
    "prior_layers": 2,
    "prior_head_dim": 8,
    "decoding_steps": 10,
    "choice_temperature": 4.0,
}
HALTON = {"decoding_order": "halton"}
SAVERS = [field.name for field in dataclasses.fields(SamplerOptimizations)]
n, K, C = 10, 5, 3


def make_prior(num_tokens=n, codes=K, **options):
    torch.manual_seed(0)
    prior = Prior(make_config(**{**SMALL, "codebook_size": codes, **options}), torch.randn(codes, 8), num_tokens, C)
    return prior.eval().requires_grad_(False)


def make_sampler(prior=None, savers=None, **options):
    return Sampler(prior or make_prior(), make_config(**{**SMALL, **options}), savers)


def some_tokens(rows=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, K, (rows, n), generator=generator)
    masked = torch.rand(rows, n, generator=generator).argsort(1)[:, :4].sort(1).values
    return tokens.scatter(1, masked, K), masked, torch.arange(rows) % (C + 1)


@pytest.mark.parametrize("off", [None, "masked_positions_only", "first_layer_table"])
def test_logits_equal_the_plain_path(off):
    prior = make_prior()
    sampler = make_sampler(prior, SamplerOptimizations(**({off: False} if off else {})))
    tokens, masked, labels = some_tokens()
    expected = prior(tokens, labels)
    torch.testing.assert_close(sampler.logits(tokens, labels), expected, rtol=2e-5, atol=2e-5)
    at_masked = expected.gather(1, masked[..., None].expand(-1, -1, K))
    torch.testing.assert_close(sampler.logits(tokens, labels, masked), at_masked, rtol=2e-5, atol=2e-5)
    # n stands for no position; the others are what they were.
    padded = torch.cat([masked, torch.full((len(masked), 2), n)], dim=1)
    torch.testing.assert_close(sampler.logits(tokens, labels, padded)[:, :4], at_masked, rtol=2e-5, atol=2e-5)


def test_first_logits_equal_the_plain_path():
    prior = make_prior()
    masks, classes = torch.full((C + 1, n), K), torch.arange(C + 1)
    torch.testing.assert_close(make_sampler(prior).first_logits, prior(masks, classes), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.5}, {"unmasking": "google"}, {"decoding_steps": 25}], ids=str
)
def test_tokens_are_the_same_whatever_is_left_out(options):
    prior = make_prior().double()  # so that nothing hangs on rounding
    labels, sample = torch.arange(40) % (C + 1), torch.arange(100, 140)
    plain = make_sampler(prior, SamplerOptimizations.none(), **options).decode(labels, sample, seed=3)
    assert plain.shape == (40, n) and plain.min() >= 0 and plain.max() < K
    for savers in [SamplerOptimizations(), *(SamplerOptimizations(**{name: False}) for name in SAVERS)]:
        assert torch.equal(make_sampler(prior, savers, **options).decode(labels, sample, seed=3), plain), savers
    assert not torch.equal(make_sampler(prior, **options).decode(labels, sample, seed=4), plain)


LEVELS = {"codebook_levels": 2}


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_scale": 2.5}, {"guidance_scale": 0.0, "top_k": 7}, {"unmasking": "google"}, {"decoding_steps": 25}],
    ids=str,
)
def test_levels_have_their_own_codes_coarse_before_fine(options):
    prior, options = make_prior(num_tokens=2 * n, codes=2 * K).double(), {**LEVELS, **options}
    labels, sample = torch.arange(40) % (C + 1), torch.arange(100, 140)
    plain = make_sampler(prior, SamplerOptimizations.none(), **options).decode(labels, sample, seed=3)
    assert plain.shape == (40, 2 * n)
    assert plain[:, :n].unique().tolist() == [*range(K)] and plain[:, n:].unique().tolist() == [*range(K, 2 * K)]
    for savers in [SamplerOptimizations(), *(SamplerOptimizations(**{name: False}) for name in SAVERS)]:
        assert torch.equal(make_sampler(prior, savers, **options).decode(labels, sample, seed=3), plain), savers
    sampler = make_sampler(prior, **options)
    assert torch.equal(sampler.decode(labels[7:9], sample[7:9], seed=3), plain[7:9])
    # Fine tokens change no coarse one; and coarse ones that are known lead to the same fine ones.
    known = torch.where(torch.arange(2 * n) < n, plain, 2 * K)
    assert torch.equal(sampler.decode(labels, sample, seed=3, known=known), plain)


def test_known_tokens_of_levels_stay():
    prior = make_prior(num_tokens=2 * n, codes=2 * K)
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (
        torch.randint(0, K, (6, n), generator=generator),
        torch.randint(K, 2 * K, (6, n), generator=generator),
    )
    wanted = torch.rand(6, n, generator=generator) < 0.4
    known = torch.cat([coarse.masked_fill(wanted, 2 * K), fine.masked_fill(wanted | (coarse == 0), 2 * K)], 1)
    known[0], known[1] = 2 * K, torch.cat([coarse[1], fine[1]])  # nothing, all
    out = make_sampler(prior, **LEVELS).decode(torch.arange(6) % C, torch.arange(6), seed=0, known=known)
    assert torch.equal(out[known < 2 * K], known[known < 2 * K])
    assert out[:, :n].max() < K <= out[:, n:].min() and out.max() < 2 * K


def count_rows(monkeypatch, sampler):
    """Rows and columns of logits that each forward pass computes."""
    shapes = []
    compute = sampler.logits

    def logits(tokens, labels, positions=None, conditions=None):
        shapes.append((len(tokens), n if positions is None else positions.shape[1]))
        return compute(tokens, labels, positions, conditions)

    monkeypatch.setattr(sampler, "logits", logits)
    return shapes


def test_the_work_is_saved(monkeypatch):
    labels, sample = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    expected = {
        # Of n = 10 in 10 steps: 9 9 8 8 7 5 4 3 1 0 stay masked.
        SamplerOptimizations(): [(4, m) for m in (9, 8, 7, 5, 4, 3, 1)],
        SamplerOptimizations(drop_idle_steps=False): [(4, m) for m in (9, 9, 8, 8, 7, 5, 4, 3, 1)],
        SamplerOptimizations(first_step_by_class=False): [(4, m) for m in (10, 9, 8, 7, 5, 4, 3, 1)],
        SamplerOptimizations(masked_positions_only=False): [(4, 10)] * 7,
        SamplerOptimizations(conditional_pass_only=False): [(8, m) for m in (9, 8, 7, 5, 4, 3, 1)],
    }
    for savers, shapes in expected.items():
        sampler = make_sampler(savers=savers)
        seen = count_rows(monkeypatch, sampler)
        sampler.decode(labels, sample, seed=0)
        assert seen == shapes, savers
    assert make_sampler().table is not None and make_sampler(savers=SamplerOptimizations.none()).table is None


def test_a_table_that_would_be_too_large_is_not_made(monkeypatch):
    monkeypatch.setattr(Sampler, "MAX_TABLE_BYTES", 1000)
    prior = make_prior().double()
    sampler = make_sampler(prior)
    assert sampler.table is None
    monkeypatch.undo()
    labels, sample = torch.zeros(5, dtype=torch.int64), torch.arange(5)
    assert torch.equal(sampler.decode(labels, sample, 0), make_sampler(prior).decode(labels, sample, 0))


def test_the_table_may_take_all_the_bytes_it_is_given(monkeypatch):
    prior = make_prior()
    size = sum(part.nbytes for part in make_sampler(prior).table)
    for limit, made in ((size, True), (size - 1, False)):
        monkeypatch.setattr(Sampler, "MAX_TABLE_BYTES", limit)
        assert (make_sampler(prior).table is not None) == made


def test_guidance():
    prior = make_prior().double()
    tokens, _, labels = some_tokens()
    conditional, unconditional = prior(tokens, labels), prior(tokens, torch.full_like(labels, C))
    expected = unconditional + 2.5 * (conditional - unconditional)
    # One step from these tokens: what is masked is drawn from the guided logits.
    sampler = make_sampler(prior, guidance_scale=2.5, decoding_steps=1)
    drawn = torch.cat(
        [
            sampler.decode(labels.repeat(500), torch.arange(i, i + 3000), seed=0, known=tokens.repeat(500, 1))
            for i in range(0, 18_000, 3000)
        ]
    )
    p = expected.softmax(-1)
    seen = F.one_hot(drawn.view(3000, 6, n), K).double().mean(0)
    free = tokens == K
    z = (seen - p)[free] / (p * (1 - p) / 3000).sqrt()[free]
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean() < 1.3
    assert torch.equal(drawn.view(3000, 6, n)[:, ~free], tokens[~free].expand(3000, -1))


def test_a_row_does_not_depend_on_its_batch():
    sampler = make_sampler(make_prior().double(), guidance_scale=1.5)  # in float64 rounding does not show
    labels, sample = torch.arange(8) % 4, torch.arange(100, 108)
    whole = sampler.decode(labels, sample, seed=3)
    torch.testing.assert_close(whole[2:5], sampler.decode(labels[2:5], sample[2:5], seed=3))


def plain_sampler(prior, label, rows, config, generator):
    """Written from the description: torch's own draws, topk, one row after the other.  -> tokens [rows, n]"""
    levels, codes, T = config.codebook_levels, prior.num_codes, config.decoding_steps
    num_tokens = prior.num_tokens // levels
    whole = torch.full((rows, prior.num_tokens), codes)
    for level, t in itertools.product(range(levels), range(T)):
        columns = slice(level * num_tokens, (level + 1) * num_tokens)
        tokens = whole[:, columns]
        logits = prior(whole, torch.full((rows,), label))[:, columns] / config.temperature
        logits[..., torch.arange(codes) * levels // codes != level] = -torch.inf
        if config.top_k:
            cut = logits.topk(config.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < cut, -torch.inf)
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(rows, num_tokens)
        masked = tokens == codes
        new = torch.where(masked, drawn, tokens)
        chosen = p.gather(-1, new[..., None])[..., 0].double()
        ratio = (t + 1) / T
        gumbel = -torch.log(-torch.log(torch.rand(rows, num_tokens, dtype=torch.float64, generator=generator)))
        google = config.unmasking == "google"
        confidence = torch.log(chosen + (0 if google else 1e-5)) + config.choice_temperature * (1 - ratio) * gumbel
        confidence[~masked] = torch.inf
        for row in range(rows if ratio < 1 else 0):
            count = int(np.floor(num_tokens * np.cos(np.pi / 2 * ratio)))
            if google:
                count = max(1, min(count, int(masked[row].sum()) - 1))
                cut = confidence[row].sort().values[count]
                new[row, confidence[row] < cut] = codes
            elif config.decoding_order == "halton":
                new[row, num_tokens - count :] = codes  # of two or three tokens the order is that of their positions
            else:
                new[row, confidence[row].topk(count, largest=False).indices] = codes
        whole[:, columns] = new
    return whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unmasking": "google"},
        {"temperature": 0.6},
        {"top_k": 2},
        {"choice_temperature": 0.0},
        HALTON,
        LEVELS,
        {**LEVELS, **HALTON},
    ],
    ids=str,
)
def test_the_distribution_is_the_plain_samplers(options):
    """All 27 outcomes of three tokens of three codes, or all 16 of two levels of two tokens of two, in three steps."""
    codes = size = 4 if "codebook_levels" in options else 3
    prior = make_prior(num_tokens=size, codes=codes)
    for parameter in prior.head[-1].parameters():
        parameter.mul_(4)  # far from uniform
    size //= options.get("codebook_levels", 1)
    config = make_config(**{**SMALL, "codebook_size": size, "decoding_steps": 3, **options})
    rows = 6000
    ours = Sampler(prior, config).decode(torch.ones(rows, dtype=torch.int64), torch.arange(rows), seed=0)
    plain = plain_sampler(prior, 1, rows, config, torch.Generator().manual_seed(0))
    weights = size ** torch.arange(codes)
    a, b = (torch.bincount((tokens % size * weights).sum(1), minlength=27).double() for tokens in (ours, plain))
    seen = a + b > 0
    chi_square = ((a - b).square() / (a + b))[seen].sum()
    # Mean and deviation of chi-square with as many degrees of freedom as outcomes, less one.
    freedom = int(seen.sum()) - 1
    assert freedom >= 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("savers", [None, SamplerOptimizations.none()], ids=["all savers", "none"])
def test_weights_that_are_rounded_once_give_the_logits_of_those_rounded_for_every_product(savers):
    prior = make_prior()
    tokens, _, labels = some_tokens()
    sampler = Sampler(prior, make_config(**SMALL), savers, precision="bf16")
    cpu = torch.device("cpu")
    with computing("bf16", cpu), autocast("bf16", cpu), torch.no_grad():
        assert torch.equal(sampler.logits(tokens, labels), prior(tokens, labels))
    assert {x.dtype for x in prior.parameters()} == {torch.float32}


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_known_tokens_stay_and_rows_have_their_own_schedule(monkeypatch, order):
    from ncfast.sampling import maskgit as sampling

    prior = make_prior()
    tokens, _, labels = some_tokens()
    tokens[0] = torch.arange(n) % K  # nothing left to draw
    tokens[1] = K  # everything
    counts, left = [], []

    def recorded(*arguments, **options):
        result = step(*arguments, **options)
        counts.append((result[0] == K).sum(1))
        left.append(result[0] == K)
        return result

    step = sampling.unmask_step
    monkeypatch.setattr(sampling, "unmask_step", recorded)
    out = make_sampler(prior, decoding_order=order).decode(labels, torch.arange(6), seed=0, known=tokens)
    assert torch.equal(out[tokens < K], tokens[tokens < K]) and out.max() < K
    for row, unknown in enumerate((tokens == K).sum(1).tolist()):
        assert [int(count[row]) for count in counts] == mask_schedule(unknown, 10)
    if order == "halton":  # what is left was masked from the start, and comes last in the order
        in_order = halton_order(3, n)
        for masked in left:
            for row, start in zip(masked[:, in_order], (tokens == K)[:, in_order], strict=True):
                assert torch.equal(row[start], torch.arange(int(start.sum())) >= int((start & ~row).sum()))
    sampler = make_sampler(prior.double(), decoding_order=order)
    alone = sampler.decode(labels[1:2], torch.tensor([1]), seed=0)
    assert torch.equal(sampler.decode(labels, torch.arange(6), seed=0, known=tokens)[1:2], alone)


def test_halton_order_visits_every_cell_once_and_spreads():
    assert halton_order(3, 12) == [0, 6, 9, 3, 4, 10, 1, 7, 8, 2, 5, 11]  # points (i in base 3, i in base 2), by hand
    assert halton_order(3, 10) == [0, 5, 2, 7, 1, 6, 3, 8, 4, 9]  # no grid of three rows: base 2 alone
    for rows, columns in ((1, 1), (3, 7), (5, 15), (3, 33)):
        order = halton_order(rows, rows * columns)
        assert sorted(order) == list(range(rows * columns))
        if columns >= 7:  # the first quarter leaves no gap of more than half of the columns' number, as any order may
            at = sorted({cell % columns for cell in order[: len(order) // 4]})
            assert max(b - a for a, b in itertools.pairwise([-1, *at, columns])) <= columns // 2


@pytest.mark.parametrize(("count", "steps"), [(75, 10), (40, 10), (8, 10), (1, 3), (30, 1), (0, 4)])
def test_mask_schedule(count, steps):
    schedule = mask_schedule(count, steps)
    assert len(schedule) == steps and schedule[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(schedule)) and schedule[0] <= count
    for t, masked in enumerate(schedule[:-1]):
        assert masked == int(count * np.cos(np.pi / 2 * (t + 1) / steps))

    google = mask_schedule(count, steps, "google")
    assert len(google) == steps and google[-1] == 0
    for before, after in itertools.pairwise([count, *google]):
        assert after < before or before <= 1  # at least one is revealed, unless it is the last
    assert all(masked == 0 if count == 0 else masked >= 1 for masked in google[:-1])


CONDITIONS = (ConditionColumn("age", "number", 50.0, 10.0), ConditionColumn("sex", "category", categories=("f", "m")))


def make_decoder(graph, device="cpu", conditions=()):
    torch.manual_seed(1)
    config = make_config(**SMALL)
    vqvae = VQVAE(config, 1, 96).eval().to(device)
    prior = Prior(config, vqvae.vq.codebook.cpu(), vqvae.num_tokens, C, conditions, 5).eval().to(device)
    return ChunkDecoder(vqvae, Sampler(prior, config), graph=graph)


def test_a_graph_that_cannot_be_captured_is_said_and_done_without(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("ncfast.sampling.maskgit.CudaGraph", refuse)
    decoder, plain = make_decoder(graph=True), make_decoder(graph=False)
    assert not decoder.wants_graph  # there is no GPU
    decoder.wants_graph = True
    labels, sample = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*not permitted"):
        tokens, x = decoder(labels, sample, 0)
    expected_tokens, expected = plain(labels, sample, 0)
    assert torch.equal(tokens, expected_tokens) and torch.equal(x, expected)
    decoder(labels, sample, 0)  # and not tried again


def test_all_that_changes_enters_a_graph_as_a_tensor(monkeypatch):
    class Replayed:
        def __init__(self, function, *inputs, warm_ups):
            self.function, self.inputs = function, [value.clone() for value in inputs]

        def __call__(self, *inputs):
            for own, value in zip(self.inputs, inputs, strict=True):
                own.copy_(value)
            return self.function(*self.inputs)

    monkeypatch.setattr("ncfast.sampling.maskgit.CudaGraph", Replayed)
    graphed, plain = make_decoder(True, conditions=CONDITIONS), make_decoder(False, conditions=CONDITIONS)
    graphed.wants_graph = True
    labels, sample = torch.arange(6) % C, torch.arange(6)
    for seed in (3, 4):
        rows = torch.stack([50 + seed * sample, sample % 2], 1).double()
        expected = plain(labels, sample, seed, conditions=rows)[0]
        assert torch.equal(graphed(labels, sample, seed, conditions=rows)[0], expected)
    assert graphed.graph is not None


@pytest.mark.gpu
@pytest.mark.parametrize("conditions", [(), CONDITIONS], ids=["class", "conditions"])
def test_a_cuda_graph_gives_the_same_bits_for_any_seed(conditions):
    graphed, eager = (make_decoder(graph, "cuda", conditions) for graph in (True, False))
    for first, seed in ((0, 3), (64, 3), (0, 2**62)):
        sample = torch.arange(first, first + 64, device="cuda")
        rows = torch.stack([sample, sample % 2], 1).double() if conditions else None
        tokens, x = graphed(sample % (C + 1), sample, seed, conditions=rows)
        expected_tokens, expected = eager(sample % (C + 1), sample, seed, conditions=rows)
        assert torch.equal(tokens, expected_tokens) and torch.equal(x, expected)
    assert graphed.graph is not None
