"""Settings of a conversation: keywords of `generate`, each change checked as the next reply would be.

Owns which keywords can be set, how a value is written, and the check. Knows nothing of turns or of a terminal.
"""

import json
from difflib import get_close_matches

from ..generation_config import PARTS, PEER_NAMES, DiffusionOptions
from ..guider import ARGuider
from .checkpoint import Checkpoint


GUIDER = "guider"
# Of Transformers: those that a line of text can say and that mean something for a single reply.
NUMBERS = (
    *("max_new_tokens", "min_new_tokens", "max_time", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "guidance_scale"),
)
UNFIT = ("output_confidence", "output_history", "unmasking_rule")  # no text shows the first two or spells the last
NAMES = tuple(sorted({GUIDER, "do_sample", *NUMBERS, *DiffusionOptions.names()}.difference(UNFIT)))
WORDS = {"on": True, "true": True, "off": False, "false": False, "none": None, "null": None}


class Reached(Exception):
    """Raised in place of the first forward: `generate` has accepted its arguments."""


class ChatSettings:
    r"""
    What is set for the next replies.

    Args:
        checkpoint ([`Checkpoint`]): The model.
        options (`dict`): Keywords of `generate` that are set from the start, a guider among them.
        opening (`list[dict]`): Turns that every conversation begins with.

    Raises:
        ValueError: If `generate` refuses them.
    """

    def __init__(self, checkpoint: Checkpoint, options: dict, opening: list[dict]):
        self.checkpoint, self.prompt = checkpoint, [*opening, {"role": "user", "content": "?"}]
        self.guider: ARGuider | None = options.get(GUIDER)
        self.options: dict = {}
        self._take(options)

    def set(self, name: str, text: str) -> None:
        """Set a keyword to the value that `text` spells; what is refused changes nothing."""
        name = known(name)
        value = read_value(name, text)
        if name in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"`{name}` must be a number, got {value!r}.")
        if name == GUIDER:
            if not isinstance(value, bool):
                raise ValueError(f"`{GUIDER}` must be on or off, got {text!r}: another is loaded with `--guider`.")
            if not value:
                return self.unset(name)
            if self.guider is None:
                raise ValueError("`guider` cannot be on without a model: start the chat with `--guider`.")
            value = self.guider
        self._take(self.options | {name: value})

    def unset(self, name: str) -> None:
        """Leave a keyword to the checkpoint; what is refused changes nothing."""
        name = known(name)
        self._take({other: value for other, value in self.options.items() if other != name})

    def _take(self, options: dict) -> None:
        """Refuse `options` as `generate` would, without a forward, or keep them."""

        def stop(*_):
            raise Reached

        handle = self.checkpoint.model.register_forward_pre_hook(stop)
        try:
            self.checkpoint.continue_prompts([self.prompt], options, True)
        except Reached:
            self.options = options
        finally:
            handle.remove()

    def line(self, name: str) -> str:
        """The value of a keyword, and who says so."""
        name = known(name)
        if name in self.options:
            return f"{name} = {'on' if name == GUIDER else spelled(self.options[name])}"
        value = getattr(self.checkpoint.model.generation_config, name, None)
        return f"{name} is not set" + ("" if value is None else f"; the checkpoint says {spelled(value)}")

    def lines(self) -> list[str]:
        """All that is set, and all that can be set."""
        found = [self.line(name) for name in self.options]
        return [*(found or ["Nothing is set: all is as the checkpoint says."]), f"Settings: {', '.join(NAMES)}."]


def known(name: str) -> str:
    """The name of a keyword, which may be written as an argument of the command line is."""
    name = name.removeprefix("--").replace("-", "_")
    if name in PEER_NAMES:
        raise ValueError(f"`{name}` is an option of other implementations: here it is {PEER_NAMES[name]}.")
    if name not in NAMES:
        meant = "".join(f", `{other}` is" for other in get_close_matches(name, NAMES, 1))
        raise ValueError(f"`{name}` is no setting{meant}: /set lists all of them.")
    return name


def read_value(name: str, text: str):
    """The value that `text` spells: a number, a list, a truth value, None, or else a word."""
    if name in PARTS and text in PARTS[name][0]:  # as the window policy "none"
        return text
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def spelled(value) -> str:
    """A value as it would be typed."""
    return value if isinstance(value, str) else json.dumps(value, default=lambda part: type(part).__name__)
