"""Logits processors on a canvas.

Owns how processors written for the scores of one next token, `(batch_size, vocab_size)`, are applied to many positions
at once, and which of them can be. Knows nothing of the loop or of what any processor does.
"""

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as host


# Exact: these look at the scores of one position alone.
POSITIONWISE = (
    host.TemperatureLogitsWarper,
    host.TopKLogitsWarper,
    host.TopPLogitsWarper,
    host.TopHLogitsWarper,
    host.MinPLogitsWarper,
    host.TypicalLogitsWarper,
    host.EpsilonLogitsWarper,
    host.EtaLogitsWarper,
    host.SuppressTokensLogitsProcessor,
    host.InfNanRemoveLogitsProcessor,
    host.LogitNormalization,
)

# Exact: these look at how many tokens stand left of the position.
BY_LENGTH = (
    host.MinLengthLogitsProcessor,
    host.MinNewTokensLengthLogitsProcessor,
    host.SuppressTokensAtBeginLogitsProcessor,
    host.ForcedBOSTokenLogitsProcessor,
    host.ForcedEOSTokenLogitsProcessor,
    host.ExponentialDecayLengthPenalty,
)

# These look at the tokens left of the position, of which the masked ones are not known yet: exact at the first masked
# position of a row, approximate behind it. So are processors of the caller's own.
BY_CONTEXT = (
    host.RepetitionPenaltyLogitsProcessor,
    host.NoRepeatNGramLogitsProcessor,
    host.SequenceBiasLogitsProcessor,
    host.NoBadWordsLogitsProcessor,
)


CANVAS_PROCESSOR_MEMBERS = ("lookahead", "reset", "__call__", "batch_select_indices", "statistics")


class CanvasProcessor(LogitsProcessor):
    r"""
    Changes the scores of a step with the whole canvas in view, an argument of `generate` as `guider=`: a guide of the
    caller's own, which needs no autoregressive model. [`ARGuider`] has the same form. A class that inherits from this
    one needs `__call__` only. `generate` works on a shallow copy of the object, so that what `reset` sets on it
    belongs to that call.
    """

    lookahead: int | None = None  # positions from the frontier on that a step scores; `None`: those of the block

    def reset(
        self,
        diffusion_model,
        canvas_mask: torch.LongTensor,
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
        input_ids: torch.LongTensor,
        scores: torch.Tensor,
        positions: torch.LongTensor,
        frontier: torch.LongTensor,
        candidate: torch.BoolTensor,
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

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch; the others are finished."""

    def statistics(self, total_seconds: float) -> dict:
        """Fields of [`DiffusionGenerationOutput`] to fill in, at the end of a call of `total_seconds`."""
        return {}


class CanvasProcessors:
    r"""
    Applies a host's list of processors to scores of shape `(batch_size, num_positions, vocab_size)`.

    Args:
        processors (`LogitsProcessorList`): Processors of Transformers and of the caller.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
        mask_token_id (`int`): Left out of the context that a processor is shown.
        guider ([`ARGuider`], *optional*): Judges what they leave of the scores.
        skip (`int`): Columns of the canvas that the caller's prompt does not have.

    Raises:
        ValueError: If a processor of Transformers is none of those above.
    """

    def __init__(self, processors: LogitsProcessorList, canvas_mask, mask_token_id: int, guider=None, skip=0):
        self.processors, self.guider, self.skip = list(map(_unpadded, processors)), guider, skip
        self.canvas_mask, self.mask_token_id = canvas_mask, mask_token_id
        for processor in processors:
            known = type(processor) in POSITIONWISE + BY_LENGTH + BY_CONTEXT  # a subclass may look at anything
            if not known and type(processor).__module__ == host.__name__:
                raise ValueError(
                    f"`{type(processor).__name__}` cannot be used in a diffusion decode, which scores many positions "
                    "at once: drop the option that asks for it."
                )

    def __call__(
        self,
        canvas: torch.LongTensor,
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
        for processor in self.processors:
            if type(processor) in POSITIONWISE:
                scores = processor(None, scores.flatten(0, 1)).view_as(scores)
            else:
                scores = self._one_by_one(processor, canvas, scores, positions)
        if self.guider is not None:
            may = torch.frombuffer(bytearray().join(candidate), dtype=torch.bool).view(len(candidate), -1)
            positions, frontier = torch.tensor(positions), torch.tensor(frontier)
            scores = self.guider(canvas, scores, positions=positions, frontier=frontier, candidate=may)
        return scores

    def _one_by_one(self, processor, canvas, scores, positions) -> torch.Tensor:
        """Show the processor each position with the tokens left of it."""
        scores = scores.clone()
        known = self.canvas_mask.bool() & (canvas != self.mask_token_id)
        by_length = type(processor) in BY_LENGTH
        for row, row_positions in enumerate(positions):
            for slot, position in enumerate(row_positions):
                context = canvas[row, self.skip : position]
                if not by_length:
                    context = context[known[row, self.skip : position]]
                scores[row, slot] = processor(context[None], scores[row, slot][None])[0]
        return scores

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.canvas_mask = self.canvas_mask[indices.to(self.canvas_mask.device)]
        if self.guider is not None:
            self.guider.batch_select_indices(indices)


def _unpadded(processor):
    """The processor as it is for a row without padding, which is how the rows are shown to it."""
    if type(processor) is host.RepetitionPenaltyLogitsProcessor and torch.is_tensor(processor.prompt_ignore_length):
        return host.RepetitionPenaltyLogitsProcessor(processor.penalty)
    return processor
