"""FreeCache: keys and values kept at absolute canvas positions, the finished ones frozen.

Owns the buffers, where the next forward writes, how many keys its queries see, and which positions may never be
written again. Knows nothing of tokens, blocks, or why a position was frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.compiler import is_compiling
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class _Target:
    """The target of the next forward's writes, shared by all layers of a cache."""

    start: int = 0
    stop: int | None = None  # exclusive; `None`: as many positions as there are queries
    positions: torch.Tensor | None = None  # (B, N), in place of start and stop where the rows differ
    attended: int | None = None  # number of leading keys that the queries see; `None`: all computed so far
    computed: int = 0  # number of leading positions whose states have been computed
    canvas_length: int | None = None  # length of the buffers; `None`: what the first forward covers


class FreeCacheLayer(DynamicLayer):
    """One layer of [`FreeCache`]: buffers of shape `(batch_size, num_heads, canvas_length, head_dim)`."""

    is_croppable = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, target: _Target):
        super().__init__()
        self.target = target

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # If the first forward covers the whole canvas, its states become the buffers: nothing is ever concatenated.
        self.dtype, self.device = key_states.dtype, key_states.device
        missing = (self.target.canvas_length or 0) - key_states.shape[-2]
        self.keys, self.values = (
            torch.nn.functional.pad(states, (0, 0, 0, missing)) if missing > 0 else states.contiguous()
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write the new states at the target positions and return all the states that the queries attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self._write(self.keys, key_states)
            self._write(self.values, value_states)
        self.target.computed = max(self.target.computed, self.target.stop or key_states.shape[-2])
        attended = self.target.attended or self.target.computed
        if attended == self.keys.shape[-2]:
            return self.keys, self.values
        return self.keys[:, :, :attended], self.values[:, :, :attended]

    def _write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        if self.target.positions is None:
            buffer[:, :, self.target.start : self.target.stop] = states
        else:
            # A row with fewer positions than the others repeats one of its own: both copies hold the same states.
            rows = torch.arange(len(states), device=states.device)[:, None]
            positions = self.target.positions.to(states.device)  # layers may be on different devices
            buffer.transpose(1, 2)[rows, positions] = states.transpose(1, 2)

    def get_seq_length(self) -> int:
        return self.target.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if not self.is_initialized:
            return query_length, 0
        return self.target.attended or max(self.target.computed, self.target.stop or 0), 0

    def get_max_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else -1

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "A `FreeCache` holds states at absolute positions and cannot be cropped: call `window` to say which of "
            f"them the next forward rewrites, got `crop({tokens_to_remove})`."
        )

    # Transformers' versions do nothing while `get_seq_length()` is 0, which here only says where the window starts.
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self.keys, self.values = (_select_rows(states, indices) for states in (self.keys, self.values))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)


