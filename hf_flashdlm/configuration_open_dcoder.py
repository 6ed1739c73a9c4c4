"""Configuration of Open-dCoder: the fields of the original `config.json`, which are those of Qwen2.

Owns the id of the mask token and the shift of the logits. Knows nothing of generation settings or tokenizers.
"""

from transformers import Qwen2Config

from .configuration_diffusion import DiffusionConfig


class OpenDCoderConfig(DiffusionConfig, Qwen2Config):
    r"""
    Configuration of an [`OpenDCoderModel`]: [`~transformers.Qwen2Config`] with the fields below and those of
    [`DiffusionConfig`]. The `model_type` of the original file is that of Qwen2.

    Args:
        mask_token_id (`int`, *optional*, defaults to 151665):
            Id of the mask token, which the original file does not name.
        logits_shift (`int`, *optional*, defaults to 1):
            The logits at position i score the token at position i + `logits_shift`.

    Raises:
        ValueError: If the fields contradict each other.
    """

    model_type = "open_dcoder"
    released_mask_token_id = 151665

    logits_shift: int = 1

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As of Transformers; a file of Qwen2, as the original is, becomes one of this class."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == Qwen2Config.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs


__all__ = ["OpenDCoderConfig"]
