"""The families on decoders of Transformers: numbers and keys of the original code, attention, loss, saved files."""

import functools
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Qwen3MoeForCausalLM

import hf_flashdlm
from hf_flashdlm import make_block_causal


GOLDENS = Path(__file__).parent / "goldens" / "families"
ATOL = 2e-3  # float32 rounding of the golden models is 1e-4
CLASSES = {
    "block_ar/sdar": hf_flashdlm.SDARForCausalLM,
    "block_ar/fast_dllm_v2": hf_flashdlm.Fast_dLLM_QwenForCausalLM,
    "block_ar/a2d_qwen3": hf_flashdlm.A2DQwen3LMHeadModel,
    "block_ar/a2d_qwen2": hf_flashdlm.A2DQwen2LMHeadModel,
    "llada2/llada2": hf_flashdlm.LLaDA2MoeModelLM,
    "llada2/llada21": hf_flashdlm.LLaDA2MoeModelLM,
    "llada2/llada_moe": hf_flashdlm.LLaDAMoEModelLM,
}
TINY = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mask_token_id=63,
    bos_token_id=60,
    eos_token_id=61,
    pad_token_id=62,
)


def folder(name):
    return GOLDENS / "{}/model_{}".format(*name.split("/"))


@functools.cache
def load(name, attention="sdpa", dtype=None):
    """A golden model; tests share it, so they leave it as it is."""
    return AutoModelForCausalLM.from_pretrained(folder(name), attn_implementation=attention, dtype=dtype).eval()


def goldens(name):
    """For each recorded forward of a model: its tag, the block length, if any, and its tensors."""
    with safe_open(GOLDENS / "{}/logits_{}.safetensors".format(*name.split("/")), "pt") as file:
        index = json.loads(file.metadata()["index"])
        for tag in index:
            keys = [key for key in file.keys() if key.startswith(f"{tag}.")]
            tensors = {key.removeprefix(f"{tag}."): file.get_tensor(key) for key in keys}
            length = tensors.pop("block_length", None)
            if isinstance(index, dict):
                length = index[tag].get("block_length")
            yield tag, None if length is None else int(length), tensors


FORWARDS = [(name, *forward) for name in CLASSES for forward in goldens(name)]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def blocks():
    """`blocks(model, length)` is the golden model with blocks of another length, or none, until the test ends."""
    changed = {}

    def blocks(model, length):
        changed.setdefault(model, model.config.attention_block_length)
        if length is None and model.config.attention_block_length is not None:
            model.config.attention_block_length = None
        elif length is not None:
            make_block_causal(model, length, model.config.attention_block_origin)
        return model

    yield blocks
    for model, length in changed.items():
        if model.config.attention_block_length != length:
            model.config.attention_block_length = length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "tag", "length", "tensors"), FORWARDS, ids=[f"{name}-{tag}" for name, tag, *_ in FORWARDS]
)
def test_logits_are_those_of_the_original(blocks, attention, name, tag, length, tensors):
    inputs = {key: value for key, value in tensors.items() if key != "logits"}
    meaningful = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    model = blocks(load(name, attention), length)
    for given in (inputs, {key: value for key, value in inputs.items() if key != "position_ids"}):
        logits = model(**given).logits
        torch.testing.assert_close(logits[meaningful], tensors["logits"][meaningful], atol=ATOL, rtol=0)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
@pytest.mark.parametrize("name", CLASSES)
def test_auto_classes_load_the_original_checkpoint_without_remote_code(name, auto_class):
    if auto_class is AutoModelForMaskedLM and CLASSES[name].config_class.logits_shift:
        with pytest.raises(ValueError, match="^Unrecognized configuration class"):
            auto_class.from_pretrained(folder(name))
    else:
        assert type(auto_class.from_pretrained(folder(name))) is CLASSES[name]


