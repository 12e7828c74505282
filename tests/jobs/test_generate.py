"""The batch job: its files, what shares it, what interrupts it, and the reader."""

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from runs import save_run

import ncfast
from ncfast import generate
from ncfast.jobs import generation, shards
from ncfast.sampling import series as sampling_series

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("x", "y", "tokens", "index")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "waves")


@pytest.fixture
def job(run, tmp_path, capsys):
    """job(*arguments): runs `generate` on `run` in this process. Returns what it prints."""

    def do(*arguments, out="out.h5", run=run):
        generate.main(["--run", str(run), "--out", str(tmp_path / out), *map(str, arguments)])
        return capsys.readouterr().out

    return do


def command(run, out, *arguments):
    return [sys.executable, "-m", "ncfast.generate", "--run", str(run), "--out", str(out), *map(str, arguments)]


def program(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=300, **options)


def contents(path):
    with ncfast.open_generated(path) as data:
        return {name: np.asarray(getattr(data, name)) for name in COLUMNS if getattr(data, name) is not None}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_small_job_is_one_plain_file_with_provenance(run, job, tmp_path):
    assert "wrote" in job("--num-samples", 150, "--seed", 3)
    expected, labels = ncfast.load(run).sample(150, seed=3)
    with h5py.File(tmp_path / "out.h5") as file:
        np.testing.assert_array_equal(file["x"], expected)
        assert (file["x"].dtype, file["tokens"].dtype, file["y"].dtype) == (np.float32, np.uint16, np.int64)
        names = np.array(list(file.attrs["class_names"]))
        np.testing.assert_array_equal(names[file["y"][:]], labels)
        np.testing.assert_array_equal(file["index"], np.arange(150))
        assert file.attrs["complete"] and file.attrs["seed"] == 3 and len(file.attrs["weights_sha256"]) == 64
        assert json.loads(file.attrs["config"])["codebook_size"] == 8
        assert file.attrs["counts"].tolist() == np.bincount(file["y"][:]).tolist()
        assert file.attrs["sha256_x"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert files(tmp_path) == ["out.h5"]
    assert "class fast: 2, class slow: 3" in job("--labels", "slow:3,fast:2", "--top-k", 2, out="counted.h5")
    with h5py.File(tmp_path / "counted.h5") as file:
        assert file["y"][:].tolist() == [1, 1, 1, 0, 0] and json.loads(file.attrs["config"])["top_k"] == 2


def test_neither_batches_nor_shards_nor_processes_change_the_series(job, tmp_path):
    job("--num-samples", 300, out="whole.h5")
    whole = contents(tmp_path / "whole.h5")
    for size in (7, 64, 256):
        job("--num-samples", 300, "--batch-size", size, out=f"{size}.h5")
        assert (tmp_path / f"{size}.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    for count in (1, 2, 3):
        for part in range(count):
            printed = job("--num-samples", 300, "--num-shards", 7, "--shard", f"{part}/{count}", out=f"{count}of.h5")
            assert ("left to other processes" in printed) == (part < count - 1)
        assert_same(contents(tmp_path / f"{count}of.h5"), whole)
    with h5py.File(tmp_path / "3of.h5") as file:
        assert file["x"].is_virtual and list(file.attrs["shards"]) == [f"3of-{k:05d}-of-00007.h5" for k in range(7)]
    for k in range(7):
        name = f"of-{k:05d}-of-00007.h5"
        assert (tmp_path / f"1{name}").read_bytes() == (tmp_path / f"3{name}").read_bytes()
    manifest = json.loads((tmp_path / "3of.manifest.json").read_text())
    assert manifest["complete"] and sum(shard["rows"] for shard in manifest["shards"]) == 300
    with h5py.File(tmp_path / "3of-00002-of-00007.h5") as file:
        assert manifest["shards"][2]["sha256"]["y"] == hashlib.sha256(file["y"][:].tobytes()).hexdigest()


def test_shards_cover_every_row_once(run, tmp_path):
    for rows, count in ((1, 1), (10, 10), (2047, 2), (5000, 3), (10**7, 305)):
        made = shards.Job(tmp_path / "o.h5", rows, count, {"tokens": ((3,), "u2")}, "none", (), {}, {}).all_shards()
        assert [shard.first for shard in made] == np.cumsum([0, *[shard.rows for shard in made[:-1]]]).tolist()
        assert sum(shard.rows for shard in made) == rows and min(shard.rows for shard in made) > 0


def test_the_same_command_continues_a_job(job, tmp_path):
    arguments = ("--num-samples", 200, "--num-shards", 4)
    job(*arguments)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "out.h5"}
    series = contents(tmp_path / "out.h5")
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out-*")}
    (tmp_path / "out-00001-of-00004.h5").unlink()
    with h5py.File(tmp_path / "out-00002-of-00004.h5", "r+") as file:
        file["x"][3, 0, 5] += 1
    (tmp_path / "out-00003-of-00004.h5").write_bytes(before["out-00003-of-00004.h5"][:2000])
    # What killed processes leave: one of ours, one of a host that is long gone; and one that is at work.
    name = ".out-00001-of-00004.h5"
    (dead, old, busy) = (tmp_path / f"{name}.{host}.tmp" for host in ("HOST.999999999", "gone.1", "elsewhere.1"))
    dead = tmp_path / dead.name.replace("HOST", os.uname().nodename)
    for leftover in (dead, old, busy):
        leftover.write_text("half")
    os.utime(old, (0, 0))
    printed = job(*arguments[:2])  # the number of shards is the job's
    assert "kept       1 of 4" in printed
    assert "its x has changed: the checksum is another one" in printed and "truncated" in printed
    busy.unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != "out.h5"} == before
    assert_same(contents(tmp_path / "out.h5"), series)
    assert (tmp_path / "out-00000-of-00004.h5").stat().st_mtime_ns == times["out-00000-of-00004.h5"]


