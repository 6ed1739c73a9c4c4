"""The demonstration: the embedded pair decodes held-out word problems, first before your eyes, then measured.

Owns which methods are compared, what is counted and how it is reported. Knows nothing of how decoding works.
"""

import json
import random
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..console.checkpoint import Checkpoint, Continuation
from ..console.display import mask_character
from ..guider import ARGuider
from .machine import describe_machine, versions


TINY = Path(__file__).parents[1] / "tiny"
MAX_NEW_TOKENS = 64
SECONDS_PER_FORWARD = 0.04

# The embedded guider alone errs more often than the model: it may only say no to what the diffusion model is sure of.
GUIDANCE = {"combine": "intersection", "confidence_threshold": 0.5}

NOTES = """\
NFE: forwards of the diffusion model; guider: forwards of the guider; active:
query positions the diffusion model computed; each a mean per problem.
Tokens: generated ones up to and with EOS. Seconds: for all problems together,
median of the runs.
Speed: over the two baselines, the plain decodes that fill the whole canvas
(full) and that stop at the end of the text (EOS)."""


@dataclass(frozen=True)
class Settings:
    r"""
    Settings of a demonstration.

    Args:
        problems (`int`): Size of the measured sample of held-out problems.
        batch_size (`int`): Problems decoded together.
        repeats (`int`): Runs of each method; their median is the time.
        show (`int`): Problems of the sample that are decoded in view, one at a time.
        seed (`int`): Seed of the draw of the sample. Decoding is greedy and draws nothing.
    """

    problems: int = 100
    batch_size: int = 25
    repeats: int = 1
    show: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """A held-out problem: the `question` and the number that the right answer ends in."""

    question: str
    final: int


@dataclass(frozen=True)
class Method:
    """A way to decode: its `name` in the table and the `options` of `generate` that make it."""

    name: str
    options: dict

    def __call__(self, checkpoint: Checkpoint, problems: list[Problem], streamer=None) -> Continuation:
        """Decode a batch of problems."""
        options = {"max_new_tokens": MAX_NEW_TOKENS, "streamer": streamer} | self.options
        return checkpoint.continue_prompts([problem.question for problem in problems], options)


@dataclass
class Measurement:
    """What `method` did: sums over the problems, the same in every run, and the `seconds` of each run."""

    method: Method
    num_problems: int = 0
    correct: int = 0
    nfe: int = 0
    guider_forwards: int = 0
    active_tokens: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def decode(self, checkpoint: Checkpoint, batch: list[Problem], run: int) -> None:
        """Decode one more batch of the run number `run`, counted from 0."""
        continuation = self.method(checkpoint, batch)
        self.seconds += [0.0] * (run + 1 - len(self.seconds))
        self.seconds[run] += continuation.seconds
        if run == 0:
            self._count(batch, continuation)

    def _count(self, batch: list[Problem], continuation: Continuation) -> None:
        output, pairs = continuation.output, zip(continuation.texts, batch, strict=True)
        self.num_problems += len(batch)
        self.correct += sum(final_number(text) == problem.final for text, problem in pairs)
        self.nfe += int(output.nfe.sum())
        self.active_tokens += int(output.active_tokens.sum())
        self.guider_forwards += 0 if output.guider_forwards is None else int(output.guider_forwards.sum())
        self.tokens += sum(continuation.lengths)

    @property
    def median_seconds(self) -> float:
        """Seconds that all problems took together, median of the runs."""
        return statistics.median(self.seconds)


def run_demo(settings: Settings, console: Console) -> dict:
    """Decode a few problems in view, measure every method, print the table, and return its figures for a JSON file."""
    problems = sample_problems(settings.problems, settings.seed)
    checkpoint = Checkpoint.load(str(TINY / "dlm"), "cpu", "float32")
    methods = compared_methods(checkpoint.load_guider(str(TINY / "guider"), "cpu", "float32", **GUIDANCE))
    if settings.show:
        show_decoding(checkpoint, methods[1:3] + methods[4:], problems[: settings.show], console)
    block_length = checkpoint.model.generation_config.block_length
    console.print(
        f"{settings.problems} held-out problems in batches of {settings.batch_size}, at most {MAX_NEW_TOKENS} new "
        f"tokens in blocks of {block_length}, {torch.get_num_threads()} CPU threads:\n"
    )
    measurements = measure(checkpoint, methods, problems, settings, console)
    record = make_record(settings, block_length, measurements)
    console.print(results_table(record["methods"]))
    console.print(f"\n{NOTES}")
    return record


