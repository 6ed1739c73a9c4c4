"""The demonstration: the embedded pair decodes held-out word problems, first in view, then measured.

Owns which methods are compared, what is counted and how it is reported. Knows nothing of how decoding works.
"""

import statistics
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..console.checkpoint import Checkpoint, Continuation
from ..console.display import mask_character
from ..guider import ARGuider
from ..methods import METHODS
from ..tiny import FOLDER, GUIDANCE, Problem, final_number, sample_problems
from .machine import describe_machine, versions
from .recipe import Recipe
from .run import binomial_interval
from .settings import Settings


PROBLEM_TOKENS = 64
SECONDS_PER_FORWARD = 0.04

NOTES = """\
NFE: forwards of the diffusion model; guider: forwards of the guider; active:
query positions the diffusion model computed; each a mean per problem.
Tokens: generated tokens up to and including EOS. Seconds: for all problems
together, median of the runs.
Speed: over the two baselines, the plain decodes that fill the whole canvas
(full) and that stop at the end of the text (EOS)."""


@dataclass
class Measurement:
    """The counts of `method`, summed over the problems and the same in every run, and the `seconds` of each run."""

    method: Recipe
    num_problems: int = 0
    correct: int = 0
    nfe: int = 0
    guider_forwards: int = 0
    active_tokens: int = 0
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    def decode(self, checkpoint: Checkpoint, batch: list[Problem], run: int) -> None:
        """Decode another batch in run number `run`, counted from 0."""
        continuation = decode_problems(checkpoint, self.method, batch)
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
    checkpoint = Checkpoint.load(str(FOLDER / "dlm"), "cpu", "float32")
    methods = compared_methods(checkpoint.load_guider(str(FOLDER / "guider"), "cpu", "float32", **GUIDANCE))
    if settings.show:
        show_decoding(checkpoint, methods[1:3] + methods[4:], problems[: settings.show], console)
    block_length = checkpoint.model.generation_config.block_length
    console.print(
        f"{settings.problems} held-out problems in batches of {settings.batch_size}, at most {PROBLEM_TOKENS} new "
        f"tokens in blocks of {block_length}, {torch.get_num_threads()} CPU threads:\n"
    )
    measurements = time_demo(checkpoint, methods, problems, settings, console)
    record = make_record(settings, block_length, measurements)
    console.print(results_table(record["methods"]))
    console.print(f"\n{NOTES}")
    return record


def compared_methods(guider: ARGuider | None) -> list[Recipe]:
    """The rows of the table: the two baselines, then the cache, then the methods that write several tokens at once."""
    return [
        Recipe("plain, full canvas", METHODS["llada"] | {"stop_at_eos": False}),
        Recipe("plain, EOS stop", METHODS["llada"]),
        Recipe("FreeCache", METHODS["freecache"]),
        Recipe("FreeCache + p>=0.9", METHODS["flashdlm"]),
        Recipe("FreeCache + guider", METHODS["flashdlm"] | {"guider": guider}),
    ]


def decode_problems(checkpoint: Checkpoint, method: Recipe, problems: list[Problem], streamer=None) -> Continuation:
    """Decode a batch of problems."""
    options = {"max_new_tokens": PROBLEM_TOKENS, "streamer": streamer} | method.options
    return checkpoint.continue_prompts([problem.question for problem in problems], options)


def show_decoding(checkpoint: Checkpoint, methods: list[Recipe], problems: list[Problem], console: Console) -> None:
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


def decode_in_view(checkpoint: Checkpoint, method: Recipe, problem: Problem, console: Console) -> None:
    """Decode one problem; its text stays in view, with the number of forwards."""

    def picture(text: Text, verdict: str = "") -> Group:
        return Group(Text(method.name + verdict, "cyan"), text)

    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def show(text: Text) -> None:
                live.update(picture(text), refresh=True)

            streamer = checkpoint.canvas_streamer(show, console, SECONDS_PER_FORWARD)
            continuation = decode_problems(checkpoint, method, [problem], streamer)
    else:
        continuation = decode_problems(checkpoint, method, [problem])
    text = continuation.texts[0]
    verdict = "right" if final_number(text) == problem.final else f"wrong, it is {problem.final}"
    console.print(picture(Text(text), f": {int(continuation.output.nfe)} forwards, {verdict}"))


def time_demo(
    checkpoint: Checkpoint, methods: list[Recipe], problems: list[Problem], settings: Settings, console: Console
) -> list[Measurement]:
    """Decode all problems with every method, `settings.repeats` times."""
    starts = range(0, len(problems), settings.batch_size)
    batches = [problems[start : start + settings.batch_size] for start in starts]
    measurements = [Measurement(method) for method in methods]
    for method in methods:  # warm-up
        decode_problems(checkpoint, method, batches[0][:1])
    # The methods take turns at every batch, so that a slow minute of the machine falls on all of them.
    for run in range(settings.repeats):
        for index, batch in enumerate(batches):
            with console.status(f"run {run + 1} of {settings.repeats}, batch {index + 1} of {len(batches)}"):
                for measurement in measurements:
                    measurement.decode(checkpoint, batch, run)
    return measurements


def make_record(settings: Settings, block_length: int, measurements: list[Measurement]) -> dict:
    """The figures of the table, with what is needed to measure them again; counts are means per problem."""
    full_canvas, eos_stop = measurements[0], measurements[1]
    return {
        "command": "flashdlm demo",
        "settings": asdict(settings) | {"max_new_tokens": PROBLEM_TOKENS, "block_length": block_length},
        "versions": versions(),
        "machine": describe_machine(torch.device("cpu")),
        "baselines": {"full_canvas": full_canvas.method.name, "eos_stop": eos_stop.method.name},
        "methods": [
            method_record(measurement, full_canvas.median_seconds, eos_stop.median_seconds)
            for measurement in measurements
        ],
    }


def method_record(measurement: Measurement, full_canvas_seconds: float, eos_stop_seconds: float) -> dict:
    """The figures of one row of the table."""
    options = {name: GUIDANCE if name == "guider" else value for name, value in measurement.method.options.items()}
    return {
        "name": measurement.method.name,
        "options": options,
        "accuracy": measurement.correct / measurement.num_problems,
        "accuracy_interval": list(binomial_interval(measurement.correct, measurement.num_problems)),
        "nfe": measurement.nfe / measurement.num_problems,
        "guider_forwards": measurement.guider_forwards / measurement.num_problems,
        "active_tokens": measurement.active_tokens / measurement.num_problems,
        "tokens_per_forward": measurement.tokens / measurement.nfe,
        "seconds": measurement.median_seconds,
        "seconds_of_runs": measurement.seconds,
        "speed_over_full_canvas": full_canvas_seconds / measurement.median_seconds,
        "speed_over_eos_stop": eos_stop_seconds / measurement.median_seconds,
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
