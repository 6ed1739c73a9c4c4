"""The loop: iterative unmasking of a canvas, block after block.

Owns the state of a decode and the one denoising loop. It calls only what it is given: a denoiser, a window policy, a
schedule, an unmasking rule, processors. Knows nothing of which model it runs, which method its parts make up, that a
guider exists, or of configurations.

Shapes: B rows still unfinished, L canvas length, N candidate positions, V vocabulary. The canvas and the scores are
tensors on the model's device. The state of a row is a [`Row`] of Python numbers. They cost next to nothing compared
with a forward, and one transfer per step, of the drafts and their confidence, keeps them up to date.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

import torch

from .blocks import Blocks
from .schedule import Schedule
from .unmasking import Drafts, MostConfident, TokenEditing, UnmaskingRule, negative_entropy
from .windows import Window, WindowPolicy


@dataclass
class Row:
    """The state of one unfinished row."""

    index: int  # of the caller's batch
    tokens: list[int]  # the canvas, masks included
    masked: bytearray  # for each position whether it is masked
    open: bytearray  # for each position whether it may still be written; `masked` itself, if no token is edited
    prompt_length: int  # where the generated region begins, the same column for all rows
    block_origin: int  # the position that blocks are counted from: no block crosses a multiple of its length
    frontiers: list[int]  # first open position now, and as the k-th last forward saw it (0: none)
    written: list[int] = field(default_factory=list)  # positions written at the last step
    closed: list[int] = field(default_factory=list)  # positions that became final at the last step
    writes: list[dict[int, int]] = field(default_factory=list)  # for each step the tokens written, by position
    probability: dict[int, float] = field(default_factory=dict)  # the model's of the tokens written, if measured
    written_entropy: float = 0.0  # the highest entropy of their distributions, if measured
    block_index: int = -1  # the block being unmasked, -1 before the first step
    block_start: int = 0
    block_stop: int = 0  # exclusive
    block_masked: int = 0  # masked positions up to the block's end when the row entered it
    block_nfe: int = 0  # forwards since the row entered it
    block_checks: int = 0  # those of them that saw no mask in it
    step: int = 0  # the next step of the block's schedule
    nfe: int = 0  # forwards so far
    active_tokens: int = 0  # query positions computed so far
    due: int = 0  # the next step writes all drafts before this position

    @property
    def frontier(self) -> int:
        """The first open position, which is the first masked one if no token is edited; else the canvas length."""
        return self.frontiers[0]

    def write(self, drafts: dict[int, int], closed: Iterable[int] | None = None) -> None:
        """Write tokens at open positions, in order, and close the positions `closed`, by default those written."""
        self.written = list(drafts)
        self.writes.append(drafts)
        self.closed = self.written if closed is None else list(closed)
        for position, token in drafts.items():
            self.tokens[position], self.masked[position] = token, False
        for position in self.closed:
            self.open[position] = False
        frontier = self.open.find(True, self.frontier)
        self.frontiers = [len(self.open) if frontier < 0 else frontier, *self.frontiers[:-1]]


@dataclass
class DenoisingState:
    """The canvas and the states of its rows; a step changes both."""

    canvas: torch.Tensor  # (B, L) token ids, masks included
    rows: list[Row]

    @classmethod
    def start(
        cls,
        canvas: torch.Tensor,
        mask_token_id: int,
        prompt_length: int,
        history: int,
        block_origins: list[int] | None = None,
        edits_tokens: bool = False,
    ) -> "DenoisingState":
        """
        The state before the first step, for a canvas `(B, L)` with at least one mask in every row. Blocks are counted
        from `block_origins` on, by default from the end of the prompt.
        """
        rows = []
        for index, tokens in enumerate(canvas.tolist()):
            masked = bytearray(token == mask_token_id for token in tokens)
            positions = masked.copy() if edits_tokens else masked
            origin = prompt_length if block_origins is None else block_origins[index]
            frontiers = [masked.find(True)] + [0] * history
            rows.append(Row(index, tokens, masked, positions, prompt_length, origin, frontiers))
        return cls(canvas, rows)

    def write(self) -> None:
        """Write on the canvas what the rows have written at this step."""
        length = self.canvas.shape[1]
        places = [length * index + position for index, row in enumerate(self.rows) for position in row.written]
        tokens = [row.tokens[position] for row in self.rows for position in row.written]
        index, source = torch.tensor([places, tokens], dtype=torch.long).to(self.canvas.device)
        self.canvas = self.canvas.put(index, source)  # not in place: a streamer or processor may hold the old canvas

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.canvas = self.canvas[indices.to(self.canvas.device)]
        self.rows = [self.rows[index] for index in indices.tolist()]


@dataclass(frozen=True)
class Method:
    r"""
    A decoding method: a choice of parts.

    Args:
        window_policy ([`WindowPolicy`]): Which positions a forward recomputes.
        blocks ([`Blocks`]): Which positions may be written.
        schedule ([`Schedule`]): The minimum number of tokens that a row writes.
        rule ([`UnmaskingRule`], *optional*): Which drafts are written; by default the most confident ones.
        editing ([`TokenEditing`], *optional*):
            Which of the tokens that a block already holds are written anew, and when the block is final.
    """

    window_policy: WindowPolicy
    blocks: Blocks
    schedule: Schedule
    rule: UnmaskingRule = MostConfident()
    editing: TokenEditing | None = None


class Scorer(Protocol):
    """Scores canvas positions with one forward of a model, see [`Denoiser`]."""

    def __call__(
        self, canvas: torch.Tensor, windows: list[Window], positions: list[range], frontier: list[int]
    ) -> tuple[torch.Tensor, list[int]]: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class ScoreProcessor(Protocol):
    """Changes or refuses scores, see [`CanvasProcessors`]."""

    def __call__(
        self,
        canvas: torch.Tensor,
        scores: torch.Tensor,
        positions: list[range],
        frontier: list[int],
        candidate: list[bytearray],
    ) -> torch.Tensor: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


def denoise(
    state: DenoisingState,
    denoiser: Scorer,
    method: Method,
    processors: ScoreProcessor,
    drafter: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    after_step: Callable[[DenoisingState], list[bool]],
    keeps_probability: bool = False,
) -> None:
    r"""
    Unmask the canvas, step by step, until every row is finished.

    1. The window policy says which positions are recomputed, the blocks which are scored.
    2. One forward of the model scores them.
    3. The processors, a guider among them, change or refuse scores; a token is drafted for each position.
    4. The blocks say which drafts may be written, schedule and rule which of them are.
    5. Rows that are finished leave the batch.

    Args:
        state ([`DenoisingState`]): From [`DenoisingState.start`].
        denoiser ([`Scorer`]): Returns scores of shape `(B, N, V)` and the query positions computed in each row.
        method ([`Method`]): The parts that decide.
        processors ([`ScoreProcessor`]): Return scores of the same shape.
        drafter (`Callable`): `scores -> (token ids, confidence)`, both `(B, N)`; `-inf` refuses a position.
        after_step (`Callable`): Gets the state after each step and returns for each row whether it is finished.
        keeps_probability (`bool`): Whether the rows keep the model's probability of what is written.

    Raises:
        RuntimeError: If processors refuse every candidate of a row, so that it could never finish, or if its scores
            are not finite.
        ValueError: If a part returns what no step can use; the message names the part.
    """
    while state.rows:
        # 1. windows
        method.blocks.enter(state.rows)
        windows = [_window(method.window_policy, row) for row in state.rows]
        positions, candidate = method.blocks.candidates(state.rows, [window.hi for window in windows])
        # 2. one forward
        frontier = [row.frontier for row in state.rows]
        logits, computed = denoiser(state.canvas, windows, positions, frontier)
        # 3. drafts
        measures = {"entropy": -negative_entropy(logits)} if method.window_policy.needs_entropy else {}
        softmax = logits.softmax(-1) if keeps_probability else None  # a processor may write into the logits
        scores = processors(state.canvas, logits, positions=positions, frontier=frontier, candidate=candidate)
        token_ids, confidence = drafter(scores)
        if softmax is not None:
            measures["probability"] = softmax.gather(-1, token_ids[..., None]).squeeze(-1)
        drafts = _transfer(token_ids, confidence, *measures.values())
        _check_finite(state.rows, candidate, drafts[1], logits, scores)
        # 4. unmasking
        for row, num_queries, scored, may, ids, sure, *values in zip(
            state.rows, computed, positions, candidate, *drafts, strict=True
        ):
            _unmask(row, method, scored, may, ids, sure)
            _measure(row, scored, dict(zip(measures, values, strict=True)))
            row.block_nfe, row.nfe = row.block_nfe + 1, row.nfe + 1
            row.active_tokens += num_queries
        state.write()
        # 5. finished rows leave
        finished = after_step(state)
        if any(finished):
            unfinished = _unfinished(finished)
            state.batch_select_indices(unfinished)
            denoiser.batch_select_indices(unfinished)
            processors.batch_select_indices(unfinished)


def _transfer(*numbers: torch.Tensor) -> list:
    """Drafts, their confidence and what else is measured as Python numbers: the only transfer of a step."""
    return torch.stack(numbers).tolist()  # in the dtype of the confidence: token ids are exact as floats


def _check_finite(rows: list[Row], candidate: list[bytearray], confidence: list[list[float]], logits, scores) -> None:
    """Say where the scores come from that are not numbers, if they leave a row without a candidate."""
    for index, (row, may, sure) in enumerate(zip(rows, candidate, confidence, strict=True)):
        places = [place for place, is_candidate in enumerate(may) if is_candidate]
        if not places or any(sure[place] > -inf for place in places):
            continue
        for name, given in (("The model", logits), ("A logits processor or the guider", scores)):
            if not (given[index, places].amax(-1) < inf).all():
                raise RuntimeError(
                    f"{name} gave row {row.index} scores that are not finite (NaN or infinite): check its weights and "
                    "their dtype, or its settings."
                )


def _window(policy: WindowPolicy, row: Row) -> Window:
    """The window of a row's next forward, checked."""
    window, length = policy(row), len(row.tokens)
    fits = isinstance(window, Window) and 0 <= window.frozen <= window.lo < window.hi <= window.attended <= length
    # A row that waits for the others has nothing to write. Masks left of the window are fed in any case.
    if not fits or window.frozen > row.frontier or not (row.frontier < window.hi or row.frontier >= row.block_stop):
        raise ValueError(
            "`window_policy` must return a `Window` with 0 <= frozen <= lo < hi <= attended <= canvas length and "
            f"frozen <= first mask < hi, here {length} and {row.frontier}, got {window} from {type(policy).__name__}."
        )
    return window


