"""The loop, with a fake denoiser that spells a word in an order of its own: no model."""

import pytest
import torch

from hf_flashdlm.blocks import Blocks, FixedBlocks
from hf_flashdlm.denoising_loop import DenoisingState, Method, denoise
from hf_flashdlm.schedule import MinimumSchedule, UniformSchedule
from hf_flashdlm.unmasking import ConfidenceThreshold, Drafter
from hf_flashdlm.windows import BlockWindow, FreeCacheWindow, FullWindow


MASK, VOCAB = ord("_"), 128


class Speller:
    """
    Scores the letters of its words, one word per row, with the confidence that `order` gives each position: a digit d
    means d in ten. The scores do not depend on the canvas; it records its arguments.
    """

    def __init__(self, *words, order):
        self.words = torch.tensor([[ord(letter) for letter in word] for word in words])
        self.confidence = torch.tensor([[int(digit) / 10 for digit in digits] for digits in order])
        self.calls = []

    def __call__(self, canvas, windows, positions, frontier):
        positions = torch.tensor(positions)
        self.calls.append((canvas.clone(), positions.tolist(), frontier))
        letters, confidence = self.words.gather(1, positions), self.confidence.gather(1, positions)
        rest = ((1 - confidence) / (VOCAB - 1)).log()
        scores = rest[..., None].repeat(1, 1, VOCAB)
        scores = scores.scatter(2, letters[..., None], confidence.log()[..., None])
        return scores, [window.hi - window.lo for window in windows]

    def batch_select_indices(self, indices):
        self.words, self.confidence = self.words[indices], self.confidence[indices]


class Unprocessed:
    """Processors that leave the scores as they are, but refuse what `refused(canvas, positions)` says, if given."""

    def __init__(self, refused=None):
        self.refused, self.rows = refused, []

    def __call__(self, canvas, scores, positions, frontier, candidate=None):
        if self.refused is None:
            return scores
        only_mask = torch.full_like(scores, -torch.inf)
        only_mask[..., MASK] = 0
        return torch.where(self.refused(canvas, torch.tensor(positions))[..., None], only_mask, scores)

    def batch_select_indices(self, indices):
        self.rows.append(indices.tolist())


def read(tokens):
    return ["".join(map(chr, row)) for row in tokens.tolist()]


@pytest.fixture
def decode(start):
    """Texts after each step, a list per row of the batch, and the final state of each row."""

    def decode(*texts, words, order, prompt_length=0, window=None, blocks=None, processors=None, **parts):
        window = window or FullWindow()
        blocks = blocks or Blocks(FixedBlocks(16))
        state = start(*texts, prompt_length=prompt_length, history=window.history)
        steps, last = [[] for _ in texts], list(state.rows)

        def after_step(state):
            for row, text in zip(state.rows, read(state.canvas), strict=True):
                steps[row.index].append(text)
                assert row.tokens == list(map(ord, text)) and list(row.masked) == [letter == "_" for letter in text]
            return filled(state)

        speller = Speller(*words, order=order)
        method = Method(window, blocks, **{"schedule": MinimumSchedule(), **parts})
        denoise(state, speller, method, processors or Unprocessed(), Drafter(MASK), after_step)
        decode.calls = speller.calls
        return steps, last

    return decode


def filled(state):
    return [not any(row.masked) for row in state.rows]


def test_a_word_is_spelled_in_the_order_of_confidence(decode):
    steps, last = decode("p____", words=["pword"], order=["96849"])
    assert steps == [["p___d", "p_o_d", "pwo_d", "pword"]]
    assert last[0].nfe == 4 and last[0].active_tokens == 20


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"rule": ConfidenceThreshold(0.75)}, ["p_o_d", "pwo_d", "pword"]),
        ({"schedule": UniformSchedule((2,))}, ["p_o_d", "pword"]),
        ({"schedule": UniformSchedule((1,))}, ["pword"]),
        ({"rule": ConfidenceThreshold(0.1)}, ["pword"]),
    ],
)
def test_rule_and_schedule_say_how_many_are_written(decode, parts, expected):
    steps, last = decode("p____", words=["pword"], order=["96849"], **parts)
    assert steps == [expected] and last[0].nfe == len(expected)


def test_blocks_are_written_from_left_to_right(decode):
    steps, last = decode("p____", words=["pword"], order=["95689"], prompt_length=1, blocks=Blocks(FixedBlocks(2)))
    assert steps == [["p_o__", "pwo__", "pwo_d", "pword"]]
    assert [positions for _, positions, _ in decode.calls] == [[[1, 2]]] * 2 + [[[3, 4]]] * 2
    assert last[0].block_index == 1 and last[0].block_nfe == 2


