"""`flashdlm bench`: what it counts, what it writes, what it refuses; and the loops that it compares with."""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import reference
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.configuration_utils import CompileConfig

from hf_flashdlm.bench import ablation, comparison, decoding
from hf_flashdlm.bench.ablation_table import settings
from hf_flashdlm.bench.decoding import Models
from hf_flashdlm.bench.machine import Ceilings, Probe
from hf_flashdlm.bench.models import guider_config, named_config, random_model, twin_config
from hf_flashdlm.bench.recipe import Recipe
from hf_flashdlm.bench.recipes import choose, recipes
from hf_flashdlm.bench.report import format_table
from hf_flashdlm.bench.run import Run, binomial_interval, run
from hf_flashdlm.bench.shapes import SHAPES
from hf_flashdlm.bench.workload import Workload, problem_workload
from hf_flashdlm.cli.bench import add_commands
from hf_flashdlm.cli.command import Parser
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.generation_config import DiffusionOptions
from hf_flashdlm.guider import ARGuider
from hf_flashdlm.tiny import FOLDER as TINY
from hf_flashdlm.tiny import problems


ROW_KEYS = """batch_size method options rule num_rows tokens nfe guider_forwards active_tokens tokens_per_forward
drafts_judged drafts_accepted guider_time_share outside_forwards_share accuracy accuracy_interval seconds
seconds_of_runs speed_over_full_canvas speed_over_eos_stop tokens_per_second peak_memory_bytes floor_seconds
seconds_over_floor compiled graphs later_graphs warm_up_seconds milliseconds_per_step kept_bytes like speed_over_like
equal_share operations_per_forward operations_per_step stops_at_answers accuracy_of_long""".split()
RECORD_KEYS = "schema command seed commit machine versions options ceilings models rows".split()
SHORT = "--config tiny --problems 2 --new-tokens 8 --batch-size 1 --repeats 1 --device cpu".split()
METHODS = ["--methods", "plain,plain-eos,freecache+window,guided,ar"]


# With Dream's shift a cached block needs the position before it, which the package decides for each row alone.
@pytest.mark.parametrize(("name", "num_rows"), [("llada", 3), ("llada_gqa", 3), ("dream", 1), ("dream_trained", 1)])
@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize("block_length", [1, 3, 4, 12])
def test_ours_writes_what_a_loop_of_others_writes(tiny, name, num_rows, method, block_length):
    model, (loop, options) = tiny(name), reference.METHODS[method]
    prompts = torch.randint(3, 400, (num_rows, 7), generator=torch.Generator().manual_seed(block_length))
    expected = loop(model, prompts, max_new_tokens=12, block_length=block_length)
    if "confidence_threshold" not in options:
        options = options | {"steps": 12}
    inputs = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 12, "block_length": block_length}
    ids = model.generate(prompts, **inputs, stop_at_eos=False, **options)
    assert ids.tolist() == expected.tolist()


def test_a_step_of_a_loop_of_others_does_the_work_of_the_original(tiny):
    model = tiny("llada")
    prompts = torch.randint(3, 400, (2, 7), generator=torch.Generator().manual_seed(0))
    runs = {}
    for method, (loop, _) in reference.METHODS.items():
        with Probe(model) as probe:
            loop(model, prompts, max_new_tokens=8, block_length=4)
        runs[method] = [(forward.queries, forward.keys, forward.head_rows) for forward in probe.forwards]
    assert runs["LLaDA"] == 8 * [(15, 15, 15)]
    assert runs["Fast-dLLM prefix"] == [(15, 15, 15)] + 3 * [(8, 15, 8)] + [(15, 15, 15)] + 3 * [(4, 15, 4)]
    assert runs["Fast-dLLM dual"] == 2 * ([(15, 15, 15)] + 3 * [(4, 15, 4)])
    one_prompt = [(15, 15, 15)] + 3 * [(8, 15, 8)] + 4 * [(4, 15, 4)]
    assert runs["FlashDLM freecache"] == len(prompts) * one_prompt


