"""The example with a picture, as a user runs it from a clone."""

import re
import runpy
from pathlib import Path

from PIL import Image


EXAMPLE = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "vision.py"))


def test_a_frozen_prompt_costs_fewer_positions_in_as_many_forwards(capsys, tmp_path):
    Image.new("RGB", (30, 90)).save(tmp_path / "tall.png")
    EXAMPLE["main"](picture=tmp_path / "tall.png", tokens=8, runs=1)
    first, *lines, answer = capsys.readouterr().out.splitlines()
    length, of_image, tokens = map(int, re.findall(r"\d+", first))
    assert tokens == 8 and 392 < of_image < length, "a tile of the whole and two of its parts"
    figures = [re.fullmatch(r"(.*): (\d+) forwards, (\d+) positions, [\d.]+ seconds", line) for line in lines]
    assert [one[1] for one in figures] == list(EXAMPLE["SETTINGS"])
    assert {one[2] for one in figures} == {"4"}
    everything, once, *frozen = (int(one[3]) for one in figures)
    assert everything == 4 * (length + 8) and once == length + 4 * 8
    assert all(length + 8 <= positions <= once for positions in frozen)
    assert answer.startswith("Answer:")


def test_the_picture_is_drawn():
    picture = EXAMPLE["draw"]()
    assert picture.size == (640, 400)
    colours = [picture.getpixel(point) for point in ((10, 10), (10, 390), (320, 250))]
    assert colours == [(135, 206, 235), (46, 139, 87), (178, 34, 34)]
