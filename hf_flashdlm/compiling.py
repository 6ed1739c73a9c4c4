"""Compiled forwards.

Owns when the forward of a model runs compiled, and what happens where it cannot. Knows nothing of canvases, windows,
or which of the two models it runs.
"""

from transformers.utils import logging


logger = logging.get_logger(__name__)


class Forward:
    r"""
    The forward of a model, compiled where that is asked for. The first one of a cache, which makes its buffers, always
    runs eagerly; so do all after one that could not be compiled, with a warning.

    Args:
        model (`PreTrainedModel`): Whose forward to run.
        compile_config (`CompileConfig`, *optional*): The host's settings of `torch.compile`; without them, eager.
    """

    def __init__(self, model, compile_config=None):
        self.model, self.compile_config = model, compile_config

    def __call__(self, past_key_values=None, **inputs):
        is_first = past_key_values is not None and not past_key_values.is_initialized
        if self.compile_config is None or is_first:
            return self.model(past_key_values=past_key_values, **inputs)
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import  # noqa: PLC0415

        try:
            return self.model.get_compiled_call(self.compile_config)(past_key_values=past_key_values, **inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().split("\n")[0]
            logger.warning(
                f"`compile_config` has no effect: the forward of {type(self.model).__name__} could not be compiled "
                f"and runs eagerly ({reason})."
            )
            self.compile_config = None
            return self.model(past_key_values=past_key_values, **inputs)