def test_references_are_compared_with_our_settings_for_them(bench, tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = "--prompt-length 16 --block-length 4 --json".split()
    bench(*SHORT, *arguments, str(path), "--reference", reference.__file__)
    printed = capsys.readouterr().out.splitlines()
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [row for name in reference.METHODS for row in (f"{name} (ours)", name)]
    for name in reference.METHODS:
        ours, other = rows[f"{name} (ours)"], rows[name]
        assert ours["like"] == name and other["like"] is None
        assert ours["equal_share"] == 1 and ours["nfe"] == other["nfe"]
        assert ours["speed_over_like"] == other["seconds"] / ours["seconds"]
    assert rows["LLaDA (ours)"]["kept_bytes"] == rows["LLaDA"]["kept_bytes"] == 0
    assert rows["Fast-dLLM dual (ours)"]["kept_bytes"] == 4 * 2 * 6 * 128 * (16 + 8)
    header = next(index for index, line in enumerate(printed) if line.split()[-1:] == ["equal%"])
    assert [line.split("  ")[0] for line in printed[header + 1 : -1]] == [
        f"{name} (ours)" for name in reference.METHODS
    ]
    times = sorted(row["speed_over_like"] for row in rows.values() if row["like"])
    assert printed[-1] == f"times: {times[0]:.2f} to {times[-1]:.2f}, median {times[3]:.2f}"


def test_compiled_forwards_are_measured_beside_the_others(bench, tmp_path, monkeypatch, capsys):
    eager = CompileConfig(backend="eager", mode=None)
    monkeypatch.setattr(decoding, "compile_config", lambda device: eager)
    path = tmp_path / "record.json"
    bench(*SHORT, "--methods", "freecache,guided,ar", "--compile", "--json", str(path))
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["freecache", "freecache (compiled)", "guided", "guided (compiled)", "ar"]
    for name in ("freecache", "guided"):
        plain, compiled = rows[name], rows[f"{name} (compiled)"]
        assert not plain["compiled"] and compiled["compiled"] and compiled["like"] == name
        assert compiled["equal_share"] == 1 and compiled["nfe"] == plain["nfe"]
        assert compiled["guider_forwards"] == plain["guider_forwards"]
        assert 0 < compiled["outside_forwards_share"] < 1
        assert compiled["warm_up_seconds"] > compiled["seconds"], "it compiled before the runs"
        assert compiled["graphs"] > 0 == compiled["later_graphs"] == plain["graphs"]
    assert "freecache (compiled)" in capsys.readouterr().out.partition("equal%  graphs  later")[2]


def test_ceilings_are_measured_before_the_runs_and_after_them(bench, tmp_path, monkeypatch):
    both = iter([Ceilings(1e9, 4e9), Ceilings(3e9, 2e9)])
    monkeypatch.setattr(Ceilings, "measure", lambda *_: next(both))
    path = tmp_path / "record.json"
    bench(*SHORT, "--methods", "freecache", "--json", str(path))
    ceilings = json.loads(path.read_text())["ceilings"]
    assert (ceilings["flops_per_second"], ceilings["bytes_per_second"]) == (3e9, 4e9)


def test_graphs_are_captured_where_launches_cost():
    assert decoding.compile_config(torch.device("cuda")).mode == "reduce-overhead"
    assert decoding.compile_config(torch.device("cpu")).mode is None


def test_steps_write_several_tokens_each(bench, tmp_path):
    path = tmp_path / "record.json"
    options = "--random-weights --steps 2 --block-length 4 --methods plain,freecache --fill-canvas --json".split()
    bench(*SHORT, *options, str(path))
    for row in json.loads(path.read_text())["rows"]:
        assert row["nfe"] == 2 and row["tokens_per_forward"] == 4
        assert row["milliseconds_per_step"] == 1000 * row["seconds"] / 2


def test_random_weights_take_prompts_of_any_length(bench, capsys):
    long = "--random-weights --prompt-length 600 --steps 1 --block-length 8 --methods freecache,guided,ar".split()
    bench(*SHORT, *long)
    assert " 608 " in capsys.readouterr().out


def test_the_record_has_its_schema_and_is_the_last_line(bench, capsys):
    bench(*SHORT, *METHODS, "--json", "-")
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert list(record) == RECORD_KEYS
    rows = {row["method"]: row for row in record["rows"]}
    assert all(sorted(row) == sorted(ROW_KEYS) for row in rows.values())
    assert record["command"].startswith("flashdlm bench --config tiny --new-tokens 8 --problems 2 --batch-size 1 ")
    plain, guided, autoregressive = rows["plain"], rows["guided"], rows["ar"]
    assert plain["nfe"] == 8 and plain["speed_over_full_canvas"] == 1
    assert plain["active_tokens"] == 8 * (autoregressive["active_tokens"] - 7 + 8)
    assert autoregressive["nfe"] == autoregressive["tokens"] == 8 and autoregressive["accuracy"] is None
    assert 1 <= guided["guider_forwards"] == guided["nfe"] <= 8
    assert 0 <= guided["drafts_accepted"] <= guided["drafts_judged"]
    for row in rows.values():
        assert 0 < row["outside_forwards_share"] < 1
        assert row["seconds_over_floor"] == row["seconds"] / row["floor_seconds"]
        assert row["tokens_per_second"] == pytest.approx(2 * row["tokens"] / row["seconds"])
    # The table has a line for each row, under its headers.
    header = next(index for index, line in enumerate(lines) if line.startswith("method"))
    assert lines[header].split() == comparison.HEADERS
    assert [line.split()[0] for line in lines[header + 1 : header + 1 + len(rows)]] == list(rows)


def test_the_autoregressive_twin_stops_where_the_answers_end():
    options = {"max_new_tokens": 30, "block_length": 8, "stop_at_eos": True}
    checkpoint = Checkpoint.load(str(TINY / "dlm"), "cpu", "auto")
    workload = problem_workload(checkpoint, 5, 2, 0, options)
    recipe = recipes(16, 4)["ar"]
    lengths = [workload.fixed_lengths(recipe, index) for index in range(3)]
    drawn = problems(5)
    random.Random(0).shuffle(drawn)
    held_out = [len(checkpoint.tokenizer(problem.answer).input_ids) + 1 for problem in drawn[:5]]
    assert sum(lengths, []) == [min(length, 30) for length in held_out]
    assert min(held_out) < 30 < max(held_out)
    models = Models(checkpoint.model, checkpoint=checkpoint, twin=random_twin(checkpoint.model))
    total = run(models, recipe, workload)
    assert total.tokens == sum(sum(lengths, []))
    assert len(total.forwards["twin"]) == sum(map(max, lengths))
    filled = replace(workload, options=options | {"stop_at_eos": False})
    assert filled.fixed_lengths(recipe, 0) is None and workload.fixed_lengths(recipes(16, 4)["plain"], 0) is None


def test_long_answers_are_the_longest_quarter():
    workload = Workload([{}, {}], {}, [[1, 2, 3], [4]], [[5, 9, 5], [7]])
    assert [workload.is_long(index) for index in (0, 1)] == [[False, True, False], [False]]
    figures = Run(num_rows=4, correct=3, long_rows=2, long_correct=1, tokens=4, nfe=4, seconds=1.0).figures()
    assert (figures["accuracy"], figures["accuracy_of_long"]) == (0.75, 0.5)


SMALL_LLADA2 = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, vocab_size=99)
SMALL_LLADA2 |= dict(num_attention_heads=4, num_key_value_heads=2, num_experts=8, n_group=4, topk_group=2)
SMALL_LLADA2 |= dict(num_experts_per_tok=3, mask_token_id=98, pad_token_id=97)


