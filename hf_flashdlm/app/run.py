"""Decodes that take turns, a step at a time, so that several methods can be watched side by side.

Owns which methods are compared, the clock of each, what is known of a decode after every step, and that a decode which
nobody watches any more ends within a step. Decoding itself is `model.generate`, which runs in a thread of its own and
waits after every step until it is asked for the next. Knows nothing of pages.
"""

import copy
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

import torch

from ..console.checkpoint import Checkpoint, Continuation, usual_block_length
from ..console.defaults import MAX_NEW_TOKENS
from ..generation_config import DEFAULT_CONFIDENCE_THRESHOLD
from ..guider import ARGuider


TURN = threading.Lock()  # held by the decode that computes: clocks run alone, and a second visitor waits for a step


@dataclass(frozen=True)
class Settings:
    """What a visitor may set; the names are those of keywords of `generate`."""

    max_new_tokens: int
    block_length: int
    confidence_threshold: float

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Settings":
        """The defaults of a checkpoint."""
        config = checkpoint.model.generation_config
        new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
        threshold = getattr(config, "confidence_threshold", None) or DEFAULT_CONFIDENCE_THRESHOLD
        return cls(new_tokens, usual_block_length(checkpoint.model, new_tokens), threshold)


@dataclass(frozen=True)
class Method:
    """A way to decode: its `name`, a `note` that says what it does, and keywords of `generate`."""

    name: str
    note: str
    options: dict

    @property
    def is_guided(self) -> bool:
        """Whether a guider judges its drafts."""
        return "guider" in self.options


def methods(settings: Settings, guider: ARGuider | None) -> list[Method]:
    """The methods that are compared, the last with the guider, if there is one."""
    threshold = settings.confidence_threshold
    compared = [
        Method("Plain", "One token per forward. Every forward computes the whole canvas.", {"method": "llada"}),
        Method(
            "FreeCache",
            f"Every token of probability {threshold:.2f} or more. Finished text is computed once.",
            {"method": "flashdlm", "confidence_threshold": threshold},
        ),
    ]
    if guider is not None:
        note = "Every token that the guider accepts, and one in any case. Finished text is computed once."
        compared.append(Method("FreeCache and guider", note, {"method": "flashdlm", "guider": guider}))
    return compared


@dataclass
class Trace:
    r"""
    What is known of a decode so far.

    Args:
        method ([`Method`]): How it decodes.
        prompt (`list[int]`): The ids before the canvas.
        canvases (`list[list[int]]`): The generated region after each step, mask tokens included.
        seconds (`list[float]`): The time up to the end of each step, without that in which the decode waited.
        accepted (`list[int]`): How many of the tokens written at each step the guider accepted, from the left.
        continuation ([`Continuation`], *optional*): What came of it, when it is done.
        error (`str`, *optional*): Why nothing came of it.
    """

    method: Method
    prompt: list[int] = field(default_factory=list)
    canvases: list[list[int]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    continuation: Continuation | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.continuation is not None or self.error is not None

    def probability(self, place: int) -> float | None:
        """The model's probability of the token at a place of the generated region, when the decode is done."""
        if self.continuation is None:
            return None
        confidence = self.continuation.output.confidence[0]
        column = len(self.prompt) + place
        return float(confidence[column]) if column < len(confidence) else None


class Watched:
    """A guider whose copy, which `generate` makes for a call, is kept: it counts what it has accepted so far."""

    def __init__(self, guider: ARGuider):
        self.guider = self.copied = guider

    def __copy__(self) -> ARGuider:
        self.copied = copy.copy(self.guider)
        return self.copied

    def __getattr__(self, name: str):
        return getattr(self.guider, name)

    def accepted(self) -> list[int]:
        """How many drafts were accepted at each step."""
        return self.copied.statistics(1.0)["accepted_lengths"][0]


class Stopped(Exception):
    """Nobody watches the decode any more."""


class Decode:
    r"""
    A decode that takes a step when it is asked for one. It is the streamer of its call.

    Args:
        checkpoint ([`Checkpoint`]): The model with its tokenizer.
        prompt (`str`): What is continued.
        method ([`Method`]): How.
        options (`dict`): More keywords of `generate`.
    """

    shows_canvas = True  # `put_draft` is to be given the whole canvas

    def __init__(self, checkpoint: Checkpoint, prompt: str, method: Method, options: dict):
        self.trace = Trace(method)
        self._guider = Watched(method.options["guider"]) if method.is_guided else None
        options = options | method.options | {"temperature": 0, "streamer": self, "guider": self._guider}
        self._arguments = checkpoint, prompt, options | {"output_confidence": True}
        self._asked, self._answered = threading.Semaphore(0), threading.Semaphore(0)
        self._is_stopped, self._begun = False, 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def seconds(self) -> float:
        """The time up to the end of the last step."""
        return self.trace.seconds[-1] if self.trace.seconds else 0.0

    def advance(self) -> None:
        """Take a step, the first time with what comes before it, the last time with what comes after it."""
        if self._thread.ident is None:
            self._thread.start()
        self._asked.release()
        self._answered.acquire()

    def stop(self) -> None:
        """Let the decode end where it is; returns at once."""
        self._is_stopped = True
        self._asked.release()

    def _run(self) -> None:
        checkpoint, prompt, options = self._arguments
        self._asked.acquire()
        try:
            with TURN:
                self.trace.continuation = checkpoint.continue_prompts([prompt], options)
        except Stopped:
            pass
        except Exception as error:  # of any part of the call: the page says what it was, and goes on
            said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self.trace.error = said.strip()
        finally:
            self._answered.release()

    # The streamer of the call.

    def put(self, ids: torch.LongTensor) -> None:
        """The first ids are the prompt. Finished text is on the canvas anyway."""
        if not self.trace.prompt:
            self.trace.prompt = ids.flatten().tolist()
            self._begun = time.perf_counter()

    def put_draft(self, canvas: torch.LongTensor) -> None:
        """Keep the canvas `(1, canvas_length)`, and wait until the next step is asked for."""
        self.trace.seconds.append(self.seconds + time.perf_counter() - self._begun)
        self.trace.canvases.append(canvas[0, len(self.trace.prompt) :].tolist())
        self.trace.accepted = [0] * len(self.trace.canvases) if self._guider is None else self._guider.accepted()
        TURN.release()
        self._answered.release()
        self._asked.acquire()
        TURN.acquire()
        if self._is_stopped:
            raise Stopped
        self._begun = time.perf_counter()

    def end(self) -> None:
        """The continuation says the rest."""


def race(
    checkpoint: Checkpoint, prompt: str, compared: list[Method], settings: Settings
) -> Generator[list[Trace], None, None]:
    r"""
    Decode a prompt by several methods on one clock: the next step is that of the method which has used least time, so
    that all have used about the same whenever one looks.

    Args:
        checkpoint ([`Checkpoint`]): The model with its tokenizer.
        prompt (`str`): What is continued.
        compared (`list[Method]`): The methods.
        settings ([`Settings`]): What they share.

    Yields:
        `list[Trace]`: What is known of each, the same objects after every step. Closing the iterator ends the decodes
        within a step.
    """
    options = {"max_new_tokens": settings.max_new_tokens, "block_length": settings.block_length}
    decodes = [Decode(checkpoint, prompt, method, options) for method in compared]
    traces = [decode.trace for decode in decodes]
    try:
        while left := [decode for decode in decodes if not decode.trace.is_done]:
            min(left, key=lambda decode: decode.seconds).advance()
            yield traces
    finally:
        for decode in decodes:
            decode.stop()
