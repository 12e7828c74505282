import os
import pickle

import pytest
import torch

from ncfast.engine import checkpoint
from ncfast.errors import UserError

CPU = torch.device("cpu")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), checkpoint.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert checkpoint.read_json(path) == {"a": 1}
    assert files(tmp_path) == ["x.json"]


def test_state_round_trip_over_larger_and_smaller_ones(tmp_path):
    path = tmp_path / "state.pt"
    for size in (10, 100_000, 3, 50_000):
        checkpoint.write_state(path, {"epoch": size, "w": torch.full((size,), float(size))})
        state = checkpoint.read_state(path, CPU)
        assert state["epoch"] == size and torch.equal(state["w"], torch.full((size,), float(size)))
    assert files(tmp_path) == [".state.pt.spare", "state.pt"]
    checkpoint.drop_spare_state(path)
    assert files(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("stop_at", ["save", "unlink", "link", "replace 1", "replace 2"])
def test_a_kill_at_any_point_of_a_write_leaves_the_old_state_or_the_new_one(tmp_path, monkeypatch, stop_at):
    class Killed(BaseException):
        pass

    def killed(*args, **kwargs):
        raise Killed

    path = tmp_path / "state.pt"
    for epoch in (1, 2):
        checkpoint.write_state(path, {"epoch": epoch, "w": torch.arange(1000) + epoch})

    replaces = []
    replace = os.replace

    def counted_replace(*args):
        replaces.append(args)
        if stop_at == f"replace {len(replaces)}":
            raise Killed
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", counted_replace)
        if stop_at == "save":
            patch.setattr(checkpoint.torch, "save", lambda state, file: (file.write(b"half"), killed()))
        if stop_at == "unlink":
            patch.setattr(checkpoint.Path, "unlink", killed)
        if stop_at == "link":
            patch.setattr(checkpoint.os, "link", killed)
        with pytest.raises(Killed):
            checkpoint.write_state(path, {"epoch": 3, "w": torch.arange(1000) + 3})
    state = checkpoint.read_state(path, CPU)
    assert state["epoch"] == (3 if stop_at == "replace 2" else 2)
    assert torch.equal(state["w"], torch.arange(1000) + state["epoch"])
    checkpoint.write_state(path, {"epoch": 4})
    checkpoint.write_state(path, {"epoch": 5})
    assert checkpoint.read_state(path, CPU) == {"epoch": 5}


def test_reading_never_runs_code(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "state.pt"
    torch.save({"epoch": Harmful()}, path)
    with pytest.raises(UserError, match=r"state\.pt cannot be read"):
        checkpoint.read_state(path, CPU)
    path.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"state\.pt cannot be read"):
        checkpoint.read_state(path, CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.json", "x.safetensors"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    read = checkpoint.read_json if name.endswith("json") else checkpoint.read_tensors
    with pytest.raises(UserError, match=f"{name} does not exist"):
        read(path)
    path.write_bytes(b"\x00\x01garbage")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        read(path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    missing = tmp_path / "no" / "state.pt"
    with pytest.raises(UserError, match=r"cannot write .*state\.pt"):
        checkpoint.write_state(missing, {"epoch": 1})
    with pytest.raises(UserError, match=r"cannot write .*x\.json"):
        checkpoint.write_json(tmp_path / "no" / "x.json", {})
