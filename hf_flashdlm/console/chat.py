"""A conversation in the terminal, with the drafts of each reply in view, as `flashdlm chat` holds it.

Owns the turns, the commands among the lines, and what is said between two replies. Knows nothing of arguments, of
how checkpoints are loaded, or of how decoding works.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress

from rich.console import Console

from .chat_settings import ChatSettings
from .checkpoint import Checkpoint, Continuation
from .display import shows_canvas
from .terminal import visible


with suppress(ImportError):  # not on every system
    import readline  # noqa: F401  gives `input` its keys

CLEAR, EXIT = "/clear", "/exit"
SLOW, LONGEST = 0.2, 60.0  # seconds for which a step is shown
COMMANDS = {  # how each is written, and what it does
    "/help": ("/help", "lists the commands"),
    CLEAR: (CLEAR, "forgets the conversation"),
    "/set": ("/set [NAME [VALUE]]", "changes a setting of `generate`, or shows it; alone, all settings"),
    "/unset": ("/unset NAME", "leaves a setting to the checkpoint"),
    "/stats": ("/stats [on|off]", "what a reply took, after each or after none; alone, of the last"),
    "/slow": ("/slow [SECONDS|off]", f"shows each step this long, alone for {SLOW} seconds"),
    EXIT: (EXIT, "ends the chat, and so does Ctrl-D"),
}
NOTE = "dim"


def run_chat(checkpoint: Checkpoint, options: dict, system: str | None, console: Console, notes: Console) -> None:
    r"""
    Answer the lines of standard input, one after another, each with all turns before it in view of the model.

    An interrupt during a reply drops the question with it, and the conversation goes on.

    Args:
        checkpoint (`Checkpoint`): The model, whose tokenizer needs a chat template.
        options (`dict`): Keywords of `generate`; a `temperature` decides on `do_sample`, too.
        system (`str`, *optional*): What the model is told before the first turn.
        console (`Console`): Gets the replies.
        notes (`Console`): Gets everything else.

    Raises:
        ValueError: If there is no chat template, or if `generate` refuses the options.
    """
    if checkpoint.tokenizer.chat_template is None:
        raise ValueError(
            "`--model` must have a chat template to chat with, which its tokenizer has not: use `flashdlm generate`."
        )
    chat = Chat(checkpoint, options, system, console, notes)
    notes.print(f"{CLEAR} forgets the conversation, {EXIT} ends it, /help lists all commands.", style=NOTE)
    for line in read_lines():
        chat.take(line)


class Chat:
    """A conversation and how it is shown; arguments as of [`run_chat`]."""

    def __init__(self, checkpoint: Checkpoint, options: dict, system: str | None, console: Console, notes: Console):
        self.checkpoint, self.console, self.notes = checkpoint, console, notes
        self.opening = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict] = []
        self.settings = ChatSettings(checkpoint, options, self.opening)
        self.last: Continuation | None = None
        self.says_statistics, self.pause = True, 0.0

    def take(self, line: str) -> None:
        """Answer a line, or do what it says."""
        try:
            if line.startswith("/"):
                self.obey(*filter(None, re.split(r"[\s=]+", line, maxsplit=2)))
            else:
                self.answer(line.strip())
        except ValueError as error:
            self.notes.print(visible(str(error)))

    def answer(self, text: str) -> None:
        """Reply to a text, unless it is interrupted."""
        question = {"role": "user", "content": text}
        prompt = [*self.opening, *self.turns, question]
        try:
            self.last = self.checkpoint.stream(prompt, self.settings.options, True, self.console, pause=self.pause)
        except KeyboardInterrupt:
            self.notes.print("\nDropped; the conversation is as it was before the question.", style=NOTE)
        except ValueError as error:
            raise ValueError(f"{error} Or {CLEAR} forgets the conversation.") from error
        else:
            self.turns += [question, {"role": "assistant", "content": self.last.texts[0]}]
            if self.says_statistics:
                self.notes.print(statistics(self.last), style=NOTE)

    def obey(self, name: str, *words: str) -> None:
        """Do what a command says."""
        if name not in COMMANDS:
            raise ValueError(
                f"{name} is no command: /help lists them, and a text that begins with a slash is sent with a space "
                "before it."
            )
        command = getattr(self, f"do_{name.removeprefix('/')}")
        try:
            inspect.signature(command).bind(*words)
        except TypeError:
            raise misused(name, words) from None
        command(*words)

    def do_help(self) -> None:
        """List the commands."""
        for usage, about in COMMANDS.values():
            self.notes.print(f"{usage:<20} {about}", style=NOTE)

    def do_clear(self) -> None:
        """Forget the turns."""
        self.turns = []

    def do_set(self, name: str | None = None, value: str | None = None) -> None:
        """Change a setting, or show it, or all."""
        if name is not None and value is not None:
            self.settings.set(name, value)
        for line in self.settings.lines() if name is None else [self.settings.line(name)]:
            self.notes.print(visible(line), style=NOTE)

    def do_unset(self, name: str) -> None:
        """Leave a setting to the checkpoint."""
        self.settings.unset(name)
        self.notes.print(visible(self.settings.line(name)), style=NOTE)

    def do_stats(self, when: str | None = None) -> None:
        """Say what the last reply took, or whether it is said after each."""
        if when is not None:
            if when not in ("on", "off"):
                raise misused("/stats", [when])
            self.says_statistics = when == "on"
        elif self.last is None:
            raise ValueError("There is no reply yet: ask something first.")
        else:
            self.notes.print(statistics(self.last), style=NOTE)

    def do_slow(self, seconds: str = str(SLOW)) -> None:
        """Show each step for a while."""
        if not shows_canvas(self.console):
            raise ValueError("/slow needs a terminal, where the steps of a reply are shown.")
        try:
            pause = 0.0 if seconds == "off" else float(seconds)
        except ValueError:
            pause = -1.0
        if not 0 <= pause <= LONGEST:
            raise misused("/slow", [seconds])
        self.pause = pause


def misused(name: str, words: Sequence[str]) -> ValueError:
    """The mistake of a command that is followed by something else than its usage says."""
    return ValueError(f"{name} is written {COMMANDS[name][0]}, got {' '.join([name, *words])!r}.")


def read_lines() -> Iterator[str]:
    """
    What is said on standard input, until it ends or asks for the end; a command begins with a slash, and a text that
    does with a space before it.
    """
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).rstrip()
        except (EOFError, KeyboardInterrupt) as end:
            sys.stdout.write("\n" if prompt else "")  # the shell goes on in a line of its own
            if isinstance(end, EOFError):
                return
            raise
        if line.partition(" ")[0] == EXIT:
            return
        if line:
            yield line


def statistics(continuation: Continuation) -> str:
    """What a reply took."""
    output, tokens, seconds = continuation.output, continuation.lengths[0], continuation.seconds
    forwards = f"{int(output.nfe)} forwards"
    if output.guider_forwards is not None:
        forwards += f" and {int(output.guider_forwards)} of the guider"
    return (
        f"{tokens} tokens, {forwards}, {float(output.tokens_per_forward):.2f} tokens per forward, {seconds:.2f} "
        f"seconds, {tokens / seconds:.1f} tokens per second"
    )
