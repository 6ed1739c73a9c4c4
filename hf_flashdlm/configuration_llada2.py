"""Configuration of LLaDA2.0 and LLaDA2.1: the fields of the original `config.json`, read unchanged.

Owns the sizes of the architecture, the ids of its special tokens and the refusal of switches that no released
checkpoint uses. Knows nothing of generation settings or tokenizers.
"""

from transformers import Glm4MoeConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_diffusion import DiffusionConfig, repository_name


# The original code can build other architectures out of the same fields; every released LLaDA2 has these values.
IMPLEMENTED = {
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32",),
    "moe_router_enable_expert_bias": (True,),
    "norm_topk_prob": (True,),
    "use_bias": (False,),
    "use_rmsnorm": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "using_split_qkv_in_self_attention": (False,),
    "embedding_dropout": (0.0,),
    "output_dropout": (0.0,),
}
# Fields of LLaDA2.2, which inserts and deletes tokens and routes whole blocks.
UNKNOWN_FIELDS = ("expert_capacity", "delete_token_id", "split_token_id")
UNSUPPORTED = (
    "LLaDA2.2 inserts and deletes tokens, which is not supported: load it with its own code, in a process that does "
    "not import hf_flashdlm"
)


class LLaDA2MoeConfig(DiffusionConfig):
    r"""
    Configuration of a [`LLaDA2MoeModelLM`]. The defaults are those of
    [inclusionAI/LLaDA2.0-mini](https://huggingface.co/inclusionAI/LLaDA2.0-mini). The fields keep their original
    names; `attribute_map` also offers them under the names of [`~transformers.Glm4MoeConfig`].

    Args:
        block_size (`int`, *optional*, defaults to 32):
            Length of the attention blocks, counted from a row's first token; also called `attention_block_length`.
        vocab_size (`int`, *optional*, defaults to 157184):
            Number of rows of the embedding and of the output head.
        hidden_size (`int`, *optional*, defaults to 2048):
            Width of the hidden states.
        intermediate_size (`int`, *optional*, defaults to 5120):
            Width of the feed-forward layers without experts.
        moe_intermediate_size (`int`, *optional*, defaults to 512):
            Width of an expert.
        num_hidden_layers (`int`, *optional*, defaults to 20):
            Number of layers.
        first_k_dense_replace (`int`, *optional*, defaults to 1):
            Number of leading layers without experts.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*, defaults to 4):
            Number of key and value heads.
        head_dim (`int`, *optional*):
            Width of a head. Defaults to `hidden_size / num_attention_heads`.
        num_experts (`int`, *optional*, defaults to 256):
            Number of routed experts of a layer.
        num_shared_experts (`int`, *optional*, defaults to 1):
            Number of experts that compute every token.
        num_experts_per_tok (`int`, *optional*, defaults to 8):
            Number of routed experts that compute a token.
        n_group (`int`, *optional*, defaults to 8):
            Number of groups of the routed experts.
        topk_group (`int`, *optional*, defaults to 4):
            Number of groups that a token's experts are chosen from.
        routed_scaling_factor (`float`, *optional*, defaults to 2.5):
            Factor of the routed experts' weights.
        use_qkv_bias (`bool`, *optional*, defaults to `False`):
            Whether the query, key and value projections have a bias.
        use_qk_norm (`bool`, *optional*, defaults to `True`):
            Whether queries and keys are normed.
        max_position_embeddings (`int`, *optional*, defaults to 32768):
            Longest canvas the model was trained on.
        rope_theta (`float`, *optional*, defaults to 600000.0):
            Base of the rotary embedding. A value in `rope_parameters` wins.
        partial_rotary_factor (`float`, *optional*, defaults to 0.5):
            Share of a head that is rotated. A value in `rope_parameters` wins.
        rotary_dim (`int`, *optional*):
            The same as a number of dimensions. Defaults to what `partial_rotary_factor` says.
        rope_parameters (`RopeParameters`, *optional*):
            The rotary embedding in the form of Transformers v5.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06):
            Epsilon of the RMS norms.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the feed-forward layers and experts.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether to return the router's logits.
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
        pad_token_id (`int`, *optional*, defaults to 156892):
            Id of the padding token.
        eos_token_id (`int` or `list[int]`, *optional*, defaults to `pad_token_id`):
            Id of the end-of-sequence token, which the original file does not name.
        bos_token_id (`int`, *optional*):
            Id of the beginning-of-sequence token.

    `score_function`, `router_dtype`, `moe_router_enable_expert_bias`, `norm_topk_prob`, `use_bias`, `use_rmsnorm`,
    `norm_head`, `norm_softmax`, `using_split_qkv_in_self_attention`, `embedding_dropout` and `output_dropout` have one
    implemented value each.

    Raises:
        ValueError: If such a field has another value, or if the fields contradict each other.
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {
        "attention_block_length": "block_size",
        "attention_bias": "use_qkv_bias",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "num_local_experts": "num_experts",
    }
    # Attention stays whole on each process: its weights are a single tensor in a checkpoint, which Transformers would
    # cut before it becomes those of queries, keys and values.
    base_model_tp_plan = {
        name: plan for name, plan in Glm4MoeConfig.base_model_tp_plan.items() if ".self_attn." not in name
    }
    base_model_ep_plan = Glm4MoeConfig.base_model_ep_plan
    base_model_pp_plan = Glm4MoeConfig.base_model_pp_plan
    released_mask_token_id = 156895
    num_mtp_layers = 0  # of GLM-4-MoE, which LLaDA2 has not

    block_size: int = 32
    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    max_position_embeddings: int = 32768
    rope_theta: float | int = 600000.0
    partial_rotary_factor: float | int = 0.5
    rotary_dim: int | None = None
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = False
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None

    score_function: str = "sigmoid"
    router_dtype: str = "fp32"
    moe_router_enable_expert_bias: bool = True
    norm_topk_prob: bool = True
    use_bias: bool = False
    use_rmsnorm: bool = True
    norm_head: bool = False
    norm_softmax: bool = False
    using_split_qkv_in_self_attention: bool = False
    embedding_dropout: float = 0.0
    output_dropout: float = 0.0

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.eos_token_id is None:
            self.eos_token_id = self.pad_token_id
        name = repository_name(kwargs.get("name_or_path", "")).lower()
        if "llada2.2" in name:
            raise ValueError(f"the checkpoint must be of LLaDA2.0 or LLaDA2.1, got {name!r}: {UNSUPPORTED}.")
        if self.recommended_method is None:
            # Nothing but its name tells a checkpoint that edits its tokens from one that does not.
            edits = "llada2.1" in name
            self.recommended_method = "llada2.1" if edits else "llada2"
        super().__post_init__(**kwargs)
        self.partial_rotary_factor = self.rope_parameters["partial_rotary_factor"]
        if self.rotary_dim is None:
            self.rotary_dim = int(self.head_dim * self.partial_rotary_factor)
        present = [name for name in UNKNOWN_FIELDS if getattr(self, name, None) is not None]
        if present:
            raise ValueError(
                f"`{present[0]}` must not be given for LLaDA2.0 or LLaDA2.1, got {getattr(self, present[0])}: "
                f"{UNSUPPORTED}."
            )
        self.require(IMPLEMENTED)
        self._check_sizes()
        self._check_routing()

    def _check_sizes(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` ({self.num_attention_heads}), got "
                f"{self.num_key_value_heads}: change one of them."
            )
        rotary_dim = int(self.head_dim * self.partial_rotary_factor)
        if self.rotary_dim != rotary_dim:
            raise ValueError(
                f"`rotary_dim` must be `head_dim` times `partial_rotary_factor`, {rotary_dim}, got {self.rotary_dim}: "
                "leave it out."
            )

    def _check_routing(self):
        if self.n_group < 1 or self.num_experts % self.n_group or self.num_experts < 2 * self.n_group:
            raise ValueError(
                f"`n_group` must divide `num_experts` ({self.num_experts}) into groups of at least two, got "
                f"{self.n_group}: change one of them."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"`topk_group` must be from 1 to `n_group` ({self.n_group}), got {self.topk_group}: "
                "change one of them."
            )
        most = self.topk_group * self.num_experts // self.n_group
        if not 1 <= self.num_experts_per_tok <= most:
            raise ValueError(
                f"`num_experts_per_tok` must be from 1 to {most}, the experts in `topk_group` groups, got "
                f"{self.num_experts_per_tok}: change one of them."
            )


__all__ = ["LLaDA2MoeConfig"]
