"""Window policies: the table of what a step recomputes, row by row, and the laws of all policies."""

import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashdlm.blocks import Blocks, FixedBlocks
from hf_flashdlm.denoising_loop import Method, denoise
from hf_flashdlm.schedule import MinimumSchedule
from hf_flashdlm.unmasking import MostConfident
from hf_flashdlm.windows import BlockWindow, DKVWindow, FreeCacheWindow, FullWindow, SubBlockWindow


PROMPT, BLOCK, LENGTH = 4, 3, 10  # pppp|___|___
FREECACHE = FreeCacheWindow(BLOCK)


@pytest.fixture(scope="session")
def at(start):
    """
    `at(7, 5, nfe=2)` is a row whose frontier is 7 now and was 5 in the last forward. Its block is that of the
    frontier, and it has just been entered unless `block_nfe` says otherwise.
    """

    def at(*frontiers, nfe=5, **fields):
        text = "p" * frontiers[0] + "_" * (LENGTH - frontiers[0])
        (row,) = start(text, prompt_length=PROMPT, frontiers=[list(frontiers)], nfe=[nfe]).rows
        Blocks(FixedBlocks(BLOCK)).enter([row])
        for name, value in fields.items():
            setattr(row, name, value)
        return row

    return at


def numbers(window):
    return window.lo, window.hi, window.attended, window.frozen


@pytest.mark.parametrize(
    ("policy", "first", "entering", "others"),
    # Each window is (lo, hi, attended, frozen): at the first step, on entering the second block, within it.
    [
        (FullWindow(), (0, 10, 10, 0), (0, 10, 10, 0), (0, 10, 10, 0)),
        (FullWindow(grow_length=1), (0, 7, 7, 0), (0, 10, 10, 0), (0, 10, 10, 0)),
        (BlockWindow(dual=False), (0, 10, 10, 0), (0, 10, 10, 0), (7, 10, 10, 0)),
        (BlockWindow(dual=True), (0, 10, 10, 0), (0, 10, 10, 0), (7, 10, 10, 0)),
        (FREECACHE, (0, 10, 10, 0), (4, 10, 10, 4), (7, 10, 10, 7)),
        (replace(FREECACHE, grow_length=1), (0, 7, 7, 0), (4, 10, 10, 4), (7, 10, 10, 7)),
        (replace(FREECACHE, refresh_blocks=1), (0, 10, 10, 0), (0, 10, 10, 0), (7, 10, 10, 7)),
        (DKVWindow(refresh_steps=8), (0, 10, 10, 0), (0, 10, 10, 0), (0, 10, 10, 0)),
    ],
)
def test_a_policy_recomputes_what_its_row_of_the_table_says(at, policy, first, entering, others):
    history = [0] * policy.history
    assert numbers(policy(at(4, *history, nfe=0))) == first
    assert numbers(policy(at(7, *[6] * policy.history))) == entering
    assert numbers(policy(at(8, *[7] * policy.history, block_nfe=1))) == others


def test_the_dual_cache_recomputes_the_block_alone(at):
    assert numbers(BlockWindow(dual=True)(at(5, block_nfe=1))) == (4, 7, 10, 0)
    assert numbers(BlockWindow(dual=False)(at(5, block_nfe=1))) == (4, 10, 10, 0)


@pytest.mark.parametrize(
    ("lag", "frontiers", "frozen"),
    [
        (0, (7,), 7),  # as in the paper's code: as soon as the block is complete
        (0, (6,), 4),
        (1, (7, 6), 4),  # the last forward saw position 6 masked
        (1, (8, 7), 7),
        (2, (8, 7, 6), 4),
        (2, (9, 8, 7), 7),
        (2, (5, 4, 0), 0),  # a single forward has seen the prompt
    ],
)
def test_finished_text_is_frozen_as_many_forwards_late_as_the_lag_says(at, lag, frontiers, frozen):
    window = replace(FREECACHE, freeze_lag=lag)(at(*frontiers))
    assert (window.lo, window.frozen) == (frozen, frozen)


