"""What a decode returns.

Owns the output fields. Knows nothing of how tokens are chosen, or of when a row ends.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    r"""
    Output of `generate` with `return_dict_in_generate=True`. All counts are per row and fresh for each call.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Prompt and generated tokens, filled up with the pad token after the end of a row.
        nfe (`torch.LongTensor` of shape `(batch_size,)`):
            Forwards of the diffusion model while the row was unfinished.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch_size,)`):
            Number of generated tokens, up to and including EOS, divided by `nfe`.
        active_tokens (`torch.LongTensor` of shape `(batch_size,)`):
            Query positions that the diffusion model computed for the row, summed over its forwards.
        guider_forwards (`torch.LongTensor` of shape `(batch_size,)`):
            Forwards of the guider while the row was unfinished.
        drafts_judged (`torch.LongTensor` of shape `(batch_size,)`):
            Drafts that the guider judged.
        drafts_accepted (`torch.LongTensor` of shape `(batch_size,)`):
            Drafts in the accepted prefixes, without a first draft that was written although it was refused.
        accepted_lengths (`list[list[int]]`, *optional*):
            Length of the accepted prefix in each step of each row. Only with a guider.
        gate_closed_at (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Step at which the gate closed and the guider was no longer asked, -1 if it never did. Only with a gate.
        guider_time_share (`float`, *optional*):
            Share of the decode's wall time spent in the guider; on a GPU only the kernel launches are counted. Only
            with a guider.
        written_at (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Step at which each token was written, the last one if it was written anew, counted from 0; -1 for what was
            given and for pad tokens after the end of a row.
        confidence (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Probability of each token in the softmax of the model's logits, before processors and guider, at the
            forward after which it was written; NaN where `written_at` is -1. Only with `output_confidence=True`.
        history (`torch.LongTensor` of shape `(num_steps, batch_size, sequence_length)`, *optional*):
            The canvas after every step, mask tokens included, as far as the longest row reaches in the end. A row that
            is finished looks as in `sequences`. Only with `output_history=True`.
    """

    sequences: torch.Tensor
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    active_tokens: torch.Tensor | None = None
    guider_forwards: torch.Tensor | None = None
    drafts_judged: torch.Tensor | None = None
    drafts_accepted: torch.Tensor | None = None
    accepted_lengths: list[list[int]] | None = None
    gate_closed_at: torch.Tensor | None = None
    guider_time_share: float | None = None
    written_at: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    history: torch.Tensor | None = None
