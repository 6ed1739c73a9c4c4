"""Repositories of every family: what an export keeps, and that it decodes without the package as with it."""

import json
import shutil

import lavida
import pytest
import torch
from hub_cases import APART, SUMMARY, TINY, summary, usage
from huggingface_hub import ModelCard
from minihub import TOKEN
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    pipeline,
)

import hf_flashdlm
from hf_flashdlm.hub.export import export_code, export_guider, export_model
from hf_flashdlm.hub.loading import MODELS
from hf_flashdlm.hub.upload import list_files, push


# Warnings of the client itself when it sends a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SIZES = dict(
    vocab_size=512,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    initializer_range=0.5,
)
# Checkpoint: its type and further fields. No file but SDAR's names a mask token.
EXPERTS = dict(num_experts=8, num_experts_per_tok=2)
ROUTED = EXPERTS | dict(moe_intermediate_size=8, n_group=2, topk_group=1)
CHECKPOINTS = {
    "SDAR-1.7B-Chat-b8": ("sdar", dict(mask_token_id=311)),
    "SDAR-30B-A3B-Chat": ("sdar_moe", EXPERTS | dict(moe_intermediate_size=8)),
    "Qwen3-0.6B-diffusion-mdlm-v0.1": ("a2d-qwen3", {}),
    "Qwen3-0.6B-diffusion-bd3lm-v0.1": ("a2d-qwen3", {}),
    "Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1": ("a2d-qwen2", {}),
    "Llama-diffusion-bd3lm": ("a2d-llama", {}),
    "Fast_dLLM_v2_1.5B": ("Fast_dLLM_Qwen", {}),
    "LLaDA-MoE-7B-A1B-Instruct": ("llada_moe", EXPERTS | dict(expert_intermediate_size=8)),
    "LLaDA2.0-mini": ("llada2_moe", ROUTED),
    "LLaDA2.1-mini": ("llada2_moe", ROUTED),
    "open-dcoder-0.5B": ("open_dcoder", {}),
    "MMaDA-8B-MixCoT": ("mmada", dict(num_key_value_heads=2, codebook_size=64)),
}
WITH_CODE = ("LLaDA-MoE-7B-A1B-Instruct", "LLaDA2.1-mini", "open-dcoder-0.5B")
DERIVED = ("mask_token_id", "attention_block_length", "block_size", "recommended_method", "logits_shift")
PROMPTS = [[5, 70, 33], [9, 8, 7, 6, 200, 41, 3, 12, 50]]
BATCH = {
    "input_ids": [[0] * 6 + PROMPTS[0], PROMPTS[1]],
    "attention_mask": [[0] * 6 + [1] * 3, [1] * 9],
}
CHAT = [{"role": "user", "content": "What is 7 times 8?"}]
OPTIONS = {"max_new_tokens": 13, "return_dict_in_generate": True}


