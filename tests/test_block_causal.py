"""Block-causal attention: who sees whom, in any decoder of Transformers, with and without a cache."""

import copy
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from hf_flashdlm import FreeCache, make_bidirectional, make_block_causal
from hf_flashdlm.block_causal import block_causal_mask, for_backend
from hf_flashdlm.compiling import CACHE_NAME


TINY = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    initializer_range=0.8,  # so that attention matters
    pad_token_id=None,
)
MOE = dict(num_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1)
KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "mistral": {"sliding_window": None},
    "gpt_neox": {},
    "qwen3_moe": MOE,
    "glm4_moe": MOE,
}


@functools.cache
def built(kind, attention, changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **TINY | KINDS.get(kind, {}) | dict(changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def decoder(kind="qwen3", attention="sdpa", **changes):
    """A model of one's own to change, with the weights that all of its kind have."""
    return copy.deepcopy(built(kind, attention, tuple(changes.items())))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def canvas(batch_size=2, length=11):
    return torch.randint(1, 64, (batch_size, length), generator=torch.Generator().manual_seed(1))


def left_padded(ids, padding):
    """The rows of `ids`, each after its number of padding tokens, which gives all the same length; and their mask."""
    rows = [torch.cat([torch.zeros(count, dtype=torch.long), row]) for row, count in zip(ids, padding, strict=True)]
    mask = torch.ones(len(rows), len(rows[0]), dtype=torch.long)
    for row, count in zip(mask, padding, strict=True):
        row[:count] = 0
    return torch.stack(rows), mask


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def seen(model, ids, **inputs):
    """`(T, T)`: whether a change of the token at a column changes the logits at a row, for a batch of one."""
    before = model(ids, **inputs).logits[0]
    columns = []
    for column in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, column] = (changed[0, column] + 7) % 64
        columns.append((model(changed, **inputs).logits[0] - before).abs().amax(1) > 1e-5)
    return torch.stack(columns, 1)


def blocks(positions, length):
    return positions[:, None] // length >= positions[None] // length


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_decoder_sees_its_block_and_those_before(kind, attention):
    model = make_block_causal(decoder(kind, attention), 4)
    assert torch.equal(seen(model, canvas(1)), blocks(torch.arange(11), 4))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@given(length=st.integers(1, 12), block_length=st.integers(1, 13), origin=st.sampled_from(["row", "prompt"]))
def test_the_mask_is_that_of_the_definition(attention, length, block_length, origin):
    model = make_block_causal(decoder(attention=attention), block_length, origin)
    ids = canvas(2, length)
    positions = torch.arange(length)[None]
    mask = for_backend(block_causal_mask(positions // block_length, positions // block_length), model)
    close(model(ids).logits, model(ids, attention_mask=mask).logits)


def test_a_block_as_long_as_the_canvas_is_bidirectional():
    ids = canvas()
    close(make_block_causal(decoder(), 11)(ids).logits, make_bidirectional(decoder())(ids).logits)


def test_blocks_of_one_are_causal():
    ids = canvas()
    close(make_block_causal(decoder(), 1)(ids).logits, decoder()(ids).logits)


def test_the_bare_decoder_is_block_causal_too():
    model = make_block_causal(decoder(), 4)
    ids = canvas()
    close(model.lm_head(model.model(ids)[0]), model(ids).logits)
    bare = make_block_causal(AutoModel.from_config(model.config).eval(), 4)
    bare.load_state_dict(model.model.state_dict())
    close(bare(ids)[0], model.model(ids)[0])


def test_the_settings_are_read_from_the_config_at_each_forward():
    model, ids = make_block_causal(decoder(), 4), canvas()
    model.config.attention_block_length = 3
    close(model(ids).logits, make_block_causal(decoder(), 3)(ids).logits)
    model.config.attention_block_length = None
    close(model(ids).logits, make_bidirectional(decoder())(ids).logits)


def test_calling_it_again_changes_the_blocks_and_nothing_else():
    model, ids = make_block_causal(make_block_causal(decoder(), 4, "prompt"), 3), canvas()
    assert len(model.model._forward_pre_hooks) == 1
    close(model(ids).logits, make_block_causal(decoder(), 3)(ids).logits)


def test_a_copy_is_block_causal():
    model, ids = make_block_causal(decoder(), 4), canvas()
    close(copy.deepcopy(model)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_of_a_padded_row_begin_at_its_first_token(attention, with_positions):
    model, ids = make_block_causal(decoder(attention=attention), 4), canvas(3)
    padded, mask = left_padded([ids[0], ids[1, :8], ids[2, :6]], [0, 3, 5])
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if with_positions else {}
    logits = model(padded, attention_mask=mask, **positions).logits
    for row, count in zip(range(3), [0, 3, 5], strict=True):
        close(logits[row, count:], model(padded[row : row + 1, count:]).logits[0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_right_changes_nothing(attention):
    model, ids = make_block_causal(decoder(attention=attention), 4), canvas(1)
    mask = torch.tensor([[1] * 6 + [0] * 5])
    close(model(ids, attention_mask=mask).logits[:, :6], model(ids[:, :6]).logits)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_from_the_prompts_end_are_those_of_the_padded_columns(attention, with_positions):
    model = make_block_causal(decoder(attention=attention), 4, origin="prompt")
    padded, mask = left_padded(canvas(1), [5])
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if with_positions else {}
    expected = blocks(torch.arange(16), 4)
    expected[:, :5] = False
    tokens = torch.arange(16) >= 5
    assert torch.equal(seen(model, padded, attention_mask=mask, **positions)[tokens], expected[tokens])


def test_a_row_of_padding_has_finite_logits():
    for attention in ("sdpa", "eager"):
        for origin in ("row", "prompt"):
            model = make_block_causal(decoder(attention=attention), 4, origin)
            padded, mask = left_padded(canvas(2, 4), [0, 0])
            mask[1] = 0
            assert model(padded, attention_mask=mask).logits.isfinite().all()


def test_a_mask_of_four_dimensions_is_used_as_it_is():
    ids = canvas(1)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
    close(make_block_causal(decoder(), 4)(ids, attention_mask=causal).logits, decoder()(ids).logits)


def test_a_caller_that_says_so_sees_every_key():
    ids = canvas()
    model = make_block_causal(decoder(), 4)
    close(model(ids, is_causal=False).logits, make_bidirectional(decoder())(ids).logits)


def test_embeddings_and_positional_arguments_are_as_good():
    model, ids = make_block_causal(decoder(), 4), canvas()
    close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
    padded, mask = left_padded(ids, [2, 2])
    close(model(padded, mask).logits, model(padded, attention_mask=mask).logits)
    close(model.model(padded, mask)[0], model.model(padded, attention_mask=mask)[0])


def masks_of(model):
    """What the decoder's layers are given as a mask, forward by forward."""
    masks = []
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    return masks


def test_no_mask_is_made_where_every_key_is_seen():
    model, ids = make_block_causal(decoder(), 4), canvas()
    masks = masks_of(model)
    cache = DynamicCache(config=model.config)
    model(ids[:, :4], **{CACHE_NAME: cache})
    model(ids[:, 4:8], position_ids=torch.arange(4, 8)[None], **{CACHE_NAME: cache})
    model(ids[:, 8:], **{CACHE_NAME: cache})
    assert masks == [None] * 3
    model(ids)
    assert masks[3].shape == (2, 1, 11, 11)


@pytest.mark.parametrize("padding", [[0, 0], [0, 3]])
@pytest.mark.parametrize("origin", ["row", "prompt"])
def test_block_after_block_with_a_cache_is_the_whole_forward(origin, padding):
    """A finished block never changes its states: keeping them is exact."""
    model = make_block_causal(decoder(), 4, origin)
    ids, mask = left_padded([canvas()[0], canvas()[1, : 11 - max(padding)]], padding)
    whole = model(ids, attention_mask=mask).logits
    tokens = mask.bool()
    bounds = [0, 4, 8, 11] if padding == [0, 0] or origin == "prompt" else [0, 11]
    caches = [DynamicCache(config=model.config)]
    if padding == [0, 0]:
        caches.append(StaticCache(config=model.config, max_cache_len=16))
    for cache in caches:
        parts = [
            model(ids[:, lo:hi], attention_mask=mask[:, :hi], **{CACHE_NAME: cache}).logits
            for lo, hi in zip(bounds, bounds[1:], strict=False)
        ]
        close(torch.cat(parts, 1)[tokens], whole[tokens])


@given(
    block_length=st.integers(1, 6),
    padding=st.integers(0, 5),
    origin=st.sampled_from(["row", "prompt"]),
    cut=st.integers(0, 12),
    scattered=st.booleans(),
)
def test_a_window_over_frozen_blocks_is_the_whole_forward(block_length, padding, origin, cut, scattered):
    model = make_block_causal(decoder(), block_length, origin)
    ids, mask = left_padded([canvas(1, 12)[0], canvas(2, 12)[1, : 12 - padding]], [0, padding])
    # Where each row's block begins that holds the column `cut`: what lies before it never sees the rest.
    origins = [0, padding if origin == "row" else 0]
    lows = [max((min(cut, 11) - start) // block_length * block_length + start, 0) for start in origins]
    cache = FreeCache()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
    changed = torch.where(torch.arange(12) >= torch.tensor(lows)[:, None], (ids + 5) % 64, ids)
    lo = min(lows)
    if scattered:
        feed = torch.arange(lo, 12).expand(2, -1).flip(1)
        cache.scatter(feed)
    else:
        feed = torch.arange(lo, 12).expand(2, -1)
        cache.window(lo, 12)
    logits = model(
        changed.gather(1, feed), attention_mask=mask, position_ids=positions.gather(1, feed), **{CACHE_NAME: cache}
    ).logits
    whole = model(changed, attention_mask=mask, position_ids=positions).logits
    fed = mask.gather(1, feed).bool()
    close(logits[fed], whole.gather(1, feed[..., None].expand(-1, -1, 64))[fed])


def test_a_compiled_forward_is_the_same():
    model = make_block_causal(decoder(), 4)
    padded, mask = left_padded(canvas(), [2, 2])
    compiled = torch.compile(model, backend="eager")
    close(compiled(padded, attention_mask=mask).logits, model(padded, attention_mask=mask).logits)


def test_half_precision_masks_in_its_own_type():
    model, ids = make_block_causal(decoder(attention="eager").bfloat16(), 4), canvas(1)
    assert torch.equal(seen(model, ids), blocks(torch.arange(11), 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_length": 0},
            "`block_length` must be a positive integer, got 0: give the length that the weights were trained with.",
        ),
        (
            {"block_length": 2.5},
            "`block_length` must be a positive integer, got 2.5: give the length that the weights were trained with.",
        ),
        (
            {"block_length": True},
            "`block_length` must be a positive integer, got True: give the length that the weights were trained with.",
        ),
        ({"origin": "end"}, "`origin` must be 'row' or 'prompt', got 'end'."),
    ],
)
def test_bad_settings_are_refused_and_leave_the_model(changes, message):
    model, ids = decoder(), canvas()
    with pytest.raises(ValueError) as error:
        make_block_causal(model, **{"block_length": 4, **changes})
    assert str(error.value) == message
    close(model(ids).logits, decoder()(ids).logits)


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "Qwen2ForCausalLM"),
        ("mistral", {"sliding_window": 4}, "MistralForCausalLM"),
    ],
)
def test_layers_that_see_a_part_are_refused(kind, changes, name):
    with pytest.raises(ValueError) as error:
        make_block_causal(decoder(kind, **changes), 4)
    assert str(error.value) == (
        f"`model` must attend to the whole context in every layer, got {name} with sliding_attention: block-causal "
        "attention needs full attention."
    )


def test_attention_that_takes_no_such_mask_is_refused():
    model = make_block_causal(decoder(), 4)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError) as error:
        model(canvas())
    assert str(error.value) == (
        "`attn_implementation` must be 'sdpa' or 'eager' for block-causal attention, got 'flex_attention': load the "
        "model with one of them."
    )
