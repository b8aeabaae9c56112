"""Arrays and arguments that a compiled kernel is rarely given, where one of them was once wrong."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running import skip_unless_usable

import gpuconv
from gpuconv import conv2d, dispatch
from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason="no compiled kernels on this machine")

NAMES = [name for name in dispatch.serving("forward", "cpu") if dispatch.library_of(name) == "numba_cpu"]
compiled = pytest.mark.parametrize("name", NAMES)
# A kernel for each implementation, over 20 channels: dense, 1×1, depthwise.
KERNELS = (20, 20, 3, 3), (20, 20, 1, 1), (20, 1, 3, 3)


@pytest.fixture(autouse=True)
def forgotten():
    gpuconv.clear()


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def between_elements(shape: tuple[int, ...], inner: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 with a byte that is nobody's behind every ``inner`` axes, and these bytes."""
    kind = np.dtype([("number", np.float32, shape[len(shape) - inner :]), ("flag", np.uint8)])
    array = np.zeros(shape[: len(shape) - inner], kind)
    array["flag"] = 77
    return array["number"], array["flag"]


def served(name: str, x: np.ndarray, k: np.ndarray, **options) -> np.ndarray | None:
    """The convolution by ``name``, or nothing where that is not for such problems."""
    skip_unless_usable(name)
    groups = x.shape[1 if options.get("layout", "NCHW") == "NCHW" else 3] // options.pop("inputs", k.shape[1])
    try:
        return conv2d(x, k, groups=groups, precision="high", backend=name, **options)
    except gpuconv.NoBackendError:
        return None


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("inner", [0, 1, 2, 3])
@compiled
def test_a_result_whose_parts_begin_between_elements(name, inner, layout):
    """The bytes between them, of other fields of a structured array, stay as they are."""
    x = normal((2, 20, 6, 20) if layout == "NCHW" else (2, 6, 20, 20))
    for shape in KERNELS:
        k = normal(shape, 1)
        wanted = served("numpy.reference", x, k, layout=layout)
        out, flags = between_elements(wanted.shape, inner)
        if served(name, x, k, layout=layout, out=out) is not None:
            assert np.allclose(out, wanted, atol=1e-3)
            assert np.all(flags == 77)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("inner", [0, 1, 2, 3])
@compiled
def test_operands_whose_parts_begin_between_elements(name, inner, layout):
    x, _ = between_elements((2, 20, 6, 20) if layout == "NCHW" else (2, 6, 20, 20), inner)
    x[...] = normal(x.shape)
    for shape in KERNELS:
        k, _ = between_elements(shape, inner)
        k[...] = normal(shape, 1)
        wanted = served("numpy.reference", x, k, layout=layout)
        for _ in range(2):  # the second by the short way
            y = served(name, x, k, layout=layout)
            assert y is None or np.allclose(y, wanted, atol=1e-3)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kernel_layout", ["OIHW", "HWIO", "OHWI"])
