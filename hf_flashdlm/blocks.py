"""Blocks: how the generated region is tiled, and where a step may write.

Owns the borders of a row's blocks: when the row enters the next block, where that block ends, and which positions are
candidates. Knows nothing of models, caches, or how many candidates are written.
"""

from dataclasses import dataclass
from typing import Protocol

from .unmasking import Drafts


class BlockPolicy(Protocol):
    r"""
    Says how the generated region of a row is cut into blocks. Passed to `generate` as `blocks=`. A row enters its
    first block at the end of the prompt, and the next one when the current block has no mask left.
    """

    def stop(self, row) -> int:
        r"""
        The furthest end that a block may have.

        Args:
            row ([`Row`]): A row that enters the block at `row.block_start`.

        Returns:
            `int`: A position after `row.block_start`, exclusive; the end of the canvas is a limit in any case.
        """
        ...

    def cut(self, drafts: Drafts, row) -> int:
        r"""
        The end of a block. Asked once, when its first step has drafted the tokens up to `row.block_stop`.

        Args:
            drafts ([`Drafts`]): What the step has drafted.
            row ([`Row`]): The row; `row.block_stop` is what `stop` has returned.

        Returns:
            `int`: A position after `row.block_start` and at most `row.block_stop`, exclusive.
        """
        ...


@dataclass(frozen=True)
class FixedBlocks:
    r"""
    Blocks of the same length, counted from `row.block_origin` on, so that a row may begin within one; the last block
    may be cut by the end of the canvas.

    Args:
        block_length (`int`): Length of a block.
    """

    block_length: int

    def stop(self, row) -> int:
        return row.block_start + self.block_length - (row.block_start - row.block_origin) % self.block_length

    def cut(self, drafts: Drafts, row) -> int:
        return row.block_stop


@dataclass(frozen=True)
class AdaptiveBlocks:
    r"""
    Blocks that end at a delimiter the model is sure of (AdaBlock-dLLM, https://arxiv.org/abs/2509.26432): among the
    drafts of the first positions of a block the most confident delimiter is its end, if it is confident enough.

    Args:
        block_length (`int`): Length of a block without such a delimiter.
        delimiter_token_ids (`frozenset[int]`): The delimiters.
        delimiter_threshold (`float`): Minimum probability of a draft that ends a block.
        delimiter_window (`int`): Number of positions from the start of a block that are searched for delimiters.
    """

    block_length: int
    delimiter_token_ids: frozenset[int]
    delimiter_threshold: float
    delimiter_window: int

    def stop(self, row) -> int:
        return row.block_start + max(self.block_length, self.delimiter_window)

    def cut(self, drafts: Drafts, row) -> int:
        window = range(row.block_start, row.block_start + self.delimiter_window)
        delimiters = [
            position
            for position in drafts.candidates
            if position in window and drafts.token_id(position) in self.delimiter_token_ids
        ]
        best = max(delimiters, key=drafts.confidence_of, default=None)  # ties go to the lower position
        if best is not None and drafts.confidence_of(best) >= self.delimiter_threshold:
            return best + 1
        return min(row.block_start + self.block_length, row.block_stop)


@dataclass(frozen=True)
class Blocks:
    r"""
    The blocks of a batch.

    Args:
        policy ([`BlockPolicy`]): Where blocks end.
        lookahead (`int`, *optional*):
            If set, the candidates are the next `lookahead` positions from the frontier on, across block borders.
        synchronous (`bool`): Rows that have finished a block wait for the others before they enter the next.
        lone_multiple (`int`, *optional*):
            A position that is a multiple of this from `row.block_origin` on is written alone while it is the frontier.
    """

    policy: BlockPolicy
    lookahead: int | None = None
    synchronous: bool = False
    lone_multiple: int | None = None

    def enter(self, rows: list) -> None:
        """Let the rows ([`Row`]) whose frontier has left their block enter the block that holds the frontier."""
        for group in [rows] if self.synchronous else [[row] for row in rows]:
            while all(row.frontier >= row.block_stop for row in group):
                for row in group:
                    self._enter(row)

    def _enter(self, row) -> None:
        row.block_start = max(row.block_stop, row.prompt_length)
        row.block_index += 1
        row.block_nfe = row.block_checks = row.step = 0
        self._end(row, min(self.policy.stop(row), len(row.masked)))

    def _end(self, row, stop: int) -> None:
        if not row.block_start < stop <= len(row.masked):
            raise ValueError(
                f"`blocks` must end a block after its start {row.block_start} and at most at "
                f"{row.block_stop or len(row.masked)}, got {stop} from {type(self.policy).__name__}."
            )
        row.block_stop = stop
        row.block_masked = row.masked.count(True, 0, stop)

    def cut(self, drafts: Drafts, row) -> None:
        """Settle at its first step where the row's block ends, and drop the candidates after it."""
        stop = self.policy.cut(drafts, row)
        if stop != row.block_stop:
            self._end(row, min(stop, row.block_stop))
        if self.lookahead is None:
            drafts.candidates[:] = [position for position in drafts.candidates if position < row.block_stop]

    def candidates(self, rows: list, ends: list[int]) -> tuple[list[range], list[bytearray]]:
        """
        Consecutive positions of each row from its frontier on and before its end in `ends`, the same number for all
        rows; and for each position whether it may be written.
        """
        stops = [min(self._stop(row), end) for row, end in zip(rows, ends, strict=True)]
        count = max(stop - row.frontier for row, stop in zip(rows, stops, strict=True))
        # Rows near the end of the canvas start earlier: positions before their frontier are no candidates.
        starts = [min(row.frontier, len(row.masked) - count) for row in rows]
        candidate = [
            row.open[start:stop].ljust(count, b"\0") for row, start, stop in zip(rows, starts, stops, strict=True)
        ]
        return [range(start, start + count) for start in starts], candidate

    def _stop(self, row) -> int:
        if self.lone_multiple is not None and (row.frontier - row.block_origin) % self.lone_multiple == 0:
            if row.masked[row.frontier]:
                return row.frontier + 1
        return row.block_stop if self.lookahead is None else row.frontier + self.lookahead
