"""Export, push to a Hub on loopback, and loading from it in processes where the package cannot be imported."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, constants, snapshot_download
from minihub import TOKEN, MiniHub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.dynamic_module_utils import check_python_requirements

import hf_flashdlm
from hf_flashdlm import __version__, diffusion_generate, make_bidirectional
from hf_flashdlm.cli import main as cli
from hf_flashdlm.generate import decode, generate
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
from hf_flashdlm.hub.push import list_files, push


# The client's own, where it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_flashdlm.__file__).parent
TINY = PACKAGE / "tiny"
GOLDENS = Path(__file__).parent / "goldens"

MODEL, GUIDER = "hf-flashdlm/tiny-dlm", "hf-flashdlm/tiny-guider"
CODE, STRATEGY, LLADA = "hf-flashdlm/flash-dream", "hf-flashdlm/flashdlm", "hf-flashdlm/tiny-llada"

# What the cards name; here the tiny pair stands in for them.
STAND_INS = {
    "Dream-org/Dream-v0-Instruct-7B": "dlm",
    "Qwen/Qwen2.5-1.5B-Instruct": "guider",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "guider",
}

QUESTIONS = [json.loads(line)["question"] for line in (TINY / "problems.jsonl").read_text().splitlines()[:3]]

# Makes the package's absence certain, also where it is installed.
APART = """
import sys
sys.modules["hf_flashdlm"] = None
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, pipeline
from transformers import LlamaForCausalLM, TextIteratorStreamer
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of each kind of repository."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(GOLDENS / "model_llada", folder / "llada")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / "dlm" / name, folder / "llada" / name)
    return {
        MODEL: export_model(str(TINY / "dlm"), folder / "dlm", MODEL, "tiny-dlm"),
        GUIDER: export_guider(str(TINY / "guider"), folder / "guider", GUIDER, "tiny-guider"),
        CODE: export_code("Dream", folder / "code", CODE, str(TINY / "dlm")),
        STRATEGY: export_strategy(folder / "strategy", STRATEGY),
        LLADA: export_model(str(folder / "llada"), folder / "llada_out", LLADA),
    }


@pytest.fixture(scope="module")
def minihub(tmp_path_factory):
    with MiniHub() as minihub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", minihub.url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", minihub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub_cache")))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that this Hub does not speak
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr("hf_flashdlm.hub.push.get_token", lambda: None)
        yield minihub


@pytest.fixture(scope="module")
def published(exported, minihub):
    """The Hub with a repository of each kind, and the ones that stand in."""
    for repo_id, folder in exported.items():
        push(folder, repo_id, token=TOKEN)
    for repo_id, name in STAND_INS.items():
        minihub.create(repo_id).commit({path.name: path.read_bytes() for path in (TINY / name).iterdir()})
    return minihub


@pytest.fixture(scope="module")
def run_apart(published, tmp_path_factory):
    """`run_apart(script)`: the last line that it prints in a new process without the package, read as JSON."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": published.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}

    def run_apart(script):
        result = subprocess.run(
            [sys.executable, "-I", "-c", script],
            cwd=home,
            env=environment | settings | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run_apart


@pytest.fixture(scope="module")
def batch():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "dlm")
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def guider():
    return AutoModelForCausalLM.from_pretrained(TINY / "guider")


@pytest.fixture(scope="module")
def expected(batch, guider):
    """What the package decodes."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "dlm")
    return model.generate(**batch, guider=guider, return_dict_in_generate=True)


@pytest.fixture(scope="module")
def foreign():
    """Dream's weights in Transformers' own Qwen2."""
    model = Qwen2ForCausalLM.from_pretrained(TINY / "dlm")
    model.config.logits_shift = 1
    return make_bidirectional(model)


def summary(output):
    return {"kind": type(output).__name__, "nfe": output.nfe.tolist(), "sequences": output.sequences.tolist()}


SUMMARY = """
def summary(output):
    return {"kind": type(output).__name__, "nfe": output.nfe.tolist(), "sequences": output.sequences.tolist()}
"""


def usage(card):
    """The code of a card."""
    return "".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))


# Loading without the package


