"""`flashdlm export` and `flashdlm push`.

Owns their arguments and what they print. Knows nothing of what lies in a repository.
"""

import argparse
import shlex

from ..version import __version__


def add_commands(commands) -> None:
    """The two sub-commands, added to `commands` of [`argparse.ArgumentParser.add_subparsers`]."""
    add_export(commands)
    add_push(commands)


def add_export(commands) -> None:
    """The arguments of `flashdlm export`, one sub-command for each kind of repository."""
    about = "Write a folder that `flashdlm push` publishes as a repository of the Hugging Face Hub."
    parser = commands.add_parser("export", help="write a folder for the Hub", description=about)
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")

    def add_kind(name: str, text: str, run) -> argparse.ArgumentParser:
        kind = kinds.add_parser(name, help=text, description=f"Write {text}.")
        kind.add_argument("repo_id", metavar="REPO_ID", help="the repository it is going to be, organization/name")
        kind.add_argument("directory", metavar="DIRECTORY", help="a new or an empty folder")
        kind.set_defaults(run=lambda args: report_export(run(args), args.repo_id))
        return kind

    for name, text, run in (
        ("model", "the weights of a diffusion model with the code that decodes them", run_export_model),
        ("guider", "an autoregressive model, which needs no code", run_export_guider),
    ):
        kind = add_kind(name, text, run)
        kind.add_argument("--checkpoint", required=True, metavar="DIR_OR_ID", help="a folder or a Hub repository")
        kind.add_argument("--card", metavar="NAME", help="a card of model_cards (default: the checkpoint's)")
    kind = add_kind("code", "the code alone, for checkpoints whose weights stay where they are", run_export_code)
    kind.add_argument("--model-type", required=True, metavar="TYPE", help="its model_type, such as llada")
    kind.add_argument("--checkpoint", metavar="DIR_OR_ID", help="take the configuration from here")
    add_kind(
        "strategy",
        "the decoding strategy alone, for custom_generate",
        run_export_strategy,
    )
    kind = add_kind("space", "the page of `flashdlm app` as a Space, with this package in it", run_export_space)
    kind.set_defaults(run=run_export_space)
    kind.add_argument("--model", metavar="DIR_OR_ID", help="the diffusion model (default: the embedded pair)")
    kind.add_argument("--guider", metavar="DIR_OR_ID", help="an autoregressive model that judges the drafts")


def add_push(commands) -> None:
    """The arguments of `flashdlm push`."""
    about = "Publish an exported folder on the Hugging Face Hub: one commit, then a tag. Can be repeated."
    parser = commands.add_parser("push", help="publish a folder on the Hub", description=about)
    parser.set_defaults(run=run_push)
    add = parser.add_argument
    add("directory", metavar="DIRECTORY", help="a folder that `flashdlm export` has written")
    add("repo_id", metavar="REPO_ID", help="the repository, organization/name; it is created if there is none")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="for a new repository")
    visibility.add_argument("--public", action="store_false", dest="private", help="for a new repository")
    add("--tag", default=__version__, metavar="NAME", help="of the commit (default: %(default)s)")
    add("--dry-run", action="store_true", help="only list what would go up")


def run_export_model(args: argparse.Namespace):
    from ..hub.export import export_model

    return export_model(args.checkpoint, args.directory, args.repo_id, args.card)


def run_export_guider(args: argparse.Namespace):
    from ..hub.export import export_guider

    return export_guider(args.checkpoint, args.directory, args.repo_id, args.card or "guider")


def run_export_code(args: argparse.Namespace):
    from ..hub.export import export_code

    return export_code(args.model_type, args.directory, args.repo_id, args.checkpoint)


def run_export_strategy(args: argparse.Namespace):
    from ..hub.export import export_strategy

    return export_strategy(args.directory, args.repo_id)


def run_export_space(args: argparse.Namespace) -> None:
    """`flashdlm export space`, which prints what was written and what publishes it."""
    from ..hub.space import export_space

    directory = export_space(args.directory, args.repo_id, args.model, args.guider)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    print_files({path.relative_to(directory).as_posix(): path.stat().st_size for path in files})
    print(shlex.join(["hf", "upload", args.repo_id, str(directory), ".", "--repo-type", "space"]))


def report_export(directory, repo_id: str) -> None:
    """Print what was written and what publishes it."""
    from ..hub.upload import list_files

    print_files(list_files(directory))
    print(shlex.join(["flashdlm", "push", str(directory), repo_id]))


def run_push(args: argparse.Namespace) -> None:
    """`flashdlm push`."""
    from ..hub.export import check_repo_id
    from ..hub.upload import list_files, push

    check_repo_id(args.repo_id)
    if args.dry_run:
        print_files(list_files(args.directory))
    else:
        print(push(args.directory, args.repo_id, args.private, args.tag))


def print_files(files: dict[str, int]) -> None:
    """A line for each file, and a line for their sum."""
    from rich.filesize import decimal

    for name, size in files.items():
        print(f"{decimal(size):>12}  {name}")
    print(f"{decimal(sum(files.values())):>12}  in {len(files)} files")