def test_block_causal_models_decode_by_the_methods_they_have(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "llada2-mini", ("llada2_moe", SMALL_LLADA2))
    path, short = tmp_path / "record.json", "--new-tokens 32 --prompt-length 4 --steps 1 --batch-size 1".split()
    command = [*"--config llada2-mini --random-weights --guider tiny --device cpu --repeats 1".split(), *short]
    bench(*command, "--methods", "plain,freecache+window", "--json", str(path))
    assert all(row["num_rows"] == 1 for row in json.loads(path.read_text())["rows"])
    model = random_model(named_config("llada2-mini"), torch.float32, torch.device("cpu"), 0)
    possible = {recipe.name for recipe in choose(None, recipes(1, 32), {}, Models(model, {"guider": model}))}
    assert possible == set(recipes(1, 32)) - {"prefix", "prefix+threshold", "dkv", "ar"}
    with pytest.raises(ValueError, match="ar needs a model of type llada or Dream, got .llada2_moe.: leave ar out."):
        bench(*command, "--methods", "ar")


def random_twin(model):
    return random_model(twin_config(model.config), torch.float32, model.device, 0)


def test_the_best_method_is_fast_and_as_right_as_plain_ones():
    rows = [
        {"batch_size": 1, "method": name, "accuracy": accuracy, "seconds": seconds}
        for name, accuracy, seconds in [
            ("plain-eos", 0.95, 8.0), ("dual+threshold", 0.9, 2.0), ("guided", 0.945, 1.0), ("ar", None, 3.0),
        ]
    ]  # fmt: skip
    rows[-1]["stops_at_answers"] = True
    assert comparison.report_best(rows) == ["", "best at batch 1: guided, 3.00x ar, 2.00x dual+threshold"]
    assert comparison.report_best(rows[1:]) == [], "nothing says how right a plain decode is"
    rows[-1]["stops_at_answers"] = False
    assert comparison.report_best(rows) == ["", "best at batch 1: guided, 2.00x dual+threshold"]


