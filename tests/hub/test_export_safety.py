"""An export reads its checkpoint alone, writes its folder alone; a push publishes a repository's files alone."""

import json
import os
import shutil

import pytest

from hf_flashdlm.hub.export import export_guider, export_model, export_strategy
from hf_flashdlm.hub.upload import list_files
from hf_flashdlm.tiny import FOLDER as TINY


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("SECRET")
    return tmp_path / "home" / "id_rsa"


@pytest.fixture
def guider(tmp_path):
    return shutil.copytree(TINY / "guider", tmp_path / "guider")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_guider(str(TINY / "guider"), tmp_path_factory.mktemp("exported") / "guider", "o/n")


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "folder")


def link(path, target):
    if path.is_file():
        path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_a_checkpoint_is_not_followed(name, guider, secret, tmp_path):
    link(guider / name, secret)
    with pytest.raises(ValueError) as refused:
        export_guider(str(guider), tmp_path / "out", "o/n")
    assert str(refused.value) == (
        f"`checkpoint` must have no link that leads out of it, but in {str(guider)!r} {name!r} does: put the file "
        "there, or remove the link."
    )
    assert not (tmp_path / "out").exists()


def test_nor_is_a_link_to_a_folder(guider, secret, tmp_path):
    (guider / "additional_chat_templates").symlink_to(secret.parent)
    with pytest.raises(ValueError, match="'additional_chat_templates' does"):
        export_guider(str(guider), tmp_path / "out", "o/n")


def test_a_snapshot_of_the_hubs_cache_is_a_checkpoint(tmp_path, secret):
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(TINY / "guider", blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    folder = export_guider(str(snapshot), tmp_path / "out", "o/n")
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert (folder / "model.safetensors").read_bytes() == (TINY / "guider" / "model.safetensors").read_bytes()
    link(blobs / "generation_config.json", secret)
    with pytest.raises(ValueError, match="'generation_config.json' does"):
        export_guider(str(snapshot), tmp_path / "other", "o/n")


def test_weights_in_another_folder_are_not_exported(guider, tmp_path):
    shutil.move(guider / "model.safetensors", tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a\\b.safetensors"):
        index = {"weight_map": {"model.norm.weight": name}}
        (guider / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="which is no safetensors file beside it"):
            export_guider(str(guider), tmp_path / "out", "o/n")
    assert not (tmp_path / "out").exists()


def test_a_config_cannot_name_other_weights(guider, tmp_path):
    config = json.loads((guider / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (guider / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names another file: remove `transformers_weights` there"):
        export_guider(str(guider), tmp_path / "out", "o/n")


def test_a_guider_is_published_without_the_code_that_its_config_names(guider, tmp_path):
    config = json.loads((guider / "config.json").read_text())
    (guider / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil/repo--a.B"}}))
    folder = export_guider(str(guider), tmp_path / "out", "o/n")
    assert json.loads((folder / "config.json").read_text()) == config


def test_the_folder_lies_outside_of_the_checkpoint(guider):
    before = sorted(path.name for path in guider.iterdir())
    for inside in (guider / "out", guider / ".." / guider.name / "out"):
        with pytest.raises(ValueError, match="`directory` must not lie in the checkpoint, got"):
            export_guider(str(guider), inside, "o/n")
    assert sorted(path.name for path in guider.iterdir()) == before


def test_what_fails_on_the_way_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(ValueError, match="`card` must be one of"):
            export_model(str(TINY / "dlm"), directory, "o/n", card="../README")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


@pytest.mark.parametrize("name", ["file/out", "dangling", "n\0ll"])
def test_a_folder_that_cannot_be_made_is_one_sentence(name, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    with pytest.raises(ValueError, match="`directory` must be"):
        export_strategy(tmp_path / name, "o/n")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "name", ["id_rsa", "pytorch_model.bin", "other.safetensors", "notes.txt", "data/secret.py", "optimizer.pt"]
)
def test_a_push_publishes_no_other_files(name, folder):
    before = list_files(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    if name == "data/secret.py":
        assert set(list_files(folder)) == {*before, name}  # code may have folders
        return
    with pytest.raises(ValueError) as refused:
        list_files(folder)
    assert str(refused.value) == (
        f"`directory` must hold nothing but a repository's files, got {name!r}: move it elsewhere."
    )


def test_a_push_follows_no_link_out_of_the_folder(folder, secret):
    link(folder / "vocab.json", secret)
    with pytest.raises(ValueError, match="`directory` must have no link that leads out of it, but in .*'vocab.json'"):
        list_files(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders")
def test_a_push_reads_no_pipe(folder):
    os.mkfifo(folder / "vocab.json")
    with pytest.raises(ValueError, match="got 'vocab.json'"):
        list_files(folder)


def test_a_push_publishes_weights_that_are_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"SECRET" * 100)
    with pytest.raises(ValueError, match="must have its weights as safetensors, but in .* model.safetensors is none"):
        list_files(folder)


@pytest.mark.parametrize(
    "auto_map", ["x", 3, [1], {"A": 3}, {"A": {"b": "c"}}, {"A": "../x.B"}, {"A": "/etc/passwd.B"}, {"A": "x"}]
)
@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_a_push_reads_no_code_elsewhere(auto_map, name, folder):
    (folder / name).write_text(json.dumps({"auto_map": auto_map}))
    with pytest.raises(ValueError, match=f"must have a {name} that names classes in auto_map, got"):
        list_files(folder)


def test_a_push_needs_the_code_of_a_processor(folder):
    (folder / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "absent.Processor"}}')
    with pytest.raises(ValueError, match="must be a complete repository, but .* has no absent.py"):
        list_files(folder)


@pytest.mark.parametrize("config", ["[1]", "{", "3", "\0", '"a"'])
def test_a_push_of_a_folder_with_a_broken_config_is_one_sentence(config, folder):
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="`directory` must have a config.json"):
        list_files(folder)
