"""The pages of the repository, as their readers see them: blocks, tables, links, commands."""

import re
import shlex
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGED = ("hf_flashdlm", "examples", "tests")  # folders whose files in Markdown are all pages
NAMES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "model_cards/README.md"),
    *(path.relative_to(ROOT).as_posix() for name in PAGED for path in sorted((ROOT / name).rglob("*.md"))),
)


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(name: str, title: str) -> str:
    """What is below a title of the second level."""
    return page(name).partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """The blocks of a language; that of commands has no name."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def snippets(text: str) -> list[str]:
    """The blocks of Python."""
    return blocks(text, "python")


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of each call of `program`."""
    lines = "".join(blocks(text, "")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def marked(name: str) -> list[tuple[str, str]]:
    """Each mark `<!-- ... -->` of a page, and the table or the block of text that follows it."""
    return re.findall(r"^<!-- (.*?) -->\n((?:\|.*\n)+|```\n(?:.*\n)*?```\n)", page(name), re.MULTILINE)


def rows(table: str) -> list[list[str]]:
    """The cells of a table, its first line included."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [lines[0], *lines[2:]]
