"""Transformers' processors on many positions: each equals its answer position by position, or is refused by name."""

import inspect

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

from hf_flashdlm.canvas_processors import (
    AT_FRONTIER,
    BY_CONTEXT,
    BY_LENGTH,
    BY_ROW,
    POSITIONWISE,
    CanvasProcessors,
)


MASK, EOS, VOCAB = 0, 1, 12
EOS_IDS = torch.tensor([EOS])
CANVAS = torch.tensor([[3, 4, 5, 4, 3, 4, 5, 6], [7, 7, 7, 8, 9, 7, 7, 7]])  # nothing masked, nothing padded
POSITIONS = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])

EXAMPLES = [
    logits_process.TemperatureLogitsWarper(0.5),
    logits_process.TopKLogitsWarper(2),
    logits_process.TopPLogitsWarper(0.6),
    logits_process.TopHLogitsWarper(0.4),
    logits_process.MinPLogitsWarper(0.3),
    logits_process.TypicalLogitsWarper(0.5),
    logits_process.EpsilonLogitsWarper(0.05),
    logits_process.EtaLogitsWarper(0.1),
    logits_process.SuppressTokensLogitsProcessor([4, 5]),
    logits_process.InfNanRemoveLogitsProcessor(),
    logits_process.LogitNormalization(),
    logits_process.MinLengthLogitsProcessor(4, EOS_IDS),
    logits_process.MinNewTokensLengthLogitsProcessor(2, 3, EOS_IDS),
    logits_process.SuppressTokensAtBeginLogitsProcessor([4, 5], 4),
    logits_process.ForcedBOSTokenLogitsProcessor(2),
    logits_process.ForcedEOSTokenLogitsProcessor(8, EOS_IDS),
    logits_process.ExponentialDecayLengthPenalty((2, 1.5), EOS_IDS, 2),
    logits_process.RepetitionPenaltyLogitsProcessor(1.5),
]
LEFT_TO_RIGHT = [
    logits_process.NoRepeatNGramLogitsProcessor(2),
    logits_process.SequenceBiasLogitsProcessor([[[3, 4], 2.0], [[7], -2.0]]),
    logits_process.NoBadWordsLogitsProcessor([[4, 5], [7, 7]], EOS_IDS),
    logits_process.PrefixConstrainedLogitsProcessor(lambda row, ids: [3 + row, int(ids[-1])], 1),
]


def name_of(value):
    return value.__name__ if inspect.isclass(value) else type(value).__name__


def raw_scores():
    scores = torch.randn(2, 4, VOCAB, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 3] = torch.nan
    return scores


def apply(processors, canvas=CANVAS, scores=None, mask=None, positions=POSITIONS, guider=None):
    mask = torch.ones_like(canvas) if mask is None else mask
    scores = raw_scores() if scores is None else scores
    ranges = [range(int(row[0]), int(row[-1]) + 1) for row in positions]

    def shown(length, device):
        clean = torch.arange(length) < torch.tensor([row.start for row in ranges])[:, None]
        return torch.where(clean, canvas[:, :length], MASK)

    together = CanvasProcessors(LogitsProcessorList(processors), mask, MASK, guider, shown=shown)
    candidate = [bytearray(b"\1" * len(one)) for one in ranges]
    return together(canvas, scores, ranges, [one.start for one in ranges], candidate)


