"""Bugs that other convolution libraries shipped: each is a case that every implementation here has to pass.

Sizes and offsets beyond 2^31 are in ``test_large_extents.py``, gradients and transposes in
``test_known_bugs_family.py``, a comparison that asserts nothing is what ``test_teeth.py`` is about.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import units
from cases import BY_NAME, Case
from running import (
    FORWARD,
    SIMULATOR_MARKS,
    every_implementation,
    gpu_arrays,
    home,
    runner,
    share,
    simulated,
    skip_in_simulator,
    skip_unless_usable,
)

import gpuconv
from gpuconv import conv2d, dispatch, explain
from gpuconv.backends import cupy_gemm

pytestmark = SIMULATOR_MARKS

TESTS = Path(__file__).parent


def normal(x_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(11)
    return rng.standard_normal(x_shape).astype(np.float32), rng.standard_normal(k_shape).astype(np.float32)


def refused(*operands: Any, says: tuple[str, ...] = (), **arguments: Any) -> None:
    """conv2d and explain refuse the call, whatever is asked to compute it."""
    for function, backend in itertools.product((conv2d, explain), (None, *FORWARD)):
        with pytest.raises(ValueError, match=f"^{function.__name__}: ") as refusal:
            function(*operands, backend=backend, **arguments)
        assert all(text in str(refusal.value) for text in says), refusal.value


# ---- memory


SIGNS = list(itertools.product((1, -1), repeat=4))


@every_implementation
def test_negative_strides_of_x_and_k_together(name):
    """Read out of bounds elsewhere. Every sign of x beside every sign of k, each array between guards of NaN."""
    run, xp = runner(name), home(name)
    case = Case("signs", (2, 3, 4, 3), (2, 3, 2, 3), {"padding": ((1, 0), (0, 1))})
    x, k, _, answer = units.posed(case, "float32", "wide")
    for x_signs, k_signs in share(name, itertools.product(SIGNS, SIGNS), 61):
        image, _ = units.arranged(x, (0, 1, 2, 3), x_signs, 1, xp)
        kernel, _ = units.arranged(k, (0, 1, 2, 3), k_signs, 1, xp)
        units.assert_exact(run(image, kernel, **case.kwargs), answer, f"{x_signs} and {k_signs}")


@every_implementation
def test_strided_and_broadcast_operands_are_not_taken_for_contiguous(name):
    run = runner(name)
    x, k = normal((2, 3, 5, 6), (4, 3, 4, 4))
    overlapping = np.lib.stride_tricks.sliding_window_view(x[0], 2, axis=0).transpose(0, 3, 1, 2)
    views = {
        "k[:, :, ::2, ::2]": (x, k[:, :, ::2, ::2]),
        "k of one filter": (x, np.broadcast_to(k[:1], k.shape)),
        "k[:, :, ::-2, 1::2]": (x, k[:, :, ::-2, 1::2]),
        "k of one row": (x, np.broadcast_to(k[..., :1, :], k.shape)),
        "x of one image": (np.broadcast_to(x[:1], x.shape), k),
        "k of one number": (x, np.broadcast_to(k[0, 0, 0, 0], (4, 3, 2, 2))),
        "overlapping images": (overlapping, k[:, :2, :2, :2]),
        "x of one pixel": (np.broadcast_to(x[:, :, :1, :1], x.shape), k),
        "Fortran order": (np.asfortranarray(x), np.asfortranarray(k)),
        "x of one number": (np.broadcast_to(np.float32(3), x.shape), k),
        "x and k of the same memory": (x[:, :, :4, :4], x[:, :, :4, :4]),
        "1×1 of a larger kernel": (x, k[:, :, 1:2, 2:3]),
        "1×1 of one filter": (x, np.broadcast_to(k[:1, :, :1, :1], (4, 3, 1, 1))),
        "read-only": (x.view(), k.view()),
    }
    for array in views["read-only"]:
        array.flags.writeable = False
    for text, (image, kernel) in share(name, views.items(), 2):
        units.assert_close(run(image, kernel), oracle.answer(image.copy(), kernel.copy()), text)


WIDTHS = (1, 2, 3, 5, 7, 9, 15, 17, 31, 33)


@pytest.mark.parametrize("kernel", [1, 2])
@every_implementation
def test_channel_counts_that_divide_no_tile_read_no_garbage(name, kernel):
    """Rounded up, they read what lies behind the array: here NaN, on every side, and out is NaN before."""
    run, xp = runner(name), home(name)
    for C, O in share(name, itertools.product(WIDTHS, WIDTHS), 23):
        case = Case(f"{C} to {O} channels", (1, C, 3, 3), (O, C, kernel, kernel), bias=True)
        units.check(run, case, "float32", "wide", into=True, xp=xp)
        if C == O and not simulated(name):
            case = Case(f"{C} depthwise", (1, C, 3, 3), (C, 1, kernel, kernel), {"groups": C, "layout": "NCHW"})
            units.check(run, case, "float32", "wide", into=True, xp=xp)


# ---- geometry


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@every_implementation
def test_one_by_one_kernel_keeps_the_stride(name, layout, batch):
    run = runner(name)
    ramp = np.arange(1, 10, dtype=np.float32).reshape(3, 3)
    if batch is None:
        assert units.to_host(run(ramp, [[1]], stride=2)).tolist() == [[1, 3], [7, 9]]
        return
    x = np.stack([ramp + 100 * n for n in range(batch)])
    x = x[:, None] if layout == "NCHW" else x[..., None]
    y = units.to_host(run(x, np.ones((1, 1, 1, 1), np.float32), stride=2, layout=layout))
    assert y.reshape(batch, 4).tolist() == [[100 * n + v for v in (1, 3, 7, 9)] for n in range(batch)]


def test_a_kernel_larger_than_the_padded_input_gives_no_phantom_pixel():
    """k = 3 with dilation 2 spans 5 of 4 pixels; rounding toward zero called the result 1×1."""
    refused(np.ones((4, 4)), np.ones((3, 3)), dilation=2, stride=2, says=("(5×5)", "(4×4)"))
    for n, k, d, s, p in itertools.product((1, 2, 4), (2, 3, 5), (1, 2, 3), (1, 2, 7), (0, 1)):
        reach, padded = d * (k - 1) + 1, n + 2 * p
        arguments = {"dilation": d, "stride": s, "padding": p}
        if reach > padded:
            with pytest.raises(ValueError, match=f"{reach}×{reach}.*{padded}×{padded}"):
                conv2d(np.ones((n, n)), np.ones((k, k)), **arguments)
        else:
            assert conv2d(np.ones((n, n)), np.ones((k, k)), **arguments).shape == ((padded - reach) // s + 1,) * 2


@every_implementation
def test_dilation_of_a_one_by_one_kernel_changes_nothing(name):
    """A dilated extent is d·(k - 1) + 1, not d·k."""
    run = runner(name)
    x, k = normal((1, 2, 4, 3), (2, 2, 1, 1))
    plain = units.to_host(run(x, k))
    for dilation in (5, (3, 1), cases.HUGE):
        y = units.to_host(run(x, k, dilation=dilation))
        assert y.shape == (1, 2, 4, 3)
        assert np.array_equal(y, plain)


@every_implementation
def test_padding_of_100_on_a_2_by_2_input(name):
    skip_in_simulator(name)
    run = runner(name)
    y = units.to_host(run([[1.0, 2.0], [3.0, 4.0]], np.ones((1, 1)), padding=100))
    wanted = np.zeros((202, 202))
    wanted[100:102, 100:102] = [[1, 2], [3, 4]]
    assert np.array_equal(y, wanted)
    x, k = normal((2, 2), (3, 3))
    for mode in ("constant", "reflect", "symmetric", "edge", "wrap"):
        kwargs = {"padding": ((100, 97), (98, 100)), "padding_mode": mode, "stride": (13, 11)}
        units.assert_close(run(x, k, **kwargs), oracle.answer(x, k, **kwargs), mode)


@pytest.mark.parametrize("value", [2**31, 2**55, 2**62, 2**63, 2**64 + 1])
@pytest.mark.parametrize("argument", ["stride", "padding", "dilation"])
def test_sizes_that_overflow_are_refused(argument, value):
    for form in (value, (1, value), (value, 1)):
        refused(np.ones((5, 5)), np.ones((1, 1)), **{argument: form}, says=(argument, str(value), str(2**31)))
    if argument == "padding":
        refused(np.ones((5, 5)), np.ones((3, 3)), padding=((0, 0), (0, value)), says=("padding[1][1]",))
        return
    with pytest.raises(ValueError, match=argument):
        gpuconv.output_size(5, 1, **{argument: value})


@pytest.mark.parametrize(
    ("shape", "k_shape", "arguments", "says"),
    [
        ((1, 2, 4, 4), (2, 2, 3, 3), {"groups": 0}, "groups"),
        ((1, 0, 4, 4), (2, 0, 3, 3), {"groups": 0}, "groups"),
        ((1, 2, 4, 4), (2, 2, 3, 3), {"groups": -1}, "groups"),
        ((1, 2, 4, 4), (2, 2, 0, 3), {}, "0 rows"),
        ((1, 2, 4, 4), (2, 2, 3, 0), {"padding": 1}, "0 columns"),
        ((4, 4), (0, 0), {}, "0 rows"),
        ((1, 2, 4, 4), (0, 2, 3, 3), {}, "0 output channels"),
        ((4, 4), (0, 3, 3), {}, "0 output channels"),
        ((0, 2, 4, 4), (0, 2, 3, 3), {}, "0 output channels"),
        ((1, 2, 4, 4), (2, 2, 3, 3), {"stride": 0}, "stride"),
        ((1, 2, 4, 4), (2, 2, 3, 3), {"dilation": (1, 0)}, "dilation"),
    ],
)
def test_nothing_is_divided_by_zero(shape, k_shape, arguments, says, monkeypatch):
    for name in FORWARD:
        monkeypatch.setattr(dispatch.implementation(name), "run", None)  # before any launch
    refused(np.ones(shape, np.float32), np.ones(k_shape, np.float32), **arguments, says=(says,))


@every_implementation
def test_an_empty_batch_has_an_empty_result(name):
    run, xp = runner(name), home(name)
    k = np.ones((3, 2, 2, 2), np.float32)
    for dtype, (layout, shape, wanted) in itertools.product(
        ("float32", "float16", "int8", "complex64"),
        (("NCHW", (0, 2, 4, 5), (0, 3, 3, 4)), ("NHWC", (0, 4, 5, 2), (0, 3, 4, 3))),
    ):
        x = xp.asarray(np.zeros(shape, dtype))
        y = run(x, k.astype(dtype), np.ones(3, np.int32), layout=layout)
        assert y.shape == wanted
        assert run(x, k.astype(dtype), layout=layout, out=y) is y
        assert run(x, k.astype(dtype), layout=layout, padding=2, padding_mode="wrap").shape[0] == 0


@every_implementation
def test_no_channels_leave_the_bias(name):
    run = runner(name)
    bias = np.array([2, -3, 0], np.int8)
    for dtype in ("float32", "float16", "bfloat16", "int8", "int64", "complex128"):
        numpy_type = cases.numpy_dtype(dtype)
        x, k = np.zeros((2, 0, 3, 4), numpy_type), np.zeros((3, 0, 2, 2), numpy_type)
        out = np.full((2, 3, 2, 3), 77, oracle.result_dtype(numpy_type, numpy_type))
        run(x, k, bias, out=out)
        assert np.all(out == bias[:, None, None])
        assert np.all(units.to_host(run(x, k, bias, padding=1)) == bias[:, None, None])
        assert not np.any(units.to_host(run(x, k)))
        if dtype != "complex128":
            assert np.all(units.to_host(run(x, k, bias, activation="relu")) == np.maximum(bias, 0)[:, None, None])
    y = units.to_host(run(np.zeros((1, 0, 1, 1)), np.zeros((1, 0, 1, 1)), np.array([np.nan]), activation="relu"))
    assert np.isnan(y).all(), "NaN passes through relu"


@every_implementation
def test_same_with_a_stride_pads_the_end(name):
    """H = 4, k = 3, stride 2 takes one row after the input; a row on each side gives the same shape, shifted."""
    run = runner(name)
    x = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    k = np.array([[1, 2, 4], [8, 16, 32], [64, 128, 256]], np.float32)
    padded = np.pad(x, ((0, 1), (0, 1)))
    wanted = [[float((padded[i : i + 3, j : j + 3] * k).sum()) for j in (0, 2)] for i in (0, 2)]
    assert units.to_host(run(x, k, stride=2, padding="same")).tolist() == wanted
    assert units.to_host(run(x, k, stride=2, padding="same_upper")).tolist() == wanted
    padded = np.pad(x, ((1, 0), (1, 0)))
    wanted = [[float((padded[i : i + 3, j : j + 3] * k).sum()) for j in (0, 2)] for i in (0, 2)]
    assert units.to_host(run(x, k, stride=2, padding="same_lower")).tolist() == wanted


# ---- numbers


@pytest.mark.parametrize("channels", [3, 128, 300])
@every_implementation
def test_inf_stays_inf(name, channels):
    """Not NaN, as where a sum is split and one part's Inf meets another's."""
    if channels > 3:
        skip_in_simulator(name)
    run = runner(name)
    x, k = np.ones((1, channels, 4, 4), np.float32), np.ones((2, channels, 3, 3), np.float32)
    for channel, value in itertools.product((0, channels // 2, channels - 1), (np.inf, -np.inf)):
        x[...] = 1
        x[0, channel, 0, 1] = value
        y = units.to_host(run(x, k))
        assert np.all(y[0, :, 0] == value), f"channel {channel}: {y[0, :, 0]}, not {value}"
        assert np.all(y[0, :, 1] == 9 * channels)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_implementation
def test_16_bit_sums_are_kept_in_float32(name, dtype):
    """Not in 16 bits, nor any part of them: over channels, rows, columns and all three."""
    run = runner(name)
    units.check_cancelling(run, dtype)
    for shape in share(name, ((1, 1, 599), (1, 599, 1), (67, 3, 3), (5, 11, 11)), 4):
        x = np.full((1, *shape), 16, cases.numpy_dtype(dtype))
        k = np.where(np.arange(x.size) < (x.size + 1) // 2, 16, -16).reshape(x.shape).astype(x.dtype)
        assert float(units.to_host(run(x, k)).item()) == 256, shape


TF32 = {"CUPY_TF32": "1", "NVIDIA_TF32_OVERRIDE": "1"}


@pytest.mark.parametrize(("precision", "wanted"), [("highest", 69), ("high", 69), ("medium", 77)])
def test_tf32_is_asked_for_by_the_precision_alone(precision, wanted, monkeypatch):
    """69 is cuBLAS's pedantic float32, 77 its TF32; no environment variable takes part."""
    a, b, out = np.ones((1, 4, 6), "f"), np.ones((2, 1, 6, 5), "f"), np.ones((2, 1, 4, 5), "f")
    for environment in ({}, TF32):
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        assert {call[-2] for call in cupy_gemm.gemm_calls(precision, a, b, out)} == {wanted}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in FORWARD if not name.startswith("numpy")])
def test_tf32_is_not_taken_from_the_environment(name):
    """The accuracy tests in a process that the variables were set for."""
    skip_unless_usable(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_implementations.py")]
    command += ["-k", f"{name} and (unit_b or test_agrees and (long_sum or tail) and float32)"]
    child = subprocess.run(command, env=os.environ | TF32, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]
    assert " passed" in child.stdout and " skipped" not in child.stdout


# ---- what is kept between calls


def variations() -> list[dict[str, Any]]:
    """A call, and that call with one argument changed: all on the same arrays."""
    rng = np.random.default_rng(3)
    x, k = rng.integers(-4, 5, (1, 4, 6, 4)).astype(np.int8), rng.integers(-4, 5, (4, 4, 4, 4)).astype(np.int8)
    base = {"x": x, "k": k, "padding": 2, "padding_mode": "constant", "padding_value": 0}
    changes: list[dict[str, Any]] = [
        {}, {"stride": 2}, {"stride": (1, 2)}, {"stride": (2, 1)}, {"dilation": 2}, {"dilation": (1, 2)},
        {"padding": 3}, {"padding": (2, 3)}, {"padding": ((2, 1), (2, 2))}, {"padding": ((1, 2), (2, 2))},
        {"padding_mode": "reflect"}, {"padding_mode": "edge"}, {"padding_mode": "wrap"}, {"padding_mode": "symmetric"},
        {"padding_value": 1}, {"padding_value": -2}, {"flip": True}, {"layout": "NHWC"}, {"kernel_layout": "HWIO"},
        {"kernel_layout": "OHWI"}, {"activation": "relu"}, {"x_zero_point": 3}, {"k_zero_point": 2},
        {"k_zero_point": [1, 2, 3, 4]}, {"bias": np.array([1, -2, 3, -4])}, {"dtype": "float32"}, {"dtype": "float64"},
        {"dtype": "int64"}, {"precision": "high"}, {"x": x.astype(np.int16)}, {"k": k.astype(np.float32)},
        {"groups": 2, "k": k[:, :2]}, {"groups": 4, "k": k[:, :1]}, {"k": k[:2]}, {"k": k[:, :, :3]},
        {"x": x[:, :, 1:]}, {"x": np.concatenate([x, x])},
    ]  # fmt: skip
    return [base | change for change in changes]


@every_implementation
def test_no_plan_is_used_for_another_problem(name):
    """The key of what is kept holds every argument: each call right after every kind of other, forwards and back."""
    skip_in_simulator(name)
    run = runner(name)
    gpuconv.clear()
    calls = []
    for call in variations():
        given = {key: value for key, value in call.items() if key != "precision"}
        dtype = np.dtype(given["dtype"]) if "dtype" in given else None
        calls.append((call, oracle.answer(**given | {"dtype": dtype})))
    for call, answer in (*calls, *calls[::-1]):
        units.assert_close(run(**call), answer, str(call.keys()))


def test_every_argument_is_in_the_key():
    """But for the values of k's zero points, which are operands."""
    calls = variations()
    problems = [explain(**call).problem for call in calls if not isinstance(call.get("k_zero_point"), list)]
    assert len(set(problems)) == len({str(problem) for problem in problems}) == len(problems) == len(calls) - 1
    keys = [{}, {"backend": "numpy"}, {"backend": "numpy.reference"}, {"workspace_limit": 10**6}, {"device": "cpu"}]
    gpuconv.clear()
    for arguments in keys:
        conv2d(**calls[0], **arguments)
    # device="cpu" is where x is: the same target
    assert dispatch.choose.cache_info().misses == dispatch.choose.cache_info().currsize == len(keys) - 1


# ---- memory that runs out


@every_implementation
def test_the_call_after_a_memory_error_is_right(name):
    run = runner(name)
    case = BY_NAME["nhwc_hwio_strided"]
    x, k, _, answer = units.posed(case, "float32", "wide")
    for _ in range(3):
        with pytest.raises(MemoryError, match=r"conv2d: .*\d+ bytes"):
            run(x, k, workspace_limit=1, **case.kwargs)
        units.assert_exact(run(x, k, **case.kwargs), answer)


@pytest.mark.parametrize("name", [None, *dispatch.serving("forward", "cuda")])
def test_a_pool_smaller_than_the_columns(name):
    """The columns take 17 MB, and the pool holds half of that: smaller chunks, or another implementation."""
    xp = gpu_arrays()
    if xp is None or (name and dispatch.implementation(name).unavailable() is not None):
        pytest.skip("CuPy has no GPU here")
    case = Case("pool", (4, 32, 64, 64), (32, 32, 3, 3))
    x, k, _ = cases.fill(case, "float32", "wide")
    given = [xp.asarray(x), xp.asarray(k), None]
    kwargs = {"backend": name} if name else {"device": "cuda"}
    wanted = units.to_host(conv2d(x, k, backend="numpy"))
    pool = xp.get_default_memory_pool()
    gpuconv.clear()
    pool.set_limit(size=pool.total_bytes() + wanted.nbytes + 8 * 2**20)
    try:
        limited = units.to_host(conv2d(*given, **kwargs))
    finally:
        pool.set_limit(size=0)
    assert np.array_equal(limited, wanted)
    assert np.array_equal(units.to_host(conv2d(*given, **kwargs)), wanted), "the next call"


# ---- other libraries' arrays


class Interface:
    """Nothing but an array interface, with some of its entries replaced."""

    def __init__(self, owner: Any, name: str = "__array_interface__", **entries: Any) -> None:
        self.owner = owner
        setattr(self, name, getattr(owner, name) | entries)


def test_zero_size_read_only_and_masked_arrays():
    x, k = normal((2, 3, 4, 4), (2, 3, 2, 2))
    wanted = conv2d(x, k)
    assert conv2d(Interface(x[:0], data=(0, False)), k).shape == (0, 2, 3, 3)
    assert np.array_equal(conv2d(Interface(x, strides=None), Interface(k, strides=None)), wanted)
    frozen = Interface(x, data=(x.ctypes.data, True))
    assert np.array_equal(conv2d(frozen, k), wanted)
    for out in (Interface(wanted, data=(wanted.ctypes.data, True)), np.broadcast_to(wanted, wanted.shape)):
        with pytest.raises((TypeError, ValueError), match=r"^conv2d: out "):
            conv2d(x, k, out=out)
    for operands in ((np.ma.masked_less(x, 0), k), (x, np.ma.masked_array(k))):
        with pytest.raises(TypeError, match=r"^conv2d: [xk] is a masked array"):
            conv2d(*operands)


@pytest.mark.skipif(gpu_arrays() is not None, reason="CuPy is usable here")
def test_a_cuda_array_without_cupy_is_refused_by_name():
    entries = {"shape": (4, 4), "typestr": "<f4", "data": (0, False), "version": 3}

    class OnGpu:
        __cuda_array_interface__ = entries

    for operands in ((OnGpu(), np.ones((2, 2))), (np.ones((4, 4)), OnGpu())):
        with pytest.raises(TypeError, match=r"^conv2d: [xk] lives on a GPU.*CuPy"):
            conv2d(*operands)


@pytest.mark.gpu
def test_zero_size_read_only_and_masked_cuda_arrays():
    xp, name = gpu_arrays(), "__cuda_array_interface__"
    x, k = (xp.asarray(array) for array in normal((2, 3, 4, 4), (2, 3, 2, 2)))
    wanted = conv2d(x, k)
    assert conv2d(Interface(x[:0], name, data=(0, False), strides=None), k).shape == (0, 2, 3, 3)
    stepped = Interface(x[:0], name, data=(0, False), strides=x.strides)
    try:
        assert conv2d(stepped, k).shape == (0, 2, 3, 3)
    except (TypeError, ValueError) as refusal:
        assert str(refusal).startswith("conv2d: x ")
    assert bool((conv2d(Interface(x, name, strides=None), Interface(k, name, strides=None)) == wanted).all())
    turned = conv2d(Interface(x.transpose(0, 1, 3, 2), name), k.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert float(abs(turned - wanted).max()) < 1e-4
    assert bool((conv2d(Interface(x, name, data=(x.data.ptr, True)), k) == wanted).all())
    with pytest.raises(ValueError, match=r"^conv2d: out is read-only"):
        conv2d(x, k, out=Interface(wanted, name, data=(wanted.data.ptr, True)))
    masked = Interface(x, name, mask=Interface(xp.ones(x.shape, bool), name))
    with pytest.raises((TypeError, ValueError), match=r"^conv2d: x "):
        conv2d(masked, k)
