"""Configuration of Dream: the fields of the original `config.json`, which are those of Qwen2 plus a mask token.

Owns the ids of the special tokens and the declaration that attention is bidirectional. Knows nothing of generation
settings or tokenizers.
"""

from transformers import Qwen2Config
from transformers.utils.versions import require_version


require_version("transformers>=5.18", "hf_flashdlm needs it: `pip install -U transformers`.")


class DreamConfig(Qwen2Config):
    r"""
    Configuration of a [`DreamModel`]: [`~transformers.Qwen2Config`] with the fields below. The defaults are those of
    [Dream-org/Dream-v0-Instruct-7B](https://huggingface.co/Dream-org/Dream-v0-Instruct-7B). DiffuCoder and
    Dream-Coder have the same architecture and the same `model_type`.

    Args:
        rope_theta (`float`, *optional*, defaults to 1000000.0):
            Base of the rotary embedding. A value in `rope_parameters` wins.
        mask_token_id (`int`, *optional*, defaults to 151666):
            Id of the mask token.
        is_causal (`bool`, *optional*, defaults to `False`):
            Must be `False`: Transformers then builds bidirectional masks for the modules of Qwen2.
        logits_shift (`int`, *optional*, defaults to 1):
            The logits at position i score the token at position i + `logits_shift`.

    Raises:
        ValueError: if `is_causal` or `use_sliding_window` is `True`.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    sliding_window: int | None = None
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    mask_token_id: int = 151666
    is_causal: bool = False
    logits_shift: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # The original code reads `rope_theta` and would ignore `rope_parameters`, so a saved file must agree on both.
        self.rope_theta = self.rope_parameters["rope_theta"]
        for name in ("is_causal", "use_sliding_window"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` must be False, because every position of Dream attends to every other, got True: "
                    "load an autoregressive checkpoint as `Qwen2ForCausalLM`."
                )


__all__ = ["DreamConfig"]
