"""The figures of the README are those of the committed records."""

import json
from pathlib import Path
from statistics import median

import pytest

from hf_flashdlm.bench.comparison import report_comparison


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]


def record(name):
    return json.loads((REPOSITORY / "examples" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_speed_table_is_what_bench_shows_of_its_record():
    assert f"```\n{report_comparison(record('bench'))}\n```" in README


@pytest.mark.parametrize("method", ["freecache+window+threshold", "guided+window+intersection", "ar"])
def test_tokens_per_second_grow_with_the_batch_where_windows_are_narrow(method):
    rows = {row["batch_size"]: row for row in record("bench")["rows"] if row["method"] == method}
    assert list(rows) == [1, 4, 16]
    assert rows[1]["tokens_per_second"] < rows[4]["tokens_per_second"] < rows[16]["tokens_per_second"]


def test_the_table_of_guiders_is_of_the_ablation():
    rows = {(row["group"], row["name"]): row for row in record("ablation")["rows"]}
    shown = [cells for cells in CELLS if len(cells) == 6 and tuple(cells[:2]) in rows]
    assert len(shown) >= 10
    for group, name, *figures in shown:
        row = rows[group, name]
        expected = [f"{100 * row['accuracy']:.1f}", f"{row['nfe']:.2f}", f"{row['guider_forwards']:.2f}"]
        assert figures == [*expected, f"{row['seconds']:.1f}"]


def test_the_time_outside_of_a_forward_is_that_of_the_record():
    rows = [row for row in record("bench")["rows"] if row["batch_size"] == 1 and row["method"] != "ar"]
    rows = [row for row in rows if row["guider_forwards"] == 0]
    forwards = [row["num_rows"] * row["nfe"] for row in rows]
    outside = [1000 * row["seconds"] * row["outside_forwards_share"] for row in rows]
    milliseconds = [f"{one / count:.1f}" for one, count in zip(outside, forwards, strict=True)]
    assert f"forwards are {min(milliseconds)} to {max(milliseconds)} ms at batch 1" in " ".join(README.split())


def test_the_profile_of_a_step_is_its_record():
    rows, shares = record("profile")["rows"], []
    shown = {cells[0]: cells[1:] for cells in CELLS}
    assert shown["microseconds per step"] == [row["method"] for row in rows]
    for index, row in enumerate(rows):
        parts = dict(row["microseconds_per_step"])
        assert {part: shown[part][index] for part in parts} == {part: f"{one:.0f}" for part, one in parts.items()}
        del parts["set-up of the call"]
        forwards = sum(one for part, one in parts.items() if part.startswith("forward"))
        shares.append(f"{100 * (1 - forwards / sum(parts.values())):.0f} %")
    text = "Of a step without the set-up of its call {}, {} and {} are not inside a forward."
    assert text.format(*shares) in " ".join(README.split())


def test_the_comparison_with_other_loops_is_its_record():
    rows, text = record("reference")["rows"], " ".join(README.split())
    pairs = [row for row in rows if row["like"] is not None]
    assert all(row["equal_share"] > 0.9 for row in pairs) and len(pairs) == 21
    shown = {cells[0]: cells[1:] for cells in CELLS}
    for row in pairs:
        assert shown[row["like"]][[1, 4, 16].index(row["batch_size"])] == f"{row['speed_over_like']:.2f}x"
    assert f"The median is {median(row['speed_over_like'] for row in pairs):.2f}x" in text
    assert all(row["speed_over_like"] > 1 for row in pairs)
    others = [row for row in rows if row["like"] is None and row["batch_size"] == 1]
    bounds = [f"{1 / (1 - row['outside_forwards_share']):.2f}" for row in others]
    assert f"a loop that cost nothing would be {min(bounds)} to {max(bounds)} times as fast" in text


def test_the_memory_of_a_long_prompt_is_that_of_its_record():
    (row,) = record("long")["rows"]
    kept, peak = (f"{row[name] / 1e6:.0f} MB" for name in ("kept_bytes", "peak_memory_bytes"))
    assert f"keeps {kept} of keys and values and peaks at {peak} beside" in " ".join(README.split())


def test_what_is_said_of_the_guiders_is_what_the_ablation_found():
    ablation, text = record("ablation"), " ".join(README.split())
    sizes = {name: model["parameters"] for name, model in ablation["models"].items()}
    guider, early, small, large = (
        f"{sizes[name] / sizes['model']:.2f}" for name in ("guider", "early", "small", "large")
    )
    assert f"have {guider}, {early} (early: trained for less long), {small} (small) and {large} (large) of" in text
    rows = {(row["group"], row["name"]): row for row in ablation["rows"]}
    assert f"of the {len(ablation['rows'])} rows" in text
    unguided = rows["unguided rules", "Frechet 0.5, block 4"]
    both = rows["guider size", "guider: guider + intersection"]
    windowed = rows["parts", "EOS + FreeCache + window + guider + intersection"]
    forwards, seconds = both["nfe"] / unguided["nfe"], windowed["seconds"] / unguided["seconds"]
    assert f"takes {forwards:.2f} of its forwards, and with a window of 16 {seconds:.2f} of its seconds" in text
    alone = rows["guider alone", "guider"]
    assert f"it takes {alone['seconds']:.1f} s and gets {100 * alone['accuracy']:.1f} % right" in text


def test_the_best_guided_setting_meets_the_target():
    """Within a point of the best plain order at half of the forwards that suffice without a guider, and sooner."""
    ablation = record("ablation")
    sizes = {name: model["parameters"] for name, model in ablation["models"].items()}
    best = max(row["accuracy"] for row in ablation["rows"] if row["is_plain"])
    close = [row for row in ablation["rows"] if row["accuracy"] >= best - 0.01 - 1e-9]
    close = [row for row in close if row["group"] not in ("sampling", "guider alone")]
    unguided = [row for row in close if row["guider"] is None]
    guided = [row for row in close if row["guider"] is not None and 4 * sizes[row["guider"]] <= sizes["model"]]
    forwards, seconds = (min(row[name] for row in unguided) for name in ("nfe", "seconds"))
    assert any(row["nfe"] <= forwards / 2 and row["seconds"] < seconds for row in guided)


@pytest.mark.parametrize("row", record("demo")["methods"], ids=lambda row: row["name"])
def test_the_table_of_the_demo_is_its_record(row):
    (cells,) = [cells for cells in CELLS if cells[0] == row["name"]]
    expected = [f"{row[name]:.1f}" for name in ("nfe", "guider_forwards")]
    assert cells[1].split()[0] == f"{100 * row['accuracy']:.1f}" and cells[2:4] == expected
    assert cells[6:] == [
        f"{row['seconds']:.1f}",
        *(f"{row[name]:.1f}x" for name in ("speed_over_full_canvas", "speed_over_eos_stop")),
    ]


def test_the_first_snippet_prints_an_answer(capsys):
    snippet = README.split("```python\n")[1].split("```")[0]
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith("#### 7")
