"""The door of `generate`: what a call was given.

Owns the checks of prompts, masks, negative prompts, caches and numbers, and the layout of the prompts on the model's
device. Knows nothing of how a canvas is decoded.
"""

from dataclasses import dataclass
from math import isfinite
from numbers import Integral

import torch
from torch.nn.functional import pad
from transformers import Cache, GenerationConfig

from .block_causal import attention_block_length, counts_from_row, for_backend
from .compiling import CACHE_NAME, device_of
from .generation_config import INEXACT_POLICIES, DiffusionOptions
from .images import Images


LONGEST_CANVAS = 2**22  # positions of a row, where the model names no limit of its own
LARGEST_BATCH = 2**28  # positions of all rows
MOST_SEQUENCES = 2**16  # `num_return_sequences`
MOST_STEPS = 2**20  # `steps` and `freeze_lag`, which take memory in proportion to themselves
SMALLEST, LARGEST = 1e-20, 1e20  # of numbers that scores in float32 are divided by or multiplied with


@dataclass(frozen=True)
class Canvas:
    """Prompts, masks to be unmasked, and where blocks begin; see [`make_canvas`]."""

    ids: torch.Tensor  # (B, L) token ids
    mask: torch.Tensor  # (B, L) 0 where the canvas holds padding
    block_origins: list[int]  # the column of each row that blocks are counted from
    attention_block_length: int | None  # that of a model with block-causal attention
    prefix_length: int = 0  # this many positions are computed once, by themselves
    images: Images | None = None


@dataclass(frozen=True)
class Layout:
    """Prompts of one length, padded on the left, on the model's device."""

    input_ids: torch.Tensor  # (B, P)
    prompt_mask: torch.Tensor  # (B, P)
    negative_ids: torch.Tensor | None = None  # (B, P)
    negative_mask: torch.Tensor | None = None


def check_inputs(model, inputs, model_kwargs: dict) -> torch.Tensor | None:
    r"""
    Check what the caller passed as inputs of the model, before anything is done with it.

    Args:
        model (`PreTrainedModel`): The diffusion model.
        inputs (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*): The prompts, if not a keyword.
        model_kwargs (`dict`): Keywords for the model; `input_ids` and `attention_mask` become int64.

    Returns:
        `torch.LongTensor`: `inputs`, in int64.

    Raises:
        ValueError: If any of them cannot be used.
    """
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "`inputs_embeds` has no meaning for a diffusion decode, whose canvas holds ids: pass `input_ids` alone."
        )
    check_cache(model_kwargs.get(CACHE_NAME))
    ids = model_kwargs.get("input_ids") if inputs is None else inputs
    if ids is None:
        return None  # Transformers starts from the BOS token
    ids = check_ids("input_ids", ids, model)
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        mask = model_kwargs["attention_mask"] = check_mask("attention_mask", mask, "input_ids", ids)
    _check_position_ids(model_kwargs.get("position_ids"), ids, mask)
    if inputs is not None:
        return ids
    model_kwargs["input_ids"] = ids
    return None


def check_ids(name: str, ids, model) -> torch.Tensor:
    """The ids `(batch_size, length)` in int64; refuses other shapes, types, and ids that the model does not have."""
    if not torch.is_tensor(ids) or ids.ndim != 2:
        got = f"shape {tuple(ids.shape)}" if torch.is_tensor(ids) else f"a {type(ids).__name__}"
        raise ValueError(f"`{name}` must be a tensor of shape (batch_size, length), got {got}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integers, got {ids.dtype}: pass the ids of a tokenizer.")
    if ids.numel():
        lowest, highest = ids.min().item(), ids.max().item()
        size = vocabulary_size(model)
        if lowest < 0 or highest >= size:
            raise ValueError(
                f"`{name}` must hold ids of the model's vocabulary, 0 to {size - 1}, got "
                f"{lowest if lowest < 0 else highest}: use the tokenizer of the model."
            )
    return ids.long()


def vocabulary_size(model) -> int:
    """Number of ids that the model has an embedding for."""
    config = model.config.get_text_config()
    return getattr(config, "embedding_size", None) or config.vocab_size


def check_mask(name: str, mask, of: str, ids: torch.Tensor) -> torch.Tensor:
    """The mask of `of` in int64; refuses other shapes, and values that are neither 0 nor 1."""
    if not torch.is_tensor(mask) or mask.shape != ids.shape:
        got = tuple(mask.shape) if torch.is_tensor(mask) else f"a {type(mask).__name__}"
        raise ValueError(f"`{name}` must have the shape of `{of}`, {tuple(ids.shape)}, got {got}.")
    wrong = mask[(mask != 0) & (mask != 1)]
    if wrong.numel():
        raise ValueError(f"`{name}` must be 1 at tokens and 0 at padding, got {wrong[0].item()}.")
    return mask.long()


