"""Codes of several levels, against a residual quantisation written independently."""

import numpy as np
import torch

from ncfast.config import make_config
from ncfast.models.vqvae import VQVAE

K, LEVELS = 6, 3


def make_model():
    torch.manual_seed(0)
    options = {"dim": 8, "residual_blocks": 1, "codebook_size": K, "codebook_levels": LEVELS}
    return VQVAE(make_config(**options), 1, 60).eval()


def residual_codes(z, books):
    """Latents float64 [B, n, D] -> for each level its nearest codes of what the coarser ones leave, int64 [B, n]."""
    indices, left = [], z
    for book in books:
        indices.append(np.square(left[:, :, None] - book).sum(-1).argmin(-1))
        left = left - book[indices[-1]]
    return indices, left


def test_each_level_codes_what_the_coarser_ones_leave():
    model, x = make_model(), torch.randn(5, 1, 60, generator=torch.Generator().manual_seed(1))
    n = model.grid[0] * model.grid[1]
    books = [vq.codebook.double().numpy() for vq in model.levels]
    assert model.num_tokens == LEVELS * n and model.codebook.shape == (LEVELS * K, 8)
    np.testing.assert_array_equal(model.codebook.double().numpy(), np.concatenate(books))
    with torch.no_grad():
        z = model.encode(model.spectrum(x)).double().numpy()
        indices, left = residual_codes(z, books)
        tokens = model.tokenize(x)
        expected = np.concatenate([index + level * K for level, index in enumerate(indices)], 1)
        np.testing.assert_array_equal(tokens, expected)
        embedded = model.embed(tokens)
        np.testing.assert_allclose(embedded, z - left, atol=1e-5)
        series = model.stft.inverse(model.decode(embedded))
        assert torch.equal(model.detokenize(tokens), series) and torch.equal(model.reconstruct(x), series)


def test_gradients_pass_the_levels_once():
    model = make_model().train()
    z = torch.randn(4, model.num_tokens // LEVELS, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    books = [vq.codebook.double().numpy().copy() for vq in model.levels]  # before they move
    _, left = residual_codes(z.detach().double().numpy(), books)
    z_q, commitment = model.quantize(z)
    np.testing.assert_allclose(z_q.detach(), z.detach().double().numpy() - left, atol=1e-5)
    weight = torch.randn(z.shape)
    torch.testing.assert_close(torch.autograd.grad((z_q * weight).sum(), z, retain_graph=True)[0], weight)
    # Each level's loss is of what the levels up to it leave.
    lefts = [residual_codes(z.detach().double().numpy(), books[: level + 1])[1] for level in range(LEVELS)]
    expected = sum(np.square(each).mean() for each in lefts)
    np.testing.assert_allclose(commitment.item(), expected, rtol=1e-5)
    gradient = torch.autograd.grad(commitment, z)[0]
    np.testing.assert_allclose(gradient, sum(2 * each / each.size for each in lefts), atol=1e-6)
    assert all(not np.array_equal(vq.codebook, book) for vq, book in zip(model.levels, books, strict=True))
