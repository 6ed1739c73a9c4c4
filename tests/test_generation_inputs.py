"""What a call of `generate` may be given: the types that Transformers takes, and one sentence for anything else."""

import copy
import re

import numpy
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from hf_flashdlm import FreeCache
from hf_flashdlm.compiling import CACHE_NAME


PROMPT, MASK = torch.tensor([[5, 70, 200, 41]]), torch.tensor([[0, 1, 1, 1]])
OPTIONS = dict(max_new_tokens=6, pad_token_id=508)
BIG = 10**12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
@pytest.mark.parametrize("policy", ["freecache", "dkv", "none"])
def test_ids_may_be_any_integers(tiny, dtype, policy):
    outputs = [tiny("llada").generate(ids, **OPTIONS, window_policy=policy) for ids in (PROMPT, PROMPT.to(dtype))]
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_be_of_any_type(tiny, dtype):
    outputs = [tiny("llada").generate(PROMPT, attention_mask=mask, **OPTIONS) for mask in (MASK, MASK.to(dtype))]
    assert outputs[0].equal(outputs[1])


def test_negative_prompts_may_be_of_other_types_and_lengths(tiny):
    def decode(ids, mask):
        return tiny("llada").generate(
            PROMPT.repeat(4, 1),
            attention_mask=torch.ones(4, 4),
            negative_prompt_ids=ids,
            negative_prompt_attention_mask=mask,
            guidance_scale=1.5,
            **OPTIONS,
        )

    ids, mask = torch.tensor([[9, 9, 8, 7, 6], [0, 9, 8, 7, 5]]), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    assert decode(ids.int(), mask.bool()).equal(decode(ids, mask))


@pytest.mark.parametrize("kind", [numpy.int64, numpy.int32, torch.tensor])
def test_options_may_be_scalars_of_numpy_and_torch(tiny, kind):
    float_kind = torch.tensor if kind is torch.tensor else numpy.float64
    plain = tiny("llada").generate(PROMPT, max_new_tokens=6, block_length=3, confidence_threshold=0.5)
    options = dict(max_new_tokens=kind(6), block_length=kind(3), confidence_threshold=float_kind(0.5))
    assert tiny("llada").generate(PROMPT, **options).equal(plain)


@pytest.mark.parametrize("source", ["keyword", "config"])
@pytest.mark.parametrize("length", [dict(max_new_tokens=3), dict(max_length=7, max_new_tokens=None)], ids=str)
def test_a_block_length_of_the_model_yields_to_a_shorter_request(tiny, length, source):
    model = copy.copy(tiny("llada"))
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.block_length = 8
    if source == "config":
        length = dict(generation_config=GenerationConfig(**length))
    assert model.generate(PROMPT, **length).shape == (1, 7)
    with pytest.raises(ValueError, match="^`block_length` must be at most `max_new_tokens`=3, got 5: "):
        model.generate(PROMPT, **length, block_length=5)


def test_position_ids_that_count_the_tokens_are_taken(tiny):
    positions = torch.tensor([[0, 0, 1, 2]])
    plain = tiny("llada").generate(PROMPT, attention_mask=MASK, **OPTIONS)
    assert tiny("llada").generate(PROMPT, attention_mask=MASK, position_ids=positions, **OPTIONS).equal(plain)


def test_a_fresh_cache_is_taken(tiny):
    plain = tiny("llada").generate(PROMPT, **OPTIONS)
    assert tiny("llada").generate(PROMPT, cache=FreeCache(), **OPTIONS).equal(plain)


def shape(name, got):
    return f"`{name}` must be a tensor of shape (batch_size, length), got {got}."


def integers(name, got):
    return f"`{name}` must hold integers, got {got}: pass the ids of a tokenizer."


def vocabulary(name, got):
    return f"`{name}` must hold ids of the model's vocabulary, 0 to 511, got {got}: use the tokenizer of the model."


def masked(name, of, got):
    return f"`{name}` must have the shape of `{of}`, (1, 4), got {got}."


def rows(wanted, got):
    return f"`negative_prompt_ids` must hold one row, or one for each of the {wanted} prompts, got {got}."


def guided(message, ids, num_rows=1, **more):
    return message, dict(guidance_scale=2.0, negative_prompt_ids=ids, **more), PROMPT.repeat(num_rows, 1)


def overflow(name, value, **more):
    limits = "must lie between 1e-20 and 1e+20"
    return f"`{name}` {limits}, got {value}: scores overflow.", {name: value, **more}, PROMPT


