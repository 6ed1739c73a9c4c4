"""`generate` as its users meet it: a row decodes alone as in a batch, whatever the parts; nothing survives a call."""

import inspect
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextStreamer,
    pipeline,
)

import hf_flashdlm.generation_mixin
from hf_flashdlm import ARGuider, DiffusionGenerationOutput, DiffusionOptions, FreeCache
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.generation_config import PEER_NAMES
from hf_flashdlm.tiny import FOLDER as TINY


MASK = 511
ENDS = list(range(1, 70))  # so many that random models end, and at different steps; the pad token 0 is none of them
PROMPTS = [[5, 70, 200, 41, 333, 62, 90, 8], [77, 130, 402, 256], [300, 21, 450]]
PROMPT = PROMPTS[0]

POLICIES = {
    "none": dict(window_policy="none"),
    "none-growing": dict(window_policy="none", grow_canvas=True),
    "prefix": dict(window_policy="prefix"),
    "dual": dict(window_policy="dual"),
    "dkv": dict(window_policy="dkv"),
    "dkv-often": dict(window_policy="dkv", refresh_steps=2),
    "freecache": dict(),
    "lag-0": dict(freeze_lag=0),
    "lag-3": dict(freeze_lag=3),
    "short-pieces": dict(freeze_length=2),
    "margin": dict(left_margin=2),
    "narrow": dict(right_window=3),
    "narrow-stale": dict(right_window=3, attend_stale=True),
    "narrow-margin-lag-0": dict(right_window=6, left_margin=1, freeze_lag=0),
    "growing": dict(grow_canvas=True),
    "growing-narrow-stale": dict(grow_canvas=True, right_window=4, attend_stale=True),
    "refresh-blocks": dict(refresh_blocks=2),
    "refresh-entropy": dict(refresh_entropy=1.0),
    "refresh-both-narrow": dict(refresh_blocks=1, refresh_entropy=2.0, right_window=4),
    "synchronous": dict(synchronize_blocks=True),
}
SYNCHRONOUS = ("prefix", "dual", "dkv", "dkv-often", "synchronous")
RULES = {
    "steps": dict(steps=9),
    "timesteps": dict(steps=9, schedule="timesteps"),
    "empty-timesteps": dict(steps=9, schedule="timesteps", run_empty_steps=True),
    "margin": dict(steps=9, confidence="margin"),
    "entropy": dict(steps=7, confidence="entropy"),
    "threshold": dict(confidence_threshold=0.6),
    "factor": dict(factor=0.8),
    "frechet": dict(frechet_delta=0.3),
    "entropy-bound": dict(entropy_bound=1.5),
    "default": dict(),
}
# Every policy with every rule; the models take turns, so that each meets all policies and all rules.
COMBINATIONS = [
    (("llada", "dream")[(i + j) % 2], policy, rule)
    for i, policy in enumerate(POLICIES)
    for j, rule in enumerate(RULES)
]
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_model = pytest.mark.parametrize("name", ["llada", "dream"])


def cut(text):
    """Ids up to and with the first end token."""
    return text[: next((index + 1 for index, token in enumerate(text) if token in ENDS), len(text))]


