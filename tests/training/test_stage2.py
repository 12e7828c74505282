import dataclasses
import functools
import math

import pytest
import torch
from torch.nn import functional as F

from ncfast.config import make_config
from ncfast.models import prior as prior_module
from ncfast.models.prior import Prior
from ncfast.models.vqvae import VQVAE
from ncfast.ops import dispatch, layer_norm
from ncfast.training.stage2 import Dropout, TokenDistribution, coins, random_mask, ranks, stage2_losses

SMALL = {"dim": 8, "residual_blocks": 1, "codebook_size": 5, "prior_dim": 16, "prior_layers": 2, "prior_head_dim": 8}


def small_prior(**options):
    torch.manual_seed(0)
    return Prior(make_config(**{**SMALL, **options}), torch.randn(5, 8), num_tokens=10, num_classes=3)


def test_parameter_count_is_the_papers():
    with torch.device("meta"):
        prior = Prior(make_config(), torch.empty(32, 64), num_tokens=75, num_classes=2)
    # The published count leaves out the 32 trainable token embeddings of 64.
    assert sum(p.numel() for p in prior.parameters()) == 1_116_704 + 32 * 64


@pytest.mark.parametrize(("embeddings", "same"), [("learned", True), ("random", False)])
def test_embeddings_start_at_the_codebook_or_not(embeddings, same):
    codebook = torch.randn(5, 8)
    prior = Prior(make_config(**SMALL, embeddings=embeddings), codebook, 10, 3)
    assert torch.equal(prior.token_embedding[:5], codebook) == same
    assert prior.token_embedding.requires_grad


@pytest.mark.parametrize("lower", [None, torch.bfloat16], ids=str)
def test_norms_of_triton(monkeypatch, lower):
    """The logits are float32 and, as the gradients, those of PyTorch's layers, closely even after bfloat16 products."""
    if dispatch.why_not_triton(torch.device("cpu")):
        pytest.skip(dispatch.why_not_triton(torch.device("cpu")))
    prior = small_prior()
    x, tokens = torch.randn(3, 10, 8), torch.randint(0, 6, (3, 10))
    with torch.no_grad():
        for norm in (prior.norm, prior.head[2]):
            norm.weight.normal_()
            norm.bias.normal_()

    def results():
        with torch.autocast("cpu", lower or torch.bfloat16, enabled=lower is not None):
            embedded, logits = prior.embed_tokens(tokens), prior.predict(x)
        inputs = [prior.token_embedding, prior.position_embedding, *prior.norm.parameters(), *prior.head.parameters()]
        return embedded, logits, *torch.autograd.grad((embedded.square().sum(), logits.square().sum()), inputs)

    expected = results()
    monkeypatch.setattr(prior_module, "layer_norm", functools.partial(layer_norm, impl="triton"))
    for ours, theirs in zip(results(), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= (1e-5 if lower is None else 1e-2) * theirs.norm()


@pytest.mark.parametrize(("masking", "share"), [("masked", 2 / math.pi), ("kept", 1 - 2 / math.pi)])
def test_mask_share_of_both_conventions(masking, share):
    generator = torch.Generator().manual_seed(0)
    masks = [random_mask((4, 64), masking, generator, torch.device("cpu")) for _ in range(2000)]
    counts = torch.stack([mask.sum(1) for mask in masks])
    assert (counts == counts[:, :1]).all()  # one ratio a batch
    # floor() takes half a position on average.
    expected = share - 0.5 / 64 if masking == "masked" else share + 0.5 / 64
    assert abs(counts.double().mean() / 64 - expected) < 4 * 0.31 / math.sqrt(2000)
    positions = torch.stack(masks).double().mean((0, 1))
    assert (positions - positions.mean()).abs().max() < 0.03


@pytest.mark.parametrize("masking", ["masked", "kept"])
def test_no_token_is_masked_before_all_finer_ones(masking):
    levels, n = 3, 8
    partly = torch.zeros(n)
    for seed in range(300):
        mask = random_mask((4, levels * n), masking, torch.Generator().manual_seed(seed), torch.device("cpu"), levels)
        t = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        drawn = int(levels * n * math.cos(0.5 * math.pi * t))
        assert (mask.sum(1) == (drawn if masking == "masked" else levels * n - drawn)).all()
        each = mask.view(4, levels, n)
        for coarse in range(levels - 1):
            begun = each[:, coarse].any(1)
            assert each[begun][:, coarse + 1 :].all()
        of_one = each.any(2) & ~each.all(2)
        partly += each[of_one].sum(0)
    assert partly.min() > 0.7 * partly.max()  # within a level any position


def test_dropout_keeps_a_share_and_the_mean():
    drop = Dropout(0.3, torch.Generator().manual_seed(0), 500, slice(None))
    x = drop(torch.ones(500, 40))
    kept = x != 0
    torch.testing.assert_close(x[kept], torch.full_like(x[kept], 1 / 0.7))
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / 20_000) ** 0.5
    assert not torch.equal(drop(torch.ones(500, 40)) != 0, kept)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_coins_on_a_cpu_are_independent(p):
    """Four of them come from one number."""
    each = coins(p, (60_000, 5), torch.Generator().manual_seed(0), torch.ones(())).double()
    flat = each.flatten()
    for lag in (1, 2, 3, 4, 5):
        both = (flat[:-lag] * flat[lag:]).mean()
        assert abs(both - p * p) <= 5 * (p * p * (1 - p * p) / len(flat)) ** 0.5 * 2, lag
    assert (each.mean(0) - p).abs().max() <= 5 * (p * (1 - p) / len(each)) ** 0.5