def number(name, largest, value, **more):
    return f"`{name}` must be an integer between 1 and {largest}, got {value!r}.", {name: value, **more}, PROMPT


NOT_FRESH = f"`{CACHE_NAME}` must be a fresh `FreeCache`, got a"
VALUES = "`attention_mask` must be 1 at tokens and 0 at padding, got"
NO_EMBEDDINGS = (
    "`inputs_embeds` has no meaning for a diffusion decode, whose canvas holds ids: pass `input_ids` alone."
)
EMPTY, EMBEDDINGS = torch.zeros(0, 4, dtype=torch.long), torch.zeros(1, 4, 64)

REFUSALS = {
    "ids-float": (integers("input_ids", "torch.float32"), {}, PROMPT.float()),
    "ids-bool": (integers("input_ids", "torch.bool"), {}, PROMPT > 5),
    "ids-large": (vocabulary("input_ids", 900), {}, torch.tensor([[5, 900]])),
    "ids-negative": (vocabulary("input_ids", -4), {}, torch.tensor([[5, -4]])),
    "ids-one-dimension": (shape("input_ids", "shape (4,)"), {}, PROMPT[0]),
    "ids-three-dimensions": (shape("input_ids", "shape (1, 1, 4)"), {}, PROMPT[None]),
    "ids-list": (shape("input_ids", "a list"), {}, PROMPT.tolist()),
    "ids-numpy": (shape("input_ids", "a ndarray"), {}, PROMPT.numpy()),
    "ids-none": (
        "`input_ids` must hold at least one token in every row that is not padding, got an empty row.",
        dict(attention_mask=EMPTY),
        EMPTY,
    ),
    "mask-shape": (masked("attention_mask", "input_ids", (1, 3)), dict(attention_mask=MASK[:, 1:]), PROMPT),
    "mask-list": (masked("attention_mask", "input_ids", "a list"), dict(attention_mask=MASK.tolist()), PROMPT),
    "mask-two": (f"{VALUES} 2.", dict(attention_mask=2 * MASK), PROMPT),
    "mask-nan": (f"{VALUES} nan.", dict(attention_mask=MASK * torch.nan), PROMPT),
    "positions": (
        "`position_ids` must count the tokens of each row from 0, as a diffusion decode does itself: drop it.",
        dict(position_ids=torch.tensor([[3, 4, 5, 6]])),
        PROMPT,
    ),
    "embeddings": (NO_EMBEDDINGS, dict(inputs_embeds=EMBEDDINGS), PROMPT),
    "embeddings-alone": (NO_EMBEDDINGS, dict(inputs_embeds=EMBEDDINGS), None),
    "cache-number": (f"{NOT_FRESH} int: drop it.", {CACHE_NAME: 3}, PROMPT),
    "cache-tuple": (f"{NOT_FRESH} tuple: drop it.", {"cache": ()}, PROMPT),
    "cache-class": (f"{NOT_FRESH} type: drop it.", {"cache": DynamicCache}, PROMPT),
    "length-float": number("max_new_tokens", 2**22, 6.0),
    "length-bool": number("max_new_tokens", 2**22, True),
    "length-absurd": number("max_new_tokens", 2**22, BIG),
    "max-length-absurd": number("max_length", 2**22, BIG, max_new_tokens=None),
    "sequences-absurd": number("num_return_sequences", 2**16, BIG, do_sample=True),
    "steps-absurd": (f"`steps` must be at most 1048576, got {BIG}: lower it.", dict(steps=BIG), PROMPT),
    "lag-absurd": (f"`freeze_lag` must be at most 1048576, got {BIG}: lower it.", dict(freeze_lag=BIG), PROMPT),
    "temperature-inf": overflow("temperature", torch.inf, do_sample=True),
    "temperature-tiny": overflow("temperature", 1e-310, do_sample=True),
    "position-temperature": overflow("position_temperature", 1e-40, steps=6),
    "guidance-inf": overflow("guidance_scale", torch.inf),
    "guidance-nan": overflow("guidance_scale", torch.nan),
    "negative-rows": guided(rows(3, 2), PROMPT.repeat(2, 1), num_rows=3),
    "negative-more-rows": guided(rows(1, 3), PROMPT.repeat(3, 1)),
    "negative-no-row": guided(rows(1, 0), EMPTY),
    "negative-one-dimension": guided(shape("negative_prompt_ids", "shape (4,)"), PROMPT[0]),
    "negative-list": guided(shape("negative_prompt_ids", "a list"), PROMPT.tolist()),
    "negative-float": guided(integers("negative_prompt_ids", "torch.float32"), PROMPT.float()),
    "negative-large": guided(vocabulary("negative_prompt_ids", 1100), PROMPT + 900),
    "negative-long": guided(
        "`negative_prompt_ids` and the prompt must fit the model's 512 positions together, got 516: shorten one of "
        "them.",
        torch.full((1, 510), 9),
    ),
    "negative-mask": guided(
        masked("negative_prompt_attention_mask", "negative_prompt_ids", (1, 3)),
        PROMPT,
        negative_prompt_attention_mask=MASK[:, 1:],
    ),
    "negative-mask-values": guided(
        "`negative_prompt_attention_mask` must be 1 at tokens and 0 at padding, got 3.",
        PROMPT,
        negative_prompt_attention_mask=3 * MASK,
    ),
    "synced-alone": (
        "`synced_gpus` needs several processes, got one without a process group: drop it, or call "
        "`torch.distributed.init_process_group`.",
        dict(synced_gpus=True),
        PROMPT,
    ),
}