def generated(output, row=0, prompt_length=8):
    return output.sequences[row, prompt_length:].tolist()


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy", "rule"), COMBINATIONS)
def test_a_row_decodes_alone_as_in_an_uneven_batch(tiny, decode, name, policy, rule):
    options = dict(
        max_new_tokens=11, block_length=4, eos_token_id=ENDS, pad_token_id=0, **POLICIES[policy], **RULES[rule]
    )
    batch = decode(tiny(name), PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(tiny(name), [prompt], **options)
        padding = len(PROMPT) - len(prompt)
        text, in_batch = alone.sequences[0].tolist(), batch.sequences[row, padding:].tolist()
        assert in_batch == text + [0] * (len(in_batch) - len(text)), f"row {row} depends on its neighbours"
        if policy not in SYNCHRONOUS:
            assert batch.nfe[row] == alone.nfe[0]
            # Where a forward covers the whole canvas, the padding is computed, too.
            whole = sum(int(forward["position_ids"][0, 0]) == 0 for forward in alone.forwards)
            assert batch.active_tokens[row] == alone.active_tokens[0] + padding * whole


@every_model
@every_policy
def test_rows_that_are_finished_leave_the_batch(tiny, decode, name, policy):
    output = decode(
        tiny(name), PROMPTS, max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, **policy
    )
    rows = [len(forward["input_ids"]) for forward in output.forwards]
    assert rows == [int((output.nfe > step).sum()) for step in range(int(output.nfe.max()))]
    assert rows[-1] < len(PROMPTS), "the case is too easy: all rows finish together"


@every_model
@every_policy
def test_what_stops_at_an_end_is_what_would_have_been_cut_there(tiny, decode, name, policy):
    options = dict(max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, steps=9, **policy)
    stopped = decode(tiny(name), PROMPTS, **options)
    filled = decode(tiny(name), PROMPTS, stop_at_eos=False, **options)
    assert filled.sequences.shape == (3, len(PROMPT) + 14)
    for row in range(len(PROMPTS)):
        text = cut(generated(filled, row))
        in_batch = generated(stopped, row)
        assert in_batch == text + [0] * (len(in_batch) - len(text))
        assert stopped.nfe[row] <= filled.nfe[row]
    assert any(len(cut(generated(filled, row))) < 14 for row in range(3)), "the case is too easy: nothing ended"


# --- properties ------------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """A model's name, prompts and options."""
    prompts = draw(st.lists(st.lists(st.integers(30, 500), min_size=1, max_size=6), min_size=1, max_size=3))
    max_new_tokens = draw(st.integers(1, 13))
    block_length = draw(st.integers(1, max_new_tokens))
    policy, rule = draw(st.sampled_from(list(POLICIES.values()))), draw(st.sampled_from(list(RULES.values())))
    options = dict(max_new_tokens=max_new_tokens, block_length=block_length, **policy, **rule)
    if "steps" in rule:
        options["steps"] = draw(st.integers(-(-max_new_tokens // block_length), 16))
    options["stop_at_eos"] = draw(st.booleans())
    return draw(st.sampled_from(["llada_gqa", "dream", "dream_trained"])), prompts, options


@given(calls())
def test_every_decode_obeys_the_laws(tiny, decode, call):
    name, prompts, options = call
    output = decode(tiny(name), prompts, eos_token_id=ENDS, pad_token_id=0, **options)
    longest, num_new = max(map(len, prompts)), options["max_new_tokens"]
    assert longest < output.sequences.shape[1] <= longest + num_new
    for row, prompt in enumerate(prompts):
        sequence = output.sequences[row].tolist()
        assert MASK not in sequence
        assert sequence[:longest] == [0] * (longest - len(prompt)) + prompt, "the prompt has changed"
        text = sequence[longest:]
        ended = cut(text) if options["stop_at_eos"] else text
        if ended[-1] in ENDS and options["stop_at_eos"]:
            assert not any(text[len(ended) :]), "what follows the end is not padding"
        else:
            assert len(text) == num_new
        nfe = int(output.nfe[row])
        if "run_empty_steps" not in options:
            assert 1 <= nfe <= num_new, "a step wrote nothing"
        if "steps" in options and "right_window" not in options:
            assert nfe <= max(options["steps"], -(-num_new // options["block_length"]))
        assert float(output.tokens_per_forward[row]) * nfe == pytest.approx(len(ended))
    assert len(output.forwards) == int(output.nfe.max())


# --- exactness -------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (dict(window_policy="dkv", refresh_steps=1), dict(steps=9)),
        (dict(window_policy="dkv", refresh_steps=1), dict(confidence_threshold=0.6)),
        (dict(window_policy="prefix"), dict(steps=4)),
        (dict(window_policy="dual"), dict(steps=4)),
        (dict(window_policy="prefix"), dict(block_length=1)),
        (dict(window_policy="dual"), dict(block_length=1)),
        (dict(refresh_blocks=1), dict(steps=4)),
        (dict(refresh_blocks=1), dict(block_length=1)),
        (dict(refresh_entropy=0.0), dict(steps=9)),
        (dict(left_margin=1000), dict(confidence_threshold=0.6)),
        (dict(left_margin=1000, grow_canvas=True), dict(steps=9)),
        (dict(left_margin=1000), dict(factor=0.8)),
    ],
)
def test_a_cache_that_is_refreshed_at_every_step_is_none(tiny, decode, name, policy, rule):
    options = dict(max_new_tokens=14, block_length=4, stop_at_eos=False) | rule
    cached = decode(tiny(name), PROMPTS, **options, **policy)
    growing = {name: value for name, value in policy.items() if name == "grow_canvas"}
    synchronous = policy.get("window_policy", "freecache") != "freecache"
    exact = decode(tiny(name), PROMPTS, **options, **growing, window_policy="none", synchronize_blocks=synchronous)
    assert cached.sequences.tolist() == exact.sequences.tolist()
    assert cached.nfe.tolist() == exact.nfe.tolist()
    assert cached.active_tokens.tolist() == exact.active_tokens.tolist()


# --- infilling -------------------------------------------------------------------------------------------------------


HOLES = [[5, MASK, 200, MASK, MASK, 62, 90, 8], [MASK, 130, 402, 256, MASK], [300, 21]]


@every_policy
@pytest.mark.parametrize("rule", [dict(steps=9), dict(steps=9, schedule="timesteps"), dict(factor=0.8), "guider"])
def test_masks_in_the_prompt_are_filled_and_what_is_given_stays(tiny, decode, policy, rule):
    rule = dict(guider=tiny("guider")) if rule == "guider" else rule
    options = dict(max_new_tokens=9, block_length=4, stop_at_eos=False, **policy, **rule)
    output = decode(tiny("dream_trained"), HOLES, **options)
    assert output.sequences.shape == (3, 8 + 9)
    assert not (output.sequences == MASK).any()
    for row, prompt in enumerate(HOLES):
        filled = output.sequences[row, 8 - len(prompt) :].tolist()
        assert [token for token, given in zip(filled, prompt, strict=False) if given != MASK] == [
            given for given in prompt if given != MASK
        ]
        assert float(output.tokens_per_forward[row] * output.nfe[row]) == pytest.approx(9 + prompt.count(MASK))


@every_model
def test_infilled_rows_decode_alone_as_in_a_batch(tiny, decode, name):
    options = dict(max_new_tokens=9, block_length=4, steps=9, stop_at_eos=False)
    batch = decode(tiny(name), HOLES, **options)
    for row, prompt in enumerate(HOLES):
        alone = decode(tiny(name), [prompt], **options)
        assert batch.sequences[row, 8 - len(prompt) :].tolist() == alone.sequences[0].tolist()


def test_an_end_in_the_prompt_ends_nothing(tiny, decode):
    output = decode(
        tiny("llada"), [[5, 7, MASK, 9]], max_new_tokens=6, eos_token_id=[5, 7, 9], pad_token_id=0, steps=6
    )
    assert output.sequences.shape == (1, 10)


# --- calls do not influence each other -------------------------------------------------------------------------------


@every_model
def test_no_call_leaves_a_trace(tiny, decode, name):
    model = tiny(name)
    state = lambda: (set(vars(model)), model.generation_config.to_dict(), model.config.to_dict())  # noqa: E731
    options = dict(max_new_tokens=10, block_length=5, eos_token_id=ENDS, pad_token_id=0)
    before, first = state(), decode(model, PROMPTS, **options)
    for policy in POLICIES.values():
        decode(model, [PROMPT], max_new_tokens=5, **policy)
    decode(model, [PROMPT], max_new_tokens=5, guider=tiny("guider"), block_length=2)
    decode(model, [PROMPT], max_new_tokens=5, do_sample=True, guidance_scale=2.0, mask_token_id=480)

    def fail(input_ids, scores):
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        decode(model, PROMPTS, max_new_tokens=5, logits_processor=LogitsProcessorList([fail]))
    again = decode(model, PROMPTS, **options)
    assert state() == before
    for field in ("sequences", "nfe", "active_tokens", "tokens_per_forward"):
        assert again[field].tolist() == first[field].tolist()


def test_the_configuration_of_the_caller_is_not_changed(tiny):
    config = GenerationConfig(
        max_new_tokens=6, block_length=3, window_policy="dual", eos_token_id=ENDS, pad_token_id=0
    )
    before = config.to_dict()
    outputs = [tiny("llada").generate(torch.tensor([PROMPT]), generation_config=config) for _ in range(2)]
    assert config.to_dict() == before
    assert outputs[0].tolist() == outputs[1].tolist()


@every_model
@pytest.mark.parametrize("policy", ["none", "freecache"])
def test_a_model_can_be_trained_on_what_it_has_written(tiny, name, policy):
    model = tiny(name)
    sequences = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, window_policy=policy)
    assert not sequences.is_inference()
    model(sequences, labels=sequences).loss.backward()
    assert all(one.grad is not None for one in model.parameters())
    model.zero_grad()


def test_forwards_run_in_inference_mode_unless_processes_share_the_model(tiny, tmp_path):
    modes = []
    hook = tiny("llada").register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    alone = tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=6)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        shared = tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=6)
    finally:
        torch.distributed.destroy_process_group()
        hook.remove()
    half = len(modes) // 2
    assert modes == half * [True] + half * [False] and shared.equal(alone)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # older hosts do
@pytest.mark.parametrize("reads_text", [False, True])
def test_models_whose_weights_are_offloaded_decode_the_same(decode, reads_text):
    def load(name):
        return AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(TINY / "dlm")

    def run(model, guider):
        guider = ARGuider(guider, tokenizer=tokenizer, canvas_tokenizer=tokenizer)
        guider.reads_text = reads_text
        return decode(model, PROMPTS, max_new_tokens=24, block_length=8, guider=guider)

    expected = run(load("dlm"), load("guider"))
    model, guider = load("dlm"), load("guider")
    for one in (model, guider):
        cpu_offload(one, execution_device=torch.device("cpu"))
        assert one.device.type == "meta"
    output = run(model, guider)
    assert output.sequences.equal(expected.sequences) and output.accepted_lengths == expected.accepted_lengths


# --- where options come from -----------------------------------------------------------------------------------------


@pytest.fixture
def options_seen(monkeypatch):
    """The checked options of each call."""
    seen = []
    choose = hf_flashdlm.generation_mixin.choose_parts
    monkeypatch.setattr(
        hf_flashdlm.generation_mixin,
        "choose_parts",
        lambda options, *rest: seen.append(options) or choose(options, *rest),
    )
    return seen


@pytest.fixture
def own_model(tiny, tmp_path):
    """A copy of a tiny model that a test may change."""
    tiny("llada").save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path).eval()


