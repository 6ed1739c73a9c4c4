"""The gate of a guider: whether asking it pays.

Owns the trial of each row and its verdict. Knows nothing of models or scores: it is told, on the CPU, which positions
of a row may still be written.
"""

import torch


class Gate:
    r"""
    Decides in each row whether asking the guider pays: after `TRIAL` steps with it and as many without, it goes on
    asking if (tokens per step with) / (1 + cost ratio) is above (tokens per step without).

    Args:
        num_rows (`int`): Rows of the batch.
        canvas_length (`int`): Their length.
        cost_ratio (`float`): Cost of a guider's forward over one of the diffusion model.
    """

    TRIAL = 4

    def __init__(self, num_rows: int, canvas_length: int, cost_ratio: float):
        self.cost_ratio = cost_ratio
        self.steps = torch.zeros(num_rows, dtype=torch.long)
        self.open = torch.zeros(num_rows, canvas_length, dtype=torch.bool)  # what the last step might have written
        self.written = torch.zeros(num_rows, 2, dtype=torch.long)  # tokens, in the steps with the guider and without
        self.closed_at = torch.full((num_rows,), -1)

    def ask(
        self,
        rows: torch.LongTensor,
        positions: torch.LongTensor,
        frontier: torch.LongTensor,
        candidate: torch.BoolTensor,
    ) -> torch.BoolTensor:
        """Whether to ask in this step, for the rows `rows` of the batch; the rest as of [`ARGuider.__call__`]."""
        step, before = self.steps[rows], self.open[rows]
        # Only candidates are written, and where a row's candidates end never moves back: those of the last step that
        # are none any more have been written.
        now = before.scatter(1, positions, candidate) & (torch.arange(before.shape[1]) >= frontier[:, None])
        written = (before & ~now).sum(1)
        for phase in range(2):
            counted = (step > phase * self.TRIAL) & (step <= (phase + 1) * self.TRIAL)
            self.written[rows, phase] += torch.where(counted, written, 0)
        with_guider, without = self.written[rows].unbind(1)
        closes = (step == 2 * self.TRIAL) & (with_guider <= without * (1 + self.cost_ratio))
        self.closed_at[rows[closes]] = step[closes]
        self.open[rows] = now
        self.steps[rows] += 1
        trial_without = (step >= self.TRIAL) & (step < 2 * self.TRIAL)
        return ~trial_without & (self.closed_at[rows] < 0)
