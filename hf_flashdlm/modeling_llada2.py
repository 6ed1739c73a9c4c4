"""LLaDA2.0 and LLaDA2.1: GLM-4-MoE with block-causal attention, under the original checkpoint key names.

Owns the name of the class and how the original weights become those of GLM-4-MoE, and back when saved. Knows nothing
of steps, policies, or why a cache is frozen where it is.
"""

import torch
from transformers import Glm4MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from .configuration_llada2 import LLaDA2MoeConfig
from .modeling_diffusion import DiffusionModelMixin


class SplitHeads(ConversionOps):
    """Rows of all query heads, all key heads, all value heads: one tensor becomes three."""

    # An operation of Transformers returns a tensor for each name, whatever its base class declares.
    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config=None, **kwargs) -> dict[str, torch.Tensor]:  # type: ignore[override]
        (tensors,) = input_dict.values()
        fused = tensors[0] if isinstance(tensors, list) else tensors
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts = fused.split([number * config.head_dim for number in heads])
        return {name: part.contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


class LLaDA2MoeModelLM(DiffusionModelMixin, Glm4MoeForCausalLM):
    r"""
    The LLaDA2.0 and LLaDA2.1 block diffusion language model, under its original name. See
    [LLaDA2.0](https://huggingface.co/papers/2512.15745). `forward` takes the arguments of
    [`~transformers.Glm4MoeForCausalLM`] with what [`DiffusionModelMixin`] says of them.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("inclusionAI/LLaDA2.0-mini", dtype="auto")
    ```"""

    config: LLaDA2MoeConfig  # type: ignore[assignment]  # it has the fields of GLM-4-MoE under its own names

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        for layer in self.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.norm_topk_prob = config.num_experts_per_tok > 1  # as in the original code


def _split(kind: str) -> WeightConverter:
    # A pattern of the last names alone is the same before and after the modules are renamed, in either direction.
    return WeightConverter(
        f"query_key_value.{kind}", [f"{name}_proj.{kind}" for name in ("q", "k", "v")], operations=[SplitHeads()]
    )


register_checkpoint_conversion_mapping(
    LLaDA2MoeConfig.model_type,
    [
        *get_checkpoint_conversion_mapping("glm4_moe"),
        WeightRenaming(r"^model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.", ".self_attn."),
        WeightRenaming(r"\.self_attn\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.self_attn\.key_layernorm\.", ".self_attn.k_norm."),
        WeightRenaming(r"\.self_attn\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.mlp\.gate\.expert_bias", ".mlp.gate.e_score_correction_bias"),
        _split("weight"),
        _split("bias"),
    ],
    overwrite=True,
)


__all__ = ["LLaDA2MoeModelLM"]
