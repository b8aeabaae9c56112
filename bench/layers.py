"""The rows of a benchmark: layers of well-known networks and image filters, each as one problem line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpuconv.problem import Conv2dProblem

TABLE = Path(__file__).with_name("layers.csv")


@dataclass(frozen=True)
class Row:
    suite: str
    name: str
    problem: Conv2dProblem


def suites() -> list[str]:
    """The suites of the table, in its order."""
    with TABLE.open(newline="") as lines:
        return list(dict.fromkeys(row["suite"] for row in csv.DictReader(lines)))


def load(
    chosen: Sequence[str],
    *,
    batch: int | None = None,
    dtype: str = "float32",
    layout: str = "NCHW",
    precision: str = "highest",
) -> list[Row]:
    """The rows of the chosen suites; ``batch`` replaces the table's own N."""
    unknown = set(chosen) - set(suites())
    if unknown:
        raise ValueError(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(suites())}")
    rows = []
    with TABLE.open(newline="") as lines:
        for row in csv.DictReader(lines):
            if row["suite"] not in chosen:
                continue
            sizes = {key: int(value) for key, value in row.items() if key not in ("suite", "name")}
            N, C, H, W = batch or sizes["N"], sizes["C"], sizes["H"], sizes["W"]
            problem = Conv2dProblem.of(
                (N, C, H, W) if layout == "NCHW" else (N, H, W, C),
                (sizes["O"], C // sizes["groups"], sizes["KH"], sizes["KW"]),
                call="bench",
                x_dtype=dtype,
                k_dtype=dtype,
                stride=sizes["stride"],
                padding=sizes["padding"],
                groups=sizes["groups"],
                layout=layout,
                precision=precision,
            )
            rows.append(Row(row["suite"], row["name"], problem))
    return rows


def from_lines(lines: Iterable[str]) -> list[Row]:
    """Rows of a suite of their own from problem lines."""
    return [Row("given", line, Conv2dProblem.parse(line)) for line in lines]


def tiny(row: Row) -> Row:
    """A row of the same kind, small enough for a rehearsal: few channels, a little more than one window, which is no
    larger than 17×17.
    """
    problem = row.problem
    taps = [min(extent, 17) for extent in (problem.KH, problem.KW)]
    padding = problem.padding
    if taps != [problem.KH, problem.KW]:
        padding = tuple((min(a, k // 2), min(b, k // 2)) for (a, b), k in zip(padding, taps, strict=True))
    problem = replace(problem, KH=taps[0], KW=taps[1], padding=padding)
    groups = min(problem.groups, 4)
    channels, outputs = problem.C // problem.groups, problem.O // problem.groups
    small = replace(
        problem,
        N=min(problem.N, 2),
        C=groups * min(channels, 5),
        O=groups * min(outputs, 6),
        H=min(problem.H, problem.KH + 4),
        W=min(problem.W, problem.KW + 5),
        groups=groups,
    )
    return Row(row.suite, row.name, Conv2dProblem.parse(str(small)))
