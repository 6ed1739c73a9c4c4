"""Showing a canvas while it is being denoised: masks, fresh tokens and finished text, as styled text.

Owns how a canvas looks and the streamer that shows it. Knows nothing of how or why tokens were chosen.
"""

import time
from collections.abc import Callable, Collection
from itertools import groupby

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .terminal import visible


MASKED, FRESH, WRITTEN = "dim", "bold green", ""


def mask_character(console: Console) -> str:
    """The character that stands for a masked position, one that `console` can print."""
    return "░" if console.encoding.lower().startswith("utf") else "_"


def shows_canvas(console: Console) -> bool:
    """Whether a canvas can change in place on `console`."""
    return console.is_terminal and not console.is_dumb_terminal


def up_to_end(ids: list[int], end_token_ids: Collection[int]) -> list[int]:
    """`ids` up to and with the first that ends a text."""
    return ids[: next((length for length, token_id in enumerate(ids, 1) if token_id in end_token_ids), len(ids))]


class CanvasStreamer:
    r"""
    A streamer for one or several prompts: hands on the text of their whole generated regions after every denoising
    step, drafts and masks included.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Turns ids into text.
        mask_token_id (`int`): The id of a masked position.
        end_token_ids (`set[int]`): Text after one of these is not shown.
        show (`Callable`): Is called with a `rich.text.Text` after each step, for example `rich.live.Live.update`. The
            rows of a batch stand below each other, an empty line between them.
        mask (`str`, *optional*, defaults to `"░"`): Drawn for each masked position.
        pause (`float`, *optional*, defaults to 0): Seconds to wait after each step.

    `seconds` is the time that it has taken so far, which is none of the decode's.
    """

    shows_canvas = True  # `put_draft` is to be given the whole canvas

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_token_id: int,
        end_token_ids: set[int],
        show: Callable[[Text], None],
        mask: str = "░",
        pause: float = 0.0,
    ):
        self.tokenizer, self.mask_token_id, self.end_token_ids = tokenizer, mask_token_id, end_token_ids
        self.show, self.mask, self.pause = show, mask, pause
        self.seconds = 0.0
        self.end()

    def put(self, ids: torch.LongTensor) -> None:
        """The first ids are the prompt, which is not shown. Finished text is on the canvas anyway."""
        if self.prompt_length is None:
            self.prompt_length = ids.shape[-1]

    def put_draft(self, canvas: torch.LongTensor) -> None:
        """Show `canvas`, shape `(batch_size, canvas_length)`."""
        started = time.perf_counter()
        rows = canvas[:, self.prompt_length :].tolist()
        before = self.shown or [None] * len(rows)
        self.show(Text("\n\n").join(self.render(*both) for both in zip(rows, before, strict=True)))
        self.shown = rows
        time.sleep(self.pause)
        self.seconds += time.perf_counter() - started

    def end(self) -> None:
        """Forget the prompt: the streamer can be used again."""
        self.prompt_length, self.shown = None, []

    def render(self, ids: list[int], before: list[int] | None = None) -> Text:
        """The text of a generated region, up to its first end token; `before` is what it held a step ago."""
        end = next((index for index, token_id in enumerate(ids) if token_id in self.end_token_ids), len(ids))
        text = Text()
        # A run of one style is decoded at once, because a character may be spread over several tokens.
        for style, run in groupby(enumerate(ids[:end]), key=lambda item: self._style(*item, before)):
            run_ids = [token_id for _, token_id in run]
            written = f" {self.mask}" * len(run_ids) if style == MASKED else visible(self.tokenizer.decode(run_ids))
            text.append(written, style)
        return text

    def _style(self, index: int, token_id: int, before: list[int] | None) -> str:
        if token_id == self.mask_token_id:
            return MASKED
        was_masked = before is None or before[index] == self.mask_token_id
        return FRESH if was_masked else WRITTEN
