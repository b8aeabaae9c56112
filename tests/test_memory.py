"""Memory on the CPU: scratch within what was announced and the limit, and what happens when memory runs out."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import calls
import fake_cupy
import numpy as np
import pytest
from running import skip_costly

from gpuconv import conv2d, explain

MiB = 2**20
# What NumPy's own casting loops buffer: 8,192 elements for each of three operands, 8 bytes each, or 16.
LOOP_BUFFERS = 3 * 8192 * 8

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and limits the address space")
needs_compiler = pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")
pytestmark = pytest.mark.skipif(
    any(os.environ.get(name) == "1" for name in ("NUMBA_ENABLE_CUDASIM", "GPUCONV_TEST_FAKE_CUPY")),
    reason="this process is a child itself",
)
cpu_implementations = pytest.mark.parametrize("name", calls.usable("cpu", "forward"))

# ---- scratch: as announced, and inside the limit


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Gives the peak, in bytes, of what was allocated since.

    Without the garbage collector meanwhile: what other tests left behind may warn when it is collected, and a warning
    under ``tracemalloc`` reads the source it tells of, which would be counted.
    """
    collecting = gc.isenabled()
    gc.disable()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        if collecting:
            gc.enable()


PADS = ((7, 3), (2, 9))
PROBLEMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, dict[str, Any]]] = {
    "large_image": ((1, 1, 1100, 1000), (1, 1, 3, 3), "float32", {"padding": "same"}),
    "large_image_rank_2": ((700, 900), (3, 5), "float64", {}),
    "im2col_heavy": ((1, 12, 60, 60), (6, 12, 7, 7), "float32", {"padding": 3}),
    "long_kernel": ((1, 2, 200, 60), (3, 2, 31, 3), "float32", {}),
    "batch": ((24, 4, 40, 40), (8, 4, 3, 3), "float32", {"padding": 1}),
    "grouped": ((2, 12, 90, 90), (8, 3, 3, 3), "float32", {"groups": 4, "stride": 2, "padding": 2}),
    "depthwise": ((1, 24, 90, 90), (24, 1, 3, 3), "float32", {"groups": 24, "dilation": 2}),
    "one_by_one": ((2, 24, 70, 70), (40, 24, 1, 1), "float32", {}),
    "one_by_one_stride": ((2, 24, 90, 90), (8, 24, 1, 1), "float32", {"stride": 2}),
    "many_weights": ((1, 160, 8, 8), (96, 160, 3, 3), "float32", {}),
    "constant": ((1, 4, 190, 180), (4, 4, 3, 3), "float32", {"padding": PADS, "padding_value": 2}),
    "reflect": ((1, 4, 190, 180), (4, 4, 3, 3), "float32", {"padding": PADS, "padding_mode": "reflect"}),
    "symmetric": ((1, 4, 190, 180), (4, 4, 3, 3), "float32", {"padding": PADS, "padding_mode": "symmetric"}),
    "edge": ((1, 4, 190, 180), (4, 4, 3, 3), "float32", {"padding": PADS, "padding_mode": "edge"}),
    "wrap_strided": ((1, 4, 190, 180), (4, 4, 3, 3), "float32", {"padding": PADS, "padding_mode": "wrap", "stride": 3}),
    "wide_padding": ((1, 4, 20, 20), (4, 4, 3, 3), "float32", {"padding": 80, "padding_mode": "reflect"}),
    "float16": ((2, 8, 100, 100), (8, 8, 3, 3), "float16", {"padding": 1}),
    "bfloat16": ((2, 8, 100, 100), (8, 8, 3, 3), "bfloat16", {"padding": 1, "padding_mode": "edge"}),
    "int8": ((2, 8, 100, 100), (8, 8, 3, 3), "int8", {"x_zero_point": 3, "k_zero_point": -2, "padding": 1}),
    "uint8": ((1, 3, 120, 120), (6, 3, 3, 3), "uint8", {}),
    "int16": ((2, 8, 100, 100), (8, 8, 3, 3), "int16", {"padding": 1}),
    "int64": ((1, 8, 70, 70), (4, 8, 3, 3), "int64", {"padding": 1}),
    "complex64": ((2, 8, 70, 70), (8, 8, 3, 3), "complex64", {"padding": 1}),
    "complex128": ((2, 8, 70, 70), (8, 8, 3, 3), "complex128", {"padding": 1, "padding_mode": "wrap"}),
    "nhwc": ((2, 80, 80, 12), (10, 12, 3, 3), "float32", {"layout": "NHWC", "padding": 1}),
    "nhwc_hwio_grouped": (
        (2, 80, 80, 12), (3, 3, 3, 8), "float16",
        {"layout": "NHWC", "kernel_layout": "HWIO", "groups": 4, "stride": (1, 2)},
    ),
    "relu": ((2, 8, 100, 100), (8, 8, 3, 3), "float32", {"activation": "relu", "flip": True}),
    "result_wider": ((2, 8, 100, 100), (8, 8, 3, 3), "float32", {"dtype": "float64"}),
}  # fmt: skip


