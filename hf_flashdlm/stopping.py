"""When a row is finished, and what it ends with.

Owns the rule that ends a row, and the counts and tokens that it leaves with. Knows nothing of how tokens are chosen.
"""

from math import nan

import torch

from .generation_output import DiffusionGenerationOutput


class RowEnds:
    r"""
    Decides after each step which rows are finished, and keeps what they end with.

    A row is finished when nothing is masked any more, or when an end token has been written and nothing left of it is
    masked. Stopping criteria are asked after every step, see [`RowEnds.ask`]; what was given is never cut.

    Args:
        state ([`DenoisingState`]): The state before the first step.
        prompt_length (`int`): End tokens count from here on.
        pad_token_id (`int`): Fills a row after its end.
        eos_token_ids (`Iterable[int]`, *optional*): End tokens; without them rows fill their canvas.
        stopping_criteria (`list`): Criteria of Transformers or of the caller, called with `(ids, None)`.
        skip (`int`): Columns of the canvas that the caller's prompt does not have.
        limit (`int`, *optional*): A row that is clean up to this position is finished; by default the canvas length.
    """

    def __init__(  # noqa: PLR0913, what a call asks for
        self, state, prompt_length: int, pad_token_id: int, eos_token_ids=(), stopping_criteria=(), skip=0, limit=None
    ):
        self.prompt_length, self.pad_token_id, self.skip = prompt_length, pad_token_id, skip
        self.limit = len(state.rows[0].masked) if limit is None else limit
        self.eos_token_ids = set(eos_token_ids)
        self.stopping_criteria = stopping_criteria
        self.mask_token_id = state.rows[0].tokens[state.rows[0].frontier]
        self.rows = list(state.rows)  # of the caller's batch, whose tokens stay as the rows ended
        self.given = [list(row.tokens) for row in state.rows]  # the canvas before the first step
        self.generated = [bytes(row.masked) for row in state.rows]  # for each position whether it was to be filled
        self.clean = [row.frontier for row in state.rows]  # prefix that was clean at the last step
        self.ends = [len(row.masked) + 1 for row in state.rows]  # after the first end token written
        self.finished = [False] * len(state.rows)

    def update(self, state) -> tuple[list[int], list[bool]]:
        """For each row the length up to which its text is final, and whether it is finished."""
        before = list(self.clean)
        for row in state.rows:
            for position in row.closed:
                if row.tokens[position] in self.eos_token_ids and position >= self.prompt_length:
                    self.ends[row.index] = min(self.ends[row.index], position + 1)
            self.clean[row.index] = min(row.frontier, self.ends[row.index], self.limit)
            self.finished[row.index] = self.clean[row.index] in (self.ends[row.index], self.limit)
        if self.stopping_criteria:
            self.ask(state, before)
        indices = [row.index for row in state.rows]
        return [self.clean[index] for index in indices], [self.finished[index] for index in indices]

    def ask(self, state, before: list[int]) -> None:
        r"""
        Ask the stopping criteria as a decode from left to right would: about every length that a row's clean text has
        reached at this step, in order, and about the last one again where it has not grown.

        They are shown the caller's whole batch, its rows cut to that length. What is not clean yet is the mask token,
        what follows the end of a row the pad token. An answer for each row counts for the rows that have just reached
        the length; a single one counts for all.

        A row whose first generated token is not there yet is not ended: its masks up to that token are written at the
        next step.
        """
        first = self.prompt_length + 1
        lengths = {
            row.index: range(max(before[row.index] + 1, first), self.clean[row.index] + 1)
            or range(max(self.clean[row.index], first), max(self.clean[row.index], first) + 1)
            for row in state.rows
        }
        stopped: dict[int, int] = {}  # of each row: the length at which it is told to
        shown = self.shown(max(reached.stop for reached in lengths.values()), state.canvas.device)
        for length in sorted(set().union(*lengths.values())):
            reached = {index for index in lengths if length in lengths[index]} - stopped.keys()
            for criterion in self.stopping_criteria if reached else ():
                ids = shown[:, : length - self.skip].clone()  # it may write into what it is shown
                answer = self._answers(criterion(ids, None))
                for index in lengths if answer is True else [one for one in reached if answer and answer[one]]:
                    stopped.setdefault(index, length if index in reached else self.clean[index])
        for row in state.rows:
            if row.index in stopped and self.clean[row.index] < first:
                row.due = first
            elif row.index in stopped:
                self.clean[row.index], self.finished[row.index] = stopped[row.index], True

    def shown(self, length: int, device) -> torch.Tensor:
        """
        The caller's batch up to the position `length`, as criteria and processors are shown it: of each row its clean
        text, then mask tokens, or pad tokens if it is finished.
        """
        shown = []
        for row, clean, finished in zip(self.rows, self.clean, self.finished, strict=True):
            filler = self.pad_token_id if finished else self.mask_token_id
            shown.append((row.tokens[:clean] + [filler] * (length - clean))[self.skip : length])
        return torch.tensor(shown, device=device)

    def _answers(self, answer) -> bool | list[bool]:
        """What a criterion has answered, for the whole batch or for each of its rows."""
        if isinstance(answer, bool):
            return answer
        answers = torch.as_tensor(answer).bool()
        if answers.numel() == 1:  # which Transformers broadcasts
            return bool(answers)
        if answers.numel() != len(self.rows):
            raise ValueError(
                "A criterion of `stopping_criteria` must answer with a bool or with one for each of the "
                f"{len(self.rows)} rows, got shape {tuple(answers.shape)}."
            )
        return answers.flatten().tolist()

    def output(
        self, device, has_confidence=False, has_history=False, **guider_statistics
    ) -> DiffusionGenerationOutput:
        """The output of the call, on `device`, without the first `skip` columns, cut after its longest row."""
        longest = max(self.clean)

        def padded(values: list[list], filler) -> torch.Tensor:
            """For each row what it has up to its end, then `filler`."""
            rows = zip(values, self.clean, strict=True)
            return torch.tensor(
                [row[self.skip : end] + [filler] * (longest - end) for row, end in rows], device=device
            )

        sequences = padded([row.tokens for row in self.rows], self.pad_token_id)
        columns = range(longest)
        written_at = [
            {position: step for step, written in enumerate(row.writes) for position in written} for row in self.rows
        ]
        confidence = history = None
        if has_confidence:
            confidence = padded([[row.probability.get(column, nan) for column in columns] for row in self.rows], nan)
        if has_history:
            history = self._history(sequences)
        lengths = [sum(one[:end]) for one, end in zip(self.generated, self.clean, strict=True)]
        nfe = torch.tensor([row.nfe for row in self.rows])
        return DiffusionGenerationOutput(
            sequences=sequences,
            nfe=nfe,
            tokens_per_forward=torch.tensor(lengths) / nfe,
            active_tokens=torch.tensor([row.active_tokens for row in self.rows]),
            written_at=padded([[steps.get(column, -1) for column in columns] for steps in written_at], -1),
            confidence=confidence,
            history=history,
            **guider_statistics,
        )

    def _history(self, sequences: torch.Tensor) -> torch.Tensor:
        """The canvas after every step, `(num_steps, B, L)`, where a finished row looks as in `sequences`."""
        num_steps = max(len(row.writes) for row in self.rows)
        history = sequences.repeat(num_steps, 1, 1)
        for index, (row, given) in enumerate(zip(self.rows, self.given, strict=True)):
            for step, written in enumerate(row.writes[:-1]):
                for position, token in written.items():
                    given[position] = token
                canvas = given[self.skip :][: sequences.shape[1]]
                history[step, index] = torch.tensor(canvas, device=sequences.device)
        return history
