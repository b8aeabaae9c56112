"""Rows measured in a process apart, which may hang, die or lose its GPU without ending the run.

    here                                          apart
    a row, who is left out            ──▶
                                      ◀──         "numba_cuda.direct is next"     before each one's first call
                                      ◀──         what was measured; or who left the GPU broken
    nothing for a minute: it is ended, and the row begins again in a new one, without the one that was next

An illegal address or a deadlock in one kernel leaves a CUDA context, and so its process, of no use to any other. Who
does that twice takes no part in the rows that follow.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench import drive
from bench.check import Arrays
from bench.layers import Row
from bench.timing import Clock, Effort
from gpuconv.problem import Conv2dProblem

STARTS = 180.0  # seconds that a new process may take until it is ready: it imports PyTorch and finds the GPU
PATIENCE = 60.0  # seconds without a word, beside those of the timing: kernels are compiled, cuDNN tries algorithms
_SLICE = 0.5  # seconds
_STRIKES = 2
_TIMING = "timing"

# What a process apart measures by, made there, because what it holds cannot travel: who takes part in a row, and what
# has become of the device, which is nothing as long as all is well.
Ways = tuple[Callable[[Row], tuple[drive.Enter, Clock]], Callable[[], str]]


class _Broken(BaseException):
    """The device is of no use any more; not an Exception, of which each contender may raise its own."""


def without(enter: drive.Enter, out: dict[str, str]) -> drive.Enter:
    """``enter`` but for those who are left out, each with the reason."""

    def entered(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        field = enter(problem, given)
        ours = {label: out.get(label, contender) for label, contender in field.ours.items()}
        return replace(field, ours=ours, peers={name: out.get(name, found) for name, found in field.peers.items()})

    return entered


def _serve(connection: Any, make: Callable[..., Ways], given: tuple[Any, ...], effort: Effort) -> None:
    """Measure one row after the other until there is none, or until the device is broken."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who is interrupted ends this process
    ways, broken = make(*given)
    connection.send(("ready", None))
    while (asked := connection.recv()) is not None:
        row, seconds, out = asked
        now = ""

        def begin(label: str) -> None:
            nonlocal now
            found = broken() if now else ""
            if found:
                raise _Broken(found)
            now = label
            connection.send(("next", label))

        try:
            try:
                enter, clock = ways(row)
                measured = drive.measure(row.problem, without(enter, out), clock, seconds, effort, begin=begin)
            except Exception as error:
                measured = drive.refused(error)
            found = broken()
            if found:
                raise _Broken(found)
        except _Broken as error:
            connection.send(("broken", str(error)))
            return
        connection.send(("row", measured))


class Apart:
    """Measures rows in a process apart, for ``drive.run``; to be closed.

    ``make(*given)`` is called there and gives the ways to measure a row. It is a function of a module, because it
    travels by name.
    """

    def __init__(
        self, make: Callable[..., Ways], given: tuple[Any, ...], effort: Effort, patience: float = PATIENCE
    ) -> None:
        self._of_child = make, given, effort
        self.patience = patience
        self.strikes: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self._process: Any = None
        self._connection: Any = None

    def __call__(self, row: Row, seconds: float) -> dict[str, Any]:
        """What ``drive.measure`` found, of as many of the contenders as can be measured."""
        out = {who: why for who, why in self.reasons.items() if self.strikes[who] >= _STRIKES}
        again = True  # where nobody was next yet, once
        while True:
            measured, culprit, why = self._once(row, seconds, out)
            if measured is not None:
                return measured
            if again and not culprit:
                again = False
                continue
            if not culprit or culprit in out or culprit == _TIMING:
                return drive.refused(RuntimeError(f"{culprit or 'the row'}: {why}"))
            self.strikes[culprit] += 1
            out[culprit] = why
            self.reasons[culprit] = f"left out, because of {row.problem}: {why}"

    def _once(self, row: Row, seconds: float, out: dict[str, str]) -> tuple[dict[str, Any] | None, str, str]:
        """What was measured; or None, who was next when the process was lost, and how."""
        culprit, patience = "", self.patience
        try:
            if self._process is None:
                self._start()
            self._connection.send((row, seconds, out))
            while self._comes(patience):
                kind, said = self._connection.recv()
                if kind == "row":
                    return said, "", ""
                if kind == "broken":
                    self.close()
                    return None, culprit, f"it left the device broken: {said}"
                culprit = said
                if culprit == _TIMING:
                    patience += 2 * seconds
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return None, culprit, f"its process died with exit code {self.close(wait=2)}"
        except BaseException:
            self.close()
            raise
        self.close()
        return None, culprit, f"hung: nothing came of it in {patience:.3g} s"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, *self._of_child), daemon=True)
        self._process.start()
        end.close()
        try:
            if not self._comes(STARTS):
                raise EOFError
            self._connection.recv()
        except EOFError:
            code = self.close(wait=2)
            raise drive.Lost(f"no process can measure any more; the last ended with code {code}") from None

    def _comes(self, seconds: float) -> bool:
        """Whether word comes within so many seconds, of which those do not count in which the machine was asleep."""
        slices = math.ceil(seconds / _SLICE)
        return any(self._connection.poll(_SLICE) for _ in range(slices))

    def close(self, wait: float = 0) -> int | None:
        """End the process, if there is one, and if it has not ended by itself in ``wait`` seconds; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.join(wait)
        process.kill()
        process.join(10)
        self._connection.close()
        code: int | None = process.exitcode
        return code
