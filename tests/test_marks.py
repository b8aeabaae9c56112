"""What a ``Conv2d`` keeps on a GPU, from stream to stream: on a stand-in for CuPy's streams, events and captures."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import marks, prepared

A, B = 0x1000, 0x2000


class Gpu:
    """A GPU that has done what was asked of it up to some point of time, which only a test moves."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.current, self.capturing = A, set[int]()
        self.busy, self.relaxed = True, 0

    def module(self) -> SimpleNamespace:
        gpu = self

        class Event:
            def __init__(self, disable_timing: bool) -> None:
                assert disable_timing
                self.on = 0

            @property
            def done(self) -> bool:
                assert gpu.relaxed, "CUDA would give up a capture"
                return not gpu.busy

            def synchronize(self) -> None:
                assert gpu.relaxed, "CUDA would give up a capture"
                gpu.log.append(("host waits for", self.on))

        class Stream:
            @property
            def ptr(self) -> int:
                return gpu.current

            def record(self, event: Event) -> Event:
                assert gpu.current not in gpu.capturing, "an event within the graph"
                event.on = gpu.current
                return event

            def wait_event(self, event: Event) -> None:
                assert gpu.current not in gpu.capturing, "a graph cannot wait for what is outside"
                gpu.log.append((gpu.current, "waits for", event.on))

        class Device:
            def __init__(self, ordinal: int) -> None:
                self.ordinal = ordinal

            def __enter__(self) -> Device:
                return self

            def __exit__(self, *details: Any) -> None:
                pass

            def synchronize(self) -> None:
                if gpu.capturing:
                    raise RuntimeError("a graph is being captured")
                gpu.log.append(("host waits for GPU", self.ordinal))

        runtime = SimpleNamespace(streamIsCapturing=lambda address: address in gpu.capturing)
        return SimpleNamespace(
            cuda=SimpleNamespace(Event=Event, Device=Device, get_current_stream=Stream, runtime=runtime)
        )

    def exchange(self, mode: Any) -> None:
        mode = mode._obj
        self.relaxed, mode.value = int(mode.value == 2), 2 * self.relaxed


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    monkeypatch.setitem(sys.modules, "cupy", made.module())
    monkeypatch.setattr(marks, "_exchange", lambda: made.exchange)
    yield made
    assert made.relaxed == 0, "as it was before"


def layer_on(gpu: Gpu, value: Any = "packed") -> gpuconv.Conv2d:
    layer = gpuconv.Conv2d(np.ones((3, 3)))
    assert layer.kept("weights", lambda: value, 0) is value
    assert gpu.log == [], "who packs waits for nothing"
    return layer


def use(layer: gpuconv.Conv2d) -> Any:
    return layer.kept("weights", pytest.fail, 0)


def test_another_stream_waits_on_the_gpu_until_the_weights_are_there(gpu):
    layer = layer_on(gpu)
    gpu.current = B
    assert use(layer) == use(layer) == "packed"
    # Twice, because another stream may have the same address by now; which costs a microsecond, while packing lasts.
    assert gpu.log == [(B, "waits for", A)] * 2
    gpu.busy = False
    use(layer)
    gpu.busy = True  # it is not asked again
    use(layer)
    assert len(gpu.log) == 2


def test_a_capture_has_the_host_wait_once(gpu):
    """The graph must not depend on what is outside of it; and nothing is packed within it."""
    layer = layer_on(gpu)
    gpu.current, gpu.capturing = B, {B}
    assert use(layer) == use(layer) == "packed"
    assert gpu.log == [("host waits for", A)]
    with pytest.raises(RuntimeError, match=r"packed while a CUDA graph is captured.* before the capture"):
        layer.kept("other weights", pytest.fail, 0)
    gpu.capturing = set()
    assert layer.kept("other weights", lambda: 5, 0) == 5


