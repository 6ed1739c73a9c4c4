"""A guider that reads text: from the ids of the diffusion model to its own ids and back."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.generation.configuration_utils import CompileConfig

import hf_flashdlm
from hf_flashdlm import ARGuider
from hf_flashdlm.guider_text import Alignment, TextReader


MASK = 511
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
    """A tokenizer with a token per byte, and ` 12` as one token: shorter and longer than the words of the canvas."""
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
        (byte_tokenizer.convert_ids_to_tokens(token_id), span)
        for token_id, span in zip(translation.ids, translation.spans, strict=True)
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
    """The embedded guider, made to read text although it has the tokenizer of the diffusion model."""
    guider = ARGuider(pair[1], accept="top1", tokenizer=canvas_tokenizer, canvas_tokenizer=canvas_tokenizer)
    guider.reads_text = True
    return guider


def test_reading_text_equals_reading_ids_where_the_tokenizers_are_one(pair, canvas_tokenizer, text_guider, checked):
    inputs = canvas_tokenizer(PROMPTS[0], return_tensors="pt")
    expected = pair[0].generate(**inputs, guider=ARGuider(pair[1], accept="top1"), return_dict_in_generate=True)
    output = pair[0].generate(**inputs, guider=text_guider, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert checked(output, text_guider).accepted_lengths == checked(expected, text_guider).accepted_lengths


@pytest.mark.slow
def test_reading_text_is_compiled_where_that_is_asked_for(pair, canvas_tokenizer, text_guider):
    inputs = canvas_tokenizer(PROMPTS[1], return_tensors="pt")
    options = dict(max_new_tokens=8, guider=text_guider, return_dict_in_generate=True)
    eager = pair[0].generate(**inputs, **options)
    compile_config = CompileConfig(backend="eager", mode=None)
    compiled = pair[0].generate(**inputs, **options, compile_config=compile_config)
    assert pair[1]._last_compile_config.dynamic
    assert compiled.accepted_lengths == eager.accepted_lengths


def test_rows_of_a_batch_are_read_as_alone(pair, canvas_tokenizer, text_guider, checked):
    inputs = canvas_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = pair[0].generate(**inputs, guider=text_guider, return_dict_in_generate=True)
    checked(output, text_guider)
    for row, prompt in enumerate(PROMPTS):
        alone = canvas_tokenizer(prompt, return_tensors="pt")
        single = pair[0].generate(**alone, guider=text_guider, return_dict_in_generate=True)
        assert output.accepted_lengths[row] == single.accepted_lengths[0]
        assert output.nfe[row] == single.nfe[0]


@pytest.fixture(scope="module")
def byte_model(byte_tokenizer):
    """A model of bytes; every second layer sees only the last few bytes."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text",
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def text_reader(model, alignment, num_rows=1, ends=(), kind=TextReader):
    """A reader of rows without padding."""
    return kind(model, alignment, torch.ones(num_rows, 1, dtype=torch.long), MASK, set(ends))


class Compared(TextReader):
    """A guider that compares its decisions with those of a fresh reader, row by row."""

    def judge_rows(self, rows, first, accept):
        accepted = super().judge_rows(rows, first, accept)
        for row, start, verdict in zip(rows, first, accepted, strict=True):
            assert text_reader(self.model, self.alignment).judge_rows([row], [start], accept) == [verdict]
            self.verdicts.append(len(verdict))
        return accepted


def test_what_is_judged_with_a_cache_is_what_a_row_alone_is_without(canvas_tokenizer, byte_tokenizer, byte_model):
    alignment = Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0)

    def rule(logits, ids):
        return (logits > logits.gather(-1, ids[..., None])).sum(-1) < 220

    verdicts = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        reader = text_reader(byte_model, alignment, 3, kind=Compared)
        reader.verdicts = verdicts
        # Drafts after the written tokens are drawn anew, so that the text before them is tokenized differently.
        written = [torch.randint(0, 512, (int(length),), generator=generator).tolist() for length in (1, 9, 4)]
        for _ in range(6):
            rows = [row + torch.randint(0, 512, (7,), generator=generator).tolist() for row in written]
            reader.judge_rows(rows, [len(row) for row in written], rule)
            steps = torch.randint(1, 6, (len(rows),), generator=generator).tolist()
            written = [row[: len(before) + step] for row, before, step in zip(rows, written, steps, strict=True)]
            if float(torch.rand((), generator=generator)) < 0.1 and len(rows) > 1:
                reader.batch_select_indices(torch.tensor([0, len(rows) - 1]))
                written = [written[0], written[-1]]
    assert len(verdicts) > 500 and 0 < sum(verdicts) < 7 * len(verdicts)


