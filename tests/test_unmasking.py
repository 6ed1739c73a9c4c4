"""Unmasking: what is drafted, how confident, and which drafts are written."""

from math import inf, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_flashdlm.unmasking import (
    ConfidenceFactor,
    ConfidenceThreshold,
    Drafter,
    Drafts,
    EntropyBound,
    EntropyBudget,
    FrechetProfile,
    MostConfident,
    TokenEditing,
    draft,
    margin,
    negative_entropy,
)


MASK = 3


def scores_of(*distributions):
    """Scores (1, N, V) of the distributions."""
    return torch.tensor([distributions]).log()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Drafts


def test_the_most_likely_token_is_drafted_with_its_probability():
    token_ids, probability = draft(scores_of([0.5, 0.25, 0.125, 0.125], [0.25, 0.0, 0.75, 0.0]), MASK)
    assert token_ids.tolist() == [[0, 2]]
    assert probability.tolist() == [[pytest.approx(0.5), pytest.approx(0.75)]]


def test_the_mask_token_is_never_drafted_but_takes_its_share_of_the_probability():
    token_ids, probability = draft(scores_of([0.25, 0.125, 0.125, 0.5]), MASK)
    assert token_ids.tolist() == [[0]] and probability.tolist() == [[pytest.approx(0.25)]]


def test_among_equals_the_first_token_is_drafted():
    assert draft(torch.zeros(1, 2, 4), MASK)[0].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("scores", "probability"),
    [
        ([-inf, -inf, -inf, 0.0], -inf),  # refused: only the mask token is left
        ([-inf, -inf, -inf, -inf], -inf),  # nothing is left
        ([-inf, 2.0, -inf, -inf], 1),
        ([-inf, 0.0, -inf, 0.0], 0.5),
    ],
)
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_infinite_scores_give_certain_answers(scores, probability, temperature):
    assert draft(torch.tensor([[scores]]), MASK, temperature, seeded())[1].item() == probability


def test_probabilities_are_those_of_a_softmax_in_double_precision():
    scores = 10 * torch.randn(4, 50, 20, generator=seeded())
    token_ids, probability = draft(scores, MASK)
    expected = scores.double().softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)
    torch.testing.assert_close(probability, expected, atol=0, rtol=1e-6)
    assert probability.dtype == torch.float64


def test_probabilities_near_one_keep_their_order():
    scores = torch.stack([torch.tensor([best, 0.0, 0.0, -inf]) for best in (20.0, 22.0, 21.0, 30.0)])[None]
    assert scores.softmax(-1)[0, 1, 0] == scores.softmax(-1)[0, 3, 0] == 1, "in single precision they are all 1"
    assert draft(scores, MASK)[1].argsort().tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_drawn_token_has_its_probability_at_temperature_one(temperature):
    scores = scores_of([0.5, 0.25, 0.125, 0.125])
    token_ids, probability = draft(scores / temperature, MASK, temperature, seeded())
    assert probability.item() == pytest.approx([0.5, 0.25, 0.125][token_ids.item()])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_from_the_scores_without_the_mask_token(temperature):
    weights = torch.tensor([0.4, 0.2, 0.1])  # 4 : 2 : 1 at temperature 1, 16 : 4 : 1 at 0.5
    scores = scores_of([0.4, 0.2, 0.1, 0.3]).expand(1, 10_000, 4) / temperature
    token_ids, _ = draft(scores, MASK, temperature, seeded())
    counts = torch.bincount(token_ids.flatten(), minlength=4)
    expected = 10_000 * (weights ** (1 / temperature) / (weights ** (1 / temperature)).sum())
    assert counts[MASK] == 0
    chi_square = ((counts[:3] - expected) ** 2 / expected).sum()
    assert chi_square < 13.8, "with two degrees of freedom, one fair draw in a thousand lies above"


