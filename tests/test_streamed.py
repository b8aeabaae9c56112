"""Large NumPy arrays through a GPU in pieces: the answers. Without a GPU, on the stand-in for CuPy in a child."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import calls
import fake_cupy
import numpy as np
import pytest
from running import skip_unless_usable

import gpuconv
from gpuconv import arrays, conv2d, cutting, dispatch, pinned, streaming

TESTS = Path(__file__).parent
in_child = os.environ.get("GPUCONV_TEST_FAKE_CUPY") == "1"
of_the_stand_in = pytest.mark.skipif(not in_child, reason="counts what the stand-in for CuPy is asked for")


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
    assert passed is not None and int(passed[1]) >= 60, child.stdout[-2000:]


@pytest.fixture
def tiny(monkeypatch) -> Iterator[list[int]]:
    """Pieces of a few hundred bytes, so that small arrays are cut, and copies by several threads; notes the pieces."""
    skip_unless_usable("cupy.gemm")
    cuts: list[int] = []
    real = cutting.cut

    def noted(*arguments: Any) -> Any:
        pieces = real(*arguments)
        cuts.append(len(pieces or ()))
        return pieces

    monkeypatch.setattr(cutting, "_LEAST", 8)
    monkeypatch.setattr(cutting, "_MOST", 512)
    monkeypatch.setattr(cutting, "cut", noted)
    monkeypatch.setattr(pinned, "_ALONE", 0)
    monkeypatch.setattr(pinned, "_threads", lambda: 3)
    yield cuts
    pinned.release()


@pytest.mark.parametrize("dtype", calls.DTYPES)
@pytest.mark.parametrize("g", calls.GEOMETRIES, ids=str)
def test_calls_are_right(tiny, g, dtype):
    for call in calls.make(g, dtype, seed=3):
        for name in calls.serving(call, [name for name in calls.usable("cuda") if name.startswith("cupy")]):
            call.check(backend=name)
    assert max(tiny) > 1 or dtype == "int64", "which only unfold and fold take, here of one image"


def whole(monkeypatch: Any, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "cut", lambda *_: None)
        return run()


def integers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return rng.integers(0, 4, shape).astype(dtype)


OPTIONS = {
    "same": {"padding": "same"},
    "stride": {"stride": (3, 2), "padding": ((1, 0), (0, 2))},
    "dilation": {"dilation": (3, 2), "padding": 4},
    "stride and dilation": {"stride": (4, 3), "dilation": (2, 2), "padding": 3},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "symmetric": {"padding": 5, "padding_mode": "symmetric"},
    "edge": {"padding": ((40, 1), (0, 3)), "padding_mode": "edge"},
    "wrap": {"padding": ((30, 2), (3, 0)), "padding_mode": "wrap", "stride": 2},
    "far outside": {"padding": ((100, 0), (0, 0)), "stride": 50},
    "few far windows": {"stride": (17, 1), "dilation": (9, 1)},
    "value": {"padding": 3, "padding_value": 7},
    "relu, flipped": {"activation": "relu", "flip": True, "padding": 1},
}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(tiny, monkeypatch, options, layout):
    """In rows of one image and in images, with the answer of the whole, to the last pixel."""
    rng = np.random.default_rng(5)
    k, bias = integers(rng, (4, 3, 3, 3)) - 2, integers(rng, (4,))
    for shape in ((1, 3, 40, 11), (9, 3, 20, 5)):
        x = integers(rng, shape)
        x = np.moveaxis(x, 1, -1) if layout == "NHWC" else x
        run = partial(conv2d, x, k, bias, layout=layout, **options)
        expected = run(backend="numpy.reference")
        result = run(device="cuda")
        assert tiny[-1] > 1 or options.get("stride") == 50
        assert result.flags.c_contiguous
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(whole(monkeypatch, partial(run, device="cuda")), expected)


def test_taps_so_far_apart_that_windows_share_no_rows(tiny):
    """The padding and the image take turns in what a piece of rows reads."""
    rng = np.random.default_rng(16)
    x, k = integers(rng, (1, 2, 240, 3)), integers(rng, (2, 2, 3, 3))
    options = {"dilation": (100, 1), "padding": ((20, 19), (0, 0)), "padding_value": 3}
    expected = conv2d(x, k, backend="numpy.reference", **options)
    np.testing.assert_array_equal(conv2d(x, k, device="cuda", **options), expected)
    assert tiny[-1] > 1


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float16", "bfloat16", "float64", "complex128"])
def test_memory_of_any_kind(tiny, dtype):
    """Steps backwards, broadcasts, other byte orders and strided results, with padding."""
    rng = np.random.default_rng(6)
    dense = integers(rng, (6, 12, 2, 14), dtype)
    k = integers(rng, (2, 2, 3, 3), dtype)
    forms = {
        "backwards": dense.transpose(0, 2, 1, 3)[::-1, :, ::-1, ::-1],
        "stepped": dense.transpose(0, 2, 1, 3)[::2, :, 1:, ::3],
        "broadcast": np.broadcast_to(dense[:1, :1, :, :].transpose(0, 2, 1, 3), (6, 2, 12, 14)),
    }
    if dtype not in ("bool", "uint8", "bfloat16"):
        forms["swapped"] = forms["backwards"].astype(dense.dtype.newbyteorder("S"))
    for name, x in forms.items():
        expected = conv2d(x, k, padding=2, backend="numpy.reference")
        out = np.full((*expected.shape[:3], 2 * expected.shape[3]), 77, expected.dtype)
        given = out[..., ::-2]
        assert conv2d(x, k, padding=2, device="cuda", out=given) is given
        assert tiny[-1] > 1, name
        np.testing.assert_array_equal(given, expected, err_msg=name)
        assert (out[..., ::2] == 77).all(), name


def test_zero_points(tiny):
    rng = np.random.default_rng(7)
    x, k = rng.integers(0, 255, (1, 4, 30, 9), np.uint8), rng.integers(-9, 9, (4, 2, 3, 3), np.int8)
    options = {"groups": 2, "padding": 2, "x_zero_point": 9, "k_zero_point": np.array([1, -2, 3, 0])}
    expected = conv2d(x, k, backend="numpy.reference", **options)
    np.testing.assert_array_equal(conv2d(x, k, device="cuda", **options), expected)
    assert tiny[-1] > 1


def test_kernel_is_packed_and_uploaded_once(tiny, monkeypatch):
    rng = np.random.default_rng(8)
    x, k = integers(rng, (12, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    packs, uploads = [], []
    module = dispatch.implementation("cupy.gemm")
    real_pack, real_upload = module.pack, arrays.to_device
    monkeypatch.setattr(module, "pack", lambda *given: packs.append(1) or real_pack(*given))
    monkeypatch.setattr(arrays, "to_device", lambda *given: uploads.append(given[0].shape) or real_upload(*given))
    layer = gpuconv.Conv2d(k, device="cuda", backend="cupy.gemm")
    expected = conv2d(x, k, backend="numpy.reference")
    for _ in range(3):
        np.testing.assert_array_equal(layer(x), expected)
    assert (len(packs), uploads) == (1, [k.shape])
    np.testing.assert_array_equal(conv2d(x, k, device="cuda", backend="cupy.gemm"), expected)
    assert len(packs) == 2, "once, not once per piece"


@of_the_stand_in
def test_pieces_that_want_the_kernel_in_another_form_get_it(tiny, monkeypatch):
    """As where what was tuned for so many images is not what runs for fewer."""
    module = dispatch.implementation("cupy.gemm")
    real_key, real_pack, real_run = module.pack_key, module.pack, module.run
    forms: dict[int, Any] = {}
    runs: list[int] = []

    def pack(plan: Any, operands: Any) -> Any:
        assert plan.problem.N not in forms
        forms[plan.problem.N] = real_pack(plan, operands).copy()
        return forms[plan.problem.N]

    def run(plan: Any, operands: Any, out: Any) -> None:
        assert operands.packed is forms[plan.problem.N]
        runs.append(plan.problem.N)
        real_run(plan, operands, out)

    monkeypatch.setattr(module, "pack_key", lambda plan: (plan.problem.N, real_key(plan)))
    monkeypatch.setattr(module, "pack", pack)
    monkeypatch.setattr(module, "run", run)
    rng = np.random.default_rng(22)
    x, k = integers(rng, (100, 1, 4, 4)), integers(rng, (4, 1, 3, 3))
    expected = conv2d(x, k, backend="numpy.reference")
    np.testing.assert_array_equal(conv2d(x, k, backend="cupy.gemm"), expected)
    assert sum(runs) == 100 and len(forms) == 2


@of_the_stand_in
def test_memory_is_page_locked_once_and_released(tiny):
    rng = np.random.default_rng(9)
    x, k = integers(rng, (12, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    pinned.release()
    fake_cupy.PINNED.clear()
    for _ in range(5):
        conv2d(x, k, device="cuda")
        conv2d(x[:8], k, device="cuda")
    assert len(fake_cupy.PINNED) == 1
    gpuconv.clear()
    assert not pinned._free
    conv2d(x, k, device="cuda")
    assert len(fake_cupy.PINNED) == 2


def test_by_many_threads(tiny):
    rng = np.random.default_rng(10)
    k = integers(rng, (8, 4, 3, 3))
    layer = gpuconv.Conv2d(k, device="cuda")
    images = [integers(rng, (12, 4, 8, 8)) for _ in range(8)]
    wanted = [conv2d(x, k, backend="numpy.reference") for x in images]
    wrong: list[int] = []

    def work(turn: int) -> None:
        for _ in range(5):
            if not np.array_equal(layer(images[turn]), wanted[turn]):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pinned._free) == 1, "one ring is kept, however many calls there were at once"


@of_the_stand_in
def test_through_a_gpu_that_is_too_small_for_it(tiny):
    """Each array on the GPU is far smaller than x; and where a piece has no room either, the next call is right."""
    rng = np.random.default_rng(11)
    x, k = integers(rng, (40, 4, 16, 16)), integers(rng, (4, 4, 3, 3))
    expected = conv2d(x, k, backend="numpy.reference")
    conv2d(x, k, device="cuda", backend="cupy.gemm")
    try:
        fake_cupy.POOL.set_limit(x.nbytes // 3)
        np.testing.assert_array_equal(conv2d(x, k, device="cuda", backend="cupy.gemm"), expected)
        fake_cupy.POOL.set_limit(100)
        with pytest.raises(MemoryError):
            conv2d(x, k, device="cuda", backend="cupy.gemm")
    finally:
        fake_cupy.POOL.set_limit(0)
    np.testing.assert_array_equal(conv2d(x, k, device="cuda", backend="cupy.gemm"), expected)


class Failure(Exception):
    pass


STEPS = {
    "copy on the host": (streaming, "_copy"),
    "copy over the bus": (pinned.CupyRing, "_ask"),
    "mark": (pinned.CupyRing, "record"),
    "wait": (pinned.CupyRing, "wait"),
    "wait on the host": (pinned.CupyRing, "reach"),
    "launch": (dispatch.implementation("cupy.gemm"), "run"),
}


@of_the_stand_in
@pytest.mark.parametrize("op", ["conv2d", "conv2d_weight"])
@pytest.mark.parametrize("step", STEPS)
def test_after_an_error_in_any_step_the_next_call_is_right(tiny, monkeypatch, step, op):
    """And nothing is under way that could write to memory which is given back."""
    rng = np.random.default_rng(17)
    x, k = integers(rng, (40, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    dy = integers(rng, (40, 8, 6, 6))
    run = partial(conv2d, x, k) if op == "conv2d" else partial(gpuconv.grad.conv2d_weight, x, k.shape, dy)
    expected = run(backend="numpy.reference")
    where, name = STEPS[step]
    real = getattr(where, name)
    for failing in (0, 1, 5, 11):
        count = itertools.count()

        def stumbling(*given: Any, failing: int = failing, count: Any = count) -> Any:
            if next(count) == failing:
                raise Failure
            return real(*given)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, stumbling)
            with pytest.raises(Failure):
                run(device="cuda")
        assert all(stream.done == len(stream.asked) for stream in fake_cupy.STREAMS.values())
        np.testing.assert_array_equal(run(device="cuda"), expected)
    assert tiny[-1] > 1


@pytest.mark.parametrize("shape", [(9, 2, 0, 8), (1, 2, 0, 8), (9, 2, 8, 0), (9, 0, 8, 8), (0, 2, 8, 8)], ids=str)
def test_empty_arrays(tiny, shape):
    """Nothing goes up, or nothing at all; images of padding alone are cut like others."""
    k, bias = integers(np.random.default_rng(19), (2, shape[1], 3, 3)), np.arange(2, dtype=np.float32)
    options = {"padding": 20, "padding_value": 3}
    y = conv2d(np.zeros(shape, np.float32), k, bias, device="cuda", **options)
    np.testing.assert_array_equal(y, conv2d(np.zeros(shape), k, bias, backend="numpy.reference", **options))
    dk = gpuconv.grad.conv2d_weight(np.zeros(shape, np.float32), k.shape, y, padding=20, device="cuda")
    assert (dk.shape, dk.any()) == (k.shape, False)
    assert max(tiny, default=0) > 1 or 0 in shape[:2]


def test_an_image_larger_than_all_page_locked_memory_is_moved_whole(tiny, monkeypatch):
    monkeypatch.setattr(cutting, "RING", 64)
    x, k = integers(np.random.default_rng(20), (3, 2, 30, 8)), integers(np.random.default_rng(21), (2, 2, 3, 3))
    np.testing.assert_array_equal(conv2d(x, k, device="cuda"), conv2d(x, k, backend="numpy.reference"))
    assert tiny == [0]


@of_the_stand_in
@pytest.mark.parametrize("device", [0, 1])
def test_the_default_streams_of_two_gpus_are_two_streams(device):
    """Both are at address 0."""
    made = []

    class Default(fake_cupy.CurrentStream):
        def record(self, event: Any) -> Any:
            made.append("record")
            return event

        def wait_event(self, event: Any) -> None:
            made.append("wait")

    arrays.wait_for(Default(), device)
    arrays.hand_back(Default(), device)
    assert made == (["record", "wait"] if device else [])


def test_clear_while_calls_run(tiny):
    rng = np.random.default_rng(18)
    x, k = integers(rng, (12, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    dy = integers(rng, (12, 8, 6, 6))
    expected = conv2d(x, k, backend="numpy.reference"), gpuconv.grad.conv2d_weight(x, k.shape, dy, device="cpu")
    wrong: list[int] = []

    def work() -> None:
        for _ in range(8):
            found = conv2d(x, k, device="cuda"), gpuconv.grad.conv2d_weight(x, k.shape, dy, device="cuda")
            if not all(map(np.array_equal, found, expected)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        gpuconv.clear()
    assert not wrong


def test_without_page_locked_memory(tiny, monkeypatch):
    """What the system refuses to lock is copied from ordinary memory."""
    import cupy

    def refuse(size: int) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(cupy.cuda, "PinnedMemory", refuse)
    pinned.release()
    rng = np.random.default_rng(12)
    x, k = integers(rng, (12, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    np.testing.assert_array_equal(conv2d(x, k, device="cuda"), conv2d(x, k, backend="numpy.reference"))


@of_the_stand_in
@pytest.mark.parametrize("missing", ["wait", "reach"])
def test_without_a_wait_is_wrong(tiny, monkeypatch, missing):
    """The stand-in's copies land late enough to show it."""
    rng = np.random.default_rng(13)
    x, k = integers(rng, (12, 4, 8, 8)), integers(rng, (8, 4, 3, 3))
    monkeypatch.setattr(pinned.CupyRing, missing, lambda *_: None)
    found = conv2d(x, k, device="cuda")
    assert not np.array_equal(found, conv2d(x, k, backend="numpy.reference"))


