"""`flashdlm bench --ablate`: its table, its file, and its verdict."""

import json

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_flashdlm.bench import ablation
from hf_flashdlm.bench.ablation_table import PART_COMBINATIONS, PARTS, settings
from hf_flashdlm.bench.decoding import Models
from hf_flashdlm.bench.run import binomial_interval
from hf_flashdlm.bench.workload import problem_workload
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.generation_config import DiffusionOptions
from hf_flashdlm.guider import ARGuider
from hf_flashdlm.tiny import FOLDER as TINY


def test_every_row_of_the_ablation_has_options_that_generate_takes(tiny):
    table = settings(64, 8, ["small", "large"], [200])
    for setting in table:
        options = setting.recipe.options
        ours = {
            name: options[name] for name in options.keys() - {"do_sample", "temperature"}
        }  # the other options are those of Transformers
        DiffusionOptions(**ours).tiling(64)
        ARGuider(tiny("guider"), **setting.recipe.rule)
    names = [(setting.group, setting.recipe.name) for setting in table]
    assert len(set(names)) == len(names), "two rows have the same name"
    assert {name for parts in PART_COMBINATIONS for name in parts.split()} == set(PARTS)
    for group in ("guider size", "guider alone"):
        assert {setting.recipe.guider for setting in table if setting.group == group} == {"small", "large"}
    large = [row.recipe.name for row in table if row.group == "intersection" and row.recipe.guider == "large"]
    assert large == [f"large: both {sure}, window 32" for sure in (0.3, 0.5, 0.6)]
    assert [setting.recipe.options["block_length"] for setting in table if setting.group == "plain order"] == [
        1, 2, 4, 8, 16, 64
    ]  # fmt: skip


def test_an_ablation_goes_on_where_its_file_ends(bench, tmp_path, monkeypatch, capsys):
    short = [
        row
        for row in settings(8, 8, ["guider"], [200])
        if row.recipe.name in ("plain", "EOS", "plain, block 8", "V 4")
    ]
    monkeypatch.setattr(ablation, "settings", lambda *_: short)
    path = tmp_path / "ablation.json"
    arguments = ["--ablate", "--problems", "2", "--new-tokens", "8", "--json", str(path), "--device", "cpu"]
    bench(*arguments)
    printed = capsys.readouterr()
    first = json.loads(path.read_text())
    assert [row["name"] for row in first["rows"]] == ["plain", "EOS", "plain, block 8", "V 4"]
    assert printed.err.count(" of 4: ") == 3, "`EOS` and `plain, block 8` are one setting"
    assert first["rows"][1]["nfe"] == first["rows"][2]["nfe"]
    assert set(first["verdict"]) == {
        "best_plain", "unguided_nfe", "unguided_seconds", "guided_nfe", "guided_seconds"
    }  # fmt: skip
    bench(*arguments)
    again = capsys.readouterr()
    assert again.err == "", "nothing is measured twice"
    bench("--show", str(path))
    shown = capsys.readouterr().out
    assert shown.startswith(f"$ flashdlm bench --new-tokens 8 --problems 2 --device cpu --ablate --json {path}\n")
    assert shown.endswith(again.out.partition("commit: ")[2].partition("\n")[2])
    assert json.loads(path.read_text())["rows"] == first["rows"]
    bench(*arguments, "--problems", "1")
    second = json.loads(path.read_text())
    assert [row["num_rows"] for row in second["rows"]] == [1, 1, 1, 1]
    assert len(second["earlier"]) == 3, "rows of other settings stay in the file"


