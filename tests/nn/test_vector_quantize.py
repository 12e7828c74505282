import math

import numpy as np
import torch

from ncfast.nn.vector_quantize import VectorQuantize


def test_ema_update_follows_its_definition():
    torch.manual_seed(0)
    vq = VectorQuantize(dim=3, codebook_size=5, decay=0.7, eps=1e-3)
    embed, size, average = (b[0].double().numpy() for b in (vq.embed, vq.cluster_size, vq.embed_avg))
    for step in range(4):
        z = torch.randn(2, 11, 3)
        vq(z)
        rows = z.reshape(-1, 3).double().numpy()
        chosen = ((rows[:, None] - embed) ** 2).sum(-1).argmin(-1)
        one_hot = np.eye(5)[chosen]
        size = 0.7 * size + 0.3 * one_hot.sum(0)
        average = 0.7 * average + 0.3 * one_hot.T @ rows
        embed = average / ((size + 1e-3) / (size.sum() + 5 * 1e-3) * size.sum())[:, None]
        np.testing.assert_allclose(vq.codebook, embed, rtol=1e-4, err_msg=f"step {step}")
        np.testing.assert_allclose(vq.cluster_size[0], size, rtol=1e-5)


def test_output_gradient_loss_and_perplexity():
    torch.manual_seed(0)
    vq = VectorQuantize(dim=4, codebook_size=6).eval()
    codebook = vq.codebook.clone()
    z = torch.randn(3, 7, 4, requires_grad=True)
    out = vq(z)
    torch.testing.assert_close(vq.codebook, codebook)  # eval leaves the codebook alone
    torch.testing.assert_close(out.z_q, codebook[out.tokens])
    torch.testing.assert_close(out.commitment_loss, (z - codebook[out.tokens]).square().mean())
    weight = torch.randn_like(z)
    torch.testing.assert_close(torch.autograd.grad((out.z_q * weight).sum(), z, retain_graph=True)[0], weight)
    expected = 2 * (z - codebook[out.tokens]) / z.numel()
    torch.testing.assert_close(torch.autograd.grad(out.commitment_loss, z)[0], expected)
    share = np.bincount(out.tokens.flatten(), minlength=6) / out.tokens.numel()
    entropy = -sum(p * math.log(p) for p in share if p > 0)
    assert math.isclose(out.perplexity, math.exp(entropy), rel_tol=1e-5)


def test_codebook_maths_is_float32_under_autocast():
    vq = VectorQuantize(dim=8, codebook_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(torch.randn(2, 5, 8).bfloat16())
    assert out.z_q.dtype == out.commitment_loss.dtype == torch.float32
