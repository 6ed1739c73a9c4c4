"""Log-likelihoods of given text under a diffusion model.

Owns the Monte Carlo estimate: which positions a sample masks, what it is weighted with, and how samples become an
estimate. Knows nothing of decoding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, nan

import torch
from transformers.utils import ModelOutput

from .block_causal import AttentionBlocks, attention_block_length, counts_from_row
from .compiling import device_of
from .denoiser import ClassifierFreeGuidance, Denoiser
from .generation_inputs import mask_token_id_of
from .windows import Window


@dataclass
class LogLikelihoodOutput(ModelOutput):
    r"""
    Args:
        log_likelihood (`torch.DoubleTensor` of shape `(num_pairs,)`): Estimate for each answer, in nats.
        standard_error (`torch.DoubleTensor` of shape `(num_pairs,)`):
            Standard deviation of the estimate; NaN where there is one sample.
        nfe (`int`): Number of rows that the model has computed.
    """

    log_likelihood: torch.Tensor
    standard_error: torch.Tensor | None = None
    nfe: int | None = None


@dataclass(frozen=True)
class _Sample:
    """One row of a forward: a text with masks in one of its segments."""

    pair: int
    number: int  # of the sample of its pair
    ids: list[int]  # up to the end of the segment, masks included
    targets: dict[int, int]  # the masked positions, and the tokens there
    weight: float  # 1 / share of the segment that is masked
    prompt_length: int


@torch.no_grad()
def log_likelihood(  # noqa: PLR0913, options of the user's, by keyword
    model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    num_samples: int = 128,
    batch_size: int = 8,
    guidance_scale: float = 1.0,
    mask_token_id: int | None = None,
    masks: Sequence[torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> LogLikelihoodOutput:
    r"""
    The log-likelihood of answers given their prompts, by LLaDA's estimate
    (https://arxiv.org/abs/2502.09992, equation 6 and algorithm 3): the mean over samples, each of which masks n of the
    L tokens of the answer, of L / n times their log-probability. The numbers n of the samples are spread evenly over 1
    to L. It is the estimate of a lower bound, and not comparable with the likelihood of an autoregressive model.

    With block-causal attention each block of the answer is masked by itself, after the true text before it
    (https://arxiv.org/abs/2503.09573, equation 8), and the estimates of its blocks are added.

    Args:
        model (`PreTrainedModel`): A diffusion model as `generate` takes it, in evaluation mode.
        prompts (`Sequence[Sequence[int]]`): Token ids of each prompt.
        answers (`Sequence[Sequence[int]]`): Token ids of each answer, at least one.
        num_samples (`int`, *optional*, defaults to 128): Number of samples of each pair (of each block).
        batch_size (`int`, *optional*, defaults to 8): Number of samples that a forward computes.
        guidance_scale (`float`, *optional*, defaults to 1.0): Classifier-free guidance, as of `generate`.
        mask_token_id (`int`, *optional*): By default `model.config.mask_token_id`.
        masks (`Sequence[torch.BoolTensor]`, *optional*):
            For each pair the masks of its samples, of shape `(num_samples, answer_length)`, instead of drawn ones.
        generator (`torch.Generator`, *optional*): Source of randomness, on the CPU.

    Returns:
        [`LogLikelihoodOutput`]

    Raises:
        ValueError: If there is nothing to estimate, or an option has another form.
    """
    mask_token_id = mask_token_id_of(model, mask_token_id)
    _check(model, prompts, answers, num_samples, batch_size)
    counts = [num_samples] * len(answers) if masks is None else [len(drawn) for drawn in masks]
    sums = [torch.zeros(count, dtype=torch.double) for count in counts]
    samples = list(_samples(model, prompts, answers, num_samples, mask_token_id, masks, generator))
    samples.sort(key=lambda sample: len(sample.ids))  # little padding
    for begin in range(0, len(samples), batch_size):
        batch = samples[begin : begin + batch_size]
        for sample, value in zip(batch, _score(model, batch, guidance_scale, mask_token_id), strict=True):
            sums[sample.pair][sample.number] += value
    errors = [values.std() / len(values) ** 0.5 if len(values) > 1 else values.new_tensor(nan) for values in sums]
    return LogLikelihoodOutput(
        log_likelihood=torch.stack([values.mean() for values in sums]),
        standard_error=torch.stack(errors),
        nfe=len(samples),
    )


def perplexity(model, texts: Sequence[Sequence[int]], **options) -> float:
    r"""
    The perplexity of texts: exp of minus their log-likelihood per token, all but the first of each text. As an upper
    bound it is not comparable with that of an autoregressive model.

    Args:
        model (`PreTrainedModel`): As of [`log_likelihood`].
        texts (`Sequence[Sequence[int]]`): Token ids of each text, at least two.
        options: As of [`log_likelihood`].
    """
    answers = [list(text[1:]) for text in texts]
    output = log_likelihood(model, [list(text[:1]) for text in texts], answers, **options)
    return exp(-output.log_likelihood.sum().item() / sum(map(len, answers)))


def draw_masks(length: int, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
    r"""
    Masks of `num_samples` samples, `(num_samples, length)`: each of a random set of positions, their numbers spread
    evenly over 1 to `length` from a random start on.
    """
    start = torch.randint(1, length + 1, (1,), generator=generator)
    numbers = (start + torch.arange(num_samples) * length / num_samples).round().long()
    numbers = (numbers - 1) % length + 1
    order = torch.rand(num_samples, length, generator=generator).argsort(1).argsort(1)
    return order < numbers[:, None]


def _check(model, prompts, answers, num_samples: int, batch_size: int) -> None:
    if len(prompts) != len(answers) or not len(answers):
        raise ValueError(f"`answers` must hold one answer for each prompt, got {len(answers)} and {len(prompts)}.")
    for index, answer in enumerate(answers):
        if not len(answer):
            raise ValueError(f"`answers` must hold at least one token each, got none at {index}.")
        if not len(prompts[index]) and getattr(model.config, "logits_shift", False):
            raise ValueError(
                f"`prompts` must hold at least one token each for a {type(model).__name__}, which scores a token from "
                f"the one before it, got none at {index}: pass the begin-of-text token."
            )
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def _segments(model, prompt_length: int, length: int) -> list[tuple[int, int]]:
    """The parts of the answer that are masked by themselves."""
    block = attention_block_length(model)
    if block is None:
        return [(prompt_length, length)]
    origin = 0 if counts_from_row(model) else prompt_length
    borders = [border for border in range(origin, length, block) if border > prompt_length]
    return list(zip([prompt_length, *borders], [*borders, length], strict=True))


def _samples(model, prompts, answers, num_samples, mask_token_id, masks, generator) -> Iterator[_Sample]:
    for pair, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text = [*prompt, *answer]
        for start, stop in _segments(model, len(prompt), len(text)):
            if masks is None:
                drawn = draw_masks(stop - start, num_samples, generator)
            else:
                drawn = torch.as_tensor(masks[pair]).bool()[:, start - len(prompt) : stop - len(prompt)]
            for number, row in enumerate(drawn.tolist()):
                targets = {start + place: text[start + place] for place, masked in enumerate(row) if masked}
                if targets:
                    ids = [mask_token_id if place in targets else token for place, token in enumerate(text[:stop])]
                    yield _Sample(pair, number, ids, targets, (stop - start) / len(targets), len(prompt))


def _score(model, batch: list[_Sample], guidance_scale: float, mask_token_id: int) -> list[float]:
    """The weighted log-probability of the masked tokens of each sample."""
    length, device = max(len(sample.ids) for sample in batch), device_of(model)
    padding = [length - len(sample.ids) for sample in batch]
    rows = list(zip(padding, batch, strict=True))
    canvas = torch.tensor([[0] * count + sample.ids for count, sample in rows], device=device)
    mask = torch.tensor([[0] * count + [1] * len(sample.ids) for count, sample in rows], device=device)
    first = min(count + min(sample.targets) for count, sample in rows)
    denoiser = _denoiser(model, batch, padding, canvas, mask, guidance_scale, mask_token_id)
    windows, positions = len(rows) * [Window(0, length, length, 0)], len(rows) * [range(first, length)]
    logits, _ = denoiser(canvas, windows, positions, len(rows) * [first])
    scores = logits.log_softmax(-1)
    values = []
    for row, (count, sample) in enumerate(rows):
        places = torch.tensor([count + place - first for place in sample.targets], device=scores.device)
        tokens = torch.tensor(list(sample.targets.values()), device=scores.device)
        values.append(scores[row, places, tokens].double().sum().item() * sample.weight)
    return values


def _denoiser(model, batch, padding, canvas, mask, guidance_scale: float, mask_token_id: int):  # noqa: PLR0913
    """What scores the samples, without a cache."""
    length, shift = attention_block_length(model), int(getattr(model.config, "logits_shift", 0))
    starts = [count + sample.prompt_length for count, sample in zip(padding, batch, strict=True)]
    origins = padding if counts_from_row(model) else starts

    def of(canvas_mask: torch.Tensor, halves: int) -> Denoiser:
        blocks = None if length is None else AttentionBlocks(length, halves * origins, canvas_mask)
        return Denoiser(model, canvas_mask, None, shift, attention_blocks=blocks)

    if guidance_scale == 1:
        return of(mask, 1)
    columns = torch.arange(canvas.shape[1], device=canvas.device)
    is_prompt = columns < torch.tensor(starts, device=canvas.device)[:, None]
    unconditional = torch.full_like(canvas, mask_token_id)
    return ClassifierFreeGuidance(of(torch.cat([mask, mask]), 2), guidance_scale, unconditional, is_prompt)
