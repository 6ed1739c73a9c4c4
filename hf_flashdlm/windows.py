"""Window policies: which positions a denoising step recomputes, and which it freezes.

Owns the table "cache method -> [lo, hi)". Knows nothing of models, logits or how tokens are chosen; it reads the
state of a row and returns positions.
"""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Window:
    r"""
    What one forward computes for a row, in canvas positions.

    Args:
        lo (`int`): First recomputed position.
        hi (`int`): End of the recomputed positions, exclusive.
        attended (`int`): The queries see the keys `[0, attended)`.
        frozen (`int`):
            The states of `[0, frozen)` stay as they are. A smaller value than before unfreezes states for a refresh.
        scored (`bytearray`, *optional*):
            A byte per canvas position: recompute only the positions whose outputs score the marked ones, instead of
            all of `[lo, hi)`.
        include_scored (`bool`): With shifted logits, recompute the marked positions as well.
    """

    lo: int
    hi: int
    attended: int
    frozen: int
    scored: bytearray | None = None
    include_scored: bool = False


class WindowPolicy(Protocol):
    r"""
    Says which positions a forward recomputes. Passed to `generate` as `window_policy=`. The first window of a row
    must begin at position 0. A class that inherits from this protocol gets its defaults.

    Attributes:
        history (`int`): Number of earlier forwards whose frontier the policy reads, in `row.frontiers[1:]`.
        synchronous (`bool`): Whether the rows of a batch enter a block together, so that their refreshes coincide.
        needs_entropy (`bool`): Whether it reads `row.written_entropy`, which is measured only in that case.
    """

    history: int = 0
    synchronous: bool = False
    needs_entropy: bool = False

    def __call__(self, row) -> Window:
        r"""
        Args:
            row ([`Row`]): The state of the row.

        Returns:
            [`Window`]: What its next forward computes, with 0 <= frozen <= lo < hi <= attended
            and frozen <= `row.frontier` < hi.
        """
        ...


def _canvas_end(row, grow_length: int | None) -> int:
    """Where the canvas of a row ends: it grows with the current block, in pieces of `grow_length` if that is given."""
    return len(row.tokens) if grow_length is None else _rounded(row, row.block_stop, grow_length)


