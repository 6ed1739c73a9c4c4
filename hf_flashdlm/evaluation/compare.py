"""Methods compared on tasks of lm-evaluation-harness: the rows of `flashdlm evaluate`. What the numbers mean:

accuracy%, 95%: the task's first metric, or the one of `--metric`, and its interval: Wilson's where each answer is
right or wrong, else 1.96 standard errors to both sides. What is no share, such as a perplexity, is printed as it is.
s/problem: time of the decodes or estimates, divided by the problems.
/full, /EOS: speed over the plain decode (no cache, one token per forward) that fills the canvas, `plain`, and over the
plain decode that stops at the end of the text, `plain-eos`: their seconds divided by these seconds.
NFE, guider: forwards of the diffusion model and of the guider, each as a mean per problem.
tok/fwd: generated tokens, up to and including the end token, divided by NFE.

A task that scores given answers decodes nothing, so no method changes its figures: it has a single row.

Owns the order of the work and the arithmetic of the rows. Knows nothing of how decoding works.
"""

import argparse
import difflib
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager

from ..bench.ablation import describe_models, key_of, read_rows, write_rows
from ..bench.decoding import Models
from ..bench.recipe import Recipe
from ..bench.recipes import choose, recipes
from ..bench.report import format_table
from ..bench.run import Run, binomial_interval
from ..console.checkpoint import Checkpoint
from ..hub.loading import refusing
from ..methods import METHODS
from .harness import FlashDLM


HEADERS = "accuracy% 95% s/problem /full /EOS NFE guider tok/fwd".split()
NEW_TOKENS = 256  # where neither the caller nor the task names a length: the harness's number
LIKELIHOOD = Recipe("log-likelihood")  # of given answers
BASELINES = {"speed_over_full_canvas": "plain", "speed_over_eos_stop": "plain-eos"}


def methods(steps_per_block: int, block_length: int) -> dict[str, Recipe]:
    """The methods by name: those of `flashdlm bench`, and the published ones as `generate(method=)` has them."""
    known = {name: recipe for name, recipe in recipes(steps_per_block, block_length).items() if recipe.loop is None}
    guided = dict.fromkeys(("flashdlm", "flashdlm-fast"), "guider")
    return {name: Recipe(name, {"method": name}, guided.get(name)) for name in METHODS} | known


@dataclass(frozen=True)
class Row:
    """What is to be measured: `recipe` on the `task`, whose decodes get `options` too, and all that decides it."""

    task: str
    recipe: Recipe
    options: dict
    identity: dict


