"""The dense kernels of the CPU: narrower registers than this machine's, any number of threads, and the same bits."""

from __future__ import annotations

import sys
from typing import Any

import calls
import cases
import numba
import numpy as np
import pytest

import gpuconv
from gpuconv import arrays, request
from gpuconv.backends.numba_cpu import merged, pixels, pointwise, runtime, strip
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason="no compiled kernels on this machine")

MODULES = {"strip": strip, "pointwise": pointwise, "merged": merged}
PROBLEMS = {
    "strip": (
        "n2c21h9w11_o13kh3kw3_p1", "n1c5h13w40_o9kh5kw2_s2x3d2p2x1", "n2c6h9w9_o10kh3kw3_p2g2_reflect_bias_relu",
    ),
    "pointwise": ("n2c330h5w7_o13kh1kw1_bias", "n1c6h9w9_o10kh1kw1_s2g2"),
    "merged": ("n7c40h7w7_o21kh3kw3_p1_bias_relu", "n3c330h4w5_o9kh1kw1"),
}  # fmt: skip
MOST = 1 << 28


def computed(module: Any, line: str, dtype: str, bits: int | None, threads: int, images: int | None = None) -> Any:
    """The convolution of fixed normal numbers, and the reference's."""
    problem = Conv2dProblem.parse(f"{line}_{dtype}")
    rng = np.random.default_rng(7)
    numpy_type = cases.numpy_dtype(problem.x_dtype)
    x, k, bias = (
        rng.standard_normal(shape).astype(numpy_type) for shape in (problem.x_shape, problem.k_shape, (problem.O,))
    )
    if images is not None:
        x = x[:images]
        problem = Conv2dProblem.parse(f"n{images}{line[line.index('c') :]}_{dtype}")
    y = np.full(problem.y_shape, np.nan, numpy_type)
    target = Target("cpu", None, threads, bits)
    assert module.unsupported(problem, target) == []
    plan = module.plan(problem, target, MOST)
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, y))]
    module.run(plan, Operands(views[0], views[1], bias if problem.bias else None), views[2])
    options = {name: getattr(problem, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    wanted = gpuconv.conv2d(
        x, k, bias if problem.bias else None, **options, activation=problem.activation, backend="numpy.reference"
    )
    return y, wanted


@pytest.mark.parametrize("dtype", ["f32", pytest.param("f64", marks=pytest.mark.full), "f16"])
@pytest.mark.parametrize("bits", [128, 256, pytest.param(512, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", MODULES)
def test_any_width(name, bits, dtype):
    if dtype == "f16" and (name != "strip" or bits == 128):
        pytest.skip("16-bit results are numba_cpu.strip's and alike at every width")
    for line in PROBLEMS[name]:
        y, wanted = computed(MODULES[name], line, dtype, bits, 2)
        tolerance = {"f32": 1e-5, "f64": 1e-13, "f16": 4e-3}[dtype]
        error = np.abs(y.astype(np.float64) - wanted.astype(np.float64)).max()
        assert error <= tolerance * np.abs(wanted.astype(np.float64)).max(), line


@pytest.mark.parametrize("name", MODULES)
def test_threads_and_company_change_no_bit(name):
    for line in PROBLEMS[name]:
        one, _ = computed(MODULES[name], line, "f32", None, 1)
        for threads in (2, 3, 7):
            assert computed(MODULES[name], line, "f32", None, threads)[0].tobytes() == one.tobytes(), (line, threads)
        alone, _ = computed(MODULES[name], line, "f32", None, 2, images=1)
        assert alone.tobytes() == one[:1].tobytes(), line


def test_the_dense_kernels_sum_alike():
    for line, names in (("n3c330h4w5_o9kh1kw1", MODULES), ("n7c40h7w7_o21kh3kw3_p1", ("strip", "merged"))):
        found = {computed(MODULES[name], line, "f32", None, 2)[0].tobytes() for name in names}
        assert len(found) == 1, line


STRAIGHT = ("n2c3h20w31_o13kh3kw3_p1_bias_relu", "n1c4h13w112_o9kh5kw5_s2p2", "n2c6h9w40_o10kh3kw3_p1g2_reflect")


@pytest.mark.parametrize("bits", [128, 256])
def test_tiles_written_straight_to_the_result_have_the_bits_of_sums(monkeypatch, bits):
    asked, usual = [], strip._direct
    monkeypatch.setattr(strip, "_direct", lambda plan, out: asked.append(usual(plan, out)) or asked[-1])
    straight = [computed(strip, line, "f32", bits, 2)[0].tobytes() for line in STRAIGHT]
    assert asked == [True] * len(STRAIGHT)
    monkeypatch.setattr(strip, "_direct", lambda plan, out: False)
    assert straight == [computed(strip, line, "f32", bits, 2)[0].tobytes() for line in STRAIGHT]


@pytest.mark.parametrize("gap", ["between columns", "between elements"])
def test_a_result_with_gaps_is_not_written_straight(gap):
    x, k = (
        np.random.default_rng(3).standard_normal(shape).astype(np.float32) for shape in ((1, 3, 9, 40), (5, 3, 3, 3))
    )
    wanted = gpuconv.conv2d(x, k, padding=1, backend="numba_cpu.strip")
    if gap == "between columns":
        out = np.zeros((1, 5, 9, 80), np.float32)[..., ::2]
    else:  # rows of 40 numbers and a byte
        out = np.zeros((1, 5, 9), np.dtype([("y", np.float32, 40), ("tag", np.uint8)]))["y"]
    gpuconv.conv2d(x, k, padding=1, out=out, backend="numba_cpu.strip")
    assert out.tobytes() == wanted.tobytes()


def test_the_cache_decides_blocks_and_no_bit(monkeypatch):
    line = "n1c40h33w50_o160kh3kw3_p1_f32"
    plans, results = set(), set()
    for size in (64 << 10, 512 << 10, 1 << 20, 32 << 20):
        monkeypatch.setattr(runtime, "l2_bytes", lambda size=size: size)
        plans.add(strip.plan(Conv2dProblem.parse(line), Target("cpu", None, 2), MOST).detail)
        results.add(computed(strip, line.removesuffix("_f32"), "f32", None, 2)[0].tobytes())
    assert len(plans) == 3 and len(results) == 1  # 1 MB and more are alike
    details = set()
    for size in (64 << 10, 1 << 20, 32 << 20):
        monkeypatch.setattr(runtime, "l2_bytes", lambda size=size: size)
        details.add(pixels.plan(Conv2dProblem.parse(line), Target("cpu", None, 2), MOST).detail)
    assert len(details) == 2


@pytest.mark.skipif(sys.platform == "darwin", reason="tells it otherwise")
def test_the_size_of_the_cache_is_what_the_system_tells(tmp_path):
    assert runtime.l2_bytes(str(tmp_path)) == 1 << 20  # nothing
    for index, told in enumerate((("1", "Data", "32K"), ("2", "Instruction", "64K"), ("2", "Unified", "512K"))):
        folder = tmp_path / "caches" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size"), told, strict=True):
            (folder / name).write_text(value + "\n")
    assert runtime.l2_bytes(str(tmp_path / "caches")) == 512 << 10
    (tmp_path / "caches" / "index2" / "size").write_text("a lot")
    runtime.l2_bytes.cache_clear()
    assert runtime.l2_bytes(str(tmp_path / "caches")) == 1 << 20


def test_a_table_of_arguments_that_is_too_long_is_refused():
    most = runtime.TABLE - runtime.ARRAYS
    runtime.Task(0, [0] * most, 1)
    with pytest.raises(ValueError, match="broadcast"):
        runtime.Task(0, [0] * (most + 1), 1)


def test_registers_are_asked_for_by_name(monkeypatch):
    runtime.vector_bits.cache_clear()
    monkeypatch.setenv("GPUCONV_VECTOR_BITS", "96")
    with pytest.raises(ValueError, match=r"GPUCONV_VECTOR_BITS must be 128, 256 or 512; got '96'"):
        runtime.vector_bits()
    monkeypatch.delenv("GPUCONV_VECTOR_BITS")
    runtime.vector_bits.cache_clear()


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_is_a_number(monkeypatch, wrong):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", wrong)
    with pytest.raises((TypeError, ValueError), match="GPUCONV_NUM_THREADS"):
        runtime.thread_count()


def test_threads_are_limited(monkeypatch):
    monkeypatch.setenv("GPUCONV_NUM_THREADS", "1")
    assert runtime.thread_count() == 1
    y = gpuconv.conv2d(np.ones((2, 32, 40, 40), np.float32), np.ones((32, 32, 3, 3), np.float32))
    assert (y == 288).all()


def test_the_number_of_threads_is_that_of_numba():
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert runtime.thread_count() == 1
    finally:
        numba.set_num_threads(before)
    assert runtime.thread_count() == before


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3, 5, 1000)), ("uint8", (1 << 15,)), ("float64", (70, 70))])
def test_large_results_begin_at_a_cache_line(dtype, shape):
    kept = [arrays.empty(shape, dtype) for _ in range(5)]
    for index, y in enumerate(kept):
        assert (y.shape, y.dtype, y.ctypes.data % 64) == (shape, dtype, 0) and y.flags.c_contiguous
        y[...] = index
    assert all((y == index).all() for index, y in enumerate(kept))


@pytest.mark.parametrize("start", [0, 4, 16, 2048, 4092])
def test_large_results_begin_apart_from_the_image(start):
    """As far as a page goes: reads of the image need not wait for what is written, row for row, at the same place."""
    memory = np.zeros((1 << 20) + 8192, np.uint8)
    first = -memory.ctypes.data % 4096 + start
    x = memory[first : first + (1 << 20)].view(np.float32).reshape(1, 1, 256, 1024)
    k = np.ones((1, 1, 3, 3), np.float32)
    prepared = gpuconv.Conv2d(k, padding=1)
    for call in (lambda: gpuconv.conv2d(x, k, padding=1), lambda: prepared(x)):
        for y in (call(), call(), call()):
            apart = (y.ctypes.data - x.ctypes.data) % 4096
            assert 1024 <= apart <= 3072 and y.ctypes.data % 64 == 0 and y.flags.c_contiguous


ONE_KERNEL = """
import numpy as np, gpuconv
for rows in ROWS:
    x, k = np.ones((1, 1, 6, 6), np.float32), np.full((1, 1, rows, rows), 2, np.float32)
    y = gpuconv.conv2d(x, k, backend="numba_cpu.rows")
    assert (y == 2 * rows * rows).all(), (rows, y)
"""


@pytest.mark.full
def test_kernels_from_two_processes_are_not_taken_for_one_another(tmp_path):
    """Each compiles one kernel as its first, so that Numba gives both the same name; a third process uses both."""
    for rows in ("(1,)", "(2,)", "(1, 2)", "(2, 1)"):
        calls.child(ONE_KERNEL.replace("ROWS", rows), GPUCONV_CACHE_DIR=str(tmp_path / "kernels"))


@pytest.mark.parametrize(("N", "bits", "tasks"), [(1, 256, 27), (32, 256, 32), (1, 512, 2)])
def test_tasks_of_1x1_are_small_where_a_core_may_be_slow(N, bits, tasks):
    """Many for each thread, of whole panels of pixels; a batch has enough as it is."""
    problem = Conv2dProblem.of((N, 64, 56, 56), (64, 64, 1, 1), x_dtype="float32", k_dtype="float32")
    plan = pointwise.plan(problem, Target("cpu", threads=2, vector_bits=bits), 1 << 28)
    at_once = plan.config["at_once"]
    assert N * -(-56 * 56 // at_once) == tasks
    assert at_once % (24 if bits == 256 else 48) == 0 or at_once == 56 * 56
