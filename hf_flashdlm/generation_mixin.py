"""The seam with `generate` of Transformers.

Owns how a call becomes a decode: which options Transformers must let through, what is refused at the door, the canvas,
the parts, streaming and the output. Everything else, configuration merging, special tokens, processors, stopping
criteria, length and typo checks, stays that of Transformers. Knows nothing of how a step chooses tokens.
"""

import copy
import inspect
import math
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from .block_causal import AttentionBlocks, attention_block_length, drop_causality
from .cache import FreeCache
from .canvas_processors import CANVAS_PROCESSOR_MEMBERS, CanvasProcessors
from .compiling import CACHE_NAME, cache_name, forward_parameters
from .denoiser import ClassifierFreeGuidance, Denoiser
from .denoising_loop import DenoisingState, denoise
from .generation_config import DECIDING, PARTS, PEER_NAMES, SCHEDULED, DiffusionOptions
from .generation_inputs import (
    Canvas,
    Layout,
    check_block_causal,
    check_inputs,
    check_numbers,
    check_prompt,
    find_images,
    lay_out,
    make_canvas,
    mask_token_id_of,
)
from .generation_output import DiffusionGenerationOutput
from .guider import ARGuider
from .guider_reader import is_language_model
from .methods import METHODS
from .parts import choose_parts
from .stopping import RowEnds
from .streaming import Stream
from .synchronizing import SynchronizedDenoiser, has_plain_weights, is_sharded
from .unmasking import Drafter


# Options of Transformers that make no sense here, each with the value that turns it off.
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


if TYPE_CHECKING:

    class _Model(PreTrainedModel, GenerationMixin):
        """What the mixin is mixed into, with the attributes that the methods of Transformers declare for it."""

        device: torch.device
        dtype: torch.dtype
        hf_device_map: dict[str, Any]
else:
    _Model = GenerationMixin


