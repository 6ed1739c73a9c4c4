"""Guided Diffusion: a small autoregressive model judges which drafts may be written at once.

Owns the guider's model, its cache, the acceptance rules and its counts. Knows nothing of blocks, schedules, windows or
the diffusion model's cache. Its form is a logits processor: scores in, scores out.
"""

import math
import time

import torch
from transformers import DynamicCache, LogitsProcessor

from .unmasking import draft


ACCEPTANCE_RULES = ("top1", "topk", "topk_relative")


class ARGuider(LogitsProcessor):
    r"""
    Judges the drafts of a diffusion model with an autoregressive one (Guided Diffusion of FlashDLM,
    https://arxiv.org/abs/2505.21467, section 4). It never supplies a token.

    One forward reads the finished prefix and the drafts behind it. The longest prefix of drafts that it accepts is
    written; if it refuses the first, that one is written all the same, so that every step makes progress. A refused
    position comes back with the mask token as its only finite score, an accepted one with its draft as the only one.

    Args:
        model (`PreTrainedModel`): A causal language model with the vocabulary of the diffusion model.
        accept (`str`, *optional*, defaults to `"topk_relative"`):
            A draft is accepted when it is the guider's best token (`"top1"`), among its `top_k` best (`"topk"`), or
            among them with a probability of at least `relative_threshold` times the best one's (`"topk_relative"`).
        top_k (`int`, *optional*, defaults to 2): See `accept`.
        relative_threshold (`float`, *optional*, defaults to 0.5): See `accept`; the paper's tau.
        num_drafts (`int`, *optional*, defaults to 32): At most this many positions are judged in a step.

    Example:

    ```python
    >>> guider = ARGuider(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct"), accept="topk", top_k=5)
    >>> model.generate(**inputs, guider=guider)
    ```
    """

    reads_canvas = True  # called with the canvas and (B, N, V) scores, not position by position

    def __init__(
        self,
        model,
        accept: str = "topk_relative",
        top_k: int = 2,
        relative_threshold: float = 0.5,
        num_drafts: int = 32,
    ):
        if accept not in ACCEPTANCE_RULES:
            raise ValueError(f"`accept` must be one of {', '.join(ACCEPTANCE_RULES)}, got {accept!r}.")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, got {top_k!r}.")
        if not 0 <= relative_threshold <= 1:
            raise ValueError(f"`relative_threshold` must lie between 0 and 1, got {relative_threshold!r}.")
        if not isinstance(num_drafts, int) or num_drafts < 1:
            raise ValueError(f"`num_drafts` must be a positive integer, got {num_drafts!r}.")
        self.model = model
        self.top_k = 1 if accept == "top1" else top_k
        self.log_threshold = math.log(relative_threshold or 1e-38) if accept == "topk_relative" else -math.inf
        self.num_drafts = num_drafts

    @property
    def lookahead(self) -> int:
        """Positions from the frontier on that a step has to score."""
        return self.num_drafts

    def reset(
        self, canvas_mask: torch.LongTensor, mask_token_id: int, vocab_size: int, temperature=None, generator=None
    ) -> None:
        r"""
        Forget the last call; called at the start of every `generate`.

        Args:
            canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas is padding.
            mask_token_id (`int`): The diffusion model's mask token.
            vocab_size (`int`): The size of the diffusion model's vocabulary.
            temperature (`float`, *optional*): Draw the drafts, from scores divided by this, instead of taking the
                most likely tokens.
            generator (`torch.Generator`, *optional*): Source of randomness when drawing.

        Raises:
            ValueError: If the guider has another vocabulary.
        """
        guider_vocab_size = self.model.config.get_text_config().vocab_size
        if guider_vocab_size != vocab_size:
            raise ValueError(
                f"`guider` must share the diffusion model's vocabulary of {vocab_size} tokens, got one of "
                f"{guider_vocab_size}: choose a guider with the same tokenizer."
            )
        self.mask_token_id, self.temperature, self.generator = mask_token_id, temperature, generator
        self.canvas_mask = canvas_mask.to(self.model.device)
        self.position_ids = (self.canvas_mask.cumsum(1) - 1).clamp_min(0)
        self.cache = DynamicCache(config=self.model.config)
        self.seen = self.canvas_mask.new_zeros(len(canvas_mask), 0)  # the committed ids whose states the cache holds
        self.committed = 0  # clean prefix shared by all rows at the last call
        self.rows = torch.arange(len(canvas_mask))
        zeros = torch.zeros(len(canvas_mask), dtype=torch.long)
        self.forwards, self.judged = zeros.clone(), zeros.clone()
        self.accepted_lengths: list[list[int]] = [[] for _ in range(len(canvas_mask))]
        self.seconds = 0.0

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.canvas_mask.device)
        self.canvas_mask, self.position_ids, self.seen = (
            self.canvas_mask[rows],
            self.position_ids[rows],
            self.seen[rows],
        )
        self.cache.batch_select_indices(rows)
        self.rows = self.rows[indices]

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.LongTensor,
        scores: torch.Tensor,
        positions: torch.LongTensor,
        frontier: torch.LongTensor,
    ) -> torch.Tensor:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, canvas_length)`): The canvas, masks included.
            scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Scores of the diffusion model.
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                Consecutive canvas positions that the scores belong to, on the CPU.
            frontier (`torch.LongTensor` of shape `(batch_size,)`): First masked position of each row, on the CPU.

        Returns:
            `torch.Tensor`: Scores of the same shape.
        """
        started = time.perf_counter()
        device = scores.device
        on_device = positions.to(device)
        drafts, _ = draft(scores, self.mask_token_id, self.temperature, self.generator)
        masked = input_ids.gather(1, on_device) == self.mask_token_id
        inside = (positions >= frontier[:, None]) & (positions < frontier[:, None] + self.num_drafts)
        judged = masked & inside.to(device)
        canvas = input_ids.scatter(1, on_device, torch.where(masked, drafts, input_ids.gather(1, on_device)))
        logits = self._forward(canvas, positions, frontier)
        accepted = self._accept(logits, drafts.to(logits.device)).to(device) & (on_device > 0)
        prefix = (accepted | ~judged).long().cumprod(1).bool() & judged
        self._count(judged, prefix)
        # The first draft is written even if it is refused.
        written = prefix | (judged & (on_device == frontier.to(device)[:, None]))
        kept = torch.where(written, drafts, self.mask_token_id)
        result = torch.full_like(scores, -torch.inf).scatter(-1, kept[..., None], 0.0)
        self.seconds += time.perf_counter() - started
        return result

    def _forward(self, canvas, positions, frontier) -> torch.Tensor:
        """Logits of the guider that score `positions`, `(B, N, V)`; only the committed prefix stays in the cache."""
        start, stop = max(self.committed - 1, 0), int(positions.max())
        canvas = canvas.to(self.canvas_mask.device)
        if self.seen.shape[1] and not torch.equal(self.seen[:, :start], canvas[:, :start]):
            raise RuntimeError("The canvas left of the frontier has changed since the last call: `reset` the guider.")
        self.cache.crop(min(start - self.cache.get_seq_length(), 0))
        slots = (positions - 1 - start).clamp_min(0).to(canvas.device)
        first = int(positions.min()) - 1 - start
        logits = self.model(
            input_ids=canvas[:, start:stop],
            attention_mask=self.canvas_mask[:, :stop],
            position_ids=self.position_ids[:, start:stop],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=stop - start - max(first, 0),
        ).logits
        self.committed = int(frontier.min())
        self.seen = canvas[:, : self.committed]
        rows = torch.arange(len(slots), device=logits.device)[:, None]
        return logits[rows, (slots - max(first, 0)).clamp_min(0)]

    def _accept(self, logits: torch.Tensor, drafts: torch.LongTensor) -> torch.BoolTensor:
        """Whether each draft passes the acceptance rule, `(B, N)`."""
        known = drafts < logits.shape[-1]
        score = logits.gather(-1, drafts.clamp_max(logits.shape[-1] - 1)[..., None])
        better = (logits > score).sum(-1)
        return known & (better < self.top_k) & ((score.squeeze(-1) - logits.amax(-1)) >= self.log_threshold)

    def _count(self, judged: torch.BoolTensor, prefix: torch.BoolTensor) -> None:
        counts = torch.stack([judged.sum(1), prefix.sum(1)]).cpu()
        self.forwards[self.rows] += 1
        self.judged[self.rows] += counts[0]
        for row, accepted in zip(self.rows.tolist(), counts[1].tolist(), strict=True):
            self.accepted_lengths[row].append(accepted)

    def statistics(self, total_seconds: float) -> dict:
        """Counts of the call, per row of its batch, under the names of [`DiffusionGenerationOutput`]."""
        return {
            "guider_forwards": self.forwards,
            "drafts_judged": self.judged,
            "drafts_accepted": torch.tensor([sum(lengths) for lengths in self.accepted_lengths]),
            "accepted_lengths": self.accepted_lengths,
            "guider_time_share": self.seconds / total_seconds,
        }
