"""The picture of a run: for each layer, how fast gpuconv is against the fastest of its peers.

Blue bars to the right are layers on which gpuconv is faster, orange ones to the left those on which the peer is; these
two colours stay apart for every kind of colour blindness, and the side says the same without any.
"""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.record import BEST, best_ratio, summary

# Of gpuconv's labels, in their order: light to dark, where gpuconv is faster and where the peer is.
_FASTER = ("#a6cbe8", "#1764ab", "#0b3a66")
_SLOWER = ("#fbc98a", "#c2660a", "#7a3d00")
_FAINT = "#666666"
_NAMES = {
    "torch": "PyTorch",
    "torch-ahead": "PyTorch, ahead",
    "onnxruntime": "ONNX Runtime",
    "opencv": "OpenCV",
    "scipy": "SciPy",
    "cudnn": "cuDNN",
}
_PACKAGES = {
    "gpuconv": ("gpuconv",),
    "PyTorch": ("torch",),
    "ONNX Runtime": ("onnxruntime",),
    "OpenCV": ("opencv-python-headless", "opencv-python"),
    "SciPy": ("scipy",),
    "NumPy": ("numpy",),
    "Numba": ("numba",),
    "Python": ("python",),
}
_TICKS = (  # from the finest to the coarsest
    [step * 10.0**power for power in range(-4, 6) for step in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)],
    [step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5)],
    [10.0**power for power in range(-4, 6)],
)
_LONG = 26  # rows from which two columns are easier to look at than one
_SLOT = 0.27  # inches for a row
_THICK = 0.78  # of which the bars take this part


def missing() -> str | None:
    """Why there can be no picture here, with the remedy."""
    return None if find_spec("matplotlib") else "no plot: matplotlib is not installed; pip install matplotlib"


def draw(data: dict[str, Any], path: Path) -> str | None:
    """Draw a run, as its JSON file holds it, into ``path``; the reason where there is nothing to draw."""
    rows = [row for row in data["rows"] if any(row["ratios"].values())]
    why = missing() or (None if rows else "no plot: no row has both a time of gpuconv and one of a peer")
    if why is not None:
        return why
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = _columns(rows)
    slots = max(len(column) + _suites(column) for column in columns)
    # Inches: letters beside the bars, bars, the peers' names.
    name, bars, peer, above, below = 0.3 + 0.066 * max(len(row["name"]) for row in rows), 4.1, 1.15, 1.55, 0.75
    width, height = len(columns) * (name + bars + peer), above + _SLOT * slots + below
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    for index, column in enumerate(columns):
        left = index * (name + bars + peer) + name
        axes = figure.add_axes((left / width, below / height, bars / width, 1 - (above + below) / height))
        _fill(axes, column, slots if len(columns) > 1 else 0)
    _heading(figure, data, rows, height)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return None


def _suites(rows: list[dict[str, Any]]) -> int:
    return len({row["suite"] for row in rows})


