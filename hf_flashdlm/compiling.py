"""Compiled forwards.

Owns when the forward of a model runs compiled, what captured graphs need, what happens if it cannot be compiled, and
on which device its inputs are. Knows nothing of canvases, windows, or which of the two models it runs.
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


logger = logging.get_logger(__name__)

CAPTURING_MODES = ("reduce-overhead", "max-autotune")  # of `torch.compile`: a GPU replays captured graphs

# The name of the cache in models, masks, outputs and `generate` of Transformers: `cache` from 5.24 on. The older name
# can go when 5.24 is the oldest version supported.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Lets a forward or layer whose cache is called `cache` be given it by the older name: with a version that has passed,
# the decorator of Transformers takes that without a word.
takes_past_key_values = deprecate_kwarg("past_key_values", version="5.18.0", new_name="cache")

# Compile configs that failed, so that no later call tries them again. Keyed by the input embedding, because the views
# by which models of other classes are decoded share it with the original model.
_failed: WeakKeyDictionary[torch.nn.Module, list] = WeakKeyDictionary()


def device_of(model) -> torch.device:
    """The device of a model's inputs: that of its weights, or the CPU if hooks fetch offloaded weights."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def unwrapped(model):
    """The model of Transformers in a wrapper, such as an adapter's or that of `torch.compile`; else `model` itself."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((module for module in modules if isinstance(module, PreTrainedModel)), model)


def forward_parameters(model) -> Mapping[str, inspect.Parameter]:
    """The parameters of `model.forward` by name; those of a class are looked up once."""
    forward = model.forward
    function = getattr(forward, "__func__", None)
    return inspect.signature(forward).parameters if function is None else _parameters(function)


@lru_cache(maxsize=64)
def _parameters(function) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def cache_name(model) -> str:
    """The name of the cache argument of `model.forward`; code outside of Transformers may use either name."""
    accepted = forward_parameters(unwrapped(model))
    return next((name for name in ("cache", "past_key_values") if name in accepted), CACHE_NAME)


class CompiledForward:
    r"""
    The forward of a model, compiled if `compile_config` is given. The first forward with a cache, which makes its
    buffers, always runs eagerly. A model that could not be compiled runs eagerly, after one warning.

    Args:
        model (`PreTrainedModel`): The model to run.
        compile_config (`CompileConfig`, *optional*): Transformers' settings for `torch.compile`; eager without them.
    """

    def __init__(self, model, compile_config=None):
        self.model, self.compile_config, self.cache_name = model, compile_config, cache_name(model)
        if compile_config is not None and compile_config in _failed.get(model.get_input_embeddings(), ()):
            self.compile_config = None

    def __call__(self, cache=None, **inputs):
        inputs[self.cache_name] = cache
        is_first = cache is not None and not cache.is_initialized
        if self.compile_config is None or is_first:
            return self.model(**inputs)
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import  # noqa: PLC0415

        try:
            return self._compiled(cache, inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            logger.warning(
                f"`compile_config` has no effect: the forward of {type(self.model).__name__} could not be compiled "
                f"and runs eagerly ({reason})."
            )
            _failed.setdefault(self.model.get_input_embeddings(), []).append(self.compile_config)
            self.compile_config = None
            return self.model(**inputs)

    def _compiled(self, cache, inputs):
        forward = self.model.get_compiled_call(self.compile_config)
        if self.compile_config.mode not in CAPTURING_MODES:
            return forward(**inputs)
        torch.compiler.cudagraph_mark_step_begin()
        if cache is not None:
            for layer in cache.layers:
                # A captured graph writes into these very buffers; the next call has new buffers and new graphs.
                torch._dynamo.mark_static_address(layer.keys, guard=False)
                torch._dynamo.mark_static_address(layer.values, guard=False)
        output = forward(**inputs)
        output.logits = output.logits.clone()  # the next replay overwrites the output
        return output
