"""A conversation on standard input: turns, commands, interrupts, mistakes."""

import io
import json
import re
import sys
from contextlib import nullcontext

import pytest
from rich.console import Console

from hf_flashdlm.cli import main
from hf_flashdlm.console.chat import read_lines, run_chat
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.tiny import FOLDER as TINY


CHAT = ["chat", "--device", "cpu", "--dtype", "float32"]
PROBLEM = json.loads((TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()[0])
QUESTION, ANSWER = PROBLEM["question"], f"#### {PROBLEM['final']}"
OPTIONS = {"max_new_tokens": 64}


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.load(str(TINY / "dlm"), "cpu", "float32")


@pytest.fixture
def say(monkeypatch):
    """`say(lines)` puts the lines on standard input."""
    return lambda *lines: monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def conversations(monkeypatch):
    """The conversation that the model gets for each reply, as lists of roles and texts."""
    seen, stream = [], Checkpoint.stream

    def spy(self, prompt, *args):
        seen.append([(turn["role"], turn["content"]) for turn in prompt])
        return stream(self, prompt, *args)

    monkeypatch.setattr(Checkpoint, "stream", spy)
    return seen


@pytest.fixture
def talk(checkpoint, say):
    """`talk(lines)` holds a conversation, with replies to `console`, and returns the notes."""

    def talk(*lines, checkpoint=checkpoint, options=OPTIONS, system=None, console=None):
        say(*lines)
        notes = io.StringIO()
        run_chat(checkpoint, options, system, console or Console(), Console(file=notes, soft_wrap=True))
        return notes.getvalue()

    return talk


def test_the_embedded_pair_answers_at_once_and_figures_go_to_standard_error(say, capsys):
    say(QUESTION)
    assert main(CHAT) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(ANSWER)
    figures = r"(\d+) tokens, (\d+) forwards and \2 of the guider, ([\d.]+) tokens per forward, [\d.]+ seconds\n"
    tokens, forwards, rate = re.search(figures, captured.err).groups()
    assert float(rate) == pytest.approx(int(tokens) / int(forwards), abs=0.01)
    assert captured.err.startswith("The embedded model knows word problems such as: ")


def test_options_reach_the_decoding(say, capsys):
    say(QUESTION)
    arguments = ["--model", str(TINY / "dlm"), "--max-new-tokens", "8", "--block-length", "4", "--temperature", "0"]
    assert main([*CHAT, *arguments]) == 0
    error = capsys.readouterr().err
    assert "\n8 tokens, " in error and "guider" not in error
    assert "embedded" not in error


def test_a_turn_sees_the_turns_before_it_until_they_are_cleared(talk, conversations, capsys):
    talk(QUESTION, "", "Nora has 2 nuts.", "/clear", QUESTION, system="Count.")
    replies = [text.strip() for text in capsys.readouterr().out.split("\n ")]
    opening, question = [("system", "Count.")], ("user", QUESTION)
    first, second, third = conversations
    assert first == third == [*opening, question]
    assert second == [*opening, question, ("assistant", replies[0]), ("user", "Nora has 2 nuts.")]
    assert replies[0].endswith(ANSWER)


def test_nothing_is_answered_after_the_end(talk, conversations):
    talk("/exit", QUESTION)
    assert conversations == []


def test_an_interrupt_drops_the_reply_and_keeps_the_conversation(talk, conversations, monkeypatch):
    spy = Checkpoint.stream

    def interrupted(self, prompt, *args):
        if prompt[-1]["content"] == "Stop me.":
            raise KeyboardInterrupt
        return spy(self, prompt, *args)

    monkeypatch.setattr(Checkpoint, "stream", interrupted)
    noted = talk(QUESTION, "Stop me.", "Nora has 2 nuts.")
    assert noted.count("Dropped; the conversation is as it was before the question.") == 1
    assert [role for role, _ in conversations[-1]] == ["user", "assistant", "user"]
    assert "Stop me." not in str(conversations)


def test_a_conversation_that_no_longer_fits_can_be_cleared(talk, conversations):
    noted = talk(QUESTION, "many " * 512, QUESTION)
    assert "must fit the model's 512 positions together" in noted
    assert "shorten one of them. Or /clear forgets the conversation.\n" in noted
    assert [role for role, _ in conversations[-1]] == ["user", "assistant", "user"]


def test_nor_does_a_question_that_is_too_long_end_a_conversation_that_was_cleared(talk, conversations):
    noted = talk(QUESTION, "/clear", "many " * 512, QUESTION)
    assert noted.count("must fit the model's 512 positions together") == 1
    assert conversations[-1] == conversations[0] == [("user", QUESTION)]


def test_a_first_question_that_is_refused_ends_it(talk):
    with pytest.raises(ValueError, match="`block_length` must be"):
        talk(QUESTION, options=OPTIONS | {"block_length": 0})


def test_a_terminal_sees_the_draft_and_then_the_text(talk):
    screen = io.StringIO()
    talk(QUESTION, console=Console(file=screen, force_terminal=True, width=200, color_system=None))
    drafts, text = screen.getvalue().split("\x1b[?25h")
    assert "░" in drafts
    assert text.rstrip().endswith(ANSWER) and "░" not in text


@pytest.mark.parametrize(("is_terminal", "prompt"), [(False, ""), (True, "> ")])
def test_a_line_is_asked_for_on_a_terminal_alone(monkeypatch, is_terminal, prompt):
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

    asked = []
    monkeypatch.setattr("sys.stdin", Stream())
    monkeypatch.setattr("sys.stdout", Stream())
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "/exit")
    assert list(read_lines()) == []
    assert asked == [prompt]


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_shell_goes_on_in_a_line_of_its_own(monkeypatch, capsys, is_terminal, end):
    def ended(text):
        raise end

    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(KeyboardInterrupt) if end is KeyboardInterrupt else nullcontext():
        assert list(read_lines()) == []
    assert capsys.readouterr().out == "\n" * is_terminal


def test_a_checkpoint_without_a_chat_template_is_refused(talk):
    untemplated = Checkpoint.load(str(TINY / "dlm"), "cpu", "float32")
    untemplated.tokenizer.chat_template = None
    message = "`--model` must have a chat template to chat with, which its tokenizer has not: use `flashdlm generate`."
    with pytest.raises(ValueError) as refused:
        talk(QUESTION, checkpoint=untemplated)
    assert str(refused.value) == message


def test_an_unknown_option_is_a_mistake(capsys):
    assert main(["chat", "--no-such"]) == 2
    assert capsys.readouterr().err == "flashdlm: unrecognized arguments: --no-such\n"
