"""The rules of thumb that were made without a GPU, each with other numbers in its place, for the tour to measure.

A row's labels are the values of one rule, the one in force among them; the fastest is what should be in the source.
What is planned under a value is planned once, as for a call that is repeated, and runs under it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from bench import drive, gpu, layers, peers
from bench.check import Arrays
from bench.layers import Row
from gpuconv import arrays, dispatch, request, schedule
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

_MiB = 1 << 20


@dataclass(frozen=True)
class Rule:
    """A module's attribute, what to put in its place, and the problems that tell."""

    module: str  # of gpuconv
    attribute: str
    values: Mapping[str, Any]  # by label
    problems: tuple[str, ...]
    backend: str | None = None  # the implementation that goes by it; None of rules for NumPy arrays

    @property
    def title(self) -> str:
        """The suite of its rows."""
        return f"rule of thumb: {self.module}.{self.attribute}"

    @property
    def host(self) -> bool:
        """Whether operands and result are NumPy arrays."""
        return self.backend is None

    def rows(self, tiny: bool = False) -> tuple[Row, ...]:
        """One row per problem."""
        rows = [Row(self.title, line, Conv2dProblem.parse(line)) for line in self.problems]
        return tuple(layers.tiny(row) if tiny else row for row in rows)

    @contextmanager
    def under(self, value: Any) -> Iterator[None]:
        """With the value in the attribute's place."""
        module = importlib.import_module(f"gpuconv.{self.module}")
        kept = getattr(module, self.attribute)
        setattr(module, self.attribute, value)
        try:
            yield
        finally:
            setattr(module, self.attribute, kept)


@lru_cache(maxsize=1)
def rules() -> tuple[Rule, ...]:
    """Every rule, the most telling first."""
    from gpuconv.backends.numba_cuda import direct

    sizes = {f"{size} MiB": size * _MiB for size in (1, 4, 16, 64)}
    least = {f"{size} MiB": size * _MiB for size in (1, 2, 4, 8)}
    tiles = {f"tile {tile}": partial(_always, tile) for tile in (direct.WIDE, direct.FEW_OUTPUTS, direct.ONE_OUTPUT)}
    shapes = {
        "tall columns of threads": _shapes(0),
        "by the sums, as now": _shapes(None),
        "short columns of threads": _shapes(1 << 40),
    }
    return (
        Rule("cutting", "_MOST", sizes, ("n256c64h56w56_o64kh3kw3_p1_f32", "n1c3h4096w4096_o8kh5kw5_p2_f32")),
        Rule("cutting", "_LEAST", least, ("n32c64h56w56_o64kh3kw3_p1_f32",)),
        Rule("cutting", "_PIECES", {"4": 4, "8": 8, "16": 16}, ("n32c64h56w56_o64kh3kw3_p1_f32",)),
        Rule(
            "backends.cupy_gemm", "_PRODUCTS", {f"{count:.0e}": count for count in (2 * 10**8, 2 * 10**9, 2 * 10**10)},
            ("n32c64h56w56_o64kh3kw3_p1_f32", "n32c64h56w56_o64kh3kw3_p1_nhwc_f16"), "cupy.gemm",
        ),
        Rule(
            "backends.gemm_rows", "_GAIN", {"rows of the kernel": 0, "1.5": 1.5, "columns": math.inf},
            ("n32c64h56w56_o64kh3kw3_p1_nhwc_f32", "n32c256h14w14_o256kh3kw3_p1_nhwc_f16"), "cupy.gemm",
        ),
        Rule(
            "backends.numba_cuda.direct", "choose_tile", {"as now": direct.choose_tile} | tiles,
            ("n32c3h224w224_o8kh3kw3_p1_f32", "n32c64h56w56_o2kh3kw3_p1_f32"), "numba_cuda.direct",
        ),
        Rule(
            "backends.numba_cuda.depthwise_shape", "block", shapes,
            ("n1c512h14w14_o512kh3kw3_p1_g512_f32", "n32c32h112w112_o32kh3kw3_p1_g32_f32"), "numba_cuda.depthwise",
        ),
    )  # fmt: skip


def _always(tile: Any, problem: Conv2dProblem) -> Any:
    return tile


def _shapes(multiprocessors: int | None) -> Callable[..., Any]:
    """``depthwise_shape.block`` for a GPU of so many multiprocessors, whose threads tall columns leave idle or not."""
    from gpuconv.backends.numba_cuda import depthwise_shape

    kept = depthwise_shape.block
    if multiprocessors is None:
        return kept

    @lru_cache(maxsize=256)
    def block(problem: Conv2dProblem, side: int) -> Any:
        rule = Rule("backends.numba_cuda.depthwise_shape", "_MULTIPROCESSORS", {}, ())
        with rule.under(multiprocessors):
            return kept.__wrapped__(problem, side)

    return block


def field(rig: gpu.Rig, rule: Rule) -> drive.Enter:
    """Who takes part in a rule's rows: one implementation under each value, against itself."""
    contender = _from_host if rule.host else _planned

    def enter(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        ours: dict[str, drive.Ours | str] = {}
        if not (rule.host or type(rig) is gpu.Rig or dispatch.has_cupy()):
            return drive.Field(ours, {})  # CuPy holds the operands, and nobody asked for these rows
        for label, value in rule.values.items():
            try:
                ours[label] = contender(rig, rule, value, problem, given)
            except Exception as error:  # a value that leaves no plan, or no memory
                ours[label] = f"{type(error).__name__}: {error}"
        return drive.Field(ours, {})

    return enter


def _from_host(rig: gpu.Rig, rule: Rule, value: Any, problem: Conv2dProblem, given: Arrays) -> drive.Ours:
    device = "cpu" if type(rig) is gpu.Rig else "cuda"
    call = partial(gpu.calling(problem, device=device), given.x, given.k, given.bias)

    def under() -> Any:
        with rule.under(value):
            return call()

    return drive.Ours(f"device={device}", peers.Contender("plain call", under, peers.to_nchw(problem)))


def _planned(rig: gpu.Rig, rule: Rule, value: Any, problem: Conv2dProblem, given: Arrays) -> drive.Ours:
    rehearsal = type(rig) is gpu.Rig
    name = "numpy.gemm" if rehearsal else str(rule.backend)  # in whose stead, so that every line here runs
    target = Target("cpu") if rehearsal else Target("cuda", 0)
    implementation = dispatch.implementation(name)
    reasons = dispatch.reasons(name, problem, target)
    if reasons:
        raise RuntimeError("; ".join(reasons))
    with rule.under(value):
        plan = implementation.plan(problem, target, schedule.DEFAULT_WORKSPACE)

    def make() -> tuple[Any, Any]:
        x, k = (arrays.operand("bench", "x", rig.array(problem, values)).array for values in (given.x, given.k))
        return request.view(problem, 0, x), request.view(problem, 1, k)

    def call(x: Any, k: Any) -> Any:
        y = rig.empty(request.shape_of(problem, 2), problem.y_dtype)
        with rule.under(value):
            implementation.run(plan, Operands(x, k, ordinal=target.ordinal), request.view(problem, 2, y))
        return y

    to_nchw = peers.to_nchw(problem)
    turning = gpu.rotating(rig, problem, call, make)
    return drive.Ours(name, peers.Contender("planned", turning, lambda y: to_nchw(arrays.to_host(y))))
