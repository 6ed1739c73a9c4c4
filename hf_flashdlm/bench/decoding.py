"""The models of a measurement, which decode by a recipe.

Owns the one call of `generate`. Knows nothing of which recipes and models there are, or of how decoding works.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import CompileConfig

from ..console.checkpoint import Checkpoint, usual_block_length
from ..guider import ARGuider
from .recipe import Recipe


@dataclass
class Models:
    r"""
    The models of a measurement.

    Args:
        model (`PreTrainedModel`): The diffusion model.
        guiders (`dict[str, PreTrainedModel]`): Autoregressive models by name.
        tokenizers (`dict`): Tokenizers of the guiders, if they have any.
        checkpoint ([`Checkpoint`], *optional*): `model` with its tokenizer, if it is trained.
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
        """All models by name."""
        twin = {} if self.twin is None else {"twin": self.twin}
        return {"model": self.model, **self.guiders, **twin}

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else ids

    def block_length(self, wanted: int | None, new_tokens: int) -> int:
        """The length of the blocks: as `wanted`, but no longer than the canvas, else that which `generate` takes."""
        return usual_block_length(self.model, new_tokens) if wanted is None else min(wanted, new_tokens)

    @staticmethod
    def steps_per_block(steps: int | None, new_tokens: int, block_length: int) -> int:
        """The steps of a block where `steps` are those of the canvas; by default each step writes one token."""
        return block_length if steps is None else max(steps * block_length // new_tokens, 1)

    def guider(self, recipe: Recipe) -> ARGuider:
        """The guider of a recipe, made once and then reused."""
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
    """How forwards are compiled: on CUDA into captured graphs, which save the kernel launches."""
    return CompileConfig(mode="reduce-overhead" if device.type == "cuda" else None)
