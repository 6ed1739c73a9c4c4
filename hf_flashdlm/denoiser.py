"""The border with the diffusion model.

Owns all that differs between models: the shift of the logits, position ids and padding, the rows of the output head
that are computed, and the arguments of `forward`. House law: row j of what it returns scores position j asked for.
Knows nothing of blocks, policies, or how tokens are chosen.
"""

import torch

from .cache import FreeCache
from .compiling import Forward
from .windows import Window


WIDTH_STEP = 16  # a compiled forward takes multiples of so many positions, that few shapes have to be compiled


class Denoiser:
    r"""
    Logits of a masked diffusion model for chosen canvas positions.

    Args:
        model (`PreTrainedModel`): A bidirectional model with the standard forward.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
        cache (`FreeCache`, *optional*): A fresh cache; without one every forward starts from the window's tokens.
        logits_shift (`int`): 1 for models whose output at position p - 1 scores position p (Dream), else 0.
        compile_config (`CompileConfig`, *optional*):
            Compile the forward, as the host does, for static shapes: windows are filled up with copies of their last
            position, queries see all keys through a mask. The first forward, which makes the buffers, stays eager.
    """

    def __init__(
        self, model, canvas_mask: torch.LongTensor, cache: FreeCache | None, logits_shift: int, compile_config=None
    ):
        self.forward = Forward(model, compile_config)
        self.is_static = compile_config is not None
        self.cache = cache
        self.shift = logits_shift
        self.first = canvas_mask.argmax(1).cpu()  # where each row begins, behind its padding
        self.padded = not bool(canvas_mask.all())
        self.canvas_mask = canvas_mask
        self.position_ids = (canvas_mask.cumsum(1) - 1).clamp_min(0)

    def __call__(
        self,
        canvas: torch.LongTensor,
        window: Window,
        positions: torch.LongTensor,
        frontier: torch.LongTensor,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        r"""
        One forward over the window.

        Args:
            canvas (`torch.LongTensor` of shape `(batch_size, canvas_length)`): Token ids, masks included.
            window ([`Window`]): The positions to recompute; with a cache, those before it are frozen.
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                Consecutive positions to score, on the CPU. Those outside the row's window, or before its frontier, get
                meaningless scores.
            frontier (`torch.LongTensor` of shape `(batch_size,)`): First position of each row whose scores matter.

        Returns:
            `tuple`: logits in float32 of shape `(batch_size, num_positions, vocab_size)`, and the number of query
            positions computed for each row.
        """
        feed, slots, computed = self._plan(window, positions, frontier)
        first, last = int(slots.min()), int(slots.max())
        kept = torch.arange(first, first + self._width(last + 1 - first), device=canvas.device)
        input_ids, position_ids = (
            ids[:, feed] if isinstance(feed, slice) else ids.gather(1, feed) for ids in (canvas, self.position_ids)
        )
        logits = self.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self._attention_mask(window.attended),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=kept.clamp_max(input_ids.shape[1] - 1),
        ).logits
        if slots.shape[1] != logits.shape[1] or not (slots == slots[:1]).all():
            rows = torch.arange(len(slots), device=logits.device)[:, None]
            logits = logits[rows, (slots - first).to(logits.device)]
        return logits.float(), computed

    def _width(self, width: int) -> int:
        """`width`, or for static shapes the next of the few that are compiled."""
        return -(-width // WIDTH_STEP) * WIDTH_STEP if self.is_static else width

    def _plan(self, window: Window, positions: torch.LongTensor, frontier: torch.LongTensor):
        """
        What to feed, as a slice where all rows agree and `(B, n)` positions elsewhere; the slot `(B, N)` of it whose
        output scores each position; how many positions each row computes. Tells the cache where the states go.
        """
        # With a shift the first score comes from the position before it, which a cut window has to include.
        source = torch.maximum(positions - self.shift, self.first[:, None])
        lo = torch.minimum(window.lo, (frontier - self.shift).clamp_min(0))
        if self.cache is None:
            stop = int(window.hi.max())
            return slice(0, stop), source.clamp_max(stop - 1), window.hi
        if (window.frozen < self.cache.frozen_length).any():
            self.cache.thaw()
        self.cache.freeze(torch.minimum(window.frozen, lo))
        attended = self._num_keys(window.attended)
        if window.scored is not None:
            return self._plan_scattered(window, source, attended)
        starts, stops, computed = lo.tolist(), window.hi.tolist(), window.hi - lo
        slots = (source - lo[:, None]).clamp(min=0, max=int(computed.max()) - 1)
        if len(set(starts)) == len(set(stops)) == 1 and not self._sees_all:
            self.cache.window(starts[0], stops[0], attended)
            return slice(starts[0], stops[0]), slots, computed
        # A row with a smaller window repeats its last position: the same states are computed and stored twice.
        feed = torch.minimum(lo[:, None] + torch.arange(self._width(int(computed.max()))), window.hi[:, None] - 1)
        self.cache.scatter(feed, attended)
        return feed.to(self.canvas_mask.device), slots, computed

    def _plan_scattered(self, window: Window, source: torch.LongTensor, attended: int):
        """The same for a window that recomputes only what scores certain positions."""
        fed = window.scored
        if self.shift:
            fed = fed.roll(-1, 1)
            fed[:, -1] = window.scored.all(1)  # scores nothing in the canvas: recomputed in a refresh only
            if window.scored_too:
                fed |= window.scored
                fed[:, -1] = fed[:, -2]
        fed = fed & (torch.arange(fed.shape[1]) >= window.frozen[:, None])
        computed = fed.sum(1)
        order = (~fed).long().argsort(dim=1, stable=True)
        slot = torch.arange(self._width(int(computed.max())))
        feed = order.gather(1, torch.minimum(slot, computed[:, None] - 1))
        self.cache.scatter(feed, attended)
        slots = (fed.cumsum(1) - 1).clamp_min(0).gather(1, source)
        return feed.to(self.canvas_mask.device), slots, computed

    @property
    def _sees_all(self) -> bool:
        """Whether the keys are the whole buffer, and only the mask says which of them are seen."""
        return self.is_static and self.cache is not None and self.cache.is_initialized

    def _num_keys(self, attended: torch.LongTensor) -> int:
        """How many leading keys the queries are given; a mask hides those that a row does not see."""
        return self.canvas_mask.shape[1] if self._sees_all else int(attended.max())

    def _attention_mask(self, attended: torch.LongTensor) -> torch.LongTensor | None:
        """2D mask over the attended keys, `None` where every row sees them all."""
        longest = self._num_keys(attended)
        uneven = self._sees_all or not (attended == longest).all()
        if not self.padded and not uneven:
            return None
        mask = self.canvas_mask[:, :longest]
        if uneven:
            device = mask.device
            mask = mask * (torch.arange(longest, device=device) < attended.to(device)[:, None])
        return mask

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.canvas_mask.device)
        self.canvas_mask, self.position_ids = self.canvas_mask[rows], self.position_ids[rows]
        self.first = self.first[indices]
        if self.cache is not None:
            self.cache.batch_select_indices(indices)


