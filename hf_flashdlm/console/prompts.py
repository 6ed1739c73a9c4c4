"""From what a user says to ids: text stays text.

Owns the chat template's use, and that a special token which a user types is read as the characters it is spelled with,
while those that the template writes are tokens. Knows nothing of models.
"""

import json
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..hub.loading import bounded, refusing


Prompt = str | list[dict]  # a text or the turns of a conversation
SECONDS, BYTES, CHARACTERS = 5, 2**29, 2**20  # what a template may take, the last beyond four times the turns' text
PRIVATE = range(0xF0000, 0x10FFFE)  # planes 15 and 16, characters without a meaning


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text in which nothing is a special token, with those that the tokenizer adds to any text."""
    if not added_spans(tokenizer, text):
        return tokenizer(text)["input_ids"]
    backend, ids = without_added_tokens(tokenizer, unused(text))
    return as_ids(backend.encode(text), ids)


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: list[dict], before: str = "") -> list[int]:
    """
    Ids of a conversation in the chat template, which asks for the next reply; `before` comes before the text of the
    last turn, and what it spells as tokens are tokens.
    """
    template = tokenizer.chat_template
    said = "".join(turn["content"] for turn in turns)
    characters = unused(said + (template if isinstance(template, str) else json.dumps(template)))
    typed = {}  # what a user typed, by the character that stands for it while the template is filled in
    marked = [turn | {"content": mark(tokenizer, turn, typed, characters)} for turn in turns]
    marked[-1]["content"] = before + marked[-1]["content"]
    text = fill_in(tokenizer, marked, CHARACTERS + 4 * len(said))
    if not typed:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    backend, ids = without_added_tokens(tokenizer, characters)
    names = {token_id: name for name, token_id in ids.items()}
    text = replace(text, [(start, end, names[one]) for start, end, one in added_spans(tokenizer, text)])
    for character, characters_typed in typed.items():
        text = text.replace(character, characters_typed)
    return as_ids(backend.encode(text, add_special_tokens=False), ids)


def fill_in(tokenizer: PreTrainedTokenizerBase, turns: list[dict], most: int) -> str:
    """The chat template with `turns`, at most `most` characters, in bounded time and memory."""
    sentence = f"the chat template of {tokenizer.name_or_path!r} cannot be filled in"
    with refusing(sentence), bounded(SECONDS, BYTES):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if len(text) > most:
        raise ValueError(f"{sentence}: it writes {len(text)} characters, and {most} are the most.")
    if not text:  # as a template of expressions that the sandbox takes away
        raise ValueError(f"{sentence}: it writes nothing.")
    return text


def mark(tokenizer: PreTrainedTokenizerBase, turn: dict, typed: dict, characters: Iterator[str]) -> str:
    """The text of a turn in which a character stands for each token that somebody typed; `typed` grows."""
    spans = added_spans(tokenizer, turn["content"])
    if turn["role"] == "assistant":  # a template may look for a reply's tokens, such as those around a thought
        special = set(tokenizer.all_special_ids)
        spans = [span for span in spans if span[2] in special]
    changes = []
    for start, end, _ in spans:
        character = next(characters)
        typed[character] = turn["content"][start:end]
        changes.append((start, end, character))
    return replace(turn["content"], changes)


def added_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int, int]]:
    """Where the tokenizer takes a piece of `text` for a token that was added to its vocabulary: bounds and id."""
    added = tokenizer.added_tokens_decoder
    if not tokenizer.is_fast:
        for token in added.values():
            if token.content in text:
                raise ValueError(
                    f"a prompt must not hold {token.content!r}, which the tokenizer {type(tokenizer).__name__} cannot "
                    "read as text: leave it out."
                )
        return []
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [(start, end, one) for one, (start, end) in pairs if one in added and end > start]


def without_added_tokens(tokenizer: PreTrainedTokenizerBase, characters: Iterator[str]) -> tuple[Tokenizer, dict]:
    """
    The same tokenizer in which each added token is spelled by one of `characters`, which no text holds, and their ids
    by that spelling.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"padding": None, "truncation": None}
    names = {}
    for token in described["added_tokens"]:
        names[token["content"]] = next(characters)
        token.update(content=names[token["content"]], normalized=False, single_word=False)
    ids = {names[token.content]: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    rename(described["model"], names)
    return Tokenizer.from_str(json.dumps(described)), ids


def rename(model: dict, names: dict[str, str]) -> None:
    """Rename entries of a vocabulary, but for those that pieces of text are merged to."""
    merged = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", [])}
    names = {name: new for name, new in names.items() if name not in merged}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def as_ids(encoding, ids: dict[str, int]) -> list[int]:
    """Ids of an encoding, those of added tokens by their spelling."""
    return [ids.get(token, token_id) for token, token_id in zip(encoding.tokens, encoding.ids, strict=True)]


def replace(text: str, changes: Iterable[tuple[int, int, str]]) -> str:
    """`text` with other pieces at `changes`, bounds and new text from left to right."""
    pieces, end = [], 0
    for start, stop, new in changes:
        pieces += [text[end:start], new]
        end = stop
    return "".join([*pieces, text[end:]])


def unused(text: str) -> Iterator[str]:
    """Characters without a meaning that `text` does not hold."""
    held = set(text)
    return (character for character in map(chr, PRIVATE) if character not in held)
