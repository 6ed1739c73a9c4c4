"""When a row is finished, and what the output says of it."""

import numpy
import pytest
import torch
from transformers import StoppingCriteria

from hf_flashdlm.stopping import RowEnds


PAD, END, OTHER_END = ord("."), ord("!"), ord("?")
PROMPT = 1


@pytest.fixture
def decode(start):
    """`decode("p____")` starts a decode; its `write("pa_b_", nfe=1)` says which rows are finished with this canvas."""

    class Decode:
        def __init__(self, *texts, ends=(END, OTHER_END), criteria=(), skip=0, prompt=PROMPT):
            self.state = start(*texts)
            self.ends = RowEnds(self.state, prompt, PAD, ends, criteria, skip)
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


def test_what_is_after_an_end_becomes_padding_and_the_longest_row_cuts_the_output(decode):
    for skip in (0, 1):
        run = decode("p_____", "p_____", skip=skip)
        run.write("pa!b__", "pabc!_")
        assert text(run.output("cpu")) == [row[skip:] for row in ("pa!..", "pabc!")]


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


def seen(input_ids):
    return ["".join(map(chr, row)) for row in input_ids.tolist()]


def test_a_criterion_is_shown_the_callers_batch_cut_to_the_length_that_a_row_has_reached(decode):
    asked = []
    run = decode("p____", "p____", "p____", criteria=[lambda ids, scores: asked.append(seen(ids)) or False])
    run.write("pab_d", "p!___", "pa___")
    assert asked == [["pa", "p!", "pa"], ["pab", "p!.", "pa_"]], "masks are not known yet, after an end is padding"
    asked.clear()
    run.write("pabcd", "pab__")
    assert asked == [
        ["pab", "p!.", "pab"],
        ["pabc", "p!.", "pab_"][:1] + ["p!..", "pab_"],
        ["pabcd", "p!...", "pab__"],
    ]


def test_a_criterion_does_not_see_the_columns_that_a_longer_negative_prompt_adds(decode):
    asked = []
    run = decode("..p__", skip=2, prompt=3, criteria=[lambda ids, scores: asked.append(seen(ids)) or False])
    run.write("..pa_")
    assert asked == [["pa"]]


def test_a_criterion_is_asked_again_where_nothing_became_clean(decode):
    asked = []
    run = decode("p____", criteria=[lambda ids, scores: asked.append(seen(ids)) or len(asked) > 2])
    run.write("pa___")
    run.write("pa_c_", nfe=2)
    assert run.write("pa_cd", nfe=3) == ([2], [True])
    assert asked == [["pa"]] * 3 and text(run.output("cpu")) == ["pa"]


def test_what_was_given_is_not_cut_and_one_token_follows_it(decode):
    run = decode("p_q__", prompt=3, criteria=[lambda ids, scores: True])
    assert run.write("p_q_b") == ([1], [False])
    assert run.state.rows[0].due == 4, "the next step writes what is masked up to the first generated token"
    assert run.write("paqcb", nfe=2) == ([4], [True])
    assert text(run.output("cpu")) == ["paqc"]


def test_what_holds_inside_the_prompt_ends_nothing(decode):
    run = decode("pq__", prompt=2, criteria=[lambda ids, scores: ids[:, -1] == ord("q")])
    assert run.write("pq_b") == ([2], [False])
    assert run.write("pqab", nfe=2) == ([4], [True]) and text(run.output("cpu")) == ["pqab"]


class Counts(StoppingCriteria):
    def __init__(self, answer):
        self.answer = answer

    def __call__(self, input_ids, scores, **kwargs):
        return self.answer(input_ids)


@pytest.mark.parametrize(
    "form",
    [
        lambda hits: hits,
        lambda hits: hits[:, None],
        lambda hits: hits.tolist(),
        lambda hits: hits.numpy(),
        lambda hits: hits.int(),
        lambda hits: bool(hits.all()),
        lambda hits: hits.all(),
        lambda hits: numpy.bool_(hits.all()),
    ],
)
def test_a_criterion_may_answer_with_a_bool_or_one_for_each_row(decode, form):
    run = decode("p____", "p____", criteria=[Counts(lambda ids: form(ids[:, -1] == ord("b")))])
    assert run.write("pabc_", "pabd_") == ([3, 3], [True, True])


def test_a_single_answer_counts_for_rows_of_any_length(decode):
    run = decode("p____", "p____", "p____", criteria=[Counts(lambda ids: ids.shape[1] == 3)])
    assert run.write("pabc_", "pa_b_", "pa__b") == ([3, 2, 2], [True, True, True])


def test_a_criterion_that_writes_into_what_it_is_shown_changes_nothing(decode):
    def scribbles(ids, scores):
        ids[:] = END
        return False

    asked = []
    run = decode("p___", criteria=[scribbles, lambda ids, scores: asked.append(seen(ids)) or False])
    run.write("pab_")
    run.write("pabc", nfe=2)
    assert asked == [["pa"], ["pab"], ["pabc"]] and text(run.output("cpu")) == ["pabc"]


def test_an_answer_for_another_number_of_rows_is_refused(decode):
    run = decode("p__", "p__", criteria=[Counts(lambda ids: torch.tensor([True, False, True]))])
    with pytest.raises(ValueError) as error:
        run.write("pa_", "pa_")
    assert str(error.value) == (
        "A criterion of `stopping_criteria` must answer with a bool or with one for each of the 2 rows, got shape "
        "(3,)."
    )
