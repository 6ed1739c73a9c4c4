"""Word problems with worked answers: the endless training set of the embedded model pair.

Owns the problem kinds, the split into train and test, and the two strings a model sees (`prompt_text`,
`answer_text`). Knows nothing of tokens or models.

Every kind is data: the ranges its numbers are drawn from, its question phrasings, and for every step one formula and
its answer phrasings. All numbers, results included, lie in `SMALLEST` ... `LARGEST`.
"""

import hashlib
import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass


SMALLEST, LARGEST = 2, 30
HELD_OUT = 16  # one question in `HELD_OUT` is for testing
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}

WOMEN = ("Alice", "Clara", "Emma", "Hana", "Ines", "Julia", "Lara", "Nora", "Sofia", "Yara")
MEN = ("Adam", "Bruno", "David", "Felix", "Jonas", "Karl", "Luca", "Noah", "Oscar", "Victor")
THINGS = ("apples", "beads", "buttons", "cards", "coins", "lemons", "marbles", "nuts", "pencils", "shells", "stamps")
WARES = ("bowl", "candle", "kite", "mug", "puzzle", "shirt")
HOLDERS = ("bags", "boxes", "jars", "trays")


@dataclass(frozen=True)
class Problem:
    """One problem: `question` and `answer` as plain text, and the number `final` the answer ends in."""

    question: str
    answer: str
    final: int


