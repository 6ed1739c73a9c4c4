"""Configuration of LLaDA-MoE: the fields of the original `config.json`, read unchanged.

Owns the sizes of the architecture, the ids of its special tokens and the refusal of switches that no released
checkpoint uses. Knows nothing of generation settings or tokenizers.
"""

from transformers import Qwen3MoeConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_diffusion import DiffusionConfig, check_experts


# The original code can build other architectures out of the same fields; every released LLaDA-MoE has these values.
IMPLEMENTED = {
    "qk_layernorm": (True,),
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_score_function": ("softmax",),
    "partial_rotary_factor": (1,),
}


class LLaDAMoEConfig(DiffusionConfig):
    r"""
    Configuration of a [`LLaDAMoEModelLM`]. The defaults are those of
    [inclusionAI/LLaDA-MoE-7B-A1B-Instruct](https://huggingface.co/inclusionAI/LLaDA-MoE-7B-A1B-Instruct). The fields
    keep their original names; `attribute_map` also offers them under the names of [`~transformers.Qwen3MoeConfig`].
    The `model_type` is that of the dense LLaDA, as in the original files: [`LLaDAConfig.from_dict`] makes this
    configuration of those that count experts.

    Args:
        vocab_size (`int`, *optional*, defaults to 157184):
            Number of rows of the embedding and of the output head.
        hidden_size (`int`, *optional*, defaults to 2048):
            Width of the hidden states.
        num_hidden_layers (`int`, *optional*, defaults to 16):
            Number of layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to `num_attention_heads`):
            Number of key and value heads.
        num_experts (`int`, *optional*, defaults to 64):
            Number of experts of a layer.
        num_experts_per_tok (`int`, *optional*, defaults to 8):
            Number of experts that compute a token.
        expert_intermediate_size (`int`, *optional*, defaults to 1024):
            Width of an expert.
        dense_intermediate_size (`int`, *optional*, defaults to 8192):
            Width of the feed-forward layers without experts.
        moe_layer_freq (`list[int]`, *optional*):
            For each layer 1 where it has experts and 0 where not. All have by default.
        max_position_embeddings (`int`, *optional*, defaults to 8192):
            Longest canvas the model was trained on.
        rope_theta (`float`, *optional*, defaults to 50000.0):
            Base of the rotary embedding. A value in `rope_parameters` wins.
        rope_parameters (`RopeParameters`, *optional*):
            The rotary embedding in the form of Transformers v5.
        rms_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the RMS norms.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the feed-forward layers and experts.
        norm_topk_prob (`bool`, *optional*):
            Kept from the original file. The weights of a token's experts are never scaled to a sum of 1.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.01):
            Weight of the loss that balances the experts.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether to return the router's logits, and to add that loss.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output head is the embedding.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of newly initialized weights.
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether a forward pass without a cache creates one.
        mask_token_id (`int`, *optional*, defaults to 156895):
            Id of the mask token, which the original file does not name.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 156892):
            Id of the end-of-sequence token.
        pad_token_id (`int`, *optional*, defaults to 156892):
            Id of the padding token.
        bos_token_id (`int`, *optional*):
            Id of the beginning-of-sequence token.

    `qk_layernorm`, `attention_bias`, `clip_qkv`, `shared_expert_intermediate_size`, `moe_router_enable_expert_bias`,
    `moe_router_score_function` and `partial_rotary_factor` have one implemented value each.

    Raises:
        ValueError: If such a field has another value, or if the fields contradict each other.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
        "num_local_experts": "num_experts",
    }
    base_model_tp_plan = Qwen3MoeConfig.base_model_tp_plan
    base_model_ep_plan = Qwen3MoeConfig.base_model_ep_plan
    base_model_pp_plan = Qwen3MoeConfig.base_model_pp_plan
    released_mask_token_id = 156895
    # What Qwen3-MoE offers beyond LLaDA-MoE.
    decoder_sparse_step = 1
    sliding_window = None

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    num_experts: int = 64
    num_experts_per_tok: int = 8
    expert_intermediate_size: int = 1024
    dense_intermediate_size: int = 8192
    moe_layer_freq: list[int] | None = None
    max_position_embeddings: int = 8192
    rope_theta: float | int = 50000.0
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-5
    hidden_act: str = "silu"
    norm_topk_prob: bool | None = None
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = False
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None

    qk_layernorm: bool = True
    attention_bias: bool = False
    clip_qkv: float | None = None
    shared_expert_intermediate_size: int | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_score_function: str = "softmax"
    partial_rotary_factor: float | int = 1

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.moe_layer_freq is None:
            self.moe_layer_freq = [1] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.require(IMPLEMENTED)
        self._check_sizes()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As of Transformers; refuses a file of the dense LLaDA, which has the same `model_type`."""
        if not {"num_experts", "num_local_experts"} & config_dict.keys():
            raise ValueError(
                "`num_experts` must be given for a LLaDA-MoE, got a config.json without it: load a dense LLaDA with "
                "`LLaDAModelLM` or `AutoModelForCausalLM`."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def mlp_only_layers(self) -> list[int]:
        """The layers without experts, as Qwen3-MoE asks for them."""
        return [layer for layer, has_experts in enumerate(self.moe_layer_freq) if not has_experts]

    def _check_sizes(self):
        if len(self.moe_layer_freq) != self.num_hidden_layers:
            raise ValueError(
                f"`moe_layer_freq` must have an entry for each of the {self.num_hidden_layers} layers, got "
                f"{len(self.moe_layer_freq)}: change one of them."
            )
        check_experts(self.num_experts_per_tok, self.num_experts)


__all__ = ["LLaDAMoEConfig"]
