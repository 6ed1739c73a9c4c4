"""Methods of the field as choices of parts.

Owns how options name a window policy, blocks, a schedule and an unmasking rule. Knows nothing of models or tensors.
"""

from .denoising_loop import Blocks, Method
from .generation_config import DEFAULT_CONFIDENCE_THRESHOLD, DEFAULT_REFRESH_STEPS, DiffusionOptions
from .schedule import MinimumSchedule, TimestepSchedule, UniformSchedule, split_steps
from .unmasking import ConfidenceFactor, ConfidenceThreshold, EntropyBound, FrechetProfile
from .windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, WindowPolicy


def choose_parts(options: DiffusionOptions, prompt_length: int, num_new: int, lookahead: int | None = None) -> Method:
    """
    The parts that the options name.

    Args:
        options ([`DiffusionOptions`]): Checked options.
        prompt_length (`int`): Length of the prompt, padding included.
        num_new (`int`): Length of the generated region.
        lookahead (`int`, *optional*): How far a guider reads from the frontier on.

    Returns:
        [`Method`]: What [`denoise`] runs.
    """
    block_length, num_blocks = options.blocks(num_new)
    window_policy = _window_policy(options, prompt_length, block_length)
    synchronous = options.synchronize_blocks
    blocks = Blocks(
        prompt_length,
        block_length,
        lookahead=lookahead,
        synchronous=window_policy.synchronous if synchronous is None else synchronous,
    )
    return Method(window_policy, blocks, _schedule(options, num_blocks), _rule(options))


def _window_policy(options: DiffusionOptions, prompt_length: int, block_length: int) -> WindowPolicy:
    if options.window_policy == "none":
        return FullWindow(options.grow_canvas)
    if options.window_policy == "dkv":
        return DKVWindow(options.refresh_steps or DEFAULT_REFRESH_STEPS)
    if options.window_policy in ("prefix", "dual"):
        return BlockWindow(dual=options.window_policy == "dual")
    return FreeCacheWindow(
        prompt_length=prompt_length,
        freeze_length=options.freeze_length or block_length,
        freeze_lag=options.freeze_lag,
        left_margin=options.left_margin,
        right_window=options.right_window,
        attend_stale=options.attend_stale,
        growing=options.grow_canvas,
        refresh_blocks=options.refresh_blocks,
        refresh_entropy=options.refresh_entropy,
    )


def _schedule(options: DiffusionOptions, num_blocks: int):
    if options.steps is None:
        return MinimumSchedule()
    steps = split_steps(options.steps, num_blocks)
    if options.schedule == "uniform":
        return UniformSchedule(steps)
    return TimestepSchedule(steps, options.eps, options.run_empty_steps)


def _rule(options: DiffusionOptions):
    if options.steps is not None:
        return None
    if options.factor is not None:
        return ConfidenceFactor(options.factor)
    if options.frechet_delta is not None:
        return FrechetProfile(options.frechet_delta)
    if options.entropy_bound is not None:
        return EntropyBound(options.entropy_bound)
    threshold = options.confidence_threshold
    return ConfidenceThreshold(DEFAULT_CONFIDENCE_THRESHOLD if threshold is None else threshold)