def test_a_keyword_beats_the_passed_configuration_which_beats_the_models_which_beats_the_default(
    own_model, options_seen
):
    own_model.generation_config.block_length = 2
    own_model.generation_config.window_policy = "prefix"
    own_model.generation_config.confidence_threshold = 0.5
    passed = GenerationConfig(block_length=3, window_policy="dual", max_new_tokens=6)
    own_model.generate(torch.tensor([PROMPT]), generation_config=passed, block_length=4)
    own_model.generate(torch.tensor([PROMPT]), generation_config=passed)
    own_model.generate(torch.tensor([PROMPT]), max_new_tokens=6)
    common = DiffusionOptions(confidence_threshold=0.5)
    assert options_seen == [
        replace(common, block_length=4, window_policy="dual"),
        replace(common, block_length=3, window_policy="dual"),
        replace(common, block_length=2, window_policy="prefix"),
    ]


def test_options_travel_with_a_saved_model(own_model, options_seen, tmp_path):
    wanted = DiffusionOptions(block_length=2, window_policy="dkv", refresh_steps=3, factor=0.5, stop_at_eos=False)
    # One that was made up from the model's configuration is made up again by the host when it is loaded.
    own_model.generation_config = GenerationConfig(**vars(wanted))
    own_model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    loaded.generate(torch.tensor([PROMPT]), max_new_tokens=6)
    assert options_seen == [wanted]


