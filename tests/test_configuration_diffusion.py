"""Configurations of the families: original fields, names that tell checkpoints apart, and what is refused by field."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import hf_flashdlm
from hf_flashdlm.unsupported import REASONS


GOLDENS = Path(__file__).parent / "goldens" / "families"
FOLDERS = {
    "sdar": "block_ar/model_sdar",
    "fast_dllm_v2": "block_ar/model_fast_dllm_v2",
    "a2d_qwen3": "block_ar/model_a2d_qwen3",
    "a2d_qwen2": "block_ar/model_a2d_qwen2",
    "llada2": "llada2/model_llada2",
    "llada_moe": "llada2/model_llada_moe",
}
LLADA22 = (
    "LLaDA2.2 inserts and deletes tokens, which is not supported: load it with its own code, in a process that does "
    "not import hf_flashdlm."
)
CODE = "load it with the modeling code it was trained with."


def fields(name):
    return json.loads((GOLDENS / FOLDERS[name] / "config.json").read_text())


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(name, folder, **changes)`: a folder with the golden config, changed, and no weights."""

    def checkpoint(name, folder="model", **changes):
        values = {key: value for key, value in (fields(name) | changes).items() if value != "absent"}
        path = tmp_path / folder
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(values))
        return path

    return checkpoint


@pytest.mark.parametrize("name", FOLDERS)
def test_original_fields_keep_their_values(name):
    config = AutoConfig.from_pretrained(GOLDENS / FOLDERS[name])
    for key, value in fields(name).items():
        # Of these Transformers has a form of its own.
        if key not in ("architectures", "torch_dtype", "dtype", "transformers_version", "rope_scaling"):
            if key != "attn_implementation":
                assert getattr(config, key) == value, key


@pytest.mark.parametrize(
    ("name", "length", "origin", "shift"),
    [
        ("sdar", 4, "row", 0),
        ("fast_dllm_v2", 32, "row", 1),
        ("a2d_qwen3", None, "prompt", 0),
        ("a2d_qwen2", None, "prompt", 0),
        ("llada2", 32, "row", 0),
        ("llada_moe", None, "row", 0),
    ],
)
def test_attention_and_shift_of_each_family(name, length, origin, shift):
    config = AutoConfig.from_pretrained(GOLDENS / FOLDERS[name])
    assert (config.attention_block_length, config.attention_block_origin) == (length, origin)
    assert (config.is_causal, config.logits_shift) == (False, shift)


@pytest.mark.parametrize(
    ("name", "vocab_size", "mask_token_id"),
    [
        ("sdar", 151936, 151669),
        ("fast_dllm_v2", 151936, 151665),
        ("fast_dllm_v2", 152064, 151665),
        ("a2d_qwen3", 151936, 151669),
        ("a2d_qwen2", 151936, 151665),
        ("llada2", 157184, 156895),
        ("llada_moe", 157184, 156895),
        ("a2d_qwen3", 320, None),
        ("llada2", 320, None),
    ],
)
def test_the_mask_token_that_no_file_names_is_the_released_one(checkpoint, name, vocab_size, mask_token_id):
    path = checkpoint(name, vocab_size=vocab_size, mask_token_id="absent")
    assert AutoConfig.from_pretrained(path).mask_token_id == mask_token_id


