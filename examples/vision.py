"""A picture in a prompt, and what its hundreds of tokens cost: recomputed in every step, or computed once.

    python examples/vision.py [--model DIR_OR_ID] [--picture PATH]

Draws a picture with Pillow unless one is given. Without `--model`, from a clone of the repository, a checkpoint of the
tests with random weights answers: nonsense, at the costs that count. Each line is the median of three runs.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter

from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from hf_flashdlm import LavidaProcessor
from hf_flashdlm.tiny import FOLDER


TINY = Path(__file__).parents[1] / "tests" / "goldens" / "families" / "lavida" / "model_llada"
SETTINGS = {
    "everything in every step": {"window_policy": "none"},
    "the prompt once (LaViDa's prefix cache)": {"window_policy": "none", "prefix_lm": True},
    "FreeCache": {"window_policy": "freecache"},
    "FreeCache, the prompt once": {"window_policy": "freecache", "prefix_lm": True},
}


def draw() -> Image.Image:
    """A red ball on a green field under a blue sky."""
    picture = Image.new("RGB", (640, 400), "skyblue")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 260, 640, 400), fill="seagreen")
    pen.ellipse((250, 180, 390, 320), fill="firebrick", outline="black", width=4)
    return picture


def load(name: str | None):
    """The processor and the model; the small one has no tokenizer of its own."""
    if name is not None:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")
        return AutoProcessor.from_pretrained(name), model
    config = AutoConfig.from_pretrained(TINY)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "dlm", model_max_length=config.max_position_embeddings)
    processor = LavidaProcessor.of(config, tokenizer)
    config.image_token_id = processor.image_token_id
    return processor, AutoModelForImageTextToText.from_pretrained(TINY, config=config)


def prompt(processor, picture: Image.Image):
    """The question about the picture, as `generate` takes it."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is on the field?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def measure(model, inputs, runs: int, **options):
    """The output of `generate`, and the median of its seconds."""
    seconds = []
    for _ in range(runs):
        begun = perf_counter()
        output = model.generate(**inputs, return_dict_in_generate=True, stop_at_eos=False, **options)
        seconds.append(perf_counter() - begun)
    return output, median(seconds)


def main(model: str | None = None, picture: str | None = None, tokens: int = 64, runs: int = 3) -> None:
    """Print what a decode of `tokens` tokens costs with each of the settings, two tokens in a step."""
    processor, seeing = load(model)
    inputs = prompt(processor, draw() if picture is None else Image.open(picture)).to(seeing.device)
    length = inputs["input_ids"].shape[1]
    of_image = int((inputs["input_ids"] == processor.image_token_id).sum())
    print(f"A prompt of {length} tokens, {of_image} of them of the picture; {tokens} tokens are generated.")
    for name, options in SETTINGS.items():
        output, seconds = measure(seeing, inputs, runs, max_new_tokens=tokens, steps=tokens // 2, **options)
        forwards, computed = int(output.nfe), int(output.active_tokens)
        print(f"{name}: {forwards} forwards, {computed} positions, {seconds:.2f} seconds")
    print("Answer:", processor.decode(output.sequences[0, length:], skip_special_tokens=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="DIR_OR_ID", help="a LaViDa (default: random weights)")
    parser.add_argument("--picture", metavar="PATH", help="(default: a drawn one)")
    main(**vars(parser.parse_args()))
