"""The options of a diffusion decode: names, defaults and checks, in one place.

Every option can be a keyword of `generate`, an attribute of a `GenerationConfig`, or a key of generation_config.json,
in that order of priority. Knows nothing of tensors or of how an option is used.
"""

from dataclasses import dataclass, fields

from transformers import GenerationConfig


DEFAULT_BLOCK_LENGTH = 32
DEFAULT_CONFIDENCE_THRESHOLD = 0.9
DEFAULT_REFRESH_STEPS = 8

WINDOW_POLICIES = ("freecache", "prefix", "dual", "dkv", "none")
CONFIDENCES = ("probability", "margin", "entropy", "random")
SCHEDULES = ("uniform", "timesteps")
RULES = ("confidence_threshold", "factor", "frechet_delta", "entropy_bound")

# Names that other implementations use, and what they are called here.
PEER_NAMES = {
    "gen_length": "max_new_tokens",
    "block_size": "block_length",
    "diffusion_steps": "steps",
    "num_inference_steps": "steps",
    "max_denoising_steps": "steps",
    "threshold": "confidence_threshold",
    "remasking": "confidence",
    "alg": "confidence",
    "alg_temp": "position_temperature",
    "cfg_scale": "guidance_scale` (1 + cfg_scale), `",
    "mask_id": "mask_token_id",
    "dual_cache": "window_policy",
    "use_block_caching": "window_policy",
    "cache_steps": "refresh_steps",
    "cache_reloading_step": "refresh_steps",
}

# Options that mean something to some window policies only.
_POLICY_OPTIONS = {
    "freeze_length": ("freecache",),
    "freeze_lag": ("freecache",),
    "left_margin": ("freecache",),
    "right_window": ("freecache",),
    "attend_stale": ("freecache",),
    "refresh_blocks": ("freecache",),
    "refresh_entropy": ("freecache",),
    "grow_canvas": ("freecache", "none"),
    "refresh_steps": ("dkv",),
}


