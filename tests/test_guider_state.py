"""What a guider is given and keeps: settings, wrapped models, and a state for each call."""

import copy
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import MASK, PROMPTS
from guided_cases import FILLED
from test_cache_name import Newer, Older, of_class

from hf_flashdlm import ARGuider, ProductMixture
from hf_flashdlm.compiling import cache_name, unwrapped


# --- settings --------------------------------------------------------------------------------------------------------

NO_NUMBERS = ["x", "0.5", None, True, [1], float("nan"), float("inf"), -1, np.float64("nan"), np.array([1, 2]), {}]
NO_NAMES = ["", "x", 1, True, ["topk"], np.array([1, 2]), float("nan")]
REFUSED = {
    "accept": [*NO_NAMES, None],
    "top_k": [*NO_NUMBERS, 0, 1.5, np.bool_(True), torch.tensor(2.0)],
    "relative_threshold": [*NO_NUMBERS, 1.5, torch.tensor(True)],
    "num_drafts": [*NO_NUMBERS, 0, 2.0],
    "combine": NO_NAMES,
    "confidence_threshold": [*NO_NUMBERS, 1.0001],
    "beyond_prefix": ["no", 0, 1, None, [True], np.array([True, False])],
    "gate": NO_NAMES,
    "cost_ratio": [value for value in NO_NUMBERS if value is not None] + [10**400],
}
TAKEN = [
    dict(top_k=np.int64(3), relative_threshold=np.float32(0.5), num_drafts=torch.tensor(4)),
    dict(confidence_threshold=torch.tensor(0.5), combine="union", beyond_prefix=np.bool_(True)),
    dict(gate="auto", cost_ratio=np.float64(0.25), accept=np.str_("topk")),
    dict(top_k=10**30, num_drafts=10**30, relative_threshold=0, confidence_threshold=1, cost_ratio=1e300, gate="auto"),
]


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_of_a_wrong_kind_is_refused_by_name(tiny, name):
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=f"^`{name}` must "):
            ARGuider(tiny("guider"), **{name: value})


@pytest.mark.parametrize("name", ["weight", "num_drafts"])
def test_a_product_mixture_refuses_them_too(tiny, name):
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=f"^`{name}` must "):
            ProductMixture(tiny("guider"), **{name: value})


@pytest.mark.parametrize("settings", TAKEN, ids=str)
def test_scalars_of_numpy_and_torch_are_the_numbers_that_they_hold(tiny, decode, settings):
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}
    outputs = [
        decode(tiny("dream_trained"), PROMPTS, guider=ARGuider(tiny("guider"), **each), **FILLED)
        for each in (settings, plain)
    ]
    assert outputs[0].sequences.equal(outputs[1].sequences)
    assert outputs[0].accepted_lengths == outputs[1].accepted_lengths


@pytest.mark.parametrize(
    ("model", "got"),
    [(None, "NoneType"), ("gpt2", "str"), (torch.nn.Linear(2, 2), "Linear"), (Older, "the class Older")],
    ids=str,
)
def test_what_is_no_language_model_is_refused(model, got):
    message = (
        f"`model` must be an autoregressive language model, got {got}: load one with "
        "`AutoModelForCausalLM.from_pretrained`."
    )
    for kind in (ARGuider, ProductMixture):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            kind(model)


def test_a_guider_in_a_guider_and_a_wrong_tokenizer_are_refused(tiny, guider):
    with pytest.raises(ValueError, match="^`model` must be an autoregressive language model, got ARGuider: load one"):
        ARGuider(guider())
    for name, other in (("tokenizer", "canvas_tokenizer"), ("canvas_tokenizer", "tokenizer")):
        with pytest.raises(ValueError, match=f"^`{name}` must be a tokenizer, got int: load one, or drop it\\.$"):
            ARGuider(tiny("guider"), **{name: 3, other: None})


