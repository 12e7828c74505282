import pytest
import torch

from ncfast.nn.stft import STFT

LENGTHS = [8, 9, 15, 24, 65, 96, 140, 499, 500, 720]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("n_fft", [4, 8, 16])
def test_equals_torch_stft(length, n_fft):
    if length < n_fft:
        pytest.skip("shorter than the window")
    x = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(length))
    u = STFT(length, n_fft)(x)
    window = torch.hann_window(n_fft, dtype=torch.float64)
    flat = x.double().reshape(6, length)
    expected = torch.stft(flat, n_fft, n_fft // 4, n_fft, window, return_complex=True)  # [6, H, W]
    expected = torch.stack([expected.real, expected.imag], 1).view(3, 4, *expected.shape[1:])
    torch.testing.assert_close(u.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_inverse_returns_every_sample(length):
    stft = STFT(length)
    x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length))
    assert stft.inverse(stft(x)).shape == x.shape
    torch.testing.assert_close(stft.inverse(stft(x)), x, rtol=0, atol=2e-6)


def test_inverse_equals_torch_istft_on_any_spectrum():
    length, n_fft = 140, 8
    stft = STFT(length, n_fft)
    u = torch.randn(4, 2, 5, 71, generator=torch.Generator().manual_seed(0))
    spectrum = torch.complex(u[:, 0], u[:, 1]).to(torch.complex128)
    window = torch.hann_window(n_fft, dtype=torch.float64)
    expected = torch.istft(spectrum, n_fft, n_fft // 4, n_fft, window, length=length)
    torch.testing.assert_close(stft.inverse(u)[:, 0].double(), expected, rtol=0, atol=3e-6)


def test_refuses_short_series_and_odd_windows():
    with pytest.raises(ValueError, match="at least n_fft = 8"):
        STFT(7)
    with pytest.raises(ValueError, match="multiple of 4"):
        STFT(100, 6)
