"""`Checkpoint`, a model with its tokenizer: the public way to turn what a user types into ids."""

from .console.checkpoint import Checkpoint


__all__ = ["Checkpoint"]
