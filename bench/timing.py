"""One timer for everything: contenders take turns, in blocks, and the median of many samples counts.

Blocks, not single calls in turn: on the CPU every library keeps threads of its own, which go on waiting in a busy loop
for some milliseconds after a call and take the cores from the next library. On two cores, NumPy's and PyTorch's calls
took four to nine times as long with a pause of 10 ms between blocks as with 50 ms, or as alone. Each block therefore
begins with a pause that lets them fall asleep, and with calls that are not timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, Protocol

Call = Callable[[], Any]

# Seconds of untimed calls at the start of a block: caches, threads and the processor's clock come back from a pause.
_WARM_UP = 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    min: float
    max: float
    repeats: int  # samples
    calls: int  # calls per sample: short calls are timed in bunches
    wall: float | None = None  # on a GPU, from the call to the end of the work as the host sees it

    @property
    def unsteady(self) -> bool:
        """Whether half of the samples took far longer than the best: something else had the processor."""
        return self.median > 1.5 * self.min

    def facts(self) -> dict[str, float]:
        facts = {f"{key}_s": value for key, value in asdict(self).items() if isinstance(value, float)}
        rounded = {key: float(f"{value:.4g}") for key, value in facts.items()}
        return rounded | {"repeats": self.repeats, "calls": self.calls}


@dataclass(frozen=True)
class Effort:
    """How much is measured. The defaults are for figures, QUICK is for trying the machinery."""

    rounds: int = 5  # blocks per contender
    repeats: int = 50  # samples per contender, as far as time allows
    least: int = 1  # samples per block, whatever time allows
    shortest: float = 2e-4  # seconds per sample, at least
    pause: float = 0.05  # seconds before a block, at least
    checked: int = 10**10  # products, some seconds' worth, that checking an answer may take


QUICK = Effort(rounds=2, repeats=4, shortest=0.0, pause=0.0)
GPU = Effort(rounds=5, repeats=50, least=10, shortest=1e-3, pause=0.0, checked=10**9)


class Clock(Protocol):
    name: str

    def pause(self, seconds: float) -> None:
        """Wait until nothing of an earlier block is under way."""

    def sample(self, call: Call, calls: int) -> float:
        """Seconds per call, of ``calls`` calls after one another."""

    def wall(self, call: Call) -> float | None:
        """Seconds from the call to the end of its work, where ``sample`` measures something else."""


class WallClock:
    name = "wall clock (perf_counter)"

    def pause(self, seconds: float) -> None:
        """Sleep, and go on sleeping while threads of this process still run (OpenBLAS's wait about 30 to 80 ms)."""
        time.sleep(seconds)
        for _ in range(20):
            before = time.process_time()
            time.sleep(seconds / 5)
            if time.process_time() - before <= seconds / 50:
                return

    def sample(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def wall(self, call: Call) -> float | None:
        return None


class EventClock:
    """CUDA events around calls that are queued behind idle work, so that the GPU never waits for the host's launches.

    ``make_event`` gives a new timing event, ``elapsed`` the milliseconds between two, ``synchronize`` waits for the
    GPU, ``delay`` queues about a millisecond of idle work (or does nothing where there is no such kernel).
    """

    name = "CUDA events"

    def __init__(self, make_event: Call, elapsed: Callable[[Any, Any], float], synchronize: Call, delay: Call) -> None:
        self.make_event, self.elapsed, self.synchronize, self.delay = make_event, elapsed, synchronize, delay

    def pause(self, seconds: float) -> None:
        self.synchronize()

    def sample(self, call: Call, calls: int) -> float:
        start, stop = self.make_event(), self.make_event()
        self.delay()
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        self.synchronize()
        return self.elapsed(start, stop) / 1e3 / calls

    def wall(self, call: Call) -> float | None:
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start


def busy_elsewhere() -> Callable[[], float | None]:
    """Begin to watch; the answer is the share of the machine's CPU time that went neither here nor idle since.

    Time that a hypervisor gave to another machine counts. None where the system has no such account (not Linux).
    """

    def account() -> tuple[float, float] | None:
        try:
            with open("/proc/stat") as lines:
                ticks = [int(number) for number in lines.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        return sum(ticks) / os.sysconf("SC_CLK_TCK"), idle / os.sysconf("SC_CLK_TCK") + time.process_time()

    before = account()

    def since() -> float | None:
        after = account()
        if before is None or after is None or after[0] - before[0] < 0.1:  # ticks are too coarse for less
            return None
        total, ours = after[0] - before[0], after[1] - before[1]
        return round(max(0.0, 1 - ours / total), 3)

    return since


def pilot(call: Call, clock: Clock, effort: Effort) -> float:
    """A rough time of a call that has already run once: the best of a few samples, of one where it is slow.

    More of them where calls are short: a library's threads take some calls to wake, and rough times choose a peer's
    best setting.
    """
    clock.pause(effort.pause)
    first = max(clock.sample(call, 1), 1e-9)
    if first > 0.5:
        return first
    few = _warm_up_calls(first)
    for _ in range(few):
        call()
    return min(first, *(clock.sample(call, 1) for _ in range(max(3, few))))


def _warm_up_calls(seconds: float) -> int:
    # A call of half a second warms up within itself.
    return 0 if seconds > 0.5 else max(1, min(20, int(_WARM_UP / seconds)))


def race(
    contenders: Mapping[str, Call], clock: Clock, seconds: float, effort: Effort | None = None
) -> dict[str, Timing]:
    """Time calls against one another: A B, B A, A B, ... in blocks, within about ``seconds`` in all."""
    effort = effort or Effort()
    if not contenders:
        return {}
    rough = {name: max(pilot(call, clock, effort), 1e-9) for name, call in contenders.items()}
    calls = {name: max(1, ceil(effort.shortest / seconds_each)) for name, seconds_each in rough.items()}
    # Fewer blocks where the slowest alone would take all the time, and three at the least for a median.
    rounds = min(effort.rounds, max(3, int(seconds / sum(rough.values()))))
    share = seconds / (rounds * len(contenders))
    block = {
        name: max(effort.least, min(ceil(effort.repeats / rounds), int(share / (rough[name] * calls[name]))))
        for name in contenders
    }
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
            clock.pause(effort.pause)
            for _ in range(_warm_up_calls(rough[name])):
                contenders[name]()
            samples[name] += [clock.sample(contenders[name], calls[name]) for _ in range(block[name])]
    walls = {name: [clock.wall(call) for _ in range(block[name])] for name, call in contenders.items()}
    return {
        name: Timing(
            statistics.median(found),
            min(found),
            max(found),
            len(found),
            calls[name],
            None if None in walls[name] else statistics.median(w for w in walls[name] if w is not None),
        )
        for name, found in samples.items()
    }
