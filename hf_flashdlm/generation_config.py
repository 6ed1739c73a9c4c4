"""The options of a diffusion decode: names, defaults and checks, in one place.

Every option can be a keyword of `generate`, an attribute of a `GenerationConfig`, or a key of generation_config.json,
in that order of priority. Knows nothing of tensors or of how an option is used.
"""

from dataclasses import dataclass, fields

from transformers import GenerationConfig


WINDOW_POLICIES = ("freecache", "none")
SCHEDULES = ("uniform", "timesteps")


@dataclass(frozen=True)
class DiffusionOptions:
    r"""
    Options that `generate` takes beside the host's own.

    Args:
        block_length (`int`, *optional*, defaults to 32):
            The generated region is unmasked in blocks of this many tokens, from the end of the prompt on.
        steps (`int`, *optional*):
            Number of denoising steps for the whole region: a fixed number of tokens is written at each. Excludes
            `confidence_threshold` and a guider.
        schedule (`str`, *optional*, defaults to `"uniform"`):
            How `steps` are spread: `"uniform"` as LLaDA does, `"timesteps"` as Dream does.
        eps (`float`, *optional*, defaults to 1e-3): Last timestep of the `"timesteps"` schedule.
        confidence_threshold (`float`, *optional*):
            Write every candidate at least this probable, and at least one. Without `steps` the default is 0.9.
        window_policy (`str`, *optional*, defaults to `"freecache"`):
            `"freecache"` freezes the states of the prompt and of finished blocks, `"none"` recomputes everything.
        freeze_length (`int`, *optional*): Finished text is frozen in pieces of this length; by default a block.
        freeze_lag (`int`, *optional*, defaults to 1):
            Steps for which a finished piece is still recomputed before it is frozen. 0 is the paper's code.
        left_margin (`int`, *optional*, defaults to 0): Finished tokens left of a piece's end kept out of the freeze.
        right_window (`int`, *optional*): Recompute only this many positions from the first masked one on.
        attend_stale (`bool`, *optional*, defaults to `False`):
            Whether positions right of the window are attended with the states they had, instead of not at all.
        stop_at_eos (`bool`, *optional*, defaults to `True`):
            Whether a row ends at its first end token; otherwise it fills its canvas.
        mask_token_id (`int`, *optional*): By default `model.config.mask_token_id`.
    """

    block_length: int = 32
    steps: int | None = None
    schedule: str = "uniform"
    eps: float = 1e-3
    confidence_threshold: float | None = None
    window_policy: str = "freecache"
    freeze_length: int | None = None
    freeze_lag: int = 1
    left_margin: int = 0
    right_window: int | None = None
    attend_stale: bool = False
    stop_at_eos: bool = True
    mask_token_id: int | None = None

    def __post_init__(self):
        for name in ("block_length", "steps", "freeze_length", "right_window"):
            self._check_integer(name, 1)
        for name in ("freeze_lag", "left_margin", "mask_token_id"):
            self._check_integer(name, 0)
        _check_choice("window_policy", self.window_policy, WINDOW_POLICIES)
        _check_choice("schedule", self.schedule, SCHEDULES)
        if not 0 < self.eps < 1:
            raise ValueError(f"`eps` must lie between 0 and 1, got {self.eps!r}.")
        threshold = self.confidence_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"`confidence_threshold` is a probability and must lie in [0, 1], got {threshold!r}.")
        if threshold is not None and self.steps is not None:
            raise ValueError(
                f"`steps` fixes how many tokens a step writes and `confidence_threshold` leaves it open, got "
                f"steps={self.steps} and confidence_threshold={threshold}: pass one of them, and `None` for the other "
                "if the model's generation config sets it."
            )
        if self.schedule == "timesteps" and self.steps is None:
            raise ValueError("`schedule='timesteps'` spreads `steps`, got none: pass `steps` too.")
        if self.window_policy == "none" and (self.right_window is not None or self.left_margin):
            raise ValueError(
                "`right_window` and `left_margin` shape the window of `window_policy='freecache'`, got "
                f"'{self.window_policy}', which recomputes everything: drop them."
            )

    def _check_integer(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < lowest):
            raise ValueError(f"`{name}` must be an integer of at least {lowest}, got {value!r}.")

    def check_lengths(self, max_new_tokens: int) -> int:
        """Check the options against the length of the generated region; returns its number of blocks."""
        if self.block_length > max_new_tokens:
            raise ValueError(
                f"`block_length` must be at most `max_new_tokens`={max_new_tokens}, got {self.block_length}: lower it, "
                "or generate more."
            )
        num_blocks = -(-max_new_tokens // self.block_length)
        if self.steps is not None and self.steps < num_blocks:
            raise ValueError(
                f"`steps` must give each of the {num_blocks} blocks of {self.block_length} tokens at least one step, "
                f"got {self.steps}: raise it, or raise `block_length`."
            )
        return num_blocks

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def read(cls, generation_config: GenerationConfig) -> "DiffusionOptions":
        """The options that a prepared generation config holds, checked."""
        values = {name: getattr(generation_config, name) for name in cls.names() if hasattr(generation_config, name)}
        return cls(**values)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