@pytest.mark.parametrize("kind", [ARGuider, ProductMixture])
def test_a_class_in_place_of_a_guider_is_refused(tiny, decode, kind):
    message = f"`guider` must be an object, got the class {kind.__name__}: make one of it."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), PROMPTS, guider=kind, **FILLED)


@pytest.mark.parametrize("generator", [3, "cpu", np.random.default_rng(0)], ids=str)
def test_a_generator_of_another_kind_is_refused(tiny, decode, generator):
    message = f"`generator` must be a `torch.Generator`, got {type(generator).__name__}."
    for do_sample in (True, False):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            decode(tiny("dream_trained"), PROMPTS, generator=generator, do_sample=do_sample, **FILLED)


@pytest.mark.parametrize(
    ("scale", "rule"),
    [
        ("x", "must be a finite number, got 'x'."),
        (float("nan"), "must lie between 1e-20 and 1e+20, got nan: scores overflow."),
        (float("inf"), "must lie between 1e-20 and 1e+20, got inf: scores overflow."),
    ],
)
def test_a_guidance_scale_that_is_no_finite_number_is_refused(tiny, decode, scale, rule):
    with pytest.raises(ValueError, match=f"^{re.escape(f'`guidance_scale` {rule}')}$"):
        decode(tiny("dream_trained"), PROMPTS, guidance_scale=scale, **FILLED)


# --- logits that are no numbers --------------------------------------------------------------------------------------


def fill(output, value):
    """Give every position this logit for one token."""
    output.logits[..., 7] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [ARGuider, ProductMixture])
def test_a_guider_without_finite_logits_is_named(tiny, decode, kind, value):
    broken = copy.deepcopy(tiny("guider"))
    broken.register_forward_hook(lambda _, args, output: fill(output, value))
    message = (
        "`guider` must give finite logits, got infinite ones or NaN from Qwen2ForCausalLM: load it in bfloat16 or "
        "float32, and check its weights."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), PROMPTS, guider=kind(broken), **FILLED)


def test_a_guider_that_forbids_tokens_is_taken(tiny, decode):
    strict = copy.deepcopy(tiny("guider"))
    strict.register_forward_hook(lambda _, args, output: fill(output, -torch.inf))
    output = decode(tiny("dream_trained"), PROMPTS, guider=ARGuider(strict), **FILLED)
    assert not (output.sequences == MASK).any()


@pytest.mark.parametrize("weight", [0, 1])
def test_a_mixture_of_all_or_nothing_is_one_of_the_two(tiny, decode, weight):
    output = decode(tiny("dream_trained"), PROMPTS, guider=ProductMixture(tiny("guider"), weight=weight), **FILLED)
    assert not (output.sequences == MASK).any()
    assert output.guider_forwards.tolist() == output.nfe.tolist()


# --- wrapped models --------------------------------------------------------------------------------------------------


