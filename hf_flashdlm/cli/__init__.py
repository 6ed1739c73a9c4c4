"""The script `flashdlm`: `main` runs the command line."""

from .command import main


__all__ = ["main"]
