"""The cards of exported checkpoints and what the pages say of the Hub run as they are written."""

import pytest
from hub_cases import APART, LLADA, MODEL, ROOT, usage
from huggingface_hub import ModelCard
from minihub import TOKEN
from pages import commands, page, section, snippets

from hf_flashdlm.cli import main
from hf_flashdlm.hub.export import export_model
from hf_flashdlm.hub.upload import push


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


# Two cards are those of two others.
CARDS = {name.partition("/")[2] for name in CHECKPOINTS} - {"LLaDA-1.5", "DiffuCoder-7B-Instruct"}


@pytest.mark.parametrize(
    "cards", [{"LLaDA-8B-Instruct"}, pytest.param(CARDS, marks=pytest.mark.slow)], ids=["one card", "all cards"]
)
def test_checkpoints_of_the_hub_are_exported_and_their_cards_run(run_apart, originals, exported, tmp_path, cards):
    code = APART
    for checkpoint, weights in CHECKPOINTS.items():
        name = checkpoint.partition("/")[2]
        repo_id = f"o/flash-{name}"
        folder = export_model(checkpoint, tmp_path / name, repo_id)
        for original in exported[weights].glob("*.safetensors"):
            assert (folder / original.name).read_bytes() == original.read_bytes()
        if name in cards:
            push(folder, repo_id, token=TOKEN)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert ModelCard(card).data.base_model == [checkpoint]
        assert repo_id in usage(card)
        assert ("apply_chat_template" in usage(card)) == (checkpoint != "o/base")
        if name in cards:
            code += usage(card) + "assert output.nfe > 0\n"
    assert run_apart(code + "print('[]')") == []


README, PAGE = section("README.md", "On the Hub"), page("hf_flashdlm/hub/README.md")


@pytest.mark.parametrize("installed", [False, True])
def test_the_snippets_run_as_written(run_apart, installed):
    blocks = [block for block in snippets(README + PAGE) if ("import hf_flashdlm" in block) == installed]
    assert len(blocks) == (1 if installed else 3)
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" if installed else APART
    assert run_apart(path + "".join(blocks) + "\nprint('[]')") == []


def test_the_commands_run_as_written(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_flashdlm.hub.upload.get_token", lambda: TOKEN)
    calls = commands(PAGE, "flashdlm")
    *exports, push_call = calls
    assert {words[0] for words in exports} == {"export"} and push_call[0] == "push"
    for words in calls:
        assert main(words) == 0
    listed = capsys.readouterr().out
    assert "  model.safetensors\n" in listed and "my-org/flash-llada" not in originals.repositories
    assert main([word for word in push_call if word != "--dry-run"]) == 0
    assert originals.repositories.pop("my-org/flash-llada").private is True
