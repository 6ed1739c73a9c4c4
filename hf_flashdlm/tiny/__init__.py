"""The embedded pair of small models: its folder, its held-out problems, and how an answer is graded.

Owns what a problem is and which of them are drawn. Knows nothing of how they are decoded. The pair is made by
`examples/tiny/train.py`, which writes all other files of this folder.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path


FOLDER = Path(__file__).parent  # with the models in `dlm` and `guider`

# The embedded guider alone errs more often than the model: it may only say no to what the diffusion model is sure of.
GUIDANCE = {"combine": "intersection", "confidence_threshold": 0.5}


@dataclass(frozen=True)
class Problem:
    """A held-out problem: the `question`, its worked `answer`, and the number `final` that a right answer ends in."""

    question: str
    answer: str
    final: int


def problems(count: int) -> list[Problem]:
    """All problems that the package holds, if they are at least `count`."""
    lines = (FOLDER / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    if count > len(lines):
        raise ValueError(f"`--problems` must be at most {len(lines)}, which is all the package holds, got {count}.")
    return [Problem(**json.loads(line)) for line in lines]


def sample_problems(count: int, seed: int) -> list[Problem]:
    """Draw `count` of the problems that the package holds."""
    return random.Random(seed).sample(problems(count), count)


def final_number(text: str) -> int | None:
    """The number behind the last `####` of an answer, `None` where there is none."""
    _, mark, number = text.rpartition("####")
    return int(number) if mark and number.strip().isdecimal() else None
