"""Configuration of MMaDA: the fields of LLaDA, of which it is one with images among its ids.

Owns the `model_type`. Knows nothing of how an image becomes ids.
"""

from .configuration_llada import LLaDAConfig


class MMadaConfig(LLaDAConfig):
    """[`LLaDAConfig`] under another `model_type`."""

    model_type = "mmada"

    vocab_size: int = 134656


__all__ = ["MMadaConfig"]
