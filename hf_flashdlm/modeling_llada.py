"""LLaDA: a Llama-like transformer with bidirectional attention, under the original checkpoint key names.

Owns the weights, bidirectional attention and rotary positions. Knows nothing of steps, blocks, policies, or why a
cache is frozen where it is.

Shapes: B batch, T positions fed to this call, K keys attended to (cached and fed), D `d_model`, H heads.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compiling import CACHE_NAME, takes_past_key_values
from .configuration_llada import LLaDAConfig
from .diffusion_loss import takes_loss_weights
from .fused_layers import FusedRMSNorm, FusedRotaryEmbedding, attend
from .generation_mixin import FlashDLMGenerationMixin


class LLaDARotaryEmbedding(FusedRotaryEmbedding):
    """Angles in float32, as LLaDA rotates: in bfloat16 the angle of a far position would be rounded away."""

    keeps_float32 = True


class LLaDABlock(GradientCheckpointingLayer):
    """
    Attention and feed-forward layer of one depth. Both sit in one module because the original checkpoint has no level
    between the block and its projections.
    """

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.d_model // config.n_heads
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False

        qkv_bias = config.include_bias or config.include_qkv_bias
        kv_size = config.n_kv_heads * self.head_dim
        self.attn_norm = FusedRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=qkv_bias)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=config.include_bias)
        self.ff_norm = FusedRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=config.include_bias)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=config.include_bias)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=config.include_bias)
        self.dropout = nn.Dropout(config.residual_dropout)

    @takes_past_key_values
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`):
                What the block below gave.
            attention_mask (`torch.Tensor`, *optional*):
                Mask in the form of the attention backend; `None` lets every position see every other.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`):
                Of [`LLaDARotaryEmbedding`], of shape `(batch_size, sequence_length, head_dim)`, float32.
            cache (`Cache`, *optional*):
                Takes the keys and values of this call and gives back those to attend to.

        Returns:
            `tuple(torch.Tensor, torch.Tensor)`: the hidden states of shape `(batch_size, sequence_length, d_model)`
            and the attention weights of shape `(batch_size, n_heads, sequence_length, key_length)`, `None` where the
            backend does not give them.
        """
        # Backends read causality off this argument when there is no mask; a caller's value would clash with the mask.
        kwargs["is_causal"] = self.is_causal
        attention_output, attention_weights = attend(
            self, self.attn_norm(hidden_states), position_embeddings, attention_mask, cache, **kwargs
        )
        hidden_states = hidden_states + self.dropout(self.attn_out(attention_output))
        normed = self.ff_norm(hidden_states)
        feed_forward_output = self.ff_out(nn.functional.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return hidden_states + self.dropout(feed_forward_output), attention_weights


class LLaDAPreTrainedModel(PreTrainedModel):
    """What Transformers has to know of both LLaDA classes to load, place, compile and observe them."""

    config: LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDABlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LLaDABlock, "attentions": LLaDABlock}


class LLaDAModel(LLaDAPreTrainedModel):
    """
    LLaDA up to its last hidden states. It holds the output head, too, without applying it, because the original
    checkpoint keeps the head beside the blocks: `model.transformer.ff_out`.
    """

    _tied_weights_keys = {"transformer.ff_out.weight": "transformer.wte.weight"}

    def __init__(self, config: LLaDAConfig):
        if getattr(config, "num_experts", None) is not None:
            raise ValueError(
                f"`config` must be that of a dense LLaDA, got a {type(config).__name__}, which counts experts: load "
                "the checkpoint with `LLaDAMoEModelLM` or `AutoModelForCausalLM`."
            )
        super().__init__(config)
        # As in the original, a head that is the embedding has no bias.
        head_bias = config.include_bias and not config.weight_tying
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList([LLaDABlock(config, layer_idx) for layer_idx in range(config.n_layers)]),
                "ln_f": FusedRMSNorm(config.d_model, eps=config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=head_bias),
            }
        )
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.rotary_emb = LLaDARotaryEmbedding(config)  # type: ignore[arg-type]  # it has the fields of Llama under its own names
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module):
        self.transformer.wte = value

    @takes_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # the keywords of Transformers hold `position_ids`, too
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """
        Takes the arguments of [`LLaDAModelLM.forward`] that do not concern the head.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPast`]: `last_hidden_state` of shape
            `(batch_size, sequence_length, d_model)`, after the last norm.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {given}: pass one.")
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)  # (B, T, D)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)  # (1, T)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
        )

        hidden_states = self.embedding_dropout(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for block in self.transformer.blocks:
            hidden_states, _ = block(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        kept: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.transformer.ln_f(hidden_states), **kept)


class LLaDAModelLM(FlashDLMGenerationMixin, LLaDAPreTrainedModel):
    r"""
    The LLaDA masked diffusion language model with its output head, under its original name: it is what `AutoModel`
    loads, too. See [Large Language Diffusion Models](https://huggingface.co/papers/2502.09992).

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype="auto")
    ```"""

    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}
    _tp_plan = {"model.transformer.ff_out": "colwise_gather_output"}

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        # The loss of Transformers that leaves labels where they are: row i scores position i.
        self.loss_type = "ForMaskedLM"
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.model.transformer.ff_out

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.model.transformer.ff_out = new_embeddings

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """[`~transformers.PreTrainedModel.resize_token_embeddings`] that keeps `config.embedding_size` in step."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embeddings.weight.shape[0]
        return embeddings

    @takes_past_key_values
    @takes_loss_weights
    @can_return_tuple
    def forward(  # type: ignore[misc]  # as above
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The canvas, or the part of it after the positions in `cache`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                1 for positions to attend to and 0 for padding, over the cached positions, too. A mask of four
                dimensions is used as it is.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions for the rotary embedding. Defaults to counting from the cached length, padding included.
            cache (`Cache`, *optional*):
                Keys and values of positions that are not computed again. Those of this call are added to it.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, d_model)`, *optional*):
                Embeddings instead of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The token of each masked position, in place, and -100 elsewhere. The loss is the mean cross-entropy.
            use_cache (`bool`, *optional*, defaults to `config.use_cache`):
                Whether to give back the cache, and to create one where none was given.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits only for that many last positions (0 for all), or for the positions in a tensor of one
                dimension, counted within `input_ids`.
            loss_weights (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Factor of the cross-entropy of each label.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` of shape
            `(batch_size, num_kept, config.embedding_size)`, row i scoring position i itself.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.transformer.ff_out(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["LLaDAModel", "LLaDAModelLM", "LLaDAPreTrainedModel"]
