"""Memory on a GPU: scratch in CuPy's pool, a pool that is too small, and memory that streams hand to each other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import calls
import ml_dtypes
import numpy as np
import pytest
from test_memory import PROBLEMS, MiB, posed

import gpuconv
from gpuconv import conv2d, dispatch, explain

pytestmark = pytest.mark.gpu
on_gpu = [name for name in dispatch.TABLE if not name.startswith("numpy.") and calls.knows(name, "forward")]


def in_pool(task: Callable[[], Any]) -> tuple[Any, int]:
    """What ``task`` returns, and the most bytes that it held of CuPy's pool at once, as asked for."""
    import cupy

    held: dict[int, int] = {}
    most = [0]

    class Peak(cupy.cuda.MemoryHook):
        name = "Peak"

        def malloc_postprocess(self, **facts: Any) -> None:
            if facts["mem_ptr"]:
                held[facts["mem_ptr"]] = facts["size"]
                most[0] = max(most[0], sum(held.values()))

        def free_postprocess(self, **facts: Any) -> None:
            held.pop(facts["mem_ptr"], None)

    with Peak():
        result = task()
    return result, most[0]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", on_gpu)
def test_scratch_in_the_pool_is_at_most_what_was_announced(name, problem):
    import cupy

    x, k, bias, options = posed(problem)
    if x.dtype == ml_dtypes.bfloat16:
        pytest.skip("CuPy makes no arrays of bfloat16 from NumPy's")
    whole = explain(x, k, bias, backend=name, **options)
    if whole.implementation is None:
        pytest.skip(whole.note or "")
    operands = [cupy.asarray(operand) for operand in (x, k, bias)]
    plain = conv2d(*operands, backend=name, **options)
    for fraction in (1, 2, 25):
        limit = whole.workspace // fraction
        report = explain(*operands, backend=name, workspace_limit=limit, **options)
        if report.implementation is not None:
            run = functools.partial(conv2d, *operands, backend=name, workspace_limit=limit, **options)
            result, most = in_pool(functools.partial(run, out=cupy.zeros_like(plain)))
            assert most <= report.workspace + 32 * 1024, f"{most} bytes where {report.workspace} were announced"
            assert cupy.array_equal(result, plain)
            assert in_pool(run)[1] <= report.workspace + plain.nbytes + 32 * 1024


@pytest.fixture
def pool() -> Iterator[Any]:
    import cupy

    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    yield pool
    pool.set_limit(size=0)
    pool.free_all_blocks()


def test_chunks_shrink_when_the_pool_is_too_small(pool):
    import cupy

    x, k = cupy.ones((1, 32, 512, 512), cupy.float32), cupy.ones((32, 32, 7, 7), cupy.float32)
    small = x[:, :, :20, :20]
    for backend in (None, "cupy.gemm"):
        assert (conv2d(small, k, backend=backend) == 1568).all()  # cuBLAS has its workspace now
        pool.free_all_blocks()
        # the result, and a fifth of the chunk that the default limit allows; all columns are 1.6 GB
        pool.set_limit(size=pool.used_bytes() + x.nbytes + 50 * MiB)
        assert (conv2d(x, k, backend=backend) == 1568).all()
        assert (conv2d(small, k, backend=backend) == 1568).all()
        pool.free_all_blocks()
        pool.set_limit(size=pool.used_bytes() + x.nbytes // 2)
        with pytest.raises(MemoryError, match=r"\d+ ?bytes"):
            conv2d(x, k, backend=backend)
        assert (conv2d(small, k, backend=backend) == 1568).all(), "the next call"
        pool.set_limit(size=0)
        assert (conv2d(x, k, backend=backend) == 1568).all()


def test_varied_calls_leave_nothing_in_the_pool(pool):
    import cupy

    for turn in range(3):
        if turn == 1:  # handles, streams and kernels are there now
            used = pool.used_bytes()
        for seed, (g, dtype) in enumerate(itertools.product(calls.GEOMETRIES, calls.DTYPES)):
            if dtype != "bfloat16":
                for call in calls.make(g, dtype, seed=seed, xp=cupy):
                    for name in calls.serving(call, calls.usable("cuda")):
                        call.check(backend=name)
    assert pool.used_bytes() == used
    gpuconv.clear()
    assert pool.total_bytes() <= used + MiB


DELAY = """
extern "C" __global__ void delay(long long ticks) {
    long long start = clock64();
    while (clock64() - start < ticks) {}
}
"""
TICKS = 200_000_000  # of a clock of 1 to 2 GHz: longer than it takes Python to ask for all the rest


@pytest.mark.parametrize("name", ["cupy.gemm", "numba_cuda.direct", None])
def test_an_input_that_is_deleted_while_another_stream_reads_it(name):
    """A delayed producer on stream A, the convolution on B; then A gets the input's memory back and overwrites it."""
    import cupy

    rng = np.random.default_rng(2)
    values = rng.integers(-4, 4, (2, 8, 128, 128)).astype(np.float32)
    source, k = cupy.asarray(values), cupy.asarray(rng.integers(-4, 4, (8, 8, 3, 3)).astype(np.float32))
    wanted = conv2d(values, k.get(), device="cpu")
    delay = cupy.RawKernel(DELAY, "delay")
    a, b = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    # All is compiled and loaded beforehand, so that nothing waits for the GPU below; and held, so that stream A's free
    # memory is that of x alone.
    with a:
        held = [source.copy(), cupy.full(values.shape, cupy.nan, cupy.float32)]
        held.append(conv2d(held[0], k, stream=b, backend=name))
        delay((1,), (1,), (np.int64(1),))
    cupy.cuda.Device().synchronize()
    with a:
        delay((1,), (1,), (np.int64(TICKS),))
        x = source.copy()
        address = x.data.ptr
    with b:
        delay((1,), (1,), (np.int64(2 * TICKS),))  # B is far behind A when it comes to read
    with a:
        y = conv2d(x, k, stream=b, backend=name)
        assert not b.done, "the call waited for the GPU"
        del x
        other = cupy.full(values.shape, cupy.nan, cupy.float32)
        reused = other.data.ptr == address
    with b:
        found = y.get()
    assert np.array_equal(found, wanted), f"the input's memory was {'' if reused else 'not '}given to another array"


@pytest.mark.parametrize("name", ["cupy.gemm", "numba_cuda.direct", None])
def test_streams_take_turns_in_the_pool(name):
    """Neither sees the other's half-done work."""
    import cupy

    rng = np.random.default_rng(3)
    images = [rng.integers(-4, 4, (2, 8, 64, 64)).astype(np.float32) for _ in range(2)]
    k = cupy.asarray(rng.integers(-4, 4, (8, 8, 3, 3)).astype(np.float32))
    wanted = [conv2d(image, k.get(), device="cpu") for image in images]
    inputs = [cupy.asarray(image) for image in images]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    for _ in range(50):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with stream:
                found.append(conv2d(x, k, backend=name))
        for stream, y, right in zip(streams, found, wanted, strict=True):
            with stream:
                assert np.array_equal(y.get(), right)