def _rounded(row, stop: int, length: int) -> int:
    """The first position from `stop` on that is a multiple of `length` from the row's origin, within the canvas."""
    return min(row.block_origin - -(stop - row.block_origin) // length * length, len(row.tokens))


@dataclass
class FullWindow:
    r"""
    Recompute the whole canvas at every step: no cache.

    Args:
        grow_length (`int`, *optional*):
            The canvas ends with the current block, rounded up to a multiple of this many positions from
            `row.block_origin` on: later positions are not seen. By default it ends after the generated region.
    """

    grow_length: int | None = None
    history: int = 0
    synchronous: bool = False
    needs_entropy: bool = False

    def __call__(self, row) -> Window:
        length = _canvas_end(row, self.grow_length)
        return Window(0, length, length, 0)


@dataclass
class BlockWindow:
    r"""
    Prefix and dual cache of Fast-dLLM (https://arxiv.org/abs/2505.22618, section 3.2): the first step of a block
    refreshes the whole canvas, the other steps recompute it from the block's start on, or the block alone.

    Args:
        dual (`bool`): Recompute the block alone; positions right of it are attended with the states of the refresh.
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


@dataclass
class FreeCacheWindow:
    r"""
    FreeCache (https://arxiv.org/abs/2505.21467, algorithm 1): only the first forward covers the canvas; afterwards the
    prompt and the finished blocks are frozen and the rest is recomputed.

    Args:
        freeze_length (`int`): Finished text is frozen in pieces of this many tokens.
        freeze_lag (`int`): A piece is frozen once this many forwards have seen it finished. With 0, as in the
            paper's code, the states frozen for the tokens written last are still those of mask tokens.
        left_margin (`int`): Number of tokens at the end of the finished pieces that are still recomputed.
        right_window (`int`, *optional*): Recompute only this many positions from the frontier on; by default all.
            Forwards that recompute everything do so to the end of the canvas.
        attend_stale (`bool`): Whether positions right of the window are attended with their last states;
            otherwise they are not seen at all.
        grow_length (`int`, *optional*): As of [`FullWindow`]. A growing canvas ends with the right window, too, unless
            stale states are attended.
        refresh_blocks (`int`, *optional*): Number of blocks after which everything is recomputed.
        refresh_entropy (`float`, *optional*): Recompute everything after a step that wrote a token whose
            distribution had more entropy than this, in nats.
    """

    freeze_length: int
    freeze_lag: int = 1
    left_margin: int = 0
    right_window: int | None = None
    attend_stale: bool = False
    grow_length: int | None = None
    refresh_blocks: int | None = None
    refresh_entropy: float | None = None
    history: int = field(init=False)
    synchronous: bool = False
    needs_entropy: bool = field(init=False)

    def __post_init__(self):
        self.history, self.needs_entropy = self.freeze_lag, self.refresh_entropy is not None

    def __call__(self, row) -> Window:
        refresh = self._refresh(row)
        length = _canvas_end(row, self.grow_length)
        pieces = (row.frontiers[self.freeze_lag] - row.block_origin) // self.freeze_length
        frozen = row.block_origin + pieces * self.freeze_length - self.left_margin
        # For a row that waits at the end of a growing canvas, its last position is fed.
        lo = 0 if refresh else max(min(frozen, length - 1), 0)
        hi = length
        if self.right_window is not None and not self._reaches_the_end(row, refresh):
            start = row.frontier if self.grow_length is None else max(row.frontier, row.prompt_length)
            hi = min(_rounded(row, start + self.right_window, self.grow_length or 1), length)
        return Window(lo, hi, length if self.attend_stale else hi, lo)

    def _reaches_the_end(self, row, refresh: bool) -> bool:
        """Whether a forward computes all that the canvas holds to its right, whatever the right window."""
        if self.grow_length is None:
            return refresh
        # A growing canvas has no more than what is seen; where that is stale states, a new block has none yet.
        return self.attend_stale and (refresh or row.block_nfe == 0)

    def _refresh(self, row) -> bool:
        enters = self.refresh_blocks is not None and row.block_nfe == 0 and row.block_index % self.refresh_blocks == 0
        unsure = self.refresh_entropy is not None and row.written_entropy > self.refresh_entropy
        return row.nfe == 0 or enters or unsure


@dataclass
class SubBlockWindow:
    r"""
    The sub-block cache of Fast-dLLM v2 (https://arxiv.org/abs/2509.26328, section 3.3), for models with block-causal
    attention: finished attention blocks are frozen. Of the current attention block all is recomputed until the first
    position of the block being unmasked is written, then only that block; the rest is attended with its last states.

    Args:
        block_length (`int`): Length of the blocks that are unmasked.
        attention_block_length (`int`): Length of the attention blocks, a multiple of it.
    """

    block_length: int
    attention_block_length: int
    history: int = 1
    synchronous: bool = False
    needs_entropy: bool = False

    def __call__(self, row) -> Window:
        length = _canvas_end(row, self.attention_block_length)
        last = row.block_stop - 1
        begin, seen, whole = (
            row.block_origin + (min(position, last) - row.block_origin) // multiple * multiple
            for position, multiple in (
                (row.block_start, self.block_length),
                (row.frontiers[1], self.attention_block_length),
                (row.frontier, self.attention_block_length),
            )
        )
        # A row that waits for others at the end of its block recomputes the attention block with its last tokens.
        waits = row.frontier > last
        has_states = row.nfe > 0 and seen == whole and row.frontiers[1] > whole and not waits
        if has_states and not row.masked[begin]:
            return Window(begin, row.block_stop, length, max(seen, 0))
        lo = 0 if row.nfe == 0 else max(seen, 0)
        return Window(lo, length, length, lo)


@dataclass
class DKVWindow:
    r"""
    dKV-Cache (https://arxiv.org/abs/2505.15781, section 3.3, "decode"): a step recomputes the positions that were
    masked when the previous step began, so the states of a token are cached one step after it was written.

    Args:
        refresh_steps (`int`):
            Number of steps of a block after which everything is recomputed; its first step always does so.
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
        # The second forward recomputes the generated region to its end, even if the logits are shifted.
        return Window(0, length, length, 0, scored, include_scored=row.nfe == 1)
