"""What the output says of each step: when a token was written, how sure the model was, and the canvas then."""

import pytest
import torch
from cases import ENDS, MASK, PLAIN, PROMPT, PROMPTS, every_model, every_policy
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hf_flashdlm import ARGuider


BOTH = {"output_confidence": True, "output_history": True}


def check(output, given):
    """The laws of the history; `given` is the canvas of the call, `(B, P)` and then masks."""
    sequences, written_at, history = output.sequences, output.written_at, output.history
    assert history.shape == (int(output.nfe.max()), *sequences.shape)
    assert torch.equal(history[-1], sequences)
    columns = range(sequences.shape[1])
    for row, nfe in enumerate(output.nfe.tolist()):
        assert (history[nfe - 1 :, row] == sequences[row]).all(), "a finished row has changed"
        for column in columns:
            step, token, shown = written_at[row, column], sequences[row, column], history[:, row, column].tolist()
            if step < 0:
                assert column >= given.shape[1] or (given[row, column] != MASK and set(shown) == {int(token)})
                continue
            assert step < nfe and shown[step:] == [token] * (len(shown) - step)
            assert (shown[step - 1] if step else MASK) != token
            assert column >= given.shape[1] or given[row, column] == MASK
    counts = (written_at >= 0).sum(1)
    torch.testing.assert_close(counts / output.nfe, output.tokens_per_forward)
    assert output.confidence is None or torch.equal(output.confidence.isnan(), written_at < 0)


def forwards_of(model, call):
    """The output of the call, and of each forward the canvas positions scored and their probabilities `(N, V)`."""
    forwards, shift = [], getattr(model.config, "logits_shift", 0)

    def keep(_, args, kwargs, output):
        # Its own `logits_to_keep` says where in the fed positions each row of the head stands.
        positions = kwargs["position_ids"][0][kwargs["logits_to_keep"]] + shift
        forwards.append((positions.tolist(), output.logits[0].softmax(-1)))

    hook = model.register_forward_hook(keep, with_kwargs=True)
    try:
        return call(), forwards
    finally:
        hook.remove()


def check_confidence(output, forwards):
    for column, step in enumerate(output.written_at[0].tolist()):
        if step >= 0:
            positions, probabilities = forwards[step]
            expected = probabilities[positions.index(column), output.sequences[0, column]]
            torch.testing.assert_close(output.confidence[0, column], expected)


class Grumpy(LogitsProcessor):
    """Writes into what it is given, as processors may."""

    positionwise = True

    def __call__(self, input_ids, scores):
        scores[:, ::2] -= 1.0
        return scores


CALLS = {
    "steps": {"steps": 9},
    "threshold": {"confidence_threshold": 0.2},
    "random order": {"steps": 9, "confidence": "random"},
    "sampling": {"steps": 9, "do_sample": True, "temperature": 0.7, "top_k": 20},
    "processor": {"steps": 9, "logits_processor": [Grumpy()]},
    "left to right": {"no_repeat_ngram_size": 2},
    "entropy": {"steps": 6, "refresh_entropy": 1.0},
}
COMMON = {"max_new_tokens": 12, "block_length": 4, "stop_at_eos": False, "return_dict_in_generate": True} | BOTH


@every_model
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
def test_confidence_is_the_softmax_of_the_forward_that_wrote_a_token(tiny, name, options):
    model, ids = tiny(name), torch.tensor([PROMPT])
    torch.manual_seed(0)
    output, forwards = forwards_of(model, lambda: model.generate(ids, **(COMMON | options)))
    check(output, ids)
    check_confidence(output, forwards)


@every_model
@every_policy
def test_with_every_policy_a_batch_has_the_history_of_its_rows(tiny, left_padded, name, policy):
    model, (ids, mask) = tiny(name), left_padded(PROMPTS)
    options = COMMON | {"confidence_threshold": 0.2, "stop_at_eos": True, "eos_token_id": ENDS} | policy
    output = model.generate(ids, attention_mask=mask, **options)
    check(output, ids)
    if policy.get("window_policy") in ("prefix", "dual", "dkv") or policy.get("synchronize_blocks"):
        return  # rows wait for each other, so that steps differ
    for row, prompt in enumerate(PROMPTS):
        alone, forwards = forwards_of(model, lambda prompt=prompt: model.generate(torch.tensor([prompt]), **options))
        check_confidence(alone, forwards)
        first, length = ids.shape[1] - len(prompt), alone.sequences.shape[1]
        for name in ("written_at", "confidence"):
            own, batched = getattr(alone, name)[0], getattr(output, name)[row, first : first + length]
            torch.testing.assert_close(own, batched, equal_nan=True, atol=1e-4, rtol=1e-4)
        assert torch.equal(alone.history[:, 0], output.history[: len(alone.history), row, first : first + length])


@pytest.mark.parametrize("combine", ["guider", "intersection", "union"])
def test_a_guider_decides_when_and_the_model_how_sure_it_is(tiny, combine):
    model, ids = tiny("llada"), torch.tensor([PROMPT])
    settings = {} if combine == "guider" else {"combine": combine, "confidence_threshold": 0.1}
    guider = ARGuider(tiny("guider"), **settings)
    options = COMMON | {"guider": guider}
    output, forwards = forwards_of(model, lambda: model.generate(ids, **options))
    check(output, ids)
    check_confidence(output, forwards)
    assert (output.confidence[0, 8:] < 1).all()


def test_tokens_that_are_edited_have_their_last_step(tiny):
    model, ids = tiny("llada"), torch.tensor([PROMPT])
    options = COMMON | {"block_length": 12, "editing_threshold": 0.05}
    output, forwards = forwards_of(model, lambda: model.generate(ids, **options))
    check(output, ids)
    check_confidence(output, forwards)
    before = output.history[:-1]
    assert ((before != output.sequences) & (before != MASK)).any(), "no token was edited"


def test_masks_inside_the_prompt_are_written_too(tiny):
    ids = torch.tensor([PROMPT])
    ids[0, 3] = MASK
    output = tiny("llada").generate(ids, **COMMON)
    check(output, ids)
    assert output.written_at[0, 3] >= 0 and output.confidence[0, 3] > 0


class Shown(BaseStreamer):
    shows_canvas = True

    def __init__(self):
        self.canvases = []

    def put(self, value):
        pass

    def put_draft(self, value):
        self.canvases.append(value)

    def end(self):
        pass


def test_a_streamer_sees_the_history_as_it_forms(tiny):
    shown, ids = Shown(), torch.tensor([PROMPT])
    output = tiny("llada").generate(ids, streamer=shown, **COMMON)
    assert torch.equal(torch.stack(shown.canvases)[-len(output.history) :], output.history)


def test_guidance_and_negative_prompts_do_not_shift_the_history(tiny):
    ids = torch.tensor([PROMPTS[1]])
    output = tiny("llada").generate(ids, guidance_scale=1.5, negative_prompt_ids=torch.tensor([PROMPT]), **COMMON)
    check(output, ids)


def test_nothing_is_kept_that_was_not_asked_for(tiny):
    model, ids = tiny("llada"), torch.tensor([PROMPT])
    output = model.generate(ids, return_dict_in_generate=True, **PLAIN)
    assert output.confidence is None and output.history is None
    assert output.written_at.shape == output.sequences.shape
    with_both = model.generate(ids, return_dict_in_generate=True, **PLAIN, **BOTH)
    assert torch.equal(with_both.sequences, output.sequences)
    assert torch.equal(with_both.written_at, output.written_at)
