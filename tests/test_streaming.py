"""Streaming: final text once and in order, drafts only where they can be shown."""

from types import SimpleNamespace

from hf_flashdlm.streaming import Stream


class Streamer:
    """A streamer that keeps all it gets."""

    def __init__(self):
        self.told = []

    def put(self, token_ids):
        self.told.append(("put", token_ids.tolist()))

    def end(self):
        self.told.append(("end",))


class DraftStreamer(Streamer):
    def put_draft(self, token_ids):
        self.told.append(("draft", token_ids.tolist()))


class CanvasStreamer(DraftStreamer):
    shows_canvas = True


def shown(streamer, *steps):
    """What a streamer gets for steps `(canvas, final)` after a prompt of two tokens; 9 is the mask token."""
    stream = Stream(streamer, prompt_length=2)
    for canvas, final in steps:
        stream.show([SimpleNamespace(tokens=canvas)], [final])
    stream.end()
    return streamer.told


STEPS = [([5, 6, 9, 9, 3], 2), ([5, 6, 1, 9, 3], 3), ([5, 6, 1, 2, 3], 5)]


def test_final_ids_are_put_once_and_in_order():
    assert shown(Streamer(), *STEPS) == [("put", [1]), ("put", [2, 3]), ("end",)]


def test_what_is_after_them_is_shown_as_a_draft():
    assert shown(DraftStreamer(), *STEPS) == [
        ("draft", [[9, 9, 3]]),
        ("put", [1]),
        ("draft", [[9, 3]]),
        ("put", [2, 3]),
        ("end",),
    ]


def test_nothing_is_put_while_nothing_becomes_final():
    assert shown(Streamer(), STEPS[0], STEPS[0]) == [("end",)]


def test_a_streamer_that_shows_the_canvas_gets_all_rows_and_the_finished_ones_as_they_ended():
    streamer = CanvasStreamer()
    stream = Stream(streamer, prompt_length=1)
    rows = [SimpleNamespace(tokens=[5, 9]), SimpleNamespace(tokens=[5, 1])]
    stream.show(rows, [1, 2])
    rows[0].tokens[1] = 2
    stream.show(rows[:1], [2])
    assert streamer.told == [("draft", [[5, 9], [5, 1]]), ("draft", [[5, 2], [5, 1]])]


def test_without_a_streamer_nothing_happens():
    stream = Stream(None, prompt_length=1)
    stream.show([SimpleNamespace(tokens=[5, 9])], [1])
    stream.end()
    assert stream.canvas == [] and stream.final == 1
