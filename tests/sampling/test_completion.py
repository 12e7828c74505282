"""Completing series: what is observed stays, and what is drawn follows it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ncfast.config import make_config
from ncfast.data.gaps import interpolated
from ncfast.data.stats import DataStats
from ncfast.errors import UserError
from ncfast.models.trained import build_models
from ncfast.ncvqvae import NCVQVAE
from ncfast.sampling.completion import Context

SMALL = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 6,
    "prior_dim": 16,
    "prior_layers": 1,
    "prior_head_dim": 8,
    "decoding_steps": 4,
}
L = 120


def make_model(channels=1, classes=("a", "b")):
    data = DataStats(
        "waves", "", 10, channels, L, tuple(classes), (5,) * len(classes), (2.0,) * channels, (3.0,) * channels
    )
    torch.manual_seed(0)
    config = make_config(**SMALL)
    vqvae, prior = build_models(config, data)
    vqvae.train()
    for _ in range(3):  # statistics of the batch norms, and codes where latents are
        vqvae.vq(vqvae.encode(vqvae.stft(torch.randn(16, channels, L))))
    return NCVQVAE(config, data, vqvae, prior, torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    return make_model()


def series(m, channels=1, seed=0):
    return (2 + 3 * np.random.default_rng(seed).normal(size=(m, channels, L))).astype(np.float32)


def test_observed_samples_come_back_as_they_were_and_the_rest_is_drawn(model):
    x = series(3)
    observed = np.ones(L, bool)
    observed[70:] = False
    completed, labels = model.sample(context=x, mask=observed, seed=1)
    assert completed.shape == (3, 1, L) and labels is None and np.isfinite(completed).all()
    np.testing.assert_array_equal(completed[..., :70], x[..., :70])
    assert not np.array_equal(completed[..., 70:], x[..., 70:])
    # What stands where nothing was observed does not matter.
    hidden = np.where(observed, x, np.nan)
    np.testing.assert_array_equal(model.sample(context=hidden, seed=1)[0], completed)
    np.testing.assert_array_equal(model.sample(context=np.where(observed, x, 99), mask=observed, seed=1)[0], completed)


def test_more_draws_than_contexts_take_them_in_turn_and_any_split_is_the_same(model):
    x = np.where(np.arange(L) < 60, series(3), np.nan)
    whole, labels = model.sample(70, context=x, labels=["b", "a"], seed=2)
    assert labels.tolist() == ["b", "a"] * 35
    for i in (0, 1, 2, 69):
        np.testing.assert_array_equal(whole[i, :, :60], x[i % 3, :, :60].astype(np.float32))
    assert not np.array_equal(whole[0], whole[6])  # the same context and label, another draw
    part, _ = model.sample(25, context=x, labels=["b", "a"], seed=2, start=40)
    np.testing.assert_array_equal(part, whole[40:65])


def test_all_observed_and_nothing_observed(model):
    x = series(2)
    np.testing.assert_array_equal(model.sample(context=x)[0], x)
    nothing = Context(x, np.zeros(L, bool), model.data)
    nothing.find_known_tokens(model.vqvae, torch.randn(7, 1, L), 64)
    assert (nothing.known == 6).all()
    everything = Context(x, None, model.data)
    everything.find_known_tokens(model.vqvae, torch.randn(7, 1, L), 64)
    expected = model.vqvae.tokenize(model.data.normalise(x, torch.device("cpu")))
    assert torch.equal(everything.known, expected)


def test_known_tokens_are_those_that_no_fill_changes(model):
    x = series(5, seed=3)
    context = Context(np.where(np.arange(L) < 80, x, np.nan), None, model.data)
    fills = torch.randn(7, 1, L)
    context.find_known_tokens(model.vqvae, fills, 64)
    share = (context.known < 6).float().mean()
    assert 0.1 < share < 0.9
    # Whatever follows, tokens of columns so far from the gap that the encoder does not see it stay as they are.
    for future in torch.randn(20, 1, L):
        other = model.data.normalise(x, torch.device("cpu"))
        other[..., 80:] = future[..., 80:]
        tokens = model.vqvae.tokenize(other).view(5, *model.vqvae.grid)
        known = context.known.view(5, *model.vqvae.grid)
        assert (known[..., :2] < 6).all() and torch.equal(tokens[..., :2], known[..., :2])
    # The completed series keep the tokens that are known.
    batch = next(iter(model.sample_batches(context=np.where(np.arange(L) < 80, x, np.nan), seed=0)))
    assert batch.tokens.shape == context.known.shape


def test_channels_have_masks_of_their_own():
    model = make_model(channels=2)
    x = series(4, channels=2)
    mask = np.ones((4, 2, L), bool)
    mask[:, 1, 30:90] = False
    completed, _ = model.sample(context=x, mask=mask)
    np.testing.assert_array_equal(completed[mask], x[mask])
    np.testing.assert_array_equal(model.sample(context=x[0], mask=mask[0])[0].shape, (1, 2, L))
    both = model.sample(context=x, mask=mask[:, 1])[0]  # [m, L]: for all channels
    np.testing.assert_array_equal(both[:, 0, :30], x[:, 0, :30])
    assert not np.array_equal(both[:, 0, 30:90], x[:, 0, 30:90])


def test_shapes_a_user_may_bring(model):
    x = series(1)[0, 0]
    for context in (x, x[None], x[None, None]):
        assert model.sample(context=context)[0].shape == (1, 1, L)


def test_a_mask_of_two_series_and_two_channels_is_told_apart():
    data = make_model(channels=2).data
    rng = np.random.default_rng(0)
    x, mask = rng.standard_normal((2, 2, L)), rng.random((2, L)) < 0.5
    with pytest.raises(UserError, match=r"may be \[series, time\] or \[channels, time\]: give mask\[:, None\]"):
        Context(x, mask, data)
    for given in (mask[:, None], mask[None]):
        np.testing.assert_array_equal(Context(x, given, data).observed, np.broadcast_to(given, (2, 2, L)))
    np.testing.assert_array_equal(Context(x[0], mask, data).observed[0], mask)
    for m in (1, 3):  # not as many as channels
        np.testing.assert_array_equal(
            Context(np.resize(x, (m, 2, L)), np.resize(mask, (m, L)), data).observed[:, 1],
            np.resize(mask, (m, L)),
        )


def test_what_a_masked_array_masks_was_not_observed(model):
    hidden = np.random.default_rng(0).random((3, 1, L)) < 0.5
    x = np.ma.array(series(3).reshape(3, 1, L), mask=hidden, fill_value=1e36)
    np.testing.assert_array_equal(Context(x, None, model.data).observed, ~hidden)
    np.testing.assert_array_equal(Context([*x], None, model.data).observed, ~hidden)
    integers = np.ma.array(np.arange(3 * L).reshape(3, 1, L), mask=hidden)
    np.testing.assert_array_equal(Context(integers, None, model.data).observed, ~hidden)


def test_one_channel_has_a_mask_for_each_series(model):
    mask = np.random.default_rng(0).random((3, L)) < 0.5
    np.testing.assert_array_equal(Context(series(3), mask, model.data).observed, mask[:, None])


def small_context(x):
    """Of one channel, whose units are the normalised ones: what is not finite was not observed."""
    x = np.asarray(x, np.float32)
    return Context(x, None, DataStats("", "", 1, 1, x.shape[-1], (), (), (0.0,), (1.0,)))


def small_vqvae(tokenize, columns, span):
    """One row of columns, two codes."""
    return SimpleNamespace(tokenize=tokenize, codebook=torch.zeros(2, 1), grid=(1, columns), samples_per_column=span)


def test_a_fill_is_bent_to_meet_what_was_observed():
    """In a gap it keeps its deviation from its own straight line, on top of the context's."""
    tried = []

    def tokenize(x):
        tried.append(x[0, 0].tolist())
        return torch.zeros(1, 1, dtype=torch.int64)

    fill = torch.tensor([[[5.0, 7, 4, 8, 1]]])  # its line is 5 6 7 8 8, the context's 1 2 3 4 4
    small_context([1, np.nan, np.nan, 4, np.nan]).find_known_tokens(small_vqvae(tokenize, 1, 5), fill, 1)
    assert tried == [[1, 2, 3, 4, 4], [1, 3, 0, 4, -3]]


