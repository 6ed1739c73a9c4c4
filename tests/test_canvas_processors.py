"""Transformers' processors on many positions: each equals its answer position by position, or is refused by name."""

import inspect

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as host

from hf_flashdlm.canvas_processors import BY_CONTEXT, BY_LENGTH, POSITIONWISE, CanvasProcessors


MASK, EOS, VOCAB = 0, 1, 12
EOS_IDS = torch.tensor([EOS])
CANVAS = torch.tensor([[3, 4, 5, 4, 3, 4, 5, 6], [7, 7, 7, 8, 9, 7, 7, 7]])  # nothing masked, nothing padded
POSITIONS = torch.tensor([[1, 2, 3, 4], [4, 5, 6, 7]])

EXAMPLES = [
    host.TemperatureLogitsWarper(0.5),
    host.TopKLogitsWarper(2),
    host.TopPLogitsWarper(0.6),
    host.TopHLogitsWarper(0.4),
    host.MinPLogitsWarper(0.3),
    host.TypicalLogitsWarper(0.5),
    host.EpsilonLogitsWarper(0.05),
    host.EtaLogitsWarper(0.1),
    host.SuppressTokensLogitsProcessor([4, 5]),
    host.InfNanRemoveLogitsProcessor(),
    host.LogitNormalization(),
    host.MinLengthLogitsProcessor(4, EOS_IDS),
    host.MinNewTokensLengthLogitsProcessor(2, 3, EOS_IDS),
    host.SuppressTokensAtBeginLogitsProcessor([4, 5], 4),
    host.ForcedBOSTokenLogitsProcessor(2),
    host.ForcedEOSTokenLogitsProcessor(8, EOS_IDS),
    host.ExponentialDecayLengthPenalty((2, 1.5), EOS_IDS, 2),
    host.RepetitionPenaltyLogitsProcessor(1.5),
    host.NoRepeatNGramLogitsProcessor(2),
    host.SequenceBiasLogitsProcessor([[[3, 4], 2.0], [[7], -2.0]]),
    host.NoBadWordsLogitsProcessor([[4, 5], [7, 7]], EOS_IDS),
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
    together = CanvasProcessors(LogitsProcessorList(processors), mask, MASK, guider)
    ranges = [range(int(row[0]), int(row[-1]) + 1) for row in positions]
    candidate = [bytearray(b"\1" * len(positions)) for positions in ranges]
    return together(canvas, scores, ranges, [positions.start for positions in ranges], candidate)


class Reader(LogitsProcessor):
    """A caller's own processor: keeps the contexts that it gets, and adds their length to the scores."""

    def __init__(self):
        self.contexts = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1 and scores.shape[1] == VOCAB
        self.contexts.append(input_ids[0].tolist())
        return scores + input_ids.shape[1]


def test_every_processor_that_is_let_through_is_tried_here():
    assert [type(example) for example in EXAMPLES] == list(POSITIONWISE + BY_LENGTH + BY_CONTEXT)


@pytest.mark.parametrize("processor", EXAMPLES, ids=name_of)
def test_a_processor_equals_its_answer_position_by_position(processor):
    scores = raw_scores() if isinstance(processor, host.InfNanRemoveLogitsProcessor) else raw_scores().nan_to_num(0)
    expected = scores.clone()
    for row, positions in enumerate(POSITIONS.tolist()):
        for slot, position in enumerate(positions):
            alone = scores[row, slot][None].clone()
            expected[row, slot] = processor(CANVAS[row : row + 1, :position], alone)[0]
    before = scores.clone()
    assert not torch.equal(expected, before), "the example must change something"
    torch.testing.assert_close(apply([processor], scores=scores), expected, equal_nan=True)
    torch.testing.assert_close(scores, before, atol=0, rtol=0, equal_nan=True, msg="its input must not change")


@pytest.mark.parametrize(
    "processor",
    [
        kind
        for _, kind in inspect.getmembers(host, inspect.isclass)
        if issubclass(kind, LogitsProcessor)
        and kind.__module__ == host.__name__
        and not issubclass(kind, POSITIONWISE + BY_LENGTH + BY_CONTEXT)
    ],
    ids=name_of,
)
def test_any_other_processor_of_the_host_is_refused_by_name(processor):
    unready = processor.__new__(processor)
    with pytest.raises(
        ValueError, match=rf"`{processor.__name__}` cannot be used in a diffusion decode, .*: drop the"
    ):
        CanvasProcessors(LogitsProcessorList([unready]), torch.ones(1, 1), MASK)


def test_a_context_holds_what_is_known_left_of_the_position():
    """Masks and padding are not part of a context."""
    canvas = torch.tensor([[2, 2, 5, MASK, 6, MASK]])
    mask, reader = torch.tensor([[0, 0, 1, 1, 1, 1]]), Reader()
    scores = apply([reader], canvas, torch.zeros(1, 3, VOCAB), mask, torch.tensor([[3, 4, 5]]))
    assert reader.contexts == [[5], [5], [5, 6]]
    assert scores[0, :, 0].tolist() == [1, 1, 2]


def test_a_penalty_does_not_see_padding_and_masks():
    canvas, mask = torch.tensor([[2, 5, MASK]]), torch.tensor([[0, 1, 1]])
    scores = apply(
        [host.RepetitionPenaltyLogitsProcessor(2.0)], canvas, torch.ones(1, 1, VOCAB), mask, torch.tensor([[2]])
    )
    assert scores[0, 0, [MASK, 2, 5]].tolist() == [1, 1, 0.5]


def test_a_length_counts_masks_and_padding():
    """Count as Transformers does: a minimum length is that of the sequence, its padding included."""
    canvas, mask = torch.tensor([[2, 5, MASK, MASK]]), torch.tensor([[0, 1, 1, 1]])
    processor = host.MinLengthLogitsProcessor(3, EOS_IDS)
    scores = apply([processor], canvas, torch.zeros(1, 2, VOCAB), mask, torch.tensor([[2, 3]]))
    assert scores[0, :, EOS].tolist() == [-torch.inf, 0]


def test_a_callers_own_processor_is_shown_one_position_at_a_time():
    reader = Reader()
    scores = apply([reader], scores=torch.zeros(2, 4, VOCAB))
    assert reader.contexts == [CANVAS[row, :end].tolist() for row in (0, 1) for end in POSITIONS[row].tolist()]
    assert scores[:, :, 0].tolist() == POSITIONS.tolist()


def test_a_callers_plain_function_is_a_processor_too():
    scores = apply([lambda input_ids, scores: scores - input_ids[:, -1:]], scores=torch.zeros(2, 4, VOCAB))
    assert scores[0, :, 0].tolist() == [-3, -4, -5, -4]


def test_a_callers_subclass_of_a_hosts_processor_is_the_callers_own():
    class Colder(host.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids, scores) + input_ids.shape[1]

    assert apply([Colder(1.0)], scores=torch.zeros(2, 4, VOCAB))[:, :, 0].tolist() == POSITIONS.tolist()


def test_processors_are_applied_in_their_order():
    scores = torch.zeros(2, 4, VOCAB)
    warmer = host.TemperatureLogitsWarper(0.5)
    assert apply([Reader(), warmer], scores=scores)[0, :, 0].tolist() == [2, 4, 6, 8]
    assert apply([warmer, Reader()], scores=scores)[0, :, 0].tolist() == [1, 2, 3, 4]


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
    scores = apply([Reader()], scores=torch.zeros(2, 4, VOCAB), guider=guider)
    assert guider.told == [([1, 2, 3, 4], POSITIONS.tolist(), [1, 4])]
    assert scores[0, :, 0].tolist() == [-1, -2, -3, -4]


def test_rows_that_leave_take_their_padding_along_and_the_guider_is_told():
    guider, reader = Guider(), Reader()
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    processors = CanvasProcessors(LogitsProcessorList([reader]), mask, MASK, guider)
    processors.batch_select_indices(torch.tensor([1]))
    processors(torch.tensor([[4, 5, 6]]), torch.zeros(1, 1, VOCAB), [range(2, 3)], [2], [bytearray(1)])
    assert guider.told[0] == [1] and reader.contexts == [[5]]
