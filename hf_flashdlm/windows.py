"""Window policies: which positions a denoising step recomputes, and which it freezes.

Owns the table "cache method -> [lo, hi)". Knows nothing of models, logits or how tokens are chosen; it reads where
each row stands and answers with positions.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Window:
    r"""
    What one forward computes, in canvas positions. All tensors are on the CPU.

    Args:
        lo (`torch.LongTensor` of shape `(batch_size,)`): First recomputed position of each row.
        hi (`torch.LongTensor` of shape `(batch_size,)`): End of the recomputed positions, exclusive.
        attended (`torch.LongTensor` of shape `(batch_size,)`): The queries of a row see its keys `[0, attended)`.
        frozen (`torch.LongTensor` of shape `(batch_size,)`):
            The states of `[0, frozen)` stay as they are. Less than before thaws them, for a refresh.
        scored (`torch.BoolTensor` of shape `(batch_size, canvas_length)`, *optional*):
            Recompute only what scores these positions, instead of all of `[lo, hi)`.
        scored_too (`bool`): Recompute these positions as well, where the logits are shifted.
    """

    lo: torch.LongTensor
    hi: torch.LongTensor
    attended: torch.LongTensor
    frozen: torch.LongTensor
    scored: torch.BoolTensor | None = None
    scored_too: bool = False


class WindowPolicy(Protocol):
    """A window policy reads a [`DenoisingState`] and returns the [`Window`] of its next forward."""

    history: int  # number of earlier forwards whose frontier the policy looks at
    synchronous: bool  # whether the rows of a batch enter a block together, so that their refreshes coincide
    needs_entropy: bool  # whether it reads `written_entropy`, which is only measured then

    def __call__(self, state) -> Window: ...


@dataclass(frozen=True)
class FullWindow:
    r"""
    Recompute the whole canvas at every step: no cache.

    Args:
        growing (`bool`): The canvas ends with the current block: what lies behind it is not seen.
    """

    growing: bool = False
    history: int = 0
    synchronous: bool = False
    needs_entropy: bool = False

    def __call__(self, state) -> Window:
        zeros = torch.zeros_like(state.rows)
        hi = state.block_stop if self.growing else zeros + state.canvas.shape[1]
        return Window(zeros, hi, hi, zeros)


@dataclass(frozen=True)
class BlockWindow:
    r"""
    Prefix and dual cache of Fast-dLLM (https://arxiv.org/abs/2505.22618, section 3.2): the first step of a block
    refreshes the whole canvas, the others recompute it from the block's start on, or the block alone.

    Args:
        dual (`bool`): Recompute the block alone; what lies right of it is attended with the states of the refresh.
    """

    dual: bool
    history: int = 0
    synchronous: bool = True
    needs_entropy: bool = False

    def __call__(self, state) -> Window:
        zeros = torch.zeros_like(state.rows)
        length = zeros + state.canvas.shape[1]
        refresh = state.block_nfe == 0
        lo = torch.where(refresh, 0, state.block_start)
        hi = torch.where(refresh, length, state.block_stop) if self.dual else length
        return Window(lo, hi, length, zeros)


@dataclass(frozen=True)
class FreeCacheWindow:
    r"""
    FreeCache (https://arxiv.org/abs/2505.21467, algorithm 1): only the first forward covers the canvas; afterwards the
    prompt and the finished blocks are frozen and the rest is recomputed.

    Args:
        prompt_length (`int`): End of the prompt, where the blocks begin.
        freeze_length (`int`): Finished text is frozen in pieces of this many tokens.
        freeze_lag (`int`): A piece is frozen once this many forwards have seen it finished. With 0, as in the
            paper's code, the states frozen for the tokens written last are still those of mask tokens.
        left_margin (`int`): Finished tokens before the frozen ones' end that are still recomputed.
        right_window (`int`, *optional*): Recompute only this many positions from the frontier on; by default all.
        attend_stale (`bool`): Whether positions right of the window are attended with the states they had last;
            otherwise they are not seen at all.
        growing (`bool`): The canvas ends with the current block: what lies behind it is not seen.
        refresh_blocks (`int`, *optional*): Recompute everything at the first step of every so many blocks.
        refresh_entropy (`float`, *optional*): Recompute everything after a step that wrote a token whose
            distribution had more entropy than this, in nats.
    """

    prompt_length: int
    freeze_length: int
    freeze_lag: int = 1
    left_margin: int = 0
    right_window: int | None = None
    attend_stale: bool = False
    growing: bool = False
    refresh_blocks: int | None = None
    refresh_entropy: float | None = None
    synchronous: bool = False

    @property
    def history(self) -> int:
        return self.freeze_lag

    @property
    def needs_entropy(self) -> bool:
        return self.refresh_entropy is not None

    def __call__(self, state) -> Window:
        refresh = self._refresh(state)
        finished = state.frontiers[:, self.freeze_lag] - self.prompt_length
        frozen = self.prompt_length + finished.div(self.freeze_length, rounding_mode="floor") * self.freeze_length
        length = state.block_stop if self.growing else torch.full_like(frozen, state.canvas.shape[1])
        # A row that waits at the end of a growing canvas is fed its last position.
        lo = torch.where(refresh, 0, torch.minimum(frozen - self.left_margin, length - 1).clamp_min(0))
        hi = length
        if self.right_window is not None:
            # Of a block that a growing canvas has just reached there are no stale states yet.
            unseen = refresh | ((self.growing and self.attend_stale) & (state.block_nfe == 0))
            hi = torch.where(unseen, length, torch.minimum(state.frontiers[:, 0] + self.right_window, length))
        return Window(lo, hi, length if self.attend_stale else hi, lo)

    def _refresh(self, state) -> torch.BoolTensor:
        refresh = state.nfe == 0
        if self.refresh_blocks is not None:
            refresh = refresh | ((state.block_nfe == 0) & (state.block_index % self.refresh_blocks == 0))
        if self.refresh_entropy is not None:
            refresh = refresh | (state.written_entropy > self.refresh_entropy)
        return refresh


@dataclass(frozen=True)
class DKVWindow:
    r"""
    dKV-Cache (https://arxiv.org/abs/2505.15781, section 3.3, "decode"): a step recomputes the positions that were
    masked when the previous step began, so a token's states are kept from one step after it was written on.

    Args:
        refresh_steps (`int`): Every so many steps of a block everything is recomputed, at its first step in any case.
        first_steps (`int`): As are the first steps of a block, this many.
        frozen_prompt (`int`): The states of the first so many positions are computed once (variant "pd").
        scored_too (`bool`): Recompute the masked positions and not only those that score them, which differ for
            models with shifted logits (variant "un_right").
    """

    refresh_steps: int
    first_steps: int = 1
    frozen_prompt: int = 0
    scored_too: bool = False
    history: int = 0
    synchronous: bool = True
    needs_entropy: bool = False

    def __call__(self, state) -> Window:
        started = state.nfe > 0
        frozen = torch.where(started, self.frozen_prompt, 0)
        length = torch.full_like(frozen, state.canvas.shape[1])
        refresh = (state.block_nfe % self.refresh_steps == 0) | (state.block_nfe < self.first_steps)
        scored = refresh[:, None] | state.previously_masked
        # A canvas without decoded tokens is recomputed to its end, whatever the shift.
        scored_too = self.scored_too or bool((state.nfe == 1).all())
        return Window(frozen, length, length, frozen, None if refresh.all() else scored, scored_too)
