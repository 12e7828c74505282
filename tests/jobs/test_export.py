"""Generated series in the formats of others."""

import numpy as np
import pytest
from runs import save_run

import ncfast
from ncfast import generate
from ncfast.jobs import export
from ncfast.jobs.export import format_of

pandas = pytest.importorskip("pandas")


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(name, channels, names): 23 series under that name, in small blocks, and the HDF5 file beside it."""
    monkeypatch.setattr(export, "BLOCK_VALUES", 300)

    def make(name, channels=1, names=("fast", "slow"), *more):
        run = save_run(tmp_path / "run", channels=channels, names=names)
        out = tmp_path / name
        arguments = ["--run", run, "--num-samples", 23, "--out", out, "--device", "cpu", *more]
        generate.main([str(argument) for argument in arguments])
        return out, ncfast.open_generated(out.with_suffix(".h5"))

    return make


def names_of(data):
    return [data.class_names[k] for k in data.y[:]]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("names", [("fast", "slow"), ()])
def test_a_row_a_series(written, kind, names):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    out, data = written(f"x.{kind}", 1, names)
    frame = pandas.read_csv(out) if kind == "csv" else pandas.read_parquet(out)
    assert list(frame) == ["label"] * bool(names) + [f"t{t}" for t in range(21)]
    if names:
        assert frame.pop("label").tolist() == names_of(data)
    assert np.array_equal(frame.to_numpy(np.float32), data.x[:, 0])


def test_a_row_a_time_point_with_several_channels(written):
    out, data = written("x.csv", 2)
    frame = pandas.read_csv(out)
    assert list(frame) == ["series", "label", "time", "c0", "c1"] and len(frame) == 23 * 21
    for k in (0, 7, 22):
        one = frame[frame.series == k]
        assert one.time.tolist() == list(range(21)) and set(one.label) == {names_of(data)[k]}
        assert np.array_equal(one[["c0", "c1"]].to_numpy(np.float32).T, data.x[k])


def test_the_layout_of_the_archive_is_read_back(written):
    out, data = written("Waves_TRAIN.tsv")
    again = ncfast.data.load_dataset(str(out))
    assert np.array_equal(again.X_train, data.x[:])
    assert [again.class_names[k] for k in again.y_train] == names_of(data)
    with pytest.raises(ncfast.UserError, match="tsv has one channel, and these series have 2"):
        written("y.tsv", 2)
    with pytest.raises(ncfast.UserError, match="begins with a label, and these series have none"):
        written("z.tsv", 1, ())
    assert not any(out.with_name(f"{name}.h5").exists() for name in "yz")  # before anything is drawn


def test_an_archive_of_numpy(written):
    out, data = written("x.npz", 2)
    with np.load(out) as arrays:
        assert np.array_equal(arrays["X"], data.x[:]) and arrays["y"].tolist() == names_of(data)
    assert set(np.load(written("z.npz", 1, ())[0])) == {"X"}


def test_the_name_or_the_option_says_which(written, tmp_path):
    assert format_of(tmp_path / "a.h5") == format_of(tmp_path / "a.hdf5") == format_of(tmp_path / "a") == "h5"
    assert format_of(tmp_path / "a.CSV") == format_of(tmp_path / "a.txt", "csv") == "csv"
    assert format_of(tmp_path / "a", "csv") == "csv" and format_of(tmp_path / "a.2024", "h5") == "h5"
    with pytest.raises(ncfast.UserError, match="no format has the suffix of a.xls; there are h5, csv"):
        format_of(tmp_path / "a.xls")
    with pytest.raises(ncfast.UserError, match="--format csv and the name a.npz do not fit"):
        format_of(tmp_path / "a.npz", "csv")
    with pytest.raises(ncfast.UserError, match="csv is for series; leave out --tokens-only"):
        written("t.csv", 1, ("fast", "slow"), "--tokens-only")
