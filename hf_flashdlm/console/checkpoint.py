"""Continuing prompts with a checkpoint, as `flashdlm generate` does it.

Owns which models are a diffusion model and a guider, and the choice between a batch and a stream. A mistake of the
user's is a `ValueError` of one sentence. Knows nothing of how decoding works.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

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

from ..generation_output import DiffusionGenerationOutput
from ..guider import ARGuider
from ..hub import loading
from ..hub.loading import (
    check_device,
    is_diffusion_model,
    load_config,
    load_diffusion_config,
    load_tokenizer,
    set_mask_token,
)
from .defaults import MAX_NEW_TOKENS
from .display import CanvasStreamer, mask_character
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
        seconds (`float`): The time that `generate` took for the batch.
    """

    texts: list[str]
    lengths: list[int]
    output: DiffusionGenerationOutput
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """A diffusion `model` and its `tokenizer`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, device: str = "auto", dtype: str = "auto") -> "Checkpoint":
        r"""
        Load from a folder or from the Hub.

        Args:
            name (`str`): Folder or Hub repository.
            device (`str`, *optional*, defaults to `"auto"`): `"auto"` takes the accelerators, if there are any.
            dtype (`str`, *optional*, defaults to `"auto"`): `"auto"` keeps the one that the weights were saved in.

        Raises:
            ValueError: If there is no such checkpoint or it is no diffusion model, or for a device or dtype that is
                not there.
        """
        model = load_weights("--model", name, load_diffusion_config("--model", name), device, dtype)
        tokenizer = load_tokenizer("--model", name)
        set_mask_token("--model", name, model.config, tokenizer)
        return cls(model, tokenizer)

    def load_guider(self, name: str, device: str = "auto", dtype: str = "auto", **settings) -> ARGuider:
        """A guider with `settings` from the model in a folder or on the Hub, which may have another tokenizer."""
        model, tokenizer = load_guider(name, device, dtype), load_tokenizer("--guider", name)
        return ARGuider(model, tokenizer=tokenizer, canvas_tokenizer=self.tokenizer, **settings)

    @property
    def end_token_ids(self) -> set[int]:
        """Ids that end a text."""
        ids = self.model.generation_config.eos_token_id
        return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)

    def continue_prompts(self, prompts: list[Prompt], options: dict, chat: bool | None = None) -> Continuation:
        r"""
        Continue `prompts` in one batch.

        Args:
            prompts (`list[str]` or `list[list[dict]]`): Prompts; for the chat template also whole conversations.
            options (`dict`): Keywords of `generate`; a `temperature` decides on `do_sample`, too.
            chat (`bool`, *optional*): Whether the prompts go into the chat template; by default if there is one.

        Returns:
            [`Continuation`]: Texts and what they cost.
        """
        inputs = self.encode(prompts, chat)
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
        ends = (length for length, token_id in enumerate(ids, 1) if token_id in self.end_token_ids)
        return ids[: next(ends, len(ids))]

    def stream(self, prompt: Prompt, options: dict, chat: bool | None, console: Console) -> Continuation:
        """Continue one prompt and print the text as it forms: on a terminal the whole canvas, else what is final."""
        if not console.is_terminal:
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
            return self.continue_prompts([prompt], options | {"streamer": streamer}, chat)
        with Live(console=console, auto_refresh=False, transient=True) as live:
            streamer = self.canvas_streamer(lambda text: live.update(text, refresh=True), console)
            continuation = self.continue_prompts([prompt], options | {"streamer": streamer}, chat)
        console.out(visible(continuation.texts[0]), highlight=False)
        return continuation

    def canvas_streamer(self, show: Callable[[Text], None], console: Console, pause: float = 0.0) -> CanvasStreamer:
        """A streamer that hands pictures of the canvas to `show`; arguments as of [`CanvasStreamer`]."""
        mask_token_id = self.model.config.mask_token_id
        return CanvasStreamer(self.tokenizer, mask_token_id, self.end_token_ids, show, mask_character(console), pause)

    def encode(self, prompts: list[Prompt], chat: bool | None) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` of `prompts`, on the model's device."""
        chat = self.uses_chat_template(chat)
        rows = [self._ids(prompt, chat) for prompt in prompts]
        if not all(rows):
            raise ValueError("`--prompt` must hold at least one token, got an empty text.")
        length, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": input_ids.to(self.model.device), "attention_mask": attention_mask.to(self.model.device)}

    def uses_chat_template(self, chat: bool | None) -> bool:
        """Whether prompts go into the chat template: as `chat` says, and by default if there is one."""
        has_template = self.tokenizer.chat_template is not None
        if chat and not has_template:
            raise ValueError("`--chat` needs a chat template, which the tokenizer does not have: drop it.")
        return has_template if chat is None else chat

    def _ids(self, prompt: Prompt, chat: bool) -> list[int]:
        if not chat:
            return encode_text(self.tokenizer, prompt)
        return encode_chat(
            self.tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        )


def with_sampling(options: dict) -> dict:
    """`options` in which a `temperature` above 0 means drawing and 0 means not to."""
    temperature = options.get("temperature")
    if temperature is None:
        return options
    if temperature < 0:
        raise ValueError(f"`--temperature` must not be negative, got {temperature}.")
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
