"""`generate` as its users see it: where options come from, what is returned, and that nothing survives a call."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from cases import ENDS, PLAIN, POLICIES, PROMPT, PROMPTS, every_model, every_policy, spell
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessorList, pipeline

import hf_flashdlm.generation_mixin
from hf_flashdlm import ARGuider, DiffusionGenerationOutput, DiffusionOptions, FreeCache
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.generation_config import PEER_NAMES
from hf_flashdlm.tiny import FOLDER as TINY


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
    assert all(weight.grad is not None for weight in model.parameters())
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


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # of older Transformers
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
    for offloaded in (model, guider):
        cpu_offload(offloaded, execution_device=torch.device("cpu"))
        assert offloaded.device.type == "meta"
    output = run(model, guider)
    assert output.sequences.equal(expected.sequences) and output.accepted_lengths == expected.accepted_lengths


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # of older Transformers
@pytest.mark.parametrize("in_part", [False, True])
def test_models_whose_weights_are_on_disk_decode_the_same(decode, in_part, tmp_path):
    def load(name, **options):
        return AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32, **options)

    def on_disk(name, memory):
        devices = {"device_map": "auto", "max_memory": {"cpu": memory}} if in_part else {"device_map": {"": "disk"}}
        model = load(name, **devices, offload_folder=tmp_path / name)
        assert set(model.hf_device_map.values()) == ({"cpu", "disk"} if in_part else {"disk"})
        return model

    options = {"max_new_tokens": 16, "block_length": 8}
    expected = decode(load("dlm"), PROMPTS, **options, guider=load("guider"))
    output = decode(on_disk("dlm", "2MB"), PROMPTS, **options, guider=on_disk("guider", "1MB"))
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
    own_model.generation_config = GenerationConfig(**vars(wanted))
    own_model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    loaded.generate(torch.tensor([PROMPT]), max_new_tokens=6)
    assert options_seen == [wanted]


def save_the_model(model, folder):
    model.save_pretrained(folder)


def save_the_generation_config(model, folder):
    model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def save_another_model(model, folder):
    """A model that was never loaded takes over the generation config."""
    other = type(model)(model.config)
    other.generation_config = GenerationConfig.from_model_config(model.config)
    other.generation_config.block_length, other.generation_config.max_new_tokens = 2, 6
    other.save_pretrained(folder)


@every_model
@pytest.mark.parametrize("save", [save_the_model, save_the_generation_config, save_another_model])
def test_options_set_on_a_derived_generation_config_travel_with_it(tiny, tmp_path, save, name):
    tiny(name).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.generation_config.block_length, model.generation_config.max_new_tokens = 2, 6
    for again in ("once", "twice"):
        save(model, tmp_path / again)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / again)
        assert model.generation_config.block_length == 2
        assert model.generation_config.max_new_tokens == 6


def test_a_derived_generation_config_may_be_given_to_from_pretrained(own_model, tmp_path):
    derived = GenerationConfig.from_model_config(own_model.config)
    derived.block_length = 2
    before = derived.to_dict()
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path, generation_config=derived).generation_config.block_length == 2
    )
    assert derived.to_dict() == before


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
def test_an_unknown_name_raises_what_transformers_raises(tiny, name):
    with pytest.raises(ValueError, match=rf"`model_kwargs` are not used by the model: \['{name}'\]"):
        tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=3, **{name: 4})


@pytest.mark.parametrize("name", PEER_NAMES)
def test_a_name_of_other_implementations_is_answered_with_ours(tiny, name):
    known = DiffusionOptions.names() + list(inspect.signature(GenerationConfig().update).parameters)
    known += list(vars(GenerationConfig()))
    ours = PEER_NAMES[name].split("`")[1].split("=")[0]
    assert ours in known and name not in known
    message = f"`{name}` is an option of other implementations: here it is {PEER_NAMES[name]}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny("llada").generate(torch.tensor([PROMPT]), max_new_tokens=3, **{name: 4})


def test_max_length_counts_the_prompt(tiny):
    output = tiny("llada").generate(torch.tensor([PROMPT]), max_length=13, stop_at_eos=False)
    assert output.shape == (1, 13)


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
        assert set(output) == {"sequences", "nfe", "tokens_per_forward", "active_tokens", "written_at"}


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
    single = generate(spell(PROMPT), **options)[0]["generated_text"]
    wanted = tiny("llada").generate(torch.tensor([PROMPT]), **options)
    assert single == spell(wanted[0].tolist())
    several = generate([spell(prompt) for prompt in PROMPTS], batch_size=3, **options)
    assert [len(texts[0]["generated_text"]) for texts in several] == [len(prompt) + 6 for prompt in PROMPTS]
    assert several[0][0]["generated_text"] == single


def test_a_batch_of_a_tokenizer_can_be_passed_whole(tiny, tokenizer):
    inputs = tokenizer([spell(prompt) for prompt in PROMPTS], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    output = tiny("llada").generate(**inputs, max_new_tokens=4, stop_at_eos=False)
    assert output.shape == (3, 12)
