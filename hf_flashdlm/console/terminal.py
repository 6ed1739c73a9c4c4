"""Text on its way to a terminal: characters that would steer it are spelled out.

Owns which characters those are, and the streams of a program whose output a terminal shows. What goes to a pipe or a
file is left as it is. Knows nothing of where a text comes from.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


# All of C0 but tab and newline, DEL, C1, and the marks that reorder text on the screen (U+202A to 202E, 2066 to 2069).
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PROGRESS = re.compile(r"\n*(\x1b\[A)*|\r")  # how a progress bar moves the cursor, each move in a write of its own


def visible(text: str) -> str:
    r"""`text` with its control characters written as escapes such as `\x1b`."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class GuardedStream:
    r"""
    The stream of a terminal, to which only visible text is written; see [`unguarded`].

    Args:
        stream (`TextIO`): The stream.
        progress (`bool`): Whether progress bars write to it, which move the cursor.
    """

    def __init__(self, stream, progress: bool):
        self.rich_proxied_file, self.progress = stream, progress

    def write(self, text: str) -> int:
        start = 0
        if self.progress:
            start = len(text) if PROGRESS.fullmatch(text) else text.startswith("\r")
        self.rich_proxied_file.write(text[:start] + visible(text[start:]))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str):
        return getattr(self.rich_proxied_file, name)


def unguarded(stream):
    """
    The stream for a console of Rich, which has control sequences of its own to write; what it is given to print must
    be made visible before.
    """
    return getattr(stream, "rich_proxied_file", stream)


@contextmanager
def guarded_terminal() -> Iterator[None]:
    """Guard standard output and standard error where they are terminals."""
    before = sys.stdout, sys.stderr
    if sys.stdout.isatty():
        sys.stdout = GuardedStream(sys.stdout, progress=False)
    if sys.stderr.isatty():
        sys.stderr = GuardedStream(sys.stderr, progress=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
