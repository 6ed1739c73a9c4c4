"""What a decode returns, and when a row is finished.

Owns the output fields and their arithmetic, and the rule that ends a row. Knows nothing of how tokens are chosen.
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

    sequences: torch.LongTensor | None = None
    nfe: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    active_tokens: torch.LongTensor | None = None
    guider_forwards: torch.LongTensor | None = None
    drafts_judged: torch.LongTensor | None = None
    drafts_accepted: torch.LongTensor | None = None
    accepted_lengths: list[list[int]] | None = None
    gate_closed_at: torch.LongTensor | None = None
    guider_time_share: float | None = None


class Rows:
    r"""
    Decides after each step which rows are finished, and keeps what they end with.

    A row is finished when nothing is masked any more, or when an end token has been written and nothing left of it is
    masked; stopping criteria are asked about every prefix that has become clean.

    Args:
        state ([`DenoisingState`]): The state before the first step.
        prompt_length (`int`): End tokens count from here on, and only where the canvas was masked.
        pad_token_id (`int`): Fills a row behind its end.
        eos_token_ids (`torch.LongTensor`, *optional*): End tokens; without them rows fill their canvas.
        stopping_criteria (`list`): Criteria of the host, asked with `(ids (1, length), None)`.
    """

    def __init__(self, state, prompt_length: int, pad_token_id: int, eos_token_ids=None, stopping_criteria=()):
        self.sequences = torch.full_like(state.tokens, pad_token_id)
        self.generated = state.masked
        self.can_end = state.masked & (torch.arange(state.masked.shape[1]) >= prompt_length)
        self.eos_token_ids = eos_token_ids
        self.stopping_criteria = stopping_criteria
        self.clean = state.frontiers[:, 0].clone()  # (B,) prefix that was clean at the last step
        zeros = torch.zeros_like(state.rows)
        self.lengths, self.nfe, self.active_tokens = zeros.clone(), zeros.clone(), zeros.clone()

    def update(self, state) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """The length up to which each row's text is final, and whether the row is finished; both of shape `(B,)`."""
        length = state.masked.shape[1]
        final = state.frontiers[:, 0].clone()
        finished = final == length
        if self.eos_token_ids is not None:
            ends = torch.isin(state.tokens, self.eos_token_ids) & self.can_end[state.rows]
            first = torch.where(ends.any(1), ends.int().argmax(1) + 1, length + 1)
            finished |= first <= final
            final = torch.minimum(final, first)
        for index, row in enumerate(state.rows.tolist() if self.stopping_criteria else []):
            for end in range(int(self.clean[row]) + 1, int(final[index]) + 1):
                prefix = state.canvas[index : index + 1, :end]
                if any(bool(criterion(prefix, None).all()) for criterion in self.stopping_criteria):
                    final[index], finished[index] = end, True
                    break
        self.clean[state.rows] = final
        self._keep(state, final, finished)
        return final, finished

    def _keep(self, state, final, finished) -> None:
        for index in finished.nonzero().flatten().tolist():
            row, end = int(state.rows[index]), int(final[index])
            self.sequences[row, :end] = state.tokens[index, :end]
            self.lengths[row], self.nfe[row] = self.generated[row, :end].sum(), state.nfe[index]
            self.active_tokens[row] = state.active_tokens[index]
            self.clean[row] = end

    def output(self, device, skip: int = 0, **guider_statistics) -> DiffusionGenerationOutput:
        """The output of the call, on `device`, without the first `skip` columns, cut behind its longest row."""
        longest = int(self.clean.max())
        return DiffusionGenerationOutput(
            sequences=self.sequences[:, skip:longest].to(device),
            nfe=self.nfe,
            tokens_per_forward=self.lengths / self.nfe,
            active_tokens=self.active_tokens,
            **guider_statistics,
        )
