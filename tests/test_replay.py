"""Decodes that are recorded step by step and replayed side by side: times, counts, what fits on a terminal."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from hf_flashdlm.bench.replay import Frame, Recorder, Replay, Stage
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.tiny import FOLDER, GUIDANCE, sample_problems


QUESTION = sample_problems(1, seed=0)[0].question
MASK, END = 0, 1


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.load(str(FOLDER / "dlm"), "cpu", "float32")


@pytest.fixture(scope="module", params=["alone", "guided"])
def recorded(request, checkpoint):
    """A decode that was recorded: the recorder, what came of it, and whether there was a guider."""
    guider = checkpoint.load_guider(str(FOLDER / "guider"), "cpu", "float32", **GUIDANCE)
    guider = guider if request.param == "guided" else None
    recorder = Recorder(checkpoint.model.config.mask_token_id)
    options = {"max_new_tokens": 64, "guider": guider, "output_history": True, "streamer": recorder}
    with recorder.counting(guider):
        continuation = checkpoint.continue_prompts([QUESTION], options)
    return recorder, continuation, guider


def test_a_replay_holds_every_step_of_the_decode(recorded, checkpoint):
    recorder, continuation, _ = recorded
    replay = recorder.replay("name", "right", continuation.seconds)
    history = continuation.output.history[:, 0]
    first, *steps = replay.frames
    assert [frame.forwards for frame in replay.frames] == [*range(len(history) + 1)]
    assert first == Frame(0.0, 0, 0, 64 * [checkpoint.model.config.mask_token_id])
    for frame, canvas in zip(steps, history[:, recorder.prompt_length :].tolist(), strict=True):
        ids = checkpoint.up_to_end(frame.ids)
        assert len(ids) > 5 and ids[: len(canvas)] == canvas[: len(ids)]
    assert (replay.name, replay.note, replay.seconds) == ("name", "right", continuation.seconds)


def test_times_are_those_of_the_decode_and_forwards_of_the_guider_are_counted(recorded):
    recorder, continuation, guider = recorded
    frames = recorder.replay("", "", continuation.seconds).frames
    times = [frame.seconds for frame in frames]
    assert times == sorted(times) and times[0] == 0 and times[-1] <= continuation.seconds
    guided = continuation.output.guider_forwards
    assert frames[-1].guider_forwards == (0 if guided is None else int(guided))
    assert guider is None or not guider.model._forward_hooks


def replay(name, *steps, seconds=None):
    """A replay of steps `(seconds, ids)`."""
    frames = [Frame(at, number, 2 * number, ids) for number, (at, ids) in enumerate(steps)]
    return Replay(name, "right", frames, seconds or frames[-1].seconds)


class Painter:
    """Spells ids as letters."""

    mask_token_id, end_token_ids = MASK, {END}

    def render(self, ids, before):
        from rich.text import Text

        return Text("".join("_ ab"[one] for one in ids))


FAST = replay("fast", (0.0, [MASK] * 4), (0.1, [2, 3, END, MASK]))
SLOW = replay("slow", (0.0, [MASK] * 4), (0.1, [2, MASK, MASK, MASK]), (0.3, [2, 3, END, 2]), seconds=0.4)


def shown(stage, seconds, texts=True):
    """The words of a picture, column by column."""
    with stage.console.capture() as captured:
        stage.console.print(stage.picture(seconds, texts))
    return captured.get()


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60, height=24)


def test_each_decode_is_at_its_own_step_at_a_time(console):
    stage = Stage([FAST, SLOW], Painter(), console)
    clock, names, forwards, taken, text, _ = (line.rstrip() for line in shown(stage, 0.2).splitlines())
    assert clock == "0.200 s"
    assert names.split("  ")[0] == "fast: right" and names.endswith(" slow"), "which one is done is told"
    assert forwards.split() == "1 + 2 guider forwards 1 + 2 guider forwards".split()
    assert taken.split() == "3 tokens, 0.100 s 1 tokens, 0.200 s".split()
    assert text.split() == ["ab", "_", "a___"]


def test_the_last_picture_has_all_decodes_ended(console):
    stage = Stage([FAST, SLOW], Painter(), console)
    printed = shown(stage, stage.end)
    assert stage.end == 0.4
    assert "fast: right" in printed and "slow: right" in printed
    assert "3 tokens, 0.100 s" in printed and "3 tokens, 0.400 s" in printed


@pytest.mark.parametrize(("width", "columns"), [(20, 1), (52, 2), (80, 3), (200, 5)])
def test_there_are_as_many_columns_as_fit(width, columns):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, height=60)
    stage = Stage(5 * [FAST], Painter(), console)
    assert stage.num_columns == columns
    assert all(len(line) <= width for line in shown(stage, 0.2).splitlines())
    assert shown(stage, 0.0).splitlines()[1].count("fast") == columns


def test_texts_that_do_not_fit_are_left_out_until_the_end(console):
    assert Stage([FAST, SLOW], Painter(), console).fits
    low = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60, height=6)
    stage = Stage([FAST, SLOW], Painter(), low)
    assert not stage.fits
    assert len(shown(stage, 0.2, texts=False).splitlines()) == 4
    stage.play(slow=0)
    assert "ab" in low.file.getvalue()


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by a fortieth of a second with each picture."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += 0.025

    monkeypatch.setattr("hf_flashdlm.bench.replay.time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    return clock


@pytest.mark.parametrize("slow", [0, 1, 3])
def test_a_replay_takes_as_long_as_the_decode_times_what_is_asked(console, clock, slow):
    Stage([FAST, SLOW], Painter(), console).play(slow)
    assert clock.now == pytest.approx(0.4 * slow, abs=0.026)
    assert console.file.getvalue().count("\x1b[?25h") == 1, "the cursor is back"


def test_the_first_to_end_is_seen_to_end_first(console, clock):
    Stage([FAST, SLOW], Painter(), console).play(1)
    printed = console.file.getvalue()
    assert printed.index("fast: right") < printed.index("slow: right")


def test_an_interrupt_leaves_nothing_on_the_screen(console, clock, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_flashdlm.bench.replay.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Stage([FAST, SLOW], Painter(), console).play(1)
    left = console.file.getvalue().partition("\x1b[?25h")[2]
    assert left.count("\x1b[2K") >= 6 and "fast" not in left, "every line is wiped off, and none is printed after"


def test_without_colour_there_is_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=60)
    Stage([FAST, SLOW], Painter(), console).play(0)
    assert "\x1b[3" not in console.file.getvalue()
