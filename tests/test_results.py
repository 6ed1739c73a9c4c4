"""What the pages say of the committed records is so."""

import json
from pathlib import Path

import pytest
from recorded_decodes import RECORDINGS

from hf_flashdlm import METHODS


def record(name):
    path = Path(__file__).parents[1] / "examples" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["freecache+window+threshold", "guided+window+intersection", "ar"])
def test_tokens_per_second_grow_with_the_batch_where_windows_are_narrow(method):
    rows = {row["batch_size"]: row for row in record("bench")["rows"] if row["method"] == method}
    assert list(rows) == [1, 4, 16]
    assert rows[1]["tokens_per_second"] < rows[4]["tokens_per_second"] < rows[16]["tokens_per_second"]


def test_the_loops_of_others_give_the_same_tokens_and_are_slower():
    pairs = [row for row in record("reference")["rows"] if row["like"] is not None]
    assert len(pairs) == 21
    assert all(row["equal_share"] > 0.9 and row["speed_over_like"] > 1 for row in pairs)


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


def test_the_guider_alone_is_the_fastest():
    rows = record("ablation")["rows"]
    alone = [row["seconds"] for row in rows if row["group"] == "guider alone"]
    assert max(alone) < min(row["seconds"] for row in rows if row["group"] != "guider alone")


def test_a_mask_of_all_pairs_would_take_more_than_the_memory_of_a_long_prompt():
    (row,) = record("long")["rows"]
    assert (32768 + 32) ** 2 > row["kept_bytes"] + row["peak_memory_bytes"]


def test_families_are_those_of_their_configs_and_cost_less_than_recorded():
    families = record("families")
    assert all(row["settings"] == METHODS[row["method"]] for row in families["checkpoints"])
    assert all(row["bytes"] >= 2 * row["parameters"] for row in families["checkpoints"])
    assert [row["family"] for row in families["recordings"]] == list(RECORDINGS)
    for row in families["recordings"]:
        assert row["forwards"] <= row["original_forwards"]
