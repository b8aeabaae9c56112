"""What ``python -m bench gpu`` measures when nothing else is asked for: the most telling rows first.

A few layers that stand for the rest, through dtypes and precisions, layouts, batches, both gradients, and from NumPy to
NumPy; then every layer of the table. Whenever the time is up, what was measured says the most that it could.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bench import drive, gpu, layers
from bench.layers import Row
from bench.record import Record
from bench.timing import Effort, WallClock
from gpuconv.problem import Conv2dProblem

# One of each kind: a dense 3×3 of large planes and of small ones, 1×1, the stem, depthwise, few channels.
_TELLING = (
    ("resnet50", "56 3x3 64-64"),
    ("resnet50", "14 3x3 256-256"),
    ("resnet50", "28 1x1 128-512"),
    ("resnet50", "conv1 7x7/2"),
    ("depthwise", None),
    ("grouped", None),
)


@dataclass(frozen=True)
class Section:
    """Rows of one kind; ``host`` says that operands and result are NumPy arrays."""

    rows: tuple[Row, ...]
    host: bool = False


# op, dtype, precision, layout, N; the last whether operands are NumPy arrays, or a bias and a ReLU are fused
_ORDER = (
    ("forward", "float32", "highest", "NCHW", 32, ""),
    ("forward", "float16", "highest", "NHWC", 32, ""),
    ("forward", "float32", "highest", "NCHW", 32, "numpy"),
    ("forward", "float32", "medium", "NHWC", 32, ""),
    ("forward", "float32", "highest", "NCHW", 32, "relu"),
    ("input_grad", "float32", "highest", "NCHW", 32, ""),
    ("weight_grad", "float32", "highest", "NCHW", 32, ""),
    ("forward", "float32", "highest", "NCHW", 1, ""),
    ("forward", "float32", "highest", "NHWC", 32, ""),
    ("forward", "float16", "highest", "NHWC", 256, ""),
    ("input_grad", "float16", "highest", "NHWC", 32, ""),
    ("weight_grad", "float16", "highest", "NHWC", 32, ""),
    ("forward", "bfloat16", "highest", "NHWC", 32, ""),
    ("forward", "float32", "highest", "NCHW", 256, ""),
    ("forward", "float16", "highest", "NHWC", 1, ""),
    ("forward", "float16", "highest", "NCHW", 32, "numpy"),
    ("forward", "float16", "highest", "NCHW", 32, ""),
    ("forward", "float32", "medium", "NCHW", 32, ""),
    ("forward", "bfloat16", "highest", "NCHW", 32, ""),
    ("forward", "float32", "highest", "NCHW", 256, "numpy"),
)


def sections(tiny: bool = False) -> Iterator[Section]:
    """The tour, section by section; ``tiny`` for a rehearsal."""
    for op, dtype, precision, layout, batch, special in _ORDER:
        named = (op, dtype, precision if dtype == "float32" else "", layout, f"N={batch}", special)
        title = " ".join(filter(None, named))
        form = {"dtype": dtype, "precision": precision, "layout": layout}
        rows = [_as(row, title, op, special) for row in _telling(batch, form)]
        yield Section(tuple(_tiny(row) if tiny else row for row in rows), special == "numpy")
    rows = layers.load(layers.suites())
    yield Section(tuple(layers.tiny(row) if tiny else row for row in rows))


def _telling(batch: int, form: dict[str, str]) -> list[Row]:
    found = []
    for suite, name in _TELLING:
        rows = [row for row in layers.load([suite], batch=batch, **form) if name in (None, row.name)]
        found.append(rows[0])
    return found


def _as(row: Row, title: str, op: str, special: str) -> Row:
    problem = replace(row.problem, op=op)
    if special == "relu":
        problem = replace(problem, bias=True, activation="relu")
    return Row(title, row.name, Conv2dProblem.parse(str(problem)))


def _tiny(row: Row) -> Row:
    small = layers.tiny(row)
    return Row(row.suite, row.name, replace(small.problem, op=row.problem.op))


def run(
    rig: gpu.Rig,
    backend: str | None,
    wanted: list[Section],
    record: Record,
    minutes: float,
    effort: Effort,
    say: Callable[[str], None],
    begin: Callable[[Row], None],
) -> str | None:
    """Measure the sections within about ``minutes``; returns why it stopped."""
    deadline = time.monotonic() + 60 * minutes
    left = sum(len(section.rows) for section in wanted)
    stopped = None
    for section in wanted:
        left -= len(section.rows)
        share = max(deadline - time.monotonic(), 0) / 60
        enter = gpu.from_host(rig) if section.host else gpu.field(rig, backend)
        clock = WallClock() if section.host else rig.clock()
        stopped = drive.run(section.rows, enter, record, clock, share, effort, say, begin, forgiving=True, after=left)
        if stopped == "interrupted":
            break
    return stopped
