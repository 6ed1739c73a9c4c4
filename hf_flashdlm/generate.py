"""The entries for `custom_generate` of Transformers: of a repository (`generate`) and as a callable (`decode`).

Owns the forms in which Transformers calls a custom strategy, and what it adds to the caller's arguments on the way.
Knows nothing of how a call becomes a decode.
"""

import inspect
from typing import cast

import torch
from transformers.generation import LogitsProcessorList

from .generation_config import DiffusionOptions
from .generation_inputs import check_inputs
from .generation_mixin import FlashDLMGenerationMixin, as_diffusion_model, diffusion_generate


# Arguments that say where a strategy is loaded from; Transformers hands them on to the strategy itself.
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


# What belongs to a call and not to its configuration.
CALL_ARGUMENTS = ("guider", "generator", "streamer", "synced_gpus")


@torch.no_grad()
def generate(inputs=None, generation_config=None, *, model, custom_generate=None, **kwargs):
    r"""
    Decode with a masked diffusion model of any class: `model.generate(..., custom_generate="<this repository>")`, or
    `generate` of a model loaded from this repository.

    Args:
        inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): As `input_ids`.
        generation_config (`GenerationConfig`, *optional*): May hold the options of [`DiffusionOptions`], too.
        model (`PreTrainedModel`): Filled in by Transformers. See [`diffusion_generate`] for what it must be.
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
    The same as a callable: `model.generate(..., custom_generate=decode, guider=guider)`. From models of other classes
    Transformers does not hand on `streamer`, and `tokenizer` for `stop_strings`, in this form:
    [`diffusion_generate`] takes both.

    Args:
        model (`PreTrainedModel`): See [`diffusion_generate`].
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Prompts.
        generation_config (`GenerationConfig`): As Transformers has completed it.
        logits_processor (`LogitsProcessorList`, *optional*): The caller's and those of Transformers, as it has made
            them: they are used as they are.
        stopping_criteria (`StoppingCriteriaList`, *optional*): The caller's and those of Transformers.
        kwargs: `guider`, `generator`, `streamer`, `synced_gpus`, the options of [`DiffusionOptions`], and arguments of
            a forward.

    Returns:
        As of [`diffusion_generate`].
    """
    view = as_diffusion_model(model)
    own = {name: kwargs.pop(name) for name in CALL_ARGUMENTS if kwargs.get(name) is not None}
    options = {name: kwargs[name] for name in DiffusionOptions.names() if kwargs.get(name) is not None}
    model_kwargs = {"attention_mask": kwargs.get("attention_mask")}
    generation_config, _ = FlashDLMGenerationMixin._prepare_generation_config(view, generation_config, **options)
    input_ids = cast("torch.Tensor", check_inputs(view, input_ids, model_kwargs))
    # The cache that Transformers has made for another class is an autoregressive one.
    FlashDLMGenerationMixin._prepare_cache_for_generation(view, generation_config, model_kwargs)
    return FlashDLMGenerationMixin._sample(
        view,
        input_ids,
        LogitsProcessorList() if logits_processor is None else logits_processor,
        stopping_criteria,
        generation_config,
        **own,
        **model_kwargs,
    )


# Transformers passes a callable what its signature names, and refuses the rest as unknown.
_NAMES = (*CALL_ARGUMENTS, "tokenizer", *DiffusionOptions.names())
_signature = inspect.signature(decode)
decode.__signature__ = _signature.replace(  # type: ignore[attr-defined]  # which `inspect` looks for first
    parameters=[
        *list(_signature.parameters.values())[:-1],
        *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _NAMES),
        _signature.parameters["kwargs"],
    ]
)