def test_the_last_block_is_cut_by_the_end_of_the_canvas(decode):
    steps, _ = decode(
        "p____",
        words=["pword"],
        order=["91119"],
        prompt_length=1,
        blocks=Blocks(FixedBlocks(3)),
        rule=ConfidenceThreshold(0.05),
    )
    assert steps == [["pwor_", "pword"]]


def test_masks_in_the_prompt_belong_to_the_first_block(decode):
    steps, _ = decode(
        "_p___",
        words=["apple"],
        order=["58888"],
        prompt_length=2,
        blocks=Blocks(FixedBlocks(2)),
        rule=ConfidenceThreshold(0.5),
    )
    assert steps == [["appl_", "apple"]]


def test_each_block_is_divided_over_its_own_steps(decode):
    schedule = UniformSchedule((2, 1))
    steps, _ = decode("____", words=["word"], order=["5678"], blocks=Blocks(FixedBlocks(2)), schedule=schedule)
    assert steps == [["_o__", "wo__", "word"]]


def test_a_lookahead_writes_across_blocks_from_the_frontier_on(decode):
    blocks = Blocks(FixedBlocks(2), lookahead=3)
    steps, _ = decode("p____", words=["pword"], order=["95789"], prompt_length=1, blocks=blocks)
    assert steps == [["p__r_", "p_or_", "pwor_", "pword"]]
    assert [positions for _, positions, _ in decode.calls] == [[[1, 2, 3]], [[1, 2, 3]], [[1, 2, 3]], [[4]]]


def test_rows_leave_when_they_are_finished(decode):
    processors = Unprocessed()
    steps, last = decode("a_", "b_", "__", words=["ab", "ba", "on"], order=["99", "99", "98"], processors=processors)
    assert steps == [["ab"], ["ba"], ["o_", "on"]]
    assert [last[row].nfe for row in range(3)] == [1, 1, 2]
    assert [len(canvas) for canvas, _, _ in decode.calls] == [3, 1]
    assert processors.rows == [[2], []], "the processors must be told which rows are left"


def test_the_last_rows_take_the_places_of_those_that_leave(decode):
    processors = Unprocessed()
    texts, words = ["a_", "__", "b_", "__", "__"], ["ab", "on", "ba", "no", "an"]
    steps, last = decode(*texts, words=words, order=["99", "98", "99", "98", "98"], processors=processors)
    assert processors.rows == [[4, 1, 3], []]
    assert [texts[-1] for texts in steps] == words and [last[row].nfe for row in range(5)] == [1, 2, 1, 2, 2]


def test_rows_of_a_batch_are_decoded_as_alone(decode):
    texts, words, order = ["p____", "pq___", "____s"], ["pword", "pqrst", "tests"], ["96849", "99123", "54329"]
    together, last = decode(
        *texts, words=words, order=order, prompt_length=1, blocks=Blocks(FixedBlocks(2)), rule=ConfidenceThreshold(0.6)
    )
    for row, (text, word, digits) in enumerate(zip(texts, words, order, strict=True)):
        alone, its_last = decode(
            text,
            words=[word],
            order=[digits],
            prompt_length=1,
            blocks=Blocks(FixedBlocks(2)),
            rule=ConfidenceThreshold(0.6),
        )
        assert together[row] == alone[0] and last[row].nfe == its_last[0].nfe


@pytest.mark.parametrize(("synchronous", "expected"), [(False, ["ab_", "abc"]), (True, ["ab_", "ab_", "abc"])])
def test_rows_of_synchronous_blocks_wait_for_each_other(decode, synchronous, expected):
    blocks = Blocks(FixedBlocks(2), synchronous=synchronous)
    steps, last = decode("a__", "___", words=["abc", "def"], order=["999", "999"], blocks=blocks)
    assert steps == [expected, ["d__", "de_", "def"]]
    assert [last[row].nfe for row in (0, 1)] == [len(expected), 3], "a row that waits counts its forwards"


@pytest.mark.parametrize("window", [FullWindow(1), BlockWindow(False), BlockWindow(True), FreeCacheWindow(2, 0)])
def test_the_window_policy_decides_the_cost_and_not_the_word(decode, window):
    steps, last = decode(
        "p____", words=["pword"], order=["95689"], prompt_length=1, blocks=Blocks(FixedBlocks(2)), window=window
    )
    assert steps == [["p_o__", "pwo__", "pwo_d", "pword"]]
    # Two steps in each block, and their windows by the table.
    active = {
        "FullWindow": 3 + 3 + 5 + 5,
        "BlockWindow": 5 + 2 + 5 + 2 if window == BlockWindow(True) else 5 + 4 + 5 + 2,
    }
    assert last[0].active_tokens == active.get(type(window).__name__, 5 + 4 + 2 + 2)


