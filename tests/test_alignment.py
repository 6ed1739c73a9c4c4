"""A guider that reads text: the way from the diffusion model's ids to its own and back."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_flashdlm
from hf_flashdlm import ARGuider
from hf_flashdlm.alignment import Alignment


TINY = Path(hf_flashdlm.__file__).parent / "tiny"
PROMPTS = [
    "Hana has 3 trays. Each of them holds 6 stamps. How many stamps does Hana have?\nAnswer:",
    "1 + 1 =\nAnswer:",
]


@pytest.fixture(scope="module")
def canvas_tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "dlm")


@pytest.fixture(scope="module")
def byte_tokenizer():
    """One token per byte, and ` 12` as one token: shorter and longer than the words of the canvas."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    vocabulary |= {"Ġ1": len(vocabulary), "Ġ12": len(vocabulary) + 1}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "1"), ("Ġ1", "2")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_every_guider_token_knows_the_canvas_tokens_whose_text_it_shares(canvas_tokenizer, byte_tokenizer):
    alignment = Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0)
    ids = canvas_tokenizer("Hana has 12é").input_ids + [0]
    translation = alignment.translate(ids)
    pieces = [
        (byte_tokenizer.convert_ids_to_tokens(one), span)
        for one, span in zip(translation.ids, translation.spans, strict=True)
    ]
    assert [span for _, span in pieces[:4]] == [(0, 0)] * 4  # H, a, n, a
    assert ("Ġ12", (2, 3)) in pieces  # ` 1` and `2` of the canvas
    assert [span for _, span in pieces[-3:]] == [(4, 5), (4, 5), (6, 6)]  # both bytes of é, then the end
    assert byte_tokenizer.decode(translation.ids) == "Hana has 12é<end>"


def test_special_tokens_without_a_counterpart_are_left_out(canvas_tokenizer, byte_tokenizer):
    alignment = Alignment(canvas_tokenizer, byte_tokenizer, set(), None)
    translation = alignment.translate([0] + canvas_tokenizer("Hana").input_ids)
    assert byte_tokenizer.decode(translation.ids) == "Hana"
    assert {span for span in translation.spans} == {(1, 1)}


def test_a_slow_tokenizer_is_refused(canvas_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="^`tokenizer` must be a fast tokenizer, got Slow"):
        Alignment(canvas_tokenizer, Slow(), set(), None)


@pytest.fixture(scope="module")
def pair():
    return [AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32) for name in ("dlm", "guider")]


@pytest.fixture
def text_guider(pair, canvas_tokenizer):
    """The embedded guider, made to read text although its tokenizer is the model's."""
    guider = ARGuider(pair[1], accept="top1", tokenizer=canvas_tokenizer, canvas_tokenizer=canvas_tokenizer)
    guider.reads_text = True
    return guider


def test_reading_text_equals_reading_ids_where_the_tokenizers_are_one(pair, canvas_tokenizer, text_guider):
    inputs = canvas_tokenizer(PROMPTS[0], return_tensors="pt")
    expected = pair[0].generate(**inputs, guider=ARGuider(pair[1], accept="top1"), return_dict_in_generate=True)
    output = pair[0].generate(**inputs, guider=text_guider, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.guider_forwards.tolist() == output.nfe.tolist()


def test_rows_of_a_batch_are_read_as_alone(pair, canvas_tokenizer, text_guider):
    inputs = canvas_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = pair[0].generate(**inputs, guider=text_guider, return_dict_in_generate=True)
    for row, prompt in enumerate(PROMPTS):
        alone = canvas_tokenizer(prompt, return_tensors="pt")
        single = pair[0].generate(**alone, guider=text_guider, return_dict_in_generate=True)
        assert output.accepted_lengths[row] == single.accepted_lengths[0]
        assert output.nfe[row] == single.nfe[0]


def test_a_guider_of_bytes_ends_and_supplies_no_token(pair, canvas_tokenizer, byte_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    guider = ARGuider(LlamaForCausalLM(config), tokenizer=byte_tokenizer, canvas_tokenizer=canvas_tokenizer)
    assert guider.reads_text
    inputs = canvas_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = pair[0].generate(**inputs, max_new_tokens=12, guider=guider, return_dict_in_generate=True)
    assert (output.sequences != pair[0].config.mask_token_id).all()
    assert (output.drafts_accepted <= output.drafts_judged).all()