def original(name, folder):
    """A small checkpoint in the form of the one of that name, with a tokenizer that has a mask token."""
    model_type, fields = CHECKPOINTS[name]
    torch.manual_seed(0)
    config = MODELS[model_type](**SIZES | fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in values.items() if key not in DERIVED or key in fields}
    if model_type == "open_dcoder":
        values |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / "dlm" / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {name: original(name, folder / name) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def repositories(originals, tmp_path_factory):
    """The exported folder of each checkpoint."""
    folder = tmp_path_factory.mktemp("repositories")
    return {name: export_model(str(path), folder / name, f"o/flash-{name}") for name, path in originals.items()}


@pytest.fixture(scope="module")
def code_repositories(originals, published, tmp_path_factory):
    """Repositories with the code alone, on the Hub."""
    folder = tmp_path_factory.mktemp("code")
    names = {}
    for name in WITH_CODE:
        model_type, _ = CHECKPOINTS[name]
        repo_id = f"o/code-{name}"
        exported = export_code(model_type, folder / name, repo_id, str(originals[name]))
        assert not list(exported.glob("*.safetensors"))
        push(exported, repo_id, token=TOKEN)
        names[name] = repo_id
    return names


@pytest.fixture(scope="module")
def expected(repositories):
    """What the package decodes from ids and in a pipeline, as the authors of each checkpoint recommend."""
    batch = {name: torch.tensor(rows) for name, rows in BATCH.items()}
    answers = {}
    for name, folder in repositories.items():
        generator = pipeline("text-generation", str(folder))
        texts = generator([CHAT] * 2, batch_size=2, max_new_tokens=8, return_tensors=True)
        answers[name] = {
            "decoded": summary(generator.model.generate(**batch, **OPTIONS)),
            "pipeline": [text[0]["generated_token_ids"] for text in texts],
        }
    return answers


def test_every_family_is_here():
    elsewhere = {"llada", "Dream", "llava_llada", "llava_dream", "llada_v"}
    assert {model_type for model_type, _ in CHECKPOINTS.values()} == MODELS.keys() - elsewhere


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_export_says_what_the_name_of_the_checkpoint_said(originals, repositories, name):
    model_type, _ = CHECKPOINTS[name]
    config = AutoConfig.from_pretrained(repositories[name])
    assert type(config) is MODELS[model_type]
    length, method = {
        "SDAR-1.7B-Chat-b8": (8, "sdar"),
        "SDAR-30B-A3B-Chat": (4, "sdar"),
        "Fast_dLLM_v2_1.5B": (32, "fast-dllm-v2"),
        "LLaDA2.0-mini": (32, "llada2"),
        "LLaDA2.1-mini": (32, "llada2.1"),
    }.get(name, (32, "bd3lm") if "bd3lm" in name else (None, None))
    found = [getattr(config, field, None) for field in ("attention_block_length", "recommended_method")]
    assert found == [length, method]
    assert config.mask_token_id == (311 if name == "SDAR-1.7B-Chat-b8" else 1), "that of the file, or the tokenizer's"
    settings = json.loads((repositories[name] / "generation_config.json").read_text())
    assert settings["mask_token_id"] == config.mask_token_id
    weights = (originals[name] / "model.safetensors").read_bytes()
    assert (repositories[name] / "model.safetensors").read_bytes() == weights
    assert "README.md" in list_files(repositories[name])
    assert str(originals[name].parent) not in (repositories[name] / "config.json").read_text()


def test_repositories_decode_without_the_package_as_with_it(
    run_apart, repositories, code_repositories, originals, expected
):
    jobs = [
        (name, str(folder), code_repositories.get(name), str(originals[name])) for name, folder in repositories.items()
    ]
    answers = run_apart(f"""{APART}{SUMMARY}
batch = {{name: torch.tensor(rows) for name, rows in {BATCH!r}.items()}}
answers = {{}}
for name, folder, code, weights in {jobs!r}:
    generator = pipeline("text-generation", folder, trust_remote_code=True)
    texts = generator([{CHAT!r}] * 2, batch_size=2, max_new_tokens=8, return_tensors=True)
    models = [generator.model]
    if code is None:
        models.append(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    else:
        config = AutoConfig.from_pretrained(code, trust_remote_code=True)
        models.append(AutoModelForCausalLM.from_pretrained(weights, config=config, trust_remote_code=True))
    answers[name] = dict(
        modules=[type(model).__module__.partition(".")[0] for model in models],
        pipeline=[answer[0]["generated_token_ids"] for answer in texts],
        decoded=[summary(model.generate(**batch, **{OPTIONS!r})) for model in models],
    )
print(json.dumps(answers))
""")
    assert answers.keys() == CHECKPOINTS.keys()
    for name, answer in answers.items():
        assert answer["modules"] == ["transformers_modules"] * 2, name
        assert answer["decoded"] == [expected[name]["decoded"]] * 2, name
        assert answer["pipeline"] == expected[name]["pipeline"], name


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_card_of_a_family(repositories, name):
    card = ModelCard.load(repositories[name] / "README.md")
    assert "tags" in card.data.to_dict() and card.data.license is None
    assert "The weights have the licence that their authors gave them." in card.content
    title = card.text.lstrip().splitlines()[0]
    assert title == f"# o/flash-{name}"


def test_a_checkpoint_without_a_mask_token_is_not_exported(originals, tmp_path):
    folder = shutil.copytree(originals["Llama-diffusion-bd3lm"], tmp_path / "llama")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "mask_token"}))
    assert AutoTokenizer.from_pretrained(folder).mask_token is None
    with pytest.raises(ValueError) as error:
        export_model(str(folder), tmp_path / "out", "o/n")
    assert str(error.value) == (
        f"`checkpoint` must name a mask token of its vocabulary of 512, but {str(folder)!r} names None: put "
        "`mask_token_id` into its config.json."
    )
    assert not (tmp_path / "out").exists()


def test_a_diffusion_model_of_any_family_is_no_guider(originals, tmp_path):
    for name in ("SDAR-1.7B-Chat-b8", "LLaDA-MoE-7B-A1B-Instruct", "open-dcoder-0.5B"):
        with pytest.raises(ValueError, match="must be an autoregressive model, got the diffusion model"):
            export_guider(str(originals[name]), tmp_path / "out", "o/n")


def test_a_code_repository_without_sizes_needs_a_checkpoint(originals, tmp_path):
    def refusal(*arguments):
        with pytest.raises(ValueError) as error:
            export_code(*arguments)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert refusal("sdar", tmp_path / "out", "o/n") == (
        "`checkpoint` must be given for 'sdar', whose checkpoints do not share sizes: name one of them."
    )
    assert refusal("llava_llada", tmp_path / "out", "o/n") == (
        "`checkpoint` must be given for 'llava_llada', whose checkpoints do not share the processor of images: name "
        "one of them."
    )
    assert refusal("llada", tmp_path / "out", "o/n", str(originals["LLaDA-MoE-7B-A1B-Instruct"])) == (
        "`checkpoint` must be of type 'llada', got 'llada_moe'."
    )
    sizes = json.loads((export_code("llada2_moe", tmp_path / "out", "o/n") / "config.json").read_text())
    assert (sizes["num_experts"], sizes["mask_token_id"]) == (256, 156895)