def test_nan_reaches_its_windows_alone(tiny):
    x, k = np.ones((1, 2, 60, 8), np.float32), np.ones((1, 2, 3, 3), np.float32)
    x[0, 1, 31, 4] = np.nan
    y = conv2d(x, k, padding=1, device="cuda", backend="cupy.gemm")
    assert tiny[-1] > 1
    expected = np.zeros(y.shape, bool)
    expected[0, 0, 30:33, 3:6] = True
    np.testing.assert_array_equal(np.isnan(y), expected)


def test_explain_says_in_which_pieces(tiny):
    lines = [str(gpuconv.explain(x, (8, 4, 3, 3), device="cuda")) for x in ((12, 4, 8, 8), (1, 4, 96, 8), (1, 4, 3, 3))]
    assert "Host arrays go through the GPU in 12 pieces of 1 image(s)" in lines[0]
    assert "rows of an image" in lines[1]
    assert "pieces" not in lines[2]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cupy.gemm", "numba_cuda.direct"])
@pytest.mark.parametrize("shape", [(64, 16, 256, 256), (1, 4, 4096, 2048)])
def test_arrays_that_the_pool_has_no_room_for(name, shape):
    """A result of 268 MB or more, through a pool that may hold 200 MiB."""
    import cupy

    pool = cupy.get_default_memory_pool()
    x = np.random.default_rng(14).integers(-4, 5, shape).astype(np.float32)
    k = np.random.default_rng(15).integers(-4, 5, (16, shape[1], 3, 3)).astype(np.float32)
    conv2d(x[:1, :, :32, :32], k, backend=name)  # cuBLAS has its workspace now
    expected = conv2d(x, k, padding=1, device="cpu")
    pool.free_all_blocks()
    try:
        pool.set_limit(size=pool.used_bytes() + (200 << 20))
        np.testing.assert_array_equal(conv2d(x, k, padding=1, backend=name), expected)
    finally:
        pool.set_limit(size=0)


