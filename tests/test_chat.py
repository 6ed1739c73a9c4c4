"""A conversation on standard input: turns, commands, interrupts, mistakes."""

import io
import json
import os
import re
import select
import sys
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
from rich.console import Console

from hf_flashdlm import DiffusionOptions
from hf_flashdlm.cli import main
from hf_flashdlm.console.chat import COMMANDS, SLOW, Chat, read_lines, run_chat
from hf_flashdlm.console.chat_settings import NAMES, read_value
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.tiny import FOLDER as TINY
from hf_flashdlm.tiny import GUIDANCE


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

    def spy(self, prompt, *args, **kwargs):
        seen.append([(turn["role"], turn["content"]) for turn in prompt])
        return stream(self, prompt, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "stream", spy)
    return seen


@pytest.fixture
def options_given(monkeypatch):
    """The keywords of `generate` for each reply."""
    seen, stream = [], Checkpoint.stream

    def spy(self, prompt, options, *args, **kwargs):
        seen.append(options)
        return stream(self, prompt, options, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "stream", spy)
    return seen


@pytest.fixture
def talk(checkpoint, say):
    """`talk(lines)` holds a conversation, with replies to `console`, and returns the notes."""

    def talk(*lines, checkpoint=checkpoint, options=OPTIONS, system=None, console=None):
        say(*lines)
        notes = io.StringIO()
        run_chat(checkpoint, options, system, console or Console(), Console(file=notes, markup=False, soft_wrap=True))
        return notes.getvalue()

    return talk


def test_the_embedded_pair_answers_at_once_and_figures_go_to_standard_error(say, capsys):
    say(QUESTION)
    assert main(CHAT) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(ANSWER)
    figures = r"(\d+) tokens, (\d+) forwards and \2 of the guider, ([\d.]+) tokens per forward, "
    figures += r"[\d.]+ seconds, [\d.]+ tokens per second\n"
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

    def interrupted(self, prompt, *args, **kwargs):
        if prompt[-1]["content"] == "Stop me.":
            raise KeyboardInterrupt
        return spy(self, prompt, *args, **kwargs)

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


@pytest.mark.parametrize("before", [[], [QUESTION, "/clear"]])
def test_nor_does_a_first_question_that_is_too_long_end_it(talk, conversations, before):
    noted = talk(*before, "many " * 512, QUESTION)
    assert noted.count("must fit the model's 512 positions together") == 1
    assert conversations[-1] == [("user", QUESTION)]


def test_options_that_are_refused_are_refused_before_the_first_question(talk):
    with pytest.raises(ValueError, match="`block_length` must be"):
        talk(options=OPTIONS | {"block_length": 0})


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


# Commands


