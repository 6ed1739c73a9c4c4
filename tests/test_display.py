"""The streamer that shows a canvas: what is masked, what is new, what is finished."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from hf_flashdlm.console.display import FRESH, MASKED, CanvasStreamer, mask_character, shows_canvas


MASK, END = 0, 1
WORDS = {2: " two", 3: " three", 4: "\n#### 4"}


class Tokenizer:
    """A tokenizer that spells a few ids."""

    def decode(self, ids):
        return "".join(WORDS[token_id] for token_id in ids)


@pytest.fixture
def frames():
    return []


@pytest.fixture
def streamer(frames):
    return CanvasStreamer(Tokenizer(), MASK, {END}, frames.append, mask="_")


def styled(text):
    return [(text.plain[span.start : span.end], span.style) for span in text.spans]


def test_the_prompt_is_not_shown_and_masks_are_dim(streamer, frames):
    streamer.put(torch.tensor([[7, 7, 7]]))
    streamer.put_draft(torch.tensor([[7, 7, 7, MASK, MASK]]))
    assert frames[0].plain == " _ _"
    assert styled(frames[0]) == [(" _ _", MASKED)]


def test_only_what_the_last_step_wrote_is_highlighted(streamer, frames):
    streamer.put(torch.tensor([[7]]))
    streamer.put_draft(torch.tensor([[7, MASK, 3, MASK]]))
    streamer.put_draft(torch.tensor([[7, 2, 3, MASK]]))
    assert styled(frames[0]) == [(" _", MASKED), (" three", FRESH), (" _", MASKED)]
    assert styled(frames[1]) == [(" two", FRESH), (" _", MASKED)]
    assert frames[1].plain == " two three _"


def test_what_is_after_the_end_is_not_shown(streamer, frames):
    streamer.put(torch.tensor([[7]]))
    streamer.put_draft(torch.tensor([[7, 2, MASK, END, 3, MASK]]))
    assert frames[0].plain == " two _"


def test_finished_text_that_is_put_is_no_second_prompt(streamer, frames):
    streamer.put(torch.tensor([[7]]))
    streamer.put(torch.tensor([2]))
    streamer.put_draft(torch.tensor([[7, 2, 4]]))
    assert frames[0].plain == " two\n#### 4"


def test_a_streamer_can_be_used_again(streamer, frames):
    for prompt in ([7, 7], [7]):
        streamer.put(torch.tensor([prompt]))
        streamer.put_draft(torch.tensor([[*prompt, 2]]))
        streamer.end()
    assert [frame.plain for frame in frames] == [" two", " two"]
    assert styled(frames[1]) == [(" two", FRESH)], "the canvas of the first prompt must not be compared"


@pytest.mark.parametrize(("encoding", "character"), [("utf-8", "░"), ("ascii", "_")])
def test_the_mask_is_a_character_that_the_console_can_print(encoding, character):
    assert mask_character(Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))) == character


def test_the_rows_of_a_batch_stand_below_each_other(streamer, frames):
    streamer.put(torch.tensor([[7], [7]]))
    streamer.put_draft(torch.tensor([[7, MASK, 3], [7, 2, MASK]]))
    streamer.put_draft(torch.tensor([[7, 2, 3], [7, 2, 3]]))
    assert [frame.plain for frame in frames] == [" _ three\n\n two _", " two three\n\n two three"]
    assert styled(frames[1]) == [(" two", FRESH), (" three", FRESH)]


@pytest.mark.parametrize(
    ("is_terminal", "kind", "expected"), [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)]
)
def test_a_canvas_is_shown_where_the_cursor_can_be_moved(is_terminal, kind, expected):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, _environ={"TERM": kind})
    assert shows_canvas(console) is expected


def test_the_time_of_showing_is_counted(streamer, monkeypatch):
    streamer.pause, waits = 2.0, []
    clock = SimpleNamespace(sleep=waits.append, perf_counter=lambda: sum(waits))
    monkeypatch.setattr("hf_flashdlm.console.display.time", clock)
    for _ in range(2):
        streamer.put(torch.tensor([[7]]))
        streamer.put_draft(torch.tensor([[7, 2]]))
        streamer.end()
    assert streamer.seconds == sum(waits) == 4
