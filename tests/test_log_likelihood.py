"""Log-likelihoods: recorded estimates, exact values on tiny vocabularies, batches, block-causal models, refusals."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hf_flashdlm import log_likelihood, make_block_causal, perplexity
from hf_flashdlm.log_likelihood import draw_masks


GOLDENS = Path(__file__).parent / "goldens"
CASES = json.loads((GOLDENS / "cases_llada_loglikelihood.json").read_text())["cases"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_recorded_estimate(load, case, batch_size):
    prompt, answer, settings = case["prompt_ids"], case["answer_ids"], case["settings"]
    drawn = [row for batch in case["batches"] for row in batch["perturbed"]]
    masks = torch.tensor(drawn)[:, len(prompt) :] == settings["mask_id"]
    output = log_likelihood(
        load(case["model"]),
        [prompt],
        [answer],
        batch_size=batch_size,
        guidance_scale=1 + settings["cfg_scale"],
        masks=[masks],
    )
    assert output.log_likelihood.item() == pytest.approx(case["log_likelihood"], rel=1e-4)
    assert output.nfe == settings["mc_num"]


@given(length=st.integers(1, 12), num_samples=st.integers(1, 30), seed=st.integers(0, 99))
def test_drawn_masks_are_spread_over_all_numbers(length, num_samples, seed):
    masks = draw_masks(length, num_samples, torch.Generator().manual_seed(seed))
    numbers = masks.sum(1)
    assert masks.shape == (num_samples, length) and numbers.min() >= 1 and numbers.max() <= length
    if num_samples == length:
        assert sorted(numbers.tolist()) == list(range(1, length + 1))


def exact(model, prompt, answer, mask):
    """The estimate's expectation: all sets of masked positions, each number of them as probable as another."""
    total = 0.0
    for number in range(1, len(answer) + 1):
        masks = torch.zeros(0, len(answer), dtype=torch.bool)
        for places in itertools.combinations(range(len(answer)), number):
            row = torch.zeros(1, len(answer), dtype=torch.bool)
            row[0, list(places)] = True
            masks = torch.cat([masks, row])
        total += log_likelihood(model, [prompt], [answer], masks=[masks], mask_token_id=mask).log_likelihood.item()
    return total / len(answer)


@pytest.mark.parametrize("name", ["model_llada", "model_dream"])
def test_the_estimate_approaches_its_expectation(load, name):
    prompt, answer = [5, 70, 33], [8, 200, 41]
    expected = exact(load(name), prompt, answer, 511)
    output = log_likelihood(
        load(name), [prompt], [answer], num_samples=300, generator=torch.Generator().manual_seed(0), batch_size=50
    )
    error = output.standard_error.item()
    assert abs(output.log_likelihood.item() - expected) < 4 * error and 0 < error < abs(expected) / 5


PAIRS = ([[5, 70, 33], [9], [4, 5, 6, 7, 8, 9, 10]], [[8, 200], [41, 3, 7, 19, 22], [17]])


@pytest.mark.parametrize("name", ["model_llada", "model_dream", "families/block_ar/model_sdar"])
def test_a_pair_has_the_same_estimate_alone_and_among_others(load, name):
    masks = [draw_masks(len(answer), 4, torch.Generator().manual_seed(1)) for answer in PAIRS[1]]
    options = {"mask_token_id": 311 if "sdar" in name else 511}
    together = log_likelihood(load(name), *PAIRS, masks=masks, batch_size=5, **options).log_likelihood
    for index, (prompt, answer) in enumerate(zip(*PAIRS, strict=True)):
        alone = log_likelihood(load(name), [prompt], [answer], masks=masks[index : index + 1], **options)
        assert together[index].item() == pytest.approx(alone.log_likelihood.item(), rel=1e-4)


