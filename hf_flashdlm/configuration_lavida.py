"""Configurations of LaViDa and LLaDA-V: the fields of the original `config.json`, of the text model and of its images.

Owns the fields that say how images become tokens. Knows nothing of generation settings, tokenizers or pixels.
"""

import ast
import re
from math import ceil
from typing import Any

from transformers import CONFIG_MAPPING, LlamaConfig, PreTrainedConfig, SiglipVisionConfig

from .configuration_diffusion import DiffusionConfig
from .configuration_dream import DreamConfig
from .configuration_llada import LLaDAConfig


# The original code can build other vision parts out of the same fields; every released checkpoint has these values.
IMPLEMENTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_vision_select_layer": (-2,),
}
PINPOINTS = ((384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152))


class LavidaConfig(PreTrainedConfig):
    r"""
    Base of the configurations of models that see images: what an image becomes.

    Args:
        vision_config (`SiglipVisionConfig` or `dict`, *optional*):
            The vision tower. The original file names a checkpoint instead; defaults to that of all releases, SigLIP
            so400m of 384 pixels without its last layer.
        image_token_id (`int`, *optional*):
            The token that stands for an embedding of an image in a prompt. The original file names none; defaults to
            the first id after the tokenizer's, where the embedding has it.
        image_grid_pinpoints (`list[tuple[int, int]]` or `str`, *optional*):
            Widths and heights in pixels of the grids of tiles that an image may be cut into; or the smallest and the
            largest grid in tiles, such as `"(1x1),...,(6x6)"`, for all between them.
        image_aspect_ratio (`str`, *optional*, defaults to `"anyres"`):
            `"anyres_max_4"` scales the embeddings of a grid down to those of about four tiles.
        pool_tiles (`bool`, *optional*, defaults to `True`):
            Whether a tile has half as many embeddings in each direction as patches. The original code of LaViDa reads
            it from an environment variable: `False` for `lavida-llada-1.0-lowres`.
        mm_hidden_size (`int`, *optional*, defaults to 1152):
            Width of the vision tower.

    `mm_projector_type`, `mm_patch_merge_type`, `mm_spatial_pool_mode` and `mm_vision_select_layer` have one
    implemented value each.

    Raises:
        ValueError: If such a field has another value, or if the fields contradict each other.
    """

    sub_configs = {"vision_config": SiglipVisionConfig}
    released_image_token_id = 0

    vision_config: Any = None
    image_token_id: int | None = None
    image_grid_pinpoints: Any = PINPOINTS
    image_aspect_ratio: str = "anyres"
    pool_tiles: bool = True
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
        self.image_grid_pinpoints = _pinpoints(self.image_grid_pinpoints, self.vision_config.image_size)
        super().__post_init__(**kwargs)
        size = getattr(self, "embedding_size", None) or self.vocab_size
        if self.image_token_id is None and self.released_image_token_id < size:
            self.image_token_id = self.released_image_token_id
        for name, implemented in IMPLEMENTED.items():
            if getattr(self, name) not in implemented:
                raise ValueError(
                    f"`{name}` must be {' or '.join(map(repr, implemented))}, as in every released checkpoint of "
                    f"{self.model_type}, got {getattr(self, name)!r}: load it with its own code."
                )
        if not re.fullmatch(r"anyres(_max_[1-9]\d*)?", str(self.image_aspect_ratio)):
            raise ValueError(
                f"`image_aspect_ratio` must be 'anyres' or 'anyres_max_' and a number of tiles, got "
                f"{self.image_aspect_ratio!r}: load it with its own code."
            )
        if self.vision_config.hidden_size != self.mm_hidden_size:
            raise ValueError(
                f"`mm_hidden_size` must be the width of the vision tower, {self.vision_config.hidden_size}, got "
                f"{self.mm_hidden_size}: change one of them."
            )

    @property
    def max_tiles(self) -> int | None:
        """This many tiles have as many embeddings as a larger grid is scaled down to."""
        number = self.image_aspect_ratio.removeprefix("anyres").removeprefix("_max_")
        return int(number) if number else None

    @property
    def tile_side(self) -> int:
        """Embeddings of a tile in each direction."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return ceil(side / 2) if self.pool_tiles else side


def _pinpoints(pinpoints, size: int) -> list[list[int]]:
    """Widths and heights in pixels of grids, whatever the form they have in the file."""
    found, grids = pinpoints, []
    if isinstance(pinpoints, str):
        corners = [tuple(map(int, pair)) for pair in re.findall(r"(\d{1,3})x(\d{1,3})", pinpoints)]
        found = _between(corners[0], corners[-1], size) if corners else ast.literal_eval(pinpoints)
    for grid in found or [()]:
        if len(grid) != 2 or not all(isinstance(side, int) and side > 0 and side % size == 0 for side in grid):
            raise ValueError(
                f"`image_grid_pinpoints` must be widths and heights in multiples of a tile's {size} pixels, got "
                f"{pinpoints!r}: change one of them."
            )
        grids.append(list(grid))
    return grids


def _between(smallest: tuple[int, ...], largest: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Widths and heights in pixels of all grids from the smallest to the largest, which are in tiles."""
    widths, heights = (range(low, high + 1) for low, high in zip(smallest, largest, strict=True))
    return [(width * size, height * size) for width in widths for height in heights]


class LLaDAVConfig(LavidaConfig, DiffusionConfig, LlamaConfig):
    """[`~transformers.LlamaConfig`] with the fields of [`DiffusionConfig`] and [`LavidaConfig`]."""

    model_type = "llava_llada"
    released_mask_token_id = 126336
    released_image_token_id = 126349

    vocab_size: int = 126464
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    image_aspect_ratio: str = "anyres_max_4"
    image_grid_pinpoints: Any = "(1x1),...,(6x6)"
    pool_tiles: bool = False


class LavidaLLaDAConfig(LavidaConfig, LLaDAConfig):
    """[`LLaDAConfig`] with the fields of [`LavidaConfig`]."""

    model_type = "llava_llada"
    released_image_token_id = 126349

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As of Transformers; a file of LLaDA-V, which has the same `model_type`, makes an [`LLaDAVConfig`]."""
        if "hidden_size" in config_dict and "d_model" not in config_dict:
            return LLaDAVConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class LavidaDreamConfig(LavidaConfig, DreamConfig):
    """[`DreamConfig`] with the fields of [`LavidaConfig`]."""

    model_type = "llava_dream"
    released_image_token_id = 151667


__all__ = ["LLaDAVConfig", "LavidaDreamConfig", "LavidaLLaDAConfig"]
