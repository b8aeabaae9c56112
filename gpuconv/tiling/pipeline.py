"""Three things at once: one thread reads the next tile, the caller computes this one, another thread writes the last.

    reader   read 0   read 1     read 2      read 3  …
    caller            compute 0  compute 1   compute 2  …
    writer                       write 0     write 1  …

Windows and results go round through queues; that there are two of each is what bounds them. What fails stops all three:
tiles that were computed before are still written, nothing is left running, and the error says which tile it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
W = TypeVar("W")
R = TypeVar("R")


class Pipeline(Generic[T, W, R]):
    """The stages of every tile, and the memory they use: ``windows`` and ``results``, at least one of each.

    ``read(tile, window)``, then ``compute(tile, window, result)``, then ``write(tile, result)``; each stage takes the
    tiles in order. ``named(stage, tile)`` is added to an error as a note.
    """

    def __init__(
        self,
        read: Callable[[T, W], None],
        compute: Callable[[T, W, R], None],
        write: Callable[[T, R], None],
        named: Callable[[str, T], str],
    ) -> None:
        self._read, self._compute, self._write, self._named = read, compute, write, named
        self._failures: list[BaseException] = []
        self._stopped = threading.Event()
        # None in a queue ends whoever takes from it.
        self._windows: SimpleQueue[W | None] = SimpleQueue()
        self._filled: SimpleQueue[tuple[T, W] | None] = SimpleQueue()
        self._results: SimpleQueue[R | None] = SimpleQueue()
        self._made: SimpleQueue[tuple[T, R] | None] = SimpleQueue()

    def run(self, tiles: Iterable[T], windows: Sequence[W], results: Sequence[R]) -> None:
        """Bring every tile through; the first error of any stage is raised here, when all have stopped."""
        for window in windows:
            self._windows.put(window)
        for result in results:
            self._results.put(result)
        threads = [
            threading.Thread(target=self._reader, args=(tiles,), name="gpuconv-reader"),
            threading.Thread(target=self._writer, name="gpuconv-writer"),
        ]
        try:
            for thread in threads:
                thread.start()
            self._computer()
        except BaseException as error:  # KeyboardInterrupt too, wherever it comes
            self._failures.append(error)
        finally:
            self._made.put(None)
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failures:
            try:
                raise self._failures[0]
            finally:
                self._failures.clear()  # or the error and this frame would hold each other, and the buffers

    def _stop(self) -> None:
        self._stopped.set()
        self._windows.put(None)
        self._filled.put(None)
        self._results.put(None)

    def _reader(self, tiles: Iterable[T]) -> None:
        with self._guarded():
            for tile in tiles:
                window = self._windows.get()
                if window is None or self._stopped.is_set():
                    return
                with self._noted("reading", tile):
                    self._read(tile, window)
                self._filled.put((tile, window))
            self._filled.put(None)

    def _computer(self) -> None:
        while (item := self._filled.get()) is not None:
            tile, window = item
            result = self._results.get()
            if result is None or self._stopped.is_set():
                return
            with self._noted("computing", tile):
                self._compute(tile, window, result)
            self._windows.put(window)
            self._made.put((tile, result))

    def _writer(self) -> None:
        with self._guarded():
            while (item := self._made.get()) is not None:
                tile, result = item
                with self._noted("writing", tile):
                    self._write(tile, result)
                self._results.put(result)

    @contextmanager
    def _guarded(self) -> Any:
        """Errors of a thread stop all, and are kept for the caller."""
        try:
            yield
        except BaseException as error:
            self._failures.append(error)
            self._stop()

    @contextmanager
    def _noted(self, stage: str, tile: T) -> Any:
        try:
            yield
        except Exception as error:
            error.add_note(self._named(stage, tile))
            raise
