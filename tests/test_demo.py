"""The demonstration: what it measures and how it reports it."""

import io
import threading
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from hf_flashdlm.bench import demo
from hf_flashdlm.bench.demo import Measurement
from hf_flashdlm.bench.recipe import Recipe
from hf_flashdlm.bench.run import binomial_interval
from hf_flashdlm.bench.settings import Settings
from hf_flashdlm.methods import METHODS
from hf_flashdlm.tiny import FOLDER, final_number, sample_problems


SETTINGS = Settings(problems=2, batch_size=1, repeats=2, show=1, seed=0)


@pytest.fixture(scope="module")
def run():
    """One demonstration on two problems: its record, and its output to a file."""
    console = Console(file=io.StringIO())
    record = demo.run_demo(SETTINGS, console)
    return record, console.file.getvalue()


def test_the_record_holds_every_figure_and_how_to_measure_it_again(run):
    record, _ = run
    assert set(record) == {"command", "settings", "versions", "machine", "baselines", "methods"}
    assert record["settings"] == {
        "problems": 2,
        "batch_size": 1,
        "repeats": 2,
        "show": 1,
        "slow": 20,
        "seed": 0,
        "max_new_tokens": 64,
        "block_length": record["settings"]["block_length"],
    }
    assert set(record["versions"]) == {"hf_flashdlm", "python", "torch", "transformers"}
    assert record["machine"]["device"] == "cpu" and record["machine"]["threads"] == torch.get_num_threads()
    for method in record["methods"]:
        assert set(method) == {
            "name",
            "options",
            "accuracy",
            "accuracy_interval",
            "nfe",
            "guider_forwards",
            "active_tokens",
            "tokens_per_forward",
            "seconds",
            "seconds_of_runs",
            "speed_over_full_canvas",
            "speed_over_eos_stop",
        }
        assert len(method["seconds_of_runs"]) == 2
        assert method["accuracy_interval"][0] <= method["accuracy"] <= method["accuracy_interval"][1]


def test_the_two_baselines_are_named_and_plain(run):
    record, _ = run
    full_canvas, eos_stop = record["methods"][:2]
    assert record["baselines"] == {"full_canvas": full_canvas["name"], "eos_stop": eos_stop["name"]}
    assert full_canvas["options"] == METHODS["llada"] | {"stop_at_eos": False}
    assert eos_stop["options"] == METHODS["llada"]
    assert full_canvas["nfe"] == 64
    assert full_canvas["speed_over_full_canvas"] == eos_stop["speed_over_eos_stop"] == 1


def test_only_the_guided_method_asks_the_guider(run):
    guided = [method["guider_forwards"] > 0 for method in run[0]["methods"]]
    assert guided == [False, False, False, False, True]


def test_the_cache_computes_less_than_the_baseline(run):
    _, eos_stop, cached, *_ = run[0]["methods"]
    assert cached["active_tokens"] < eos_stop["active_tokens"]


def test_a_file_gets_text_without_control_codes(run):
    record, printed = run
    assert "\x1b" not in printed and "░" not in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    for method in record["methods"]:
        assert method["name"] in printed
    assert "…" not in printed, "a column of the table does not fit"
    assert "NFE: forwards of the diffusion model" in printed


@pytest.fixture(scope="module")
def checkpoint():
    return demo.Checkpoint.load(str(FOLDER / "dlm"), "cpu", "float32")


# All methods by their names, but fast.
METHODS_BY_NAME = [Recipe(method.name, METHODS["flashdlm-fast"]) for method in demo.compared_methods(None)]
PROBLEMS = sample_problems(2, seed=0)


def terminal(**settings):
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80, height=24, **settings)


def test_a_terminal_sees_the_decodes_side_by_side(checkpoint):
    console = terminal()
    demo.show_decoding(checkpoint, METHODS_BY_NAME, PROBLEMS[:1], 1, console)
    printed, names = console.file.getvalue(), [method.name for method in METHODS_BY_NAME]
    assert "░ is a masked position" in printed and "shown at its pace, 1 times slower" in printed
    assert any(all(name in line for name in names[:3]) for line in printed.splitlines()), "three in a line"
    assert printed.count("░") > 64
    ended = printed.rpartition("\x1b[?25h")[2]
    assert all(f"{name}: right" in ended for name in names) and "░" not in ended