def test_a_narrow_window_hides_candidates(decode):
    window = FreeCacheWindow(4, right_window=2)
    steps, _ = decode(
        "p____", words=["pword"], order=["91239"], window=window, prompt_length=1, blocks=Blocks(FixedBlocks(4))
    )
    assert steps == [["p___d", "p_o_d", "pwo_d", "pword"]], "the first forward sees all, the later ones two positions"


def test_the_state_carries_what_the_last_forwards_saw(decode):
    _, last = decode(
        "p____", words=["pword"], order=["99111"], prompt_length=1, window=FreeCacheWindow(4, freeze_lag=2)
    )
    assert last[0].frontiers == [5, 4, 3] and last[0].written == [4]


def test_only_the_entropy_of_what_was_written_is_kept(decode):
    window = FreeCacheWindow(4, refresh_entropy=0.5)
    _, sure = decode("p_", words=["pw"], order=["99"], prompt_length=1, window=window)
    _, unsure = decode("p_", words=["pw"], order=["92"], prompt_length=1, window=window)
    _, unmeasured = decode("p_", words=["pw"], order=["92"])
    p = torch.tensor([0.2] + [0.8 / (VOCAB - 1)] * (VOCAB - 1))
    assert unsure[0].written_entropy == pytest.approx(float(-(p * p.log()).sum()), rel=1e-4)
    assert 0 < sure[0].written_entropy < unsure[0].written_entropy
    assert unmeasured[0].written_entropy == 0


def test_a_refused_position_is_left_for_later(decode):
    first_letters = Unprocessed(lambda canvas, positions: (positions == 4) & (canvas == MASK)[:, 1:2])
    steps, _ = decode("p____", words=["pword"], order=["96849"], processors=first_letters)
    assert steps == [["p_o__", "pwo__", "pwo_d", "pword"]]


def test_a_row_whose_candidates_are_all_refused_is_named(decode):
    refuse_b = Unprocessed(lambda canvas, positions: (canvas[:, :1] == ord("b")).expand_as(positions))
    with pytest.raises(RuntimeError, match="Row 1 could not unmask any position: every candidate was refused"):
        decode("a__", "b__", words=["abc", "bcd"], order=["999", "999"], processors=refuse_b)


def test_the_row_named_is_that_of_the_callers_batch(decode):
    """Refuse row 1 after row 0 has left."""
    refuse_bb = Unprocessed(lambda canvas, positions: (canvas[:, :2] == ord("b")).all(1)[:, None].expand_as(positions))
    with pytest.raises(RuntimeError, match="Row 1 could not"):
        decode("aa_", "b__", words=["aab", "bbc"], order=["999", "999"], processors=refuse_bb)


def test_the_canvas_it_is_given_is_left_alone():
    canvas = torch.tensor([[ord(letter) for letter in text] for text in ("p____", "p____")])
    before = canvas.clone()
    speller = Speller("pword", "ptest", order=["95689", "95689"])
    method = Method(FullWindow(), Blocks(FixedBlocks(2)), MinimumSchedule(), ConfidenceThreshold(0.75))
    denoise(DenoisingState.start(canvas, MASK, 1, 0), speller, method, Unprocessed(), Drafter(MASK), filled)
    assert torch.equal(canvas, before)


def test_two_decodes_of_the_same_parts_are_independent(start):
    runs = []
    method = Method(FreeCacheWindow(2), Blocks(FixedBlocks(2)), UniformSchedule((2, 1)))
    for _ in range(2):
        seen = []

        def after_step(state, seen=seen):
            (row,) = state.rows
            seen.append((read(state.canvas), row.nfe, row.active_tokens, row.step))
            return filled(state)

        speller = Speller("pword", order=["95689"])
        denoise(start("p____", prompt_length=1, history=1), speller, method, Unprocessed(), Drafter(MASK), after_step)
        runs.append(seen)
    assert runs[0] == runs[1] and [nfe for _, nfe, _, _ in runs[0]] == [1, 2, 3]


def test_rows_of_a_state_are_kept_in_the_order_asked(start):
    state = start("ab_", "__c", "d__")
    state.batch_select_indices(torch.tensor([2, 0]))
    assert read(state.canvas) == ["d__", "ab_"] and [row.index for row in state.rows] == [2, 0]
    assert [row.frontier for row in state.rows] == [1, 2]
