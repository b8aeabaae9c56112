"""Weight gradients of large NumPy arrays: pieces of both operands through a GPU, added up there.

Without a GPU, on the stand-in for CuPy in a child.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import calls
import fake_cupy
import numpy as np
import oracle_family
import pytest
import units
from test_streamed import OPTIONS, integers, of_the_stand_in, tiny, whole  # noqa: F401  # tiny is a fixture

import gpuconv
from gpuconv import arrays, cutting, pinned
from gpuconv.grad import conv2d_bias, conv2d_weight

TESTS = Path(__file__).parent
in_child = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"


@pytest.mark.skipif(in_child, reason="this process is the child")
@pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")
def test_all_on_the_stand_in():
    environment = os.environ | {
        "GPUCONV_TEST_FAKE_CUPY": "1",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "fake_cupy"]
    command += [__file__, "-k", "not stand_in", "-m", "not full and not gpu"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= 40, child.stdout[-2000:]


def operands(shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, **options: Any):
    """x, and a dy of the shape of its convolution, of small integers."""
    rng = np.random.default_rng(seed)
    x = integers(rng, shape, dtype)
    problem = gpuconv.Conv2dProblem.of(shape, k_shape, **options)
    dy = integers(rng, problem.y_shape, dtype)
    if np.dtype(dtype).kind == "c":
        x, dy = x + 1j * integers(rng, x.shape), dy - 1j * integers(rng, dy.shape)
    return x.astype(dtype), dy.astype(dtype)


GEOMETRIES = {name: options for name, options in OPTIONS.items() if not {"padding_mode", "padding_value"} & {*options}}
GEOMETRIES["relu, flipped"] = {"flip": True, "padding": 1}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES)
def test_options(tiny, monkeypatch, options, layout):  # noqa: F811
    """In rows of one image and in images, with the answer of the whole, to the last weight."""
    for shape, groups in (((1, 4, 60, 11), 1), ((9, 4, 20, 5), 2)):
        x, dy = operands(shape, (4, 4 // groups, 3, 3), groups=groups, **options)
        if layout == "NHWC":
            x, dy = (np.moveaxis(array, 1, -1) for array in (x, dy))
        for kernel_layout, axes in {"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0)}.items():
            size = tuple((4, 4 // groups, 3, 3)[axis] for axis in axes)
            how = {"layout": layout, "kernel_layout": kernel_layout, "groups": groups, **options}
            run = partial(conv2d_weight, x, size, dy, **how)
            expected = run(backend="numpy.reference")
            result = run(device="cuda")
            assert tiny[-1] > 1
            assert result.flags.c_contiguous
            np.testing.assert_array_equal(result, expected)
            np.testing.assert_array_equal(whole(monkeypatch, partial(run, device="cuda")), expected)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "float16", "bfloat16", "float64", "complex64", "complex128"]
)
def test_memory_of_any_kind(tiny, dtype):  # noqa: F811
    """Steps backwards, broadcasts, other byte orders and strided results; each operand in a form of its own."""
    dense, other = operands((12, 6, 14, 2), (6, 6, 1, 1), dtype)
    axes = (1, 3, 0, 2)
    forms = {
        "backwards": [array.transpose(axes)[::-1, :, ::-1, ::-1] for array in (dense, other)],
        "stepped": [array.transpose(axes)[::2, :, :, ::3] for array in (dense, other)],
        "broadcast": [np.broadcast_to(array[:1, :, :1].transpose(axes), (6, 2, 12, 14)) for array in (dense, other)],
    }
    if dtype not in ("bool", "uint8", "bfloat16"):
        swapped = np.dtype(dtype).newbyteorder("S")
        forms["swapped"] = [array.astype(swapped) for array in forms["backwards"]]
    for name, (x, y) in forms.items():
        dy = y[:, :, : y.shape[2] - 2, : y.shape[3] - 2]
        expected = conv2d_weight(x, (2, 2, 3, 3), dy, backend="numpy.reference")
        out = np.full((2, 2, 3, 6), 77, expected.dtype)
        given = out[..., ::-2]
        assert conv2d_weight(x, (2, 2, 3, 3), dy, device="cuda", out=given) is given
        assert tiny[-1] > 1, name
        np.testing.assert_array_equal(given, expected, err_msg=name)
        assert (out[..., ::2] == 77).all(), name


def test_operands_of_two_types(tiny):  # noqa: F811
    x, _ = operands((12, 3, 8, 8), (4, 3, 3, 3), "float16")
    _, dy = operands((12, 3, 8, 8), (4, 3, 3, 3), "float64")
    for first, second in ((x, dy), (x.astype("int8"), dy), (x.astype("float32"), dy.astype("complex64"))):
        expected = conv2d_weight(first, (4, 3, 3, 3), second, backend="numpy.reference")
        np.testing.assert_array_equal(conv2d_weight(first, (4, 3, 3, 3), second, device="cuda"), expected)
        assert tiny[-1] > 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_partial_sums_are_not_rounded_to_16_bits(tiny, dtype):  # noqa: F811
    """Pieces of +65536 and -65536 leave the 256 between them; 2049 is no float16."""
    x = np.ones((17, 1, 16, 16), dtype)
    dy = np.zeros((17, 1, 16, 16), np.float32)
    dy[:8], dy[8, 0, 0, :], dy[9:] = 256, 16, -256
    found = conv2d_weight(x, (1, 1, 1, 1), dy.astype(dtype), device="cuda")
    assert tiny[-1] > 1
    assert found.dtype == np.dtype(dtype) and found[0, 0, 0, 0] == 256


@pytest.mark.parametrize("kind", ["normal", "positive"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_error_is_within_the_bound(tiny, dtype, kind):  # noqa: F811
    """Of a direct sum over all images, in one rounding; and near that of an ideal sum."""
    rng = np.random.default_rng(2)
    x, dy = operands((30, 2, 12, 12), (3, 2, 3, 3), dtype, padding=1)
    for array in (x, dy):
        reals = rng.standard_normal(array.shape) if kind == "normal" else rng.uniform(0, 1, array.shape)
        array[...] = reals.astype(dtype)
    answer = oracle_family.conv2d_weight(x, (3, 2, 3, 3), dy, padding=1)
    found = conv2d_weight(x, (3, 2, 3, 3), dy, padding=1, device="cuda")
    assert tiny[-1] > 1
    units.assert_close(found, answer, f"{dtype} {kind}", units.limit_of(answer))
    if dtype in ("float32", "float64"):
        assert units.unit_b(found, answer, x, dy) <= (10 if kind == "normal" else 150)


def test_same_bits(tiny):  # noqa: F811
    """Whatever the limit, and where the GPU has room for two pieces only."""
    rng = np.random.default_rng(3)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((30, 4, 9, 8), (30, 8, 9, 8)))
    run = partial(conv2d_weight, x, (8, 4, 3, 3), dy, padding=1, backend="cupy.gemm")
    first = run()
    assert tiny[-1] > 1
    for limit in (None, 2**22, 2**30):
        assert run(workspace_limit=limit).tobytes() == first.tobytes()
        assert tiny[-1] == tiny[0]


def test_zeros_and_nan(tiny):  # noqa: F811
    """One NaN in x is in the weights of its channel, one in dy in those of its output; nowhere else."""
    x, dy = operands((20, 2, 6, 6), (3, 2, 3, 3))
    for array, at, where in ((x, (7, 1, 3, 3), (slice(None), 1)), (dy, (19, 2, 1, 1), (2,))):
        given = array.copy()
        given[at] = np.nan
        found = conv2d_weight(given if array is x else x, (3, 2, 3, 3), given if array is dy else dy, device="cuda")
        assert tiny[-1] > 1
        expected = np.zeros(found.shape, bool)
        expected[where] = True
        np.testing.assert_array_equal(np.isnan(found), expected)


def test_sums_too_large_for_the_result_are_infinite(tiny):  # noqa: F811
    x, dy = np.full((20, 1, 4, 4), 3e38, np.float32), np.full((20, 1, 4, 4), 1, np.float32)
    assert conv2d_weight(x, (1, 1, 1, 1), dy, device="cuda") == np.inf
    half = conv2d_weight(np.full((20, 1, 8, 8), 600, np.float16), (1, 1, 1, 1), np.ones((20, 1, 8, 8), np.float16),
                         device="cuda")  # fmt: skip
    assert half == np.inf and tiny[-1] > 1


@pytest.mark.parametrize("dtype", ["float16", "int8", "complex64"])
def test_the_gradient_of_a_bias(tiny, dtype):  # noqa: F811
    _, dy = operands((20, 3, 8, 8), (4, 3, 3, 3), dtype)
    expected = conv2d_bias(dy, backend="numpy.reference")
    np.testing.assert_array_equal(conv2d_bias(dy, device="cuda"), expected)
    assert tiny[-1] > 1


@of_the_stand_in
def test_through_a_gpu_that_is_too_small_for_it(tiny):  # noqa: F811
    """Each array on the GPU is far smaller than x; and where a piece has no room either, the next call is right."""
    x, dy = operands((60, 4, 16, 16), (4, 4, 3, 3))
    run = partial(conv2d_weight, x, (4, 4, 3, 3), dy, backend="cupy.gemm")
    expected = conv2d_weight(x, (4, 4, 3, 3), dy, backend="numpy.reference")
    np.testing.assert_array_equal(run(), expected)
    try:
        fake_cupy.POOL.set_limit(x.nbytes // 3)
        np.testing.assert_array_equal(run(), expected)
        fake_cupy.POOL.set_limit(100)
        with pytest.raises(MemoryError):
            run()
    finally:
        fake_cupy.POOL.set_limit(0)
    np.testing.assert_array_equal(run(), expected)


def there(array: np.ndarray) -> arrays.Operand:
    """An operand that is on the GPU, in the stand-in an array like any other."""
    import cupy

    return arrays.Operand(cupy.asarray(array), "cupy", 0, array.dtype.name)


@of_the_stand_in
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("on_gpu", ["x", "dy"])
def test_with_one_operand_on_the_gpu_only_the_other_goes_up(tiny, monkeypatch, on_gpu, dtype):  # noqa: F811
    """Of images, of rows and of rows that read padding and image in turn; the result is where x is."""
    asked, moved = [], []
    real = pinned.CupyRing._ask
    monkeypatch.setattr(pinned.CupyRing, "_ask", lambda *given: asked.append((given[1], given[4])) or real(*given))
    to_device = arrays.to_device
    monkeypatch.setattr(arrays, "to_device", lambda *given: moved.append(given[0]) or to_device(*given))
    far = {"padding": ((20, 19), (0, 0)), "dilation": (100, 1)}
    for shape, options in [((20, 2, 9, 8), {"padding": 1}), ((1, 2, 240, 5), {"padding": 1, "stride": (2, 1)}),
                           ((1, 2, 240, 3), far), ((2, 2, 60, 4), {"groups": 2})]:  # fmt: skip
        k_shape = (2, 2 // options.get("groups", 1), 3, 3)
        x, dy = operands(shape, k_shape, dtype, **options)
        expected = conv2d_weight(x, k_shape, dy, backend="numpy.reference", **options)
        asked.clear(), moved.clear()
        mixed = (there(x), dy) if on_gpu == "x" else (x, there(dy))
        result = conv2d_weight(mixed[0], k_shape, mixed[1], backend="cupy.gemm", device="cuda", **options)
        np.testing.assert_array_equal(result, expected)
        assert tiny[-1] > 1
        up = [size for lane, size in asked if lane == "upload"]
        assert len(up) == tiny[-1] and max(up) <= 1024
        host = dy if on_gpu == "x" else x
        assert not any(np.may_share_memory(array, host) for array in moved), "it is not moved whole"
        assert len([lane for lane, _ in asked if lane == "download"]) == (on_gpu == "dy")


@of_the_stand_in
def test_with_one_operand_on_the_gpu_and_what_may_go_wrong(tiny, monkeypatch):  # noqa: F811
    """Strided results, NaN, the other layout, a missing wait; a host operand too small to be cut is moved whole."""
    x, dy = operands((20, 2, 9, 8), (4, 2, 3, 3), padding=1)
    x[7, 1, 3, 3] = np.nan
    expected = conv2d_weight(x, (4, 2, 3, 3), dy, padding=1, backend="numpy.reference")
    out = np.full((4, 2, 3, 6), 77, np.float32)
    conv2d_weight(x, (4, 2, 3, 3), there(dy), padding=1, device="cuda", out=out[..., ::-2])
    np.testing.assert_array_equal(out[..., ::-2], expected)
    assert (out[..., ::2] == 77).all() and tiny[-1] > 1
    last = [np.ascontiguousarray(np.moveaxis(array, 1, -1)) for array in (x, dy)]
    run = partial(conv2d_weight, there(last[0]), (4, 2, 3, 3), last[1], padding=1, layout="NHWC", backend="cupy.gemm")
    np.testing.assert_array_equal(run(), expected)
    assert tiny[-1] > 1
    with monkeypatch.context() as patch:
        patch.setattr(pinned.CupyRing, "wait", lambda *_: None)
        assert not np.array_equal(run(), expected, equal_nan=True)
    pinned.release()
    monkeypatch.setattr(cutting, "_LEAST", 2**20)
    np.testing.assert_array_equal(run(), expected)
    assert tiny[-1] == 0


@of_the_stand_in
def test_the_sum_comes_down_once(tiny, monkeypatch):  # noqa: F811
    asked = []
    real = pinned.CupyRing._ask
    monkeypatch.setattr(pinned.CupyRing, "_ask", lambda *given: asked.append((given[1], given[4])) or real(*given))
    x, dy = operands((40, 4, 8, 8), (4, 4, 3, 3))
    conv2d_weight(x, (4, 4, 3, 3), dy, device="cuda")
    downloads = [size for lane, size in asked if lane == "download"]
    assert downloads == [4 * 4 * 9 * 8]  # in float64
    assert len(asked) == tiny[-1] + 1


@of_the_stand_in
@pytest.mark.parametrize("missing", ["wait", "reach"])
def test_without_a_wait_is_wrong(tiny, monkeypatch, missing):  # noqa: F811
    """The stand-in's copies land late enough to show it."""
    x, dy = operands((40, 4, 8, 8), (4, 4, 3, 3))
    monkeypatch.setattr(pinned.CupyRing, missing, lambda *_: None)
    found = conv2d_weight(x, (4, 4, 3, 3), dy, device="cuda")
    assert not np.array_equal(found, conv2d_weight(x, (4, 4, 3, 3), dy, backend="numpy.reference"))


