"""The processor of LaViDa: pixels as the original makes them, counts of tokens, chats, files that cannot be read."""

import json
import re

import lavida
import numpy as np
import pytest
import torch
from lavida import GOLDENS, IMAGE, KINDS, bomb, chat, new_tokenizer, prepared
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    TextStreamer,
    pipeline,
)

from hf_flashdlm import LavidaProcessor
from hf_flashdlm.hub.loading import load_processor
from hf_flashdlm.processing_original import SYSTEM_MESSAGE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(kind, tokenizer, **changes)`: the folder of [`lavida.write_checkpoint`]."""

    def checkpoint(kind="llada", tokenizer=None, **changes):
        return lavida.write_checkpoint(tmp_path_factory.mktemp(kind), kind, tokenizer, **changes)

    return checkpoint


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint(image_token_id=IMAGE))


def as_bytes(pixels):
    """The tiles of normalized pixels, which must be those of whole numbers."""
    scaled = (pixels.double() * 0.5 + 0.5) * 255
    torch.testing.assert_close(scaled, scaled.round(), atol=1e-4, rtol=0)
    return scaled.round().to(torch.uint8).numpy()


@pytest.mark.parametrize("name", ["wide", "tall", "banner"])
def test_an_image_is_cut_into_the_tiles_of_the_original(processor, name):
    inputs = processor(lavida.picture(name), "<image>a", return_tensors="pt")
    with np.load(GOLDENS / "pixels.npz") as recorded:
        assert np.array_equal(as_bytes(inputs["pixel_values"][0]), recorded[name])
    assert inputs["image_sizes"].tolist() == [list(lavida.picture(name).size[::-1])]
    assert inputs["input_ids"].tolist()[0].count(IMAGE) == len(features(name))


def features(name):
    return lavida.features("dream" if name == "tall" else "llada", name)


def test_several_images_are_one_tile_each(processor):
    names = ["wide", "tall", "banner"]
    inputs = processor([lavida.picture(name) for name in names], "<image>a<image><image>b", return_tensors="pt")
    with np.load(GOLDENS / "pixels.npz") as recorded:
        for pixels, name in zip(inputs["pixel_values"], names, strict=True):
            assert np.array_equal(as_bytes(pixels), recorded[f"{name}_pad"])
    assert inputs["input_ids"].tolist()[0].count(IMAGE) == 3 * 197
    assert inputs["batch_num_images"].tolist() == [3]


def test_images_in_one_list_go_to_the_texts_that_ask_for_them(processor):
    images = [lavida.picture(name) for name in ("wide", "tall", "banner")]
    texts = ["<image>a", "b", "<image>c<image>"]
    flat = processor(images, texts, return_tensors="pt", padding=True)
    nested = processor([images[:1], [], images[1:]], texts, return_tensors="pt", padding=True)
    assert flat["batch_num_images"].tolist() == nested["batch_num_images"].tolist() == [1, 2]
    assert all(flat[name].equal(nested[name]) for name in nested)


@pytest.mark.parametrize("size", [(384, 384), (385, 383), (30, 900), (1, 700), (900, 31), (2000, 1500), (769, 767)])
def test_it_counts_the_tokens_that_the_model_makes(processor, size, no_grad):
    inputs = processor(Image.new("RGB", size), "<image>", return_tensors="pt")
    model = lavida.load("llada").model
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    assert [len(one) for one in model.get_image_features(**images).pooler_output] == [inputs["input_ids"].shape[1]]


def test_a_chat_has_the_system_message_and_images_where_they_are(processor):
    text = processor.apply_chat_template(chat(Image.new("RGB", (9, 9)), "what is it"), add_generation_prompt=True)
    assert text == f"<|system|>{SYSTEM_MESSAGE}\n<|user|><image>\nwhat is it\n<|assistant|>"
    own = chat("be brief", role="system") + chat("first ", Image.new("RGB", (9, 9)), "then")
    assert processor.apply_chat_template(own) == "<|system|>be brief\n<|user|>first <image>\nthen\n"
    plain = [{"role": "user", "content": "no picture"}]
    assert processor.apply_chat_template(plain).endswith("<|user|>no picture\n")


@pytest.mark.parametrize("kind", KINDS)
def test_an_original_checkpoint_answers_a_chat(checkpoint, kind):
    folder = checkpoint(kind, image_token_id=IMAGE)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert type(processor) is LavidaProcessor and processor.tokenizer.padding_side == "left"
    chats = [
        chat("hi"),
        chat(lavida.picture("wide"), "what"),
        chat(lavida.picture("tall"), lavida.picture("wide"), "eh"),
    ]
    options = dict(max_new_tokens=4, stop_at_eos=False, prefix_lm=True)
    together = model.generate(**prepared(processor, *chats), **options)[:, -4:]
    for row, one in enumerate(chats):
        alone = model.generate(**prepared(processor, one), **options)[0, -4:]
        assert alone.tolist() == together[row].tolist()


def test_it_survives_files(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is LavidaProcessor
    given = chat(lavida.picture("banner"), "what")
    before, after = prepared(processor, given), prepared(loaded, given)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_the_image_token_is_the_first_free_id(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint(tokenizer=new_tokenizer(400)))
    assert (processor.image_token, processor.image_token_id) == ("<image>", 400)
    assert AutoConfig.from_pretrained(GOLDENS / "model_llada").image_token_id is None


def test_a_token_of_the_tokenizer_may_be_the_image_token(checkpoint):
    tokenizer = new_tokenizer(500)
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    processor = AutoProcessor.from_pretrained(checkpoint(tokenizer=tokenizer, image_token_id=500))
    assert (processor.image_token, processor.image_token_id) == ("<picture>", 500)
    assert processor.apply_chat_template(chat(Image.new("RGB", (9, 9)), "x")).endswith("<|user|><picture>\nx\n")


def test_an_image_token_that_cannot_be_is_refused(checkpoint):
    folder = checkpoint(tokenizer=new_tokenizer(400), image_token_id=505)
    message = (
        "`image_token_id` must be the id of `<image>` in the tokenizer, 400, got 505: set it in the configuration "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}of the model\\.$"):
        AutoProcessor.from_pretrained(folder)


def test_a_tokenizer_without_a_free_id_for_images_is_refused(checkpoint):
    message = (
        "`tokenizer` must leave an id below 512 for `<image>`, got 512 tokens: name one of them in `image_token_id` "
        "of the configuration."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AutoProcessor.from_pretrained(checkpoint(tokenizer=new_tokenizer(512)))


def test_a_processor_of_another_family_is_refused(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace("LavidaProcessor", "LlavaProcessor"))
    message = (
        "`processor_class` must be LavidaProcessor in processor_config.json of a LaViDa, got 'LlavaProcessor': remove "
        "the file, and a processor is made of the tokenizer."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LavidaProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_image_tokens": 729}, "`num_image_tokens` is 729, and 196 fits."),
        (
            {"processor_class": None},
            "`processor_class` must be LavidaProcessor in processor_config.json of a LaViDa, ",
        ),
        ("{", "It looks like the config file at"),
    ],
)
def test_a_processor_that_does_not_fit_its_model_is_refused(checkpoint, processor, changes, said):
    folder = checkpoint(image_token_id=IMAGE)
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    path.write_text(changes if isinstance(changes, str) else json.dumps(json.loads(path.read_text()) | changes))
    tokenizer = new_tokenizer()
    message = f"`--model` must have a processor that fits its model, but in {str(folder)!r}: {said}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        load_processor("--model", str(folder), AutoConfig.from_pretrained(folder), tokenizer)


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")  # as it is left
@pytest.mark.parametrize("fault", ["no-picture", "cut", "bomb"])
def test_a_file_that_is_no_picture_is_refused(processor, tmp_path, fault):
    path = tmp_path / "picture.png"
    whole = (GOLDENS / "images" / "wide.png").read_bytes()
    path.write_bytes({"no-picture": b"words", "cut": whole[: len(whole) // 2], "bomb": bomb()}[fault])
    with pytest.raises(ValueError, match="^`images` must be pictures that can be read, got one that cannot: "):
        processor(str(path), "<image>", return_tensors="pt")
    with pytest.raises(ValueError, match="^`images` must be pictures that can be read, got one that cannot: "):
        prepared(processor, [{"role": "user", "content": [{"type": "image", "path": str(path)}]}])


SPOT = Image.new("RGB", (9, 9))


@pytest.mark.parametrize(
    ("images", "text", "asked", "given"),
    [
        (SPOT, "a", [0], [1]),
        (None, "<image>a", [1], [0]),
        ([SPOT, SPOT], "<image>a", [1], [2]),
        ([SPOT], "<image><image>", [2], [1]),
        ([SPOT], ["<image>a", "<image>b"], [1, 1], [1]),
        ([[SPOT], []], ["a", "<image>b"], [0, 1], [1, 0]),
        ([[SPOT]], ["<image>a", "b"], [1, 0], [1]),
    ],
)
def test_texts_that_do_not_ask_for_their_images_are_refused(processor, images, text, asked, given):
    message = f"`text` must hold `<image>` once for each of its images, got {asked} in the texts and {given} images."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        processor(images, text, return_tensors="pt", padding=True)


def test_images_go_to_the_texts_that_ask_for_them(processor):
    given = processor([SPOT, SPOT, SPOT], ["<image>a", "b", "<image><image>"], return_tensors="pt", padding=True)
    assert given["batch_num_images"].tolist() == [1, 2], "of the texts that have any"
    tokens = (given["input_ids"] == IMAGE).sum(1).tolist()
    assert tokens[1:] == [0, 2 * 197] and tokens[0] > 197
    for images in (None, [], [[], []]):
        given = processor(images, ["a", "b"], return_tensors="pt")
        assert given.keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (5, 2000), (383, 385)])
def test_an_image_of_any_shape_has_as_many_tokens_as_embeddings(processor, size, no_grad, monkeypatch):
    given = processor(Image.new("RGB", size), "<image>", return_tensors="pt")
    model = lavida.load("llada").model
    tower = model.vision_tower.vision_tower.vision_model
    monkeypatch.setattr(tower, "forward", lambda tiles: torch.zeros(len(tiles), 729, 24))
    pixels = {name: given[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
    (features,) = model.get_image_features(**pixels).pooler_output
    assert len(features) == given["input_ids"].numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mm_projector_type": "linear"},
            "`mm_projector_type` must be 'mlp2x_gelu', as in every released checkpoint of llava_llada, got 'linear': "
            "load it with its own code.",
        ),
        (
            {"image_aspect_ratio": "pad"},
            "`image_aspect_ratio` must be 'anyres' or 'anyres_max_' and a number of tiles, got 'pad': load it with "
            "its own code.",
        ),
        *(
            (
                {"image_grid_pinpoints": pinpoints},
                "`image_grid_pinpoints` must be widths and heights in multiples of a tile's 384 pixels, got "
                f"{pinpoints!r}: change one of them.",
            )
            for pinpoints in ([[384, 500]], [[384]], [], "[(0, 384)]", "(2x2),...,(1x1)", [[384.0, 384]])
        ),
        (
            {"mm_hidden_size": 1152},
            "`mm_hidden_size` must be the width of the vision tower, 24, got 1152: change one of them.",
        ),
    ],
)
def test_a_vision_part_of_another_kind_is_refused(checkpoint, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AutoConfig.from_pretrained(checkpoint(**changes))


def test_the_defaults_are_those_of_the_releases():
    for name, token_id in (("llava_llada", 126349), ("llava_dream", 151667)):
        config = AutoConfig.for_model(name, image_grid_pinpoints="[(384, 768), (768, 384)]")
        assert config.image_token_id == token_id
        assert config.image_grid_pinpoints == [[384, 768], [768, 384]]
        assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1152, 26)


def test_prompts_of_another_processor_are_refused(processor):
    inputs = processor(lavida.picture("wide"), "<image>", return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"][:, 0]
    with pytest.raises(ValueError, match="^`pixel_values` must have the shape"):
        lavida.load("llada").generate(**inputs, max_new_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_of_transformers_answers_a_chat(checkpoint, kind):
    folder = checkpoint(kind, image_token_id=IMAGE)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    given = chat(lavida.picture("wide"), "what")
    options = dict(max_new_tokens=4, stop_at_eos=False, prefix_lm=True)
    (answer,) = describe(text=given, return_full_text=False, generate_kwargs=options)
    ids = model.generate(**prepared(processor, given), **options)[0, -4:]
    assert answer["generated_text"] == processor.decode(ids, skip_special_tokens=True) != ""


def test_an_answer_is_streamed(checkpoint, processor):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(image_token_id=IMAGE)).eval()
    inputs, words = prepared(processor, chat(lavida.picture("wide"), "what")), []
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: words.append(text)
    ids = model.generate(**inputs, streamer=streamer, max_new_tokens=4, stop_at_eos=False)[0, -4:]
    assert "".join(words) == processor.decode(ids)