def evaluate(args: argparse.Namespace, device: torch.device, record: dict, note: Callable[[str], None]) -> dict:
    r"""
    Measure all methods on all tasks, except for the rows that the file `--json` already holds.

    Args:
        args (`argparse.Namespace`): Arguments of the command line.
        device (`torch.device`): Where to decode.
        record (`dict`): The part of the record that is known before; the file holds it, too.
        note (`Callable`): Called with a line that says what is being measured.

    Returns:
        `dict`: The rest of the record: the models, the rows, and those that the file held for other settings.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_defaults=not all(map(is_file, args.tasks)))
    tasks = {name: load_task(manager, name) for name in args.tasks}
    models, described = load_models(args, device)
    known, is_warm = read_rows(args.json), False
    rest = {"models": described, "rows": []}
    work = plan(args, tasks, models, described | {"machine": record["machine"]})
    for index, row in enumerate(work, 1):
        key = key_of(row.identity)
        if key not in known:
            note(f"{index} of {len(work)}: {row.task}: {row.recipe.name}")
            if not is_warm:  # and a metric that is none is refused before the work
                select(row.identity | measure(args, manager, models, row, 1), args.metric)
                is_warm = True
            figures = measure(args, manager, models, row, args.limit)
            known[key] = row.identity | figures | {"key": key, "commit": record["commit"]}
        rest["rows"].append(known[key])
        write_rows(args.json, record, rest, known)
    rest["rows"] = [select(row, args.metric) for row in rest["rows"]]
    add_speeds(rest["rows"])
    return rest


def is_file(name: str) -> bool:
    """Whether a task is named by its file."""
    return name.endswith(".yaml")


def load_task(manager: TaskManager, name: str) -> dict:
    """The tasks that a name or a file stands for, by their own names."""
    if is_file(name) and not Path(name).is_file():
        raise ValueError(f"`--tasks` must be names of tasks or .yaml files that exist, got {name!r}.")
    if not is_file(name) and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 1)
        remedy = f"did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them."
        raise ValueError(f"`--tasks` must be tasks of lm-evaluation-harness or .yaml files, got {name!r}: {remedy}")
    with refusing(f"`--tasks` {name!r} cannot be loaded"):
        return manager.load([name])["tasks"]


def load_models(args: argparse.Namespace, device: torch.device) -> tuple[Models, dict]:
    """The diffusion model and the guider, and their entries in the record."""
    checkpoint = Checkpoint.load(args.model, str(device), args.dtype)
    guider = {} if args.guider is None else {"guider": args.guider}
    models = Models.load(checkpoint, guider, device, args.dtype)
    args.chat = checkpoint.uses_chat_template(args.chat)
    if args.methods is None:
        args.methods = [*BASELINES.values(), "freecache", *(["guided"] if guider else [])]
    choose(args.methods, methods(1, 1), {}, models)  # refuses what is none
    return models, describe_models(models)


def plan(args: argparse.Namespace, tasks: dict[str, dict], models: Models, described: dict) -> list[Row]:
    """The rows of all tasks; `described` holds what the record says of the models and of the machine."""
    settings = ("limit", "num_fewshot", "batch_size", "chat", "num_samples", "seed", "dtype")
    shared = {name: getattr(args, name) for name in settings}
    shared |= {"model": described["model"]["weights_hash"], "harness": lm_eval.__version__}
    shared |= {"machine": [described["machine"][name] for name in ("device", "processor", "threads")]}
    rows = []
    for name, members in tasks.items():
        length = args.new_tokens or max(map(new_tokens, members.values()))
        block_length = models.block_length(args.block_length, length)
        options = {"block_length": block_length, "stop_at_eos": not args.fill_canvas}
        chosen = [LIKELIHOOD]
        if any(task.OUTPUT_TYPE == "generate_until" for task in members.values()):
            steps = models.steps_per_block(args.steps, length, block_length)
            chosen = choose(args.methods, methods(steps, block_length), {}, models)
        config = key_of({key: task.dump_config() for key, task in members.items()})
        for recipe in chosen:
            guider = recipe.guider and described[recipe.guider]["weights_hash"]
            identity = shared | {"task": name, "task_hash": config, "new_tokens": length, "method": recipe.name}
            identity |= {"options": options | recipe.options, "guider": guider, "rule": recipe.rule}
            rows.append(Row(name, recipe, options | recipe.options, identity))
    return rows


def new_tokens(task) -> int:
    """The length of the answers that a task asks for."""
    return (task.config.generation_kwargs or {}).get("max_gen_toks", NEW_TOKENS)


def measure(args: argparse.Namespace, manager: TaskManager, models: Models, row: Row, limit: int | None) -> dict:
    """The figures of a row."""
    lm = FlashDLM(
        models.model,
        tokenizer=models.checkpoint.tokenizer,
        guider=models.guider(row.recipe) if row.recipe.guider else None,
        batch_size=args.batch_size,
        num_samples=args.num_samples,
        seed=args.seed,
        **row.options,
    )
    found = lm_eval.simple_evaluate(
        lm,
        tasks=[row.task],
        num_fewshot=args.num_fewshot,
        limit=limit,
        apply_chat_template=args.chat,
        gen_kwargs={"max_gen_toks": row.identity["new_tokens"]},
        task_manager=manager,
        bootstrap_iters=0,
        confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        torch_random_seed=args.seed,
    )
    samples = {name: each for name, each in found["samples"].items() if each}
    problems = sum(len({sample["doc_id"] for sample in each}) for each in samples.values())
    return {"scores": scores(found["results"], samples)} | costs(lm.run, problems)


def scores(results: dict, samples: dict[str, list[dict]]) -> dict[str, dict]:
    """Each metric of a task over all its problems, with its interval, by its name and that of its filter."""
    flat = [sample for each in samples.values() for sample in each]
    found = {}
    for metric, kept in dict.fromkeys((metric, sample["filter"]) for sample in flat for metric in sample["metrics"]):
        name = f"{metric},{kept}"
        values = [sample[metric] for sample in flat if sample["filter"] == kept and metric in sample]
        if all(isinstance(value, int | float) for value in values):
            is_share = all(0 <= value <= 1 for value in values)
            mean = statistics.fmean(values)
            found[name] = {"score": mean, "score_interval": interval(values), "is_share": is_share}
        elif len(samples) == 1:  # no mean over problems, such as a perplexity
            value = float(results[next(iter(samples))][name])
            found[name] = {"score": value, "score_interval": None, "is_share": False}
    return found


def select(row: dict, wanted: str | None) -> dict:
    """The row with one of its metrics, by default the first."""
    name = wanted or next(iter(row["scores"]))
    if name not in row["scores"]:
        known = ", ".join(row["scores"])
        raise ValueError(f"`--metric` must be one of {known} in {row['task']!r}, got {name!r}.")
    return row | {"metric": name} | row["scores"][name]


def interval(values: list[float]) -> list[float] | None:
    """The 95% interval of a mean; `None` if it cannot be told."""
    if set(values) <= {0, 1}:
        return list(binomial_interval(int(sum(values)), len(values)))
    if len(values) < 2:
        return None
    half_width = 1.96 * statistics.stdev(values) / len(values) ** 0.5
    return [statistics.fmean(values) - half_width, statistics.fmean(values) + half_width]


def costs(run: Run, problems: int) -> dict:
    """What the problems cost, in the mean."""
    figures = {
        name: getattr(run, name) / problems
        for name in ("seconds", "nfe", "guider_forwards", "active_tokens", "tokens")
    }
    rate = run.tokens / run.nfe if run.tokens else None  # an estimate of a likelihood writes no tokens
    return {"num_problems": problems, **figures, "tokens_per_forward": rate}


def add_speeds(rows: list[dict]) -> None:
    """Add to each row how many times as fast as the baselines of its task it is."""
    seconds = {(row["task"], row["method"]): row["seconds"] for row in rows}
    for row in rows:
        for name, baseline in BASELINES.items():
            known = seconds.get((row["task"], baseline))
            row[name] = None if known is None else known / row["seconds"]


def report_evaluation(record: dict) -> str:
    """A table for each task."""
    tables = []
    for task in dict.fromkeys(row["task"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["task"] == task]
        title = (
            f"{Path(task).stem if is_file(task) else task}, {rows[0]['metric']}, {rows[0]['num_problems']} problems"
        )
        tables.append(title + "\n" + format_table(["method", *HEADERS], [format_row(row) for row in rows]))
    return "\n\n".join(tables)


def format_row(row: dict) -> list[str]:
    """A row of the printed table."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    scale, form = (100, ".1f") if row["is_share"] else (1, ".3f")
    low, high = row["score_interval"] or (None, None)
    return [
        row["method"],
        format(scale * row["score"], form),
        "-" if low is None else f"{scale * low:{form}}-{scale * high:{form}}",
        number(row["seconds"], ".3f"),
        number(row["speed_over_full_canvas"], ".2f"),
        number(row["speed_over_eos_stop"], ".2f"),
        number(row["nfe"], ".1f"),
        number(row["guider_forwards"], ".1f"),
        number(row["tokens_per_forward"], ".2f"),
    ]
