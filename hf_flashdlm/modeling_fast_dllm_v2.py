"""Fast-dLLM v2: Qwen2 with block-causal attention and shifted logits.

Owns the name of the class. Knows nothing of steps, policies, or why a cache is frozen where it is.
"""

from transformers import Qwen2ForCausalLM

from .configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from .modeling_diffusion import DiffusionModelMixin


class Fast_dLLM_QwenForCausalLM(DiffusionModelMixin, Qwen2ForCausalLM):
    r"""
    The Fast-dLLM v2 block diffusion language model, under its original name. See
    [Fast-dLLM v2](https://huggingface.co/papers/2509.26328). `forward` takes the arguments of
    [`~transformers.Qwen2ForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("Efficient-Large-Model/Fast_dLLM_v2_1.5B", dtype="auto")
    ```"""

    config: Fast_dLLM_QwenConfig


__all__ = ["Fast_dLLM_QwenForCausalLM"]
