"""The command line: `flashdlm generate`, `flashdlm chat`, `flashdlm app`, `flashdlm demo`, `flashdlm bench`,
`flashdlm evaluate`, `flashdlm export` and `flashdlm push`.

Owns the arguments, what goes to which stream, and the exit codes: 0, 2 with one sentence on standard error for a
mistake of the user's, 130 after an interrupt. Knows nothing of checkpoints or of how decoding works.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ..bench.report import write_json
from ..bench.settings import Settings
from ..console.defaults import MAX_NEW_TOKENS
from ..console.terminal import guarded_terminal, unguarded, visible
from ..generation_config import WINDOW_POLICIES
from ..version import __version__
from .app import add_app
from .bench import add_commands as add_bench
from .bench import integer_from, quiet_transformers
from .evaluate import add_evaluate
from .files import check_writable
from .hub import add_commands
from .many import add_file_arguments, answer_file, has_file


# Options that are keywords of `generate`.
DECODING_OPTIONS = ("max_new_tokens", "block_length", "steps", "confidence_threshold", "window_policy", "temperature")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are raised, not printed below the usage."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def main(argv: list[str] | None = None, prepare: Callable[[], object] = lambda: None) -> int:
    r"""
    Run the command line.

    Args:
        argv (`list[str]`, *optional*): By default the program's own arguments.
        prepare (`Callable`, *optional*): Is called before a command runs, and not for help, versions and mistakes.

    Returns:
        `int`: The exit code.
    """
    with guarded_terminal():
        try:
            args = make_parser().parse_args(argv)
            prepare()
            args.run(args)
            sys.stdout.flush()
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # who reads the output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (ValueError, OSError) as error:
            return refuse(error)
        except Exception as error:  # of a library, at a model whose files do not fit together
            if sys.flags.dev_mode:
                raise
            said = str(error).strip().partition("\n")[0]
            return refuse(f"{type(error).__name__}: {said} (`python -X dev -m hf_flashdlm` shows where it arose)")
    return 0


def refuse(error: Exception | str) -> int:
    """Say in one line what the mistake is; the exit code."""
    message = f"{error.filename}: {error.strerror}." if isinstance(error, OSError) and error.strerror else str(error)
    print(visible(re.sub(r"\s*\n\s*", " ", f"flashdlm: {message}")), file=sys.stderr)
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = Parser(prog="flashdlm", description="Fast decoding of masked diffusion language models.")
    parser.add_argument("--version", action="version", version=f"flashdlm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_generate(commands)
    add_chat(commands)
    add_app(commands)
    add_demo(commands)
    add_bench(commands)
    add_evaluate(commands)
    add_commands(commands)
    return parser


def add_generate(commands) -> None:
    """The arguments of `flashdlm generate`."""
    about = "Continue prompts with a diffusion model. What is not given here is as the checkpoint says."
    parser = commands.add_parser("generate", help="continue prompts with a diffusion model", description=about)
    parser.set_defaults(run=generate)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="the diffusion model: a folder or a Hub repository")
    add_decoding(parser)
    add("--prompt", action="append", metavar="TEXT", help="can be repeated; without it, standard input is the prompt")
    picture = "a picture that each prompt is about, for a model that sees images; can be repeated"
    add("--image", action="append", default=[], metavar="PATH", help=picture)
    add("--steps", type=int, metavar="N", help="a fixed number of denoising steps, spread over the tokens")
    add("--confidence-threshold", type=float, metavar="P", help="instead of --steps: write every token this probable")
    add("--window-policy", metavar="NAME", help=f"what a step recomputes: {', '.join(WINDOW_POLICIES)}")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)")
    add("--stream", action="store_true", help="show each text while it forms")
    add("--stats", action="store_true", help="print forwards and seconds to standard error")
    add_file_arguments(parser)


def add_chat(commands) -> None:
    """The arguments of `flashdlm chat`."""
    about = "Talk to a diffusion model and see each reply form. /help lists what can be said to the chat."
    parser = commands.add_parser("chat", help="talk to a checkpoint in the terminal", description=about)
    parser.set_defaults(run=chat)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="the diffusion model (default: the embedded pair, which does sums)")
    add_decoding(parser)
    add("--system", metavar="TEXT", help="what the model is told before the first turn")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """The arguments that `generate` and `chat` share."""
    add = parser.add_argument
    add("--guider", metavar="DIR_OR_ID", help="an autoregressive model that judges the drafts")
    length = f"tokens to generate (default: the checkpoint's number, else {MAX_NEW_TOKENS})"
    add("--max-new-tokens", type=int, metavar="N", help=length)
    add("--block-length", type=int, metavar="N", help="tokens of a block; blocks are unmasked one after another")
    add("--temperature", type=float, metavar="T", help="0 takes the most likely tokens, more draws them")
    add("--seed", type=int, metavar="N", help="seed of the draw")
    add("--dtype", default="auto", metavar="NAME", help="of the weights, such as bfloat16 (default: as saved)")
    device = "such as cpu or cuda:0 (default: an accelerator if there is one)"
    add("--device", default="auto", metavar="NAME", help=device)


def add_demo(commands) -> None:
    """The arguments of `flashdlm demo`."""
    about = "Decode held-out word problems with the embedded pair of models: a few in view, then many, measured."
    parser = commands.add_parser("demo", help="see and measure decoding with the embedded pair", description=about)
    parser.set_defaults(run=demo)
    defaults = Settings()

    def add(option: str, least: int, text: str) -> None:
        default = getattr(defaults, option.removeprefix("--").replace("-", "_"))
        parser.add_argument(
            option, type=integer_from(least), default=default, metavar="N", help=f"{text} (default: {default})"
        )

    add("--problems", 1, "problems to measure on")
    add("--batch-size", 1, "problems decoded together")
    add("--repeats", 1, "runs of each method, of which the median time counts")
    add("--show", 0, "problems to decode in view first")
    add("--slow", 0, "times slower than decoded they are replayed on a terminal; 0 shows their ends alone")
    add("--seed", 0, "seed of the draw of problems")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file, too")


def generate(args: argparse.Namespace) -> None:
    """`flashdlm generate`."""
    if has_file(args):
        return answer_file(args, load)
    from ..console.pictures import read_pictures

    if args.image and args.guider is not None:
        raise ValueError("`--guider` reads text alone, got `--image`: drop one of them.")
    prompts, images = read_prompts(args.prompt), read_pictures(args.image)
    checkpoint, options = load(args, bool(images))
    if args.stream:
        for prompt in prompts:
            report(checkpoint.stream(prompt, options, args.chat, console_on(sys.stdout), images), args.stats)
    else:
        continuation = checkpoint.continue_prompts(prompts, options, args.chat, images)
        print("\n\n".join(continuation.texts))
        report(continuation, args.stats)


def chat(args: argparse.Namespace) -> None:
    """`flashdlm chat`."""
    from ..console.chat import run_chat
    from ..tiny import pair_unless_named, sample_problems

    notes = console_on(sys.stderr, markup=False, soft_wrap=True)
    if args.model is None:
        notes.print(f"The embedded model knows word problems such as: {sample_problems(1, 0)[0].question}")
    args.model, args.guider, guidance = pair_unless_named(args.model, args.guider)
    checkpoint, options = load(args, **guidance)
    run_chat(checkpoint, options, args.system, console_on(sys.stdout), notes)


def load(args: argparse.Namespace, images: bool = False, **guidance):
    """
    The diffusion model, which has to see `images`, and the keywords of `generate`, a guider with its settings
    `guidance` among them.
    """
    import torch

    from ..console.checkpoint import Checkpoint

    quiet_transformers(progress_bars=sys.stderr.isatty())
    checkpoint = Checkpoint.load(args.model, args.device, args.dtype, images)
    values = {name: vars(args).get(name) for name in DECODING_OPTIONS}
    options = {name: value for name, value in values.items() if value is not None}
    if args.guider is not None:
        options["guider"] = checkpoint.load_guider(args.guider, args.device, args.dtype, **guidance)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    return checkpoint, options


def read_prompts(prompts: list[str] | None) -> list[str]:
    """The prompts of the command line, or else all of standard input as a single prompt."""
    if prompts is None:
        if sys.stdin.isatty():
            raise ValueError("`--prompt` is missing: give it, or pipe a prompt into the command.")
        prompts = [sys.stdin.read().strip("\n")]
    if not all(prompts):
        raise ValueError("a prompt must hold text, got ''.")
    return prompts


def report(continuation, stats: bool) -> None:
    """With `stats`, print a line for each prompt and a line for the time."""
    if not stats:
        return
    output = continuation.output
    guider_forwards = 0 * output.nfe if output.guider_forwards is None else output.guider_forwards
    columns = (output.nfe, guider_forwards, output.active_tokens, output.tokens_per_forward)
    for nfe, guided, active, rate in zip(*(column.tolist() for column in columns), strict=True):
        print(
            f"NFE {nfe}, guider forwards {guided}, active tokens {active}, tokens per forward {rate:.2f}",
            file=sys.stderr,
        )
    print(f"{continuation.seconds:.2f} seconds", file=sys.stderr)


def demo(args: argparse.Namespace) -> None:
    """`flashdlm demo`."""
    from ..bench.demo import run_demo

    if args.json is not None:
        check_writable("--json", args.json)
    quiet_transformers(progress_bars=False)
    settings = Settings(args.problems, args.batch_size, args.repeats, args.show, args.slow, args.seed)
    record = run_demo(settings, console_on(sys.stdout))
    if args.json is not None:
        write_json(Path(args.json), record)


def console_on(stream, **settings):
    """A console of Rich, which does not colour what looks like code, on a stream of the program."""
    from rich.console import Console

    return Console(file=unguarded(stream), highlight=False, **settings)