def test_a_block_length_of_the_models_yields_to_a_short_request(own_model, options_seen):
    own_model.generation_config.block_length = 32
    own_model.generate(torch.tensor([PROMPT]), max_new_tokens=6)
    assert options_seen == [DiffusionOptions(block_length=6)]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "freecache"),
        ({"use_cache": True}, "freecache"),
        ({"use_cache": False}, "none"),
        ({"use_cache": False, "window_policy": "dual"}, "dual"),
    ],
)
def test_use_cache_false_is_no_cache_if_nothing_else_is_said(tiny, options_seen, options, wanted):
    tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=3, **options)
    assert options_seen[0].window_policy == wanted


@pytest.mark.parametrize("name", ["blok_length", "frozen_length", "small_block_size", "diffusion"])
def test_an_unknown_name_raises_what_the_host_raises(tiny, name):
    with pytest.raises(ValueError, match=rf"`model_kwargs` are not used by the model: \['{name}'\]"):
        tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=3, **{name: 4})


@pytest.mark.parametrize("name", PEER_NAMES)
def test_a_name_of_other_implementations_is_answered_with_ours(tiny, name):
    known = DiffusionOptions.names() + list(inspect.signature(GenerationConfig().update).parameters)
    known += list(vars(GenerationConfig()))
    ours = PEER_NAMES[name].split("`")[0]
    assert ours in known and name not in known
    with pytest.raises(ValueError, match=rf"^`{name}` is an option of other implementations: here it is `{ours}`"):
        tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=3, **{name: 4})


def test_max_length_counts_the_prompt(tiny):
    output = tiny("llada").generate(torch.tensor([PROMPT]), max_length=13, stop_at_eos=False)
    assert output.shape == (1, 13)


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(model, seed, prompts=(PROMPT,), **options):
    options = dict(do_sample=True, top_k=0, max_new_tokens=12, block_length=6, stop_at_eos=False) | options
    generator = torch.Generator().manual_seed(seed)
    return model.generate(torch.tensor(prompts), generator=generator, **options)


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(steps=6, confidence="random"),
        dict(steps=6, position_temperature=0.5),
        dict(top_p=0.9, temperature=1.4, window_policy="dual"),
    ],
)
def test_a_seed_decides_what_is_drawn(tiny, name, options):
    outputs = [sample(tiny(name), seed, **options).tolist() for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_without_a_generator_the_seed_of_torch_decides(tiny):
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(
            tiny("llada").generate(torch.tensor([PROMPT]), do_sample=True, top_k=0, max_new_tokens=8).tolist()
        )
    assert outputs[0] == outputs[1]


GREEDY = dict(max_new_tokens=12, block_length=6, stop_at_eos=False)


@every_model
@pytest.mark.parametrize("rule", [dict(steps=8), dict(confidence_threshold=0.6), dict(entropy_bound=1.0)], ids=str)
def test_a_temperature_near_zero_is_greedy(tiny, name, rule):
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY, **rule)
    assert sample(tiny(name), 3, **rule, temperature=1e-4).tolist() == greedy.tolist()


@every_model
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)], ids=str)
def test_a_filter_that_leaves_one_token_is_greedy(tiny, name, options):
    # Token by token: a filter changes the confidences, as it does in Dream, and with them the order.
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY | dict(block_length=1))
    assert sample(tiny(name), 3, block_length=1, **options).tolist() == greedy.tolist()


@every_model
@pytest.mark.parametrize("rule", [dict(steps=8), dict(confidence_threshold=0.6), dict(entropy_bound=1.0)], ids=str)
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6)], ids=str)
@pytest.mark.xfail(reason="confidences are taken after top-k and top-p, as in Dream: one token left is sure")
def test_a_filter_does_not_make_the_model_sure(tiny, name, rule, options):
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY, **rule)
    assert sample(tiny(name), 3, **rule, **options).tolist() == greedy.tolist()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 5.0])