SAME_BITS = """
import fake_cupy, numpy as np
from gpuconv import conv2d, cutting, pinned
cutting._LEAST, cutting._MOST, pinned._ALONE = 64, 256, 0
real, cuts = cutting.cut, []
rng = np.random.default_rng(0)
reflected = {"padding": 2, "padding_mode": "reflect", "stride": 2}
for shape, options in [((1, 2, 14, 5), {"padding": 1}), ((4, 2, 5, 5), reflected)]:
    x = rng.standard_normal(shape).astype("f")
    k = rng.standard_normal((2, 2, 3, 3)).astype("f")
    bits = []
    for cut in (lambda *given: cuts.append(real(*given)) or cuts[-1], lambda *given: None):
        cutting.cut = cut
        bits.append(conv2d(x, k, backend="numba_cuda.direct", **options).tobytes())
    assert bits[0] == bits[1]
assert all(len(pieces) > 1 for pieces in cuts)
cutting.cut = lambda *given: cuts.append(real(*given)) or cuts[-1]
x, k = rng.standard_normal((1, 2, 60, 5)).astype("f"), k[:, :, :1]
bits = [conv2d(x, k, backend="numba_cuda.direct").tobytes()]
pieces = len(cuts[-1])
fake_cupy.POOL.set_limit(100)
assert conv2d(x, k, backend="numba_cuda.direct").tobytes() == bits[0]
assert len(cuts[-1]) > pieces, "smaller ones, where memory is short"
print("the same")
"""


@pytest.mark.skipif(in_child, reason="a process of its own")
def test_a_kernel_of_our_own_gives_the_same_bits_in_pieces():
    """In Numba's simulator, on reals: rows of one image, and images of a batch; also where a GPU has little room."""
    found = calls.child(SAME_BITS, limit=300, GPUCONV_TEST_FAKE_CUPY="1", NUMBA_ENABLE_CUDASIM="1")
    assert found.strip() == "the same"