def test_a_model_repository_decodes_a_batch_in_a_pipeline_as_the_package_does(run_apart, exported, batch, expected):
    answers = run_apart(f"""{APART}{SUMMARY}
{usage((exported[MODEL] / "README.md").read_text())}
try:
    AutoModelForCausalLM.from_pretrained("{MODEL}", trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
generator = pipeline("text-generation", "{MODEL}", revision="{__version__}", trust_remote_code=True)
guider = AutoModelForCausalLM.from_pretrained("{GUIDER}", revision="{__version__}")
chats = [[dict(role="user", content=question)] for question in {QUESTIONS!r}]
answers = generator(chats, batch_size=3, guider=guider, return_tensors=True)
streamer = TextIteratorStreamer(generator.tokenizer, skip_prompt=True, skip_special_tokens=True)
whole = generator(chats[0], guider=guider, streamer=streamer, return_full_text=False)
batch = {{name: torch.tensor(ids) for name, ids in { ({k: v.tolist() for k, v in batch.items()})!r}.items()}}
llada = AutoModelForCausalLM.from_pretrained("{LLADA}", revision="{__version__}", trust_remote_code=True)
print(json.dumps({{
    "refusal": refusal,
    "module": type(generator.model).__module__,
    "pipeline": [answer[0]["generated_token_ids"] for answer in answers],
    "streamed": ["".join(streamer), whole[0]["generated_text"]],
    "generate": summary(generator.model.generate(**batch, guider=guider, return_dict_in_generate=True)),
    "llada": summary(llada.generate(torch.arange(20, 28)[None], max_new_tokens=12, return_dict_in_generate=True)),
}}))
""")
    assert "trust_remote_code=True" in answers["refusal"]
    assert answers["module"].startswith("transformers_modules.")
    assert answers["pipeline"] == expected.sequences.tolist()
    streamed, whole = answers["streamed"]
    assert streamed.strip() == whole.strip() != ""
    assert answers["generate"] == summary(expected)
    llada = AutoModelForCausalLM.from_pretrained(exported[LLADA])
    output = llada.generate(torch.arange(20, 28)[None], max_new_tokens=12, return_dict_in_generate=True)
    assert answers["llada"] == summary(output)


def test_a_code_repository_runs_weights_of_another_one(run_apart, exported, batch, expected):
    answers = run_apart(f"""{APART}{SUMMARY}
{usage((exported[CODE] / "README.md").read_text())}
guider = AutoModelForCausalLM.from_pretrained("{GUIDER}")
batch = {{name: torch.tensor(ids) for name, ids in { ({k: v.tolist() for k, v in batch.items()})!r}.items()}}
config = AutoConfig.from_pretrained("{CODE}", revision="{__version__}", trust_remote_code=True)
options = dict(config=config, code_revision="{__version__}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("Dream-org/Dream-v0-Instruct-7B", **options)
print(json.dumps(summary(model.generate(**batch, guider=guider, return_dict_in_generate=True))))
""")
    assert answers == summary(expected)


def test_a_strategy_repository_decodes_with_foreign_classes(run_apart, exported, batch, guider, expected):
    answers = run_apart(f"""{APART}{SUMMARY}
{usage((exported[GUIDER] / "README.md").read_text())}
{usage((exported[STRATEGY] / "README.md").read_text())}
batch = {{name: torch.tensor(ids) for name, ids in { ({k: v.tolist() for k, v in batch.items()})!r}.items()}}
options = dict(custom_generate="{STRATEGY}", guider=guider, return_dict_in_generate=True)
try:
    model.generate(**batch, **options, trust_remote_code=False)
except ValueError as error:
    refusal = str(error)
options |= dict(revision="{__version__}", trust_remote_code=True)
by_keyword = model.generate(**batch, **options)
by_position = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
llama = LlamaForCausalLM.from_pretrained("{GUIDER}")
llama.config.is_causal, llama.config.mask_token_id = False, 1
for layer in llama.model.layers:
    layer.self_attn.is_causal = False
of_llama = llama.generate(**batch, **options, max_new_tokens=16)
print(json.dumps(dict(refusal=refusal, answers=list(map(summary, (by_keyword, by_position, of_llama))))))
""")
    assert "trust_remote_code=True" in answers["refusal"]
    # An autoregressive model that sees everything talks nonsense, but the same here and there.
    llama = make_bidirectional(LlamaForCausalLM.from_pretrained(TINY / "guider"))
    llama.config.mask_token_id = 1
    options = {"guider": guider, "max_new_tokens": 16, "return_dict_in_generate": True}
    assert answers["answers"] == [summary(expected)] * 2 + [summary(diffusion_generate(llama, **batch, **options))]


