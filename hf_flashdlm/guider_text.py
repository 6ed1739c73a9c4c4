"""Reading a canvas through a guider with another tokenizer.

Owns the way from the diffusion model's ids to text, to the guider's ids, and back to positions: by character offsets,
with special tokens mapped one by one; and, for one call of `generate`, what the guider's cache holds of that text.
Knows nothing of acceptance rules or of how drafts are chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .compiling import device_of
from .guider_reader import check_finite, check_length, fill, start_cache, start_forward


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


class TextReader:
    r"""
    Reads a canvas of one call as text, with drafts in place of its masks, and judges the drafts by the tokens of the
    guider that hold their text.

    Its cache holds the ids that each row was read as; a row is read on from where they begin to differ, the batch from
    the first such place.

    Args:
        model (`PreTrainedModel`): The guider's, as of [`ARReader`].
        alignment ([`Alignment`]): The way between the vocabularies.
        canvas_mask (`torch.LongTensor` of shape `(batch_size, canvas_length)`): 0 where the canvas is padding.
        mask_token_id (`int`): The mask token of the canvas.
        ends (`set[int]`): End tokens of the guider, any of which stands for its end.
        compile_config (`CompileConfig`, *optional*): Compile the forward.

    Raises:
        ValueError: If its model has no cache that can be cropped.
    """

    def __init__(
        self, model, alignment: Alignment, canvas_mask, mask_token_id: int, ends: set[int], compile_config=None
    ):
        self.forward, self.cache = start_forward(model, compile_config), start_cache(model)
        self.model, self.alignment, self.mask_token_id = model, alignment, mask_token_id
        self.padding = (canvas_mask == 0).sum(1).cpu()  # of each row, before its text
        self.ends = torch.tensor(sorted(ends), device=device_of(model), dtype=torch.long)
        self.seen: list[list[int]] = [[] for _ in canvas_mask]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self.padding = self.padding[indices]
        self.seen = [self.seen[index] for index in indices.tolist()]
        self.cache.batch_select_indices(indices.to(device_of(self.model)))

    def judge(self, canvas, drafts, positions, frontier, judged, accept: Callable) -> torch.Tensor:
        """Which drafts a rule accepts, from one forward; see [`ARReader.judge`]."""
        # A row ends with its last draft: what is after it, which would change how its text is split, depends on the
        # other rows of the batch.
        stops = torch.where(judged.cpu(), positions + 1, frontier[:, None]).amax(1).tolist()
        ids = fill(canvas, drafts, positions, self.mask_token_id).tolist()
        rows = [row[pads:stop] for row, pads, stop in zip(ids, self.padding.tolist(), stops, strict=True)]
        accepted = self.judge_rows(rows, (frontier - self.padding).tolist(), accept)
        in_row = (positions - self.padding[:, None]).tolist()
        passed = [[position in one for position in row] for row, one in zip(in_row, accepted, strict=True)]
        return torch.tensor(passed, device=canvas.device)

    def check(self) -> None:
        """Look back at the calls since the last check: each has looked at its logits itself."""

    def judge_rows(self, rows: list[list[int]], first: list[int], accept: Callable) -> list[set[int]]:
        """
        Positions of each row, from `first` on, that the rule accepts: all of their text is in accepted tokens, and
        there is some.

        Args:
            rows (`list[list[int]]`): Canvas ids of each row, drafts included, without padding.
            first (`list[int]`): Position in each row of the first draft.
            accept (`Callable`): `(logits (B, n, vocab_size), ids (B, n)) -> accepted (B, n)`.

        Raises:
            ValueError: If the text has more tokens than the model has positions, or its logits are not finite.
        """
        read = [self.alignment.translate(row) for row in rows]
        # The first guider token that holds text of a draft; nothing stands before the very first that could score it.
        begins = [
            max(next((k for k, (_, last) in enumerate(one.spans) if last >= start), len(one.ids)), 1)
            for one, start in zip(read, first, strict=True)
        ]
        longest = max(len(one.ids) for one in read)
        if longest <= min(begins):
            return [set() for _ in rows]
        check_length(self.model, longest)
        verdicts = self._judge([one.ids for one in read], begins, longest, accept)
        accepted = []
        for one, begin, start, row, verdict in zip(read, begins, first, rows, verdicts, strict=True):
            judged = list(zip(one.spans[begin:], verdict, strict=False))  # a shorter row has verdicts of its filling
            passed, refused = (
                {position for span, verdict in judged if verdict == kind for position in range(span[0], span[1] + 1)}
                for kind in (True, False)
            )
            unread = {position for low, high in one.spans[:begin] for position in range(low, high + 1)}
            accepted.append((passed - refused - unread) & set(range(start, len(row))))
        return accepted

    def _judge(self, ids: list[list[int]], begins: list[int], longest: int, accept: Callable) -> list[list[bool]]:
        """What the rule says of each row's ids from where it begins on; the one transfer from the device."""
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])  # no row reads its own filling
        known = [_common_prefix(seen, row) for seen, row in zip(self.seen, ids, strict=True)]
        start = min(min(begins) - 1, *known)
        kept = min(begins) - 1
        device = device_of(self.model)
        self.cache.crop(min(start - self.cache.get_seq_length(), 0))
        logits = self.forward(
            input_ids=padded[:, start:].to(device),
            position_ids=torch.arange(start, longest, device=device)[None],
            cache=self.cache,
            use_cache=True,
            logits_to_keep=longest - kept,
        ).logits
        self.seen = ids
        judged = torch.tensor(begins)[:, None] + torch.arange(longest - min(begins))
        judged = judged.clamp_max(longest - 1)
        scores = logits[torch.arange(len(ids), device=device)[:, None], (judged - 1 - kept).to(device)]
        check_finite(self.model, bool(scores.amax(-1).isfinite().all()))
        return accept(scores, self._best_ends(scores, padded.gather(1, judged).to(device))).tolist()

    def _best_ends(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The ids with the most likely end token in place of each end token: any of them stands for the end."""
        if not len(self.ends):
            return ids
        return torch.where(torch.isin(ids, self.ends), self.ends[scores[..., self.ends].argmax(-1)], ids)


def end_ids(model, tokenizer) -> set[int]:
    """End tokens of a model and its tokenizer."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {*ends, tokenizer.eos_token_id} - {None}


def _common_prefix(left: list[int], right: list[int]) -> int:
    length = min(len(left), len(right))
    return next((index for index in range(length) if left[index] != right[index]), length)