class FlashDLMGenerationMixin(_Model):
    r"""
    Gives a masked diffusion language model the `generate` of Transformers, decoding by iterative unmasking.

    Beside the arguments of Transformers it takes those of [`DiffusionOptions`] and:

    Args:
        guider (`PreTrainedModel`, [`ARGuider`] or [`CanvasProcessor`], *optional*):
            An autoregressive model that judges which drafts are written at once, or any object that changes scores
            with the whole canvas in view.
        generator (`torch.Generator`, *optional*): Source of randomness with `do_sample=True`.

    `compile_config` of Transformers compiles the forwards of both models, the diffusion model's for static shapes.
    Without it, and outside of distributed runs, a decode runs in inference mode; what it returns can be trained on.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`, prompt included, or with
        `return_dict_in_generate=True` a [`DiffusionGenerationOutput`].
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        """Hook 1 of 5: let our two objects through, which no configuration can hold."""
        if assistant_model is not None:
            raise ValueError(
                "`assistant_model` proposes tokens, which a diffusion model does itself: pass the model as `guider` "
                "to let it judge the drafts."
            )
        ours = {name: kwargs.pop(name) for name in ("guider", "generator") if name in kwargs}
        if callable(custom_generate):
            # Transformers drops what `_sample` takes, too, even if the callable names it.
            named = inspect.signature(custom_generate).parameters
            dropped = {"tokenizer": kwargs.get("tokenizer"), "streamer": streamer, "synced_gpus": synced_gpus}
            ours |= {name: value for name, value in dropped.items() if name in named}
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        if synced_gpus is None:
            extracted.pop("synced_gpus", None)  # decided in `_sample`, which knows sharding of every kind
        return extracted | {name: value for name, value in ours.items() if value is not None}

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Hook 2 of 5: take our keywords, which no config of Transformers knows, and refuse what makes no sense."""
        for name in kwargs.keys() & PEER_NAMES.keys():
            raise ValueError(f"`{name}` is an option of other implementations: here it is {PEER_NAMES[name]}.")
        if "cache" in kwargs:
            kwargs[CACHE_NAME] = kwargs.pop("cache")  # the name of 5.24, on every version
        ours = DiffusionOptions.expand({name: kwargs.pop(name) for name in DiffusionOptions.names() if name in kwargs})
        if kwargs.pop("use_cache", None) is False:
            # Only the caller's word counts: checkpoints set it to false because autoregressive caching fails there.
            ours.setdefault("window_policy", "none")
        given = set(ours) | (set() if generation_config is None else set(vars(generation_config)))
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        _refuse_saved_objects(generation_config)
        for name, value in ours.items():
            setattr(generation_config, name, value)
        if not hasattr(generation_config, "_recommended"):
            self._recommend(generation_config, given)
        for name, neutral in _REFUSED.items():
            value = getattr(generation_config, name, None)
            if value is not None and value != neutral:
                raise ValueError(f"`{name}` has no meaning for a diffusion decode, got {value!r}: drop it.")
        options = DiffusionOptions.read(generation_config)
        for name in ("output_confidence", "output_history"):
            if getattr(options, name) and not generation_config.return_dict_in_generate:
                raise ValueError(f"`{name}` needs return_dict_in_generate=True, got a call that returns ids alone.")
        check_numbers(generation_config)
        return generation_config, model_kwargs

    def _recommend(self, generation_config: GenerationConfig, given: set[str]) -> None:
        """
        Fill in the settings that the authors of the model recommend, where neither the call nor the checkpoint's
        generation config chooses a method or the part; and note which settings are recommendations.
        """
        method = getattr(self.config, "recommended_method", None)
        settings = METHODS[method] if method and getattr(generation_config, "method", None) is None else {}
        chosen = {name for name in DiffusionOptions.names() if hasattr(generation_config, name)}
        if chosen.intersection(DECIDING):
            settings = {name: value for name, value in settings.items() if name not in DECIDING}
        for name in settings.keys() - chosen:
            setattr(generation_config, name, settings[name])
        recommended = (settings.keys() - chosen) | ({"block_length"} - given)
        generation_config._recommended = recommended  # type: ignore[attr-defined]  # beside its own
        if "block_length" not in given and getattr(generation_config, "blocks", None) == "whole":
            generation_config.block_length = None  # type: ignore[attr-defined]  # a recommendation of the model yields to a single block

    def save_pretrained(self, *args, **kwargs):
        """[`~transformers.PreTrainedModel.save_pretrained`], but for a generation config that holds objects."""
        _refuse_saved_objects(self.generation_config)
        _own_options(self.generation_config)
        return super().save_pretrained(*args, **kwargs)

    def adjust_generation_fn(self, generation_config, *args, **kwargs):
        """What `from_pretrained` makes the generation config with, which may hold our options from then on."""
        generation_config = copy.copy(generation_config)
        _own_options(generation_config)
        super().adjust_generation_fn(generation_config, *args, **kwargs)
        _own_options(self.generation_config)

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        """Hook 3 of 5: the inputs are checked before anything is done with them."""
        inputs = check_inputs(self, inputs, model_kwargs)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Hook 4 of 5: the cache is a FreeCache, or none."""
        options = DiffusionOptions.read(generation_config)
        if options.window_policy == "none" and not options.prefix_lm:
            model_kwargs[CACHE_NAME] = None
        elif model_kwargs.get(CACHE_NAME) is None:
            model_kwargs[CACHE_NAME] = FreeCache()

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the scheduler of Transformers would decode from left to right."""
        raise ValueError(
            "`generate_batch` and continuous batching decode from left to right, which a diffusion model does not: "
            "call `generate` with a padded batch."
        )

    generate_batch = continuous_batching_context_manager = init_continuous_batching

    def _sample(  # type: ignore[override]  # noqa: PLR0913, the signature of Transformers and two objects more
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: list,
        generation_config: GenerationConfig,
        synced_gpus: bool | None = None,
        streamer=None,
        guider=None,
        generator: torch.Generator | None = None,
        **model_kwargs,
    ) -> DiffusionGenerationOutput | torch.Tensor:
        """Hook 5 of 5: one call becomes one run of the loop."""
        started = time.perf_counter()
        _check_generator(generator, generation_config.do_sample)
        _check_model(self)
        # 1. The canvas: prompt and masks.
        max_length = int(generation_config.max_length)
        num_new = max_length - input_ids.shape[1]
        options = _read_options(self, generation_config, num_new, guider)
        mask_token_id = mask_token_id_of(self, options.mask_token_id)
        logits_processor, guidance = _split_guidance(logits_processor)
        layout = lay_out(self, input_ids, model_kwargs.get("attention_mask"), guidance, max_length)
        check_prompt(self, layout, mask_token_id, max_length)
        check_block_causal(self, options, layout)
        pad_token_id = _pad_token_id(generation_config)
        images = find_images(self, layout, model_kwargs, guider)
        canvas = make_canvas(self, options, layout, num_new, mask_token_id, pad_token_id, images)
        # 2. The parts.
        guider = _guider(guider, options)
        prompt_length = layout.input_ids.shape[1]
        skip = prompt_length - input_ids.shape[1]  # a longer negative prompt pads the prompt
        lookahead = None if guider is None else guider.lookahead
        method = choose_parts(options, num_new, lookahead, canvas.attention_block_length)
        compile_config = generation_config.compile_config
        denoiser = _denoiser(self, canvas, layout, guidance, mask_token_id, model_kwargs, compile_config)
        denoiser = _synchronized(denoiser, self, guider, synced_gpus)
        drafter = _drafter(options, generation_config, mask_token_id, generator)
        if guider is not None:
            guider.reset(self, canvas.mask, mask_token_id, drafter.temperature, generator, compile_config)
        # 3. The loop.
        state = DenoisingState.start(
            *(canvas.ids, mask_token_id, prompt_length, method.window_policy.history),
            block_origins=canvas.block_origins,
            edits_tokens=method.editing is not None,
        )
        ends = RowEnds(
            state, prompt_length, pad_token_id, *_ends(options, stopping_criteria), skip, prompt_length + num_new
        )
        processors = CanvasProcessors(logits_processor, canvas.mask, mask_token_id, guider, skip, ends.shown)
        stream = Stream(streamer, prompt_length, skip)

        def after_step(state):
            final, finished = ends.update(state)
            stream.show(state.rows, final)
            return finished

        with _without_autograd(compile_config, self, guider):
            denoise(state, denoiser, method, processors, drafter, after_step, options.output_confidence)
            if isinstance(denoiser, SynchronizedDenoiser):
                denoiser.finish(canvas.ids)
        stream.end()
        # 4. The output.
        statistics = {} if guider is None else guider.statistics(time.perf_counter() - started)
        output = ends.output(input_ids.device, options.output_confidence, options.output_history, **statistics)
        return output if generation_config.return_dict_in_generate else output.sequences


