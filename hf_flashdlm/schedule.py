"""Schedules: how many tokens a row writes at a step, known before any logits.

Integer arithmetic on masked counts. Knows nothing of logits, ids or models.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class Schedule(Protocol):
    """Says how many tokens a row writes at a step. Passed to `generate` as `schedule=`."""

    def __call__(self, row) -> tuple[int, int]:
        r"""
        Args:
            row ([`Row`]): The state of the row; `row.step` counts the steps of its block.

        Returns:
            `tuple[int, int]`: The number of tokens to write now, and the next step of the block.
        """
        ...


def split_steps(steps: int, num_blocks: int) -> tuple[int, ...]:
    """Spread `steps` over `num_blocks` blocks as evenly as possible, the remainder to the earlier blocks."""
    return tuple(steps // num_blocks + (block < steps % num_blocks) for block in range(num_blocks))


@dataclass(frozen=True)
class MinimumSchedule:
    """At least one token per row and step; the unmasking rule decides on more."""

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        return 1, row.step + 1


@dataclass(frozen=True)
class UniformSchedule:
    r"""
    LLaDA's schedule (`get_num_transfer_tokens`, https://github.com/ML-GSAI/LLaDA): the masked positions of a block are
    divided evenly over its steps; the first steps write one token more each if there is a remainder.

    Args:
        steps (`tuple[int, ...]`): Denoising steps of each block.
    """

    steps: tuple[int, ...]

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        steps = self.steps[row.block_index]
        if row.step >= steps:
            # After its last step a block has masks left only if a narrow window hid them: write them at once.
            return max(row.block_masked, 1), row.step + 1
        quota = row.block_masked // steps + (row.step < row.block_masked % steps)
        return max(quota, 1), row.step + 1


@dataclass(frozen=True)
class BlockSchedule:
    r"""
    The schedule of SDAR and LLaDA2.0: the positions of a block, also those that hold the prompt's last tokens, are
    divided evenly over its steps; the first steps write one token more each if there is a remainder.

    Args:
        block_length (`int`): Length of a block.
        steps (`int`): Denoising steps of each block.
    """

    block_length: int
    steps: int

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        if row.step >= self.steps:
            return max(row.block_masked, 1), row.step + 1  # as of `UniformSchedule`
        quota = self.block_length // self.steps + (row.step < self.block_length % self.steps)
        return max(quota, 1), row.step + 1


@dataclass(frozen=True)
class LinearSchedule:
    r"""
    The schedule of dllm's samplers (`LinearAlphaScheduler`, https://github.com/ZHZisZZ/dllm): with timesteps
    t = (S - i) / S of S steps, step i writes round(m (1 - t[i+1] / t[i])) of the m positions of the block that are
    masked then. A step that would write nothing is not run.

    Args:
        steps (`int`): Denoising steps of each block.
    """

    steps: int

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        masked = row.masked.count(True, 0, row.block_stop)
        for step in range(row.step, self.steps):
            # float32, the way over 1 - t and rounding to even are part of the schedule.
            now, then = 1 - (1 - torch.tensor([self.steps - step, self.steps - step - 1]) / self.steps)
            quota = int((masked * (1 - then / now)).round())
            if quota > 0:
                return quota, step + 1
        return max(masked, 1), self.steps


@dataclass(frozen=True)
class ShiftSchedule:
    r"""
    LaViDa's schedule (https://arxiv.org/abs/2505.16839, section 3.4): after a share t of a block's steps a share
    1 - s(1 - t) of its masked positions is written, s(t) = shift t / (1 + (shift - 1) t), at least one at each step.
    With a shift below 1 much is written at first, with one above 1 at last; with 1 the same at each step.

    Args:
        steps (`tuple[int, ...]`): Denoising steps of each block; the last number holds for all further ones.
        shift (`float`): The shift.
    """

    steps: tuple[int, ...]
    shift: float = 3.0

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        steps = self.steps[min(row.block_index, len(self.steps) - 1)]
        quotas = self._quotas(row.block_masked, min(steps, row.block_masked))
        # After its last step a block has masks left only if a narrow window hid them: write them at once.
        return quotas[row.step] if row.step < len(quotas) else max(row.block_masked, 1), row.step + 1

    def share(self, times: torch.Tensor) -> torch.Tensor:
        """s of the times t, numbers from 0 to 1. A subclass with another s has another schedule."""
        return self.shift * times / (1 + (self.shift - 1) * times)

    def _quotas(self, masked: int, steps: int) -> list[int]:
        times = torch.arange(steps + 1, dtype=torch.float32) / max(steps, 1)  # float32 is part of the schedule
        written = (self.share(times) * masked).long()
        written[-1] = masked  # which a share of 1 may miss in float32
        quotas = written.diff().clamp_min(1).tolist()
        step = 0
        while sum(quotas) > masked:  # what the minimum of one has added is taken from the steps with more, in turn
            quotas[step] -= quotas[step] > 1
            step = (step + 1) % steps
        return quotas[::-1]


@dataclass(frozen=True)
class TimestepSchedule:
    r"""
    Dream's schedule (`diffusion_generate`, https://github.com/DreamLM/Dream): with timesteps
    t = linspace(1, eps, steps + 1), step i writes int(masks * (1 - t[i+1] / t[i])) tokens and the last step of a block
    all that are left. A step that would write nothing leaves the canvas as it was and is not run.

    Args:
        steps (`tuple[int, ...]`): Denoising steps of each block.
        eps (`float`): The last timestep.
        run_empty_steps (`bool`): Run the steps that write nothing, as the original does.
    """

    steps: tuple[int, ...]
    eps: float = 1e-3
    run_empty_steps: bool = False

    def __call__(self, row) -> tuple[int, int]:
        """See [`Schedule`]."""
        begin = sum(self.steps[: row.block_index])
        last = self.steps[row.block_index] - 1
        # After its last step a block has masks left only if a narrow window hid them: write them at once.
        step = min(row.step, last)
        timesteps = torch.linspace(1, self.eps, sum(self.steps) + 1)[begin + step : begin + last + 1]
        # float32 and truncation are part of the schedule: 16 masks at 1/16 give 0 tokens, not 1.
        quotas = (row.masked.count(True) * (1 - timesteps[1:] / timesteps[:-1])).long().tolist()
        for ahead, quota in enumerate(quotas):
            if quota > 0 or self.run_empty_steps:
                return quota, step + ahead + 1
        return row.block_masked, last + 1
