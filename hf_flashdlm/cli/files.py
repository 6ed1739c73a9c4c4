"""Files that an argument names: refused before the work, not after it."""

import os
from contextlib import suppress
from pathlib import Path


def check_writable(option: str, name: str, alternative: str = "") -> None:
    """Refuse a file that could not be written; `alternative` is what the option takes instead of a file."""
    path = Path(name)
    try:
        with suppress(FileNotFoundError):
            path.stat()  # raises where `is_dir` may answer no: at a name that is too long, or holds a null
        fits = not path.is_dir() and path.parent.is_dir()
        writable = os.access(path if path.exists() else path.parent, os.W_OK)
    except (OSError, ValueError):
        fits = writable = False
    if not fits:
        raise ValueError(f"`{option}` must be {alternative}a file in a folder that exists, got {name!r}.")
    if not writable:
        raise ValueError(f"`{option}` must be {alternative}a file that can be written, got {name!r}.")
