"""A warmed-up ``Conv2d`` on arrays that stand for a GPU's does nothing but launch; in Numba's simulator.

``test_replay.py`` starts this file in a process of its own. The arrays are NumPy's, said to be in a GPU's memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import SIMULATED, SIMULATOR_MARKS

if not SIMULATED:
    pytest.skip("runs in the simulator's own process", allow_module_level=True)

import simulated_warp
from numba import cuda

import gpuconv
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import (
    cost,
    implicit_gemm_mma,
    implicit_gemm_mma_run,
    launch,
    replay,
    tensor_shape,
    tiles,
    uploads,
)

pytestmark = SIMULATOR_MARKS
PLAIN, TENSOR = "numba_cuda.implicit_gemm", "numba_cuda.implicit_gemm_mma"
WINOGRAD = "numba_cuda.winograd"
DTYPES = {PLAIN: np.float32, TENSOR: np.float16, WINOGRAD: np.float32}
# The kernel and the options that make the same result of the same image.
KERNELS = {name: ((5, 8, 2, 2), {"padding": 1}) for name in (PLAIN, TENSOR)} | {
    WINOGRAD: ((5, 8, 3, 3), {"padding": ((1, 2), (2, 1)), "precision": "high"})
}


def poisoned(size: Any, dtype: Any) -> np.ndarray:
    made = np.empty(size, dtype)
    made.reshape(-1).view(np.uint8)[...] = 0xFF
    return made


def in_place(span: Any) -> np.ndarray:
    facts = span.__cuda_array_interface__
    dtype = np.dtype(facts["typestr"])
    memory = (ctypes.c_char * (facts["shape"][0] * dtype.itemsize)).from_address(facts["data"][0])
    memory.owner = span  # as Numba's array does
    return np.frombuffer(memory, dtype)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Arrays count as a GPU's, CuPy makes them in host memory; small tiles, sums in two parts."""
    simulated_warp.install(monkeypatch)
    implicit_gemm_mma_run.kernel.cache_clear()
    monkeypatch.setattr(implicit_gemm_mma, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.implementation("cupy.gemm"), "unavailable", lambda: "a stand-in")
    monkeypatch.setattr(launch, "resident", lambda array: True)
    monkeypatch.setattr(launch, "_in_place", in_place)
    stream = SimpleNamespace(ptr=7, synchronize=lambda: None)
    library = SimpleNamespace(
        empty=poisoned, zeros=np.zeros, asarray=np.asarray, ascontiguousarray=np.ascontiguousarray,
        cuda=SimpleNamespace(
            get_current_stream=lambda: stream, Device=lambda ordinal: nullcontext(),
            runtime=SimpleNamespace(streamIsCapturing=lambda address: False),
        ),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", library)

    def only(work: cost.Work, *rest: object) -> list[cost.Candidate]:
        tile = tiles.SMALL if work.way == "float32" else tensor_shape.SMALL
        return [cost.Candidate(tile, cost.whole(work.slices, 2), 0.0)]

    monkeypatch.setattr(cost, "configurations", only)
    dispatch.choose.cache_clear()
    yield library
    dispatch.choose.cache_clear()
    implicit_gemm_mma_run.kernel.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    found: list[Any] = []
    run = replay.Step.run
    monkeypatch.setattr(replay.Step, "run", lambda step, stream: (found.append(step), run(step, stream))[1])
    return found


def forbid(monkeypatch: Any, library: Any) -> None:
    """From here on nothing may be allocated, copied or waited for."""

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("more than a launch")

    for name in ("empty", "zeros", "asarray", "ascontiguousarray"):
        monkeypatch.setattr(library, name, never)
    stream = library.cuda.get_current_stream()
    monkeypatch.setattr(stream, "synchronize", never)
    for owner, names in ((launch, ("vector", "scratch")), (cuda, ("to_device", "device_array", "synchronize"))):
        for name in names:
            monkeypatch.setattr(owner, name, never)


def layer_of(name: str, layout: str) -> tuple[gpuconv.Conv2d, list[np.ndarray]]:
    rng = np.random.default_rng(5)
    k, bias = (rng.standard_normal(shape).astype(DTYPES[name]) for shape in (KERNELS[name][0], 5))
    shape = (2, 8, 4, 3) if layout == "NCHW" else (2, 4, 3, 8)
    images = [rng.standard_normal(shape).astype(DTYPES[name]) for _ in range(3)]
    return gpuconv.Conv2d(k, bias, activation="relu", layout=layout, backend=name, **KERNELS[name][1]), images


def room(layer: gpuconv.Conv2d, x: np.ndarray) -> np.ndarray:
    shape = (2, 5, 5, 4) if x.shape[1] == 8 else (2, 5, 4, 5)
    return np.full(shape, np.nan, x.dtype)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("name", DTYPES)
def test_a_warmed_up_call_only_launches(name, layout, gpu, launches, monkeypatch):
    layer, images = layer_of(name, layout)
    first = layer(images[0], out=room(layer, images[0]))
    of_first = len(launches)
    with monkeypatch.context() as forbidden:
        forbid(forbidden, gpu)
        found = [layer(x, out=room(layer, x)) for x in images]
    # Multiply and add; with tensor cores channels are first put side by side, where they are not. Transform, multiply
    # and transform.
    each = 3 if name == WINOGRAD or (name, layout) == (TENSOR, "NCHW") else 2
    assert len(launches) == of_first + 3 * each
    assert found[0].tobytes() == first.tobytes()
    options = {"activation": "relu", "layout": layout, **KERNELS[name][1]}
    for x, y in zip(images, found, strict=True):
        wanted = gpuconv.conv2d(x, layer._kernel.array, layer._bias.array, backend=name, **options)
        assert y.tobytes() == wanted.tobytes()


def kept(layer: gpuconv.Conv2d) -> replay.Kept:
    (found,) = (value for value, _ in layer._kept.values() if isinstance(value, replay.Kept))
    return found


def test_views_and_other_alignments_are_calls_of_their_own():
    layer, (x, *_) = layer_of(PLAIN, "NHWC")
    wanted = layer(x, out=room(layer, x)).tobytes()
    wide = np.full((2, 4, 3, 17), np.nan, np.float32)
    views = [wide[..., 1:9], wide[..., 16:8:-1], wide[:, ::-1, :, :8], wide[::-1, :, ::-1, :8]]
    for view in views:
        view[...] = x
        for _ in range(2):
            assert layer(view, out=room(layer, x)).tobytes() == wanted
            view[...] = x
    memory = np.zeros(x.size + 1, np.float32)
    shifted = memory[1:].reshape(x.shape)
    shifted[...] = x
    assert layer(shifted, out=room(layer, x)).tobytes() == wanted
    out = np.full((2, 5, 4, 10), np.nan, np.float32)[..., ::2]
    assert layer(x, out=out).tobytes() == wanted
    assert len(kept(layer).calls) == 1 + len(views) + 2


def test_memory_that_begins_within_an_element_is_copied():
    """As of a view of bytes; a GPU reads no such numbers."""
    memory = np.zeros(25, np.uint8)
    shifted = memory[1:].view(np.float32)
    shifted[...] = range(6)
    assert shifted.ctypes.data % 4 == 1
    flat = launch.flat(shifted)
    assert launch.address(flat.vector) % 4 == 0 and list(flat.vector) == list(range(6))
    assert not replay.in_place(shifted) and replay.in_place(shifted.copy())
    with launch.output(shifted) as y:
        assert launch.address(y.vector) % 4 == 0
        y.vector[:] = 7
    assert (shifted == 7).all()


def test_nothing_of_the_caller_is_kept_alive():
    class Array(np.ndarray):
        pass

    layer, (x, *_) = layer_of(TENSOR, "NCHW")
    given, out = x.copy().view(Array), room(layer, x).view(Array)
    alive = weakref.ref(given), weakref.ref(out)
    layer(given, out=out)
    del given, out
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    addresses = {array.ctypes.data for array in (x,)}
    for _, steps in kept(layer).calls.values():
        for slotted in steps:
            assert not addresses & {a.ctypes.data for a in slotted.step.arguments if isinstance(a, np.ndarray)}


def test_threads_and_streams_have_scratch_of_their_own(gpu):
    layer, (x, *_) = layer_of(TENSOR, "NCHW")
    layer(x, out=room(layer, x))
    worker = threading.Thread(target=lambda: layer(x, out=room(layer, x)))
    worker.start()
    worker.join()
    gpu.cuda.get_current_stream = lambda: SimpleNamespace(ptr=8, synchronize=lambda: None)
    layer(x, out=room(layer, x))
    assert len(kept(layer).calls) == 3
    scratch = [
        {id(argument) for step in steps for argument in step.step.arguments if isinstance(argument, np.ndarray)}
        for _, steps in kept(layer).calls.values()
    ]
    shared = scratch[0] & scratch[1] & scratch[2]
    assert len(shared) == 1, "the packed weights alone"


def test_a_new_stream_with_an_old_ones_address_has_scratch_of_its_own(monkeypatch):
    """The driver counts streams; what the one that is gone was asked for may still be running in its scratch."""
    layer, (x, *_) = layer_of(TENSOR, "NCHW")
    for number in (30, 31, 31):
        monkeypatch.setattr(launch, "stream_number", lambda address, number=number: (address, number))
        layer(x, out=room(layer, x))
    assert len(kept(layer).calls) == 2


def test_a_call_of_a_new_kind_is_refused_within_a_capture(gpu, launches, monkeypatch):
    """Its scratch would be given to others while the graph writes to it."""
    layer, (x, *_) = layer_of(TENSOR, "NCHW")
    wanted = layer(x, out=room(layer, x)).tobytes()
    launches.clear()
    with monkeypatch.context() as capture:
        capture.setattr(gpu.cuda.runtime, "streamIsCapturing", lambda address: address == 7)
        with pytest.raises(RuntimeError, match="make one like it before the capture"):
            layer(x[:1], out=room(layer, x)[:1])
        assert launches == []
        assert layer(x, out=room(layer, x)).tobytes() == wanted
    assert layer(x[:1], out=room(layer, x)[:1]).tobytes() == wanted[: len(wanted) // 2]


def test_the_calls_kept_are_bounded_but_for_a_graphs(gpu, monkeypatch):
    """A graph launches by itself, into scratch whose memory must not be given to anybody else."""
    layer = gpuconv.Conv2d(np.ones((1, 1, 1, 1), np.float32), backend=PLAIN)

    def call(width: int) -> None:
        x = np.ones((1, 1, 1, width), np.float32)
        assert (layer(x, out=np.full_like(x, np.nan)) == 1).all()

    call(1)
    with monkeypatch.context() as capture:
        capture.setattr(gpu.cuda.runtime, "streamIsCapturing", lambda address: address == 7)
        call(1)
    (of_graph,) = kept(layer).calls.values()
    for width in range(2, replay._CALLS + 4):
        call(width)
    found = kept(layer)
    assert len(found.calls) == replay._CALLS and of_graph not in found.calls.values()
    (held,) = found.captured.values()
    assert held is of_graph
    call(1)
    assert len(found.calls) == replay._CALLS, "that of the graph was used again"
    gpuconv.clear()
    assert layer._kept == {}


def test_clear_keeps_nothing_and_the_next_call_is_right():
    layer, (x, *_) = layer_of(PLAIN, "NCHW")
    wanted = layer(x, out=room(layer, x)).tobytes()
    gpuconv.clear()
    assert layer(x, out=room(layer, x)).tobytes() == wanted


CALLS = {
    "numba_cuda.direct": ("float32", {"padding": 1}, 4),  # two zeros of 8 as well
    PLAIN: ("float32", {"padding": 1}, 3),
    TENSOR: ("float16", {"padding": 1, "layout": "NHWC"}, 4),  # also 16 bytes of padding
    "numba_cuda.depthwise": ("float32", {"padding": 1, "padding_mode": "reflect", "groups": 8}, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_upload_their_tables_once(name, monkeypatch):
    """And the zero that stands for a bias; and keep them until ``clear``."""
    made: list[np.ndarray] = []
    upload = uploads._uploaded
    monkeypatch.setattr(uploads, "_uploaded", lambda like, values: (made.append(values), upload(like, values))[1])
    monkeypatch.setattr(launch, "vector", pytest.fail)
    dtype, options, count = CALLS[name]
    shape = (1, 2, 3, 8) if options.get("layout") == "NHWC" else (1, 8, 2, 3)
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, shape).astype(dtype)
    k = rng.integers(-2, 3, (8, 8 // options.get("groups", 1), 2, 2)).astype(dtype)
    gpuconv.clear()
    wanted = gpuconv.conv2d(x, k, backend=name, **options)
    np.testing.assert_array_equal(wanted, gpuconv.conv2d(x, k, device="cpu", backend="numpy.reference", **options))
    assert len(made) == count
    assert gpuconv.conv2d(x, k, backend=name, **options).tobytes() == wanted.tobytes()
    assert len(made) == count
    gpuconv.clear()
    assert not uploads.KEPT._found
