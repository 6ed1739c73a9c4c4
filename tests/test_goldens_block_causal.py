"""Recorded decodes of the families with block-causal attention, reproduced by settings (tests/goldens/families)."""

from collections import Counter

import pytest
from recorded_decodes import RECORDINGS, expected_rows


POLICIES = ("freecache", "none")


def cases(*names):
    chosen = [(RECORDINGS[name], case) for name in names for case in RECORDINGS[name].cases()]
    return pytest.mark.parametrize(("recording", "case"), chosen, ids=[case["id"] for _, case in chosen])


def in_turn(name):
    """The cases of a recording, each with one of the policies: that these are equal is a law of its own."""
    recording = RECORDINGS[name]
    chosen = [(recording, case, POLICIES[index % 2]) for index, case in enumerate(recording.cases())]
    return pytest.mark.parametrize(("recording", "case", "policy"), chosen, ids=[case["id"] for _, case, _ in chosen])


def kinds(case):
    return Counter(kind for kind, *_ in case["forwards"])


@pytest.mark.parametrize("policy", POLICIES)
@cases("LLaDA2.0")
def test_llada2(policy, recording, case):
    (prompt,) = case["prompt_ids"]
    (row,), output = recording.decode(case, window_policy=policy)
    if case.get("first_eos_in_full_run") is not None:
        assert row[len(prompt) :] == case["returned_ids"][0]
        assert output.nfe.item() <= case["nfe"]  # the original may miss the end of the text
    else:
        assert row == case["canvas_ids"][0]
        assert output.nfe.item() == case["nfe"]


@in_turn("LLaDA2.1")
def test_llada21(recording, case, policy):
    (prompt,) = case["prompt_ids"]
    (row,), output = recording.decode(case, window_policy=policy)
    if case["settings"]["eos_early_stop"]:
        assert row[len(prompt) :] == case["returned_ids"][0]
    else:
        assert row == case["canvas_ids"][0]
    assert output.nfe.item() == case["nfe"]


@pytest.mark.parametrize("policy", POLICIES)
@cases("SDAR")
def test_sdar(policy, recording, case):
    stops = case["settings"].get("stopping_criteria_idx")
    (row,), output = recording.decode(case, window_policy=policy)
    (expected,) = expected_rows(case)
    assert row == expected[: len(row)] and (stops or len(row) == len(expected))
    if stops:
        assert row[-1] in stops
        assert output.nfe.item() <= kinds(case)["denoise"]  # the original looks at whole blocks
    else:
        assert output.nfe.item() == kinds(case)["denoise"]  # nothing is computed to store a block


@pytest.mark.parametrize("policy", POLICIES)
@cases("BD3LM")
def test_bd3lm(policy, recording, case):
    settings = case["settings"]
    rows, output = recording.decode(case, window_policy=policy)
    padded = case["padded_prompt_length"]
    for row, prompt, expected in zip(rows, case["prompt_ids"], case["output_ids"], strict=True):
        expected = expected[padded - len(prompt) :]
        filled = [token for token in expected if token != settings["mask_token_id"]]
        assert row[: len(filled)] == filled and (case.get("notes") or len(filled) == len(row))
    if not case.get("notes") and not settings.get("cfg_scale"):
        assert output.nfe.max().item() == kinds(case)["denoise"]


@cases("Fast-dLLM v2", "Fast-dLLM v2, sub-block cache")
def test_fast_dllm_v2(recording, case):
    rows, output = recording.decode(case)
    for row, given in zip(rows, expected_rows(case), strict=True):
        assert row[: len(given)] == given
    if case["function"] != "batch_sample":
        assert output.nfe.item() <= sum(kinds(case).values())
