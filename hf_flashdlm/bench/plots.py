"""Plots of a measurement: accuracy against forwards and against seconds, and bars of seconds.

Owns how a record is drawn. Reads records as they are in a JSON file, so that old records can be drawn again. No other
module needs matplotlib.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np


# The palette of Okabe and Ito, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
# What writes tokens: the groups of the trade-off plot, each with a marker of its own too.
WRITERS = {
    "one token per forward": "o",
    "a rule, no guider": "s",
    "guider": "^",
    "guider, intersection": "D",
    "guider, union or beyond": "v",
    "guider decodes alone": "X",
}
# What is added to a decode without changing what writes tokens: the bars of the parts plot.
ADDED = ("EOS", "FreeCache", "window")


def plot_bench(record: dict, path: Path) -> None:
    """Seconds of each method, a panel for each batch size; a line across a bar is its floor on this machine."""
    sizes = sorted({row["batch_size"] for row in record["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    figure, panels = plt.subplots(
        1,
        len(sizes),
        figsize=(3 + 3.5 * len(sizes), 1.5 + 0.3 * len(methods)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, batch_size in zip(panels[0], sizes, strict=True):
        rows = [row for row in record["rows"] if row["batch_size"] == batch_size]
        seconds, floors = ([row[name] for row in rows] for name in ("seconds", "floor_seconds"))
        places = [methods.index(row["method"]) for row in rows]
        panel.barh(places, seconds, color=COLORS[0])
        panel.scatter(floors, places, marker="|", s=120, color=COLORS[1], label="floor of this machine", zorder=3)
        for place, value in zip(places, seconds, strict=True):
            panel.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8)
        panel.set(title=f"batch {batch_size}", xlabel="seconds, median", xlim=(0, 1.2 * max(seconds)))
        panel.set_yticks(range(len(methods)), methods)
    panels[0][0].invert_yaxis()  # the first method on top; the panels share the axis
    panels[0][-1].legend(loc="lower right", fontsize=8, frameon=False)
    _save(figure, path)


def plot_evaluation(record: dict, path: Path) -> None:
    """Seconds per problem of each method, with its score and its forwards; a panel for each task."""
    tasks = list(dict.fromkeys(row["task"] for row in record["rows"]))
    groups = [[row for row in record["rows"] if row["task"] == task] for task in tasks]
    heights = [1 + 0.4 * len(rows) for rows in groups]
    figure, panels = plt.subplots(
        len(tasks), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for panel, task, rows in zip(panels[:, 0], tasks, groups, strict=True):
        seconds = [row["seconds"] for row in rows]
        panel.barh(range(len(rows)), seconds, color=[COLORS[row["guider_forwards"] > 0] for row in rows])
        for place, row in enumerate(rows):
            score = f"{100 * row['score']:.1f} %" if row["is_share"] else f"{row['score']:.3g}"
            words = f" {row['seconds']:.3g} s, {row['nfe']:.1f} forwards, {score}"
            panel.annotate(words, (row["seconds"], place), va="center", fontsize=8)
        panel.set(title=f"{Path(task).name}: {rows[0]['metric']}", xlabel="seconds per problem")
        panel.set_xlim(0, 1.6 * max(seconds))
        panel.set_yticks(range(len(rows)), [row["method"] for row in rows])
        panel.invert_yaxis()  # the first method on top
    _save(figure, path)


def plot_ablation(record: dict, folder: Path) -> None:
    """`pareto.png`, accuracy against forwards and seconds, and `seconds.png`, bars of the parts."""
    _plot_tradeoff([row for row in record["rows"] if not row["options"].get("do_sample")], folder / "pareto.png")
    _plot_parts([row for row in record["rows"] if row["group"] == "parts"], folder / "seconds.png")


def pareto_rows(rows: list[dict], cost: str = "nfe") -> list[dict]:
    """The rows that no other beats in accuracy at the same `cost` or less, by rising cost."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row[cost], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def writer(row: dict) -> str:
    """Which of `WRITERS` a row of an ablation belongs to."""
    if row["group"] == "guider alone":
        return "guider decodes alone"
    if row["guider"] is None:
        return "one token per forward" if "steps" in row["options"] else "a rule, no guider"
    if row["rule"].get("beyond_prefix") or row["rule"].get("combine") == "union":
        return "guider, union or beyond"
    return "guider, intersection" if row["rule"].get("combine") == "intersection" else "guider"


def _plot_tradeoff(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(13, 6.2), sharey=True, layout="constrained")
    decodes = [row for row in rows if row["nfe"] > 0]  # no guider alone
    axes = (
        ("nfe", decodes, "forwards of the diffusion model per problem", (3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 64)),
        ("seconds", rows, f"seconds for {rows[0]['num_rows']} problems", (1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60)),
    )
    for panel, (cost, shown, label, ticks) in zip(panels, axes, strict=True):
        costs = [row[cost] for row in shown]
        panel.set(xscale="log", xlabel=label, xlim=(0.85 * min(costs), 1.25 * max(costs)))
        ticks = [tick for tick in ticks if min(costs) <= 1.2 * tick and tick <= 1.1 * max(costs)]
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.2)
    wrong = [_wrong(row) for row in rows]
    panels[0].set(
        yscale="log",
        ylabel="right answers, %, on a logarithmic scale of the wrong ones",
        ylim=(1.6 * max(wrong), 0.6 * min(wrong)),
    )
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 35, 50, 100) if 0.6 * min(wrong) <= tick]
    ticks = [tick for tick in ticks if tick <= 1.6 * max(wrong)]
    panels[0].set_yticks(ticks, [f"{100 - tick:g}" for tick in ticks])
    panels[0].minorticks_off()
    figure.draw_without_rendering()  # the layout decides where points and labels are
    figure.set_layout_engine("none")
    for panel, (cost, shown, *_) in zip(panels, axes, strict=True):
        _draw_tradeoff(panel, cost, shown)
    _save(figure, path)


