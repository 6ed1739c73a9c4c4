"""Window policies: which positions a denoising step recomputes, and which it freezes.

Owns the table "cache method -> [lo, hi)". Knows nothing of models, logits or how tokens are chosen; it reads where
a row stands and answers with positions.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Window:
    r"""
    What one forward computes of a row, in canvas positions.

    Args:
        lo (`int`): First recomputed position.
        hi (`int`): End of the recomputed positions, exclusive.
        attended (`int`): The queries see the keys `[0, attended)`.
        frozen (`int`):
            The states of `[0, frozen)` stay as they are. Less than before thaws them, for a refresh.
        scored (`bytearray`, *optional*):
            Recompute only what scores these positions of the canvas, one byte each, instead of all of `[lo, hi)`.
        include_scored (`bool`): Recompute these positions as well, where the logits are shifted.
    """

    lo: int
    hi: int
    attended: int
    frozen: int
    scored: bytearray | None = None
    include_scored: bool = False


class WindowPolicy(Protocol):
    r"""
    Says which positions a forward recomputes, an argument of `generate` as `window_policy=`. The first window of a row
    must begin at position 0. A class that inherits from this protocol gets its defaults.

    Attributes:
        history (`int`): Number of earlier forwards whose frontier the policy reads, in `row.frontiers[1:]`.
        synchronous (`bool`): Whether the rows of a batch enter a block together, so that their refreshes coincide.
        needs_entropy (`bool`): Whether it reads `row.written_entropy`, which is only measured then.
    """

    history: int = 0
    synchronous: bool = False
    needs_entropy: bool = False

    def __call__(self, row) -> Window:
        r"""
        Args:
            row ([`Row`]): Where the row stands.

        Returns:
            [`Window`]: What its next forward computes, with 0 <= frozen <= lo <= `row.frontier` < hi <= attended.
        """
        ...


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

    def __call__(self, row) -> Window:
        length = row.block_stop if self.growing else len(row.tokens)
        return Window(0, length, length, 0)


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

    def __call__(self, row) -> Window:
        length = len(row.tokens)
        if row.block_nfe == 0:
            return Window(0, length, length, 0)
        lo = min(row.block_start, row.frontier)  # masks inside the prompt belong to the first block
        return Window(lo, row.block_stop if self.dual else length, length, 0)


@dataclass(frozen=True)
class FreeCacheWindow:
    r"""
    FreeCache (https://arxiv.org/abs/2505.21467, algorithm 1): only the first forward covers the canvas; afterwards the
    prompt and the finished blocks are frozen and the rest is recomputed.

    Args:
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

    def __call__(self, row) -> Window:
        refresh = self._refresh(row)
        length = row.block_stop if self.growing else len(row.tokens)
        pieces = (row.frontiers[self.freeze_lag] - row.prompt_length) // self.freeze_length
        frozen = row.prompt_length + pieces * self.freeze_length - self.left_margin
        # A row that waits at the end of a growing canvas is fed its last position.
        lo = 0 if refresh else max(min(frozen, length - 1), 0)
        # Of a block that a growing canvas has just reached there are no stale states yet.
        unseen = refresh or (self.growing and self.attend_stale and row.block_nfe == 0)
        is_cut = self.right_window is not None and not unseen
        hi = min(row.frontier + self.right_window, length) if is_cut else length
        return Window(lo, hi, length if self.attend_stale else hi, lo)

    def _refresh(self, row) -> bool:
        enters = self.refresh_blocks is not None and row.block_nfe == 0 and row.block_index % self.refresh_blocks == 0
        unsure = self.refresh_entropy is not None and row.written_entropy > self.refresh_entropy
        return row.nfe == 0 or enters or unsure


@dataclass(frozen=True)
class DKVWindow:
    r"""
    dKV-Cache (https://arxiv.org/abs/2505.15781, section 3.3, "decode"): a step recomputes the positions that were
    masked when the previous step began, so a token's states are kept from one step after it was written on.

    Args:
        refresh_steps (`int`):
            Every this many steps of a block everything is recomputed, at its first step in any case.
    """

    refresh_steps: int
    history: int = 0
    synchronous: bool = True
    needs_entropy: bool = False

    def __call__(self, row) -> Window:
        length, scored = len(row.tokens), None
        if row.block_nfe % self.refresh_steps:
            scored = row.masked.copy()
            for position in row.written:
                scored[position] = True
        # A canvas without decoded tokens is recomputed to its end, whatever the shift.
        return Window(0, length, length, 0, scored, include_scored=row.nfe == 1)
