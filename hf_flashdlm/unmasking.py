"""Unmasking: which of the drafted tokens are written at a step.

Owns candidates, their confidence, and the rules that say how many of the most confident are written. Knows nothing of
models, caches, blocks or time; works on tensors of shape (B, N): batch rows, candidate positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


def draft(
    scores: torch.Tensor, mask_token_id: int, generator: torch.Generator | None = None, sample: bool = False
) -> tuple[torch.LongTensor, torch.Tensor]:
    r"""
    The token drafted at each position and its probability.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`):
            Processed logits in float32. The column of the mask token is overwritten: it is never drafted.
        mask_token_id (`int`): A position whose only finite score is that of this token is refused: probability 0.
        generator (`torch.Generator`, *optional*): Source of the noise when sampling.
        sample (`bool`): Draw from the distribution (Gumbel-max) instead of taking the most likely token.

    Returns:
        `tuple`: token ids and probabilities, both of shape `(batch_size, num_positions)`.
    """
    normalizer = scores.logsumexp(-1)
    scores[..., mask_token_id] = -torch.inf
    if sample:
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device)
        token_ids = (scores - (-uniform.log()).log()).argmax(-1)
    else:
        token_ids = scores.argmax(-1)
    best = scores.gather(-1, token_ids[..., None]).squeeze(-1)
    return token_ids, (best - normalizer).exp()


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Write every candidate at least this confident (Fast-dLLM, https://arxiv.org/abs/2505.22618, algorithm 1)."""

    threshold: float

    def __call__(self, confidence: torch.Tensor) -> torch.LongTensor:
        """Number of candidates to write, `(batch_size,)`, from `(batch_size, num_positions)` sorted downwards."""
        return (confidence >= self.threshold).sum(1)


def select(
    confidence: torch.Tensor,
    candidate: torch.BoolTensor,
    quota: torch.LongTensor,
    rule: Callable[[torch.Tensor], torch.LongTensor] | None = None,
) -> torch.BoolTensor:
    r"""
    The candidates to write: the most confident of each row, as many as the rule says and at least its quota.

    Args:
        confidence (`torch.Tensor` of shape `(batch_size, num_positions)`): Higher is written earlier; among equals
            the lower position is.
        candidate (`torch.BoolTensor` of shape `(batch_size, num_positions)`): Positions that may be written.
        quota (`torch.LongTensor` of shape `(batch_size,)`): Tokens to write at the least, where there are as many.
        rule (`Callable`, *optional*): Maps the confidence, sorted downwards with `-inf` behind the last candidate, to
            the number of tokens to write; by default the quota alone counts.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_positions)`.
    """
    ranked, order = confidence.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True)
    count = quota if rule is None else torch.maximum(rule(ranked), quota)
    chosen = torch.arange(ranked.shape[1], device=ranked.device) < count[:, None]
    return torch.zeros_like(candidate).scatter(1, order, chosen) & candidate
