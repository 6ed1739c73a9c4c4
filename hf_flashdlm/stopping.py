"""When a row is finished, and what it ends with.

Owns the rule that ends a row, and the counts and tokens that it leaves with. Knows nothing of how tokens are chosen.
"""

import torch

from .generation_output import DiffusionGenerationOutput


class RowEnds:
    r"""
    Decides after each step which rows are finished, and keeps what they end with.

    A row is finished when nothing is masked any more, or when an end token has been written and nothing left of it is
    masked; stopping criteria are asked about every prefix that has become clean.

    Args:
        state ([`DenoisingState`]): The state before the first step.
        prompt_length (`int`): End tokens count from here on.
        pad_token_id (`int`): Fills a row behind its end.
        eos_token_ids (`Iterable[int]`, *optional*): End tokens; without them rows fill their canvas.
        stopping_criteria (`list`): Criteria of the host, asked with `(ids (1, length), None)`.
    """

    def __init__(self, state, prompt_length: int, pad_token_id: int, eos_token_ids=(), stopping_criteria=()):
        self.prompt_length, self.pad_token_id = prompt_length, pad_token_id
        self.eos_token_ids = set(eos_token_ids)
        self.stopping_criteria = stopping_criteria
        self.generated = [bytes(row.masked) for row in state.rows]  # for each position whether it was to be filled
        self.clean = [row.frontier for row in state.rows]  # prefix that was clean at the last step
        self.ends = [len(row.masked) + 1 for row in state.rows]  # behind the first end token written
        self.finished: list = [None] * len(state.rows)

    def update(self, state) -> tuple[list[int], list[bool]]:
        """For each row the length up to which its text is final, and whether it is finished."""
        rows = [self._update(index, row, state.canvas) for index, row in enumerate(state.rows)]
        return [final for final, _ in rows], [finished for _, finished in rows]

    def _update(self, index: int, row, canvas: torch.LongTensor) -> tuple[int, bool]:
        for position in row.written:
            if row.tokens[position] in self.eos_token_ids and position >= self.prompt_length:
                self.ends[row.index] = min(self.ends[row.index], position + 1)
        final = min(row.frontier, self.ends[row.index])
        finished = final in (self.ends[row.index], len(row.masked))
        if self.stopping_criteria:
            for end in range(self.clean[row.index] + 1, final + 1):
                prefix = canvas[index : index + 1, :end]
                if any(bool(criterion(prefix, None).all()) for criterion in self.stopping_criteria):
                    final, finished = end, True
                    break
        self.clean[row.index] = final
        if finished:
            self.finished[row.index] = row
        return final, finished

    def output(self, device, skip: int = 0, **guider_statistics) -> DiffusionGenerationOutput:
        """The output of the call, on `device`, without the first `skip` columns, cut behind its longest row."""
        longest = max(self.clean)
        sequences = [
            row.tokens[skip:end] + [self.pad_token_id] * (longest - end)
            for row, end in zip(self.finished, self.clean, strict=True)
        ]
        lengths = [sum(one[:end]) for one, end in zip(self.generated, self.clean, strict=True)]
        nfe = torch.tensor([row.nfe for row in self.finished])
        return DiffusionGenerationOutput(
            sequences=torch.tensor(sequences, device=device),
            nfe=nfe,
            tokens_per_forward=torch.tensor(lengths) / nfe,
            active_tokens=torch.tensor([row.active_tokens for row in self.finished]),
            **guider_statistics,
        )
