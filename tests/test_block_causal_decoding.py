"""Decodes of models with block-causal attention: exact caches, rows of a batch, editing, guiders, refusals."""

import functools
import re

import pytest
import torch
from cases import CHARACTERS, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_decodes import GOLDENS
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_flashdlm import ARGuider, diffusion_generate, make_bidirectional, make_block_causal


MASKS = {"block_ar/model_sdar": 311, "block_ar/model_fast_dllm_v2": 311, "llada2/model_llada21": 351}
PROMPTS = [[5, 70, 33], [9, 8, 7, 6, 200, 41, 3], [17], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]


@functools.cache
def golden(name):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / name).eval()


@pytest.fixture(scope="session")
def family():
    """`family(name, block_length, origin)`: a model of tests/goldens/families whose attention has such blocks."""

    def family(name, block_length=4, origin="row"):
        return make_block_causal(golden(name), block_length, origin)

    yield family
    golden.cache_clear()


def texts(output, prompts):
    longest = max(map(len, prompts))
    return [row[longest - len(prompt) :] for row, prompt in zip(output.sequences.tolist(), prompts, strict=True)]


part = settings(max_examples=settings.default.max_examples // 3)  # of the profile, see `test_laws.py`
models = st.sampled_from(sorted(MASKS))
rules = st.one_of(
    st.fixed_dictionaries({"confidence_threshold": st.sampled_from([0.3, 0.7, 0.95])}),
    st.fixed_dictionaries({"steps_per_block": st.integers(1, 5)}),
    st.fixed_dictionaries({"steps_per_block": st.integers(1, 5), "confidence_threshold": st.just(0.6)}),
    st.fixed_dictionaries({"schedule": st.sampled_from(["linear", "uniform"])}),
    st.fixed_dictionaries({"confidence_threshold": st.just(0.5), "first_token_alone": st.just(True)}),
    st.fixed_dictionaries(
        {
            "confidence_threshold": st.just(0.5),
            "editing_threshold": st.sampled_from([0.0, 0.4, 0.9]),
            "max_post_steps": st.integers(0, 3),
        }
    ),
)
caches = st.fixed_dictionaries(
    {},
    optional={
        "freeze_lag": st.integers(1, 3),
        "left_margin": st.integers(0, 5),
        "refresh_blocks": st.integers(1, 2),
        "refresh_entropy": st.sampled_from([0.5, 2.0]),
        "grow_canvas": st.booleans(),
    },
)
calls = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 14),
        "block_length": st.none() | st.integers(1, 9),
        "stop_at_eos": st.booleans(),
        "eos_token_id": st.lists(st.integers(0, 300), min_size=30, max_size=30),
    }
)


@part
@given(
    name=models,
    length=st.integers(1, 6),
    origin=st.sampled_from(["row", "prompt"]),
    rule=rules,
    cache=caches,
    call=calls,
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=3),
)
def test_a_cached_decode_equals_one_without_a_cache(  # noqa: PLR0913, what a decode depends on
    family, decode, name, length, origin, rule, cache, call, prompts
):
    model = family(name, length, origin)
    options = {"mask_token_id": MASKS[name], "pad_token_id": 0, "confidence_threshold": None} | rule | call
    exact = decode(model, prompts, **options, window_policy="none")
    longest = max(length, call["block_length"] or 1)
    wide = {"freeze_length": 2 * length, "right_window": longest + 1} if len(prompts) > 1 else {}
    cached = decode(model, prompts, **options, **cache, **wide)
    assert cached.sequences.tolist() == exact.sequences.tolist()
    assert cached.nfe.tolist() == exact.nfe.tolist()
    if not cache.keys() - {"grow_canvas"}:
        assert (cached.active_tokens <= exact.active_tokens).all()


