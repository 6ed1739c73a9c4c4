"""Compiled forwards.

Owns when the forward of a model runs compiled, what captured graphs need, what happens where it cannot be compiled,
and where its inputs go. Knows nothing of canvases, windows, or which of the two models it runs.
"""

import inspect
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging


logger = logging.get_logger(__name__)

CAPTURING_MODES = ("reduce-overhead", "max-autotune")  # of `torch.compile`: a GPU replays captured graphs

# What models, masks, outputs and `generate` of Transformers call a cache: `cache` from 5.24 on. The older name can go
# when 5.24 is the oldest version supported.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# What could not be compiled, so that no later call tries again: settings by the embedding of the model, which the
# views that decode models of other classes share with it.
_failed = WeakKeyDictionary()


def device_of(model) -> torch.device:
    """Where a model takes its inputs: beside its weights; on the CPU, where hooks fetch offloaded ones."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def unwrapped(model):
    """The model of Transformers in a wrapper, such as an adapter's or that of `torch.compile`; else `model` itself."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((module for module in modules if isinstance(module, PreTrainedModel)), model)


def cache_name(model) -> str:
    """The keyword under which the forward of `model` takes a cache: code outside of Transformers keeps its own."""
    accepted = inspect.signature(unwrapped(model).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), CACHE_NAME)


class CompiledForward:
    r"""
    The forward of a model, compiled where that is asked for. The first one of a cache, which makes its buffers, always
    runs eagerly; so do all of a model that could not be compiled, with one warning.

    Args:
        model (`PreTrainedModel`): Whose forward to run.
        compile_config (`CompileConfig`, *optional*): The host's settings of `torch.compile`; without them, eager.
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
                # A graph writes into the buffers where they lie; those of the next call are captured anew.
                torch._dynamo.mark_static_address(layer.keys, guard=False)
                torch._dynamo.mark_static_address(layer.values, guard=False)
        output = forward(**inputs)
        output.logits = output.logits.clone()  # the next replay writes over what this one returned
        return output
