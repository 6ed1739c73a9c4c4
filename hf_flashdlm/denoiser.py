"""The border with the diffusion model.

Owns all that differs between models: the shift of the logits, position ids and padding, the rows of the output head
that are computed, and the arguments of `forward`. House law: row j of what it returns scores position j asked for.
Knows nothing of blocks, policies, or how tokens are chosen.
"""

from dataclasses import replace

import torch
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_causal import AttentionBlocks, for_backend
from .cache import FreeCache
from .compiling import CompiledForward, forward_parameters
from .images import Images
from .windows import Window


WIDTH_STEP = 16  # compiled forwards round their width up to a multiple of this, so that few shapes are compiled


# What is known of the attention functions of Transformers: how each is told which keys a query sees.
_BACKENDS: dict[object, str] = {
    sdpa_attention_forward: "sdpa",
    flex_attention_forward: "flex",
    flash_attention_forward: "flash",
}


def attention_backend(model) -> str:
    """
    The kind of the attention that the text part of `model` runs: "eager", "sdpa", "flex" or "flash", the last also for
    the kernels of the Hub that Transformers calls in the same way.

    Raises:
        ValueError: If it is none of them, or if the forward does not hand on what flash attention has to be told.
    """
    name = model.config.get_text_config()._attn_implementation
    if name == "eager":
        return name
    function = dict(ALL_ATTENTION_FUNCTIONS).get(name)
    backend = _BACKENDS.get(getattr(function, "func", function))  # a kernel of the Hub may be bound by `partial`
    if backend is None:
        raise ValueError(
            "`attn_implementation` must be eager, sdpa, flex_attention or a flash attention of Transformers, "
            f"whose masks are known, got {name!r}: call `model.set_attn_implementation('sdpa')`."
        )
    parameters = forward_parameters(model).values()
    if backend == "flash" and not any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise ValueError(
            f"`attn_implementation` {name!r} needs a forward that takes further keywords, which that of "
            f"{type(model).__name__} does not: call `model.set_attn_implementation('sdpa')`."
        )
    return backend


