import torch
from torch.nn import functional as F

from ncfast.nn.transformer import RMSNorm, Transformer


def test_rms_norm_value_and_gradients():
    torch.manual_seed(0)
    norm = RMSNorm(12).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (12,), norm.weight, eps=1e-12))


def test_every_position_sees_every_other():
    torch.manual_seed(0)
    model = Transformer(4, 16, length=6, layers=1, heads=2, head_dim=8)
    x = torch.randn(1, 6, 4, requires_grad=True)
    for position in range(6):
        (gradient,) = torch.autograd.grad(model(x)[0, position].sum(), x)
        assert (gradient.abs().sum(-1) > 0).all()
