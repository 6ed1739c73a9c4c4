"""The settings that `flashdlm bench --ablate` measures, one per line.

Owns the parts of a decode, their combinations, the values that are tried, and how a guider decodes by itself. Knows
nothing of which models there are, or of how a setting is measured.
"""

from dataclasses import dataclass

import torch

from ..methods import METHODS
from .decoding import Models
from .recipe import Recipe


# The parts, each with its options of `generate` and of the guider.
PARTS = {
    "EOS": ({"stop_at_eos": True}, {}),
    "FreeCache": (METHODS["flashdlm"], {}),
    "window": ({"right_window": 16}, {}),
    "threshold": ({"confidence_threshold": METHODS["fast-dllm"]["confidence_threshold"]}, {}),
    "guider": ({}, {}),
    "union": ({}, {"combine": "union"}),
    "intersection": ({}, {"combine": "intersection", "confidence_threshold": 0.5}),
    "beyond": ({}, {"beyond_prefix": True}),
}
# The combinations. The window needs FreeCache; the last three parts need the guider, whose decision replaces the
# threshold. With "beyond" the threshold decides on the drafts after the first refused draft.
PART_COMBINATIONS = (
    "",
    "EOS",
    "FreeCache",
    "FreeCache window",
    "threshold",
    "guider",
    "guider union",
    "guider beyond",
    "EOS FreeCache",
    "EOS FreeCache window",
    "EOS threshold",
    "EOS FreeCache threshold",
    "EOS FreeCache window threshold",
    "EOS guider",
    "EOS guider union",
    "EOS guider beyond",
    "EOS guider union beyond",
    "EOS guider intersection",
    "EOS FreeCache guider",
    "EOS FreeCache window guider",
    "EOS FreeCache guider intersection",
    "EOS FreeCache window guider union",
    "EOS FreeCache window guider intersection",
    "EOS FreeCache window guider beyond",
    "EOS FreeCache guider union beyond",
    "EOS FreeCache guider intersection beyond",
    "FreeCache window guider union beyond",
    "EOS FreeCache window guider union beyond",
)
BLOCK_LENGTHS = (1, 2, 4, 8, 16, 64)
SHORT_BLOCKS = (2, 4, 8)  # at which decoding without a guider is accurate
ADAPTIVE_LENGTHS = (4, 8, 16)
GROWN_LENGTHS = (4, 8, 16, 32)
DELIMITER_THRESHOLDS = (0.3, 0.5, 0.9)
RIGHT_WINDOWS = (8, 16, 32)
TOP_KS = (1, 2, 3, 5)
RELATIVE_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
LOW_THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8)
GUIDER_RULES = {
    "top1": {"accept": "top1"},
    "topk 5": {"accept": "topk", "top_k": 5},
    "relative": {},
    "relative, k 5": {"top_k": 5},
}
INSTEAD = {"confidence_threshold": None}  # another rule than the threshold
UNGUIDED = {
    "threshold 0.8": {"confidence_threshold": 0.8},
    "threshold 0.95": {"confidence_threshold": 0.95},
    "factor 0.5": {"factor": 0.5},
    "factor 1": {"factor": 1.0},
    "Frechet 0.5": {"frechet_delta": 0.5},
    "entropy bound 0.1": {"entropy_bound": 0.1},
}
TEMPERATURES = (0.5, 1.0)
SEEDS = (0, 1, 2)  # of the rows that draw tokens
GUIDER_THRESHOLDS = (0.3, 0.5, 0.6)  # the best threshold of each guider is among them
NUM_DRAFTS = (4, 8, 16, 32, 64)
THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Setting:
    """A row of the table: its `group`, the `recipe` under the name it has there, and the `seeds` of its runs."""

    group: str
    recipe: Recipe
    seeds: tuple[int, ...] = (0,)

    def entry(self) -> dict:
        """The fields of a row that name the setting. A plain order writes one token per forward, without a cache."""
        options = self.recipe.options
        is_plain = "steps" in options and options["window_policy"] == "none"
        names = {"group": self.group, "name": self.recipe.name, "is_plain": is_plain, "seeds": list(self.seeds)}
        return names | {"options": options, "guider": self.recipe.guider, "rule": self.recipe.rule}

    @property
    def is_alone(self) -> bool:
        """Whether a guider decodes by itself."""
        return self.recipe.loop is not None


def combine(parts: str, block_length: int, new_tokens: int, guider: str) -> Recipe:
    """The recipe of a combination of `PARTS`."""
    names = parts.split()
    options = {"block_length": block_length, "window_policy": "none", "stop_at_eos": False}
    rule = {}
    for name in names:
        options |= PARTS[name][0]
        rule |= PARTS[name][1]
    if "guider" not in names and "threshold" not in names:
        options["steps"] = new_tokens
    return Recipe(" + ".join(names) or "plain", options, guider if "guider" in names else None, rule)


def settings(new_tokens: int, block_length: int, guiders: list[str], line_break: list[int]) -> list[Setting]:
    r"""
    The rows of the table.

    Args:
        new_tokens (`int`): Length of the canvas after the prompt.
        block_length (`int`): Block length of the settings that do not set their own.
        guiders (`list[str]`): Names of the guiders; the first judges in all rows that do not compare guiders.
        line_break (`list[int]`): Token ids at which an adaptive block may end.
    """

    def setting(group, name, parts, options=None, rule=None, *, guider: str = guiders[0], seeds=(0,)) -> Setting:
        recipe = combine(parts, block_length, new_tokens, guider)
        options, rule = recipe.options | (options or {}), recipe.rule | (rule or {})
        return Setting(group, Recipe(name or recipe.name, options, recipe.guider, rule), seeds)

    return [
        *(setting("parts", "", parts) for parts in PART_COMBINATIONS),
        *(setting(*row) for row in block_rows(new_tokens)),
        *(setting(*row) for row in adaptive_rows(new_tokens, line_break)),
        *(setting(*row) for row in grown_rows(new_tokens)),
        *(setting(*row) for row in rule_rows()),
        *(setting(*row, guider=name) for name in guiders for row in size_rows(name)),
        *(setting(*row, seeds=SEEDS) for row in sampling_rows()),
        *(Setting("guider alone", Recipe(name, {}, name, loop=alone(name))) for name in guiders),
    ]