def test_the_temperature_does_not_change_the_order(tiny, decode, monkeypatch, temperature):
    # What is drawn is the same, so only the confidences could tell the order apart.
    monkeypatch.setattr(hf_flashdlm.unmasking, "gumbel", lambda like, generator=None: torch.zeros_like(like))
    options = dict(max_new_tokens=12, block_length=12, stop_at_eos=False, steps=12)
    greedy = decode(tiny("llada"), [PROMPT], **options)
    warm = decode(tiny("llada"), [PROMPT], do_sample=True, top_k=0, temperature=temperature, **options)
    steps = [[forward["input_ids"].tolist() for forward in output.forwards] for output in (greedy, warm)]
    assert steps[0] == steps[1]


def test_num_return_sequences_draws_several_for_each_prompt(tiny):
    prompts = [PROMPT, PROMPT[::-1]]
    output = sample(tiny("llada"), 1, prompts, num_return_sequences=3, temperature=1.5)
    assert output.shape == (6, 20)
    assert output[:, :8].tolist() == [PROMPT] * 3 + [PROMPT[::-1]] * 3
    assert len({tuple(row) for row in output.tolist()}) == 6


# --- classifier-free guidance ----------------------------------------------------------------------------------------


def test_a_guidance_scale_of_one_is_none(tiny, decode):
    options = dict(max_new_tokens=12, block_length=4, steps=9)
    plain, guided = (decode(tiny("llada"), PROMPTS, **options, **more) for more in ({}, dict(guidance_scale=1.0)))
    assert guided.sequences.tolist() == plain.sequences.tolist()
    assert guided.active_tokens.tolist() == plain.active_tokens.tolist()


@every_model
@every_policy
def test_a_negative_prompt_that_is_the_prompt_changes_nothing(tiny, decode, name, policy):
    options = dict(max_new_tokens=10, block_length=4, stop_at_eos=False, **policy)
    plain = decode(tiny(name), [PROMPT], **options)
    guided = decode(tiny(name), [PROMPT], guidance_scale=3.0, negative_prompt_ids=torch.tensor([PROMPT]), **options)
    assert guided.sequences.tolist() == plain.sequences.tolist()
    assert guided.nfe.tolist() == plain.nfe.tolist()
    assert guided.active_tokens.tolist() == (2 * plain.active_tokens).tolist()


@every_model
@pytest.mark.parametrize("negative", [None, [3, 4], list(range(40, 52))], ids=["masked", "shorter", "longer"])
def test_guidance_is_the_textbook_formula(tiny, decode, name, negative):
    model = tiny(name)
    options = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    output = decode(
        model,
        [PROMPT],
        max_new_tokens=6,
        steps=6,
        window_policy="none",
        stop_at_eos=False,
        guidance_scale=1.5,
        **options,
    )
    negative = [MASK] * len(PROMPT) if negative is None else negative
    text, shift = [MASK] * 6, model.config.logits_shift
    for _ in range(6):
        scores = []
        for prompt in (PROMPT, negative):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + text])).logits[0]
            scores.append(logits[len(prompt) - shift :][:6])
        probabilities = (scores[1] + 1.5 * (scores[0] - scores[1])).double().softmax(-1)
        best, token_ids = probabilities[:, :MASK].max(-1)
        chosen = max((i for i in range(6) if text[i] == MASK), key=lambda i: float(best[i]))
        text[chosen] = int(token_ids[chosen])
    assert generated(output) == text


@every_model
@pytest.mark.parametrize("policy", [dict(window_policy="dkv", refresh_steps=1), dict(left_margin=1000)], ids=str)
def test_guidance_with_a_refreshed_cache_is_guidance_without(tiny, decode, name, policy):
    options = dict(
        max_new_tokens=10,
        block_length=4,
        steps=8,
        stop_at_eos=False,
        guidance_scale=1.5,
        negative_prompt_ids=torch.tensor([[3, 4], [0, 9], [7, 7]]),
        negative_prompt_attention_mask=torch.tensor([[1, 1], [0, 1], [1, 1]]),
    )
    cached, exact = (decode(tiny(name), PROMPTS, **options, **more) for more in (policy, dict(window_policy="none")))
    assert cached.sequences.tolist() == exact.sequences.tolist()
    assert cached.active_tokens.tolist() == exact.active_tokens.tolist()


@pytest.mark.parametrize(("name", "negatives"), [("llada", None), ("dream", [[3], [4, 5, 6], [7] * 10])])
@every_policy
def test_a_guided_row_decodes_alone_as_in_a_batch(tiny, decode, left_padded, name, negatives, policy):
    options = dict(max_new_tokens=8, block_length=4, guidance_scale=1.5, eos_token_id=ENDS, pad_token_id=0, **policy)

    def run(rows):
        negative = {}
        if negatives is not None:
            ids, mask = left_padded([negatives[row] for row in rows])
            negative = dict(negative_prompt_ids=ids, negative_prompt_attention_mask=mask)
        return decode(tiny(name), [PROMPTS[row] for row in rows], **options, **negative)

    batch = run([0, 1, 2])
    for row in range(3):
        alone = generated(run([row]), 0, len(PROMPTS[row]))
        in_batch = generated(batch, row)
        assert in_batch == alone + [0] * (len(in_batch) - len(alone))


# --- processors and criteria of the host -----------------------------------------------------------------------------