class Reader(LogitsProcessor):
    """A caller's own processor: keeps what it is shown, and adds the length to the scores and the row to the last."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores) and scores.shape[1] == VOCAB
        self.shown.append(input_ids.tolist())
        scores = scores + input_ids.shape[1]
        scores[:, -1] += torch.arange(len(scores))
        return scores


def test_every_processor_that_is_let_through_is_tried_here():
    assert [type(example) for example in EXAMPLES] == list(POSITIONWISE + BY_LENGTH + BY_CONTEXT)
    assert [type(example) for example in LEFT_TO_RIGHT] == list(AT_FRONTIER + BY_ROW)


@pytest.mark.parametrize("processor", EXAMPLES, ids=name_of)
def test_a_processor_equals_its_answer_position_by_position(processor):
    removes = isinstance(processor, logits_process.InfNanRemoveLogitsProcessor)
    scores = raw_scores() if removes else raw_scores().nan_to_num(0)
    expected = scores.clone()
    for row, positions in enumerate(POSITIONS.tolist()):
        for slot, position in enumerate(positions):
            alone = scores[row, slot][None].clone()
            expected[row, slot] = processor(CANVAS[row : row + 1, :position], alone)[0]
    before = scores.clone()
    assert not torch.equal(expected, before), "the example must change something"
    torch.testing.assert_close(apply([processor], scores=scores), expected, equal_nan=True)
    torch.testing.assert_close(scores, before, atol=0, rtol=0, equal_nan=True, msg="its input must not change")


def only_the_mask(scores):
    return (scores[..., MASK] == 0).all() and (scores[..., MASK + 1 :] == -torch.inf).all()


@pytest.mark.parametrize("processor", LEFT_TO_RIGHT, ids=name_of)
def test_a_processor_of_the_text_left_of_a_position_leaves_the_first_masked_one_of_each_row(processor):
    scores = raw_scores().nan_to_num(0)
    before = scores.clone()
    processed = apply([processor], scores=scores)
    for row, position in enumerate(POSITIONS[:, 0].tolist()):
        batch = torch.zeros(2, VOCAB)
        batch[row] = before[row, 0]
        context = CANVAS[:, :position]
        one = row if type(processor) in BY_ROW else slice(row, row + 1)
        expected = processor(context, batch)[row] if type(processor) in BY_ROW else processor(context[one], batch[one])
        torch.testing.assert_close(processed[row, 0], expected.flatten())
    assert only_the_mask(processed[:, 1:]), "what stands left of the other positions is not known yet"
    torch.testing.assert_close(scores, before, atol=0, rtol=0, msg="the scores it is given must stay")


@pytest.mark.parametrize(
    "processor",
    [
        kind
        for _, kind in inspect.getmembers(logits_process, inspect.isclass)
        if issubclass(kind, LogitsProcessor)
        and kind.__module__ == logits_process.__name__
        and not issubclass(kind, POSITIONWISE + BY_LENGTH + BY_CONTEXT + AT_FRONTIER + BY_ROW)
    ],
    ids=name_of,
)
def test_any_other_processor_of_transformers_is_refused_by_name(processor):
    unready = processor.__new__(processor)
    with pytest.raises(
        ValueError, match=rf"`{processor.__name__}` cannot be used in a diffusion decode, .*: drop the"
    ):
        CanvasProcessors(LogitsProcessorList([unready]), torch.ones(1, 1), MASK)


def test_a_penalty_does_not_see_padding_and_masks():
    canvas, mask = torch.tensor([[2, 5, MASK]]), torch.tensor([[0, 1, 1]])
    scores = apply(
        [logits_process.RepetitionPenaltyLogitsProcessor(2.0)],
        canvas,
        torch.ones(1, 1, VOCAB),
        mask,
        torch.tensor([[2]]),
    )
    assert scores[0, 0, [MASK, 2, 5]].tolist() == [1, 1, 0.5]


def test_a_length_counts_masks_and_padding():
    """Count as Transformers does: a minimum length is that of the sequence, its padding included."""
    canvas, mask = torch.tensor([[2, 5, MASK, MASK]]), torch.tensor([[0, 1, 1, 1]])
    processor = logits_process.MinLengthLogitsProcessor(3, EOS_IDS)
    scores = apply([processor], canvas, torch.zeros(1, 2, VOCAB), mask, torch.tensor([[2, 3]]))
    assert scores[0, :, EOS].tolist() == [-torch.inf, 0]


def test_a_callers_own_processor_is_shown_the_batch_up_to_the_first_masked_position():
    reader = Reader()
    scores = apply([reader], scores=torch.zeros(2, 4, VOCAB))
    assert reader.shown == [[[3], [7]], [[3, MASK, MASK, MASK], [7, 7, 7, 8]]], "rows that differ in it are told apart"
    assert scores[:, 0, 1].tolist() == [1, 4] and scores[:, 0, -1].tolist() == [1, 5], "each row has its own answer"
    assert only_the_mask(scores[:, 1:])


def test_rows_at_the_same_position_are_shown_together():
    reader = Reader()
    apply([reader], scores=torch.zeros(2, 2, VOCAB), positions=torch.tensor([[4, 5], [4, 5]]))
    assert reader.shown == [CANVAS[:, :4].tolist()]


def test_a_callers_plain_function_is_a_processor_too():
    scores = apply([lambda input_ids, scores: scores - input_ids[:, -1:]], scores=torch.zeros(2, 4, VOCAB))
    assert scores[:, 0, 1].tolist() == [-3, -8]


def test_a_callers_processor_of_scores_alone_may_say_so():
    class Colder(LogitsProcessor):
        positionwise = True

        def __call__(self, input_ids, scores):
            assert input_ids is None and scores.shape == (8, VOCAB)
            return scores - 1

    assert (apply([Colder()], scores=torch.zeros(2, 4, VOCAB)) == -1).all()


def test_a_callers_subclass_of_a_processor_of_transformers_is_the_callers_own():
    class Colder(logits_process.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids, scores) + input_ids.shape[1]

    assert apply([Colder(1.0)], scores=torch.zeros(2, 4, VOCAB))[:, 0, 1].tolist() == [1, 4]


def test_processors_are_applied_in_their_order():
    scores = torch.zeros(2, 4, VOCAB)
    warmer = logits_process.TemperatureLogitsWarper(0.5)
    assert apply([Reader(), warmer], scores=scores)[:, 0, 1].tolist() == [2, 8]
    assert apply([warmer, Reader()], scores=scores)[:, 0, 1].tolist() == [1, 4]


def test_a_row_that_waits_is_shown_but_not_changed():
    reader = Reader()
    processors = CanvasProcessors(
        LogitsProcessorList([reader]), torch.ones(2, 4), MASK, shown=lambda length, device: CANVAS[:, :length]
    )
    scores = torch.zeros(2, 1, VOCAB)
    positions, candidate = [range(2, 3), range(2, 3)], [bytearray(b"\1"), bytearray(1)]
    scores = processors(CANVAS[:, :4], scores, positions, [2, 3], candidate)
    assert reader.shown == [CANVAS[:, :2].tolist()]
    assert scores[0, 0, 1] == 2 and only_the_mask(scores[1])


class Guider:
    def __init__(self):
        self.told = []

    def __call__(self, canvas, scores, positions, frontier, candidate=None):
        self.told.append((scores[0, :, 0].tolist(), positions.tolist(), frontier.tolist()))
        return -scores

    def batch_select_indices(self, indices):
        self.told.append(indices.tolist())


def test_a_guider_judges_what_the_processors_leave():
    guider = Guider()
    scores = apply([logits_process.TemperatureLogitsWarper(0.5)], scores=torch.ones(2, 4, VOCAB), guider=guider)
    assert guider.told == [([2] * 4, POSITIONS.tolist(), [1, 4])]
    assert scores[0, :, 0].tolist() == [-2] * 4


def test_rows_that_leave_take_their_padding_along_and_the_guider_is_told():
    guider = Guider()
    mask, penalty = torch.tensor([[1, 1, 1], [0, 1, 1]]), logits_process.RepetitionPenaltyLogitsProcessor(2.0)
    processors = CanvasProcessors(LogitsProcessorList([penalty]), mask, MASK, guider)
    processors.batch_select_indices(torch.tensor([1]))
    scores = processors(torch.tensor([[4, 5, 6]]), torch.ones(1, 1, VOCAB), [range(2, 3)], [2], [bytearray(1)])
    assert guider.told[0] == [1] and (-scores[0, 0, [4, 5]]).tolist() == [1, 0.5], "4 is padding"


def test_rows_that_left_are_still_shown_and_the_others_keep_their_places():
    reader = Reader()
    shown = lambda length, device: CANVAS[[0, 1, 0], :length]  # noqa: E731
    processors = CanvasProcessors(LogitsProcessorList([reader]), torch.ones(3, 8), MASK, shown=shown)
    processors.batch_select_indices(torch.tensor([2, 1]))
    scores = torch.zeros(2, 1, VOCAB)
    scores = processors(CANVAS, scores, [range(2, 3)] * 2, [2, 2], [bytearray(b"\1")] * 2)
    assert reader.shown == [CANVAS[[0, 1, 0], :2].tolist()]
    assert scores[:, 0, -1].tolist() == [4, 3], "the length, and the row of the caller's batch"
