"""What a run leaves behind: a JSON file, rewritten after each row, and tables on the terminal."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
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
    "numpy", "numba", "llvmlite", "scipy", "torch", "opencv-python-headless", "opencv-python", "numba-cuda",
    "cupy-cuda13x", "cupy-cuda12x", "ml_dtypes",
)  # fmt: skip


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
        self.data["complete"], self.data["stopped"] = stopped is None, stopped
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


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """suite -> gpuconv's label -> peer -> geometric mean of the ratios, and the extremes with their rows."""
    gathered: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        for label, against in row["ratios"].items():
            for peer, ratio in against.items():
                gathered.setdefault((row["suite"], label, peer), {})[row["name"]] = ratio
    result: dict[str, Any] = {}
    for (suite, label, peer), ratios in gathered.items():
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
    """Every row, the reasons for what is not there, and the summary."""
    rows = record.data["rows"]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    table = Table("suite", "layer", "gpuconv runs", "time", "GFLOP/s", "unit A")
    table.title = "Ratios: peer's time / gpuconv's; above 1 gpuconv is faster"
    for peer in peers:
        table.add_column(peer, justify="right")
    for row in rows:
        for label, entry in row["gpuconv"].items():
            cells = [row["suite"], row["name"], entry.get("implementation", label)]
            if "refused" in entry:
                table.add_row(*cells, "[red]refused", "", "", *("" for _ in peers))
                continue
            seconds = entry["median_s"]
            cells += [time_text(seconds), f"{row['flops'] / seconds / 1e9:.3g}", f"{entry['accuracy']['unit_a']:.2g}"]
            ratios = row["ratios"].get(label, {})
            mark = "?" if row.get("unsteady") else ""
            table.add_row(*cells, *(f"{ratios[peer]:.3g}{mark}" if peer in ratios else "–" for peer in peers))
    console.print(table)

    if any(row.get("unsteady") for row in rows):
        console.print("? unsteady: a median above 1.5 times the least, or above 5 % of the CPU time spent elsewhere")

    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for peer, entry in row["peers"].items():
            if "reason" in entry:
                key = (peer, entry["reason"])
                reasons[key] = reasons.get(key, 0) + 1
    for (peer, reason), count in reasons.items():
        console.print(f"– {peer} ({count} row{'s' if count > 1 else ''}): {reason}", markup=False, highlight=False)
    for line in record.refusals():
        console.print(f"refused: {line}", style="red", markup=False, highlight=False)

    means = Table("suite", "gpuconv", "against", "geometric mean", "rows", "unsteady", "lowest", "highest")
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
        console.print(f"{record.data['stopped']}: {count} rows were not reached", markup=False)
