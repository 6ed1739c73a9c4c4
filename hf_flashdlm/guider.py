"""Guided Diffusion: a small autoregressive model judges which drafts may be written at once.

Owns the acceptance rules, what they make of the scores, and their counts. Knows nothing of blocks, schedules, windows,
or of how the autoregressive model keeps what it has read. Its form is a logits processor: scores in, scores out.
"""

import math
import time
from collections.abc import Callable

import torch

from .canvas_processors import CanvasProcessor
from .generation_inputs import vocabulary_size
from .guider_gate import Gate
from .guider_reader import ARReader, check_vocabulary, is_language_model
from .guider_text import Alignment, TextReader, end_ids
from .unmasking import draft


ACCEPTANCE_RULES = ("top1", "topk", "topk_relative")
COMBINATIONS = ("union", "intersection")


class ARGuider(CanvasProcessor):
    r"""
    Judges the drafts of a diffusion model with an autoregressive one (Guided Diffusion of FlashDLM,
    https://arxiv.org/abs/2505.21467, section 4). It never supplies a token.

    One forward reads the finished prefix and the drafts after it. The longest prefix of drafts that it accepts is
    written; if it refuses the first, that one is written all the same, so that every step makes progress. A refused
    position comes back with the mask token as its only finite score, an accepted one with its draft as the only one.

    At a temperature the drafts are drawn, independently, from the diffusion model's scores divided by it, and judged
    as any others. So the first token of a step, which is written in any case, follows the diffusion model's own
    distribution; the tokens after it follow it on condition that they are accepted.

    Args:
        model (`PreTrainedModel`):
            A causal language model with attention in every layer; windows of attention may slide.
        accept (`str`, *optional*, defaults to `"topk_relative"`):
            A draft is accepted when it is the guider's best token (`"top1"`), among its `top_k` best (`"topk"`), or
            among them with a probability of at least `relative_threshold` times the best one's (`"topk_relative"`).
        top_k (`int`, *optional*, defaults to 2): See `accept`.
        relative_threshold (`float`, *optional*, defaults to 0.5): See `accept`; the paper's tau.
        num_drafts (`int`, *optional*, defaults to 32): At most this many positions are judged in a step.
        combine (`str`, *optional*):
            Ask the diffusion model too: `"union"` accepts what either of them is sure of, `"intersection"` what both
            are.
        confidence_threshold (`float`, *optional*, defaults to 0.9):
            With `combine`, the probability from which on the diffusion model is sure.
        beyond_prefix (`bool`, *optional*, defaults to `False`):
            Leave the drafts of the block after the first refused one to the unmasking rule of the decode.
        gate (`str`, *optional*):
            `"auto"` compares, in each row, some steps with guidance to some without, and stops asking where
            the tokens written per step do not repay the guider's cost. The output says when, in `gate_closed_at`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The guider's tokenizer, where it is not the diffusion model's: drafts are then read as text. Needs
            `canvas_tokenizer`.
        canvas_tokenizer (`PreTrainedTokenizerBase`, *optional*): The diffusion model's tokenizer.
        cost_ratio (`float`, *optional*):
            Cost of a guider's forward over one of the diffusion model, for the gate; by default the ratio of their
            parameters. It is not measured, so that a result depends on inputs and settings alone.

    Example:

    ```python
    >>> guider = ARGuider(AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct"), accept="topk", top_k=5)
    >>> model.generate(**inputs, guider=guider)
    ```
    """

    def __init__(  # noqa: PLR0913, options of the user's, by keyword
        self,
        model,
        accept: str = "topk_relative",
        *,
        top_k: int = 2,
        relative_threshold: float = 0.5,
        num_drafts: int = 32,
        combine: str | None = None,
        confidence_threshold: float = 0.9,
        beyond_prefix: bool = False,
        gate: str | None = None,
        cost_ratio: float | None = None,
        tokenizer=None,
        canvas_tokenizer=None,
    ):
        checked = _checked(
            accept=accept,
            top_k=top_k,
            relative_threshold=relative_threshold,
            num_drafts=num_drafts,
            combine=combine,
            confidence_threshold=confidence_threshold,
            beyond_prefix=beyond_prefix,
            gate=gate,
            cost_ratio=cost_ratio,
        )
        accept, relative = checked["accept"], checked["relative_threshold"]
        self.top_k = 1 if accept == "top1" else checked["top_k"]
        self.log_threshold = math.log(relative) if accept == "topk_relative" and relative > 0 else -math.inf
        self.num_drafts, self.beyond_prefix = checked["num_drafts"], checked["beyond_prefix"]
        self.lookahead = None if self.beyond_prefix else self.num_drafts
        self.combine, self.confidence_threshold = checked["combine"], checked["confidence_threshold"]
        self.gate, self.cost_ratio = checked["gate"], checked["cost_ratio"]
        self.reads_text = _read_as_text(tokenizer, canvas_tokenizer)
        self.tokenizer, self.canvas_tokenizer = tokenizer, canvas_tokenizer
        self.model = _language_model(model)

    def reset(
        self,
        diffusion_model,
        canvas_mask: torch.Tensor,
        mask_token_id: int,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
        compile_config=None,
    ) -> None:
        """
        Begin a call, see [`CanvasProcessor`]: everything that the call changes is made here.

        Raises:
            ValueError: If the guider has another vocabulary, too few positions, or no cache that can be cropped.
        """
        if self.tokenizer is None:
            check_vocabulary(self.model, diffusion_model)
        self.mask_token_id, self.temperature, self.generator = mask_token_id, temperature, generator
        if self.reads_text:
            ends = [end_ids(diffusion_model, self.canvas_tokenizer), end_ids(self.model, self.tokenizer)]
            alignment = Alignment(self.canvas_tokenizer, self.tokenizer, ends[0], self.tokenizer.eos_token_id)
            self.reader: ARReader | TextReader = TextReader(
                self.model, alignment, canvas_mask, mask_token_id, ends[1], compile_config
            )
        else:
            self.reader = ARReader(
                self.model, canvas_mask, mask_token_id, vocabulary_size(diffusion_model), compile_config
            )
        self.num_rows, self.rows = len(canvas_mask), torch.arange(len(canvas_mask))
        self.padding = (canvas_mask == 0).sum(1).cpu()  # of each row, before its text
        # Of each step: the rows, which of them were asked, and the drafts judged and accepted, on the scores' device.
        self.counts: list[tuple[torch.Tensor, ...]] = []
        self.seconds = 0.0
        self.gates = None
        if self.gate is not None:
            ratio = self.cost_ratio
            if ratio is None:
                ratio = self.model.num_parameters() / diffusion_model.num_parameters()
            self.gates = Gate(self.num_rows, ratio)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reader.batch_select_indices(indices)
        self.rows, self.padding = self.rows[indices], self.padding[indices]

    def __call__(self, input_ids, scores, positions, frontier, candidate=None) -> torch.Tensor:
        """
        One step, see [`CanvasProcessor`]. By default the masked positions are candidates.

        Returns:
            `torch.Tensor`: Scores of the same shape.
        """
        started = time.perf_counter()
        if candidate is None:
            candidate = (input_ids.gather(1, positions.to(input_ids.device)) == self.mask_token_id).cpu()
        asked = candidate.any(1)  # a row that waits for the others has nothing to judge
        if self.gates is not None:
            asked = self.gates.ask(self.rows, asked, input_ids == self.mask_token_id)
            candidate = candidate & asked[:, None]
        if asked.any():
            scores = self._judge(input_ids, scores, positions, frontier, candidate, asked)
        self.seconds += time.perf_counter() - started
        return scores

    def _judge(self, input_ids, scores, positions, frontier, candidate, asked) -> torch.Tensor:
        """The scores of the rows `asked`, a bool per row, as the guider's verdict leaves them."""
        # 1. The drafts that it is asked about, a few from the frontier on.
        reach = min(self.num_drafts, positions.shape[1])
        drafts, probability = draft(scores, self.mask_token_id, self.temperature, self.generator)
        judged = (candidate & (positions < frontier[:, None] + reach)).to(scores.device) & (probability > -torch.inf)
        # The first position of a row has nothing before it to be judged by.
        begins = (positions == self.padding[:, None]).to(scores.device) if (frontier <= self.padding).any() else None
        readable = judged if begins is None else judged & ~begins
        # 2. Its verdict on each of them.
        accepted = self.reader.judge(input_ids, drafts, positions, frontier, readable, self._accept)
        if self.combine is not None:
            sure = probability >= self.confidence_threshold
            accepted = accepted | sure if self.combine == "union" else accepted & sure
        if begins is not None:
            accepted = accepted & ~begins
        # 3. The longest prefix that it accepts is written, and the first draft in any case.
        refused = (judged > accepted).cumsum(1)  # how many up to each position
        prefix = judged & (refused == 0)
        self.counts.append((self.rows, asked, judged, prefix))
        written = prefix | (judged & (positions == frontier[:, None]).to(scores.device))
        # 4. The verdict as scores. The loop drafts from scores, with a guider as without: it needs no second path and
        # does not know of guiders, other processors can follow, and a rule of the decode may choose among the rest.
        # The price is a second pass over the vocabulary, in which a draft that was accepted has probability 1 and a
        # refused position nothing but the mask token. Beside the forwards of two models it is small.
        kept = torch.where(written, drafts, self.mask_token_id)
        decided = torch.full_like(scores, -torch.inf).scatter_(-1, kept[..., None], 0.0)
        if self.beyond_prefix:
            left = (refused > 1) | ((refused == 1) & ~judged)  # after the first refused position
            decided = torch.where(left[..., None], scores, decided)
        return decided if asked.all() else torch.where(asked.to(scores.device)[:, None, None], decided, scores)

    def _accept(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Whether tokens of shape `(...)` pass the acceptance rule, given the logits `(..., vocab_size)` for them."""
        score = logits.gather(-1, ids[..., None])
        better = (logits > score).sum(-1)
        is_likely = score.squeeze(-1) - logits.amax(-1) >= self.log_threshold
        return (better < min(self.top_k, logits.shape[-1])) & is_likely

    def statistics(self, total_seconds: float) -> dict:
        """
        Counts of the call, per row of its batch, under the names of [`DiffusionGenerationOutput`].

        Raises:
            ValueError: If the guider gave logits that are not finite.
            RuntimeError: If the canvas was changed left of the frontier; waits for the device, as a step does not.
        """
        self.reader.check()
        judged = [0] * self.num_rows
        lengths: list[list[int]] = [[] for _ in judged]
        # Steps differ in their width: only their sums can be brought over together, in one transfer.
        sums = [torch.stack([tried, passed]).sum(2) for *_, tried, passed in self.counts]
        counts = torch.cat(sums, 1).T.tolist() if sums else []
        for rows, asked, *_ in self.counts:
            for row, is_asked in zip(rows.tolist(), asked.tolist(), strict=True):
                num_judged, num_accepted = counts.pop(0)
                if is_asked:
                    judged[row] += num_judged
                    lengths[row].append(num_accepted)
        return {
            "guider_forwards": torch.tensor([len(one) for one in lengths]),
            "drafts_judged": torch.tensor(judged),
            "drafts_accepted": torch.tensor([sum(one) for one in lengths]),
            "accepted_lengths": lengths,
            "gate_closed_at": None if self.gates is None else self.gates.closed_at,
            "guider_time_share": self.seconds / total_seconds,
        }


class ProductMixture(CanvasProcessor):
    r"""
    Mixes the distributions of the two models, p(x) ~ p_diffusion(x)^weight * p_autoregressive(x)^(1 - weight), where
    the autoregressive model reads the drafts left of a position. Unlike [`ARGuider`] it moves the result towards the
    autoregressive model, which supplies tokens of its own.

    Args:
        model (`PreTrainedModel`): A causal language model with the vocabulary of the diffusion model.
        weight (`float`, *optional*, defaults to 0.5): Weight of the diffusion model, between 0 and 1.
        num_drafts (`int`, *optional*, defaults to 32): Positions from the first masked one on that are scored.
    """

    def __init__(self, model, weight: float = 0.5, num_drafts: int = 32):
        checked = _checked(weight=weight, num_drafts=num_drafts)
        self.weight, self.lookahead = checked["weight"], checked["num_drafts"]
        self.model = _language_model(model)

    def reset(  # noqa: D102, see CanvasProcessor
        self, diffusion_model, canvas_mask, mask_token_id, temperature=None, generator=None, compile_config=None
    ) -> None:
        check_vocabulary(self.model, diffusion_model)
        self.mask_token_id, self.temperature, self.generator = mask_token_id, temperature, generator
        self.reader = ARReader(
            self.model, canvas_mask, mask_token_id, vocabulary_size(diffusion_model), compile_config
        )
        self.rows, self.forwards, self.seconds = torch.arange(len(canvas_mask)), [0] * len(canvas_mask), 0.0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reader.batch_select_indices(indices)
        self.rows = self.rows[indices]

    def __call__(self, input_ids, scores, positions, frontier, candidate) -> torch.Tensor:
        started = time.perf_counter()
        drafts, _ = draft(scores, self.mask_token_id, self.temperature, self.generator)
        read = self.reader.read(input_ids, drafts, positions, frontier, candidate).float()
        self.reader.check()  # the loop would find no token to write, and not know why
        missing = scores.shape[-1] - read.shape[-1]  # cuts where negative
        read = torch.nn.functional.pad(read, (0, missing), value=-torch.inf).log_softmax(-1)
        read = read.clamp_min(torch.finfo(read.dtype).min)  # which no weight of 0 makes a NaN
        mixed = self.weight * scores.log_softmax(-1) + (1 - self.weight) * read
        for row in self.rows[candidate.any(1)].tolist():
            self.forwards[row] += 1
        self.seconds += time.perf_counter() - started
        return mixed.masked_fill(scores == -torch.inf, -torch.inf)  # what a processor forbids stays forbidden

    def statistics(self, total_seconds: float) -> dict:
        """Counts of the call, per row of its batch, under the names of [`DiffusionGenerationOutput`]."""
        return {"guider_forwards": torch.tensor(self.forwards), "guider_time_share": self.seconds / total_seconds}


def _same_vocabulary(left, right) -> bool:
    """Whether two tokenizers give the same ids, but for a few tokens that one of them adds, such as a mask token."""
    left, right = left.get_vocab(), right.get_vocab()
    shared = left.keys() & right.keys()
    few = max(len(left), len(right)) // 100
    return max(len(left), len(right)) - len(shared) <= few and all(left[token] == right[token] for token in shared)


def _read_as_text(tokenizer, canvas_tokenizer) -> bool:
    """Whether drafts have to be read as text, for two tokenizers or none; checked."""
    for name, value in (("tokenizer", tokenizer), ("canvas_tokenizer", canvas_tokenizer)):
        if value is not None and not hasattr(value, "get_vocab"):
            raise ValueError(f"`{name}` must be a tokenizer, got {type(value).__name__}: load one, or drop it.")
    if (tokenizer is None) != (canvas_tokenizer is None):
        raise ValueError(
            "`tokenizer` and `canvas_tokenizer` must be given together, got one of them: the guider's and the "
            "diffusion model's."
        )
    return tokenizer is not None and not _same_vocabulary(tokenizer, canvas_tokenizer)


def _language_model(model):
    if not is_language_model(model):
        raise ValueError(
            f"`model` must be an autoregressive language model, got {_described(model)}: load one with "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    return model


def _described(value) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _is_positive(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_share(value, highest: float = 1) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= highest  # as NaN is not


def _is_cost(value) -> bool:
    return value is None or _is_share(value, torch.finfo(torch.float64).max)


def _is_among(*choices: str | None) -> Callable:
    return lambda value: isinstance(value, str | None) and value in choices


# What each setting must be, and the words for it.
_SETTINGS = {
    "accept": (_is_among(*ACCEPTANCE_RULES), f"be one of {', '.join(ACCEPTANCE_RULES)}"),
    "top_k": (_is_positive, "be a positive integer"),
    "relative_threshold": (_is_share, "lie between 0 and 1"),
    "num_drafts": (_is_positive, "be a positive integer"),
    "combine": (_is_among(*COMBINATIONS, None), f"be one of {', '.join(COMBINATIONS)} or None"),
    "confidence_threshold": (_is_share, "lie between 0 and 1"),
    "beyond_prefix": (lambda value: isinstance(value, bool), "be True or False"),
    "gate": (_is_among("auto", None), "be 'auto' or None"),
    "cost_ratio": (_is_cost, "be a finite number of at least 0, or None"),
    "weight": (_is_share, "lie between 0 and 1"),
}


def _checked(**settings) -> dict:
    """The settings as Python values, where they came as scalars of numpy or torch."""
    checked = {}
    for name, value in settings.items():
        fits, rule = _SETTINGS[name]
        checked[name] = value.item() if getattr(value, "ndim", None) == 0 else value
        if not fits(checked[name]):
            raise ValueError(f"`{name}` must {rule}, got {value!r}.")
    return checked
