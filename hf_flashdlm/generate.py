"""The entries for the host's `custom_generate`: of a repository (`generate`) and as a callable (`decode`).

Owns the forms in which the host calls a custom strategy, and what it adds to the caller's arguments on the way. Knows
nothing of how a call becomes a decode.
"""

import copy
import inspect

import torch
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from .generation_config import DiffusionOptions
from .generation_mixin import diffusion_generate


# What says where a strategy is loaded from; the host hands it on to the strategy itself.
LOADING_ARGUMENTS = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


@torch.no_grad()
def generate(inputs=None, generation_config=None, *, model, custom_generate=None, **kwargs):
    r"""
    Decode with a masked diffusion model of any class: `model.generate(..., custom_generate="<this repository>")`, or
    `generate` of a model loaded from this repository.

    Args:
        inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): As `input_ids`.
        generation_config (`GenerationConfig`, *optional*): May hold the options of [`DiffusionOptions`], too.
        model (`PreTrainedModel`): The host fills it in. See [`diffusion_generate`] for what it must be.
        custom_generate (*optional*): Another strategy, which then does the work.
        kwargs: As of `generate`, and those of [`FlashDLMGenerationMixin`].

    Returns:
        As of [`diffusion_generate`].
    """
    if custom_generate is not None:
        return type(model).generate(model, inputs, generation_config, custom_generate=custom_generate, **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in LOADING_ARGUMENTS}
    return diffusion_generate(model, inputs, generation_config=generation_config, **kwargs)


@torch.no_grad()
def decode(model, input_ids, *, generation_config, logits_processor=None, stopping_criteria=(), **kwargs):
    r"""
    The same as a callable: `model.generate(..., custom_generate=decode, guider=guider)`. The host drops `streamer`
    and `tokenizer` in this form, which [`diffusion_generate`] takes.

    Args:
        model (`PreTrainedModel`): See [`diffusion_generate`].
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Prompts.
        generation_config (`GenerationConfig`): As the host has completed it.
        logits_processor (`LogitsProcessorList`, *optional*): The caller's and the host's.
        stopping_criteria (`StoppingCriteriaList`, *optional*): The caller's and the host's.
        kwargs: `guider`, `generator`, the options of [`DiffusionOptions`], and the host's arguments of a forward.

    Returns:
        As of [`diffusion_generate`].
    """
    generation_config = copy.copy(generation_config)
    generation_config.num_return_sequences = 1  # the rows are there already
    if generation_config.max_new_tokens is not None:
        generation_config.max_length = None
    criteria = [one for one in stopping_criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    ours = {name: kwargs[name] for name in (*_NAMES, "attention_mask") if kwargs.get(name) is not None}
    return diffusion_generate(
        model,
        input_ids,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=criteria,
        **ours,
    )


# The host passes a callable what its signature names, and refuses the rest as unknown.
_NAMES = ("guider", "generator", *DiffusionOptions.names())
_signature = inspect.signature(decode)
decode.__signature__ = _signature.replace(
    parameters=[
        *list(_signature.parameters.values())[:-1],
        *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _NAMES),
        _signature.parameters["kwargs"],
    ]
)
