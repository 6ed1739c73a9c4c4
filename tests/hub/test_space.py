"""The page as a Space: a folder that holds all it starts from, or is not written."""

import re
import shutil
import tomllib

import pytest
import yaml
from hub_cases import ROOT, TINY
from safetensors import safe_open

from hf_flashdlm.cli import main
from hf_flashdlm.hub.export import check_links
from hf_flashdlm.hub.space import GRADIO, REQUIREMENTS, export_space


PAGE = "o/page"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return export_space(tmp_path_factory.mktemp("spaces") / "page", PAGE)


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_the_folder_is_a_space_of_gradio(space):
    assert {path.name for path in space.iterdir()} == {
        "LICENSE", "README.md", "app.py", "hf_flashdlm", "requirements.txt",
    }  # fmt: skip
    found = front_matter(space)
    assert (found["sdk"], found["sdk_version"], found["app_file"]) == ("gradio", GRADIO, "app.py")
    assert found["license"] == "apache-2.0" and "{" not in (space / "README.md").read_text(encoding="utf-8")
    compile((space / "app.py").read_text(encoding="utf-8"), "app.py", "exec")


def test_the_package_is_carried_as_it_is_and_nothing_else(space):
    carried = {path.relative_to(space).as_posix() for path in (space / "hf_flashdlm").rglob("*") if path.is_file()}
    needed = (".py", ".css", ".json", ".jsonl", ".jinja", ".safetensors")
    files = [path for path in (ROOT / "hf_flashdlm").rglob("*") if path.is_file()]
    code = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in needed}
    assert carried == code
    for name in carried:
        assert (space / name).read_bytes() == (ROOT / name).read_bytes()
    check_links("directory", space)


def test_what_is_installed_is_what_the_package_needs():
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(REQUIREMENTS) == sorted(stated["dependencies"])
    assert f"\ngradio=={GRADIO}\n" in (ROOT / "tests" / "requirements-app.txt").read_text(encoding="utf-8")


def test_models_of_folders_come_into_the_space(tmp_path):
    space = export_space(tmp_path / "out", PAGE, str(TINY / "dlm"), str(TINY / "guider"))
    text = (space / "app.py").read_text(encoding="utf-8")
    assert 'show_page(model=str(HERE / "model"), guider=str(HERE / "guider"))' in text
    for name in ("model", "guider"):
        with safe_open(space / name / "model.safetensors", "pt") as weights:
            assert list(weights.keys())
    assert str(tmp_path) not in "".join(
        path.read_text(encoding="utf-8") for path in space.rglob("*") if path.suffix in (".py", ".md", ".json")
    )


def test_models_of_the_hub_are_named(tmp_path, monkeypatch):
    known = {"o/dlm": TINY / "dlm", "o/guider": TINY / "guider"}
    from hf_flashdlm.hub import loading, space

    load = loading.load_config
    monkeypatch.setattr(loading, "load_config", lambda option, name: load(option, str(known.get(name, name))))
    monkeypatch.setattr(space, "load_config", loading.load_config)
    folder = export_space(tmp_path / "out", PAGE, "o/dlm", "o/guider")
    assert "show_page(model='o/dlm', guider='o/guider')" in (folder / "app.py").read_text(encoding="utf-8")
    assert "it downloads o/dlm and o/guider;" in (folder / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="`guider` must be an autoregressive model, got the diffusion model 'o/dlm'."):
        export_space(tmp_path / "other", PAGE, None, "o/dlm")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "page"}, "`repo_id` must have the form organization/name, got 'page'."),
        ({"model": str(TINY / "guider")}, "`checkpoint` must be a diffusion model, got "),
        ({"guider": str(TINY / "dlm")}, "`checkpoint` must be an autoregressive model, got the diffusion model "),
        ({"model": "/no/such"}, "`model` must be a folder with a checkpoint or a Hub repository, got no folder "),
        ({"guider": "./none"}, "`guider` must be a folder with a checkpoint or a Hub repository, got no folder "),
    ],
)
def test_a_refusal_leaves_nothing(tmp_path, arguments, message):
    with pytest.raises(ValueError) as refused:
        export_space(tmp_path / "out", **{"repo_id": PAGE} | arguments)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_what_breaks_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copytree", fail)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        with pytest.raises(OSError, match="no space left"):
            export_space(tmp_path / name, PAGE, str(TINY / "dlm"))
    assert list((tmp_path / "empty").iterdir()) == [] and not (tmp_path / "new").exists()


def test_a_folder_in_use_is_refused(space, capsys):
    before = sorted(space.rglob("*"))
    assert main(["export", "space", PAGE, str(space)]) == 2
    assert capsys.readouterr().err == f"flashdlm: `directory` must be new or empty, got {str(space)!r}.\n"
    assert sorted(space.rglob("*")) == before


def test_the_command_says_how_to_publish(tmp_path, capsys):
    assert main(["export", "space", PAGE, str(tmp_path / "out")]) == 0
    *files, total, publish = capsys.readouterr().out.splitlines()
    assert publish == f"hf upload {PAGE} {tmp_path / 'out'} . --repo-type space"
    assert any(line.endswith("  app.py") for line in files) and re.fullmatch(r" *[\d.]+ MB  in \d+ files", total)
    assert len(files) == sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == int(total.split()[-2])
