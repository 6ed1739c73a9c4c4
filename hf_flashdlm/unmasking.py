"""Unmasking: which of the drafted tokens are written at a step.

Owns candidates, their confidence, and the rules that say how many of the most confident are written. Knows nothing of
models, caches, blocks or time; works on tensors of shape (B, N): batch rows, candidate positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


MAX_ODDS = 1e38  # a draft that unlikely is one all the same


def gumbel(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel noise of the shape of `like`: adding it to log-probabilities and taking the maximum samples from them."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()


def draft(
    scores: torch.Tensor,
    mask_token_id: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.LongTensor, torch.Tensor]:
    r"""
    The token drafted at each position and its probability.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Processed logits in float32.
        mask_token_id (`int`): Never drafted; a position whose only finite score is its is refused.
        temperature (`float`, *optional*): What the scores have been divided by: tokens are drawn from them. Without it
            the most likely are taken.
        generator (`torch.Generator`, *optional*): Source of the noise when drawing.

    Returns:
        `tuple`: token ids and their probabilities at temperature 1, both of shape `(batch_size, num_positions)`;
        `-inf` where the position is refused. The probabilities are in float64, where those near 1 keep their order;
        nothing over the vocabulary is.
    """
    others = scores.clone()
    others[..., mask_token_id] = -torch.inf
    noisy = others if temperature is None else others + gumbel(others, generator)
    token_ids = noisy.argmax(-1, keepdim=True)
    log_odds = scores - scores.gather(-1, token_ids)  # against the draft, of each other token
    if temperature is not None:
        log_odds *= temperature
    odds = log_odds.exp_().scatter_(-1, token_ids, 0.0)
    # Only the sum is in float64: in float32 equal distributions of other tokens would not have equal sums.
    odds = odds.sum(-1, dtype=torch.float32 if scores.device.type == "mps" else torch.float64)
    # Where nothing but the mask token is finite, the odds are not a number.
    return token_ids.squeeze(-1), odds.clamp_max_(MAX_ODDS).add_(1).reciprocal_().nan_to_num_(-torch.inf)


def negative_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Minus the entropy in nats of the distributions over the last dimension of `scores`."""
    return -torch.special.entr(scores.softmax(-1)).sum(-1)


def margin(scores: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely token less that of the second, over the last dimension of `scores`."""
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    normalizer = scores.logsumexp(-1)
    return (first - normalizer).exp() - (second - normalizer).exp()


@dataclass(frozen=True)
class Drafter:
    r"""
    Drafts a token for every position and says how confident it is.

    Args:
        mask_token_id (`int`): Never drafted.
        confidence (`str`): `"probability"` of the drafted token (LLaDA's low_confidence, Dream's maskgit_plus),
            `"margin"` between the two most likely (Dream's topk_margin), `"entropy"`, negated, or `"random"`.
        position_temperature (`float`): Noise on the order of the positions (Dream's alg_temp); 0 is none.
        temperature (`float`, *optional*): What the scores have been divided by: tokens are drawn from them. The
            confidence is that of temperature 1, since it would saturate at lower ones.
        generator (`torch.Generator`, *optional*): Source of randomness.
    """

    mask_token_id: int
    confidence: str = "probability"
    position_temperature: float = 0.0
    temperature: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, scores: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
        """Token ids and confidence, both `(batch_size, num_positions)`; `-inf` where the position is refused."""
        token_ids, probability = draft(scores, self.mask_token_id, self.temperature, self.generator)
        confidence = probability
        if self.confidence in ("margin", "entropy"):
            measure = margin if self.confidence == "margin" else negative_entropy
            confidence = measure(scores if self.temperature is None else scores * self.temperature)
        elif self.confidence == "random":
            confidence = torch.rand(probability.shape, generator=self.generator, device=scores.device)
        if self.position_temperature:
            confidence = confidence / self.position_temperature + gumbel(confidence, self.generator)
        if confidence is not probability:
            confidence = confidence.masked_fill(probability == -torch.inf, -torch.inf)
        return token_ids, confidence


@dataclass(frozen=True)
class ConfidenceThreshold:
    """Write every candidate at least this confident (Fast-dLLM, https://arxiv.org/abs/2505.22618, algorithm 1)."""

    threshold: float

    def __call__(self, confidence: torch.Tensor) -> torch.LongTensor:
        """Number of candidates to write, `(batch_size,)`, from `(batch_size, num_positions)` sorted downwards."""
        return (confidence >= self.threshold).sum(1)


@dataclass(frozen=True)
class ConfidenceFactor:
    r"""
    Write the n most confident, for the largest n with (i + 1) (1 - c_i) <= `factor` for all i from 2 to n (Fast-dLLM,
    https://arxiv.org/abs/2505.22618, section 3.3).
    """

    factor: float

    def __call__(self, confidence: torch.Tensor) -> torch.LongTensor:
        """Number of candidates to write, `(batch_size,)`, from `(batch_size, num_positions)` sorted downwards."""
        rank = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        passes = confidence >= 1 - self.factor / (rank + 1)
        passes[:, 0] = True
        return passes.long().cumprod(1).sum(1)


@dataclass(frozen=True)
class FrechetProfile:
    r"""
    Write the n most confident, for the largest n with c_1 + ... + c_n - (n - 1) - (1 - c_n) > `delta`: a Frechet bound
    on the probability that all n are right (Fast-dLLM++, https://arxiv.org/abs/2606.02955).
    """

    delta: float

    def __call__(self, confidence: torch.Tensor) -> torch.LongTensor:
        """Number of candidates to write, `(batch_size,)`, from `(batch_size, num_positions)` sorted downwards."""
        rank = torch.arange(1, confidence.shape[1] + 1, device=confidence.device)
        bound = confidence.cumsum(1) - (rank - 1) - (1 - confidence)
        return (bound > self.delta).long().cumprod(1).sum(1)


@dataclass(frozen=True)
class EntropyBound:
    r"""
    Write the n positions of least entropy, for the largest n whose summed entropy, the largest left out, is at most
    `bound` nats (EB-Sampler, https://arxiv.org/abs/2505.24857; transformers' `EntropyBoundSampler`). The confidence is
    the negative entropy.
    """

    bound: float

    def __call__(self, confidence: torch.Tensor) -> torch.LongTensor:
        """Number of candidates to write, `(batch_size,)`, from `(batch_size, num_positions)` sorted downwards."""
        nats = -confidence
        return ((nats.cumsum(1) - nats) <= self.bound).sum(1)


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
            the lower position is. `-inf` is never written.
        candidate (`torch.BoolTensor` of shape `(batch_size, num_positions)`): Positions that may be written.
        quota (`torch.LongTensor` of shape `(batch_size,)`): Tokens to write at the least, where there are as many.
        rule (`Callable`, *optional*): Maps the confidence, sorted downwards with `-inf` behind the last candidate, to
            the number of tokens to write; by default the quota alone counts.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, num_positions)`.
    """
    ranked, order = torch.where(candidate, confidence, -torch.inf).sort(dim=1, descending=True, stable=True)
    count = quota if rule is None else torch.maximum(rule(ranked), quota)
    chosen = torch.arange(ranked.shape[1], device=ranked.device) < count[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen & (ranked > -torch.inf))
