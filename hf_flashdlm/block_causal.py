"""Block-causal attention: a position sees its own block and the blocks before it.

Owns which positions belong to which attention block, the mask that follows from it, and how a model of Transformers is
given it: by a hook for forwards of its own, by the denoiser in a decode. Knows nothing of steps, of what caches hold,
or where a step may write.

Shapes: B batch, T positions fed to a forward, K keys attended to.
"""

from typing import Any

import torch
from torch.compiler import is_compiling
from torch.nn.functional import pad
from transformers import PreTrainedModel

from .compiling import CACHE_NAME
from .configuration_diffusion import check_block_length, check_block_origin


_PADDING = torch.iinfo(torch.long).max  # padding is a block of its own, after all others: none of them sees it
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds")  # of forward, in order


def make_block_causal(model: PreTrainedModel, block_length: int, origin: str = "row") -> PreTrainedModel:
    r"""
    Let every position of a decoder-only model see its own block and those before it, in place, as a block diffusion
    model trained from its architecture needs (https://arxiv.org/abs/2503.09573, section 3).

    The two settings are kept in the model's config, as `attention_block_length` and `attention_block_origin`, and read
    there by each forward. A forward whose `attention_mask` is missing or of two dimensions gets the block-causal mask;
    one of four dimensions is used as it is, and so is a missing one where `is_causal=False` is passed beside it.

    Args:
        model (`PreTrainedModel`):
            A decoder whose layers all attend to the whole context, with `attn_implementation` `"sdpa"` or `"eager"`.
        block_length (`int`): Length of a block.
        origin (`str`, *optional*, defaults to `"row"`):
            Where blocks are counted from: `"row"` is each row's first token that is not padding. `"prompt"` is the end
            of the prompt, for prompts padded on the left to a multiple of `block_length`, so that blocks begin at its
            multiples in the padded row.

    Returns:
        `PreTrainedModel`: The model.

    Raises:
        ValueError: If the settings or the model do not fit.
    """
    _check(model, block_length, origin)
    drop_causality(model)
    config = model.config.get_text_config()
    config.attention_block_length, config.attention_block_origin = block_length, origin
    decoder = model.base_model
    if _mask_blocks not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_mask_blocks, with_kwargs=True)
    return model


def drop_causality(model: PreTrainedModel) -> None:
    """Let the modules of a decoder, and the masks that Transformers makes for it, no longer be causal."""
    model.config.get_text_config().is_causal = False
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]  # torch declares tensors and submodules alone


def attention_block_length(model: PreTrainedModel) -> int | None:
    """Length of the attention blocks of a model; `None` if its attention has none."""
    return getattr(model.config.get_text_config(), "attention_block_length", None)


def counts_from_row(model: PreTrainedModel) -> bool:
    """Whether attention blocks are counted from the first token of a row, and not from the end of its prompt."""
    return attention_block_length(model) is not None and model.config.get_text_config().attention_block_origin == "row"


class AttentionBlocks:
    r"""
    The attention blocks of a canvas.

    Args:
        block_length (`int`): Length of a block.
        origins (`list[int]`): The column of each row that blocks are counted from, in both directions.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas holds padding.
    """

    def __init__(self, block_length: int, origins: list[int], canvas_mask: torch.Tensor):
        self.block_length, self.origins = block_length, origins
        columns = torch.arange(canvas_mask.shape[1], device=canvas_mask.device)
        blocks = (columns - torch.tensor(origins, device=canvas_mask.device)[:, None]) // block_length
        self.blocks = blocks.masked_fill(canvas_mask == 0, _PADDING)
        self.has_padding = (canvas_mask == 0).any(1).tolist()

    def sees_all(self, lows: list[int], attended: list[int]) -> bool:
        """Whether every query of the rows, which begin at `lows`, sees all keys before `attended`."""
        rows = zip(lows, attended, self.origins, self.has_padding, strict=True)
        length = self.block_length
        return len(set(attended)) == 1 and not any(
            padded or (low - origin) // length != (stop - 1 - origin) // length for low, stop, origin, padded in rows
        )

    def mask(self, feed, attended: list[int], num_keys: int) -> torch.Tensor:
        r"""
        Which keys each query sees.

        Args:
            feed (`slice` or `torch.LongTensor` of shape `(batch_size, T)`): The columns that are fed.
            attended (`list[int]`): The queries of each row see the keys before it.
            num_keys (`int`): Number of keys.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, 1, T, num_keys)`.
        """
        queries = self.blocks[:, feed] if isinstance(feed, slice) else self.blocks.gather(1, feed)
        visible = block_causal_mask(queries, self.blocks[:, :num_keys])
        if min(attended) < num_keys:
            stops = torch.tensor(attended, device=visible.device)[:, None, None, None]
            visible &= torch.arange(num_keys, device=visible.device) < stops
        return visible

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.blocks = self.blocks[indices.to(self.blocks.device)]
        self.origins, self.has_padding = (
            [numbers[index] for index in indices.tolist()] for numbers in (self.origins, self.has_padding)
        )