def test_a_vocabulary_without_the_released_mask_token_has_to_be_told_it():
    path = GOLDENS / FOLDERS["a2d_qwen3"]
    model = AutoModelForCausalLM.from_pretrained(path)
    inputs = model.dummy_inputs["input_ids"][:1]
    with pytest.raises(ValueError) as error:
        model.generate(inputs, max_new_tokens=4)
    assert str(error.value) == (
        "`mask_token_id` must be an id of the model's vocabulary of 320, got None: pass that of the tokenizer's "
        "mask token, or set it in `model.config`."
    )
    model = AutoModelForCausalLM.from_pretrained(path, mask_token_id=311)
    assert model.generate(inputs, max_new_tokens=4).shape == (1, inputs.shape[1] + 4)


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, hf_flashdlm.SDARConfig.from_pretrained])
@pytest.mark.parametrize(
    ("folder", "block_size", "length"),
    [
        ("SDAR-8B-Chat", 4, 4),
        ("SDAR-8B-Chat", "absent", 4),
        ("SDAR-8B-Chat-b32", "absent", 32),
        ("SDAR-4B-Chat-b16-v2", None, 16),
        ("SDAR-8B-Chat-b32", 8, 8),
        ("SDAR-8B-base", "absent", 4),
    ],
)
def test_sdars_blocks_are_those_of_the_file_or_the_name(checkpoint, load, folder, block_size, length):
    config = load(checkpoint("sdar", folder, block_size=block_size))
    assert (config.block_size, config.attention_block_length) == (length, length)


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, hf_flashdlm.A2DQwen3Config.from_pretrained])
@pytest.mark.parametrize(
    ("folder", "length"),
    [
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", 32),
        ("Qwen3-0.6B-diffusion-mdlm-v0.1", None),
        ("bd3lm/mdlm", None),
        ("models--dllm-hub--Qwen3-0.6B-diffusion-bd3lm-v0.1/snapshots/0123abcd", 32),
        ("snapshots/BD3LM", 32),
    ],
)
def test_a_bd3lm_is_told_by_its_name(checkpoint, tmp_path, load, folder, length):
    config = load(checkpoint("a2d_qwen3", folder))
    assert config.attention_block_length == length
    config.save_pretrained(tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere").attention_block_length == length, "a saved file says it itself"


def test_a_length_that_is_given_wins():
    path = GOLDENS / FOLDERS["sdar"]
    config = AutoConfig.from_pretrained(path, attention_block_length=8)
    assert (config.block_size, config.attention_block_length) == (8, 8)
    assert hf_flashdlm.SDARConfig(attention_block_length=16).block_size == 16


def test_sdars_file_does_not_choose_the_attention_to_load_with():
    path = GOLDENS / FOLDERS["sdar"]
    assert fields("sdar")["attn_implementation"] == "flex_attention"
    for kind in (AutoModelForCausalLM, hf_flashdlm.SDARForCausalLM):
        assert kind.from_pretrained(path).config._attn_implementation == "sdpa"
        assert kind.from_pretrained(path, attn_implementation="eager").config._attn_implementation == "eager"


def test_llada2s_end_token_is_its_padding(checkpoint):
    assert AutoConfig.from_pretrained(checkpoint("llada2", pad_token_id=5)).eos_token_id == 5
    assert AutoConfig.from_pretrained(checkpoint("llada2", "given", eos_token_id=7)).eos_token_id == 7


def test_experts_tell_llada_moe_from_llada(checkpoint):
    kind = hf_flashdlm.LLaDAConfig
    assert type(kind.from_pretrained(GOLDENS / FOLDERS["llada_moe"])) is hf_flashdlm.LLaDAMoEConfig
    assert type(kind.from_pretrained(GOLDENS.parent / "model_llada")) is kind
    config, unused = AutoConfig.from_pretrained(
        GOLDENS / FOLDERS["llada_moe"], return_unused_kwargs=True, hidden_act="relu", other=1
    )
    assert config.hidden_act == "relu" and unused == {"other": 1}


def test_a_checkpoint_of_llada_is_not_loaded_with_the_class_of_the_other_kind(checkpoint):
    with pytest.raises(ValueError) as error:
        hf_flashdlm.LLaDAModelLM.from_pretrained(GOLDENS / FOLDERS["llada_moe"])
    assert str(error.value) == (
        "`config` must be that of a dense LLaDA, got a LLaDAMoEConfig, which counts experts: load the checkpoint with "
        "`LLaDAMoEModelLM` or `AutoModelForCausalLM`."
    )
    with pytest.raises(ValueError) as error:
        hf_flashdlm.LLaDAMoEModelLM.from_pretrained(GOLDENS.parent / "model_llada")
    assert str(error.value) == (
        "`num_experts` must be given for a LLaDA-MoE, got a config.json without it: load a dense LLaDA with "
        "`LLaDAModelLM` or `AutoModelForCausalLM`."
    )


def test_moe_fields_are_offered_under_the_names_of_transformers():
    config = hf_flashdlm.LLaDAMoEConfig(moe_intermediate_size=24, intermediate_size=48)
    assert (config.expert_intermediate_size, config.dense_intermediate_size) == (24, 48)
    config = hf_flashdlm.LLaDA2MoeConfig(n_routed_experts=64, n_shared_experts=2, attention_bias=True)
    assert (config.num_experts, config.num_shared_experts, config.use_qkv_bias) == (64, 2, True)
    assert hf_flashdlm.SDARMoeConfig(num_experts=16).num_local_experts == 16


def positive(name, value):
    return f"`{name}` must be a positive integer, got {value!r}: give the length that the weights were trained with."


REFUSALS = [
    ("sdar", {"block_size": 0}, positive("block_size", 0)),
    ("fast_dllm_v2", {"bd_size": 0}, positive("bd_size", 0)),
    ("fast_dllm_v2", {"bd_size": -8}, positive("bd_size", -8)),
    ("a2d_qwen3", {"attention_block_length": 0}, positive("attention_block_length", 0)),
    ("llada2", {"block_size": 0}, positive("block_size", 0)),
    ("llada2", {"block_size": None}, positive("block_size", None)),
    ("fast_dllm_v2", {"bd_size": None}, positive("bd_size", None)),
    ("sdar", {"block_size": "4"}, positive("block_size", "4")),
    (
        "sdar",
        {"mask_token_id": "311"},
        "`mask_token_id` must be an id of the vocabulary of 320, got '311': set it to the tokenizer's.",
    ),
    (
        "sdar",
        {"model_type": "sdar_moe", "num_experts": 4, "num_experts_per_tok": 5},
        "`num_experts_per_tok` must be from 1 to `num_experts` (4), got 5: change one of them.",
    ),
    (
        "sdar",
        {"mask_token_id": 320},
        "`mask_token_id` must be an id of the vocabulary of 320, got 320: set it to the tokenizer's.",
    ),
    (
        "a2d_qwen2",
        {"mask_token_id": -1},
        "`mask_token_id` must be an id of the vocabulary of 320, got -1: set it to the tokenizer's.",
    ),
    (
        "sdar",
        {"use_sliding_window": True, "sliding_window": 8},
        "`use_sliding_window` must be False for a diffusion model, got True: load an autoregressive checkpoint with "
        "the class of its architecture.",
    ),
    (
        "a2d_qwen3",
        {"is_causal": True},
        "`is_causal` must be False for a diffusion model, got True: load an autoregressive checkpoint with the class "
        "of its architecture.",
    ),
    (
        "a2d_qwen3",
        {"attention_block_length": 8, "attention_block_origin": "left"},
        "`attention_block_origin` must be 'row' or 'prompt', got 'left'.",
    ),
    (
        "llada2",
        {"score_function": "softmax"},
        f"`score_function` must be 'sigmoid', as in every released checkpoint of `llada2_moe`, got 'softmax': {CODE}",
    ),
    (
        "llada2",
        {"use_bias": True},
        f"`use_bias` must be False, as in every released checkpoint of `llada2_moe`, got True: {CODE}",
    ),
    (
        "llada2",
        {"expert_capacity": 48},
        f"`expert_capacity` must not be given for LLaDA2.0 or LLaDA2.1, got 48: {LLADA22}",
    ),
    (
        "llada2",
        {"delete_token_id": 156930},
        f"`delete_token_id` must not be given for LLaDA2.0 or LLaDA2.1, got 156930: {LLADA22}",
    ),
    (
        "llada2",
        {"n_group": 3},
        "`n_group` must divide `num_experts` (16) into groups of at least two, got 3: change one of them.",
    ),
    (
        "llada2",
        {"n_group": 16},
        "`n_group` must divide `num_experts` (16) into groups of at least two, got 16: change one of them.",
    ),
    ("llada2", {"topk_group": 5}, "`topk_group` must be from 1 to `n_group` (4), got 5: change one of them."),
    (
        "llada2",
        {"num_experts_per_tok": 9},
        "`num_experts_per_tok` must be from 1 to 8, the experts in `topk_group` groups, got 9: change one of them.",
    ),
    (
        "llada2",
        {"num_key_value_heads": 3},
        "`num_key_value_heads` must divide `num_attention_heads` (4), got 3: change one of them.",
    ),
    (
        "llada2",
        {"rotary_dim": 16},
        "`rotary_dim` must be `head_dim` times `partial_rotary_factor`, 8, got 16: leave it out.",
    ),
    (
        "llada_moe",
        {"moe_router_score_function": "sigmoid"},
        "`moe_router_score_function` must be 'softmax', as in every released checkpoint of `llada`, got 'sigmoid': "
        + CODE,
    ),
    (
        "llada_moe",
        {"shared_expert_intermediate_size": 32},
        f"`shared_expert_intermediate_size` must be None, as in every released checkpoint of `llada`, got 32: {CODE}",
    ),
    (
        "llada_moe",
        {"moe_router_enable_expert_bias": True},
        f"`moe_router_enable_expert_bias` must be False, as in every released checkpoint of `llada`, got True: {CODE}",
    ),
    (
        "llada_moe",
        {"partial_rotary_factor": 0.5},
        f"`partial_rotary_factor` must be 1, as in every released checkpoint of `llada`, got 0.5: {CODE}",
    ),
    (
        "llada_moe",
        {"moe_layer_freq": [1, 1]},
        "`moe_layer_freq` must have an entry for each of the 3 layers, got 2: change one of them.",
    ),
    (
        "llada_moe",
        {"num_experts_per_tok": 9},
        "`num_experts_per_tok` must be from 1 to `num_experts` (8), got 9: change one of them.",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSALS, ids=[f"{name}-{one}" for name, one, _ in REFUSALS])
def test_fields_that_contradict_are_refused_before_weights_are_looked_for(checkpoint, name, changes, message):
    path = checkpoint(name, **changes)
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(path)
    assert str(error.value) == message


def test_a_bad_length_given_when_loading_is_refused_before_weights_are_loaded(checkpoint):
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(GOLDENS / FOLDERS["a2d_qwen3"], attention_block_length=0)
    assert str(error.value) == positive("block_length", 0)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        (
            "wedlm",
            "WeDLM reorders tokens under causal attention, which is not supported: load it with its own code, "
            "`trust_remote_code=True`",
        ),
        (
            "llada2_moe_veomni",
            "LLaDA2 in the format of its trainer dFactory, with stacked experts, is not supported: convert it to the "
            "Hub's format with dFactory's script",
        ),
        (
            "dimple",
            "Dimple counts the positions of images in three dimensions, which is not supported: load it with its own "
            "code, in a process that does not import hf_flashdlm",
        ),
    ],
)
def test_known_models_that_cannot_be_decoded_are_refused_by_name(checkpoint, model_type, reason):
    assert REASONS[model_type] == reason
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(checkpoint("sdar", model_type=model_type))
    assert str(error.value) == (f"`model_type` must be one that hf_flashdlm decodes, got {model_type!r}: {reason}.")


@pytest.mark.parametrize("folder", ["LLaDA2.2-flash", "models--inclusionAI--llada2.2-flash/snapshots/0123abcd"])
def test_llada22_is_refused_by_its_name(checkpoint, folder):
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained(checkpoint("llada2", folder))
    assert str(error.value) == f"the checkpoint must be of LLaDA2.0 or LLaDA2.1, got 'llada2.2-flash': {LLADA22}"


REMOTE_CODE = {
    "configuration_own.py": """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "{model_type}"
""",
    "modeling_own.py": """
from transformers import Qwen3ForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
""",
}


@pytest.mark.parametrize("model_type", REASONS)
def test_who_asks_for_the_code_of_the_repository_gets_it(checkpoint, model_type):
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    path = checkpoint("sdar", model_type, model_type=model_type, auto_map=auto_map, attn_implementation="absent")
    for name, code in REMOTE_CODE.items():
        (path / name).write_text(code.format(model_type=model_type))
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert type(config).__name__ == "OwnConfig"
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with pytest.raises(ValueError, match=f"must be one that hf_flashdlm decodes, got '{model_type}': "):
        AutoModelForCausalLM.from_pretrained(path)
