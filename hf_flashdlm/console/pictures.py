"""Files of pictures that nobody vouches for.

Owns which files are read, how much of the machine they may take, and that every fault of them is a `ValueError` of one
sentence. Knows nothing of models.
"""

import importlib.util
import warnings
from pathlib import Path

from ..hub.loading import bounded, refusing


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # Pillow hands some others to programs


def read_pictures(paths: list[str]) -> list:
    r"""
    Pictures of Pillow, upright and in RGB.

    Args:
        paths (`list[str]`): Their files.

    Raises:
        ValueError: If Pillow is not installed, or a file is none, no picture, broken, or of too many pixels.
    """
    if paths and importlib.util.find_spec("PIL") is None:
        raise ValueError("`--image` needs Pillow, which is not installed: pip install pillow.")
    return [read_picture(path) for path in paths]


def read_picture(path: str):
    """One of [`read_pictures`]."""
    from PIL import Image, ImageOps  # which is needed for images alone

    with refusing(f"`--image` must be a file with a picture ({', '.join(FORMATS)}), got {path!r}"), bounded():
        if not Path(path).is_file():  # nor a pipe, from which reading may never end
            raise ValueError("there is no such file.")
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            with Image.open(path, formats=FORMATS) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
