"""The moving picture of the README is of a real decode."""

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest


ROOT = Path(__file__).parents[1]
ANIMATE = runpy.run_path(str(ROOT / "examples" / "animate.py"))
RESULTS = ROOT / "examples" / "results"
RECORD = json.loads((RESULTS / "unmasking.json").read_text(encoding="utf-8"))


def shape(decodes):
    """What does not depend on the machine."""
    return [
        [decode["name"], decode["tokens"], [(step["frozen"], step["written"]) for step in decode["steps"]]]
        for decode in decodes
    ]


def test_the_picture_is_what_the_command_draws_of_the_record():
    assert (RESULTS / "unmasking.svg").read_text(encoding="utf-8") == ANIMATE["draw"](RECORD)


def test_the_record_is_what_the_models_decode():
    assert shape(ANIMATE["record_decodes"](1)) == shape(RECORD["decodes"])


@pytest.mark.parametrize("decode", RECORD["decodes"], ids=lambda decode: decode["name"])
def test_each_token_is_written_once_and_frozen_after_that(decode):
    prompt, end, written = decode["prompt_length"], len(decode["tokens"]), []
    for step in decode["steps"]:
        assert set(range(prompt, step["frozen"])) <= set(written)
        written += step["written"]
    assert set(range(prompt, end)) <= set(written) <= set(range(prompt, end + 1))
    assert len(written) == len(set(written))


@pytest.mark.parametrize("index", range(3))
def test_where_nothing_moves_the_finished_text_is_shown(index):
    svg = "{http://www.w3.org/2000/svg}"
    panel = [one for one in ElementTree.fromstring(ANIMATE["draw"](RECORD)) if one.tag == f"{svg}g"][index]
    shown = [*panel, *(one for group in panel if group.get("opacity") == "1" for one in group)]
    texts = [one for one in shown if one.tag == f"{svg}text" and one.get("class") is None]
    texts.sort(key=lambda one: (float(one.get("y")), float(one.get("x"))))
    expected = [text.strip() for text in RECORD["decodes"][index]["tokens"]]
    assert [one.text or "" for one in texts] == expected
