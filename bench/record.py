"""What a run leaves behind: a JSON file, rewritten after each row, and tables on the terminal.

A row of the file, beside its suite, name, problem line and FLOPs:

``gpuconv``
    By label (``plain call`` and ``prepared`` on the CPU, the implementation's name on a GPU): the implementation, its
    accuracy, and seconds per call; or ``refused`` with the reason, and then it was not timed. On a GPU the ``plan`` in
    words too, with the time that the cost model predicted; of a rule of thumb the labels are its values.
``peers``
    By library: the fastest of its settings (``setting``), its accuracy and seconds per call, and all that were tried
    (``tried_s``: seconds, roughly, or what was wrong); or ``reason``, why it does not take part.
``ratios``
    By label and peer: the peer's median time / gpuconv's.
``best_peer``
    The peer of the least median time; absent where none took part.
``unsteady``, ``busy_elsewhere``
    Who was disturbed while this row was measured, and the share of CPU time that others took.

``summary`` has, by suite, label and peer, the geometric mean of the ratios and their extremes; the peer ``best peer``
stands for the fastest of each row. ``verified``, of a GPU, has what came of its tests and of compute-sanitizer.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import gpuconv
from bench.layers import Row

_PACKAGES = (
    "numpy", "numba", "llvmlite", "scipy", "torch", "onnxruntime", "opencv-python-headless", "opencv-python",
    "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes",
)  # fmt: skip


BEST = "best peer"
_WIDE = 176  # columns that the table of all rows needs


def machine() -> dict[str, Any]:
    """Processor, memory and system; nothing that names the machine or its user."""
    facts = {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector": _vector(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "getloadavg"):
        facts["load_at_start"] = round(os.getloadavg()[0], 2)  # other work on the machine spoils the figures
    return facts


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _vector() -> str:
    flags = _cpuinfo("flags").split()
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "sse2": "SSE2"}
    return next((name for flag, name in names.items() if flag in flags), "unknown")


def versions() -> dict[str, str]:
    """Versions of everything that takes part, the BLAS of NumPy included."""
    found = {"python": platform.python_version(), "gpuconv": gpuconv.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})
    found["numpy's BLAS"] = f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
    return found


def commit() -> str | None:
    """The revision of the working tree, with a mark where it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


class Record:
    """The rows so far and the file that holds them: valid JSON at any moment."""

    def __init__(self, path: Path, kind: str, settings: dict[str, Any], rows: Sequence[Row]) -> None:
        self.path = path
        self.waiting = list(rows)
        self.data: dict[str, Any] = {
            "bench": kind,
            "complete": False,
            "stopped": None,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "ratio": "peer's median time / gpuconv's median time, measured in this run; above 1 gpuconv is faster",
            "settings": settings,
            "machine": machine(),
            "versions": versions(),
            "summary": {},
            "rows": [],
            "not_reached": [],
        }
        self._write()

    def add(self, row: Row, measured: dict[str, Any]) -> None:
        """Keep a row that has been measured, or refused."""
        self.waiting.remove(row)
        problem = row.problem
        facts = {"suite": row.suite, "name": row.name, "problem": str(problem), "flops": problem.flops}
        self.data["rows"].append(facts | measured)
        self._write()

    def close(self, stopped: str | None = None) -> None:
        """Note why the run ended; None when it reached the end."""
        self.data["complete"], self.data["stopped"] = stopped is None and not self.waiting, stopped
        self._write()

    def note(self, key: str, facts: dict[str, Any]) -> None:
        """Keep something beside the rows."""
        self.data[key] = facts
        self._write()

    def refusals(self) -> list[str]:
        """gpuconv's wrong answers and errors, one line each."""
        return [
            f"{row['problem']}: {label}: {entry['refused']}"
            for row in self.data["rows"]
            for label, entry in row["gpuconv"].items()
            if "refused" in entry
        ]

    def _write(self) -> None:
        self.data["summary"] = summary(self.data["rows"])
        self.data["not_reached"] = [f"{row.suite}: {row.name}" for row in self.waiting]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Another file renamed over it: whoever stops the run between two bytes finds the rows of before.
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(beside, self.path)


