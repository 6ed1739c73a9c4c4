"""Measuring a way to decode: what it is made of, what it decodes, and what came of it.

Owns the recipes' form, the prompts, the one function that runs and counts, and the table printed of it. Uses
`generate` only; knows nothing of how decoding works, or of the command line.
"""

import json
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import CompileConfig

from ..console.checkpoint import Checkpoint
from ..guider import ARGuider
from .demo import TINY, binomial_interval, final_number
from .machine import Forward, Probe, synchronize


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
        compiled (`bool`): Whether `generate` compiles the forwards.
        like (`str`, *optional*): Name of the recipe that writes the same tokens, to be compared with.
    """

    name: str
    options: dict = field(default_factory=dict)
    guider: str | None = None
    rule: dict = field(default_factory=dict)
    loop: Callable | None = None
    speaks: bool = True
    compiled: bool = False
    like: str | None = None


@dataclass
class Models:
    r"""
    The models of a measurement.

    Args:
        model (`PreTrainedModel`): The diffusion model.
        guiders (`dict[str, PreTrainedModel]`): Autoregressive models by name.
        tokenizers (`dict`): Those of the guiders, where they have any.
        checkpoint ([`Checkpoint`], *optional*): `model` with its tokenizer, where it is trained.
        twin (`PreTrainedModel`, *optional*): An autoregressive model of the same shape.
    """

    model: PreTrainedModel
    guiders: dict[str, PreTrainedModel] = field(default_factory=dict)
    tokenizers: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    twin: PreTrainedModel | None = None
    made: dict[tuple, ARGuider] = field(default_factory=dict, repr=False)  # by guider and rule

    @classmethod
    def load(cls, checkpoint: Checkpoint, paths: dict[str, str], device: torch.device, dtype: str) -> "Models":
        """A trained model and guiders from folders or the Hub, by name."""
        guiders = {name: checkpoint.load_guider(path, str(device), dtype) for name, path in paths.items()}
        models = {name: guider.model for name, guider in guiders.items()}
        return cls(checkpoint.model, models, {name: guider.tokenizer for name, guider in guiders.items()}, checkpoint)

    def named(self) -> dict[str, PreTrainedModel]:
        """All of them by name."""
        twin = {} if self.twin is None else {"twin": self.twin}
        return {"model": self.model, **self.guiders, **twin}

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else ids

    def guider(self, recipe: Recipe) -> ARGuider:
        """The guider of a recipe, made once, as a caller would."""
        key = (recipe.guider, *recipe.rule.items())
        if key not in self.made:
            rule = recipe.rule
            if recipe.guider in self.tokenizers:
                both = {"tokenizer": self.tokenizers[recipe.guider], "canvas_tokenizer": self.checkpoint.tokenizer}
                rule = rule | both
            self.made[key] = ARGuider(self.guiders[recipe.guider], **rule)
        return self.made[key]

    def decode(self, recipe: Recipe, inputs: dict, options: dict):
        """Decode `inputs` by `recipe`: the ids `(B, L)`, and the output of `generate` if it was used."""
        options = options | recipe.options
        if recipe.loop is not None:
            return recipe.loop(self, inputs, options), None
        if recipe.guider is not None:
            options["guider"] = self.guider(recipe)
        if recipe.compiled:
            options["compile_config"] = compile_config(self.model.device)
        options = {"do_sample": False} | options
        output = self.model.generate(**inputs, **options, return_dict_in_generate=True)
        return output.sequences, output


def compile_config(device: torch.device) -> CompileConfig:
    """How forwards are compiled: on CUDA into captured graphs, which leave no launches to wait for."""
    return CompileConfig(mode="reduce-overhead" if device.type == "cuda" else None)


@dataclass(frozen=True)
class Workload:
    r"""
    What is decoded.

    Args:
        batches (`list[dict]`): `input_ids` and `attention_mask` of each batch.
        options (`dict`): Keywords of `generate` for all recipes.
        answers (`list[list[int]]`, *optional*): The right answers of each batch.
    """

    batches: list[dict]
    options: dict
    answers: list[list[int]] | None = None

    def start(self) -> "Workload":
        """Its first batch."""
        return Workload(self.batches[:1], self.options, self.answers and self.answers[:1])


@dataclass
class Run:
    r"""
    What one run over a workload counted, summed over its rows.

    Args:
        canvases (`list[list[int]]`): The ids of all rows, prompts and pads included.
        seconds (`float`): Time of the decodes, without counting.
        forward_seconds (`float`): The part of it inside the models' forwards.
        forwards (`dict[str, list[Forward]]`): The forwards of each model, by its name.
    """

    num_rows: int = 0
    correct: int | None = None
    tokens: int = 0
    nfe: int = 0
    guider_forwards: int = 0
    active_tokens: int = 0
    drafts_judged: int = 0
    drafts_accepted: int = 0
    guider_seconds: float = 0.0
    seconds: float = 0.0
    forward_seconds: float = 0.0
    forwards: dict[str, list[Forward]] = field(default_factory=dict)
    canvases: list[list[int]] = field(default_factory=list)

    @property
    def outside_share(self) -> float:
        """Share of the time that is not inside a forward."""
        return 1 - self.forward_seconds / self.seconds

    def count(self, output) -> None:
        """Add the counts of an output of `generate`."""
        self.nfe += int(output.nfe.sum())
        self.active_tokens += int(output.active_tokens.sum())
        for name in ("guider_forwards", "drafts_judged", "drafts_accepted"):
            value = getattr(output, name)
            setattr(self, name, getattr(self, name) + (0 if value is None else int(value.sum())))

    def count_forwards(self, forwards: list[Forward]) -> None:
        """Add the counts of a loop that does not count itself: all rows take part in all forwards."""
        self.nfe += sum(one.rows for one in forwards)
        self.active_tokens += sum(one.rows * one.queries for one in forwards)

    def figures(self) -> dict:
        """What the run says of its recipe; counts are means per row, `tokens` are those up to and with EOS."""
        figures = {
            "num_rows": self.num_rows,
            "tokens": self.tokens / self.num_rows,
            "nfe": self.nfe / self.num_rows,
            "guider_forwards": self.guider_forwards / self.num_rows,
            "active_tokens": self.active_tokens / self.num_rows,
            "tokens_per_forward": self.tokens / self.nfe,
            "drafts_judged": self.drafts_judged / self.num_rows,
            "drafts_accepted": self.drafts_accepted / self.num_rows,
            "guider_time_share": self.guider_seconds / self.seconds,
            "outside_forwards_share": self.outside_share,
            "accuracy": None,
            "accuracy_interval": None,
        }
        if self.correct is not None:
            interval = binomial_interval(self.correct, self.num_rows)
            figures |= {"accuracy": self.correct / self.num_rows, "accuracy_interval": list(interval)}
        return figures


def run(models: Models, recipe: Recipe, workload: Workload) -> Run:
    """Decode the workload once."""
    total = Run(correct=0 if workload.answers and recipe.speaks else None)
    watched = {name: models.named()[name] for name in ("model", "twin", recipe.guider) if name in models.named()}
    device = models.model.device
    for index, inputs in enumerate(workload.batches):
        probes = {name: Probe(model) for name, model in watched.items()}
        with ExitStack() as stack:
            for probe in probes.values():
                stack.enter_context(probe)
            synchronize(device)
            started = time.perf_counter()
            ids, output = models.decode(recipe, inputs, workload.options)
            synchronize(device)
            seconds = time.perf_counter() - started
        total.seconds += seconds
        for name, probe in probes.items():
            total.forward_seconds += probe.seconds
            total.forwards.setdefault(name, []).extend(probe.forwards)
        if output is None:
            total.count_forwards([one for probe in probes.values() for one in probe.forwards])
        else:
            total.count(output)
            total.guider_seconds += seconds * (output.guider_time_share or 0.0)
        ends = models.end_token_ids if recipe.speaks else []
        total.canvases += ids.tolist()
        texts = [_up_to_end(row, ends) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
        total.num_rows += len(texts)
        total.tokens += sum(map(len, texts))
        if total.correct is not None:
            answers = models.checkpoint.tokenizer.batch_decode(texts, skip_special_tokens=True)
            pairs = zip(answers, workload.answers[index], strict=True)
            total.correct += sum(final_number(text) == answer for text, answer in pairs)
    return total


def _up_to_end(ids: list[int], end_token_ids: list[int]) -> list[int]:
    """`ids` up to and with the first that ends a text."""
    return ids[: next((index for index, one in enumerate(ids, 1) if one in end_token_ids), len(ids))]


def problem_workload(
    checkpoint: Checkpoint, count: int, batch_size: int, seed: int, options: dict, prompt_length: int | None = None
) -> Workload:
    r"""
    Held-out word problems of the package as prompts.

    Args:
        checkpoint ([`Checkpoint`]): Gives the tokenizer and the chat template.
        count (`int`): How many.
        batch_size (`int`): Decoded together.
        seed (`int`): Of the draw.
        options (`dict`): Keywords of `generate` for all recipes.
        prompt_length (`int`, *optional*): Put solved problems in front of each question and keep the last so many
            tokens; by default the question stands alone.
    """
    lines = [json.loads(line) for line in (Path(TINY) / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    if count > len(lines):
        raise ValueError(f"`--problems` must be at most {len(lines)}, which is all the package holds, got {count}.")
    random.Random(seed).shuffle(lines)
    solved = [f"{line['question']}\nAnswer: {line['answer']}" for line in lines[count:] or lines]
    batches, answers = [], []
    for start in range(0, count, batch_size):
        chosen = lines[start : min(start + batch_size, count)]
        prompts = [line["question"] for line in chosen]
        inputs = checkpoint.encode(prompts, None)
        shots = 0
        while prompt_length is not None and inputs["attention_mask"].sum(1).min() < prompt_length:
            shots = max(2 * shots, 1)
            examples = [solved[index % len(solved)] for index in range(shots)]
            inputs = checkpoint.encode(["\n\n".join([*examples, prompt]) for prompt in prompts], None)
        if prompt_length is not None:
            inputs = {name: value[:, -prompt_length:] for name, value in inputs.items()}
        batches.append(inputs)
        answers.append([line["final"] for line in chosen])
    return Workload(batches, options, answers)


def random_workload(model, batch_size: int, seed: int, options: dict, prompt_length: int) -> Workload:
    """One batch of prompts of random ids, none of them an end, a pad or the mask token."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    special = torch.tensor(
        [one for name in ("mask", "eos", "pad") if isinstance(one := getattr(config, f"{name}_token_id", None), int)]
    )
    usual = torch.arange(config.vocab_size)
    usual = usual[~torch.isin(usual, special)]
    ids = usual[torch.randint(len(usual), (batch_size, prompt_length), generator=generator)].to(model.device)
    return Workload([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], options)


def format_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table in plain text: the first column to the left, the others to the right."""
    columns = [[header, *cells] for header, *cells in zip(headers, *rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}" for index, (cell, width) in enumerate(line))
        for line in (zip(row, widths, strict=True) for row in [headers, *rows])
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_json(path: Path, record: dict) -> None:
    """Write at once, so that an interrupt leaves the old file or the new one."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)
