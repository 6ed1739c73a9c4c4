"""A decode as HTML: who wrote which token, what is still masked, and what it took up to a step.

Owns how a canvas is marked up and the counters beside it. All text of models and visitors is escaped here, and its
control characters are spelled out. Knows nothing of how decoding works or of the page around it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ..console.checkpoint import Checkpoint
from ..console.terminal import visible
from .run import Trace


# Who chose a token, with the words for it; the style sheet of the page gives each a colour and an underline.
GIVEN, MODEL, GUIDER, MASKED = "given", "model", "guider", "masked"
AUTHORS = {
    GIVEN: "given",
    MODEL: "written on the model's own confidence",
    GUIDER: "accepted by the guider",
}
MASK, SHOWN = "░", 400  # the character of a masked position; of a longer prompt its last characters are shown
COUNTS = ("forwards of the model", "forwards of the guider", "tokens", "tokens per forward", "seconds")


@dataclass(frozen=True)
class Cell:
    """A position of the canvas: its token, its author, the step that wrote it, and the probability it had then."""

    token_id: int
    author: str
    step: int | None = None
    probability: float | None = None


def panel(checkpoint: Checkpoint, trace: Trace, step: int | None = None) -> str:
    """
    A decode after `step` steps, by default after the last one so far; a step after its last one shows the last.
    """
    last = len(trace.canvases)
    step = last if step is None else min(step, last)
    parts = [f"<h2>{escape(trace.method.name)}</h2>", f'<p class="flash-note">{escape(trace.method.note)}</p>']
    if trace.error is not None:
        parts.append(f'<p class="flash-error" role="alert">{plain(trace.error)}</p>')
    else:
        cells = canvas(checkpoint, trace, step)
        parts += [table(trace, step, cells), markup(checkpoint, trace, step, cells), authors(cells)]
    state = "flash-done" if trace.is_done and step == last else "flash-forming"
    return f'<section class="flash-panel {state}" aria-label="{escape(trace.method.name)}">{"".join(parts)}</section>'


def plain(text: str) -> str:
    """Text of anybody as text of HTML."""
    return escape(visible(text))


def canvas(checkpoint: Checkpoint, trace: Trace, step: int) -> list[Cell]:
    """The generated region after `step` steps, up to its first end token."""
    if not trace.canvases:
        return []
    mask_token_id = checkpoint.model.config.mask_token_id
    before = [mask_token_id] * len(trace.canvases[0])
    cells = [Cell(mask_token_id, MASKED) for _ in before]
    for index, after in enumerate(trace.canvases[:step]):
        written = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        for rank, place in enumerate(written):
            author = GUIDER if rank < trace.accepted[index] else MODEL
            probability = trace.probability(place) if after[place] == trace.canvases[-1][place] else None
            cells[place] = Cell(after[place], author, index + 1, probability)
        before = after
    return cells[: len(checkpoint.up_to_end(before))]


def table(trace: Trace, step: int, cells: list[Cell]) -> str:
    """What the decode took up to a step."""
    tokens = sum(cell.author != MASKED for cell in cells)
    asked = step if trace.method.is_guided else 0
    rate, seconds = tokens / step if step else 0.0, trace.seconds[step - 1] if step else 0.0
    numbers = (str(step), str(asked), str(tokens), f"{rate:.2f}", f"{seconds:.2f}")
    rows = zip(COUNTS, numbers, strict=True)
    entries = "".join(f"<div><dt>{name}</dt><dd>{number}</dd></div>" for name, number in rows)
    return f'<dl class="flash-counts">{entries}</dl>'


def markup(checkpoint: Checkpoint, trace: Trace, step: int, cells: list[Cell]) -> str:
    """The prompt and the canvas."""
    tokenizer = checkpoint.tokenizer
    given = tokenizer.decode(trace.prompt, skip_special_tokens=True)
    parts = [f'<span class="flash-given">{plain(given if len(given) <= SHOWN else "…" + given[-SHOWN:])}</span> ']
    for author, run in groupby(cells, key=lambda cell: cell.author):
        group = list(run)
        if author == MASKED:
            masks = f"{MASK} " * len(group)
            parts.append(f'<span class="flash-masked" role="img" aria-label="{len(group)} masked">{masks}</span>')
        else:
            parts += (span(text, tokens, step) for text, tokens in pieces(tokenizer, group) if text)
    return f'<p class="flash-canvas">{"".join(parts)}</p>'


def pieces(tokenizer: PreTrainedTokenizerBase, cells: list[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    """The text of each token, or of several where a character is spread over them."""
    before: list[int] = []
    pending: list[Cell] = []
    for number, cell in enumerate(cells, 1):
        pending.append(cell)
        ids = [one.token_id for one in pending]
        start = len(tokenizer.decode(before, skip_special_tokens=True))
        text = tokenizer.decode(before + ids, skip_special_tokens=True)[start:]
        if not text.endswith("\ufffd") or number == len(cells):
            yield text, pending
            before, pending = ids, []


def span(text: str, cells: list[Cell], step: int) -> str:
    """A token."""
    cell = cells[-1]
    words = [f"{AUTHORS[cell.author]} at step {cell.step}"]
    if cell.probability is not None:
        words.append(f"probability {cell.probability:.2f}")
    fresh = " flash-fresh" if any(cell.step == step for cell in cells) else ""
    return f'<span class="flash-token flash-{cell.author}{fresh}" title="{", ".join(words)}">{plain(text)}</span>'


def authors(cells: list[Cell]) -> str:
    """How many tokens are whose, in words."""
    counts = [(words, sum(cell.author == author for cell in cells)) for author, words in AUTHORS.items()]
    said = ", ".join(f"{number} {words}" for words, number in counts if number)
    return f'<p class="flash-authors">{escape(said) or "nothing written yet"}</p>'