def test_the_help_lists_every_command(talk):
    noted = talk("/help")
    for usage, about in COMMANDS.values():
        assert f"{usage:<20} {about}\n" in noted
    assert {f"/{name.removeprefix('do_')}" for name in vars(Chat) if name.startswith("do_")} == {*COMMANDS} - {"/exit"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "/etc/hosts says what?",
            "/etc/hosts is no command: /help lists them, and a text that begins with a slash is sent with a space "
            "before it.",
        ),
        ("/clear now", "/clear is written /clear, got '/clear now'."),
        ("/unset", "/unset is written /unset NAME, got '/unset'."),
        ("/unset top_k top_p", "/unset is written /unset NAME, got '/unset top_k top_p'."),
        ("/stats maybe", "/stats is written /stats [on|off], got '/stats maybe'."),
        ("/stats", "There is no reply yet: ask something first."),
        ("/slow", "/slow needs a terminal, where the steps of a reply are shown."),
        (
            "/\x1b[2J",
            "/\\x1b[2J is no command: /help lists them, and a text that begins with a slash is sent with a space "
            "before it.",
        ),
        ("/set top_k many", "`top_k` must be a number, got 'many'."),
        ("/set temperature none", "`temperature` must be a number, got None."),
        ("/set max_new_tokens on", "`max_new_tokens` must be a number, got True."),
        ("/set temperature -1", "`temperature` must not be negative, got -1."),
        ("/set blok_length 4", "`blok_length` is no setting, `block_length` is: /set lists all of them."),
        ("/set streamer x", "`streamer` is no setting: /set lists all of them."),
        ("/unset custom_generate", "`custom_generate` is no setting: /set lists all of them."),
        (
            "/set threshold 0.5",
            "`threshold` is an option of other implementations: here it is `confidence_threshold`.",
        ),
        ("/set guider on", "`guider` cannot be on without a model: start the chat with `--guider`."),
        (
            "/set guider Qwen/Qwen3-0.6B",
            "`guider` must be on or off, got 'Qwen/Qwen3-0.6B': another is loaded with `--guider`.",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_the_conversation_goes_on(talk, conversations, line, message):
    noted = talk(line, QUESTION).splitlines()
    assert noted[1] == message
    assert conversations == [[("user", QUESTION)]]


def test_a_text_that_begins_with_a_slash_is_sent_with_a_space_before_it(talk, conversations):
    talk(" /help", options={"max_new_tokens": 8})
    assert conversations == [[("user", "/help")]]


REFUSED = {
    "block_length": 0,
    "confidence_threshold": 1.5,
    "method": "fastest",
    "window_policy": "dula",
    "refresh_steps": 4,
    "steps": "many",
    "blocks": "adaptive",
    "max_new_tokens": 600,
    "mask_token_id": 5000,
    "first_token_alone": True,
    "top_k": -1,
    "min_p": 3,
    "repetition_penalty": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_is_refused_at_once_as_generate_refuses_it(talk, checkpoint, conversations, name):
    options = OPTIONS | {"temperature": 0.5}
    noted = talk(f"/set {name} {REFUSED[name]}", f"/set {name}", options=options).splitlines()
    prompt = [[{"role": "user", "content": "?"}]]
    with pytest.raises(ValueError) as refused:
        checkpoint.continue_prompts(prompt, options | {name: REFUSED[name]}, True)
    assert noted[1] == str(refused.value)
    assert noted[2].startswith(f"{name} = 64" if name == "max_new_tokens" else f"{name} is not set")
    assert conversations == [], "no reply was needed to find out"


def test_settings_reach_the_next_reply_until_they_are_unset(talk, options_given):
    noted = talk(
        *("Hi.", "/set block_length 4", "/set steps=16", "/set window-policy none", "Hi.", "/unset steps", "Hi."),
        options={"max_new_tokens": 16},
    )
    first, second, third = options_given
    assert first == {"max_new_tokens": 16}
    assert second == {"max_new_tokens": 16, "block_length": 4, "steps": 16, "window_policy": "none"}
    assert third == {"max_new_tokens": 16, "block_length": 4, "window_policy": "none"}
    assert "\nblock_length = 4\nsteps = 16\nwindow_policy = none\n" in noted and "\nsteps is not set\n" in noted


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("window_policy", "none", "none"),
        ("schedule", "none", None),
        ("stop_at_eos", "off", False),
        ("grow_canvas", "True", True),
        ("delimiter_token_ids", "[198, 13]", [198, 13]),
        ("method", '"llada"', "llada"),
        ("eps", "1e-3", 0.001),
        ("steps", "[" * 9999, "[" * 9999),
    ],
)
def test_a_value_is_a_word_a_number_a_list_or_a_switch(name, text, value):
    assert read_value(name, text) == value


def test_what_is_set_is_listed_with_what_can_be(talk):
    noted = talk("/set", "/set temperature 0.5", "/set", "/set block_length", "/set steps", options={})
    assert noted.count(f"Settings: {', '.join(NAMES)}.\n") == 2
    assert "\nNothing is set: all is as the checkpoint says.\nSettings: " in noted
    assert noted.count("temperature = 0.5\n") == 2
    assert "\nblock_length is not set; the checkpoint says 8\nsteps is not set\n" in noted


@pytest.mark.parametrize("name", sorted({*NAMES} - {"guider"}))
def test_whatever_can_be_set_is_a_keyword_of_generate(checkpoint, name):
    from transformers import GenerationConfig

    assert name in DiffusionOptions.names() or hasattr(GenerationConfig(), name)