def best_ratio(row: dict[str, Any], label: str) -> float | None:
    """Of one row and one of gpuconv's labels, the ratio against the fastest peer."""
    return min(row["ratios"].get(label, {}).values(), default=None)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """suite -> gpuconv's label -> peer -> geometric mean of the ratios, and the extremes with their rows."""
    gathered: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        for label, against in row["ratios"].items():
            best = best_ratio(row, label)
            for peer, ratio in (against | ({BEST: best} if best else {})).items():
                gathered.setdefault((row["suite"], label, peer), {})[row["name"]] = ratio
    result: dict[str, Any] = {}
    for (suite, label, peer), ratios in sorted(gathered.items(), key=lambda item: item[0][2] == BEST):
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
        result.setdefault(suite, {}).setdefault(label, {})[peer] = {
            "geometric_mean": float(f"{mean:.3g}"),
            "rows": len(ratios),
            "unsteady": sum(row["name"] in ratios and row["suite"] == suite for row in rows if row.get("unsteady")),
            "lowest": [low, ratios[low]],
            "highest": [high, ratios[high]],
        }
    return result


def time_text(seconds: float) -> str:
    """A time with three digits and a unit."""
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def show(record: Record, console: Console) -> None:
    """Every row, in which settings the peers ran, the reasons for what is not there, and the summary."""
    rows = record.data["rows"]
    console.print(_every_row(rows, console.width >= _WIDE))
    if console.width < _WIDE:
        console.print(f"A terminal of {_WIDE} columns shows every peer of each row; so does the file.")
    if any(row.get("unsteady") for row in rows):
        console.print("? unsteady: a median above 1.5 times the least, or above 5 % of the CPU time spent elsewhere")

    entries = [(peer, entry) for row in rows for peer, entry in row["peers"].items()]
    settings = Counter((peer, entry["setting"]) for peer, entry in entries if "setting" in entry)
    for (peer, setting), count in sorted(settings.items()):
        console.print(f"+ {peer} ({_rows(count)}): {setting}", markup=False, highlight=False)
    reasons = Counter((peer, entry["reason"]) for peer, entry in entries if "reason" in entry)
    for (peer, reason), count in reasons.items():
        console.print(f"– {peer} ({_rows(count)}): {reason}", markup=False, highlight=False)
    for line in record.refusals():
        console.print(f"refused: {line}", style="red", markup=False, highlight=False)

    means = Table()
    for column in ("suite", "gpuconv", "against"):
        means.add_column(column, no_wrap=True)
    for column in ("geometric mean", "rows", "unsteady", "lowest", "highest"):
        means.add_column(column)
    for suite, labels in record.data["summary"].items():
        for label, against in labels.items():
            for peer, facts in against.items():
                counts = [str(facts[key]) for key in ("rows", "unsteady")]
                extremes = [f"{ratio:.3g} ({name})" for name, ratio in (facts["lowest"], facts["highest"])]
                means.add_row(suite, label, peer, f"{facts['geometric_mean']:.3g}", *counts, *extremes)
    if means.row_count:
        console.print(means)
    if record.data["not_reached"]:
        count = len(record.data["not_reached"])
        console.print(f"{record.data['stopped']}: {_rows(count)} not reached", markup=False)


def _rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def _every_row(rows: list[dict[str, Any]], wide: bool) -> Table:
    """A line for each of gpuconv's labels in each row; of the peers, where there is room, not only the fastest."""
    table = Table("suite", "layer", "gpuconv", title="Ratios: peer's time / gpuconv's; above 1 gpuconv is faster")
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"])) if wide else []
    for column in ("implementation", "time", "GFLOP/s", "unit A") if wide else ("time",):
        table.add_column(column)
    for peer in (*peers, BEST):
        table.add_column(peer, justify="right")
    table.add_column("which")
    for row in rows:
        for index, (label, entry) in enumerate(row["gpuconv"].items()):
            title = ["", ""] if index else [row["suite"], row["name"]]
            cells = [*title, label, *([entry.get("implementation", "")] if wide else [])]
            if "refused" in entry:
                table.add_row(*cells, "[red]refused")
                continue
            seconds, unit = entry["median_s"], entry["accuracy"]["unit_a"]
            facts = [time_text(seconds), f"{row['flops'] / seconds / 1e9:.3g}", f"{unit:.2g}"]
            against = row["ratios"].get(label, {})
            ratios = [*(against.get(peer) for peer in peers), best_ratio(row, label)]
            mark = "?" if row.get("unsteady") else ""
            found = [f"{ratio:.3g}{mark}" if ratio else "–" for ratio in ratios]
            table.add_row(*cells, *(facts if wide else facts[:1]), *found, row.get("best_peer", ""))
    return table