def test_a_quick_look_sets_what_the_caller_leaves_open(bench, tmp_path, capsys):
    path = tmp_path / "record.json"
    bench("--config", "tiny", "--quick", "--problems", "1", "--methods", "ar,guided", "--json", str(path))
    record = json.loads(path.read_text())
    assert record["options"]["max_new_tokens"] == 64 and {row["batch_size"] for row in record["rows"]} == {1}
    assert {row["num_rows"] for row in record["rows"]} == {1}
    assert "batch 1, 1 runs of 2 methods will take about " in capsys.readouterr().err


def test_random_weights_and_long_prompts(bench, tmp_path):
    path = tmp_path / "record.json"
    options = "--new-tokens 6 --block-length 3 --batch-size 1,2 --repeats 1 --prompt-length 11 --device cpu".split()
    options += ["--methods", "plain,freecache,guided,LLaDA", "--reference", reference.__file__]
    bench("--config", "tiny", *options, "--problems", "2", "--json", str(path))
    trained = json.loads(path.read_text())["rows"]
    bench("--config", "tiny", "--random-weights", *options, "--json", str(path))
    rows = json.loads(path.read_text())["rows"]
    for name in ("active_tokens", "nfe"):
        assert rows[0][name] == trained[0][name]
    assert [row["batch_size"] for row in rows] == 5 * [1] + 5 * [2]
    assert rows[0]["nfe"] == 6 and rows[0]["active_tokens"] == 6 * (11 + 6)
    assert [row["method"] for row in rows[3:5]] == ["LLaDA (ours)", "LLaDA"]
    assert {row["active_tokens"] for row in rows[3:5]} == {rows[0]["active_tokens"]}
    assert rows[0]["accuracy"] is None and trained[0]["accuracy"] is not None