def test_explain_says_in_which_pieces(tiny):  # noqa: F811
    lines = [
        str(gpuconv.explain(x, (8, 4, 3, 3), device="cuda", op="weight_grad")) for x in ((12, 4, 8, 8), (1, 4, 96, 8))
    ]
    assert "Host arrays go through the GPU in 12 pieces of 1 image(s)" in lines[0]
    assert "rows of an image" in lines[1]
    assert all("the sums over each are added up there" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cupy.gemm", "numba_cuda.direct"])
@pytest.mark.parametrize("shape", [(256, 16, 128, 128), (1, 4, 4096, 4096)])
def test_arrays_that_the_pool_has_no_room_for(name, shape):
    """Operands of 540 MB and more, through a pool that may hold 200 MiB."""
    import cupy

    pool = cupy.get_default_memory_pool()
    x = np.random.default_rng(14).integers(-2, 3, shape).astype(np.float32)
    dy = np.random.default_rng(15).integers(-2, 3, (shape[0], 16, *shape[2:])).astype(np.float32)
    k_shape = (16, shape[1], 3, 3)
    conv2d_weight(x[:1, :, :32, :32], k_shape, dy[:1, :, :32, :32], padding=1, backend=name)  # cuBLAS has its workspace
    expected = conv2d_weight(x, k_shape, dy, padding=1, device="cpu")
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.used_bytes() + (200 << 20))
        found = [conv2d_weight(x, k_shape, dy, padding=1, backend=name) for _ in range(2)]
    finally:
        pool.set_limit(size=0)
    np.testing.assert_array_equal(found[0], expected)
    assert found[0].tobytes() == found[1].tobytes()