def test_another_job_under_the_same_name_is_refused(run, job, tmp_path):
    other = save_run(tmp_path / "other", seed=1)
    for extra, single in (((), True), (("--num-shards", 3), False)):
        out = f"{single}.h5"
        job("--num-samples", 90, *extra, out=out)
        before = {path.name: path.read_bytes() for path in tmp_path.glob("*.h5")}
        for arguments, folder, what in (
            (("--num-samples", 91), run, "rows is 90 there and 91 here"),
            (("--num-samples", 90, "--seed", 1), run, "seed is 0 there and 1 here"),
            (("--num-samples", 90, "--labels", "none"), run, "labels is train there and none here"),
            (("--num-samples", 90, "--dtype", "float16"), run, "columns is"),
            (("--num-samples", 90, "--top-k", 3), run, "top_k is 0 there and 3 here"),
            (("--num-samples", 90), other, "weights_sha256 is"),
        ):
            with pytest.raises(ncfast.UserError, match="not of this job; add --overwrite" if single else what):
                job(*arguments, out=out, run=folder)
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.h5")} == before
    with pytest.raises(ncfast.UserError, match="has 3 shards; leave out --num-shards"):
        job("--num-samples", 90, "--num-shards", 4, out="False.h5")
    job("--num-samples", 80, "--num-shards", 2, "--overwrite", out="False.h5")
    assert len(ncfast.open_generated(tmp_path / "False.h5")) == 80
    assert len(list(tmp_path.glob("False-*"))) == 2


def test_a_refiner_is_part_of_what_drew_a_job(job, tmp_path):
    run = save_run(tmp_path / "refined", refiner="flow")
    model = ncfast.load(run, "cpu")
    for options, refinements in ((["--refinements", 3], 3), ([], 8)):
        job("--num-samples", 70, *options, out=f"{refinements}.h5", run=run)
        with ncfast.open_generated(tmp_path / f"{refinements}.h5") as data:
            data.verify(redraw=5)
            np.testing.assert_array_equal(model.decode(data.tokens[:], refinements=refinements), data.x[:])
    file = run / "stage3.safetensors"
    other = save_run(tmp_path / "other", seed=1, refiner="flow")
    file.write_bytes((other / "stage3.safetensors").read_bytes())
    with ncfast.open_generated(tmp_path / "8.h5") as data, pytest.raises(ncfast.UserError, match="weights are others"):
        data.verify(redraw=5)


@pytest.mark.parametrize("compression", ["lzf", "gzip"])
def test_types_and_compression(run, job, tmp_path, compression):
    job("--num-samples", 100, out="plain.h5")
    job("--num-samples", 100, "--dtype", "float16", "--compression", compression)
    with h5py.File(tmp_path / "out.h5") as file, h5py.File(tmp_path / "plain.h5") as plain:
        assert file["x"].dtype == np.float16 and file["x"].compression == compression and file["x"].shuffle
        np.testing.assert_array_equal(file["x"], plain["x"][:].astype(np.float16))
        np.testing.assert_array_equal(file["tokens"], plain["tokens"])
    data = ncfast.open_generated(tmp_path / "out.h5")
    data.verify()
    assert data[0][0].dtype == torch.float32