def test_dropout_does_not_depend_on_the_number_of_processes():
    x = torch.randn(7, 3, 4)
    parts = [
        Dropout(0.5, torch.Generator().manual_seed(0), 7, own)(x[own])
        for own in (slice(0, 4), slice(4, 7), slice(7, 7))
    ]
    assert torch.equal(torch.cat(parts), Dropout(0.5, torch.Generator().manual_seed(0), 7, slice(None))(x))


def test_dropout_changes_the_loss_and_without_it_nothing_is_drawn(monkeypatch):
    prior, tokens = small_prior(), torch.randint(0, 5, (6, 10))
    generators = {}

    def loss(p):
        generators[p] = torch.Generator().manual_seed(3)
        return stage2_losses(prior, tokens, None, make_config(**SMALL, prior_dropout=p), generators[p])["loss"]

    plain, dropped = loss(0.0), loss(0.3)
    assert dropped.isfinite() and dropped != plain
    mask = random_mask((6, 10), "masked", torch.Generator().manual_seed(3), torch.device("cpu"))
    logits = prior(tokens.masked_fill(mask, 5), torch.full((6,), 3))
    assert torch.equal(plain, F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").mean())
    generator = torch.Generator().manual_seed(3)
    random_mask((6, 10), "masked", generator, torch.device("cpu"))
    assert torch.equal(generators[0.0].get_state(), generator.get_state())


def test_loss_is_over_all_positions_and_classes_are_dropped():
    prior = small_prior(class_dropout=0.0)
    config = make_config(**SMALL, class_dropout=0.0, prior_dropout=0.0)
    tokens = torch.randint(0, 5, (6, 10), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    mask = random_mask((6, 10), "masked", torch.Generator().manual_seed(3), torch.device("cpu"))
    expected = F.cross_entropy(prior(tokens.masked_fill(mask, 5), labels).permute(0, 2, 1), tokens)
    actual = stage2_losses(prior, tokens, labels, config, torch.Generator().manual_seed(3))
    torch.testing.assert_close(actual["loss"], expected)
    torch.testing.assert_close(actual["masked_share"], mask.float().mean())

    dropped = stage2_losses(
        prior, tokens, labels, dataclasses.replace(config, class_dropout=1.0), torch.Generator().manual_seed(3)
    )
    unlabelled = stage2_losses(prior, tokens, None, config, torch.Generator().manual_seed(3))
    torch.testing.assert_close(dropped["loss"], unlabelled["loss"])
    assert not torch.equal(dropped["loss"], actual["loss"])


@pytest.mark.parametrize("tau", [1.0, 0.4])
@pytest.mark.parametrize("limit", [2**31, 0], ids=["probabilities", "latents"])
def test_token_distribution_is_the_softmax_of_negative_distances(limit, tau, monkeypatch):
    monkeypatch.setattr(TokenDistribution, "MAX_BYTES", limit)
    torch.manual_seed(0)
    model = VQVAE(make_config(**SMALL), 1, 40).eval()
    x = torch.randn(3, 1, 40)
    distribution = TokenDistribution(model, x, temperature=tau, batch_size=2)
    z = model.encode(model.stft(x))
    p = torch.softmax(-torch.cdist(z.double(), model.vq.codebook.double()).square() / tau, -1)  # [3, n, K]
    draws, rows = 4000, torch.tensor([2, 0])
    generator = torch.Generator().manual_seed(0)
    counts = sum(F.one_hot(distribution.draw(rows, generator), 5) for _ in range(draws))
    expected = draws * p[rows]
    seen = expected > 5
    z_score = ((counts - expected) / (expected * (1 - p[rows])).sqrt().clamp_min(1e-9))[seen]
    assert z_score.abs().max() < 4.5
    assert 0.7 < z_score.square().mean() < 1.3


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("limit", [2**31, 0], ids=["probabilities", "latents"])
def test_at_temperature_0_tokens_are_the_nearest(limit, levels, monkeypatch):
    monkeypatch.setattr(TokenDistribution, "MAX_BYTES", limit)
    torch.manual_seed(0)
    model, x = VQVAE(make_config(**SMALL, codebook_levels=levels), 1, 40).eval(), torch.randn(3, 1, 40)
    distribution = TokenDistribution(model, x, temperature=0.0, batch_size=2)
    for seed in range(5):
        tokens = distribution.draw(torch.tensor([2, 0, 1]), torch.Generator().manual_seed(seed))
        assert torch.equal(tokens, model.tokenize(x)[[2, 0, 1]])


def test_finer_tokens_are_the_nearest_to_what_the_drawn_ones_leave():
    torch.manual_seed(0)
    model, x = VQVAE(make_config(**SMALL, codebook_levels=2), 1, 40).eval(), torch.randn(3, 1, 40)
    distribution, rows = TokenDistribution(model, x), torch.tensor([2, 0])
    n, z = model.num_tokens // 2, model.encode(model.stft(x))[[2, 0]]
    first, second = (vq.codebook.double() for vq in model.levels)
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(2, n, 5)
    for _ in range(400):
        coarse, fine = distribution.draw(rows, generator).split(n, 1)
        assert torch.equal(fine, 5 + torch.cdist(z.double() - first[coarse], second).argmin(-1))
        seen += F.one_hot(coarse, 5)
    p = torch.softmax(-torch.cdist(z.double(), first).square(), -1)
    assert (seen / 400 - p).abs().max() < 4.5 * 0.5 / 20


def test_the_distribution_may_take_all_the_bytes_it_is_given(monkeypatch):
    """float32 probabilities of every token of every series."""
    model = VQVAE(make_config(**SMALL), 1, 40).eval()
    x = torch.randn(3, 1, 40)
    size = 4 * 3 * model.num_tokens * 5
    for limit, latents in ((size, False), (size - 1, True)):
        monkeypatch.setattr(TokenDistribution, "MAX_BYTES", limit)
        distribution = TokenDistribution(model, x)
        assert distribution.stores_latents == latents
        assert distribution.stored.shape == (3, model.num_tokens, 8 if latents else 5)


def test_each_token_has_a_draw_of_its_own(monkeypatch):
    """Of four codes equally likely, a draw on the edge of two takes the second, and none is beyond the last."""
    draws = torch.tensor([[0.0, 0.2, 0.25, 0.5, 1.0], [0.99, 0.75, 0.74, 0.3, 0.1]])
    distribution = TokenDistribution.__new__(TokenDistribution)
    distribution.stores_latents, distribution.stored = False, torch.tensor([0.25, 0.5, 0.75, 1]).expand(2, 5, 4)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: draws.view(shape))
    drawn = distribution.draw(torch.arange(2), torch.Generator())
    assert drawn.tolist() == [[0, 0, 1, 2, 3], [3, 3, 2, 1, 0]]


def test_losses_of_the_parts_of_a_batch_add_up():
    """Each with its share of the rows: 4 of 6, 2 and none."""
    prior, config = small_prior(), make_config(**SMALL, class_dropout=0.5)
    tokens, labels = torch.randint(0, 5, (6, 10)), torch.arange(6) % 3

    def loss(**part):
        return stage2_losses(prior, tokens, labels, config, torch.Generator().manual_seed(3), **part)["loss"]

    parts = [
        loss(local_slice=slice(*own), loss_weight=weight)
        for *own, weight in ((0, 4, 4 / 6), (4, 6, 2 / 6), (6, 6, 0.0))
    ]
    assert parts[2] == 0
    torch.testing.assert_close(sum(parts), loss())


class AsOnAGpu(torch.Tensor):
    device = torch.device("cuda")


def test_ranks_without_a_sort_are_those_of_a_sort():
    x = torch.tensor([[0.5, 0.1, 0.5, 0.9, 0.1], [0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = [[2, 0, 3, 4, 1], [0, 1, 2, 3, 4]]
    assert ranks(x).tolist() == ranks(x.as_subclass(AsOnAGpu)).tolist() == expected


@pytest.mark.gpu
def test_ranks_on_a_gpu_are_those_of_a_cpu():
    x = torch.randint(0, 50, (64, 75), generator=torch.Generator().manual_seed(0)) / 50  # with equal ones
    assert torch.equal(ranks(x.cuda()).cpu(), ranks(x))