class Wrapper(torch.nn.Module):
    """No model of Transformers itself: hands on what it is given and what it is asked for, as an adapter's does."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("kind", [None, Older, Newer])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_wrapped_model_judges_as_it_does_bare(tiny, decode, layers, kind):
    model = tiny("guider") if kind is None else of_class(kind, tiny("guider"))
    wrapped = Wrapper(model) if layers == 1 else Wrapper(Wrapper(model))
    assert unwrapped(wrapped) is model and cache_name(wrapped) == cache_name(model)
    wanted = decode(tiny("dream_trained"), PROMPTS, guider=ARGuider(model), **FILLED)
    for given in (wrapped, ARGuider(wrapped)):
        output = decode(tiny("dream_trained"), PROMPTS, guider=given, **FILLED)
        assert output.sequences.equal(wanted.sequences)
    assert output.accepted_lengths == wanted.accepted_lengths


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_a_compiled_model_judges_as_it_does_bare(tiny, decode, stance):
    model, options = tiny("guider"), FILLED | dict(max_new_tokens=4)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    assert unwrapped(compiled) is model and cache_name(compiled) == cache_name(model)
    with torch.compiler.set_stance(stance):  # tracing takes most of a minute
        wanted, output = (
            decode(tiny("dream_trained"), PROMPTS[:1], guider=one, **options) for one in (model, compiled)
        )
    assert output.sequences.equal(wanted.sequences) and output.accepted_lengths == wanted.accepted_lengths


def test_learned_tokens_before_the_canvas_are_refused(tiny, decode):
    class PromptLearning:
        is_prompt_learning = True

    wrapped = Wrapper(tiny("guider"))
    wrapped.active_peft_config = PromptLearning()
    message = (
        "`guider` must read the canvas as it is, got an adapter that puts learned tokens before it: choose one that "
        "changes weights, such as LoRA."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        decode(tiny("dream_trained"), PROMPTS, guider=wrapped, **FILLED)


@pytest.mark.parametrize("reads_text", [False, True])
def test_a_guider_of_another_precision_judges(tiny, decode, reads_text, tokenizer):
    half = copy.deepcopy(tiny("guider")).to(torch.bfloat16)
    judge = ARGuider(half, tokenizer=tokenizer, canvas_tokenizer=tokenizer)
    judge.reads_text = reads_text
    output = decode(tiny("dream_trained"), PROMPTS, guider=judge, **FILLED)
    assert not (output.sequences == MASK).any()


# --- the state of a call ---------------------------------------------------------------------------------------------


def same(left, right):
    fields = ("guider_forwards", "drafts_judged", "drafts_accepted")
    counts = all(left[field] is right[field] or left[field].equal(right[field]) for field in fields)
    return left.sequences.equal(right.sequences) and counts and left.accepted_lengths == right.accepted_lengths


SETTINGS = [dict(), dict(gate="auto"), dict(combine="union", beyond_prefix=True), dict(reads_text=True)]


@pytest.fixture(params=SETTINGS, ids=str)
def judge(request, tiny, tokenizer):
    settings = dict(request.param)
    reads_text = settings.pop("reads_text", False)
    guider = ARGuider(tiny("guider"), **settings, tokenizer=tokenizer, canvas_tokenizer=tokenizer)
    guider.reads_text = reads_text
    return guider


def test_a_call_changes_nothing_on_the_guider(tiny, decode, judge):
    before = dict(vars(judge))
    decode(tiny("dream_trained"), PROMPTS, guider=judge, **FILLED)
    assert vars(judge).keys() == before.keys()
    assert all(vars(judge)[name] is value for name, value in before.items())


def test_a_call_within_a_call_is_a_call_of_its_own(tiny, decode, judge):
    model, inner = tiny("dream_trained"), []
    options = FILLED | dict(max_new_tokens=24)
    wanted = [decode(model, prompts, guider=judge, **options) for prompts in (PROMPTS, PROMPTS[1:])]

    class Meanwhile:
        def put(self, ids):
            if len(inner) < 2:
                inner.append(None)
                inner[-1] = decode(model, PROMPTS[1:], guider=judge, **options)

        def end(self):
            pass

    alone = decode(model, PROMPTS[:1], guider=judge, **options)
    outer = decode(model, PROMPTS[:1], guider=judge, streamer=Meanwhile(), **options)
    assert len(inner) == 2 and all(same(output, wanted[1]) for output in inner)
    assert same(outer, alone)


def test_threads_share_a_guider(tiny, judge):
    model, barrier = tiny("dream_trained"), threading.Barrier(4)
    options = FILLED | dict(guider=judge, return_dict_in_generate=True, max_new_tokens=24)
    prompts = [torch.tensor([(PROMPTS[0] * 2)[: 3 + index]]) for index in range(4)]
    wanted = [model.generate(prompt, **options) for prompt in prompts]

    def ask(index):
        barrier.wait()
        return [model.generate(prompts[index], **options) for _ in range(2)]

    with ThreadPoolExecutor(4) as pool:
        for index, outputs in enumerate(pool.map(ask, range(4))):
            assert all(same(output, wanted[index]) for output in outputs)
