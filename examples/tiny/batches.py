"""Training batches of the embedded model pair: token rows for next-token loss and masked rows for diffusion loss.

Owns the mix of masking patterns and the weight of every target. Knows nothing of models or optimizers.

Shapes: B rows, T positions of a row. A row is a prompt, its answer, and end-of-text up to T (at least one).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from problems import answer_text, problems, prompt_text


TAIL_WEIGHT = 0.1  # of the end-of-text tokens after the first one of a row
DIGIT_CUTS = 6.0  # a cut falls before a digit this many times as often as before another token
PREFIX_DECAY = 0.5  # loss weight of a masked token against the masked token before it, in prefix rows
SHARES = (0.4, 0.3, 0.3)  # of scattered, prefix and block rows in a batch
BLOCK_LENGTHS = (4, 8, 16, 32, 64)
SHORT, MIDDLE, LONG = 52, 108, 288  # shortest, usually longest and longest T of a diffusion batch
LONG_SHARE = 0.03


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `target_ids` and `weights` of shape (B, T); `weights[:, i]` is the weight of the loss of
    `target_ids[:, i]`, which the logits at `i - 1` predict."""

    input_ids: Tensor
    target_ids: Tensor
    weights: Tensor


class Rows:
    """Endless rows of training problems: `take` gives token ids (B, T) with prompt and answer lengths (B,)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.stream = problems(seed, "train")
        self.tokenizer = tokenizer

    def take(self, size: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """`size` rows of `length` positions: filled up with end-of-text, or cut where the answer is longer."""
        drawn = list(islice(self.stream, size))
        prompts = self.tokenizer([prompt_text(problem.question) for problem in drawn])["input_ids"]
        answers = self.tokenizer([answer_text(problem.answer) for problem in drawn])["input_ids"]
        ids = torch.full((size, length), self.tokenizer.eos_token_id)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            text = torch.tensor((prompt + answer)[:length])
            ids[row, : len(text)] = text
        return ids, torch.tensor([len(p) for p in prompts]), torch.tensor([len(a) + 1 for a in answers])


def causal_batches(rows: Rows, size: int, length: int = 88) -> Iterator[Batch]:
    """Next-token batches; only the answer carries loss."""
    while True:
        ids, prompt_lengths, answer_lengths = rows.take(size, length)
        position = torch.arange(length)
        is_answer = position >= prompt_lengths[:, None]
        is_tail = position >= (prompt_lengths + answer_lengths)[:, None]
        yield Batch(ids, ids, is_answer * torch.where(is_tail, TAIL_WEIGHT, 1.0) / answer_lengths[:, None])


def diffusion_batches(rows: Rows, tokens: int, seed: int) -> Iterator[Batch]:
    """Masked batches of about `tokens` positions each, T drawn anew for every batch so that no length is special."""
    generator = torch.Generator().manual_seed(seed)
    digits = {i for token, i in rows.tokenizer.get_vocab().items() if token[-1].isdigit() and i >= 2}
    is_digit = torch.tensor([i in digits for i in range(max(digits) + 1)])
    while True:
        is_long = torch.rand((), generator=generator) < LONG_SHARE
        low, high = (MIDDLE, LONG) if is_long else (SHORT, MIDDLE)
        length = int(torch.randint(low, high + 1, (), generator=generator))
        ids, prompt_lengths, answer_lengths = rows.take(max(tokens // length, 1), length)
        starts = (ids < len(is_digit)) & is_digit[ids.clamp(max=len(is_digit) - 1)]
        masked, weights = mask_rows(starts, prompt_lengths, answer_lengths, generator)
        yield Batch(ids.masked_fill(masked, rows.tokenizer.mask_token_id), ids, weights)


def mask_rows(
    is_digit: Tensor, prompt_lengths: Tensor, answer_lengths: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Chooses what is masked and what it weighs, as (B, T) tensors, for rows of three patterns.

    - Scattered rows are LLaDA's objective in the form of equation 6 of https://arxiv.org/abs/2502.09992: l of the L
      canvas positions masked, l uniform in 1 ... L, weight 1/l.
    - Prefix rows hide all positions from a cut on (or a random part of them); the nearest masked token weighs most.
    - Block rows are what decoding in blocks meets: the blocks before are clear, the blocks after hidden, and l of the
      positions of the block are masked, each with weight 1/l.
    """
    size, length = is_digit.shape
    position = torch.arange(length).expand(size, length)
    pattern = torch.randperm(size, generator=generator) / size
    is_prefix = (pattern >= SHARES[0]) & (pattern < SHARES[0] + SHARES[1])
    is_block = pattern >= SHARES[0] + SHARES[1]

    cut = draw_cuts(is_digit, prompt_lengths, answer_lengths, generator)
    block_length = torch.tensor(BLOCK_LENGTHS)[torch.randint(len(BLOCK_LENGTHS), (size,), generator=generator)]
    block_start = prompt_lengths + (cut - prompt_lengths) // block_length * block_length
    low = torch.where(is_prefix, cut, torch.where(is_block, block_start, prompt_lengths))
    high = torch.where(is_block, (block_start + block_length).clamp(max=length), length)

    stratum = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
    is_whole = is_prefix & (torch.rand(size, generator=generator) < 0.5)
    count = torch.where(is_whole, high - low, (stratum * (high - low)).long() + 1)
    order = torch.rand(size, length, generator=generator)
    order = torch.where(is_prefix[:, None] & (position == cut[:, None]), -1.0, order)
    order = order.masked_fill((position < low[:, None]) | (position >= high[:, None]), 2.0)
    chosen = order.argsort(dim=1).argsort(dim=1) < count[:, None]

    nearness = PREFIX_DECAY ** (chosen.cumsum(dim=1) - 1).float()
    weights = torch.where(is_prefix[:, None], nearness, 1 / count[:, None])
    is_tail = position >= (prompt_lengths + answer_lengths)[:, None]
    weights = weights * torch.where(is_tail, TAIL_WEIGHT, 1.0) * chosen
    return chosen | (position >= high[:, None]), weights


def draw_cuts(is_digit: Tensor, prompt_lengths: Tensor, answer_lengths: Tensor, generator: torch.Generator) -> Tensor:
    """A position (B,) inside each answer; a digit is drawn `DIGIT_CUTS` times as often as another token."""
    position = torch.arange(is_digit.shape[1])
    in_answer = (position >= prompt_lengths[:, None]) & (position < (prompt_lengths + answer_lengths)[:, None])
    chance = in_answer * torch.where(is_digit, DIGIT_CUTS, 1.0)
    return torch.multinomial(chance, 1, generator=generator)[:, 0]
