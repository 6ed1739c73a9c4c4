"""The cards of exported checkpoints and the section of the README run as they are written."""

import re
import shlex

import pytest
from hub_cases import APART, LLADA, MODEL, ROOT, usage
from huggingface_hub import ModelCard
from minihub import TOKEN

from hf_flashdlm.cli import main as cli
from hf_flashdlm.hub.export import export_model
from hf_flashdlm.hub.push import push


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# The checkpoints with a card of their own, and the weights that replace theirs.
CHECKPOINTS = {
    "GSAI-ML/LLaDA-8B-Instruct": LLADA,
    "GSAI-ML/LLaDA-1.5": LLADA,
    "Dream-org/Dream-v0-Instruct-7B": MODEL,
    "apple/DiffuCoder-7B-Instruct": MODEL,
    "o/unheard-of": MODEL,
    "o/base": MODEL,
}


@pytest.fixture(scope="module")
def originals(published, exported):
    """The Hub with these checkpoints, as their authors might have published them."""
    for checkpoint, weights in CHECKPOINTS.items():
        if checkpoint not in published.repositories:
            files = {path.name: path.read_bytes() for path in exported[weights].iterdir() if path.suffix != ".py"}
            if checkpoint == "o/base":
                del files["chat_template.jinja"]
            published.create(checkpoint).commit(files)
    return published


def test_checkpoints_of_the_hub_are_exported_and_their_cards_run(run_apart, originals, exported, tmp_path):
    code = APART
    for checkpoint, weights in CHECKPOINTS.items():
        name = checkpoint.partition("/")[2]
        repo_id = f"o/flash-{name}"
        folder = export_model(checkpoint, tmp_path / name, repo_id)
        for original in exported[weights].glob("*.safetensors"):
            assert (folder / original.name).read_bytes() == original.read_bytes()
        push(folder, repo_id, token=TOKEN)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert ModelCard(card).data.base_model == [checkpoint]
        assert repo_id in usage(card)
        assert ("apply_chat_template" in usage(card)) == (checkpoint != "o/base")
        code += usage(card) + "assert output.nfe > 0\n"
    assert run_apart(code + "print('[]')") == []


README = (ROOT / "README.md").read_text(encoding="utf-8")


SECTION = README.partition("## On the Hub\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("installed", [False, True])
def test_the_section_of_the_readme_runs_as_written(run_apart, installed):
    blocks = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    blocks = [block for block in blocks if ("hf_flashdlm" in block) == installed]
    assert blocks
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" if installed else APART
    assert run_apart(path + "".join(blocks) + "\nprint('[]')") == []


def test_the_commands_of_the_readme_run_as_written(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_flashdlm.hub.push.get_token", lambda: TOKEN)
    commands = [shlex.split(line, comments=True)[1:] for line in SECTION.splitlines() if line.startswith("flashdlm ")]
    assert [words[0] for words in commands] == ["export", "push"]
    for words in commands:
        assert cli.main(words) == 0
    listed = capsys.readouterr().out
    assert listed.count("  model.safetensors\n") == 2 and "my-org/flash-llada" not in originals.repositories
    assert cli.main([word for word in commands[-1] if word != "--dry-run"]) == 0
    assert originals.repositories["my-org/flash-llada"].private