def _refuse_saved_objects(generation_config) -> None:
    """Refuse parts that are objects in a generation config, which is saved as JSON."""
    for name in PARTS:
        value = getattr(generation_config, name, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"`{name}` must be a string in a generation config, which is saved as JSON, got an object of "
                f"{type(value).__name__}: pass the object to `generate`."
            )


def _own_options(generation_config: GenerationConfig | None) -> None:
    """Take off the mark of a derived generation config: Transformers reads a file that has it without our options."""
    if generation_config is not None:
        generation_config._from_model_config = False


def make_bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """
    Let every position of a decoder-only model see every other, in place, as a masked diffusion model trained from its
    architecture needs. For models whose attention follows `is_causal` of Transformers (Llama, Qwen2, Qwen3, others).
    Files of a class that has attention blocks, such as SDAR's, cannot say it: once saved, a model has them again.
    """
    drop_causality(model)
    if attention_block_length(model) is not None:
        model.config.get_text_config().attention_block_length = None  # which the hook of `make_block_causal` reads
    return model


def diffusion_generate(model: PreTrainedModel, inputs=None, **kwargs) -> DiffusionGenerationOutput | torch.Tensor:
    r"""
    `generate` of [`FlashDLMGenerationMixin`] for a model of another class, which is not changed.

    Args:
        model (`PreTrainedModel`):
            A bidirectional masked diffusion model (see [`make_bidirectional`]) whose forward takes `input_ids`,
            `attention_mask`, `position_ids`, `logits_to_keep` and a cache, as `cache` or as `past_key_values`. Its
            config gives `mask_token_id`, and `logits_shift=1` if its output at a position scores the next one.
        inputs (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): As `input_ids`.
        kwargs: As of `generate`.
    """
    view = as_diffusion_model(model)
    return type(view).generate(view, inputs, **kwargs)  # not `view.generate`, which may be a strategy's


def as_diffusion_model(model: PreTrainedModel) -> FlashDLMGenerationMixin:
    """The model, or a view of it: the same weights and configs under a class with the hooks above."""
    if isinstance(model, FlashDLMGenerationMixin):
        return model
    kind: Any = type(f"FlashDLM{type(model).__name__}", (FlashDLMGenerationMixin, type(model)), {})
    view = kind.__new__(kind)
    view.__dict__ = model.__dict__
    return view


