"""Comparing methods by time: the rows of `flashdlm bench`. What the numbers mean:

long%: accuracy where the correct answer is among the longest quarter.
seconds: median over the runs of the time that all prompts take together; in every run the methods take turns.
/full, /EOS: speed over the plain decode (no cache, one token per forward) that fills the canvas, and over the plain
decode that stops at the end of the text: their seconds divided by these seconds.
NFE, guider, active: forwards of the diffusion model, forwards of the guider and query positions that the diffusion
model computed, each as a mean per prompt.
tok/fwd, tok/s: generated tokens, up to and including EOS, divided by NFE and by seconds.
peak MB: memory in use at the peak of a run minus the memory in use before it (10^6 bytes).
outside %: share of the time that is not inside a forward of a model.
x floor: seconds divided by the floor, the time that the forwards would take at the ceilings of the machine: the longer
of operations over GEMM throughput and bytes over memory bandwidth, summed over the forwards.
ops/fwd, ops/step: operations of torch that are not views (kernel launches on an accelerator) in a forward of a model,
and outside of the forwards for each forward of the diffusion model.
ms/step: seconds divided by the forwards of the diffusion model; for `ar`, by those of the autoregressive model.

A method that writes the same tokens as a reference is compared with it: `times` is the reference's seconds divided by
the method's, `equal%` the share of prompts whose tokens are equal, `graphs` how many graphs were compiled before the
runs, and `later` how many in them, of which there should be none. References are the loops of `--reference`, each
compared with the built-in method of the same settings, which fills the canvas as the loop does, and with `--compile`
the eager methods, each compared with itself compiled. Compilation happens in the warm-up before the runs; the record
holds its seconds.

`ar` decodes one token at a time with an autoregressive model of the same shape, random weights and a K/V cache: as
many tokens as the longest correct answer of the batch has, as if it had written it; without answers, or where no
method stops at the end of the text, as many as the canvas has. Random weights write one token per forward whatever the
method: they measure the cost of a forward, not how many are needed.

best: at each batch size the fastest method whose accuracy is within a point of the best plain decode, and how many
times as fast it is as `ar` and as Fast-dLLM's best setting, `dual+threshold`.

Owns the order of the runs and the arithmetic of the rows. Knows nothing of which methods there are, or of how decoding
works.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..fused_layers import fused_view
from .decoding import Models
from .machine import Ceilings, CostModel, peak_memory
from .models import load_models, random_model, twin_config
from .operations import OperationCounter, layer_operations, operations_within
from .recipe import Recipe
from .recipes import choose, compiled, recipes, references
from .report import format_table
from .run import Run, run
from .workload import Workload, problem_workload, random_workload


MARGIN = 0.01  # of the accuracy, which the best method may give away
OPPONENTS = ("ar", "dual+threshold")
RANDOM_PROMPT_LENGTH = 128  # of random ids, unless the caller names one
HEADERS = "method batch accuracy% long% seconds /full /EOS NFE guider active tok/fwd tok/s".split()
OPERATIONS = ("operations_per_forward", "operations_per_step")  # of a row of the record
HEADERS += ["peakMB", "outside%", "xfloor", "ops/fwd", "ops/step", "ms/step"]


def compare(args: argparse.Namespace, device: torch.device, note: Callable[[str], None]) -> dict:
    r"""
    Measure all methods at all batch sizes.

    Args:
        args (`argparse.Namespace`): Arguments of the command line.
        device (`torch.device`): Where to decode.
        note (`Callable`): Called with a line that says what is being measured.

    Returns:
        `dict`: The rest of the record: options, ceilings, models and rows.
    """
    new_tokens = args.new_tokens or 256
    models = load_models(args, device, (args.prompt_length or RANDOM_PROMPT_LENGTH) + new_tokens)
    block_length = models.block_length(args.block_length, new_tokens)
    steps = models.steps_per_block(args.steps, new_tokens, block_length)
    chosen = choose(args.methods, recipes(steps, block_length), references(args.reference, steps), models)
    if args.compile:
        # All methods share the compiled code, in one process.
        torch._dynamo.config.recompile_limit = 64
        chosen = [twin for recipe in chosen for twin in (recipe, compiled(recipe)) if twin is not None]
    if any(recipe.name == "ar" for recipe in chosen):
        models.twin = random_model(twin_config(models.model.config), models.model.dtype, device, args.seed)
    costs = {name: CostModel(model) for name, model in models.named().items()}
    of_machine = device, models.model.dtype, costs["model"].weight_bytes
    ceilings = Ceilings.measure(*of_machine)
    options = {"max_new_tokens": new_tokens, "block_length": block_length, "stop_at_eos": not args.fill_canvas}
    measured = {}
    for batch_size in args.batch_size or [1, 4, 16]:
        workload = make_workload(args, models, batch_size, options)

        def told(text: str, batch_size: int = batch_size) -> None:
            note(f"batch {batch_size}, {text}")

        measured[batch_size] = time_methods(models, chosen, workload, args.repeats or 3, told)
    # A machine that was disturbed while its ceilings were measured would look as if the runs were near them.
    ceilings = ceilings.or_higher(Ceilings.measure(*of_machine))
    rows = [
        {"batch_size": batch_size} | row
        for batch_size, of_batch in measured.items()
        for row in make_rows(of_batch, costs, ceilings)
    ]
    return {
        "options": options,
        "ceilings": vars(ceilings) | {"dtype": str(models.model.dtype)},
        "models": {
            name: describe(fused_view(model) if name in models.guiders else model, costs[name])
            for name, model in models.named().items()
        },
        "rows": rows,
    }


def describe(model, cost: CostModel) -> dict:
    """The entry of a model in the record."""
    sizes = {"parameters": model.num_parameters(), "weight_bytes": cost.weight_bytes}
    return {"type": model.config.model_type, **sizes, "operations_of_layers": layer_operations(model)}


def make_workload(args: argparse.Namespace, models: Models, batch_size: int, options: dict) -> Workload:
    """The prompts: held-out problems for a trained model, random ids for random weights."""
    if models.checkpoint is None:
        return random_workload(
            models.model, batch_size, args.seed, options, args.prompt_length or RANDOM_PROMPT_LENGTH
        )
    count = max(args.problems or 16, batch_size)
    return problem_workload(models.checkpoint, count, batch_size, args.seed, options, args.prompt_length)


@dataclass
class Measured:
    """The runs of a recipe, and the time and memory of the warm-up before them."""

    recipe: Recipe
    runs: list[Run]
    warm_up_seconds: float
    once: float  # seconds of the run after it
    peak_memory_bytes: int | None
    operations: dict[str, float | None]
    graphs: int  # compiled before the runs
    later_graphs: int = 0  # compiled in the runs

    @property
    def seconds(self) -> float:
        """The median of the runs."""
        return statistics.median(single.seconds for single in self.runs)


def time_methods(
    models: Models, chosen: list[Recipe], workload: Workload, repeats: int, note: Callable[[str], None]
) -> dict[str, Measured]:
    """Run all methods and return the measurements by name."""
    measured = {}
    for recipe in chosen:
        note(f"warm-up: {recipe.name}")
        graphs = num_graphs()
        # The memory for compiling and for counting is not counted as memory for decoding.
        seconds, operations = warm_up(models, recipe, workload)
        with peak_memory(models.model.device) as peak:
            once = run(models, recipe, workload).seconds
        measured[recipe.name] = Measured(recipe, [], seconds, once, peak[0], operations, num_graphs() - graphs)
    seconds = sum(of_method.once for of_method in measured.values())
    note(f"{repeats} runs of {len(measured)} methods will take about {repeats * seconds:.0f} s")
    # The methods take turns, so that a slow minute of the machine does not fall on a single method.
    for index in range(repeats):
        for name, of_method in measured.items():
            note(f"run {index + 1} of {repeats}: {name}")
            graphs = num_graphs()
            of_method.runs.append(run(models, of_method.recipe, workload))
            of_method.later_graphs += num_graphs() - graphs
    return measured


def num_graphs() -> int:
    """How many graphs this process has compiled."""
    compiler = sys.modules.get("torch._dynamo.utils")  # takes seconds to import
    return 0 if compiler is None else compiler.counters["stats"]["unique_graphs"]


def warm_up(models: Models, recipe: Recipe, workload: Workload) -> tuple[float, dict[str, float | None]]:
    """The first run of a method: its seconds, and the operations of a forward and of the rest of a step."""
    if recipe.compiled:
        return run(models, recipe, workload).seconds, dict.fromkeys(OPERATIONS)
    watched = models.named().values()
    with torch.inference_mode(), OperationCounter() as counter, operations_within(counter, watched) as counts:
        first = run(models, recipe, workload.start())
    steps = len(first.forwards["model"] or first.forwards["twin"])
    outside = counter.total - sum(counts)
    return first.seconds, dict(zip(OPERATIONS, (sum(counts) / len(counts), outside / steps), strict=True))


def make_rows(measured: dict[str, Measured], costs: dict[str, CostModel], ceilings: Ceilings):
    """Rows of the record, one per method."""
    for name, of_method in measured.items():
        recipe, seconds, first = of_method.recipe, of_method.seconds, of_method.runs[0]
        floor = sum(costs[model].floor_seconds(forwards, ceilings) for model, forwards in first.forwards.items())
        yield {
            "method": name,
            "options": recipe.options,
            "rule": recipe.rule,
            "compiled": recipe.compiled,
            "stops_at_answers": recipe.stops_at_answers,
            **first.figures(),
            "seconds": seconds,
            "seconds_of_runs": [single.seconds for single in of_method.runs],
            "warm_up_seconds": of_method.warm_up_seconds,
            "graphs": of_method.graphs,
            "later_graphs": of_method.later_graphs,
            "milliseconds_per_step": 1000 * seconds / len(first.forwards["model"] or first.forwards["twin"]),
            "speed_over_full_canvas": speed_over("plain", of_method, measured),
            "speed_over_eos_stop": speed_over("plain-eos", of_method, measured),
            "tokens_per_second": first.tokens / seconds,
            "peak_memory_bytes": of_method.peak_memory_bytes,
            "kept_bytes": sum(costs[model].kept_bytes(forwards) for model, forwards in first.forwards.items()),
            "outside_forwards_share": statistics.median(single.outside_share for single in of_method.runs),
            **of_method.operations,
            "floor_seconds": floor,
            "seconds_over_floor": seconds / floor,
            "like": recipe.like,
            "speed_over_like": speed_over(recipe.like, of_method, measured),
            "equal_share": equal_share(of_method, measured.get(recipe.like)),
        }


def speed_over(name: str | None, of_method: Measured, measured: dict[str, Measured]) -> float | None:
    """How many times as fast as the method of that name, if it was measured."""
    return measured[name].seconds / of_method.seconds if name in measured else None


def equal_share(of_method: Measured, reference: Measured | None) -> float | None:
    """The share of rows that hold the same tokens."""
    if reference is None:
        return None
    pairs = list(zip(of_method.runs[0].canvases, reference.runs[0].canvases, strict=True))
    return sum(left == right for left, right in pairs) / len(pairs)


def format_row(row: dict) -> list[str]:
    """A row of the printed table."""

    def number(name: str, form: str, scale: float = 1) -> str:
        value = row.get(name)  # older records lack some fields
        return "-" if value is None else format(value * scale, form)

    return [
        row["method"],
        str(row["batch_size"]),
        number("accuracy", ".0f", 100),
        number("accuracy_of_long", ".0f", 100),
        number("seconds", ".3f"),
        number("speed_over_full_canvas", ".2f"),
        number("speed_over_eos_stop", ".2f"),
        number("nfe", ".1f"),
        number("guider_forwards", ".1f"),
        number("active_tokens", ".0f"),
        number("tokens_per_forward", ".2f"),
        number("tokens_per_second", ".1f"),
        number("peak_memory_bytes", ".1f", 1e-6),
        number("outside_forwards_share", ".1f", 100),
        number("seconds_over_floor", ".1f"),
        number("operations_per_forward", ".0f"),
        number("operations_per_step", ".0f"),
        number("milliseconds_per_step", ".2f"),
    ]


def report_comparison(record: dict) -> str:
    """The ceilings, the table without empty columns, and the pairs of methods that write the same tokens."""
    ceilings = record["ceilings"]
    columns = zip(HEADERS, *(format_row(row) for row in record["rows"]), strict=True)
    headers, *rows = zip(*(column for column in columns if set(column[1:]) != {"-"}), strict=True)
    lines = [
        f"GEMM: {ceilings['flops_per_second'] / 1e9:.0f} GFLOP/s in {ceilings['dtype']}",
        f"memory: {ceilings['bytes_per_second'] / 1e9:.1f} GB/s",
        *report_layers(record["models"]),
        format_table(headers, rows),
        *report_best(record["rows"]),
    ]
    for is_compiled in (False, True):
        lines += report_pairs(
            [row for row in record["rows"] if row.get("like") is not None and row["compiled"] == is_compiled]
        )
    return "\n".join(lines)


def report_best(rows: list[dict]) -> list[str]:
    """The best method at each batch size, beside the opponents; none where texts have no answers."""
    lines = []
    # Older records have an autoregressive model that fills the canvas: no opponent of a decode that stops.
    rows = [row for row in rows if row["method"] != "ar" or row.get("stops_at_answers")]
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        measured = {row["method"]: row for row in rows if row["batch_size"] == batch_size}
        plain = [row["accuracy"] for name, row in measured.items() if name in ("plain", "plain-eos")]
        if not plain or None in plain:
            continue
        right = [row for row in measured.values() if (row["accuracy"] or 0) >= max(plain) - MARGIN]
        best = min(right, key=lambda row: row["seconds"])
        ratios = [
            f"{measured[name]['seconds'] / best['seconds']:.2f}x {name}" for name in OPPONENTS if name in measured
        ]
        lines.append(f"best at batch {batch_size}: {best['method']}" + "".join(f", {ratio}" for ratio in ratios))
    return ["", *lines] if lines else []


def report_layers(models: dict[str, dict]) -> list[str]:
    """The operations of a layer of each model, and an empty line."""
    counts = {name: sorted(set(model.get("operations_of_layers", ()))) for name, model in models.items()}
    texts = [f"{name} {' or '.join(map(str, numbers))}" for name, numbers in counts.items() if numbers]
    return [f"operations of a layer: {', '.join(texts)}\n"] if texts else [""]


def report_pairs(rows: list[dict]) -> list[str]:
    """The table of methods that are compared with a reference, and how many times as fast they are."""
    if not rows:
        return []
    times = [row["speed_over_like"] for row in rows]
    counts = ["graphs", "later_graphs"] if rows[0]["compiled"] else []
    table = [
        [
            row["method"],
            str(row["batch_size"]),
            f"{row['seconds']:.3f}",
            f"{row['seconds'] * row['speed_over_like']:.3f}",
            f"{row['speed_over_like']:.2f}",
            f"{100 * row['equal_share']:.0f}",
            *(str(row[name]) for name in counts),
        ]
        for row in rows
    ]
    headers = ["method", "batch", "seconds", "reference", "times", "equal%", "graphs", "later"]
    return [
        "",
        format_table(headers[: 6 + len(counts)], table),
        f"times: {min(times):.2f} to {max(times):.2f}, median {statistics.median(times):.2f}",
    ]
