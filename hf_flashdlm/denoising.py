"""The loop: iterative unmasking of a canvas, block after block.

Owns the state of a decode and the one denoising loop. It calls only what it was handed: a denoiser, a window policy, a
schedule, an unmasking rule, processors. Knows nothing of which model it runs, which method its parts make up, that a
guider exists, or of configurations.

Shapes: B rows still unfinished, L canvas length, N candidate positions, V vocabulary. The canvas and the scores live
on the model's device; all bookkeeping is on the CPU and costs one transfer, the canvas, per step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .unmasking import negative_entropy, select
from .windows import WindowPolicy


@dataclass(frozen=True)
class DenoisingState:
    """Where the unfinished rows stand. A step makes a new one; only the cache and the guider mutate."""

    canvas: torch.LongTensor  # (B, L) token ids, masks included
    tokens: torch.LongTensor  # (B, L) the canvas on the CPU
    masked: torch.BoolTensor  # (B, L) on the CPU
    previously_masked: torch.BoolTensor  # (B, L) as the last forward saw it
    rows: torch.LongTensor  # (B,) which row of the caller's batch each row is
    frontiers: torch.LongTensor  # (B, 1 + H) first masked position now, and as the k-th last forward saw it (0: none)
    block_index: torch.LongTensor  # (B,) the block being unmasked, -1 before the first step
    block_start: torch.LongTensor  # (B,)
    block_stop: torch.LongTensor  # (B,) exclusive
    block_masked: torch.LongTensor  # (B,) masked positions up to the block's end when the row entered it
    block_nfe: torch.LongTensor  # (B,) forwards since then
    step: torch.LongTensor  # (B,) where the block's schedule stands
    nfe: torch.LongTensor  # (B,) forwards so far
    active_tokens: torch.LongTensor  # (B,) query positions computed so far
    written_entropy: torch.Tensor  # (B,) highest entropy of a token written at the last step, where it is measured

    def __getitem__(self, indices: torch.LongTensor) -> "DenoisingState":
        """The state of the rows `indices`."""
        values = {name: value[indices.to(value.device)] for name, value in vars(self).items()}
        return DenoisingState(**values)


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

    def enter(self, state: DenoisingState) -> DenoisingState:
        """Renew the fields of the state that depend on the block its frontier has reached."""
        index = (state.frontiers[:, 0] - self.prompt_length).clamp_min(0) // self.block_length
        if self.synchronous:
            index = index.amin().expand_as(index)
        entered = index != state.block_index
        if not entered.any():
            return state
        start = self.prompt_length + index * self.block_length
        stop = (start + self.block_length).clamp_max(state.masked.shape[1])
        masked = (state.masked & (torch.arange(state.masked.shape[1]) < stop[:, None])).sum(1)
        return replace(
            state,
            block_index=index,
            block_start=start,
            block_stop=stop,
            block_masked=torch.where(entered, masked, state.block_masked),
            block_nfe=torch.where(entered, 0, state.block_nfe),
            step=torch.where(entered, 0, state.step),
        )

    def candidates(self, state: DenoisingState, hi: torch.LongTensor) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Consecutive positions `(B, N)` from each row's frontier on, and which of them may be written; on the CPU."""
        start = state.frontiers[:, 0]
        stop = state.block_stop if self.lookahead is None else start + self.lookahead
        stop = torch.minimum(stop, hi)
        num_positions = int((stop - start).max())
        # Rows near the end of the canvas start earlier: what lies before their frontier is no candidate.
        positions = start.clamp_max(state.masked.shape[1] - num_positions)[:, None] + torch.arange(num_positions)
        candidate = state.masked.gather(1, positions) & (positions < stop[:, None])
        return positions, candidate & (positions >= start[:, None])


@dataclass(frozen=True)
class Method:
    r"""
    A decoding method of the field: a choice of parts.

    Args:
        window_policy ([`WindowPolicy`]): Which positions a forward recomputes.
        blocks ([`Blocks`]): Which positions may be written.
        schedule (`Callable`): `state -> (quota, next step)`, see [`UniformSchedule`].
        rule (`Callable`, *optional*): How many of the most confident candidates are written, see [`select`].
    """

    window_policy: WindowPolicy
    blocks: Blocks
    schedule: Callable
    rule: Callable | None = None


