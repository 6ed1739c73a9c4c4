"""Configurations of A2D models: the fields of the Qwen3, Qwen2 or Llama that dllm made a diffusion model of.

Owns how an MDLM is told from a BD3LM and the id of the mask token. Knows nothing of generation settings or tokenizers.
"""

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from .configuration_diffusion import DiffusionConfig, repository_name


class A2DConfig(DiffusionConfig):
    r"""
    Base of the configurations of A2D models, with the fields below and those of [`DiffusionConfig`].

    Args:
        attention_block_length (`int`, *optional*):
            Length of the blocks of a BD3LM; without it attention is bidirectional, as an MDLM's. The original file
            does not tell them apart: it defaults to 32 for a checkpoint with "bd3lm" in its name.
        attention_block_origin (`str`, *optional*, defaults to `"prompt"`):
            Where attention blocks are counted from, see [`make_block_causal`].
        mask_token_id (`int`, *optional*):
            Id of the mask token, which the original file does not name: the tokenizer's first one after its source
            model's. Defaults to 151669 for Qwen3 and 151665 for Qwen2; for Llama it has to be given.

    Raises:
        ValueError: If the fields contradict each other.
    """

    attention_block_length: int | None = None
    attention_block_origin: str = "prompt"

    def __post_init__(self, **kwargs):
        if self.attention_block_length is None and "bd3lm" in repository_name(kwargs.get("name_or_path", "")).lower():
            self.attention_block_length = 32
        if self.recommended_method is None and self.attention_block_length is not None:
            self.recommended_method = "bd3lm"
        super().__post_init__(**kwargs)


class A2DQwen3Config(A2DConfig, Qwen3Config):
    """[`~transformers.Qwen3Config`] with the fields of [`A2DConfig`]."""

    model_type = "a2d-qwen3"
    released_mask_token_id = 151669


class A2DQwen2Config(A2DConfig, Qwen2Config):
    """[`~transformers.Qwen2Config`] with the fields of [`A2DConfig`]."""

    model_type = "a2d-qwen2"
    released_mask_token_id = 151665


class A2DLlamaConfig(A2DConfig, LlamaConfig):
    """[`~transformers.LlamaConfig`] with the fields of [`A2DConfig`]."""

    model_type = "a2d-llama"


__all__ = ["A2DLlamaConfig", "A2DQwen2Config", "A2DQwen3Config"]
