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
    What one forward computes. All fields are CPU tensors of shape `(batch_size,)`, in canvas positions.

    Args:
        lo (`torch.LongTensor`): First recomputed position of each row.
        hi (`torch.LongTensor`): End of the recomputed positions, exclusive.
        attended (`torch.LongTensor`): The queries of a row see its keys `[0, attended)`.
        frozen (`torch.LongTensor`): From now on the states of `[0, frozen)` are never recomputed.
    """

    lo: torch.LongTensor
    hi: torch.LongTensor
    attended: torch.LongTensor
    frozen: torch.LongTensor


class WindowPolicy(Protocol):
    """A window policy reads a [`DenoisingState`] and returns the [`Window`] of its next forward."""

    history: int  # number of earlier forwards whose frontier the policy looks at

    def __call__(self, state) -> Window: ...


@dataclass(frozen=True)
class FullWindow:
    """Recompute the whole canvas at every step: no cache."""

    history: int = 0

    def __call__(self, state) -> Window:
        zeros = torch.zeros_like(state.rows)
        length = zeros + state.canvas.shape[1]
        return Window(zeros, length, length, zeros)


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
    """

    prompt_length: int
    freeze_length: int
    freeze_lag: int = 1
    left_margin: int = 0
    right_window: int | None = None
    attend_stale: bool = False

    @property
    def history(self) -> int:
        return self.freeze_lag

    def __call__(self, state) -> Window:
        length = state.canvas.shape[1]
        started = state.nfe > 0
        finished = state.frontiers[:, self.freeze_lag] - self.prompt_length
        frozen = self.prompt_length + finished.div(self.freeze_length, rounding_mode="floor") * self.freeze_length
        lo = torch.where(started, (frozen - self.left_margin).clamp_min(0), 0)
        hi = torch.full_like(lo, length)
        if self.right_window is not None:
            hi = torch.where(started, (state.frontiers[:, 0] + self.right_window).clamp_max(length), hi)
        return Window(lo, hi, torch.full_like(hi, length) if self.attend_stale else hi, lo)