def test_zstd_is_written_or_said_to_be_missing(job, tmp_path):
    try:
        import hdf5plugin  # noqa: F401
    except ImportError:
        with pytest.raises(ncfast.UserError, match="pip install hdf5plugin"):
            job("--num-samples", 10, "--compression", "zstd")
        assert not files(tmp_path)
        return
    job("--num-samples", 10, "--compression", "zstd")
    ncfast.open_generated(tmp_path / "out.h5").verify()


def test_tokens_only_and_back(run, job, tmp_path):
    job("--num-samples", 150, "--tokens-only", out="tokens.h5")
    job("--num-samples", 150, out="series.h5")
    tokens, series = (ncfast.open_generated(tmp_path / name) for name in ("tokens.h5", "series.h5"))
    assert tokens.x is None
    np.testing.assert_array_equal(tokens.tokens, series.tokens)
    model = ncfast.load(run)
    np.testing.assert_array_equal(model.decode(tokens.tokens[:]), series.x)
    np.testing.assert_array_equal(model.decode(tokens.tokens[70:75]), series.x[70:75])
    assert model.decode(tokens.tokens[:0]).shape == (0, 1, 21)
    for wrong, message in ((np.zeros((2, 3), int), "integers"), (tokens.tokens[:2] + 8, "0 to 7; got 8")):
        with pytest.raises(ncfast.UserError, match=message):
            model.decode(wrong)
    with pytest.raises(ncfast.UserError, match="tokens only"):
        tokens[0]


def test_numbers_that_a_type_cannot_hold_are_an_error(job, tmp_path):
    large = save_run(tmp_path / "large", std=1e6)
    with pytest.raises(ncfast.UserError, match="float16 ends at 65504; use --dtype float32"):
        job("--num-samples", 20, "--dtype", "float16", run=large)
    assert files(tmp_path) == ["large"]
    job("--num-samples", 20, run=large)


def test_a_dry_run_writes_nothing(job, tmp_path):
    printed = job("--num-samples", 10**7, "--shard", "3/8", "--dry-run")
    assert "x [10000000, 1, 21] f4" in printed and not files(tmp_path)
    row = 21 * 4 + 33 * 2 + 8 + 8
    assert f"shards     {max(32, -(-(10**7) * row // 2**28))}, of which part 3 of 8" in printed
    assert generation.human(10**7 * row) in printed


def test_a_disk_too_small_is_noticed_before_anything_is_drawn(job, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "free_space", lambda job: 10_000)
    with pytest.raises(ncfast.UserError, match=r"9.8 KiB free, and the job needs 16.2 KiB more; free space"):
        job("--num-samples", 100)
    assert not files(tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_the_job_can_go_on(run, job, tmp_path):
    arguments = ("--num-samples", 3000, "--num-shards", 3)
    whole = ("--num-samples", 3000)
    done = program(
        run,
        tmp_path / "out.h5",
        *arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)),
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and "out-00000-of-00003.h5: File too large; free space" in errors[0]
    assert files(tmp_path) == ["out.manifest.json"]
    with pytest.raises(ncfast.UserError, match="its job has 0 of 3 shards"):
        ncfast.open_generated(tmp_path / "out.h5")
    job(*whole)
    job(*whole, out="undisturbed.h5")
    assert_same(contents(tmp_path / "out.h5"), contents(tmp_path / "undisturbed.h5"))