def _unmask(
    row: Row,
    method: Method,
    positions: range,
    candidate: bytearray,
    token_ids: list[float],
    confidence: list[float],
) -> None:
    """Write the drafts of a row that blocks, schedule and rule choose, and those that replace a token."""
    may_write = [position for position, may in zip(positions, candidate, strict=True) if may]
    able = [position for position in may_write if confidence[position - positions.start] > -inf]
    candidates = [position for position in able if row.masked[position]]
    drafts = Drafts(positions, list(map(int, token_ids)), confidence, candidates)
    is_refused = not candidates and any(row.masked[position] for position in may_write)
    if row.block_nfe == 0:
        method.blocks.cut(drafts, row)
    drafts.quota, row.step = _scheduled(method.schedule, row)
    if is_refused and drafts.quota > 0:
        raise RuntimeError(
            f"Row {row.index} could not unmask any position: every candidate was refused or has no finite score. "
            "A logits processor must leave each unfinished row a candidate other than the mask token."
        )
    chosen = _chosen(method.rule, drafts, row)
    if row.due > row.frontier:
        chosen = sorted({*chosen, *(position for position in drafts.candidates if position < row.due)})
    closed = None
    if method.editing is not None:
        chosen, closed = method.editing(
            drafts, row, chosen, [position for position in able if not row.masked[position]]
        )
    row.write({position: drafts.token_id(position) for position in chosen}, closed)


