"""What a measurement decodes: held-out problems, or random ids.

Owns the prompts and their correct answers. Knows nothing of how they are decoded.
"""

import random
from dataclasses import dataclass
from functools import cached_property

import torch

from ..console.checkpoint import Checkpoint
from ..tiny import problems
from .recipe import Recipe


STARTING_LENGTH = 16  # tokens, to look at a few steps


@dataclass(frozen=True)
class Workload:
    r"""
    The inputs of a measurement.

    Args:
        batches (`list[dict]`): `input_ids` and `attention_mask` of each batch.
        options (`dict`): Keywords of `generate` for all recipes.
        answers (`list[list[int]]`, *optional*): The correct answers of each batch.
        lengths (`list[list[int]]`, *optional*): The number of tokens of each correct answer, with its end token.
    """

    batches: list[dict]
    options: dict
    answers: list[list[int]] | None = None
    lengths: list[list[int]] | None = None

    def start(self) -> "Workload":
        """The first batch alone, with a block or two to write."""
        length = min(self.options["max_new_tokens"], STARTING_LENGTH)
        short = {"max_new_tokens": length, "block_length": min(self.options.get("block_length", length), length)}
        return Workload(
            self.batches[:1],
            self.options | short,
            self.answers and self.answers[:1],
            self.lengths and self.lengths[:1],
        )

    def fixed_lengths(self, recipe: Recipe, index: int) -> list[int] | None:
        """How many tokens each row of a batch has if the recipe stops at the correct answers."""
        if not (recipe.stops_at_answers and self.lengths and self.options.get("stop_at_eos", True)):
            return None
        return [min(length, self.options["max_new_tokens"]) for length in self.lengths[index]]

    def is_long(self, index: int) -> list[bool]:
        """Which correct answers of a batch are among the longest quarter of the workload's."""
        return [length >= self._long for length in self.lengths[index]] if self.lengths else []

    @cached_property
    def _long(self) -> int:
        lengths = sorted(length for batch in self.lengths or () for length in batch)
        return lengths[3 * len(lengths) // 4]


def problem_workload(
    checkpoint: Checkpoint, count: int, batch_size: int, seed: int, options: dict, prompt_length: int | None = None
) -> Workload:
    r"""
    Prompts from the held-out word problems of the package.

    Args:
        checkpoint ([`Checkpoint`]): Gives the tokenizer and the chat template.
        count (`int`): Number of problems.
        batch_size (`int`): Problems decoded together.
        seed (`int`): Seed of the draw.
        options (`dict`): Keywords of `generate` for all recipes.
        prompt_length (`int`, *optional*): Put solved problems before each question and keep the last
            `prompt_length` tokens; by default a prompt is the question alone.
    """
    drawn = problems(count)
    random.Random(seed).shuffle(drawn)
    solved = [f"{problem.question}\nAnswer: {problem.answer}" for problem in drawn[count:] or drawn]
    batches, answers, lengths = [], [], []
    for start in range(0, count, batch_size):
        chosen = drawn[start : min(start + batch_size, count)]
        prompts = [problem.question for problem in chosen]
        inputs = checkpoint.encode(prompts, None)
        shots = 0
        while prompt_length is not None and inputs["attention_mask"].sum(1).min() < prompt_length:
            shots = max(2 * shots, 1)
            examples = [solved[index % len(solved)] for index in range(shots)]
            inputs = checkpoint.encode(["\n\n".join([*examples, prompt]) for prompt in prompts], None)
        if prompt_length is not None:
            inputs = {name: value[:, -prompt_length:] for name, value in inputs.items()}
        batches.append(inputs)
        answers.append([problem.final for problem in chosen])
        lengths.append([len(checkpoint.tokenizer(problem.answer).input_ids) + 1 for problem in chosen])
    return Workload(batches, options, answers, lengths)


def random_workload(model, batch_size: int, seed: int, options: dict, prompt_length: int) -> Workload:
    """One batch of prompts of random ids, none of them an end, a pad or the mask token."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    special = torch.tensor(
        [
            token_id
            for name in ("mask", "eos", "pad")
            if isinstance(token_id := getattr(config, f"{name}_token_id", None), int)
        ]
    )
    usual = torch.arange(config.vocab_size)
    usual = usual[~torch.isin(usual, special)]
    ids = usual[torch.randint(len(usual), (batch_size, prompt_length), generator=generator)].to(model.device)
    return Workload([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], options)
