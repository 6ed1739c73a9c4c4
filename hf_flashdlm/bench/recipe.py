"""A way to decode: what a recipe may say.

Knows nothing of which recipes and models there are, or of how decoding works.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    r"""
    A way to decode.

    Args:
        name (`str`): In tables.
        options (`dict`): Keywords of `generate`.
        guider (`str`, *optional*): Which of the models' guiders judges the drafts.
        rule (`dict`): Keywords of [`ARGuider`].
        loop (`Callable`, *optional*): `(models, inputs, options) -> ids (B, L)`, in place of `generate`.
        speaks (`bool`): Whether its texts mean something: else they have no end before the canvas's, and no answer.
        stops_at_answers (`bool`):
            Whether the workload says where a text ends, as if the model had written the correct answer.
        compiled (`bool`): Whether `generate` compiles the forwards.
        like (`str`, *optional*): Name of the recipe that writes the same tokens, to be compared with.
    """

    name: str
    options: dict = field(default_factory=dict)
    guider: str | None = None
    rule: dict = field(default_factory=dict)
    loop: Callable | None = None
    speaks: bool = True
    stops_at_answers: bool = False
    compiled: bool = False
    like: str | None = None
