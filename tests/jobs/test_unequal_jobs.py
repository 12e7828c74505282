"""Series of unequal lengths, from training to files: each is drawn with the length of a training series."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from runs import SMALL, generated_file, waves

import ncfast
from ncfast import evaluate, generate
from ncfast.data import to_list
from ncfast.evaluation.material import Material
from ncfast.evaluation.protocol import measure
from ncfast.sampling.series import SeriesSampler

pandas = pytest.importorskip("pandas")
X, Y = waves(40, 21)
# Those of "slow" are 9 to 15 long, those of "fast" 16 to 21.
ENDS = np.where(Y == "slow", 9 + np.arange(40) % 7, 16 + np.arange(40) % 6)
LISTED = [x[:, :end] for x, end in zip(X, ENDS, strict=True)]
QUICK = {"quiet": True, "stage1_steps": 1, "stage2_steps": 1, "decoding_steps": 3, "device": "cpu", **SMALL}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unequal"
    with pytest.warns(UserWarning, match="9 to 21 time points: each is learned and generated with its own end"):
        ncfast.fit(LISTED, Y, out=folder, **QUICK)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return ncfast.load(run, device="cpu")


@pytest.fixture
def written(run, tmp_path):
    return lambda name, *more: generated_file(run, tmp_path / name, *more)


def ends_of(x):
    """Where each ends; and that it is whole before, and nothing after."""
    ends = np.array([series.shape[1] for series in to_list(x)])
    for series, end in zip(x, ends, strict=True):
        assert np.isfinite(series[:, :end]).all() and np.isnan(series[:, end:]).all()
    return ends


def test_lengths_are_those_of_training_series_of_the_class(model):
    x, y = model.sample(600, seed=3)
    ends = ends_of(x)
    assert ends.tolist() == model.sample_conditions(600, seed=3)["length"].tolist()
    for name in ("slow", "fast"):
        own, real = Counter(ends[y == name].tolist()), Counter(ENDS[name == Y].tolist())
        assert {*own} == {*real}
        for length, count in real.items():
            assert own[length] / (y == name).sum() == pytest.approx(count / (name == Y).sum(), abs=0.08)
    assert {*ends_of(model.sample(600, labels="none")[0]).tolist()} == {*ENDS.tolist()}


def test_a_series_and_its_end_do_not_depend_on_the_batch(model):
    x, _ = model.sample(100, seed=3)
    batches = list(model.sample_batches(30, seed=3, start=60, batch_size=7))
    np.testing.assert_array_equal(np.concatenate([batch.x for batch in batches]), x[60:90])
    lengths = np.concatenate([batch.length for batch in batches])
    assert lengths.dtype == np.int64 and lengths.tolist() == ends_of(x[60:90]).tolist()
    assert batches[0].conditions is None
    again = SeriesSampler(model, seed=3).again(np.array([61, 70, 99]))
    np.testing.assert_array_equal(again.x, x[[61, 70, 99]])


def test_lengths_can_be_given(model):
    x, _ = model.sample(6, condition={"length": [1, 12, 21]})
    assert ends_of(x).tolist() == [1, 12, 21] * 2
    for wrong in (0, 22, 3.5, -1):
        with pytest.raises(ncfast.UserError, match="length is an integer from 1 to 21; got"):
            model.sample(2, condition={"length": wrong})
    with pytest.raises(ncfast.UserError, match="length is a number; got 'long'"):
        model.sample(2, condition={"length": "long"})


def test_the_length_reaches_the_prior(model):
    """Same seed and class: what differs before the shorter end comes from the length."""
    tokens = [
        next(iter(model.sample_batches(20, ["slow"], condition={"length": end}, guidance_scale=3.0))).tokens
        for end in (9, 21)
    ]
    assert (tokens[0] != tokens[1]).any()


def test_tokens_decode_to_full_length(model):
    batch = next(iter(model.sample_batches(10, seed=1)))
    whole = model.decode(batch.tokens)
    assert np.isfinite(whole).all()
    for series, own in zip(to_list(whole, batch.length), to_list(batch.x), strict=True):
        np.testing.assert_array_equal(series, own)


def test_reconstruction_ends_where_the_series_does(model):
    x = model.reconstruct(LISTED[:5])
    assert x.shape == (5, 1, 21) and ends_of(x).tolist() == ENDS[:5].tolist()
    assert ends_of(model.reconstruct(X[:2, :, :9])).tolist() == [9, 9]
    with pytest.raises(ncfast.UserError, match=r"series are \[n, 1, 21\]"):
        model.reconstruct(np.zeros((2, 1, 22)))


def test_completion(model):
    context = np.full((2, 21), np.nan, np.float32)
    context[:, :10] = X[:2, 0, :10]
    x, _ = model.sample(4, context=context, condition={"length": [14, 10]})
    assert ends_of(x).tolist() == [14, 10] * 2
    np.testing.assert_array_equal(x[:2, 0, :10], context[:, :10])
    assert ends_of(model.sample(4, context=context)[0]).tolist() == [21] * 4
    with pytest.raises(
        ncfast.UserError, match="series 1 has length 9, and its context is observed up to time point 10"
    ):
        model.sample(4, context=context, condition={"length": [14, 9]})


def test_a_file_holds_what_sample_returns(model, written):
    x, y = model.sample(150, seed=2)
    for more in ([], ["--num-shards", 3, "--overwrite"]):
        data = written("x.h5", *more)
        assert data.length.dtype == np.int64 and data.length[:].tolist() == ends_of(x).tolist()
        np.testing.assert_array_equal(data.x[:], x)
        assert data.conditions is None and data.condition_values() == {} and data.labels().tolist() == y.tolist()
        assert data.to_ntd([0, 3]).shape == (2, 21, 1)
        np.testing.assert_array_equal(data.to_ntd(), x.swapaxes(1, 2))
        for series, own in zip(data.to_list(slice(100)), to_list(x[:100]), strict=True):
            np.testing.assert_array_equal(series, own)
        assert [series.shape for series in data.to_list(7)] == [(1, data.length[7])]
        np.testing.assert_array_equal(data[5][0].numpy(), x[5])
        data.verify(redraw=3)


def test_half_precision_and_tokens_only(written):
    data = written("half.h5", "--dtype", "float16")
    assert ends_of(data.x[:]).tolist() == data.length[:].tolist()
    data.verify(redraw=3)
    tokens = written("tokens.h5", "--tokens-only")
    assert tokens.x is None and tokens.length[:].tolist() == data.length[:].tolist()


def test_given_lengths_are_of_the_job(written):
    data = written("x.h5", "--condition", "length=12", "length=15", "--num-shards", 3)
    assert data.length[:].tolist() == [12, 15] * 75
    assert json.loads(data.attributes["condition"]) == {"length": [12, 15]}
    data.verify(redraw=3)
    ncfast.open_generated(data.shards[1]).verify(redraw=3)
    with pytest.raises(ncfast.UserError, match="is of another job"):
        written("x.h5", "--condition", "length=13", "--num-shards", 3)


def test_a_diverged_model_is_told_from_an_end(model, written, monkeypatch):
    decode = model.vqvae.stft.inverse

    def broken(u):
        x = decode(u)
        x[:, :, 3] = torch.nan
        return x

    monkeypatch.setattr(type(model.vqvae.stft), "inverse", lambda self, u: broken(u))
    with pytest.raises(ncfast.UserError, match="is not finite: the model of this run has diverged"):
        written("bad.h5")


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet", "tsv"])
def test_exports_are_read_back(written, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    data = written(f"x.{kind}")
    options = {"index_column": "length"} if kind in ("csv", "parquet") else {}
    again = ncfast.data.load_dataset(tmp_path / f"x.{kind}", **options)
    longest = data.length[:].max()
    np.testing.assert_array_equal(again.X_train, data.x[:][..., :longest])
    assert again.lengths_train.tolist() == data.length[:].tolist()
    assert again.class_names == data.class_names
    if kind == "csv":
        frame = pandas.read_csv(tmp_path / "x.csv")
        assert list(frame)[:3] == ["label", "length", "t0"] and frame["length"].tolist() == data.length[:].tolist()


def test_a_row_of_a_time_point_ends_with_its_series(tmp_path):
    x, y = waves(40, 21, channels=2)
    run = tmp_path / "two"
    with pytest.warns(UserWarning):
        ncfast.fit([a[:, :end] for a, end in zip(x, ENDS, strict=True)], y, out=run, **QUICK)
    generate.main(["--run", str(run), "--num-samples", "20", "--out", str(tmp_path / "x.csv"), "--device", "cpu"])
    frame, data = pandas.read_csv(tmp_path / "x.csv"), ncfast.open_generated(tmp_path / "x.h5")
    assert frame.groupby("series").size().tolist() == data.length[:].tolist()
    assert np.isfinite(frame[["c0", "c1"]].to_numpy()).all()


def test_with_conditions_besides(tmp_path):
    ages = np.arange(40.0)
    with pytest.warns(UserWarning):
        model = ncfast.fit(LISTED, Y, conditions={"age": ages}, **QUICK)
    batch = next(iter(model.sample_batches(30, seed=1)))
    assert batch.conditions.shape == (30, 1)
    assert batch.length.tolist() == ENDS[batch.conditions[:, 0].astype(int)].tolist()  # of the same training series
    assert [*model.sample_conditions(3)] == ["age", "length"]
    assert model.data.user_conditions == model.data.conditions[:1]
    with pytest.raises(ncfast.UserError, match="condition called 'length' without being given; leave out"):
        ncfast.fit(LISTED, Y, conditions={"length": ENDS}, **QUICK)


def test_evaluation_finds_and_measures_it(tmp_path):
    def half(part):
        return [[LISTED[i], Y[i]] for i in range(40) if (i // 2) % 2 == part]

    for part, split in enumerate(("TRAIN", "TEST")):
        lines = [",".join(f"{v:.6g}" for v in x[0]) + f":{y}" for x, y in half(part)]
        header = "@univariate true\n@equalLength false\n@classLabel true slow fast\n@data\n"
        (tmp_path / f"Unequal_{split}.ts").write_text(header + "\n".join(lines) + "\n")
    dataset = ncfast.data.load_dataset(tmp_path / "Unequal_TRAIN.ts")
    run = tmp_path / "run"
    from ncfast.config import make_config
    from ncfast.training.fit import resolve_config, train

    device = torch.device("cpu")
    options = {name: value for name, value in QUICK.items() if name not in ("quiet", "device")}
    train(resolve_config(make_config(**options), dataset, device), dataset, out=run, device=device, quiet=True)
    model = ncfast.load(run, device="cpu")
    found = evaluate.find_dataset(model.data, None, None, condition_columns=None)
    assert found.lengths_test.tolist() == dataset.lengths_test.tolist()
    material = Material(model, found, quiet=True)
    assert evaluate.same_series(model.data, material.stats)
    made = material.generated(0)
    assert torch.isfinite(made.x).all() and {*made.length.tolist()} <= {*dataset.lengths_train.tolist()}
    result = measure(material, ("acd", "mdd", "nnd", "reconstruction"), [0])
    assert all(np.isfinite(figure["value"]) for figure in result["measures"] if figure["value"] is not None)
    check_pictures(material)


def check_pictures(material):
    """Drawn to their ends: generated series on the right, and test series through the codebook."""
    pytest.importorskip("matplotlib")
    from ncfast.evaluation.figures import figures

    drawn = {title: draw for title, _, draw in figures(material, 0)}
    panels = drawn["Real and generated series"]().axes[1::2]
    ends = {int(np.isfinite(line.get_ydata()).sum()) for panel in panels for line in panel.lines}
    assert ends <= {*material.dataset.lengths_train.tolist()} and len(ends) > 3
    for panel in drawn["Reconstruction"]().axes:
        i = int(panel.get_title().split()[2].rstrip(","))
        assert {len(line.get_ydata()) for line in panel.lines} == {material.dataset.lengths_test[i]}


def test_resume_refuses_other_lengths(run):
    shorter = [x[:, :end] for x, end in zip(X, np.minimum(ENDS, 20), strict=True)]
    shorter[1] = X[1]
    from ncfast.data import from_arrays
    from ncfast.models.trained import read_config
    from ncfast.training.fit import train

    config, _ = read_config(run)
    with pytest.raises(ncfast.UserError, match="was trained on other data"):
        train(config, from_arrays(shorter, Y), out=run, device=torch.device("cpu"), resume=True, quiet=True)
