"""Comparing methods by time: the rows of `flashdlm bench`. What the numbers mean:

seconds: median over the runs of the time that all prompts take together; in every run the methods take turns.
/full, /EOS: the seconds of the plain decode (no cache, one token per forward) that fills the canvas, and of the one
that stops at the end of the text, over these seconds.
NFE, guider, active: forwards of the diffusion model, forwards of the guider and query positions that the diffusion
model computed, each a mean per prompt.
tok/fwd, tok/s: generated tokens, up to and with EOS, over NFE and over seconds.
peak MB: memory in use at the peak of a run beyond what the models take before it (10^6 bytes).
outside %: share of the time that is not inside a forward of a model.
x floor: seconds over the floor, the time that the forwards would take at the ceilings on the card: the longer of
operations over GEMM throughput and bytes over memory bandwidth, summed over the forwards.

`ar` decodes as many tokens as the canvas has, one at a time, with an autoregressive model of the same shape, random
weights and a K/V cache. Random weights write one token per forward whatever the method: they measure the cost of a
forward, not how many are needed.

Owns the table of methods, the order of the runs and the arithmetic of the rows. Knows nothing of how decoding works.
"""

import argparse
import runpy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from .machine import Ceilings, CostModel, peak_memory
from .measuring import Models, Recipe, Run, Workload, format_table, problem_workload, random_workload, run
from .shapes import load_models, random_model, twin_config


HEADERS = "method batch accuracy% seconds /full /EOS NFE guider active tok/fwd tok/s peakMB outside% xfloor".split()


def recipes(new_tokens: int, block_length: int) -> dict[str, Recipe]:
    """The methods that can be compared, by name; the first two are the baselines."""
    plain = {"window_policy": "none", "steps": new_tokens}
    one = {"steps": new_tokens}
    sure = {"confidence_threshold": 0.9}
    window = {"right_window": 2 * block_length}
    both = {"combine": "intersection", "confidence_threshold": 0.5}
    table = [
        Recipe("plain", plain | {"stop_at_eos": False}),
        Recipe("plain-eos", plain),
        Recipe("prefix", one | {"window_policy": "prefix"}),
        Recipe("dual", one | {"window_policy": "dual"}),
        Recipe("dkv", one | {"window_policy": "dkv"}),
        Recipe("freecache", one | {"window_policy": "freecache"}),
        Recipe("freecache+window", one | {"window_policy": "freecache"} | window),
        Recipe("plain+threshold", sure | {"window_policy": "none"}),
        Recipe("prefix+threshold", sure | {"window_policy": "prefix"}),
        Recipe("dual+threshold", sure | {"window_policy": "dual"}),
        Recipe("freecache+threshold", sure | {"window_policy": "freecache"}),
        Recipe("freecache+window+threshold", sure | {"window_policy": "freecache"} | window),
        Recipe("guided", {"window_policy": "freecache"}, "guider"),
        Recipe("guided+window", {"window_policy": "freecache"} | window, "guider"),
        Recipe("guided+union", {"window_policy": "freecache"}, "guider", {"combine": "union"}),
        Recipe("guided+intersection", {"window_policy": "freecache"}, "guider", both),
        Recipe("guided+window+intersection", {"window_policy": "freecache"} | window, "guider", both),
        Recipe("ar", loop=decode_twin, speaks=False),
    ]
    return {recipe.name: recipe for recipe in table}


def decode_twin(models: Models, inputs: dict, options: dict) -> torch.LongTensor:
    """The autoregressive model of the same shape, with the host's own loop and cache."""
    return models.twin.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)


def compare(args: argparse.Namespace, device: torch.device, note: Callable[[str], None]) -> dict:
    r"""
    Measure all methods at all batch sizes.

    Args:
        args (`argparse.Namespace`): Of the command line.
        device (`torch.device`): Where to decode.
        note (`Callable`): Is told what is being measured.

    Returns:
        `dict`: The rest of the record: options, ceilings, models and rows.
    """
    models = load_models(args, device)
    new_tokens = args.new_tokens or 256
    recommended = getattr(models.model.generation_config, "block_length", None)
    block_length = min(args.block_length or recommended or 32, new_tokens)
    chosen = choose(args.methods, recipes(new_tokens, block_length) | references(args.reference), models)
    if any(recipe.name == "ar" for recipe in chosen):
        models.twin = random_model(twin_config(models.model.config), models.model.dtype, device, args.seed)
    costs = {name: CostModel(model) for name, model in models.named().items()}
    ceilings = Ceilings.measure(device, models.model.dtype, costs["model"].weight_bytes)
    options = {"max_new_tokens": new_tokens, "block_length": block_length, "stop_at_eos": not args.fill_canvas}
    rows = []
    for batch_size in args.batch_size or [1, 4, 16]:
        workload = make_workload(args, models, batch_size, options)

        def told(text: str, batch_size: int = batch_size) -> None:
            note(f"batch {batch_size}, {text}")

        runs, peaks = measure(models, chosen, workload, args.repeats or 3, told)
        rows += [{"batch_size": batch_size} | row for row in make_rows(chosen, runs, peaks, costs, ceilings)]
    return {
        "options": options,
        "ceilings": vars(ceilings) | {"dtype": str(models.model.dtype)},
        "models": {name: describe(model, costs[name]) for name, model in models.named().items()},
        "rows": rows,
    }