@compiled
def test_a_repeated_call_reads_the_kernel_in_its_own_layout(name, kernel_layout, layout):
    """The short way has the caller's array, not the view of it that the first call had."""
    x = normal((2, 20, 6, 20) if layout == "NCHW" else (2, 6, 20, 20))
    axes = {"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}[kernel_layout]
    for shape in KERNELS:
        k = normal(shape, 1)
        wanted = served("numpy.reference", x, k, layout=layout)
        turned = np.ascontiguousarray(k.transpose(axes))
        for source in (turned, turned[..., ::-1].copy()[..., ::-1]):
            for _ in range(2):
                y = served(name, x, source, layout=layout, kernel_layout=kernel_layout, inputs=k.shape[1])
                assert y is None or np.allclose(y, wanted, atol=1e-3)


@pytest.mark.parametrize("pad", [1, 2, 3, 4, 5])
@compiled
def test_padding_beyond_the_kernel(name, pad):
    """Windows that see nothing but padding end one row and begin the next; a plane's last was once the next one's
    first.
    """
    bias = np.arange(20, dtype=np.float32)
    for width in range(33, 50):
        x = normal((2, 20, 4, width))
        for shape in KERNELS[::2]:
            k = normal(shape, 1)
            options = {"bias": bias, "padding": pad, "padding_value": 0.5}
            y = served(name, x, k, **options)
            assert y is None or np.allclose(y, served("numpy.reference", x, k, **options), atol=1e-3), width


class Step:
    """An integer to Python that may change; it looks the same whatever it is."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return "Step"


def test_an_argument_that_changes_is_read_again():
    x, k = normal((1, 3, 9, 9)), normal((4, 3, 3, 3), 1)
    step = Step(1)
    assert conv2d(x, k, stride=step).shape == (1, 4, 7, 7)
    step.value = 2
    assert conv2d(x, k, stride=step).shape == (1, 4, 4, 4)
    steps = [1, 1]
    assert conv2d(x, k, stride=steps).shape == (1, 4, 7, 7)
    steps[1] = 3
    assert conv2d(x, k, stride=steps).shape == (1, 4, 7, 3)


@pytest.mark.parametrize("op", ["forward", "input_grad"])
@compiled
def test_results_without_elements_have_a_plan(name, op):
    implementation = dispatch.implementation(name)
    for shape in ((0, 6, 7, 7), (1, 0, 7, 7), (0, 0, 7, 7), (2, 6, 1, 7)):
        for side in (3, 1):
            for layout in ("NCHW", "NHWC"):
                given = shape if layout == "NCHW" else tuple(shape[axis] for axis in (0, 2, 3, 1))
                groups = 6 if shape[1] and side == 3 else 1
                problem = Conv2dProblem.of(
                    given, (12, shape[1] // groups, side, side), padding=1, groups=groups, layout=layout, op=op,
                    precision="high",
                )  # fmt: skip
                for threads in (1, 2, 3):
                    target = Target("cpu", None, threads)
                    if not implementation.unsupported(problem, target):
                        assert implementation.plan(problem, target, 1 << 28).workspace >= 0


@compiled
def test_threads_share_a_remembered_call(name):
    """Nothing that a call writes belongs to what is remembered of it."""
    for layout, shape in itertools.product(("NCHW", "NHWC"), KERNELS):
        k = normal(shape, 1)
        images = [normal((2, 20, 9, 20) if layout == "NCHW" else (2, 9, 20, 20), seed) for seed in range(8)]
        wanted = [served(name, x, k, layout=layout) for x in images]
        if wanted[0] is None:
            continue
        layer = gpuconv.Conv2d(k, groups=20 // shape[1], layout=layout, precision="high", backend=name)
        for call in (lambda x, k=k, layout=layout: served(name, x, k, layout=layout), layer):
            with ThreadPoolExecutor(4) as pool:
                results = list(pool.map(call, images * 4))
            assert all(y.tobytes() == w.tobytes() for y, w in zip(results, wanted * 4, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "bit", "folder"])
def test_a_damaged_cache_of_kernels_is_replaced(damage, tmp_path):
    tmp_path.chmod(0o700)
    code = (
        "import numpy as np, gpuconv; from gpuconv.backends.numba_cpu import runtime\n"
        "y = gpuconv.conv2d(np.ones((1, 1, 9, 9), 'f4'), np.ones((4, 1, 3, 3), 'f4'), backend='numba_cpu.strip')\n"
        "print(int(y.sum()), runtime.compiled)"
    )

    def said() -> str:
        environment = os.environ | {"GPUCONV_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    first = said()
    assert first.startswith("1764 ['strip")
    kernels = list(tmp_path.iterdir())
    for path in kernels:
        content = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        else:
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"cut": content[:-1], "empty": b"", "noise": content[::-1], "bit": flipped}[damage])
    assert said() == first
    assert damage == "folder" or said() == "1764 []\n"


@pytest.mark.parametrize("backend", ["numba_cpu.weight_planes", "numba_cpu.weight_grad", None])
def test_weight_gradients_of_two_kinds_of_floats(backend):
    """The narrower one is widened as it is read; code that narrowed float64 to float16 ended the process."""
    O, groups = (16, 1) if backend == "numba_cpu.weight_grad" else (3, 3)
    x, g = np.ones((2, 3, 9, 9), np.float64), np.ones((2, O, 7, 7), np.float16)
    assert (gpuconv.grad.conv2d_weight(x, (O, 3 // groups, 3, 3), g, groups=groups, backend=backend) == 98).all()


def test_a_stride_beyond_all_planes():
    x, k = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 3, 3), np.float32)
    assert gpuconv.conv2d(x, k, stride=2**31 - 1).item() == 9
    with pytest.raises(gpuconv.NoBackendError, match="strides of at most"):
        gpuconv.conv2d(x, k, stride=2**31 - 1, backend="numba_cpu.lanes")
