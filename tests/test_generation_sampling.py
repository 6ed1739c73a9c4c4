"""Sampling, and classifier-free guidance."""

import pytest
import torch
from cases import ENDS, MASK, PROMPT, PROMPTS, every_model, every_policy, generated

import hf_flashdlm.generation_mixin


# --- sampling --------------------------------------------------------------------------------------------------------


def sample(model, seed, prompts=(PROMPT,), **options):
    options = dict(do_sample=True, top_k=0, max_new_tokens=12, block_length=6, stop_at_eos=False) | options
    generator = torch.Generator().manual_seed(seed)
    return model.generate(torch.tensor(prompts), generator=generator, **options)


@every_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(steps=6, confidence="random"),
        dict(steps=6, position_temperature=0.5),
        dict(top_p=0.9, temperature=1.4, window_policy="dual"),
    ],
)
def test_a_seed_decides_what_is_drawn(tiny, name, options):
    outputs = [sample(tiny(name), seed, **options).tolist() for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_without_a_generator_the_seed_of_torch_decides(tiny):
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(
            tiny("llada").generate(torch.tensor([PROMPT]), do_sample=True, top_k=0, max_new_tokens=8).tolist()
        )
    assert outputs[0] == outputs[1]


GREEDY = dict(max_new_tokens=12, block_length=6, stop_at_eos=False)


@every_model
@pytest.mark.parametrize("rule", [dict(steps=8), dict(confidence_threshold=0.6), dict(entropy_bound=1.0)], ids=str)
def test_a_temperature_near_zero_is_greedy(tiny, name, rule):
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY, **rule)
    assert sample(tiny(name), 3, **rule, temperature=1e-4).tolist() == greedy.tolist()


@every_model
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0)], ids=str)
def test_a_filter_that_leaves_one_token_is_greedy(tiny, name, options):
    # One token per step: a filter changes the confidences, as it does in Dream, and so the order.
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY | dict(block_length=1))
    assert sample(tiny(name), 3, block_length=1, **options).tolist() == greedy.tolist()


@every_model
@pytest.mark.parametrize("rule", [dict(steps=8), dict(confidence_threshold=0.6), dict(entropy_bound=1.0)], ids=str)
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_p=1e-6)], ids=str)
@pytest.mark.xfail(reason="confidences follow top-k and top-p, as in Dream: a single remaining token is certain")
def test_a_filter_does_not_make_the_model_sure(tiny, name, rule, options):
    greedy = tiny(name).generate(torch.tensor([PROMPT]), **GREEDY, **rule)
    assert sample(tiny(name), 3, **rule, **options).tolist() == greedy.tolist()


@pytest.mark.parametrize("temperature", [0.1, 0.7, 5.0])
def test_the_temperature_does_not_change_the_order(tiny, decode, monkeypatch, temperature):
    # The drawn tokens are the same, so only the confidences could change the order.
    monkeypatch.setattr(hf_flashdlm.unmasking, "gumbel", lambda like, generator=None: torch.zeros_like(like))
    options = dict(max_new_tokens=12, block_length=12, stop_at_eos=False, steps=12)
    greedy = decode(tiny("llada"), [PROMPT], **options)
    warm = decode(tiny("llada"), [PROMPT], do_sample=True, top_k=0, temperature=temperature, **options)
    steps = [[forward["input_ids"].tolist() for forward in output.forwards] for output in (greedy, warm)]
    assert steps[0] == steps[1]


def test_num_return_sequences_draws_several_for_each_prompt(tiny):
    prompts = [PROMPT, PROMPT[::-1]]
    output = sample(tiny("llada"), 1, prompts, num_return_sequences=3, temperature=1.5)
    assert output.shape == (6, 20)
    assert output[:, :8].tolist() == [PROMPT] * 3 + [PROMPT[::-1]] * 3
    assert len({tuple(row) for row in output.tolist()}) == 6


# --- classifier-free guidance ----------------------------------------------------------------------------------------


