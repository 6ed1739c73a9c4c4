"""Loading a checkpoint and continuing prompts with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hf_flashdlm.console.checkpoint import MAX_NEW_TOKENS, Checkpoint, usual_block_length
from hf_flashdlm.tiny import FOLDER as TINY


QUESTION = "Adam has 3 coins. Nora gives Adam 4 more coins. How many coins does Adam have now?"
GOLDENS = Path(__file__).parent / "goldens"
SHORT = {"max_new_tokens": 16, "block_length": 8}


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.load(str(TINY / "dlm"), "cpu", "float32")


def partial_copy(tmp_path, *names):
    """A folder with some of the files of the embedded diffusion model."""
    for name in names:
        shutil.copy(TINY / "dlm" / name, tmp_path)
    return str(tmp_path)


def test_prompts_of_a_batch_are_continued_as_each_alone(checkpoint):
    prompts = [QUESTION, "Nora has 2 nuts."]
    together = checkpoint.continue_prompts(prompts, SHORT)
    alone = [checkpoint.continue_prompts([prompt], SHORT) for prompt in prompts]
    assert together.texts == [single.texts[0] for single in alone]
    assert together.lengths == [single.lengths[0] for single in alone]
    assert together.output.nfe.tolist() == [int(single.output.nfe) for single in alone]


def test_a_text_ends_with_its_first_end_token_even_if_the_canvas_is_filled(checkpoint):
    options = {"max_new_tokens": 64, "steps": 64, "window_policy": "none"}
    stopped = checkpoint.continue_prompts([QUESTION], options)
    filled = checkpoint.continue_prompts([QUESTION], options | {"stop_at_eos": False})
    assert stopped.texts == filled.texts
    assert stopped.lengths == filled.lengths
    assert int(filled.output.nfe) == 64 > int(stopped.output.nfe)


def test_the_chat_template_is_used_unless_refused(checkpoint):
    lengths = [checkpoint.encode([QUESTION], chat)["input_ids"].shape[1] for chat in (None, True, False)]
    assert lengths[0] == lengths[1] > lengths[2]


def test_temperature_decides_on_sampling(checkpoint):
    greedy = checkpoint.continue_prompts([QUESTION], SHORT).texts
    assert checkpoint.continue_prompts([QUESTION], SHORT | {"temperature": 0.0}).texts == greedy
    torch.manual_seed(0)
    drawn = [checkpoint.continue_prompts([QUESTION], SHORT | {"temperature": 3.0}).texts for _ in range(3)]
    assert any(texts != greedy for texts in drawn)


def test_a_checkpoint_without_a_length_gets_ours(checkpoint, monkeypatch):
    seen = {}

    def generate(**kwargs):
        seen.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.model, "generate", generate)
    monkeypatch.setattr(checkpoint.model.generation_config, "max_new_tokens", None)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.continue_prompts([QUESTION], {})
    assert seen["max_new_tokens"] == MAX_NEW_TOKENS


@pytest.mark.parametrize(("ids", "expected"), [(None, set()), (5, {5}), ([5, 6], {5, 6})])
def test_every_end_token_of_the_checkpoint_counts(checkpoint, monkeypatch, ids, expected):
    monkeypatch.setattr(checkpoint.model.generation_config, "eos_token_id", ids)
    assert checkpoint.end_token_ids == expected


def test_a_terminal_sees_masks_and_keeps_the_text(checkpoint, capsys):
    console = Console(force_terminal=True, width=200)
    continuation = checkpoint.stream(QUESTION, SHORT, None, console)
    printed = capsys.readouterr().out
    assert "░" in printed
    assert printed.endswith(f"{continuation.texts[0]}\n")


def test_a_file_gets_the_same_text_without_control_codes(checkpoint, capsys):
    continuation = checkpoint.stream(QUESTION, SHORT, None, Console())
    printed = capsys.readouterr().out
    assert printed.strip() == continuation.texts[0]
    assert "\x1b" not in printed and "░" not in printed


def test_a_guider_is_an_autoregressive_model(checkpoint):
    guider = checkpoint.load_guider(str(TINY / "guider"), "cpu", "float32")
    output = checkpoint.continue_prompts([QUESTION], SHORT | {"guider": guider}).output
    assert int(output.guider_forwards) == int(output.nfe) > 0


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    folder = partial_copy(tmp_path, "config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    settings = json.loads((TINY / "dlm" / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Checkpoint.load(folder, "cpu")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert len(loaded.continue_prompts(["a", "b c d"], SHORT, chat=False).texts) == 2
    with pytest.raises(
        ValueError, match="`--chat` needs a chat template, which the tokenizer does not have: drop it."
    ):
        loaded.encode(["a"], chat=True)


@pytest.mark.parametrize("option", ["--model", "--guider"])
@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "no-such-owner/no-such-repository"])
def test_a_name_that_leads_nowhere_is_refused(checkpoint, option, name):
    load = {"--model": Checkpoint.load, "--guider": checkpoint.load_guider}[option]
    with pytest.raises(
        ValueError, match=f"`{option}` must be a folder with a checkpoint or a Hub repository, got"
    ) as e:
        load(name)
    assert name in str(e.value)
    assert "\n" not in str(e.value)


def test_a_model_type_that_nobody_knows_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sdar3"}))
    with pytest.raises(ValueError) as error:
        Checkpoint.load(str(tmp_path))
    assert str(error.value) == (
        f"`--model` must have a `model_type` that Transformers or hf_flashdlm knows, got 'sdar3' in {str(tmp_path)!r}"
        ": load the model with its own code, and pass it to `diffusion_generate`."
    )


def test_an_autoregressive_model_is_no_diffusion_model():
    with pytest.raises(
        ValueError, match="`--model` must be a diffusion model, got .* with `model_type` 'llama': there"
    ):
        Checkpoint.load(str(TINY / "guider"))


def test_a_diffusion_model_or_a_translator_is_no_guider(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`--guider` must be an autoregressive language model, got type 'Dream'"):
        checkpoint.load_guider(str(TINY / "dlm"))
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="`--guider` must be an autoregressive language model, got type 't5'"):
        checkpoint.load_guider(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = partial_copy(tmp_path, "config.json")
    with pytest.raises(ValueError, match="`--model` could not be loaded from .*model.safetensors"):
        Checkpoint.load(folder)
    torch.save(load_file(TINY / "dlm" / "model.safetensors"), Path(folder) / "pytorch_model.bin")
    with pytest.raises(ValueError, match="`--model` could not be loaded from .*model.safetensors"):
        Checkpoint.load(folder)  # loading them would unpickle them


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    folder = partial_copy(tmp_path, "config.json", "generation_config.json", "model.safetensors")
    with pytest.raises(ValueError, match="`--model` must have a tokenizer, got .*: it has no vocabulary."):
        Checkpoint.load(folder)


def test_a_checkpoint_saved_without_its_tokenizer_is_refused():
    with pytest.raises(ValueError, match="`--model` must have a tokenizer, got .*model_llada': Couldn't instantiate"):
        Checkpoint.load(str(GOLDENS / "model_llada"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "abacus"}, "`--device` must be auto or a device that torch can use here, got 'abacus'"),
        ({"dtype": "float31"}, "`--dtype` must be auto or a dtype of torch, got 'float31'"),
    ],
)
def test_a_device_or_dtype_that_is_not_there_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint.load(str(TINY / "dlm"), **arguments)


def test_a_negative_temperature_is_refused(checkpoint):
    with pytest.raises(ValueError, match="`temperature` must not be negative, got -1"):
        checkpoint.continue_prompts([QUESTION], {"temperature": -1})


@pytest.mark.parametrize("max_new_tokens", [3, 12, 40])
@pytest.mark.parametrize(
    "name", ["model_llada", "families/block_ar/model_sdar", "families/block_ar/model_fast_dllm_v2"]
)
def test_the_usual_length_of_blocks_is_that_of_a_call_that_names_none(load, name, max_new_tokens):
    model = load(name)
    prompt, options = torch.tensor([[5, 6, 7]]), {"max_new_tokens": max_new_tokens, "mask_token_id": 4}
    options["return_dict_in_generate"] = True
    named = model.generate(prompt, **options, block_length=usual_block_length(model, max_new_tokens))
    unnamed = model.generate(prompt, **options)
    assert named.nfe == unnamed.nfe
    assert named.sequences.tolist() == unnamed.sequences.tolist()


def test_the_usual_length_of_blocks(load):
    assert usual_block_length(load("families/block_ar/model_sdar"), 100) == 4, "of its attention"
    assert usual_block_length(load("families/block_ar/model_fast_dllm_v2"), 100) == 8, "of the method it recommends"
    assert usual_block_length(Checkpoint.load(str(TINY / "dlm")).model, 100) == 8, "of its generation config"
    assert usual_block_length(load("model_llada"), 100) == 32
    assert usual_block_length(load("model_llada"), 20) == 20
