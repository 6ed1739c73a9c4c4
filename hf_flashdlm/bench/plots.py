"""Plots of a measurement: accuracy against forwards, and bars of seconds.

Reads records as they are in a JSON file, so that old records can be drawn again. No other module needs matplotlib.
"""

from pathlib import Path

import matplotlib.pyplot as plt


# The palette of Okabe and Ito, which colour-blind readers can tell apart; further groups differ by their marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"


def plot_bench(record: dict, path: Path) -> None:
    """Seconds of each method, a panel for each batch size; a line across a bar is its floor on this machine."""
    sizes = sorted({row["batch_size"] for row in record["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3 + 3.5 * len(sizes), 1.5 + 0.3 * len(methods)), sharey=True, squeeze=False
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


def plot_ablation(record: dict, folder: Path) -> None:
    """`pareto.png`, accuracy against NFE with a point for each setting, and `seconds.png`, bars of the parts."""
    _plot_pareto([row for row in record["rows"] if row["nfe"] > 0], folder / "pareto.png")  # no guider alone
    _plot_parts([row for row in record["rows"] if row["group"] == "parts"], folder / "seconds.png")


def _plot_pareto(rows: list[dict], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(9, 6))
    for index, group in enumerate(dict.fromkeys(row["group"] for row in rows)):
        members = [row for row in rows if row["group"] == group]
        panel.scatter(
            [row["nfe"] for row in members],
            [100 * row["accuracy"] for row in members],
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[(index + index // len(COLORS)) % len(COLORS)],
            s=24,
            alpha=0.8,
            label=group,
        )
    names = []
    for number, row in enumerate(pareto_rows(rows), 1):
        accuracy = 100 * row["accuracy"]
        bounds = [[abs(100 * bound - accuracy)] for bound in row["accuracy_interval"]]
        panel.errorbar(row["nfe"], accuracy, bounds, color="gray", linewidth=0.8, capsize=2, zorder=0)
        panel.annotate(str(number), (row["nfe"], accuracy), (-9, 4), textcoords="offset points", fontsize=9)
        names.append(f"{number}  {row['name']}: {row['nfe']:.1f} NFE, {accuracy:.1f}%")
    panel.text(0.36, 0.03, "\n".join(["Not beaten in both:", *names]), transform=panel.transAxes, fontsize=8)
    panel.set(xscale="log", xlabel="forwards of the diffusion model per problem (NFE)")
    panel.set_ylabel("accuracy %; 95% interval where numbered")
    ticks = [tick for tick in (3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 64) if tick <= 1.1 * max(row["nfe"] for row in rows)]
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.2)
    panel.legend(fontsize=8, frameon=False, loc="lower right")
    _save(figure, path)


def pareto_rows(rows: list[dict]) -> list[dict]:
    """The rows that no other row beats in accuracy at as few forwards, by rising NFE."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["nfe"], -row["accuracy"])):
        if not best or row["accuracy"] > best[-1]["accuracy"]:
            best.append(row)
    return best


def _plot_parts(rows: list[dict], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(9, 1.5 + 0.26 * len(rows)))
    guided = [row["guider"] is not None for row in rows]
    panel.barh(
        range(len(rows)),
        [row["seconds"] for row in rows],
        color=[COLORS[1 if is_guided else 0] for is_guided in guided],
    )
    for index, row in enumerate(rows):
        words = f" {row['seconds']:.3g} s, {100 * row['accuracy']:.1f}%, {row['nfe']:.1f} NFE"
        panel.annotate(words, (row["seconds"], index), va="center", fontsize=7)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set(
        xlabel=f"seconds for {rows[0]['num_rows']} problems; orange: with a guider",
        xlim=(0, 1.4 * max(row["seconds"] for row in rows)),
    )
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
