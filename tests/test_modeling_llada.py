"""LLaDA: the numbers of the original code, its keys and fields, and what Transformers may ask of a model."""

import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache, StaticCache

import hf_flashdlm  # noqa: F401  registers the model with the Auto classes
from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.configuration_llada import IMPLEMENTED_SWITCHES, LLaDAConfig
from hf_flashdlm.modeling_llada import LLaDAModel, LLaDAModelLM


GOLDENS = Path(__file__).parent / "goldens"
ATOL = 2e-3  # float32 rounding of the golden models is 1e-4
TINY = {
    "vocab_size": 60,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "max_sequence_length": 64,
    "mask_token_id": 59,
    "eos_token_id": 58,
    "pad_token_id": 58,
}


@functools.cache
def load(name, attention="sdpa"):
    """A golden model; tests share it, so they leave it as it is."""
    return LLaDAModelLM.from_pretrained(GOLDENS / f"model_{name}", attn_implementation=attention).eval()


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


@pytest.fixture(params=["llada", "llada_gqa"])
def model(request):
    return load(request.param)


@pytest.fixture
def llada():
    return load("llada")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def tiny(**fields):
    torch.manual_seed(0)
    return LLaDAModelLM(LLaDAConfig(**{**TINY, **fields})).eval()


def canvas(batch_size=2, length=12):
    return torch.randint(0, 58, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "tag"), golden_tags("llada") + golden_tags("llada_gqa"))
def test_logits_are_those_of_the_original(name, tag, attention):
    inputs, expected, meaningful = golden(name, tag)
    logits = load(name, attention)(**inputs).logits
    torch.testing.assert_close(logits[meaningful], expected[meaningful], atol=ATOL, rtol=0)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_load_the_original_checkpoint_without_remote_code(auto_class):
    assert type(auto_class.from_pretrained(GOLDENS / "model_llada")) is LLaDAModelLM


