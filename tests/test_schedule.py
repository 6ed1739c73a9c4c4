"""Schedules: how many tokens a step writes, and that a block is never left with masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashdlm.schedule import (
    BlockSchedule,
    LinearSchedule,
    MinimumSchedule,
    ShiftSchedule,
    TimestepSchedule,
    UniformSchedule,
    split_steps,
)


@pytest.fixture(scope="session")
def at(start):
    """`at(masked, block_masked, step, block=0)`: a row with `masked` masks; its block began with `block_masked`."""

    def at(masked, block_masked, step, block=0):
        block_stop = 1 + block_masked  # of a block at its first step
        fields = {"block_masked": block_masked, "step": step, "block_index": block, "block_stop": block_stop}
        state = start("p" + "_" * masked, **{name: [value] for name, value in fields.items()})
        return state.rows[0]

    return at


@pytest.fixture(scope="session")
def counts(at):
    """The counts of a schedule over blocks with these numbers of masks, a list per block."""

    def counts(schedule, blocks):
        masked, written = sum(blocks), []
        for block, length in enumerate(blocks):
            left, step = length, 0
            written.append([])
            while left:
                assert len(written[-1]) < 100, "a schedule must come to the end of a block"
                quota, next_step = schedule(at(masked, length, step, block))
                count, step = min(quota, left), next_step
                written[-1].append(count)
                left, masked = left - count, masked - count
        return written

    return counts


@pytest.mark.parametrize(
    ("steps", "num_blocks", "expected"), [(8, 2, [4, 4]), (7, 2, [4, 3]), (11, 4, [3, 3, 3, 2]), (3, 3, [1, 1, 1])]
)
def test_steps_are_spread_evenly_with_the_remainder_first(steps, num_blocks, expected):
    assert split_steps(steps, num_blocks) == tuple(expected)


@given(st.integers(1, 20), st.integers(0, 80))
def test_no_step_is_lost_in_spreading(num_blocks, more):
    steps = split_steps(num_blocks + more, num_blocks)
    assert sum(steps) == num_blocks + more
    assert list(steps) == sorted(steps, reverse=True) and steps[0] - steps[-1] <= 1


def test_without_a_schedule_one_token_is_the_least(at):
    assert MinimumSchedule()(at(8, 4, step=2)) == (1, 3)


# LLaDA


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [
        (8, 4, [2, 2, 2, 2]),
        (8, 3, [3, 3, 2]),  # early steps take the remainder
        (5, 4, [2, 1, 1, 1]),
        (3, 1, [3]),
        (2, 5, [1, 1]),  # a step writes at least one token, so that steps are left over
    ],
)
def test_a_block_is_divided_over_its_steps(counts, length, steps, expected):
    assert counts(UniformSchedule((steps,)), [length]) == [expected]


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_counts_of_a_block_sum_to_its_masks(at, length, steps):
    quotas = [UniformSchedule((steps,))(at(length, length, step))[0] for step in range(steps)]
    assert sum(quotas[:length]) == length
    assert quotas == sorted(quotas, reverse=True) and quotas[0] - quotas[-1] <= 1


def test_each_block_has_its_own_steps(counts):
    assert counts(UniformSchedule((2, 1)), [4, 4]) == [[2, 2], [4]]


@pytest.mark.parametrize(
    "schedule", [UniformSchedule((2, 2)), BlockSchedule(4, 2), LinearSchedule(2), TimestepSchedule((2, 2))]
)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("late", [0, 1, 5])
def test_masks_left_after_the_last_step_of_a_block_are_written_at_once(at, schedule, block, late):
    """A narrow window can hide them from the last step."""
    quota, next_step = schedule(at(3, 4, step=2 + late, block=block))
    assert quota >= 3 and next_step >= 2


# SDAR and LLaDA2.0


@pytest.mark.parametrize(
    ("length", "steps", "masked", "expected"),
    [
        (8, 3, 8, [3, 3, 2]),
        (8, 3, 5, [3, 2]),  # the prompt has three positions of the block, and the quotas are those of all eight
        (8, 8, 3, [1, 1, 1]),
        (4, 6, 4, [1, 1, 1, 1]),
    ],
)
def test_all_positions_of_a_block_are_divided_over_its_steps(counts, length, steps, masked, expected):
    assert counts(BlockSchedule(length, steps), [masked]) == [expected]


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_whole_block_of_sdar_is_divided_as_one_of_llada(counts, length, steps):
    assert counts(BlockSchedule(length, steps), [length]) == counts(UniformSchedule((steps,)), [length])


# dllm


@pytest.mark.parametrize(
    ("masked", "steps", "expected"),
    [
        (32, 12, [3, 3, 3, 3, 3, 2, 3, 2, 3, 2, 3, 2]),
        (8, 5, [2, 2, 1, 2, 1]),  # 8 / 5, 6 / 4 and 4 / 3 to the nearest integer, halves to the even one
        (2, 8, [1, 1]),  # steps that would write nothing are not run
        (5, 1, [5]),
    ],
)
def test_a_linear_schedule_rounds_what_is_due(counts, masked, steps, expected):
    assert counts(LinearSchedule(steps), [masked]) == [expected]


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_linear_schedule_writes_a_block_in_its_steps(counts, masked, steps):
    (written,) = counts(LinearSchedule(steps), [masked])
    assert sum(written) == masked and min(written) >= 1 and len(written) <= steps


# Dream


def dream_counts(length, steps, eps, run_empty_steps):
    """The loop of `diffusion_generate`, in its single precision."""
    times = torch.linspace(1, eps, steps + 1)
    counts, left = [], length
    for step in range(steps):
        count = left if step == steps - 1 else int(left * (1 - times[step + 1] / times[step]))
        counts.append(count)
        left -= count
    return [count for count in counts if count or run_empty_steps]


@pytest.mark.parametrize(
    ("length", "steps", "expected"),
    [
        (8, 1, [8]),
        (8, 2, [3, 5]),  # int(8 * 0.4995) = 3
        (4, 4, [0, 1, 1, 2]),  # int(4 * 0.24975) = 0, int(4 * 0.333) = 1, int(3 * 0.4995) = 1, the rest
    ],
)
def test_timesteps_by_hand(at, counts, length, steps, expected):
    assert counts(TimestepSchedule((steps,), 1e-3, True), [length]) == [expected]
    assert counts(TimestepSchedule((steps,), 1e-3), [length]) == [[count for count in expected if count]]


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([1e-3, 1e-2, 0.5]), st.booleans())
def test_timesteps_equal_the_original_loop(counts, length, steps, eps, run_empty_steps):
    written = counts(TimestepSchedule((steps,), eps, run_empty_steps), [length])[0]
    expected = dream_counts(length, steps, eps, run_empty_steps)
    while expected and not expected[-1]:
        expected.pop()  # nothing is left: the loop of this package has ended
    assert written == expected and sum(written) == length


@given(st.lists(st.integers(1, 16), min_size=1, max_size=4), st.integers(0, 30), st.booleans())
def test_the_last_step_of_every_block_writes_what_is_left(counts, blocks, more, run_empty_steps):
    steps = split_steps(len(blocks) + more, len(blocks))
    written = counts(TimestepSchedule(steps, 1e-3, run_empty_steps), blocks)
    assert [sum(block) for block in written] == blocks
    assert all(len(block) <= count for block, count in zip(written, steps, strict=True))
    assert run_empty_steps or all(all(block) for block in written)


def test_the_share_of_a_block_is_that_of_all_masks(at):
    """Half of the 16 masks in two blocks of 8 are due in the middle of the timesteps: the whole first block."""
    assert TimestepSchedule((1, 1))(at(16, 8, step=0))[0] == 8
    assert TimestepSchedule((2, 2))(at(16, 8, step=0))[0] == 3, "int(16 * 0.24975)"


# LaViDa


@pytest.mark.parametrize(
    ("length", "steps", "shift", "expected"),
    [
        (8, 4, 1.0, [2, 2, 2, 2]),
        (24, 4, 3.0, [3, 3, 6, 12]),
        (24, 4, 1 / 3, [12, 6, 4, 2]),
        (3, 9, 3.0, [1, 1, 1]),
    ],
)
def test_a_shift_moves_tokens_to_the_last_or_the_first_steps(counts, length, steps, shift, expected):
    assert counts(ShiftSchedule((steps,), shift), [length]) == [expected]


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.05, 20))
def test_the_shifted_counts_of_a_block_sum_to_its_masks(at, length, steps, shift):
    quotas = [ShiftSchedule((steps,), shift)(at(length, length, step))[0] for step in range(min(steps, length))]
    assert sum(quotas) == length and min(quotas) >= 1


@given(st.integers(1, 64), st.floats(0.05, 20), st.floats(0.05, 20))
def test_with_a_larger_shift_tokens_are_written_later(steps, one, other):
    """Up to rounding: where each step has its one token, a few more are taken from other steps."""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    less, more = (ShiftSchedule((steps,), shift).share(times) for shift in sorted([one, other]))
    assert (more >= less - 1e-12).all(), "the share that is still masked"


def test_a_narrow_window_leaves_no_mask_to_a_shift(at):
    assert ShiftSchedule((2,))(at(3, 3, step=2)) == (3, 3)
