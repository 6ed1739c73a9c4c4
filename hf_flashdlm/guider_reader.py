"""Reading a canvas through an autoregressive model.

Owns that model's forward, what is asked of it, its cache and what the cache holds, for one call of `generate`. Knows
nothing of acceptance rules, of how drafts are chosen, or of the diffusion model.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .compiling import CompiledForward, cache_name, device_of, forward_parameters, unwrapped
from .fused_layers import fused_view


PADDING = 256  # two models with one tokenizer may round the size of its vocabulary up differently


def is_language_model(model) -> bool:
    """Whether `model` is a model of Transformers, or hands on its config as a wrapper does."""
    has_config = hasattr(getattr(model, "config", None), "get_text_config")
    return has_config and hasattr(model, "forward") and not isinstance(model, type)


def check_vocabulary(model, diffusion_model) -> None:
    """Refuse a guider whose vocabulary cannot be the diffusion model's."""
    guider_size, size = (one.config.get_text_config().vocab_size for one in (model, diffusion_model))
    if abs(guider_size - size) > min(PADDING, size // 100):
        raise ValueError(
            f"`guider` must share the diffusion model's vocabulary of {size} tokens, got one of {guider_size}: pass "
            "both tokenizers, `ARGuider(model, tokenizer=..., canvas_tokenizer=...)`."
        )


def start_cache(model) -> DynamicCache:
    r"""
    An empty cache for `model` that can be cropped to any length.

    Layers with a sliding window keep all their states as well: the attention mask hides what is outside the window,
    while a layer that had dropped it would lack it after a crop.

    Raises:
        ValueError: If the model has no such cache, is not causal, or reads tokens that it is not given.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if isinstance(inner, PreTrainedModel):
        accepted = forward_parameters(inner)
        missing = [f"`{one}`" for one in (cache_name(model), "logits_to_keep") if one not in accepted]
        if missing and not inner._is_stateful:
            raise ValueError(
                f"`guider` must take {' and '.join(missing)} in its forward, which {name} does not: choose another "
                "model."
            )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "`guider` must read the canvas as it is, got an adapter that puts learned tokens before it: choose one "
            "that changes weights, such as LoRA."
        )
    if not getattr(model.config.get_text_config(), "is_causal", True):
        raise ValueError(
            f"`guider` must be autoregressive, got {name}, which sees the drafts that it is to judge: choose a causal "
            "language model."
        )
    cache = DynamicCache(config=model.config)
    if getattr(inner, "_is_stateful", False) or not cache.is_croppable:
        raise ValueError(
            f"`guider` must attend to its tokens in every layer, got {name}, whose recurrent states cannot be taken "
            "back when a draft is refused: choose another model."
        )
    cache.layers = [DynamicLayer() if type(one) is DynamicSlidingWindowLayer else one for one in cache.layers]
    return cache


def start_forward(model, compile_config) -> CompiledForward:
    """The forward of `model`, compiled for shapes of any size: what it reads grows, so no graph is captured."""
    if compile_config is None:
        return CompiledForward(fused_view(model))
    return CompiledForward(model, replace(compile_config, dynamic=True, mode=None))


def check_length(model, length: int) -> None:
    """Refuse more tokens than the model has positions for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"`guider` must have positions for the {length} tokens that it reads, got a model of {longest}: shorten "
            "`max_new_tokens` or the prompt."
        )


def check_finite(model, is_finite: bool) -> None:
    """Refuse logits that are no numbers."""
    if not is_finite:
        raise ValueError(
            f"`guider` must give finite logits, got infinite ones or NaN from {type(unwrapped(model)).__name__}: load "
            "it in bfloat16 or float32, and check its weights."
        )


def fill(canvas: torch.Tensor, drafts: torch.Tensor, positions, mask_token_id: int) -> torch.Tensor:
    """The canvas with the drafts in place of its masks at `positions`."""
    filled = canvas.scatter(1, positions.to(canvas.device), drafts)
    return torch.where(canvas == mask_token_id, filled, canvas)


