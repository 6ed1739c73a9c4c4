"""Recorded LaViDa models, images and pixels (tests/goldens/families/lavida), as a call of `generate` takes them."""

import functools
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from cases import CHARACTERS
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_flashdlm import LLaDAVConfig, LlavaLLaDAModelLM
from hf_flashdlm.processing_original import SYSTEM_MESSAGE


GOLDENS = Path(__file__).parent / "goldens" / "families" / "lavida"
KINDS = ("llada", "dream")
IMAGE, MASK = 505, 511
# A LLaDA-V of small sizes.
TILE_SIZE = 56
TEXT = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    initializer_range=0.4,
)
VISION = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=TILE_SIZE,
    patch_size=14,
    vision_use_head=False,
)
IDS = dict(mask_token_id=511, eos_token_id=510, pad_token_id=509, image_token_id=IMAGE)
LETTERS = sorted(set(SYSTEM_MESSAGE) | set("<|>_:\n"))
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def load(kind):
    """The model, loaded once; no test may change it."""
    model = AutoModelForImageTextToText.from_pretrained(GOLDENS / f"model_{kind}").eval()
    model.config.image_token_id = IMAGE
    return model


@functools.cache
def picture(name):
    return Image.open(GOLDENS / "images" / f"{name.removesuffix('.pad')}.png").convert("RGB")


def tiles(name):
    """The recorded tiles of an image, as floats; those of `<name>.pad` are the one tile of a padded image."""
    with np.load(GOLDENS / "pixels.npz") as recorded:
        return (torch.from_numpy(recorded[name.replace(".", "_")]) / 255 - 0.5) / 0.5


def pixels(names, counts):
    """`pixel_values`, `image_sizes` and `batch_num_images` for `generate`."""
    images = [tiles(name) for name in names]
    longest = max(map(len, images))
    padded = [torch.cat([one, one.new_zeros(longest - len(one), *one.shape[1:])]) for one in images]
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([picture(name).size[::-1] for name in names]),
        "batch_num_images": torch.tensor(counts),
    }


@functools.cache
@torch.no_grad()
def features(kind, name):
    """The embeddings of an image; of one that was padded as of the first of two."""
    names = 2 * [name] if name.endswith(".pad") else [name]
    return load(kind).model.get_image_features(**pixels(names, [len(names)])).pooler_output[0]


def spliced(kind, prompt_ids, names):
    """The prompt with as many image tokens as each image has embeddings, for each -200."""
    lengths = iter([len(features(kind, name)) for name in names])
    return sum([[IMAGE] * next(lengths) if token == -200 else [token] for token in prompt_ids], [])


def encoded(kind, names):
    """The embeddings of images as the keyword that Transformers hands on."""
    if not names:
        return {}
    embeddings = [features(kind, name) for name in names]
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=embeddings)}}


def new_tokenizer(size=IMAGE):
    """A tokenizer of letters with `size` ids."""
    letters = (LETTERS + [one for one in CHARACTERS if one not in LETTERS])[:size]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, letters[-1]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=letters[-2], chat_template=TEMPLATE)


def write_checkpoint(folder, kind="llada", tokenizer=None, **changes):
    """A folder like the original ones, with a tokenizer and no files of a processor; `changes` in its config.json."""
    for file in (GOLDENS / f"model_{kind}").iterdir():
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (tokenizer or new_tokenizer()).save_pretrained(folder)
    return folder


def write_llada_v(folder):
    """A small LLaDA-V as the original code saves it, with a tokenizer; its file says what the original's says."""
    torch.manual_seed(0)
    LlavaLLaDAModelLM(LLaDAVConfig(**TEXT, **IDS, vision_config=VISION, mm_hidden_size=24)).save_pretrained(folder)
    fields = TEXT | IDS | {"vision_config": VISION | {"model_type": "siglip_vision_model"}, "mm_hidden_size": 24}
    fields |= {"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"], "mm_vision_select_layer": -2}
    fields |= {"image_grid_pinpoints": "(1x1),...,(6x6)", "image_aspect_ratio": "anyres_max_4"}
    (folder / "config.json").write_text(json.dumps(fields))
    new_tokenizer().save_pretrained(folder)
    return folder


def chat(*contents, role="user"):
    parts = [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one} for one in contents
    ]
    return [{"role": role, "content": parts}]


def prepared(processor, *chats):
    return processor.apply_chat_template(
        [*chats],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def bomb(side=60000):
    """A file of a few bytes that says it holds a picture of `side` x `side` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