@pytest.mark.parametrize(("message", "options", "prompt"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_used_is_refused_in_one_sentence(tiny, message, options, prompt):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny("llada").generate(prompt, **OPTIONS | options)


def test_a_streamer_is_told_nothing_of_a_call_that_is_refused(tiny):
    class Streamer:
        def put(self, ids):
            raise AssertionError

    with pytest.raises(ValueError, match="^`input_ids` must hold integers"):
        tiny("llada").generate(PROMPT.float(), streamer=Streamer(), **OPTIONS)


def test_more_positions_than_fit_in_memory_are_refused(tiny):
    model = copy.deepcopy(tiny("llada"))
    model.config.max_sequence_length = None
    with pytest.raises(ValueError) as error:
        model.generate(PROMPT, max_new_tokens=2**21, num_return_sequences=2**10, do_sample=True)
    assert str(error.value) == (
        f"`max_new_tokens` and the prompts must be at most {2**28} tokens together, got 1024 rows of {2**21 + 4}: "
        "pass fewer rows at a time."
    )


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(tiny, call):
    with pytest.raises(ValueError) as error:
        getattr(tiny("llada"), call)([[5, 6]])
    assert str(error.value) == (
        "`generate_batch` and continuous batching decode from left to right, which a diffusion model does not: call "
        "`generate` with a padded batch."
    )


def test_an_adapter_of_virtual_tokens_is_refused_and_one_that_was_taken_off_is_not(tiny):
    """PEFT's prompt and prefix tuning insert their tokens where Transformers prepares the inputs of a forward."""
    model = copy.copy(tiny("llada"))
    model.__dict__ = dict(model.__dict__)
    plain, own = model.generate(PROMPT, **OPTIONS), model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError) as error:
        model.generate(PROMPT, **OPTIONS)
    assert str(error.value) == (
        "`model` has an adapter of prompt or prefix tuning, whose tokens a diffusion decode would leave out: use one "
        "that changes the weights, such as LoRA."
    )
    model.prepare_inputs_for_generation = own
    assert model.generate(PROMPT, **OPTIONS).equal(plain)


def not_finite(name):
    return (
        f"{name} gave row 0 scores that are not finite (NaN or infinite): check its weights and their dtype, or its "
        "settings."
    )


@pytest.mark.parametrize("policy", ["freecache", "none"])
def test_a_model_whose_scores_are_not_finite_is_named(tiny, policy):
    model = copy.deepcopy(tiny("llada"))
    with torch.no_grad():
        model.model.transformer.ff_out.weight[7] = torch.nan
    with pytest.raises(RuntimeError) as error:
        model.generate(PROMPT, **OPTIONS, window_policy=policy)
    assert str(error.value) == not_finite("The model")


def test_a_processor_whose_scores_are_not_finite_is_named(tiny):
    processors = LogitsProcessorList([lambda ids, scores: scores * torch.nan])
    with pytest.raises(RuntimeError) as error:
        tiny("llada").generate(PROMPT, **OPTIONS, logits_processor=processors)
    assert str(error.value) == not_finite("A logits processor or the guider")


class Wrapped(torch.Tensor):
    """A tensor of another class, as those of quantized weights are."""


def test_weights_that_are_not_plain_tensors_are_decoded_outside_of_inference_mode(tiny):
    model, modes = copy.deepcopy(tiny("llada")), []
    model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    plain = model.generate(PROMPT, **OPTIONS)
    head = model.model.transformer.ff_out
    head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(Wrapped))
    assert model.generate(PROMPT, **OPTIONS).tolist() == plain.tolist()
    half = len(modes) // 2
    assert modes == [True] * half + [False] * half