def test_an_old_transformers_is_named_by_every_repository(run_apart):
    answers = run_apart(f"""{APART}
from importlib import metadata
installed = metadata.version
metadata.version = lambda name: "5.17.0" if name == "transformers" else installed(name)
def refusal(load):
    try:
        load()
    except ImportError as error:
        return str(error)
repo = dict(revision="{__version__}", trust_remote_code=True)
qwen2 = Qwen2ForCausalLM.from_pretrained("{MODEL}")
print(json.dumps([
    refusal(lambda: AutoModelForCausalLM.from_pretrained("{MODEL}", **repo)),
    refusal(lambda: AutoModelForCausalLM.from_pretrained("{LLADA}", **repo)),
    refusal(lambda: AutoConfig.from_pretrained("{CODE}", **repo)),
    refusal(lambda: qwen2.generate(max_new_tokens=4, custom_generate="{STRATEGY}", **repo)),
]))
""")
    *codes, strategy = answers
    assert "transformers>=5.18 (installed: 5.17.0)" in strategy
    for code in codes:
        assert code.startswith("transformers>=5.18 is required for a normal functioning of this module, but found")
        assert code.endswith("==5.17.0.\nhf_flashdlm needs it: `pip install -U transformers`.")


# The checkpoints that have a card of their own, and what stands in for their weights.
CHECKPOINTS = {
    "GSAI-ML/LLaDA-8B-Instruct": LLADA,
    "GSAI-ML/LLaDA-1.5": LLADA,
    "Dream-org/Dream-v0-Instruct-7B": MODEL,
    "apple/DiffuCoder-7B-Instruct": MODEL,
    "o/unheard-of": MODEL,
    "o/base": MODEL,
}


@pytest.fixture(scope="module")
def originals(published, exported):
    """The Hub with those checkpoints, as their authors might have published them."""
    for checkpoint, weights in CHECKPOINTS.items():
        if checkpoint not in published.repositories:
            files = {path.name: path.read_bytes() for path in exported[weights].iterdir() if path.suffix != ".py"}
            if checkpoint == "o/base":
                del files["chat_template.jinja"]
            published.create(checkpoint).commit(files)
    return published


def test_checkpoints_of_the_hub_are_exported_and_their_cards_run(run_apart, originals, exported, tmp_path):
    code = APART
    for checkpoint, weights in CHECKPOINTS.items():
        name = checkpoint.partition("/")[2]
        repo_id = f"o/flash-{name}"
        folder = export_model(checkpoint, tmp_path / name, repo_id)
        for original in exported[weights].glob("*.safetensors"):
            assert (folder / original.name).read_bytes() == original.read_bytes()
        push(folder, repo_id, token=TOKEN)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert ModelCard(card).data.base_model == [checkpoint]
        assert repo_id in usage(card)
        assert ("apply_chat_template" in usage(card)) == (checkpoint != "o/base")
        code += usage(card) + "assert output.nfe > 0\n"
    assert run_apart(code + "print('[]')") == []


README = (ROOT / "README.md").read_text(encoding="utf-8")