def test_the_same_seed_draws_the_same_tokens():
    scores = torch.zeros(1, 50, 10)
    first, again, other = (draft(scores, MASK, 1.0, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_drafting_leaves_the_scores_alone():
    scores = scores_of([0.25, 0.125, 0.125, 0.5])
    before = scores.clone()
    draft(scores, MASK)
    assert torch.equal(scores, before)


# Confidence


def test_measures_of_confidence_by_hand():
    scores = scores_of([0.5, 0.25, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0])
    assert margin(scores)[0].tolist() == pytest.approx([0.25, 1])
    assert negative_entropy(scores)[0].tolist() == pytest.approx([-1.5 * log(2), 0])


@pytest.mark.parametrize(
    ("confidence", "expected"), [("probability", 0.5), ("margin", 0.25), ("entropy", -1.5 * log(2))]
)
@pytest.mark.parametrize("temperature", [None, 0.5, 2.0])
def test_the_confidence_is_that_of_temperature_one(confidence, expected, temperature):
    scores = scores_of([0.5, 0.25, 0.25, 0.0]) / (temperature or 1)
    drafter = Drafter(MASK, confidence, temperature=temperature, generator=seeded(1))
    token_ids, measured = drafter(scores)
    assert token_ids.item() == 0, "the seed must draw the most likely tokens for these numbers"
    assert measured.item() == pytest.approx(expected)


@pytest.mark.parametrize("confidence", ["probability", "margin", "entropy", "random"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_refused_position_has_no_confidence(confidence, noise):
    scores = torch.tensor([[[-inf, -inf, -inf, 5.0], [1.0, 0.0, 0.0, 0.0]]])
    measured = Drafter(MASK, confidence, position_temperature=noise, generator=seeded())(scores)[1]
    assert measured[0, 0] == -inf and measured[0, 1].isfinite()


def test_random_confidence_comes_from_the_seed_and_not_from_the_scores():
    one, two = (Drafter(MASK, "random", generator=seeded(seed))(torch.zeros(1, 8, 4))[1] for seed in (1, 2))
    again = Drafter(MASK, "random", generator=seeded(1))(torch.randn(1, 8, 4))[1]
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert ((one >= 0) & (one < 1)).all()


def test_noise_on_the_positions_grows_with_its_temperature():
    """The first position is e times as likely as the second at temperature 1, and much more at 0.1."""
    scores = torch.tensor([[[4.0, 0.0, 0.0, -inf], [0.0, 0.0, 0.0, -inf]]])
    gap = float(draft(scores, MASK)[1].diff().abs())
    wins = {}
    for temperature in (gap, gap / 10):
        drafter = Drafter(MASK, position_temperature=temperature, generator=seeded())
        wins[temperature] = sum(int(drafter(scores)[1].argmax()) == 0 for _ in range(1000)) / 1000
    assert wins[gap] == pytest.approx(0.731, abs=0.05) and wins[gap / 10] > 0.99


# Rules


@pytest.mark.parametrize(
    ("rule", "confidence", "count"),
    [
        (ConfidenceThreshold(0.9), [0.95, 0.9, 0.89], 2),
        (ConfidenceThreshold(0.9), [0.5, 0.4, 0.3], 0),
        (ConfidenceFactor(1.0), [0.1, 0.1], 1),  # one token is always written
        (ConfidenceFactor(1.0), [0.1, 0.75, 0.74], 2),  # 3 x 0.25 <= 1, 4 x 0.26 > 1
        (ConfidenceFactor(1.0), [0.9, 0.6, 0.9], 1),  # 3 x 0.4 > 1: later candidates do not count
        (ConfidenceFactor(1.0), [0.9, 0.9, 0.9, 0.9], 4),
        (FrechetProfile(0.5), [0.9, 0.9, 0.9], 3),  # 0.8, 0.7, 0.6
        (FrechetProfile(0.65), [0.9, 0.9, 0.9], 2),
        (FrechetProfile(0.9), [0.9], 0),  # 0.9 - 0 - 0.1
        (EntropyBound(1.0), [-0.5, -0.5, -0.6], 3),  # the largest is left out: 0, 0.5, 1.0
        (EntropyBound(1.0), [-0.6, -0.6, -0.7], 2),  # 0, 0.6, 1.2
        (EntropyBound(0.0), [-2.0, -2.0], 1),
        (EntropyBudget(1.5), [-0.5, -0.5, -0.5], 2),  # 0.5, 1.0, and 1.5 is not below the budget
        (EntropyBudget(1.5), [-0.5, -0.6, -0.6], 2),  # 0.5, 1.1, 1.7
        (EntropyBudget(0.5), [-2.0, -2.0], 0),
    ],
)
def test_a_rule_by_hand(rule, confidence, count):
    assert rule.count(confidence) == count


def factor_count(confidence, factor):
    fits = [
        n
        for n in range(1, len(confidence) + 1)
        if all((i + 1) * (1 - confidence[i - 1]) <= factor for i in range(2, n + 1))
    ]
    return max(fits, default=0)


def frechet_count(confidence, delta):
    count = 0
    while count < len(confidence):
        n = count + 1
        if not sum(confidence[:n]) - (n - 1) - (1 - confidence[n - 1]) > delta:
            break
        count = n
    return count


def entropy_count(confidence, bound):
    entropies = [-value for value in confidence]
    fits = [n for n in range(1, len(entropies) + 1) if sum(entropies[:n]) - max(entropies[:n]) <= bound]
    return max(fits, default=0)


def budget_count(confidence, budget):
    return sum(-sum(confidence[:n]) < budget for n in range(1, len(confidence) + 1))


@pytest.mark.parametrize(
    ("rule", "count", "sign"),
    [
        (ConfidenceThreshold, lambda confidence, bound: sum(value >= bound for value in confidence), 1),
        (ConfidenceFactor, factor_count, 1),
        (FrechetProfile, frechet_count, 1),
        (EntropyBound, entropy_count, -1),
        (EntropyBudget, budget_count, -1),
    ],
)
@given(st.lists(st.integers(0, 64), min_size=1, max_size=6), st.integers(0, 64))
def test_a_rule_equals_its_definition(rule, count, sign, numbers, bound):
    """Compare in sixty-fourths, which are exact."""
    confidence = sorted((sign * number / 64 for number in numbers), reverse=True)
    assert rule(bound / 64).count(confidence) == count(confidence, bound / 64)


# Selection


def select(confidence, candidate, quota, rule=MostConfident()):  # noqa: B008
    """The positions that a rule chooses."""
    candidates = [place for place, may in enumerate(candidate) if may and confidence[place] > -inf]
    drafts = Drafts(range(len(confidence)), [0] * len(confidence), confidence, candidates, quota)
    return sorted(rule(drafts, row=None))


@pytest.mark.parametrize(
    ("confidence", "candidate", "quota", "expected"),
    [
        ([0.1, 0.9, 0.5, 0.7], [1, 1, 1, 1], 2, [1, 3]),
        ([0.1, 0.9, 0.5, 0.7], [1, 0, 1, 0], 1, [2]),
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2, [0, 1]),  # ties go to the lower position
        ([0.5, 0.9, 0.5, 0.5], [0, 1, 1, 1], 2, [1, 2]),
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 0, 1], 3, [3]),
        ([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 0, []),
        ([0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0], 2, []),
    ],
)
def test_the_most_confident_candidates_are_written(confidence, candidate, quota, expected):
    assert select(confidence, candidate, quota) == expected


@pytest.mark.parametrize("rule", [MostConfident(), ConfidenceThreshold(0.5), ConfidenceFactor(1.0)])
def test_a_refused_candidate_is_not_written_whatever_the_quota(rule):
    assert select([-inf, 0.75, -inf], [1, 1, 1], 3, rule) == [1]
    assert select([-inf, -inf, -inf], [1, 1, 1], 1, rule) == []


@pytest.mark.parametrize(("quota", "expected"), [(1, [1, 2]), (3, [0, 1, 2])])
def test_a_rule_writes_at_least_the_quota(quota, expected):
    assert select([0.1, 0.9, 0.8, 0.0], [1, 1, 1, 1], quota, ConfidenceThreshold(0.8)) == expected


def test_a_budget_below_every_entropy_writes_the_surest_token():
    assert select([-3.0, -2.0, -4.0], [1, 1, 1], 1, EntropyBudget(0.5)) == [1]


def test_many_ties_go_to_the_lower_positions():
    assert select([0.5] * 300, [1] * 300, 100) == list(range(100)), "an unstable sort would mix them up"


@given(
    st.lists(st.tuples(st.sampled_from([-inf, 0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=6),
    st.integers(0, 5),
    st.sampled_from([MostConfident(), ConfidenceThreshold(0.75), ConfidenceFactor(1.0), FrechetProfile(0.5)]),
)
def test_no_better_candidate_is_left_out(positions, quota, rule):
    confidence, candidate = map(list, zip(*positions, strict=True))
    chosen = select(confidence, candidate, quota, rule)
    able = [place for place, (value, may) in enumerate(positions) if may and value > -inf]
    assert chosen == sorted(chosen) and set(chosen) <= set(able)
    at_least = min(quota, len(able))
    assert len(chosen) == at_least if type(rule) is MostConfident else len(chosen) >= at_least
    left_out = set(able) - set(chosen)
    assert all((confidence[best], -best) > (confidence[other], -other) for best in chosen for other in left_out)


# Token editing


@pytest.fixture
def edit(start):
    """
    `edit(editing, "ab_d", "xbcz", confidence)`: what is written, and what is final, in a block of four that holds
    the first text, where the second is drafted; `checks` steps before this one have seen no mask in it.
    """

    def edit(editing, text, drafted, confidence, checks=0):
        fields = {"frontiers": [0, 0], "block_stop": 4, "block_checks": checks}
        (row,) = start(text + "e_", **{name: [value] for name, value in fields.items()}).rows
        masks = [place for place in range(4) if text[place] == "_"]
        drafts = Drafts(range(5), [ord(letter) for letter in drafted + "y"], [*confidence, 1.0], masks)
        written = [place for place in range(5) if place not in masks]
        chosen, final = editing(drafts, row, masks, written)
        return chosen, list(final)

    return edit


EDITING = TokenEditing(threshold=0.5, max_post_steps=2)
BLOCK = [0, 1, 2, 3]


def test_tokens_of_the_block_are_replaced_by_others_that_are_sure(edit):
    """`b` is drafted again, `z` is not sure enough, and position 4 is of the next block."""
    chosen, final = edit(EDITING, "ab_d", "xbcz", [0.51, 0.9, 0.1, 0.5])
    assert chosen == [0, 2] and final == [], "the tokens that were just written have not been checked"


@pytest.mark.parametrize(
    ("drafted", "checks", "chosen", "final"),
    [
        ("abcd", 0, [], BLOCK),  # nothing is replaced
        ("xbcd", 0, [0], []),  # the new token has not been checked
        ("xbcd", 1, [0], BLOCK),  # the second check is the last
    ],
)
def test_a_block_is_finished_by_a_check_that_replaces_nothing_or_by_the_last_check(
    edit, drafted, checks, chosen, final
):
    assert edit(EDITING, "abcd", drafted, [0.9] * 4, checks) == (chosen, final)


def test_without_checks_a_block_is_finished_by_its_last_mask(edit):
    assert edit(TokenEditing(0.5, 0), "ab_d", "abcd", [0.9] * 4) == ([2], BLOCK)
    assert edit(TokenEditing(0.5, 0), "ab_d", "xbcd", [0.9] * 4) == ([0, 2], BLOCK)