class FreeCache(DynamicCache):
    r"""
    The cache of FlashDLM (FreeCache, https://arxiv.org/abs/2505.21467, section 3): states of the prompt and of
    finished text are computed once, frozen, and from then on only read.

    The first forward starts at position 0 and sizes the buffers, unless they are given a length. Before every later
    forward [`~FreeCache.window`] says which positions it recomputes; freezing moves one integer per row. As long as
    the canvas does not change, a windowed forward equals the full forward up to rounding; once it changes, positions
    outside the window keep their old states, which is the only approximation.

    Any v5 model works with it unchanged, if it is called with explicit `position_ids` (the canvas positions that are
    fed) and, where needed, with a 2D `attention_mask` over the attended keys.

    Args:
        canvas_length (`int`, *optional*): Length of the buffers; by default that of the first forward.

    Example (models of Transformers before 5.24 take it as `past_key_values`):

    ```python
    >>> cache = FreeCache()
    >>> full = model(canvas, cache=cache)  # (B, L): sizes the buffers
    >>> cache.freeze(prompt_length)
    >>> cache.window(prompt_length, canvas.shape[1])
    >>> position_ids = torch.arange(prompt_length, canvas.shape[1])[None]
    >>> logits = model(canvas[:, prompt_length:], position_ids=position_ids, cache=cache).logits
    ```
    """

    keeps_positions = True
    layers: list[FreeCacheLayer]  # type: ignore[assignment]  # Transformers allows every kind of layer

    def __init__(self, canvas_length: int | None = None):
        self.target = _Target(canvas_length=canvas_length)
        # One number per row, or a single number for all rows. Python integers, because every step reads them.
        self.frozen, self.lowest = [0], [0]  # frozen lengths; first positions that the next forward writes
        Cache.__init__(self, layer_class_to_replicate=partial(FreeCacheLayer, self.target))  # type: ignore[arg-type]  # it is only called

    @property
    def frozen_length(self) -> torch.Tensor:
        """Number of leading frozen positions, of shape `(batch_size,)`, or `(1,)` if all rows agree."""
        return torch.tensor(self.frozen)

    @property
    def canvas_length(self) -> int | None:
        """Number of positions that the buffers hold, `None` before the first forward."""
        return self.layers[0].keys.shape[-2] if self.is_initialized else None

    def window(self, lo: int, hi: int, attended: int | None = None) -> None:
        """
        Let the next forward recompute the canvas positions `[lo, hi)` of every row.

        Args:
            lo (`int`): First position, not below the frozen length of any row.
            hi (`int`): End of the window, exclusive, at most the canvas length.
            attended (`int`, *optional*): The queries see the keys `[0, attended)`; by default all of the canvas.

        Raises:
            ValueError: If the window lies outside the canvas or reaches into frozen positions.
        """
        self._check([lo], [hi])
        self.target.start, self.target.stop, self.target.positions = lo, hi, None
        self.target.attended = attended

    def scatter(self, positions: torch.Tensor, attended: int | None = None) -> None:
        """
        Let the next forward recompute a different set of canvas positions in each row.

        Args:
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                The positions that are fed, in this order; on the CPU. A row with fewer positions than the others
                repeats one of its own.
            attended (`int`, *optional*): The queries see the keys `[0, attended)`; by default all of the canvas.

        Raises:
            ValueError: If a position lies outside the canvas or is frozen.
        """
        if not self.is_initialized:
            raise ValueError("The first window must be the same for all rows: call `window` before `scatter`.")
        stops = (positions.amax(1) + 1).tolist()
        self._check(positions.amin(1).tolist(), stops)
        # If these numbers changed from step to step, each value would need a captured graph of its own.
        self.target.start, self.target.stop = 0, attended or max(stops)
        self.target.positions = positions.to(self.layers[0].keys.device)
        self.target.attended = attended

    def thaw(self) -> None:
        """Unfreeze all positions, so that the next forward can recompute them."""
        self.frozen = [0]

    def freeze(self, length: int | list[int] | torch.Tensor) -> None:
        """
        Freeze the positions `[0, length)`: no later forward may rewrite them.

        Args:
            length (`int`, `list[int]` or `torch.LongTensor` of shape `(batch_size,)`):
                Frozen length of all rows, or of each row. Only `thaw` makes it shrink.

        Raises:
            ValueError: If a length is below what is already frozen, or beyond the canvas.
        """
        lengths = length if isinstance(length, list) else torch.as_tensor(length).reshape(-1).tolist()
        if _any_below(lengths, self.frozen):
            raise ValueError(
                f"`length` must not be below the frozen length {self.frozen}, got {lengths}: frozen states stay "
                "frozen until `thaw`."
            )
        if max(lengths) > self.target.computed:
            raise ValueError(
                f"`length` must be at most the {self.target.computed} positions computed so far, got {lengths}: run "
                "the forward over the whole canvas first."
            )
        self.frozen = lengths

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        # Skipped under `torch.compile`: `scatter` has already made this check.
        if layer_idx == 0 and not is_compiling() and _any_below(self.lowest, self.frozen):
            raise ValueError(
                f"The next forward would rewrite frozen positions: it starts at {self.lowest}, frozen are "
                f"{self.frozen}. Call `window` before it."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check(self, lo: list[int], hi: list[int]) -> None:
        if _any_below(lo, self.frozen):
            raise ValueError(
                f"A window must start at or after the frozen length {self.frozen}, got {lo}: frozen positions are "
                "never rewritten."
            )
        length = self.canvas_length
        if length is None and max(lo) > 0:
            raise ValueError(
                f"The first window must start at position 0, got {lo}: every state is computed once before it is kept."
            )
        if _any_below(hi, [start + 1 for start in lo]) or (length is not None and max(hi) > length):
            raise ValueError(
                f"A window must hold at least one position and end within the canvas of {length}, got {lo} to {hi}."
            )
        self.lowest = lo

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select(lambda numbers: [number for number in numbers for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch, in that order."""
        super().batch_select_indices(indices)
        self._select(lambda numbers: [numbers[index] for index in indices.tolist()])

    def _select(self, rows: Callable) -> None:
        self.frozen, self.lowest = (
            rows(numbers) if len(numbers) > 1 else numbers for numbers in (self.frozen, self.lowest)
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        """Drop all states; the next forward sizes the buffers again."""
        super().reset()
        self.frozen, self.lowest = [0], [0]
        self.target.start, self.target.stop, self.target.positions, self.target.attended = 0, None, None, None
        self.target.computed = 0


def _select_rows(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The rows `indices` of `states`: in place, if only rows from the end move, into the places of dropped rows."""
    moved = [(place, index) for place, index in enumerate(indices.tolist()) if place != index]
    if any(index < len(indices) for _, index in moved):
        return states.index_select(0, indices.to(states.device))
    for place, index in moved:
        states[place] = states[index]
    return states[: len(indices)]


def _any_below(lengths: list[int], bounds: list[int]) -> bool:
    """Whether any length is below the bound of its row; a single number applies to all rows."""
    if len(lengths) == 1 or len(bounds) == 1:
        return min(lengths) < max(bounds)
    return any(length < bound for length, bound in zip(lengths, bounds, strict=True))