def _columns(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """One column, or two of about the same length that do not part a suite."""
    names = list(dict.fromkeys(row["suite"] for row in rows))
    rows = [row for name in names for row in rows if row["suite"] == name]
    if len(rows) < _LONG or len(names) == 1:
        return [rows]
    counts = [sum(row["suite"] in names[:cut] for row in rows) for cut in range(1, len(names))]
    middle = min(counts, key=lambda count: abs(2 * count - len(rows)))
    return [rows[:middle], rows[middle:]]


def _fill(axes: Any, rows: list[dict[str, Any]], slots: int) -> None:
    """The bars of ``rows`` from the top down, with a heading before each suite."""
    labels = list(dict.fromkeys(label for row in rows for label in row["ratios"]))
    shown = [best_ratio(row, label) for row in rows for label in labels]
    ratios = [ratio for ratio in shown if ratio is not None]
    # Room for the figures beyond the bars.
    low, high = min(0.8, *ratios), max(1.25, *ratios)
    room = (high / low) ** 0.14
    means = summary(rows)
    y, marks, suite = 0.0, [], None
    for row in rows:
        if row["suite"] != suite:
            suite = row["suite"]
            _suite(axes, y, suite, means[suite], labels)
            y += 1
        marks.append((y, row["name"]))
        _bars(axes, y, row, labels)
        peer = row.get("best_peer", "")
        name = _NAMES.get(peer, peer)
        axes.text(1.02, y, name, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color=_FAINT)
        y += 1
    axes.text(
        1.02, -0.05, "fastest peer", transform=axes.get_yaxis_transform(), va="center", fontsize=7, style="italic"
    )
    axes.set_xscale("log")
    axes.set_xlim(low / room, high * room)
    axes.set_ylim(max(y, slots) - 0.4, -0.6)
    inside = [[tick for tick in ticks if low / room <= tick <= high * room] for ticks in _TICKS]
    ticks = next((ticks for ticks in inside if len(ticks) <= 9), inside[-1])  # few enough that they do not touch
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.set_yticks([mark for mark, _ in marks], [name for _, name in marks], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.axvline(1, color="black", linewidth=1.1)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("←  peer faster      time of the fastest peer / time of gpuconv      gpuconv faster  →", fontsize=8)


def _suite(axes: Any, y: float, suite: str, means: dict[str, Any], labels: list[str]) -> None:
    figures = [f"{_figure(means[label][BEST]['geometric_mean'])} {label}" for label in labels if label in means]
    put = {"transform": axes.get_yaxis_transform(), "va": "center"}
    # Above the line at 1, which would run through the text.
    axes.axhspan(y - 0.42, y + 0.42, color="#f2f2f2", linewidth=0, zorder=3)
    axes.text(-0.015, y, suite, ha="right", fontsize=8.5, fontweight="bold", **put)
    axes.text(0.01, y, "geometric mean: " + ", ".join(figures), fontsize=7.5, zorder=4, **put)


def _figure(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


def _bars(axes: Any, y: float, row: dict[str, Any], labels: list[str]) -> None:
    thick = _THICK / len(labels)
    doubt = "?" if row.get("unsteady") else ""
    for index, label in enumerate(labels):
        ratio = best_ratio(row, label)
        if ratio is None:
            continue
        shades = _FASTER if ratio >= 1 else _SLOWER
        place = y - _THICK / 2 + thick * (index + 0.5)
        axes.barh(place, ratio - 1, left=1, height=thick, color=shades[index % len(shades)], linewidth=0)
        side = {"xytext": (3 if ratio >= 1 else -3, 0), "textcoords": "offset points"}
        align = {"ha": "left" if ratio >= 1 else "right", "va": "center_baseline"}
        axes.annotate(f"{_figure(ratio)}{doubt}", (ratio, place), fontsize=min(6.5, 13 * thick), **side, **align)


def _heading(figure: Any, data: dict[str, Any], rows: list[dict[str, Any]], height: float) -> None:
    from matplotlib.patches import Patch

    settings, versions, machine = data["settings"], data["versions"], data["machine"]
    title = "gpuconv against the fastest of its peers, layer by layer"
    if "rehearsal" in data["bench"]:
        title = "A rehearsal on tiny layers: these figures say nothing"
    threads = settings.get("threads")
    lines = settings.get("lines")
    where = [machine["cpu"] if settings.get("device", "cpu") == "cpu" else settings["device"], machine["vector"]]
    where += [f"{threads} thread{'s' if threads > 1 else ''}"] if threads else []
    batch = f"N = {settings['batch']}" if settings.get("batch") else "N of the table"
    form = (
        []
        if lines
        else [settings.get("dtype"), settings.get("layout"), batch, f"precision {settings.get('precision')}"]
    )
    where += [part for part in form if part]
    found = {
        name: next((versions[package] for package in packages if package in versions), None)
        for name, packages in _PACKAGES.items()
    }
    used = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    used = "\n".join(textwrap.wrap(f"{used}; {data['date'][:10]}", int(15 * figure.get_figwidth())))
    left = 0.2 / figure.get_figwidth()
    figure.text(left, 1 - 0.32 / height, title, fontsize=13, fontweight="bold", va="center")
    figure.text(left, 1 - 0.58 / height, ", ".join(where), fontsize=8.5, va="center")
    figure.text(left, 1 - 0.71 / height, used, fontsize=7.5, color=_FAINT, va="top")
    labels = list(dict.fromkeys(label for row in rows for label in row["ratios"]))
    patches = [Patch(facecolor=_FASTER[index % 3], label=label) for index, label in enumerate(labels)]
    patches += [Patch(facecolor=_SLOWER[index % 3], label=f"{label}, slower") for index, label in enumerate(labels)]
    figure.legend(
        handles=patches, loc="center left", bbox_to_anchor=(0.5 * left, 1 - 1.2 / height), ncols=2 * len(labels),
        fontsize=8, frameon=False, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    notes = []
    if any(row.get("unsteady") for row in rows):
        notes.append("? unsteady: half of the samples took far longer than the least, or others had the processor")
    absent = len(data["rows"]) - len(rows)
    if absent:
        notes.append(f"{absent} row{'s' if absent > 1 else ''} without a peer not shown")
    if data["not_reached"]:
        notes.append(f"{len(data['not_reached'])} not reached")
    figure.text(left, 0.14 / height, "; ".join(notes), fontsize=7.5, color=_FAINT, va="center")