@part
@given(
    name=models,
    length=st.integers(1, 6),
    rule=rules,
    call=calls,
    policy=st.sampled_from(["freecache", "none", "dual"]),
)
def test_a_row_decodes_alone_as_in_an_uneven_batch(family, decode, name, length, rule, call, policy):
    if policy == "dual":
        call = call | {"block_length": length}
    options = {"mask_token_id": MASKS[name], "pad_token_id": 0, "confidence_threshold": None} | rule | call
    model = family(name, length)
    batch = decode(model, PROMPTS, **options, window_policy=policy)
    for index, (text, prompt) in enumerate(zip(texts(batch, PROMPTS), PROMPTS, strict=True)):
        alone = decode(model, [prompt], **options, window_policy=policy)
        (expected,) = texts(alone, [prompt])
        assert text == expected + [0] * (len(text) - len(expected))
        assert batch.nfe[index] == alone.nfe[0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_decoder_of_transformers_decodes(left_padded, kind, attention):
    torch.manual_seed(0)
    tiny = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model(kind, **tiny, num_key_value_heads=2, initializer_range=0.8, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    make_block_causal(model, 4)
    ids, mask = left_padded([[5, 7, 33], [9, 8, 7, 6, 20, 41, 3]])
    options = dict(attention_mask=mask, max_new_tokens=9, mask_token_id=63, eos_token_id=62, pad_token_id=0)
    cached = diffusion_generate(model, ids, **options)
    assert torch.equal(cached, diffusion_generate(model, ids, **options, window_policy="none"))
    assert model(ids).logits.shape == (2, 7, 64), "the model is as it was"


def test_a_finished_block_is_frozen_by_the_first_forward_of_the_next(family, decode):
    model = family("block_ar/model_sdar", 4)
    options = dict(mask_token_id=311, stop_at_eos=False, schedule="uniform")
    output = decode(model, [PROMPTS[0]], max_new_tokens=9, **options)
    shapes = [tuple(forward["input_ids"].shape) for forward in output.forwards]
    # The prompt of three and one mask; then each block with the finished one before it, then by itself.
    assert shapes == [(1, 4), (1, 8), (1, 4), (1, 4), (1, 4), (1, 8), (1, 4), (1, 4), (1, 4)]
    assert output.active_tokens.item() == sum(length for _, length in shapes)


def test_no_mask_is_made_where_every_key_is_seen(family, decode):
    model = family("block_ar/model_sdar", 4)
    output = decode(model, [PROMPTS[0]], max_new_tokens=9, mask_token_id=311, stop_at_eos=False, schedule="uniform")
    masks = [forward["attention_mask"] for forward in output.forwards]
    assert [mask is None for mask in masks] == [forward["input_ids"].shape[1] == 4 for forward in output.forwards]
    assert all(mask.dtype == torch.bool and mask.ndim == 4 for mask in masks if mask is not None)


def test_a_canvas_is_filled_to_the_end_of_its_last_block_and_cut(family, decode):
    model, options = family("block_ar/model_sdar", 8), dict(mask_token_id=311, stop_at_eos=False)
    short = decode(model, PROMPTS, max_new_tokens=3, **options).sequences
    assert short.shape[1] == len(PROMPTS[-1]) + 3
    longer = decode(model, PROMPTS, max_new_tokens=8, **options).sequences
    assert torch.equal(short, longer[:, : short.shape[1]])


# Token editing


def edited(family, decode, **options):
    model = family("llada2/model_llada21", 8)
    given = dict(max_new_tokens=24, mask_token_id=351, stop_at_eos=False, confidence_threshold=0.6)
    return decode(model, [PROMPTS[1]], **given | options)


def test_what_may_be_edited_is_neither_streamed_nor_final(family, decode):
    parts = []

    class Parts:
        def put(self, ids):
            parts.append(ids.flatten().tolist())

        def end(self):
            pass

    output = edited(family, decode, editing_threshold=0.4, streamer=Parts())
    prompt, *blocks = parts
    assert [token for block in blocks for token in block] == output.sequences[0, len(prompt) :].tolist()
    assert [len(block) for block in blocks if block] == [1, 8, 8, 7], "block by block"


def test_an_end_token_counts_when_its_block_is_finished(family, decode):
    text = edited(family, decode, editing_threshold=0.4).sequences[0].tolist()
    for end in text[len(PROMPTS[1]) :: 5]:
        output = edited(family, decode, editing_threshold=0.4, stop_at_eos=True, eos_token_id=end)
        assert output.sequences[0].tolist() == text[: text.index(end, len(PROMPTS[1])) + 1]


def test_without_post_steps_only_steps_that_fill_masks_edit(family, decode):
    plain = edited(family, decode)
    assert edited(family, decode, editing_threshold=1.0, max_post_steps=0).nfe.tolist() == plain.nfe.tolist()
    # The step that finds nothing to edit is the price of looking, once in each of the four blocks.
    assert edited(family, decode, editing_threshold=1.0).nfe.tolist() == [plain.nfe.item() + 4]


# Guiders


@pytest.fixture(scope="session")
def guider():
    torch.manual_seed(1)
    fields = TINY | dict(vocab_size=320, initializer_range=0.5, pad_token_id=None)
    config = AutoConfig.for_model("qwen3", **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["block_ar/model_sdar", "block_ar/model_fast_dllm_v2"])
@pytest.mark.parametrize("policy", ["freecache", "none", "dual"])
def test_a_guided_row_decodes_alone_as_in_an_uneven_batch(family, decode, guider, name, policy):
    model = family(name, 4)
    options = dict(max_new_tokens=11, mask_token_id=311, pad_token_id=0, stop_at_eos=False, window_policy=policy)
    options["block_length"] = 4
    options["guider"] = ARGuider(guider, "topk", top_k=40)
    batch = decode(model, PROMPTS, **options)
    assert batch.drafts_judged.sum() > 0
    for text, prompt in zip(texts(batch, PROMPTS), PROMPTS, strict=True):
        assert [text] == texts(decode(model, [prompt], **options), [prompt])


def test_a_guider_with_another_vocabulary_reads_text(family, decode, tiny, tokenizer):
    """As LLaDA2 has no autoregressive model of its own vocabulary."""
    model, words = family("llada2/model_llada2", 4), WordLevel({one: i for i, one in enumerate(CHARACTERS[:320])})
    words.unk_token = CHARACTERS[0]
    backend = Tokenizer(words)
    backend.pre_tokenizer, backend.decoder = tokenizer.backend_tokenizer.pre_tokenizer, Fuse()
    canvas_tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=CHARACTERS[311])
    options = dict(max_new_tokens=11, mask_token_id=311, pad_token_id=0, stop_at_eos=False)
    options["guider"] = ARGuider(
        tiny("guider"), "topk", top_k=60, tokenizer=tokenizer, canvas_tokenizer=canvas_tokenizer
    )
    batch = decode(model, PROMPTS, **options)
    assert 0 < batch.drafts_accepted.sum() < batch.drafts_judged.sum()
    for row, (text, prompt) in enumerate(zip(texts(batch, PROMPTS), PROMPTS, strict=True)):
        alone = decode(model, [prompt], **options)
        assert [text] == texts(alone, [prompt]) and batch.accepted_lengths[row] == alone.accepted_lengths[0]


def test_a_guider_wins_over_the_recommended_choice_of_tokens(family, guider):
    model = family("llada2/model_llada21", 4)
    assert model.config.recommended_method == "llada2"
    model.config.recommended_method = "llada2.1"
    try:
        options = dict(mask_token_id=351, max_new_tokens=6, stop_at_eos=False)
        ids = torch.tensor([PROMPTS[0]])
        guided = model.generate(ids, guider=Nothing(), **options)
        assert torch.equal(guided, model.generate(ids, editing_threshold=None, confidence_threshold=0.9, **options))
        with pytest.raises(ValueError, match="^`editing_threshold` rewrites tokens that a `guider` has accepted, got"):
            model.generate(ids, guider=Nothing(), editing_threshold=0.5, **options)
    finally:
        model.config.recommended_method = "llada2"


class Nothing:
    """A guide that changes nothing."""

    lookahead = None

    def reset(self, *args):
        pass

    def __call__(self, canvas, scores, **kwargs):
        return scores

    def batch_select_indices(self, indices):
        pass

    def statistics(self, seconds):
        return {}


# Recommendations and refusals


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("block_ar/model_sdar", "sdar"),
        ("block_ar/model_fast_dllm_v2", "fast-dllm-v2"),
        ("llada2/model_llada2", "llada2"),
    ],
)
def test_a_family_decodes_as_its_authors_recommend(decode, name, method):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name)
    options = dict(max_new_tokens=12, mask_token_id=311, stop_at_eos=False)
    recommended = decode(model, PROMPTS[:2], **options)
    named = decode(model, PROMPTS[:2], **options, method=method)
    assert recommended.sequences.tolist() == named.sequences.tolist()
    assert recommended.nfe.tolist() == named.nfe.tolist()
    # A choice of the caller's replaces the recommended one, and is not a contradiction of it.
    assert decode(model, PROMPTS[:2], **options, steps_per_block=1).nfe.max() <= 12