DIRECT = """
import fake_cupy, numpy as np
from gpuconv import Conv2dProblem, cutting, pinned
from gpuconv.grad import conv2d_weight
cutting._LEAST, cutting._MOST, pinned._ALONE = 16, 256, 0
real, cuts = cutting.cut, []
cutting.cut = lambda *given: cuts.append(real(*given)) or cuts[-1]
rng = np.random.default_rng(0)
for shape, dtype, options in [((1, 2, 14, 5), "f", {"padding": 1}), ((4, 2, 5, 5), "e", {"stride": 2, "groups": 2}),
                              ((4, 2, 5, 5), "h", {}), ((4, 2, 5, 5), "F", {"layout": "NHWC"})]:
    k_shape = (2, 2 // options.get("groups", 1), 3, 3)
    x = rng.integers(-3, 4, shape).astype(dtype)
    problem = Conv2dProblem.of(shape, k_shape, **{k: v for k, v in options.items() if k != "layout"})
    dy = rng.integers(-3, 4, problem.y_shape).astype(dtype)
    if "layout" in options:
        x, dy = x.transpose(0, 2, 3, 1) * np.complex64(1j), dy.transpose(0, 2, 3, 1) * np.complex64(1 + 1j)
    found = conv2d_weight(x, k_shape, dy, backend="numba_cuda.direct", **options)
    assert len(cuts[-1]) > 1
    assert np.array_equal(found, conv2d_weight(x, k_shape, dy, backend="numpy.reference", **options)), (shape, dtype)
print("right")
"""


@pytest.mark.skipif(in_child, reason="a process of its own")
def test_by_a_kernel_of_our_own():
    """In Numba's simulator, on the stand-in for CuPy."""
    found = calls.child(DIRECT, limit=300, GPUCONV_TEST_FAKE_CUPY="1", NUMBA_ENABLE_CUDASIM="1")
    assert found.strip() == "right"
