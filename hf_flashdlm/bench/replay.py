"""Decodes of the same prompt as they went, replayed side by side on one clock.

Owns when each step of a decode was written, and how several decodes are shown at once in a terminal. Knows nothing of
methods, of problems, or of how decoding works.
"""

import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..console.display import CanvasStreamer, up_to_end
from ..guider import ARGuider


COLUMN = 26  # characters that a decode needs at least, the gap to the next one among them
SECONDS_PER_PICTURE = 0.04


@dataclass(frozen=True, slots=True)
class Frame:
    """What a decode had after a step: the `ids` of its generated region, and what it had taken until then."""

    seconds: float
    forwards: int
    guider_forwards: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Replay:
    """A decode: its `name`, a `note` on its result, its steps, and the `seconds` that it took."""

    name: str
    note: str
    frames: list[Frame]
    seconds: float

    def at(self, seconds: float) -> tuple[Frame, Frame]:
        """The last frame that was written by then, and the one before it."""
        index = max(bisect_right(self.frames, seconds, key=lambda frame: frame.seconds) - 1, 0)
        return self.frames[index], self.frames[max(index - 1, 0)]


class Recorder:
    r"""
    A streamer that keeps each step of a decode with the time at which it was written, and shows nothing.

    Args:
        mask_token_id (`int`): The id of a masked position.
    """

    shows_canvas = True  # `put_draft` is to be given the whole canvas

    def __init__(self, mask_token_id: int):
        self.mask_token_id, self.prompt_length = mask_token_id, 0
        self.guider_forwards = 0
        self.steps: list[tuple[float, int, torch.Tensor]] = []

    @contextmanager
    def counting(self, guider: ARGuider | None) -> Iterator[None]:
        """Forwards of the guider are counted."""
        if guider is None:
            yield
            return

        def count(*_):
            self.guider_forwards += 1

        handle = guider.model.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def put(self, ids: torch.LongTensor) -> None:
        """The first ids are the prompt."""
        self.prompt_length = self.prompt_length or ids.shape[-1]

    def put_draft(self, canvas: torch.LongTensor) -> None:
        """Keep `canvas`, shape `(1, canvas_length)`."""
        self.steps.append((time.perf_counter(), self.guider_forwards, canvas))

    def end(self) -> None:
        """The last step was the last."""
        self.ended = time.perf_counter()

    def replay(self, name: str, note: str, seconds: float) -> Replay:
        """The decode, which took `seconds` until it ended, with a step at the start in which nothing is written."""
        rows = [canvas[0, self.prompt_length :].tolist() for *_, canvas in self.steps]
        frames = [Frame(0.0, 0, 0, [self.mask_token_id] * len(rows[0]))]
        for number, ((written, guided, _), ids) in enumerate(zip(self.steps, rows, strict=True), 1):
            frames.append(Frame(seconds - (self.ended - written), number, guided, ids))
        return Replay(name, note, frames, seconds)


class Stage:
    r"""
    Decodes side by side, or below each other where they do not fit; without their texts where those do not fit.

    Args:
        replays (`list[Replay]`): The decodes.
        painter ([`CanvasStreamer`]): Draws a canvas.
        console (`Console`): Where they are shown.
    """

    def __init__(self, replays: list[Replay], painter: CanvasStreamer, console: Console):
        self.replays, self.painter, self.console = replays, painter, console
        self.num_columns = max(1, min(len(replays), console.width // COLUMN))
        self.width = max(1, console.width // self.num_columns - 1)
        # While they play, each text takes the lines of its longest picture: nothing moves but what is written.
        self.heights = [max(len(self._lines(replay, frame.seconds)) for frame in replay.frames) for replay in replays]
        self.end = max(replay.seconds for replay in replays)
        self.fits = len(console.render_lines(self.picture(0.0, texts=True), pad=False)) < console.height

    def play(self, slow: float) -> None:
        """Show all from the start to the end of the last, `slow` times slower than it was, and leave that in view."""
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            started = time.perf_counter()
            while slow and (now := (time.perf_counter() - started) / slow) < self.end:
                live.update(self.picture(now, self.fits), refresh=True)
                time.sleep(SECONDS_PER_PICTURE)
        self.heights = [0] * len(self.replays)
        self.console.print(self.picture(self.end, texts=True))

    def picture(self, seconds: float, texts: bool) -> Group:
        """All decodes as they were after this time, with their texts or without."""
        table = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(self.num_columns):
            table.add_column(width=self.width)
        cells = [self._cell(index, seconds, texts) for index in range(len(self.replays))]
        for start in range(0, len(cells), self.num_columns):
            table.add_row(*cells[start : start + self.num_columns])
        return Group(Text(f"{seconds:.3f} s", "bold"), table)

    def _cell(self, index: int, seconds: float, texts: bool) -> Group:
        replay = self.replays[index]
        frame, _ = replay.at(seconds)
        is_done = seconds >= replay.seconds
        forwards = f"{frame.forwards} forwards"
        if replay.frames[-1].guider_forwards:
            forwards = f"{frame.forwards} + {frame.guider_forwards} guider forwards"
        taken = f"{self._tokens(frame.ids)} tokens, {min(seconds, replay.seconds):.3f} s"
        head = [
            Text(f"{replay.name}: {replay.note}" if is_done else replay.name, "cyan"),
            Text(forwards),
            Text(taken, "bold green" if is_done else ""),
        ]
        if not texts:
            return Group(*head)
        lines = self._lines(replay, seconds)
        return Group(*head, *lines, *[Text("")] * (self.heights[index] - len(lines)), Text(""))

    def _lines(self, replay: Replay, seconds: float) -> list[Text]:
        """The lines of the text after this time."""
        frame, before = replay.at(seconds)
        return list(self.painter.render(frame.ids, before.ids).wrap(self.console, self.width))

    def _tokens(self, ids: list[int]) -> int:
        """How many are written, up to the first end token and with it."""
        written = up_to_end(ids, self.painter.end_token_ids)
        return len(written) - written.count(self.painter.mask_token_id)
