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
            Prompt and generated tokens; what follows the end of a row is the pad token.
        nfe (`torch.LongTensor` of shape `(batch_size,)`):
            Forwards of the diffusion model while the row was unfinished.
        tokens_per_forward (`torch.FloatTensor` of shape `(batch_size,)`):
            Generated tokens, up to and with EOS, over `nfe`.
        active_tokens (`torch.LongTensor` of shape `(batch_size,)`):
            Query positions that the diffusion model computed for the row, summed over its forwards.
        guider_forwards (`torch.LongTensor` of shape `(batch_size,)`):
            Forwards of the guider while the row was unfinished.
        drafts_judged (`torch.LongTensor` of shape `(batch_size,)`):
            Drafts that the guider was asked about.
        drafts_accepted (`torch.LongTensor` of shape `(batch_size,)`):
            Drafts in the accepted prefixes; a first draft written although it was refused is not among them.
        accepted_lengths (`list[list[int]]`, *optional*):
            Length of the accepted prefix in each step of each row. Only with a guider.
        gate_closed_at (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Step from which on the guider was not asked any more, -1 where it was to the end. Only with a gate.
        guider_time_share (`float`, *optional*):
            Share of the time of the whole decode spent in the guider, on a GPU in launching it. Only with a guider.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    active_tokens: torch.Tensor | None = None
    guider_forwards: torch.Tensor | None = None
    drafts_judged: torch.Tensor | None = None
    drafts_accepted: torch.Tensor | None = None
    accepted_lengths: list[list[int]] | None = None
    gate_closed_at: torch.Tensor | None = None
    guider_time_share: float | None = None
