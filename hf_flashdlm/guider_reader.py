"""Reading a canvas through an autoregressive model.

Owns that model's forward, what is asked of it, its cache and what the cache holds. Knows nothing of acceptance rules,
of how drafts are chosen, or of the diffusion model.
"""

import inspect
import time
from dataclasses import replace

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .compiling import CompiledForward, cache_name, device_of


PADDING = 256  # two models with one tokenizer may round the size of its vocabulary up differently


def start_cache(model) -> DynamicCache:
    r"""
    An empty cache for `model` that can be cropped to any length.

    Layers with a sliding window keep all their states as well: the attention mask hides what is outside the window,
    while a layer that had dropped it would lack it after a crop.

    Raises:
        ValueError: If the model has no such cache, or is not causal.
    """
    if isinstance(model, PreTrainedModel):  # a wrapper, of an adapter say, hands on what it is given
        accepted = inspect.signature(model.forward).parameters
        missing = [f"`{name}`" for name in (cache_name(model), "logits_to_keep") if name not in accepted]
        if missing and not model._is_stateful:
            raise ValueError(
                f"`guider` must take {' and '.join(missing)} in its forward, which {type(model).__name__} does not: "
                "choose another model."
            )
    if not getattr(model.config.get_text_config(), "is_causal", True):
        raise ValueError(
            f"`guider` must be autoregressive, got {type(model).__name__}, which sees the drafts that it is to judge: "
            "choose a causal language model."
        )
    cache = DynamicCache(config=model.config)
    if getattr(model, "_is_stateful", False) or not cache.is_croppable:
        raise ValueError(
            f"`guider` must attend to its tokens in every layer, got {type(model).__name__}, whose recurrent states "
            "cannot be taken back when a draft is refused: choose another model."
        )
    cache.layers = [DynamicLayer() if type(one) is DynamicSlidingWindowLayer else one for one in cache.layers]
    return cache


