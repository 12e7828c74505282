"""Finished runs on the Hugging Face hub: configuration as JSON, weights as safetensors, and a model card."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from ncfast.config import Config, epochs_text
from ncfast.data.stats import DataStats
from ncfast.engine.checkpoint import read_json
from ncfast.errors import UserError
from ncfast.version import __version__

FILES = ("config.json", *(f"stage{stage}.safetensors" for stage in (1, 2, 3)))  # the third, of a refiner
SHOWN = ("samples.png", "evaluation.json", "metrics.json")  # of a run folder, where they are there


def download(name: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None) -> Path:
    """The folder with a repository's files. Nothing of them is ever executed.

    Raises:
        UserError: no such repository, or no huggingface_hub.
    """
    hub = huggingface_hub()
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "allow_patterns": list(FILES)}
    try:
        return Path(hub.snapshot_download(name, **options))
    except (OSError, ValueError) as error:  # what the hub's errors derive from
        raise UserError(
            f"{name} is no folder here, and the hub does not give it: {' '.join(str(error).split())[:200]}; check the "
            "name, the network, and for a private repository `hf auth login`"
        ) from error


def upload(
    folder: Path, repo_id: str, private: bool | None, token: str | bool | None, revision: str | None, message: str
) -> str:
    """Commits all files of a folder; the repository is made if it is not there. Returns the commit's address."""
    api = huggingface_hub().HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message))


def model_card(config: Config, data: DataStats, folder: Path, repo_id: str) -> str:
    """Markdown: data, how to draw from the model, and the picture and measures that lie in `folder`."""
    classes = f"{len(data.class_names)} classes ({', '.join(data.class_names)})" if data.class_names else "no labels"
    picture = "![Real and generated series](samples.png)\n\n" if (folder / "samples.png").exists() else ""
    return f"""---
library_name: ncfast
tags: [time-series, time-series-generation, vq-vae, maskgit]
---

# {data.name}, generated

An NC-VQVAE ([arXiv 2408.16613](https://arxiv.org/abs/2408.16613)) trained with ncfast {__version__} on {data.name}:
{data.num_series} series of {data.length} samples and {data.channels} channel(s), {classes}. Self-supervised loss:
{config.ssl}; {epochs_text(config)} epochs.

{picture}```python
import ncfast

model = ncfast.NCVQVAE.from_pretrained("{repo_id}")
X, y = model.sample(1000, seed=0)
```
{measures(folder)}"""


def measures(folder: Path) -> str:
    if not (folder / "evaluation.json").exists():
        return ""
    figures = [figure for figure in read_json(folder / "evaluation.json")["measures"] if figure["value"] is not None]
    spread = ["" if figure["std"] is None else f" ± {figure['std']:.2g}" for figure in figures]
    rows = [f"| {each['metric']} | {each['value']:.4g}{std} |" for each, std in zip(figures, spread, strict=True)]
    return "\n".join(["\n## Measures, on the test set\n", "| measure | value |", "|---|---:|", *rows, ""])


def huggingface_hub() -> ModuleType:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise UserError("the hub needs huggingface_hub: pip install 'ncfast[hub]'") from None
