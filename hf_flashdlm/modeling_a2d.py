"""A2D models: a Qwen3, Qwen2 or Llama that dllm made a diffusion model of, MDLM or BD3LM.

Owns the names of the classes. Knows nothing of steps, policies, or why a cache is frozen where it is.
"""

from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from .configuration_a2d import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from .modeling_diffusion import DiffusionModelMixin


class A2DQwen3LMHeadModel(DiffusionModelMixin, Qwen3ForCausalLM):
    r"""
    A diffusion language model made of Qwen3, under its original name: a masked one, whose attention is bidirectional
    (MDLM), or a block diffusion model (BD3LM, https://huggingface.co/papers/2503.09573). `forward` takes the arguments
    of [`~transformers.Qwen3ForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", dtype="auto")
    ```"""

    config: A2DQwen3Config


class A2DQwen2LMHeadModel(DiffusionModelMixin, Qwen2ForCausalLM):
    """The same made of Qwen2, see [`A2DQwen3LMHeadModel`]."""

    config: A2DQwen2Config


class A2DLlamaLMHeadModel(DiffusionModelMixin, LlamaForCausalLM):
    """The same made of Llama, see [`A2DQwen3LMHeadModel`]."""

    config: A2DLlamaConfig


__all__ = ["A2DLlamaLMHeadModel", "A2DQwen2LMHeadModel", "A2DQwen3LMHeadModel"]
