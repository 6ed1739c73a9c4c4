"""`flashdlm bench --ablate`: what each part contributes, on the embedded pair.

Measures the rows of `ablation_table`, continues where its file ends, and says which rows come within one percentage
point of the best plain order. Decoding is greedy, so that the counts and the accuracy of a row are the same in every
run. Only the rows of the group "sampling" draw tokens: their figures and intervals are over the runs of all seeds.
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from ..console.checkpoint import Checkpoint
from ..guider import ARGuider
from ..tiny import FOLDER
from .ablation_table import Setting, settings
from .decoding import Models
from .report import format_table, write_json
from .run import Run, run
from .workload import Workload, problem_workload


APART = ("sampling", "guider alone")  # the first depends on chance, the second leaves out the diffusion model


def run_ablation(args: argparse.Namespace, device: torch.device, record: dict, note: Callable[[str], None]) -> dict:
    r"""
    Measure the table, except for the rows that the file `--json` already holds.

    Args:
        args (`argparse.Namespace`): Arguments of the command line.
        device (`torch.device`): Where to decode.
        record (`dict`): The part of the record that is known before; the file holds it, too.
        note (`Callable`): Called with a line that says what is being measured.

    Returns:
        `dict`: The rest of the record: what all rows share, the models, the rows, those that the file held for other
        settings, and the verdict.
    """
    models, workload, shared = load(args, device, record["machine"])
    described = describe_models(models)
    known = read_rows(args.json)
    rest = {"shared": shared, "models": described, "rows": []}
    line_break = models.checkpoint.tokenizer.encode("\n", add_special_tokens=False)
    table = settings(shared["new_tokens"], shared["block_length"], list(models.guiders), line_break)
    table = [row for row in table if not row.is_alone or can_decode(models, row.recipe.guider)]
    run(models, table[0].recipe, workload.start())  # warm-up
    for index, setting in enumerate(table, 1):
        recipe = setting.recipe
        guider = recipe.guider and described[recipe.guider]["weights_hash"]
        identity = shared | {"options": recipe.options, "guider": guider, "rule": recipe.rule}
        key = key_of(identity | ({"seeds": setting.seeds} if len(setting.seeds) > 1 else {}))
        if key not in known:
            note(f"{index} of {len(table)}: {setting.group}: {recipe.name}")
            known[key] = measure_setting(models, setting, workload, args.repeats or 1)
            known[key] |= {"key": key, "commit": record["commit"]}
        rest["rows"].append(known[key] | setting.entry())
        write_rows(args.json, record, rest, known)
    return rest | {"verdict": verdict(rest["rows"])}


def load(args: argparse.Namespace, device: torch.device, machine: dict) -> tuple[Models, Workload, dict]:
    """The models, the problems, and the shared settings that decide the outcome of all rows."""
    dtype, problems, new_tokens = args.dtype or "float32", args.problems or 500, args.new_tokens or 64
    batch_size = (args.batch_size or [25])[0]
    checkpoint = Checkpoint.load(str(FOLDER / "dlm"), str(device), dtype)
    paths = {Path(path).resolve().name: path for path in args.guiders or [str(FOLDER / "guider")]}
    if len(paths) < len(args.guiders or "1") or paths.keys() & {"model", "twin"}:
        raise ValueError("`--guiders` must be folders of different names, and not called model or twin: rename one.")
    workload = problem_workload(checkpoint, problems, batch_size, args.seed, {"max_new_tokens": new_tokens})
    shared = {
        "problems": problems,
        "seed": args.seed,
        "new_tokens": new_tokens,
        "block_length": min(args.block_length or checkpoint.model.generation_config.block_length, new_tokens),
        "batch_size": batch_size,
        "weights_hash": weights_hash(checkpoint.model),
        "machine": [machine[name] for name in ("device", "processor", "threads")],
    }
    return Models.load(checkpoint, paths, device, dtype), workload, shared


def can_decode(models: Models, guider: str) -> bool:
    """Whether a guider can decode by itself, which a guider that reads text cannot: prompts are token ids."""
    both = {"tokenizer": models.tokenizers[guider], "canvas_tokenizer": models.checkpoint.tokenizer}
    return not ARGuider(models.guiders[guider], **both).reads_text


def weights_hash(model) -> str:
    """A short hash of the weights as they are loaded, dtype included."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def key_of(identity: dict) -> str:
    """A short hash of the settings that decide the outcome of a row."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def describe_models(models: Models) -> dict:
    """Sizes and hashes of the models, by name."""
    named = {"model": models.model, **models.guiders}
    return {
        name: {"parameters": model.num_parameters(), "weights_hash": weights_hash(model)}
        for name, model in named.items()
    }


def read_rows(path: str | None) -> dict[str, dict]:
    """The rows of an earlier run, by key."""
    if path in (None, "-") or not Path(path).exists():
        return {}
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        return {row["key"]: row for row in record["rows"] + record["earlier"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`--json` must be a new file or one that this command has written, got {path!r}.") from error


def write_rows(path: str | None, record: dict, rest: dict, known: dict[str, dict]) -> None:
    """Write the rows so far, and those `known` that no row of this run is; `rest` is what the record gets."""
    written = {row["key"] for row in rest["rows"]}
    rest["earlier"] = [row for key, row in known.items() if key not in written]
    if path not in (None, "-"):
        write_json(Path(path), record | rest)


def measure_setting(models: Models, setting: Setting, workload: Workload, repeats: int) -> dict:
    """The figures of a row, over the runs of all its seeds; `seconds` is the median of all runs."""
    runs = []
    for seed in setting.seeds * repeats:
        torch.manual_seed(seed)
        runs.append(run(models, setting.recipe, workload))
    figures, seconds = pooled(runs[: len(setting.seeds)]).figures(), [single.seconds for single in runs]
    if setting.is_alone:  # the counted forwards are those of the guider, one token each
        figures |= {"nfe": 0.0, "active_tokens": 0.0, "tokens_per_forward": 1.0}
        figures |= {"guider_forwards": figures["tokens"], "guider_time_share": 1.0}
    return figures | {"seconds": statistics.median(seconds), "seconds_of_runs": seconds}


def pooled(runs: list[Run]) -> Run:
    """The sum of several runs, without their lists of forwards and tokens."""
    names = [field.name for field in fields(Run) if field.name not in ("forwards", "canvases")]
    return Run(**{name: sum(getattr(single, name) for single in runs) for name in names})


def verdict(rows: list[dict]) -> dict:
    """
    The best plain order and, among the rows within one percentage point of it, those of the fewest forwards and of the
    least time, with a guider and without; `None` if there is no such row. The groups in `APART` are left out.
    """
    rows = [row for row in rows if row["group"] not in APART]
    best = max((row for row in rows if row["is_plain"]), key=lambda row: (row["accuracy"], -row["nfe"]))
    close = [row for row in rows if row["accuracy"] >= best["accuracy"] - 0.01 - 1e-9]
    answer = {"best_plain": summary(best)}
    for kind in ("unguided", "guided"):
        of_kind = [row for row in close if (row["guider"] is None) == (kind == "unguided")]
        for name in ("nfe", "seconds"):
            answer[f"{kind}_{name}"] = summary(min(of_kind, key=lambda row: row[name])) if of_kind else None  # noqa: B023
    return answer


def summary(row: dict) -> dict:
    """The fields of a row that the verdict shows."""
    return {name: row[name] for name in ("name", "group", "accuracy", "nfe", "seconds")}


def report_ablation(record: dict) -> str:
    """The tables of all groups, and the verdict."""
    headers = ["accuracy %", "95%", "NFE", "guider", "active", "tok/fwd", "accepted %", "guider s %", "seconds"]
    tables = []
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        rows = [format_row(row) for row in record["rows"] if row["group"] == group]
        tables.append(format_table([group, *headers], rows))
    lines = ["Within one percentage point of the best plain order:"]
    for name, row in verdict(record["rows"]).items():
        words = "none" if row is None else f"{row['name']} ({row['group']})"
        if row is not None:
            words += f": {100 * row['accuracy']:.1f}%, {row['nfe']:.1f} NFE, {row['seconds']:.2f} s"
        lines.append(f"{name.replace('_', ', least ').replace(', least plain', ' plain')}: {words}")
    return "\n\n".join([*tables, "\n".join(lines)])


def format_row(row: dict) -> list[str]:
    """A row of the printed table."""
    low, high = row["accuracy_interval"]
    judged = row["drafts_judged"]
    return [
        row["name"],
        f"{100 * row['accuracy']:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        f"{row['nfe']:.1f}",
        f"{row['guider_forwards']:.1f}",
        f"{row['active_tokens']:.0f}",
        f"{row['tokens_per_forward']:.2f}",
        f"{100 * row['drafts_accepted'] / judged:.0f}" if judged else "-",
        f"{100 * row['guider_time_share']:.0f}" if judged else "-",
        f"{row['seconds']:.2f}",
    ]
