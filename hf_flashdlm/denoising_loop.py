"""The loop: iterative unmasking of a canvas, block after block.

Owns the state of a decode and the one denoising loop. It calls only what it was handed: a denoiser, a window policy, a
schedule, an unmasking rule, processors. Knows nothing of which model it runs, which method its parts make up, that a
guider exists, or of configurations.

Shapes: B rows still unfinished, L canvas length, N candidate positions, V vocabulary. The canvas and the scores are
tensors on the model's device. Where a row stands are plain numbers, a [`Row`] each: they cost next to nothing beside a
forward, and one transfer per step, of the drafts and their confidence, keeps them up to date.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import torch

from .unmasking import negative_entropy, select
from .windows import WindowPolicy


@dataclass
class Row:
    """Where one unfinished row stands."""

    index: int  # of the caller's batch
    tokens: list[int]  # the canvas, masks included
    masked: bytearray  # for each position whether it is masked
    frontiers: list[int]  # first masked position now, and as the k-th last forward saw it (0: none)
    written: list[int] = field(default_factory=list)  # positions written at the last step
    written_entropy: float = 0.0  # the highest of their distributions, where it is measured
    block_index: int = -1  # the block being unmasked, -1 before the first step
    block_start: int = 0
    block_stop: int = 0  # exclusive
    block_masked: int = 0  # masked positions up to the block's end when the row entered it
    block_nfe: int = 0  # forwards since then
    step: int = 0  # where the block's schedule stands
    nfe: int = 0  # forwards so far
    active_tokens: int = 0  # query positions computed so far
    due: int = 0  # the next step writes all drafts before this position

    @property
    def frontier(self) -> int:
        """The first masked position; the length of the canvas where nothing is masked."""
        return self.frontiers[0]

    def write(self, drafts: dict[int, int]) -> None:
        """Write tokens at masked positions, in order."""
        self.written = list(drafts)
        for position, token in drafts.items():
            self.tokens[position], self.masked[position] = token, False
        frontier = self.masked.find(True, self.frontier)
        self.frontiers = [len(self.masked) if frontier < 0 else frontier, *self.frontiers[:-1]]


@dataclass
class DenoisingState:
    """The canvas and where its rows stand; a step changes both."""

    canvas: torch.LongTensor  # (B, L) token ids, masks included
    rows: list[Row]

    @classmethod
    def start(cls, canvas: torch.LongTensor, mask_token_id: int, history: int) -> "DenoisingState":
        """The state before the first step, for a canvas `(B, L)` with at least one mask in every row."""
        rows = []
        for index, tokens in enumerate(canvas.tolist()):
            masked = bytearray(token == mask_token_id for token in tokens)
            rows.append(Row(index, tokens, masked, [masked.find(True)] + [0] * history))
        return cls(canvas, rows)

    def write(self) -> None:
        """Write on the canvas what the rows have written at this step."""
        length = self.canvas.shape[1]
        places = [length * index + position for index, row in enumerate(self.rows) for position in row.written]
        tokens = [row.tokens[position] for row in self.rows for position in row.written]
        places, tokens = (torch.tensor(one, dtype=torch.long).to(self.canvas.device) for one in (places, tokens))
        self.canvas = self.canvas.put(places, tokens)  # not in place: who was shown the old one may have kept it

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.canvas = self.canvas[indices.to(self.canvas.device)]
        self.rows = [self.rows[index] for index in indices.tolist()]


@dataclass(frozen=True)
class Blocks:
    r"""
    How the generated region is tiled, and where a step may write.

    Args:
        prompt_length (`int`): Where the first block starts. Masks inside the prompt belong to it.
        block_length (`int`): Length of every block; the last may be cut by the end of the canvas.
        lookahead (`int`, *optional*): Candidates are so many positions from the frontier on, whatever the block.
        synchronous (`bool`): Rows that have finished a block wait for the others before they enter the next.
    """

    prompt_length: int
    block_length: int
    lookahead: int | None = None
    synchronous: bool = False

    def enter(self, rows: list[Row]) -> None:
        """Renew what depends on the block, for the rows whose frontier has reached another one."""
        slowest = min(row.frontier for row in rows)
        for row in rows:
            frontier = slowest if self.synchronous else row.frontier
            index = max(frontier - self.prompt_length, 0) // self.block_length
            if index != row.block_index:
                row.block_index = index
                row.block_start = self.prompt_length + index * self.block_length
                row.block_stop = min(row.block_start + self.block_length, len(row.masked))
                row.block_masked = row.masked.count(True, 0, row.block_stop)
                row.block_nfe = row.step = 0

    def candidates(self, rows: list[Row], ends: list[int]) -> tuple[list[range], list[bytearray]]:
        """
        Consecutive positions from each row's frontier on, before its end of `ends`, as many for all rows; and for each
        of them whether it may be written.
        """
        stops = [min(self._stop(row), end) for row, end in zip(rows, ends, strict=True)]
        count = max(stop - row.frontier for row, stop in zip(rows, stops, strict=True))
        # Rows near the end of the canvas start earlier: what lies before their frontier is no candidate.
        starts = [min(row.frontier, len(row.masked) - count) for row in rows]
        candidate = [
            row.masked[start:stop].ljust(count, b"\0") for row, start, stop in zip(rows, starts, stops, strict=True)
        ]
        return [range(start, start + count) for start in starts], candidate

    def _stop(self, row: Row) -> int:
        return row.block_stop if self.lookahead is None else row.frontier + self.lookahead


@dataclass(frozen=True)
class Method:
    r"""
    A decoding method of the field: a choice of parts.

    Args:
        window_policy ([`WindowPolicy`]): Which positions a forward recomputes.
        blocks ([`Blocks`]): Which positions may be written.
        schedule (`Callable`): `row -> (quota, next step)`, see [`UniformSchedule`].
        rule (`Callable`, *optional*): How many of the most confident candidates are written, see [`select`].
    """

    window_policy: WindowPolicy
    blocks: Blocks
    schedule: Callable
    rule: Callable | None = None


def denoise(
    state: DenoisingState,
    denoiser: Callable,
    method: Method,
    processors: Callable,
    drafter: Callable,
    after_step: Callable,
) -> None:
    r"""
    Unmask the canvas, step by step, until every row is finished.

    1. The window policy says which positions are recomputed, the blocks which are scored.
    2. One forward of the model scores them.
    3. The processors, a guider among them, change or refuse scores; a token is drafted for each position.
    4. The most confident candidates are written, as many as schedule and rule say.
    5. Rows that are finished leave the batch.

    Args:
        state ([`DenoisingState`]): From [`DenoisingState.start`].
        denoiser (`Callable`): `(canvas, windows, positions, frontier) -> (scores (B, N, V), query positions computed
            in each row)`, with `batch_select_indices`, see [`Denoiser`]. Positions are a range for each row.
        method ([`Method`]): The parts that decide.
        processors (`Callable`): `(canvas, scores, positions=, frontier=, candidate=) -> scores`, with
            `batch_select_indices`, see [`CanvasProcessors`].
        drafter (`Callable`): `scores -> (token ids, confidence)`, both `(B, N)`; `-inf` refuses a position.
        after_step (`Callable`): Is shown the state after each step and returns for each row whether it is finished.

    Raises:
        RuntimeError: If processors refuse every candidate of a row, so that it could never finish.
    """
    while state.rows:
        # 1. windows
        method.blocks.enter(state.rows)
        windows = [method.window_policy(row) for row in state.rows]
        positions, candidate = method.blocks.candidates(state.rows, [window.hi for window in windows])
        # 2. one forward
        frontier = [row.frontier for row in state.rows]
        scores, computed = denoiser(state.canvas, windows, positions, frontier)
        # 3. drafts
        entropy = -negative_entropy(scores) if method.window_policy.needs_entropy else None
        scores = processors(state.canvas, scores, positions=positions, frontier=frontier, candidate=candidate)
        drafts = _transfer(*drafter(scores), entropy)
        # 4. unmasking
        for row, num_queries, *numbers in zip(state.rows, computed, positions, candidate, *drafts, strict=True):
            _unmask(row, method, *numbers)
            row.block_nfe, row.nfe = row.block_nfe + 1, row.nfe + 1
            row.active_tokens += num_queries
        state.write()
        # 5. finished rows leave
        finished = after_step(state)
        if any(finished):
            unfinished = _unfinished(finished)
            for part in (state, denoiser, processors):
                part.batch_select_indices(unfinished)


def _transfer(token_ids: torch.LongTensor, confidence: torch.Tensor, entropy: torch.Tensor | None) -> list:
    """Drafts, their confidence and the entropy, where it is measured, as numbers: the one transfer of a step."""
    numbers = [token_ids, confidence] if entropy is None else [token_ids, confidence, entropy]
    return torch.stack([one.to(confidence.dtype) for one in numbers]).tolist()  # a token id is exact as a float, too


def _unmask(
    row: Row,
    method: Method,
    positions: range,
    candidate: bytearray,
    token_ids: list[float],
    confidence: list[float],
    entropy: list[float] | None = None,
) -> None:
    """Write those of a row's drafts that schedule and rule choose."""
    quota, row.step = method.schedule(row)
    places = select(confidence, candidate, quota, method.rule)
    if row.due > row.frontier:
        due = (place for place, position in enumerate(positions) if candidate[place] and position < row.due)
        places = sorted({*places, *(place for place in due if confidence[place] > -inf)})
    if not places and quota > 0 and any(candidate):
        raise RuntimeError(
            f"Row {row.index} could not unmask any position: every candidate was refused or has no finite score. "
            "A logits processor must leave each unfinished row a candidate other than the mask token."
        )
    row.write({positions[place]: int(token_ids[place]) for place in places})
    if entropy is not None:
        row.written_entropy = max((entropy[place] for place in places), default=0.0)


def _unfinished(finished: list[bool]) -> torch.LongTensor:
    """The unfinished rows, the last of them in the places of those that leave: a cache has few states to move."""
    count = finished.count(False)
    last = [index for index, one in enumerate(finished) if not one and index >= count]
    return torch.tensor([last.pop() if one else index for index, one in enumerate(finished[:count])], dtype=torch.long)