class Denoiser:
    r"""
    Logits of a masked diffusion model for chosen canvas positions.

    Args:
        model (`PreTrainedModel`): A bidirectional model with the standard forward.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
        cache (`FreeCache`, *optional*): A fresh cache; without one every forward starts from the window's tokens.
        logits_shift (`int`): 1 for models whose output at position p - 1 scores position p (Dream), else 0.
        compile_config (`CompileConfig`, *optional*):
            Compile the forward, as Transformers does, for static shapes: windows are filled up with copies of their
            last position, queries see all keys through a mask. The first forward, which makes the buffers, is eager.
        attention_blocks ([`AttentionBlocks`], *optional*):
            Those of a model with block-causal attention; without them a query sees all keys.
        images ([`Images`], *optional*): Embeddings that stand in the prompts.
        prefix_length (`int`): This many positions, which hold no masks, are computed once, by themselves.
    """

    def __init__(  # noqa: PLR0913, what a forward depends on
        self,
        model,
        canvas_mask: torch.Tensor,
        cache: FreeCache | None,
        logits_shift: int,
        compile_config=None,
        attention_blocks: AttentionBlocks | None = None,
        prefix_length: int = 0,
        images: Images | None = None,
    ):
        self.model, self.attention_blocks, self.images = model, attention_blocks, images
        self.forward = CompiledForward(model, compile_config)
        self.is_static = compile_config is not None
        self.backend = attention_backend(model)
        self.cache = cache
        self.shift = logits_shift
        self.first = canvas_mask.argmax(1).tolist()  # where each row begins, after its padding
        self.padded = not bool(canvas_mask.all())
        self.canvas_mask = canvas_mask.bool()
        # Slices of it are the positions that a step keeps, and those that it sees: nothing is made anew.
        self.columns = torch.arange(2 * canvas_mask.shape[1] + WIDTH_STEP, device=canvas_mask.device)
        self.num_kept = 0
        self.position_ids = (canvas_mask.cumsum(1) - 1).clamp_min(0)
        self.prefix_length = prefix_length
        self.prefix_logits: torch.Tensor | None = None  # (B, 1, V): the scores of the first position after the prefix

    def __call__(
        self,
        canvas: torch.Tensor,
        windows: list[Window],
        positions: list[range],
        frontier: list[int],
    ) -> tuple[torch.Tensor, list[int]]:
        r"""
        One forward over the windows.

        Args:
            canvas (`torch.LongTensor` of shape `(batch_size, canvas_length)`): Token ids, masks included.
            windows (`list[Window]`):
                The positions of each row to recompute; with a cache, those before them are frozen.
            positions (`list[range]`):
                The positions of each row to score, as many for all. Those outside the row's window, or before its
                frontier, get meaningless scores.
            frontier (`list[int]`): First position of each row whose scores matter.

        Returns:
            `tuple`: logits in float32 of shape `(batch_size, num_positions, vocab_size)`, and for each row the number
            of query positions computed.
        """
        prefilled = 0
        if self.prefix_length and self.cache is not None:
            if not self.cache.is_initialized:
                self._prefill(canvas)
                prefilled = self.prefix_length
            windows = [_after(self.prefix_length, window) for window in windows]
        feed, slots, computed = self._plan(windows, positions, frontier)
        num_positions = len(positions[0])
        if isinstance(slots, int):
            first, last = slots, slots + num_positions - 1
        else:
            first, last = int(slots.min()), int(slots.max())
        input_ids, position_ids = (
            ids[:, feed] if isinstance(feed, slice) else ids.gather(1, feed) for ids in (canvas, self.position_ids)
        )
        inputs = {"input_ids": input_ids}
        if self.images is not None and self.images.are_fed(self._lows(len(windows))):
            inputs = {"inputs_embeds": self.images.embed(self.model, input_ids, feed)}
        logits = self.forward(
            **inputs,
            position_ids=position_ids,
            **self._attention([window.attended for window in windows], feed, input_ids.shape[1]),
            cache=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=self._kept(first, last, input_ids.shape[1]),
        ).logits
        if not isinstance(slots, int):
            rows = torch.arange(len(slots), device=logits.device)[:, None]
            logits = logits[rows, (slots - first).to(logits.device)]
        elif self.is_static:
            logits = logits[:, :num_positions]
        logits = logits.float()
        if self.prefix_logits is not None:
            for row, scored in enumerate(positions):
                if self.prefix_length in scored:
                    logits[row, self.prefix_length - scored.start] = self.prefix_logits[row, 0]
        return logits, [num_queries + prefilled for num_queries in computed]

    def _prefill(self, canvas: torch.Tensor) -> None:
        """Compute the states of the prefix by themselves, which no later forward recomputes, whatever its window."""
        length, self.prefix_length, rows = self.prefix_length, 0, len(canvas)
        scored = length if self.shift else length - 1  # with a shift, the last of them scores what follows
        logits, _ = self(canvas, rows * [Window(0, length, length, 0)], rows * [range(scored, scored + 1)], rows * [0])
        self.prefix_length, self.prefix_logits = length, logits if self.shift else None

    def _width(self, width: int) -> int:
        """`width`, or for static shapes the next of the few that are compiled."""
        return -(-width // WIDTH_STEP) * WIDTH_STEP if self.is_static else width

    def _kept(self, first: int, last: int, num_fed: int) -> torch.Tensor:
        """The outputs to score, from `first` to `last`; of static shapes as many as any step has needed so far."""
        if not self.is_static:
            return self.columns[first : last + 1]
        self.num_kept = max(self._width(last + 1 - first), self.num_kept)
        return self.columns[first : first + self.num_kept].clamp_max(num_fed - 1)

    def _plan(self, windows: list[Window], positions: list[range], frontier: list[int]):
        """
        What to feed, as a slice where all rows agree and `(B, n)` positions elsewhere; the slots of it whose output
        scores the positions, as the first of consecutive ones where all rows agree and `(B, N)` elsewhere; how many
        positions each row computes. Tells the cache where the states go.
        """
        if self.cache is None:
            stop = max(window.hi for window in windows)
            slots = self._slots(positions, [0] * len(windows), stop)
            return slice(0, stop), slots, [window.hi for window in windows]
        # With a shift the first score comes from the position before it, which a cut window has to include.
        lows = [
            min(window.lo, max(first - self.shift, self.prefix_length))
            for window, first in zip(windows, frontier, strict=True)
        ]
        stops = [window.hi for window in windows]
        if not self.cache.is_initialized:
            stops = [max(stops)] * len(stops)  # the first forward makes the buffers, the same for all rows
        frozen = [min(window.frozen, lo) for window, lo in zip(windows, lows, strict=True)]
        if any(window.frozen < length for window, length in zip(windows, self.cache.frozen, strict=False)):
            self.cache.thaw()  # a fresh cache has one length for all rows, 0, which nothing is below
        self.cache.freeze(frozen)
        attended = self._num_keys([window.attended for window in windows])
        if any(window.scored is not None for window in windows):
            return self._plan_scattered(windows, positions, attended)
        computed = [window.hi - lo for window, lo in zip(windows, lows, strict=True)]
        slots = self._slots(positions, lows, max(stop - lo for stop, lo in zip(stops, lows, strict=True)))
        if len(set(lows)) == len(set(stops)) == 1 and not self._sees_all:
            self.cache.window(lows[0], stops[0], attended)
            return slice(lows[0], stops[0]), slots, computed
        # A row with a smaller window repeats its last position: the same states are computed and stored twice.
        slot = torch.arange(self._width(max(computed)))
        feed = torch.minimum(torch.tensor(lows)[:, None] + slot, torch.tensor(stops)[:, None] - 1)
        self.cache.scatter(feed, attended)
        return feed.to(self.canvas_mask.device), slots, computed

    def _slots(self, positions: list[range], lows: list[int], width: int) -> int | torch.Tensor:
        """For each row, the indices within its window of the outputs that score `positions`."""
        starts = [one.start for one in positions]
        slots = {start - self.shift - lo for start, lo in zip(starts, lows, strict=True)}
        is_even = len(slots) == 1 and all(
            start - self.shift >= begin for start, begin in zip(starts, self.first, strict=True)
        )
        if is_even and 0 <= min(slots) <= width - len(positions[0]):
            return min(slots)
        return (self._source(positions) - torch.tensor(lows)[:, None]).clamp(0, width - 1)

    def _source(self, positions: list[range]) -> torch.Tensor:
        """The positions `(B, N)` whose output scores `positions`; a row's first token has none, and gets its own."""
        return torch.maximum(torch.tensor(positions) - self.shift, torch.tensor(self.first)[:, None])

    def _plan_scattered(self, windows: list[Window], positions: list[range], attended: int):
        """The same as `_plan` for windows that recompute only what scores certain positions."""
        assert self.cache is not None
        length = self.canvas_mask.shape[1]
        scored = [bytearray(b"\1" * length) if window.scored is None else window.scored for window in windows]
        scored = torch.frombuffer(bytearray().join(scored), dtype=torch.bool).view(len(windows), length)
        columns, fed = torch.arange(length), scored
        if self.shift:
            first = torch.tensor(self.first)[:, None]
            fed = fed.roll(-1, 1)
            fed[:, -1] = scored.all(1)  # scores nothing in the canvas: recomputed in a refresh only
            fed = (fed & (columns >= first)) | (scored & (columns == first))  # nothing before a row's first token
            too = torch.tensor([window.include_scored for window in windows])[:, None]
            fed |= scored & too
            fed[:, -1:] = torch.where(too, fed[:, -2:-1], fed[:, -1:])
        fed = fed & (columns >= torch.tensor([window.frozen for window in windows])[:, None])
        computed = fed.sum(1)
        order = (~fed).long().argsort(dim=1, stable=True)
        slot = torch.arange(self._width(int(computed.max())))
        feed = order.gather(1, torch.minimum(slot, computed[:, None] - 1))
        self.cache.scatter(feed, attended)
        slots = (fed.cumsum(1) - 1).clamp_min(0).gather(1, self._source(positions))
        return feed.to(self.canvas_mask.device), slots, computed.tolist()

    @property
    def _sees_all(self) -> bool:
        """Whether the keys are the whole buffer, and only the mask says which of them are seen."""
        return self.is_static and self.cache is not None and self.cache.is_initialized

    def _num_keys(self, attended: list[int]) -> int:
        """How many leading keys the queries are given; a mask hides those that a row does not see."""
        return self.canvas_mask.shape[1] if self._sees_all else max(attended)

    def _lows(self, num_rows: int) -> list[int]:
        """The first position of each row that is fed, as the cache was told."""
        lowest = [0] if self.cache is None else self.cache.lowest
        return lowest * num_rows if len(lowest) == 1 else lowest

    def _attention(self, attended: list[int], feed, num_queries: int) -> dict:
        """The arguments of the forward that say which keys the queries of each row see."""
        longest = self._num_keys(attended)
        if self.attention_blocks is not None:
            if not self._sees_all and self.attention_blocks.sees_all(self._lows(len(attended)), attended):
                return {"attention_mask": None, "is_causal": False}  # beside it, the model makes no mask of its own
            return {"attention_mask": for_backend(self.attention_blocks.mask(feed, attended, longest), self.model)}
        uneven = self._sees_all or min(attended) < longest
        if self.backend == "flash":
            # By itself it takes one row at scattered positions for several packed ones.
            is_plain = not self.padded and not uneven and isinstance(feed, slice)
            return {"attention_mask": None} | ({} if is_plain else self._segments(attended, longest, num_queries))
        if not self.padded and not uneven:
            return {"attention_mask": None}
        mask = self.canvas_mask[:, :longest]
        if uneven:
            mask = mask & (self.columns[:longest] < torch.tensor(attended, device=mask.device)[:, None])
        # All queries of a row see the same keys. Transformers would write that out for each of them, queries times
        # keys; the one backend that takes a mask which broadcasts is spared it.
        return {"attention_mask": mask[:, None, None] if self.backend == "sdpa" else mask}

    def _segments(self, attended: list[int], longest: int, num_queries: int) -> dict:
        """
        The rows as segments of packed sequences, the form of flash attention, which takes the last columns of a mask
        for its queries. The keys that a row does not see, left and right, are segments without a query.
        """
        queries, keys = [0], [0]
        for row, (first, stop) in enumerate(zip(self.first, attended, strict=True)):
            queries += [num_queries * row] + [num_queries * (row + 1)] * 2
            keys += [longest * row + first, longest * row + stop, longest * (row + 1)]
        lengths = torch.tensor([queries, keys], dtype=torch.int32).to(self.canvas_mask.device)
        return dict(
            zip(
                ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
                (*lengths, num_queries, longest),
                strict=True,
            )
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.canvas_mask.device)
        self.canvas_mask, self.position_ids = self.canvas_mask[rows], self.position_ids[rows]
        self.first = [self.first[index] for index in indices.tolist()]
        if self.prefix_logits is not None:
            self.prefix_logits = self.prefix_logits[indices.to(self.prefix_logits.device)]
        if self.images is not None:
            self.images.batch_select_indices(indices)
        if self.attention_blocks is not None:
            self.attention_blocks.batch_select_indices(indices)
        if self.cache is not None:
            self.cache.batch_select_indices(indices)


def _after(length: int, window: Window) -> Window:
    """The window without the first `length` positions, whose states are kept for good."""
    return replace(window, lo=max(window.lo, length), frozen=max(window.frozen, length))


class ClassifierFreeGuidance:
    r"""
    A denoiser whose logits are u + scale * (c - u), with c given the prompt and u without it, both from one doubled
    batch (https://arxiv.org/abs/2502.09992, appendix A.2; LLaDA's cfg_scale is `scale - 1`).

    Args:
        denoiser ([`Denoiser`]): A denoiser for `2 * batch_size` rows, the unconditional ones last.
        scale (`float`): `guidance_scale` of Transformers.
        unconditional (`torch.LongTensor` of shape `(batch_size, canvas_length)`):
            What the unconditional rows hold where the canvas is given: mask tokens, or a negative prompt.
        given (`torch.BoolTensor` of shape `(batch_size, canvas_length)`): Where the canvas is given.
    """

    def __init__(self, denoiser: Denoiser, scale: float, unconditional: torch.Tensor, given: torch.Tensor):
        self.denoiser, self.scale = denoiser, scale
        self.unconditional, self.given = unconditional, given

    def __call__(self, canvas, windows, positions, frontier) -> tuple[torch.Tensor, list[int]]:
        """As [`Denoiser`], with the positions of both halves counted."""
        canvas = torch.cat([canvas, torch.where(self.given, self.unconditional, canvas)])
        logits, computed = self.denoiser(canvas, 2 * windows, 2 * positions, 2 * frontier)
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + self.scale * (conditional - unconditional)
        return logits, [sum(halves) for halves in zip(computed[: len(windows)], computed[len(windows) :], strict=True)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.denoiser.batch_select_indices(torch.cat([indices, indices + len(self.given)]))
        rows = indices.to(self.given.device)
        self.unconditional, self.given = self.unconditional[rows], self.given[rows]