def strided(array: np.ndarray) -> np.ndarray:
    """The same values with a gap behind every element of the last axis, and the first axes in another order."""
    memory = np.zeros((*array.shape[::-1][1:], array.shape[-1] * 2), array.dtype)
    axes = (*range(array.ndim - 2, -1, -1), array.ndim - 1)
    view = memory.transpose(axes)[..., ::2]
    view[...] = array
    return view


@functools.cache
def posed(problem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """x, k, bias and options of a problem, of small integers. Shared: not to be written to."""
    x_shape, k_shape, kind, options = PROBLEMS[problem]
    dtype = np.dtype(kind)
    rng = np.random.default_rng(5)
    x, k = (rng.integers(0, 3, shape).astype(dtype) for shape in (x_shape, k_shape))
    outputs = k_shape[-1] if options.get("kernel_layout") == "HWIO" else k_shape[0] if len(k_shape) > 2 else 1
    return x, k, np.ones(outputs, np.int32 if dtype.kind in "iu" and dtype.itemsize == 1 else dtype), options


@functools.cache
def answered(problem: str) -> np.ndarray:
    """Exact, so the same of every implementation. Shared: not to be written to."""
    x, k, bias, options = posed(problem)
    return conv2d(x, k, bias, **options, **calls.affordable(x.dtype.name, k.dtype.name))


def check_scratch(name: str, problem: str, fraction: int, of_inputs: Any = np.copy, of_out: Any = np.copy) -> None:
    """``conv2d`` in a ``fraction`` of the scratch that it would take takes what ``explain`` announced."""
    x, k, bias, options = posed(problem)
    skip_costly(name, x, options.get("dtype"))
    options = options | {"backend": name}
    whole = explain(x, k, bias, **options)
    if whole.implementation is None:
        pytest.skip(f"{name} does not serve {x.dtype}")
    options |= {"workspace_limit": whole.workspace // fraction}
    report = explain(x, k, bias, **options)
    if report.implementation is None:
        pytest.skip("not a chunk of one image, group, row and column fits")
    out = of_out(np.full_like(answered(problem), 77))
    x, k = of_inputs(x), of_inputs(k)
    conv2d(x, k, bias, out=out, **options)  # what is compiled or read from a cache is no scratch
    out[...] = 77
    slack = LOOP_BUFFERS * max(1, x.dtype.itemsize // 8)
    for _ in range(2):  # what the call allocates, it allocates every time; another thread of the process does not
        with traced() as peak:
            conv2d(x, k, bias, out=out, **options)
            taken = peak()
        if taken <= report.workspace + slack:
            break
    assert report.workspace <= options["workspace_limit"]
    assert taken <= report.workspace + slack, f"{taken} bytes where {report.workspace} were announced"
    assert np.array_equal(out, answered(problem))


@pytest.mark.parametrize("fraction", [1, 2, 25])
@pytest.mark.parametrize("problem", PROBLEMS)
@cpu_implementations
def test_scratch_is_at_most_what_was_announced(name, problem, fraction):
    """With views as operands, too: what is copied for BLAS's sake is scratch as well."""
    check_scratch(name, problem, fraction, of_inputs=strided if fraction != 2 else np.copy)


@pytest.mark.parametrize("problem", ["batch", "depthwise", "one_by_one", "result_wider"])
@cpu_implementations
def test_scratch_for_a_strided_result(name, problem):
    check_scratch(name, problem, 1, of_out=strided)


@pytest.mark.parametrize("problem", ["batch", "depthwise", "one_by_one", "result_wider"])
@cpu_implementations
def test_scratch_for_a_strided_result_in_chunks(name, problem):
    check_scratch(name, problem, 2, of_inputs=strided, of_out=strided)


@cpu_implementations
def test_a_limit_that_no_chunk_fits_names_the_bytes(name):
    for problem in PROBLEMS:
        x, k, bias, options = posed(problem)
        if explain(x, k, bias, backend=name, **options).implementation is not None:
            with pytest.raises(MemoryError, match=r"^conv2d: .*needs at least \d+ bytes .*workspace_limit is 99"):
                conv2d(x, k, bias, backend=name, workspace_limit=99, **options)


def test_scratch_does_not_grow_with_the_number_of_chunks():
    x, k = np.ones((1, 4, 2500, 3), np.float32), np.ones((1, 4, 1, 3), np.float32)
    out = np.empty((1, 1, 2500, 1), np.float32)
    least = "needs at least (\\d+) bytes"
    with pytest.raises(MemoryError, match=least) as refusal:
        conv2d(x, k, workspace_limit=1)
    limit = int(re.search(least, str(refusal.value))[1])
    report = explain(x, k, workspace_limit=limit)
    conv2d(x, k, out=out, workspace_limit=limit)  # compiles or loads what needs least, if that has to be
    out[...] = 0
    with traced() as peak:
        conv2d(x, k, out=out, workspace_limit=limit)
        taken = peak()
    assert (out == 12).all()
    assert taken <= report.workspace + LOOP_BUFFERS, f"{taken} bytes where {report.workspace} were announced"


SIBLINGS = calls.Geometry(N=2, groups=2, I=8, outputs=6, H=60, W=64, KH=3, KW=4, padding=(1, 2), stride=(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_operator_stays_inside_the_limit(dtype):
    """Whatever it announces; Conv2d is not asked: what it keeps of the weights is no scratch."""
    for call in calls.make(SIBLINGS, dtype):
        served = 0
        for name, limit in itertools.product(
            calls.serving(call, calls.usable("cpu")), (None, 2 * MiB, 400_000, 100_000)
        ):
            if call.name.startswith("Conv2d "):
                continue
            plain = call.run(backend=name)
            out = np.full_like(plain, 77)
            with traced() as peak:
                try:
                    call.run(backend=name, out=out, workspace_limit=limit)
                except MemoryError as error:
                    assert limit is not None and re.search(r"\d+ bytes", str(error)), f"{call.name}: {error}"
                    continue
                taken = peak()
            assert np.array_equal(out, plain), f"{call.name} on {name} in {limit}"
            assert taken <= (256 * MiB if limit is None else limit) + LOOP_BUFFERS, f"{call.name} on {name} in {limit}"
            served += 1
        assert served >= 2 or call.name.startswith(("Conv2d ", "grad.conv2d_bias ")), call.name


# ---- when memory runs out

CAPPED = """
import resource
import numpy as np
import calls, gpuconv
from gpuconv import conv2d
MiB = 2**20
x, k = np.ones((1, 32, 256, 256), np.float32), np.ones((2, 32, 5, 5), np.float32)
small = x[:, :, :20, :20]

def answer(x, **options):
    "The value that every element of the result has, or what was said instead."
    try:
        y = conv2d(x, k, **options)
    except MemoryError as error:
        return str(error)
    assert (y == y.flat[0]).all()
    return float(y.flat[0])

names = [name for name in calls.usable("cpu", "forward") if gpuconv.explain(x, k, backend=name).implementation]
for name in names:
    assert answer(small, backend=name) == 800.0  # and BLAS has what it takes for itself
calls.run_all(calls.jobs(calls.usable("cpu"))[::5])  # a compiler that runs out of memory ends the process
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 100 * MiB,) * 2)
"""


@linux
def test_calls_after_memory_ran_out_are_right():
    """In an address space that holds not all columns (203 MB), which the default limit allows."""
    calls.child(
        CAPPED
        + """
import re
BYTES = r"\\d[.]? (.iB|bytes)"
for name in names:
    for limit in (2**30, None, 20 * MiB):
        found = answer(x, workspace_limit=limit, backend=name)
        if limit in (2**30, None):  # of which reference needs less than gemm
            assert found == 800.0 or re.search(BYTES, found), found
        else:
            assert found == 800.0, found
        assert answer(small, backend=name) == 800.0
    # 64 GiB of result, 16 MiB of scratch
    found = answer(np.broadcast_to(np.float32(1), (2048, 32, 512, 512)), workspace_limit=16 * MiB, backend=name)
    assert re.search(BYTES, str(found)), found
    assert answer(small, backend=name) == 800.0
    assert answer(x, workspace_limit=16 * MiB, backend=name) == 800.0
assert calls.run_all(calls.jobs(calls.usable("cpu"))[::5]) >= 20
""",
        OPENBLAS_NUM_THREADS="1",
    )


@linux
def test_chunks_shrink_when_memory_runs_out():
    """Smaller chunks or another implementation, as where a pool's limit is below the size of the columns."""
    calls.child(CAPPED + "assert answer(x) == 800.0, answer(x)", OPENBLAS_NUM_THREADS="1")


@needs_compiler
def test_chunks_shrink_when_memory_runs_out_on_the_stand_in():
    """A pool that holds 2 MB; CuPy's OutOfMemoryError is a MemoryError."""
    calls.child(
        """
import fake_cupy, sys
import numpy as np
from gpuconv import conv2d
x, k = np.ones((1, 8, 90, 90), np.float32), np.ones((8, 8, 5, 5), np.float32)
assert (conv2d(x, k, device="cuda") == 200).all()
cupy, asked = sys.modules["cupy"], []
plenty = cupy.empty
def empty(shape, dtype):
    asked.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    if asked[-1] > 2_000_000:
        raise MemoryError(f"Out of memory allocating {asked[-1]:,} bytes")
    return plenty(shape, dtype)
cupy.empty = empty
assert (conv2d(x, k, device="cuda") == 200).all()
assert max(asked) > 2_000_000, "the pool was never too small"
""",
        GPUCONV_TEST_FAKE_CUPY="1",
    )