def check_cache(cache) -> None:
    """Refuse any cache but a fresh `FreeCache`; one that was loaded from the Hub has its own class."""
    if cache is None or (getattr(cache, "keeps_positions", False) and not cache.is_initialized):
        return
    got = type(cache).__name__
    if isinstance(cache, Cache):
        got += f" of {cache.get_seq_length()} tokens: drop it, or `reset` it"
    else:
        got += ": drop it"
    raise ValueError(f"`{CACHE_NAME}` must be a fresh `FreeCache`, got a {got}.")


def _check_position_ids(position_ids, ids: torch.Tensor, mask) -> None:
    """Positions are counted from the first token of each row; others would be ignored."""
    if position_ids is None:
        return
    counted = (torch.ones_like(ids) if mask is None else mask.to(ids.device)).cumsum(1) - 1
    is_seen = counted >= 0
    same = torch.is_tensor(position_ids) and position_ids.shape[-1:] == ids.shape[-1:] and position_ids.ndim <= 2
    if not same or ((position_ids.to(ids.device) != counted) & is_seen).any():
        raise ValueError(
            "`position_ids` must count the tokens of each row from 0, as a diffusion decode does itself: drop it."
        )


def check_numbers(generation_config: GenerationConfig) -> None:
    r"""
    Check the numbers of a prepared generation config that Transformers does not, and that would take memory or time in
    proportion to themselves or make scores infinite.

    Raises:
        ValueError: If one of them is no number of its kind, or too large or small.
    """
    for name, largest in (
        ("max_new_tokens", LONGEST_CANVAS),
        ("max_length", LONGEST_CANVAS),
        ("num_return_sequences", MOST_SEQUENCES),
    ):
        value = getattr(generation_config, name, None)
        if value is None:
            continue
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, Integral) or isinstance(value, bool) or not 1 <= int(value) <= largest:
            raise ValueError(f"`{name}` must be an integer between 1 and {largest}, got {value!r}.")
        setattr(generation_config, name, int(value))
    for name in ("steps", "freeze_lag"):
        value = getattr(generation_config, name, None)
        if isinstance(value, Integral) and int(value) > MOST_STEPS:
            raise ValueError(f"`{name}` must be at most {MOST_STEPS}, got {value}: lower it.")
    penalty = generation_config.repetition_penalty
    if isinstance(penalty, int | float) and not penalty > 0:
        raise ValueError(f"`repetition_penalty` must be greater than 0, got {penalty}.")
    scales = ["guidance_scale", "position_temperature", "repetition_penalty"]
    for name in (*scales, *(["temperature"] if generation_config.do_sample else [])):
        value = getattr(generation_config, name, None)
        if not value or not isinstance(value, int | float):
            continue  # 0 and other kinds are judged by those who use them
        if not isfinite(value) or not SMALLEST <= abs(value) <= LARGEST:
            raise ValueError(f"`{name}` must lie between {SMALLEST} and {LARGEST}, got {value}: scores overflow.")


def mask_token_id_of(model, given: int | None) -> int:
    """The mask token of a canvas: that `given`, by default the model's."""
    mask_token_id = getattr(model.config, "mask_token_id", None) if given is None else given
    vocab_size = model.config.get_text_config().vocab_size
    if not isinstance(mask_token_id, int) or mask_token_id not in range(vocab_size):
        raise ValueError(
            f"`mask_token_id` must be an id of the model's vocabulary of {vocab_size}, got {mask_token_id}: pass that "
            "of the tokenizer's mask token, or set it in `model.config`."
        )
    return mask_token_id


def lay_out(model, input_ids: torch.Tensor, prompt_mask, guidance, max_length: int) -> Layout:
    r"""
    Bring prompts and negative prompts to the same length.

    Args:
        model (`PreTrainedModel`): The diffusion model.
        input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`): Checked prompts.
        prompt_mask (`torch.LongTensor` of the same shape, *optional*): 0 at padding.
        guidance (*optional*): The processor of Transformers for classifier-free guidance.
        max_length (`int`): Length of prompt and generated region together.

    Raises:
        ValueError: If the negative prompts do not fit the prompts or the model.
    """
    device = device_of(model)
    ids = input_ids.to(device)
    mask = torch.ones_like(ids) if prompt_mask is None else prompt_mask.to(device)
    if guidance is None or guidance.unconditional_context["input_ids"] is None:
        return Layout(ids, mask)
    negative, negative_mask = _negative_prompts(model, guidance.unconditional_context, len(ids))
    longest = max(ids.shape[1], negative.shape[1])
    if longest > ids.shape[1]:
        _check_length(model, "negative_prompt_ids", longest + max_length - ids.shape[1])
    ids, mask, negative, negative_mask = (
        pad(one, (longest - one.shape[1], 0)) for one in (ids, mask, negative, negative_mask)
    )
    return Layout(ids, mask, negative, negative_mask)