def _wrong(row: dict) -> float:
    """Wrong answers in percent, half a problem where there is none: the axis is logarithmic."""
    return 100 * max(1 - row["accuracy"], 0.5 / row["num_rows"])


def _draw_tradeoff(panel, cost: str, rows: list[dict]) -> None:
    """Points of each group with its name beside them, and the lines of what is not beaten."""
    points = {name: [(row[cost], _wrong(row)) for row in rows if writer(row) == name] for name in WRITERS}
    for (name, marker), color in zip(WRITERS.items(), COLORS, strict=True):
        if points[name]:
            panel.scatter(*zip(*points[name], strict=True), marker=marker, color=color, s=26, alpha=0.75, linewidth=0)
    decodes = [row for row in rows if row["nfe"] > 0]
    unguided = [row for row in decodes if row["guider"] is None]
    lines = {"best": ("-", decodes), "best without a guider": ("--", unguided)}
    taken = [panel.transData.transform(point) for members in points.values() for point in members]
    ends = {}
    for text, (style, members) in lines.items():
        line = [(row[cost], _wrong(row)) for row in pareto_rows(members, cost)]
        if line:
            panel.plot(*zip(*line, strict=True), style, color="0.4", linewidth=1, drawstyle="steps-post", zorder=0)
            taken += _trace([panel.transData.transform(point) for point in line])
            ends[text] = line[-1:]
    labels: list[tuple[float, float, float, float]] = []
    for text, end in ends.items():
        _label(panel, text, end, "0.3", taken, labels)
    for name, color in zip(WRITERS, COLORS, strict=True):
        if points[name]:
            _label(panel, name, points[name], color, taken, labels)


def _trace(corners: list) -> list[tuple[float, float]]:
    """Points along the stairs through `corners`, in pixels."""
    points = []
    for (x, y), (right, top) in zip(corners, corners[1:], strict=False):
        points += [(x + share / 20 * (right - x), y) for share in range(20)]
        points += [(right, y + share / 20 * (top - y)) for share in range(20)]
    return points


def _label(panel, text: str, members: list, color: str, taken: list, labels: list) -> None:
    """Write `text` beside the member where it fits best: over no point, over no other label, and near."""
    height = 0.14 * panel.figure.dpi
    size = np.array([0.47 * len(text) + 1, 1]) * height
    anchors = panel.transData.transform(members)
    offsets = np.stack(np.meshgrid(np.arange(-280, 281, 20), np.arange(-140, 141, 20)), -1).reshape(-1, 2)
    low = (anchors[:, None] + offsets).reshape(-1, 1, 2)  # corners of the boxes that are tried
    high, anchor = low + size, np.repeat(anchors, len(offsets), 0)[:, None]
    hits = ((low - 6 < taken) & (np.array(taken) < high + 6)).all(-1).sum(-1)
    clashes = sum(((low < stop) & (start < high)).all(-1) for start, stop in labels)
    outside = (low < panel.bbox.min) | (high > panel.bbox.max)
    distance = np.linalg.norm(np.clip(anchor, low, high) - anchor, axis=-1)[:, 0]
    best = np.argmin(hits + 50 * np.reshape(clashes, -1) + 100 * outside.any((-1, -2)) + distance / 30)
    labels.append((low[best], high[best]))
    place, end = panel.transData.inverted().transform([low[best, 0] + (height / 2, height / 2), anchor[best, 0]])
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkB": 3}
    panel.annotate(text, end, place, color=color, fontsize=10, va="center", arrowprops=line)


def _plot_parts(rows: list[dict], path: Path) -> None:
    """A block of bars for each way to write tokens; in it, what is added to that."""
    groups: dict[str, list[tuple[str, dict]]] = {}
    for row in rows:
        names = row["name"].replace("plain", "").split(" + ")
        ways = " + ".join(name for name in names if name not in ADDED) or "one token per forward"
        added = " + ".join(name for name in names if name in ADDED) or "nothing added"
        groups.setdefault(ways, []).append((added, row))
    lines = len(rows) + 1.6 * len(groups)
    figure, panel = plt.subplots(figsize=(9, 1 + 0.23 * lines), layout="constrained")
    longest, place, ticks = max(row["seconds"] for row in rows), 0.0, {}
    for ways, members in groups.items():
        panel.annotate(ways, (0, place), (4, 0), textcoords="offset points", va="center", weight="bold", fontsize=9)
        for added, row in members:
            place += 1
            panel.barh(place, row["seconds"], color=COLORS[0 if row["guider"] is None else 1], height=0.75)
            words = f" {row['seconds']:.1f} s, {row['nfe']:.1f} forwards, {100 * row['accuracy']:.1f} % right"
            panel.annotate(words, (row["seconds"], place), va="center", fontsize=8)
            ticks[place] = added
        place += 1.6
    panel.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    panel.set(xlabel=f"seconds for {rows[0]['num_rows']} problems", xlim=(0, 1.5 * longest), ylim=(place - 0.8, -0.8))
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