@dataclass(frozen=True)
class DiffusionOptions:
    r"""
    Options that `generate` takes beside the host's own.

    Args:
        block_length (`int`, *optional*):
            The generated region is unmasked in blocks of this many tokens, from the end of the prompt on. By default
            32, or the whole region if that is shorter.
        steps (`int`, *optional*):
            Number of denoising steps for the whole region: a fixed number of tokens is written at each. Excludes the
            four rules below and a guider.
        schedule (`str`, *optional*, defaults to `"uniform"`):
            How `steps` are spread: `"uniform"` as LLaDA does, `"timesteps"` as Dream does.
        eps (`float`, *optional*, defaults to 1e-3): Last timestep of the `"timesteps"` schedule.
        run_empty_steps (`bool`, *optional*, defaults to `False`):
            Whether steps of the `"timesteps"` schedule that write nothing are run, as Dream does.
        confidence (`str`, *optional*, defaults to `"probability"`):
            What is written first: `"probability"` (LLaDA's low_confidence, Dream's maskgit_plus), `"margin"`
            (topk_margin), `"entropy"`, `"random"` (LLaDA's random, Dream's origin).
        position_temperature (`float`, *optional*, defaults to 0.0): Noise on that order (Dream's alg_temp).
        confidence_threshold (`float`, *optional*):
            Write every candidate at least this probable, and at least one. 0.9 where neither `steps` nor a rule is
            given.
        factor (`float`, *optional*): Rule of Fast-dLLM, see [`ConfidenceFactor`].
        frechet_delta (`float`, *optional*): Rule of Fast-dLLM++, see [`FrechetProfile`].
        entropy_bound (`float`, *optional*): Rule of the EB-Sampler, see [`EntropyBound`]; implies
            `confidence="entropy"`.
        window_policy (`str`, *optional*, defaults to `"freecache"`):
            `"freecache"` freezes the states of the prompt and of finished blocks (FlashDLM), `"prefix"` and `"dual"`
            refresh all at each block (Fast-dLLM), `"dkv"` keeps written tokens one step late (dKV-Cache), `"none"`
            recomputes everything.
        freeze_length (`int`, *optional*): Finished text is frozen in pieces of this length; by default a block.
        freeze_lag (`int`, *optional*, defaults to 1):
            Steps for which a finished piece is still recomputed before it is frozen. 0 is the paper's code.
        left_margin (`int`, *optional*, defaults to 0): Finished tokens left of a piece's end kept out of the freeze.
        right_window (`int`, *optional*): Recompute only this many positions from the first masked one on.
        attend_stale (`bool`, *optional*, defaults to `False`):
            Whether positions right of the window are attended with the states they had, instead of not at all.
        grow_canvas (`bool`, *optional*, defaults to `False`):
            Show the model only the blocks up to the current one, so that the cost does not depend on
            `max_new_tokens`.
        refresh_blocks (`int`, *optional*): FreeCache recomputes everything at every so many blocks.
        refresh_entropy (`float`, *optional*): And after writing a token with more entropy than this, in nats.
        refresh_steps (`int`, *optional*): dKV-Cache recomputes everything at every so many steps; by default 8.
        synchronize_blocks (`bool`, *optional*):
            Whether rows wait for each other before they enter a block. By default those of a batch do where the
            window policy refreshes at blocks.
        stop_at_eos (`bool`, *optional*, defaults to `True`):
            Whether a row ends at its first end token; otherwise it fills its canvas.
        mask_token_id (`int`, *optional*): By default `model.config.mask_token_id`.
    """

    block_length: int | None = None
    steps: int | None = None
    schedule: str = "uniform"
    eps: float = 1e-3
    run_empty_steps: bool = False
    confidence: str = "probability"
    position_temperature: float = 0.0
    confidence_threshold: float | None = None
    factor: float | None = None
    frechet_delta: float | None = None
    entropy_bound: float | None = None
    window_policy: str = "freecache"
    freeze_length: int | None = None
    freeze_lag: int = 1
    left_margin: int = 0
    right_window: int | None = None
    attend_stale: bool = False
    grow_canvas: bool = False
    refresh_blocks: int | None = None
    refresh_entropy: float | None = None
    refresh_steps: int | None = None
    synchronize_blocks: bool | None = None
    stop_at_eos: bool = True
    mask_token_id: int | None = None

    def __post_init__(self):
        self._take_scalars()
        for name in ("block_length", "steps", "freeze_length", "right_window", "refresh_blocks", "refresh_steps"):
            self._check_number(name, int, 1)
        for name in ("freeze_lag", "left_margin", "mask_token_id"):
            self._check_number(name, int, 0)
        for name in ("position_temperature", "factor", "frechet_delta", "entropy_bound", "refresh_entropy"):
            self._check_number(name, float, 0)
        for name in ("eps", "confidence_threshold", "frechet_delta"):
            self._check_number(name, float, 0, 1)
        for name in ("run_empty_steps", "attend_stale", "grow_canvas", "stop_at_eos", "synchronize_blocks"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name != "synchronize_blocks" or value is not None):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        for name, choices in (
            ("window_policy", WINDOW_POLICIES),
            ("confidence", CONFIDENCES),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        self._check_rules()
        self._check_policy()

    def _take_scalars(self) -> None:
        """Scalars of numpy and torch become plain numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
                object.__setattr__(self, field.name, value.item())

    def _check_number(self, name: str, kind: type, lowest: int, highest: int | None = None) -> None:
        value = getattr(self, name)
        allowed = (int,) if kind is int else (int, float)
        if value is None:
            return
        fits = isinstance(value, allowed) and not isinstance(value, bool) and value >= lowest
        if not fits or (highest is not None and value > highest):
            noun = "an integer" if kind is int else "a number"
            limits = f"of at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise ValueError(f"`{name}` must be {noun} {limits}, got {value!r}.")

    def _check_rules(self) -> None:
        rules = [name for name in RULES if getattr(self, name) is not None]
        if self.steps is not None and rules:
            raise ValueError(
                f"`steps` fixes how many tokens a step writes and `{rules[0]}` leaves it open, got steps={self.steps} "
                f"and {rules[0]}={getattr(self, rules[0])}: pass one of them, and `None` for the other if the model's "
                "generation config sets it."
            )
        if len(rules) > 1:
            raise ValueError(f"`{rules[0]}` and `{rules[1]}` are rules for the same thing: pass one of them.")
        if self.steps is None and (self.schedule != "uniform" or self.run_empty_steps):
            raise ValueError(
                f"`schedule` and `run_empty_steps` say how `steps` are spread, got schedule={self.schedule!r} and no "
                "`steps`: pass `steps` too."
            )
        # `entropy_bound` implies its own measure, so the default is as good as saying it.
        fitting = ("probability", "entropy")[: 1 + (rules == ["entropy_bound"])]
        if self.steps is None and self.confidence not in fitting:
            raise ValueError(
                f"`confidence` must be {fitting[-1]!r} for `{(rules or RULES)[0]}`, got {self.confidence!r}: drop it, "
                "or pass `steps`."
            )

    def _check_policy(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, policies in _POLICY_OPTIONS.items():
            if getattr(self, name) != defaults[name] and self.window_policy not in policies:
                raise ValueError(
                    f"`{name}` belongs to window_policy={' or '.join(map(repr, policies))}, got {getattr(self, name)} "
                    f"with {self.window_policy!r}: drop it."
                )

    def blocks(self, max_new_tokens: int) -> tuple[int, int]:
        """Length and number of the blocks that tile a region of `max_new_tokens`; checks what depends on it."""
        block_length = self.block_length or min(DEFAULT_BLOCK_LENGTH, max_new_tokens)
        if block_length > max_new_tokens:
            raise ValueError(
                f"`block_length` must be at most `max_new_tokens`={max_new_tokens}, got {block_length}: lower it, or "
                "generate more."
            )
        num_blocks = -(-max_new_tokens // block_length)
        if self.steps is not None and self.steps < num_blocks:
            raise ValueError(
                f"`steps` must give each of the {num_blocks} blocks of {block_length} tokens at least one step, got "
                f"{self.steps}: raise it, or raise `block_length`."
            )
        return block_length, num_blocks

    @classmethod
    def names(cls) -> list[str]:
        """Names of the options."""
        return [field.name for field in fields(cls)]

    @classmethod
    def read(cls, generation_config: GenerationConfig) -> "DiffusionOptions":
        """The options that a prepared generation config holds, checked."""
        values = {name: getattr(generation_config, name) for name in cls.names() if hasattr(generation_config, name)}
        return cls(**values)
