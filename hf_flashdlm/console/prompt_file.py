"""Prompts in a file, a line each: which lines are prompts, and which of them are decoded together.

Owns what a line may hold and the order of the work. Knows nothing of what becomes of the answers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint
from .defaults import MAX_NEW_TOKENS
from .prompts import Prompt


@dataclass(frozen=True, slots=True)
class Line:
    """A prompt of the file: the `number` of its line, its first byte `offset`, and its `length` in tokens."""

    number: int
    offset: int
    length: int


def parse(text: bytes) -> Prompt:
    """The prompt in a line; `ValueError` with what is wrong with it."""
    try:
        prompt = json.loads(text)
        json.dumps(prompt, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON in UTF-8") from error
    if not (isinstance(prompt, str) or is_chat(prompt)):
        raise ValueError('it must be a string, or a list of turns such as {"role": "user", "content": "Hello"}')
    if not prompt:
        raise ValueError("it is empty")
    return prompt


def is_chat(prompt) -> bool:
    """Whether `prompt` is a list of turns with texts."""
    turns = prompt if isinstance(prompt, list) else [None]
    return all(
        isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))
        for turn in turns
    )


def rows(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """The number, the offset and the text of each line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, offset, text
            offset += len(text)


def read_prompts(path: Path, lines: list[Line]) -> list[Prompt]:
    """The prompts of `lines`."""
    with path.open("rb") as file:
        texts = [file.readline() for line in lines if file.seek(line.offset) >= 0]
    return [parse(text) for text in texts]


def check_lines(path: Path) -> dict[int, str]:
    """What is wrong with lines, by their numbers, as far as it can be told without a model."""
    if not path.is_file():  # which is read more than once
        raise ValueError(f"`--input` must be a file with prompts, got {str(path)!r}, which is no file.")
    faults, count = {}, 0
    for number, _, text in rows(path):
        count += 1
        try:
            parse(text)
        except ValueError as error:
            faults[number] = str(error)
    if not count:
        raise ValueError(f"`--input` must be a file with prompts, got {str(path)!r}, which is empty.")
    return faults


def measure_lines(
    path: Path, checkpoint: Checkpoint, max_new_tokens: int | None, chat: bool | None
) -> tuple[list[Line], dict[int, str]]:
    """The lines that can be continued, and what is wrong with the others that [`check_lines`] lets pass."""
    chat, faults, lines = checkpoint.uses_chat_template(chat), {}, []
    new_tokens = max_new_tokens or checkpoint.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
    room = getattr(checkpoint.model.config.get_text_config(), "max_position_embeddings", None)
    for number, offset, text in rows(path):
        try:
            prompt = parse(text)
        except ValueError:
            continue
        try:
            if not chat and not isinstance(prompt, str):
                raise ValueError("it is a chat, and no chat template is used")
            length = checkpoint.encode([prompt], chat)["input_ids"].shape[1]
            if room is not None and length + new_tokens > room:
                raise ValueError(
                    f"its {length} tokens and {new_tokens} new ones are more than the model's {room} positions"
                )
        except ValueError as error:
            faults[number] = str(error).rstrip(".")
        else:
            lines.append(Line(number, offset, length))
    return lines, faults


def batches(lines: list[Line], size: int) -> list[list[Line]]:
    """Batches of prompts of about the same length, the longest first: they show whether the memory is enough."""
    ordered = sorted(lines, key=lambda line: (-line.length, line.number))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
