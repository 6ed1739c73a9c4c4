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
from .schedule import MinimumSchedule, Schedule, TimestepSchedule, UniformSchedule, split_steps
from .unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    EntropyBound,
    FrechetProfile,
    MostConfident,
    UnmaskingRule,
)
from .windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, WindowPolicy


def choose_parts(options: DiffusionOptions, num_new: int, lookahead: int | None = None) -> Method:
    """
    Choose the parts that the options name or hold.

    Args:
        options ([`DiffusionOptions`]): Checked options.
        num_new (`int`): Length of the generated region.
        lookahead (`int`, *optional*): Number of positions that a guider reads from the frontier on.

    Returns:
        [`Method`]: The parts that [`denoise`] runs.
    """
    block_length, num_blocks = options.tiling(num_new)
    window_policy = _window_policy(options, block_length)
    synchronous = options.synchronize_blocks
    if synchronous is None:
        synchronous = window_policy.synchronous
    blocks = Blocks(
        _blocks(options, block_length, num_new),
        lookahead=lookahead,
        synchronous=synchronous and lookahead is None,  # drafts across block borders leave nobody to wait for
    )
    return Method(window_policy, blocks, _schedule(options, num_new, num_blocks), _rule(options))


def _window_policy(options: DiffusionOptions, block_length: int) -> WindowPolicy:
    if options.window_policy == "none":
        return FullWindow(options.grow_canvas)
    if options.window_policy == "dkv":
        return DKVWindow(options.refresh_steps or DEFAULT_REFRESH_STEPS)
    if options.window_policy in ("prefix", "dual"):
        return BlockWindow(dual=options.window_policy == "dual")
    if options.window_policy != "freecache":
        return options.window_policy
    return FreeCacheWindow(
        freeze_length=options.freeze_length or block_length,
        freeze_lag=options.freeze_lag,
        left_margin=options.left_margin,
        right_window=options.right_window,
        attend_stale=options.attend_stale,
        growing=options.grow_canvas,
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


def _schedule(options: DiffusionOptions, num_new: int, num_blocks: int) -> Schedule:
    if not options.is_scheduled:
        return MinimumSchedule()
    if not isinstance(options.schedule, str | None):
        return options.schedule
    steps = split_steps(num_new if options.steps is None else options.steps, num_blocks)
    if options.schedule == "timesteps":
        return TimestepSchedule(steps, options.eps, options.run_empty_steps)
    return UniformSchedule(steps)


def _rule(options: DiffusionOptions) -> UnmaskingRule:
    if options.unmasking_rule is not None:
        return options.unmasking_rule
    if options.is_scheduled:
        return MostConfident()
    if options.factor is not None:
        return ConfidenceFactor(options.factor)
    if options.frechet_delta is not None:
        return FrechetProfile(options.frechet_delta)
    if options.entropy_bound is not None:
        return EntropyBound(options.entropy_bound)
    threshold = options.confidence_threshold
    return ConfidenceThreshold(DEFAULT_CONFIDENCE_THRESHOLD if threshold is None else threshold)
