"""The moving picture of the README: one problem decoded plainly, with FreeCache, and with a guider, on one clock.

    python examples/animate.py --json examples/results/unmasking.json --svg examples/results/unmasking.svg
    python examples/animate.py --show examples/results/unmasking.json --svg examples/results/unmasking.svg

The first command decodes with the embedded pair and records what each forward wrote, when, and which positions it kept
frozen; the second draws an earlier record again. The methods take turns, and the fastest run of each is shown. Every
frame of the picture is a forward of the record; only the clock runs slower.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flashdlm import ARGuider, FreeCacheWindow, FullWindow, WindowPolicy
from hf_flashdlm.bench.machine import commit, describe_machine, versions
from hf_flashdlm.bench.report import write_json
from hf_flashdlm.tiny import FOLDER, GUIDANCE


QUESTION = "Clara has 8 beads. Yara has 10 more than Clara. How many do they have together?"
OPTIONS = {"max_new_tokens": 64, "block_length": 8}

# Sizes in pixels, times in seconds.
CHARACTER, LINE, COLUMNS, MARGIN = 7.23, 22, 36, 14
PANEL = COLUMNS * CHARACTER + 2 * MARGIN
TOP = 92  # of the text in a panel
PLAYED, HELD = 10.0, 4.0  # how long the slowest decode is shown, and all that came of it
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #dbe4ee }
.title { font-size: 14px; font-weight: bold; fill: #ffffff } .note { font-size: 11px; fill: #9fb0c3 }
.ground { fill: #0d1520 } .panel { fill: #16212f } .rail { fill: #2a394b } .time { fill: #e0a33e }
.mask { fill: #3d4c5e } .fresh { fill: #24834a } .frozen { fill: #1f4e8c }
"""


# Recording


@dataclass
class Recorder:
    """A window policy and a streamer in one: notes what each forward kept frozen and what it wrote, for one row."""

    policy: WindowPolicy
    steps: list[dict] = field(default_factory=list)
    shows_canvas = True
    synchronous = needs_entropy = False

    def __post_init__(self):
        self.history, self.begun = self.policy.history, time.perf_counter()

    def __call__(self, row):
        window = self.policy(row)
        self.steps.append({"seconds": 0.0, "frozen": window.frozen, "masked": row.masked.copy()})
        return window

    def put(self, ids: torch.LongTensor) -> None:
        """The prompt is on the canvas already."""

    def put_draft(self, canvas: torch.LongTensor) -> None:
        """The canvas after a step."""
        step = self.steps[-1]
        step["seconds"], step["canvas"] = time.perf_counter() - self.begun, canvas[0].tolist()

    def end(self) -> None: ...


