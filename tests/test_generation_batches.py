"""A row decodes alone as in a batch, for all parts; `test_laws.py` says what else every decode obeys."""

import pytest
from cases import ENDS, MASK, POLICIES, PROMPT, PROMPTS, RULES, cut, every_model, every_policy, generated


SYNCHRONOUS = ("prefix", "dual", "dkv", "dkv-often", "synchronous")
# Policies and rules in turn, and with another model: each is tested with all policies and all rules. The laws try the
# rest at random.
COMBINATIONS = [
    (("llada", "dream")[(i + j) // 2 % 2], policy, rule)
    for i, policy in enumerate(POLICIES)
    for j, rule in enumerate(RULES)
    if (i + j) % 2 == 0
]


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy", "rule"), COMBINATIONS)
def test_a_row_decodes_alone_as_in_an_uneven_batch(tiny, decode, name, policy, rule):
    options = dict(
        max_new_tokens=11, block_length=4, eos_token_id=ENDS, pad_token_id=0, **POLICIES[policy], **RULES[rule]
    )
    batch = decode(tiny(name), PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(tiny(name), [prompt], **options)
        padding = len(PROMPT) - len(prompt)
        text, in_batch = alone.sequences[0].tolist(), batch.sequences[row, padding:].tolist()
        assert in_batch == text + [0] * (len(in_batch) - len(text)), f"row {row} depends on its neighbours"
        if policy not in SYNCHRONOUS:
            assert batch.nfe[row] == alone.nfe[0]
            # If a forward covers the whole canvas, it computes the padding, too.
            whole = sum(int(forward["position_ids"][0, 0]) == 0 for forward in alone.forwards)
            assert batch.active_tokens[row] == alone.active_tokens[0] + padding * whole


@every_model
@every_policy
def test_rows_that_are_finished_leave_the_batch(tiny, decode, name, policy):
    output = decode(
        tiny(name), PROMPTS, max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, **policy
    )
    rows = [len(forward["input_ids"]) for forward in output.forwards]
    assert rows == [int((output.nfe > step).sum()) for step in range(int(output.nfe.max()))]
    assert rows[-1] < len(PROMPTS), "the case is too easy: all rows finish together"


@every_model
@every_policy
def test_what_stops_at_an_end_is_what_would_have_been_cut_there(tiny, decode, name, policy):
    options = dict(max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, steps=9, **policy)
    stopped = decode(tiny(name), PROMPTS, **options)
    filled = decode(tiny(name), PROMPTS, stop_at_eos=False, **options)
    assert filled.sequences.shape == (3, len(PROMPT) + 14)
    for row in range(len(PROMPTS)):
        text = cut(generated(filled, row))
        in_batch = generated(stopped, row)
        assert in_batch == text + [0] * (len(in_batch) - len(text))
        assert stopped.nfe[row] <= filled.nfe[row]
    assert any(len(cut(generated(filled, row))) < 14 for row in range(3)), "the case is too easy: nothing ended"


# --- exactness -------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        (dict(window_policy="dkv", refresh_steps=1), dict(steps=9)),
        (dict(window_policy="dkv", refresh_steps=1), dict(confidence_threshold=0.6)),
        (dict(window_policy="prefix"), dict(steps=4)),
        (dict(window_policy="dual"), dict(steps=4)),
        (dict(window_policy="prefix"), dict(block_length=1)),
        (dict(window_policy="dual"), dict(block_length=1)),
        (dict(refresh_blocks=1), dict(steps=4)),
        (dict(refresh_blocks=1), dict(block_length=1)),
        (dict(refresh_entropy=0.0), dict(steps=9)),
        (dict(left_margin=1000), dict(confidence_threshold=0.6)),
        (dict(left_margin=1000, grow_canvas=True), dict(steps=9)),
        (dict(left_margin=1000), dict(factor=0.8)),
    ],
)
def test_a_cache_that_is_refreshed_at_every_step_is_none(tiny, decode, name, policy, rule):
    options = dict(max_new_tokens=14, block_length=4, stop_at_eos=False) | rule
    cached = decode(tiny(name), PROMPTS, **options, **policy)
    growing = {name: value for name, value in policy.items() if name == "grow_canvas"}
    synchronous = policy.get("window_policy", "freecache") != "freecache"
    exact = decode(tiny(name), PROMPTS, **options, **growing, window_policy="none", synchronize_blocks=synchronous)
    assert cached.sequences.tolist() == exact.sequences.tolist()
    assert cached.nfe.tolist() == exact.nfe.tolist()
    assert cached.active_tokens.tolist() == exact.active_tokens.tolist()


# --- infilling -------------------------------------------------------------------------------------------------------


HOLES = [[5, MASK, 200, MASK, MASK, 62, 90, 8], [MASK, 130, 402, 256, MASK], [300, 21]]


@every_policy
@pytest.mark.parametrize("rule", [dict(steps=9), dict(steps=9, schedule="timesteps"), dict(factor=0.8), "guider"])
def test_masks_in_the_prompt_are_filled_and_what_is_given_stays(tiny, decode, policy, rule):
    rule = dict(guider=tiny("guider")) if rule == "guider" else rule
    options = dict(max_new_tokens=9, block_length=4, stop_at_eos=False, **policy, **rule)
    output = decode(tiny("dream_trained"), HOLES, **options)
    assert output.sequences.shape == (3, 8 + 9)
    assert not (output.sequences == MASK).any()
    for row, prompt in enumerate(HOLES):
        filled = output.sequences[row, 8 - len(prompt) :].tolist()
        assert [token for token, given in zip(filled, prompt, strict=False) if given != MASK] == [
            given for given in prompt if given != MASK
        ]
        assert float(output.tokens_per_forward[row] * output.nfe[row]) == pytest.approx(9 + prompt.count(MASK))


@every_model
def test_infilled_rows_decode_alone_as_in_a_batch(tiny, decode, name):
    options = dict(max_new_tokens=9, block_length=4, steps=9, stop_at_eos=False)
    batch = decode(tiny(name), HOLES, **options)
    for row, prompt in enumerate(HOLES):
        alone = decode(tiny(name), [prompt], **options)
        assert batch.sequences[row, 8 - len(prompt) :].tolist() == alone.sequences[0].tolist()


@pytest.mark.parametrize("name", ["dream", "dream_trained"])
@pytest.mark.parametrize("refresh_steps", [4, 6])
def test_a_mask_that_begins_a_row_is_scored_alone_as_in_a_batch(tiny, decode, name, refresh_steps):
    # With a shift it is scored by itself: before it is nothing, and no padding in its place.
    options = dict(max_new_tokens=8, block_length=8, steps=8, window_policy="dkv", refresh_steps=refresh_steps)
    for given in ([166, 263], [38, 48, 350], [136, 38]):
        prompts = [[MASK, *given], [253, 58, 157, 285, 152, 364, 66]]
        batch = decode(tiny(name), prompts, stop_at_eos=False, **options)
        alone = decode(tiny(name), prompts[:1], stop_at_eos=False, **options)
        assert batch.sequences[0, 6 - len(given) :].tolist() == alone.sequences[0].tolist()


def test_an_end_in_the_prompt_ends_nothing(tiny, decode):
    output = decode(
        tiny("llada"), [[5, 7, MASK, 9]], max_new_tokens=6, eos_token_id=[5, 7, 9], pad_token_id=0, steps=6
    )
    assert output.sequences.shape == (1, 10)
