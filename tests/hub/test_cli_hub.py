"""`flashdlm export` and `flashdlm push`."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
from hub_cases import GUIDER, MODEL, ROOT, STRATEGY, TINY
from minihub import TOKEN, MiniHub

from hf_flashdlm import __version__
from hf_flashdlm.cli import main
from hf_flashdlm.hub.upload import list_files


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def run(capsys):
    """`run(words)`: what a command prints to standard output."""

    def run(*words):
        assert main(list(map(str, words))) == 0
        return capsys.readouterr().out

    return run


def test_the_commands_export_and_list(run, minihub, tmp_path):
    written = run("export", "model", MODEL, tmp_path / "dlm", "--checkpoint", TINY / "dlm", "--card", "tiny-dlm")
    assert "2.7 MB  model.safetensors\n" in written and f"flashdlm push {tmp_path / 'dlm'} {MODEL}\n" in written
    run("export", "guider", GUIDER, tmp_path / "guider", "--checkpoint", TINY / "guider")
    run("export", "code", "o/flash-llada", tmp_path / "code", "--model-type", "llada")
    assert (tmp_path / "code" / "modeling_llada.py").is_file()
    run("export", "strategy", STRATEGY, tmp_path / "strategy")
    before = list(minihub.requests)
    listed = run("push", tmp_path / "strategy", STRATEGY, "--dry-run", "--private")
    files = list_files(tmp_path / "strategy")
    assert all(f"  {name}\n" in listed for name in files) and f"in {len(files)} files\n" in listed
    assert minihub.requests == before


def test_the_command_pushes(exported, minihub, run, monkeypatch):
    monkeypatch.setattr("hf_flashdlm.hub.upload.get_token", lambda: TOKEN)
    printed = run("push", exported[STRATEGY], "o/command", "--private", "--tag", "v9")
    assert printed == f"{minihub.url}/o/command/tree/v9\n"
    assert minihub.repositories["o/command"].private and "v9" in minihub.repositories["o/command"].tags


def test_a_mistake_in_a_folder_is_one_sentence(exported, tmp_path, capsys):
    folder = shutil.copytree(exported[STRATEGY], tmp_path / "strategy")
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "no-organization", "--dry-run"]) == 2
    assert "`repo_id` must have the form organization/name" in capsys.readouterr().err
    assert main(["push", str(folder), "o/n", "--dry-run"]) == 2
    refusal = f"flashdlm: `directory` must be a complete repository, but {str(folder)!r} has no README.md.\n"
    assert capsys.readouterr() == ("", refusal)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no `pty`")
def test_a_push_shows_its_progress_on_a_terminal(exported):
    import pty
    import termios

    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with MiniHub() as fresh:
        settings = {"HF_ENDPOINT": fresh.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
        command = [sys.executable, "-m", "hf_flashdlm", "push", str(exported[MODEL]), "o/seen"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment | settings, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # the end of a terminal on Linux
            while read := os.read(screen, 1024):
                shown += read
        os.close(screen)
        assert process.wait(timeout=60) == 0, shown
    assert b"model.safetensors: 100%" in shown
    assert shown.decode().splitlines()[-1] == f"{fresh.url}/o/seen/tree/{__version__}"