def test_progress_names_the_method_and_how_many_problems_are_done(checkpoint):
    console = terminal()
    demo.time_demo(checkpoint, METHODS_BY_NAME, PROBLEMS, replace(SETTINGS, repeats=1), console)
    printed = console.file.getvalue()
    for number, method in enumerate(METHODS_BY_NAME, 1):
        for done in (0, 1):
            assert f"run 1/1, {done}/2 problems, method {number}/5: {method.name}" in printed
    assert printed.count("0:00:0") >= 5, "the time that is left"


def test_nothing_is_drawn_while_a_decode_is_timed(checkpoint, monkeypatch):
    console, decode, drawn, threads = terminal(), Measurement.decode, [], []

    def watched(self, *args):
        before = console.file.tell()
        decode(self, *args)
        drawn.append(console.file.tell() - before)
        threads.append(threading.active_count())

    before = threading.active_count()
    monkeypatch.setattr(Measurement, "decode", watched)
    demo.time_demo(checkpoint, METHODS_BY_NAME, PROBLEMS, replace(SETTINGS, repeats=1), console)
    assert drawn == 10 * [0] and threads == 10 * [before]


def test_a_dumb_terminal_gets_the_lines_of_a_file(checkpoint):
    dumb, file = terminal(_environ={"TERM": "dumb"}), Console(file=io.StringIO(), width=80)
    for console in (dumb, file):
        demo.show_decoding(checkpoint, METHODS_BY_NAME, PROBLEMS[:1], 1, console)
        demo.time_demo(checkpoint, METHODS_BY_NAME[:1], PROBLEMS[:1], replace(SETTINGS, repeats=1), console)
    assert dumb.file.getvalue() == file.file.getvalue() != ""
    assert "forwards, right\n" in file.file.getvalue()


@pytest.fixture
def row():
    return {
        "name": "plain, full canvas",
        "accuracy": 1.0,
        "accuracy_interval": [0.98, 1.0],
        "nfe": 64.0,
        "guider_forwards": 64.0,
        "active_tokens": 6528.0,
        "tokens_per_forward": 64.0,
        "seconds": 1234.56,
        "speed_over_full_canvas": 12.3,
        "speed_over_eos_stop": 12.3,
    }


def test_the_table_fits_80_columns_whatever_the_figures(row):
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.results_table([row], console))
    assert "…" not in console.file.getvalue()
    assert "100.0 (98-100) 64.0   64.0   6528   64.00 1234.56 12.3x 12.3x" in console.file.getvalue()


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (79, "100.0 (98-100) 64.0   64.0   64.00 1234.56 12.3x 12.3x"),
        (70, "100.0 (98-100) 64.0   64.0 1234.56 12.3x 12.3x"),
        (60, "100.0 (98-100) 64.0 1234.56 12.3x 12.3x"),
        (55, "100.0 (98-100) 64.0 1234.56 12.3x"),
        (45, "100.0 (98-100) 1234.56"),
    ],
)
def test_a_narrower_terminal_gets_fewer_figures_and_those_whole(row, width, figures):
    console = Console(file=io.StringIO(), width=width)
    console.print(demo.results_table([row], console))
    printed = console.file.getvalue()
    assert "…" not in printed and f"plain, full canvas {figures}\n" in printed


def test_the_seed_draws_the_problems():
    first, again, other = (sample_problems(20, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({problem.question for problem in first}) == 20


def test_more_problems_than_there_are_is_refused():
    with pytest.raises(
        ValueError, match="`--problems` must be at most [0-9]+, which is all the package holds, got 99999"
    ):
        sample_problems(99999, seed=0)


@pytest.mark.parametrize(
    ("text", "number"),
    [("3 + 4 = 7.\n#### 7", 7), ("#### 1 #### 12 ", 12), ("7", None), ("####", None), ("#### seven", None)],
)
def test_the_final_number_is_after_the_last_mark(text, number):
    assert final_number(text) == number


def test_the_interval_of_a_share_is_wilsons():
    # By hand for 8 of 10 with z = 1.96: center 0.7166, half width 0.2267.
    assert binomial_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert binomial_interval(0, 10)[0] == 0
    assert binomial_interval(10, 10)[1] == 1


def test_the_time_of_a_method_is_the_median_of_its_runs():
    assert Measurement(Recipe("any"), seconds=[3.0, 1.0, 2.0]).median_seconds == 2