def describe(model, cost: CostModel) -> dict:
    """A model in the record."""
    sizes = {"parameters": model.num_parameters(), "weight_bytes": cost.weight_bytes}
    return {"type": model.config.model_type, **sizes}


def references(path: str | None) -> dict[str, Recipe]:
    """Loops of the user's, from the `METHODS` of a Python file."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"`--reference` must be a Python file, got {path!r}.")
    loops = runpy.run_path(path).get("METHODS")
    if not isinstance(loops, dict):
        raise ValueError(f"`--reference` must define METHODS, a dict of loops by name, got {path!r}.")
    return {name: Recipe(name, loop=reference_loop(loop)) for name, loop in loops.items()}


def reference_loop(loop):
    """A loop `(model, input_ids, max_new_tokens=, block_length=) -> ids` in the form of a recipe's."""

    def decode(models: Models, inputs: dict, options: dict) -> torch.LongTensor:
        if not inputs["attention_mask"].all():
            raise ValueError("`--reference` loops take prompts of one length: add `--prompt-length`.")
        sizes = {name: options[name] for name in ("max_new_tokens", "block_length")}
        return loop(models.model, inputs["input_ids"], **sizes)

    return decode


def choose(wanted: list[str] | None, known: dict[str, Recipe], models: Models) -> list[Recipe]:
    """The methods asked for; without a guider not those that need one."""
    if wanted is None:
        return [recipe for recipe in known.values() if recipe.guider is None or models.guiders]
    for name in wanted:
        if name not in known:
            raise ValueError(f"`--methods` must be some of {', '.join(known)}, got {name!r}.")
        if known[name].guider is not None and not models.guiders:
            raise ValueError(f"`--methods` {name} needs a guider: add `--guider`.")
    return [known[name] for name in wanted]


def make_workload(args: argparse.Namespace, models: Models, batch_size: int, options: dict) -> Workload:
    """The prompts: held-out problems for a trained model, random ids for random weights."""
    if models.checkpoint is None:
        return random_workload(models.model, batch_size, args.seed, options, args.prompt_length or 128)
    count = max(args.problems or 16, batch_size)
    return problem_workload(models.checkpoint, count, batch_size, args.seed, options, args.prompt_length)


def measure(models: Models, chosen: list[Recipe], workload: Workload, repeats: int, note: Callable[[str], None]):
    """The runs of each method, and the peak memory of a run before them that warms up; both by name."""
    peaks: dict[str, int | None] = {}
    runs: dict[str, list[Run]] = {recipe.name: [] for recipe in chosen}
    for recipe in chosen:
        note(f"warm-up: {recipe.name}")
        with peak_memory(models.model.device) as peak:
            run(models, recipe, workload)
        peaks[recipe.name] = peak[0]
    # The methods take turns, so that a slow minute of the machine does not fall on one of them alone.
    for index in range(repeats):
        for recipe in chosen:
            note(f"run {index + 1} of {repeats}: {recipe.name}")
            runs[recipe.name].append(run(models, recipe, workload))
    return runs, peaks


def make_rows(chosen: list[Recipe], runs: dict[str, list[Run]], peaks: dict, costs: dict, ceilings: Ceilings):
    """Rows of the record, one per method."""
    median = {name: statistics.median(one.seconds for one in of_method) for name, of_method in runs.items()}
    for recipe in chosen:
        of_method, seconds = runs[recipe.name], median[recipe.name]
        first = of_method[0]
        floor = sum(costs[name].floor_seconds(forwards, ceilings) for name, forwards in first.forwards.items())
        yield {
            "method": recipe.name,
            "options": recipe.options,
            "rule": recipe.rule,
            **first.figures(),
            "seconds": seconds,
            "seconds_of_runs": [one.seconds for one in of_method],
            "speed_over_full_canvas": median["plain"] / seconds if "plain" in median else None,
            "speed_over_eos_stop": median["plain-eos"] / seconds if "plain-eos" in median else None,
            "tokens_per_second": first.tokens / seconds,
            "peak_memory_bytes": peaks[recipe.name],
            "outside_forwards_share": statistics.median(one.outside_share for one in of_method),
            "floor_seconds": floor,
            "seconds_over_floor": seconds / floor,
        }


def cells(row: dict) -> list[str]:
    """A row of the printed table."""

    def number(name: str, form: str, scale: float = 1) -> str:
        return "-" if row[name] is None else format(row[name] * scale, form)

    return [
        row["method"],
        str(row["batch_size"]),
        number("accuracy", ".0f", 100),
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
    ]


def report_comparison(record: dict) -> str:
    """The ceilings and the table."""
    ceilings = record["ceilings"]
    return (
        f"GEMM: {ceilings['flops_per_second'] / 1e9:.0f} GFLOP/s in {ceilings['dtype']}\n"
        f"memory: {ceilings['bytes_per_second'] / 1e9:.1f} GB/s\n\n"
        f"{format_table(HEADERS, [cells(row) for row in record['rows']])}"
    )
