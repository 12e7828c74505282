import math

import numpy as np
import pytest
import torch

from ncfast.ops import philox, unmask_step


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the generator's published known answers (Random123, kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox.philox4x32(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_uniform_is_addressed_and_open():
    sample, position = torch.arange(2**33, 2**33 + 500), torch.arange(100)
    u = philox.uniform(7, sample[:, None], position, step=3, stream=philox.TOKENS)
    assert u.shape == (500, 100) and u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.numel())
    part = philox.uniform(7, sample[123:124, None], position[40:50], step=3, stream=philox.TOKENS)
    torch.testing.assert_close(u[123:124, 40:50], part, rtol=0, atol=0)
    for other in (
        philox.uniform(8, sample[:, None], position, step=3, stream=philox.TOKENS),
        philox.uniform(7, sample[:, None], position, step=4, stream=philox.TOKENS),
        philox.uniform(7, sample[:, None], position, step=3, stream=philox.CONFIDENCE),
        philox.uniform(7, sample[:, None] + 2**32, position, step=3, stream=philox.TOKENS),
    ):
        assert (u != other).float().mean() > 0.999


def step(logits, tokens, **options):
    options = {"seed": 1, "step": 0, "num_masked": 0, "choice_temperature": 0.0} | options
    return unmask_step(logits, tokens, torch.arange(len(tokens)), **options)


def test_last_step_draws_from_the_softmax():
    B, n, K = 40_000, 2, 4
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 3.0, -9.0, 0.0]])
    drawn = step(logits.expand(B, n, K), torch.full((B, n), K))
    for position in range(n):
        p = logits[position].double().softmax(0).numpy()
        observed = np.bincount(drawn[:, position], minlength=K)
        chi_square = ((observed - B * p) ** 2 / (B * p)).sum()
        assert chi_square < 16.27  # 99.9 % quantile with three degrees of freedom


def test_known_tokens_stay_and_counts_are_exact():
    generator = torch.Generator().manual_seed(0)
    B, n, K = 50, 17, 5
    logits = torch.randn(B, n, K, generator=generator)
    tokens = torch.randint(0, K, (B, n), generator=generator)
    tokens[:, 8:] = K
    out = step(logits, tokens, num_masked=4, choice_temperature=2.0)
    torch.testing.assert_close(out[:, :8], tokens[:, :8])
    assert ((out == K).sum(1) == 4).all()


def test_least_confident_are_masked_again_and_ties_go_to_the_left():
    K = 2
    # One code is certain at positions 0 and 3, likely at 1 and equally likely at 2 and 4.
    logits = torch.tensor([[[50.0, 0.0], [2.0, 0.0], [0.0, 0.0], [50.0, 0.0], [0.0, 0.0]]])
    rows = 64
    out = step(logits.expand(rows, -1, -1), torch.full((rows, 5), K), num_masked=1)
    masked = (out == K).float().argmax(1)
    drawn = step(logits.expand(rows, -1, -1), torch.full((rows, 5), K))
    # Position 1 is the least confident where its unlikely code was drawn; otherwise 2 and 4 tie and 2 is masked.
    torch.testing.assert_close(masked, torch.where(drawn[:, 1] == 1, 1, 2))


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(9, 12, 6, generator=torch.Generator().manual_seed(3))
    tokens = torch.full((9, 12), 6)
    whole = step(logits, tokens, num_masked=5, choice_temperature=3.0)
    alone = unmask_step(
        logits[4:5], tokens[4:5], torch.tensor([4]), seed=1, step=0, num_masked=5, choice_temperature=3.0
    )
    torch.testing.assert_close(whole[4:5], alone)


def test_noise_changes_what_is_kept_and_fades():
    logits = torch.randn(200, 20, 4, generator=torch.Generator().manual_seed(5)) * 3
    tokens = torch.full((200, 20), 4)
    plain = step(logits, tokens, num_masked=10)
    noisy = step(logits, tokens, num_masked=10, choice_temperature=4.0)
    tiny = step(logits, tokens, num_masked=10, choice_temperature=1e-9)
    assert ((plain == 4) != (noisy == 4)).any(1).float().mean() > 0.9
    torch.testing.assert_close(plain, tiny)


def test_refuses_shapes():
    with pytest.raises(ValueError, match="tokens"):
        unmask_step(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.arange(2), seed=0, step=0, num_masked=0)