def find_images(model, layout: Layout, model_kwargs: dict, guider) -> Images | None:
    r"""
    The images of the prompts, which Transformers has embedded before.

    Raises:
        ValueError: If there are other image tokens than embeddings, or a guider, which reads text alone.
    """
    image_token_id = getattr(model.config, "image_token_id", None)
    outputs = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
    if image_token_id is None and outputs is None:
        return None
    if image_token_id is None:
        raise ValueError(
            "`image_token_id` must be the id that stands for images in `input_ids`, got None: set it in "
            "`model.config` to that of the processor."
        )
    is_image = (layout.input_ids == image_token_id) & layout.prompt_mask.bool()
    if outputs is None:
        if is_image.any():
            raise ValueError(
                f"`pixel_values` must be given for the {int(is_image.sum())} image tokens {image_token_id} in "
                "`input_ids`: pass all that the processor returns."
            )
        return None
    if guider is not None:
        raise ValueError("`guider` reads text alone, got a prompt with images: drop one of them.")
    return Images.of(list(outputs.pooler_output), layout.input_ids, is_image)


def make_canvas(  # noqa: PLR0913, what a canvas is made of
    model,
    options: DiffusionOptions,
    layout: Layout,
    num_new: int,
    mask_token_id: int,
    pad_token_id: int,
    images: Images | None = None,
) -> Canvas:
    r"""
    Put masks after the prompts: `num_new` of them, or where attention blocks are counted from the start of a row as
    many as fill its last block, which the model was trained to see whole.

    Args:
        model (`PreTrainedModel`): The diffusion model.
        options ([`DiffusionOptions`]): Checked options.
        layout ([`Layout`]): The prompts.
        num_new (`int`): Length of the generated region.
        mask_token_id (`int`): The mask token.
        pad_token_id (`int`): Stands after the last block of a row that is shorter than others.
        images ([`Images`], *optional*): Those of the prompts.
    """
    prompt_length = layout.input_ids.shape[1]
    end = prompt_length + num_new
    length = attention_block_length(model)
    origins, stops = [prompt_length] * len(layout.input_ids), [end] * len(layout.input_ids)
    if length is not None and counts_from_row(model):
        origins = layout.prompt_mask.argmax(1).tolist()
        stops = [end + (origin - end) % length for origin in origins]
    ids = pad(layout.input_ids, (0, max(stops) - prompt_length), value=mask_token_id)
    for row, stop in zip(ids, stops, strict=True):
        row[stop:] = pad_token_id
    mask = pad(layout.prompt_mask, (0, max(stops) - prompt_length), value=1)
    prefix_length = _prefix_length(model, options, layout, mask_token_id) if options.prefix_lm else 0
    return Canvas(ids, mask, origins, length, prefix_length, images)


def check_block_causal(model, options: DiffusionOptions, layout: Layout) -> None:
    r"""
    Refuse options that would make a decode with block-causal attention inexact, or that have no meaning there.

    Raises:
        ValueError: If there is one.
    """
    length = attention_block_length(model)
    if length is None:
        if options.first_token_alone:
            raise ValueError(
                "`first_token_alone` belongs to models with block-causal attention, got a "
                f"{type(model).__name__}, which attends to the whole canvas: drop it."
            )
        return
    name = f"a {type(model).__name__}, whose attention is block-causal"
    for_backend(torch.ones(1, 1, 1, 1, dtype=torch.bool), model)
    _check_exact(options, length, name)
    if not counts_from_row(model):
        return
    if options.steps is not None or options.schedule == "timesteps":
        given = "steps" if options.steps is not None else "schedule"
        raise ValueError(
            f"`{given}` spreads steps over blocks that begin at the end of the prompt, got "
            f"{getattr(options, given)!r} for {name}, counted from the start of a row: pass `steps_per_block`."
        )
    first = layout.prompt_mask.argmax(1)
    if layout.negative_mask is not None and not torch.equal(layout.negative_mask.argmax(1), first):
        raise ValueError(
            f"`negative_prompt_ids` must be as long as the prompt of their row for {name}, so that blocks coincide: "
            "pass others, or none."
        )


