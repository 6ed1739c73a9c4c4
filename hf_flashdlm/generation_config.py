"""The options of a diffusion decode: names, defaults and checks, in one place.

Every option can be a keyword of `generate`, an attribute of a `GenerationConfig`, or a key of generation_config.json,
in that order of priority; a part that is an object can only be a keyword. Knows nothing of tensors or of how an option
is used.
"""

import inspect
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .methods import METHODS


if TYPE_CHECKING:  # the names of the options are known before Transformers is imported
    from transformers import GenerationConfig


DEFAULT_BLOCK_LENGTH = 32
DEFAULT_CONFIDENCE_THRESHOLD = 0.9
DEFAULT_REFRESH_STEPS = 8
DEFAULT_DELIMITER_THRESHOLD = 0.3
DELIMITER_SHARE = 0.25  # of the generated region: the default of `delimiter_window`

WINDOW_POLICIES = ("freecache", "prefix", "dual", "dkv", "none")
INEXACT_POLICIES = ("prefix", "dkv")  # of them those that would approximate what block-causal attention makes exact
CONFIDENCES = ("probability", "margin", "entropy", "random", "position")
SCHEDULES = ("uniform", "timesteps", "linear", "shift")
BLOCKS = ("fixed", "whole", "adaptive")
RULES = ("confidence_threshold", "factor", "frechet_delta", "entropy_bound")
SCHEDULED = ("steps", "steps_per_block", "schedule")  # options that say how many tokens a step writes
DECIDING = (*SCHEDULED, *RULES, "unmasking_rule", "editing_threshold")  # options that say which tokens a step writes

# Names that other implementations use, and what they are called here.
PEER_NAMES = {
    "gen_length": "`max_new_tokens`",
    "block_size": "`block_length`",
    "diffusion_steps": "`steps`",
    "num_inference_steps": "`steps`",
    "max_denoising_steps": "`steps`",
    "threshold": "`confidence_threshold`",
    "remasking": "`confidence`",
    "alg": "`confidence`",
    "alg_temp": "`position_temperature`",
    "cfg_scale": "`guidance_scale`, which is 1 + cfg_scale",
    "mask_id": "`mask_token_id`",
    "dual_cache": "`window_policy='dual'`",
    "use_block_caching": "`window_policy='freecache'`",
    "cache_steps": "`refresh_steps`",
    "cache_reloading_step": "`refresh_steps`",
}

# The options that make up a method; a named method sets all of them.
METHOD_OPTIONS = (
    *("steps", "steps_per_block", "schedule", "confidence", "position_temperature", "unmasking_rule"),
    *("window_policy", "blocks"),
    *("delimiter_threshold", "delimiter_window", "grow_canvas", "freeze_length", "freeze_lag", "left_margin"),
    *("right_window", "attend_stale", "refresh_blocks", "refresh_entropy", "refresh_steps", "run_empty_steps"),
    *("first_token_alone", "editing_threshold", "max_post_steps", "schedule_shift", "prefix_lm"),
    *RULES,
)

# Parts that may be objects: the names of the built-in parts, then the protocol that an object must follow, with its
# attributes, and its methods with their arguments.
PARTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "window_policy": (
        WINDOW_POLICIES,
        "WindowPolicy",
        ("history", "synchronous", "needs_entropy"),
        {"__call__": ("row",)},
    ),
    "blocks": (BLOCKS, "BlockPolicy", (), {"stop": ("row",), "cut": ("drafts", "row")}),
    "schedule": (SCHEDULES, "Schedule", (), {"__call__": ("row",)}),
    "unmasking_rule": ((), "UnmaskingRule", (), {"__call__": ("drafts", "row")}),
    "confidence": (CONFIDENCES, "Confidence", (), {"__call__": ("scores", "token_ids", "probability")}),
}

