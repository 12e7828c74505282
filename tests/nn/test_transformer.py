import pytest
import torch
from torch.nn import functional as F

from ncfast.nn import transformer
from ncfast.nn.transformer import RMSNorm, Transformer
from ncfast.ops import dispatch, fused_linear_reference


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


def outputs(model, x, dtype=None):
    """model(x) and the gradients of its squares, of x and of every parameter. dtype: of autocast."""
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        y = model(x)
    inputs = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(y.double().square().sum(), list(inputs.values()))
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def assert_close(actual, expected, tolerance):
    for name, right in expected.items():
        assert (actual[name].double() - right).norm() <= tolerance * right.norm() + 1e-9, name


def model_and_input():
    torch.manual_seed(0)
    return Transformer(4, 16, length=6, layers=2, heads=2, head_dim=8), torch.randn(3, 6, 4)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_value_and_gradients_by_every_implementation(impl, monkeypatch):
    """x of a half-block goes round it through the first of its layers, gradients included."""
    cpu = torch.device("cpu")
    reason = {"cpp": dispatch.why_not_cpp, "triton": dispatch.why_not_triton}.get(impl, lambda device: None)(cpu)
    if reason:
        pytest.skip(reason)
    model, x = model_and_input()

    def plain(x, weight, bias, norm_weight, residual, *, norm_eps, gelu, return_x):
        y = fused_linear_reference(x, weight, bias, norm_weight, residual, norm_eps=norm_eps, gelu=gelu)
        return (y, x) if return_x else y

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "fused_linear", plain)
        expected = outputs(model.double(), x.double().requires_grad_())
    chosen = transformer.fused_linear
    monkeypatch.setattr(transformer, "fused_linear", lambda *inputs, **options: chosen(*inputs, impl=impl, **options))
    assert_close(outputs(model.float(), x.requires_grad_()), expected, 1e-5)


def test_under_autocast():
    model, x = model_and_input()
    expected = outputs(model, x.requires_grad_())
    assert_close(outputs(model, x, torch.bfloat16), expected, 0.1)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