@dataclass(frozen=True)
class Step:
    """One step of an answer: `result = formula`, said in one of `phrasings`, in which `{=}` is the equation."""

    result: str
    formula: str
    phrasings: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of problem: inclusive `ranges` of its numbers, its `questions` (phrasings) and its `steps`."""

    ranges: dict[str, tuple[int, int]]
    questions: tuple[str, ...]
    steps: tuple[Step, ...]


KINDS = {
    "add": Kind(
        {"a": (2, 28), "b": (2, 28)},
        (
            "{A} has {a} {things}. {B} gives {A} {b} more {things}. How many {things} does {A} have now?",
            "There are {a} {things} in a box. {A} puts {b} more in it. How many {things} are in the box now?",
        ),
        (Step("p", "a + b", ("Now there are {=} {things}.", "That makes {=} {things}.")),),
    ),
    "take": Kind(
        {"a": (3, 30), "b": (2, 29)},
        (
            "{A} has {a} {things} and loses {b} of them. How many {things} does {A} have left?",
            "There were {a} {things} on the table. {A} took {b} away. How many {things} are still there?",
        ),
        (Step("p", "a - b", ("There are {=} {things} left.", "That leaves {=} {things}.")),),
    ),
    "groups": Kind(
        {"a": (2, 10), "b": (2, 10)},
        (
            "{A} has {a} {holders}. Each of them holds {b} {things}. How many {things} does {A} have?",
            "There are {b} {things} in each of {a} {holders}. How many {things} are there in all?",
        ),
        (Step("p", "a * b", ("In all there are {=} {things}.", "The {holders} hold {=} {things}.")),),
    ),
    "split": Kind(
        {"a": (4, 30), "b": (2, 9)},
        (
            "{A} puts {a} {things} into {b} {holders}, the same number in each. How many are in each?",
            "{A} shares {a} {things} evenly among {b} friends. How many {things} does each friend get?",
        ),
        (Step("p", "a / b", ("Each gets {=} {things}.", "That is {=} {things} for each.")),),
    ),
    "add_take": Kind(
        {"a": (2, 20), "b": (2, 20), "c": (2, 29)},
        (
            "{A} has {a} {things}. {He} finds {b} more and gives {c} to {B}. How many {things} does {A} have left?",
            "A box holds {a} {things}. {A} adds {b} and then {B} takes {c}. How many {things} stay in the box?",
        ),
        (
            Step("p", "a + b", ("First there are {=} {things}.", "With the new ones that is {=}.")),
            Step("q", "p - c", ("Then {=} {things} are left.", "Take away {c}: {=}.")),
        ),
    ),
    "groups_add": Kind(
        {"a": (2, 9), "b": (2, 9), "c": (2, 20)},
        (
            "{A} fills {a} {holders} with {b} {things} each and keeps {c} more in a drawer."
            " How many {things} does {A} have?",
            "There are {c} {things} on the table and {a} {holders} with {b} {things} each."
            " How many {things} are there?",
        ),
        (
            Step("p", "a * b", ("The {holders} hold {=} {things}.", "First count the {holders}: {=}.")),
            Step("q", "p + c", ("Then there are {=} {things}.", "With the other {c} that is {=}.")),
        ),
    ),
    "groups_take": Kind(
        {"a": (2, 9), "b": (2, 9), "c": (2, 20)},
        (
            "{A} fills {a} {holders} with {b} {things} each and then gives {c} {things} to {B}."
            " How many {things} does {A} have left?",
            "There are {a} {holders} with {b} {things} each. {A} loses {c} {things}. How many {things} are left?",
        ),
        (
            Step("p", "a * b", ("The {holders} hold {=} {things}.", "First count the {holders}: {=}.")),
            Step("q", "p - c", ("Then {=} {things} are left.", "Take away {c}: {=}.")),
        ),
    ),
    "more": Kind(
        {"a": (2, 14), "b": (2, 14)},
        (
            "{A} has {a} {things}. {B} has {b} more than {A}. How many {things} do they have together?",
            "{A} found {a} {things} and {B} found {b} more than {A}. How many {things} did they find in all?",
        ),
        (
            Step("p", "a + b", ("{B} has {=} {things}.", "The number for {B} is {=}.")),
            Step("q", "a + p", ("Together they have {=} {things}.", "So in all that is {=}.")),
        ),
    ),
    "twice": Kind(
        {"a": (2, 10)},
        (
            "{A} has {a} {things}. {B} has twice as many as {A}. How many {things} do they have together?",
            "{A} found {a} {things} and {B} found twice as many. How many {things} did they find in all?",
        ),
        (
            Step("p", "a * 2", ("{B} has {=} {things}.", "The number for {B} is {=}.")),
            Step("q", "a + p", ("Together they have {=} {things}.", "So in all that is {=}.")),
        ),
    ),
    "pool": Kind(
        {"a": (2, 20), "b": (2, 20), "c": (2, 9)},
        (
            "{A} has {a} {things} and {B} has {b}. They put them together and share them evenly among {c} friends."
            " How many {things} does each friend get?",
            "{A} finds {a} {things}, then {b} more. {He} puts them all into {c} {holders}, the same number in each."
            " How many are in each?",
        ),
        (
            Step("p", "a + b", ("Together that is {=} {things}.", "First there are {=} {things}.")),
            Step("q", "p / c", ("Each gets {=} {things}.", "Share them among {c}: {=}.")),
        ),
    ),
    "change": Kind(
        {"a": (2, 9), "b": (2, 9), "c": (5, 30)},
        (
            "A {ware} costs {b} dollars. {A} buys {a} of them and pays with {c} dollars."
            " How many dollars does {A} get back?",
            "{A} has {c} dollars and buys {a} {wares} for {b} dollars each. How many dollars does {A} have left?",
        ),
        (
            Step("p", "a * b", ("The {wares} cost {=} dollars.", "{A} pays {=} dollars.")),
            Step("q", "c - p", ("Then {=} dollars are left.", "So {A} keeps {=} dollars.")),
        ),
    ),
    "two_wares": Kind(
        {"a": (2, 7), "b": (2, 7), "c": (2, 7), "d": (2, 7)},
        (
            "{A} buys {a} {wares} for {b} dollars each and {c} {goods} for {d} dollars each."
            " How many dollars does {A} pay?",
            "A {ware} costs {b} dollars and a {good} costs {d} dollars."
            " How many dollars do {a} {wares} and {c} {goods} cost?",
        ),
        (
            Step("p", "a * b", ("The {wares} cost {=} dollars.", "First pay for the {wares}: {=}.")),
            Step("q", "c * d", ("The {goods} cost {=} dollars.", "Then pay for the {goods}: {=}.")),
            Step("r", "p + q", ("Together that is {=} dollars.", "So in all that is {=}.")),
        ),
    ),
    "save": Kind(
        {"a": (2, 9), "b": (2, 9), "c": (2, 15), "d": (2, 29)},
        (
            "{A} saves {b} dollars a week for {a} weeks. {He} had {c} dollars before."
            " Then {A} spends {d} dollars. How many dollars does {A} have left?",
            "{A} had {c} dollars. {He} worked {a} hours for {b} dollars an hour and then paid {d} dollars to {B}."
            " How many dollars does {A} have left?",
        ),
        (
            Step("p", "a * b", ("{A} gets {=} dollars.", "The new money is {=}.")),
            Step("q", "c + p", ("Together that is {=} dollars.", "With the other {c} that is {=}.")),
            Step("r", "q - d", ("Then {=} dollars are left.", "Take away {d}: {=}.")),
        ),
    ),
    "pack": Kind(
        {"a": (2, 9), "b": (2, 9), "c": (2, 24), "d": (2, 6)},
        (
            "{A} has {a} {holders} of {b} {things}. {He} sells {c} and shares the rest evenly among {d} friends."
            " How many {things} does each friend get?",
            "There are {a} {holders} with {b} {things} each. {A} takes {c} away and puts the rest into {d} sacks,"
            " the same number in each. How many are in each?",
        ),
        (
            Step("p", "a * b", ("The {holders} hold {=} {things}.", "First count the {holders}: {=}.")),
            Step("q", "p - c", ("Then {=} {things} are left.", "Take away {c}: {=}.")),
            Step("r", "q / d", ("Each gets {=} {things}.", "Share them among {d}: {=}.")),
        ),
    ),
}


def problems(seed: int, split: str) -> Iterator[Problem]:
    """Endless problems of one `split` (`"train"` or `"test"`), the same problems for the same `seed`."""
    rng = random.Random(seed)
    kinds = tuple(KINDS.values())
    while True:
        problem = make_problem(rng.choice(kinds), rng)
        if is_held_out(problem.question) == (split == "test"):
            yield problem


def held_out_problems(count: int, seed: int) -> list[Problem]:
    """`count` different problems of the test split."""
    unique: dict[str, Problem] = {}
    for problem in problems(seed, "test"):
        unique.setdefault(problem.question, problem)
        if len(unique) == count:
            return list(unique.values())


def is_held_out(question: str) -> bool:
    """Whether the hash of `question` puts it in the test split, so that no seed can bring it into training."""
    return hashlib.md5(question.encode(), usedforsecurity=False).digest()[0] % HELD_OUT == 0


def prompt_text(question: str) -> str:
    """The prompt that a model gets."""
    return f"{question}\nAnswer:"


def answer_text(answer: str) -> str:
    """The text that a model should write after the prompt; the end-of-text token follows it."""
    return f" {answer}"


def final_number(text: str) -> int | None:
    """The number after the last `####` of a written answer, None if there is none."""
    tail = text.rpartition("####")[2] if "####" in text else ""
    return int(tail) if tail.strip().isascii() and tail.strip().isdigit() else None


def make_problem(kind: Kind, rng: random.Random) -> Problem:
    """Draws the numbers, names, things and phrasings of one problem."""
    numbers = draw_numbers(kind, rng)
    words = draw_words(rng) | numbers
    sentences = []
    for step in kind.steps:
        left, sign, right = step.formula.split()
        equation = f"{numbers.get(left, left)} {sign} {numbers.get(right, right)} = {numbers[step.result]}"
        sentences.append(rng.choice(step.phrasings).format_map(words | {"=": equation}))
    final = numbers[kind.steps[-1].result]
    question = rng.choice(kind.questions).format_map(words)
    return Problem(question, f"{' '.join(sentences)}\n#### {final}", final)


def draw_numbers(kind: Kind, rng: random.Random) -> dict[str, int]:
    """Draws the numbers of `kind` again and again until every step has a whole result in `SMALLEST` ... `LARGEST`."""
    while True:
        numbers = {name: rng.randint(low, high) for name, (low, high) in kind.ranges.items()}
        for step in kind.steps:
            left, sign, right = step.formula.split()
            result = OPERATIONS[sign](numbers[left], numbers.get(right) or int(right))
            if not (SMALLEST <= result <= LARGEST and result == int(result)):
                break
            numbers[step.result] = int(result)
        else:
            return numbers


def draw_words(rng: random.Random) -> dict[str, str]:
    """Draws two people and the things of one problem."""
    first, second = rng.sample(WOMEN + MEN, 2)
    ware, good = rng.sample(WARES, 2)
    return {
        "A": first,
        "B": second,
        "He": "She" if first in WOMEN else "He",
        "things": rng.choice(THINGS),
        "holders": rng.choice(HOLDERS),
        "ware": ware,
        "wares": f"{ware}s",
        "good": good,
        "goods": f"{good}s",
    }