def _prefix_length(model, options: DiffusionOptions, layout: Layout, mask_token_id: int) -> int:
    """How many positions `prefix_lm` computes by themselves; refuses what cannot be."""
    length = layout.input_ids.shape[1] - options.prompt_tail
    if attention_block_length(model) is not None:
        raise ValueError(
            f"`prefix_lm` must be False for a {type(model).__name__}, whose prompt does not see later blocks anyway, "
            "got True: drop it."
        )
    if length < 1 or not layout.prompt_mask[:, length - 1].all():
        raise ValueError(
            "`prompt_tail` must be shorter than each prompt, the shortest of which has "
            f"{int(layout.prompt_mask.sum(1).min())} tokens, got {options.prompt_tail}: lower it."
        )
    if (layout.input_ids[:, :length] == mask_token_id).any():
        raise ValueError(
            f"`prefix_lm` computes the first {length} positions before anything is written, got mask tokens among "
            "them: drop it, or raise `prompt_tail`."
        )
    return length


def _check_exact(options: DiffusionOptions, length: int, name: str) -> None:
    """Refuse what would approximate states that block-causal attention makes exact."""
    if options.window_policy in INEXACT_POLICIES:
        raise ValueError(
            f"`window_policy` must be 'freecache', 'dual' or 'none' for {name}, got {options.window_policy!r}: "
            "'freecache' is exact there."
        )
    if options.attend_stale or options.freeze_lag == 0:
        given = "attend_stale" if options.attend_stale else "freeze_lag"
        raise ValueError(
            f"`{given}` would make states inexact that are exact for {name}, got {getattr(options, given)}: drop it."
        )
    if options.freeze_length is not None and options.freeze_length % length:
        raise ValueError(
            f"`freeze_length` must be a multiple of the {length} positions of an attention block for {name}, got "
            f"{options.freeze_length}: drop it."
        )
    longest = max(length, options.block_length or 1)
    if options.right_window is not None and options.right_window < longest:
        raise ValueError(
            f"`right_window` must hold the {longest} positions of a block for {name}, got {options.right_window}: "
            "drop it."
        )
    if options.window_policy == "dual" and length % (options.block_length or length):
        raise ValueError(
            f"`block_length` must divide the {length} positions of an attention block with window_policy='dual', got "
            f"{options.block_length}."
        )


def _negative_prompts(model, context: dict, num_rows: int):
    """Ids and mask of the negative prompts, one for each row, on the model's device."""
    ids = check_ids("negative_prompt_ids", context["input_ids"], model).to(device_of(model))
    mask = context["attention_mask"]
    mask = torch.ones_like(ids) if mask is None else mask
    mask = check_mask("negative_prompt_attention_mask", mask, "negative_prompt_ids", ids).to(ids.device)
    if len(ids) == 0 or num_rows % len(ids):
        raise ValueError(
            f"`negative_prompt_ids` must hold one row, or one for each of the {num_rows} prompts, got {len(ids)}."
        )
    return (one.repeat_interleave(num_rows // len(ids), 0) for one in (ids, mask))


def check_prompt(model, layout: Layout, mask_token_id: int, max_length: int) -> None:
    """Refuse prompts that cannot be continued."""
    _check_padding("input_ids", layout.input_ids, layout.prompt_mask)
    if layout.negative_ids is not None and layout.negative_mask is not None:
        _check_padding("negative_prompt_ids", layout.negative_ids, layout.negative_mask)
    if ((layout.input_ids == mask_token_id) & (layout.prompt_mask == 0)).any():
        raise ValueError(
            f"`input_ids` must not be padded with the mask token {mask_token_id}, whose positions are filled: set "
            "another `pad_token` in the tokenizer."
        )
    _check_length(model, "max_new_tokens", max_length)
    if len(layout.input_ids) * max_length > LARGEST_BATCH:
        raise ValueError(
            f"`max_new_tokens` and the prompts must be at most {LARGEST_BATCH} tokens together, got "
            f"{len(layout.input_ids)} rows of {max_length}: pass fewer rows at a time."
        )


def _check_length(model, name: str, length: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"`{name}` and the prompt must fit the model's {longest} positions together, got {length}: shorten one of "
            "them."
        )


def _check_padding(name: str, input_ids: torch.Tensor, prompt_mask: torch.Tensor) -> None:
    if input_ids.numel() == 0 or not prompt_mask.any(1).all():
        raise ValueError(f"`{name}` must hold at least one token in every row that is not padding, got an empty row.")
    if not prompt_mask[:, -1].all():
        raise ValueError(f"`{name}` must be padded on the left, got padding on the right: set padding_side='left'.")
