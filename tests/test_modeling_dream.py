"""Dream: bidirectional attention in Qwen2's modules, its shift, and its configuration."""

import pytest
import torch
from golden_models import GOLDENS, canvas, load
from safetensors.torch import load_file

import hf_flashdlm
from hf_flashdlm.configuration_dream import DreamConfig
from hf_flashdlm.modeling_dream import DreamModel


pytestmark = pytest.mark.usefixtures("no_grad")

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


@pytest.fixture
def dream():
    return load("dream")


def tiny(**fields):
    torch.manual_seed(0)
    return DreamModel(DreamConfig(**{**TINY, **fields})).eval()


def test_generate_is_ours():
    order = DreamModel.__mro__
    assert order[1] is hf_flashdlm.FlashDLMGenerationMixin


def test_no_attention_module_is_causal(dream):
    assert [layer.self_attn.is_causal for layer in dream.model.layers] == [False] * 4
    assert dream.config.is_causal is False


def test_hidden_states_and_attentions_can_be_recorded():
    model = tiny()
    model.set_attn_implementation("eager")
    out = model(canvas(), output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in out.hidden_states] == [(2, 12, 32)] * 3
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 12, 12)] * 2


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
