"""The autoregressive guider: what it accepts, and that it never writes a token of its own."""

import math

import pytest
import torch
from cases import ENDS, MASK, PROMPTS
from guided_cases import FILLED, OPTIONS, POLICIES, V, alphabet_guider, always, judge, never, random

from hf_flashdlm import ARGuider


# --- acceptance ------------------------------------------------------------------------------------------------------

# Log-probabilities of a vocabulary of five: token 0 is the best, 1 and 2 tie for second place, 4 is impossible.
HAND_SET = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0]).log()[None, None]


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        (dict(accept="top1"), [0]),
        (dict(accept="top1", top_k=3), [0]),
        (dict(accept="topk", top_k=1), [0]),
        (dict(accept="topk", top_k=2), [0, 1, 2]),  # ties share a rank
        (dict(accept="topk", top_k=3), [0, 1, 2]),
        (dict(accept="topk", top_k=4), [0, 1, 2, 3]),
        (dict(accept="topk", top_k=5), [0, 1, 2, 3, 4]),
        (dict(accept="topk_relative", top_k=5, relative_threshold=0.41), [0]),
        (dict(accept="topk_relative", top_k=5, relative_threshold=0.39), [0, 1, 2]),
        (dict(accept="topk_relative", top_k=5, relative_threshold=0.19), [0, 1, 2, 3]),
        (dict(accept="topk_relative", top_k=1, relative_threshold=0.0), [0]),
        (dict(accept="topk_relative", top_k=4, relative_threshold=1.0), [0]),
        (dict(), [0]),
    ],
    ids=str,
)
def test_a_rule_accepts_what_it_says(guider, options, accepted):
    drafts = torch.arange(5)[None]
    assert guider(**options)._accept(HAND_SET.expand(1, 5, 5), drafts)[0].nonzero().flatten().tolist() == accepted


def test_a_tie_for_the_best_token_is_accepted_by_every_rule(guider):
    logits, drafts = torch.tensor([[[3.0, 3.0, 1.0]]]), torch.tensor([[1]])
    for rule in ("top1", "topk", "topk_relative"):
        assert guider(accept=rule, top_k=1, relative_threshold=1.0)._accept(logits, drafts).all()


@pytest.mark.parametrize(
    ("accepted", "written"),
    [
        ([], [3]),  # the first draft is written although it is refused
        ([3], [3]),
        ([3, 4], [3, 4]),
        ([4, 6, 7], [3]),
        ([3, 4, 6], [3, 4, 6]),  # 5 is known: it is not judged, and breaks no prefix
        ([3, 4, 7], [3, 4]),
        ([3, 4, 6, 7, 8], [3, 4, 6, 7]),  # five drafts at most; position 8 would be the sixth
    ],
)
def test_the_longest_accepted_prefix_comes_back_with_its_drafts_as_only_scores(accepted, written):
    canvas = torch.tensor([[1, 2, 3, 0, 0, 5, 0, 0, 0]])
    positions = torch.arange(3, 9)[None]
    scores = torch.zeros(1, 6, 6).scatter(2, torch.tensor([[[1], [2], [3], [4], [5], [1]]]), 9.0)
    guider = alphabet_guider(lambda drafts: torch.isin(positions, torch.tensor(accepted)), num_drafts=5)
    result = judge(guider, canvas, scores, positions, 3)
    finite = result.isfinite()
    assert (finite.sum(-1) == 1).all()
    chosen = result.argmax(-1)[0].tolist()
    assert [position for position in range(3, 9) if position != 5 and chosen[position - 3] != 0] == written
    assert all(chosen[position - 3] == [1, 2, 3, 4, 5, 1][position - 3] for position in written)
    statistics = guider.statistics(total_seconds=1.0)
    assert statistics["drafts_judged"].tolist() == [4]
    assert statistics["accepted_lengths"] == [[len([p for p in written if p in accepted])]]


