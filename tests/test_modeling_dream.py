"""Dream: the numbers of the original code, its keys and fields, and bidirectional attention in Qwen2's modules."""

import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache, StaticCache

import hf_flashdlm
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.configuration_dream import DreamConfig
from hf_flashdlm.modeling_dream import DreamModel


GOLDENS = Path(__file__).parent / "goldens"
ATOL = 2e-3  # float32 rounding of the golden models is 1e-4
TINY = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "mask_token_id": 59,
    "bos_token_id": 58,
    "eos_token_id": 58,
    "pad_token_id": 58,
}


@functools.cache
def load(name, attention="sdpa"):
    """A golden model; tests share it, so they leave it as it is."""
    return DreamModel.from_pretrained(GOLDENS / f"model_{name}", attn_implementation=attention).eval()


def golden_tags(name):
    with safe_open(GOLDENS / f"logits_{name}.safetensors", "pt") as file:
        return [(name, entry["tag"]) for entry in json.loads(file.metadata()["index"])]


def golden(name, tag):
    """The inputs of a golden forward, its logits, and which of their rows mean something."""
    with safe_open(GOLDENS / f"logits_{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{tag}.")]
        inputs = {key.removeprefix(f"{tag}."): file.get_tensor(key) for key in keys}
    logits = inputs.pop("logits")
    return inputs, logits, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


@pytest.fixture
def dream():
    return load("dream")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny(**fields):
    torch.manual_seed(0)
    return DreamModel(DreamConfig(**{**TINY, **fields})).eval()


def canvas(batch_size=2, length=12):
    return torch.randint(0, 58, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "tag"), golden_tags("dream") + golden_tags("dream_trained"))
def test_logits_are_those_of_the_original_unshifted(name, tag, attention):
    inputs, expected, meaningful = golden(name, tag)
    logits = load(name, attention)(**inputs).logits
    torch.testing.assert_close(logits[meaningful], expected[meaningful], atol=ATOL, rtol=0)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_load_the_original_checkpoint_without_remote_code(auto_class):
    assert type(auto_class.from_pretrained(GOLDENS / "model_dream")) is DreamModel


