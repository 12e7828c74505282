"""Finished runs on the Hugging Face hub: configuration as JSON, weights as safetensors, and a model card."""

import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ncfast.engine.checkpoint import read_json
from ncfast.errors import UserError
from ncfast.evaluation import table
from ncfast.ncvqvae import NCVQVAE, load
from ncfast.version import __version__

NEEDED = ("config.json", "stage1.safetensors", "stage2.safetensors")
SHOWN = ("samples.png", "evaluation.json", "metrics.json")  # of a run folder, where they are there


def from_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: str | None = None,
) -> NCVQVAE:
    """The model of a run folder, or of a repository on the hub.

    Nothing that is downloaded is executed: the files are JSON and safetensors.

    Args:
        name: a folder, or "owner/name" of a repository.
        revision: branch, tag or commit of the repository.
        token: of the hub; None takes that of `hf auth login`.
        cache_dir: where downloads are kept; None takes the hub's own folder.
        device, precision: as for `ncfast.load`.

    Raises:
        UserError: no such folder or repository, one without a finished run, or no huggingface_hub.
    """
    if Path(name).is_dir():
        return load(name, device, precision)
    hub = huggingface_hub()
    try:
        folder = hub.snapshot_download(
            str(name), revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(NEEDED)
        )
    except (OSError, ValueError) as error:  # what the hub's errors derive from
        raise UserError(
            f"{name} is no folder here, and the hub does not give it: {' '.join(str(error).split())[:200]}; check the "
            "name, the network, and for a private repository `hf auth login`"
        ) from error
    return load(folder, device, precision)


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Upload a run of ncfast",
) -> str:
    """Uploads a finished run with a model card made from it. Returns the commit's address.

    Args:
        run: folder of the run. Its picture and its evaluation go with it where they are there.
        repo_id: "owner/name"; the repository is made if it is not there.
        private: of a new repository; None is the owner's default.
        token: of the hub; None takes that of `hf auth login`.
        revision: branch to commit to.
        message: of the commit.

    Raises:
        UserError: a run that is not finished, or no huggingface_hub.
    """
    hub = huggingface_hub()
    model = load(run, "cpu")  # what is uploaded can be loaded
    with tempfile.TemporaryDirectory() as folder:
        for name in (*NEEDED, *SHOWN):
            if (Path(run) / name).exists():
                shutil.copy(Path(run) / name, folder)
        (Path(folder) / "README.md").write_text(model_card(model, Path(folder), repo_id))
        api = hub.HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message))


def model_card(model: NCVQVAE, folder: Path, repo_id: str) -> str:
    """Markdown: data, measures, picture and how to draw from it."""
    data, config = model.data, model.config
    classes = f"{len(data.class_names)} classes ({', '.join(data.class_names)})" if data.class_names else "no labels"
    picture = "![Real and generated series](samples.png)\n\n" if (folder / "samples.png").exists() else ""
    return f"""---
library_name: ncfast
tags: [time-series, time-series-generation, vq-vae, maskgit]
---

# {data.name}, generated

An NC-VQVAE ([arXiv 2408.16613](https://arxiv.org/abs/2408.16613)) trained with ncfast {__version__} on {data.name}:
{data.num_series} series of {data.length} samples and {data.channels} channel(s), {classes}. Self-supervised loss:
{config.ssl}; {config.stage1_epochs} + {config.stage2_epochs} epochs.

{picture}```python
import ncfast

model = ncfast.NCVQVAE.from_pretrained("{repo_id}")
X, y = model.sample(1000, seed=0)
```
{measures(folder)}"""


def measures(folder: Path) -> str:
    if not (folder / "evaluation.json").exists():
        return ""
    rows: list[Any] = [row[:3] for row in table.rows(read_json(folder / "evaluation.json")) if row[1] != "-"]
    lines = [table.HEADINGS[:3], ("---", "---:", "---"), *rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in lines)
    return f"\n## Measures, on the test set\n\n{text}\n"


def huggingface_hub() -> ModuleType:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'ncfast[hub]'") from None
