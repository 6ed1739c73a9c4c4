"""Pictures on the command line: what a prompt with them becomes, and what is refused in one sentence."""

import importlib.util
import io
import json
import os
import shutil

import lavida
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_flashdlm.cli import main
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.console.pictures import read_pictures
from hf_flashdlm.tiny import FOLDER as TINY


WIDE, TALL = (str(lavida.GOLDENS / "images" / f"{name}.png") for name in ("wide", "tall"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An original checkpoint, without files of a processor."""
    return str(lavida.write_checkpoint(tmp_path_factory.mktemp("lavida"), image_token_id=lavida.IMAGE))


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint.load(folder, "cpu", images=True)


def command(folder, *arguments):
    return ["generate", "--model", folder, "--device", "cpu", "--max-new-tokens", "4", *arguments]


@pytest.mark.parametrize("paths", [[WIDE], [WIDE, TALL]])
def test_a_prompt_about_pictures_is_what_the_processor_makes_of_a_chat(checkpoint, folder, paths):
    pictures = [Image.open(path).convert("RGB") for path in paths]
    chats = [lavida.chat(*pictures, text) for text in ("what", "is it")]
    expected = lavida.prepared(AutoProcessor.from_pretrained(folder), *chats)
    inputs = checkpoint.encode(["what", "is it"], None, read_pictures(paths))
    assert inputs.keys() == expected.keys() - {"token_type_ids"}
    assert all(inputs[name].equal(torch.as_tensor(expected[name])) for name in inputs)


def test_a_token_that_a_user_types_is_no_picture(checkpoint):
    images = read_pictures([WIDE])
    ids, typed = (checkpoint.encode([text], None, images)["input_ids"][0].tolist() for text in ("a", "a<image>"))
    assert typed.count(lavida.IMAGE) == ids.count(lavida.IMAGE) > 0
    assert len(typed) == len(ids) + len("<image>"), "a token for each letter"


def test_generate_describes_a_picture(folder, capsys):
    assert main(command(folder, "--prompt", "what", "--prompt", "is it", "--image", WIDE, "--stats")) == 0
    captured = capsys.readouterr()
    assert captured.err.count("NFE") == 2
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder)
    texts = []
    for text in ("what", "is it"):
        inputs = lavida.prepared(processor, lavida.chat(lavida.picture("wide"), text))
        ids = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(ids, skip_special_tokens=True).strip())
    assert captured.out == "\n\n".join(texts) + "\n"
    assert main(command(folder, "--prompt", "what", "--image", WIDE, "--stream")) == 0
    assert capsys.readouterr().out.strip() == texts[0] != ""
    assert main(command(folder, "--prompt", "what", "--image", TALL)) == 0
    assert capsys.readouterr().out.strip() != texts[0]
    assert main(command(folder, "--prompt", "what")) == 0, "text alone"


def broken(path, fault):
    whole = (lavida.GOLDENS / "images" / "wide.png").read_bytes()
    if fault == "pipe":
        os.mkfifo(path)
    elif fault == "folder":
        path.mkdir()
    elif fault == "program":  # Pillow would hand it to Ghostscript
        Image.new("RGB", (9, 9)).save(path, format="EPS")
    elif fault != "missing":
        content = {"words": b"words", "empty": b"", "cut": whole[: len(whole) // 2], "swapped": whole[:60] + whole}
        content |= {"bomb": lavida.bomb(), "large": lavida.bomb(12000)}
        path.write_bytes(content[fault])


FAULTS = {
    **dict.fromkeys(("missing", "pipe", "folder"), "there is no such file."),
    **dict.fromkeys(("words", "empty", "program"), "cannot identify image file"),
    "cut": "image file is truncated",
    "swapped": "",
    "bomb": "Image size (3600000000 pixels) exceeds limit of",
    "large": "Image size (144000000 pixels) exceeds limit of",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_no_picture_is_one_sentence(folder, tmp_path, capsys, fault):
    path = tmp_path / "a\x1b[2Jb.png"
    broken(path, fault)
    assert main(command(folder, "--prompt", "what", "--image", WIDE, "--image", str(path))) == 2
    captured = capsys.readouterr()
    start = "flashdlm: `--image` must be a file with a picture (PNG, JPEG, WEBP, GIF, BMP), got "
    assert captured.err.startswith(f"{start}{str(path)!r}: {FAULTS[fault]}")
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err[:-1].isprintable()


@pytest.mark.parametrize("name", ["nul\0.png", "n" * 300, "", "http://127.0.0.1:1/a.png"])
def test_a_name_that_no_file_has_is_one_sentence(folder, capsys, name):
    assert main(command(folder, "--prompt", "what", "--image", name)) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashdlm: `--image` must be a file with a picture") and error.count("\n") == 1


def test_other_formats_and_modes_are_read_upright(tmp_path):
    original = Image.new("RGBA", (8, 4), (10, 20, 30, 0))
    for form in ("PNG", "WEBP", "GIF", "BMP"):
        original.save(tmp_path / form, format=form)
    (tmp_path / "JPEG").write_bytes(upright())
    pictures = read_pictures([str(tmp_path / form) for form in ("PNG", "WEBP", "GIF", "BMP", "JPEG")])
    assert [one.size for one in pictures] == [(8, 4)] * 4 + [(4, 8)]
    assert {one.mode for one in pictures} == {"RGB"}


def upright():
    """A photograph that was taken with the camera on its side."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, format="JPEG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", str(TINY / "dlm")],
            f"`--image` needs a model that sees images, got {str(TINY / 'dlm')!r} with `model_type` 'Dream': drop it.",
        ),
        (["--guider", str(TINY / "guider")], "`--guider` reads text alone, got `--image`: drop one of them."),
        (
            ["--no-chat"],
            "`--image` puts pictures into the turns of a chat, got a prompt without a chat template: drop it, or "
            "`--no-chat`.",
        ),
    ],
)
def test_what_does_not_go_with_a_picture_is_one_sentence(folder, capsys, arguments, message):
    assert main(command(folder, "--prompt", "what", "--image", WIDE, *arguments)) == 2
    assert capsys.readouterr().err == f"flashdlm: {message}\n"


def test_pillow_is_named_where_it_is_missing(folder, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"PIL": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: absent.get(name, find_spec(name, *rest)))
    assert main(command(folder, "--prompt", "what", "--image", WIDE)) == 2
    error = capsys.readouterr().err
    assert error == "flashdlm: `--image` needs Pillow, which is not installed: pip install pillow.\n"


def test_a_chat_template_that_drops_a_picture_is_one_sentence(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("a")
    assert main(command(str(tmp_path / "model"), "--prompt", "what", "--image", WIDE)) == 2
    message = (
        "`--model` must have a chat template that keeps the token `<image>` of each picture, and its template does"
    )
    assert capsys.readouterr().err == f"flashdlm: {message} not.\n"


def test_tiles_that_take_the_machine_are_one_sentence(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_grid_pinpoints": [[384000, 384000]]}))
    assert main(command(str(tmp_path / "model"), "--prompt", "what", "--image", WIDE)) == 2
    error = capsys.readouterr().err
    assert error.startswith("flashdlm: `--image` cannot be cut into tiles as `--model` asks for: ")
    assert error.count("\n") == 1
