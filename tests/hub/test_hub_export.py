"""The files of a repository of each kind, its card, and what cannot be exported."""

import json
import re
import shutil

import pytest
import transformers
from hub_cases import CODE, GOLDENS, GUIDER, LLADA, MODEL, PACKAGE, ROOT, STRATEGY, TINY, usage
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import check_python_requirements

from hf_flashdlm import DreamConfig, LavidaDreamConfig, LLaDAConfig, LLaDAMoEConfig, SDARConfig
from hf_flashdlm.generation_config import (
    DEFAULT_BLOCK_LENGTH,
    DEFAULT_CONFIDENCE_THRESHOLD,
    WINDOW_POLICIES,
    DiffusionOptions,
)
from hf_flashdlm.hub.export import (
    REQUIREMENTS,
    _card_of,
    _save_card,
    export_code,
    export_guider,
    export_model,
    export_strategy,
)


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# What is in a repository


def test_the_source_files_are_those_of_the_package_byte_for_byte(exported):
    seen = set()
    for folder in exported.values():
        for path in folder.rglob("*.py"):
            assert path.read_bytes() == (PACKAGE / path.name).read_bytes()
            seen.add(path.name)
    assert {"generate.py", "generation_mixin.py", "denoising_loop.py"} <= seen
    assert {"modeling_llada.py", "modeling_dream.py"} <= seen
    assert not seen & {"export.py", "main.py", "__init__.py"}


def test_the_pages_of_the_package_stay_in_it(exported):
    for folder in exported.values():
        assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.md")] == ["README.md"]


def test_weights_names_and_options_are_kept(exported):
    for repo_id, source in ((MODEL, TINY / "dlm"), (GUIDER, TINY / "guider"), (LLADA, GOLDENS / "model_llada")):
        assert (exported[repo_id] / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    config = json.loads((exported[MODEL] / "config.json").read_text())
    model = "modeling_dream.DreamModel"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
    }
    in_place = json.loads((exported[LLADA] / "config.json").read_text())["auto_map"]
    assert in_place["AutoModelForMaskedLM"] == "modeling_llada.LLaDAModelLM"
    assert hasattr(transformers, config["architectures"][0])  # otherwise `transformers serve` cannot load it
    options = json.loads((exported[MODEL] / "generation_config.json").read_text())
    assert (options["block_length"], options["max_new_tokens"], options["do_sample"]) == (8, 64, False)
    code = json.loads((exported[CODE] / "config.json").read_text())
    assert all(value.startswith(f"{CODE}--") for value in code["auto_map"].values())
    assert not list(exported[CODE].glob("*.safetensors"))


