"""Transformers' processors and stopping criteria in a whole decode."""

import pytest
import torch
from cases import ENDS, MASK, PLAIN, PROMPT, PROMPTS, every_model, every_policy, generated, spell
from transformers import LogitsProcessorList, StoppingCriteriaList


@every_model
@every_policy
def test_a_stop_string_ends_a_row_where_it_is_complete(tiny, decode, tokenizer, name, policy):
    filled = decode(tiny(name), PROMPTS, **PLAIN, **policy)
    texts = [generated(filled, row) for row in range(3)]
    stop = spell(texts[1][2:5])
    output = decode(tiny(name), PROMPTS, **PLAIN, **policy, stop_strings=[stop], tokenizer=tokenizer, pad_token_id=0)
    for row, text in enumerate(texts):
        spelled = spell(text)
        kept = text[: spelled.find(stop) + 3] if stop in spelled else text
        in_batch = generated(output, row)
        assert in_batch == kept + [0] * (len(in_batch) - len(kept))
    assert int(output.nfe[1]) <= int(filled.nfe[1])


def test_a_stop_string_in_the_prompt_stops_nothing(tiny, decode, tokenizer):
    plain = decode(tiny("llada"), [PROMPT], **PLAIN)
    stop = spell(PROMPT[2:4])
    output = decode(tiny("llada"), [PROMPT], **PLAIN, stop_strings=[stop], tokenizer=tokenizer)
    assert output.sequences.tolist() == plain.sequences.tolist()


def test_a_stopping_criterion_sees_every_clean_prefix_of_every_row(tiny, decode):
    seen = []

    def criterion(input_ids, scores):
        seen.append(input_ids.tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13)

    output = decode(tiny("llada"), PROMPTS, **PLAIN, stopping_criteria=StoppingCriteriaList([criterion]))
    assert output.sequences.shape == (3, 13)
    plain = decode(tiny("llada"), PROMPTS, **PLAIN)
    assert output.sequences.tolist() == plain.sequences[:, :13].tolist()
    for index, row in enumerate(plain.sequences.tolist()):
        shown = [batch[index] for batch in seen]
        assert all(row[:length] in shown for length in range(9, 14))
    assert all(len(batch) == 3 for batch in seen)


def test_max_time_ends_at_the_first_text_there_is(tiny, decode):
    output = decode(tiny("llada"), [PROMPT], **PLAIN | dict(block_length=1, steps=12), max_time=1e-9)
    assert output.sequences.shape == (1, 9)
    assert output.nfe.tolist() == [1]


@every_model
def test_suppressed_tokens_are_never_written(tiny, decode, name):
    unwanted = sorted(set(decode(tiny(name), PROMPTS, **PLAIN).sequences[:, 8:].flatten().tolist()))
    output = decode(tiny(name), PROMPTS, **PLAIN, suppress_tokens=unwanted)
    assert not torch.isin(output.sequences[:, 8:], torch.tensor(unwanted)).any()


@every_model
def test_tokens_suppressed_at_the_beginning_are_written_later_only(tiny, decode, name):
    first = decode(tiny(name), [PROMPT], **PLAIN).sequences[0, 8:9].tolist()
    output = decode(tiny(name), [PROMPT], **PLAIN, begin_suppress_tokens=first)
    assert generated(output)[0] != first[0]


@every_model
def test_bad_words_are_never_written_from_left_to_right(tiny, decode, name):
    options = PLAIN | dict(block_length=1, steps=12)
    texts = [generated(decode(tiny(name), PROMPTS, **options), row) for row in range(3)]
    single, pair = texts[0][4], texts[1][6:8]
    output = decode(tiny(name), PROMPTS, **options, bad_words_ids=[[single], pair])
    for row in range(3):
        text = generated(output, row)
        assert single not in text
        assert pair not in [text[i : i + 2] for i in range(11)]


@every_model
@pytest.mark.parametrize("block_length", [1, 12])
@pytest.mark.parametrize("negative", [{}, dict(guidance_scale=1.5, negative_prompt_ids=torch.arange(40, 55)[None])])
def test_no_end_is_written_before_min_new_tokens(tiny, decode, name, block_length, negative):
    options = dict(max_new_tokens=12, block_length=block_length, pad_token_id=0, **negative)
    plain = generated(decode(tiny(name), [PROMPT], stop_at_eos=False, **options))
    output = decode(tiny(name), [PROMPT], eos_token_id=plain, min_new_tokens=7, **options)
    text = generated(output)
    assert len(text) >= 7
    assert not set(text[:7]) & set(plain)


def test_a_forced_end_stands_at_the_end(tiny, decode):
    output = decode(tiny("llada"), PROMPTS, **PLAIN, forced_eos_token_id=[77])
    assert output.sequences[:, -1].tolist() == [77] * 3


@every_model
def test_a_repetition_penalty_is_exact_from_left_to_right(tiny, decode, name):
    options = dict(max_new_tokens=8, block_length=1, window_policy="none", stop_at_eos=False, repetition_penalty=5.0)
    model, ids = tiny(name), list(PROMPT)
    for step in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([ids + [MASK] * (8 - step)])).logits[0, len(ids) - model.config.logits_shift]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] < 0, logits[seen] * 5, logits[seen] / 5)
        logits[MASK] = -torch.inf
        ids.append(int(logits.argmax()))
    assert decode(model, [PROMPT], **options).sequences[0].tolist() == ids


