"""One driver for every device: check the answers, then let those that are right race, row after row."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import adjoints
from bench.check import Arrays, Truth, Wrong
from bench.layers import Row
from bench.peers import Contender
from bench.record import Record
from bench.timing import Clock, Effort, busy_elsewhere, pilot, race
from gpuconv.problem import Conv2dProblem

# Share of the machine's CPU time from which a row is marked: libraries with a thread per core wait for the slowest.
_TOO_BUSY = 0.05

# Share of a row's time that is left for timing even where checking, or compiling for the first time, took long.
_RACING = 0.4


@dataclass(frozen=True)
class Ours:
    """One of gpuconv's ways to run a problem."""

    implementation: str
    contender: Contender
    plan: str = ""  # in words, with what was predicted


@dataclass(frozen=True)
class Field:
    """Who takes part in a row: gpuconv by label, and each peer's settings, or the reason why it does not take part."""

    ours: Mapping[str, Ours | str]
    peers: Mapping[str, list[Contender] | str]


Enter = Callable[[Conv2dProblem, Arrays], Field]
Measure = Callable[[Row, float], dict[str, Any]]  # a row, and about how many seconds it may take


class Lost(Exception):
    """Nothing can be measured any more."""


def here(enter: Enter, clock: Clock, effort: Effort) -> Measure:
    """Rows measured in this process."""
    return lambda row, seconds: measure(row.problem, enter, clock, seconds, effort)


def run(
    rows: Sequence[Row],
    measuring: Measure,
    record: Record,
    minutes: float,
    say: Callable[[str], None] = lambda line: None,
    begin: Callable[[Row], None] = lambda row: None,
    forgiving: bool = False,
) -> str | None:
    """Measure ``rows`` within about ``minutes``; each is on file before the next begins. Returns why it stopped.

    A row that fails, for want of memory for example, ends the run, or is noted if ``forgiving``.
    ``begin`` is told each row before it is measured, ``say`` one line with its ratios afterwards.
    """
    deadline = time.monotonic() + 60 * minutes
    stopped: str | None = None
    try:
        for index, row in enumerate(rows):
            left = deadline - time.monotonic()
            if left <= 0:
                stopped = f"out of time after {minutes:g} minutes"
                break
            begin(row)
            try:
                measured = measuring(row, left / (len(rows) - index))
            except Lost as error:
                stopped = str(error)
                break
            except Exception as error:
                if not forgiving:
                    raise
                measured = refused(error)
            record.add(row, measured)
            say(_line(row, measured))
    except KeyboardInterrupt:
        stopped = "interrupted"
    except Exception as error:
        record.close(_sentence(error))
        raise
    record.close(stopped)
    return stopped


def refused(error: Exception) -> dict[str, Any]:
    """A row that could not be measured."""
    return {"gpuconv": {"row": {"refused": _sentence(error)}}, "peers": {}, "ratios": {}}


def measure(
    problem: Conv2dProblem,
    enter: Enter,
    clock: Clock,
    seconds: float,
    effort: Effort,
    truth: Truth | None = None,
    begin: Callable[[str], None] = lambda label: None,
) -> dict[str, Any]:
    """One row: gpuconv and peers checked, then timed against one another in about ``seconds`` in all.

    ``begin`` is told who is to be called for the first time, and then of the timing.
    """
    start = time.monotonic()
    given = adjoints.operands(problem)
    truth = truth or adjoints.truth(problem, given, effort.checked)
    field = enter(problem, given)
    measured: dict[str, Any] = {"gpuconv": {}, "peers": {}, "ratios": {}}
    calls: dict[tuple[str, str], Contender] = {}
    for label, ours in field.ours.items():
        if isinstance(ours, str):
            measured["gpuconv"][label] = {"refused": ours}
            continue
        entry = measured["gpuconv"][label] = {"implementation": ours.implementation}
        entry |= {"plan": ours.plan} if ours.plan else {}
        begin(label)
        try:
            ours.contender.activate()
            entry["accuracy"] = truth.require(ours.contender.to_numpy(ours.contender.call())).facts()
        except Exception as error:  # whatever it is, the other rows are worth having
            entry["refused"] = _sentence(error)
        else:
            calls["gpuconv", label] = ours.contender
    if calls:  # without one of ours to compare with, the time of a peer is nobody's question
        for name, settings in field.peers.items():
            if isinstance(settings, str):
                measured["peers"][name] = {"reason": settings}
                continue
            begin(name)
            best, measured["peers"][name] = _best(settings, truth, clock, effort)
            if best is not None:
                best.activate()
                calls["peers", name] = best
    begin("timing")
    elsewhere = busy_elsewhere()
    timed = race(
        {f"{side} {name}": contender.call for (side, name), contender in calls.items()},
        clock,
        max(seconds - (time.monotonic() - start), _RACING * seconds),
        effort,
    )
    for side, name in calls:
        measured[side][name] |= timed[f"{side} {name}"].facts()
    unsteady = [f"{side} {name}" for side, name in calls if timed[f"{side} {name}"].unsteady]
    measured["busy_elsewhere"] = share = elsewhere()
    if share is not None and share > _TOO_BUSY:
        unsteady.append(f"{share:.0%} of the CPU time went to other processes or machines")
    measured |= {"unsteady": unsteady} if unsteady else {}
    against = {name: timed[f"peers {name}"].median for side, name in calls if side == "peers"}
    measured |= {"best_peer": min(against, key=against.__getitem__)} if against else {}
    for side, label in calls:
        if side == "gpuconv":
            ours_time = timed[f"gpuconv {label}"].median
            measured["ratios"][label] = {name: float(f"{t / ours_time:.4g}") for name, t in against.items()}
    return measured


def _best(
    settings: Sequence[Contender], truth: Truth, clock: Clock, effort: Effort
) -> tuple[Contender | None, dict[str, Any]]:
    """A peer's fastest setting among those whose answer is right, and what was tried."""
    tried: dict[str, Any] = {}
    best: tuple[float, Contender, dict[str, float]] | None = None
    for contender in settings:
        try:
            contender.activate()
            start = time.perf_counter()
            accuracy = truth.accept(contender.to_numpy(contender.call())).facts()
            once = time.perf_counter() - start
            if best is not None and once > 1 and once > 20 * best[0]:
                tried[contender.setting] = float(f"{once:.3g}")  # a first call tells enough
                continue
            rough = pilot(contender.call, clock, effort)
        except Exception as error:
            tried[contender.setting] = _sentence(error)
            continue
        tried[contender.setting] = float(f"{rough:.3g}")
        if best is None or rough < best[0]:
            best = rough, contender, accuracy
    if best is None:
        reasons = "; ".join(f"{setting}: {found}" for setting, found in tried.items())
        return None, {"reason": reasons or "no setting to try"}
    _, contender, accuracy = best
    return contender, {
        "setting": contender.setting, "threads": contender.threads, "accuracy": accuracy, "tried_s": tried,
    }  # fmt: skip


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"its answer is wrong: {text}" if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"


def _line(row: Row, measured: dict[str, Any]) -> str:
    found = []
    for label, entry in measured["gpuconv"].items():
        against = ", ".join(f"{peer} {ratio:.3g}" for peer, ratio in measured["ratios"].get(label, {}).items())
        found.append(f"{label}: {entry.get('refused') or against or 'no peer'}")
    return f"{row.suite}: {row.name}: {'; '.join(found)}"