@pytest.mark.parametrize("name", ["block_ar/model_sdar", "block_ar/model_fast_dllm_v2", "llada2/model_llada2"])
def test_the_windows_of_a_named_method_yield_to_the_blocks_of_attention(decode, name):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name)
    options = dict(max_new_tokens=40, mask_token_id=311, stop_at_eos=False, confidence_threshold=0.02, guider=None)
    fast = decode(model, PROMPTS[:2], **options, method="flashdlm-fast")
    plain = decode(model, PROMPTS[:2], **options, method="fast-dllm", block_length=32)
    assert fast.sequences.tolist() == plain.sequences.tolist() and fast.nfe.tolist() == plain.nfe.tolist()
    assert fast.active_tokens.max() < plain.active_tokens.max()
    with pytest.raises(ValueError, match="`right_window` must hold the 32 positions of a block"):
        decode(model, PROMPTS[:2], **options, method="flashdlm-fast", right_window=11)


def test_a_model_made_bidirectional_again_has_no_attention_blocks():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "block_ar/model_sdar").eval()
    ids = torch.tensor([PROMPTS[1]])
    make_bidirectional(model)
    whole = model(ids).logits
    changed = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    assert (model(changed).logits[0, 0] - whole[0, 0]).abs().max() > 1e-3, "the first position sees the last"
    output = model.generate(ids, max_new_tokens=5, block_length=5, mask_token_id=311, stop_at_eos=False)
    assert output.shape == (1, 12)