def block_causal_mask(query_blocks: torch.Tensor, key_blocks: torch.Tensor) -> torch.Tensor:
    """
    Which keys each query sees.

    Args:
        query_blocks (`torch.LongTensor` of shape `(batch_size or 1, T)`): The block of each position fed.
        key_blocks (`torch.LongTensor` of shape `(batch_size or 1, K)`): The block of each key.

    Returns:
        `torch.BoolTensor` of shape `(batch_size or 1, 1, T, K)`.
    """
    return (query_blocks[:, :, None] >= key_blocks[:, None, :])[:, None]


def for_backend(visible: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """
    A mask of four dimensions in the form that the attention of `model` takes.

    Raises:
        ValueError: If its attention takes none.
    """
    backend = model.config._attn_implementation
    if backend == "sdpa":
        return visible
    if backend == "eager":
        hidden = torch.finfo(model.dtype).min
        return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, hidden)
    raise ValueError(
        f"`attn_implementation` must be 'sdpa' or 'eager' for block-causal attention, got {backend!r}: load the model "
        "with one of them."
    )


def _check(model: PreTrainedModel, block_length: int, origin: str) -> None:
    check_block_length("block_length", block_length)
    check_block_origin("origin", origin)
    config = model.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        layer_types = ["sliding_attention"]
    kinds = set(layer_types or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"`model` must attend to the whole context in every layer, got {type(model).__name__} with "
            f"{', '.join(sorted(kinds))}: block-causal attention needs full attention."
        )


def _mask_blocks(decoder: PreTrainedModel, args: tuple, kwargs: dict):
    """Before a forward of the decoder: put the block-causal mask in, unless it sees every key anyway."""
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    as_it_is = given.get("is_causal") is False if mask is None else getattr(mask, "ndim", None) != 2
    config = decoder.config.get_text_config()
    length = getattr(config, "attention_block_length", None)
    if as_it_is or length is None:
        return None
    inputs: Any = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    columns = config.attention_block_origin == "prompt"
    key_blocks, queries = _blocks(inputs, given, length, columns)
    visible = block_causal_mask(queries, key_blocks)
    if not is_compiling() and visible.all():
        return None
    visible = visible.expand(len(inputs), -1, -1, -1)
    return (), given | {"attention_mask": for_backend(visible, decoder)}


def _blocks(inputs, given: dict, length: int, columns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of the keys and of the positions fed, each `(batch_size or 1, number)`."""
    cache = given.get(CACHE_NAME, given.get("past_key_values"))  # code outside of Transformers keeps the older name
    mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    past, num_fed = 0, inputs.shape[1]
    num_keys = num_fed
    if cache is not None:
        past, num_keys = int(cache.get_seq_length()), cache.get_mask_sizes(num_fed, 0)[0]
    elif mask is None and position_ids is not None and not columns:
        blocks = position_ids // length
        return blocks, blocks
    scattered = getattr(cache, "keeps_positions", False)  # what is fed stands anywhere among the keys
    if mask is None:
        mask = torch.ones(1, num_keys if scattered else past + num_fed, device=inputs.device)
    mask = pad(mask.to(inputs.device).bool(), (0, max(num_keys - mask.shape[1], 0)))
    places = torch.arange(num_keys, device=inputs.device)[None] if columns else mask.cumsum(1) - 1
    key_blocks = (places // length).masked_fill(~mask, _PADDING)
    if not scattered or position_ids is None:
        return key_blocks, key_blocks[:, past : past + num_fed]
    begin = mask.long().argmax(1, keepdim=True) if columns else 0  # how much padding a row begins with
    return key_blocks, (position_ids + begin) // length
