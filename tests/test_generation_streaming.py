"""What streamers get from a decode."""

import pytest
import torch
from cases import ENDS, MASK, PLAIN, PROMPT, PROMPTS, cut, every_model, every_policy, generated, spell
from transformers import TextDiffusionStreamer, TextStreamer


class Recorder:
    """A streamer that keeps all it gets."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, token_ids):
        self.pieces.append(token_ids.flatten().tolist())

    def end(self):
        self.ended = True


class DraftRecorder(Recorder):
    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, token_ids):
        self.drafts.append((sum(self.pieces, []), token_ids.clone()))


class CanvasRecorder(DraftRecorder):
    shows_canvas = True


@every_model
@every_policy
def test_the_pieces_of_a_stream_are_the_output(tiny, decode, name, policy):
    streamer = Recorder()
    options = dict(max_new_tokens=14, block_length=4, eos_token_id=ENDS, pad_token_id=0, **policy)
    output = decode(tiny(name), [PROMPT], streamer=streamer, **options)
    assert streamer.pieces[0] == PROMPT
    assert sum(streamer.pieces, []) == output.sequences[0].tolist()
    assert all(streamer.pieces) and len(streamer.pieces) > 1
    assert streamer.ended


def test_a_stop_string_is_the_last_that_a_stream_is_told(tiny, decode, tokenizer):
    plain = generated(decode(tiny("llada"), [PROMPT], **PLAIN))
    streamer = Recorder()
    stop = dict(stop_strings=[spell(plain[5:7])], tokenizer=tokenizer)
    output = decode(tiny("llada"), [PROMPT], streamer=streamer, **PLAIN, **stop)
    assert sum(streamer.pieces, []) == output.sequences[0].tolist() == PROMPT + plain[:7]


@every_model
def test_drafts_are_what_is_after_the_final_text(tiny, decode, name):
    streamer = DraftRecorder()
    output = decode(tiny(name), [PROMPT], streamer=streamer, **PLAIN)
    assert len(streamer.drafts) == int(output.nfe[0]) - 1, "after the last step nothing is a draft any more"
    final = output.sequences[0]
    for text, rest in streamer.drafts:
        assert rest.shape == (1, 20 - len(text))
        known = rest[0] != MASK
        assert not known[0], "final text was shown as a draft"
        assert (rest[0] == final[len(text) :])[known].all()


@pytest.mark.parametrize("negative", [{}, dict(guidance_scale=1.5, negative_prompt_ids=torch.arange(40, 55)[None])])
def test_a_streamer_that_shows_the_canvas_gets_all_rows(tiny, decode, negative):
    streamer = CanvasRecorder()
    options = dict(max_new_tokens=12, block_length=4, eos_token_id=ENDS, pad_token_id=0)
    if negative:
        negative = negative | dict(negative_prompt_ids=negative["negative_prompt_ids"].expand(3, -1))
    output = decode(tiny("llada"), PROMPTS, streamer=streamer, **options, **negative)
    assert len(streamer.drafts) == int(output.nfe.max())
    assert all(canvas.shape == (3, 20) for _, canvas in streamer.drafts)
    last = streamer.drafts[-1][1]
    for row in range(3):
        text = cut(generated(output, row))
        assert last[row, 8:][: len(text)].tolist() == text
    assert streamer.ended and len(streamer.pieces) == 1


def test_a_streamer_of_transformers_takes_one_row_only(tiny, decode, tokenizer):
    with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
        decode(tiny("llada"), PROMPTS, max_new_tokens=4, streamer=TextStreamer(tokenizer))


@pytest.mark.parametrize("kind", [TextStreamer, TextDiffusionStreamer])
def test_the_streamers_of_transformers_print_the_text(tiny, decode, tokenizer, capsys, kind):
    output = decode(tiny("llada"), [PROMPT], **PLAIN, streamer=kind(tokenizer, skip_prompt=True))
    printed = capsys.readouterr().out
    text = spell(generated(output))
    assert printed.replace("\n", "").endswith(text) if kind is TextStreamer else all(c in printed for c in text)
