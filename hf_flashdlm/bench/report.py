"""Output of a measurement: a table in plain text, a JSON file.

Knows nothing of what the figures mean.
"""

import json
from pathlib import Path

from ..console.answer_file import write


def format_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table in plain text: the first column is left-aligned, the others are right-aligned."""
    columns = [[header, *cells] for header, *cells in zip(headers, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}" for index, (cell, width) in enumerate(line))
        for line in (zip(row, widths, strict=True) for row in [headers, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, record: dict) -> None:
    """Write the file in one move, so that an interrupt leaves the old file or the new one."""
    write(path, [json.dumps(record, indent=2, allow_nan=False) + "\n"])