@pytest.mark.slow
def test_torchrun_shares_a_job(run, job, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launcher, "-m", "ncfast.generate", "--run-dir", str(run)]
    line += ["--out", str(tmp_path / "out.h5"), "--num-samples", "3000"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1 and done.stdout.count("shards     2, of which part 0 of 2") == 1
    assert "3000/3000" in done.stderr
    job("--num-samples", 3000, out="alone.h5")
    assert_same(contents(tmp_path / "out.h5"), contents(tmp_path / "alone.h5"))


@pytest.mark.slow
def test_a_job_survives_kills(run, job, tmp_path):
    """NCFAST_KILLS=20 NCFAST_KILL_ROWS=200000 is the long version."""
    kills, rows = int(os.environ.get("NCFAST_KILLS", 3)), int(os.environ.get("NCFAST_KILL_ROWS", 20_000))
    count = 6 * kills
    arguments = ("--num-samples", rows, "--num-shards", count)
    begin = time.monotonic()
    job(*arguments, out="undisturbed.h5")
    seconds = (time.monotonic() - begin) / count  # of a shard
    generator = random.Random(0)
    line = command(run, tmp_path / "out.h5", *arguments)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        before = set(tmp_path.glob(".*.tmp"))
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while not set(tmp_path.glob(".*.tmp")) - before:  # it imports
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 2 * seconds))  # so that the shards are more than the kills need
        assert process.poll() is None, "the job ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in tmp_path.glob("out-*.h5"):
            ncfast.open_generated(path).verify()  # what has its name is whole
        assert not (tmp_path / "out.h5").exists()
    assert subprocess.run(line, capture_output=True, env=environment, timeout=600).returncode == 0
    assert_same(contents(tmp_path / "out.h5"), contents(tmp_path / "undisturbed.h5"))
    for k in range(count):
        names = [f"{stem}-{k:05d}-of-{count:05d}.h5" for stem in ("out", "undisturbed")]
        assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere", "--num-samples", "1"], "nowhere is not the folder of a run"),
        (["--num-samples", "0"], "at least 1"),
        (["--num-samples", "1", "--out", "no/folder/x.h5"], "does not exist"),
        (["--num-samples", "1", "--out", "."], "is a folder"),
        (["--num-samples", "1", "--labels", "red"], "no class 'red'"),
        (["--num-samples", "1", "--labels", "-1,1"], "no class '-1'"),
        (["--num-samples", "1", "--out", "x.xls"], "no format has the suffix of x.xls"),
        ([], "say how many"),
        (["--labels", "fast:3", "--num-samples", "4"], "at most 3, which"),
        (["--labels", "fast:3,slow"], "name:count"),
        (["--num-samples", "1", "--batch-size", "0"], "at least 1; got 0"),
        (["--num-samples", "1", "--seed", "-1"], "--seed is at least 0"),
        (["--num-samples", "1", "--top-k", "-1"], "--top-k is at least 0"),
        (["--num-samples", "5", "--num-shards", "6"], "--num-shards is 1 to 5 for 5 series; got 6"),
        (["--num-samples", "5", "--overwrite", "--shard", "0/2"], "--overwrite is for one process"),
    ],
)
def test_mistakes(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ncfast.UserError, match=message) as error:
        generate.main(["--run", str(run), "--out", "x.h5", *arguments])
    assert "\n" not in str(error.value) and not files(tmp_path)


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_share_that_is_none(part, run, tmp_path):
    with pytest.raises(ncfast.UserError, match="I from 0 to N-1"):
        generate.main(["--run", str(run), "--out", str(tmp_path / "x.h5"), "--num-samples", "9", f"--shard={part}"])


# The reader.


@pytest.fixture(params=[1, 3], ids=["plain", "shards"])
def written(request, run, job, tmp_path):
    job("--num-samples", 100, "--num-shards", request.param)
    return tmp_path / "out.h5", ncfast.load(run).sample(100)


def test_it_reads_what_was_drawn(written, monkeypatch, tmp_path):
    path, (x, labels) = written
    data = ncfast.open_generated(path)
    assert len(data) == 100 and data.x.shape == (100, 1, 21) and data.class_names == ("fast", "slow")
    np.testing.assert_array_equal(data.x[13:57], x[13:57])
    np.testing.assert_array_equal(data.labels(), labels)
    np.testing.assert_array_equal(data.to_ntd(), x.transpose(0, 2, 1))
    np.testing.assert_array_equal(data.to_ntd(slice(5, 7)), x[5:7].transpose(0, 2, 1))
    series, label = data[-1]
    np.testing.assert_array_equal(series, x[-1])
    assert data.class_names[label] == labels[-1] and data.attributes["dataset"] == "Waves"
    for index in (slice(3, 9, 2), [5, -1, 5], np.array([7, 2]), np.arange(100) % 9 == 0, torch.tensor([4]), []):
        some, which = data[index]
        expected = index if isinstance(index, slice) else np.asarray(index, None if len(index) else int)
        np.testing.assert_array_equal(some, x[expected])
        np.testing.assert_array_equal(np.array(data.class_names)[which], labels[expected])
    for index in (100, [1, 100], [0.5], [[1, 2]], [True]):
        with pytest.raises(IndexError):
            data[index]
    data.verify()
    # From another folder, and after the files have moved together.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tmp_path.glob("out*"):
        file.rename(moved / file.name)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ncfast.open_generated(moved / "out.h5"))).x, x)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_with_workers(written, workers):
    path, (x, labels) = written
    data = ncfast.open_generated(path)
    data.x[0]  # opened here first: a handle that workers must not use
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(data, 16, shuffle=True, num_workers=workers, generator=generator)
    seen = {}
    for series, label in loader:
        for s, k in zip(series, label, strict=True):
            seen[s.numpy().tobytes()] = data.class_names[k]
    assert seen == {row.tobytes(): label for row, label in zip(x, labels, strict=True)}


