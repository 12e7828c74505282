import pytest
import torch

from ncfast.nn.encoder_decoder import Decoder, Encoder, num_downsampling_blocks


@pytest.mark.parametrize(
    ("length", "blocks"),  # the authors' depth for their data sets
    [(96, 2), (500, 4), (152, 3), (128, 3), (1024, 6), (945, 5), (140, 3), (512, 5), (398, 4), (70, 2), (65, 2)],
)
def test_depth_is_the_papers(length, blocks):
    assert num_downsampling_blocks(length) == blocks


def test_parameter_counts_are_the_papers():
    encoder = Encoder(2, 64, 4, 4)
    decoder = Decoder(2, 64, 4, 4, (5, 251))
    assert sum(p.numel() for p in encoder.parameters()) == 315_136
    assert sum(p.numel() for p in decoder.parameters()) == 314_484


@pytest.mark.parametrize("width", [5, 36, 71, 251])
def test_shapes(width):
    encoder, decoder = Encoder(4, 8, 2, 1), Decoder(4, 8, 2, 1, (5, width))
    z = encoder(torch.randn(2, 4, 5, width))
    assert z.shape == (2, 8, 5, width // 4)
    assert decoder(z).shape == (2, 4, 5, width)
