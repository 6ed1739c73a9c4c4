"""The command `flashdlm app`.

Owns its arguments. Knows nothing of the page.
"""

import argparse
import sys

from .bench import quiet_transformers


def add_app(commands) -> None:
    """The arguments of `flashdlm app`."""
    about = "Open a page that decodes a prompt by several methods side by side, to be looked at in a browser."
    parser = commands.add_parser("app", help="a page to look at, in a browser", description=about)
    parser.set_defaults(run=app)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_ID", help="the diffusion model (default: the embedded pair, which does sums)")
    add("--guider", metavar="DIR_OR_ID", help="an autoregressive model that judges the drafts")
    add("--host", metavar="ADDRESS", help="address to listen at, 0.0.0.0 for all (default: this machine alone)")
    add("--port", type=port, metavar="N", help="port to listen at (default: the first free one from 7860 on)")
    add("--share", action="store_true", help="let Gradio's service give the page a public address for some days")
    add("--dtype", default="auto", metavar="NAME", help="of the weights, such as bfloat16 (default: as saved)")
    device = "such as cpu or cuda:0 (default: an accelerator if there is one)"
    add("--device", default="auto", metavar="NAME", help=device)


def port(text: str) -> int:
    """A port that can be asked for."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be an integer between 1 and 65535, got {text!r}.")
    return int(text)


def app(args: argparse.Namespace) -> None:
    """`flashdlm app`."""
    from ..app.serve import show_page

    quiet_transformers(progress_bars=sys.stderr.isatty())
    show_page(args.model, args.guider, args.host, args.port, args.share, args.device, args.dtype)
