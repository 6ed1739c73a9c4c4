"""Configuration of LLaDA: the fields of the original `config.json`, read unchanged.

Owns the sizes of the architecture, the ids of its special tokens and the refusal of architecture switches that
`modeling_llada` does not implement. Knows nothing of generation settings or tokenizers.
"""

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.versions import require_version

from .configuration_llada_moe import LLaDAMoEConfig


require_version("transformers>=5.18", "hf_flashdlm needs it: `pip install -U transformers`.")


# The original code can build other architectures out of the same fields; every released LLaDA has these values.
IMPLEMENTED_SWITCHES = {
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "rope": True,
    "alibi": False,
    "clip_qkv": None,
    "input_emb_norm": False,
    "scale_logits": False,
    "is_causal": False,
}


class LLaDAConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LLaDAModelLM`]. The defaults are those of
    [GSAI-ML/LLaDA-8B-Instruct](https://huggingface.co/GSAI-ML/LLaDA-8B-Instruct). The fields keep their original
    names; `attribute_map` also offers them under the names of Transformers (`hidden_size` is `d_model`).

    Args:
        vocab_size (`int`, *optional*, defaults to 126464):
            Number of tokens of the tokenizer.
        embedding_size (`int`, *optional*, defaults to `vocab_size`):
            Number of rows of the embedding and of the output head, which may be padded beyond `vocab_size`.
        d_model (`int`, *optional*, defaults to 4096):
            Width of the hidden states.
        n_layers (`int`, *optional*, defaults to 32):
            Number of blocks.
        n_heads (`int`, *optional*, defaults to 32):
            Number of query heads.
        n_kv_heads (`int`, *optional*):
            Number of key and value heads. Defaults to 1 with `multi_query_attention`, else to `n_heads`.
        multi_query_attention (`bool`, *optional*):
            Whether all query heads share one key and value head. `None` leaves the number to `n_kv_heads`.
        mlp_hidden_size (`int`, *optional*):
            Width of the feed-forward layers. Defaults to `mlp_ratio * d_model`.
        mlp_ratio (`int`, *optional*, defaults to 4):
            Ratio of the width of the feed-forward layers to `d_model`, used if `mlp_hidden_size` is not given.
        max_sequence_length (`int`, *optional*, defaults to 4096):
            Longest canvas the model was trained on.
        rope_theta (`float`, *optional*, defaults to 500000.0):
            Base of the rotary embedding. A value in `rope_parameters` wins.
        rope_parameters (`RopeParameters`, *optional*):
            The rotary embedding in the form of Transformers v5.
        rope_full_precision (`bool`, *optional*, defaults to `True`):
            Kept from the original file. The rotary embedding is always computed in float32.
        rms_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the RMS norms.
        include_bias (`bool`, *optional*, defaults to `False`):
            Whether the linear layers have a bias.
        include_qkv_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value projections have a bias.
        weight_tying (`bool`, *optional*, defaults to `False`):
            Whether the output head is the embedding.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights.
        residual_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of what each attention and feed-forward layer adds to the hidden states.
        embedding_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the embeddings.
        init_std (`float`, *optional*, defaults to 0.02):
            Standard deviation of newly initialized weights.
        mask_token_id (`int`, *optional*, defaults to 126336):
            Id of the mask token.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to 126081):
            Id of the end-of-sequence token.
        pad_token_id (`int`, *optional*, defaults to 126081):
            Id of the padding token.
        bos_token_id (`int`, *optional*):
            Id of the beginning-of-sequence token.
        use_cache (`bool`, *optional*, defaults to `False`):
            Whether a forward pass without `cache` creates a cache.
        logits_shift (`int`, *optional*, defaults to 0):
            The logits at position i score the token at position i + `logits_shift`.

    `block_type`, `block_group_size`, `activation_type`, `layer_norm_type`, `layer_norm_with_affine`,
    `bias_for_layer_norm`, `attention_layer_norm`, `rope`, `alibi`, `clip_qkv`, `input_emb_norm`, `scale_logits` and
    `is_causal` have one implemented value each.

    Raises:
        ValueError: if such a field has another value, or if sizes contradict each other.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    base_model_tp_plan = {
        "transformer.blocks.*.q_proj": "colwise",
        "transformer.blocks.*.k_proj": "colwise",
        "transformer.blocks.*.v_proj": "colwise",
        "transformer.blocks.*.attn_out": "rowwise",
        "transformer.blocks.*.ff_proj": "colwise",
        "transformer.blocks.*.up_proj": "colwise",
        "transformer.blocks.*.ff_out": "rowwise",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    multi_query_attention: bool | None = None
    mlp_hidden_size: int | None = 12288
    mlp_ratio: int = 4
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rope_parameters: RopeParameters | dict | None = None
    rope_full_precision: bool = True
    rms_norm_eps: float = 1e-5
    include_bias: bool = False
    include_qkv_bias: bool = False
    weight_tying: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    init_std: float = 0.02
    mask_token_id: int = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    bos_token_id: int | None = None
    use_cache: bool = False
    logits_shift: int = 0

    block_type: str = "llama"
    block_group_size: int = 1
    activation_type: str = "silu"
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    attention_layer_norm: bool = False
    rope: bool = True
    alibi: bool = False
    clip_qkv: float | None = None
    input_emb_norm: bool = False
    scale_logits: bool = False
    is_causal: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As of Transformers; a file of LLaDA-MoE, which has the same `model_type`, makes an [`LLaDAMoEConfig`]."""
        if config_dict.get("num_experts") is not None:
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Sizes may be given by their names in `attribute_map`, which the line above resolves.
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.bias_for_layer_norm is None:
            self.bias_for_layer_norm = self.include_bias
        # The original code reads `rope_theta` and would ignore `rope_parameters`, so a saved file must agree on both.
        self.rope_theta = self.rope_parameters["rope_theta"]
        self._check_switches()
        self._check_sizes()

    def _check_switches(self):
        for name, implemented in IMPLEMENTED_SWITCHES.items():
            value = getattr(self, name)
            if value != implemented:
                raise ValueError(
                    f"`{name}` must be {implemented!r}, as in every released LLaDA, got {value!r}: "
                    "load this checkpoint with the modeling code it was trained with."
                )

    def _check_sizes(self):
        if self.d_model % self.n_heads != 0:
            raise ValueError(
                f"`d_model` must be a multiple of `n_heads` ({self.n_heads}), got {self.d_model}: change one of them."
            )
        if self.n_heads % self.n_kv_heads != 0:
            raise ValueError(
                f"`n_kv_heads` must divide `n_heads` ({self.n_heads}), got {self.n_kv_heads}: change one of them."
            )
        expected = {None: self.n_kv_heads, True: 1, False: self.n_heads}[self.multi_query_attention]
        if self.n_kv_heads != expected:
            raise ValueError(
                f"`n_kv_heads` must be {expected} when `multi_query_attention` is {self.multi_query_attention}, "
                f"got {self.n_kv_heads}: set `multi_query_attention` to None to choose the number freely."
            )
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"`embedding_size` must be at least `vocab_size` ({self.vocab_size}), got {self.embedding_size}: "
                "leave it out to use `vocab_size`."
            )


__all__ = ["LLaDAConfig"]
