"""One run of a recipe over a workload: what it counts and how it is timed.

Owns the counts, their means, and the probes around the models. Knows nothing of which recipes are compared, or of how
decoding works.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from ..console.display import up_to_end
from ..tiny import final_number
from .decoding import Models
from .machine import ForwardShape, Probe, synchronize
from .recipe import Recipe
from .workload import Workload


@dataclass
class Run:
    r"""
    The counts of one run over a workload, summed over its rows.

    Args:
        canvases (`list[list[int]]`): The ids of all rows, prompts and pads included.
        seconds (`float`): Time of the decodes, without the time for counting.
        forward_seconds (`float`): The part of `seconds` spent in the models' forwards.
        forwards (`dict[str, list[ForwardShape]]`): The forwards of each model, by its name.
    """

    num_rows: int = 0
    correct: int | None = None
    long_rows: int = 0
    long_correct: int = 0
    tokens: int = 0
    nfe: int = 0
    guider_forwards: int = 0
    active_tokens: int = 0
    drafts_judged: int = 0
    drafts_accepted: int = 0
    guider_seconds: float = 0.0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    forwards: dict[str, list[ForwardShape]] = field(default_factory=dict)
    canvases: list[list[int]] = field(default_factory=list)

    @property
    def outside_share(self) -> float:
        """Share of the time that is not inside a forward."""
        return 1 - self.forward_seconds / self.seconds

    def count(self, output) -> None:
        """Add the counts of an output of `generate`."""
        self.nfe += int(output.nfe.sum())
        self.active_tokens += int(output.active_tokens.sum())
        for name in ("guider_forwards", "drafts_judged", "drafts_accepted"):
            value = getattr(output, name)
            setattr(self, name, getattr(self, name) + (0 if value is None else int(value.sum())))

    def count_forwards(self, forwards: list[ForwardShape]) -> None:
        """Add the counts for a loop that keeps none: all rows take part in all forwards."""
        self.nfe += sum(forward.rows for forward in forwards)
        self.active_tokens += sum(forward.rows * forward.queries for forward in forwards)

    def figures(self) -> dict:
        """The figures of the recipe. Counts are means per row; `tokens` counts up to and including EOS."""
        figures = {
            "num_rows": self.num_rows,
            "tokens": self.tokens / self.num_rows,
            "nfe": self.nfe / self.num_rows,
            "guider_forwards": self.guider_forwards / self.num_rows,
            "active_tokens": self.active_tokens / self.num_rows,
            "tokens_per_forward": self.tokens / self.nfe,
            "drafts_judged": self.drafts_judged / self.num_rows,
            "drafts_accepted": self.drafts_accepted / self.num_rows,
            "guider_time_share": self.guider_seconds / self.seconds,
            "outside_forwards_share": self.outside_share,
            "accuracy": None,
            "accuracy_interval": None,
            "accuracy_of_long": None,
        }
        if self.correct is not None:
            interval = binomial_interval(self.correct, self.num_rows)
            figures |= {"accuracy": self.correct / self.num_rows, "accuracy_interval": list(interval)}
            figures["accuracy_of_long"] = self.long_correct / self.long_rows if self.long_rows else None
        return figures


def run(models: Models, recipe: Recipe, workload: Workload) -> Run:
    """Decode the workload once."""
    total = Run(correct=0 if workload.answers and recipe.speaks else None)
    watched = {name: models.named()[name] for name in ("model", "twin", recipe.guider) if name in models.named()}
    device = models.model.device
    for index, inputs in enumerate(workload.batches):
        lengths = workload.fixed_lengths(recipe, index)
        options = workload.options if lengths is None else workload.options | {"max_new_tokens": max(lengths)}
        probes = {name: Probe(model) for name, model in watched.items()}
        with ExitStack() as stack:
            for probe in probes.values():
                stack.enter_context(probe)
            synchronize(device)
            started = time.perf_counter()
            ids, output = models.decode(recipe, inputs, options)
            synchronize(device)
            seconds = time.perf_counter() - started
        total.seconds += seconds
        for name, probe in probes.items():
            total.forward_seconds += probe.seconds
            total.forwards.setdefault(name, []).extend(probe.forwards)
        if output is None:
            total.count_forwards([forward for probe in probes.values() for forward in probe.forwards])
        else:
            total.count(output)
            total.guider_seconds += seconds * (output.guider_time_share or 0.0)
        ends = models.end_token_ids if recipe.speaks else []
        total.canvases += ids.tolist()
        texts = [up_to_end(row, ends) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        total.num_rows += len(texts)
        total.tokens += sum(lengths or map(len, texts))
        if total.correct is not None:
            answers = models.checkpoint.tokenizer.batch_decode(texts, skip_special_tokens=True)
            pairs = zip(answers, workload.answers[index], strict=True)
            right = [final_number(text) == answer for text, answer in pairs]
            is_long = workload.is_long(index)
            total.correct += sum(right)
            total.long_rows += sum(is_long)
            total.long_correct += sum(map(min, right, is_long))
    return total


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share."""
    share, z = successes / trials, 1.96
    scale = 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half_width = z * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5 / scale
    return max(center - half_width, 0.0), min(center + half_width, 1.0)
