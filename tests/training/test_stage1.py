import pytest
import torch
from torch.nn import functional as F

from ncfast.config import make_config
from ncfast.models.vqvae import VQVAE
from ncfast.nn import encoder_decoder
from ncfast.nn.projector import pool
from ncfast.ops import vicreg_loss
from ncfast.training.self_supervision import SSL_LOSSES, SelfSupervision
from ncfast.training.stage1 import Gaps, mean_squared_errors, stage1_losses


def small_config(**options):
    return make_config(**{"dim": 8, "residual_blocks": 1, "codebook_size": 6, "projector_dim": 16, **options})


LENGTHS = (8, 9, 24, 65, 97, 140, 500)


@pytest.mark.parametrize(("n_fft", "length"), [(4, 4), (4, 7), *((n_fft, n) for n_fft in (4, 8) for n in LENGTHS)])
@pytest.mark.parametrize("channels", [1, 3])
def test_length_out_is_length_in(length, channels, n_fft):
    model = VQVAE(small_config(n_fft=n_fft), channels, length).eval()
    x = torch.randn(2, channels, length)
    assert model.reconstruct(x).shape == x.shape
    tokens = model.tokenize(x)
    assert tokens.shape == (2, model.num_tokens) and tokens.max() < 6


def test_tokens_of_the_papers_shapes():
    with torch.device("meta"):
        grids = {
            length: VQVAE(make_config("paper"), 1, length).grid
            for length in (500, 96, 152, 1024, 945, 140, 398, 70, 65)
        }
    assert grids == {
        500: (5, 15),
        96: (5, 12),
        152: (5, 9),
        1024: (5, 8),
        945: (5, 14),
        140: (5, 8),
        398: (5, 12),
        70: (5, 9),
        65: (5, 8),
    }


