"""The command `flashdlm evaluate`: methods compared on tasks of lm-evaluation-harness.

Owns its arguments, what is refused before the work begins, and where the figures go. What they mean is said in
`compare`. Knows nothing of how decoding works.
"""

import argparse
import importlib.util
from pathlib import Path

from .bench import begin_record, check_plot, command_line, integer_from, names, note, positive, prepare, put_json
from .files import check_writable


def add_evaluate(commands) -> None:
    """The arguments of `flashdlm evaluate`."""
    about = "Compare methods on tasks of lm-evaluation-harness: accuracy, seconds, speed over two baselines, forwards."
    parser = commands.add_parser("evaluate", help="compare methods on tasks", description=about)
    parser.set_defaults(run=lambda args: evaluate(args, parser))
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_ID", help="the diffusion model: a folder or a Hub repository")
    add("--guider", metavar="DIR_OR_ID", help="an autoregressive model that judges the drafts")
    add("--tasks", required=True, type=names, metavar="NAME,NAME", help="tasks of the harness, or .yaml files")
    methods = "those of bench and of generate (default: plain,plain-eos,freecache, and guided if there is a guider)"
    add("--methods", type=names, metavar="NAME,NAME", help=methods)
    add("--limit", type=positive, metavar="N", help="problems of each task (default: all)")
    solved = "solved problems before each (default: the task's number)"
    add("--num-fewshot", type=integer_from(0), metavar="N", help=solved)
    add("--new-tokens", type=positive, metavar="N", help="tokens of the canvas after the prompt (default: the task's)")
    add("--block-length", type=positive, metavar="N", help="tokens of a block (default: the checkpoint's, else 32)")
    steps = "denoising steps of the methods that do not choose their number (default: one per token)"
    add("--steps", type=positive, metavar="N", help=steps)
    add("--batch-size", type=positive, default=1, metavar="N", help="prompts decoded together (default: 1)")
    add("--fill-canvas", action="store_true", help="stop no method at the end of the text, as papers' loops do")
    metric = "name and filter, such as exact_match,flexible-extract (default: the task's first)"
    add("--metric", metavar="NAME,FILTER", help=metric)
    samples = "samples of the log-likelihood of an answer (default: 128)"
    add("--num-samples", type=positive, default=128, metavar="N", help=samples)
    chat = "use the chat template (default: if there is one)"
    add("--chat", action=argparse.BooleanOptionalAction, help=chat)
    unsafe = "run code that the model writes, which tasks such as humaneval grade by running it"
    add("--confirm-run-unsafe-code", action="store_true", help=unsafe)
    add_machine(parser)


def add_machine(parser: argparse.ArgumentParser) -> None:
    """The arguments that concern this machine and its files."""
    add = parser.add_argument
    add("--threads", type=positive, metavar="N", help="CPU threads (default: what torch takes)")
    add("--dtype", default="auto", metavar="NAME", help="of the weights, such as bfloat16 (default: as saved)")
    device = "such as cpu or cuda:0 (default: an accelerator if there is one)"
    add("--device", default="auto", metavar="NAME", help=device)
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    path = "write the figures to this file; rows that it holds are not measured again. - prints them as the last line"
    add("--json", metavar="PATH", help=path)
    add("--plot", metavar="PATH", help="draw the figures to this file")


def evaluate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """`flashdlm evaluate`."""
    if args.json not in (None, "-"):
        check_writable("--json", args.json, "- or ")
    check_plot(args.plot, is_ablation=False)
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("`flashdlm evaluate` needs lm-eval, which is not installed: pip install 'hf-flashdlm[eval]'.")
    from ..evaluation import compare

    device = prepare(args)
    record = begin_record(args, command_line(args, parser), device)
    record |= compare.evaluate(args, device, record, note)
    print(compare.report_evaluation(record))
    if args.plot is not None:
        from ..bench import plots  # matplotlib is needed for this alone

        plots.plot_evaluation(record, Path(args.plot))
    put_json(args.json, record)
