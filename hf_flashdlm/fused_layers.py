"""Layers of few operations: RMS norm, rotary positions and attention of decoders like Llama.

Owns how these are computed, for LLaDA and in place of the layers of Transformers with the same weights and results.
Knows nothing of masks, steps, policies, or why a cache is frozen where it is.

Shapes: B batch, T positions fed to this call, K keys attended to, H query heads, G key and value heads.
"""

from typing import Any

import torch
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2Model, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Model, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from .compiling import takes_past_key_values
from .synchronizing import has_plain_weights


class FusedRMSNorm(LlamaRMSNorm):
    """
    [`~transformers.models.llama.modeling_llama.LlamaRMSNorm`] in one operation, if weight and states have one dtype.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


class _FusedRotaryEmbedding:
    """The forward of a rotary embedding whose sines are negative in the first half, the sign that [`rotate`] needs."""

    keeps_float32 = False
    inv_freq: Any
    attention_scaling: Any

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = position_ids[..., None] * torch.cat((-inv_freq, inv_freq))  # (B or 1, T, rotary_dim), float32
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        return (cos, sin) if self.keeps_float32 else (cos.to(x.dtype), sin.to(x.dtype))


class FusedRotaryEmbedding(_FusedRotaryEmbedding, LlamaRotaryEmbedding):
    """[`~transformers.models.llama.modeling_llama.LlamaRotaryEmbedding`] for [`rotate`]."""


class FusedGlm4MoeRotaryEmbedding(_FusedRotaryEmbedding, Glm4MoeRotaryEmbedding):
    """The embedding of GLM-4-MoE, which rotates the first part of a head alone, for [`rotate`]."""


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Rotate queries and keys together by the angles of their positions, in the dtype of the angles.

    Args:
        query (`torch.Tensor` of shape `(batch_size, sequence_length, n_heads, head_dim)`): Queries.
        key (`torch.Tensor` of shape `(batch_size, sequence_length, n_kv_heads, head_dim)`): Keys.
        cos, sin (`torch.Tensor` of shape `(batch_size, sequence_length, rotary_dim)`):
            From [`FusedRotaryEmbedding`]. What a head has after its first `rotary_dim` numbers stays as it is.

    Returns:
        `tuple`: the same in their own dtype, with heads before positions.
    """
    states = torch.cat((query, key), dim=2)
    rotary_dim = cos.shape[-1]
    turned = states[..., :rotary_dim]
    half = turned.roll(rotary_dim // 2, -1)
    rotated = torch.addcmul(turned * cos.unsqueeze(2), half, sin.unsqueeze(2)).to(states.dtype)
    if rotary_dim < states.shape[-1]:
        rotated = torch.cat((rotated, states[..., rotary_dim:]), dim=-1)
    rotated = rotated.transpose(1, 2)
    return rotated[:, : query.shape[2]], rotated[:, query.shape[2] :]


def attend(
    module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""
    Attention before its output projection.

    Args:
        module (`torch.nn.Module`): Has the projections and settings of an attention module of Transformers.
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): After the norm.
        position_embeddings (`tuple[torch.Tensor, torch.Tensor]`): From [`FusedRotaryEmbedding`].
        attention_mask (`torch.Tensor`, *optional*): In the form of the attention backend.
        cache (`Cache`, *optional*): Takes the keys and values of this call and gives back those to attend to.

    Returns:
        `tuple`: states of shape `(batch_size, sequence_length, n_heads * head_dim)`, and the attention weights, `None`
        where the backend does not give them.
    """
    input_shape = hidden_states.shape[:-1]
    head_shape = (*input_shape, -1, module.head_dim)
    query, key, value = (
        project(hidden_states).view(head_shape) for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = rotate(query, key, *position_embeddings)  # (B, H, T, head_dim), (B, G, T, head_dim)
    value = value.transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)  # (B, G, K, head_dim)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    output, weights = attention(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        sliding_window=getattr(module, "sliding_window", None),
        **kwargs,
    )
    return output.reshape(*input_shape, -1), weights


class _FusedAttention:
    """The forward of an attention module of Transformers, by [`attend`]."""

    @takes_past_key_values
    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        output, weights = attend(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return self.o_proj(output), weights  # type: ignore[attr-defined]  # of the module that this is mixed into


class FusedLlamaAttention(_FusedAttention, LlamaAttention):
    """Attention of Llama by [`attend`]."""


class FusedQwen2Attention(_FusedAttention, Qwen2Attention):
    """Attention of Qwen2 by [`attend`]."""


class FusedQwen3Attention(_FusedAttention, Qwen3Attention):
    """Attention of Qwen3 by [`attend`]."""


class FusedQwen3MoeAttention(_FusedAttention, Qwen3MoeAttention):
    """Attention of Qwen3-MoE by [`attend`]."""


class FusedGlm4MoeAttention(_FusedAttention, Glm4MoeAttention):
    """Attention of GLM-4-MoE by [`attend`]."""


_FUSED: dict[type, type] = {
    LlamaAttention: FusedLlamaAttention,
    Qwen2Attention: FusedQwen2Attention,
    Qwen3Attention: FusedQwen3Attention,
    Qwen3MoeAttention: FusedQwen3MoeAttention,
    Glm4MoeAttention: FusedGlm4MoeAttention,
    Glm4MoeRotaryEmbedding: FusedGlm4MoeRotaryEmbedding,
    **dict.fromkeys((LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Qwen3MoeRMSNorm, Glm4MoeRMSNorm), FusedRMSNorm),
    **dict.fromkeys(
        (LlamaRotaryEmbedding, Qwen2RotaryEmbedding, Qwen3RotaryEmbedding, Qwen3MoeRotaryEmbedding),
        FusedRotaryEmbedding,
    ),
}


def fuse_layers(model: PreTrainedModel) -> None:
    """Let the layers of a decoder like Llama take fewer operations, in place: weights and their names stay."""
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))


def fused_view(model):
    """
    A view of a Llama, Qwen2 or Qwen3 of Transformers with the same weights, settings and hooks, whose layers take
    fewer operations. The model is not changed. Any other model is returned as it is, and so is one whose weights or
    forwards a library has replaced: quantised, sharded, or fetched when they are needed.
    """
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    decoders: list[Any] = [module for module in modules if type(module) in (LlamaModel, Qwen2Model, Qwen3Model)]
    attentions = [getattr(layer, "self_attn", None) for decoder in decoders for layer in decoder.layers]
    is_known = decoders and all(type(attention) in _FUSED for attention in attentions)
    if not is_known or any("forward" in vars(module) for module in modules) or not has_plain_weights(model):
        return model
    return _view(model)


def _view(module: torch.nn.Module) -> torch.nn.Module:
    """The module with those in it that can be fused; what has none of these is not copied."""
    children = {name: child and _view(child) for name, child in module._modules.items()}
    kind = _FUSED.get(type(module), type(module))
    if kind is type(module) and all(child is module._modules[name] for name, child in children.items()):
        return module
    view: Any = object.__new__(kind)
    # Its own buffers: rotary embeddings of some kinds change theirs as texts grow, beside an attribute.
    view.__dict__ = vars(module) | {"_modules": children, "_buffers": dict(module._buffers)}
    return view
