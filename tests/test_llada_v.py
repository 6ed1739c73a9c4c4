"""LLaDA-V: its original files, and the same as Transformers' LlavaOnevision with its weights under other names."""

import functools

import lavida
import pytest
import torch
from cases import POLICIES
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from hf_flashdlm import LLaDAVConfig, diffusion_generate, make_bidirectional


SIZE, TILE = lavida.TILE_SIZE, 16  # pixels in each direction and embeddings of a tile
TEXT, VISION, IDS = lavida.TEXT, lavida.VISION, lavida.IDS
OPTIONS = dict(max_new_tokens=9, block_length=4, stop_at_eos=False, return_dict_in_generate=True)
SHAPES = [(56, 56), (300, 90), (640, 600), (90, 700)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lavida.write_llada_v(tmp_path_factory.mktemp("llada_v"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def renamed(name, has_inner):
    """The name of a weight in Transformers' LlavaOnevision, whose tower has an inner model in older versions."""
    inner = "vision_model." if has_inner else ""
    name = name.replace("model.vision_tower.vision_tower.vision_model.", f"model.vision_tower.{inner}")
    name = name.replace("mm_projector.0", "multi_modal_projector.linear_1")
    name = name.replace("mm_projector.2", "multi_modal_projector.linear_2")
    for part in ("layers", "embed_tokens", "norm"):
        name = name.replace(f"model.{part}.", f"model.language_model.{part}.", name.startswith(f"model.{part}."))
    return name


@pytest.fixture(scope="module")
def onevision(folder):
    pinpoints = [[height * SIZE, width * SIZE] for width in range(1, 7) for height in range(1, 7)]
    config = LlavaOnevisionConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=SiglipVisionConfig(**VISION),
        image_token_id=lavida.IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        vision_aspect_ratio="anyres_max_4",
        image_grid_pinpoints=pinpoints,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    has_inner = hasattr(model.model.vision_tower, "vision_model")
    weights = {renamed(name, has_inner): value for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    model.config.mask_token_id = model.config.text_config.mask_token_id = IDS["mask_token_id"]
    return make_bidirectional(model)


@functools.cache
def picture(size):
    torch.manual_seed(sum(size))
    return Image.fromarray(torch.randint(256, (*size[::-1], 3), dtype=torch.uint8).numpy())


def test_its_file_is_told_from_that_of_lavida(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is LLaDAVConfig
    assert (config.max_tiles, config.tile_side, len(config.image_grid_pinpoints)) == (4, 4, 36)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LLaDAVConfig
    assert again.to_dict() | {"_name_or_path": None} == config.to_dict() | {"_name_or_path": None}
    released = LLaDAVConfig()
    assert (released.mask_token_id, released.image_token_id, released.tile_side) == (126336, 126349, 27)


def test_weights_have_the_original_names(folder, model):
    names = load_file(folder / "model.safetensors").keys()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.image_newline"} <= names
    assert {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")} <= names
    prefixes = ("model.layers.", "model.vision_tower.vision_tower.vision_model.")
    assert sum(name.startswith(prefixes) for name in names) == len(names) - 8
    assert names == model.state_dict().keys()


@pytest.mark.parametrize("size", SHAPES)
def test_an_image_is_what_onevision_makes_of_it(model, onevision, processor, size, no_grad):
    inputs = processor(picture(size), "<image>", return_tensors="pt")
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    (ours,) = model.model.get_image_features(**pixels).pooler_output
    (theirs,) = onevision.model.get_image_features(**pixels, vision_aspect_ratio="anyres_max_4").pooler_output
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert len(ours) == inputs["input_ids"].numel() <= TILE + 1.1**2 * 4 * TILE + 4 * 8
    assert size != (640, 600) or inputs["pixel_values"].shape[1] > 5, "many tiles, scaled down"


def prompts(processor):
    chats = [lavida.chat("hi"), lavida.chat(picture(SHAPES[1]), "what")]
    return [*chats, lavida.chat(picture(SHAPES[0]), picture(SHAPES[2]), "is it")]


def test_logits_and_decodes_are_those_of_onevision(model, onevision, processor, no_grad):
    for chat in prompts(processor)[1:]:
        inputs = lavida.prepared(processor, chat)
        pixels = dict(inputs)
        torch.testing.assert_close(model(**pixels).logits, onevision(**pixels).logits, atol=2e-4, rtol=0)
        for policy in ({"window_policy": "none"}, {}, {"prefix_lm": True}):
            ours = model.generate(**inputs, **OPTIONS, **policy)
            theirs = diffusion_generate(onevision, **inputs, **OPTIONS, **policy)
            assert ours.sequences.equal(theirs.sequences) and ours.nfe.equal(theirs.nfe)


@pytest.mark.parametrize("policy", ["none", "freecache", "dual", "dkv", "refresh-both-narrow"])
def test_a_row_decodes_alone_as_in_an_uneven_batch(model, processor, policy):
    options = OPTIONS | POLICIES[policy]
    batch = lavida.prepared(processor, *prompts(processor))
    together = generated_rows(model.generate(**batch, **options), batch)
    for row, chat in enumerate(prompts(processor)):
        inputs = lavida.prepared(processor, chat)
        assert generated_rows(model.generate(**inputs, **options), inputs) == [together[row]]


def generated_rows(output, inputs):
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist()


def test_it_answers_in_order_for_several_sequences(model, processor):
    inputs = lavida.prepared(processor, *prompts(processor))
    options = OPTIONS | dict(do_sample=True, temperature=1e-20)
    several = model.generate(**inputs, **options, num_return_sequences=2).sequences
    assert several[::2].equal(several[1::2])
    assert several[::2].equal(model.generate(**inputs, **OPTIONS).sequences)


def test_it_trains_in_place(model):
    labels = torch.full((1, 4), -100)
    labels[0, 2] = 7
    ids = torch.tensor([[5, 6, 511, 8]])
    with torch.no_grad():
        output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 2][None], torch.tensor([7]))
    torch.testing.assert_close(output.loss, expected)
