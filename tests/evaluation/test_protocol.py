"""What `evaluate` says of a small model, against independent computations and generators whose quality is known."""

import collections
import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

import ncfast
from ncfast.config import SLOW_MEASURES
from ncfast.data.dataset import from_arrays
from ncfast.errors import UserError
from ncfast.evaluation import csv_rows, evaluate, measures
from ncfast.evaluation.fcn import Recipe
from ncfast.evaluation.gru_scores import discriminative_scores, predictive_scores
from ncfast.evaluation.material import GeneratedSet, Material
from ncfast.evaluation.protocol import MEASURES, measure
from ncfast.evaluation.published import Interval, ScoreRecipe, to_unit_range
from ncfast.evaluation.table import row
from ncfast.evaluation.ts2vec import context_fid, train_ts2vec

pytestmark = pytest.mark.usefixtures("narrow_fcn")

SMALL = {
    "dim": 8,
    "residual_blocks": 1,
    "codebook_size": 8,
    "projector_dim": 32,
    "prior_dim": 32,
    "prior_layers": 1,
    "prior_head_dim": 16,
    "batch_size": 16,
    "stage1_epochs": 8,
    "stage2_epochs": 2,
    "ssl": "none",
    "refiner_dim": 8,
}
QUICK = Recipe(epochs=10, batch_size=16)  # of real series; there are 17 times as many generated ones
QUICKER = Recipe(epochs=4, batch_size=32, learning_rate=1e-2)
NEED_SKLEARN = ("knn", "svm")
OTHERS = [name for name in MEASURES if name not in (*NEED_SKLEARN, *SLOW_MEASURES)]


