"""What ``python -m bench gpu`` measures when nothing else is asked for: the most telling rows first.

A few layers that stand for the rest, through dtypes and precisions, layouts, batches, both gradients, and from NumPy to
NumPy; the rules of thumb that were made without a GPU; then every layer of the table. Whenever the time is up, what was
measured says the most that it could.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bench import apart, drive, gpu, layers, rules
from bench.layers import Row
from bench.record import Record
from bench.timing import Clock, Effort, WallClock
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
    ("forward", "float32", "high", "NCHW", 32, ""),
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


# The last section before the rules of thumb.
_BEFORE_RULES = ("forward", "float32", 1, "")


def sections(tiny: bool = False) -> Iterator[Section]:
    """The tour, section by section; ``tiny`` for a rehearsal."""
    for op, dtype, precision, layout, batch, special in _ORDER:
        named = (op, dtype, precision if dtype == "float32" else "", layout, f"N={batch}", special)
        title = " ".join(filter(None, named))
        form = {"dtype": dtype, "precision": precision, "layout": layout}
        rows = [_as(row, title, op, special) for row in _telling(batch, form)]
        yield Section(tuple(_tiny(row) if tiny else row for row in rows), special == "numpy")
        if (op, dtype, batch, special) == _BEFORE_RULES:
            yield from _of_rules(tiny)
    rows = layers.load(layers.suites())
    yield Section(tuple(layers.tiny(row) if tiny else row for row in rows))


# Operations of few output channels per group, for which ``dispatch.preferred`` puts the direct kernel first.
_THIN = tuple(f"n32c64h56w56_o{outputs}kh3kw3_p1_f32" for outputs in (1, 4, 8, 16))


def _of_rules(tiny: bool) -> Iterator[Section]:
    """What was not measured yet: where a matrix product is too thin, and the rules that other values compete with."""
    title = "rule of thumb: thin, direct or a matrix product"
    thin = [Row(title, line, Conv2dProblem.parse(line)) for line in _THIN]
    yield Section(tuple(_tiny(row) if tiny else row for row in thin))
    for rule in rules.rules():
        yield Section(rule.rows(tiny), rule.host)


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


def ways(dry_run: bool, backend: str | None, host: frozenset[str]) -> apart.Ways:
    """How rows are measured; those of the suites ``host`` from NumPy to NumPy."""
    rig = gpu.rig(dry_run)
    if isinstance(rig, str):
        raise RuntimeError(rig)
    fields = {rule.title: rules.field(rig, rule) for rule in rules.rules()}
    usual = {True: gpu.from_host(rig), False: gpu.field(rig, backend)}

    def of(row: Row) -> tuple[drive.Enter, Clock]:
        from_host = row.suite in host
        return fields.get(row.suite, usual[from_host]), WallClock() if from_host else rig.clock()

    return of, rig.broken


def run(
    dry_run: bool,
    backend: str | None,
    wanted: list[Section],
    record: Record,
    minutes: float,
    effort: Effort,
    say: Callable[[str], None],
    begin: Callable[[Row], None],
) -> str | None:
    """Measure the sections within about ``minutes``, in a process apart; returns why it stopped."""
    rows = [row for section in wanted for row in section.rows]
    host = frozenset(row.suite for section in wanted if section.host for row in section.rows)
    measuring = apart.Apart(ways, (dry_run, backend, host), effort)
    try:
        return drive.run(rows, measuring, record, minutes, say, begin, forgiving=True)
    finally:
        measuring.close()