@pytest.mark.parametrize("name", ["llada-8b", "dream-7b", "llada-50m", "llada2-mini"])
@pytest.mark.parametrize("guider", [None, "qwen2.5-0.5b"])
def test_shapes_of_the_large_models(name, guider):
    config = named_config(name)
    args = argparse.Namespace(guider=guider, config=name)
    shapes = [config, guider_config(args, config), *([] if name == "llada2-mini" else [twin_config(config)])]
    with torch.device("meta"):
        sizes = [AutoModelForCausalLM.from_config(shape).num_parameters() / 1e9 for shape in shapes]
    billions = {"llada-8b": 8.02, "dream-7b": 7.62, "llada-50m": 0.05, "llada2-mini": 16.26}[name]
    assert {sizes[0]} == {sizes[0], *sizes[2:]} and sizes[0] == pytest.approx(billions, abs=0.01)
    if name in ("llada-8b", "dream-7b"):  # others have vocabularies of other sizes
        assert sizes[1] == pytest.approx({None: 1.5, "qwen2.5-0.5b": 0.48}[guider], abs=0.06)


def test_every_method_has_options_that_generate_takes(tiny):
    for recipe in recipes(16, 4).values():
        DiffusionOptions(**recipe.options)
        ARGuider(tiny("guider"), **recipe.rule)
    assert list(recipes(16, 4))[:2] == ["plain", "plain-eos"]