def _read_options(model, generation_config: GenerationConfig, num_new: int, guider) -> DiffusionOptions:
    """
    The options of the call. A block length that is recommended or of a method yields to a shorter request. Where
    attention has blocks it does not, but the windows of a method do. A recommended way to choose tokens yields to a
    guider.
    """
    options = DiffusionOptions.read(generation_config)
    recommended: set[str] = getattr(generation_config, "_recommended", set())
    of_method = METHODS.get(options.method or "", {})
    if attention_block_length(model) is not None:
        windows = ("right_window", "freeze_length")
        dropped: dict[str, Any] = dict.fromkeys(one for one in windows if getattr(options, one) == of_method.get(one))
        options = replace(options, **dropped)
    elif (options.block_length or 0) > num_new > 0 and (
        "block_length" in recommended or options.block_length == of_method.get("block_length")
    ):
        options = replace(options, block_length=num_new)
    if guider is not None:
        yielding: dict[str, Any] = dict.fromkeys(recommended.intersection(DECIDING))
        options = replace(options, **yielding)
    return options


def _check_generator(generator, do_sample: bool) -> None:
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"`generator` must be a `torch.Generator`, got {type(generator).__name__}.")
    if generator is not None and not do_sample:
        raise ValueError("`generator` is the source of randomness of `do_sample=True`, got do_sample=False.")


def _check_model(model) -> None:
    """The contract with a model of any class."""
    accepted = forward_parameters(model)
    needed = ("input_ids", "attention_mask", "position_ids", cache_name(model), "logits_to_keep")
    missing = [name for name in needed if name not in accepted]
    if missing:
        raise ValueError(
            f"`model` must take {', '.join(f'`{name}`' for name in missing)} in its forward, which "
            f"{type(model).__name__} does not: a diffusion decode feeds it parts of a canvas."
        )
    prepares = vars(model).get("prepare_inputs_for_generation")
    if prepares is not None and getattr(prepares, "__func__", None) is not type(model).prepare_inputs_for_generation:
        raise ValueError(
            "`model` has an adapter of prompt or prefix tuning, whose tokens a diffusion decode would leave out: use "
            "one that changes the weights, such as LoRA."
        )
    # A module's own `getattr` is slow where there is no such attribute.
    causal = any(vars(one).get("is_causal", getattr(type(one), "is_causal", False)) for one in model.modules())
    if getattr(model.config.get_text_config(), "is_causal", True) or causal:
        raise ValueError(
            f"`model` must be a bidirectional masked diffusion model, got {type(model).__name__} with causal "
            "attention: if its weights were trained for diffusion, call `make_bidirectional(model)`."
        )
    if "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        raise ValueError(
            f"`model` must attend to the whole canvas in every layer, got {type(model).__name__} with sliding "
            "windows: set its `layer_types` to full attention if its weights allow it."
        )


def _without_autograd(compile_config, model, guider):
    """
    Inference mode, which is cheaper per operation than the `no_grad` of Transformers, if all weights are plain
    tensors; captured graphs do not profit from it.
    """
    models = [one for one in (model, getattr(guider, "model", None)) if isinstance(one, torch.nn.Module)]
    is_plain = compile_config is None and all(map(has_plain_weights, models))
    return torch.inference_mode() if is_plain else nullcontext()


def _synchronized(denoiser, model, guider, synced_gpus: bool | None):
    """The denoiser, prepared for forwards that are collective if they are."""
    if not (is_sharded(model) if synced_gpus is None else synced_gpus):
        return denoiser
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            "`synced_gpus` needs several processes, got one without a process group: drop it, or call "
            "`torch.distributed.init_process_group`."
        )
    reader = getattr(guider, "model", None)
    if isinstance(reader, torch.nn.Module) and is_sharded(reader):
        raise ValueError(
            "`guider` must be whole on every process, got one that is sharded: how often it is asked depends on the "
            "text of each."
        )
    return SynchronizedDenoiser(denoiser, model)


def _split_guidance(logits_processor: LogitsProcessorList):
    """Take the classifier-free guidance of Transformers, which runs the model itself, out of its processors."""
    kind = UnbatchedClassifierFreeGuidanceLogitsProcessor
    guidance = next((one for one in logits_processor if isinstance(one, kind)), None)
    scale = 1 if guidance is None else guidance.guidance_scale
    if isinstance(scale, str) or not -math.inf < scale < math.inf:
        raise ValueError(f"`guidance_scale` must be a finite number, got {scale!r}.")
    return LogitsProcessorList(one for one in logits_processor if one is not guidance), guidance


