"""When a row is finished, and what the output says of it."""

from dataclasses import replace

import pytest
import torch

from hf_flashdlm.outputs import Rows


PAD, END, OTHER_END = ord("."), ord("!"), ord("?")
PROMPT = 1


@pytest.fixture
def rows(start):
    def rows(*texts, ends=(END, OTHER_END), criteria=()):
        state = start(*texts)
        return Rows(state, PROMPT, PAD, None if ends is None else torch.tensor(ends), criteria)

    return rows


@pytest.fixture
def after(start):
    """`after(*texts, nfe=1)`: the state when the canvas has become the texts."""

    def after(*texts, nfe=1, rows=None):
        state = start(*texts)
        frontier = torch.where(state.masked.any(1), state.frontiers[:, 0], state.masked.shape[1])
        state = replace(state, frontiers=frontier[:, None], nfe=torch.full((len(texts),), nfe))
        state = replace(state, active_tokens=10 * state.nfe)
        return state if rows is None else replace(state, rows=torch.tensor(rows))

    return after


def text(output):
    return ["".join(map(chr, row)) for row in output.sequences.tolist()]


@pytest.mark.parametrize(
    ("canvas", "final", "finished"),
    [
        ("p____", 1, False),
        ("pa_b_", 2, False),
        ("pabcd", 5, True),  # nothing is masked any more
        ("pab!_", 4, True),  # an end token, and all before it is written
        ("pa?__", 3, True),  # any of the end tokens
        ("pa_!_", 2, False),  # an end token, but a mask before it
        ("p!b!_", 2, True),  # the first end token counts
    ],
)
def test_a_row_is_finished_when_all_up_to_its_end_is_written(rows, after, canvas, final, finished):
    length, done = rows("p____").update(after(canvas))
    assert (length.tolist(), done.tolist()) == ([final], [finished])


def test_without_end_tokens_a_row_fills_its_canvas(rows, after):
    tracker = rows("p____", ends=None)
    assert tracker.update(after("pa!__"))[1].tolist() == [False]
    assert tracker.update(after("pa!bc"))[1].tolist() == [True]


@pytest.mark.parametrize(("canvas", "written"), [("!____", "!ab__"), ("p!___", "p!ab_")])
def test_an_end_token_that_was_given_ends_nothing(rows, after, canvas, written):
    assert rows(canvas).update(after(written))[1].tolist() == [False]


def test_what_is_behind_an_end_becomes_padding_and_the_longest_row_cuts_the_output(rows, after):
    tracker = rows("p_____", "p_____")
    tracker.update(after("pa!b__", "pabc!_"))
    output = tracker.output("cpu")
    assert text(output) == ["pa!..", "pabc!"]
    assert text(tracker.output("cpu", skip=1)) == ["a!..", "abc!"]


def test_counts_are_of_each_row_until_it_was_finished(rows, after):
    tracker = rows("p____", "p____")
    tracker.update(after("pa!b_", "pabc_", nfe=1))
    tracker.update(after("pabcd", nfe=2, rows=[1]))
    output = tracker.output("cpu")
    assert output.nfe.tolist() == [1, 2] and output.active_tokens.tolist() == [10, 20]
    assert output.tokens_per_forward.tolist() == [2, 2], "tokens up to and with the end, and no prompt"
    assert output.guider_forwards is None and output.accepted_lengths is None


def test_given_tokens_are_not_counted_as_generated(rows, after):
    tracker = rows("p_b__")
    tracker.update(after("pab!_", nfe=1))
    assert tracker.output("cpu").tokens_per_forward.tolist() == [2]


def test_what_a_guider_counts_is_passed_on(rows, after):
    tracker = rows("p_")
    tracker.update(after("pa"))
    output = tracker.output("cpu", drafts_judged=torch.tensor([3]), guider_time_share=0.5)
    assert output.drafts_judged.tolist() == [3] and output.guider_time_share == 0.5
    assert "guider_forwards" not in output, "what nobody counted must not be there"


def test_stopping_criteria_are_asked_about_every_prefix_that_became_clean_once(rows, after):
    asked = []

    def stops_at_c(input_ids, scores):
        asked.append("".join(map(chr, input_ids[0].tolist())))
        return input_ids[:, -1] == ord("c")

    tracker = rows("p_____", criteria=[stops_at_c])
    assert tracker.update(after("pa_c__"))[1].tolist() == [False]
    length, finished = tracker.update(after("pabcd_", nfe=2))
    assert (length.tolist(), finished.tolist()) == ([4], [True])
    assert asked == ["pa", "pab", "pabc"]
    assert text(tracker.output("cpu")) == ["pabc"]


def test_a_criterion_stops_its_own_row(rows, after):
    tracker = rows("p___", "p___", criteria=[lambda input_ids, scores: input_ids[:, -1] == ord("c")])
    assert tracker.update(after("pac_", "pab_"))[1].tolist() == [True, False]
    assert tracker.update(after("pabd", rows=[1], nfe=3))[1].tolist() == [True]
    assert text(tracker.output("cpu")) == ["pac.", "pabd"] and tracker.output("cpu").nfe.tolist() == [1, 3]