def test_a_guider_can_be_turned_off_and_on(talk, checkpoint, options_given):
    guider = checkpoint.load_guider(str(TINY / "guider"), "cpu", "float32", **GUIDANCE)
    lines = ("/set steps 8", "/set guider off", "/set steps 8", "Hi.", "/unset steps", "/set guider on", "/set", "Hi.")
    noted = talk(*lines, options={"max_new_tokens": 8, "guider": guider})
    assert [one.get("guider") for one in options_given] == [None, guider]
    assert "got steps=8: drop one of them.\nguider is not set\nsteps = 8\n" in noted
    assert "\nmax_new_tokens = 8\nguider = on\nSettings: " in noted


def test_statistics_come_after_each_reply_or_when_they_are_asked_for(talk):
    options = {"max_new_tokens": 4}
    figures = " tokens per second\n"
    assert talk("Hi.", "Hi.", options=options).count(figures) == 2
    noted = talk("/stats off", "Hi.", "Hi.", "/stats", "/stats on", "Hi.", options=options)
    assert noted.count(figures) == 2
    tokens, seconds, rate = re.search(
        r"\n(\d+) tokens, .*, ([\d.]+) seconds, ([\d.]+) tokens per second\n", noted
    ).groups()
    assert int(tokens) / float(rate) == pytest.approx(float(seconds), abs=0.006)


@pytest.fixture
def slept(monkeypatch):
    """The pauses of the display, which take no time."""
    waits = []
    clock = SimpleNamespace(sleep=waits.append, perf_counter=lambda: sum(waits))
    monkeypatch.setattr("hf_flashdlm.console.display.time", clock)
    return waits


def test_a_slow_reply_is_shown_step_by_step(talk, slept):
    lines = ("/set steps 4", "/slow 0.5", "Hi.", "/slow", "Hi.", "/slow off", "Hi.")
    talk(*lines, options={"max_new_tokens": 4}, console=Console(file=io.StringIO(), force_terminal=True))
    assert slept == 4 * [0.5] + 4 * [SLOW] + 4 * [0.0]


def test_the_seconds_of_a_reply_are_those_of_the_decode(checkpoint, slept):
    console = Console(file=io.StringIO(), force_terminal=True)
    before = time.perf_counter()
    continuation = checkpoint.stream("Hi.", {"max_new_tokens": 4, "steps": 4}, True, console, pause=100.0)
    assert continuation.seconds + 4 * 100 == pytest.approx(0, abs=time.perf_counter() - before)


@pytest.mark.parametrize("seconds", ["-1", "nan", "61", "soon"])
def test_a_step_is_shown_for_a_minute_at_most(talk, seconds):
    noted = talk(f"/slow {seconds}", console=Console(file=io.StringIO(), force_terminal=True))
    assert noted.splitlines()[1] == f"/slow is written /slow [SECONDS|off], got '/slow {seconds}'."


# On a terminal


@pytest.mark.skipif(sys.platform == "win32", reason="there is no `pty`")
@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
@pytest.mark.slow
def test_a_conversation_on_a_terminal(kind):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(HF_HUB_OFFLINE="1", TERM=kind, PYTHONPATH=os.pathsep.join(sys.path))
        os.execv(sys.executable, [sys.executable, "-m", "flashdlm_command", *CHAT])
    shown, seen = b"", 0

    def read_until(mark):
        """Read on until the mark comes after those that came before; a chunk may hold several."""
        nonlocal shown, seen
        while mark not in shown[seen:]:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 4096)
        seen = shown.index(mark, seen) + len(mark)

    def read_to_the_end():
        nonlocal shown
        with suppress(OSError):  # the end of a terminal on Linux
            while chunk := os.read(terminal, 4096):
                shown += chunk

    read_until(b"> ")
    os.write(terminal, b"/set block_length 16\n")
    read_until(b"block_length = 16")
    if kind != "dumb":
        os.write(terminal, b"/slow 5\n")
        read_until(b"> ")
    os.write(terminal, f"{QUESTION}\n".encode())
    read_until("░".encode() if kind != "dumb" else b" tokens per second")
    if kind != "dumb":
        os.write(terminal, b"\x03")
        read_until(b"Dropped")
    os.write(terminal, b"/exit\n")
    read_to_the_end()
    assert os.waitpid(pid, 0)[1] == 0, shown
    if kind == "dumb":
        assert b"\x1b" not in shown and "░".encode() not in shown
    else:
        end = shown.rindex(b"\x1b[?25h")
        assert "░".encode() not in shown[end:] and b"\x1b[2K" in shown[end:], "the canvas is wiped off"