# Options that only some window policies use.
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
    Options that `generate` takes in addition to those of Transformers. Five of them choose a part of the decode, which
    may also be an object that follows the protocol given with the option.

    Args:
        method (`str`, *optional*):
            A published method: the name of a line of settings in `methods.METHODS`. Given as a keyword, it
            replaces the corresponding options of the generation config; other keywords win over it.
        block_length (`int`, *optional*):
            The generated region is unmasked in blocks of this many tokens, from the end of the prompt on. By default
            32, or the whole region if that is shorter. Models with block-causal attention count blocks from where
            they count those of their attention, whose length is the default.
        blocks (`str` or [`BlockPolicy`], *optional*, defaults to `"fixed"`):
            `"fixed"` blocks of `block_length`, `"whole"` for a single block, or `"adaptive"`: a block ends at a
            delimiter of which the model is sure (AdaBlock-dLLM), see [`AdaptiveBlocks`].
        delimiter_token_ids (`int` or `list[int]`, *optional*): Tokens at which an adaptive block may end.
        delimiter_threshold (`float`, *optional*): Minimum probability of such a token; by default 0.3.
        delimiter_window (`int`, *optional*):
            Number of positions from the start of a block that are searched for a delimiter; by default a quarter of
            `max_new_tokens`.
        steps (`int`, *optional*):
            Number of denoising steps for the whole region: a fixed number of tokens is written at each.
            Excludes the four rules below and a guider.
        steps_per_block (`int`, *optional*):
            Number of denoising steps of each block, instead of `steps`: the number of tokens per step follows from
            `block_length`, also where a block begins within the prompt. With a `confidence_threshold` it is the least
            number: a step that finds more tokens above the threshold writes them all (SDAR, LLaDA2.0).
        schedule (`str` or [`Schedule`], *optional*):
            How steps are spread: `"uniform"` as LLaDA does, which is the default with `steps`, `"timesteps"` as Dream
            does, `"linear"` as dllm does, see [`LinearSchedule`], or `"shift"` as LaViDa does, see [`ShiftSchedule`].
            Without `steps` there are as many steps as tokens.
        eps (`float`, *optional*, defaults to 1e-3): Last timestep of the `"timesteps"` schedule.
        schedule_shift (`float`, *optional*, defaults to 3.0):
            Of the `"shift"` schedule: below 1, more is written at the first steps than at the last.
        run_empty_steps (`bool`, *optional*, defaults to `False`):
            Whether steps of the `"timesteps"` schedule that write nothing are run, as Dream does.
        confidence (`str` or [`Confidence`], *optional*, defaults to `"probability"`):
            What is written first: `"probability"` (LLaDA's low_confidence, Dream's maskgit_plus), `"margin"`
            (topk_margin), `"entropy"`, `"random"` (LLaDA's random, Dream's origin), `"position"` (SDAR's sequential).
        position_temperature (`float`, *optional*, defaults to 0.0): Noise on that order (Dream's alg_temp).
        confidence_threshold (`float`, *optional*):
            Write every candidate of at least this probability, and at least one. By default 0.9 if neither `steps`
            nor a rule is given.
        factor (`float`, *optional*): Rule of Fast-dLLM, see [`ConfidenceFactor`].
        frechet_delta (`float`, *optional*): Rule of Fast-dLLM++, see [`FrechetProfile`].
        entropy_bound (`float`, *optional*): Rule of the EB-Sampler, see [`EntropyBound`]; implies
            `confidence="entropy"`.
        unmasking_rule ([`UnmaskingRule`], *optional*): The caller's own rule, instead of the four above.
        prefix_lm (`bool`, *optional*, defaults to `False`):
            Whether the prompt does not see the answer: it is computed once, by itself, and its states serve every step
            (LaViDa). An approximation, unless the weights were trained for it; combines with every window policy.
        prompt_tail (`int`, *optional*, defaults to 0):
            With `prefix_lm`, the number of last tokens of the prompt that are computed with the answer: the beginning
            of an answer, for instance.
        editing_threshold (`float`, *optional*):
            Tokens of the current block are written anew where the model is surer than this of another one
            (LLaDA2.1), see [`TokenEditing`]. By default what is written stays.
        max_post_steps (`int`, *optional*, defaults to 16): Steps of a block that may only write anew.
        first_token_alone (`bool`, *optional*, defaults to `False`):
            For models with block-causal attention: whether the first token of an attention block is written alone,
            before the others are drafted (Fast-dLLM v2).
        window_policy (`str` or [`WindowPolicy`], *optional*, defaults to `"freecache"`):
            `"freecache"` freezes the states of the prompt and of finished blocks (FlashDLM), `"prefix"` and `"dual"`
            refresh all at each block (Fast-dLLM), `"dkv"` caches the states of a token one step late (dKV-Cache),
            `"none"` recomputes everything. For models with block-causal attention `"freecache"` is exact, and
            `"dual"` is the sub-block cache of Fast-dLLM v2, see [`SubBlockWindow`].
        freeze_length (`int`, *optional*): Finished text is frozen in pieces of this length; by default a block.
        freeze_lag (`int`, *optional*, defaults to 1):
            Steps for which a finished piece is still recomputed before it is frozen; 0 as in the paper's code.
        left_margin (`int`, *optional*, defaults to 0): Tokens at the end of a finished piece that are not frozen.
        right_window (`int`, *optional*): Recompute only this many positions from the first mask on.
        attend_stale (`bool`, *optional*, defaults to `False`):
            Whether positions right of the window are attended with their old states, instead of not at all.
        grow_canvas (`bool`, *optional*, defaults to `False`):
            Show the model only the blocks up to the current block, and of that no more than `right_window`, so that
            the cost does not depend on `max_new_tokens`. With block-causal attention, where later blocks are never
            seen, it always grows.
        refresh_blocks (`int`, *optional*): Number of blocks after which FreeCache recomputes everything.
        refresh_entropy (`float`, *optional*):
            Recompute everything after a step that wrote a token whose distribution had more entropy than this, in
            nats.
        refresh_steps (`int`, *optional*): Steps after which dKV-Cache recomputes everything; by default 8.
        synchronize_blocks (`bool`, *optional*):
            Whether the rows of a batch wait for each other before they enter a block. By default they do if the
            window policy refreshes everything at the start of a block. They never do with a guider whose drafts
            cross block borders.
        stop_at_eos (`bool`, *optional*, defaults to `True`):
            Whether a row ends at its first end token; otherwise it fills its canvas.
        output_confidence (`bool`, *optional*, defaults to `False`):
            Whether the output holds the probability that the model gave each token when it was written.
        output_history (`bool`, *optional*, defaults to `False`): Whether the output holds the canvas after every step.
        mask_token_id (`int`, *optional*): By default `model.config.mask_token_id`.
    """

    method: str | None = None
    block_length: int | None = None
    blocks: Any = "fixed"
    delimiter_token_ids: int | list[int] | None = None
    delimiter_threshold: float | None = None
    delimiter_window: int | None = None
    steps: int | None = None
    steps_per_block: int | None = None
    schedule: Any = None
    eps: float = 1e-3
    schedule_shift: float = 3.0
    run_empty_steps: bool = False
    confidence: Any = "probability"
    position_temperature: float = 0.0
    confidence_threshold: float | None = None
    factor: float | None = None
    frechet_delta: float | None = None
    entropy_bound: float | None = None
    unmasking_rule: Any = None
    prefix_lm: bool = False
    prompt_tail: int = 0
    editing_threshold: float | None = None
    max_post_steps: int = 16
    first_token_alone: bool = False
    window_policy: Any = "freecache"
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
    output_confidence: bool = False
    output_history: bool = False
    mask_token_id: int | None = None

    def __post_init__(self):
        self._take_scalars()
        for name in (
            *("block_length", "steps", "freeze_length", "right_window", "refresh_blocks", "refresh_steps"),
            *("delimiter_window", "steps_per_block"),
        ):
            self._check_number(name, int, 1)
        for name in ("freeze_lag", "left_margin", "mask_token_id", "max_post_steps", "prompt_tail"):
            self._check_number(name, int, 0)
        for name in (
            *("position_temperature", "factor", "frechet_delta", "entropy_bound", "refresh_entropy"),
            "schedule_shift",
        ):
            self._check_number(name, float, 0)
        for name in ("eps", "confidence_threshold", "frechet_delta", "delimiter_threshold", "editing_threshold"):
            self._check_number(name, float, 0, 1)
        switches = ("run_empty_steps", "attend_stale", "grow_canvas", "stop_at_eos", "synchronize_blocks")
        for name in (*switches, "first_token_alone", "prefix_lm", "output_confidence", "output_history"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name != "synchronize_blocks" or value is not None):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        _settings(self.method)
        for name in PARTS:
            check_part(name, getattr(self, name))
        self._check_rules()
        self._check_blocks()
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
        if value is None and self.__dataclass_fields__[name].default is None:
            return
        fits = isinstance(value, allowed) and not isinstance(value, bool) and value >= lowest
        if not fits or (highest is not None and value > highest):
            noun = "an integer" if kind is int else "a number"
            limits = f"of at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise ValueError(f"`{name}` must be {noun} {limits}, got {value!r}.")

    def _check_rules(self) -> None:
        rules = [name for name in (*RULES, "unmasking_rule") if getattr(self, name) is not None]
        written = [name for name in rules if name != "unmasking_rule"]
        scheduled = next((name for name in SCHEDULED if getattr(self, name) is not None), None)
        is_least = scheduled == "steps_per_block" and rules == ["confidence_threshold"]  # what the schedule says
        if scheduled is not None and written and not is_least:
            raise ValueError(
                f"`{scheduled}` fixes how many tokens a step writes and `{rules[0]}` leaves it open, got "
                f"{scheduled}={getattr(self, scheduled)} and {rules[0]}={getattr(self, rules[0])}: pass one of them, "
                "and `None` for the other if the model's generation config sets it."
            )
        if len(rules) > 1:
            raise ValueError(f"`{rules[0]}` and `{rules[1]}` are rules for the same thing: pass one of them.")
        if self.schedule_shift <= 0:
            raise ValueError(f"`schedule_shift` must be a number above 0, got {self.schedule_shift!r}.")
        if self.prompt_tail and not self.prefix_lm:
            raise ValueError(
                f"`prompt_tail` belongs to prefix_lm=True, got {self.prompt_tail} and prefix_lm=False: drop it."
            )
        if self.run_empty_steps and self.schedule != "timesteps":
            raise ValueError(
                f"`run_empty_steps` belongs to schedule='timesteps', got schedule={self.schedule!r}: drop it."
            )
        if scheduled in ("steps", "steps_per_block") and not isinstance(self.schedule, str | None):
            raise ValueError(
                f"`{scheduled}` are spread by the built-in schedules, got {scheduled}={getattr(self, scheduled)} and "
                f"a `schedule` of {type(self.schedule).__name__}: drop one of them."
            )
        if self.steps_per_block is not None and (self.steps is not None or self.schedule == "timesteps"):
            other = "steps" if self.steps is not None else "schedule"
            raise ValueError(
                f"`steps_per_block` counts the steps of a block and `{other}` those of the whole region, got "
                f"{self.steps_per_block} and {getattr(self, other)!r}: drop one of them."
            )
        # `entropy_bound` implies 'entropy', so the default 'probability' is allowed as well.
        fitting = ("probability", "entropy")[: 1 + (rules == ["entropy_bound"])]
        is_compared = scheduled is None or is_least
        if is_compared and self.unmasking_rule is None and self.confidence not in fitting:
            raise ValueError(
                f"`confidence` must be {fitting[-1]!r} for `{(rules or RULES)[0]}`, got {self.confidence!r}: drop it, "
                "or pass `steps` or an `unmasking_rule`."
            )

    @property
    def is_scheduled(self) -> bool:
        """Whether a schedule says how many tokens a step writes."""
        return any(getattr(self, name) is not None for name in SCHEDULED)

    def _check_blocks(self) -> None:
        is_adaptive = self.blocks == "adaptive"
        for name in ("delimiter_threshold", "delimiter_window"):
            if getattr(self, name) is not None and not is_adaptive:
                raise ValueError(f"`{name}` belongs to blocks='adaptive', got blocks={self.blocks!r}: drop it.")
        if self.blocks == "whole" and self.block_length is not None:
            raise ValueError(
                f"`block_length` divides a region that blocks='whole' leaves undivided, got {self.block_length}: drop "
                "one of them."
            )
        if self.steps is not None and self.blocks not in ("fixed", "whole"):
            raise ValueError(
                f"`steps` are spread over blocks whose number is known, got blocks={self.blocks!r}: drop one of them."
            )
        ids = self.delimiter_token_ids
        ids = [ids] if isinstance(ids, int) else ids
        is_list = isinstance(ids, list | tuple) and ids and all(isinstance(token_id, int) for token_id in ids)
        if not is_list and (is_adaptive or ids is not None):
            raise ValueError(
                "`delimiter_token_ids` must be the ids of the tokens at which an adaptive block may end, got "
                f"{self.delimiter_token_ids!r}: pass for example those of a line break, "
                "`tokenizer.encode('\\n', add_special_tokens=False)`."
            )
        if not is_adaptive:
            return
        if self.confidence != "probability" or self.position_temperature or self.entropy_bound is not None:
            raise ValueError(
                "`blocks='adaptive'` compares the probability of drafts with `delimiter_threshold`, got another "
                "measure in `confidence`, `position_temperature` or `entropy_bound`: drop it."
            )

    def _check_policy(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, policies in _POLICY_OPTIONS.items():
            if getattr(self, name) != defaults[name] and self.window_policy not in policies:
                raise ValueError(
                    f"`{name}` belongs to window_policy={' or '.join(map(repr, policies))}, got {getattr(self, name)} "
                    f"with {self.window_policy!r}: drop it."
                )

    def tiling(self, max_new_tokens: int, attention_block_length: int | None = None) -> tuple[int, int]:
        """Length and number of the blocks that tile a region of `max_new_tokens`; checks the related options."""
        block_length = self.block_length or attention_block_length or min(DEFAULT_BLOCK_LENGTH, max_new_tokens)
        if self.blocks == "whole":
            block_length = max_new_tokens
        if block_length > max_new_tokens and attention_block_length is None:
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
    def read(cls, generation_config: "GenerationConfig") -> "DiffusionOptions":
        """The checked options of a prepared generation config, with those of its method filled in."""
        values = {name: getattr(generation_config, name) for name in cls.names() if hasattr(generation_config, name)}
        return cls(**_settings(values.get("method")) | values)

    @classmethod
    def expand(cls, keywords: dict) -> dict:
        """The keywords of a call, with all options that its `method` sets."""
        if keywords.get("method") is None:
            return keywords
        settings = _settings(keywords["method"])
        defaults = {field.name: field.default for field in fields(cls)}
        if settings.get("blocks") == "whole":
            settings = {"block_length": None} | settings
        return {name: defaults[name] for name in METHOD_OPTIONS} | settings | keywords


def _settings(method: str | None) -> dict:
    """The line of settings of a named method."""
    if method is not None and (not isinstance(method, str) or method not in METHODS):
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    return {} if method is None else METHODS[method]


def check_part(name: str, part) -> None:
    """Refuse a value that is neither the name of a built-in part nor an object that follows its protocol."""
    names, protocol, attributes, methods = PARTS[name]
    if part is None and name in ("schedule", "unmasking_rule"):
        return
    if isinstance(part, str | int | float | None) and not callable(part):
        if part not in names or isinstance(part, int | float):
            choices = f"one of {', '.join(names)}, or " if names else ""
            raise ValueError(f"`{name}` must be {choices}an object that follows `{protocol}`, got {part!r}.")
        return
    if isinstance(part, type):
        raise ValueError(f"`{name}` must be an object, got the class {part.__name__}: pass an instance of it.")
    for member in (*attributes, *methods):
        if not hasattr(part, member):
            raise ValueError(
                f"`{name}` must have `{member}`, which {type(part).__name__} lacks: see the protocol `{protocol}`."
            )
    for method, arguments in methods.items():
        try:
            inspect.signature(part if method == "__call__" else getattr(part, method)).bind(*arguments)
        except TypeError:
            asked = f"{'' if method == '__call__' else method}({', '.join(arguments)})"
            raise ValueError(
                f"`{name}` must be callable as `{asked}`, which {type(part).__name__} is not: see the protocol "
                f"`{protocol}`."
            ) from None