CHARACTERS = [chr(0x4E00 + token_id) for token_id in range(512)]  # one for every id, so that text and ids correspond
CHARACTERS[500:506] = "abcdef"  # which the host's stop strings need


@pytest.fixture(scope="session")
def tokenizer():
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, CHARACTERS[0]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=CHARACTERS[0],
        eos_token=CHARACTERS[510],
        mask_token=CHARACTERS[MASK],
        padding_side="left",
    )


def spell(token_ids):
    return "".join(CHARACTERS[token_id] for token_id in token_ids)


PLAIN = dict(max_new_tokens=12, block_length=4, stop_at_eos=False, steps=9)


@every_model
@every_policy
def test_a_stop_string_ends_a_row_where_it_is_complete(tiny, decode, tokenizer, name, policy):
    filled = decode(tiny(name), PROMPTS, **PLAIN, **policy)
    texts = [generated(filled, row) for row in range(3)]
    stop = spell(texts[1][2:5])
    output = decode(tiny(name), PROMPTS, **PLAIN, **policy, stop_strings=[stop], tokenizer=tokenizer, pad_token_id=0)
    for row, text in enumerate(texts):
        spelled = spell(text)
        kept = text[: spelled.find(stop) + 3] if stop in spelled else text
        in_batch = generated(output, row)
        assert in_batch == kept + [0] * (len(in_batch) - len(kept))
    assert int(output.nfe[1]) <= int(filled.nfe[1])


def test_a_stop_string_in_the_prompt_stops_nothing(tiny, decode, tokenizer):
    plain = decode(tiny("llada"), [PROMPT], **PLAIN)
    stop = spell(PROMPT[2:4])
    output = decode(tiny("llada"), [PROMPT], **PLAIN, stop_strings=[stop], tokenizer=tokenizer)
    assert output.sequences.tolist() == plain.sequences.tolist()


def test_a_stopping_criterion_sees_every_clean_prefix_of_every_row_once(tiny, decode):
    seen = []

    def criterion(input_ids, scores):
        seen.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] >= 13])

    output = decode(tiny("llada"), PROMPTS, **PLAIN, stopping_criteria=StoppingCriteriaList([criterion]))
    assert output.sequences.shape == (3, 13)
    plain = decode(tiny("llada"), PROMPTS, **PLAIN)
    assert output.sequences.tolist() == plain.sequences[:, :13].tolist()
    wanted = [[row[:length]] for row in plain.sequences.tolist() for length in range(9, 14)]
    assert sorted(seen) == sorted(wanted)


def test_max_time_ends_at_the_first_text_there_is(tiny, decode):
    output = decode(tiny("llada"), [PROMPT], **PLAIN | dict(block_length=1, steps=12), max_time=1e-9)
    assert output.sequences.shape == (1, 9)
    assert output.nfe.tolist() == [1]


@every_model
def test_suppressed_tokens_are_never_written(tiny, decode, name):
    unwanted = sorted(set(decode(tiny(name), PROMPTS, **PLAIN).sequences[:, 8:].flatten().tolist()))
    output = decode(tiny(name), PROMPTS, **PLAIN, suppress_tokens=unwanted)
    assert not torch.isin(output.sequences[:, 8:], torch.tensor(unwanted)).any()


@every_model
def test_tokens_suppressed_at_the_beginning_are_written_later_only(tiny, decode, name):
    first = decode(tiny(name), [PROMPT], **PLAIN).sequences[0, 8:9].tolist()
    output = decode(tiny(name), [PROMPT], **PLAIN, begin_suppress_tokens=first)
    assert generated(output)[0] != first[0]


@every_model
def test_bad_words_are_never_written_from_left_to_right(tiny, decode, name):
    options = PLAIN | dict(block_length=1, steps=12)
    texts = [generated(decode(tiny(name), PROMPTS, **options), row) for row in range(3)]
    single, pair = texts[0][4], texts[1][6:8]
    output = decode(tiny(name), PROMPTS, **options, bad_words_ids=[[single], pair])
    for row in range(3):
        text = generated(output, row)
        assert single not in text
        assert pair not in [text[i : i + 2] for i in range(11)]


@every_model
@pytest.mark.parametrize("block_length", [1, 12])
@pytest.mark.parametrize("negative", [{}, dict(guidance_scale=1.5, negative_prompt_ids=torch.arange(40, 55)[None])])
def test_no_end_is_written_before_min_new_tokens(tiny, decode, name, block_length, negative):
    options = dict(max_new_tokens=12, block_length=block_length, pad_token_id=0, **negative)
    plain = generated(decode(tiny(name), [PROMPT], stop_at_eos=False, **options))
    output = decode(tiny(name), [PROMPT], eos_token_id=plain, min_new_tokens=7, **options)
    text = generated(output)
    assert len(text) >= 7
    assert not set(text[:7]) & set(plain)


def test_a_forced_end_stands_at_the_end(tiny, decode):
    output = decode(tiny("llada"), PROMPTS, **PLAIN, forced_eos_token_id=[77])
    assert output.sequences[:, -1].tolist() == [77] * 3