def test_options_survive_a_config_that_transformers_derived(tmp_path):
    source = shutil.copytree(TINY / "dlm", tmp_path / "source")
    derived = {"_from_model_config": True, "block_length": 4, "eos_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(derived))
    folder = export_model(str(source), tmp_path / "out", "o/n")
    options = GenerationConfig.from_pretrained(folder)
    assert (options.block_length, options.mask_token_id, options.do_sample) == (4, 1, False)


def test_shards_are_kept(tmp_path):
    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(TINY / "dlm").save_pretrained(source, max_shard_size="1MB")
    AutoTokenizer.from_pretrained(TINY / "dlm").save_pretrained(source)
    folder = export_model(str(source), tmp_path / "out", "o/n")
    names = sorted(path.name for path in source.glob("model*"))
    assert len(names) > 2
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    (source / names[0]).unlink()
    with pytest.raises(ValueError, match=f"has no {names[0]}"):
        export_model(str(source), tmp_path / "other", "o/n")


def test_the_tokenizer_of_dream_is_saved_as_qwen2s(tmp_path):
    source = shutil.copytree(TINY / "dlm", tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    saved = json.loads((export_model(str(source), tmp_path / "out", "o/n") / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"].startswith("Qwen2Tokenizer")
    assert "auto_map" not in saved and saved["padding_side"] == "left"


def test_transformers_reads_the_requirements(exported, monkeypatch):
    check_python_requirements(exported[STRATEGY], "custom_generate/requirements.txt")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.metadata.version", lambda name: {"torch": "2.6", "transformers": "5.17.0"}[name])
        with pytest.raises(ImportError, match=r"transformers>=5.18 \(installed: 5.17.0\)"):
            check_python_requirements(exported[STRATEGY], "custom_generate/requirements.txt")
    stated = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for requirement in REQUIREMENTS:
        assert f'"{requirement}"' in stated


# Cards


CARDS = sorted(path.stem for path in (ROOT / "model_cards").glob("[!_R]*.md"))


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_valid(card, tmp_path):
    values = {"code": {"model_type": "Dream"}, "sdar": {"method": "sdar"}}
    _save_card(tmp_path, card, "o/n", None, **values.get(card, {}))
    content = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(content).data
    assert isinstance(data, ModelCardData)
    fields = data.to_dict()
    task = "image-text-to-text" if card == "lavida" else "text-generation"
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", task)
    assert set(fields) <= {"library_name", "pipeline_tag", "license", "language", "base_model", "tags"}
    assert ("custom_generate" in fields["tags"]) == (card == "strategy")
    assert ("custom_code" in fields["tags"]) == (card not in ("strategy", "guider", "tiny-guider"))
    papers = {tag.removeprefix("arxiv:") for tag in fields["tags"] if tag.startswith("arxiv:")}
    assert papers <= set(re.findall(r"arxiv\.org/abs/([\d.]+)", content)) and "2505.21467" in papers
    for word in ("## Usage", "rguments", "utputs", "imits"):
        assert word in content
    assert "{{" not in content and "\n\n\n" not in content
    compile(usage(content), card, "exec")


def test_cards_of_checkpoints_are_found_by_their_names_and_families(tmp_path):
    assert _card_of("GSAI-ML/LLaDA-1.5", LLaDAConfig()) == "llada-1.5"
    assert _card_of("Dream-org/Dream-v0-Instruct-7B/", DreamConfig()) == "dream-v0-instruct-7b"
    assert _card_of("o/unheard-of", DreamConfig()) == "model"
    assert _card_of("o/unheard-of", SDARConfig()) == "sdar"
    assert _card_of("o/unheard-of", LLaDAMoEConfig()) == "llada-moe"
    assert _card_of("o/unheard-of", LavidaDreamConfig()) == "lavida"
    for checkpoint, kind, license in (
        ("GSAI-ML/LLaDA-8B-Instruct", LLaDAConfig, "mit"),
        ("Dream-org/Dream-v0-Instruct-7B", DreamConfig, "apache-2.0"),
    ):
        _save_card(tmp_path, _card_of(checkpoint, kind()), "o/n", checkpoint)
        data = ModelCard.load(tmp_path / "README.md").data
        assert (data.license, data.base_model) == (license, [checkpoint])


def test_numbers_of_cards_come_from_the_results(exported):
    results = json.loads((TINY / "results.json").read_text())
    card = (exported[MODEL] / "README.md").read_text()
    for score in (value for name, value in results["scores"].items() if name != "guider alone"):
        assert f"| {score['exact_match']} | {score['nfe']} |" in card
    assert f"{results['parameters']['dlm']:,} parameters" in card


def test_defaults_of_cards_are_those_of_the_options(exported):
    card = (exported[STRATEGY] / "README.md").read_text()
    options = DiffusionOptions()
    for name, value in (
        ("confidence_threshold", DEFAULT_CONFIDENCE_THRESHOLD),
        ("block_length", DEFAULT_BLOCK_LENGTH),
        ("window_policy", f'`"{options.window_policy}"`'),
        ("steps", str(options.steps).lower()),
    ):
        assert f"| `{name}` | {value} |" in card
    for name in WINDOW_POLICIES:
        assert f'`"{name}"`' in card


# Exports that are refused


@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(TINY / "dlm", tmp_path / "checkpoint")


def test_checkpoints_that_do_not_fit_are_refused(checkpoint, minihub, tmp_path):
    def refused(match, function, *args):
        with pytest.raises(ValueError, match=match):
            function(*args)
        assert not (tmp_path / "out").exists()

    def export(path, *more):
        return (export_model, str(path), tmp_path / "out", "o/n", *more)

    refused(
        "`checkpoint` must be a diffusion model, got .*guider' with `model_type` 'llama'", *export(TINY / "guider")
    )
    refused(
        "must be a folder or a repository that can be downloaded, got 'o/absent' \\(Repo.*Error\\)",
        *export("o/absent"),
    )
    refused("must be an autoregressive model", export_guider, str(checkpoint), tmp_path / "out", "o/n")
    refused("`model_type` must be one of llada, .*, llada_v, got 'gpt2'", export_code, "gpt2", tmp_path / "out", "o/n")
    refused("must be of type 'llada', got 'Dream'", export_code, "llada", tmp_path / "out", "o/n", str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, checkpoint / "model.safetensors")
    refused("must have all weights of DreamModel, but .* lacks 1 of them, lm_head.weight first", *export(checkpoint))
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused("must have its weights as safetensors, but .* has no model.safetensors", *export(checkpoint))
    shutil.copyfile(TINY / "dlm" / "model.safetensors", checkpoint / "model.safetensors")
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    of_its_own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"auto_map": of_its_own}))
    refused("`checkpoint` must have a tokenizer, got .*: ", *export(checkpoint))
    for name in ("vocab.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    refused("must have a tokenizer, which .* has not", *export(checkpoint))
    (checkpoint / "config.json").unlink()
    refused("must have a config.json, which .* has not", *export(checkpoint))


def test_folders_and_cards_that_do_not_fit_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="`directory` must be new or empty"):
        export_strategy(checkpoint, "o/n")
    with pytest.raises(ValueError, match="`directory` must be new or empty"):
        export_strategy(checkpoint / "config.json", "o/n")
    with pytest.raises(ValueError, match="`card` must be one of a2d, .*, tiny-guider, got 'none'"):
        export_model(str(checkpoint), tmp_path / "out", "o/n", "none")
