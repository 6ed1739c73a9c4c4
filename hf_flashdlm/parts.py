"""From options to parts: a method of the field is a choice of parts.

Owns which part an option names: window policy, blocks, schedule, unmasking rule; an option that is an object is
the part itself. Knows nothing of models or tensors.
"""

from .blocks import AdaptiveBlocks, BlockPolicy, Blocks, FixedBlocks
from .denoising_loop import Method
from .generation_config import (
    DEFAULT_CONFIDENCE_THRESHOLD,
    DEFAULT_DELIMITER_THRESHOLD,
    DEFAULT_REFRESH_STEPS,
    DELIMITER_SHARE,
    DiffusionOptions,
)
from .schedule import (
    BlockSchedule,
    LinearSchedule,
    MinimumSchedule,
    Schedule,
    ShiftSchedule,
    TimestepSchedule,
    UniformSchedule,
    split_steps,
)
from .unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    FrechetProfile,
    MostConfident,
    TokenEditing,
    UnmaskingRule,
)
from .windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, SubBlockWindow, WindowPolicy


def choose_parts(
    options: DiffusionOptions,
    num_new: int,
    lookahead: int | None = None,
    attention_block_length: int | None = None,
) -> Method:
    """
    Choose the parts that the options name or hold.

    Args:
        options ([`DiffusionOptions`]): Checked options.
        num_new (`int`): Length of the generated region.
        lookahead (`int`, *optional*): Number of positions that a guider reads from the frontier on.
        attention_block_length (`int`, *optional*): That of a model with block-causal attention.

    Returns:
        [`Method`]: The parts that [`denoise`] runs.
    """
    block_length, num_blocks = options.tiling(num_new, attention_block_length)
    window_policy = _window_policy(options, block_length, attention_block_length)
    synchronous = options.synchronize_blocks
    if synchronous is None:
        synchronous = window_policy.synchronous
    blocks = Blocks(
        _blocks(options, block_length, num_new),
        lookahead=lookahead,
        synchronous=synchronous and lookahead is None,  # drafts across block borders leave nobody to wait for
        lone_multiple=attention_block_length if options.first_token_alone else None,
    )
    schedule = _schedule(options, num_new, block_length, num_blocks, attention_block_length is not None)
    return Method(window_policy, blocks, schedule, _rule(options), _editing(options))


def _window_policy(options: DiffusionOptions, block_length: int, attention_block_length: int | None) -> WindowPolicy:
    # What block-causal attention never shows is not computed.
    grow_length = attention_block_length or (1 if options.grow_canvas else None)
    if options.window_policy == "none":
        return FullWindow(grow_length)
    if options.window_policy == "dkv":
        return DKVWindow(options.refresh_steps or DEFAULT_REFRESH_STEPS)
    if options.window_policy == "dual" and attention_block_length is not None:
        return SubBlockWindow(block_length, attention_block_length)
    if options.window_policy in ("prefix", "dual"):
        return BlockWindow(dual=options.window_policy == "dual")
    if options.window_policy != "freecache":
        return options.window_policy
    return FreeCacheWindow(
        freeze_length=options.freeze_length or attention_block_length or block_length,
        freeze_lag=options.freeze_lag,
        left_margin=options.left_margin,
        right_window=options.right_window,
        attend_stale=options.attend_stale,
        grow_length=grow_length,
        refresh_blocks=options.refresh_blocks,
        refresh_entropy=options.refresh_entropy,
    )


def _blocks(options: DiffusionOptions, block_length: int, num_new: int) -> BlockPolicy:
    if options.blocks in ("fixed", "whole"):
        return FixedBlocks(block_length)
    if options.blocks != "adaptive":
        return options.blocks
    ids, threshold = options.delimiter_token_ids or [], options.delimiter_threshold
    return AdaptiveBlocks(
        block_length,
        frozenset([ids] if isinstance(ids, int) else ids),
        DEFAULT_DELIMITER_THRESHOLD if threshold is None else threshold,
        options.delimiter_window or int(num_new * DELIMITER_SHARE),
    )


def _schedule(
    options: DiffusionOptions, num_new: int, block_length: int, num_blocks: int, has_attention_blocks: bool
) -> Schedule:
    if not options.is_scheduled:
        return MinimumSchedule()
    if not isinstance(options.schedule, str | None):
        return options.schedule
    if options.schedule == "linear":
        given = block_length if options.steps is None else -(-options.steps // num_blocks)
        return LinearSchedule(options.steps_per_block or given)
    if options.schedule == "shift":
        steps = (options.steps_per_block or block_length,)
        if options.steps is not None:
            steps = split_steps(options.steps, num_blocks)
        return ShiftSchedule(steps, options.schedule_shift)
    if options.steps_per_block is not None:
        return BlockSchedule(block_length, options.steps_per_block)
    if has_attention_blocks and options.steps is None and options.schedule == "uniform":
        # Blocks that a row begins within are not tiles of the region, over which steps could be spread.
        return BlockSchedule(block_length, block_length)
    steps = split_steps(num_new if options.steps is None else options.steps, num_blocks)
    if options.schedule == "timesteps":
        return TimestepSchedule(steps, options.eps, options.run_empty_steps)
    return UniformSchedule(steps)


def _rule(options: DiffusionOptions) -> UnmaskingRule:
    if options.unmasking_rule is not None:
        return options.unmasking_rule
    threshold = options.confidence_threshold
    if options.is_scheduled and threshold is None:
        return MostConfident()
    if options.factor is not None:
        return ConfidenceFactor(options.factor)
    if options.frechet_delta is not None:
        return FrechetProfile(options.frechet_delta)
    if options.entropy_bound is not None:
        return EntropyBound(options.entropy_bound)
    return ConfidenceThreshold(DEFAULT_CONFIDENCE_THRESHOLD if threshold is None else threshold)


def _editing(options: DiffusionOptions) -> TokenEditing | None:
    if options.editing_threshold is None:
        return None
    return TokenEditing(options.editing_threshold, options.max_post_steps)
