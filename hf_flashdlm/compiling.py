"""Compiled forwards.

Owns when the forward of a model runs compiled, what captured graphs need, what happens where it cannot be compiled,
and where its inputs go. Knows nothing of canvases, windows, or which of the two models it runs.
"""

from weakref import WeakKeyDictionary

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)

CAPTURING_MODES = ("reduce-overhead", "max-autotune")  # of `torch.compile`: a GPU replays captured graphs

# What could not be compiled, so that no later call tries again: settings by the embedding of the model, which the
# views that decode models of other classes share with it.
_failed = WeakKeyDictionary()


def device_of(model) -> torch.device:
    """Where a model takes its inputs: beside its weights; on the CPU, where hooks fetch offloaded ones."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


class CompiledForward:
    r"""
    The forward of a model, compiled where that is asked for. The first one of a cache, which makes its buffers, always
    runs eagerly; so do all of a model that could not be compiled, with one warning.

    Args:
        model (`PreTrainedModel`): Whose forward to run.
        compile_config (`CompileConfig`, *optional*): The host's settings of `torch.compile`; without them, eager.
    """

    def __init__(self, model, compile_config=None):
        self.model, self.compile_config = model, compile_config
        if compile_config is not None and compile_config in _failed.get(model.get_input_embeddings(), ()):
            self.compile_config = None

    def __call__(self, past_key_values=None, **inputs):
        is_first = past_key_values is not None and not past_key_values.is_initialized
        if self.compile_config is None or is_first:
            return self.model(past_key_values=past_key_values, **inputs)
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import  # noqa: PLC0415

        try:
            return self._compiled(past_key_values, inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            logger.warning(
                f"`compile_config` has no effect: the forward of {type(self.model).__name__} could not be compiled "
                f"and runs eagerly ({reason})."
            )
            _failed.setdefault(self.model.get_input_embeddings(), []).append(self.compile_config)
            self.compile_config = None
            return self.model(past_key_values=past_key_values, **inputs)

    def _compiled(self, past_key_values, inputs):
        forward = self.model.get_compiled_call(self.compile_config)
        if self.compile_config.mode not in CAPTURING_MODES:
            return forward(past_key_values=past_key_values, **inputs)
        torch.compiler.cudagraph_mark_step_begin()
        if past_key_values is not None:
            for layer in past_key_values.layers:
                # A graph writes into the buffers where they lie; those of the next call are captured anew.
                torch._dynamo.mark_static_address(layer.keys, guard=False)
                torch._dynamo.mark_static_address(layer.values, guard=False)
        output = forward(past_key_values=past_key_values, **inputs)
        output.logits = output.logits.clone()  # the next replay writes over what this one returned
        return output