def check_length(model, length: int) -> None:
    """Refuse more tokens than the model has positions for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"`guider` must have positions for the {length} tokens that it reads, got a model of {longest}: shorten "
            "`max_new_tokens` or the prompt."
        )


class ARReader(LogitsProcessor):
    """
    Reads a canvas with drafts in place of its masks through an autoregressive model with a K/V cache.

    Abstract: [`ARGuider`] judges the drafts by what it reads, [`ProductMixture`] mixes it with the scores. Its cache
    holds the states of the prefix that was clean at the last call, and nothing else: drafts are read anew each time.
    """

    reads_canvas = True  # called with the canvas and (B, N, V) scores, not position by position
    reads_text = False  # whether through a [`TextReader`]

    def __init__(self, model, num_drafts: int):
        if not isinstance(num_drafts, int) or num_drafts < 1:
            raise ValueError(f"`num_drafts` must be a positive integer, got {num_drafts!r}.")
        self.model = model
        self.num_drafts = num_drafts

    @property
    def lookahead(self) -> int | None:
        """Positions from the frontier on that a step has to score; `None` for those of the block."""
        return self.num_drafts

    @property
    def shares_vocabulary(self) -> bool:
        """Whether it is known to, so that the sizes may differ by padding, or need not."""
        return False

    def reset(
        self,
        diffusion_model,
        canvas_mask: torch.LongTensor,
        mask_token_id: int,
        temperature=None,
        generator=None,
        compile_config=None,
    ) -> None:
        r"""
        Forget the last call; called at the start of every `generate`.

        Args:
            diffusion_model (`PreTrainedModel`): The model whose drafts are read.
            canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas is padding.
            mask_token_id (`int`): The diffusion model's mask token.
            temperature (`float`, *optional*): Draw the drafts, from scores divided by this, instead of taking the
                most likely tokens.
            generator (`torch.Generator`, *optional*): Source of randomness when drawing.
            compile_config (`CompileConfig`, *optional*): Compile the forward, for shapes of any size.

        Raises:
            ValueError: If the guider has another vocabulary, too few positions, or no cache that can be cropped.
        """
        vocab_size = diffusion_model.config.get_text_config().vocab_size
        self.vocab_size, self.canvas_vocab_size = self.model.config.get_text_config().vocab_size, vocab_size
        if abs(self.vocab_size - vocab_size) > min(PADDING, vocab_size // 100) and not self.shares_vocabulary:
            raise ValueError(
                f"`guider` must share the diffusion model's vocabulary of {vocab_size} tokens, got one of "
                f"{self.vocab_size}: pass both tokenizers, `ARGuider(model, tokenizer=..., canvas_tokenizer=...)`."
            )
        self.mask_token_id, self.temperature, self.generator = mask_token_id, temperature, generator
        if not self.reads_text:
            check_length(self.model, int(canvas_mask.sum(1).max()))
        self.canvas_mask = canvas_mask.to(device_of(self.model))
        self.is_padded = not bool(canvas_mask.all())
        self.position_ids = (self.canvas_mask.cumsum(1) - 1).clamp_min(0)
        if compile_config is not None:  # what it reads grows: no captured graph would be used twice
            compile_config = replace(compile_config, dynamic=True, mode=None)
        self.forward = CompiledForward(self.model, compile_config)
        self.cache = start_cache(self.model)
        self.committed = 0  # length of the clean prefix that all rows shared at the last call
        self.rows = torch.arange(len(canvas_mask))
        self.seen = self.canvas_mask.new_zeros(len(canvas_mask), 0)  # its ids
        self.unchanged = []  # of each call, on the device: whether it found them on the canvas
        self.forwards = [0] * len(canvas_mask)  # of each row
        self.seconds = 0.0

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.canvas_mask.device)
        self.canvas_mask, self.position_ids = self.canvas_mask[rows], self.position_ids[rows]
        self.seen = self.seen[rows]
        if self.cache.is_initialized:
            self.cache.batch_select_indices(rows)
        self.rows = self.rows[indices]

    def __call__(
        self,
        input_ids: torch.LongTensor,
        scores: torch.Tensor,
        positions: torch.LongTensor,
        frontier: torch.LongTensor,
        candidate: torch.BoolTensor | None = None,
    ) -> torch.Tensor:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, canvas_length)`): The canvas, masks included.
            scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Scores of the diffusion model.
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                Consecutive canvas positions that the scores belong to, on the CPU.
            frontier (`torch.LongTensor` of shape `(batch_size,)`): First masked position of each row, on the CPU.
            candidate (`torch.BoolTensor` of shape `(batch_size, num_positions)`, *optional*):
                Which positions may be written, on the CPU; by default the masked ones.

        Returns:
            `torch.Tensor`: Scores of the same shape.
        """
        started = time.perf_counter()
        if candidate is None:
            candidate = (input_ids.gather(1, positions.to(input_ids.device)) == self.mask_token_id).cpu()
        scores = self._process(input_ids, scores, positions, frontier, candidate)
        self.seconds += time.perf_counter() - started
        return scores

    def _process(self, input_ids, scores, positions, frontier, candidate) -> torch.Tensor:
        raise NotImplementedError

    def _fill(self, input_ids, drafts, positions) -> torch.LongTensor:
        """The canvas with the drafts in place of its masks at `positions`."""
        filled = input_ids.scatter(1, positions.to(input_ids.device), drafts)
        return torch.where(input_ids == self.mask_token_id, filled, input_ids)

    def _count_forward(self, asked: torch.BoolTensor | None) -> None:
        for row in (self.rows if asked is None else self.rows[asked]).tolist():
            self.forwards[row] += 1

    def _read(self, input_ids, drafts, positions, frontier, asked=None) -> torch.Tensor:
        """
        Logits of the autoregressive model that score `positions`, `(B, N, V)`, on the device of the scores. The
        forward counts for the rows `asked`, a bool per row; by default for all.
        """
        canvas = self._fill(input_ids, drafts, positions).to(self.canvas_mask.device)
        if self.vocab_size < self.canvas_vocab_size:
            canvas = canvas.clamp_max(self.vocab_size - 1)  # what the guider does not know it cannot accept
        begins, num_positions, clean = positions[:, 0].tolist(), positions.shape[1], int(frontier.min())
        if clean < self.committed:
            raise RuntimeError(
                f"`frontier` must not move back from one call to the next, got {clean} after {self.committed}: "
                "`reset` the guider before another canvas."
            )
        start = max(self.committed - 1, 0)
        stop = max(max(begins) + num_positions - 1, start + 1)
        self.unchanged.append((self.seen[:, :start] == canvas[:, :start]).all())
        self.cache.crop(min(start - self.cache.get_seq_length(), 0))
        first = max(min(begins) - 1 - start, 0)
        logits = self.forward(
            input_ids=canvas[:, start:stop],
            attention_mask=self.canvas_mask[:, :stop] if self.is_padded else None,
            position_ids=self.position_ids[:, start:stop],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=stop - start - first,
        ).logits
        self.committed, self.seen = clean, canvas[:, :clean]
        self._count_forward(asked)
        if logits.shape[1] > num_positions or min(begins) - 1 - start < 0:
            slots = (positions - 1 - start - first).clamp_min(0).to(logits.device)
            logits = logits[torch.arange(len(slots), device=logits.device)[:, None], slots]
        return logits.to(input_ids.device)

    def statistics(self, total_seconds: float) -> dict:
        """
        Counts of the call, per row of its batch, under the names of [`DiffusionGenerationOutput`].

        Raises:
            RuntimeError: If the canvas was changed behind the guider's back; waits for the device, as a step does not.
        """
        if self.unchanged and not torch.stack(self.unchanged).all():
            raise RuntimeError(
                "The canvas left of the frontier has changed between two calls: `reset` the guider before another one."
            )
        return {"guider_forwards": torch.tensor(self.forwards), "guider_time_share": self.seconds / total_seconds}
