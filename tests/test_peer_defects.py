"""Known defects of other implementations, d1 to d21: each test shows that this package does not have the defect.

The whole suite tests d2 (does not load on Transformers 5). Missing numbers concern parts that do not exist here.
"""

import pytest
import torch
from transformers import TextDiffusionStreamer

from hf_flashdlm.compiling import CACHE_NAME
from hf_flashdlm.unmasking import ConfidenceFactor, Drafter


MASK, EOS = 511, 510
PROMPTS = [[5, 70, 200, 41, 333, 62], [77, 130]]


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_d1_the_attention_mask_is_not_ignored(tiny, left_padded, name):
    ids, mask = left_padded(PROMPTS)
    masked, ignored = (tiny(name)(ids, attention_mask=given).logits[1] for given in (mask, None))
    alone = tiny(name)(torch.tensor(PROMPTS[1:])).logits[0]
    torch.testing.assert_close(masked[4:], alone, atol=1e-4, rtol=1e-4)
    assert (ignored[4:] - alone).abs().max() > 0.1


@pytest.mark.parametrize("policy", ["prefix", "dual"])
@pytest.mark.parametrize("rule", [dict(confidence_threshold=1.0), dict(factor=0.0), dict(steps=2)])
def test_d3_few_steps_leave_no_masks_with_a_cache(tiny, decode, policy, rule):
    options = dict(max_new_tokens=16, block_length=8, window_policy=policy, stop_at_eos=False)
    output = decode(tiny("llada"), PROMPTS, **options, **rule)
    assert output.sequences.shape == (2, 22) and not (output.sequences == MASK).any()


def test_d4_the_factor_rule_does_not_write_the_candidate_that_fails():
    assert ConfidenceFactor(0.6).count([0.99, 0.95, 0.02]) == 2
    assert ConfidenceFactor(0.6).count([0.99, 0.02, 0.01]) == 1


@pytest.mark.parametrize("policy", ["prefix", "dual"])
def test_d5_one_step_per_block_is_one_forward_per_block_for_a_batch_too(tiny, decode, policy):
    options = dict(max_new_tokens=16, block_length=8, window_policy=policy, stop_at_eos=False)
    for rule in (dict(steps=2), dict(confidence_threshold=0.0)):
        assert decode(tiny("llada"), PROMPTS, **options, **rule).nfe.tolist() == [2, 2]


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_d6_a_low_temperature_ties_no_confidences(tiny, temperature):
    with torch.no_grad():
        scores = tiny("dream")(torch.tensor([[5, 70, 200] + [MASK] * 60])).logits.float()
    _, plain = Drafter(MASK)(scores)
    _, warm = Drafter(MASK, temperature=temperature, generator=torch.Generator().manual_seed(0))(scores / temperature)
    assert len(plain.unique()) == len(warm.unique()) == 63
    assert ((scores / temperature).softmax(-1).amax(-1).bfloat16().unique()).numel() < 40, "the case has no ties"


@pytest.mark.parametrize("policy", ["prefix", "dual"])
@pytest.mark.parametrize("prompts", [[PROMPTS[0]] * 2, PROMPTS], ids=["even", "uneven"])
@pytest.mark.parametrize("rule", [dict(confidence_threshold=0.9), dict(steps=8, confidence="margin")], ids=str)
def test_d7_dream_decodes_batches_with_a_cache(tiny, decode, policy, prompts, rule):
    options = dict(max_new_tokens=16, block_length=8, window_policy=policy, stop_at_eos=False)
    output = decode(tiny("dream"), prompts, **options, **rule)
    assert not (output.sequences[:, 6:] == MASK).any() and int(output.nfe.max()) <= 16


@pytest.mark.parametrize("policy", ["freecache", "prefix", "dual", "dkv"])
def test_d9_finished_rows_leave_the_cache_too(tiny, decode, policy):
    options = dict(max_new_tokens=16, block_length=8, window_policy=policy, pad_token_id=0)
    output = decode(tiny("dream_trained"), [list(range(20, 28)), *PROMPTS], eos_token_id=list(range(120)), **options)
    sizes = [forward["cache"].layers[0].keys.shape[0] for forward in output.forwards]
    assert len(set(output.nfe.tolist())) > 1
    assert set(sizes) == {0}, "all forwards share a cache, and no row is left at the end"


def test_d10_guidance_needs_no_mask_and_lengths_need_not_divide(tiny, decode):
    output = tiny("llada").generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=11, block_length=4, steps=7, guidance_scale=2.0, stop_at_eos=False
    )
    assert output.shape == (1, 17) and not (output == MASK).any()