def test_series_without_classes(job, tmp_path):
    unlabelled = save_run(tmp_path / "unlabelled", names=(), channels=2)
    job("--num-samples", 10, run=unlabelled)
    data = ncfast.open_generated(tmp_path / "out.h5")
    assert data.y is None and data.labels() is None and data.class_names == ()
    assert data[3].shape == (2, 21) and data.to_ntd(3).shape == (1, 21, 2)


def test_what_is_missing_or_damaged_is_refused(job, tmp_path):
    job("--num-samples", 100, "--num-shards", 3)
    part = tmp_path / "out-00001-of-00003.h5"
    whole = part.read_bytes()
    data = ncfast.open_generated(tmp_path / "out.h5")
    with h5py.File(part, "r+") as file:
        file["tokens"][0, 0] ^= 1
    ncfast.open_generated(tmp_path / "out.h5")
    with pytest.raises(ncfast.UserError, match=r"out-00001-of-00003.h5 .*its tokens has changed"):
        data.verify()
    with h5py.File(part, "r+") as file:
        file.attrs["complete"] = False
    with pytest.raises(ncfast.UserError, match="it is not complete"):
        ncfast.open_generated(tmp_path / "out.h5")
    with pytest.raises(ncfast.UserError, match="is not complete"):
        ncfast.open_generated(part)
    part.write_bytes((tmp_path / "out-00000-of-00003.h5").read_bytes())
    with pytest.raises(ncfast.UserError, match="its series are others"):
        ncfast.open_generated(tmp_path / "out.h5")
    part.write_bytes(whole[:1000])
    with pytest.raises(ncfast.UserError, match=r"out-00001-of-00003.h5 cannot be used"):
        ncfast.open_generated(tmp_path / "out.h5")
    part.unlink()
    with pytest.raises(ncfast.UserError, match="it is missing; run the command"):
        ncfast.open_generated(tmp_path / "out.h5")
    with pytest.raises(ncfast.UserError, match="does not exist"):
        ncfast.open_generated(tmp_path / "nothing.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(ncfast.UserError, match="damaged or no HDF5 file"):
        ncfast.open_generated(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(ncfast.UserError, match="not a file of `ncfast.generate`"):
        ncfast.open_generated(tmp_path / "foreign.h5")


def test_shards_are_large_enough_to_draw_a_part_of_each_again(run, job):
    out = job("--num-samples", 10**9, "--dry-run", "--num-shards", 7)
    assert "shards     7" in out
    row = 4 * 21 + 2 * ncfast.load(run).prior.num_tokens + 16
    assert f"shards     {-(-(10**9) * row // 2**28)}" in job("--num-samples", 10**9, "--dry-run")


@pytest.mark.parametrize(("rows", "parts", "shards"), [(3000, 2, 2), (20_000, 2, 3), (10**6, 2, 8), (500, 4, 1)])
def test_processes_share_shards_of_a_hundred_forward_passes(run, rows, parts, shards):
    arguments = generate.make_parser().parse_args(["--run", str(run), "--out", "x.h5", f"--num-samples={rows}"])
    model = ncfast.load(run)
    assert generation.make_job(arguments, sampling_series.SeriesSampler(model), "train", parts).shards == shards


def test_series_drawn_again_are_compared_with_the_file(run, job, tmp_path):
    for more in ([], ["--dtype", "float16", "--labels", "fast:300,slow:200"], ["--tokens-only", "--labels", "none"]):
        job("--num-samples", 500, "--num-shards", 3, "--seed", 5, "--decoding-steps", 2, *more, "--overwrite")
        with ncfast.open_generated(tmp_path / "out.h5") as generated:
            generated.verify(redraw=4)
            assert generated.attributes["run"] == str(run.resolve())


def test_series_that_are_others_when_drawn_again_are_named(run, job, tmp_path):
    job("--num-samples", 500, "--num-shards", 3)
    path = sorted(tmp_path.glob("out-*.h5"))[1]
    with h5py.File(path, "a") as file:  # as if the device had written zeros: its checksum fits
        file["x"][-1] = 0
        file.attrs["sha256_x"] = hashlib.sha256(file["x"][:].tobytes()).hexdigest()
        last = file["index"][-1]
    with ncfast.open_generated(tmp_path / "out.h5") as generated:
        generated.verify()
        with pytest.raises(ncfast.UserError, match=f"{path.name}: x of series {last} is another one when drawn again"):
            generated.verify(redraw=2)
        with pytest.raises(ncfast.UserError, match="redraw is 0 or more"):
            generated.verify(redraw=-1)


def test_the_run_that_drew_them_has_to_be_there(run, job, tmp_path):
    other = save_run(tmp_path / "other", seed=1)
    moved = tmp_path / "moved"
    first = save_run(tmp_path / "first")
    job("--num-samples", 20, run=first)
    first.rename(moved)
    with ncfast.open_generated(tmp_path / "out.h5") as generated:
        with pytest.raises(ncfast.UserError, match=r"is not in .*first; say where: verify\(redraw=..., run=DIR\)"):
            generated.verify(redraw=1)
        with pytest.raises(ncfast.UserError, match="its weights are others"):
            generated.verify(redraw=1, run=other)
        generated.verify(redraw=1, run=moved)


def test_a_shard_with_what_was_never_computed_gets_no_name(run, job, tmp_path, monkeypatch):
    """A device that leaves a chunk out once, as one that is read too early does."""
    arrived, calls = sampling_series.SeriesSampler.arrived, []

    def faulty(self, chunk):
        batch = arrived(self, chunk)
        calls.append(chunk)
        return batch._replace(x=np.zeros_like(batch.x)) if len(calls) == 1 else batch

    monkeypatch.setattr(sampling_series.SeriesSampler, "arrived", faulty)
    with pytest.raises(ncfast.UserError, match="x of series 0 when drawn again is not what was written"):
        job("--num-samples", 50)
    assert not list(tmp_path.iterdir())
    job("--num-samples", 50)
    ncfast.open_generated(tmp_path / "out.h5").verify(redraw=50)


def test_classes_of_any_name_are_drawn(job, tmp_path):
    names = ("-1", "a,b", "a:2", "none", "train")
    run = save_run(tmp_path / "run", names=names)
    for text, expected in (
        ("-1,a:2", ["-1", "a:2"]),
        ("-1:1,none:2", ["-1", "none", "none"]),
        ("a,b", ["a,b", "a,b"]),
        ("a:2", ["a:2", "a:2"]),
        ('["none", "train"]', ["none", "train"]),
        ('{"a,b": 1, "a:2": 1}', ["a,b", "a:2"]),
    ):
        told = job("--num-samples", len(expected), "--labels", text, "--overwrite", run=run)
        assert ncfast.open_generated(tmp_path / "out.h5").labels().tolist() == expected and "warning" not in told
    assert "'none' is a class too; --labels '[\"none\"]'" in job(
        "--num-samples", 3, "--labels", "none", out="x.h5", run=run
    )
    for text, message in (("a", "names with commas or colons"), ("[a", "is no JSON"), ("a,b:2,-1", "name:count")):
        with pytest.raises(ncfast.UserError, match=message):
            job("--num-samples", 3, "--labels", text, out="y.h5", run=run)


NO_LOCKS = """
#include <errno.h>
#include <fcntl.h>
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


@pytest.mark.parametrize("shards", [1, 3])
def test_a_file_system_without_locks(shards, run, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    (tmp_path / "locks.c").write_text(NO_LOCKS)
    library = tmp_path / "locks.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "locks.c"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(library)}
    environment.pop("HDF5_USE_FILE_LOCKING", None)
    generating = command(run, tmp_path / "x.h5", "--num-samples", 30, "--num-shards", shards)
    code = (
        "import sys, numpy as np, ncfast; data = ncfast.open_generated(sys.argv[1]); data.verify(); data[5:7]\n"
        "assert np.isfinite(np.asarray(data.x)).all()\n"
        "np.savez(sys.argv[2] + '/s.npz', X=data.x[:]); import h5py\n"
        "from ncfast.data import load_dataset\n"
        "file = h5py.File(sys.argv[2] + '/s.h5', 'w', locking=False); file['X'] = data.x[:]; file.close()\n"
        "assert len(load_dataset(sys.argv[2] + '/s.h5').X_train) == 30"
    )
    for process in (generating, generating, [sys.executable, "-c", code, str(tmp_path / "x.h5"), str(tmp_path)]):
        done = subprocess.run(process, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
