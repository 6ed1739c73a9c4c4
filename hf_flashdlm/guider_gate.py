"""The gate of a guider: whether asking it pays.

Owns the trial of each row and its verdict. Knows nothing of models or scores: it counts the masks that go.
"""

import torch


class Gate:
    r"""
    Decides in each row whether asking the guider pays: after `TRIAL` steps with it and as many without, it goes on
    asking if (tokens per step with) / (1 + cost ratio) is above (tokens per step without).

    Args:
        num_rows (`int`): Rows of the batch.
        cost_ratio (`float`): Cost of a guider's forward over one of the diffusion model.
    """

    TRIAL = 4

    def __init__(self, num_rows: int, cost_ratio: float):
        self.cost_ratio = cost_ratio
        self.steps = torch.zeros(num_rows, dtype=torch.long)
        self.closed_at = torch.full((num_rows,), -1)
        self.counts: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows, and what is masked in them

    def ask(self, rows: torch.Tensor, able: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        r"""
        Whether to ask in this step. Waits for the device at one step in each row, that of the verdict.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`): Rows of the batch, on the CPU.
            able (`torch.BoolTensor` of shape `(batch_size,)`): Which of them take this step, on the CPU.
            masked (`torch.BoolTensor` of shape `(batch_size, canvas_length)`): What is masked in each.

        Returns:
            `torch.BoolTensor` of shape `(batch_size,)`, on the CPU.
        """
        step = self.steps[rows]
        counted = (able & (step % self.TRIAL == 0) & (step <= 2 * self.TRIAL)).nonzero().squeeze(1)
        if len(counted):
            self.counts.append((rows[counted], masked.sum(1)[counted.to(masked.device)]))
        verdict = rows[able & (step == 2 * self.TRIAL)]
        if len(verdict):
            self._close(verdict)
        self.steps[rows[able]] += 1
        trial_without = (step >= self.TRIAL) & (step < 2 * self.TRIAL)
        return able & ~trial_without & (self.closed_at[rows] < 0)

    def _close(self, verdict: torch.Tensor) -> None:
        """Close the rows in which the steps with the guider have not repaid it."""
        left: dict[int, list[int]] = {}
        counts = torch.cat([masked for _, masked in self.counts]).tolist()
        for row, masked in zip(torch.cat([rows for rows, _ in self.counts]).tolist(), counts, strict=True):
            left.setdefault(row, []).append(masked)
        for row in verdict.tolist():
            before, between, after = left[row]
            if before - between <= (between - after) * (1 + self.cost_ratio):
                self.closed_at[row] = 2 * self.TRIAL
