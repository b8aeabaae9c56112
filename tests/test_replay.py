"""Kept launches: the proof in the simulator, what Numba makes of arguments, and a CUDA graph where there is a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from gpuconv.backends.numba_cuda import direct, launch, patches, patches_kernel, replay, ring, tensor_shape

QUICK = "mma-NCHW or gemm-NHWC or alive or threads or tables or within or graphs or address"


@pytest.mark.parametrize(
    ("part", "at_least"),
    [(QUICK, 10), pytest.param(f"not ({QUICK})", 5, marks=pytest.mark.full)],
    ids=["quick", "long"],
)
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_replay_simulated.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", part]
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= at_least, child.stdout[-2000:]


class Vector:
    """What Numba asks of a device array."""

    __cuda_memory__ = True

    def __init__(self, address: int, size: int, dtype: str) -> None:
        self.ptr, self.size, self.shape, self.dtype = address, size, (size,), np.dtype(dtype)
        self._layout = SimpleNamespace(strides_in_bytes=(self.dtype.itemsize,))
        self._strided_memory_view_shim = self
        self.__cuda_array_interface__ = {"data": (address, False)}


def test_addresses_are_found_among_the_arguments_and_replaced(monkeypatch):
    """By Numba's own way of taking arguments apart, of which this is a private part: it is checked here."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba.cuda import dispatcher, types

    assert replay._can_bind()
    array = types.Array(types.float32, 1, "C")
    kinds = (array, types.int64, array, types.int32, types.boolean, array, types.float32, array)
    compiled = SimpleNamespace(argument_types=kinds, extensions=[])
    compiled._prepare_args = dispatcher._Kernel._prepare_args.__get__(compiled)
    x, y, table = Vector(0x1000, 64, "float32"), Vector(0x2000, 48, "float32"), Vector(0x3000, 8, "float32")
    arguments = (x, 64, table, np.int32(7), True, y, np.float32(0.5), x)
    values, places, held = replay.taken_apart(compiled, arguments, x, y)
    assert held == (table,)
    assert [(values[place], which) for place, which in places] == [(0x1000, 0), (0x2000, 1), (0x1000, 0)]
    started: list[Any] = []
    monkeypatch.setattr(dispatcher, "launch", lambda *given: started.append(given))
    monkeypatch.setattr("numba.cuda.cudadrv.driver._to_core_stream", lambda stream: stream)
    bound = replay.Bound("config", "kernel", values, places, held)
    memory = [SimpleNamespace(address=address) for address in (0x7000, 0x8000)]
    bound.launch("stream", memory)
    ((stream, config, kernel, *given),) = started
    assert (stream, config, kernel) == ("stream", "config", "kernel")
    changed = [
        index for index, (old, new) in enumerate(zip(values, given, strict=True)) if old is not new and old != new
    ]
    assert changed == [place for place, _ in places]
    assert [given[index] for index in changed] == [0x7000, 0x8000, 0x7000]
    assert 0x3000 in given


def test_more_shared_memory_is_asked_for_once_per_device(monkeypatch):
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba.cuda.cudadrv import driver

    calls: list[Any] = []
    monkeypatch.setattr(driver, "driver", SimpleNamespace(cuKernelSetAttribute=lambda *given: calls.append(given)))
    devices = [SimpleNamespace(id=0)]

    class Kernel:
        def typeof_pyval(self, value: Any) -> str:
            return type(value).__name__

        def compile(self, kinds: Any) -> Any:
            function = SimpleNamespace(device=devices[0], handle="handle")
            return SimpleNamespace(_codelibrary=SimpleNamespace(get_cufunc=lambda: function))

        def __getitem__(self, shape: Any) -> Any:
            return lambda *arguments: calls.append((shape, arguments))

    kernel = launch.Kernel(Kernel(), tensor_shape.LARGE.dynamic_bytes)
    kernel[5, 256, "stream"](1, 2.0)
    kernel[5, 256, "stream"](1, 2.0)
    devices[0] = SimpleNamespace(id=1)
    kernel[6, 256](1, 2.0)
    asked = [call for call in calls if len(call) == 4]
    assert [call[1:] for call in asked] == [(81920, "handle", 0), (81920, "handle", 1)]
    assert "MAX_DYNAMIC_SHARED_SIZE_BYTES" in str(asked[0][0])
    launched = [call for call in calls if len(call) == 2]
    assert launched[0] == ((5, 256, "stream", 81920), (1, 2.0))
    assert launched[2] == ((6, 256, 0, 81920), (1, 2.0))


def test_small_grids_are_launched_without_a_warning(monkeypatch):
    """Of which Numba warns, and here warnings are errors; whoever has kernels of his own is warned as before."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba.cuda.core.errors import NumbaPerformanceWarning

    kernels = [
        launch.jit(ring.build(True)),
        direct.kernel(direct.SMALL, "float32", "float32", "float32", False),
        patches.kernel(patches_kernel.build_unfold, 4),
    ]
    for kernel in kernels:
        launched: list[Any] = []
        monkeypatch.setattr(kernel.kernel, "call", lambda given, shape, to=launched: to.append((given, shape.griddim)))
        kernel[3, 32, 0](1, 2)
        assert launched == [((1, 2), (3, 1, 1))]
        with pytest.warns(NumbaPerformanceWarning, match="Grid size 2"):
            kernel.kernel[2, 32, 0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"), [("numba_cuda.implicit_gemm", "float32"), ("numba_cuda.implicit_gemm_mma", "float16")]
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_warmed_up_layer_is_captured_in_a_graph(name, dtype, layout):
    """What is replayed reads x and writes y anew each time; nothing else is in the graph than kernels."""
    import cupy

    rng = np.random.default_rng(0)
    shape = (1, 256, 14, 14) if layout == "NCHW" else (1, 14, 14, 256)
    k, bias = (cupy.asarray(rng.standard_normal(size).astype(dtype)) for size in ((256, 256, 3, 3), 256))
    images = [cupy.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(3)]
    layer = gpuconv.Conv2d(k, bias, padding=1, layout=layout, backend=name)
    x, stream = images[0].copy(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        y = cupy.empty_like(x)
        layer(x, out=y)
        stream.begin_capture()
        layer(x, out=y)
        graph = stream.end_capture()
        found = []
        for image in images:
            x[...] = image
            y.fill(np.nan)
            graph.launch()
            found.append(y.copy())
        stream.synchronize()
    for image, replayed in zip(images, found, strict=True):
        assert cupy.array_equal(replayed, layer(image))