def test_loading_says_nothing(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        _, info = DreamModel.from_pretrained(GOLDENS / "model_dream", output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert not any(info.values())


def test_generate_is_ours():
    order = DreamModel.__mro__
    assert order[1] is hf_flashdlm.FlashDLMGenerationMixin


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_token_changes_the_first_logits(attention):
    model = load("dream", attention)
    ids = canvas()
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(changed).logits[:, 0], model(ids).logits[:, 0], atol=0.1)


def test_no_attention_module_is_causal(dream):
    assert [layer.self_attn.is_causal for layer in dream.model.layers] == [False] * 4
    assert dream.config.is_causal is False


def test_a_padded_row_equals_the_row_alone(dream):
    ids, padding = canvas(1, 12), 5
    padded = torch.cat([torch.full((1, padding), 7), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    batch = torch.cat([padded, canvas(1, 17)])
    batch_mask = torch.cat([mask, torch.ones_like(mask)])
    position_ids = (batch_mask.cumsum(1) - 1).clamp_min(0)
    logits = dream(batch, attention_mask=batch_mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:1, padding:], dream(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_positions_behind_an_unchanged_cached_prefix_get_the_logits_of_the_full_forward(attention):
    model = load("dream", attention)
    ids = canvas(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    full = model(ids, attention_mask=mask, position_ids=position_ids, **{CACHE_NAME: cache})
    cache.crop(-7)
    rest = model(ids[:, 5:], attention_mask=mask, position_ids=position_ids[:, 5:], **{CACHE_NAME: cache})
    torch.testing.assert_close(rest.logits, full.logits[:, 5:], atol=ATOL, rtol=0)


def test_unused_slots_of_a_static_cache_are_not_attended_to(dream):
    ids = canvas()
    cache = StaticCache(config=dream.config, max_cache_len=16)
    logits = dream(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, dream(ids).logits, atol=ATOL, rtol=0)


def test_default_positions_continue_behind_the_cache(dream):
    ids = canvas()
    out = dream(ids, use_cache=True)
    out[CACHE_NAME].crop(-7)
    rest = dream(ids[:, 5:], **{CACHE_NAME: out[CACHE_NAME]}).logits
    torch.testing.assert_close(rest, out.logits[:, 5:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kept", [3, torch.tensor([1, 4, 5])])
def test_logits_to_keep_selects_rows(dream, kept):
    rows = slice(-kept, None) if isinstance(kept, int) else kept
    logits = dream(canvas(), logits_to_keep=kept).logits
    torch.testing.assert_close(logits, dream(canvas()).logits[:, rows], atol=ATOL, rtol=0)


def test_hidden_states_and_attentions_can_be_recorded():
    model = tiny()
    model.set_attn_implementation("eager")
    out = model(canvas(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(2, 12, 32)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 12, 12)] * 2


def test_saving_keeps_keys_fields_and_logits(dream, tmp_path):
    dream.save_pretrained(tmp_path)
    source = GOLDENS / "model_dream"
    original, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    original_fields = json.loads((source / "config.json").read_text())
    fields = json.loads((tmp_path / "config.json").read_text())
    rewritten = {"torch_dtype", "transformers_version"}  # Transformers v5 writes `dtype` and its own version
    assert {key: fields.get(key) for key in original_fields.keys() - rewritten} == {
        key: value for key, value in original_fields.items() if key not in rewritten
    }
    assert torch.equal(DreamModel.from_pretrained(tmp_path).eval()(canvas()).logits, dream(canvas()).logits)


def test_rotary_frequencies_are_computed_after_loading_on_the_meta_device(dream):
    rotary = dream.model.rotary_emb
    expected = 1000000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(rotary.inv_freq, expected)
    torch.testing.assert_close(rotary.original_inv_freq, expected)


def test_bfloat16_mostly_agrees(dream):
    model = DreamModel.from_pretrained(GOLDENS / "model_dream", dtype=torch.bfloat16).eval()
    logits = model(canvas()).logits
    assert logits.dtype == torch.bfloat16
    agreement = (logits.argmax(-1) == dream(canvas()).logits.argmax(-1)).float().mean()
    assert agreement > 0.6, "random golden weights are sensitive, yet bfloat16 must mostly agree"


def test_device_map_and_tied_weights(tmp_path):
    model = tiny(tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = DreamModel.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(canvas()).logits, model(canvas()).logits)


def test_labels_stay_in_place_though_logits_are_shifted():
    model = tiny()
    labels = torch.full((2, 12), -100)
    labels[:, 3] = torch.tensor([5, 6])
    out = model(canvas(), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 2], labels[:, 3]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the floor has no other name
def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(use_cache=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            model(canvas(), labels=canvas()).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_config_defaults_are_those_of_dream_7b():
    config = DreamConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (3584, 28, 152064)
    assert config.mask_token_id == 151666
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert config.logits_shift == 1


def test_config_round_trip(tmp_path):
    config = AutoConfig.from_pretrained(GOLDENS / "model_dream")
    assert type(config) is DreamConfig
    config.save_pretrained(tmp_path / "once")
    DreamConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


def test_rope_theta_follows_rope_parameters():
    assert DreamConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert DreamConfig(rope_theta=7.0, rope_scaling=None).rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize("name", ["is_causal", "use_sliding_window"])
def test_attention_that_is_not_full_is_refused(name):
    with pytest.raises(ValueError) as error:
        DreamConfig(**{name: True})
    assert str(error.value) == (
        f"`{name}` must be False, because every position of Dream attends to every other, got True: "
        "load an autoregressive checkpoint as `Qwen2ForCausalLM`."
    )