def sample_problems(count: int, seed: int) -> list[Problem]:
    """Draw `count` of the problems that the package holds."""
    lines = [json.loads(line) for line in (TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    if count > len(lines):
        raise ValueError(f"`--problems` must be at most {len(lines)}, which is all the package holds, got {count}.")
    return [Problem(line["question"], line["final"]) for line in random.Random(seed).sample(lines, count)]


def compared_methods(guider: ARGuider | None) -> list[Method]:
    """The rows of the table: the two baselines, then the cache, then what writes several tokens at once."""
    one_by_one = {"steps": MAX_NEW_TOKENS}
    return [
        Method("plain, full canvas", {"window_policy": "none", "stop_at_eos": False} | one_by_one),
        Method("plain, EOS stop", {"window_policy": "none"} | one_by_one),
        Method("FreeCache", {"window_policy": "freecache"} | one_by_one),
        Method("FreeCache + p>=0.9", {"window_policy": "freecache", "confidence_threshold": 0.9}),
        Method("FreeCache + guider", {"window_policy": "freecache", "guider": guider}),
    ]


def final_number(text: str) -> int | None:
    """The number behind the last `####` of an answer, `None` where there is none."""
    _, mark, number = text.rpartition("####")
    return int(number) if mark and number.strip().isdecimal() else None


def show_decoding(checkpoint: Checkpoint, methods: list[Method], problems: list[Problem], console: Console) -> None:
    """Decode `problems` one by one with each method; a terminal shows the canvas as it fills."""
    if console.is_terminal:
        console.print(
            f"{mask_character(console)} is a masked position, green is what the last forward wrote. Every forward is "
            f"shown for {1000 * SECONDS_PER_FORWARD:.0f} ms.\n"
        )
    for problem in problems:
        console.print(Text(problem.question, "bold"))
        for method in methods:
            decode_in_view(checkpoint, method, problem, console)
        console.print()


def decode_in_view(checkpoint: Checkpoint, method: Method, problem: Problem, console: Console) -> None:
    """Decode one problem; its text stays, with what it took."""

    def picture(text: Text, verdict: str = "") -> Group:
        return Group(Text(method.name + verdict, "cyan"), text)

    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def show(text: Text) -> None:
                live.update(picture(text), refresh=True)

            streamer = checkpoint.canvas_streamer(show, console, SECONDS_PER_FORWARD)
            continuation = method(checkpoint, [problem], streamer)
    else:
        continuation = method(checkpoint, [problem])
    text = continuation.texts[0]
    verdict = "right" if final_number(text) == problem.final else f"wrong, it is {problem.final}"
    console.print(picture(Text(text), f": {int(continuation.output.nfe)} forwards, {verdict}"))


def measure(
    checkpoint: Checkpoint, methods: list[Method], problems: list[Problem], settings: Settings, console: Console
) -> list[Measurement]:
    """Decode all problems with every method, `settings.repeats` times."""
    starts = range(0, len(problems), settings.batch_size)
    batches = [problems[start : start + settings.batch_size] for start in starts]
    measurements = [Measurement(method) for method in methods]
    for method in methods:  # warm-up
        method(checkpoint, batches[0][:1])
    # The methods take turns at every batch, so that a slow minute of the machine falls on all of them.
    for run in range(settings.repeats):
        for index, batch in enumerate(batches):
            with console.status(f"run {run + 1} of {settings.repeats}, batch {index + 1} of {len(batches)}"):
                for measurement in measurements:
                    measurement.decode(checkpoint, batch, run)
    return measurements


def binomial_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    share, z = successes / trials, 1.96
    scale = 1 + z**2 / trials
    center = (share + z**2 / (2 * trials)) / scale
    half_width = z * (share * (1 - share) / trials + z**2 / (4 * trials**2)) ** 0.5 / scale
    return max(center - half_width, 0.0), min(center + half_width, 1.0)


def make_record(settings: Settings, block_length: int, measurements: list[Measurement]) -> dict:
    """The figures of the table, with what is needed to measure them again; counts are means per problem."""
    full_canvas, eos_stop = measurements[0], measurements[1]
    return {
        "command": "flashdlm demo",
        "settings": asdict(settings) | {"max_new_tokens": MAX_NEW_TOKENS, "block_length": block_length},
        "versions": versions(),
        "machine": describe_machine(torch.device("cpu")),
        "baselines": {"full_canvas": full_canvas.method.name, "eos_stop": eos_stop.method.name},
        "methods": [method_record(one, full_canvas.median_seconds, eos_stop.median_seconds) for one in measurements],
    }


def method_record(one: Measurement, full_canvas_seconds: float, eos_stop_seconds: float) -> dict:
    """One row of the table."""
    options = {name: GUIDANCE if name == "guider" else value for name, value in one.method.options.items()}
    return {
        "name": one.method.name,
        "options": options,
        "accuracy": one.correct / one.num_problems,
        "accuracy_interval": list(binomial_interval(one.correct, one.num_problems)),
        "nfe": one.nfe / one.num_problems,
        "guider_forwards": one.guider_forwards / one.num_problems,
        "active_tokens": one.active_tokens / one.num_problems,
        "tokens_per_forward": one.tokens / one.nfe,
        "seconds": one.median_seconds,
        "seconds_of_runs": one.seconds,
        "speed_over_full_canvas": full_canvas_seconds / one.median_seconds,
        "speed_over_eos_stop": eos_stop_seconds / one.median_seconds,
    }


def results_table(rows: list[dict]) -> Table:
    """The table of the `methods` of a record, 80 columns wide."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("\ndecoding", no_wrap=True)
    counts = ("\nNFE", "\nguider", "\nactive", "tokens/\nforward", "\nseconds", "speed\n/full", "speed\n/EOS")
    for header in ("accuracy %\n(95%)", *counts):
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        low, high = row["accuracy_interval"]
        table.add_row(
            row["name"],
            f"{100 * row['accuracy']:.1f} ({100 * low:.0f}-{100 * high:.0f})",
            f"{row['nfe']:.1f}",
            f"{row['guider_forwards']:.1f}",
            f"{row['active_tokens']:.0f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['speed_over_full_canvas']:.1f}x",
            f"{row['speed_over_eos_stop']:.1f}x",
        )
    return table
