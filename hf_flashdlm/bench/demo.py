"""The demonstration: the embedded pair decodes held-out word problems, first in view, then measured.

Owns which methods are compared, what is counted and how it is reported. Knows nothing of how decoding works.
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from ..console.checkpoint import Checkpoint, Continuation
from ..console.display import mask_character, shows_canvas
from ..guider import ARGuider
from ..methods import METHODS
from ..tiny import FOLDER, GUIDANCE, Problem, final_number, sample_problems
from .machine import describe_machine, versions
from .recipe import Recipe
from .replay import Recorder, Replay, Stage
from .run import binomial_interval
from .settings import Settings


PROBLEM_TOKENS = 64

NOTES = """\
NFE: forwards of the diffusion model; guider: forwards of the guider; active:
query positions the diffusion model computed; each a mean per problem.
Tokens: generated tokens up to and including EOS. Seconds: for all problems
together, median of the runs.
Speed: over the two baselines, the plain decodes that fill the whole canvas
(full) and that stop at the end of the text (EOS)."""

# The columns of the table, and which are left out first where there is no room.
FIGURES: dict[str, Callable[[dict], str]] = {
    "\ndecoding": lambda row: row["name"],
    "accuracy %\n(95%)": lambda row: "{:.1f} ({:.0f}-{:.0f})".format(
        *(100 * share for share in (row["accuracy"], *row["accuracy_interval"]))
    ),
    "\nNFE": lambda row: f"{row['nfe']:.1f}",
    "\nguider": lambda row: f"{row['guider_forwards']:.1f}",
    "\nactive": lambda row: f"{row['active_tokens']:.0f}",
    "tokens/\nforward": lambda row: f"{row['tokens_per_forward']:.2f}",
    "\nseconds": lambda row: f"{row['seconds']:.2f}",
    "speed\n/full": lambda row: f"{row['speed_over_full_canvas']:.1f}x",
    "speed\n/EOS": lambda row: f"{row['speed_over_eos_stop']:.1f}x",
}
LEFT_OUT = ("\nactive", "tokens/\nforward", "\nguider", "speed\n/full", "\nNFE", "speed\n/EOS")


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
    for method in methods:  # warm-up
        decode_problems(checkpoint, method, problems[:1])
    show_decoding(checkpoint, methods, problems[: settings.show], settings.slow, console)
    block_length = checkpoint.model.generation_config.block_length
    console.print(
        f"{settings.problems} held-out problems in batches of {settings.batch_size}, at most {PROBLEM_TOKENS} new "
        f"tokens in blocks of {block_length}, {torch.get_num_threads()} CPU threads:\n"
    )
    measurements = time_demo(checkpoint, methods, problems, settings, console)
    record = make_record(settings, block_length, measurements)
    console.print(results_table(record["methods"], console))
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


def show_decoding(
    checkpoint: Checkpoint, methods: list[Recipe], problems: list[Problem], slow: int, console: Console
) -> None:
    """Decode `problems` one by one with each method; a terminal shows the canvases as they filled, side by side."""
    if not shows_canvas(console):
        for problem in problems:
            console.print(Text(problem.question, "bold"))
            for method in methods[1:3] + methods[4:]:
                print_decoded(checkpoint, method, problem, console)
            console.print()
        return
    if problems and slow:
        console.print(
            f"{mask_character(console)} is a masked position, green is what the last forward wrote. Each decode is "
            f"shown at its pace, {slow} times slower.\n"
        )
    painter = checkpoint.canvas_streamer(print, console)  # draws what it is given, and is shown nothing itself
    for problem in problems:
        replays = [record_decoding(checkpoint, method, problem) for method in methods]
        console.print(Text(f"{problem.question} ({problem.final})", "bold"))
        Stage(replays, painter, console).play(slow)


def print_decoded(checkpoint: Checkpoint, method: Recipe, problem: Problem, console: Console) -> None:
    """Decode one problem, and print its text with the number of forwards."""
    continuation = decode_problems(checkpoint, method, [problem])
    text, forwards = continuation.texts[0], int(continuation.output.nfe)
    right = final_number(text) == problem.final
    verdict = "right" if right else f"wrong, it is {problem.final}"
    console.print(Text(f"{method.name}: {forwards} forwards, {verdict}", "cyan"), Text(text), sep="\n")


def record_decoding(checkpoint: Checkpoint, method: Recipe, problem: Problem) -> Replay:
    """Decode one problem; its steps with the times at which they were written."""
    recorder = Recorder(checkpoint.model.config.mask_token_id)
    with recorder.counting(method.options.get("guider")):
        continuation = decode_problems(checkpoint, method, [problem], recorder)
    right = final_number(continuation.texts[0]) == problem.final
    return recorder.replay(method.name, "right" if right else "wrong", continuation.seconds)


def time_demo(
    checkpoint: Checkpoint, methods: list[Recipe], problems: list[Problem], settings: Settings, console: Console
) -> list[Measurement]:
    """Decode all problems with every method, `settings.repeats` times."""
    starts = range(0, len(problems), settings.batch_size)
    measurements = [Measurement(method) for method in methods]
    with progress_bar(console, settings.repeats * len(problems) * len(methods)) as progress:
        (task,) = progress.task_ids
        # The methods take turns at every batch, so that a slow minute of the machine falls on all of them.
        for run, start in product(range(settings.repeats), starts):
            batch = problems[start : start + settings.batch_size]
            for number, measurement in enumerate(measurements, 1):
                done = f"run {run + 1}/{settings.repeats}, {start}/{len(problems)} problems"
                now = f"method {number}/{len(methods)}: {measurement.method.name}"
                progress.update(task, description=f"{done}, {now}", refresh=True)
                measurement.decode(checkpoint, batch, run)
                progress.advance(task, len(batch))
    return measurements


def progress_bar(console: Console, total: int) -> Progress:
    """A bar that is drawn when it is told to, and never while a decode is timed; on a terminal alone."""
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    progress = Progress(
        *(text, BarColumn(bar_width=12), TimeRemainingColumn()),
        console=console,
        auto_refresh=False,
        transient=True,
        expand=True,
        disable=not shows_canvas(console),
        speed_estimate_period=3600,
    )
    progress.add_task("", total=total)
    return progress


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


def results_table(rows: list[dict], console: Console) -> Table:
    """The table of the `methods` of a record, 80 columns wide; on a narrower terminal with fewer figures."""
    left_out: list[str] = []
    while True:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        columns = {header: figure for header, figure in FIGURES.items() if header not in left_out}
        for header in columns:
            table.add_column(header, justify="right" if table.columns else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(figure(row) for figure in columns.values()))
        needed = console.measure(table, options=console.options.update(width=100)).maximum
        if needed <= console.width or len(left_out) == len(LEFT_OUT):
            return table
        left_out.append(LEFT_OUT[len(left_out)])