@every_model
def test_a_repetition_penalty_is_exact_from_left_to_right(tiny, decode, name):
    options = dict(max_new_tokens=8, block_length=1, window_policy="none", stop_at_eos=False, repetition_penalty=5.0)
    model, ids = tiny(name), list(PROMPT)
    for step in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([ids + [MASK] * (8 - step)])).logits[0, len(ids) - model.config.logits_shift]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 5, logits[seen] / 5)
        logits[MASK] = -torch.inf
        ids.append(int(logits.argmax()))
    assert decode(model, [PROMPT], **options).sequences[0].tolist() == ids


@every_model
@pytest.mark.parametrize(
    "processor",
    [
        dict(repetition_penalty=5.0),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=6),
        dict(sequence_bias=[[[418], -5.0], [[30, 31], 4.0]]),
        dict(exponential_decay_length_penalty=(3, 1.5)),
        dict(begin_suppress_tokens=[132, 254]),
        dict(bad_words_ids=[[132], [258, 132]]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_processed_row_decodes_alone_as_in_an_uneven_batch(tiny, decode, name, processor):
    options = dict(max_new_tokens=8, block_length=4, eos_token_id=ENDS, pad_token_id=0, **processor)
    batch = decode(tiny(name), PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        text = generated(decode(tiny(name), [prompt], **options), 0, len(prompt))
        in_batch = generated(batch, row)
        assert in_batch == text + [0] * (len(in_batch) - len(text))


def test_a_repetition_penalty_knows_a_padded_row(tiny):
    options = dict(max_new_tokens=8, block_length=1, stop_at_eos=False, repetition_penalty=5.0)
    plain = tiny("llada").generate(torch.tensor([PROMPT]), **options)
    padded = tiny("llada").generate(
        torch.tensor([[0] * 4 + PROMPT]), attention_mask=torch.tensor([[0] * 4 + [1] * 8]), **options
    )
    assert padded[0, 4:].tolist() == plain[0].tolist()


def test_no_bigram_is_written_twice_from_left_to_right(tiny, decode):
    output = decode(tiny("llada"), [PROMPT], max_new_tokens=14, block_length=1, no_repeat_ngram_size=2)
    text = output.sequences[0].tolist()
    pairs = list(zip(text[:-1], text[1:], strict=True))
    assert len(set(pairs)) == len(pairs)


def test_a_processor_of_the_callers_sees_what_is_known_left_of_a_position(tiny, decode):
    seen = []

    def processor(input_ids, scores):
        assert scores.shape == (1, 512)
        seen.append(input_ids[0].tolist())
        return scores

    options = dict(max_new_tokens=4, block_length=1)
    output = decode(tiny("llada"), [[5, 6]], **options, logits_processor=LogitsProcessorList([processor]))
    assert seen == [output.sequences[0, :length].tolist() for length in range(2, 6)]
    assert output.sequences.tolist() == decode(tiny("llada"), [[5, 6]], **options).sequences.tolist()


# --- streaming -------------------------------------------------------------------------------------------------------


class Recorder:
    """A streamer that keeps what it is told."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, token_ids):
        self.pieces.append(token_ids.flatten().tolist())

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, token_ids):
        self.drafts.append((sum(self.pieces, []), token_ids.clone()))


class CanvasRecorder(DraftRecorder):
    shows_canvas = True


@every_model
@every_policy
def test_the_pieces_of_a_stream_are_the_output(tiny, decode, name, policy):
    streamer = Recorder()
    options = dict(max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, **policy)
    output = decode(tiny(name), [PROMPT], streamer=streamer, **options)
    assert streamer.pieces[0] == PROMPT
    assert sum(streamer.pieces, []) == output.sequences[0].tolist()
    assert all(streamer.pieces) and len(streamer.pieces) > 1
    assert streamer.ended


def test_a_stop_string_is_the_last_that_a_stream_is_told(tiny, decode, tokenizer):
    plain = generated(decode(tiny("llada"), [PROMPT], **PLAIN))
    streamer = Recorder()
    stop = dict(stop_strings=[spell(plain[5:7])], tokenizer=tokenizer)
    output = decode(tiny("llada"), [PROMPT], streamer=streamer, **PLAIN, **stop)
    assert sum(streamer.pieces, []) == output.sequences[0].tolist() == PROMPT + plain[:7]


@every_model
def test_drafts_are_what_is_behind_the_final_text(tiny, decode, name):
    streamer = DraftRecorder()
    output = decode(tiny(name), [PROMPT], streamer=streamer, **PLAIN)
    assert len(streamer.drafts) == int(output.nfe[0]) - 1, "after the last step nothing is a draft any more"
    final = output.sequences[0]
    for text, rest in streamer.drafts:
        assert rest.shape == (1, 20 - len(text))
        known = rest[0] != MASK
        assert not known[0], "final text was shown as a draft"
        assert (rest[0] == final[len(text) :])[known].all()


@pytest.mark.parametrize("negative", [{}, dict(guidance_scale=1.5, negative_prompt_ids=torch.arange(40, 55)[None])])
def test_a_streamer_that_shows_the_canvas_gets_all_rows(tiny, decode, negative):
    streamer = CanvasRecorder()
    options = dict(max_new_tokens=12, block_length=4, eos_token_id=ENDS, pad_token_id=0)
    if negative:
        negative = negative | dict(negative_prompt_ids=negative["negative_prompt_ids"].expand(3, -1))
    output = decode(tiny("llada"), PROMPTS, streamer=streamer, **options, **negative)
    assert len(streamer.drafts) == int(output.nfe.max())
    assert all(canvas.shape == (3, 20) for _, canvas in streamer.drafts)
    last = streamer.drafts[-1][1]
    for row in range(3):
        text = cut(generated(output, row))
        assert last[row, 8:][: len(text)].tolist() == text
    assert streamer.ended and len(streamer.pieces) == 1


def test_a_streamer_of_the_host_takes_one_row_only(tiny, decode, tokenizer):
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        decode(tiny("llada"), PROMPTS, max_new_tokens=4, streamer=TextStreamer(tokenizer))


@pytest.mark.parametrize("kind", [TextStreamer, TextDiffusionStreamer])
def test_the_streamers_of_the_host_print_the_text(tiny, decode, tokenizer, capsys, kind):
    output = decode(tiny("llada"), [PROMPT], **PLAIN, streamer=kind(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    text = spell(generated(output))
    assert printed.replace("\n", "").endswith(text) if kind is TextStreamer else all(c in printed for c in text)


# --- what is returned ------------------------------------------------------------------------------------------------


def test_by_default_the_ids_are_returned(tiny, left_padded):
    ids, mask = left_padded(PROMPTS)
    output = tiny("llada").generate(ids, attention_mask=mask, max_new_tokens=4, stop_at_eos=False)
    assert isinstance(output, torch.LongTensor)
    assert output.shape == (3, 12)


@pytest.mark.parametrize("guided", [False, True])
def test_every_field_has_its_shape(tiny, decode, guided):
    options = dict(guider=tiny("guider")) if guided else {}
    output = decode(tiny("dream_trained"), PROMPTS, max_new_tokens=12, block_length=4, **options)
    assert isinstance(output, DiffusionGenerationOutput)
    assert next(iter(output)) == "sequences"
    for name in ("nfe", "active_tokens"):
        assert output[name].dtype == torch.long and output[name].shape == (3,)
    assert output.tokens_per_forward.dtype == torch.float and output.tokens_per_forward.shape == (3,)
    counts = [output.guider_forwards, output.drafts_judged, output.drafts_accepted]
    if guided:
        assert all(count.shape == (3,) and count.dtype == torch.long for count in counts)
        assert [len(lengths) for lengths in output.accepted_lengths] == output.nfe.tolist()
        assert 0 < output.guider_time_share < 1
    else:
        assert set(output) == {"sequences", "nfe", "tokens_per_forward", "active_tokens"}


@every_policy
def test_active_tokens_are_the_queries_that_were_fed(tiny, decode, policy):
    output = decode(tiny("dream"), [PROMPT], max_new_tokens=14, block_length=4, **policy)
    assert output.active_tokens.tolist() == [sum(forward["input_ids"].shape[1] for forward in output.forwards)]
    assert all((forward["cache"] is None) == ("none" in str(policy)) for forward in output.forwards)


def test_a_cache_of_the_callers_is_used(tiny, decode):
    cache = FreeCache()
    output = decode(tiny("llada"), [PROMPT], **PLAIN, cache=cache)
    assert cache.canvas_length == 20
    assert all(forward["cache"] is cache for forward in output.forwards)
    cache.reset()
    again = decode(tiny("llada"), [PROMPT], **PLAIN, cache=cache)
    assert again.sequences.tolist() == output.sequences.tolist()


def test_a_cache_of_the_callers_is_afterwards_written_in_inference_mode_only(tiny):
    cache, ids = FreeCache(), torch.tensor([PROMPT])
    tiny("llada").generate(ids, max_new_tokens=4, cache=cache)
    last = cache.canvas_length - 1

    def write():
        cache.window(last, last + 1)
        tiny("llada")(ids[:, -1:], position_ids=torch.tensor([[last]]), **{CACHE_NAME: cache})

    with torch.no_grad(), pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        write()
    with torch.inference_mode():
        write()


def test_a_pipeline_generates_text(tiny, tokenizer):
    generate = pipeline("text-generation", model=tiny("llada"), tokenizer=tokenizer)
    options = dict(max_new_tokens=6, block_length=3, window_policy="dual", do_sample=False, stop_at_eos=False)
    one = generate(spell(PROMPT), **options)[0]["generated_text"]
    wanted = tiny("llada").generate(torch.tensor([PROMPT]), **options)
    assert one == spell(wanted[0].tolist())
    several = generate([spell(prompt) for prompt in PROMPTS], batch_size=3, **options)
    assert [len(texts[0]["generated_text"]) for texts in several] == [len(prompt) + 6 for prompt in PROMPTS]
    assert several[0][0]["generated_text"] == one


def test_a_batch_of_a_tokenizer_can_be_passed_whole(tiny, tokenizer):
    inputs = tokenizer([spell(prompt) for prompt in PROMPTS], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    output = tiny("llada").generate(**inputs, max_new_tokens=4, stop_at_eos=False)
    assert output.shape == (3, 12)
