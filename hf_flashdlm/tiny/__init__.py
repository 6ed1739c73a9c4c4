"""The embedded pair of small models: its folder, its held-out problems, and how an answer is graded.

Owns what a problem is and which of them are drawn. Knows nothing of how they are decoded. The pair is made by
`examples/tiny/train.py`, which writes all other files of this folder.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path


FOLDER = Path(__file__).parent  # holds the models in `dlm` and `guider`

# The embedded guider errs more often than the diffusion model, so it may only veto drafts that the model is sure of.
GUIDANCE = {"combine": "intersection", "confidence_threshold": 0.5}


def pair_unless_named(model: str | None, guider: str | None) -> tuple[str, str | None, dict]:
    """
    The two models, and the settings of the guider: as named, or the embedded pair where no `model` is. A guider that
    is named judges the embedded model by the default settings.
    """
    if model is not None:
        return model, guider, {}
    if guider is not None:
        return str(FOLDER / "dlm"), guider, {}
    return str(FOLDER / "dlm"), str(FOLDER / "guider"), GUIDANCE


@dataclass(frozen=True)
class Problem:
    """A held-out problem: the `question`, its worked `answer`, and the number `final` it should end in."""

    question: str
    answer: str
    final: int


def problems(count: int) -> list[Problem]:
    """All problems of the package; `ValueError` if there are fewer than `count`."""
    lines = (FOLDER / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    if count > len(lines):
        raise ValueError(f"`--problems` must be at most {len(lines)}, which is all the package holds, got {count}.")
    return [Problem(**json.loads(line)) for line in lines]


def sample_problems(count: int, seed: int) -> list[Problem]:
    """Draw `count` problems of the package."""
    return random.Random(seed).sample(problems(count), count)


def final_number(text: str) -> int | None:
    """The number after the last `####` of an answer, `None` if there is none."""
    _, mark, number = text.rpartition("####")
    return int(number) if mark and number.strip().isdecimal() else None
