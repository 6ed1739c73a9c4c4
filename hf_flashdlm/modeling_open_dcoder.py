"""Open-dCoder: Qwen2 with bidirectional attention and shifted logits.

Owns the name of the class. Knows nothing of steps, blocks, policies, or why a cache is frozen where it is.
"""

from transformers import Qwen2ForCausalLM

from .configuration_open_dcoder import OpenDCoderConfig
from .modeling_diffusion import DiffusionModelMixin


class OpenDCoderModel(DiffusionModelMixin, Qwen2ForCausalLM):
    r"""
    The Open-dCoder masked diffusion language model (https://github.com/pengzhangzhi/Open-dLLM). `forward` takes the
    arguments of [`~transformers.Qwen2ForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    The original `config.json` is that of an autoregressive Qwen2, which the Auto classes therefore load; this class
    has to be named. What it saves, the Auto classes load as well.

    Example:

    ```python
    >>> from hf_flashdlm import OpenDCoderModel

    >>> model = OpenDCoderModel.from_pretrained("fredzzp/open-dcoder-0.5B", dtype="auto")
    ```"""

    config: OpenDCoderConfig


__all__ = ["OpenDCoderModel"]
