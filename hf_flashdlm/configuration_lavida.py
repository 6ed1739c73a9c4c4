"""Configurations of LaViDa: the fields of the original `config.json`, those of LLaDA or Dream and of its images.

Owns the fields that say how images become tokens. Knows nothing of generation settings, tokenizers or pixels.
"""

import ast
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, SiglipVisionConfig

from .configuration_dream import DreamConfig
from .configuration_llada import LLaDAConfig


# The original code can build other vision parts out of the same fields; every released LaViDa has these values.
IMPLEMENTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_vision_select_layer": (-2,),
    "image_aspect_ratio": ("anyres",),
}
PINPOINTS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))


class LavidaConfig(PreTrainedConfig):
    r"""
    Base of the configurations of LaViDa: what an image becomes.

    Args:
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision tower. The original file names a checkpoint instead; defaults to that of all releases, SigLIP
            so400m of 384 pixels without its last layer.
        image_token_id (`int`, *optional*):
            The token that stands for an embedding of an image in a prompt. The original file names none; defaults to
            the first id after the tokenizer's, where the embedding has it.
        image_grid_pinpoints (`list[tuple[int, int]]` or `str`, *optional*):
            Widths and heights in pixels of the grids of tiles that an image may be cut into.
        mm_hidden_size (`int`, *optional*, defaults to 1152):
            Width of the vision tower.

    `mm_projector_type`, `mm_patch_merge_type`, `mm_spatial_pool_mode`, `mm_vision_select_layer` and
    `image_aspect_ratio` have one implemented value each.

    Raises:
        ValueError: If such a field has another value, or if the fields contradict each other.
    """

    sub_configs = {"vision_config": SiglipVisionConfig}
    released_image_token_id = 0

    vision_config: Any = None
    image_token_id: int | None = None
    image_grid_pinpoints: Any = PINPOINTS
    image_aspect_ratio: str = "anyres"
    mm_hidden_size: int = 1152
    mm_projector_type: str = "mlp2x_gelu"
    mm_patch_merge_type: str = "spatial_unpad"
    mm_spatial_pool_mode: str = "bilinear"
    mm_vision_select_layer: int = -2

    def __post_init__(self, **kwargs):
        if self.vision_config is None:
            self.vision_config = {
                "hidden_size": self.mm_hidden_size,
                "intermediate_size": 4304,
                "num_hidden_layers": 26,
                "num_attention_heads": 16,
                "image_size": 384,
                "patch_size": 14,
                "vision_use_head": False,
            }
        if isinstance(self.vision_config, dict):
            self.vision_config = CONFIG_MAPPING["siglip_vision_model"](**self.vision_config)
        pinpoints = self.image_grid_pinpoints
        if isinstance(pinpoints, str):
            pinpoints = ast.literal_eval(pinpoints)
        self.image_grid_pinpoints = [list(point) for point in pinpoints]
        super().__post_init__(**kwargs)
        size = getattr(self, "embedding_size", None) or self.vocab_size
        if self.image_token_id is None and self.released_image_token_id < size:
            self.image_token_id = self.released_image_token_id
        for name, implemented in IMPLEMENTED.items():
            if getattr(self, name) not in implemented:
                raise ValueError(
                    f"`{name}` must be {' or '.join(map(repr, implemented))}, as in every released LaViDa, got "
                    f"{getattr(self, name)!r}: load it with its own code."
                )
        if self.vision_config.hidden_size != self.mm_hidden_size:
            raise ValueError(
                f"`mm_hidden_size` must be the width of the vision tower, {self.vision_config.hidden_size}, got "
                f"{self.mm_hidden_size}: change one of them."
            )


class LavidaLLaDAConfig(LavidaConfig, LLaDAConfig):
    """[`LLaDAConfig`] with the fields of [`LavidaConfig`]."""

    model_type = "llava_llada"
    released_image_token_id = 126349

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """[`~transformers.PreTrainedConfig.from_dict`], but for LLaDA-V, whose file has the same `model_type`."""
        architectures = config_dict.get("architectures") or []
        if "LlavaLLaDAModelLM" in architectures or ("hidden_size" in config_dict and "d_model" not in config_dict):
            raise ValueError(
                "`model_type` 'llava_llada' must be a LaViDa here, got LLaDA-V, whose vision part and weight names "
                "are others: load it with its own code, in a process that does not import hf_flashdlm."
            )
        return super().from_dict(config_dict, **kwargs)


class LavidaDreamConfig(LavidaConfig, DreamConfig):
    """[`DreamConfig`] with the fields of [`LavidaConfig`]."""

    model_type = "llava_dream"
    released_image_token_id = 151667


__all__ = ["LavidaDreamConfig", "LavidaLLaDAConfig"]