WHERE = "for a SDARForCausalLM, whose attention is block-causal"
REFUSED = {
    "prefix": (
        {"window_policy": "prefix"},
        f"`window_policy` must be 'freecache', 'dual' or 'none' {WHERE}, got 'prefix': 'freecache' is exact there.",
    ),
    "dkv": (
        {"window_policy": "dkv"},
        f"`window_policy` must be 'freecache', 'dual' or 'none' {WHERE}, got 'dkv': 'freecache' is exact there.",
    ),
    "lag": ({"freeze_lag": 0}, f"`freeze_lag` would make states inexact that are exact {WHERE}, got 0: drop it."),
    "stale": (
        {"attend_stale": True, "right_window": 8},
        f"`attend_stale` would make states inexact that are exact {WHERE}, got True: drop it.",
    ),
    "freeze": (
        {"freeze_length": 6},
        f"`freeze_length` must be a multiple of the 4 positions of an attention block {WHERE}, got 6: drop it.",
    ),
    "window": (
        {"right_window": 3},
        f"`right_window` must hold the 4 positions of a block {WHERE}, got 3: drop it.",
    ),
    "dual": (
        {"window_policy": "dual", "block_length": 3},
        "`block_length` must divide the 4 positions of an attention block with window_policy='dual', got 3.",
    ),
    "steps": (
        {"steps": 8, "confidence_threshold": None},
        f"`steps` spreads steps over blocks that begin at the end of the prompt, got 8 {WHERE}, counted from the "
        "start of a row: pass `steps_per_block`.",
    ),
    "timesteps": (
        {"schedule": "timesteps"},
        "`schedule` spreads steps over blocks that begin at the end of the prompt, got 'timesteps' "
        f"{WHERE}, counted from the start of a row: pass `steps_per_block`.",
    ),
    "negative": (
        {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[1, 2]])},
        f"`negative_prompt_ids` must be as long as the prompt of their row {WHERE}, so that blocks coincide: pass "
        "others, or none.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(family, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        family("block_ar/model_sdar").generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=8, mask_token_id=311, **options
        )


def test_guidance_without_a_negative_prompt_works(family, decode):
    options = dict(max_new_tokens=9, mask_token_id=311, pad_token_id=0, stop_at_eos=False, guidance_scale=1.5)
    model = family("block_ar/model_sdar")
    cached, exact = (decode(model, PROMPTS, **options, window_policy=policy) for policy in ("freecache", "none"))
    assert cached.sequences.tolist() == exact.sequences.tolist()


def test_the_first_token_alone_needs_attention_blocks(tiny):
    message = (
        "`first_token_alone` belongs to models with block-causal attention, got a LLaDAModelLM, which attends to "
    )
    with pytest.raises(ValueError, match=f"^{message}the whole canvas: drop it\\.$"):
        tiny("llada").generate(torch.tensor([[5, 6]]), max_new_tokens=4, first_token_alone=True)


def test_other_attention_is_refused_by_name():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "block_ar/model_sdar", attn_implementation="flex_attention")
    with pytest.raises(
        ValueError, match="^`attn_implementation` must be 'sdpa' or 'eager' for block-causal attention"
    ):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, mask_token_id=311)