def test_a_guidance_scale_of_one_is_none(tiny, decode):
    options = dict(max_new_tokens=12, block_length=4, steps=9)
    plain, guided = (decode(tiny("llada"), PROMPTS, **options, **more) for more in ({}, dict(guidance_scale=1.0)))
    assert guided.sequences.tolist() == plain.sequences.tolist()
    assert guided.active_tokens.tolist() == plain.active_tokens.tolist()


@every_model
@every_policy
def test_a_negative_prompt_that_is_the_prompt_changes_nothing(tiny, decode, name, policy):
    options = dict(max_new_tokens=10, block_length=4, stop_at_eos=False, **policy)
    plain = decode(tiny(name), [PROMPT], **options)
    guided = decode(tiny(name), [PROMPT], guidance_scale=3.0, negative_prompt_ids=torch.tensor([PROMPT]), **options)
    assert guided.sequences.tolist() == plain.sequences.tolist()
    assert guided.nfe.tolist() == plain.nfe.tolist()
    assert guided.active_tokens.tolist() == (2 * plain.active_tokens).tolist()


@every_model
@pytest.mark.parametrize("negative", [None, [3, 4], list(range(40, 52))], ids=["masked", "shorter", "longer"])
def test_guidance_is_the_textbook_formula(tiny, decode, name, negative):
    model = tiny(name)
    options = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    output = decode(
        model,
        [PROMPT],
        max_new_tokens=6,
        steps=6,
        window_policy="none",
        stop_at_eos=False,
        guidance_scale=1.5,
        **options,
    )
    negative = [MASK] * len(PROMPT) if negative is None else negative
    text, shift = [MASK] * 6, model.config.logits_shift
    for _ in range(6):
        scores = []
        for prompt in (PROMPT, negative):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + text])).logits[0]
            scores.append(logits[len(prompt) - shift :][:6])
        probabilities = (scores[1] + 1.5 * (scores[0] - scores[1])).double().softmax(-1)
        best, token_ids = probabilities[:, :MASK].max(-1)
        chosen = max((i for i in range(6) if text[i] == MASK), key=lambda i: float(best[i]))
        text[chosen] = int(token_ids[chosen])
    assert generated(output) == text


@every_model
@pytest.mark.parametrize("policy", [dict(window_policy="dkv", refresh_steps=1), dict(left_margin=1000)], ids=str)
def test_guidance_with_a_refreshed_cache_is_guidance_without(tiny, decode, name, policy):
    options = dict(
        max_new_tokens=10,
        block_length=4,
        steps=8,
        stop_at_eos=False,
        guidance_scale=1.5,
        negative_prompt_ids=torch.tensor([[3, 4], [0, 9], [7, 7]]),
        negative_prompt_attention_mask=torch.tensor([[1, 1], [0, 1], [1, 1]]),
    )
    cached, exact = (decode(tiny(name), PROMPTS, **options, **more) for more in (policy, dict(window_policy="none")))
    assert cached.sequences.tolist() == exact.sequences.tolist()
    assert cached.active_tokens.tolist() == exact.active_tokens.tolist()


@pytest.mark.parametrize(("name", "negatives"), [("llada", None), ("dream", [[3], [4, 5, 6], [7] * 10])])
@every_policy
def test_a_guided_row_decodes_alone_as_in_a_batch(tiny, decode, left_padded, name, negatives, policy):
    options = dict(max_new_tokens=8, block_length=4, guidance_scale=1.5, eos_token_id=ENDS, pad_token_id=0, **policy)

    def run(rows):
        negative = {}
        if negatives is not None:
            ids, mask = left_padded([negatives[row] for row in rows])
            negative = dict(negative_prompt_ids=ids, negative_prompt_attention_mask=mask)
        return decode(tiny(name), [PROMPTS[row] for row in rows], **options, **negative)

    batch = run([0, 1, 2])
    for row in range(3):
        alone = generated(run([row]), 0, len(PROMPTS[row]))
        in_batch = generated(batch, row)
        assert in_batch == alone + [0] * (len(in_batch) - len(alone))
