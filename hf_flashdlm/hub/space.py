"""The page of `flashdlm app` as a Hugging Face Space: a folder that starts from what it contains.

Owns what lies in the folder: the package itself, which no registry has yet, a few lines that start the page, what is
to be installed beside it, and the card. Knows nothing of the page.
"""

import shutil
from pathlib import Path

from ..version import __version__
from .export import check_repo_id, export_guider, export_model, new_directory
from .loading import is_diffusion_model, load_config, load_diffusion_config


GRADIO = "6.31.0"  # what the page is tested with, and what the Space installs
# The dependencies of the package, as `pyproject.toml` names them.
REQUIREMENTS = "accelerate huggingface-hub jinja2 rich>=13 safetensors torch>=2.6 transformers>=5.18".split()
PACKAGE = Path(__file__).parents[1]
CARRIED = (".py", ".css", ".json", ".jsonl", ".jinja", ".safetensors")  # of the package
APP = '''\
"""The page, from the package in this folder."""

from pathlib import Path

from hf_flashdlm.app.serve import show_page


HERE = Path(__file__).parent

show_page(model={model}, guider={guider})
'''
CARD = f"""\
---
title: A diffusion language model at work
emoji: 🧩
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {GRADIO}
python_version: "3.11"
app_file: app.py
license: apache-2.0
---

# A diffusion language model at work

A prompt is decoded by several methods side by side, on one clock: plainly, with FreeCache, and, if there is a guider,
with it. {{models}}

The page is that of `flashdlm app`. Its code is the package hf_flashdlm {__version__}, which lies in the folder
`hf_flashdlm`, because no registry has it; `requirements.txt` names what is installed beside it. This repository was
written by `flashdlm export space`, which writes it anew for another version of the package.

To run the page elsewhere: `pip install -r requirements.txt gradio=={GRADIO}`, then `python app.py`.
"""


def export_space(directory: str | Path, repo_id: str, model: str | None = None, guider: str | None = None) -> Path:
    r"""
    Write the page as a Space.

    Args:
        directory (`str` or `Path`): A new or an empty folder.
        repo_id (`str`): The Space that the folder is going to be.
        model (`str`, *optional*): A diffusion model: a folder, which is exported into the Space, or a repository of
            the Hub, which the Space downloads when it starts. By default the embedded pair.
        guider (`str`, *optional*): An autoregressive model, likewise.

    Returns:
        `Path`: The folder.

    Raises:
        ValueError: If a model does not fit, or if the folder is in use.
    """
    check_repo_id(repo_id)
    is_folder = {name: name is not None and Path(name).is_dir() for name in (model, guider)}
    if model is not None and not is_folder[model]:
        load_diffusion_config("model", model)
    if guider is not None and not is_folder[guider] and is_diffusion_model(load_config("guider", guider)):
        raise ValueError(f"`guider` must be an autoregressive model, got the diffusion model {guider!r}.")
    with new_directory(directory) as directory:
        arguments = {"model": repr(model), "guider": repr(guider)}
        for option, name, export in (("model", model, export_model), ("guider", guider, export_guider)):
            if name is not None and is_folder[name]:
                export(name, directory / option, repo_id)
                arguments[option] = f'str(HERE / "{option}")'
        shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=left_out)
        licence = next(path for path in (PACKAGE / "LICENSE", PACKAGE.parent / "LICENSE") if path.is_file())
        shutil.copyfile(licence, directory / "LICENSE")
        downloaded = [name for name, stays in is_folder.items() if name is not None and not stays]
        (directory / "README.md").write_text(CARD.format(models=models(downloaded)), encoding="utf-8")
        (directory / "app.py").write_text(APP.format(**arguments), encoding="utf-8")
        (directory / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    return directory


def models(downloaded: list[str]) -> str:
    """The sentence of the card about the models."""
    if downloaded:
        return f"When the Space starts, it downloads {' and '.join(downloaded)}; its hardware must hold them."
    return "The models lie in this repository, so that it starts without downloading any."


def left_out(folder: str, names: list[str]) -> list[str]:
    """What of a folder of the package does not go into a Space."""
    unused = {"__pycache__", "model_cards"}
    return [
        name
        for name in names
        if name in unused or name.startswith(".") or not (Path(folder, name).is_dir() or name.endswith(CARRIED))
    ]
