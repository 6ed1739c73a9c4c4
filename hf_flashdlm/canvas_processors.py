"""Logits processors on a canvas.

Owns how processors that are written for the scores of one next token, `(batch_size, vocab_size)`, are applied to a
canvas, and which of them can be. Knows nothing of the loop or of what any processor does.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process


# Exact: these look at the scores of one position alone.
POSITIONWISE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)

# Exact: these look at how many tokens stand left of the position.
BY_LENGTH = (
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
)

# Approximate: a penalty on the tokens left of the position, of which those that are masked are not known yet.
BY_CONTEXT = (logits_process.RepetitionPenaltyLogitsProcessor,)

# These promise something about what is written, which takes the whole text left of the position. So while such a
# processor is in use, a step writes the first masked position of a row and no other.
AT_FRONTIER = (
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
)

# As `AT_FRONTIER`, and they may have a rule for each row or remember what they were shown: they are called as in a
# decode from left to right. So are the processors of the caller's own.
BY_ROW = (logits_process.PrefixConstrainedLogitsProcessor,)


CANVAS_PROCESSOR_MEMBERS = ("lookahead", "reset", "__call__", "batch_select_indices", "statistics")


class CanvasProcessor(LogitsProcessor):
    r"""
    Changes the scores of a step with the whole canvas in view, an argument of `generate` as `guider=`: a guide of the
    caller's own, which needs no autoregressive model. [`ARGuider`] has the same form. A subclass needs
    `__call__` only. `generate` works on a shallow copy of the object, so that what `reset` sets on it belongs to that
    call.
    """

    lookahead: int | None = None  # positions from the frontier on that a step scores; `None`: those of the block

    def reset(
        self,
        diffusion_model,
        canvas_mask: torch.Tensor,
        mask_token_id: int,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        compile_config=None,
    ) -> None:
        r"""
        Begin a call.

        Args:
            diffusion_model (`PreTrainedModel`): The model whose scores are changed.
            canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas is padding.
            mask_token_id (`int`): The mask token. A position where nothing else is finite is refused.
            temperature (`float`, *optional*): What the scores have been divided by, where tokens are drawn.
            generator (`torch.Generator`, *optional*): Source of randomness of the call.
            compile_config (`CompileConfig`, *optional*): Of the call.
        """

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        positions: torch.Tensor,
        frontier: torch.Tensor,
        candidate: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, canvas_length)`): The canvas, masks included.
            scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Scores of the diffusion model.
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                The canvas positions that the scores belong to, on the CPU.
            frontier (`torch.LongTensor` of shape `(batch_size,)`): First masked position of each row, on the CPU.
            candidate (`torch.BoolTensor` of shape `(batch_size, num_positions)`):
                Which positions may be written, on the CPU.

        Returns:
            `torch.Tensor`: Scores of the same shape.
        """
        raise NotImplementedError(f"`{type(self).__name__}` must define `__call__`.")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch; the others are finished."""

    def statistics(self, total_seconds: float) -> dict:
        """Fields of [`DiffusionGenerationOutput`] to fill in, at the end of a call of `total_seconds`."""
        return {}


class CanvasProcessors:
    r"""
    Applies a list of processors to scores of shape `(batch_size, num_positions, vocab_size)`.

    A processor of the caller's own is called once a step, with the caller's whole batch up to the first masked
    position, whatever rows have ended: in the order of the caller's rows, ids `(batch_size, length)` and scores
    `(batch_size, vocab_size)`. Ended rows are filled up with pad tokens and their scores are 0. Where rows differ in
    their first masked position it is called for each of these; what is not known of another row is the mask token.
    With the attribute `positionwise = True` it looks at the scores alone, and is shown those of all positions at once.

    Args:
        processors (`LogitsProcessorList`): Processors of Transformers and of the caller.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
        mask_token_id (`int`): Left out of the context that a processor is shown.
        guider ([`ARGuider`], *optional*): Judges what they leave of the scores.
        skip (`int`): Columns of the canvas that the caller's prompt does not have.
        shown (`Callable`, *optional*): The caller's batch up to a position, see [`RowEnds.shown`].

    Raises:
        ValueError: If a processor of Transformers is none of those above.
    """

    def __init__(
        self, processors: LogitsProcessorList, canvas_mask, mask_token_id: int, guider=None, skip=0, shown=None
    ):
        self.processors, self.guider, self.skip, self.shown = list(map(_unpadded, processors)), guider, skip, shown
        self.canvas_mask, self.mask_token_id = canvas_mask, mask_token_id
        self.rows, self.num_rows = list(range(len(canvas_mask))), len(canvas_mask)  # of the caller's batch
        self.is_left_to_right = any(map(_is_left_to_right, self.processors))
        for processor in processors:
            known = type(processor) in POSITIONWISE + BY_LENGTH + BY_CONTEXT + AT_FRONTIER + BY_ROW
            if not known and type(processor).__module__ == logits_process.__name__:  # a subclass may look at anything
                raise ValueError(
                    f"`{type(processor).__name__}` cannot be used in a diffusion decode, which scores many positions "
                    "at once: drop the option that asks for it."
                )

    def __call__(
        self,
        canvas: torch.Tensor,
        scores: torch.Tensor,
        positions: list[range],
        frontier: list[int],
        candidate: list[bytearray],
    ) -> torch.Tensor:
        r"""
        Args:
            canvas (`torch.LongTensor` of shape `(batch_size, canvas_length)`): Token ids, masks included.
            scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): The model's.
            positions (`list[range]`): The positions of each row that the scores belong to.
            frontier (`list[int]`): First masked position of each row.
            candidate (`list[bytearray]`): For each position whether it may be written.

        Returns:
            `torch.Tensor`: Scores of the same shape.
        """
        places = {}  # of the rows that may write it, their first masked position
        if self.is_left_to_right:
            for index, (first, row, may) in enumerate(zip(frontier, positions, candidate, strict=True)):
                if first in row and may[first - row.start]:
                    places[index] = first - row.start
        for processor in self.processors:
            scores = self._apply(processor, canvas, scores, positions, places)
        if self.is_left_to_right:
            scores = self._refuse_others(scores, places)
        if self.guider is not None:
            may = torch.frombuffer(bytearray().join(candidate), dtype=torch.bool).view(len(candidate), -1)
            positions, frontier = torch.tensor(positions), torch.tensor(frontier)
            scores = self.guider(canvas, scores, positions=positions, frontier=frontier, candidate=may)
        return scores

    def _apply(self, processor, canvas, scores, positions, places: dict[int, int]) -> torch.Tensor:
        """The scores after one processor."""
        if type(processor) in POSITIONWISE or getattr(processor, "positionwise", False):
            return processor(None, scores.flatten(0, 1)).view_as(scores)
        if type(processor) in AT_FRONTIER:
            return self._one_by_one(processor, canvas, scores, positions, places)
        if type(processor) in BY_LENGTH + BY_CONTEXT:
            return self._one_by_one(processor, canvas, scores, positions)
        return self._by_row(processor, scores, positions, places)

    def _one_by_one(self, processor, canvas, scores, positions, places=None) -> torch.Tensor:
        """Show the processor each position, or those at `places` alone, with the tokens left of it."""
        scores = scores.clone()
        known = self.canvas_mask.bool() & (canvas != self.mask_token_id)
        by_length = type(processor) in BY_LENGTH
        for row, row_positions in enumerate(positions):
            slots = range(len(row_positions)) if places is None else [places[row]] if row in places else []
            for slot in slots:
                context = canvas[row, self.skip : row_positions[slot]]
                if not by_length:
                    context = context[known[row, self.skip : row_positions[slot]]]
                scores[row, slot] = processor(context[None], scores[row, slot][None])[0]
        return scores

    def _by_row(self, processor, scores, positions, places: dict[int, int]) -> torch.Tensor:
        """Show the processor the caller's whole batch, at the first masked position of its rows."""
        scores = scores.clone()
        lengths = {index: positions[index][place] for index, place in places.items()}
        for length in sorted(set(lengths.values())):
            batch = scores.new_zeros(self.num_rows, scores.shape[-1])
            for index, place in places.items():
                batch[self.rows[index]] = scores[index, place]
            batch = processor(self.shown(length, scores.device), batch)
            for index, place in places.items():
                if lengths[index] == length:
                    scores[index, place] = batch[self.rows[index]]
        return scores

    def _refuse_others(self, scores, places: dict[int, int]) -> torch.Tensor:
        """Leave every position but those at `places` the mask token alone."""
        refused = torch.ones(scores.shape[:2], dtype=torch.bool)
        refused[list(places), list(places.values())] = False
        scores = scores.masked_fill(refused[..., None].to(scores.device), -torch.inf)
        scores[..., self.mask_token_id].masked_fill_(refused.to(scores.device), 0.0)
        return scores

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.canvas_mask = self.canvas_mask[indices.to(self.canvas_mask.device)]
        self.rows = [self.rows[index] for index in indices.tolist()]
        if self.guider is not None:
            self.guider.batch_select_indices(indices)


def _unpadded(processor):
    """The processor as it is for a row without padding, which is how the rows are shown to it."""
    penalty = logits_process.RepetitionPenaltyLogitsProcessor
    if type(processor) is penalty and torch.is_tensor(processor.prompt_ignore_length):
        return penalty(processor.penalty)
    return processor


def _is_left_to_right(processor) -> bool:
    """Whether the processor is shown the first masked position of a row only."""
    known = type(processor) in POSITIONWISE + BY_LENGTH + BY_CONTEXT
    return not known and not getattr(processor, "positionwise", False)
