"""``autotune``: measure the few configurations that should be fastest, and remember the one that is."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpuconv import dispatch, dtypes, request
from gpuconv.backends.protocol import Operands, Plan
from gpuconv.errors import NoBackendError
from gpuconv.explaining import explain
from gpuconv.problem import Conv2dProblem

_CONFIGURATIONS = 3  # that are measured
_ROUNDS = 7  # of one measurement each, taken in turn so that a GPU that slows down slows all of them down
_SECONDS = 2e-3  # that a measurement takes, about


@dataclass(frozen=True)
class Measured:
    """One configuration, and how long it took.

    Attributes
    ----------
    configuration : str
        Its tile, and in how many parts it makes its sums.
    predicted : float
        Seconds, by the cost model.
    seconds : float or None
        Of the GPU, the median; None where it could not run.
    """

    configuration: str
    predicted: float
    seconds: float | None


@dataclass(frozen=True)
class Tuning:
    """The answer of ``autotune``; printing it gives the report.

    Attributes
    ----------
    problem : Conv2dProblem
        What was measured.
    implementation : str
        Whose configurations were measured.
    measured : tuple of Measured
        The configurations, the fastest first; empty where there is nothing to choose.
    note : str
        Where the fastest is remembered, or why nothing is.
    """

    problem: Conv2dProblem
    implementation: str
    measured: tuple[Measured, ...]
    note: str

    def __str__(self) -> str:
        lines = [f"{self.problem}, {self.implementation}"]
        for row in self.measured:
            took = "cannot run" if row.seconds is None else f"{row.seconds * 1e6:8.1f} µs"
            lines.append(f"  {took}  {row.predicted * 1e6:8.1f} µs predicted  {row.configuration}")
        return "\n".join([*lines, self.note])


def autotune(*arguments: Any, **options: Any) -> Tuning:
    """Measure on this GPU how a convolution runs fastest, and remember it for every later call like it.

    What would run is decided as always, and stays the same; measured are that implementation's configurations, the
    three that should be fastest. Their operands are made up, so shapes will do for arrays. Later calls with the same
    problem, options and workspace limit, on the same GPU with the same software, in this process or another, run the
    configuration that was fastest. Sums may then be added up in another order, so that the last bits change.

    Parameters
    ----------
    *arguments, **options
        As for ``explain``: those of ``conv2d``, or shapes and ``input_dtype``, or one problem line; ``op`` for
        gradients.

    Returns
    -------
    Tuning
        What was measured, and where it is remembered: ``tuning.json`` in the cache folder (``GPUCONV_CACHE_DIR``, or
        ``gpuconv`` in the user's own cache folder), which may be read, edited and deleted.

    Raises
    ------
    TypeError, ValueError
        As ``conv2d``.
    NoBackendError
        When nothing can run the problem, or CuPy is missing, which holds the operands.

    Examples
    --------
    >>> print(autotune((1, 3, 32, 32), (8, 3, 3, 3), backend="numpy.gemm").note)
    nothing is tuned: numpy.gemm has one way to run a problem
    """
    asked = explain(*arguments, **options)
    name, plan = asked.implementation, asked.plan
    if name is None or plan is None:
        raise NoBackendError(asked.note or f"autotune: nothing can run {asked.problem}")
    module: Any = dispatch.implementation(name)
    if not hasattr(module, "configurations"):
        return Tuning(asked.problem, name, (), f"nothing is tuned: {name} has one way to run a problem")
    problem, target = asked.problem, asked.target
    limit = request.workspace("autotune", options.get("workspace_limit"))
    if not problem.result_size or not problem.products:
        return Tuning(problem, name, (), "nothing is tuned: there is nothing to compute")
    ways = module.configurations(problem, target, _CONFIGURATIONS)
    plans: list[Plan | None] = []
    for way in ways:
        try:
            plans.append(module.plan(problem, target, limit, way))
        except MemoryError:
            plans.append(None)
    times = _measure(module, problem, target.ordinal, plans)
    rows = [
        Measured(_told(way), sum(found.seconds for found in way), seconds)
        for way, seconds in zip(ways, times, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda index: (times[index] is None, times[index]))
    fastest = times[order[0]]
    if fastest is None:
        return Tuning(problem, name, tuple(rows), "nothing is remembered: workspace_limit leaves too little for any")
    from gpuconv.backends.numba_cuda import tuned

    key = tuned.key(name, problem, target, limit)
    if key is None:
        note = "nothing is remembered: no GPU was measured"
    else:
        kept = tuned.remember(key, ways[order[0]], fastest)
        dispatch.choose.cache_clear()
        note = f"remembered in {kept}" if isinstance(kept, Path) else f"nothing is remembered: {kept}"
    return Tuning(problem, name, tuple(rows[index] for index in order), note)


def _told(way: Any) -> str:
    """A configuration in a few words; of a problem in several launches the first one's."""
    first = way[0]
    return f"tile {first.tile}, sums in {first.parts} part{'s' * (first.parts > 1)}"


def _measure(module: Any, problem: Conv2dProblem, ordinal: int | None, plans: list[Plan | None]) -> list[float | None]:
    """Seconds that each plan takes on the GPU, medians; None for those that there are not."""
    missing = dispatch.implementation("cupy.gemm").unavailable()
    if missing is not None:
        raise NoBackendError(f"autotune: CuPy holds the operands on the GPU: {missing}")
    import cupy

    with cupy.cuda.Device(ordinal):
        rng = np.random.default_rng(0)
        first, second = (
            _operand(problem, which, rng) if shape is not None else None
            for which, shape in enumerate(problem.operand_shapes)
        )
        out = _operand(problem, 2, None)
        bias = None
        if problem.bias:
            bias = cupy.asarray(np.zeros(problem.result_channels, dtypes.numpy_dtype(problem.y_dtype)))
        stream = cupy.cuda.Stream(non_blocking=True)
        runs: list[Callable[[], None] | None] = []
        for plan in plans:
            operands = Operands(first, second, bias, ordinal=ordinal)
            if plan is not None:
                # As Conv2d does, whose calls are nothing but launches.
                operands.packed, operands.again = module.pack(plan, operands), True

            def run(plan: Plan | None = plan, operands: Operands = operands) -> None:
                module.run(plan, operands, out)

            runs.append(None if plan is None else run)
        cupy.cuda.get_current_stream().synchronize()  # the operands are there
        with stream:
            return rounds(runs, clock(stream))


def _operand(problem: Conv2dProblem, which: int, rng: np.random.Generator | None) -> Any:
    """An operand or the result on the current GPU, in the problem's layout, as implementations see it; of normal
    numbers, because zeros would take a GPU less power and time.
    """
    import cupy

    shape = request.shape_of(problem, which)
    dtype = (problem.x_dtype, problem.k_dtype, problem.y_dtype)[which]
    made = np.zeros(shape, np.float32) if rng is None else rng.standard_normal(shape, np.float32)
    return request.view(problem, which, cupy.asarray(made.astype(dtypes.numpy_dtype(dtype))))


def rounds(runs: list[Callable[[], None] | None], clock: Callable[[Callable[[], None]], float]) -> list[float | None]:
    """The median of each run's times, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, own in zip(runs, times, strict=True):
            if run is not None:
                own.append(clock(run))
    return [statistics.median(own) if own else None for own in times]


def clock(stream: Any) -> Callable[[Callable[[], None]], float]:
    """A function that gives the GPU's seconds for what a run launches on ``stream``, the current one.

    The launches are captured in a graph, so that what the host takes to launch them is not in the time.
    """
    import cupy

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    graphs: dict[Any, tuple[Any, int]] = {}

    def elapsed(graph: Any, count: int) -> float:
        begin.record(stream)
        for _ in range(count):
            graph.launch(stream)
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3 / count

    def seconds(run: Callable[[], None]) -> float:
        if run not in graphs:
            run()  # compiles, and makes what later calls use again
            stream.begin_capture()
            try:
                run()
            finally:
                graph = stream.end_capture()
            elapsed(graph, 1)
            graphs[run] = graph, max(1, min(1000, int(_SECONDS / max(elapsed(graph, 1), 1e-6))))
        return elapsed(*graphs[run])

    return seconds