def test_rows_that_draw_are_over_all_seeds_and_a_guider_alone_needs_no_model(bench, tmp_path, monkeypatch):
    table = settings(8, 8, ["guider"], [200])
    short = [row for row in table if row.recipe.name in ("plain", "guider, temperature 1.0", "guider")]
    short = [row for row in short if row.group in ("parts", "sampling", "guider alone")]
    assert [row.seeds for row in short] == [(0,), (0,), (0, 1, 2), (0,)]
    monkeypatch.setattr(ablation, "settings", lambda *_: short)
    runs, run = [], ablation.run

    def noted(models, recipe, workload):
        runs.append(run(models, recipe, workload))
        return runs[-1]

    monkeypatch.setattr(ablation, "run", noted)
    path = tmp_path / "ablation.json"
    arguments = ["--ablate", "--problems", "3", "--new-tokens", "8", "--json", str(path), "--device", "cpu"]
    bench(*arguments)
    rows = json.loads(path.read_text())["rows"]
    assert [row["seeds"] for row in rows] == [[0], [0], [0, 1, 2], [0]]
    drawn, of_seeds = rows[2], runs[3:6]  # after the warm-up and a run of each earlier row
    assert drawn["num_rows"] == 9 and drawn["seconds_of_runs"] == [single.seconds for single in of_seeds]
    for name in ("nfe", "tokens", "drafts_judged", "drafts_accepted"):
        assert drawn[name] == sum(getattr(single, name) for single in of_seeds) / 9
    assert drawn["accuracy_interval"] == list(binomial_interval(sum(single.correct for single in of_seeds), 9))
    alone = rows[3]
    assert alone["group"] == "guider alone" and alone["nfe"] == alone["active_tokens"] == 0
    assert 1 <= alone["guider_forwards"] == alone["tokens"] <= 8
    again = len(runs)
    bench(*arguments)
    assert json.loads(path.read_text())["rows"] == rows and len(runs) == again + 1, "the warm-up alone"


def test_a_seed_decides_what_is_drawn_and_a_guider_alone_decodes_greedily_as_transformers_does():
    checkpoint = Checkpoint.load(str(TINY / "dlm"), "cpu", "float32")
    models = Models.load(checkpoint, {"guider": str(TINY / "guider")}, torch.device("cpu"), "float32")
    workload = problem_workload(checkpoint, 2, 2, 0, {"max_new_tokens": 24})
    table = {(row.group, row.recipe.name): row for row in settings(24, 8, ["guider"], [200])}
    recipe = table["sampling", "threshold, temperature 1.0"].recipe
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(models.decode(recipe, workload.batches[0], workload.options)[0].tolist())
    assert texts[0] == texts[1] != texts[2]
    alone = table["guider alone", "guider"].recipe
    ids, _ = models.decode(alone, workload.batches[0], workload.options)
    expected = models.guiders["guider"].generate(**workload.batches[0], max_new_tokens=24, do_sample=False)
    assert ids.tolist() == expected.tolist()
    assert ablation.can_decode(models, "guider")
    alphabet = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    models.tokenizers["guider"] = PreTrainedTokenizerFast(tokenizer_object=alphabet)
    assert not ablation.can_decode(models, "guider")


def test_the_verdict_names_what_comes_within_a_point():
    def row(name, accuracy, nfe, seconds, guider=None, is_plain=False):
        return dict(
            name=name, group="g", accuracy=accuracy, nfe=nfe, seconds=seconds, guider=guider, is_plain=is_plain
        )

    rows = [
        row("slow", 0.98, 64, 9, is_plain=True),
        row("plain", 0.98, 32, 5, is_plain=True),
        row("few", 0.97, 10, 4),
        row("quick", 0.98, 12, 3),
        row("wrong", 0.96, 2, 1),
        row("guided", 0.97, 5, 2, guider="a"),
        row("lucky", 0.99, 1, 1) | {"group": "sampling"},
        row("alone", 0.99, 0, 1, guider="a") | {"group": "guider alone"},
    ]
    verdict = ablation.verdict(rows)
    assert {name: row["name"] for name, row in verdict.items()} == {
        "best_plain": "plain",
        "unguided_nfe": "few",
        "unguided_seconds": "quick",
        "guided_nfe": "guided",
        "guided_seconds": "guided",
    }
    assert ablation.verdict(rows[:5])["guided_nfe"] is None
