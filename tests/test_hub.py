"""Runs on the hub, with a client that only pretends: there is no network in a test."""

import inspect
import json
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
from runs import save_run

import ncfast

client = pytest.importorskip("huggingface_hub")

FILES = {"config.json", "stage1.safetensors", "stage2.safetensors"}


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A hub whose repositories are folders of tmp_path / "hub"; every call fits the client's own signature."""
    calls = []
    real, download_signature = client.HfApi, inspect.signature(client.snapshot_download)

    class Api:
        def __init__(self, **options):
            inspect.signature(real).bind(**options)

        def create_repo(self, *arguments, **options):
            inspect.signature(real.create_repo).bind(self, *arguments, **options)
            calls.append(options)

        def upload_folder(self, **options):
            inspect.signature(real.upload_folder).bind(self, **options)
            shutil.copytree(options["folder_path"], tmp_path / "hub" / options["repo_id"])
            return "https://hub/commit"

    def download(*arguments, **options):
        given = download_signature.bind(*arguments, **options).arguments
        source, target = tmp_path / "hub" / given["repo_id"], tmp_path / "cache"
        if not source.exists():
            raise client.errors.RepositoryNotFoundError("404: no such repository", response=Mock(headers={}))
        shutil.copytree(source, target, ignore=lambda _, names: set(names) - set(given["allow_patterns"]))
        return str(target)

    monkeypatch.setattr(client, "HfApi", Api)
    monkeypatch.setattr(client, "snapshot_download", download)
    return calls


def test_what_is_pushed_comes_back(run, pretend, tmp_path):
    (run / "samples.png").write_bytes(b"a picture")
    measured = [
        {
            "metric": "fid",
            "value": 1.25,
            "std": None,
            "std_over": "",
            "seeds": [0],
            "n": "9",
            "evaluator_accuracy": None,
        },
        {"metric": "cas", "value": None, "reason": "no labels"},
    ]
    (run / "evaluation.json").write_text(json.dumps({"measures": measured}))
    (run / "state.pt").write_bytes(b"a pickle")
    model = ncfast.load(run, "cpu")
    assert model.push_to_hub("me/waves", run=run, private=True) == "https://hub/commit"
    assert pretend == [{"private": True, "exist_ok": True}]
    there = tmp_path / "hub" / "me" / "waves"
    assert {path.name for path in there.iterdir()} == {*FILES, "README.md", "samples.png", "evaluation.json"}
    card = (there / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ncfast\n") and "![Real and generated series](samples.png)" in card
    assert "| fid | 1.25 |" in card and "cas" not in card and 'from_pretrained("me/waves")' in card
    again = ncfast.NCVQVAE.from_pretrained("me/waves", device="cpu")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == FILES
    assert np.array_equal(model.sample(3)[0], again.sample(3)[0])


def test_a_model_in_memory_and_a_folder(run, pretend, tmp_path):
    model = ncfast.NCVQVAE.from_pretrained(run, device="cpu")
    model.push_to_hub("me/plain")
    card = (tmp_path / "hub" / "me" / "plain" / "README.md").read_text()
    assert "samples.png" not in card and "Measures" not in card


def test_a_refiner_goes_with_the_model(pretend, tmp_path):
    model = ncfast.load(save_run(tmp_path / "refined", refiner="flow", refiner_epochs=7), "cpu")
    model.push_to_hub("me/refined")
    assert "1 + 1 + 7 epochs" in (tmp_path / "hub" / "me" / "refined" / "README.md").read_text()
    again = ncfast.NCVQVAE.from_pretrained("me/refined", device="cpu")
    assert np.array_equal(model.sample(3)[0], again.sample(3)[0])
    assert not np.array_equal(model.sample(3)[0], again.sample(3, refinements=0)[0])


def test_errors_are_one_line(run, pretend, monkeypatch, tmp_path):
    with pytest.raises(ncfast.UserError, match="me/nothing is no folder here, and the hub does not give it: 404"):
        ncfast.NCVQVAE.from_pretrained("me/nothing")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ncfast.UserError, match="pip install 'ncfast\\[hub\\]'"):
        ncfast.load(run, "cpu").push_to_hub("me/half")
