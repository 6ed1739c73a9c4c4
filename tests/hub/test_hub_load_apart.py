"""Repositories decode as the package does, in processes that cannot import the package and in this process."""

import shutil

import pytest
import torch
from hub_cases import APART, CODE, GUIDER, LLADA, MODEL, QUESTIONS, STRATEGY, SUMMARY, TINY, summary, usage
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, Qwen2ForCausalLM

from hf_flashdlm import __version__, diffusion_generate, make_bidirectional
from hf_flashdlm.generate import decode, generate


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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


def test_tokenizers_need_no_code_and_a_guider_is_loaded_without_a_question(run_apart):
    answers = run_apart(f"""{APART}
import builtins
asked = []
builtins.input = lambda text: asked.append(text) or "n"
model = AutoTokenizer.from_pretrained("{MODEL}", trust_remote_code=False)
AutoModelForCausalLM.from_pretrained("{GUIDER}")
guider = AutoTokenizer.from_pretrained("{GUIDER}")
print(json.dumps({{"asked": asked, "ids": [one("Ben has 5 pens.").input_ids for one in (model, guider)]}}))
""")
    known = [AutoTokenizer.from_pretrained(TINY / name)("Ben has 5 pens.").input_ids for name in ("dlm", "guider")]
    assert answers == {"asked": [], "ids": known}


def test_with_the_package_a_repository_is_loaded_without_a_question(exported, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    for name in (MODEL, LLADA, GUIDER):
        assert AutoTokenizer.from_pretrained(exported[name])("Ben has 5 pens.").input_ids
        assert AutoModelForCausalLM.from_pretrained(exported[name]).dtype


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


def test_a_strategy_repository_decodes_with_foreign_classes(run_apart, exported, batch, guider, expected_of_foreign):
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
    # An autoregressive model that sees everything writes nonsense, but the same nonsense with and without the package.
    llama = make_bidirectional(LlamaForCausalLM.from_pretrained(TINY / "guider"))
    llama.config.mask_token_id = 1
    options = {"guider": guider, "max_new_tokens": 16, "return_dict_in_generate": True}
    assert answers["answers"] == [summary(expected_of_foreign)] * 2 + [
        summary(diffusion_generate(llama, **batch, **options))
    ]


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


# The forms of `custom_generate`, in this process


def test_generate_takes_positions_keywords_and_what_transformers_adds(foreign, batch, guider, expected_of_foreign):
    added = {"revision": "0.1.0", "token": None, "cache_dir": "x", "trust_remote_code": True, "synced_gpus": None}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    config = GenerationConfig(**foreign.generation_config.to_dict())
    config.return_dict_in_generate = True
    for output in (
        generate(model=foreign, **batch, guider=guider, return_dict_in_generate=True, **added),
        generate(ids, config, model=foreign, attention_mask=mask, guider=guider),
        generate(inputs=ids, generation_config=config, model=foreign, attention_mask=mask, guider=guider),
    ):
        assert summary(output) == summary(expected_of_foreign)
        assert not output.sequences.requires_grad


def test_the_callable_form_gives_the_same(foreign, batch, guider, expected_of_foreign):
    options = {"custom_generate": decode, "guider": guider, "return_dict_in_generate": True}
    assert summary(foreign.generate(**batch, **options)) == summary(expected_of_foreign)
    assert summary(foreign.generate(**batch, **options, block_length=8)) == summary(expected_of_foreign)
    assert summary(foreign.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)) == summary(
        expected_of_foreign
    )
    with pytest.raises(ValueError, match="blok_length"):
        foreign.generate(**batch, **options, blok_length=8)


def test_a_model_of_a_strategy_repository_decodes_with_it(exported, batch, guider, expected_of_foreign, tmp_path):
    folder = shutil.copytree(TINY / "dlm", tmp_path / "with_strategy")
    shutil.copytree(exported[STRATEGY] / "custom_generate", folder / "custom_generate")
    model = Qwen2ForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.config.logits_shift = 1
    make_bidirectional(model)
    assert model.generate.func.__module__.startswith("transformers_modules.")
    output = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], guider=guider, return_dict_in_generate=True
    )
    assert summary(output) == summary(expected_of_foreign)
    # Another strategy takes precedence.
    assert summary(model.generate(**batch, guider=guider, return_dict_in_generate=True, custom_generate=decode)) == (
        summary(expected_of_foreign)
    )