def _measure(row: Row, positions: range, measures: dict[str, list[float]]) -> None:
    """Keep what was measured at the positions that the row has just written."""
    for name, values in measures.items():
        written = {position: values[position - positions.start] for position in row.written}
        if name == "entropy":
            row.written_entropy = max(written.values(), default=0.0)
        else:
            row.probability |= written


def _scheduled(schedule: Schedule, row: Row) -> tuple[int, int]:
    """The answer of the schedule for a row, checked."""
    answer = schedule(row)
    if not isinstance(answer, tuple) or len(answer) != 2 or not all(isinstance(number, int) for number in answer):
        raise ValueError(
            "`schedule` must return two integers, the minimum number of tokens to write and the next step of the "
            f"block, got {answer!r} from {type(schedule).__name__}."
        )
    return answer


def _chosen(rule: UnmaskingRule, drafts: Drafts, row: Row) -> list[int]:
    """The positions that the rule chooses, in order, checked; at least one if the schedule asks for any."""
    answer = rule(drafts, row)
    chosen = sorted(set(answer)) if isinstance(answer, Iterable) else None
    if chosen is None or not set(drafts.candidates).issuperset(chosen):
        raise ValueError(
            f"`unmasking_rule` must return positions among `drafts.candidates`, here {drafts.candidates}, got "
            f"{answer!r} from {type(rule).__name__}."
        )
    return chosen or (drafts.ranked()[:1] if drafts.quota > 0 else [])


def _unfinished(finished: list[bool]) -> torch.Tensor:
    """The unfinished rows, the last of them in the places of finished rows, so that a cache moves few states."""
    count = finished.count(False)
    last = [index for index, is_finished in enumerate(finished) if not is_finished and index >= count]
    rows = [last.pop() if is_finished else index for index, is_finished in enumerate(finished[:count])]
    return torch.tensor(rows, dtype=torch.long)