@pytest.mark.parametrize("name", CLASSES)
def test_loading_says_nothing(caplog, name):
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        _, info = CLASSES[name].from_pretrained(folder(name), output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []
    assert not any(info.values())


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_saved_are_the_original_weights_and_fields(tmp_path, name):
    load(name).save_pretrained(tmp_path)
    original, saved = (load_file(path / "model.safetensors") for path in (folder(name), tmp_path))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in original)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder(name), tmp_path))
    written_by_transformers = {"transformers_version", "torch_dtype", "architectures", "attn_implementation"}
    for key in before.keys() - written_by_transformers:
        assert after.get(key, "lost") == before[key], key
    # LLaDA-MoE's released file names a class that the original code has not.
    assert after["architectures"] == [CLASSES[name].__name__]


@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_model_is_the_same_when_loaded_again(tmp_path, name):
    model, ids = load(name), torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.config.attention_block_length == model.config.attention_block_length
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", CLASSES)
def test_generate_is_ours_and_no_module_is_causal(name):
    model = load(name)
    assert isinstance(model, hf_flashdlm.FlashDLMGenerationMixin)
    assert not any(getattr(module, "is_causal", False) for module in model.modules())
    assert model.config.is_causal is False


@pytest.mark.parametrize(
    ("name", "length"),
    [("block_ar/sdar", 4), ("block_ar/fast_dllm_v2", 32), ("llada2/llada2", 32), ("block_ar/a2d_qwen3", None)],
)
def test_the_config_says_what_sees_what(name, length):
    model = load(name)
    ids = torch.arange(40)[None]
    changed = ids.clone()
    changed[0, 37] = 50
    moved = (model(changed).logits - model(ids).logits)[0].abs().amax(1) > 1e-3
    first = 0 if length is None else 37 // length * length
    assert moved.tolist() == [position >= first for position in range(40)]


def test_the_length_of_blocks_can_be_chosen_when_loading():
    model = AutoModelForCausalLM.from_pretrained(folder("block_ar/a2d_qwen3"), attention_block_length=8)
    assert (model.config.attention_block_length, model.config.attention_block_origin) == (8, "prompt")
    expected = next(tensors for tag, _, tensors in goldens("block_ar/a2d_qwen3") if tag == "padded_block8")
    logits = expected.pop("logits")
    rows = expected["attention_mask"].bool()
    torch.testing.assert_close(model(**expected).logits[rows], logits[rows], atol=ATOL, rtol=0)


def tiny(kind, **changes):
    config = getattr(hf_flashdlm, f"{kind}Config")(**TINY | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_sdar_moe_is_qwen3_moe_with_blocks(tmp_path):
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True)
    model, ids = tiny("SDARMoe", initializer_range=0.5, **sizes), torch.arange(20)[None]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_experts"] == 4 and "num_local_experts" not in saved
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    causal = Qwen3MoeForCausalLM.from_pretrained(tmp_path).eval()
    blocks = torch.arange(20) // 4
    mask = (blocks[:, None] >= blocks[None])[None, None]
    torch.testing.assert_close(model(ids).logits, causal(ids, attention_mask=mask).logits)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is hf_flashdlm.SDARMoeForCausalLM and not any(info.values())
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)


def test_a2d_llama_with_scaled_positions_is_saved_as_the_original_reads_it(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny("A2DLlama", rope_theta=500000.0, rope_scaling=dict(scaling))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_theta"] == 500000.0 and saved["rope_scaling"] == scaling
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_open_dcoder_loads_a_checkpoint_that_says_qwen2(tmp_path):
    model = tiny("OpenDCoder")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "qwen2"}))
    again = hf_flashdlm.OpenDCoderModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(20)[None]
    assert again.config.logits_shift == 1
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "Qwen2Config"


def test_open_dcoder_decodes_as_dream_does(left_padded):
    path = GOLDENS.parent / "model_dream"
    dream = AutoModelForCausalLM.from_pretrained(path).eval()
    fields = {name: value for name, value in dream.config.to_dict().items() if name not in ("model_type", "auto_map")}
    model = hf_flashdlm.OpenDCoderModel(hf_flashdlm.OpenDCoderConfig(**fields)).eval()
    model.load_state_dict(dream.state_dict())
    ids, mask = left_padded([[5, 70, 200, 41], [9, 33]])
    inputs = dict(inputs=ids, attention_mask=mask, max_new_tokens=16, steps=8, schedule="timesteps")
    assert torch.equal(model.generate(**inputs), dream.generate(**inputs))


