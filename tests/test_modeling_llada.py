"""LLaDA: what Transformers expects of a model, and the fields and switches of its configuration."""

import pytest
import torch
from golden_models import GOLDENS, canvas, load
from safetensors.torch import load_file

from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.configuration_llada import IMPLEMENTED_SWITCHES, LLaDAConfig
from hf_flashdlm.modeling_llada import LLaDAModel, LLaDAModelLM


pytestmark = pytest.mark.usefixtures("no_grad")

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


@pytest.fixture
def llada():
    return load("llada")


def tiny(**fields):
    torch.manual_seed(0)
    return LLaDAModelLM(LLaDAConfig(**{**TINY, **fields})).eval()


def test_is_causal_cannot_be_asked_for(llada):
    torch.testing.assert_close(llada(canvas(), is_causal=True).logits, llada(canvas()).logits)


def test_position_ids_default_to_counting_from_zero(llada):
    ids = canvas()
    torch.testing.assert_close(llada(ids, position_ids=torch.arange(12)[None]).logits, llada(ids).logits)
    stretched = llada(ids, position_ids=2 * torch.arange(12)[None]).logits
    assert not torch.allclose(stretched, llada(ids).logits, atol=0.1)


def test_a_cache_is_only_made_on_request(llada):
    assert getattr(llada(canvas()), CACHE_NAME) is None
    assert llada(canvas(), use_cache=True)[CACHE_NAME].get_seq_length() == 12


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