def test_the_same_seed_gives_the_same_estimate(load):
    first, second = (
        log_likelihood(load("model_llada"), *PAIRS, num_samples=3, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert torch.equal(first.log_likelihood, second.log_likelihood)


@pytest.mark.parametrize("origin", ["row", "prompt"])
def test_with_blocks_of_one_the_estimate_is_the_exact_likelihood(origin):
    model = make_block_causal(AutoModelForCausalLM.from_pretrained(GOLDENS / "families/block_ar/model_sdar").eval(), 1)
    model.config.attention_block_origin = origin
    prompt, answer = [5, 70, 33], [8, 200, 41]
    expected = 0.0
    for end in range(len(answer)):  # a block is one token: it sees the true text before it, and the mask
        ids = torch.tensor([[*prompt, *answer[:end], 311]])
        with torch.no_grad():
            expected += model(ids).logits[0, -1].log_softmax(-1)[answer[end]].item()
    output = log_likelihood(model, [prompt], [answer], num_samples=2, mask_token_id=311)
    assert output.log_likelihood.item() == pytest.approx(expected, rel=1e-4)
    assert output.standard_error.item() == pytest.approx(0, abs=1e-4)


def test_a_block_is_masked_after_the_true_text_before_it():
    model = make_block_causal(AutoModelForCausalLM.from_pretrained(GOLDENS / "families/block_ar/model_sdar").eval(), 4)
    prompt, answer = [5, 70, 33], [8, 200, 41, 17, 3]  # blocks: 1 token, then 4
    masks = torch.ones(1, 5, dtype=torch.bool)
    output = log_likelihood(model, [prompt], [answer], masks=[masks], mask_token_id=311)
    with torch.no_grad():
        first = model(torch.tensor([[*prompt, 311]])).logits[0, -1:].log_softmax(-1)
        second = model(torch.tensor([[*prompt, answer[0], 311, 311, 311, 311]])).logits[0, -4:].log_softmax(-1)
    expected = first[0, answer[0]] + second[torch.arange(4), torch.tensor(answer[1:])].sum()
    assert output.log_likelihood.item() == pytest.approx(expected.item(), rel=1e-4)
    assert output.nfe == 2


def test_perplexity_is_that_of_all_tokens_but_the_first(load):
    texts = [[5, 70, 33, 8], [9, 41]]
    seeded = dict(num_samples=4)
    value = perplexity(load("model_llada"), texts, generator=torch.Generator().manual_seed(3), **seeded)
    output = log_likelihood(
        load("model_llada"), [[5], [9]], [[70, 33, 8], [41]], generator=torch.Generator().manual_seed(3), **seeded
    )
    assert value == pytest.approx(torch.exp(-output.log_likelihood.sum() / 4).item())


REFUSED = {
    "number": (([[1]], [[2], [3]]), {}, "`answers` must hold one answer for each prompt, got 2 and 1."),
    "none": (([], []), {}, "`answers` must hold one answer for each prompt, got 0 and 0."),
    "empty": (([[1], [1]], [[2], []]), {}, "`answers` must hold at least one token each, got none at 1."),
    "samples": (([[1]], [[2]]), {"num_samples": 0}, "`num_samples` must be an integer of at least 1, got 0."),
    "batch": (([[1]], [[2]]), {"batch_size": 1.5}, "`batch_size` must be an integer of at least 1, got 1.5."),
    "mask": (
        ([[1]], [[2]]),
        {"mask_token_id": 512},
        "`mask_token_id` must be an id of the model's vocabulary of 512, got 512: pass that of the tokenizer's mask "
        "token, or set it in `model.config`.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_estimated_is_refused(load, case):
    pairs, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        log_likelihood(load("model_llada"), *pairs, **options)


def test_a_shifted_model_needs_a_token_before_the_answer(load):
    message = (
        "`prompts` must hold at least one token each for a DreamModel, which scores a token from the one before it, "
        "got none at 0: pass the begin-of-text token."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        log_likelihood(load("model_dream"), [[]], [[2]])
    assert log_likelihood(load("model_llada"), [[]], [[2]], num_samples=1).log_likelihood.shape == (1,)