# --- whole decodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_an_always_accepting_guider_writes_every_draft(tiny, decode, decided, policy):
    model = tiny("dream_trained")
    output = decode(model, [PROMPTS[0]], guider=decided(always), **FILLED, **policy)
    # Everything in reach is written at once; without a narrow window that is the whole canvas, in one step.
    narrow = policy.get("right_window") and not output.nfe.eq(1).all()
    if not narrow and not policy.get("grow_canvas"):
        plain = decode(model, [PROMPTS[0]], **FILLED | dict(block_length=12), confidence_threshold=0, **policy)
        assert output.sequences.tolist() == plain.sequences.tolist()
        assert output.nfe.tolist() == [1]
        assert output.drafts_accepted.tolist() == [12]
    assert output.drafts_accepted.tolist() == output.drafts_judged.tolist()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_an_always_refusing_guider_leaves_one_token_a_step_from_left_to_right(tiny, decode, decided, policy):
    output = decode(tiny("dream_trained"), PROMPTS, guider=decided(never), **FILLED, **policy)
    assert output.nfe.tolist() == [12, 12, 12]
    assert output.drafts_accepted.tolist() == [0, 0, 0]
    for step, forward in enumerate(output.forwards):
        if forward["cache"] is None and not policy.get("grow_canvas"):
            masks = (forward["input_ids"] == MASK).sum(1)
            assert masks.tolist() == [12 - step] * 3
    if policy == dict(window_policy="none"):
        plain = decode(tiny("dream_trained"), PROMPTS, **FILLED | dict(block_length=1), **policy)
        assert output.sequences.tolist() == plain.sequences.tolist()