@pytest.mark.parametrize(("freeze_length", "frozen"), [(1, 9), (2, 8), (3, 7), (6, 4)])
def test_text_is_frozen_in_whole_pieces(at, freeze_length, frozen):
    assert FreeCacheWindow(freeze_length)(at(9, 9)).frozen == frozen


@pytest.mark.parametrize(("margin", "lo"), [(0, 7), (2, 5), (9, 0)])
def test_the_left_margin_is_recomputed_and_not_frozen(at, margin, lo):
    window = replace(FREECACHE, left_margin=margin)(at(8, 7))
    assert (window.lo, window.frozen) == (lo, lo)


@pytest.mark.parametrize(("stale", "attended"), [(False, 7), (True, 10)])
def test_the_right_window_prunes_what_is_after_it_or_reads_its_old_states(at, stale, attended):
    policy = replace(FREECACHE, right_window=2, attend_stale=stale)
    assert numbers(policy(at(5, 4))) == (4, 7, attended, 4)
    assert numbers(policy(at(9, 7))) == (7, 10, 10, 7), "the window must end with the canvas"
    assert numbers(policy(at(4, 0, nfe=0))) == (0, 10, 10, 0), "the first forward must cover the canvas"


def test_a_growing_canvas_ends_with_the_block(at):
    assert numbers(replace(FREECACHE, grow_length=1)(at(5, 4))) == (4, 7, 7, 4)
    assert numbers(FullWindow(grow_length=1)(at(5))) == (0, 7, 7, 0)


def test_a_growing_canvas_ends_with_the_right_window_in_the_first_forward_too(at):
    policy = replace(FREECACHE, grow_length=1, right_window=2)
    assert numbers(policy(at(4, 0, nfe=0))) == (0, 6, 6, 0)
    assert numbers(policy(at(1, 0, nfe=0))) == (0, 6, 6, 0), "all of a prompt with masks is seen"
    assert numbers(replace(policy, refresh_entropy=0.5)(at(5, 4, written_entropy=1.0))) == (0, 7, 7, 0)
    assert numbers(replace(policy, attend_stale=True)(at(4, 0, nfe=0))) == (0, 7, 7, 0), "stale states must be made"


def test_a_row_that_waits_at_the_end_of_a_growing_canvas_is_fed_a_position(at):
    window = replace(FREECACHE, grow_length=1)(at(7, 7, block_index=0, block_start=4, block_stop=7, block_nfe=3))
    assert numbers(window) == (6, 7, 7, 6)


def test_a_block_that_a_growing_canvas_has_just_reached_is_computed_before_it_is_attended(at):
    policy = replace(FREECACHE, grow_length=1, right_window=1, attend_stale=True)
    assert numbers(policy(at(7, 7, block_nfe=0))) == (7, 10, 10, 7), "its states cannot be stale: there are none"
    assert numbers(policy(at(7, 7, block_nfe=1))) == (7, 8, 10, 7)
    assert numbers(replace(policy, attend_stale=False)(at(7, 7, block_nfe=0))) == (7, 8, 8, 7)


@pytest.mark.parametrize(("frontiers", "block_nfe", "lo"), [((4, 4), 0, 0), ((7, 7), 0, 7), ((4, 4), 1, 4)])
def test_at_every_nth_block_all_is_refreshed_on_entering(at, frontiers, block_nfe, lo):
    window = replace(FREECACHE, refresh_blocks=2)(at(*frontiers, block_nfe=block_nfe))
    assert (window.lo, window.frozen) == (lo, lo)


@pytest.mark.parametrize(("entropy", "lo"), [(0.5, 7), (0.6, 0)])
def test_more_entropy_than_the_bound_refreshes_all(at, entropy, lo):
    policy = replace(FREECACHE, refresh_entropy=0.5)
    window = policy(at(8, 7, written_entropy=entropy))
    assert (window.lo, window.frozen) == (lo, lo)
    assert policy.needs_entropy and not FREECACHE.needs_entropy


