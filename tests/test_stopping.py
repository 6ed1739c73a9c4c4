"""When a row is finished, and what the output says of it."""

import pytest
import torch

from hf_flashdlm.stopping import RowEnds


PAD, END, OTHER_END = ord("."), ord("!"), ord("?")
PROMPT = 1


@pytest.fixture
def decode(start):
    """`decode("p____")` starts a decode; its `write("pa_b_", nfe=1)` says which rows are finished with this canvas."""

    class Decode:
        def __init__(self, *texts, ends=(END, OTHER_END), criteria=()):
            self.state = start(*texts)
            self.ends = RowEnds(self.state, PROMPT, PAD, ends, criteria)
            self.output = self.ends.output

        def write(self, *texts, nfe=1):
            for row, text in zip(self.state.rows, texts, strict=True):
                letters = {place: ord(letter) for place, letter in enumerate(text) if letter != "_"}
                row.write({place: letter for place, letter in letters.items() if row.masked[place]})
                row.nfe, row.active_tokens = nfe, 10 * nfe
            self.state.write()
            final, finished = self.ends.update(self.state)
            self.state.batch_select_indices((~torch.tensor(finished)).nonzero().flatten())
            return final, finished

    return Decode


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
def test_a_row_is_finished_when_all_up_to_its_end_is_written(decode, canvas, final, finished):
    assert decode("p____").write(canvas) == ([final], [finished])


def test_an_end_token_written_before_what_is_left_of_it_ends_the_row_later(decode):
    run = decode("p____")
    assert [run.write(canvas) for canvas in ("p__!_", "pa_!_", "pab!_")] == [
        ([1], [False]),
        ([2], [False]),
        ([4], [True]),
    ]


def test_without_end_tokens_a_row_fills_its_canvas(decode):
    run = decode("p____", ends=())
    assert run.write("pa!__")[1] == [False]
    assert run.write("pa!bc")[1] == [True]


@pytest.mark.parametrize(("canvas", "written"), [("!____", "!ab__"), ("p!___", "p!ab_")])
def test_an_end_token_that_was_given_ends_nothing(decode, canvas, written):
    assert decode(canvas).write(written)[1] == [False]


def test_what_is_behind_an_end_becomes_padding_and_the_longest_row_cuts_the_output(decode):
    run = decode("p_____", "p_____")
    run.write("pa!b__", "pabc!_")
    assert text(run.output("cpu")) == ["pa!..", "pabc!"]
    assert text(run.output("cpu", skip=1)) == ["a!..", "abc!"]


def test_counts_are_of_each_row_until_it_was_finished(decode):
    run = decode("p____", "p____")
    run.write("pa!b_", "pabc_", nfe=1)
    run.write("pabcd", nfe=2)
    output = run.output("cpu")
    assert output.nfe.tolist() == [1, 2] and output.active_tokens.tolist() == [10, 20]
    assert output.tokens_per_forward.tolist() == [2, 2], "tokens up to and including the end, without the prompt"
    assert output.guider_forwards is None and output.accepted_lengths is None


def test_given_tokens_are_not_counted_as_generated(decode):
    run = decode("p_b__")
    run.write("pab!_", nfe=1)
    assert run.output("cpu").tokens_per_forward.tolist() == [2]


def test_what_a_guider_counts_is_passed_on(decode):
    run = decode("p_")
    run.write("pa")
    output = run.output("cpu", drafts_judged=torch.tensor([3]), guider_time_share=0.5)
    assert output.drafts_judged.tolist() == [3] and output.guider_time_share == 0.5
    assert "guider_forwards" not in output, "counts that nobody made must be absent"


def test_stopping_criteria_are_asked_about_every_prefix_that_became_clean_once(decode):
    asked = []

    def stops_at_c(input_ids, scores):
        asked.append("".join(map(chr, input_ids[0].tolist())))
        return input_ids[:, -1] == ord("c")

    run = decode("p_____", criteria=[stops_at_c])
    assert run.write("pa_c__")[1] == [False]
    assert run.write("pabcd_", nfe=2) == ([4], [True])
    assert asked == ["pa", "pab", "pabc"]
    assert text(run.output("cpu")) == ["pabc"]


def test_a_criterion_stops_its_own_row(decode):
    run = decode("p___", "p___", criteria=[lambda input_ids, scores: input_ids[:, -1] == ord("c")])
    assert run.write("pac_", "pab_")[1] == [True, False]
    assert run.write("pabd", nfe=3)[1] == [True]
    assert text(run.output("cpu")) == ["pac.", "pabd"] and run.output("cpu").nfe.tolist() == [1, 3]
