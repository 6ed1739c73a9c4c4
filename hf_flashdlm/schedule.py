"""Schedules: how many tokens each row writes at a step, known before any logits.

Integer arithmetic on masked counts. Knows nothing of logits, ids or models.
"""

from dataclasses import dataclass

import torch


def split_steps(steps: int, num_blocks: int) -> torch.LongTensor:
    """Spread `steps` over `num_blocks` blocks as evenly as possible, the remainder to the earlier blocks."""
    blocks = torch.arange(num_blocks)
    return steps // num_blocks + (blocks < steps % num_blocks).long()


@dataclass(frozen=True)
class MinimumSchedule:
    """One token per row and step at the least; the unmasking rule decides about more."""

    def __call__(self, state) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Tokens each row writes at the least, and the step of its block at which it goes on, both `(batch_size,)`."""
        return torch.ones_like(state.step), state.step + 1


@dataclass(frozen=True)
class UniformSchedule:
    r"""
    LLaDA's schedule (`get_num_transfer_tokens`, https://github.com/ML-GSAI/LLaDA): the masked positions of a block are
    divided evenly over the steps of the block, the remainder one each to its first steps.

    Args:
        steps (`torch.LongTensor` of shape `(num_blocks,)`): Denoising steps of each block.
    """

    steps: torch.LongTensor

    def __call__(self, state) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Tokens each row writes, and the step of its block at which it goes on, both `(batch_size,)`."""
        steps = self.steps[state.block_index]
        quota = state.block_masked // steps + (state.step < state.block_masked % steps)
        # Past its last step a block has masks left only where a narrow window hid them: they are written at once.
        return torch.where(state.step < steps, quota, state.block_masked).clamp_min(1), state.step + 1


@dataclass(frozen=True)
class TimestepSchedule:
    r"""
    Dream's schedule (`diffusion_generate`, https://github.com/DreamLM/Dream): with timesteps
    t = linspace(1, eps, steps + 1), step i writes int(masks * (1 - t[i+1] / t[i])) tokens and the last step of a block
    all that are left. A step that would write nothing leaves the canvas as it was and is not run.

    Args:
        steps (`torch.LongTensor` of shape `(num_blocks,)`): Denoising steps of each block.
        eps (`float`): The last timestep.
        run_empty_steps (`bool`): Run the steps that write nothing, as the original does.
    """

    steps: torch.LongTensor
    eps: float = 1e-3
    run_empty_steps: bool = False

    def __call__(self, state) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Tokens each row writes, and the step of its block at which it goes on, both `(batch_size,)`."""
        ends = self.steps.cumsum(0)[state.block_index]
        begins = ends - self.steps[state.block_index]
        timesteps = torch.linspace(1, self.eps, int(self.steps.sum()) + 1)
        # float32 and truncation are part of the schedule: 16 masks at 1/16 give 0 tokens, not 1.
        quotas = (state.masked.sum(1, keepdim=True) * (1 - timesteps[1:] / timesteps[:-1])).long()
        quotas = torch.where(
            torch.arange(len(timesteps) - 1) >= ends[:, None] - 1, state.block_masked[:, None], quotas
        )
        # Past its last step a block has masks left only where a narrow window hid them: they are written at once.
        ahead = torch.arange(len(timesteps) - 1) >= torch.minimum(begins + state.step, ends - 1)[:, None]
        index = (ahead & ((quotas > 0) | self.run_empty_steps)).int().argmax(1)
        return quotas.gather(1, index[:, None]).squeeze(1), index + 1 - begins
