"""Logits processors on a canvas.

Owns how processors written for one next token, `(batch_size, vocab_size)` scores, are applied to many positions at
once, and which of them can be. Knows nothing of the loop or of what any processor does.
"""

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process


# These look at each position's scores alone, so applying them to all positions at once is exact.
POSITIONWISE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)


class CanvasProcessors:
    r"""
    Applies a host's list of processors to scores of shape `(batch_size, num_positions, vocab_size)`.

    Args:
        processors (`LogitsProcessorList`): Processors of the host and of the caller.
        guider ([`ARGuider`], *optional*): Judges what they leave of the scores.

    Raises:
        ValueError: If a processor depends on the text to its left, which a canvas does not have.
    """

    def __init__(self, processors: LogitsProcessorList, guider=None):
        self.processors, self.guider = processors, guider
        for processor in processors:
            if not isinstance(processor, POSITIONWISE):
                raise ValueError(
                    f"`{type(processor).__name__}` cannot be used in a diffusion decode, which scores many positions "
                    "at once: drop the option or processor that asks for it."
                )

    def __call__(self, canvas: torch.LongTensor, scores: torch.Tensor, positions, frontier) -> torch.Tensor:
        for processor in self.processors:
            scores = processor(None, scores.flatten(0, 1)).view_as(scores)
        if self.guider is not None:
            scores = self.guider(canvas, scores, positions=positions, frontier=frontier)
        return scores

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        if self.guider is not None:
            self.guider.batch_select_indices(indices)