SECTION = README.partition("## On the Hub\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("installed", [False, True])
def test_the_section_of_the_readme_runs_as_written(run_apart, installed):
    blocks = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    blocks = [block for block in blocks if ("hf_flashdlm" in block) == installed]
    assert blocks
    path = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" if installed else APART
    assert run_apart(path + "".join(blocks) + "\nprint('[]')") == []


def test_the_commands_of_the_readme_run_as_written(originals, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_flashdlm.hub.push.get_token", lambda: TOKEN)
    commands = [shlex.split(line, comments=True)[1:] for line in SECTION.splitlines() if line.startswith("flashdlm ")]
    assert [words[0] for words in commands] == ["export", "push"]
    for words in commands:
        assert cli.main(words) == 0
    listed = capsys.readouterr().out
    assert listed.count("  model.safetensors\n") == 2 and "my-org/flash-llada" not in originals.repositories
    assert cli.main([word for word in commands[-1] if word != "--dry-run"]) == 0
    assert originals.repositories["my-org/flash-llada"].private


# The forms of `custom_generate`, in this process


def test_generate_takes_positions_keywords_and_what_the_host_adds(foreign, batch, guider, expected):
    added = {"revision": "0.1.0", "token": None, "cache_dir": "x", "trust_remote_code": True, "synced_gpus": None}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    config = GenerationConfig(**foreign.generation_config.to_dict())
    config.return_dict_in_generate = True
    for output in (
        generate(model=foreign, **batch, guider=guider, return_dict_in_generate=True, **added),
        generate(ids, config, model=foreign, attention_mask=mask, guider=guider),
        generate(inputs=ids, generation_config=config, model=foreign, attention_mask=mask, guider=guider),
    ):
        assert summary(output) == summary(expected)
        assert not output.sequences.requires_grad


def test_the_callable_form_gives_the_same(foreign, batch, guider, expected):
    options = {"custom_generate": decode, "guider": guider, "return_dict_in_generate": True}
    assert summary(foreign.generate(**batch, **options)) == summary(expected)
    assert summary(foreign.generate(**batch, **options, block_length=8)) == summary(expected)
    assert summary(foreign.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)) == summary(
        expected
    )
    with pytest.raises(ValueError, match="blok_length"):
        foreign.generate(**batch, **options, blok_length=8)


def test_a_model_of_a_strategy_repository_decodes_with_it(exported, batch, guider, expected, tmp_path):
    folder = shutil.copytree(TINY / "dlm", tmp_path / "with_strategy")
    shutil.copytree(exported[STRATEGY] / "custom_generate", folder / "custom_generate")
    model = Qwen2ForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.config.logits_shift = 1
    make_bidirectional(model)
    assert model.generate.func.__module__.startswith("transformers_modules.")
    output = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], guider=guider, return_dict_in_generate=True
    )
    assert summary(output) == summary(expected)
    # Another strategy takes precedence.
    assert summary(model.generate(**batch, guider=guider, return_dict_in_generate=True, custom_generate=decode)) == (
        summary(expected)
    )


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


