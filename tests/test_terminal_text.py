"""Text on a terminal: nothing that a model, a name or a server says steers it."""

import io
import json
import os
import shutil
import sys
from contextlib import suppress

import pytest

from hf_flashdlm.cli import main
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.console.terminal import GuardedStream, guarded_terminal, visible
from hf_flashdlm.tiny import FOLDER as TINY


STEERING = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]


def test_all_that_steers_is_spelled_out():
    for code in STEERING:
        shown = visible(f"a{chr(code)}b")
        assert shown.isascii() and shown.isprintable() and shown[0] == "a" and shown[-1] == "b"
    assert visible("\x1b[2J\x9b\u202e") == "\\x1b[2J\\x9b\\u202e"


def test_other_text_is_as_it_was():
    text = "tab\tline\n" + "".join(map(chr, [*range(32, 127), *range(160, 0x2000)])) + "漢字 \u200f\u200e🙂"
    assert visible(text) == text == visible(visible(text))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_guarded_and_a_pipe_is_not(monkeypatch):
    terminal, pipe = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", pipe)
    with guarded_terminal():
        sys.stdout.writelines(["\x1b[1mtext\x07\n"])
        sys.stderr.write("\x1b[1m")
        assert sys.stdout.isatty() and sys.stdout.rich_proxied_file is terminal
    assert (terminal.getvalue(), pipe.getvalue()) == ("\\x1b[1mtext\\x07\n", "\x1b[1m")
    assert sys.stdout is terminal and sys.stderr is pipe


def test_a_progress_bar_moves_the_cursor_and_its_text_does_not():
    terminal = Terminal()
    stream = GuardedStream(terminal, progress=True)
    for part in ("\r", "\r 50% \x1b[2Jname.safetensors", "\n", "\x1b[A", "\r\r"):
        stream.write(part)
    assert terminal.getvalue() == "\r\r 50% \\x1b[2Jname.safetensors\n\x1b[A\r\\r"
    plain = GuardedStream(Terminal(), progress=False)
    plain.write("\r\x1b[A")
    assert plain.rich_proxied_file.getvalue() == "\\r\\x1b[A"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A checkpoint that writes the byte ESC wherever it can."""
    folder = shutil.copytree(TINY / "dlm", tmp_path_factory.mktemp("hostile") / "dlm")
    settings = {"eos_token_id": 0, "pad_token_id": 0, "mask_token_id": 1, "sequence_bias": [[[217], 1e4]]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no `pty`")
@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_what_a_model_writes_does_not_steer_the_terminal(hostile, more):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(HF_HUB_OFFLINE="1", TERM="xterm-256color", PYTHONPATH=os.pathsep.join(sys.path))
        command = [sys.executable, "-m", "flashdlm_command", "generate", "--model", hostile]
        os.execv(sys.executable, [*command, "--prompt", "x", "--max-new-tokens", "4", *more])
    shown = b""
    with suppress(OSError):  # the end of a terminal on Linux
        while part := os.read(terminal, 4096):
            shown += part
    assert os.waitpid(pid, 0)[1] == 0, shown
    assert b"\x1b\x1b" not in shown
    assert b"\\x1b\\x1b\\x1b\\x1b" in shown
    assert b"\\x1b[" not in shown, "what moves the cursor is spelled out"
    assert (b"\x1b[2K" in shown) == bool(more), "the canvas is drawn anew"


def test_a_pipe_gets_the_text_as_it_is(hostile, capsys):
    assert main(["generate", "--model", hostile, "--prompt", "x", "--max-new-tokens", "4"]) == 0
    assert "\x1b\x1b\x1b\x1b" in capsys.readouterr().out


def test_a_picture_of_the_canvas_shows_no_control_characters(hostile):
    checkpoint = Checkpoint.load(hostile, "cpu")
    pictures = []

    class Console:
        encoding = "utf-8"

    streamer = checkpoint.canvas_streamer(pictures.append, Console())
    assert streamer.render([217, 1, 217]).plain == "\\x1b ░\\x1b"


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "/no\x1b[2J", "--prompt", "a"],
        ["push", "\x1b[2J", "o/n", "--dry-run"],
        ["\x1b[2J"],
        ["demo", "--no-such\x9b\nx"],
    ],
)
def test_a_mistake_is_one_line_without_control_characters(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable()