@pytest.mark.parametrize(
    ("policy", "block_nfe", "refreshes"),
    [
        (DKVWindow(3), [0, 1, 2, 3, 4, 5, 6], [True, False, False, True, False, False, True]),
        (DKVWindow(4), [0, 1, 2, 3, 4], [True, False, False, False, True]),
        (DKVWindow(1), [0, 1, 2], [True, True, True]),
    ],
)
def test_dkv_refreshes_at_every_nth_step_of_a_block(at, policy, block_nfe, refreshes):
    assert [policy(at(5, block_nfe=step)).scored is None for step in block_nfe] == refreshes


def test_dkv_recomputes_what_was_masked_when_the_last_step_began(at):
    window = DKVWindow(8)(at(7, written=[5, 6], block_nfe=1))
    assert list(window.scored) == [False] * 5 + [True] * 5
    assert numbers(window) == (0, 10, 10, 0)


@pytest.mark.parametrize(("nfe", "expected"), [(1, True), (2, False)])
def test_dkv_recomputes_masks_themselves_after_the_first_forward(at, nfe, expected):
    assert DKVWindow(8)(at(5, nfe=nfe, block_nfe=1)).include_scored is expected


@pytest.mark.parametrize(
    ("frontiers", "nfe", "expected"),
    [
        ((4, 0), 0, (0, 10, 10, 0)),  # the prompt and the whole attention block
        ((5, 4), 1, (4, 10, 10, 4)),  # no forward has seen the first token
        ((6, 5), 2, (4, 7, 10, 4)),  # the block alone
        ((7, 6), 3, (4, 10, 10, 4)),  # the first position of the second block is a mask
        ((8, 7), 4, (7, 10, 10, 4)),
        ((10, 9), 5, (4, 16, 16, 4)),  # the finished attention block for the last time, with the next
        ((11, 10), 6, (10, 16, 16, 10)),
        ((12, 11), 7, (10, 13, 16, 10)),
    ],
)
def test_the_sub_block_cache_recomputes_a_block_alone_once_it_has_states_and_a_token(start, frontiers, nfe, expected):
    """Attention blocks of 6 from position 4 on, pppp|___ ___|___ ___, unmasked in halves."""
    text = "p" * frontiers[0] + "_" * (16 - frontiers[0])
    (row,) = start(text, prompt_length=PROMPT, frontiers=[list(frontiers)], nfe=[nfe]).rows
    Blocks(FixedBlocks(BLOCK)).enter([row])
    assert numbers(SubBlockWindow(BLOCK, 2 * BLOCK)(row)) == expected


@pytest.mark.parametrize("frontiers", [(10, 9), (10, 10)])
def test_a_row_that_waits_at_the_end_of_an_attention_block_recomputes_it_with_its_tokens(start, frontiers):
    text = "p" * 10 + "_" * 6
    (row,) = start(text, prompt_length=PROMPT, frontiers=[list(frontiers)], nfe=[5]).rows
    row.block_start, row.block_stop = 7, 10
    assert numbers(SubBlockWindow(BLOCK, 2 * BLOCK)(row)) == (4, 10, 10, 4)


# Laws of all policies


@dataclass(frozen=True)
class Recorder:
    """A policy that keeps the rows that it gets, and the windows that it returns."""

    policy: object
    seen: list = field(default_factory=list)

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def __call__(self, row):
        window = self.policy(row)
        self.seen.append((copy.deepcopy(row), window))
        return window