def test_half_of_a_columns_samples_make_it_known():
    """Two samples a column, and the last has the one that is left over: 2, 1, 0 of 2, and 1, 2 of 3 are observed."""
    vqvae = small_vqvae(lambda x: torch.ones(len(x), 4, dtype=torch.int64), 4, 2)
    for end, known in (([0, np.nan, np.nan], [1, 1, 2, 2]), ([np.nan, 0, 0], [1, 1, 2, 1])):
        context = small_context([0, 0, 0, np.nan, np.nan, np.nan, *end])
        context.find_known_tokens(vqvae, torch.zeros(1, 1, 9), 1)
        assert context.known.tolist() == [known]


def test_a_fine_token_is_known_only_with_its_coarse_one():
    """Two levels of three columns of two samples: a fill changes the first coarse token and the second fine one."""

    def tokenize(x):
        tokens = torch.tensor([[0, 0, 0, 1, 1, 1]]).repeat(len(x), 1)
        if float(x[0, 0, 1]) != 0:
            tokens[:, 0], tokens[:, 4] = 1, 0
        return tokens

    context = small_context([0, np.nan, 0, np.nan, 0, np.nan])
    context.find_known_tokens(small_vqvae(tokenize, 3, 2), torch.tensor([[[0.0, 5, 0, 5, 0, 5]]]), 1)
    assert context.known.tolist() == [[2, 0, 0, 2, 2, 1]]


def test_interpolation():
    x = torch.tensor([[[9.0, 1, np.nan, 9, 4, 9]]])
    observed = torch.tensor([[[False, True, False, False, True, False]]])
    assert interpolated(x, observed).tolist() == [[[1, 1, 2, 3, 4, 4]]]
    assert (interpolated(x, torch.zeros_like(observed)) == 0).all()


@pytest.mark.parametrize(
    ("context", "mask", "message"),
    [
        (np.zeros(L - 1), None, r"context is \[m, 1, 120\] .* got \[119\]"),
        (np.zeros((2, 3, L)), None, r"got \[2, 3, 120\]"),
        (np.zeros((0, L)), None, r"m from 1"),
        (np.zeros((2, L)), np.ones(L), "mask is bool"),
        (np.zeros((2, L)), np.ones((3, L), bool), "mask has the shape of the context"),
        (np.full((2, L), np.nan), np.ones(L, bool), "NaN or infinity"),
    ],
)
def test_refuses(model, context, mask, message):
    with pytest.raises(UserError, match=message):
        model.sample(context=context, mask=mask)