def test_the_plots_are_written(bench, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    bench(*SHORT, "--methods", "plain,guided", "--plot", str(tmp_path / "bench.png"))
    short = settings(8, 8, ["guider"], [200])[:6]
    monkeypatch.setattr(ablation, "settings", lambda *_: short)
    bench("--ablate", "--problems", "1", "--new-tokens", "8", "--plot", str(tmp_path), "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.png", "pareto.png", "seconds.png"]


def test_the_frontier_holds_what_nothing_beats():
    pytest.importorskip("matplotlib")
    from hf_flashdlm.bench.plots import pareto_rows

    rows = [dict(nfe=nfe, accuracy=accuracy) for nfe, accuracy in ((8, 0.9), (4, 0.5), (6, 0.4), (9, 0.9), (4, 0.6))]
    assert pareto_rows(rows) == [dict(nfe=4, accuracy=0.6), dict(nfe=8, accuracy=0.9)]
    costs = [dict(seconds=one["nfe"], accuracy=one["accuracy"]) for one in rows]
    assert pareto_rows(costs, "seconds") == [dict(seconds=4, accuracy=0.6), dict(seconds=8, accuracy=0.9)]


def test_the_groups_of_the_tradeoff_are_few_and_each_has_rows():
    pytest.importorskip("matplotlib")
    from hf_flashdlm.bench.plots import WRITERS, writer

    results = Path(__file__).parents[1] / "examples" / "results" / "ablation.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert {writer(row) for row in rows} == set(WRITERS) and len(WRITERS) <= 6


def test_labels_of_the_tradeoff_are_beside_each_other_and_over_no_point():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from hf_flashdlm.bench.plots import _label

    figure, panel = pyplot.subplots(figsize=(8, 6))
    members = [(share / 10, share / 10) for share in range(1, 10)]
    panel.set(xlim=(0, 1), ylim=(0, 1))
    taken = [panel.transData.transform(member) for member in members]
    labels = []
    for text in ("first", "second", "third"):
        _label(panel, text, members, "black", taken, labels)
    pyplot.close(figure)
    for index, (low, high) in enumerate(labels):
        assert not any((low < point).all() and (point < high).all() for point in taken)
        assert not any((low < stop).all() and (start < high).all() for start, stop in labels[:index])
        assert (low >= panel.bbox.min).all() and (high <= panel.bbox.max).all()


def test_the_interval_is_wilsons():
    # 9 of 10 with z = 2: (0.9 + 0.2 +- 2 sqrt(0.009 + 0.01)) / 1.4 would be 0.589 to 0.983; z is 1.96.
    assert binomial_interval(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert binomial_interval(0, 4) == pytest.approx((0, 3.8416 / 7.8416), abs=1e-6)


def test_a_run_is_a_mean_per_row():
    figures = Run(num_rows=2, correct=1, tokens=6, nfe=4, active_tokens=10, seconds=2.0, forward_seconds=1.5).figures()
    assert figures["tokens"] == 3 and figures["nfe"] == 2 and figures["active_tokens"] == 5
    assert figures["tokens_per_forward"] == 1.5
    assert figures["outside_forwards_share"] == 0.25
    assert figures["accuracy"] == 0.5


def test_a_table_is_aligned():
    assert format_table(["a", "bb"], [["long", "1"], ["x", "100"]]) == "a      bb\nlong    1\nx     100"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`--model` or `--config` must be given"),
        (["--model", "a", "--config", "tiny"], "`--model` or `--config` must be given"),
        (["--model", "a", "--random-weights"], "`--random-weights` belongs to `--config`"),
        (["--config", "llada-8b"], "`--config llada-8b` has no weights: add `--random-weights`"),
        (["--config", "llada"], "argument --config: invalid choice: 'llada'"),
        (["--config", "tiny", "--dtype", "float31"], "`--dtype` must be auto or a dtype of torch, got 'float31'."),
        (["--config", "tiny", "--device", "abacus"], "`--device` must be auto or a device"),
        (["--config", "tiny", "--batch-size", "0"], "argument --batch-size: must be an integer of at least 1"),
        (["--config", "tiny", "--batch-size", "1,,2"], "argument --batch-size: must be names with commas"),
        (["--config", "tiny", "--methods", "magic"], "`--methods` must be some of plain, "),
        (["--config", "tiny", "--problems", "100000"], "`--problems` must be at most "),
        (["--model", str(TINY / "dlm"), "--methods", "guided"], "`--methods` guided needs a guider: add `--guider`."),
        (["--config", "tiny", "--random-weights", "--guider", "x"], "`--guider` must be one of qwen2.5-0.5b, "),
        (["--config", "tiny", "--json", "/no/such/a.json"], "`--json` must be - or a file in a folder that exists"),
        (["--config", "tiny", "--plot", "/no/such/a.png"], "`--plot` must be a .png or .svg file in a folder"),
        (["--config", "tiny", "--plot", "a.txt"], "`--plot` must be a .png or .svg file in a folder"),
        (["--config", "tiny", "--reference", "/no/such.py"], "`--reference` must be a Python file"),
        (["--config", "tiny", "--reference", comparison.__file__ + "x"], "`--reference` must be a Python file"),
        (
            ["--config", "tiny", "--reference", "a.py", "--steps", "8"],
            "`--steps` has no meaning with `--reference`, whose loops write a token per step: drop it.",
        ),
        (["--config", "tiny", "--guiders", "a,b"], "`--guiders` belongs to `--ablate`"),
        (["--ablate", "--config", "tiny"], "`--config` has no meaning with `--ablate`"),
        (["--ablate", "--compile"], "`--compile` has no meaning with `--ablate`"),
        (["--ablate", "--batch-size", "1,4"], "`--batch-size` must be one number with `--ablate`"),
        (["--ablate", "--plot", "/no/such"], "`--plot` must be a folder that exists for an ablation"),
        (["--ablate", "--guiders", "a/model"], "`--guiders` must be folders of different names"),
        (["--ablate", "--guiders", "a/x,b/x"], "`--guiders` must be folders of different names"),
        (["--show", "/no/such.json"], "`--show` must be a file that `--json` has written"),
        (["--show", str(TINY / "dlm" / "config.json")], "`--show` must be a file that `--json` has written"),
        (["--ablate", "--json", str(TINY / "dlm" / "config.json")], "`--json` must be a new file or one that"),
    ],
)
def test_a_mistake_is_one_sentence(bench, arguments, message):
    with pytest.raises(ValueError) as error:
        bench(*arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_reference_without_methods_and_uneven_prompts_are_refused(bench, tmp_path):
    for text in ("LOOPS = {}\n", "METHODS = []\n", "METHODS = {'a': print}\n"):
        (tmp_path / "loops.py").write_text(text)
        with pytest.raises(ValueError, match="must define METHODS"):
            bench(*SHORT, "--reference", str(tmp_path / "loops.py"))
    uneven = [*SHORT, "--batch-size", "4", "--reference", reference.__file__, "--methods", "LLaDA"]
    with pytest.raises(ValueError, match="take prompts of one length: add `--prompt-length`"):
        bench(*uneven)


def test_plots_without_matplotlib_are_refused(bench, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    with pytest.raises(ValueError, match="needs matplotlib"):
        bench(*SHORT, "--plot", str(tmp_path / "a.png"))


@pytest.mark.parametrize("small", ["1", ""])
def test_the_script_for_a_gpu_measures_each_case_once(tmp_path, small):
    log, stub, folder = tmp_path / "log", tmp_path / "stub", tmp_path / "results"
    # Logs its arguments and writes the file it is asked for, except in the very first call, which fails.
    stub.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n[ -e {tmp_path}/failed ] || {{ touch {tmp_path}/failed; exit 1; }}\n'
        'while [ "$1" != --json ]; do shift; done\ntouch "$2"\n'
    )
    stub.chmod(0o755)
    script = ["bash", Path(__file__).parents[1] / "examples" / "gpu.sh", folder]
    environment = os.environ | {"SMALL": small, "FLASHDLM": str(stub)}

    def run(**more):
        done = subprocess.run(script, env=environment | more, capture_output=True, text=True)
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return done, calls

    late, none = run(BUDGET="0")
    assert late.returncode == 1 and none == [] and "no time left" in late.stderr
    first, calls = run()
    assert first.returncode == 1 and first.stderr.count("failed:") == 1
    second, again = run()
    assert second.returncode == 0 and again == calls[:1], "only what failed is measured again"
    third, nothing = run()
    assert third.returncode == 0 and nothing == []
    parser = Parser()
    add_commands(parser.add_subparsers())
    for call in calls:
        args = parser.parse_args(call.split())
        assert set(args.methods) <= set(recipes(1, 1))
    sizes = {(args.prompt_length, args.new_tokens) for args in (parser.parse_args(call.split()) for call in calls)}
    assert small or sizes == {(128, 256), (128, 1024), (1024, 256), (32512, 256)}


def test_the_profile_of_a_step_names_its_parts(tmp_path):
    script, path = Path(__file__).parents[1] / "examples" / "profile_step.py", tmp_path / "profile.json"
    arguments = ["--problems", "2", "--batch-size", "2", "--passes", "1", "--threads", "1", "--json", path]
    run = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == run.stdout.splitlines()[0].split()[-4:]
    for row in rows:
        parts = row["microseconds_per_step"]
        assert all(time > 0 for time in parts.values())
        assert {"matrix products of weights", "attention", "the rest of the model"} < parts.keys()
        assert ("the rest of the guider" in parts) == ("guided" in row["method"])


def test_help_names_every_option(capsys):
    parser = Parser()
    add_commands(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["bench", "--help"])
    printed = capsys.readouterr().out.partition("options:")[2]
    for name in (
        "model config random-weights guider prompt-length new-tokens block-length problems batch-size methods "
        "fill-canvas reference compile steps repeats threads dtype device seed ablate guiders json show plot"
    ).split():
        assert f"--{name}" in printed


def test_threads_and_recipe_defaults(bench, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    bench(*SHORT, "--methods", "plain-eos", "--threads", "2", "--fill-canvas")
    assert " 8.0 " in capsys.readouterr().out
    assert seen == [2]
    assert Recipe("a") == Recipe("a", {}, None, {}, None, True, False, False, None)