def alone(guider: str):
    """The loop of a guider that decodes by itself, one token per forward, with Transformers' own cache."""

    def decode(models: Models, inputs: dict, options: dict) -> torch.LongTensor:
        ends = {"eos_token_id": models.end_token_ids, "pad_token_id": models.checkpoint.tokenizer.pad_token_id}
        length = options["max_new_tokens"]
        return models.guiders[guider].generate(**inputs, **ends, max_new_tokens=length, do_sample=False)

    return decode


def block_rows(new_tokens: int):
    """Group, name, parts and options of the rows on block lengths and windows."""
    for length in (size for size in BLOCK_LENGTHS if size <= new_tokens):
        block = {"block_length": length}
        yield "plain order", f"plain, block {length}", "EOS", block
        yield "block length", f"FreeCache, block {length}", "EOS FreeCache", block
        if length > 1:
            yield "block length", f"threshold, block {length}", "EOS FreeCache threshold", block
            yield "block length", f"beyond, block {length}", "EOS FreeCache guider beyond", block
            yield "block length", f"union + beyond, block {length}", "EOS FreeCache guider union beyond", block
            yield "block length", f"intersection, block {length}", "EOS FreeCache guider intersection", block
        if length in SHORT_BLOCKS:
            for name, rule in UNGUIDED.items():
                yield "unguided rules", f"{name}, block {length}", "EOS FreeCache threshold", block | INSTEAD | rule
    for width in RIGHT_WINDOWS:
        window = {"right_window": width}
        yield "right window", f"threshold, window {width}", "EOS FreeCache window threshold", window
        yield "right window", f"guider, window {width}", "EOS FreeCache window guider", window


def adaptive_rows(new_tokens: int, line_break: list[int]):
    """Group, name, parts and options of the rows on blocks that end at a line break."""
    for length in (size for size in ADAPTIVE_LENGTHS if size <= new_tokens):
        block = {"block_length": length}
        adaptive = block | {"blocks": "adaptive", "delimiter_token_ids": line_break}
        dual = {"window_policy": METHODS["adablock"]["window_policy"]}
        yield "adaptive blocks", f"fixed, dual, block {length}", "EOS threshold", block | dual
        yield "adaptive blocks", f"adaptive, dual, block {length}", "EOS threshold", adaptive | dual
        for bar in DELIMITER_THRESHOLDS:
            options = adaptive | {"delimiter_threshold": bar}
            yield "adaptive blocks", f"adaptive {bar}, block {length}", "EOS FreeCache threshold", options


def grown_rows(new_tokens: int):
    """Group, name, parts and options of the rows on a canvas that grows with the block."""
    for length in (size for size in GROWN_LENGTHS if size <= new_tokens):
        grown = {"block_length": length, "grow_canvas": True}
        yield "grown canvas", f"threshold, block {length}", "EOS FreeCache threshold", grown
        yield "grown canvas", f"intersection, block {length}", "EOS FreeCache guider intersection", grown


def rule_rows():
    """Group, name, parts, options and rule of the rows on unmasking rules."""
    judged = "EOS FreeCache guider"
    for sure in THRESHOLDS:
        rule = {"confidence_threshold": sure}
        yield "threshold", f"threshold {sure}", "EOS FreeCache threshold", rule
        yield "threshold", f"union {sure}", judged + " union", {}, rule
        yield "threshold", f"intersection {sure}", judged + " intersection", {}, rule
    for sure in LOW_THRESHOLDS:
        for name, rule in GUIDER_RULES.items():
            both = rule | {"combine": "intersection", "confidence_threshold": sure}
            yield "intersection", f"{name}, both {sure}", judged, {}, both
            yield "intersection", f"{name}, both {sure}, window 32", judged, {"right_window": 32}, both
    for top_k in TOP_KS:
        yield "k", f"topk, k {top_k}", judged, {}, {"accept": "topk", "top_k": top_k}
    for tau in RELATIVE_THRESHOLDS:
        yield "tau", f"topk_relative, k 2, tau {tau}", judged, {}, {"relative_threshold": tau}
    for drafts in NUM_DRAFTS:
        yield "V", f"V {drafts}", judged, {}, {"num_drafts": drafts}
    for parts in ("guider", "guider union"):
        yield "gate", f"{parts}, gate", f"EOS FreeCache {parts}", {}, {"gate": "auto"}


def size_rows(guider: str):
    """Group, name, parts, options and rule of the rows on one guider."""
    for parts in ("guider", "guider union", "guider intersection"):
        yield "guider size", f"{guider}: {parts.replace(' ', ' + ')}", f"EOS FreeCache {parts}"
    for sure in GUIDER_THRESHOLDS:
        name, rule = f"{guider}: both {sure}, window 32", {"confidence_threshold": sure}
        yield "intersection", name, "EOS FreeCache guider intersection", {"right_window": 32}, rule


def sampling_rows():
    """Group, name, parts and options of the rows that draw tokens."""
    for temperature in TEMPERATURES:
        drawn = {"do_sample": True, "temperature": temperature}
        for parts in ("threshold", "guider", "guider intersection"):
            name = f"{parts.replace(' ', ' + ')}, temperature {temperature}"
            yield "sampling", name, f"EOS FreeCache {parts}", drawn