def record_decodes(repeats: int) -> list[dict]:
    """The fastest of `repeats` runs of each method."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "dlm", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "dlm")
    guider = ARGuider(AutoModelForCausalLM.from_pretrained(FOLDER / "guider", dtype="float32"), **GUIDANCE)
    one_by_one = {"steps": OPTIONS["max_new_tokens"]}
    methods = {
        "plain": (FullWindow(), one_by_one),
        "FreeCache": (FreeCacheWindow(OPTIONS["block_length"]), one_by_one),
        "FreeCache and guider": (FreeCacheWindow(OPTIONS["block_length"]), {"guider": guider}),
    }
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    runs = {name: [] for name in methods}
    for _ in range(repeats):
        for name, (policy, options) in methods.items():
            recorder = Recorder(policy)
            model.generate(**inputs, **OPTIONS, **options, window_policy=recorder, streamer=recorder)
            runs[name].append(recorder.steps)
    return [
        {"name": name, "prompt_length": inputs["input_ids"].shape[1], "guided": "guider" in methods[name][1]}
        | describe(min(runs[name], key=lambda steps: steps[-1]["seconds"]), model.config.eos_token_id, tokenizer)
        for name in methods
    ]


def describe(steps: list[dict], eos_token_id: int, tokenizer) -> dict:
    """The tokens of a decode, the end token aside, and its steps with the positions that each wrote."""
    ids = steps[-1]["canvas"]
    end = ids.index(eos_token_id) if eos_token_id in ids else len(ids)
    masked = [step["masked"] for step in steps] + [bytearray(len(ids))]
    return {
        "length": len(ids),
        "tokens": [tokenizer.decode([one]) for one in ids[:end]],
        "steps": [
            {
                "seconds": step["seconds"],
                "frozen": step["frozen"],
                "written": [place for place in range(end + 1) if before[place] and not after[place]],
            }
            for step, before, after in zip(steps, masked, masked[1:], strict=False)
        ],
    }


# Drawing


def lay_out(decode: dict) -> tuple[list[tuple[float, float, float]], int]:
    """Left, top and width of each canvas position, in the place that it has in the finished text; number of lines."""
    texts = decode["tokens"] + [" "] * (decode["length"] - len(decode["tokens"]))
    words: list[list[str]] = []
    for index, text in enumerate(texts):
        if text.startswith(" ") or not index or texts[index - 1].endswith("\n"):
            words.append([])
        words[-1].append(text)
    places, column, line = [], 0, 0
    for word in words:
        lead = len(word[0]) - len(word[0].lstrip(" ")) if column else 0
        if column + lead + len("".join(word).strip()) > COLUMNS:
            column, line, lead = 0, line + 1, 0
        column += lead
        for text in word:
            width = max(len(text.strip()), 1)
            places.append((MARGIN + column * CHARACTER, TOP + line * LINE, width * CHARACTER))
            column += width
        if word[-1].endswith("\n"):
            column, line = 0, line + 1
    return places, line + 1


def box(kind: str, place: tuple[float, float, float]) -> str:
    """What stands at a place: a mask, or the ground of a text."""
    left, top, width = place
    return f'<rect class="{kind}" x="{left:.1f}" y="{top - 13}" width="{width - 1:.1f}" height="17" rx="2"/>'


def word(text: str, place: tuple[float, float, float], kind: str = "") -> str:
    """A text, stretched to the width of its place unless it is of a kind of its own."""
    left, top, width = place
    kind = f' class="{kind}"' if kind else ""
    length = f' textLength="{width:.1f}"' if text.strip() and not kind else ""
    return f'<text{kind} x="{left:.1f}" y="{top}"{length} xml:space="preserve">{escape(text.strip())}</text>'


@dataclass(frozen=True)
class Clock:
    """When things are shown: in the picture all times are `slowness` times those of the record."""

    slowness: float
    seconds: float

    def show(self, content: str, begin: float = 0.0, end: float | None = None) -> str:
        """`content` from `begin` to `end`. What never moves sees the end of the decode."""
        times, values = ["0"], [f"{begin <= 0:d}"]
        for seconds, shown in ((begin, 1), (end, 0)):
            if seconds:
                times.append(f"{seconds * self.slowness / self.seconds:.5g}")
                values.append(str(shown))
        animation = self._animate("opacity", ";".join(values), ";".join(times), "discrete")
        return f'<g opacity="{end is None:d}">{animation}{content}</g>' if content else ""

    def grow(self, width: float, stop: float) -> str:
        """A change of the width from nothing at the start to all at `stop`."""
        share = stop * self.slowness / self.seconds
        return self._animate("width", f"0;{width:.1f};{width:.1f}", f"0;{share:.5g};1", "linear")

    def _animate(self, name: str, values: str, times: str, mode: str) -> str:
        always = f'dur="{self.seconds:g}s" repeatCount="indefinite"'
        return f'<animate attributeName="{name}" calcMode="{mode}" values="{values}" keyTimes="{times}" {always}/>'


def draw_panel(decode: dict, clock: Clock, slowest: float) -> Iterator[str]:
    """What happens on a canvas, in the order in which it is painted."""
    places, _ = lay_out(decode)
    steps, prompt, tokens = decode["steps"], decode["prompt_length"], decode["tokens"]
    times = [step["seconds"] for step in steps]
    full, last = PANEL - 2 * MARGIN, times[-1]
    yield word(decode["name"], (MARGIN, 26, 0), "title")
    yield f'<rect class="rail" x="{MARGIN}" y="56" width="{full:.1f}" height="4"/>'
    width = full * last / slowest
    yield f'<rect class="time" x="{MARGIN}" y="56" width="{width:.1f}" height="4">{clock.grow(width, last)}</rect>'
    frozen = 0
    for step, begun in zip(steps, [0.0, *times], strict=False):
        yield clock.show("".join(box("frozen", place) for place in places[frozen : step["frozen"]]), begun)
        frozen = max(frozen, step["frozen"])
    yield "".join(word(text, place) for text, place in zip(tokens[:prompt], places, strict=False))
    yield clock.show(word("0 forwards", (MARGIN, 46, 0), "note"), 0.0, times[0])
    for index, (step, end) in enumerate(zip(steps, [*times[1:], None], strict=True)):
        begun, written = step["seconds"], step["written"]
        yield clock.show("".join(box("mask", places[one]) for one in written), 0.0, begun)
        yield clock.show("".join(box("fresh", places[one]) for one in written), begun, end or begun + 0.05 * slowest)
        yield clock.show("".join(word(tokens[one], places[one]) for one in written if one < len(tokens)), begun)
        count = f"{index + 1} forwards" + f" + {index + 1} of the guider" * decode["guided"]
        yield clock.show(word(f"{count}, {1000 * begun:.0f} ms", (MARGIN, 46, 0), "note"), begun, end)
    yield clock.show("".join(box("mask", place) for place in places[len(tokens) + 1 :]), 0.0, last)


def draw(record: dict) -> str:
    """The picture of a record."""
    decodes = record["decodes"]
    slowest = max(decode["steps"][-1]["seconds"] for decode in decodes)
    clock = Clock(PLAYED / slowest, PLAYED + HELD)
    lines = max(lay_out(decode)[1] for decode in decodes)
    width, bottom = len(decodes) * (PANEL + 10) + 10, TOP + lines * LINE + 6
    parts = []
    for index, decode in enumerate(decodes):
        panel = f'<rect class="panel" y="6" width="{PANEL:.1f}" height="{bottom - 6}" rx="6"/>'
        content = "\n".join(filter(None, draw_panel(decode, clock, slowest)))
        parts.append(f'<g transform="translate({10 + index * (PANEL + 10):.1f} 4)">{panel}{content}</g>')
    left = 16.0
    for kind, text in (("mask", "masked"), ("fresh", "written now"), ("frozen", "frozen: never computed again")):
        parts += [box(kind, (left, bottom + 26, 14)), word(text, (left + 20, bottom + 26, 0), "note")]
        left += 40 + 6.7 * len(text)
    note = f"Real times, shown {clock.slowness:.0f} times slower."
    parts.append(word(note, (width - 16 - 6.7 * len(note), bottom + 26, 0), "note"))
    size = f'viewBox="0 0 {width:.0f} {bottom + 40}" width="{width:.0f}" height="{bottom + 40}"'
    title = "Three decodes of one canvas side by side: " + ", ".join(decode["name"] for decode in decodes)
    ground = '<rect class="ground" width="100%" height="100%" rx="8"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{title}</title><style>{STYLE}</style>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="runs of each method, of which the fastest is shown")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--show", type=Path, help="decode nothing: draw the record of this file")
    parser.add_argument("--svg", type=Path, help="draw the picture to this file")
    args = parser.parse_args()
    if args.show is not None:
        record = json.loads(args.show.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(1)
        record = {"command": shlex.join(["python", *sys.argv]), "commit": commit(), "versions": versions()}
        record |= {"machine": describe_machine(torch.device("cpu")), "decodes": record_decodes(args.repeats)}
    for decode in record["decodes"]:
        print(f"{decode['name']}: {len(decode['steps'])} forwards, {decode['steps'][-1]['seconds']:.3f} seconds")
    if args.json is not None:
        write_json(args.json, record)
    if args.svg is not None:
        args.svg.write_text(draw(record), encoding="utf-8")


if __name__ == "__main__":
    main()