def start_denoising(canvas: torch.LongTensor, mask_token_id: int, history: int) -> DenoisingState:
    """The state before the first step, for a canvas `(B, L)` with at least one mask in every row."""
    tokens = canvas.cpu()
    masked = tokens == mask_token_id
    zeros = torch.zeros(len(canvas), dtype=torch.long)
    frontiers = torch.zeros(len(canvas), 1 + history, dtype=torch.long)
    frontiers[:, 0] = masked.int().argmax(1)
    return DenoisingState(
        canvas=canvas,
        tokens=tokens,
        masked=masked,
        previously_masked=masked,
        rows=torch.arange(len(canvas)),
        frontiers=frontiers,
        block_index=zeros - 1,
        block_start=zeros,
        block_stop=zeros,
        block_masked=zeros,
        block_nfe=zeros,
        step=zeros,
        nfe=zeros,
        active_tokens=zeros,
        written_entropy=torch.zeros(len(canvas)),
    )


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
        state ([`DenoisingState`]): From [`start_denoising`].
        denoiser (`Callable`): `(canvas, window, positions, frontier) -> (scores (B, N, V), query positions computed
            (B,))`, with `batch_select_indices`, see [`Denoiser`].
        method ([`Method`]): The parts that decide.
        processors (`Callable`): `(canvas, scores, positions=, frontier=, candidate=) -> scores`, with
            `batch_select_indices`.
        drafter (`Callable`): `scores -> (token ids, confidence)`, both `(B, N)`; `-inf` refuses a position.
        after_step (`Callable`): Is shown the state after each step and returns which rows are finished, `(B,)`.

    Raises:
        RuntimeError: If processors refuse every candidate of a row, so that it could never finish.
    """
    while len(state.rows):
        # 1. windows
        state = method.blocks.enter(state)
        window = method.window_policy(state)
        positions, candidate = method.blocks.candidates(state, window.hi)
        # 2. one forward
        frontier = state.frontiers[:, 0]
        scores, computed = denoiser(state.canvas, window, positions, frontier)
        # 3. drafts
        entropy = -negative_entropy(scores) if method.window_policy.needs_entropy else None
        scores = processors(state.canvas, scores, positions=positions, frontier=frontier, candidate=candidate)
        token_ids, confidence = drafter(scores)
        # 4. unmasking
        quota, next_step = method.schedule(state)
        unmask = select(confidence, candidate.to(confidence.device), quota.to(confidence.device), method.rule)
        written = _write(state, positions, token_ids, unmask, due=candidate.any(1) & (quota > 0))
        if entropy is not None:
            written["written_entropy"] = entropy.masked_fill(~unmask, 0).amax(1).cpu()
        state = replace(
            state,
            **written,
            step=next_step,
            block_nfe=state.block_nfe + 1,
            nfe=state.nfe + 1,
            active_tokens=state.active_tokens + computed,
        )
        # 5. finished rows leave
        finished = after_step(state)
        if finished.any():
            unfinished = (~finished).nonzero().squeeze(1)
            state = state[unfinished]
            denoiser.batch_select_indices(unfinished)
            processors.batch_select_indices(unfinished)


def _write(state: DenoisingState, positions, token_ids, unmask, due: torch.BoolTensor) -> dict:
    """The new canvas with the chosen tokens, and the new frontiers: the one transfer of a step."""
    positions = positions.to(state.canvas.device)
    written = torch.where(unmask, token_ids, state.canvas.gather(1, positions))
    canvas = state.canvas.scatter(1, positions, written)
    tokens = canvas.cpu()
    masked = state.masked & (tokens == state.tokens)
    stuck = due & (masked == state.masked).all(1)
    if stuck.any():
        raise RuntimeError(
            f"Row {int(state.rows[stuck][0])} could not unmask any position: every candidate was refused or has no "
            "finite score. A logits processor must leave each unfinished row a candidate other than the mask token."
        )
    frontier = torch.where(masked.any(1), masked.int().argmax(1), masked.shape[1])[:, None]
    return {
        "canvas": canvas,
        "tokens": tokens,
        "masked": masked,
        "previously_masked": state.masked,
        "frontiers": torch.cat([frontier, state.frontiers[:, :-1]], 1),
    }
