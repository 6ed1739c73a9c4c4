"""The figures of the README are those of the committed records."""

import json
from pathlib import Path

import pytest

from hf_flashdlm.comparison import report_comparison


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]


def record(name):
    return json.loads((REPOSITORY / "examples" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_speed_table_is_what_bench_shows_of_its_record():
    assert f"```\n{report_comparison(record('bench'))}\n```" in README


def test_the_table_of_guiders_is_of_the_ablation():
    rows = {(row["group"], row["name"]): row for row in record("ablation")["rows"]}
    shown = [cells for cells in CELLS if len(cells) == 6 and tuple(cells[:2]) in rows]
    assert len(shown) >= 10
    for group, name, *figures in shown:
        row = rows[group, name]
        expected = [f"{100 * row['accuracy']:.1f}", f"{row['nfe']:.2f}", f"{row['guider_forwards']:.2f}"]
        assert figures == [*expected, f"{row['seconds']:.1f}"]


@pytest.mark.parametrize("row", record("demo")["methods"], ids=lambda row: row["name"])
def test_the_table_of_the_demo_is_its_record(row):
    (cells,) = [cells for cells in CELLS if cells[0] == row["name"]]
    expected = [f"{row[name]:.1f}" for name in ("nfe", "guider_forwards")]
    assert cells[1].split()[0] == f"{100 * row['accuracy']:.1f}" and cells[2:4] == expected
    assert cells[6:] == [
        f"{row['seconds']:.1f}",
        *(f"{row[name]:.1f}x" for name in ("speed_over_full_canvas", "speed_over_eos_stop")),
    ]