def test_the_files_of_a_model_say_what_it_is(originals, tmp_path):
    model = hf_flashdlm.OpenDCoderModel.from_pretrained(originals["open-dcoder-0.5B"])
    model.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is hf_flashdlm.OpenDCoderModel


# Models that see images


PICTURE = str(lavida.GOLDENS / "images" / "wide.png")
DESCRIBE = [{"role": "user", "content": [{"type": "image", "path": PICTURE}, {"type": "text", "text": "what"}]}]
# Runs with the package and without it; a card names `picture.png`.
DESCRIBES = f"""
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer
class Words(TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        words.append(text)
def describe(folder):
    global words
    words = []
    repo = dict(pretrained_model_name_or_path=folder, trust_remote_code=True)
    processor, model = AutoProcessor.from_pretrained(**repo), AutoModelForImageTextToText.from_pretrained(**repo)
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template([{DESCRIBE!r}], add_generation_prompt=True, **options)
    options = dict(max_new_tokens=6, stop_at_eos=False, prefix_lm=True)
    streamer = Words(processor.tokenizer, skip_prompt=True)
    streamed = model.generate(**inputs, **options, streamer=streamer)
    pipe = pipeline("image-text-to-text", folder, trust_remote_code=True)
    (answer,) = pipe(text={DESCRIBE!r}, return_full_text=False, generate_kwargs=dict(options))
    decoded = summary(model.generate(**inputs, **options, return_dict_in_generate=True))
    assert streamed.tolist() == decoded["sequences"]
    return dict(decoded=decoded, piped=answer["generated_text"], streamed="".join(words)), model, processor
"""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The exported folder of a small LaViDa of each kind, and of a LLaDA-V."""
    folder = tmp_path_factory.mktemp("seeing")
    exported = {}
    for kind in (*lavida.KINDS, "llada_v"):
        (folder / kind).mkdir()
        if kind == "llada_v":
            original = lavida.write_llada_v(folder / kind)
        else:
            original = lavida.write_checkpoint(folder / kind, kind, image_token_id=lavida.IMAGE)
        (original / "generation_config.json").write_text('{"max_new_tokens": 6}')
        exported[kind] = export_model(str(original), folder / f"lavida-{kind}", f"o/lavida-{kind}")
    return exported


def test_a_repository_that_sees_images_holds_its_processor(seeing):
    for kind, folder in seeing.items():
        files = list_files(folder)
        assert {"processing_lavida.py", "processor_config.json", "README.md"} <= files.keys()
        assert "processing_original.py" not in files
        settings = json.loads((folder / "processor_config.json").read_text())
        assert settings["auto_map"] == {"AutoProcessor": "processing_lavida.LavidaProcessor"}
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
        assert config["image_token_id"] == lavida.IMAGE
        weights = (folder.with_name(kind) / "model.safetensors").read_bytes()
        assert (folder / "model.safetensors").read_bytes() == weights
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "image-text-to-text"
        assert "AutoProcessor.from_pretrained(**repo)" in usage(card.content)
        again = export_model(str(folder), folder.with_name(f"again-{kind}"), "o/again")
        assert list_files(again).keys() == files.keys()
        assert (again / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()


@pytest.mark.heavy
def test_a_repository_describes_an_image_without_the_package_as_with_it(run_apart, seeing, tmp_path):
    code = export_code("llava_dream", tmp_path / "code", "o/code", str(seeing["dream"]))
    names = {"summary": summary, "pipeline": pipeline}
    exec(DESCRIBES, names)
    expected, cards = {}, ""
    for kind, folder in seeing.items():
        expected[kind] = names["describe"](str(folder))[0]
        assert expected[kind]["piped"] == expected[kind]["streamed"] != ""
        push(folder, f"o/lavida-{kind}", token=TOKEN)
        cards += usage((folder / "README.md").read_text()) + "assert output.nfe > 0\n"
    answers = run_apart(f"""{APART}{SUMMARY}{DESCRIBES}
import shutil
shutil.copyfile({PICTURE!r}, "picture.png")
answers = {{}}
for kind in {list(seeing)!r}:
    answers[kind], model, processor = describe("o/lavida-" + kind)
    assert {{type(one).__module__.partition(".")[0] for one in (model, processor)}} == {{"transformers_modules"}}
processor = AutoProcessor.from_pretrained({str(code)!r}, trust_remote_code=True)
assert processor.image_token_id == {lavida.IMAGE}
{cards}
print(json.dumps(answers))
""")
    assert answers == expected