def test_loading_says_nothing(caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        _, info = LLaDAModelLM.from_pretrained(GOLDENS / "model_llada", output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert not any(info.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_last_token_changes_the_first_logits(attention):
    model = load("llada", attention)
    ids = canvas()
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.allclose(model(changed).logits[:, 0], model(ids).logits[:, 0], atol=0.1)


def test_is_causal_cannot_be_asked_for(llada):
    torch.testing.assert_close(llada(canvas(), is_causal=True).logits, llada(canvas()).logits)


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


def test_position_ids_default_to_counting_from_zero(llada):
    ids = canvas()
    torch.testing.assert_close(llada(ids, position_ids=torch.arange(12)[None]).logits, llada(ids).logits)
    stretched = llada(ids, position_ids=2 * torch.arange(12)[None]).logits
    assert not torch.allclose(stretched, llada(ids).logits, atol=0.1)


def test_positions_behind_an_unchanged_cached_prefix_get_the_logits_of_the_full_forward(model):
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


def test_unused_slots_of_a_static_cache_are_not_attended_to(llada):
    ids = canvas()
    cache = StaticCache(config=llada.config, max_cache_len=16)
    logits = llada(ids, attention_mask=torch.ones_like(ids), **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(logits, llada(ids).logits, atol=ATOL, rtol=0)


def test_default_positions_continue_behind_the_cache(llada):
    ids = canvas()
    out = llada(ids, use_cache=True)
    out[CACHE_NAME].crop(-7)
    rest = llada(ids[:, 5:], **{CACHE_NAME: out[CACHE_NAME]}).logits
    torch.testing.assert_close(rest, out.logits[:, 5:], atol=ATOL, rtol=0)


def test_a_cache_is_only_made_on_request(llada):
    assert getattr(llada(canvas()), CACHE_NAME) is None
    assert llada(canvas(), use_cache=True)[CACHE_NAME].get_seq_length() == 12


@pytest.mark.parametrize("kept", [3, torch.tensor([1, 4, 5])])
def test_logits_to_keep_selects_rows(llada, kept):
    rows = slice(-kept, None) if isinstance(kept, int) else kept
    logits = llada(canvas(), logits_to_keep=kept).logits
    torch.testing.assert_close(logits, llada(canvas()).logits[:, rows], atol=ATOL, rtol=0)


def test_embeddings_stand_in_for_ids(llada):
    embeds = llada.get_input_embeddings()(canvas())
    torch.testing.assert_close(llada(inputs_embeds=embeds).logits, llada(canvas()).logits)
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got neither"):
        llada()
    with pytest.raises(ValueError, match="Exactly one of `input_ids` and `inputs_embeds` must be given, got both"):
        llada(canvas(), inputs_embeds=embeds)


def test_hidden_states_and_attentions_can_be_recorded():
    model = tiny()
    model.set_attn_implementation("eager")
    out = model(canvas(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(2, 12, 32)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 12, 12)] * 2
    assert isinstance(model(canvas(), return_dict=False), tuple)


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
    assert torch.equal(LLaDAModelLM.from_pretrained(tmp_path).eval()(canvas()).logits, model(canvas()).logits)


def test_rotary_frequencies_are_computed_after_loading_on_the_meta_device(llada):
    rotary = llada.model.rotary_emb
    expected = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(rotary.inv_freq, expected)
    torch.testing.assert_close(rotary.original_inv_freq, expected)


def test_bfloat16_keeps_the_rotary_embedding_in_float32(llada):
    model = LLaDAModelLM.from_pretrained(GOLDENS / "model_llada", dtype=torch.bfloat16).eval()
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(4)[None])
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    logits = model(canvas()).logits
    assert logits.dtype == torch.bfloat16
    agreement = (logits.argmax(-1) == llada(canvas()).logits.argmax(-1)).float().mean()
    assert agreement > 0.6, "random golden weights are sensitive, yet bfloat16 must mostly agree"


def test_the_body_loads_alone(llada):
    body = LLaDAModel.from_pretrained(GOLDENS / "model_llada").eval()
    hidden_states = body(canvas()).last_hidden_state
    assert hidden_states.shape == (2, 12, 64)
    torch.testing.assert_close(body.transformer.ff_out(hidden_states), llada(canvas()).logits)
    assert llada.get_decoder() is llada.model
    assert llada.get_input_embeddings() is llada.model.transformer.wte


def test_device_map_and_tied_weights(tmp_path):
    model = tiny(weight_tying=True, include_bias=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight and head.bias is None
    model.save_pretrained(tmp_path)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = LLaDAModelLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(canvas()).logits, model(canvas()).logits)


def test_embeddings_may_have_more_rows_than_the_vocabulary(tmp_path):
    model = tiny(embedding_size=64)
    assert model(canvas()).logits.shape == (2, 12, 64)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert (model.config.vocab_size, model.config.embedding_size) == (70, 70)
    model.save_pretrained(tmp_path)
    assert torch.equal(LLaDAModelLM.from_pretrained(tmp_path).eval()(canvas()).logits, model(canvas()).logits)


@pytest.mark.parametrize(
    ("fields", "num_kv_heads"),
    [({}, 4), ({"n_kv_heads": 2}, 2), ({"multi_query_attention": True}, 1), ({"multi_query_attention": False}, 4)],
)
def test_number_of_key_value_heads(fields, num_kv_heads):
    model = tiny(**fields)
    assert model.config.num_key_value_heads == num_kv_heads
    out = model(canvas(), use_cache=True)
    assert out[CACHE_NAME].layers[0].keys.shape == (2, num_kv_heads, 12, 8)


@pytest.mark.parametrize(
    ("fields", "biased"),
    [({}, set()), ({"include_qkv_bias": True}, {"q_proj", "k_proj", "v_proj"})],
)
def test_biases(fields, biased):
    block = tiny(**fields).model.transformer.blocks[0]
    assert {name.removesuffix(".bias") for name, _ in block.named_parameters() if name.endswith("bias")} == biased


def test_labels_stay_in_place():
    model = tiny()
    labels = torch.full((2, 12), -100)
    labels[:, 3] = torch.tensor([5, 6])
    out = model(canvas(), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, 3], labels[:, 3]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # the floor has no other name
def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            model(canvas(), labels=canvas()).loss.backward()
        gradients.append(model.model.transformer.wte.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_config_reads_fields_under_both_names():
    config = LLaDAConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, mlp_hidden_size=None)
    assert (config.d_model, config.n_heads, config.n_layers) == (32, 4, 1)
    assert (config.intermediate_size, config.n_kv_heads, config.embedding_size) == (128, 4, 126464)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (126336, 126081, 126081)
    assert config.logits_shift == 0


def test_config_round_trip(tmp_path):
    config = AutoConfig.from_pretrained(GOLDENS / "model_llada_gqa")
    assert type(config) is LLaDAConfig
    config.save_pretrained(tmp_path / "once")
    LLaDAConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


def test_rope_theta_follows_rope_parameters():
    assert LLaDAConfig(rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope_theta == 7.0
    assert LLaDAConfig(rope_theta=7.0, rope_scaling=None).rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "gelu"),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("bias_for_layer_norm", True),
        ("attention_layer_norm", True),
        ("rope", False),
        ("alibi", True),
        ("clip_qkv", 8.0),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("is_causal", True),
    ],
)
def test_other_architectures_are_refused(name, value):
    with pytest.raises(ValueError) as error:
        LLaDAConfig(**{name: value})
    assert str(error.value) == (
        f"`{name}` must be {IMPLEMENTED_SWITCHES[name]!r}, as in every released LLaDA, got {value!r}: "
        "load this checkpoint with the modeling code it was trained with."
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "`d_model` must be a multiple of `n_heads` (4), got 30: change one of them."),
        ({"n_kv_heads": 3}, "`n_kv_heads` must divide `n_heads` (4), got 3: change one of them."),
        (
            {"n_kv_heads": 2, "multi_query_attention": True},
            "`n_kv_heads` must be 1 when `multi_query_attention` is True, got 2: "
            "set `multi_query_attention` to None to choose the number freely.",
        ),
        (
            {"embedding_size": 10},
            "`embedding_size` must be at least `vocab_size` (60), got 10: leave it out to use `vocab_size`.",
        ),
    ],
)
def test_contradicting_sizes_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        LLaDAConfig(**{**TINY, **fields})
    assert str(error.value) == message