def waves(n, seed, length=40):
    """Two classes that differ in frequency, a third of them fast, in units far from normalised ones."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 3 == 0).astype(int)
    t = np.arange(length) / length
    x = np.sin(2 * np.pi * (2 + 3 * y[:, None]) * t + rng.uniform(0, 2 * np.pi, (n, 1)))
    return (50 + 20 * x + 2 * rng.normal(size=x.shape)).astype(np.float32), np.array(["slow", "fast"])[y]


@pytest.fixture(scope="module")
def dataset():
    return from_arrays(*waves(60, 0), *waves(45, 1), name="waves")


@pytest.fixture(scope="module")
def model(dataset):
    names = np.array(dataset.class_names)
    return ncfast.fit(dataset.X_train, names[dataset.y_train], quiet=True, **SMALL)


@pytest.fixture(scope="module")
def result(model, dataset):
    pytest.importorskip("sklearn")
    return evaluate(model, dataset, seeds=(3, 4), recipe=QUICKER, quiet=True)


def values(result):
    return {figure["metric"]: figure["value"] for figure in result["measures"]}


def figure_of(result, metric):
    return next(figure for figure in result["measures"] if figure["metric"] == metric)


def normalised(x, dataset):
    train = dataset.X_train.astype(np.float64)
    return torch.from_numpy(((x - train.mean()) / train.std()).astype(np.float32))


class Playback(Material):
    """In place of a generator: series that are given."""

    def play(self, x, y):
        self.x, self.y = x, y
        return self

    def generate(self, n, labels, seed):
        return GeneratedSet(self.x, self.y, np.zeros((len(self.x), 1), int))


def test_the_test_set_itself_is_perfect_and_noise_is_not(model, dataset):
    def taken(x):
        material = Playback(model, dataset, recipe=QUICK, quiet=True).play(x, None)
        return values(measure(material, ["fid", "is", "acd", "mdd", "nnd"], [0]))

    test = normalised(dataset.X_test, dataset)
    train = normalised(dataset.X_train, dataset)
    perfect = taken(test.flip(0))
    assert perfect["FID"] == pytest.approx(0, abs=1e-6)
    assert perfect["ACD"] == pytest.approx(0, abs=1e-6) and perfect["MDD"] == 0
    assert perfect["IS"] == pytest.approx(perfect["IS_test"])
    assert perfect["NND"] == perfect["NND_test"] > 0 and taken(train)["NND"] == 0
    rebuilt = model.vqvae.reconstruct(test)
    assert perfect["FID_reconstructed"] == pytest.approx(taken(rebuilt)["FID"], rel=1e-3)
    noise = taken(torch.randn(test.shape, generator=torch.Generator().manual_seed(0)))
    for name, times in (("FID", 3), ("ACD", 3), ("MDD", 1.3)):  # MDD sees no order in time
        assert noise[name] > times * noise[f"{name}_train"] > 0
    half = taken(torch.cat([test[:30], torch.randn(test[:15].shape, generator=torch.Generator().manual_seed(0))]))
    assert perfect["FID"] < half["FID"] < noise["FID"]
    one_class = taken(test[dataset.y_test == 0])  # what a collapsed generator makes
    assert one_class["IS"] < perfect["IS"] - 0.3 and one_class["FID"] > 3 * perfect["FID_train"]


def test_shuffled_labels_lower_cas(model, dataset):
    train = normalised(dataset.X_train, dataset)

    def accuracy(labels):
        material = Playback(model, dataset, recipe=QUICK, quiet=True).play(train, labels)
        return values(measure(material, ["cas"], [0]))["CAS"]

    right = accuracy(dataset.y_train)
    assert right > 0.9
    assert accuracy(np.random.default_rng(0).permutation(dataset.y_train)) < right - 0.2
    assert accuracy(1 - dataset.y_train) < 0.1


def test_figures_of_the_codes_are_those_of_the_whole_test_set(model, dataset, result):
    taken = values(result)
    scale = dataset.X_train.astype(np.float64).std()
    errors = np.square((model.reconstruct(dataset.X_test) - dataset.X_test) / scale).mean((1, 2))
    assert taken["test_reconstruction_mse"] == pytest.approx(errors.mean(), rel=1e-4)
    own = figure_of(result, "test_reconstruction_mse")
    assert own["std"] == pytest.approx(errors.std(ddof=1) / 45**0.5, rel=1e-4) and own["n"] == "45 test"

    x = normalised(dataset.X_test, dataset)
    tokens = model.vqvae.tokenize(x)
    counts = collections.Counter(tokens.flatten().tolist())
    p = np.array(list(counts.values())) / tokens.numel()
    assert taken["test_perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert taken["test_code_usage"] == len(counts) / 8
    usage = np.stack([np.bincount(row, minlength=8) for row in tokens.numpy()])
    resampled = np.random.default_rng(0).multinomial(45, np.full(45, 1 / 45), size=200) @ usage
    shares = np.maximum(resampled / (45 * tokens.shape[1]), 1e-300)
    own = figure_of(result, "test_perplexity")
    assert own["std"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum(1)).std(ddof=1), rel=1e-9)
    spectrum = torch.stft(x[:, 0], 4, 1, window=torch.hann_window(4), return_complex=True)
    rebuilt = model.vqvae.decode(model.vqvae.vq.codebook[tokens])
    expected = (torch.view_as_real(spectrum).permute(0, 3, 1, 2) - rebuilt).square().mean()
    assert taken["test_reconstruction_stft_mse"] == pytest.approx(expected.item(), rel=1e-3)

    codebook = model.vqvae.vq.codebook.double().numpy()
    away = ~np.eye(8, dtype=bool)
    assert taken["mean_abs_corr_off_diagonal"] == pytest.approx(np.abs(np.corrcoef(codebook))[away].mean())


def test_probes_see_the_mean_code_of_each_series(model, dataset, result):
    def pooled(x):
        return model.vqvae.vq.codebook[model.vqvae.tokenize(normalised(x, dataset))].mean(1).numpy()

    features = [pooled(dataset.X_train), dataset.y_train, pooled(dataset.X_test), dataset.y_test]
    taken = values(result)
    assert taken["knn_accuracy"] == pytest.approx(measures.knn_accuracy(*features), abs=1e-9)
    assert taken["svm_accuracy"] == pytest.approx(measures.svm_accuracy(*features), abs=1e-9)
    p = taken["knn_accuracy"]
    assert figure_of(result, "knn_accuracy")["std"] == pytest.approx((p * (1 - p) / 45) ** 0.5)


def test_figures_of_generated_series_are_means_over_seeds(model, dataset, result):
    single = [evaluate(model, dataset, measures=OTHERS, seeds=[s], recipe=QUICKER, quiet=True) for s in (3, 4)]
    for metric in ("FID", "IS", "IS_mean", "CAS", "ACD", "MDD"):
        own = figure_of(result, metric)
        pair = [values(one)[metric] for one in single]
        assert own["value"] == pytest.approx(np.mean(pair), rel=1e-5)
        assert own["std"] == pytest.approx(np.std(pair, ddof=1), rel=1e-3, abs=1e-6)
        assert own["seeds"] == [3, 4] and "45" in own["n"]
        assert figure_of(single[0], metric)["std"] is None
    assert figure_of(result, "FID")["evaluator_accuracy"] == result["evaluator"]["test_accuracy"] > 0.5
    assert result["num_samples"] == 45  # as in the test set
    assert figure_of(result, "CAS")["n"] == "1020 generated, 45 test"  # 17 times the train set, 1000 or more


def test_generated_series_are_those_of_sample(model, dataset):
    material = Material(model, dataset, num_samples=7, quiet=True)
    x, y = model.sample(7, labels="none", seed=5)
    assert y is None
    np.testing.assert_allclose(material.generated(5).x, normalised(x, dataset), atol=1e-5)
    made = material.labelled(5)
    np.testing.assert_array_equal(np.bincount(made.y), 17 * np.bincount(dataset.y_train))


def test_evaluating_changes_no_weight_statistic_or_code(model, dataset):
    state = {**model.vqvae.state_dict(), **model.prior.state_dict()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    evaluate(model, dataset, measures=OTHERS, num_samples=12, seeds=[0], recipe=QUICKER, quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert not model.vqvae.training and not model.prior.training


def test_result_is_json_and_rows_have_the_layout_of_the_authors(result):
    assert json.loads(json.dumps(result))["measures"] == result["measures"]
    assert result["format"] == 1  # of evaluation.json; another layout counts on
    rows = csv_rows(result, "regular", "run7")
    assert list(rows[0]) == ["dataset", "stage", "method", "run_id", "metric", "value"]
    assert {(row["dataset"], row["method"], row["run_id"]) for row in rows} == {("waves", "regular", "run7")}
    stages = {row["metric"]: row["stage"] for row in rows}
    theirs = {"knn_accuracy": "stage1", "svm_accuracy": "stage1", "FID": "stage2", "IS_mean": "stage2"}
    theirs |= {"IS_std": "stage2", "mean_abs_corr_off_diagonal": "stage1", "mean_abs_cos_sim_off_diagonal": "stage1"}
    assert theirs.items() <= stages.items()
    assert len(stages) == len(rows) == len(result["measures"])


def test_without_labels_the_table_says_why(model):
    unlabelled = from_arrays(waves(60, 0)[0], None, waves(45, 1)[0], name="waves")
    model = ncfast.fit(unlabelled.X_train, quiet=True, **{**SMALL, "stage1_epochs": 1})
    taken = evaluate(model, unlabelled, measures=OTHERS, seeds=[0], quiet=True)
    reasons = {figure["metric"]: figure["reason"] for figure in taken["measures"] if figure["value"] is None}
    assert reasons == dict.fromkeys(("fid", "is", "cas"), "the data has no labels")
    assert {"test_reconstruction_mse", "test_perplexity", "ACD", "MDD", "precision", "NNDR", "MIA"} <= set(
        values(taken)
    )
    assert taken["evaluator"] is None
    assert all(row["value"] is not None for row in csv_rows(taken, "m", "r"))


def test_test_series_without_labels(model, dataset):
    unlabelled = dataclasses.replace(dataset, y_test=None)
    names = ["fid", "cas"]
    taken = evaluate(model, unlabelled, measures=names, num_samples=20, seeds=[0], recipe=QUICKER, quiet=True)
    assert figure_of(taken, "cas")["reason"] == "the test series have no labels"
    assert figure_of(taken, "FID")["value"] > 0 and figure_of(taken, "FID")["evaluator_accuracy"] is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"X_test": None, "y_test": None}, "no test split"),
        ({"class_names": ("slow", "quick")}, "class names"),
        ({"X_train": np.zeros((5, 2, 40), np.float32)}, "channels"),
        ({"X_train": np.random.default_rng(0).normal(size=(60, 1, 41))}, "length"),
        ({"X_test": np.zeros((1, 1, 40), np.float32)}, "2 series"),
    ],
)
def test_data_that_does_not_fit(model, dataset, change, message):
    with pytest.raises(UserError, match=message):
        evaluate(model, dataclasses.replace(dataset, **change), measures=["acd"], quiet=True)


def test_arguments_that_are_no_good(model, dataset):
    for arguments, message in (
        ({"measures": ["fid", "fod"]}, "no measure 'fod'"),
        ({"measures": []}, "there are reconstruction"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds"),
        ({"num_samples": 1}, "2 series"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(model, dataset, **{"measures": ["acd"], "quiet": True, **arguments})


def test_only_the_probes_need_sklearn(model, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"knn and svm need scikit-learn: pip install 'ncfast\[eval\]'"):
        evaluate(model, dataset, quiet=True)
    taken = evaluate(model, dataset, measures=["acd"], num_samples=5, seeds=[0], quiet=True)
    assert values(taken)["ACD"] > 0


def test_slow_measures_are_taken_where_they_are_asked_for(model, dataset, tmp_path):
    scores = ScoreRecipe(repeats=2, discriminative_steps=3, predictive_steps=3, encoder_steps=2)
    taken = evaluate(
        model, dataset, measures=["all"], recipe=QUICKER, seeds=[7, 8], scores=scores, cache=tmp_path, quiet=True
    )
    assert set(taken["seconds"]) == set(MEASURES)
    material = Material(model, dataset, quiet=True)
    made = material.unit_range(material.generated(7).x)
    real = to_unit_range(dataset.X_train, dataset.X_train)
    np.testing.assert_allclose(material.unit_range(material.train), real, atol=1e-6)
    for metric, expected in (
        ("discriminative", discriminative_scores(real, made, repeats=2, steps=3)),
        ("predictive", predictive_scores(real, made, repeats=2, steps=3)),
        ("context_FID", [context_fid(train_ts2vec(real, 2, seed), real, made) for seed in range(2)]),
    ):
        own = figure_of(taken, metric)
        assert (own["value"], own["std"]) == pytest.approx(Interval.of(expected), rel=1e-3, abs=1e-6)
        assert own["seeds"] == [7] and own["n"] == "45 generated, 60 train"
        assert row(own)[2] == "2 repeats (95 % interval), sampling seed 7"
    assert len(list(tmp_path.glob("ts2vec-waves-*.safetensors"))) == 2


def test_privacy_and_coverage_of_a_copier_and_of_new_series(model, dataset):
    names = ["precision", "recall", "nndr", "mia"]
    train, test = normalised(dataset.X_train, dataset), normalised(dataset.X_test, dataset)

    def taken(x):
        material = Playback(model, dataset, recipe=QUICK, quiet=True).play(x, None)
        return values(measure(material, names, [0]))

    copier, perfect = taken(train), taken(test)
    assert copier["NNDR"] == 0 and copier["MIA"] == 1 and copier["precision"] == copier["precision_train"]
    assert perfect["NNDR"] == 1 and perfect["precision"] == perfect["recall"] == 1
    assert taken(test[:1].repeat(45, 1, 1))["recall"] < 0.2  # a collapsed generator
    twins = dataclasses.replace(dataset, X_test=dataset.X_train, y_test=dataset.y_train)
    material = Playback(model, twins, quiet=True).play(test, None)
    assert figure_of(measure(material, ["nndr"], [0]), "NNDR")["reason"].startswith("the median test series is")
