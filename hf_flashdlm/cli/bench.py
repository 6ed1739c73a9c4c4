"""The command `flashdlm bench`: methods compared by time, or their parts by what they contribute.

Owns its arguments, what is refused before the work begins, the card of the machine, and where the figures go. What
they mean is said in `comparison` and `ablation`. Knows nothing of how decoding works.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

from ..bench.recipes import recipes
from ..bench.report import write_json
from ..bench.shapes import GUIDER_SHAPES, SHAPES
from .files import check_writable


# Arguments that an ablation has no use for: its models and prompts are the embedded ones.
NOT_ABLATED = "model config random_weights guider prompt_length steps methods fill_canvas reference compile show quick"
# What `--quick` sets where the caller says nothing.
QUICK = {"problems": 4, "batch_size": [1], "repeats": 1, "new_tokens": 64}


def add_commands(subparsers) -> None:
    """The arguments of `flashdlm bench`."""
    about = "Measure how fast methods decode on this machine, or with --ablate what each part of them contributes."
    parser = subparsers.add_parser("bench", help="measure decoding on this machine", description=about)
    parser.set_defaults(run=lambda args: bench(args, command_line(args, parser)))
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="the diffusion model: a folder or a Hub repository")
    add("--config", choices=SHAPES, metavar="NAME", help=f"or a shape: {', '.join(SHAPES)}, the embedded model")
    add("--random-weights", action="store_true", help="give the shape random weights")
    guider = f"an autoregressive model; with random weights a shape: {', '.join(GUIDER_SHAPES)}"
    add("--guider", metavar="DIR_OR_ID", help=guider)
    length = "tokens of a prompt (default: a word problem as it is; 128 with random weights)"
    add("--prompt-length", type=positive, metavar="N", help=length)
    add("--new-tokens", type=positive, metavar="N", help="tokens of the canvas after the prompt (default: 256; 64)")
    add("--block-length", type=positive, metavar="N", help="tokens of a block (default: the checkpoint's, else 32)")
    steps = "denoising steps of the methods that do not choose their number (default: one per token)"
    add("--steps", type=positive, metavar="N", help=steps)
    add("--problems", type=positive, metavar="N", help="prompts of a trained model (default: 16; 500)")
    add("--batch-size", type=integers, metavar="N,N", help="prompts decoded together (default: 1,4,16; 25)")
    methods = f"default: the references, without them all of {', '.join(recipes(1, 1))}"
    add("--methods", type=names, metavar="NAME,NAME", help=methods)
    reference = "Python file with METHODS, other implementations' loops and our settings for them, to be compared"
    add("--reference", metavar="FILE", help=reference)
    add("--compile", action="store_true", help="measure each method with compiled forwards, too")
    add("--fill-canvas", action="store_true", help="stop no method at the end of the text, as papers' loops do")
    add("--repeats", type=positive, metavar="N", help="runs, of which the median counts (default: 3; 1)")
    add("--quick", action="store_true", help="a look within a minute: few prompts, batch size 1, one run")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: what torch takes)")
    add("--dtype", metavar="NAME", help="of the weights (default: as saved; of shapes float32, off the CPU bfloat16)")
    add(
        "--device",
        default="auto",
        metavar="NAME",
        help="such as cpu or cuda:0 (default: an accelerator if there is one)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts and random weights (default: 0)")
    add_outputs(parser)


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is measured beside methods, and where the figures go."""
    add = parser.add_argument
    add("--ablate", action="store_true", help="measure the parts on the embedded pair; has the second default each")
    add(
        "--guiders",
        type=names,
        metavar="DIR,DIR",
        help="guiders to ablate with, the usual one first (default: embedded)",
    )
    path = "write the figures to this file; - prints them as the last line. An ablation goes on where the file ends"
    add("--json", metavar="PATH", help=path)
    add("--show", metavar="PATH", help="measure nothing: print the figures that --json wrote to this file")
    add("--plot", metavar="PATH", help="draw the figures to this file, those of an ablation into this folder")


def integer_from(least: int):
    """An argument type: an integer of at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}.")
        return int(text)

    return parse


positive = integer_from(1)


def names(text: str) -> list[str]:
    """An argument type: names with commas between them."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}.")
    return found


def integers(text: str) -> list[int]:
    """An argument type: integers of at least 1 with commas between them."""
    return [positive(name) for name in names(text)]