class RandomDenoiser:
    """Scores that are noise over three letters."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, canvas, windows, positions, frontier):
        scores = torch.rand(len(positions), len(positions[0]), 3, generator=self.generator)
        return scores, [window.hi - window.lo for window in windows]

    def batch_select_indices(self, indices):
        pass


class NoProcessors:
    def __call__(self, canvas, scores, **where):
        return scores

    def batch_select_indices(self, indices):
        pass


def draft_letters(scores):
    confidence, letter = scores.max(-1)
    return letter + ord("a"), confidence


class Some(MostConfident):
    """A rule that writes a few tokens."""

    def count(self, confidence):
        return sum(value > 0.9 for value in confidence)


def filled(state):
    return [not any(row.masked) for row in state.rows]


@pytest.fixture(scope="session")
def run(start):
    """The rows and their windows in a decode of noise with a policy; one row is ahead of the other."""

    def run(policy, blocks, seed):
        recorder = Recorder(policy)
        method = Method(recorder, Blocks(FixedBlocks(BLOCK), **blocks), MinimumSchedule(), Some())
        state = start("pppp______", "ppppaa____", prompt_length=PROMPT, history=policy.history)
        denoise(state, RandomDenoiser(seed), method, NoProcessors(), draft_letters, filled)
        return recorder.seen

    return run


freecaches = st.builds(
    FreeCacheWindow,
    freeze_length=st.sampled_from([1, 2, 3]),
    freeze_lag=st.integers(0, 2),
    left_margin=st.sampled_from([0, 0, 1, 5]),
    right_window=st.sampled_from([None, None, 1, 3]),
    attend_stale=st.booleans(),
    grow_length=st.sampled_from([None, 1, 3]),
    refresh_blocks=st.none() | st.integers(1, 3),
    refresh_entropy=st.none() | st.just(1.09),
)
policies = (
    freecaches  # twice, because it has the most settings
    | freecaches
    | st.builds(FullWindow, grow_length=st.sampled_from([None, 1, 3]))
    | st.builds(BlockWindow, dual=st.booleans())
    | st.builds(DKVWindow, refresh_steps=st.integers(1, 4))
    | st.builds(SubBlockWindow, st.just(BLOCK), st.sampled_from([BLOCK, 2 * BLOCK]))
)
blocks = st.fixed_dictionaries({"synchronous": st.booleans(), "lookahead": st.none() | st.integers(1, 4)})
seeds = st.integers(0, 1000)


@settings(max_examples=100)
@given(policies, blocks, seeds)
def test_a_window_holds_the_frontier_and_is_never_empty(run, policy, blocks, seed):
    for row, window in run(policy, blocks, seed):
        waits = row.frontier >= row.block_stop
        assert window.lo <= row.frontier and (row.frontier < window.hi or waits)
        assert window.lo < window.hi, "a row that waits for the others must be fed a position as well"
        assert window.hi <= window.attended <= LENGTH


@settings(max_examples=100)
@given(policies, blocks, seeds)
def test_what_is_frozen_is_finished_text_left_of_the_window(run, policy, blocks, seed):
    for row, window in run(policy, blocks, seed):
        assert 0 <= window.frozen <= min(row.frontier, window.lo)


@settings(max_examples=100)
@given(policies, blocks, seeds)
def test_without_a_refresh_what_is_frozen_never_shrinks(run, policy, blocks, seed):
    frozen = [0, 0]
    for row, window in run(policy, blocks, seed):
        assert window.frozen >= frozen[row.index] or window.lo == 0
        frozen[row.index] = window.frozen


@settings(max_examples=100)
@given(policies, blocks, seeds)
def test_no_state_is_attended_before_it_has_been_computed(run, policy, blocks, seed):
    computed = [set(), set()]
    for row, window in run(policy, blocks, seed):
        fed = range(window.lo, window.hi)
        computed[row.index].update(fed if window.scored is None else [place for place in fed if window.scored[place]])
        assert computed[row.index] >= set(range(window.attended))


@settings(max_examples=100)
@given(freecaches, blocks, seeds)
def test_states_are_frozen_once_the_lag_of_forwards_has_seen_their_tokens(run, policy, blocks, seed):
    clean = [[0] * LENGTH, [0] * LENGTH]  # forwards that have computed the position with its token
    for row, window in run(policy, blocks, seed):
        assert all(count >= policy.freeze_lag for count in clean[row.index][: window.frozen])
        for position in range(window.frozen, LENGTH):
            clean[row.index][position] += not row.masked[position]
