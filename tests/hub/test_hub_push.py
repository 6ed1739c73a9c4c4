"""Pushing to a Hub on loopback: one commit with a tag, and what is refused."""

import shutil
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hub_cases import CODE, GUIDER, MODEL, STRATEGY, TINY
from huggingface_hub import constants, snapshot_download
from minihub import TOKEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flashdlm import __version__
from hf_flashdlm.hub.export import export_model, export_strategy
from hf_flashdlm.hub.upload import list_files, push


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_a_push_is_one_commit_with_a_tag(published, exported):
    for repo_id, folder in exported.items():
        repository = published.repositories[repo_id]
        assert len(repository.commits) == 2  # the commit of the creation is empty
        assert repository.files(__version__) == {name: (folder / name).read_bytes() for name in list_files(folder)}


def test_what_is_downloaded_is_what_was_exported(published, exported):
    for repo_id, folder in exported.items():
        copy = Path(snapshot_download(repo_id, revision=__version__))
        files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        assert files == set(list_files(folder))
        assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in files)


def test_nothing_hidden_goes_up(exported, minihub, tmp_path):
    folder = shutil.copytree(exported[STRATEGY], tmp_path / "strategy")
    for name in (".env", ".git/config", "custom_generate/__pycache__/cache.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert list_files(folder) == list_files(exported[STRATEGY])
    push(folder, "o/hidden", private=True, token=TOKEN)
    assert set(minihub.repositories["o/hidden"].files()) == set(list_files(folder))
    assert minihub.repositories["o/hidden"].private


def test_a_repository_that_is_there_must_be_as_private_as_said(exported, published):
    for private, repo_id in ((True, STRATEGY), (False, "o/closed")):
        if repo_id not in published.repositories:
            published.create(repo_id, private=True)
        with pytest.raises(ValueError, match=f"`private` must agree with {repo_id}, which is there .*, got {private}"):
            push(exported[STRATEGY], repo_id, private, "v2", TOKEN)
        assert "v2" not in published.repositories[repo_id].tags
    push(exported[STRATEGY], "o/closed", True, "v2", TOKEN)


def test_a_token_is_needed_and_has_to_be_right(exported, minihub):
    with pytest.raises(ValueError, match="a token is needed to push and there is none: run `hf auth login`"):
        push(exported[STRATEGY], "o/token")
    with pytest.raises(
        ValueError, match=r"the Hub refused the token for o/token \(401 Invalid username or password.\): run"
    ):
        push(exported[STRATEGY], "o/token", token="hf_wrong")
    assert "o/token" not in minihub.repositories


@pytest.fixture
def impatient(monkeypatch):
    """Let the client's own retries not wait."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_an_interrupted_push_leaves_nothing_and_can_be_repeated(exported, minihub, impatient):
    minihub.broken.add("/api/models/o/broken/commit/main")
    with pytest.raises(ValueError, match=r"the upload to o/broken broke off .*: run the same command again"):
        push(exported[STRATEGY], "o/broken", token=TOKEN)
    repository = minihub.repositories["o/broken"]
    assert (repository.files(), repository.tags) == ({}, {})
    minihub.broken.clear()
    assert push(exported[STRATEGY], "o/broken", token=TOKEN).endswith(f"/o/broken/tree/{__version__}")
    assert set(repository.files(__version__)) == set(list_files(exported[STRATEGY]))


@pytest.fixture
def sharded(tmp_path):
    """A repository with several large files, with content that no other repository has."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "dlm")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    model.save_pretrained(tmp_path / "source", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(TINY / "dlm").save_pretrained(tmp_path / "source")
    return export_model(str(tmp_path / "source"), tmp_path / "sharded", "o/sharded")


def test_a_repeated_push_sends_only_what_the_hub_has_not(sharded, minihub, impatient):
    objects = {sha256(path.read_bytes()).hexdigest(): path for path in sorted(sharded.glob("*.safetensors"))}
    assert len(objects) > 2

    def sent_by(attempt):
        start = len(minihub.requests)
        attempt()
        return {line.rpartition("/")[2] for line in minihub.requests[start:] if line.startswith("PUT ")}

    def broken_off():
        with pytest.raises(ValueError, match=r"the upload to o/sharded broke off \(.*\): run the same command again"):
            push(sharded, "o/sharded", token=TOKEN)
        repository = minihub.repositories["o/sharded"]
        assert (repository.files(), repository.tags) == ({}, {})

    first = min(objects)
    minihub.broken = {f"/objects/{first}"}
    assert first in sent_by(broken_off)
    held = set(objects) & set(minihub.objects)
    assert held and first not in held
    minihub.broken = {"/api/models/o/sharded/commit/main"}
    assert sent_by(broken_off) == set(objects) - held
    minihub.broken = set()
    assert sent_by(lambda: push(sharded, "o/sharded", token=TOKEN)) == set()
    files = minihub.repositories["o/sharded"].files(__version__)
    assert files == {name: (sharded / name).read_bytes() for name in list_files(sharded)}


def test_nothing_of_an_earlier_version_is_loaded(sharded, exported, minihub):
    push(exported[MODEL], "o/grown", token=TOKEN, tag="v1")
    repository = minihub.repositories["o/grown"]
    before = repository.files() | {"picture.png": b"of the author", "old.py": b""}
    repository.commit(before)
    push(sharded, "o/grown", token=TOKEN, tag="v2")
    assert set(repository.files("v2")) == {*list_files(sharded), "picture.png"}
    assert "model.safetensors" in repository.files("v1")
    assert len(repository.commits) == 4


def test_code_under_earlier_names_is_removed(exported, minihub):
    push(exported[STRATEGY], "o/renamed", token=TOKEN, tag="v1")
    repository = minihub.repositories["o/renamed"]
    repository.commit(repository.files() | {"custom_generate/denoising.py": b"", "generation.py": b""})
    push(exported[STRATEGY], "o/renamed", token=TOKEN, tag="v2")
    assert set(repository.files("v2")) == set(list_files(exported[STRATEGY]))


def test_a_push_that_broke_off_before_its_tag_is_completed(exported, minihub):
    push(exported[STRATEGY], "o/untagged", token=TOKEN)
    repository = minihub.repositories["o/untagged"]
    commits, repository.tags = dict(repository.commits), {}
    push(exported[STRATEGY], "o/untagged", token=TOKEN)
    assert repository.commits == commits and repository.tags == {__version__: repository.branches["main"]}


def test_a_tag_is_not_moved(exported, published):
    before = dict(published.repositories[STRATEGY].tags)
    with pytest.raises(ValueError, match=f"`tag` must be new, got '{__version__}', which {STRATEGY} has already"):
        push(exported[STRATEGY], STRATEGY, token=TOKEN)
    assert published.repositories[STRATEGY].tags == before
    push(exported[STRATEGY], STRATEGY, token=TOKEN, tag="later")
    assert published.repositories[STRATEGY].tags["later"] == before[__version__]


def test_a_hub_that_is_not_there_or_refuses_is_one_sentence(exported, minihub, monkeypatch):
    def attempt():
        push(exported[STRATEGY], "o/away", token=TOKEN)

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="the Hub cannot be reached in offline mode: unset `HF_HUB_OFFLINE`"):
            attempt()
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="the upload to o/away broke off"):
            attempt()
    monkeypatch.setattr(constants, "ENDPOINT", minihub.url + "/nowhere")
    with pytest.raises(
        ValueError, match=r"the Hub refused the push to o/away \(404 EntryNotFound\): nothing was tagged"
    ):
        attempt()


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "o/na me", ""])
def test_a_repository_has_an_organization_and_a_name(repo_id, tmp_path):
    for call in (
        lambda: push(tmp_path, repo_id, token=TOKEN),
        lambda: export_strategy(tmp_path / "out", repo_id),
    ):
        with pytest.raises(ValueError, match="`repo_id` must have the form organization/name, got"):
            call()


@pytest.mark.parametrize(
    ("repo_id", "name"),
    [
        (MODEL, "README.md"),
        (MODEL, "config.json"),
        (MODEL, "model.safetensors"),
        (MODEL, "tokenizer_config.json"),
        (MODEL, "denoising_loop.py"),
        (CODE, "modeling_dream.py"),
        (GUIDER, "model.safetensors"),
        (STRATEGY, "custom_generate/generate.py"),
        (STRATEGY, "custom_generate/requirements.txt"),
        (STRATEGY, "custom_generate/cache.py"),
    ],
)
def test_an_incomplete_folder_is_not_pushed(exported, tmp_path, repo_id, name):
    folder = shutil.copytree(exported[repo_id], tmp_path / "folder")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        push(folder, "o/n", token=TOKEN)


def test_a_model_may_bring_a_strategy_of_its_own(exported, tmp_path):
    folder = shutil.copytree(exported[MODEL], tmp_path / "folder")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    pass\n")
    assert set(list_files(folder)) == {*list_files(exported[MODEL]), "custom_generate/generate.py"}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        list_files(folder)
