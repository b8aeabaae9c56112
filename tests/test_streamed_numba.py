"""Large NumPy arrays through a GPU in pieces by Numba alone, as on machines without CuPy.

In Numba's simulator, in processes of their own: on its streams, which do everything at once, and on streams whose
copies land only when somebody waits for them, and until then leave 0xFF where they will land.
"""

from __future__ import annotations

import calls
import numpy as np
import pytest

from gpuconv import conv2d, cutting, dispatch
from gpuconv.grad import conv2d_weight

SMALL = """
import numpy as np
import gpuconv
from gpuconv import cutting, dispatch, pinned
from gpuconv.backends.numba_cuda import ring
cutting._LEAST, cutting._MOST, pinned._ALONE = 8, 128, 0
pinned._threads = lambda: 3
real, cuts, rings = cutting.cut, [], []
cutting.cut = lambda *given: cuts.append(len(real(*given) or ())) or real(*given)
rng = np.random.default_rng(0)

class Counted(ring.NumbaRing):
    def begin(self, stream):
        rings.append(self)
        return super().begin(stream)

ring.NumbaRing = Counted

def integers(shape, dtype="f"):
    return rng.integers(-3, 4, shape).astype(dtype)

assert not dispatch.has_cupy()
"""

CALLS = (
    SMALL
    + """
import calls
for g, dtype in [(calls.GEOMETRIES[1], "float32"), (calls.GEOMETRIES[0], "complex64"), (calls.GEOMETRIES[3], "int16"),
                 (calls.GEOMETRIES[1], "bfloat16")]:
    for call in calls.make(g, dtype, seed=3):
        if call.op in ("forward", "input_grad", "weight_grad") or dtype == "float32":
            before, begun = len(cuts), len(rings)
            call.check(device="cuda")
            cut = any(count > 1 for count in cuts[before:])
            assert cut or "conv1d" in call.name, call.name
            assert (len(rings) > begun) == cut
assert len(set(map(id, rings))) == 1, "one ring, kept from call to call"
print("right")
"""
)

FORMS = (
    SMALL
    + """
k = integers((2, 2, 3, 3))
for options in ({"padding": 1}, {"layout": "NHWC", "padding": ((2, 0), (1, 1)), "stride": 2}, {"padding_mode": "wrap",
                "padding": 2}):
    for shape in ((1, 2, 24, 3), (5, 2, 4, 3)):
        x = integers(shape)[:, :, ::-1]
        x = np.moveaxis(x, 1, -1) if "layout" in options else x
        bias = integers((2,))
        found = gpuconv.conv2d(x.astype(">f4"), k, bias, device="cuda", **options)
        assert np.array_equal(found, gpuconv.conv2d(x, k, bias, backend="numpy.reference", **options)), options
        assert cuts[-1] > 1
sums = gpuconv.conv2d(np.zeros((4, 2, 0, 3), "f"), k, padding=2, padding_value=1, device="cuda")
assert (sums[:, :, :, 2:-2] == k.sum((1, 2, 3))[:, None, None]).all()
assert cuts[-1] > 1
layer = gpuconv.Conv2d(k, device="cuda")
x = integers((9, 2, 5, 4))
for _ in range(3):
    assert np.array_equal(layer(x), gpuconv.conv2d(x, k, backend="numpy.reference"))
for name, groups in (("numba_cuda.depthwise", 2), ("numba_cuda.implicit_gemm", 1)):
    few = k[:, : 2 // groups]
    found = gpuconv.conv2d(x, few, groups=groups, backend=name)
    assert np.array_equal(found, gpuconv.conv2d(x, few, groups=groups, backend="numpy.reference")), name
    assert cuts[-1] > 1
dy = integers((9, 2, 3, 2))
found = gpuconv.grad.conv2d_weight(x, k.shape, dy, backend="numba_cuda.implicit_gemm")
assert np.array_equal(found, gpuconv.grad.conv2d_weight(x, k.shape, dy, backend="numpy.reference"))
assert cuts[-1] > 1 and len(rings) > 10
gpuconv.clear()
assert not pinned._free
print("right")
"""
)

