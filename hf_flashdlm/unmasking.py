"""Unmasking: which of the drafted tokens are written at a step.

Owns candidates, their confidence, and the rules that say how many of the most confident are written. Knows nothing of
models, caches, blocks or time. Drafts and confidence are tensors of shape (B, N), batch rows and positions, like the
scores; what is written is chosen row by row from Python numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Protocol

import torch


def gumbel(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gumbel noise of the shape of `like`: adding it to log-probabilities and taking the maximum samples from them."""
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    return -(-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()


def draft(
    scores: torch.Tensor,
    mask_token_id: int,
    temperature: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Draft a token at each position, and its probability.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Processed logits in float32.
        mask_token_id (`int`): Never drafted; a position without another finite score is refused.
        temperature (`float`, *optional*): The temperature that the scores have been divided by: tokens are drawn.
            Without it the most likely tokens are taken.
        generator (`torch.Generator`, *optional*): Source of the noise when drawing.

    Returns:
        `tuple`: token ids and their probabilities at temperature 1, both of shape `(batch_size, num_positions)`;
        `-inf` where the position is refused. Probabilities are float64, so that values near 1 keep their order; no
        vocabulary-sized tensor is.
    """
    others = scores.clone()
    others.select(-1, mask_token_id).fill_(-torch.inf)
    if temperature is None:
        best, token_ids = others.max(-1, keepdim=True)
    else:
        token_ids = (others + gumbel(others, generator)).argmax(-1, keepdim=True)
        best = scores.gather(-1, token_ids)
    log_odds = scores - best  # of every other token against the draft
    if temperature is not None:
        log_odds *= temperature
    odds = log_odds.exp_().scatter_(-1, token_ids, 0.0)
    # Only the sum is in float64: in float32 equal distributions of other tokens would not have equal sums.
    odds = odds.sum(-1, dtype=torch.float32 if scores.device.type == "mps" else torch.float64)
    # If only the mask token has a finite score, the odds are NaN.
    return token_ids.squeeze(-1), odds.add_(1).reciprocal_().nan_to_num_(-torch.inf)


def negative_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Minus the entropy in nats of the distributions over the last dimension of `scores`."""
    return -torch.special.entr(scores.softmax(-1)).sum(-1)


def margin(scores: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely token minus that of the second, over the last dimension of `scores`."""
    first, second = scores.topk(2, dim=-1).values.unbind(-1)
    normalizer = scores.logsumexp(-1)
    return (first - normalizer).exp() - (second - normalizer).exp()


class Confidence(Protocol):
    """Says how sure a model is of its drafts. Passed to `generate` as `confidence=`."""

    def __call__(self, scores: torch.Tensor, token_ids: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            scores (`torch.Tensor` of shape `(batch_size, num_positions, vocab_size)`): Processed logits in float32.
            token_ids (`torch.LongTensor` of shape `(batch_size, num_positions)`): The drafts.
            probability (`torch.Tensor` of shape `(batch_size, num_positions)`):
                Probability of each draft at temperature 1.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_positions)`: A position of higher confidence is written earlier.
        """
        ...


@dataclass(frozen=True)
class Drafter:
    r"""
    Drafts a token for every position and says how confident it is.

    Args:
        mask_token_id (`int`): Never drafted.
        confidence (`str` or [`Confidence`]): `"probability"` of the drafted token (LLaDA's low_confidence, Dream's
            maskgit_plus), `"margin"` between the two most likely (Dream's topk_margin), `"entropy"`, negated,
            `"random"`, `"position"`, the first one being the surest, or an object.
        position_temperature (`float`): Noise on the order of the positions (Dream's alg_temp); 0 is none.
        temperature (`float`, *optional*): The temperature that the scores have been divided by: tokens are drawn. The
            confidence is that of temperature 1, since it would saturate at lower temperatures.
        generator (`torch.Generator`, *optional*): Source of randomness.
    """

    mask_token_id: int
    confidence: str | Confidence = "probability"
    position_temperature: float = 0.0
    temperature: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and confidence, both `(batch_size, num_positions)`; `-inf` where the position is refused."""
        token_ids, probability = draft(scores, self.mask_token_id, self.temperature, self.generator)
        confidence = probability
        if self.confidence in ("margin", "entropy"):
            measure = margin if self.confidence == "margin" else negative_entropy
            confidence = measure(scores if self.temperature is None else scores * self.temperature)
        elif self.confidence == "random":
            confidence = torch.rand(probability.shape, generator=self.generator, device=scores.device)
        elif self.confidence == "position":
            confidence = (
                -torch.arange(probability.shape[1], device=scores.device).to(probability).expand_as(probability)
            )
        elif not isinstance(self.confidence, str):
            confidence = self._ask(self.confidence, scores, token_ids, probability)
        if self.position_temperature:
            confidence = confidence / self.position_temperature + gumbel(confidence, self.generator)
        if confidence is not probability:
            confidence = confidence.masked_fill(probability == -torch.inf, -torch.inf)
        return token_ids, confidence

    @staticmethod
    def _ask(measure: Confidence, scores, token_ids, probability) -> torch.Tensor:
        confidence = measure(scores, token_ids, probability)
        shape = getattr(confidence, "shape", None)
        if shape != probability.shape:
            raise ValueError(
                f"`confidence` must return a tensor of shape {tuple(probability.shape)}, a number for each position, "
                f"got {type(confidence).__name__ if shape is None else tuple(shape)} from "
                f"{type(measure).__name__}."
            )
        return confidence.to(probability.dtype)


@dataclass
class Drafts:
    r"""
    What a step has drafted for one row, in canvas positions.

    Args:
        positions (`range`): The positions that were scored, from the first mask on.
        token_ids (`list[int]`): The token drafted at each of them.
        confidence (`list[float]`): Confidence of each draft; `-inf` where a processor has refused the position.
        candidates (`list[int]`): The positions that may be written at this step, in order.
        quota (`int`): Number of tokens that the schedule asks for at this step.
    """

    positions: range
    token_ids: list[int]
    confidence: list[float]
    candidates: list[int]
    quota: int = 1

    def token_id(self, position: int) -> int:
        """The token drafted at a position."""
        return self.token_ids[position - self.positions.start]

    def confidence_of(self, position: int) -> float:
        """The confidence of the draft at a position."""
        return self.confidence[position - self.positions.start]

    def ranked(self) -> list[int]:
        """The candidates, the most confident first; ties go to the lower position."""
        return sorted(self.candidates, key=self.confidence_of, reverse=True)  # stable


class UnmaskingRule(Protocol):
    """Decides which drafts are written. Passed to `generate` as `unmasking_rule=`."""

    def __call__(self, drafts: Drafts, row) -> Iterable[int]:
        r"""
        Args:
            drafts ([`Drafts`]): What the step has drafted for the row.
            row ([`Row`]): The state of the row.

        Returns:
            `Iterable[int]`: Some of `drafts.candidates`. If it is empty although the schedule asks for tokens, the
            most confident candidate is written, so that every step makes progress.
        """
        ...


@dataclass(frozen=True)
class MostConfident:
    """Write the most confident candidates, as many as the schedule says; subclasses may ask for more in `count`."""

    def count(self, confidence: list[float]) -> int:
        """Number of candidates to write, given their confidence in descending order; at least the quota is written."""
        return 0

    def __call__(self, drafts: Drafts, row) -> list[int]:
        """See [`UnmaskingRule`]."""
        ranked = drafts.ranked()
        return ranked[: max(self.count([drafts.confidence_of(position) for position in ranked]), drafts.quota)]


@dataclass(frozen=True)
class TokenEditing:
    r"""
    The tokens of a block are open until the block is finished: at every step those that the model would now write
    otherwise, and is sure of, are replaced (LLaDA2.1, https://huggingface.co/inclusionAI/LLaDA2.1-mini).

    A block is finished when a step that saw no mask in it replaces nothing, or after `max_post_steps` such steps.

    Args:
        threshold (`float`): A token is replaced by another one of more than this confidence.
        max_post_steps (`int`): Number of steps of a block that may see no mask in it.
    """

    threshold: float
    max_post_steps: int

    def __call__(self, drafts: Drafts, row, chosen: list[int], written: list[int]) -> tuple[list[int], Iterable[int]]:
        r"""
        Args:
            drafts ([`Drafts`]): What the step has drafted for the row.
            row ([`Row`]): The state of the row.
            chosen (`list[int]`): The masked positions that the rule has chosen.
            written (`list[int]`): The open positions that hold a token.

        Returns:
            `tuple`: All positions to write, in order, and the positions that are final after this step.
        """
        block = range(row.frontier, row.block_stop)
        edits = [
            position
            for position in written
            if position in block
            and drafts.confidence_of(position) > self.threshold
            and drafts.token_id(position) != row.tokens[position]
        ]
        num_masked = row.masked.count(True, block.start, block.stop)
        row.block_checks += num_masked == 0
        is_filled = num_masked == sum(position in block for position in chosen)
        is_finished = is_filled and (row.block_checks >= self.max_post_steps or (num_masked == 0 and not edits))
        return sorted({*chosen, *edits}), block if is_finished else ()


@dataclass(frozen=True)
class ConfidenceThreshold(MostConfident):
    """Write every candidate of at least this confidence (Fast-dLLM, https://arxiv.org/abs/2505.22618, algorithm 1)."""

    threshold: float

    def count(self, confidence: list[float]) -> int:
        return sum(value >= self.threshold for value in confidence)


@dataclass(frozen=True)
class ConfidenceFactor(MostConfident):
    r"""
    Write the n most confident, for the largest n with (i + 1) (1 - c_i) <= `factor` for all i from 2 to n (Fast-dLLM,
    https://arxiv.org/abs/2505.22618, section 3.3).
    """

    factor: float

    def count(self, confidence: list[float]) -> int:
        fits = (value >= 1 - self.factor / (rank + 1) for rank, value in enumerate(confidence[1:], 2))
        return 1 + sum(takewhile(bool, fits))


@dataclass(frozen=True)
class FrechetProfile(MostConfident):
    r"""
    Write the n most confident, for the largest n with c_1 + ... + c_n - (n - 1) - (1 - c_n) > `delta`: a Frechet bound
    on the probability that all n are right (Fast-dLLM++, https://arxiv.org/abs/2606.02955).
    """

    delta: float

    def count(self, confidence: list[float]) -> int:
        sums = enumerate(zip(accumulate(confidence), confidence, strict=True))
        return sum(takewhile(bool, (total - others - (1 - last) > self.delta for others, (total, last) in sums)))


@dataclass(frozen=True)
class EntropyBound(MostConfident):
    r"""
    Write the n positions of least entropy, for the largest n whose summed entropy without the largest term is at most
    `bound` nats (EB-Sampler, https://arxiv.org/abs/2505.24857; Transformers' `EntropyBoundSampler`). The confidence is
    the negative entropy.
    """

    bound: float

    def count(self, confidence: list[float]) -> int:
        return sum(last - total <= self.bound for total, last in zip(accumulate(confidence), confidence, strict=True))


@dataclass(frozen=True)
class EntropyBudget(MostConfident):
    r"""
    Write the n positions of least entropy, for the largest n whose summed entropy is below `budget` nats, and at least
    one (SDAR's entropy_bounded in JetEngine, https://github.com/Labman42/JetEngine). For `confidence="entropy"`.
    """

    budget: float

    def count(self, confidence: list[float]) -> int:
        return sum(-total < self.budget for total in accumulate(confidence))
