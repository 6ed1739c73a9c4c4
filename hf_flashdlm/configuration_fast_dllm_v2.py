"""Configuration of Fast-dLLM v2: the fields of the original `config.json`, which are those of Qwen2.

Owns the length of the blocks, the id of the mask token and the shift of the logits. Knows nothing of generation
settings or tokenizers.
"""

from transformers import Qwen2Config

from .configuration_diffusion import DiffusionConfig


class Fast_dLLM_QwenConfig(DiffusionConfig, Qwen2Config):
    r"""
    Configuration of a [`Fast_dLLM_QwenForCausalLM`]: [`~transformers.Qwen2Config`] with the fields below and those of
    [`DiffusionConfig`].

    Args:
        bd_size (`int`, *optional*, defaults to 32):
            Length of the blocks, counted from a row's first token; also called `attention_block_length`.
        mask_token_id (`int`, *optional*, defaults to 151665):
            Id of the mask token, which the original file does not name.
        logits_shift (`int`, *optional*, defaults to 1):
            The logits at position i score the token at position i + `logits_shift`.

    Raises:
        ValueError: If the fields contradict each other.
    """

    model_type = "Fast_dLLM_Qwen"
    attribute_map = {"attention_block_length": "bd_size"}
    released_mask_token_id = 151665

    bd_size: int = 32
    logits_shift: int = 1
    recommended_method: str | None = "fast-dllm-v2"


__all__ = ["Fast_dLLM_QwenConfig"]
