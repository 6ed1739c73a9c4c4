"""A guided row is the same alone and in a batch: under any settings of the guider, window policy and prompts."""

import copy

import pytest
from cases import ENDS, MASK, POLICIES
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashdlm import ARGuider


@pytest.fixture(scope="module")
def pair(tiny):
    """The models in double precision, in which no near tie is decided by the order of a sum."""
    return [copy.deepcopy(tiny(name)).double() for name in ("dream_trained", "guider")]


guiders = st.fixed_dictionaries(
    {
        "accept": st.sampled_from(["top1", "topk", "topk_relative"]),
        "top_k": st.sampled_from([1, 5, 60, 300]),
        "relative_threshold": st.sampled_from([0.0, 0.2, 0.8]),
        "num_drafts": st.sampled_from([1, 3, 8, 32]),
        "combine": st.sampled_from([None, "union", "intersection"]),
        "confidence_threshold": st.sampled_from([0.05, 0.5]),
        "beyond_prefix": st.booleans(),
        "gate": st.sampled_from([None, "auto"]),
        "cost_ratio": st.sampled_from([None, 0.0, 0.3, 2.0]),
    }
)
prompts = st.lists(st.lists(st.integers(70, 500) | st.just(MASK), min_size=1, max_size=8), min_size=2, max_size=4)
policies = st.sampled_from(list(POLICIES.values()))
calls = st.fixed_dictionaries(
    {
        "block_length": st.sampled_from([3, 4, 9]),
        "confidence_threshold": st.sampled_from([0.02, 0.9]),
        "eos_token_id": st.sampled_from([None, ENDS]),
        "max_new_tokens": st.sampled_from([9, 28]),
    }
)


cases = st.tuples(prompts, policies, calls, guiders)


def check(decode, pair, case, **reading):
    """Decode rows together and alone."""
    prompts, policy, call, guidance = case
    judge = ARGuider(pair[1], **guidance)
    for name, value in reading.items():
        setattr(judge, name, value)
    options = policy | call | dict(guider=judge, pad_token_id=0)
    batch, longest = decode(pair[0], prompts, **options), max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        alone = decode(pair[0], [prompt], **options)
        text = alone.sequences[0].tolist()
        in_batch = batch.sequences[row, longest - len(prompt) :].tolist()
        assert in_batch == text + [0] * (len(in_batch) - len(text))
        for field in ("guider_forwards", "drafts_judged", "drafts_accepted", "gate_closed_at"):
            together, by_itself = getattr(batch, field), getattr(alone, field)
            assert together is by_itself or together[row] == by_itself[0]
        assert batch.accepted_lengths[row] == alone.accepted_lengths[0]
        if not judge.beyond_prefix:  # which keeps to the block, so that rows may wait for each other at its end
            assert batch.nfe[row] == alone.nfe[0]


@settings(max_examples=12)
@given(cases)
def test_a_guided_row_is_the_same_alone_and_in_a_batch(decode, pair, case):
    check(decode, pair, case)


@settings(max_examples=4)
@given(cases)
def test_so_is_a_row_that_is_read_as_text(decode, pair, tokenizer, case):
    check(decode, pair, case, reads_text=True, tokenizer=tokenizer, canvas_tokenizer=tokenizer)
