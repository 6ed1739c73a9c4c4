"""Configurations of SDAR and TraDo: the fields of the original `config.json`, which are those of Qwen3.

Owns the length of the blocks and the id of the mask token. Knows nothing of generation settings or tokenizers.
"""

import re

from transformers import Qwen3Config, Qwen3MoeConfig

from .configuration_diffusion import DiffusionConfig, check_experts, repository_name


class _Blocks(DiffusionConfig):
    """What the dense and the mixture-of-experts configuration share."""

    released_mask_token_id = 151669

    block_size: int | None = None
    recommended_method: str | None = "sdar"

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        # The original file names the attention of its training, which Transformers would load the model with.
        config_dict = {name: value for name, value in config_dict.items() if name != "attn_implementation"}
        return super().from_dict(config_dict, **kwargs)

    def __post_init__(self, **kwargs):
        if self.block_size is None:
            named = re.search(r"-b(\d+)\b", repository_name(kwargs.get("name_or_path", "")))
            self.block_size = int(named[1]) if named else 4
        super().__post_init__(**kwargs)


class SDARConfig(_Blocks, Qwen3Config):
    r"""
    Configuration of an [`SDARForCausalLM`]: [`~transformers.Qwen3Config`] with the fields below and those of
    [`DiffusionConfig`]. Checkpoints of TraDo have the same architecture and the same `model_type`.

    Args:
        block_size (`int`, *optional*):
            Length of the blocks, counted from a row's first token; also called `attention_block_length`. Defaults to
            the number after `-b` in the checkpoint's name, or else to 4.
        mask_token_id (`int`, *optional*, defaults to 151669):
            Id of the mask token.

    Raises:
        ValueError: If the fields contradict each other.
    """

    model_type = "sdar"
    attribute_map = {"attention_block_length": "block_size"}


class SDARMoeConfig(_Blocks, Qwen3MoeConfig):
    r"""
    Configuration of an [`SDARMoeForCausalLM`]: [`~transformers.Qwen3MoeConfig`] with the fields of [`SDARConfig`].
    """

    model_type = "sdar_moe"
    # The original file counts the experts as `num_experts`, and so must a saved file.
    attribute_map = {"attention_block_length": "block_size", "num_local_experts": "num_experts"}

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_experts(self.num_experts_per_tok, self.num_experts)


__all__ = ["SDARConfig", "SDARMoeConfig"]
