"""LaViDa and LLaDA-V: LLaDA and Dream that see images, under the original checkpoint key names.

Owns how pixels become embeddings, and how a forward of its own puts them in place of image tokens. Knows nothing of
steps, policies, or of how a decode feeds them.
"""

from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import Cache, LlamaForCausalLM, LlamaModel, PreTrainedModel, Qwen2Model, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionEmbeddings

from .compiling import CACHE_NAME
from .configuration_lavida import LavidaDreamConfig, LavidaLLaDAConfig, LLaDAVConfig
from .fused_layers import fuse_layers
from .generation_mixin import FlashDLMGenerationMixin, make_bidirectional
from .images import Images
from .modeling_diffusion import DiffusionModelMixin
from .modeling_dream import DreamModel
from .modeling_llada import LLaDAModel, LLaDAModelLM


class VisionTransformer(nn.Module):
    """SigLIP up to its last hidden states, without a norm after them."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # in the checkpoint only

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Hidden states `(num_tiles, num_patches, hidden_size)` of tiles `(num_tiles, 3, size, size)`."""
        return self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state


class LavidaBase(PreTrainedModel):
    """The vision part of a base model, for a subclass of it and of the text model."""

    def __init__(self, config):
        super().__init__(config)
        vision, width = config.vision_config, config.hidden_size
        if vision._attn_implementation is None:  # its modules are no model, whose `__init__` would choose
            vision._attn_implementation = config._attn_implementation
        tower = nn.ModuleDict({"vision_tower": nn.ModuleDict({"vision_model": VisionTransformer(vision)})})
        self.vision_tower: Any = tower
        projector = [nn.Linear(config.mm_hidden_size, width), nn.GELU(), nn.Linear(width, width)]
        self.mm_projector: Any = nn.Sequential(*projector)
        self.image_newline = nn.Parameter(torch.randn(width) / sqrt(width))
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SiglipVisionEmbeddings):  # a buffer that no checkpoint holds
            initialization.copy_(module.position_ids, torch.arange(module.num_positions)[None])

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        r"""
        The embeddings of images (https://arxiv.org/abs/2505.16839, section 3.1).

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_tiles, 3, size, size)`):
                The tiles of each image, the whole image first; filled up where an image has fewer than others.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`): Height and width of each image in pixels.
            batch_num_images (`torch.LongTensor`, *optional*):
                Number of images of each prompt: those of a prompt of several have one tile.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: `pooler_output` is a list with a tensor
            `(num_tokens, hidden_size)` for each image.

        Raises:
            ValueError: If the shapes are not those of each other or of the model.
        """
        sizes, num_tiles = self._check_images(pixel_values, image_sizes, batch_num_images)
        tiles = torch.cat([tiles[:number] for tiles, number in zip(pixel_values, num_tiles, strict=True)])
        weight = self.mm_projector[0].weight
        states = self.mm_projector(self.vision_tower.vision_tower.vision_model(tiles.to(weight)))
        pooled = self._pool(states).split(num_tiles)
        packed: Any = [self._pack(one, image) for one, image in zip(pooled, sizes, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=packed)

    def _check_images(self, pixel_values, image_sizes, batch_num_images):
        """The height and width of each image, and its number of tiles; refuses what the processor would not return."""
        size, count = self.config.vision_config.image_size, len(pixel_values)
        if pixel_values.ndim != 5 or pixel_values.shape[2:] != (3, size, size):
            raise ValueError(
                f"`pixel_values` must have the shape (num_images, num_tiles, 3, {size}, {size}), got "
                f"{tuple(pixel_values.shape)}: pass what the processor of the model returns."
            )
        if image_sizes is None or image_sizes.shape != (count, 2):
            got = None if image_sizes is None else tuple(image_sizes.shape)
            raise ValueError(
                f"`image_sizes` must hold the height and width of each of the {count} images, got {got}: pass all "
                "that the processor returns."
            )
        counts = [1] * count if batch_num_images is None else batch_num_images.tolist()
        if sum(counts) != count:
            raise ValueError(
                f"`batch_num_images` must add up to the {count} images, got {counts}: pass all that the processor "
                "returns."
            )
        are_single = [number == 1 for number in counts for _ in range(number)]
        sizes, num_tiles = image_sizes.tolist(), []
        for (height, width), is_single in zip(sizes, are_single, strict=True):
            num_tiles.append(image_size_to_num_patches((height, width), self._pinpoints, size) if is_single else 1)
            if num_tiles[-1] > pixel_values.shape[1]:
                raise ValueError(
                    f"`pixel_values` must hold the {num_tiles[-1]} tiles of an image of {height} x {width} pixels, "
                    f"got {pixel_values.shape[1]}: pass what the processor of the model returns."
                )
        return sizes, num_tiles

    @property
    def _pinpoints(self) -> list[tuple[int, int]]:
        """The grids as Transformers has them: height and width."""
        return [(height, width) for width, height in self.config.image_grid_pinpoints]

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """As many tokens as a tile has: `(num_tiles, hidden_size, side, side)`."""
        grid = states.unflatten(1, (int(sqrt(states.shape[1])), -1)).permute(0, 3, 1, 2)
        side = self.config.tile_side
        return interpolate(grid, (side, side), mode="bilinear") if self.config.pool_tiles else grid

    def _pack(self, tiles: torch.Tensor, image_size: list[int]) -> torch.Tensor:
        """The tokens of one image from its tiles `(num_tiles, hidden_size, side, side)`: rows end with a newline."""
        whole = tiles[0].flatten(1).T
        newline = self.image_newline.to(whole)
        if len(tiles) == 1:
            return torch.cat([whole, newline[None]])
        rows, columns = get_anyres_image_grid_shape(image_size, self._pinpoints, self.config.vision_config.image_size)
        grid = tiles[1:].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)
        grid = unpad_image(grid, image_size)
        if self.config.max_tiles is not None:
            height, width = grid.shape[1:]
            ratio = sqrt(height * width / (self.config.max_tiles * self.config.tile_side**2))
            if ratio > 1.1:
                grid = interpolate(grid[None], (int(height // ratio), int(width // ratio)), mode="bilinear")[0]
        grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=-1)
        return torch.cat([whole, grid.flatten(1).T])


class LavidaLLaDAModel(LavidaBase, LLaDAModel):
    """LLaDA with the vision part of LaViDa, up to its last hidden states."""

    config: LavidaLLaDAConfig


class LavidaDreamModel(LavidaBase, Qwen2Model):
    """Dream with the vision part of LaViDa, up to its last hidden states."""

    config: LavidaDreamConfig


class LLaDAVModel(LavidaBase, LlamaModel):
    """The Llama of LLaDA-V with its vision part, up to its last hidden states."""

    config: LLaDAVConfig


class LavidaMixin(FlashDLMGenerationMixin):
    r"""
    For a subclass of it and of a diffusion model that takes `inputs_embeds`. `forward` also takes `pixel_values`,
    `image_sizes` and `batch_num_images`, as [`LavidaBase.get_image_features`] does, or in `mm_encoder_outputs` what
    that has returned; `input_ids` hold `config.image_token_id` where the embeddings of the images go, in order.
    """

    input_modalities = ["image", "text"]
    base_class: type

    def __init__(self, config):
        super().__init__(config)
        self.model = self.base_class(config)
        fuse_layers(self)
        make_bidirectional(self)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        batch_num_images: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """See [`LavidaMixin`] and the forward of the text model."""
        if pixel_values is not None:
            images = self.model.get_image_features(pixel_values, image_sizes, batch_num_images)
            mm_encoder_outputs = {"image": images}
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None and input_ids is not None:
            features = mm_encoder_outputs["image"].pooler_output
            images = Images.of(features, input_ids, input_ids == self.config.image_token_id)
            inputs_embeds, input_ids = images.embed(self, input_ids, slice(0, input_ids.shape[1])), None
        kwargs = {CACHE_NAME: cache} | kwargs
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _expand_multimodal_outputs(self, input_ids, mm_encoder_output, expand_size=1, inputs_embeds=None):
        """Repeat the images of each prompt together; older versions of Transformers repeat them one by one."""
        images, token_id = mm_encoder_output.get("image"), self.config.image_token_id
        if images is None or token_id is None:
            return mm_encoder_output
        left, expanded = list(images.pooler_output), []
        for count in (input_ids == token_id).sum(-1).tolist():
            of_row: list[torch.Tensor] = []
            while left and sum(len(one) for one in of_row) < count:
                of_row.append(left.pop(0))
            expanded += expand_size * of_row
        images = BaseModelOutputWithPooling(images.last_hidden_state, [*expanded, *left])  # type: ignore[arg-type]
        return {**mm_encoder_output, "image": images}


class LlavaLladaForMaskedDiffusion(LavidaMixin, LLaDAModelLM):
    r"""
    LaViDa on LLaDA, under its original name. See [LaViDa](https://huggingface.co/papers/2505.16839).

    Example:

    ```python
    >>> from transformers import AutoModelForImageTextToText
    >>> import hf_flashdlm

    >>> name = "jacklishufan/lavida-llada-v1.0-instruct"
    >>> model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    ```"""

    config: LavidaLLaDAConfig
    base_class = LavidaLLaDAModel


class LlavaDreamForMaskedDiffusion(LavidaMixin, DreamModel):
    """LaViDa on Dream, under its original name; see [`LlavaLladaForMaskedDiffusion`]."""

    config: LavidaDreamConfig
    base_class = LavidaDreamModel


class LlavaLLaDAModelLM(LavidaMixin, DiffusionModelMixin, LlamaForCausalLM):
    """
    LLaDA-V, under its original name: LLaDA as a Llama, with more tiles for an image and none pooled. See
    [LLaDA-V](https://huggingface.co/papers/2505.16933).
    """

    config: LLaDAVConfig
    base_class = LLaDAVModel


__all__ = ["LlavaDreamForMaskedDiffusion", "LlavaLLaDAModelLM", "LlavaLladaForMaskedDiffusion"]