@pytest.mark.parametrize("one_batch", [False, True])
def test_losses_are_the_published_sum(one_batch, monkeypatch):
    """The whole loss of one batch against a transcription that calls each part on its own, in the authors' order."""
    if one_batch:  # as on a GPU
        monkeypatch.setattr(encoder_decoder, "in_turns", lambda x, views: False)
    torch.manual_seed(0)
    config = small_config(ssl="vicreg")
    model, ssl = VQVAE(config, 1, 60), SelfSupervision(config)
    reference = VQVAE(config, 1, 60)
    reference.load_state_dict(model.state_dict())
    x, view = torch.randn(7, 1, 60), torch.randn(7, 1, 60)

    u = reference.stft(x)
    z = reference.encoder(u)  # [B, D, H, W']
    codebook = reference.vq.codebook
    rows = z.permute(0, 2, 3, 1)
    z_q = codebook[torch.cdist(rows.double(), codebook.double()).argmin(-1)].permute(0, 3, 1, 2)
    straight_through = z_q + (z - z.detach())  # the code, exactly
    u_hat = reference.decoder(straight_through)
    expected = F.mse_loss(reference.stft.inverse(u_hat), x) + F.mse_loss(u_hat, u) + F.mse_loss(z, z_q.detach())
    u_view = reference.stft(view)
    z_view = reference.encoder(u_view)
    u_view_hat = reference.decoder(z_view)
    expected = expected + 0.1 * (F.mse_loss(reference.stft.inverse(u_view_hat), view) + F.mse_loss(u_view_hat, u_view))

    def pooled(grid):
        return torch.cat([grid.flatten(2).mean(2), grid.flatten(2).amax(2)], 1)

    expected = expected + 0.01 * vicreg_loss(*ssl.projector(pooled(straight_through), pooled(z_view)))

    actual = stage1_losses(model, ssl, x, view, 0.1)["loss"]
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-6, msg=name)
    for (name, p), q in zip(model.encoder.named_buffers(), reference.encoder.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_without_ssl_there_is_one_branch():
    config = small_config(ssl="none")
    losses = stage1_losses(VQVAE(config, 1, 60), None, torch.randn(4, 1, 60), None, 0.1)
    assert set(losses) == {"loss", "reconstruction_time", "reconstruction_spectrum", "commitment", "perplexity"}
    total = losses["reconstruction_time"] + losses["reconstruction_spectrum"] + losses["commitment"]
    torch.testing.assert_close(losses["loss"], total)


def test_losses_count_what_was_observed():
    """What stands in a gap changes the losses through the encoder alone: with that fixed, not at all."""
    torch.manual_seed(0)
    model = VQVAE(small_config(ssl="none"), 2, 60, has_gaps=True)
    x, view = torch.randn(4, 2, 60), torch.randn(4, 2, 60)
    seen, seen_view = torch.rand(4, 2, 60) < 0.7, torch.rand(4, 2, 60) < 0.7
    z = torch.randn(8, model.num_tokens, 8)
    model.encode = lambda u, views: z
    codes = {name: value.clone() for name, value in model.vq.state_dict().items()}
    found = []
    for filling in (0.0, 9.0):
        model.vq.load_state_dict(codes)
        a, b = (torch.where(mask, part, filling) for mask, part in ((seen, x), (seen_view, view)))
        both = torch.cat([seen, seen_view])
        found.append(stage1_losses(model, None, a, b, 0.1, gaps=Gaps(both, 0.7)))
    for name, loss in found[0].items():
        torch.testing.assert_close(loss, found[1][name], msg=name)
    model.vq.load_state_dict(codes)
    z_q = model.vq(z[:4])[0]
    u_hat = model.decode(torch.cat([z_q, z[4:]]), 2)
    x_hat = model.stft.inverse(u_hat)
    error = torch.where(seen, x - x_hat[:4], 0)
    torch.testing.assert_close(found[0]["reconstruction_time"], error.square().sum() / (0.7 * x.numel()))
    # û against the spectrogram of the series with x̂ in its gaps: STFT is linear.
    error = u_hat[:4] - model.stft(x_hat[:4] + error)
    torch.testing.assert_close(found[0]["reconstruction_spectrum"], error.square().mean() / 0.7)


def test_the_encoder_sees_how_much_is_missing_around_each_frame():
    model = VQVAE(small_config(n_fft=4, halvings=2), 1, 12, has_gaps=True)
    observed = torch.arange(12) < 6
    u = model.spectrum(torch.zeros(1, 1, 12), observed[None, None])
    # Frame w sees the samples w - 2 .. w + 1 of a column of 4.
    assert u.shape == (1, 3, 3, 13)
    assert u[0, 2].tolist() == [[share**4 for share in (0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1)]] * 3
    assert (model.spectrum(torch.zeros(1, 1, 12))[:, 2] == 0).all()


@pytest.mark.parametrize("ssl", list(SSL_LOSSES))
def test_every_ssl_method_reaches_the_encoder_from_both_views(ssl):
    torch.manual_seed(0)
    config = small_config(ssl=ssl)
    head = SelfSupervision(config)
    z_a, z_b = (torch.randn(6, 8, 5, 4, requires_grad=True) for _ in range(2))
    for gradient in torch.autograd.grad(head(z_a, z_b), (z_a, z_b)):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_error_of_nothing_is_zero():
    a, b = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    for views in (1, 2, 3):
        expected = [(p - q).square().mean() for p, q in zip(a.chunk(views), b.chunk(views), strict=True)]
        torch.testing.assert_close(mean_squared_errors(a, b, views), tuple(expected))
        assert mean_squared_errors(a[:0], b[:0], views) == (0,) * views


def test_the_ssl_loss_is_of_the_rows_of_all_processes():
    torch.manual_seed(0)
    ssl = SelfSupervision(small_config(ssl="barlow"))
    z_a, z_b = (torch.randn(6, 8, 5, 4) for _ in range(2))
    others = torch.cat([pool(z_a[2:]), pool(z_b[2:])], 1)
    actual = ssl(z_a[:2], z_b[:2], lambda own: torch.cat([own, others]))
    torch.testing.assert_close(actual, ssl(z_a, z_b))


def test_losses_of_a_share_of_the_rows_are_that_share():
    config = small_config(ssl="none")
    model, x, view = VQVAE(config, 1, 60), torch.randn(4, 1, 60), torch.randn(4, 1, 60)
    codes = {name: value.clone() for name, value in model.vq.state_dict().items()}
    whole = stage1_losses(model, None, x, view, 0.1)
    model.vq.load_state_dict(codes)
    for name, loss in stage1_losses(model, None, x, view, 0.1, loss_weight=0.25).items():
        torch.testing.assert_close(loss, whole[name] if name == "perplexity" else 0.25 * whole[name], msg=name)


@pytest.mark.parametrize(("halvings", "samples"), [(1, 4), (2, 8), (3, 16)])
def test_a_column_of_the_grid_stands_for_the_hop_doubled_by_each_halving(halvings, samples):
    """The hop of 8 samples a window is 2."""
    model = VQVAE(small_config(halvings=halvings, n_fft=8), 1, 96)
    assert model.samples_per_column == samples and model.grid == (5, 49 >> halvings)


def test_too_few_columns_are_refused():
    with pytest.raises(ValueError, match="at least n_fft"):
        VQVAE(small_config(n_fft=8), 1, 7)


def test_random_codes_are_standard_normal():
    """Mean square 1, with deviation sqrt(2 / 4096) over these 512 x 8 numbers, and mean fourth power 3."""
    torch.manual_seed(0)
    codebook = VQVAE(small_config(codebook_size=512, codebook_init="random"), 1, 24).vq.codebook
    assert abs(codebook.square().mean() - 1) < 4 * (2 / 4096) ** 0.5
    assert abs(codebook.pow(4).mean() - 3) < 4 * (96 / 4096) ** 0.5


@pytest.mark.parametrize("init", ["random", "kmeans"])
def test_no_code_leaves_the_reach_of_codes_and_latents(init):
    """Codes that nothing chooses, after any number of steps: a decoder makes spikes of what it has never met."""
    torch.manual_seed(0)
    vq = VQVAE(small_config(codebook_size=64, codebook_init=init), 1, 24).vq.train()
    latents = 0.1 * torch.randn(2, 40, 8)
    reach = max(vq.codebook.norm(dim=-1).max(), latents.norm(dim=-1).max())
    for _ in range(150):
        vq(latents)
        # The smoothing of the counts adds up to K eps over the number of latents.
        assert vq.codebook.norm(dim=-1).max() <= 1.0001 * reach