def test_weights_names_and_options_are_kept(exported):
    for repo_id, source in ((MODEL, TINY / "dlm"), (GUIDER, TINY / "guider"), (LLADA, GOLDENS / "model_llada")):
        assert (exported[repo_id] / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    config = json.loads((exported[MODEL] / "config.json").read_text())
    model = "modeling_dream.DreamModel"
    assert config["auto_map"] == {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        "AutoModelForMaskedLM": model,
    }
    assert hasattr(transformers, config["architectures"][0])  # or `transformers serve` cannot load it
    options = json.loads((exported[MODEL] / "generation_config.json").read_text())
    assert (options["block_length"], options["max_new_tokens"], options["do_sample"]) == (8, 64, False)
    code = json.loads((exported[CODE] / "config.json").read_text())
    assert all(value.startswith(f"{CODE}--") for value in code["auto_map"].values())
    assert not list(exported[CODE].glob("*.safetensors"))


def test_options_survive_a_config_that_the_host_derived(tmp_path):
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


def test_the_host_reads_the_requirements(exported, monkeypatch):
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
    _save_card(tmp_path, card, "o/n", None, **({"model_type": "Dream"} if card == "code" else {}))
    content = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(content).data
    assert isinstance(data, ModelCardData)
    fields = data.to_dict()
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text-generation")
    assert set(fields) <= {"library_name", "pipeline_tag", "license", "language", "base_model", "tags"}
    assert ("custom_generate" in fields["tags"]) == (card == "strategy")
    assert ("custom_code" in fields["tags"]) == (card not in ("strategy", "guider", "tiny-guider"))
    papers = {tag.removeprefix("arxiv:") for tag in fields["tags"] if tag.startswith("arxiv:")}
    assert papers <= set(re.findall(r"arxiv\.org/abs/([\d.]+)", content)) and "2505.21467" in papers
    for word in ("## Usage", "rguments", "utputs", "imits"):
        assert word in content
    assert "{{" not in content and "\n\n\n" not in content
    compile(usage(content), card, "exec")


def test_cards_of_checkpoints_are_found_by_their_names(tmp_path):
    assert _card_of("GSAI-ML/LLaDA-1.5") == "llada-1.5"
    assert _card_of("Dream-org/Dream-v0-Instruct-7B/") == "dream-v0-instruct-7b"
    assert _card_of("o/unheard-of") == "model"
    for checkpoint, license in (
        ("GSAI-ML/LLaDA-8B-Instruct", "mit"),
        ("Dream-org/Dream-v0-Instruct-7B", "apache-2.0"),
    ):
        _save_card(tmp_path, _card_of(checkpoint), "o/n", checkpoint)
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


# Pushing


def test_a_push_is_one_commit_with_a_tag(published, exported):
    for repo_id, folder in exported.items():
        repository = published.repositories[repo_id]
        assert len(repository.commits) == 2  # the one of the creation is empty
        assert repository.files(__version__) == {name: (folder / name).read_bytes() for name in list_files(folder)}


def test_what_is_downloaded_is_what_was_exported(published, exported):
    for repo_id, folder in exported.items():
        copy = Path(snapshot_download(repo_id, revision=__version__))
        files = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
        assert files == set(list_files(folder))
        assert all((copy / name).read_bytes() == (folder / name).read_bytes() for name in files)


def test_nothing_hidden_goes_up(exported, minihub, tmp_path):
    folder = shutil.copytree(exported[STRATEGY], tmp_path / "strategy")
    for name in (".env", ".git/config", "custom_generate/__pycache__/cache.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert list_files(folder) == list_files(exported[STRATEGY])
    push(folder, "o/hidden", private=True, token=TOKEN)
    assert set(minihub.repositories["o/hidden"].files()) == set(list_files(folder))
    assert minihub.repositories["o/hidden"].private


def test_a_repository_that_is_there_must_be_as_private_as_said(exported, published):
    for private, repo_id in ((True, STRATEGY), (False, "o/closed")):
        if repo_id not in published.repositories:
            published.create(repo_id, private=True)
        with pytest.raises(ValueError, match=f"`private` must agree with {repo_id}, which is there .*, got {private}"):
            push(exported[STRATEGY], repo_id, private, "v2", TOKEN)
        assert "v2" not in published.repositories[repo_id].tags
    push(exported[STRATEGY], "o/closed", True, "v2", TOKEN)


def test_a_token_is_needed_and_has_to_be_right(exported, minihub):
    with pytest.raises(ValueError, match="a token is needed to push and there is none: run `hf auth login`"):
        push(exported[STRATEGY], "o/token")
    with pytest.raises(
        ValueError, match=r"the Hub refused the token for o/token \(401 Invalid username or password.\): run"
    ):
        push(exported[STRATEGY], "o/token", token="hf_wrong")
    assert "o/token" not in minihub.repositories


@pytest.fixture
def impatient(monkeypatch):
    """The client tries several times by itself, here without waiting."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_an_interrupted_push_leaves_nothing_and_can_be_repeated(exported, minihub, impatient):
    minihub.broken.add("/api/models/o/broken/commit/main")
    with pytest.raises(ValueError, match=r"the upload to o/broken broke off .*: run the same command again"):
        push(exported[STRATEGY], "o/broken", token=TOKEN)
    repository = minihub.repositories["o/broken"]
    assert (repository.files(), repository.tags) == ({}, {})
    minihub.broken.clear()
    assert push(exported[STRATEGY], "o/broken", token=TOKEN).endswith(f"/o/broken/tree/{__version__}")
    assert set(repository.files(__version__)) == set(list_files(exported[STRATEGY]))


@pytest.fixture
def sharded(tmp_path):
    """A repository with several large files, whose content no other repository has."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "dlm")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    model.save_pretrained(tmp_path / "source", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(TINY / "dlm").save_pretrained(tmp_path / "source")
    return export_model(str(tmp_path / "source"), tmp_path / "sharded", "o/sharded")


def test_a_repeated_push_sends_only_what_the_hub_has_not(sharded, minihub, impatient):
    objects = {sha256(path.read_bytes()).hexdigest(): path for path in sorted(sharded.glob("*.safetensors"))}
    assert len(objects) > 2

    def sent_by(attempt):
        start = len(minihub.requests)
        attempt()
        return {line.rpartition("/")[2] for line in minihub.requests[start:] if line.startswith("PUT ")}

    def broken_off():
        with pytest.raises(ValueError, match=r"the upload to o/sharded broke off \(.*\): run the same command again"):
            push(sharded, "o/sharded", token=TOKEN)
        repository = minihub.repositories["o/sharded"]
        assert (repository.files(), repository.tags) == ({}, {})

    first = min(objects)
    minihub.broken = {f"/objects/{first}"}
    assert first in sent_by(broken_off)
    held = set(objects) & set(minihub.objects)
    assert held and first not in held
    minihub.broken = {"/api/models/o/sharded/commit/main"}
    assert sent_by(broken_off) == set(objects) - held
    minihub.broken = set()
    assert sent_by(lambda: push(sharded, "o/sharded", token=TOKEN)) == set()
    files = minihub.repositories["o/sharded"].files(__version__)
    assert files == {name: (sharded / name).read_bytes() for name in list_files(sharded)}


def test_nothing_of_an_earlier_version_is_loaded(sharded, exported, minihub):
    push(exported[MODEL], "o/grown", token=TOKEN, tag="v1")
    repository = minihub.repositories["o/grown"]
    before = repository.files() | {"picture.png": b"of the author", "old.py": b""}
    repository.commit(before)
    push(sharded, "o/grown", token=TOKEN, tag="v2")
    assert set(repository.files("v2")) == {*list_files(sharded), "picture.png"}
    assert "model.safetensors" in repository.files("v1")
    assert len(repository.commits) == 4


def test_a_push_that_broke_off_before_its_tag_is_completed(exported, minihub):
    push(exported[STRATEGY], "o/untagged", token=TOKEN)
    repository = minihub.repositories["o/untagged"]
    commits, repository.tags = dict(repository.commits), {}
    push(exported[STRATEGY], "o/untagged", token=TOKEN)
    assert repository.commits == commits and repository.tags == {__version__: repository.branches["main"]}


def test_a_tag_is_not_moved(exported, published):
    before = dict(published.repositories[STRATEGY].tags)
    with pytest.raises(ValueError, match=f"`tag` must be new, got '{__version__}', which {STRATEGY} has already"):
        push(exported[STRATEGY], STRATEGY, token=TOKEN)
    assert published.repositories[STRATEGY].tags == before
    push(exported[STRATEGY], STRATEGY, token=TOKEN, tag="later")
    assert published.repositories[STRATEGY].tags["later"] == before[__version__]


def test_a_hub_that_is_not_there_or_refuses_is_one_sentence(exported, minihub, monkeypatch):
    def attempt():
        push(exported[STRATEGY], "o/away", token=TOKEN)

    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="the Hub cannot be reached in offline mode: unset `HF_HUB_OFFLINE`"):
            attempt()
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ValueError, match="the upload to o/away broke off"):
            attempt()
    monkeypatch.setattr(constants, "ENDPOINT", minihub.url + "/nowhere")
    with pytest.raises(
        ValueError, match=r"the Hub refused the push to o/away \(404 EntryNotFound\): nothing was tagged"
    ):
        attempt()


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "o/na me", ""])
def test_a_repository_has_an_organization_and_a_name(repo_id, tmp_path):
    for call in (
        lambda: push(tmp_path, repo_id, token=TOKEN),
        lambda: export_strategy(tmp_path / "out", repo_id),
    ):
        with pytest.raises(ValueError, match="`repo_id` must have the form organization/name, got"):
            call()


