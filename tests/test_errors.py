"""Every refusal of a call: its type, its whole message, and that the model works as before."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from cases import TINY
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, LogitsProcessorList

from hf_flashdlm import ARGuider, DiffusionOptions, FreeCache
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.generation_mixin import diffusion_generate
from hf_flashdlm.guider import ProductMixture


MASK = 511
PROMPT = [[5, 70, 200, 41]]


def causal(kind="qwen2", **changes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY | changes)).eval()


def used_cache():
    cache = FreeCache()
    states = torch.zeros(1, 1, 6, 4)
    cache.update(states, states, 0)
    return cache


def forbid_all(input_ids, scores):
    return torch.full_like(scores, -torch.inf)


def only_the_mask(input_ids, scores):
    return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([MASK]), 0.0)


@dataclass
class Refusal:
    """A call of `generate` with a prompt of four tokens and its message; options that are callable are called."""

    message: str
    options: dict = field(default_factory=dict)
    prompt: list = field(default_factory=lambda: PROMPT)
    error: type = ValueError


def meaningless(name, value):
    return Refusal(f"`{name}` has no meaning for a diffusion decode, got {value!r}: drop it.", {name: value})


def number(name, kind, limits, value, **more):
    return Refusal(f"`{name}` must be {kind} {limits}, got {value!r}.", {name: value, **more})


def choice(name, choices, protocol, value):
    return Refusal(
        f"`{name}` must be one of {choices}, or an object that follows `{protocol}`, got {value!r}.", {name: value}
    )


def belongs(name, policies, value, policy):
    return Refusal(
        f"`{name}` belongs to window_policy={policies}, got {value} with '{policy}': drop it.",
        {name: value, "window_policy": policy},
    )


def processor(name, **options):
    return Refusal(
        f"`{name}` cannot be used in a diffusion decode, which scores many positions at once: drop the option that "
        "asks for it.",
        options,
    )


REFUSALS = {
    # Options of Transformers that make no sense for a canvas.
    **{
        f"transformers-{name}": meaningless(name, value)
        for name, value in {
            "num_beams": 2,
            "output_scores": True,
            "output_logits": True,
            "output_attentions": True,
            "output_hidden_states": True,
            "cache_implementation": "static",
            "prompt_lookup_num_tokens": 3,
            "token_healing": True,
        }.items()
    },
    "assistant-model": Refusal(
        "`assistant_model` proposes tokens, which a diffusion model does itself: pass the model as `guider` to let it "
        "judge the drafts.",
        dict(assistant_model=causal),
    ),
    "processor-of-encoders": processor("EncoderRepetitionPenaltyLogitsProcessor", encoder_repetition_penalty=1.5),
    "processor-of-encoder-ngrams": processor("EncoderNoRepeatNGramLogitsProcessor", encoder_no_repeat_ngram_size=2),
    "processor-watermark": processor(
        "WatermarkLogitsProcessor", watermarking_config=dict(greenlist_ratio=0.25, bias=2.0)
    ),
    **{
        f"ids-alone-{name}": Refusal(
            f"`{name}` needs return_dict_in_generate=True, got a call that returns ids alone.", {name: True}
        )
        for name in ("output_confidence", "output_history")
    },
    # The cache.
    "cache-of-transformers": Refusal(
        f"`{CACHE_NAME}` must be a fresh `FreeCache`, got a DynamicCache of 0 tokens: drop it, or `reset` it.",
        dict(cache=DynamicCache),
    ),
    "cache-that-was-used": Refusal(
        f"`{CACHE_NAME}` must be a fresh `FreeCache`, got a FreeCache of 0 tokens: drop it, or `reset` it.",
        dict(cache=used_cache),
    ),
    # The prompt.
    "prompt-empty": Refusal(
        "`input_ids` must hold at least one token in every row that is not padding, got an empty row.",
        prompt=[[]],
    ),
    "prompt-all-padding": Refusal(
        "`input_ids` must hold at least one token in every row that is not padding, got an empty row.",
        dict(attention_mask=lambda: torch.tensor([[1, 1], [0, 0]])),
        prompt=[[5, 6], [0, 0]],
    ),
    "prompt-padded-right": Refusal(
        "`input_ids` must be padded on the left, got padding on the right: set padding_side='left'.",
        dict(attention_mask=lambda: torch.tensor([[1, 1], [1, 0]])),
        prompt=[[5, 6], [5, 0]],
    ),
    "prompt-padded-with-masks": Refusal(
        f"`input_ids` must not be padded with the mask token {MASK}, whose positions are filled: set another "
        "`pad_token` in the tokenizer.",
        dict(attention_mask=lambda: torch.tensor([[1, 1], [0, 1]])),
        prompt=[[5, 6], [MASK, 5]],
    ),
    "prompt-mask-of-another-shape": Refusal(
        "`attention_mask` must have the shape of `input_ids`, (1, 4), got (1, 3).",
        dict(attention_mask=lambda: torch.tensor([[0, 1, 1]])),
    ),
    "prompt-too-long": Refusal(
        "`max_new_tokens` and the prompt must fit the model's 512 positions together, got 514: shorten one of them.",
        dict(max_new_tokens=510),
    ),
    "negative-prompt-padded-right": Refusal(
        "`negative_prompt_ids` must be padded on the left, got padding on the right: set padding_side='left'.",
        dict(
            guidance_scale=2.0,
            negative_prompt_ids=lambda: torch.tensor([[5, 0]]),
            negative_prompt_attention_mask=lambda: torch.tensor([[1, 0]]),
        ),
    ),
    "nothing-to-generate": Refusal("`max_new_tokens` must be greater than 0, but is 0.", dict(max_new_tokens=0)),
    # The mask token.
    **{
        f"mask-token-{value}": Refusal(
            f"`mask_token_id` must be an id of the model's vocabulary of 512, got {value}: pass that of the "
            "tokenizer's mask token, or set it in `model.config`.",
            dict(mask_token_id=value),
        )
        for value in (512, 126336)
    },
    # Blocks and steps.
    "block-above-the-canvas": Refusal(
        "`block_length` must be at most `max_new_tokens`=6, got 7: lower it, or generate more.", dict(block_length=7)
    ),
    "steps-below-the-blocks": Refusal(
        "`steps` must give each of the 3 blocks of 2 tokens at least one step, got 2: raise it, or raise "
        "`block_length`.",
        dict(block_length=2, steps=2),
    ),
    **{
        f"steps-and-{rule}": Refusal(
            f"`steps` fixes how many tokens a step writes and `{rule}` leaves it open, got steps=6 and {rule}=0.5: "
            "pass one of them, and `None` for the other if the model's generation config sets it.",
            {"steps": 6, rule: 0.5},
        )
        for rule in ("confidence_threshold", "factor", "frechet_delta", "entropy_bound")
    },
    "two-rules": Refusal(
        "`confidence_threshold` and `factor` are rules for the same thing: pass one of them.",
        dict(confidence_threshold=0.5, factor=1.0),
    ),
    **{
        f"schedule-and-{rule}": Refusal(
            f"`schedule` fixes how many tokens a step writes and `{rule}` leaves it open, got schedule=uniform and "
            f"{rule}=0.5: pass one of them, and `None` for the other if the model's generation config sets it.",
            {"schedule": "uniform", rule: 0.5},
        )
        for rule in ("confidence_threshold", "factor", "frechet_delta", "entropy_bound")
    },
    "steps-per-block-and-steps": Refusal(
        "`steps_per_block` counts the steps of a block and `steps` those of the whole region, got 2 and 8: drop one "
        "of them.",
        dict(steps_per_block=2, steps=8),
    ),
    "steps-per-block-and-timesteps": Refusal(
        "`steps_per_block` counts the steps of a block and `schedule` those of the whole region, got 2 and "
        "'timesteps': drop one of them.",
        dict(steps_per_block=2, schedule="timesteps"),
    ),
    "empty-steps-of-timesteps": Refusal(
        "`run_empty_steps` belongs to schedule='timesteps', got schedule=None: drop it.", dict(run_empty_steps=True)
    ),
    **{
        f"method-{value}": Refusal(
            "`method` must be one of llada, dream, dkv-cache, freecache, fast-dllm, fast-dllm-prefix, "
            "fast-dllm-dual, adablock, eb-sampler, sdar, bd3lm, llada2, llada2.1, fast-dllm-v2, flashdlm, "
            f"flashdlm-fast, got {value!r}.",
            dict(method=value),
        )
        for value in ("fast", 3)
    },
    "delimiters-missing": Refusal(
        "`delimiter_token_ids` must be the ids of the tokens at which an adaptive block may end, got None: pass for "
        "example those of a line break, `tokenizer.encode('\\n', add_special_tokens=False)`.",
        dict(method="adablock"),
    ),
    **{
        f"{name}-of-adaptive-blocks": Refusal(
            f"`{name}` belongs to blocks='adaptive', got blocks='fixed': drop it.", {name: value}
        )
        for name, value in {"delimiter_threshold": 0.5, "delimiter_window": 4}.items()
    },
    "adaptive-blocks-and-steps": Refusal(
        "`steps` are spread over blocks whose number is known, got blocks='adaptive': drop one of them.",
        dict(blocks="adaptive", delimiter_token_ids=3, steps=6),
    ),
    "adaptive-blocks-of-another-measure": Refusal(
        "`blocks='adaptive'` compares the probability of drafts with `delimiter_threshold`, got another measure in "
        "`confidence`, `position_temperature` or `entropy_bound`: drop it.",
        dict(blocks="adaptive", delimiter_token_ids=3, entropy_bound=0.1),
    ),
    "adaptive-blocks-and-guider": Refusal(
        "`blocks='adaptive'` needs the probability of the drafts, which a `guider` replaces by its decision: drop one "
        "of them.",
        dict(blocks="adaptive", delimiter_token_ids=3, guider=causal),
    ),
    "whole-and-block-length": Refusal(
        "`block_length` divides a region that blocks='whole' leaves undivided, got 3: drop one of them.",
        dict(blocks="whole", block_length=3),
    ),
    **{},
    **{
        f"confidence-{value}": Refusal(
            f"`confidence` must be 'probability' for `confidence_threshold`, got {value!r}: drop it, or pass "
            "`steps` or an `unmasking_rule`.",
            dict(confidence=value),
        )
        for value in ("margin", "entropy", "random")
    },
    "confidence-of-an-entropy-bound": Refusal(
        "`confidence` must be 'entropy' for `entropy_bound`, got 'margin': drop it, or pass `steps` or an "
        "`unmasking_rule`.",
        dict(confidence="margin", entropy_bound=1.0),
    ),
    # Values of options.
    **{
        f"{name}-{value}": number(name, "an integer", "of at least 1", value, **more)
        for name, more in {
            "block_length": {},
            "steps": {},
            "freeze_length": {},
            "right_window": {},
            "refresh_blocks": {},
            "refresh_steps": dict(window_policy="dkv"),
        }.items()
        for value in (0, -3, 2.0, "4", True)
    },
    **{
        f"{name}-{value}": number(name, "an integer", "of at least 0", value)
        for name in ("freeze_lag", "left_margin", "mask_token_id", "prompt_tail")
        for value in (-1, 1.5)
    },
    **{
        f"{name}-{value}": number(name, "a number", "of at least 0", value)
        for name in ("position_temperature", "factor", "entropy_bound", "refresh_entropy", "schedule_shift")
        for value in (-0.1, "high")
    },
    **{
        f"{name}-{value}": number(name, "a number", "between 0 and 1", value, **more)
        for name, more in {"eps": dict(steps=6), "confidence_threshold": {}}.items()
        for value in (-0.1, 1.1)
    },
    # What has a default that is not None must not be None.
    "freeze_lag-None": number("freeze_lag", "an integer", "of at least 0", None),
    "left_margin-None": number("left_margin", "an integer", "of at least 0", None),
    "position_temperature-None": number("position_temperature", "a number", "of at least 0", None),
    "eps-None": number("eps", "a number", "between 0 and 1", None),
    **{
        f"repetition_penalty-{value}": Refusal(
            f"`repetition_penalty` must be greater than 0, got {value}.", dict(repetition_penalty=value)
        )
        for value in (0, -1.5)
    },
    "window_policy": choice("window_policy", "freecache, prefix, dual, dkv, none", "WindowPolicy", "fast"),
    "window_policy-None": choice("window_policy", "freecache, prefix, dual, dkv, none", "WindowPolicy", None),
    "confidence": choice(
        "confidence", "probability, margin, entropy, random, position", "Confidence", "low_confidence"
    ),
    "schedule": choice("schedule", "uniform, timesteps, linear, shift", "Schedule", "cosine"),
    "schedule_shift-0": Refusal("`schedule_shift` must be a number above 0, got 0.", dict(schedule_shift=0)),
    # A prompt that is computed by itself.
    "prompt-tail-alone": Refusal(
        "`prompt_tail` belongs to prefix_lm=True, got 2 and prefix_lm=False: drop it.", dict(prompt_tail=2)
    ),
    **{
        f"prompt-tail-{value}": Refusal(
            "`prompt_tail` must be shorter than each prompt, the shortest of which has 4 tokens, got "
            f"{value}: lower it.",
            dict(prefix_lm=True, prompt_tail=value),
        )
        for value in (4, 9)
    },
    "prompt-tail-of-an-uneven-batch": Refusal(
        "`prompt_tail` must be shorter than each prompt, the shortest of which has 2 tokens, got 2: lower it.",
        dict(prefix_lm=True, prompt_tail=2, attention_mask=lambda: torch.tensor([[1, 1, 1], [0, 1, 1]])),
        prompt=[[5, 6, 7], [0, 5, 6]],
    ),
    "prefix-of-masks": Refusal(
        "`prefix_lm` computes the first 3 positions before anything is written, got mask tokens among them: drop it, "
        "or raise `prompt_tail`.",
        dict(prefix_lm=True, prompt_tail=1),
        prompt=[[5, MASK, 200, MASK]],
    ),
    # Options of other window policies.
    **{
        f"{name}-of-freecache": belongs(name, "'freecache'", value, "dual")
        for name, value in {
            "freeze_length": 4,
            "left_margin": 2,
            "right_window": 5,
            "attend_stale": True,
            "refresh_blocks": 1,
            "refresh_entropy": 1.0,
        }.items()
    },
    "freeze_lag-of-freecache": belongs("freeze_lag", "'freecache'", 2, "none"),
    "grow_canvas-of-two": belongs("grow_canvas", "'freecache' or 'none'", True, "prefix"),
    "refresh_steps-of-dkv": belongs("refresh_steps", "'dkv'", 4, "freecache"),
    # Guider and generator.
    "guider-and-steps": Refusal(
        "`steps` fixes how many tokens a step writes and a `guider` decides it, got steps=6: drop one of them.",
        dict(guider=causal, steps=6),
    ),
    "guider-of-a-wrong-type": Refusal(
        "`guider` must be an autoregressive model, an `ARGuider` or a `CanvasProcessor`, got str without `lookahead`: "
        "load a model with `AutoModelForCausalLM.from_pretrained`.",
        dict(guider="Qwen/Qwen2.5-0.5B"),
    ),
    "guider-of-another-vocabulary": Refusal(
        "`guider` must share the diffusion model's vocabulary of 512 tokens, got one of 300: pass both "
        "tokenizers, `ARGuider(model, tokenizer=..., canvas_tokenizer=...)`.",
        dict(guider=lambda: causal(vocab_size=300)),
    ),
    "generator-without-sampling": Refusal(
        "`generator` is the source of randomness of `do_sample=True`, got do_sample=False.",
        dict(generator=torch.Generator),
    ),
    # Processors that leave nothing to write.
    **{
        f"processor-{processor.__name__}-{kind}": Refusal(
            "Row 0 could not unmask any position: every candidate was refused or has no finite score. A logits "
            "processor must leave each unfinished row a candidate other than the mask token.",
            dict(logits_processor=lambda processor=processor: LogitsProcessorList([processor]), **more),
            error=RuntimeError,
        )
        for processor in (forbid_all, only_the_mask)
        for kind, more in dict(rule={}, steps=dict(steps=3), guider=dict(guider=causal)).items()
    },
}


@pytest.fixture(scope="module")
def undisturbed(tiny):
    """What the model generates before any call was refused."""
    return tiny("llada").generate(torch.tensor(PROMPT), max_new_tokens=6).tolist()


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_refused_call_says_why_and_leaves_the_model_as_it_was(tiny, undisturbed, refusal):
    model = tiny("llada")
    before = (set(vars(model)), model.generation_config.to_dict())
    options = {name: value() if callable(value) else value for name, value in refusal.options.items()}
    prompt = torch.tensor(refusal.prompt, dtype=torch.long)
    with pytest.raises(refusal.error, match=f"^{re.escape(refusal.message)}$"):
        model.generate(prompt, **dict(max_new_tokens=6) | options)
    assert (set(vars(model)), model.generation_config.to_dict()) == before
    assert model.generate(torch.tensor(PROMPT), max_new_tokens=6).tolist() == undisturbed


@pytest.mark.parametrize("source", ["keyword", "configuration", "model"])
def test_an_option_is_checked_wherever_it_comes_from(tiny, tmp_path, source):
    model, options = tiny("llada"), {}
    if source == "keyword":
        options = dict(block_length=-3)
    elif source == "configuration":
        options = dict(generation_config=GenerationConfig(block_length=-3))
    else:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        model.generation_config.block_length = -3
    with pytest.raises(ValueError, match=r"^`block_length` must be an integer of at least 1, got -3\.$"):
        model.generate(torch.tensor(PROMPT), max_new_tokens=4, **options)


@pytest.mark.parametrize("name", DiffusionOptions.names())
def test_every_option_refuses_nonsense(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        DiffusionOptions(**{name: "nonsense"})


def test_a_model_without_a_mask_token_is_refused(tiny, tmp_path):
    tiny("llada").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model.config.mask_token_id = None
    with pytest.raises(ValueError, match="^`mask_token_id` must be an id of the model's vocabulary of 512, got None"):
        model.generate(torch.tensor(PROMPT), max_new_tokens=4)
    assert model.generate(torch.tensor(PROMPT), max_new_tokens=4, mask_token_id=MASK).shape == (1, 8)


def test_a_negative_prompt_of_padding_is_refused(tiny):
    with pytest.raises(ValueError, match="^`negative_prompt_ids` must hold at least one token in every row"):
        tiny("llada").generate(
            torch.tensor(PROMPT),
            max_new_tokens=4,
            guidance_scale=2.0,
            negative_prompt_ids=torch.tensor([[0, 0]]),
            negative_prompt_attention_mask=torch.tensor([[0, 0]]),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(accept="best"), "`accept` must be one of top1, topk, topk_relative, got 'best'."),
        (dict(top_k=0), "`top_k` must be a positive integer, got 0."),
        (dict(top_k=1.5), "`top_k` must be a positive integer, got 1.5."),
        (dict(relative_threshold=1.5), "`relative_threshold` must lie between 0 and 1, got 1.5."),
        (dict(relative_threshold=-1), "`relative_threshold` must lie between 0 and 1, got -1."),
        (dict(num_drafts=0), "`num_drafts` must be a positive integer, got 0."),
        (dict(num_drafts="4"), "`num_drafts` must be a positive integer, got '4'."),
        (dict(combine="both"), "`combine` must be one of union, intersection or None, got 'both'."),
        (dict(confidence_threshold=2), "`confidence_threshold` must lie between 0 and 1, got 2."),
        (dict(gate="on"), "`gate` must be 'auto' or None, got 'on'."),
    ],
    ids=str,
)
def test_a_guider_refuses_what_it_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ARGuider(None, **options)


def test_a_product_mixture_refuses_a_weight_that_is_none():
    with pytest.raises(ValueError, match=r"^`weight` must lie between 0 and 1, got 1\.5\.$"):
        ProductMixture(None, weight=1.5)


def test_a_causal_model_is_refused():
    model = causal()
    model.config.mask_token_id = MASK
    message = (
        "`model` must be a bidirectional masked diffusion model, got FlashDLMQwen2ForCausalLM with causal attention: "
        "if its weights were trained for diffusion, call `make_bidirectional(model)`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        diffusion_generate(model, torch.tensor(PROMPT), max_new_tokens=4)


def test_a_stop_string_needs_a_tokenizer(tiny):
    with pytest.raises(ValueError, match="stop strings.*could not locate a tokenizer"):
        tiny("llada").generate(torch.tensor(PROMPT), max_new_tokens=4, stop_strings=["a"])


def test_a_loop_that_fails_leaves_a_guider_and_a_cache_that_can_be_used_again(tiny):
    guider, cache = ARGuider(tiny("guider")), FreeCache()
    model, calls = tiny("dream_trained"), []

    def fail(input_ids, scores):
        calls.append(1)
        if len(calls) > 4:
            raise KeyError("planted")
        return scores

    options = dict(max_new_tokens=8, block_length=2, guider=guider, stop_at_eos=False)
    wanted = model.generate(torch.tensor(PROMPT), **options)
    with pytest.raises(KeyError, match="planted"):
        model.generate(torch.tensor(PROMPT), cache=cache, logits_processor=LogitsProcessorList([fail]), **options)
    cache.reset()
    assert model.generate(torch.tensor(PROMPT), cache=cache, **options).tolist() == wanted.tolist()