class ARReader:
    r"""
    Reads a canvas of one call, with drafts in place of its masks, through a model with the canvas's vocabulary.

    Its cache holds the states of the prefix that was clean at the last call, and nothing else: drafts are read anew
    each time.

    Args:
        model (`PreTrainedModel`): A causal language model with attention in every layer.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas is padding.
        mask_token_id (`int`): The mask token of the canvas.
        num_ids (`int`): The ids of the canvas are less than this.
        compile_config (`CompileConfig`, *optional*): Compile the forward.

    Raises:
        ValueError: If the model has too few positions, or no cache that can be cropped.
    """

    def __init__(self, model, canvas_mask: torch.Tensor, mask_token_id: int, num_ids: int, compile_config=None):
        check_length(model, int(canvas_mask.sum(1).max()))
        self.forward, self.cache = start_forward(model, compile_config), start_cache(model)
        self.model, self.mask_token_id = model, mask_token_id
        self.vocab_size = model.config.get_text_config().vocab_size
        self.is_smaller = self.vocab_size < num_ids  # than the vocabulary of the canvas
        self.canvas_mask = canvas_mask.to(device_of(model))
        self.is_padded = not bool(canvas_mask.all())
        self.position_ids = (self.canvas_mask.cumsum(1) - 1).clamp_min(0)
        self.committed = 0  # length of the clean prefix that all rows shared at the last call
        self.seen = self.canvas_mask.new_zeros(len(canvas_mask), 0)  # its ids
        # Of each call, on the device: whether it found the prefix as it was, and finite logits.
        self.unchanged: list[torch.Tensor] = []
        self.finite: list[torch.Tensor] = []

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        rows = indices.to(self.canvas_mask.device)
        self.canvas_mask, self.position_ids = self.canvas_mask[rows], self.position_ids[rows]
        self.seen = self.seen[rows]
        if self.cache.is_initialized:
            self.cache.batch_select_indices(rows)

    def judge(self, canvas, drafts, positions, frontier, judged, accept: Callable) -> torch.Tensor:
        r"""
        Which drafts a rule accepts, from one forward.

        Args:
            canvas (`torch.LongTensor` of shape `(batch_size, canvas_length)`): Token ids, masks included.
            drafts (`torch.LongTensor` of shape `(batch_size, num_positions)`): The drafts, on the canvas's device.
            positions (`torch.LongTensor` of shape `(batch_size, num_positions)`):
                Their consecutive canvas positions, on the CPU.
            frontier (`torch.LongTensor` of shape `(batch_size,)`): First masked position of each row, on the CPU.
            judged (`torch.BoolTensor` of shape `(batch_size, num_positions)`):
                Which of the drafts matter; those before the frontier never do.
            accept (`Callable`): `(logits (..., vocab_size), ids (...)) -> accepted (...)`.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, num_positions)`, on the canvas's device.
        """
        logits = self.read(canvas, drafts, positions, frontier, judged)
        if not self.is_smaller:
            return accept(logits, drafts)
        return accept(logits, drafts.clamp_max(self.vocab_size - 1)) & (drafts < self.vocab_size)

    def read(self, canvas, drafts, positions, frontier, judged) -> torch.Tensor:
        """Logits that score `positions`, `(B, N, V)`, on the canvas's device; for the rest see [`ARReader.judge`]."""
        device = self.canvas_mask.device
        ids = fill(canvas, drafts, positions, self.mask_token_id).to(device)
        if self.is_smaller:
            ids = ids.clamp_max(self.vocab_size - 1)  # what the model does not know it cannot accept
        begins, num_positions, clean = positions[:, 0].tolist(), positions.shape[1], int(frontier.min())
        if clean < self.committed:
            raise RuntimeError(
                f"`frontier` must not move back from one call to the next, got {clean} after {self.committed}: "
                "`reset` the guider before another canvas."
            )
        start = max(self.committed - 1, 0)
        stop = max(max(begins) + num_positions - 1, start + 1)
        self.unchanged.append((self.seen[:, :start] == ids[:, :start]).all())
        self.cache.crop(min(start - self.cache.get_seq_length(), 0))
        first = max(min(begins) - 1 - start, 0)
        logits = self.forward(
            input_ids=ids[:, start:stop],
            attention_mask=self.canvas_mask[:, :stop] if self.is_padded else None,
            position_ids=self.position_ids[:, start:stop],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=stop - start - first,
        ).logits
        self.committed, self.seen = clean, ids[:, :clean]
        if logits.shape[1] > num_positions or min(begins) - 1 - start < 0:
            slots = (positions - 1 - start - first).clamp_min(0).to(logits.device)
            logits = logits[torch.arange(len(slots), device=logits.device)[:, None], slots]
        is_finite = logits.amax(-1).abs() < torch.inf
        self.finite.append((is_finite >= judged.to(logits.device)).all().to(device))  # each one judged is finite
        return logits.to(canvas.device)

    def check(self) -> None:
        """
        Look back at the calls since the last check; waits for the device, as they do not.

        Raises:
            ValueError: If logits were not finite.
            RuntimeError: If the canvas was changed left of the frontier.
        """
        if not self.unchanged:
            return
        flags = [torch.stack(one).all() for one in (self.finite, self.unchanged)]
        is_finite, is_unchanged = torch.stack(flags).tolist()
        self.unchanged, self.finite = [], []
        check_finite(self.model, is_finite)
        if not is_unchanged:
            raise RuntimeError(
                "The canvas left of the frontier has changed between two calls: `reset` the guider before another one."
            )