LATE = (
    SMALL
    + """
import ctypes, sys
import fake_cupy
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

class Now:
    def synchronize(self):
        pass

class Event:
    stream, count = None, 0
    def record(self, stream):
        if isinstance(stream, fake_cupy.Stream):
            self.stream, self.count = stream, len(stream.asked)
    def synchronize(self):
        if self.stream is not None:
            self.stream.land(self.count)
    def wait(self, stream):
        stream.asked.append(self.synchronize) if isinstance(stream, fake_cupy.Stream) else self.synchronize()

def late(copy):
    def copying(device, host, stream=0):
        if not isinstance(stream, fake_cupy.Stream):
            return copy(device, host, stream)
        target = device._ary if copy is to_device else host
        target[...] = 0xFF
        stream.asked.append(lambda: copy(device, host))
    return copying

to_device, to_host = FakeCUDAArray.copy_to_device, FakeCUDAArray.copy_to_host
FakeCUDAArray.copy_to_device, FakeCUDAArray.copy_to_host = late(to_device), late(to_host)

class Late(Counted):
    def __init__(self):
        super().__init__()
        self._own = {"upload": fake_cupy.Stream(), "compute": Now(), "download": fake_cupy.Stream()}
    def record(self, lane):
        event = Event()
        event.record(self.streams[lane])
        return event

ring.NumbaRing = Late
x, k, dy = integers((12, 2, 5, 4)), integers((2, 2, 3, 3)), integers((12, 2, 3, 2))
dy[0, 0, 0, 0], x[0, 0, 0, 0] = 3, 3

def right():
    y = gpuconv.conv2d(x, k, device="cuda")
    dk = gpuconv.grad.conv2d_weight(x, k.shape, dy, device="cuda")
    assert cuts[-1] > 1
    with np.errstate(all="ignore"):
        return [np.array_equal(y, gpuconv.conv2d(x, k, backend="numpy.reference")),
                np.array_equal(dk, gpuconv.grad.conv2d_weight(x, k.shape, dy, backend="numpy.reference"))]

assert all(right())
for missing in ("wait", "reach"):
    real_one = getattr(Late, missing)
    setattr(Late, missing, lambda *_: None)
    pinned.release()
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not any(right()), missing
    setattr(Late, missing, real_one)
    pinned.release()
assert all(right())
assert all(stream.done == len(stream.asked) for ring in rings[-2:] for stream in list(ring._own.values())[::2])
print("right")
"""
)


@pytest.mark.parametrize("script", [CALLS, FORMS, LATE], ids=["calls", "forms", "late"])
def test_in_the_simulator(script):
    assert calls.child(script, limit=400, NUMBA_ENABLE_CUDASIM="1").strip() == "right"


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    """As if CuPy were not there, where Numba's kernels take NumPy arrays too."""
    monkeypatch.setattr(dispatch, "has_cupy", lambda: False)
    cuts = []
    real = cutting.cut
    monkeypatch.setattr(cutting, "cut", lambda *given: cuts.append(real(*given)) or cuts[-1])
    rng = np.random.default_rng(0)
    x, k = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((64, 16, 128, 128), (16, 16, 3, 3)))
    for _ in range(2):
        y = conv2d(x, k, padding=1, backend="numba_cuda.direct")
        np.testing.assert_array_equal(y, conv2d(x, k, padding=1, device="cpu"))
        dk = conv2d_weight(x, k.shape, x, padding=1, backend="numba_cuda.direct")
        np.testing.assert_array_equal(dk, conv2d_weight(x, k.shape, x, padding=1, dtype=np.float64, device="cpu"))
    assert all(pieces is not None and len(pieces) > 1 for pieces in cuts)