def _denoiser(  # noqa: PLR0913, what a call is made of
    model, canvas: Canvas, layout: Layout, guidance, mask_token_id: int, model_kwargs, compile_config
):
    shift = getattr(model.config, "logits_shift", 0)
    cache, length = model_kwargs.get(CACHE_NAME), canvas.ids.shape[1]
    if cache is not None:
        cache.target.canvas_length = length

    def of(canvas_mask, num_halves: int) -> Denoiser:
        blocks = None
        if canvas.attention_block_length is not None:
            origins = num_halves * canvas.block_origins
            blocks = AttentionBlocks(canvas.attention_block_length, origins, canvas_mask)
        images = canvas.images if canvas.images is None or num_halves == 1 else canvas.images.with_rows_without()
        return Denoiser(model, canvas_mask, cache, shift, compile_config, blocks, canvas.prefix_length, images)

    if guidance is None:
        return of(canvas.mask, 1)
    given = canvas.ids != mask_token_id
    unconditional, unconditional_mask = torch.full_like(canvas.ids, mask_token_id), canvas.mask
    if layout.negative_ids is not None and layout.negative_mask is not None:
        after = (0, length - layout.negative_ids.shape[1])
        unconditional = pad(layout.negative_ids, after, value=mask_token_id)
        unconditional_mask = pad(layout.negative_mask, after, value=1)
    denoiser = of(torch.cat([canvas.mask, unconditional_mask]), 2)
    return ClassifierFreeGuidance(denoiser, guidance.guidance_scale, unconditional, given)


def _drafter(options: DiffusionOptions, generation_config, mask_token_id: int, generator) -> Drafter:
    temperature = generation_config.temperature if generation_config.do_sample else None
    confidence = options.confidence if options.entropy_bound is None else "entropy"
    return Drafter(mask_token_id, confidence, options.position_temperature, temperature, generator)


def _guider(guider, options: DiffusionOptions):
    """The guider as a processor; a bare model gets the default acceptance rule."""
    if guider is None:
        return None
    if options.is_scheduled:
        scheduled = next(name for name in SCHEDULED if getattr(options, name) is not None)
        raise ValueError(
            f"`{scheduled}` fixes how many tokens a step writes and a `guider` decides it, got "
            f"{scheduled}={getattr(options, scheduled)}: drop one of them."
        )
    if options.editing_threshold is not None:
        raise ValueError(
            "`editing_threshold` rewrites tokens that a `guider` has accepted, got "
            f"editing_threshold={options.editing_threshold}: drop one of them."
        )
    if options.blocks == "adaptive":
        raise ValueError(
            "`blocks='adaptive'` needs the probability of the drafts, which a `guider` replaces by its decision: drop "
            "one of them."
        )
    if isinstance(guider, type):
        raise ValueError(f"`guider` must be an object, got the class {guider.__name__}: make one of it.")
    missing = [name for name in CANVAS_PROCESSOR_MEMBERS if not hasattr(guider, name)]
    if missing and isinstance(guider, torch.nn.Module) and is_language_model(guider):
        return ARGuider(guider)  # in a wrapper or not
    if missing:
        raise ValueError(
            "`guider` must be an autoregressive model, an `ARGuider` or a `CanvasProcessor`, got "
            f"{type(guider).__name__} without `{missing[0]}`: load a model with "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    return copy.copy(guider)  # what `reset` makes on it belongs to this call


def _pad_token_id(generation_config: GenerationConfig) -> int:
    if generation_config.pad_token_id is not None:
        return generation_config.pad_token_id
    ends = generation_config.eos_token_id
    return 0 if ends is None else ends[0] if isinstance(ends, list) else ends


def _ends(options: DiffusionOptions, stopping_criteria: list) -> tuple[list[int], list]:
    """End tokens, and the criteria that the loop has to ask: a canvas has its length and its end tokens anyway."""
    ends = [
        criterion.eos_token_id.tolist() for criterion in stopping_criteria if isinstance(criterion, EosTokenCriteria)
    ]
    others = [one for one in stopping_criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    return sum(ends, []) if options.stop_at_eos else [], others