@pytest.mark.parametrize(
    ("repo_id", "name"),
    [
        (MODEL, "README.md"),
        (MODEL, "config.json"),
        (MODEL, "model.safetensors"),
        (MODEL, "tokenizer_config.json"),
        (MODEL, "denoising_loop.py"),
        (CODE, "modeling_dream.py"),
        (GUIDER, "model.safetensors"),
        (STRATEGY, "custom_generate/generate.py"),
        (STRATEGY, "custom_generate/requirements.txt"),
        (STRATEGY, "custom_generate/cache.py"),
    ],
)
def test_an_incomplete_folder_is_not_pushed(exported, tmp_path, repo_id, name):
    folder = shutil.copytree(exported[repo_id], tmp_path / "folder")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        push(folder, "o/n", token=TOKEN)


def test_a_model_may_bring_a_strategy_of_its_own(exported, tmp_path):
    folder = shutil.copytree(exported[MODEL], tmp_path / "folder")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **kwargs):\n    pass\n")
    assert set(list_files(folder)) == {*list_files(exported[MODEL]), "custom_generate/generate.py"}
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        list_files(folder)


# Exporting what cannot be


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

    refused("`checkpoint` must be a diffusion model of type 'llada' or 'Dream', got 'llama'", *export(TINY / "guider"))
    refused(
        "must be a folder or a repository that can be downloaded, got 'o/absent' \\(Repo.*Error\\)",
        *export("o/absent"),
    )
    refused("must be an autoregressive model", export_guider, str(checkpoint), tmp_path / "out", "o/n")
    refused("`model_type` must be 'llada' or 'Dream', got 'gpt2'", export_code, "gpt2", tmp_path / "out", "o/n")
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
    with pytest.raises(ValueError, match="`card` must be one of code, .*, tiny-guider, got 'none'"):
        export_model(str(checkpoint), tmp_path / "out", "o/n", "none")