def test_d10_special_tokens_are_settings(tiny, decode):
    plain = decode(tiny("llada"), PROMPTS[:1], max_new_tokens=8, stop_at_eos=False).sequences[0, 6:].tolist()
    output = decode(tiny("llada"), PROMPTS[:1], max_new_tokens=8, eos_token_id=plain[3], pad_token_id=7)
    end = plain.index(plain[3]) + 1
    assert output.sequences[0, 6:].tolist() == plain[:end]
    other = decode(tiny("llada"), PROMPTS[:1], max_new_tokens=8, mask_token_id=509, stop_at_eos=False)
    assert (other.forwards[0]["input_ids"][0, 6:] == 509).all()


def test_d11_tokens_suppressed_at_the_beginning_may_stand_elsewhere(tiny, decode):
    options = dict(max_new_tokens=12, block_length=12, steps=12, stop_at_eos=False)
    plain = decode(tiny("llada"), PROMPTS[:1], **options).sequences[0, 6:]
    output = decode(tiny("llada"), PROMPTS[:1], **options, begin_suppress_tokens=plain.unique().tolist())
    assert output.sequences[0, 6] not in plain
    assert torch.isin(output.sequences[0, 7:], plain).any()


def test_d12_a_guider_writes_no_token_and_keeps_no_prefix_twice(tiny, decode, capfd):
    lengths = []
    hook = tiny("guider").register_forward_hook(
        lambda _, args, kwargs, output: lengths.append(output[CACHE_NAME].get_seq_length()), with_kwargs=True
    )
    try:
        output = decode(tiny("dream_trained"), PROMPTS, guider=tiny("guider"), max_new_tokens=16, stop_at_eos=False)
    finally:
        hook.remove()
    assert max(lengths) < output.sequences.shape[1], "the cache is longer than the canvas: something is in it twice"
    assert capfd.readouterr() == ("", "")


def test_d16_a_streamer_with_drafts_works_and_lengths_are_not_rounded_up(tiny):
    class Streamer(TextDiffusionStreamer):
        drafts, texts = 0, []

        def put_draft(self, *args, **kwargs):
            super().put_draft(*args, **kwargs)
            self.drafts += 1

    class Digits:
        def decode(self, token_ids, **_):
            return " ".join(map(str, token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids))

    streamer = Streamer(Digits())
    options = dict(max_new_tokens=7, block_length=7, confidence_threshold=1.0, stop_at_eos=False)
    output = tiny("llada").generate(torch.tensor(PROMPTS[:1]), streamer=streamer, **options)
    assert output.shape == (1, 13)
    assert streamer.drafts > 0


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=True, temperature=30.0, top_k=0, generator=torch.Generator().manual_seed(1)),
        dict(repetition_penalty=50.0),
        dict(suppress_tokens=list(range(100, 480))),
        dict(guidance_scale=7.0),
        dict(confidence="random", steps=6),
    ],
    ids=lambda options: next(iter(options)),
)
def test_d18_no_setting_is_accepted_and_ignored(tiny, decode, options):
    common = dict(max_new_tokens=12, block_length=12, stop_at_eos=False)
    plain, changed = (decode(tiny("llada"), PROMPTS[:1], **common, **more) for more in ({}, options))
    assert plain.sequences.tolist() != changed.sequences.tolist()


def test_d19_no_stop_returns_masks(tiny, decode):
    output = decode(tiny("llada"), PROMPTS, max_new_tokens=16, eos_token_id=list(range(100)), pad_token_id=0)
    assert not (output.sequences == MASK).any()


def test_d20_a_seed_counts_for_every_row_and_usage_stops_at_the_end(tiny, decode):
    options = dict(max_new_tokens=12, do_sample=True, top_k=0, temperature=2.0, eos_token_id=list(range(100)))
    run = lambda seed: decode(  # noqa: E731
        tiny("llada"), [PROMPTS[0]] * 2, generator=torch.Generator().manual_seed(seed), pad_token_id=EOS, **options
    )
    first, again = run(1), run(1)
    assert first.sequences.tolist() == again.sequences.tolist()
    assert first.sequences[0].tolist() != first.sequences[1].tolist()
    for row in range(2):
        text = first.sequences[row, 6:].tolist()
        length = next((i + 1 for i, token in enumerate(text) if token < 100), 12)
        assert round(float(first.tokens_per_forward[row] * first.nfe[row])) == length


def test_d21_two_models_and_two_prompts_in_a_process_do_not_meet(tiny, decode):
    run = lambda name, prompt: decode(tiny(name), [prompt], max_new_tokens=8).sequences.tolist()  # noqa: E731
    calls = [("llada", PROMPTS[0]), ("dream", PROMPTS[1]), ("llada_gqa", PROMPTS[0]), ("llada", PROMPTS[1])]
    assert [run(*call) for call in calls] == [run(*call) for call in calls[::-1]][::-1]
