import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ncfast.nn import encoder_decoder
from ncfast.nn.encoder_decoder import Decoder, Encoder, LinearResize, num_downsampling_blocks
from ncfast.ops import dispatch


@pytest.mark.parametrize(
    ("length", "blocks"),  # the authors' depth for their data sets
    [(96, 2), (500, 4), (152, 3), (128, 3), (1024, 6), (945, 5), (140, 3), (512, 5), (398, 4), (70, 2), (65, 2)],
)
def test_depth_is_the_papers(length, blocks):
    assert num_downsampling_blocks(length) == blocks


@pytest.mark.parametrize(
    ("length", "n_fft", "blocks"),  # 32 samples are 5 halvings of a hop of 1, 4 of a hop of 2
    [(500, 4, 5), (512, 4, 5), (4096, 4, 5), (4096, 8, 4), (96, 8, 2), (70, 8, 2), (10_000, 128, 1)],
)
def test_columns_of_long_series_stand_for_no_more_samples(length, n_fft, blocks):
    assert num_downsampling_blocks(length, n_fft, 32) == blocks
    assert num_downsampling_blocks(length, n_fft) >= blocks


def test_parameter_counts_are_the_papers():
    """Less the biases of convolutions before a batch norm, which takes them away again."""
    encoder = Encoder(2, 64, 4, 4)
    decoder = Decoder(2, 64, 4, 4, (5, 251))
    # The encoder's 4 halvings and both convolutions of 4 residual blocks; the last one of 4 blocks and 3 doublings.
    assert sum(p.numel() for p in encoder.parameters()) + (4 + 2 * 4) * 64 == 315_136
    assert sum(p.numel() for p in decoder.parameters()) + (4 + 3) * 64 == 314_484


@pytest.mark.parametrize("width", [5, 36, 71, 251])
def test_shapes(width):
    encoder, decoder = Encoder(4, 8, 2, 1), Decoder(4, 8, 2, 1, (5, width))
    z = encoder(torch.randn(2, 4, 5, width))
    assert z.shape == (2, 8, 5, width // 4)
    assert decoder(z).shape == (2, 4, 5, width)


def transcribed_stack(blocks, x):
    """The published residual blocks, layer by layer."""
    for module in blocks:
        x = x + module.block(x) if hasattr(module, "block") else module(x)
    return x


def transcribed_encoder(encoder, u):
    for conv, norm, activation in list(encoder)[: encoder.num_down]:
        u = activation(norm(conv(F.pad(u, (1, 1, 1, 1), mode="replicate"))))
    return transcribed_stack(list(encoder)[encoder.num_down :], u)


def transcribed_decoder(decoder, z):
    blocks = list(decoder.blocks)
    z = transcribed_stack(blocks[: 2 * decoder.num_residual], z)
    for module in blocks[2 * decoder.num_residual :]:
        z = module(z)
    return F.interpolate(z, size=decoder.size, mode="bilinear", align_corners=True)


def spread_out(module):
    """Affine parameters and running statistics that are not those of a new norm."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.2, 1.5)
    return module


def pairs(num_residual=2):
    def encoder():
        return spread_out(Encoder(2, 6, 2, num_residual)).double()

    def decoder():
        return spread_out(Decoder(2, 6, 2, num_residual, (5, 22))).double()

    return (
        (encoder, transcribed_encoder, (6, 2, 5, 22)),
        (decoder, transcribed_decoder, (6, 6, 5, 5)),
    )


@pytest.mark.parametrize("impl", ["in turns", "reference", "triton"])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize("num_residual", [0, 2])
def test_views_are_passes_of_their_own(which, views, num_residual, impl, monkeypatch):
    make, transcribed, shape = pairs(num_residual)[which]
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    dtype = torch.float64
    if impl != "in turns":  # as on a GPU
        monkeypatch.setattr(encoder_decoder, "in_turns", lambda x, views: False)
    if impl == "triton":
        if dispatch.why_not_triton(torch.device("cpu")) is not None:
            pytest.skip("triton does not run here")
        monkeypatch.setattr(dispatch, "DEFAULT", "triton")
        dtype = torch.float32
        ours.to(dtype)
    x = torch.randn(shape, dtype=torch.float64)
    own, other = x.to(dtype, copy=True).requires_grad_(), x.clone().requires_grad_()
    actual = ours(own, views=views)
    expected = torch.cat([transcribed(theirs, part) for part in other.chunk(views)])
    # In float64 what remains are the weights of the last resize, which are float32.
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(actual.double(), expected, **close)
    weights = torch.randn_like(expected)
    (actual * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(own.grad.double(), other.grad, **close)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = q.grad.abs().max().item()
        torch.testing.assert_close(
            p.grad.double(), q.grad, rtol=close["rtol"], atol=10 * close["atol"] * max(scale, 1), msg=name
        )
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p.to(q.dtype), q, **close, msg=name)
        assert not name.endswith("num_batches_tracked") or p == views


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
def test_running_statistics_in_eval(which):
    make, transcribed, shape = pairs()[which]
    module = make().float().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(shape)
    actual, expected = module(x, views=2), transcribed(module, x)
    if which == 0:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
def test_autocast(which, monkeypatch):
    monkeypatch.setattr(encoder_decoder, "in_turns", lambda x, views: False)
    make, transcribed, shape = pairs()[which]
    ours = make().float()
    theirs = make().float()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = ours(x, views=2), torch.cat([transcribed(theirs, part) for part in x.chunk(2)])
    assert actual.dtype == torch.bfloat16
    # Its residual sums start from a float32 z, ours from what its convolutions take it for.
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0.1, atol=0.1)
    actual.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())


def test_last_layer_is_not_rounded_under_autocast(monkeypatch):
    """Where its kernel runs, as on a GPU."""
    if dispatch.why_not_triton(torch.device("cpu")) is not None:
        pytest.skip("triton does not run here")
    decoder = Decoder(2, 6, 2, 0, (5, 22))
    monkeypatch.setattr(encoder_decoder, "normalised", lambda norm, x, **options: x)
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    *firsts, last = [module for module in decoder.modules() if isinstance(module, nn.ConvTranspose2d)]
    z = torch.randn(3, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = decoder(z)
        for conv in firsts:
            z = conv(z)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, decoder.resize(last(z.float())))
    actual.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for conv in (*firsts, last) for p in conv.parameters())
    # Wider ones stay with the library, and in autocast's type.
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoder(8, 6, 2, 0, (5, 22))(torch.randn(3, 6, 5, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (5, 1), (2, 2), (3, 8), (8, 3), (64, 129), (480, 251)])
def test_resize_is_bilinear_interpolation(before, after):
    resize = LinearResize(before, after).double()
    x = torch.randn(2, 3, 4, before, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(x, size=(4, after), mode="bilinear", align_corners=True)
    actual = resize(x)
    weights = torch.randn_like(expected)
    close = {"rtol": 1e-6, "atol": 1e-6}  # the weights are float32
    torch.testing.assert_close(actual, expected, **close)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients, **close)
    single = resize.float()(x.detach().float())
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)
    half = resize(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=0.02)


def test_resize_has_no_state_and_refuses_other_widths():
    resize = LinearResize(6, 4)
    assert not resize.state_dict()
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\]"):
        resize(torch.zeros(2, 1, 5, 7))
