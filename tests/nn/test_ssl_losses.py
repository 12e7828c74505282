import copy
import inspect

import pytest
import torch

from ncfast.nn.ssl_losses import BarlowTwinsLoss, VIbCRegLoss, VICRegLoss
from ncfast.ops import barlow_twins_loss, vibcreg_loss, vicreg_loss

# module, function, options that no convention has
LOSSES = {
    "barlow": (BarlowTwinsLoss, barlow_twins_loss, {"lambd": 0.3, "ddof": 0, "eps": 0.1, "eps_std": 0.2, "scale": 3.0}),
    "vicreg": (VICRegLoss, vicreg_loss, {"sim": 2.0, "var": 3.0, "cov": 4.0, "eps": 0.1, "var_reduction": "mean"}),
    "vibcreg": (VIbCRegLoss, vibcreg_loss, {"sim": 2.0, "var": 3.0, "cov": 4.0, "eps": 0.1, "var_reduction": "mean"}),
}


def views():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(12, 40, generator=generator).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"convention": "solo", "route": "direct", "impl": "reference"}], ids=str)
def test_is_the_function_with_its_options(name, given, options):
    module, function, own = LOSSES[name]
    options = {**options, **(own if given else {})}
    za, zb = views()
    expected = function(za, zb, **options)
    actual = module(**options)(za, zb)
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(loss, (za, zb)) for loss in (actual, expected)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_takes_the_keyword_arguments_of_the_function(name):
    module, function, _ = LOSSES[name]
    of_function = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    of_module = [p for p in inspect.signature(module).parameters.values()]
    assert of_module == of_function
    with pytest.raises(TypeError, match="lamda"):
        module(lamda=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_options_are_attributes(name):
    module, function, own = LOSSES[name]
    loss = module(**own)
    for option, value in own.items():
        assert getattr(loss, option) == value
    loss.convention = "byol"
    with pytest.raises(ValueError, match="convention is"):
        loss(*views())
    assert not list(loss.parameters()) and not loss.state_dict()
    assert torch.equal(copy.deepcopy(module(**own))(*views()), function(*views(), **own))


def test_shows_what_was_given():
    shown = repr(VICRegLoss(cov=2.0, convention="facebook"))
    assert shown.startswith("VICRegLoss(cov=2.0, convention='facebook', route='auto'") and "sim" not in shown


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_whole(name):
    loss = LOSSES[name][0]()
    za, zb = views()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(za, zb), loss(za, zb))
