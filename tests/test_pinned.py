"""What copies between the host and a GPU share from call to call: threads, page-locked memory, lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import calls
import numpy as np
import pytest

from gpuconv import pinned
from gpuconv.streaming import COMPUTE, DOWNLOAD, UPLOAD


@pytest.mark.parametrize("alone", [0, 1 << 40])
def test_parallel_shares_cover_everything_once(monkeypatch, alone):
    monkeypatch.setattr(pinned, "_ALONE", alone)
    monkeypatch.setattr(pinned, "_threads", lambda: 5)
    for extent in (1, 2, 4, 5, 6, 17):
        touched = np.zeros(extent, int)
        pinned.in_parallel(lambda a, b, touched=touched: np.add.at(touched, np.arange(a, b), 1), extent, 2)
        assert (touched == 1).all()


def test_an_error_in_a_share_is_the_callers_and_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(pinned, "_ALONE", 0)
    monkeypatch.setattr(pinned, "_threads", lambda: 3)
    late, ended = threading.Event(), []

    def part(start: int, stop: int) -> None:
        if start == 0:
            late.set()
            raise KeyboardInterrupt
        late.wait(10)
        ended.append(start)

    with pytest.raises(KeyboardInterrupt):
        pinned.in_parallel(part, 3, 2)
    assert sorted(ended) == [1, 2]


class Unwilling:
    """Threads of which one more cannot be started; ``late`` runs what was asked for after all."""

    def __init__(self, willing: int) -> None:
        self.left, self.late = willing, []

    def submit(self, work: Callable[[], None]) -> None:
        self.late.append(work)
        if not self.left:
            raise RuntimeError("can't start new thread")
        self.left -= 1


@pytest.mark.parametrize("willing", [0, 2])
def test_where_no_thread_can_be_started_this_one_does_it_all(monkeypatch, willing):
    monkeypatch.setattr(pinned, "_ALONE", 0)
    monkeypatch.setattr(pinned, "_threads", lambda: 5)
    threads = Unwilling(willing)
    monkeypatch.setattr(pinned, "_copiers", lambda: threads)
    touched = np.zeros(17, int)
    pinned.in_parallel(lambda a, b: np.add.at(touched, np.arange(a, b), 1), 17, 2)
    assert (touched == 1).all()
    touched[:] = 0  # used for something else, when the pool comes round to what it had queued
    for work in threads.late:
        work()
    assert (touched == 0).all()


def test_an_interrupt_while_waiting_waits_for_the_shares(monkeypatch):
    monkeypatch.setattr(pinned, "_ALONE", 0)
    monkeypatch.setattr(pinned, "_threads", lambda: 2)
    waits = []

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(1)
            if len(waits) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    other, ended = threading.Event(), []

    def part(start: int, stop: int) -> None:
        if threading.current_thread() is threading.main_thread():
            other.wait(10)  # until another thread has a share
        else:
            other.set()
            while not waits:
                pass
            ended.append(start)

    monkeypatch.setattr(pinned.threading, "Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        pinned.in_parallel(part, 2, 2)
    assert len(ended) == 1


def test_all_lanes_are_waited_for_where_one_fails():
    waited = []

    class Stream:
        def __init__(self, name: str, error: BaseException | None = None) -> None:
            self.name, self.error = name, error

        def synchronize(self) -> None:
            waited.append(self.name)
            if self.error is not None:
                raise self.error

    ring = pinned.CupyRing.__new__(pinned.CupyRing)
    ring.streams = {name: Stream(name, KeyboardInterrupt()) for name in (UPLOAD, DOWNLOAD)} | {COMPUTE: Stream(COMPUTE)}
    with pytest.raises(KeyboardInterrupt):
        ring.settle()
    assert sorted(waited) == sorted([UPLOAD, DOWNLOAD, COMPUTE])


def test_a_forked_child_frees_nothing_and_waits_for_no_lock(monkeypatch):
    """CUDA does not survive a fork; and another thread may have held the lock."""
    freed = []

    class Memory:
        def __del__(self) -> None:
            freed.append(1)

    monkeypatch.setattr(pinned, "_free", {0: Memory()})

    def child() -> str:
        pinned.release()
        return f"{len(pinned._free)} kept, {len(freed)} freed"

    with pinned._lock:
        assert calls.forked(child) == "0 kept, 0 freed"
