"""Few channels side by side on the CPU: photographs filtered colour by colour, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuconv
from gpuconv import dispatch, request
from gpuconv.backends.numba_cpu import interleaved, runtime
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

NAME = interleaved.NAME


def numbers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Any:
    """Small integers, whose sums are exact."""
    return np.random.default_rng(seed).integers(0 if dtype == "uint8" else -9, 10, shape).astype(dtype)


def both(x: Any, k: Any, bias: Any = None, **options: Any) -> tuple[Any, Any]:
    options = {"groups": x.shape[-1], "layout": "NHWC"} | options
    return [gpuconv.conv2d(x, k, bias, **options, backend=name) for name in (NAME, "numpy.reference")]


@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8, 12, 33])
def test_every_number_of_channels(channels):
    """More and fewer than a vector has lanes, and every remainder of a row."""
    for width in range(1, 20, 3):
        x, k, bias = (
            numbers((2, 9, width, channels)),
            numbers((channels, 1, 3, 3), seed=1),
            numbers((channels,), seed=2),
        )
        y, wanted = both(x, k, bias, padding=1, activation="relu")
        assert np.array_equal(y, wanted), width


@pytest.mark.parametrize(
    "options",
    [
        *({"padding": ((1, 2), (3, 4)), "padding_mode": mode} for mode in ("reflect", "symmetric", "edge", "wrap")),
        {"padding": ((2, 0), (1, 3)), "padding_value": 5},
        {"padding": ((0, 1), (20, 0)), "dilation": (1, 4)},
        {"padding": 1, "flip": True},
        {"padding": 12, "padding_mode": "wrap"},
    ],
    ids=str,
)
def test_every_border(options):
    x, k = numbers((1, 9, 30, 3)), numbers((3, 1, 3, 3), seed=1)
    y, wanted = both(x, k, **options)
    assert np.array_equal(y, wanted)


def test_steps_of_two_rows():
    x, k = numbers((2, 19, 31, 3)), numbers((3, 1, 3, 3), seed=1)
    y, wanted = both(x, k, stride=(2, 1), padding=1)
    assert np.array_equal(y, wanted)


def test_a_photograph():
    """Bytes are read where they lie, also of three of four colours, of a turned and of a planar image."""
    whole = numbers((40, 50, 4), "uint8")
    planar = numbers((3, 40, 50), "uint8")
    kernel = np.broadcast_to(np.float32(0.25) * numbers((3, 3), seed=1), (3, 1, 3, 3))
    for x in (whole[..., :3], whole[::-1, ::2, 2::-1], planar.transpose(1, 2, 0), np.rot90(whole)[..., 1:].copy()):
        for mode in ("constant", "reflect"):
            y, wanted = both(x, kernel, padding=1, padding_mode=mode)
            assert y.dtype == np.float32
            assert np.array_equal(y, wanted)
    y, wanted = both(whole, numbers((4, 1, 3, 3), "int64", 1))
    assert y.dtype == np.int64
    assert np.array_equal(y, wanted)


def test_a_result_in_memory_of_any_form():
    x, k = numbers((2, 9, 11, 3)), numbers((3, 1, 3, 3), seed=1)
    options = {"groups": 3, "layout": "NHWC", "padding": 1}
    wanted = gpuconv.conv2d(x, k, **options, backend="numpy.reference")
    for room in (np.full((2, 9, 11, 4), np.nan, np.float32), np.full((2, 3, 9, 22), np.nan, np.float32)):
        out = room[..., :3] if room.shape[-1] == 4 else room.transpose(0, 2, 3, 1)[:, :, ::2]
        gpuconv.conv2d(x, k, **options, backend=NAME, out=out)
        assert np.array_equal(out, wanted)
        assert np.isnan(room).sum() == room.size - out.size


def test_the_same_bits_whatever_the_batch_the_blocks_and_the_threads():
    rng = np.random.default_rng(5)
    x, k = rng.standard_normal((3, 9, 90, 3)).astype(np.float32), rng.standard_normal((3, 1, 3, 3)).astype(np.float32)
    problem = Conv2dProblem.of(x.shape, k.shape, groups=3, layout="NHWC", padding=1)
    results = []
    for threads, limit in ((1, 1 << 28), (2, 1 << 28), (2, 1 << 15)):
        plan = interleaved.plan(problem, Target("cpu", None, threads), limit)
        y = np.empty((3, 9, 90, 3), np.float32)
        views = [request.view(problem, which, array) for which, array in enumerate((x, k, y))]
        interleaved.run(plan, Operands(*views[:2]), views[2])
        results.append(y)
    results.append(
        np.stack([gpuconv.conv2d(image, k, groups=3, layout="NHWC", padding=1, backend=NAME) for image in x])
    )
    assert all(np.array_equal(y, results[0]) for y in results)


def test_nan_reaches_the_windows_that_read_it():
    x, k = numbers((9, 25, 3)), numbers((3, 1, 3, 3), seed=1)
    x[4, 11, 1] = np.nan
    y, wanted = both(x, k, padding=1)
    assert np.array_equal(y, wanted, equal_nan=True)
    assert np.isnan(y).sum() == 9


def test_what_it_is_chosen_for():
    photo, kernel = np.zeros((64, 80, 3), np.uint8), np.ones((3, 1, 3, 3), np.float32)
    options = {"groups": 3, "layout": "NHWC", "padding": 1}
    for image in (photo, photo.astype(np.float32)):
        for mode in ("constant", "reflect"):
            assert gpuconv.explain(image, kernel, **options, padding_mode=mode).implementation == NAME
    wide = gpuconv.explain((64, 80, 128), (128, 1, 3, 3), groups=128, layout="NHWC", padding=1)
    assert wide.implementation == "numba_cpu.channels"
    options = {"groups": 48, "layout": "NHWC", "padding": 1}
    for mode, chosen in (("constant", "numba_cpu.channels"), ("reflect", NAME)):
        report = gpuconv.explain((64, 80, 48), (48, 1, 3, 3), **options, padding_mode=mode)
        assert report.implementation == chosen
    two = gpuconv.explain((64, 80, 3), (6, 1, 3, 3), groups=3, layout="NHWC", padding=1)
    assert two.implementation == "numba_cpu.strip"


def test_what_it_refuses():
    target = Target("cpu", None, 1)

    def reasons(x: tuple[int, ...], k: tuple[int, ...], **options: Any) -> str:
        problem = Conv2dProblem.of(x, k, **{"groups": 3, "layout": "NHWC"} | options)
        return " ".join(dispatch.implementation(NAME).unsupported(problem, target))

    x, k = (1, 30, 30, 3), (3, 1, 3, 3)
    assert reasons(x, k) == ""
    assert "NHWC" in reasons((1, 3, 30, 30), k, layout="NCHW")
    assert "stride" in reasons(x, k, stride=2)
    assert "dilation" in reasons(x, k, dilation=2)
    assert "kernel rows" in reasons(x, (3, 1, 9, 3))
    assert "channels" in reasons((1, 30, 30, 96), (96, 1, 3, 3), groups=96)
    assert "per group" in reasons((1, 30, 30, 6), (3, 2, 3, 3)) and "per group" in reasons(x, (6, 1, 3, 3))
    assert "pixels" in reasons((1, 1, 9000, 3), (3, 1, 1, 2), dilation=(1, 8000))