@pytest.mark.parametrize("name", ["llada2/llada_moe", "block_ar/a2d_qwen3", "block_ar/a2d_qwen2"])
def test_bidirectional_rows_decode_alone_as_in_an_uneven_batch(left_padded, name):
    model, prompts = load(name), [[5, 70, 200, 41, 8], [9, 33], [44, 12, 7, 90, 1, 2, 3, 4]]
    options = dict(max_new_tokens=16, block_length=8, mask_token_id=model.config.vocab_size - 1)
    ids, mask = left_padded(prompts)
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in zip(batch, prompts, strict=True):
        one = torch.tensor([prompt])
        alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert row[ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("kind", "shift"), [("SDAR", 0), ("Fast_dLLM_Qwen", 1), ("OpenDCoder", 1), ("A2DQwen3", 0), ("LLaDAMoE", 0)]
)
def test_the_loss_is_that_of_the_masked_positions(kind, shift):
    model, ids = tiny(kind), torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :5] = -100
    output = model(ids, labels=labels)
    logits = output.logits[:, 5 - shift : 12 - shift].flatten(0, 1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, ids[:, 5:].flatten()))


def test_llada_moe_never_scales_the_weights_of_experts():
    ids = torch.arange(20)[None]
    torch.testing.assert_close(tiny("LLaDAMoE", norm_topk_prob=True)(ids).logits, tiny("LLaDAMoE")(ids).logits)


@pytest.mark.parametrize("name", ["llada2/model_llada2", "llada2/model_llada_moe"])
def test_experts_are_computed_by_any_implementation_of_transformers(name):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name).eval()
    ids = torch.randint(5, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    assert model.config._experts_implementation == "grouped_mm"
    expected = model(ids).logits
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_experts_has_no_implementation_of_them():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "block_ar/model_sdar")
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="experts"):
        model.set_experts_implementation("grouped_mm")


def test_llada_moe_has_layers_without_experts():
    model = tiny("LLaDAMoE", moe_layer_freq=[0, 1])
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, True]
    assert model.model.layers[0].mlp.gate_proj.out_features == model.config.dense_intermediate_size == 48


@pytest.mark.parametrize("name", ["llada2/llada2", "llada2/llada21"])
def test_llada2s_router_and_experts_are_the_originals(name):
    tensors = load_file(GOLDENS / "{}/logits_{}.safetensors".format(*name.split("/")))
    module = next(layer.mlp for layer in load(name).model.layers if hasattr(layer.mlp, "gate"))
    hidden = tensors["router.hidden"]
    logits, weights, index = module.gate(hidden)
    torch.testing.assert_close(logits.flatten(), tensors["router.logits"].flatten(), atol=ATOL, rtol=0)
    ours, theirs = (
        torch.zeros_like(logits).scatter(1, index.view(len(logits), -1), weights.view(len(logits), -1))
        for index, weights in ((index, weights), (tensors["router.topk_index"], tensors["router.topk_weight"]))
    )
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    output = module(hidden.view(1, -1, hidden.shape[-1])).flatten()
    torch.testing.assert_close(output, tensors["router.moe_output"].flatten(), atol=ATOL, rtol=0)


def test_llada2_with_one_expert_a_token_does_not_scale_its_weight():
    sizes = dict(num_experts=4, n_group=2, topk_group=1, moe_intermediate_size=16, partial_rotary_factor=0.5)
    for number, scaled in ((1, False), (2, True)):
        model = tiny("LLaDA2Moe", num_experts_per_tok=number, **sizes)
        assert model.model.layers[1].mlp.gate.norm_topk_prob is scaled


def test_llada2_splits_biases_as_well(tmp_path):
    sizes = dict(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16)
    model = tiny("LLaDA2Moe", use_qkv_bias=True, **sizes)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias.copy_(torch.rand_like(projection.bias))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.layers.0.attention.query_key_value.bias"].shape == (64,)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(20)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", CLASSES)
def test_half_precision_runs(name):
    logits = load(name, dtype=torch.bfloat16)(torch.arange(20)[None]).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