def command_line(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that `args` came from, without what is at its default."""
    words = ["flashdlm", parser.prog.split()[-1]]
    for name, value in vars(args).items():
        if name != "run" and value != parser.get_default(name):
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(words)


def bench(args: argparse.Namespace, command: str) -> None:
    """`flashdlm bench`."""
    check(args)
    if args.quick:
        for name, value in QUICK.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    record = read_record(args.show) if args.show is not None else run_bench(args, command)
    from ..bench.ablation import report_ablation
    from ..bench.comparison import report_comparison

    is_ablation = "shared" in record
    check_plot(args.plot, is_ablation)
    print((report_ablation if is_ablation else report_comparison)(record))
    if args.plot is not None:
        from ..bench import plots  # matplotlib is needed for this alone

        (plots.plot_ablation if is_ablation else plots.plot_bench)(record, Path(args.plot))
    put_json(args.json, record)


def put_json(path: str | None, record: dict) -> None:
    """Write the record to the file of `--json`, or print it as the last line."""
    if path == "-":
        print(json.dumps(record, allow_nan=False))
    elif path is not None:
        write_json(Path(path), record)


def run_bench(args: argparse.Namespace, command: str) -> dict:
    """Print the card of the machine, and measure what is asked for: the record."""
    from ..bench.ablation import run_ablation
    from ..bench.comparison import compare

    device = prepare(args)
    record = begin_record(args, command, device)
    print(report_card(record) + "\n")
    return record | (run_ablation(args, device, record, note) if args.ablate else compare(args, device, note))


def begin_record(args: argparse.Namespace, command: str, device) -> dict:
    """What is known before the work: the command, the machine and the versions."""
    from ..bench.machine import commit, describe_machine, versions

    record = {"schema": 1, "command": command, "seed": args.seed, "commit": commit()}
    return record | {"machine": describe_machine(device), "versions": versions()}


def report_card(record: dict) -> str:
    """What is needed to measure again."""
    lines = [f"{name}: {value}" for part in ("machine", "versions") for name, value in record[part].items()]
    return "\n".join([*lines, f"seed: {record['seed']}", f"commit: {record['commit'] or 'unknown'}"])


def read_record(path: str) -> dict:
    """The record in a file; its card is printed."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        print(f"$ {record['command']}\n{report_card(record)}\n")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`--show` must be a file that `--json` has written, got {path!r}.") from error


def note(text: str) -> None:
    """Say on standard error what is going on."""
    print(text, file=sys.stderr)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before hours of work rather than after."""
    if args.ablate:
        for name in NOT_ABLATED.split():
            if getattr(args, name):
                raise ValueError(f"`--{name.replace('_', '-')}` has no meaning with `--ablate`: drop it.")
        if len(args.batch_size or [1]) > 1:
            raise ValueError(f"`--batch-size` must be one number with `--ablate`, got {args.batch_size}.")
    elif args.guiders is not None:
        raise ValueError("`--guiders` belongs to `--ablate`: drop it, or use `--guider`.")
    if args.reference is not None and args.steps is not None:
        raise ValueError("`--steps` has no meaning with `--reference`, whose loops write a token per step: drop it.")
    if args.json not in (None, "-"):
        check_writable("--json", args.json, "- or ")
    if args.show is None:
        check_plot(args.plot, args.ablate)


def check_plot(path: str | None, is_ablation: bool) -> None:
    """Refuse pictures that could not be drawn."""
    if path is None:
        return
    if is_ablation and not Path(path).is_dir():
        raise ValueError(f"`--plot` must be a folder that exists for an ablation, got {path!r}.")
    if not is_ablation and (Path(path).suffix not in (".png", ".svg") or not Path(path).parent.is_dir()):
        raise ValueError(f"`--plot` must be a .png or .svg file in a folder that exists, got {path!r}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("`--plot` needs matplotlib, which is not installed: pip install matplotlib.")


def quiet_transformers(progress_bars: bool) -> None:
    """Keep hints of Transformers out of the output, and its progress bars unless they are wanted."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()


def prepare(args: argparse.Namespace):
    """Set threads and silence; the device."""
    import torch

    from ..hub.loading import check_device

    quiet_transformers(progress_bars=False)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    check_device(args.device)
    return torch.device(args.device)
