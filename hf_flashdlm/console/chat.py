"""A conversation in the terminal, with the drafts of each reply in view, as `flashdlm chat` holds it.

Owns the turns, the commands among the lines, and what is said between two replies. Knows nothing of arguments, of
how checkpoints are loaded, or of how decoding works.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console

from .checkpoint import Checkpoint, Continuation
from .terminal import visible


with suppress(ImportError):  # not on every system
    import readline  # noqa: F401  gives `input` its keys

CLEAR, EXIT = "/clear", "/exit"
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
        ValueError: If there is no chat template, or if not even the first question can be answered.
    """
    if checkpoint.tokenizer.chat_template is None:
        raise ValueError(
            "`--model` must have a chat template to chat with, which its tokenizer has not: use `flashdlm generate`."
        )
    notes.print(f"{CLEAR} forgets the conversation, {EXIT} ends it.", style=NOTE)
    opening = [{"role": "system", "content": system}] if system else []
    turns, continuation = [], None
    for line in read_lines():
        if line == CLEAR:
            turns = []
            continue
        question = {"role": "user", "content": line}
        try:
            continuation = checkpoint.stream([*opening, *turns, question], options, True, console)
        except KeyboardInterrupt:
            notes.print("\nDropped; the conversation is as it was before the question.", style=NOTE)
        except ValueError as error:
            if continuation is None:
                raise  # the mistake may be in `options`, which no question can change
            notes.print(f"{visible(str(error))} Or {CLEAR} forgets the conversation.")
        else:
            turns += [question, {"role": "assistant", "content": continuation.texts[0]}]
            notes.print(statistics(continuation), style=NOTE)


def read_lines() -> Iterator[str]:
    """What is said on standard input, until it ends or asks for the end."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt) as end:
            sys.stdout.write("\n" if prompt else "")  # the shell goes on in a line of its own
            if isinstance(end, EOFError):
                return
            raise
        if line == EXIT:
            return
        if line:
            yield line


def statistics(continuation: Continuation) -> str:
    """What a reply took."""
    output, tokens = continuation.output, continuation.lengths[0]
    forwards = f"{int(output.nfe)} forwards"
    if output.guider_forwards is not None:
        forwards += f" and {int(output.guider_forwards)} of the guider"
    rate = float(output.tokens_per_forward)
    return f"{tokens} tokens, {forwards}, {rate:.2f} tokens per forward, {continuation.seconds:.2f} seconds"
