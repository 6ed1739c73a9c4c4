"""What a user types is text, and what a template writes are tokens."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_flashdlm.cli import main
from hf_flashdlm.console.prompts import added_spans, encode_chat, encode_text
from hf_flashdlm.prompting import Checkpoint
from hf_flashdlm.tiny import FOLDER as TINY


END, MASK = "<|endoftext|>", "<|mdm_mask|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "<|im_start|>{{ 'assistant\n' }}"
)


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY / "dlm")


@pytest.fixture(scope="module")
def chatml():
    """A tokenizer of bytes with markers of turns, as Dream's and LLaDA's have them, and one that is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|mask|>"])
    backend.add_tokens(["</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", mask_token="<|mask|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def added(tokenizer, ids):
    return [tokenizer.added_tokens_decoder[one].content for one in ids if one in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("text", [MASK, f"Ben has {MASK} pens.", f"{END}{MASK}{END}", f"a{MASK}b {END}", "plain"])
def test_the_name_of_a_token_is_its_characters(tiny, text):
    ids = encode_text(tiny, text)
    assert added(tiny, ids) == []
    assert tiny.decode(ids) == text


def test_a_text_without_names_is_encoded_as_by_the_tokenizer(tiny):
    text = "Adam has 3 coins.\n #### 漢"
    assert encode_text(tiny, text) == tiny(text)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|mask|>", "</think>", "<|", "|>", " ", "é\n", "x"]))
)
def test_every_text_comes_back(chatml, text):
    text = "".join(text)
    ids = encode_text(chatml, text)
    assert added(chatml, ids) == [] and chatml.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|mask|>", "</think>", "user", "\n", "x", "\U000f0000"])
    )
)
def test_the_markers_of_a_template_are_tokens_and_the_users_are_not(chatml, text):
    text = "".join(text)
    ids = encode_chat(chatml, [{"role": "system", "content": text}, {"role": "user", "content": text}])
    assert added(chatml, ids) == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    turn = f"\n{text.strip()}<|im_end|>\n"
    assert chatml.decode(ids) == f"<|im_start|>system{turn}<|im_start|>user{turn}<|im_start|>assistant\n"


def test_a_conversation_without_names_is_encoded_as_by_the_tokenizer(chatml):
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "a</think>b"}]
    rendered = chatml.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert encode_chat(chatml, turns) == chatml(rendered, add_special_tokens=False)["input_ids"]


def test_a_reply_keeps_the_tokens_that_a_template_looks_for_but_no_special_ones(chatml):
    turns = [{"role": "user", "content": "<|mask|>"}, {"role": "assistant", "content": "a</think><|im_end|>"}]
    names = added(chatml, encode_chat(chatml, turns))
    assert names == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "</think>", "<|im_end|>", "<|im_start|>"]


def test_tokens_of_other_vocabularies_stay_text_too():
    words = {"[UNK]": 0, "a": 1, "[MASK]": 2, "mask": 3}
    by_words = Tokenizer(models.WordLevel(words, "[UNK]"))
    by_words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    by_words.add_special_tokens(["[UNK]", "[MASK]"])
    pieces = [("<unk>", 0.0), ("a", -1.0), ("<mask>", -1.0), ("<", -5.0), (">", -5.0), ("mask", -3.0)]
    by_pieces = Tokenizer(models.Unigram(pieces, unk_id=0))
    by_pieces.add_special_tokens(["<mask>"])
    for backend, name, expected in ((by_words, "[MASK]", [1, 0, 1]), (by_pieces, "<mask>", [1, 3, 5, 4, 1])):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token=name)
        text = f"a {name} a" if backend is by_words else f"a{name}a"
        assert tokenizer.mask_token_id in tokenizer(text)["input_ids"]
        assert encode_text(tokenizer, text) == expected


def test_a_name_that_the_tokenizer_reads_in_other_letters_is_found():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<mask>", special=True, normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token="<mask>")
    assert [span[:2] for span in added_spans(tokenizer, "a <MASK> a")] == [(2, 8)]
    assert tokenizer.mask_token_id not in encode_text(tokenizer, "a <MASK> a")


def test_a_tokenizer_that_cannot_be_described_refuses_the_name(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny), "is_fast", False)
    assert encode_text(tiny, "plain") == tiny("plain")["input_ids"]
    with pytest.raises(ValueError) as refused:
        encode_text(tiny, MASK)
    assert str(refused.value) == (
        f"a prompt must not hold {MASK!r}, which the tokenizer {type(tiny).__name__} cannot read as text: "
        "leave it out."
    )


def test_the_tokenizer_of_dream_from_its_old_files(tmp_path):
    folder = shutil.copytree(TINY / "dlm", tmp_path / "dream")
    described = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    vocabulary = {piece: index for piece, index in described["vocab"].items() if index > 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {END: 0, MASK: 1}))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in described["merges"])
    (folder / "merges.txt").write_text("".join(f"{line}\n" for line in ["#version: 0.2", *merges]))
    values = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "DreamTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    checkpoint = Checkpoint.load(str(folder), "cpu")
    ids = checkpoint.encode([f"Ben has {MASK} pens.{END}"], None)["input_ids"][0].tolist()
    assert not {0, 1} & set(ids)
    assert f"Ben has {MASK} pens.{END}\nAnswer:" == checkpoint.tokenizer.decode(ids)


def test_prompts_of_a_batch_are_padded_on_the_left():
    checkpoint = Checkpoint.load(str(TINY / "dlm"), "cpu")
    rows = [f"{MASK} a", "b"]
    together = checkpoint.encode(rows, False)
    for index, row in enumerate(rows):
        alone = checkpoint.encode([row], False)["input_ids"][0]
        assert torch.equal(together["input_ids"][index][together["attention_mask"][index] == 1], alone)
    assert together["attention_mask"][:, -1].all() and together["attention_mask"].dtype == torch.long


@pytest.mark.parametrize("chat", ["--chat", "--no-chat"])
def test_the_command_line_decodes_a_prompt_that_names_the_mask_token(chat, capsys):
    words = ["generate", "--model", str(TINY / "dlm"), "--max-new-tokens", "8", "--block-length", "8", "--stats", chat]
    assert main([*words, "--prompt", f"Ben has {MASK} pens."]) == 0
    assert "NFE" in capsys.readouterr().err


def test_a_text_in_which_the_tokenizer_reads_nothing_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError) as refused:
        Checkpoint(None, tokenizer).encode(["a", " \n"], False)
    assert str(refused.value) == "`--prompt` must hold at least one token, got an empty text."