class ClassifierFreeGuidance:
    r"""
    A denoiser whose logits are u + scale * (c - u), with c given the prompt and u without it, both from one doubled
    batch (https://arxiv.org/abs/2502.09992, appendix A.2; LLaDA's cfg_scale is `scale - 1`).

    Args:
        denoiser ([`Denoiser`]): A denoiser for `2 * batch_size` rows, the unconditional ones last.
        scale (`float`): The host's `guidance_scale`.
        unconditional (`torch.LongTensor` of shape `(batch_size, canvas_length)`):
            What the unconditional rows hold where the canvas is given: mask tokens, or a negative prompt.
        given (`torch.BoolTensor` of shape `(batch_size, canvas_length)`): Where the canvas is given.
    """

    def __init__(self, denoiser: Denoiser, scale: float, unconditional: torch.LongTensor, given: torch.BoolTensor):
        self.denoiser, self.scale = denoiser, scale
        self.unconditional, self.given = unconditional, given

    def __call__(self, canvas, window, positions, frontier) -> tuple[torch.Tensor, torch.LongTensor]:
        """As [`Denoiser`], with the positions of both halves counted."""
        canvas = torch.cat([canvas, torch.where(self.given, self.unconditional, canvas)])
        doubled = {
            name: value.repeat(2, *[1] * (value.dim() - 1)) if isinstance(value, torch.Tensor) else value
            for name, value in vars(window).items()
        }
        logits, computed = self.denoiser(canvas, Window(**doubled), positions.repeat(2, 1), frontier.repeat(2))
        conditional, unconditional = logits.chunk(2)
        return unconditional + self.scale * (conditional - unconditional), sum(computed.chunk(2))

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.denoiser.batch_select_indices(torch.cat([indices, indices + len(self.given)]))
        rows = indices.to(self.given.device)
        self.unconditional, self.given = self.unconditional[rows], self.given[rows]
