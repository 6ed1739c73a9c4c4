"""The border with the diffusion model.

Owns all that differs between models: the shift of the logits, position ids and padding, the rows of the output head
that are computed, and the arguments of `forward`. House law: row j of what it returns scores position j asked for.
Knows nothing of blocks, policies, or how tokens are chosen.
"""

import torch

from .cache import FreeCache
from .windows import Window


class Denoiser:
    r"""
    Logits of a masked diffusion model for chosen canvas positions.

    Args:
        model (`PreTrainedModel`): A bidirectional model with the standard forward.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
        cache (`FreeCache`, *optional*): A fresh cache; without one every forward starts from the window's tokens.
        logits_shift (`int`): 1 for models whose output at position p - 1 scores position p (Dream), else 0.
    """

    def __init__(self, model, canvas_mask: torch.LongTensor, cache: FreeCache | None, logits_shift: int):
        self.model = model
        self.cache = cache
        self.shift = logits_shift
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
        # With a shift the first score comes from the position before it, which a cut window has to include.
        lo = torch.minimum(window.lo, (frontier - self.shift).clamp_min(0))
        if self.cache is None:
            lo = torch.zeros_like(lo)
        feed = self._feed(lo, window)
        slots = (positions - self.shift - lo[:, None]).clamp(min=0, max=int((window.hi - lo).max()) - 1)
        first, last = int(slots.min()), int(slots.max())
        logits = self.model(
            input_ids=canvas[:, feed] if isinstance(feed, slice) else canvas.gather(1, feed),
            position_ids=self.position_ids[:, feed] if isinstance(feed, slice) else self.position_ids.gather(1, feed),
            attention_mask=self._attention_mask(window.attended),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=torch.arange(first, last + 1, device=canvas.device),
        ).logits
        if slots.shape[1] != logits.shape[1] or not (slots == slots[:1]).all():
            rows = torch.arange(len(slots), device=logits.device)[:, None]
            logits = logits[rows, (slots - first).to(logits.device)]
        return logits.float(), window.hi - lo

    def _feed(self, lo: torch.LongTensor, window: Window) -> slice | torch.LongTensor:
        """The positions to feed, as a slice where all rows agree; tells the cache where their states go."""
        start, stop, attended = int(lo[0]), int(window.hi.max()), int(window.attended.max())
        if self.cache is None:
            return slice(0, stop)
        self.cache.freeze(torch.minimum(window.frozen, lo))
        if (lo == start).all() and (window.hi == stop).all():
            self.cache.window(start, stop, attended)
            return slice(start, stop)
        # A row with a smaller window repeats its last position: the same states are computed and stored twice.
        positions = lo[:, None] + torch.arange(int((window.hi - lo).max()))
        positions = torch.minimum(positions, window.hi[:, None] - 1)
        self.cache.scatter(positions, attended)
        return positions.to(self.canvas_mask.device)

    def _attention_mask(self, attended: torch.LongTensor) -> torch.LongTensor | None:
        """2D mask over the attended keys, `None` where every row sees them all."""
        longest = int(attended.max())
        uneven = not (attended == longest).all()
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
        if self.cache is not None:
            self.cache.batch_select_indices(indices)