@pytest.mark.parametrize("accept", ["topk", "topk_relative"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_guided_row_decodes_alone_as_in_an_uneven_batch(tiny, decode, guider, policy, accept):
    options = OPTIONS | dict(eos_token_id=ENDS) | policy
    batch = decode(tiny("dream_trained"), PROMPTS, guider=guider(accept=accept, top_k=5), **options)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(tiny("dream_trained"), [prompt], guider=guider(accept=accept, top_k=5), **options)
        text, in_batch = alone.sequences[0, len(prompt) :].tolist(), batch.sequences[row, 8:].tolist()
        assert in_batch == text + [0] * (len(in_batch) - len(text))
        for field in ("drafts_judged", "drafts_accepted"):
            assert batch[field][row] == alone[field][0]
        assert batch.nfe[row] == batch.guider_forwards[row] == alone.nfe[0]
        assert batch.accepted_lengths[row] == alone.accepted_lengths[0]


@pytest.mark.parametrize("num_drafts", [1, 2, 32])
@pytest.mark.parametrize("policy", [dict(window_policy="none"), dict()], ids=str)
def test_infilled_rows_decode_alone_as_in_a_batch(tiny, decode, guider, policy, num_drafts):
    holes = [[5, MASK, 200, MASK, MASK, 62, 90, 8], [MASK, MASK, 402, 256, MASK], [300, 21]]
    options = FILLED | policy
    judge = guider(accept="topk", top_k=200, num_drafts=num_drafts)
    batch = decode(tiny("dream_trained"), holes, guider=judge, **options)
    for row, prompt in enumerate(holes):
        alone = decode(tiny("dream_trained"), [prompt], guider=judge, **options)
        assert batch.sequences[row, 8 - len(prompt) :].tolist() == alone.sequences[0].tolist()
        assert batch.accepted_lengths[row] == alone.accepted_lengths[0]


@pytest.mark.parametrize("prompt", [[MASK, 5, 6], [MASK, MASK]])
@pytest.mark.parametrize("num_drafts", [1, 3])
def test_a_canvas_that_begins_with_a_mask_can_be_guided(tiny, decode, guider, prompt, num_drafts):
    output = decode(tiny("dream_trained"), [prompt], guider=guider(num_drafts=num_drafts), **FILLED)
    assert not (output.sequences == MASK).any()


def test_one_draft_at_a_time_is_plain_left_to_right(tiny, decode, guider):
    output = decode(tiny("dream_trained"), PROMPTS, guider=guider(num_drafts=1), window_policy="none", **FILLED)
    plain = decode(tiny("dream_trained"), PROMPTS, **FILLED | dict(block_length=1), window_policy="none")
    assert output.sequences.tolist() == plain.sequences.tolist()
    assert output.drafts_judged.tolist() == [12, 12, 12]


def test_every_token_is_what_the_diffusion_model_drafted(tiny, decode, guider):
    model = tiny("dream_trained")
    output = decode(model, [PROMPTS[0]], guider=guider(accept="topk", top_k=5), window_policy="none", **FILLED)
    canvases = [forward["input_ids"] for forward in output.forwards] + [output.sequences]
    assert len(canvases) > 3
    for before, after in zip(canvases[:-1], canvases[1:], strict=True):
        with torch.no_grad():
            logits = model(before).logits
        logits[..., MASK] = -math.inf
        drafts = torch.cat([before[:, :1], logits[:, :-1].argmax(-1)], 1)
        changed = after != before
        assert changed.any() and (before[changed] == MASK).all()
        assert (after[changed] == drafts[changed]).all()


def test_what_a_processor_forbids_the_guider_does_not_see(tiny, decode, decided):
    plain = decode(tiny("dream_trained"), PROMPTS, guider=decided(always), **FILLED)
    unwanted = sorted(set(plain.sequences[:, 8:].flatten().tolist()))
    output = decode(tiny("dream_trained"), PROMPTS, guider=decided(always), **FILLED, suppress_tokens=unwanted)
    assert not torch.isin(output.sequences[:, 8:], torch.tensor(unwanted)).any()


def test_guided_sampling_depends_on_the_seed_alone(tiny, decode, guider):
    judge, outputs = guider(accept="topk", top_k=50), []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        options = FILLED | dict(do_sample=True, top_k=0, temperature=1.5, generator=generator)
        outputs.append(decode(tiny("dream_trained"), PROMPTS, guider=judge, **options).sequences.tolist())
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


@pytest.mark.parametrize("accepts", [True, False])
def test_the_first_token_of_a_step_is_drawn_from_the_diffusion_model(tiny, decode, decided, accepts):
    model, temperature, num_rows = tiny("dream_trained"), 0.7, 1500
    prompt = PROMPTS[0]
    canvas = torch.tensor([prompt + [MASK] * 2])
    with torch.no_grad():
        # In this model a position is scored by the position before it.
        scores = model(canvas).logits[0, len(prompt) - 1 : -1]
    scores[:, MASK] = -math.inf
    law = (scores / temperature).softmax(-1)
    sampling = dict(do_sample=True, top_k=0, temperature=temperature, generator=torch.Generator().manual_seed(0))
    options = FILLED | sampling | dict(max_new_tokens=2, block_length=2)
    judge = decided(always if accepts else never)
    output = decode(model, [prompt] * num_rows, guider=judge, window_policy="none", **options)
    assert output.nfe.tolist() == [1 if accepts else 2] * num_rows
    # If both are written in the same step, they are independent.
    for index in range(2 if accepts else 1):
        drawn = output.sequences[:, len(prompt) + index].bincount(minlength=V) / num_rows
        deviation = (law[index] * (1 - law[index]) / num_rows).sqrt()
        assert ((drawn - law[index]).abs() <= 5 * deviation + 2 / num_rows).all()
        assert (drawn > 0).sum() > 3
    if accepts:
        best = law.argmax(-1)
        both = (output.sequences[:, -2:] == best).all(1).float().mean()
        assert both == pytest.approx(float(law.amax(-1).prod()), abs=0.05)


def test_a_draft_after_the_first_keeps_its_law_on_condition_that_it_is_accepted(tiny, decode, decided):
    judge = decided(lambda drafts: drafts % 2 == 0)
    options = FILLED | dict(
        do_sample=True, top_k=0, temperature=1.0, max_new_tokens=2, block_length=2, window_policy="none"
    )
    generator = torch.Generator().manual_seed(0)
    output = decode(tiny("dream_trained"), [PROMPTS[0]] * 300, guider=judge, generator=generator, **options)
    for (first, second), lengths in zip(output.sequences[:, -2:].tolist(), output.accepted_lengths, strict=True):
        if lengths == [2]:
            assert first % 2 == second % 2 == 0
        else:
            assert lengths[0] == 1 - first % 2


def test_a_bare_model_is_a_guider_of_the_default_rule(tiny, decode, guider):
    bare, wrapped = (
        decode(tiny("dream_trained"), PROMPTS, guider=judge, **FILLED) for judge in (tiny("guider"), guider())
    )
    assert bare.sequences.tolist() == wrapped.sequences.tolist()
    assert bare.drafts_accepted.tolist() == wrapped.drafts_accepted.tolist()


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_statistics_add_up(tiny, decode, decided, policy, seed):
    judge, forwards = decided(random(seed), num_drafts=6), []
    hook = tiny("guider").register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        output = decode(tiny("dream_trained"), PROMPTS, guider=judge, **FILLED, **policy)
    finally:
        hook.remove()
    assert len(forwards) == int(output.guider_forwards.max())
    assert output.guider_forwards.tolist() == output.nfe.tolist()
    assert [len(lengths) for lengths in output.accepted_lengths] == output.nfe.tolist()
    forced = torch.tensor([lengths.count(0) for lengths in output.accepted_lengths])
    assert (output.drafts_accepted + forced).tolist() == [12] * len(PROMPTS)
    assert output.drafts_accepted.tolist() == [sum(lengths) for lengths in output.accepted_lengths]
    assert (output.drafts_judged >= output.drafts_accepted).all()
    assert all(0 <= length <= 6 for lengths in output.accepted_lengths for length in lengths)
    assert 0 < output.guider_time_share < 1


# --- combination, beyond the prefix, gate ----------------------------------------------------------------------------


def test_a_union_with_an_unsure_model_is_the_guider_and_with_a_sure_one_accepts_all(tiny, decode, decided):
    run = lambda decide, **options: decode(  # noqa: E731
        tiny("dream_trained"), PROMPTS, guider=decided(decide, **options), **FILLED
    )
    alone = run(random(3))
    unsure = run(random(3), combine="union", confidence_threshold=1.0)
    sure = run(never, combine="union", confidence_threshold=0.0)
    assert unsure.accepted_lengths == alone.accepted_lengths
    assert sure.drafts_accepted.tolist() == [12, 12, 12]


def test_an_intersection_with_a_sure_model_is_the_guider_and_with_an_unsure_one_accepts_nothing(tiny, decode, decided):
    run = lambda decide, **options: decode(  # noqa: E731
        tiny("dream_trained"), PROMPTS, guider=decided(decide, **options), **FILLED
    )
    alone = run(random(3))
    sure = run(random(3), combine="intersection", confidence_threshold=0.0)
    unsure = run(always, combine="intersection", confidence_threshold=1.0)
    assert sure.accepted_lengths == alone.accepted_lengths
    assert unsure.drafts_accepted.tolist() == [0, 0, 0]


@pytest.mark.parametrize("policy", [dict(window_policy="none"), dict(), dict(window_policy="dual")], ids=str)
def test_beyond_the_prefix_the_rule_of_the_decode_writes_too(tiny, decode, decided, policy):
    model = tiny("dream_trained")
    output = decode(
        model, PROMPTS, guider=decided(never, beyond_prefix=True), confidence_threshold=0, **FILLED, **policy
    )
    # The first draft is forced, the others pass the threshold: a block a step.
    assert output.nfe.tolist() == [3, 3, 3]
    plain = decode(model, PROMPTS, confidence_threshold=0, **FILLED, **policy)
    assert output.sequences.tolist() == plain.sequences.tolist()
    strict = decode(model, PROMPTS, guider=decided(never, beyond_prefix=True), confidence_threshold=1, **FILLED)
    assert (strict.nfe >= 3).all()


@pytest.mark.parametrize(("decide", "ratio", "closed"), [(always, 0.0, False), (never, 10.0, True)])
def test_a_gate_closes_where_the_guider_does_not_pay(tiny, decode, decided, decide, ratio, closed):
    judge = decided(decide, gate="auto", cost_ratio=ratio, num_drafts=2)
    options = FILLED | dict(max_new_tokens=40, confidence_threshold=1.0)
    output = decode(tiny("dream_trained"), PROMPTS, guider=judge, **options)
    assert output.gate_closed_at.tolist() == [8 if closed else -1] * 3
    asked = torch.tensor([4] * 3) if closed else output.nfe - 4
    assert output.guider_forwards.tolist() == asked.tolist()
    assert not (output.sequences == MASK).any()


@pytest.mark.parametrize("options", [dict(gate="auto"), dict(beyond_prefix=True), dict(combine="union")], ids=str)
@pytest.mark.parametrize("policy", [dict(window_policy="none"), dict(), dict(right_window=5)], ids=str)
def test_a_row_with_these_options_decodes_alone_as_in_a_batch(tiny, decode, guider, options, policy):
    call = OPTIONS | dict(max_new_tokens=20, eos_token_id=ENDS) | policy
    batch = decode(tiny("dream_trained"), PROMPTS, guider=guider(**options), **call)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(tiny("dream_trained"), [prompt], guider=guider(**options), **call)
        text, in_batch = alone.sequences[0, len(prompt) :].tolist(), batch.sequences[row, 8:].tolist()
        assert in_batch == text + [0] * (len(in_batch) - len(text))
        for field in ("nfe", "guider_forwards", "drafts_judged", "drafts_accepted"):
            assert batch[field][row] == alone[field][0]


class Vocabulary:
    is_fast = True

    def __init__(self, **tokens):
        self.tokens = {f"word{index}": index for index in range(200)} | tokens

    def get_vocab(self):
        return self.tokens


def test_tokenizers_that_differ_by_an_added_token_read_ids_and_others_read_text(tiny):
    plain, with_mask, moved = Vocabulary(), Vocabulary(mask=200), Vocabulary(word0=5)
    assert not ARGuider(tiny("guider"), tokenizer=plain, canvas_tokenizer=with_mask).reads_text
    assert ARGuider(tiny("guider"), tokenizer=moved, canvas_tokenizer=plain).reads_text


def test_one_tokenizer_without_the_other_is_refused(tiny):
    with pytest.raises(ValueError, match="^`tokenizer` and `canvas_tokenizer` must be given together"):
        ARGuider(tiny("guider"), tokenizer=Vocabulary())