# The command line


@pytest.fixture
def run(capsys):
    """`run(words)`: what a command prints to standard output."""

    def run(*words):
        assert cli.main(list(map(str, words))) == 0
        return capsys.readouterr().out

    return run


def test_the_commands_export_and_list(run, minihub, tmp_path):
    written = run("export", "model", MODEL, tmp_path / "dlm", "--checkpoint", TINY / "dlm", "--card", "tiny-dlm")
    assert "2.7 MB  model.safetensors\n" in written and f"flashdlm push {tmp_path / 'dlm'} {MODEL}\n" in written
    run("export", "guider", GUIDER, tmp_path / "guider", "--checkpoint", TINY / "guider")
    run("export", "code", "o/flash-llada", tmp_path / "code", "--model-type", "llada")
    assert (tmp_path / "code" / "modeling_llada.py").is_file()
    run("export", "strategy", STRATEGY, tmp_path / "strategy")
    before = list(minihub.requests)
    listed = run("push", tmp_path / "strategy", STRATEGY, "--dry-run", "--private")
    files = list_files(tmp_path / "strategy")
    assert all(f"  {name}\n" in listed for name in files) and f"in {len(files)} files\n" in listed
    assert minihub.requests == before


def test_the_command_pushes(exported, minihub, run, monkeypatch):
    monkeypatch.setattr("hf_flashdlm.hub.push.get_token", lambda: TOKEN)
    printed = run("push", exported[STRATEGY], "o/command", "--private", "--tag", "v9")
    assert printed == f"{minihub.url}/o/command/tree/v9\n"
    assert minihub.repositories["o/command"].private and "v9" in minihub.repositories["o/command"].tags


def test_a_mistake_in_a_folder_is_one_sentence(exported, tmp_path, capsys):
    folder = shutil.copytree(exported[STRATEGY], tmp_path / "strategy")
    (folder / "README.md").unlink()
    assert cli.main(["push", str(folder), "no-organization", "--dry-run"]) == 2
    assert "`repo_id` must have the form organization/name" in capsys.readouterr().err
    assert cli.main(["push", str(folder), "o/n", "--dry-run"]) == 2
    refusal = f"flashdlm: `directory` must be a complete repository, but {str(folder)!r} has no README.md.\n"
    assert capsys.readouterr() == ("", refusal)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no `pty`")
def test_a_push_shows_its_progress_on_a_terminal(exported):
    import pty
    import termios

    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with MiniHub() as fresh:
        settings = {"HF_ENDPOINT": fresh.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
        command = [sys.executable, "-m", "hf_flashdlm", "push", str(exported[MODEL]), "o/seen"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment | settings, stdout=terminal, stderr=terminal)
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # the end of a terminal on Linux
            while read := os.read(screen, 1024):
                shown += read
        os.close(screen)
        assert process.wait(timeout=60) == 0, shown
    assert b"model.safetensors: 100%" in shown
    assert shown.decode().splitlines()[-1] == f"{fresh.url}/o/seen/tree/{__version__}"
