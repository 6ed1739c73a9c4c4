"""SDAR and TraDo: Qwen3 and Qwen3-MoE with block-causal attention.

Owns the names of the classes and the layout of the experts' weights. Knows nothing of steps, policies, or why a cache
is frozen where it is.
"""

from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_sdar import SDARConfig, SDARMoeConfig
from .modeling_diffusion import DiffusionModelMixin


register_checkpoint_conversion_mapping(
    SDARMoeConfig.model_type, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


class SDARForCausalLM(DiffusionModelMixin, Qwen3ForCausalLM):
    r"""
    The SDAR block diffusion language model, under its original name; it also serves TraDo. See
    [SDAR](https://huggingface.co/papers/2510.06303). `forward` takes the arguments of
    [`~transformers.Qwen3ForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("JetLM/SDAR-1.7B-Chat", dtype="auto")
    ```"""

    config: SDARConfig


class SDARMoeForCausalLM(DiffusionModelMixin, Qwen3MoeForCausalLM):
    """SDAR with a mixture of experts, under its original name; see [`SDARForCausalLM`]."""

    config: SDARMoeConfig


__all__ = ["SDARForCausalLM", "SDARMoeForCausalLM"]
