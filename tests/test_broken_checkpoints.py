"""Checkpoints that are broken, incomplete or hostile: one sentence, exit code 2, and nothing written."""

import json
import os
import shutil
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from hf_flashdlm.cli import main
from hf_flashdlm.hub.loading import LimitReached, bounded, load_config, load_weights, refusing, shard_names
from hf_flashdlm.tiny import FOLDER as TINY


def settings(name, **values):
    """Change a file of settings."""

    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def content(name, data):
    """Replace a file."""
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def without(name):
    return lambda folder: (folder / name).unlink()


def folder_instead(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def pipe_instead(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def loop_instead(name):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return damage


def weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def cut(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].contiguous()


def sharded(weight_map):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Damage, and words of the sentence that answers it.
DAMAGE = {
    "no config": (without(CONFIG), "config.json"),
    "empty config": (content(CONFIG, ""), "config"),
    "binary config": (content(CONFIG, bytes(range(256))), "config"),
    "config that is a list": (content(CONFIG, "[1]"), ""),
    "config that is cut off": (content(CONFIG, '{"model_type": '), "config"),
    "config that is a folder": (folder_instead(CONFIG), ""),
    "config that is a pipe": (pipe_instead(CONFIG), "must hold files and folders, got 'config.json'"),
    "config that links to itself": (loop_instead(CONFIG), ""),
    "no architecture": (settings(CONFIG, model_type=None), ""),
    "an architecture that is a list": (settings(CONFIG, model_type=["Dream"]), ""),
    "no heads": (settings(CONFIG, num_attention_heads=0), "ZeroDivisionError"),
    "negative size": (settings(CONFIG, hidden_size=-4), "negative"),
    "size that is text": (settings(CONFIG, hidden_size="x"), "hidden_size"),
    "wider than the weights": (settings(CONFIG, hidden_size=256), "has the sizes (512, 128) and (512, 256)"),
    "a vocabulary of 10^12": (settings(CONFIG, vocab_size=10**12), "describes"),
    "more layers than the weights": (settings(CONFIG, num_hidden_layers=8), "lacks 24 of them, model.layers.6."),
    "fewer layers than the weights": (settings(CONFIG, num_hidden_layers=2), "has 48 weights more, model.layers.2."),
    "a quantization that is a list": (settings(CONFIG, quantization_config=[1]), ""),
    "an attention that is code": (settings(CONFIG, attn_implementation="evil/kernel"), "'evil/kernel'"),
    "no weights": (without(WEIGHTS), "model.safetensors"),
    "empty weights": (content(WEIGHTS, b""), "header too small"),
    "weights that are text": (content(WEIGHTS, "weights" * 99), "header too large"),
    "header of 2^62 bytes": (content(WEIGHTS, (2**62).to_bytes(8, "little")), "header too large"),
    "a weight less": (weights(lambda tensors: tensors.pop("lm_head.weight")), "lacks 1 of them, lm_head.weight"),
    "a weight of other sizes": (weights(cut), "lm_head.weight has the sizes (100, 128) and (512, 128)"),
    "weights in a parent folder": (sharded({"a": "../b.safetensors"}), "names '../b.safetensors'"),
    "weights at a path": (sharded({"a": "/etc/passwd"}), "names '/etc/passwd'"),
    "weights that are no text": (sharded({"a": 3}), "names 3"),
    "weights that are code": (sharded({"a": "pytorch_model.bin"}), "names 'pytorch_model.bin'"),
    "weights that are not there": (sharded({"a": "model-1.safetensors"}), "model-1.safetensors"),
    "an index without weights": (sharded({}), "has no weight_map"),
    "no tokenizer": (without("tokenizer.json"), "tokenizer"),
    "empty tokenizer": (content("tokenizer.json", ""), "tokenizer"),
    "a tokenizer that is a list": (content("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer settings that are a list": (content("tokenizer_config.json", "[]"), "tokenizer"),
    "a tokenizer elsewhere": (settings("tokenizer_config.json", vocab_file="/etc/passwd"), "'/etc/passwd'"),
    "a template in another encoding": (content("chat_template.jinja", b"\xff\xfe"), "utf-8"),
    "generation settings that are a list": (content("generation_config.json", "[1]"), ""),
}


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(TINY / "dlm", tmp_path / "checkpoint")


@pytest.fixture
def refusal(capsys):
    """`refusal(words)`: the one line that answers a command."""

    def refusal(*words):
        assert main(list(map(str, words))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("flashdlm: ") and captured.err.count("\n") == 1
        return captured.err

    return refusal


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_broken_checkpoint_is_neither_decoded_nor_exported(name, checkpoint, tmp_path, refusal):
    damage, words = DAMAGE[name]
    damage(checkpoint)
    before = time.process_time()
    assert words in refusal("generate", "--model", checkpoint, "--prompt", "x", "--max-new-tokens", 2)
    refusal("export", "model", "a/b", tmp_path / "out", "--checkpoint", checkpoint)
    assert not (tmp_path / "out").exists()
    assert time.process_time() - before < 60


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="nothing bounds time")
def test_a_configuration_is_read_in_bounded_time(checkpoint, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr("hf_flashdlm.hub.loading.SECONDS", 1)
    settings(CONFIG, num_hidden_layers=10**9)(checkpoint)
    assert "it takes more than 1 seconds" in refusal("generate", "--model", checkpoint, "--prompt", "x")
    assert "it takes more than 1 seconds" in refusal(
        "export", "model", "a/b", tmp_path / "out", "--checkpoint", checkpoint
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 9}, {"vocab_size": 10**12}, {"hidden_size": "x"}]
)
def test_nor_is_a_broken_guider(change, tmp_path, refusal):
    guider = shutil.copytree(TINY / "guider", tmp_path / "guider")
    settings(CONFIG, **change)(guider)
    said = refusal("generate", "--model", TINY / "dlm", "--guider", guider, "--prompt", "x", "--max-new-tokens", 2)
    assert "`--guider`" in said
    assert "`checkpoint`" in refusal("export", "guider", "a/b", tmp_path / "out", "--checkpoint", guider)
    assert not (tmp_path / "out").exists()


TEMPLATES = {
    "{% for %}": "Expected an expression",
    "{{ raise_exception('no') }}": "no",
    "{{ a.b.c }}": "'a' is undefined",
    "{{ (1).__class__.__mro__ }}": "unsafe",
    "{{ ''.__class__ }}": "it writes nothing",
    "{% include '/etc/passwd' %}": "no loader",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "it never ends",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{{ 'x' * 10**8 }}": "it writes 100000000 characters",
}
if sys.platform == "linux":  # where memory is bounded
    TEMPLATES |= {
        "{{ 'x' * 10**12 }}": "it takes too much memory",
        "{{ 'x'.ljust(10**12) }}": "it takes too much memory",
        "{% set n = namespace(x='xx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}": "memory",
    }


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_cannot_be_filled_in_is_one_sentence(template, checkpoint, refusal):
    (checkpoint / "chat_template.jinja").write_text(template)
    said = refusal("generate", "--model", checkpoint, "--prompt", "x", "--max-new-tokens", 2)
    assert "the chat template of" in said and TEMPLATES[template] in said


def test_a_chat_ends_with_a_template_that_refuses_the_first_question(checkpoint, monkeypatch, capsys):
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('a\x1b[2J') }}")
    monkeypatch.setattr("builtins.input", lambda prompt: "Hello")
    assert main(["chat", "--model", str(checkpoint), "--max-new-tokens", "2"]) == 2
    said = capsys.readouterr().err
    assert "cannot be filled in: a\\x1b[2J" in said and "\x1b[2J" not in said


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="nothing bounds time")
def test_time_is_bounded_also_where_errors_are_swallowed():
    with pytest.raises(LimitReached, match="it takes more than 0.2 seconds"):
        with bounded(seconds=0.2):
            while True:
                try:
                    while True:
                        pass
                except LimitReached:
                    break  # as Jinja does while it compiles
            while True:
                pass


