"""The methods that `flashdlm bench` compares: built-in ones by name, the user's loops, and built-in ones compiled.

Owns the settings of each method, and which methods write the same tokens. Knows nothing of how they are measured.
"""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..generation_config import INEXACT_POLICIES
from ..methods import METHODS
from .recipe import Recipe
from .shapes import TWINS


if TYPE_CHECKING:  # the names of the methods are known before torch is imported
    import torch

    from .decoding import Models


def recipes(steps_per_block: int, block_length: int) -> dict[str, Recipe]:
    """The methods that can be compared, by name; the first two are the baselines."""
    fixed = {"steps_per_block": steps_per_block}
    sure = METHODS["fast-dllm"]
    window = {"right_window": 2 * block_length}
    both = {"combine": "intersection", "confidence_threshold": 0.5}
    fast = METHODS["flashdlm-fast"] | {"method": "flashdlm-fast"}  # its block length yields to a shorter canvas

    def of(method: str, changes: dict) -> dict:
        """The window policy of a published method, with `changes` instead of its other settings."""
        return {"window_policy": METHODS[method]["window_policy"]} | changes

    table = [
        Recipe("plain", of("llada", fixed | {"stop_at_eos": False})),
        Recipe("plain-eos", of("llada", fixed)),
        Recipe("prefix", of("fast-dllm-prefix", fixed)),
        Recipe("dual", of("fast-dllm-dual", fixed)),
        Recipe("dkv", of("dkv-cache", fixed)),
        Recipe("freecache", of("freecache", fixed)),
        Recipe("freecache+window", of("freecache", fixed | window)),
        Recipe("plain+threshold", sure),
        Recipe("prefix+threshold", METHODS["fast-dllm-prefix"]),
        Recipe("dual+threshold", METHODS["fast-dllm-dual"]),
        Recipe("freecache+threshold", sure | METHODS["flashdlm"]),
        Recipe("freecache+window+threshold", sure | METHODS["flashdlm"] | window),
        Recipe("guided", METHODS["flashdlm"], "guider"),
        Recipe("guided+window", METHODS["flashdlm"] | window, "guider"),
        Recipe("guided+union", METHODS["flashdlm"], "guider", {"combine": "union"}),
        Recipe("guided+intersection", METHODS["flashdlm"], "guider", both),
        Recipe("guided+window+intersection", METHODS["flashdlm"] | window, "guider", both),
        Recipe("fast+threshold", sure | fast),
        Recipe("fast+guided+intersection", fast, "guider", both),
        Recipe("ar", loop=decode_twin, speaks=False, stops_at_answers=True),
    ]
    return {recipe.name: recipe for recipe in table}


def decode_twin(models: "Models", inputs: dict, options: dict) -> "torch.LongTensor":
    """Decode with the autoregressive model of the same shape, by Transformers' own loop and cache."""
    return models.twin.generate(**inputs, max_new_tokens=options["max_new_tokens"], do_sample=False)


def references(path: str | None, steps_per_block: int) -> dict[str, list[Recipe]]:
    """The loops in `METHODS` of the user's Python file, by name, each after the built-in method with its settings."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"`--reference` must be a Python file, got {path!r}.")
    methods = runpy.run_path(path).get("METHODS")
    try:
        entries = [(name, loop, dict(options)) for name, (loop, options) in methods.items()]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "`--reference` must define METHODS, a dict from names to pairs (loop, options of `generate`), got "
            f"{path!r}."
        ) from error
    found = {}
    for name, loop, options in entries:
        if "confidence_threshold" not in options:
            options["steps_per_block"] = steps_per_block
        built_in = Recipe(f"{name} (ours)", options | {"stop_at_eos": False}, like=name)
        found[name] = [built_in, Recipe(name, loop=reference_loop(loop))]
    return found


def reference_loop(loop):
    """Adapt a loop `(model, input_ids, max_new_tokens=, block_length=) -> ids` to the form that a recipe takes."""

    def decode(models: "Models", inputs: dict, options: dict) -> "torch.LongTensor":
        if not inputs["attention_mask"].all():
            raise ValueError("`--reference` loops take prompts of one length: add `--prompt-length`.")
        sizes = {name: options[name] for name in ("max_new_tokens", "block_length")}
        return loop(models.model, inputs["input_ids"], **sizes)

    return decode


def compiled(recipe: Recipe) -> Recipe | None:
    """The same recipe with compiled forwards; `None` for a recipe with a loop of its own."""
    if recipe.loop is not None:
        return None
    return replace(recipe, name=f"{recipe.name} (compiled)", compiled=True, like=recipe.name)


def choose(
    wanted: list[str] | None, known: dict[str, Recipe], pairs: dict[str, list[Recipe]], models: "Models"
) -> list[Recipe]:
    """The methods asked for. By default the pairs with references, else all methods that the models can decode by."""
    if wanted is None:
        everything = sum(pairs.values(), []) or known.values()
        return [recipe for recipe in everything if is_possible(recipe, models)]
    for name in wanted:
        if name not in known and name not in pairs:
            raise ValueError(f"`--methods` must be some of {', '.join([*known, *pairs])}, got {name!r}.")
        if name in known and known[name].guider is not None and not models.guiders:
            raise ValueError(f"`--methods` {name} needs a guider: add `--guider`.")
    return [recipe for name in wanted for recipe in pairs.get(name) or [known[name]]]


def is_possible(recipe: Recipe, models: "Models") -> bool:
    """Whether the models can decode by a recipe: a guider, a twin and the window policy must be there for it."""
    from ..block_causal import attention_block_length

    if recipe.guider is not None and not models.guiders:
        return False
    if recipe.name == "ar":
        return models.model.config.model_type in TWINS
    return attention_block_length(models.model) is None or recipe.options.get("window_policy") not in INEXACT_POLICIES
