"""Reading a canvas through a guider with another tokenizer.

Owns the way from the diffusion model's ids to text, to the guider's ids, and back to positions: by character offsets,
with special tokens mapped one by one. Knows nothing of acceptance rules or of how drafts are chosen.
"""

from dataclasses import dataclass, field

import torch


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character decodes to


@dataclass
class Translation:
    """A row in the guider's ids, and for each id the canvas positions `[first, last]` whose text it shares."""

    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def append(self, token_id: int, first: int, last: int) -> None:
        self.ids.append(token_id)
        self.spans.append((first, last))


class Alignment:
    r"""
    Translates rows of a canvas.

    Text between special tokens is decoded and encoded again as a whole. A special token becomes the guider's token of
    the same name, an end token the guider's end token, and any other is left out.

    Args:
        canvas_tokenizer (`PreTrainedTokenizerBase`): The diffusion model's.
        guider_tokenizer (`PreTrainedTokenizerBase`): The guider's; a fast one, which knows character offsets.
        canvas_ends (`set[int]`): End tokens of the diffusion model.
        guider_end (`int`): The guider's end token.

    Raises:
        ValueError: If the guider's tokenizer does not know character offsets.
    """

    def __init__(self, canvas_tokenizer, guider_tokenizer, canvas_ends: set[int], guider_end: int | None):
        if not guider_tokenizer.is_fast:
            raise ValueError(
                f"`tokenizer` must be a fast tokenizer, got {type(guider_tokenizer).__name__}: a slow one does not "
                "say which characters a token stands for."
            )
        self.canvas_tokenizer, self.guider_tokenizer = canvas_tokenizer, guider_tokenizer
        names = guider_tokenizer.get_vocab()
        special = set(canvas_tokenizer.all_special_ids) | set(canvas_tokenizer.added_tokens_decoder)
        self.special = {one: names.get(canvas_tokenizer.convert_ids_to_tokens(one)) for one in special}
        self.special |= dict.fromkeys(canvas_ends, guider_end)
        # What the guider expects in front of every text, such as its begin-of-text token.
        self.prefix = guider_tokenizer("").input_ids

    def translate(self, ids: list[int]) -> Translation:
        """The guider's ids for a row of canvas ids without masks and padding."""
        translation = Translation()
        for token_id in self.prefix:
            translation.append(token_id, -1, -1)
        start = 0
        for position, token_id in enumerate(ids):
            if token_id in self.special:
                self._append_text(translation, ids[start:position], start)
                if self.special[token_id] is not None:
                    translation.append(self.special[token_id], position, position)
                start = position + 1
        self._append_text(translation, ids[start:], start)
        return translation

    def _append_text(self, translation: Translation, ids: list[int], start: int) -> None:
        if not ids:
            return
        ends = self._character_ends(ids)
        text = self.canvas_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        encoded = self.guider_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first = 0
        for token_id, (begin, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            while first < len(ids) - 1 and ends[first] <= begin:
                first += 1
            last = first
            while last < len(ids) - 1 and (ends[last] < end or ends[last + 1] == end):
                last += 1  # a token that only completes a character adds none, and shares the character
            translation.append(token_id, start + first, start + last)

    def _character_ends(self, ids: list[int]) -> list[int]:
        """For each id, how many characters of the text stand when it has been read; an unfinished one counts."""
        decode = self.canvas_tokenizer.decode
        pieces = decode([[one] for one in ids])
        if not any(REPLACEMENT in piece for piece in pieces):
            lengths = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
            if lengths[-1] == len(decode(ids, clean_up_tokenization_spaces=False)):
                return lengths
        # Pieces that are no whole characters, or change beside each other: read the text as it grows.
        return [len(decode(ids[: stop + 1], clean_up_tokenization_spaces=False)) for stop in range(len(ids))]
