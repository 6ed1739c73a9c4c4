"""Continuing prompts with a checkpoint, as `flashdlm generate` does it.

Owns which models are a diffusion model and a guider, and the choice between a batch and a stream. A mistake of the
user's is a `ValueError` of one sentence. Knows nothing of how decoding works.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from ..block_causal import attention_block_length
from ..compiling import device_of
from ..generation_config import DiffusionOptions
from ..generation_output import DiffusionGenerationOutput
from ..guider import ARGuider
from ..hub import loading
from ..hub.loading import (
    bounded,
    check_device,
    is_diffusion_model,
    load_config,
    load_diffusion_config,
    load_processor,
    load_tokenizer,
    refusing,
    sees_images,
    set_mask_token,
)
from ..methods import METHODS
from ..processing_original import LavidaProcessor
from .defaults import MAX_NEW_TOKENS
from .display import CanvasStreamer, mask_character, shows_canvas, up_to_end
from .prompts import Prompt, encode_chat, encode_text
from .terminal import visible


@dataclass(frozen=True)
class Continuation:
    r"""
    What came of a batch of prompts.

    Args:
        texts (`list[str]`): The continuations.
        lengths (`list[int]`): Their tokens, up to and with the first end token.
        output ([`DiffusionGenerationOutput`]): What `generate` returned.
        seconds (`float`): The time that `generate` took for the batch, without what showing it took.
    """

    texts: list[str]
    lengths: list[int]
    output: DiffusionGenerationOutput
    seconds: float


def usual_block_length(model: PreTrainedModel, max_new_tokens: int) -> int:
    """The length of the blocks in which `model.generate` writes `max_new_tokens` when it is told no other."""
    config, attention = model.generation_config, attention_block_length(model)
    method = getattr(config, "method", None) or getattr(model.config, "recommended_method", None)
    recommended = getattr(config, "block_length", None) or METHODS.get(method, {}).get("block_length")
    if recommended is not None and attention is None:
        recommended = min(recommended, max_new_tokens)
    return DiffusionOptions(block_length=recommended).tiling(max_new_tokens, attention)[0]


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion `model`, its `tokenizer`, and the `processor` of a model that sees images."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    processor: LavidaProcessor | None = None

    @classmethod
    def load(cls, name: str, device: str = "auto", dtype: str = "auto", images: bool = False) -> "Checkpoint":
        r"""
        Load from a folder or from the Hub.

        Args:
            name (`str`): Folder or Hub repository.
            device (`str`, *optional*, defaults to `"auto"`): `"auto"` takes the accelerators, if there are any.
            dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` keeps the one that the weights were saved in.
            images (`bool`, *optional*, defaults to `False`): Whether the model has to see images.

        Raises:
            ValueError: If there is no such checkpoint or it is no diffusion model, or does not see images, or for a
                device or dtype that is not there.
        """
        config = load_diffusion_config("--model", name)
        seeing = sees_images(config)
        if images and not seeing:
            raise ValueError(
                f"`--image` needs a model that sees images, got {name!r} with `model_type` {config.model_type!r}: "
                "drop it."
            )
        model = load_weights("--model", name, config, device, dtype)
        tokenizer = load_tokenizer("--model", name)
        set_mask_token("--model", name, model.config, tokenizer)
        return cls(model, tokenizer, load_processor("--model", name, model.config, tokenizer) if seeing else None)

    def load_guider(self, name: str, device: str = "auto", dtype: str = "auto", **settings) -> ARGuider:
        """A guider with `settings` from the model in a folder or on the Hub, which may have another tokenizer."""
        model, tokenizer = load_guider(name, device, dtype), load_tokenizer("--guider", name)
        return ARGuider(model, tokenizer=tokenizer, canvas_tokenizer=self.tokenizer, **settings)

    @property
    def end_token_ids(self) -> set[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    def continue_prompts(
        self, prompts: list[Prompt], options: dict, chat: bool | None = None, images: Sequence = ()
    ) -> Continuation:
        r"""
        Continue `prompts` in one batch.

        Args:
            prompts (`list[str]` or `list[list[dict]]`): Prompts; for the chat template also whole conversations.
            options (`dict`): Keywords of `generate`; a `temperature` decides on `do_sample`, too.
            chat (`bool`, *optional*): Whether the prompts go into the chat template; by default if there is one.
            images (`Sequence`, *optional*): Pictures of Pillow that each prompt is about.

        Returns:
            [`Continuation`]: Texts and what they cost.
        """
        inputs = self.encode(prompts, chat, images)
        if self.model.generation_config.max_new_tokens is None:
            options = {"max_new_tokens": MAX_NEW_TOKENS} | options
        started = time.perf_counter()
        output = self.model.generate(**inputs, **with_sampling(options), return_dict_in_generate=True)
        seconds = time.perf_counter() - started
        rows = [self.up_to_end(row) for row in output.sequences[:, inputs["input_ids"].shape[1] :].tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return Continuation([text.strip() for text in texts], [len(row) for row in rows], output, seconds)

    def up_to_end(self, ids: list[int]) -> list[int]:
        """`ids` up to and with the first that ends a text."""
        return up_to_end(ids, self.end_token_ids)

    def stream(
        self,
        prompt: Prompt,
        options: dict,
        chat: bool | None,
        console: Console,
        images: Sequence = (),
        pause: float = 0.0,
    ) -> Continuation:
        """
        Continue one prompt and print the text as it forms: on a terminal the whole canvas, each step for `pause`
        seconds, else what is final.
        """
        if not shows_canvas(console):
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            return self.continue_prompts([prompt], options | {"streamer": streamer}, chat, images)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            streamer = self.canvas_streamer(lambda text: live.update(text, refresh=True), console, pause)
            continuation = self.continue_prompts([prompt], options | {"streamer": streamer}, chat, images)
        console.out(visible(continuation.texts[0]), highlight=False)
        return replace(continuation, seconds=continuation.seconds - streamer.seconds)

    def canvas_streamer(self, show: Callable[[Text], None], console: Console, pause: float = 0.0) -> CanvasStreamer:
        """A streamer that hands pictures of the canvas to `show`; arguments as of [`CanvasStreamer`]."""
        mask_token_id = self.model.config.mask_token_id
        return CanvasStreamer(self.tokenizer, mask_token_id, self.end_token_ids, show, mask_character(console), pause)

    def encode(self, prompts: list[Prompt], chat: bool | None, images: Sequence = ()) -> dict[str, torch.Tensor]:
        """
        `input_ids` and `attention_mask` of `prompts`, and what `generate` takes of `images`, on the model's device.
        """
        chat = self.uses_chat_template(chat)
        if images and not chat:
            raise ValueError(
                "`--image` puts pictures into the turns of a chat, got a prompt without a chat template: drop it, or "
                "`--no-chat`."
            )
        rows, pixels = [self._ids(prompt, chat, len(images)) for prompt in prompts], {}
        if not all(rows):
            raise ValueError("`--prompt` must hold at least one token, got an empty text.")
        if images:
            rows, pixels = self._with_images(rows, images)
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask} | pixels
        return {name: value.to(device_of(self.model)) for name, value in inputs.items()}

    def uses_chat_template(self, chat: bool | None) -> bool:
        """Whether prompts go into the chat template: as `chat` says, and by default if there is one."""
        has_template = self.tokenizer.chat_template is not None
        if chat and not has_template:
            raise ValueError("`--chat` needs a chat template, which the tokenizer does not have: drop it.")
        return has_template if chat is None else chat

    def _ids(self, prompt: Prompt, chat: bool, num_images: int) -> list[int]:
        if not chat:
            return encode_text(self.tokenizer, prompt)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before = num_images * f"{self.processor.image_token}\n" if num_images else ""
        return encode_chat(self.tokenizer, turns, before)

    def _with_images(self, rows: list[list[int]], images: Sequence) -> tuple[list[list[int]], dict]:
        """The rows with as many image tokens as the images, the same for each row, have embeddings; their pixels."""
        number, token_id = len(images), self.processor.image_token_id
        with refusing("`--image` cannot be cut into tiles as `--model` asks for"), bounded():
            inputs = self.processor(list(images), number * self.processor.image_token, return_tensors="pt")
        of_each = (inputs["input_ids"] == token_id).sum().item() // number  # several have one tile each
        if any(row.count(token_id) != number for row in rows):
            raise ValueError(
                f"`--model` must have a chat template that keeps the token `{self.processor.image_token}` of each "
                "picture, and its template does not."
            )
        rows = [[one for token in row for one in (of_each if token == token_id else 1) * [token]] for row in rows]
        names = ("pixel_values", "image_sizes", "batch_num_images")
        return rows, {name: torch.cat(len(rows) * [inputs[name]]) for name in names}


def with_sampling(options: dict) -> dict:
    """`options` in which a `temperature` above 0 means drawing and 0 means not to."""
    temperature = options.get("temperature")
    if temperature is None:
        return options
    if temperature < 0:
        raise ValueError(f"`temperature` must not be negative, got {temperature}.")
    if temperature == 0:
        return {name: value for name, value in options.items() if name != "temperature"} | {"do_sample": False}
    return options | {"do_sample": True}


def load_guider(name: str, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """The autoregressive model in a folder or on the Hub; arguments as of [`Checkpoint.load`]."""
    config = load_config("--guider", name)
    if is_diffusion_model(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"`--guider` must be an autoregressive language model, got type {config.model_type!r}.")
    return load_weights("--guider", name, config, device, dtype)


def load_weights(option: str, name: str, config: PreTrainedConfig, device: str, dtype: str) -> PreTrainedModel:
    """A model, on `device` and in `dtype`; arguments as of [`Checkpoint.load`]."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"`--dtype` must be auto or a dtype of torch, got {dtype!r}.")
    if device == "auto":
        device_map = "auto" if torch.accelerator.is_available() else None
    else:
        check_device(device)
        device_map = device
    return loading.load_weights(option, name, config, device_map, dtype)
