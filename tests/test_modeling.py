"""LLaDA and Dream: the numbers of the original code, its keys and fields, padding, and caches."""

import json
import logging
from pathlib import Path

import pytest
import torch
from golden_models import ATOL, GOLDENS, canvas, load
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache, StaticCache

from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.configuration_dream import DreamConfig
from hf_flashdlm.configuration_llada import LLaDAConfig
from hf_flashdlm.modeling_dream import DreamModel
from hf_flashdlm.modeling_llada import LLaDAModelLM


pytestmark = pytest.mark.usefixtures("no_grad")

CLASSES = {
    "dream": (DreamConfig, DreamModel),
    "dream_trained": (DreamConfig, DreamModel),
    "llada": (LLaDAConfig, LLaDAModelLM),
    "llada_gqa": (LLaDAConfig, LLaDAModelLM),
}
every_attention = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_name = pytest.mark.parametrize("name", CLASSES)


def golden_tags(name):
    with safe_open(GOLDENS / f"logits_{name}.safetensors", "pt") as file:
        return [(name, entry["tag"]) for entry in json.loads(file.metadata()["index"])]


def golden(name, tag):
    """The inputs of a golden forward, its logits, and which of their rows count."""
    with safe_open(GOLDENS / f"logits_{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{tag}.")]
        inputs = {key.removeprefix(f"{tag}."): file.get_tensor(key) for key in keys}
    logits = inputs.pop("logits")
    return inputs, logits, inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


@pytest.fixture(params=CLASSES)
def model(request):
    return load(request.param)


@every_attention
@pytest.mark.parametrize(("name", "tag"), [pair for name in CLASSES for pair in golden_tags(name)])
def test_logits_are_those_of_the_original(name, tag, attention):
    inputs, expected, meaningful = golden(name, tag)
    logits = load(name, attention)(**inputs).logits
    torch.testing.assert_close(logits[meaningful], expected[meaningful], atol=ATOL, rtol=0)


def test_a_model_with_shifted_logits_is_no_masked_language_model():
    """`pipeline("fill-mask")` takes the logits at a position for those that score it, which Dream's are not."""
    assert type(AutoModelForMaskedLM.from_pretrained(GOLDENS / "model_llada")) is LLaDAModelLM
    with pytest.raises(ValueError, match="^Unrecognized configuration class .*DreamConfig.* this kind of AutoModel"):
        AutoModelForMaskedLM.from_pretrained(GOLDENS / "model_dream")


@every_name
@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_load_the_original_checkpoint_without_remote_code(name, auto_class):
    assert type(auto_class.from_pretrained(GOLDENS / f"model_{name}")) is CLASSES[name][1]


@every_name
def test_loading_says_nothing(name, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        _, info = AutoModelForCausalLM.from_pretrained(GOLDENS / f"model_{name}", output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert not any(info.values())


@every_name
@every_attention
def test_the_last_token_changes_the_first_logits(name, attention):
    model = load(name, attention)
    ids = canvas()
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(changed).logits[:, 0], model(ids).logits[:, 0], atol=0.1)


def test_a_padded_row_equals_the_row_alone(model):
    ids, padding = canvas(1, 12), 5
    padded = torch.cat([torch.full((1, padding), 7), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :padding] = 0
    batch = torch.cat([padded, canvas(1, 17)])
    batch_mask = torch.cat([mask, torch.ones_like(mask)])
    position_ids = (batch_mask.cumsum(1) - 1).clamp_min(0)
    logits = model(batch, attention_mask=batch_mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits[:1, padding:], model(ids).logits, atol=ATOL, rtol=0)


@every_name
@every_attention
def test_positions_after_an_unchanged_cached_prefix_get_the_logits_of_the_full_forward(name, attention):
    model = load(name, attention)
    ids = canvas(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    full = model(ids, attention_mask=mask, position_ids=position_ids, **{CACHE_NAME: cache}, use_cache=True)
    cache.crop(-7)
    rest = model(ids[:, 5:], attention_mask=mask, position_ids=position_ids[:, 5:], **{CACHE_NAME: cache})
    torch.testing.assert_close(rest.logits, full.logits[:, 5:], atol=ATOL, rtol=0)
    assert cache.get_seq_length() == 12


def test_unused_slots_of_a_static_cache_are_not_attended_to(model):
    ids = canvas()
    cache = StaticCache(config=model.config, max_cache_len=16)
    logits = model(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, model(ids).logits, atol=ATOL, rtol=0)


def test_default_positions_continue_after_the_cache(model):
    ids = canvas()
    out = model(ids, use_cache=True)
    out[CACHE_NAME].crop(-7)
    rest = model(ids[:, 5:], **{CACHE_NAME: out[CACHE_NAME]}).logits
    torch.testing.assert_close(rest, out.logits[:, 5:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("kept", [3, torch.tensor([1, 4, 5])])
def test_logits_to_keep_selects_rows(model, kept):
    rows = slice(-kept, None) if isinstance(kept, int) else kept
    logits = model(canvas(), logits_to_keep=kept).logits
    torch.testing.assert_close(logits, model(canvas()).logits[:, rows], atol=ATOL, rtol=0)


def test_saving_keeps_keys_fields_and_logits(model, tmp_path):
    model.save_pretrained(tmp_path)
    source = Path(model.config.name_or_path)
    original, saved = load_file(source / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    original_fields = json.loads((source / "config.json").read_text())
    fields = json.loads((tmp_path / "config.json").read_text())
    rewritten = {"torch_dtype", "transformers_version"}  # Transformers v5 writes `dtype` and its own version
    assert {key: fields.get(key) for key in original_fields.keys() - rewritten} == {
        key: value for key, value in original_fields.items() if key not in rewritten
    }
    assert torch.equal(type(model).from_pretrained(tmp_path).eval()(canvas()).logits, model(canvas()).logits)


@every_name
def test_config_round_trip(name, tmp_path):
    config = AutoConfig.from_pretrained(GOLDENS / f"model_{name}")
    assert type(config) is CLASSES[name][0]
    config.save_pretrained(tmp_path / "once")
    type(config).from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()
