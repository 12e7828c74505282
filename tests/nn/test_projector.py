import copy

import pytest
import torch

from ncfast.nn.projector import Projector


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_equals_two_separate_calls(whiten, device):
    """The two views share the products, not the statistics: all is as if a plain projector saw one after the other."""
    torch.manual_seed(0)
    joint = Projector(6, 16, whiten=whiten, groups=4).double().to(device)
    separate = copy.deepcopy(joint)
    a, b = (torch.randn(9, 6, dtype=torch.float64).to(device) for _ in range(2))

    def plain(x):
        for linear, norm in zip(separate.linears, separate.norms, strict=False):
            x = norm(linear(x)).relu()
        return separate.whiten(separate.linears[-1](x))

    expected_b, expected_a = plain(b), plain(a)
    actual_a, actual_b = joint(a, b)
    torch.testing.assert_close(actual_a, expected_a)
    torch.testing.assert_close(actual_b, expected_b)
    (actual_a.square().sum() + actual_b.sin().sum()).backward()
    (expected_a.square().sum() + expected_b.sin().sum()).backward()
    for (name, p), q in zip(joint.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)
    for (name, p), q in zip(joint.named_buffers(), separate.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_parameter_counts_are_the_papers_but_for_the_idle_biases():
    idle = 3 * 4096
    with torch.device("meta"):
        assert sum(p.numel() for p in Projector(128, 4096).parameters()) + idle == 34_107_392
        assert sum(p.numel() for p in Projector(128, 4096, whiten=True).parameters()) + idle == 34_115_584
