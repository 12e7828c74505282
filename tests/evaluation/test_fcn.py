"""The evaluator's classifier and its cache."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ncfast.engine.cuda_graph import CudaGraph
from ncfast.engine.loop import derived_seed
from ncfast.engine.step import TrainingStep
from ncfast.engine.threads import in_threads
from ncfast.errors import UserError
from ncfast.evaluation import fcn_cache
from ncfast.evaluation.fcn import FCN, LAYERS, Recipe, as_product, train_fcn
from ncfast.evaluation.fcn_cache import cached_fcn
from ncfast.evaluation.network_cache import default_folder

CPU = torch.device("cpu")
QUICK = Recipe(epochs=2, batch_size=16)


def waves(n, seed, length=40):
    """Two classes that differ in frequency, normalised."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    t = np.arange(length) / length
    x = np.sin(2 * np.pi * (2 + 2 * y[:, None]) * t + rng.uniform(0, 2 * np.pi, (n, 1))) * 2**0.5
    return torch.from_numpy((x + 0.3 * rng.normal(size=x.shape))[:, None].astype(np.float32)), y


def randomised(model):
    """With batch norms that do something."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for value in (module.weight.data, module.running_var, module.bias.data, module.running_mean):
                value.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("channels, length", [(1, 8), (3, 31)])
def test_features_are_those_of_three_same_convolutions(channels, length):
    torch.manual_seed(0)
    model = randomised(FCN(channels, 4))
    x = torch.randn(5, channels, length)
    h = x.double()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv1d)]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert [(tuple(c.weight.shape[::2])) for c in convolutions] == [(128, 8), (256, 5), (128, 3)]
    for convolution, norm in zip(convolutions, norms, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: an even kernel copies its input
            h = F.conv1d(h, convolution.weight.double(), padding="same")
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        h = ((h - norm.running_mean.double()[:, None]) * scale[:, None] + norm.bias.double()[:, None]).relu()
    expected = h.mean(2)
    features, probabilities = model.describe(x)
    np.testing.assert_allclose(features, expected.detach(), rtol=2e-4, atol=1e-5)
    logits = expected @ model.head.weight.double().T + model.head.bias.double()
    np.testing.assert_allclose(probabilities, logits.softmax(1).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("channels, filters, kernel, length", [(1, 128, 8, 9), (3, 5, 3, 1), (6, 4, 5, 40)])
def test_product_is_the_convolution(channels, filters, kernel, length):
    torch.manual_seed(0)
    x = torch.randn(5, channels, length + kernel - 1, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(filters, channels, kernel, dtype=torch.float64, requires_grad=True)
    expected = F.conv1d(x, weight)
    actual = as_product(x, weight)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected)
    gradient = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, (x, weight), gradient) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_off_a_cpu_no_convolution_is_left_to_cudnn():
    names = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.device("meta"), Recorded():
        FCN(3, 4)(torch.empty(5, 3, 31)).sum().backward()
    assert names.count("aten.bmm.default") == 3 + 5 and not any("conv" in name for name in names)


def test_on_a_cpu_the_bits_are_those_of_convolutions():
    """Evaluators on disk were trained with them."""
    torch.manual_seed(0)
    model, x = FCN(3, 4).train(), torch.randn(5, 3, 31, requires_grad=True)
    modules, channels = [], 3
    for filters, kernel in LAYERS:
        pad = torch.nn.ConstantPad1d(((kernel - 1) // 2, kernel // 2), 0.0)
        convolution = torch.nn.Conv1d(channels, filters, kernel, bias=False)
        modules += [pad, convolution, torch.nn.BatchNorm1d(filters), torch.nn.ReLU(inplace=True)]
        channels = filters
    plain = torch.nn.Sequential(*modules)
    plain.load_state_dict(model.body.state_dict())
    results = []
    for body in (model.body, plain):
        y = body(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *body.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_describing_changes_nothing_and_needs_no_batch():
    """Statistics of batch norm are those of training: rows do not depend on their neighbours, nor does the model."""
    model = train_fcn(*waves(20, 0), 2, QUICK, 0, CPU).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = waves(300, 1)[0]
    together = model.describe(x)[0]
    np.testing.assert_allclose(model.describe(x[7:8])[0], together[7:8], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_learns_and_depends_on_its_seed_alone():
    (x, y), (x_test, y_test) = waves(40, 0), waves(60, 1)
    recipe = Recipe(epochs=30, batch_size=16)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = train_fcn(x, y, 2, recipe, 3, CPU)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is as it was
    assert (model.describe(x_test)[1].argmax(1) == y_test).mean() > 0.95
    torch.manual_seed(6)
    again = train_fcn(x, y, 2, dataclasses.replace(recipe, epochs=1), 3, CPU)
    twin = train_fcn(x, y, 2, dataclasses.replace(recipe, epochs=1), 3, CPU)
    other = train_fcn(x, y, 2, dataclasses.replace(recipe, epochs=1), 4, CPU)
    assert torch.equal(again.head.weight, twin.head.weight)
    assert not torch.equal(again.head.weight, other.head.weight)


def plain_loop(x, y, recipe, seed):
    """What evaluators on disk were trained with: AdamW one operation after the other, on a schedule of PyTorch's."""
    generator = torch.Generator().manual_seed(derived_seed(seed, 0))
    torch.manual_seed(derived_seed(seed, 1))
    model = FCN(x.shape[1], 2).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, foreach=False, fused=False
    )
    steps = recipe.epochs * (len(x) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(x), generator=generator).tensor_split([16]):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), torch.from_numpy(y)[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def test_on_a_cpu_the_weights_are_those_of_a_plain_loop():
    """Their hash names an evaluator: the same data, recipe and seed give the same bits in every version."""
    x, y = waves(33, 0)  # the last batch takes a row more
    recipe = Recipe(epochs=8, batch_size=16, weight_decay=1e-2)
    with torch.random.fork_rng(devices=[]):
        expected = plain_loop(x, y, recipe, 3).state_dict()
    for name, tensor in train_fcn(x, y, 2, recipe, 3, CPU).state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.gpu
def test_on_a_gpu_steps_are_graphs_of_the_same_bits(monkeypatch):
    replays = []
    replay = CudaGraph.__call__
    monkeypatch.setattr(CudaGraph, "__call__", lambda graph, rows: replays.append(len(rows)) or replay(graph, rows))
    (x, y), recipe = waves(40, 0), Recipe(epochs=40, batch_size=16)
    gpu = torch.device("cuda")  # without a number
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # that a step could not be captured
        graphed = train_fcn(x, y, 2, recipe, 3, gpu)
    # Of each batch size three steps come before the graph.
    assert sorted(replays) == [8] * (40 - 3) + [16] * (80 - 3)
    monkeypatch.setattr(TrainingStep, "LEAST_REPLAYS", 10**9)
    eager = train_fcn(x, y, 2, recipe, 3, gpu)
    assert len(replays) == 120 - 6
    for name, tensor in graphed.state_dict().items():
        assert torch.equal(tensor, eager.state_dict()[name]), name
    x_test, y_test = waves(60, 1)
    assert (graphed.describe(x_test)[1].argmax(1) == y_test).mean() > 0.95


def test_number_of_epochs():
    assert Recipe(epochs=7).epochs_for(10_000) == 7
    assert Recipe(batch_size=32, least_steps=600, least_epochs=20).epochs_for(20) == 600
    assert Recipe(batch_size=32, least_steps=600, least_epochs=20).epochs_for(500) == 38  # of 16 steps
    assert Recipe(batch_size=32, least_steps=600, least_epochs=20).epochs_for(7141) == 20


@pytest.fixture
def trained(monkeypatch):
    """How often a classifier was trained."""
    calls = []
    train = fcn_cache.train_fcn
    monkeypatch.setattr(fcn_cache, "train_fcn", lambda *a, **k: calls.append(a) or train(*a, **k))
    return calls


def cached(folder, data=None, recipe=QUICK, seed=0):
    x, y = waves(20, 0) if data is None else data
    return cached_fcn(x, y, 2, recipe, seed, CPU, folder, name="two/waves", quiet=True)


def test_cache_trains_once_for_each_of_data_recipe_and_seed(tmp_path, trained):
    first, again = cached(tmp_path / "new"), cached(tmp_path / "new")
    assert len(trained) == 1 and again.sha256 == first.sha256
    x = waves(9, 2)[0]
    np.testing.assert_array_equal(first.model.describe(x)[0], again.model.describe(x)[0])
    x, y = waves(20, 0)
    nearly = x.clone()
    nearly[3, 0, 5] += 1e-3
    others = [
        cached(tmp_path / "new", data=(nearly, y)),
        cached(tmp_path / "new", data=(x, 1 - y)),
        cached(tmp_path / "new", recipe=dataclasses.replace(QUICK, learning_rate=2e-3)),
        cached(tmp_path / "new", seed=1),
    ]
    assert len(trained) == 5 and len({e.sha256 for e in [first, *others]}) == 5
    assert len(list((tmp_path / "new").iterdir())) == 10  # no temporary file is left
    assert cached(None).sha256 == first.sha256 and len(trained) == 6


@pytest.mark.parametrize("damage", ["truncated", "another's weights", "no weights", "json", "key"])
def test_damaged_cache_is_trained_again_with_a_warning(tmp_path, trained, damage):
    first = cached(tmp_path)
    weights, facts = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "another's weights":
        cached(tmp_path / "other", seed=1)
        weights.write_bytes(next((tmp_path / "other").glob("*.safetensors")).read_bytes())
        trained.pop()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "json":
        facts.write_text("{")
    else:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "key": "0"}))
    with pytest.warns(RuntimeWarning, match="trained again"):
        second = cached(tmp_path)
    assert second.sha256 == first.sha256 and len(trained) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached(tmp_path).sha256 == first.sha256
    assert len(trained) == 2


def test_of_two_threads_one_trains_the_classifier_and_the_other_waits(tmp_path, trained):
    hashes = []
    in_threads(2, lambda: hashes.append(cached(tmp_path).sha256), CPU)
    assert len(trained) == 1 and hashes[0] == hashes[1]


def test_the_first_of_two_processes_gives_the_classifier(tmp_path, monkeypatch):
    """On a GPU the second one's would differ by rounding."""
    train = fcn_cache.train_fcn
    first = []

    def slower(*arguments, **options):
        if not first:
            first.append(None)
            first[0] = cached(tmp_path)
        model = train(*arguments, **options)
        with torch.no_grad():
            model.head.bias += len(first)
        first.append(model)
        return model

    monkeypatch.setattr(fcn_cache, "train_fcn", slower)
    second = cached(tmp_path)
    assert len(first) == 3 and second.sha256 == first[0].sha256 == cached(tmp_path).sha256
    assert torch.equal(second.model.head.bias, first[0].model.head.bias)
    assert not torch.equal(second.model.head.bias, first[2].head.bias)


def test_cache_folder_that_cannot_be_made(tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache"):
        cached(tmp_path / "file")
    assert not trained


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ncfast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "ncfast"
