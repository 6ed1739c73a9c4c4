"""LLaDA-MoE: Qwen3-MoE with bidirectional attention.

Owns the name of the class, the layout of the experts' weights and that their weights for a token are not scaled. Knows
nothing of steps, blocks, policies, or why a cache is frozen where it is.
"""

from transformers import Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_llada_moe import LLaDAMoEConfig
from .modeling_diffusion import DiffusionModelMixin


class LLaDAMoEModelLM(DiffusionModelMixin, Qwen3MoeForCausalLM):
    r"""
    The LLaDA-MoE masked diffusion language model, under its original name. See
    [LLaDA-MoE](https://huggingface.co/papers/2509.24389). `forward` takes the arguments of
    [`~transformers.Qwen3MoeForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", dtype="auto")
    ```"""

    config: LLaDAMoEConfig  # type: ignore[assignment]  # it has the fields of Qwen3-MoE under its own names

    def __init__(self, config: LLaDAMoEConfig):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.norm_topk_prob = False  # whatever the file says, as in the original code


# By the name of the class, because the dense LLaDA has the same `model_type`.
register_checkpoint_conversion_mapping(
    LLaDAMoEModelLM.__name__, get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


__all__ = ["LLaDAMoEModelLM"]
