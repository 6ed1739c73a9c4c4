"""Repositories of each kind, a Hub on loopback that holds them, and processes that cannot import the package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from hub_cases import CODE, GOLDENS, GUIDER, LLADA, MODEL, QUESTIONS, STAND_INS, STRATEGY, TINY
from huggingface_hub import constants
from minihub import TOKEN, MiniHub
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from hf_flashdlm import diffusion_generate, make_bidirectional
from hf_flashdlm.hub.export import export_code, export_guider, export_model, export_strategy
from hf_flashdlm.hub.upload import push


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
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol that this Hub does not support
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr("hf_flashdlm.hub.upload.get_token", lambda: None)
        yield minihub


@pytest.fixture(scope="module")
def published(exported, minihub):
    """The Hub with a repository of each kind, and those that replace the repositories of the cards."""
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
    """The ids that the package decodes."""
    model = AutoModelForCausalLM.from_pretrained(TINY / "dlm")
    return model.generate(**batch, guider=guider, return_dict_in_generate=True)


@pytest.fixture(scope="module")
def foreign():
    """Dream's weights in Transformers' own Qwen2."""
    model = Qwen2ForCausalLM.from_pretrained(TINY / "dlm")
    model.config.logits_shift = 1
    return make_bidirectional(model)


@pytest.fixture(scope="module")
def expected_of_foreign(foreign, batch, guider, expected):
    """The ids that the package decodes with that class."""
    output = diffusion_generate(foreign, **batch, guider=guider, return_dict_in_generate=True)
    assert output.sequences.equal(expected.sequences)
    return output
