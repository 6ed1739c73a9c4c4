"""`flashdlm generate --input`: a file of prompts answered in batches, by one process or by several.

Owns its arguments, what goes to standard error, and which process decodes which batch. What a file of prompts and a
file of answers are, `prompt_file` and `answer_file` say.
"""

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

from ..console.terminal import unguarded
from ..version import __version__
from .bench import positive
from .files import check_writable
from .processes import Processes


BATCH_SIZE = 8
LOG_SECONDS = 30  # between two lines about the progress, where no terminal shows it
# Arguments that the answers depend on.
DECIDING = "model guider max_new_tokens block_length steps confidence_threshold window_policy temperature seed dtype"
DECIDING = (*DECIDING.split(), "chat", "batch_size")
ONE_BY_ONE = ("prompt", "stream", "image")  # arguments of prompts that are in no file


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `flashdlm generate` that concern a file of prompts."""
    add = parser.add_argument
    add("--input", metavar="FILE", help="a file of prompts: in each line a JSON string, or a chat as a list of turns")
    add("--output", metavar="FILE", help="its answers; an interrupted command, given again, goes on")
    size = f"prompts of a file decoded together (default: {BATCH_SIZE})"
    add("--batch-size", type=positive, metavar="N", help=size)
    add("--bad-lines", choices=("stop", "skip"), help="what a line of the file that is no prompt does (default: stop)")


def has_file(args: argparse.Namespace) -> bool:
    """Whether the arguments name a file of prompts; `ValueError` if they do by half."""
    if args.input is None:
        for name in ("output", "batch_size", "bad_lines"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name.replace('_', '-')}` belongs to `--input`: drop it, or add `--input`.")
        return False
    if args.output is None:
        raise ValueError("`--output` is missing: `--input` needs a file for the answers.")
    for name in ONE_BY_ONE:
        if getattr(args, name):
            raise ValueError(f"`--{name}` cannot be used with `--input`: drop one of them.")
    return True


def answer_file(args: argparse.Namespace, load: Callable) -> None:
    """Answer the prompts of `--input`; `load` gives the checkpoint and the keywords of `generate`."""
    from ..console.answer_file import AnswerFile
    from ..console.prompt_file import check_lines

    check_writable("--output", args.output)
    args.batch_size = args.batch_size or BATCH_SIZE
    with Processes.joined(args) as processes:
        faults = check_lines(Path(args.input))
        report_faults(args, faults, processes)
        run = {"version": __version__, "input": digest(args.input)} | {name: getattr(args, name) for name in DECIDING}
        answers = AnswerFile(Path(args.output), run, processes.number)
        processes.agree(run | versions() | {"output": answers.is_complete})
        if not answers.is_complete:
            decode_file(args, load, answers, processes, faults)
        elif processes.number == 0:
            answers.remove_parts()


def decode_file(args, load: Callable, answers, processes: Processes, faults: dict[int, str]) -> None:
    """Decode the batches that are not done, and write the output when all are."""
    from ..console.prompt_file import batches, measure_lines, read_prompts

    path = Path(args.input)
    checkpoint, options = load(args)
    lines, more_faults = measure_lines(path, checkpoint, args.max_new_tokens, args.chat)
    report_faults(args, more_faults, processes)
    work, done = batches(lines, args.batch_size), answers.done()
    processes.agree({"parts of the output": sorted(done)})
    if processes.number == 0:
        answers.claim()
    processes.wait()
    answers.start()
    left = [number for number in range(len(work)) if number not in done][processes.number :: processes.count]
    for number in show_progress(left, [len(batch) for batch in work], processes):
        if args.seed is not None:  # the same draws whichever process decodes the batch, after a kill as well
            seed(args.seed, number)
        prompts = read_prompts(path, work[number])
        answers.add(number, rows_of(work[number], checkpoint.continue_prompts(prompts, options, args.chat)))
    processes.wait()
    if processes.number == 0:
        print(summary(answers.finish(len(work), faults | more_faults), args.stats), file=sys.stderr)


def rows_of(lines: list, continuation) -> list[dict]:
    """The rows of a batch in the output."""
    output = continuation.output
    columns = {"tokens": continuation.lengths, "nfe": output.nfe.tolist()}
    if output.guider_forwards is not None:
        columns["guider_forwards"] = output.guider_forwards.tolist()
    return [
        {"line": line.number, "answer": text} | {name: values[index] for name, values in columns.items()}
        for index, (line, text) in enumerate(zip(lines, continuation.texts, strict=True))
    ]


def seed(value: int, number: int) -> None:
    """Seed the draws of a batch."""
    import torch

    torch.manual_seed(random.Random(f"{value} {number}").getrandbits(63))


def digest(path: str) -> str:
    """A short hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions that all processes must share."""
    import torch
    import transformers

    return {"version of torch": torch.__version__, "version of transformers": transformers.__version__}


def report_faults(args: argparse.Namespace, faults: dict[int, str], processes: Processes) -> None:
    """Name the lines that are no prompts, or refuse the first."""
    for number, fault in sorted(faults.items()):
        if args.bad_lines != "skip":
            raise ValueError(f"line {number} of `--input` is no prompt: {fault}; mend it, or add --bad-lines skip.")
        if processes.number == 0:
            print(f"line {number} is skipped: {fault}.", file=sys.stderr)


def show_progress(left: list[int], sizes: list[int], processes: Processes) -> Iterator[int]:
    """The numbers in `left`; standard error gets the rows that are done, their rate and the time that is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, total, rows = Console(file=unguarded(sys.stderr)), sum(sizes[number] for number in left), 0
    rate_column = TextColumn("rows, {task.fields[rate]:.2f} rows/s, left:")
    columns = (BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn())
    started = told = time.monotonic()
    is_hidden = processes.number > 0 or not console.is_terminal
    with Progress(*columns, console=console, disable=is_hidden, speed_estimate_period=3600) as progress:
        task = progress.add_task("", total=total, rate=0.0)
        for number in left:
            yield number
            rows, now = rows + sizes[number], time.monotonic()
            rate = rows / (now - started)
            progress.update(task, completed=rows, rate=rate)
            if processes.number == 0 and not console.is_terminal and now - told > LOG_SECONDS:
                told = now
                seconds = timedelta(seconds=round((total - rows) / rate))
                print(f"{rows} of {total} rows, {rate:.2f} rows/s, left: {seconds}", file=sys.stderr, flush=True)


def summary(rows: list[dict], stats: bool) -> str:
    """What the output holds."""
    answers = [row for row in rows if "answer" in row]
    text = f"{len(answers)} answers, {len(rows) - len(answers)} lines skipped"
    if not stats or not answers:
        return text
    sums = {name: sum(row.get(name, 0) for row in answers) for name in ("tokens", "nfe", "guider_forwards")}
    nfe, guided = (sums[name] / len(answers) for name in ("nfe", "guider_forwards"))
    rate = sums["tokens"] / sums["nfe"]
    return f"{text}\nNFE {nfe:.2f}, guider forwards {guided:.2f}, tokens per forward {rate:.2f}"