def test_a_draft_that_the_guider_cannot_read_is_refused(canvas_tokenizer, byte_tokenizer, byte_model):
    alignment = Alignment(canvas_tokenizer, byte_tokenizer, set(), None)
    reader = text_reader(byte_model, alignment)
    row = canvas_tokenizer("Hana has 12").input_ids
    special = len(row)  # an end token, which has no counterpart in this guider
    accept_all = lambda logits, ids: torch.ones_like(ids, dtype=torch.bool)  # noqa: E731
    assert reader.judge_rows([[*row, 0, *row]], [special - 1], accept_all) == [
        {special - 1, *range(special + 1, 2 * special + 1)}
    ]
    assert reader.judge_rows([[0, 0]], [1], accept_all) == [set()], "a row of which it reads nothing"


def test_a_draft_is_accepted_when_every_token_that_shares_its_text_is(canvas_tokenizer, byte_tokenizer, byte_model):
    reader = text_reader(byte_model, Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0))
    row = canvas_tokenizer("Hana has 12").input_ids  # Hana, has, 1, 2; of the guider's tokens one holds both digits

    def accepted(*refused):
        refused = torch.tensor(byte_tokenizer.convert_tokens_to_ids(list(refused)))
        return reader.judge_rows([row], [1], lambda logits, ids: ~torch.isin(ids, refused))

    assert accepted() == [{1, 2, 3}]
    assert accepted("s") == accepted("Ġ") == [{2, 3}]
    assert accepted("Ġ12") == [{1}]
    assert accepted("H") == [{1, 2, 3}], "written tokens are not judged"


def test_what_nothing_stands_before_is_refused(canvas_tokenizer, byte_tokenizer, byte_model):
    reader = text_reader(byte_model, Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0))
    row = canvas_tokenizer(" 12").input_ids
    assert len(row) == 2  # and one token of the guider's
    assert reader.judge_rows([row], [0], lambda logits, ids: torch.ones_like(ids, dtype=torch.bool)) == [set()]


def test_any_end_token_of_the_guider_stands_for_its_end(canvas_tokenizer, byte_tokenizer, byte_model):
    alignment = Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0)
    row = [*canvas_tokenizer("Hana has 12").input_ids, 0]
    asked = []

    def accept(logits, ids):
        asked.append((logits, ids))
        return torch.ones_like(ids, dtype=torch.bool)

    text_reader(byte_model, alignment, ends={0, 3}).judge_rows([row], [1], accept)
    text_reader(byte_model, alignment).judge_rows([row], [1], accept)
    (logits, ids), (_, as_read) = asked
    best = 0 if logits[0, -1, 0] >= logits[0, -1, 3] else 3
    assert as_read[0, -1] == 0 and ids[0, -1] == best and ids[0, :-1].equal(as_read[0, :-1])


def test_a_text_longer_than_the_guider_has_positions_for_is_refused(canvas_tokenizer, byte_tokenizer, byte_model):
    reader = text_reader(byte_model, Alignment(canvas_tokenizer, byte_tokenizer, {0}, 0))
    reader.model.config.max_position_embeddings, before = 8, reader.model.config.max_position_embeddings
    try:
        with pytest.raises(ValueError, match="^`guider` must have positions for the 12 tokens that it reads, got a"):
            reader.judge_rows([canvas_tokenizer("Hana has 3 4").input_ids], [2], lambda logits, ids: ids > 0)
    finally:
        reader.model.config.max_position_embeddings = before


@pytest.mark.parametrize("gate", [None, "auto"])
def test_a_guider_of_bytes_ends_and_supplies_no_token(
    pair, canvas_tokenizer, byte_tokenizer, byte_model, checked, gate
):
    guider = ARGuider(byte_model, tokenizer=byte_tokenizer, canvas_tokenizer=canvas_tokenizer, gate=gate)
    assert guider.reads_text
    inputs = canvas_tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = pair[0].generate(**inputs, max_new_tokens=12, guider=guider, return_dict_in_generate=True)
    assert (output.sequences != pair[0].config.mask_token_id).all()
    checked(output, guider)