@pytest.mark.skipif(sys.platform != "linux", reason="nothing bounds memory")
def test_memory_is_bounded_inside_the_block_alone():
    with pytest.raises(MemoryError), bounded(memory=2**28):
        bytearray(2**31)
    assert len(bytearray(2**29)) == 2**29


def test_weights_beyond_a_model_of_another_kind_are_left_alone(checkpoint):
    weights(lambda tensors: tensors.update({"vision_tower.weight": tensors["lm_head.weight"].clone()}))(checkpoint)
    config = load_config("--model", str(checkpoint))
    assert load_weights("--model", str(checkpoint), config, None).get_parameter("lm_head.weight").shape == (512, 128)


def test_weights_are_checked_without_memory_for_them(checkpoint):
    config = load_config("--model", str(checkpoint))
    assert {weight.device.type for weight in load_weights("--model", str(checkpoint), config).parameters()} == {"meta"}


def test_shards_have_names_beside_their_index(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}))
    assert shard_names(index) == ["m-1.safetensors", "m-2.safetensors"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("a"), "KeyError 'a'"),
        (RuntimeError("first\nsecond"), "first"),
        (RuntimeError("of `hidden_size`:\n  an integer"), "of `hidden_size`: an integer"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "it takes too much memory."),
        (RecursionError("maximum"), "it never ends."),
    ],
)
def test_what_a_library_says_becomes_the_end_of_a_sentence(error, said):
    with pytest.raises(ValueError) as refused, refusing("`--model` is broken"):
        raise error
    assert str(refused.value) == f"`--model` is broken: {said}"


def test_what_breaks_while_decoding_is_one_line_that_says_how_to_see_more(checkpoint, refusal):
    settings(CONFIG, logits_shift="x")(checkpoint)
    said = refusal("generate", "--model", checkpoint, "--prompt", "x", "--max-new-tokens", 2)
    assert "flashdlm: TypeError: " in said and "(`python -X dev -m hf_flashdlm` shows where it arose)" in said


@pytest.mark.parametrize("json_path", ["/no/such/folder/a.json", "a\0b", "x" * 5000])
@pytest.mark.parametrize("command", [["demo"], ["bench", "--config", "tiny"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(json_path, command, refusal):
    assert "`--json` must be" in refusal(*command, "--json", json_path)


def test_an_output_that_nobody_reads_any_more_ends_quietly(monkeypatch, capsys):
    def closed(*_):
        raise BrokenPipeError

    seen = []
    monkeypatch.setattr("hf_flashdlm.bench.demo.run_demo", closed)
    monkeypatch.setattr("os.dup2", lambda *both: seen.append(both))
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert main(["demo"]) == 141
    assert len(seen) == 1 and capsys.readouterr().err == ""
