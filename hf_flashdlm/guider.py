"""Guided Diffusion: a small autoregressive model judges which drafts may be written at once.

Owns the acceptance rules, what they make of the scores, and their counts. Knows nothing of blocks, schedules, windows,
or of how the autoregressive model keeps what it has read. Its form is a logits processor: scores in, scores out.
"""

import math

import torch

from .compiling import device_of
from .guider_gate import Gate
from .guider_reader import ARReader
from .guider_text import Alignment, TextReader
from .unmasking import draft


ACCEPTANCE_RULES = ("top1", "topk", "topk_relative")
COMBINATIONS = ("union", "intersection")


class ARGuider(ARReader):
    r"""
    Judges the drafts of a diffusion model with an autoregressive one (Guided Diffusion of FlashDLM,
    https://arxiv.org/abs/2505.21467, section 4). It never supplies a token.

    One forward reads the finished prefix and the drafts behind it. The longest prefix of drafts that it accepts is
    written; if it refuses the first, that one is written all the same, so that every step makes progress. A refused
    position comes back with the mask token as its only finite score, an accepted one with its draft as the only one.

    At a temperature the drafts are drawn, independently, from the diffusion model's scores divided by it, and judged
    as any others. So the first token of a step, which is written in any case, follows the diffusion model's own
    distribution; the tokens behind it follow it on condition that they are accepted.

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
            Leave the drafts of the block behind the first refused one to the unmasking rule of the decode.
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
        super().__init__(model, num_drafts)
        if accept not in ACCEPTANCE_RULES:
            raise ValueError(f"`accept` must be one of {', '.join(ACCEPTANCE_RULES)}, got {accept!r}.")
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"`top_k` must be a positive integer, got {top_k!r}.")
        if not 0 <= relative_threshold <= 1:
            raise ValueError(f"`relative_threshold` must lie between 0 and 1, got {relative_threshold!r}.")
        if combine is not None and combine not in COMBINATIONS:
            raise ValueError(f"`combine` must be one of {', '.join(COMBINATIONS)} or None, got {combine!r}.")
        if not 0 <= confidence_threshold <= 1:
            raise ValueError(f"`confidence_threshold` must lie between 0 and 1, got {confidence_threshold!r}.")
        if gate not in (None, "auto"):
            raise ValueError(f"`gate` must be 'auto' or None, got {gate!r}.")
        self.top_k = 1 if accept == "top1" else top_k
        relative = relative_threshold if accept == "topk_relative" else 0
        self.log_threshold = math.log(relative) if relative > 0 else -math.inf
        self.combine, self.confidence_threshold = combine, confidence_threshold
        self.beyond_prefix = beyond_prefix
        self.gate, self.cost_ratio = gate, cost_ratio
        if (tokenizer is None) != (canvas_tokenizer is None):
            raise ValueError(
                "`tokenizer` and `canvas_tokenizer` must be given together, got one of them: the guider's and the "
                "diffusion model's."
            )
        self.tokenizer, self.canvas_tokenizer = tokenizer, canvas_tokenizer
        self.reads_text = tokenizer is not None and not _same_vocabulary(tokenizer, canvas_tokenizer)

    @property
    def lookahead(self) -> int | None:
        return None if self.beyond_prefix else self.num_drafts

    @property
    def shares_vocabulary(self) -> bool:
        return self.tokenizer is not None

    def reset(self, diffusion_model, *args, **kwargs) -> None:
        """See [`ARReader.reset`]."""
        super().reset(diffusion_model, *args, **kwargs)
        self.text_reader = self._text_reader(diffusion_model) if self.reads_text else None
        self.padding = (self.canvas_mask == 0).sum(1).cpu()  # of each row, before its text
        # Of each step: the rows, which of them were asked, and the drafts judged and accepted, on the scores' device.
        self.counts = []
        ratio = self.cost_ratio
        if self.gate is not None and ratio is None:
            ratio = self.model.num_parameters() / diffusion_model.num_parameters()
        self.gates = None if self.gate is None else Gate(*self.canvas_mask.shape, ratio)

    def batch_select_indices(self, indices: torch.LongTensor) -> None:
        super().batch_select_indices(indices)
        self.padding = self.padding[indices]
        if self.text_reader is not None:
            self.text_reader.batch_select_indices(indices)

    def _process(self, input_ids, scores, positions, frontier, candidate) -> torch.Tensor:
        asked = None  # all rows
        if self.gates is not None:
            asked = self.gates.ask(self.rows, positions, frontier, candidate)
            if not asked.any():
                return scores
            candidate = candidate & asked[:, None]
        if positions.shape[1] > self.num_drafts:
            candidate = candidate & (positions < frontier[:, None] + self.num_drafts)
        drafts, probability = draft(scores, self.mask_token_id, self.temperature, self.generator)
        judged = candidate.to(scores.device) & (probability > -torch.inf)
        accepted = self._judge(input_ids, drafts, positions, frontier, asked)
        if self.combine is not None:
            sure = probability >= self.confidence_threshold
            accepted = accepted | sure if self.combine == "union" else accepted & sure
        if (frontier <= self.padding).any():
            # The first position of a row has nothing before it to be judged by.
            accepted = accepted & (positions > self.padding[:, None]).to(scores.device)
        refused = (judged & ~accepted).cumsum(1)  # how many up to each position
        prefix = judged & (refused == 0)
        self.counts.append((self.rows, asked, judged, prefix))
        # The first draft is written even if it is refused.
        written = prefix | (judged & (positions == frontier[:, None]).to(scores.device))
        kept = torch.where(written, drafts, self.mask_token_id)
        decided = torch.full_like(scores, -torch.inf).scatter_(-1, kept[..., None], 0.0)
        if self.beyond_prefix:
            left = (refused > 1) | ((refused == 1) & ~judged)  # behind the first refused position
            decided = torch.where(left[..., None], scores, decided)
        return decided if asked is None else torch.where(asked.to(scores.device)[:, None, None], decided, scores)

    def _judge(self, input_ids, drafts, positions, frontier, asked) -> torch.BoolTensor:
        """Whether each draft passes the acceptance rule, `(B, N)`, from one forward of the guider."""
        if self.text_reader is None:
            return self._accept(self._read(input_ids, drafts, positions, frontier, asked), drafts)
        self._count_forward(asked)
        stop = positions[:, 0] + (positions < frontier[:, None] + self.num_drafts).sum(1)
        canvas = self._fill(input_ids, drafts, positions).tolist()
        padding = self.padding.tolist()
        rows = [row[pads:end] for row, pads, end in zip(canvas, padding, stop.tolist(), strict=True)]
        accepted = self.text_reader.judge(rows, (frontier - self.padding).tolist(), self._accept)
        in_row = (positions - self.padding[:, None]).tolist()
        passed = [[position in one for position in row] for row, one in zip(in_row, accepted, strict=True)]
        return torch.tensor(passed, device=input_ids.device)

    def _text_reader(self, diffusion_model) -> TextReader:
        ends = self._end_ids(diffusion_model) | {self.canvas_tokenizer.eos_token_id} - {None}
        guider_ends = sorted(self._end_ids(self.model) | {self.tokenizer.eos_token_id} - {None})
        self.guider_ends = torch.tensor(guider_ends, device=device_of(self.model), dtype=torch.long)
        end = self.tokenizer.eos_token_id
        alignment = Alignment(self.canvas_tokenizer, self.tokenizer, ends, end)
        return TextReader(self.forward, alignment, len(self.rows))

    @staticmethod
    def _end_ids(model) -> set[int]:
        ends = model.generation_config.eos_token_id
        return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}

    def _accept(self, logits: torch.Tensor, ids: torch.LongTensor) -> torch.BoolTensor:
        """Whether tokens of shape `(...)` pass the acceptance rule, given the logits `(..., vocab_size)` for them."""
        known = ids < logits.shape[-1]  # a vocabulary may be padded to another size
        score = logits.gather(-1, ids.clamp_max(logits.shape[-1] - 1)[..., None])
        if self.reads_text and len(self.guider_ends):  # any end token of the guider's stands for its end
            is_end = torch.isin(ids, self.guider_ends)[..., None]
            score = torch.where(is_end, logits[..., self.guider_ends].amax(-1, keepdim=True), score)
        better = (logits > score).sum(-1)
        return known & (better < self.top_k) & (score.squeeze(-1) - logits.amax(-1) >= self.log_threshold)

    def statistics(self, total_seconds: float) -> dict:
        """Counts of the call, per row of its batch, under the names of [`DiffusionGenerationOutput`]."""
        judged = [0] * len(self.forwards)
        lengths: list[list[int]] = [[] for _ in judged]
        # Steps differ in their width: only their sums can be brought over together, in one transfer.
        sums = [torch.stack([tried, passed]).sum(2) for *_, tried, passed in self.counts]
        counts = torch.cat(sums, 1).T.tolist() if sums else []
        for rows, asked, *_ in self.counts:
            for index, row in enumerate(rows.tolist()):
                num_judged, num_accepted = counts.pop(0)
                if asked is None or asked[index]:
                    judged[row] += num_judged
                    lengths[row].append(num_accepted)
        return super().statistics(total_seconds) | {
            "drafts_judged": torch.tensor(judged),
            "drafts_accepted": torch.tensor([sum(one) for one in lengths]),
            "accepted_lengths": lengths,
            "gate_closed_at": None if self.gates is None else self.gates.closed_at,
        }


def _same_vocabulary(left, right) -> bool:
    """Whether two tokenizers give the same ids, but for a few tokens that one of them adds, such as a mask token."""
    left, right = left.get_vocab(), right.get_vocab()
    shared = left.keys() & right.keys()
    few = max(len(left), len(right)) // 100
    return max(len(left), len(right)) - len(shared) <= few and all(left[token] == right[token] for token in shared)


class ProductMixture(ARReader):
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
        super().__init__(model, num_drafts)
        if not 0 <= weight <= 1:
            raise ValueError(f"`weight` must lie between 0 and 1, got {weight!r}.")
        self.weight = weight

    def _process(self, input_ids, scores, positions, frontier, candidate) -> torch.Tensor:
        drafts, _ = draft(scores, self.mask_token_id, self.temperature, self.generator)
        read = self._read(input_ids, drafts, positions, frontier).float()
        missing = scores.shape[-1] - read.shape[-1]  # cuts where negative
        read = torch.nn.functional.pad(read, (0, missing), value=-torch.inf).log_softmax(-1)
        mixed = self.weight * scores.log_softmax(-1) + (1 - self.weight) * read
        return mixed.masked_fill(scores == -torch.inf, -torch.inf)  # what a processor forbids stays forbidden
