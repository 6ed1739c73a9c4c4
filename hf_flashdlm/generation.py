"""The seam with the host's `generate`.

Owns how a call becomes a decode: which options the host must let through, what is refused at the door, the canvas,
the parts, streaming and the output. Everything else, configuration merging, special tokens, processors, stopping
criteria, length and typo checks, stays the host's. Knows nothing of how a step chooses tokens.
"""

import time
from functools import partial

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria
from transformers.generation.configuration_utils import GenerationMode

from .cache import FreeCache
from .denoiser import Denoiser
from .denoising import Blocks, Method, denoise, start_denoising
from .generation_config import DiffusionOptions
from .guider import ARGuider
from .outputs import DiffusionGenerationOutput, Rows
from .processors import CanvasProcessors
from .schedule import MinimumSchedule, TimestepSchedule, UniformSchedule, split_steps
from .unmasking import ConfidenceThreshold, draft
from .windows import FreeCacheWindow, FullWindow


DEFAULT_CONFIDENCE_THRESHOLD = 0.9

# What the host offers and a denoised canvas has no meaning for, with the value that asks for nothing.
_REFUSED = {
    "num_beams": 1,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "cache_implementation": None,
    "prompt_lookup_num_tokens": None,
    "token_healing": False,
}


class FlashDLMGenerationMixin(GenerationMixin):
    r"""
    Gives a masked diffusion language model the host's `generate`, decoding by iterative unmasking.

    Beside the host's arguments it takes those of [`DiffusionOptions`] and:

    Args:
        guider (`PreTrainedModel` or [`ARGuider`], *optional*):
            An autoregressive model that judges which drafts are written at once.
        generator (`torch.Generator`, *optional*): Source of randomness with `do_sample=True`.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`, prompt included, or with
        `return_dict_in_generate=True` a [`DiffusionGenerationOutput`].
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """Hook 1 of 4: let our two objects through, which no configuration can hold."""
        if assistant_model is not None:
            raise ValueError(
                "`assistant_model` proposes tokens, which a diffusion model does itself: pass the model as `guider` "
                "to let it judge the drafts."
            )
        ours = {name: kwargs.pop(name) for name in ("guider", "generator") if name in kwargs}
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        return extracted | {name: value for name, value in ours.items() if value is not None}

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Hook 2 of 4: keywords of ours, which the host's config would call unknown; refusals."""
        ours = {name: kwargs.pop(name) for name in DiffusionOptions.names() if name in kwargs}
        if kwargs.pop("use_cache", None) is False:
            # Only the caller's word counts: checkpoints set it to false because autoregressive caching fails there.
            ours.setdefault("window_policy", "none")
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in ours.items():
            setattr(generation_config, name, value)
        for name, neutral in _REFUSED.items():
            value = getattr(generation_config, name, None)
            if value is not None and value != neutral:
                raise ValueError(f"`{name}` has no meaning for a diffusion decode, got {value!r}: drop it.")
        DiffusionOptions.read(generation_config)
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """Hook 3 of 4: the cache is a FreeCache, or none."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and (not getattr(cache, "keeps_positions", False) or cache.is_initialized):
            raise ValueError(
                f"`past_key_values` must be a fresh `FreeCache`, got a {type(cache).__name__} of "
                f"{cache.get_seq_length()} tokens: drop it, or `reset` it."
            )
        if DiffusionOptions.read(generation_config).window_policy == "none":
            model_kwargs["past_key_values"] = None
        elif cache is None:
            model_kwargs["past_key_values"] = FreeCache()

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: list,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        guider=None,
        generator: torch.Generator | None = None,
        **model_kwargs,
    ) -> DiffusionGenerationOutput | torch.LongTensor:
        """Hook 4 of 4: one call becomes one run of the loop."""
        started = time.perf_counter()
        if generator is not None and not generation_config.do_sample:
            raise ValueError("`generator` is the source of randomness of `do_sample=True`, got do_sample=False.")
        # 1. The canvas: prompt and masks.
        options = DiffusionOptions.read(generation_config)
        mask_token_id = options.mask_token_id
        if mask_token_id is None:
            mask_token_id = getattr(self.config, "mask_token_id", None)
        prompt_mask = model_kwargs.get("attention_mask")
        if prompt_mask is None:
            prompt_mask = torch.ones_like(input_ids)
        _check_prompt(self, input_ids, prompt_mask, generation_config.max_length, mask_token_id)
        prompt_length, num_new = input_ids.shape[1], generation_config.max_length - input_ids.shape[1]
        canvas = torch.nn.functional.pad(input_ids, (0, num_new), value=mask_token_id).to(self.device)
        canvas_mask = torch.nn.functional.pad(prompt_mask, (0, num_new), value=1).to(self.device)
        # 2. The parts.
        guider = _guider(guider, options)
        method = _method(options, prompt_length, num_new, guider)
        denoiser = Denoiser(
            self, canvas_mask, model_kwargs.get("past_key_values"), getattr(self.config, "logits_shift", 0)
        )
        processors = CanvasProcessors(logits_processor, guider)
        sampling = {"sample": generation_config.do_sample, "generator": generator}
        if guider is not None:
            guider.reset(canvas_mask, mask_token_id, self.config.get_text_config().vocab_size, **sampling)
        state = start_denoising(canvas, mask_token_id, method.window_policy.history)
        rows = Rows(state, prompt_length, _pad_token_id(generation_config), *_ends(options, stopping_criteria))
        # 3. The loop.
        stream = _Stream(streamer, prompt_length)

        def after_step(state):
            final, finished = rows.update(state)
            stream.show(state, final)
            return finished

        denoise(state, denoiser, method, processors, partial(draft, mask_token_id=mask_token_id, **sampling), after_step)
        stream.end()
        # 4. The output.
        statistics = {} if guider is None else guider.statistics(time.perf_counter() - started)
        output = rows.output(input_ids.device, **statistics)
        return output if generation_config.return_dict_in_generate else output.sequences


def _check_prompt(model, input_ids, prompt_mask, canvas_length: int, mask_token_id: int | None) -> None:
    """Refuse prompts that cannot be continued."""
    vocab_size = model.config.get_text_config().vocab_size
    if mask_token_id is None or mask_token_id >= vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id of the model's vocabulary of {vocab_size}, got {mask_token_id}: set it in "
            "`model.config` or pass it to `generate`."
        )
    if prompt_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
            f"{tuple(prompt_mask.shape)}."
        )
    if input_ids.shape[1] == 0 or not prompt_mask.any(1).all():
        raise ValueError("`input_ids` must hold at least one token in every row that is not padding, got an empty row.")
    if not prompt_mask[:, -1].all():
        raise ValueError("`input_ids` must be padded on the left, got padding on the right: set padding_side='left'.")
    if ((input_ids == mask_token_id) & (prompt_mask == 0)).any():
        raise ValueError(
            f"`input_ids` must not be padded with the mask token {mask_token_id}, whose positions are filled: set "
            "another `pad_token` in the tokenizer."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and canvas_length > longest:
        raise ValueError(
            f"`max_new_tokens` and the prompt must fit the model's {longest} positions together, got {canvas_length}: "
            "shorten one of them."
        )


def _guider(guider, options: DiffusionOptions):
    """The guider as a processor; a bare model gets the default acceptance rule."""
    if guider is None:
        return None
    if options.steps is not None:
        raise ValueError(
            f"`steps` fixes how many tokens a step writes and a `guider` decides it, got steps={options.steps}: drop "
            "one of them."
        )
    if isinstance(guider, PreTrainedModel):
        return ARGuider(guider)
    if not getattr(guider, "reads_canvas", False):
        raise ValueError(
            f"`guider` must be an autoregressive model or an `ARGuider`, got {type(guider).__name__}: load it with "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    return guider


def _method(options: DiffusionOptions, prompt_length: int, num_new: int, guider) -> Method:
    """The choice of parts that the options name."""
    steps = options.steps
    num_blocks = options.check_lengths(num_new)
    if options.window_policy == "none":
        window_policy = FullWindow()
    else:
        window_policy = FreeCacheWindow(
            prompt_length,
            options.freeze_length or options.block_length,
            options.freeze_lag,
            options.left_margin,
            options.right_window,
            options.attend_stale,
        )
    if steps is None:
        schedule = MinimumSchedule()
        threshold = options.confidence_threshold
        rule = ConfidenceThreshold(DEFAULT_CONFIDENCE_THRESHOLD if threshold is None else threshold)
    else:
        spread = split_steps(steps, num_blocks)
        schedule = UniformSchedule(spread) if options.schedule == "uniform" else TimestepSchedule(spread, options.eps)
        rule = None
    blocks = Blocks(prompt_length, options.block_length, None if guider is None else guider.lookahead)
    return Method(window_policy, blocks, schedule, rule)


def _pad_token_id(generation_config: GenerationConfig) -> int:
    if generation_config.pad_token_id is not None:
        return generation_config.pad_token_id
    ends = generation_config.eos_token_id
    return 0 if ends is None else ends[0] if isinstance(ends, list) else ends


def _ends(options: DiffusionOptions, stopping_criteria: list) -> tuple[torch.LongTensor | None, list]:
    """End tokens, and the criteria that the loop has to ask: a canvas has its length and its end tokens anyway."""
    ends = [criterion.eos_token_id for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)]
    others = [one for one in stopping_criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    return torch.cat(ends).cpu() if ends and options.stop_at_eos else None, others


class _Stream:
    """Feeds a streamer of the host: final text once and in order, drafts of the rest where it shows them."""

    def __init__(self, streamer, prompt_length: int):
        self.streamer = streamer
        self.shown = prompt_length

    def show(self, state, final: torch.LongTensor) -> None:
        if self.streamer is None:
            return
        if getattr(self.streamer, "shows_canvas", False):
            self.streamer.put_draft(state.tokens)
            return
        end = int(final[0])
        if end > self.shown:
            self.streamer.put(state.tokens[0, self.shown : end])
            self.shown = end
        if end < state.tokens.shape[1] and hasattr(self.streamer, "put_draft"):
            self.streamer.put_draft(state.tokens[:, end:])

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