@every_model
@pytest.mark.parametrize(
    "processor",
    [
        dict(repetition_penalty=5.0),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=6),
        dict(sequence_bias=[[[418], -5.0], [[30, 31], 4.0]]),
        dict(exponential_decay_length_penalty=(3, 1.5)),
        dict(begin_suppress_tokens=[132, 254]),
        dict(bad_words_ids=[[132], [258, 132]]),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_processed_row_decodes_alone_as_in_an_uneven_batch(tiny, decode, name, processor):
    options = dict(max_new_tokens=8, block_length=4, eos_token_id=ENDS, pad_token_id=0, **processor)
    batch = decode(tiny(name), PROMPTS, **options)
    for row, prompt in enumerate(PROMPTS):
        text = generated(decode(tiny(name), [prompt], **options), 0, len(prompt))
        in_batch = generated(batch, row)
        assert in_batch == text + [0] * (len(in_batch) - len(text))


def test_a_repetition_penalty_knows_a_padded_row(tiny):
    options = dict(max_new_tokens=8, block_length=1, stop_at_eos=False, repetition_penalty=5.0)
    plain = tiny("llada").generate(torch.tensor([PROMPT]), **options)
    padded = tiny("llada").generate(
        torch.tensor([[0] * 4 + PROMPT]), attention_mask=torch.tensor([[0] * 4 + [1] * 8]), **options
    )
    assert padded[0, 4:].tolist() == plain[0].tolist()


def test_no_bigram_is_written_twice_from_left_to_right(tiny, decode):
    output = decode(tiny("llada"), [PROMPT], max_new_tokens=14, block_length=1, no_repeat_ngram_size=2)
    text = output.sequences[0].tolist()
    pairs = list(zip(text[:-1], text[1:], strict=True))
    assert len(set(pairs)) == len(pairs)


def test_a_processor_of_the_callers_sees_what_is_known_left_of_a_position(tiny, decode):
    seen = []

    def processor(input_ids, scores):
        assert scores.shape == (1, 512)
        seen.append(input_ids[0].tolist())
        return scores

    options = dict(max_new_tokens=4, block_length=1)
    output = decode(tiny("llada"), [[5, 6]], **options, logits_processor=LogitsProcessorList([processor]))
    assert seen == [output.sequences[0, :length].tolist() for length in range(2, 6)]
    assert output.sequences.tolist() == decode(tiny("llada"), [[5, 6]], **options).sequences.tolist()


class Follows:
    """As grammar libraries do: remembers where each row stands, and goes on by the one token that it is shown anew."""

    def __init__(self, *texts):
        self.texts, self.shown = texts, None

    def __call__(self, input_ids, scores):
        if self.shown is not None:
            assert input_ids[:, :-1].equal(self.shown), "one token more for each row, once"
        self.shown = input_ids.clone()
        step, only = input_ids.shape[1] - 8, torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts):
            only[row, text[min(step, len(text) - 1)]] = 0
        return only


@pytest.mark.parametrize("policy", [dict(), dict(window_policy="prefix"), dict(right_window=4)], ids=str)
@every_model
def test_a_processor_with_a_state_for_each_row_is_called_as_from_left_to_right(tiny, decode, name, policy):
    end = ENDS[0]
    texts = [[130, 131, end], [140, 141, 142, 143, 144, 145, end], list(range(150, 162))]
    options = dict(max_new_tokens=12, block_length=6, eos_token_id=ENDS, pad_token_id=0, **policy)
    processor = Follows(*texts)
    output = decode(tiny(name), PROMPTS, **options, logits_processor=LogitsProcessorList([processor]))
    assert [generated(output, row) for row in range(3)] == [text + [0] * (12 - len(text)) for text in texts]
    assert processor.shown[0, 8:].tolist() == [130, 131, end] + [0] * 8, "an ended row goes on with padding"


def test_a_prefix_function_is_asked_with_the_row_of_the_callers_batch(tiny, decode):
    def allowed(row, input_ids):
        return [300 + row, 310 + row] if int(input_ids[-1]) != 300 + row else [310 + row]

    output = decode(tiny("llada"), PROMPTS, max_new_tokens=6, block_length=6, prefix_allowed_tokens_fn=allowed)
    for row in range(3):
        text = generated(output, row)
        assert set(text) <= {300 + row, 310 + row}
        assert [300 + row] * 2 not in [text[i : i + 2] for i in range(5)]


@every_model
@pytest.mark.parametrize("policy", [dict(), dict(window_policy="dkv"), dict(steps=4), dict(confidence_threshold=0.0)])
def test_what_is_promised_of_the_text_holds_in_blocks_that_are_written_in_parallel(tiny, decode, name, policy):
    options = dict(max_new_tokens=24, block_length=24, stop_at_eos=False, **policy)
    plain = generated(decode(tiny(name), [PROMPT], **options))
    words = [[plain[3]], plain[10:12]]
    output = decode(tiny(name), PROMPTS, **options, no_repeat_ngram_size=2, bad_words_ids=words)
    for row in range(3):
        text = generated(output, row)
        pairs = list(zip(text[:-1], text[1:], strict=True))
        assert len(set(pairs)) == len(pairs) and plain[3] not in text and tuple(plain[10:12]) not in pairs


def test_a_processor_that_says_it_reads_scores_alone_does_not_slow_a_decode(tiny, decode):
    class Colder:
        positionwise = True

        def __call__(self, input_ids, scores):
            return 2 * scores

    options = dict(max_new_tokens=12, block_length=12, steps=4)
    plain = decode(tiny("llada"), PROMPTS, **options)
    output = decode(tiny("llada"), PROMPTS, **options, logits_processor=LogitsProcessorList([Colder()]))
    assert output.nfe.tolist() == plain.nfe.tolist() == [4] * 3
