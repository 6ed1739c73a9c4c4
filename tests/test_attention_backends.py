"""Every attention backend gives the tokens of eager attention, or is refused by name."""

import copy
from functools import partial

import pytest
import torch
import transformers.integrations.flex_attention as flex_utils
import transformers.masking_utils
import transformers.modeling_flash_attention_utils as flash_utils
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_flashdlm import diffusion_generate, make_bidirectional
from hf_flashdlm.denoiser import attention_backend


PROMPTS = [[5, 70, 200, 41, 333, 62], [77, 130]]
OPTIONS = dict(max_new_tokens=16, block_length=8, eos_token_id=[3, 258, 132], pad_token_id=0)
POLICIES = [
    dict(),
    dict(right_window=8),
    dict(right_window=5, attend_stale=True),
    dict(grow_canvas=True),
    dict(refresh_blocks=1, freeze_lag=0),
    dict(window_policy="prefix"),
    dict(window_policy="dual"),
    dict(window_policy="dkv", refresh_steps=3),
    dict(window_policy="none"),
    dict(window_policy="none", grow_canvas=True),
    dict(guidance_scale=1.5),
]


def dense(query, key, value, softmax_scale=None, causal=False, **_):
    """What `flash_attn_func` computes."""
    assert not causal
    groups = query.shape[2] // key.shape[2]
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
    return attended.transpose(1, 2)


def packed(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """What `flash_attn_varlen_func` computes: queries that belong to no segment keep what their memory held."""
    output = torch.full_like(query, torch.nan)
    assert cu_seqlens_q[-1] == len(query) and cu_seqlens_k[-1] == len(key)
    for (first, last), (begin, end) in zip(cu_seqlens_q.unfold(0, 2, 1), cu_seqlens_k.unfold(0, 2, 1), strict=True):
        assert 0 <= last - first <= max_seqlen_q and 0 <= end - begin <= max_seqlen_k
        if last > first:
            output[first:last] = dense(
                query[None, first:last], key[None, begin:end], value[None, begin:end], **options
            )[0]
    return output


@pytest.fixture
def flash(monkeypatch):
    """Stands in for the kernels of flash attention; all that is above them is Transformers' own."""

    def settings(softmax_scale=None, is_causal=False, max_seqlen_q=None, max_seqlen_k=None, **_):
        lengths = {} if max_seqlen_q is None else dict(max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
        return dict(softmax_scale=softmax_scale, causal=is_causal) | lengths

    # In older versions the settings come without those of paged attention.
    alone = not hasattr(flash_utils, "_process_with_kvcache_kwargs_fn")
    kernels = (dense, packed, None, flash_utils._pad_input, flash_utils._unpad_input)
    functions = kernels, settings if alone else (settings, None)
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *_, **__: functions)


@pytest.fixture
def model_of(tiny):
    """`model_of("llada", "eager")`: a model of the tests with this attention."""

    def model_of(name, backend):
        return with_attention(copy.deepcopy(tiny(name)), backend)

    return model_of


def with_attention(model, backend):
    model.config._attn_implementation = backend  # `set_attn_implementation` asks for a GPU and the kernels
    return model


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", ["llada", "dream_trained"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["uneven", "alone"])
def test_flash_attention_gives_the_tokens_of_eager(flash, model_of, decode, name, policy, prompts):
    eager, flash = (
        decode(model_of(name, backend), prompts, **OPTIONS, **policy) for backend in ("eager", "flash_attention_2")
    )
    assert flash.sequences.tolist() == eager.sequences.tolist()
    assert flash.nfe.tolist() == eager.nfe.tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("policy", [dict(window_policy="dkv"), dict(right_window=8)], ids=str)
def test_flex_attention_gives_the_tokens_of_eager(model_of, decode, monkeypatch, policy):
    def attend(query, key, value, training=False, **options):
        return flex_attention(query, key, value, **options)

    def block_mask(*args, _compile=None, **options):
        return create_block_mask(*args, **options)

    # Transformers compiles both, which takes minutes.
    monkeypatch.setattr(flex_utils, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(transformers.masking_utils, "create_block_mask", block_mask)
    eager, flex = (
        decode(model_of("llada", backend), PROMPTS, **OPTIONS, **policy) for backend in ("eager", "flex_attention")
    )
    assert flex.sequences.tolist() == eager.sequences.tolist()


def test_a_model_of_another_class_is_decoded_with_flash_attention(flash):
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(**sizes, num_key_value_heads=1, mask_token_id=95, logits_shift=1)
    model = make_bidirectional(Qwen2ForCausalLM(config).eval())
    ids = torch.tensor([[0, 0, 7, 9], [5, 6, 7, 8]])
    call = dict(attention_mask=(ids > 0).long(), max_new_tokens=12, block_length=4, right_window=4, pad_token_id=0)
    eager, flash = (
        diffusion_generate(with_attention(model, backend), ids, **call) for backend in ("eager", "flash_attention_3")
    )
    assert flash.tolist() == eager.tolist()


def test_a_kernel_of_the_hub_that_is_called_as_flash_attention_is_one(flash, model_of, decode, monkeypatch):
    name = "kernels-community/flash-attn2"
    monkeypatch.setitem(AttentionInterface._global_mapping, name, partial(flash_attention_forward))
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
    )
    model = model_of("llada", name)
    assert attention_backend(model) == "flash"
    eager = decode(model_of("llada", "eager"), PROMPTS, **OPTIONS, right_window=8)
    assert decode(model, PROMPTS, **OPTIONS, right_window=8).sequences.tolist() == eager.sequences.tolist()


def test_the_attention_that_counts_is_that_of_the_text(tiny):
    """A model of several parts may be loaded with a dict, one attention for each."""
    model = copy.deepcopy(tiny("dream"))
    text = copy.deepcopy(model.config)
    model.config.get_text_config = lambda **_: text
    text._attn_implementation, model.config._attn_implementation = "sdpa", "eager"
    assert attention_backend(model) == "sdpa"


@pytest.mark.parametrize("name", ["paged|sdpa", "paged|eager", "my_attention", "kernels-community/other"])
def test_any_other_attention_is_refused_by_name(model_of, decode, monkeypatch, name):
    monkeypatch.setitem(AttentionInterface._global_mapping, "my_attention", lambda *_, **__: None)
    with pytest.raises(ValueError) as error:
        decode(model_of("llada", name), PROMPTS, **OPTIONS)
    assert str(error.value) == (
        "`attn_implementation` must be eager, sdpa, flex_attention or a flash attention of Transformers, whose masks "
        f"are known, got {name!r}: call `model.set_attn_implementation('sdpa')`."
    )


def test_flash_attention_needs_a_forward_that_hands_keywords_on(model_of, decode, monkeypatch):
    model = model_of("llada", "flash_attention_2")

    def forward(self, input_ids, attention_mask, position_ids, cache, use_cache, logits_to_keep):
        raise AssertionError

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ValueError) as error:
        decode(model, PROMPTS, **OPTIONS)
    assert str(error.value) == (
        "`attn_implementation` 'flash_attention_2' needs a forward that takes further keywords, which that of "
        "LLaDAModelLM does not: call `model.set_attn_implementation('sdpa')`."
    )