@pytest.mark.parametrize("address", [0, 1])
def test_of_the_default_stream_no_capture_is_asked(gpu, monkeypatch, address):
    """CUDA answers with an error while any other stream captures, and gives that capture up."""
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "streamIsCapturing", pytest.fail)
    gpu.current = address
    layer = layer_on(gpu)
    use(layer)
    assert gpu.log == [(address, "waits for", address)]


@pytest.mark.parametrize("how", ["dropped", "cleared"])
@pytest.mark.parametrize(("streams", "waits"), [((A, A), 0), ((A, B, A), 1)])
def test_memory_that_other_streams_read_is_given_back_when_they_have(gpu, streams, how, waits):
    """CuPy's pool gives it to its own stream's next array, which on one stream alone is in order."""
    layer = layer_on(gpu)
    gpu.busy = False
    for gpu.current in streams:
        use(layer)
    if how == "cleared":
        prepared.release()  # of gpuconv.clear()
        assert layer._kept == {}
    else:
        del layer
        gc.collect()
    assert gpu.log == [("host waits for GPU", 0)] * waits


def test_each_threads_own_default_stream_is_another_one(gpu):
    """All have the address 2."""
    gpu.current, gpu.busy = 2, False
    layer = layer_on(gpu)
    use(layer)
    mark = layer._kept["weights"][1]
    assert not mark.shared
    thread = threading.Thread(target=use, args=(layer,))
    thread.start()
    thread.join()
    assert mark.shared


def test_a_graphs_memory_is_given_back_when_the_gpu_has_finished(gpu):
    layer = layer_on(gpu, SimpleNamespace(captured={"call": "steps"}))
    del layer
    gc.collect()
    assert gpu.log == [("host waits for GPU", 0)]


def test_what_cannot_be_given_back_during_a_capture_is_kept_until_it_has_ended(gpu):
    released = []

    class Weights:
        captured = True

    def weights():
        found = Weights()
        weakref.finalize(found, released.append, 1)
        return found

    for drop in (lambda layer: prepared.release(), lambda layer: None):
        layer = gpuconv.Conv2d(np.ones((3, 3)))
        layer.kept("weights", weights, 0)
        gpu.capturing = {A}
        drop(layer)
        del layer
        gc.collect()
        assert released == []
        gpu.capturing = set()
    layer = layer_on(gpu, SimpleNamespace(captured=True))
    del layer
    gc.collect()
    assert gpu.log == [("host waits for GPU", 0)]
    assert released == [1, 1]


def test_no_layer_is_made_of_a_kernel_on_a_gpu_during_a_capture(gpu, monkeypatch):
    monkeypatch.setattr(prepared.arrays, "on_stream", lambda *where: contextlib.nullcontext())
    kernel = prepared.arrays.operand("Conv2d", "k", np.ones((3, 3)))
    layer, gpu.capturing = gpuconv.Conv2d(np.ones((3, 3))), {A}
    with pytest.raises(RuntimeError, match="make it before the capture"):
        layer._snapshot(dataclasses.replace(kernel, device=0))


def test_a_forked_child_asks_cuda_for_nothing(gpu, monkeypatch):
    layer = layer_on(gpu)
    gpu.busy, gpu.current = False, B
    use(layer)
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    del layer
    gc.collect()
    assert gpu.log == []


def test_copies_of_a_kernel_on_a_gpu_are_waited_for_by_whoever_packs_them(gpu):
    """The stream on which the layer was made may be PyTorch's, and not CuPy's current one."""
    layer = gpuconv.Conv2d(np.ones((3, 3)))
    layer._copied.append(marks.Mark(0))
    gpu.current = B
    layer.kept("weights", lambda: 1, 0)
    assert gpu.log == [(B, "waits for", A)]
    layer.kept("weights on the host", lambda: 2, None)
    assert gpu.log[1:] == [("host waits for", A)]


def test_without_the_drivers_function_nothing_is_relaxed(monkeypatch):
    monkeypatch.setattr(marks.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    marks._exchange.cache_clear()
    with marks.relaxed():
        assert marks._exchange() is None
    marks._exchange.cache_clear()
