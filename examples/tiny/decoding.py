"""A plain reference decoder for masked diffusion models and the exact match it reaches.

Owns the slow and obvious form of the loop: every forward reads the whole canvas, there is no cache. The package's own
loop is compared with it. Knows nothing of training.

Shapes: B rows, P prompt length, C canvas length, T = P + C.
"""

from collections import defaultdict

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from problems import Problem, final_number, prompt_text


def aligned_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits (B, T, V) at `i` that score the token at `i`; the logits of the model score the token at `i + 1`."""
    logits = model(input_ids=input_ids, use_cache=False).logits.float()
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_new_tokens: int = 64,
    block_length: int = 8,
    threshold: float | None = None,
    guider: PreTrainedModel | None = None,
) -> tuple[Tensor, Tensor]:
    """Fills a canvas after each of `prompt_ids` (B, P), block after block, every row at its own pace.

    A step of a row unmasks the most confident token of its block; with `threshold`, every token at least that
    confident too; with `guider`, instead the longest run of drafted tokens that the guider ranks first, at least one.
    A row ends when no mask is left before its first end-of-text token.

    Returns the canvas (B, C) and the number of forwards of each row (B,).
    """
    mask_id, eos_id = tokenizer.mask_token_id, tokenizer.eos_token_id
    prompt_length = prompt_ids.shape[1]
    ids = torch.cat([prompt_ids, torch.full((len(prompt_ids), max_new_tokens), mask_id)], dim=1)
    canvas = ids[:, prompt_length:]
    position = torch.arange(max_new_tokens)
    nfe = torch.zeros(len(ids), dtype=torch.long)
    while len(active := (canvas == mask_id).any(dim=1).nonzero()[:, 0]):
        masked = canvas[active] == mask_id
        block = masked.int().argmax(dim=1) // block_length
        candidates = masked & (position // block_length == block[:, None])
        confidence, draft = aligned_logits(model, ids[active])[:, prompt_length:].softmax(dim=-1).max(dim=-1)
        filled = torch.where(candidates, draft, canvas[active])
        if guider is not None:
            accepted = guided_run(guider, torch.cat([ids[active, :prompt_length], filled], dim=1), candidates)
        else:
            confidence = confidence.masked_fill(~candidates, -1.0)
            accepted = position == confidence.argmax(dim=1, keepdim=True)
            if threshold is not None:
                accepted |= confidence >= threshold
        canvas[active] = end_rows(torch.where(accepted, filled, canvas[active]), mask_id, eos_id)
        nfe[active] += 1
    return canvas, nfe


def guided_run(guider: PreTrainedModel, filled_ids: Tensor, candidates: Tensor) -> Tensor:
    """Which of `candidates` (B, C) to keep: those up to the first that the guider would not write, at least one."""
    choice = aligned_logits(guider, filled_ids).argmax(dim=-1)
    agrees = (choice == filled_ids)[:, -candidates.shape[1] :]
    run = candidates & (agrees | ~candidates).int().cumprod(dim=1).bool()
    first = torch.arange(candidates.shape[1]) == candidates.int().argmax(dim=1, keepdim=True)
    return run | first


def end_rows(canvas: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Fills a row of `canvas` (B, C) with end-of-text once no mask is left before its first end-of-text token."""
    ended = ((canvas == eos_id) & ((canvas == mask_id).cumsum(dim=1) == 0)).int().cumsum(dim=1) > 0
    return canvas.masked_fill(ended, eos_id)


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, prompt_ids: Tensor, tokenizer: PreTrainedTokenizerFast, *, max_new_tokens: int = 64
) -> tuple[Tensor, Tensor]:
    """Greedy next-token decoding of an autoregressive `model`; same shapes and ending as `decode`."""
    ids, nfe = prompt_ids, torch.zeros(len(prompt_ids), dtype=torch.long)
    ended = torch.zeros(len(prompt_ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        next_ids = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(dim=-1)
        nfe += ~ended
        ended |= next_ids == tokenizer.eos_token_id
        ids = torch.cat([ids, next_ids.masked_fill(ended, tokenizer.eos_token_id)[:, None]], dim=1)
        if ended.all():
            break
    return ids[:, prompt_ids.shape[1] :], nfe


def exact_match(
    decoder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exam: list[Problem], **options
) -> tuple[int, int]:
    """How many problems of `exam` end in the right number under `decoder`, and the forwards of all rows together.

    Problems are batched by prompt length, so that no row is padded.
    """
    groups = defaultdict(list)
    for problem in exam:
        prompt_ids = tokenizer(prompt_text(problem.question))["input_ids"]
        groups[len(prompt_ids)].append((prompt_ids, problem))
    right, forwards = 0, 0
    for group in groups.values():
        prompt_ids = torch.tensor([ids for ids, _ in group])
        canvas, nfe = decoder(model, prompt_ids, tokenizer, **options)
        forwards += int(nfe.sum())
        texts = tokenizer.batch_decode(canvas, skip_special_tokens=True)
        right += sum(final_number(text) == problem.final for text, (_, problem) in zip(texts, group, strict=True))
    return right, forwards
