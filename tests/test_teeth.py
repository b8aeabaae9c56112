"""Implementations that are wrong on purpose: each must be rejected by the checks that the library's have to pass."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import oracle
import pytest
import units
from cases import BY_NAME
from units import GUARD, Run


def store(y: np.ndarray, out: Any) -> Any:
    if out is None:
        return y
    out[...] = y
    return out


def honest(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    """The definition, rounded once."""
    found = oracle.answer(x, k, bias, **kwargs)
    with np.errstate(over="ignore", invalid="ignore"):
        return store(found.y.astype(found.dtype), out)


def changed(change: Callable[..., tuple]) -> Run:
    """The definition applied to operands or arguments that ``change`` spoilt."""

    def run(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
        x, k, bias = change(x, k, bias, kwargs)
        return honest(x, k, bias, out, **kwargs)

    return run


def argument(**replaced: Any) -> Run:
    """The definition with an argument ignored."""
    return changed(lambda x, k, bias, kwargs: (kwargs.update(replaced), (x, k, bias))[1])


def finished(spoil: Callable[[np.ndarray], Any]) -> Run:
    """The definition whose result is spoilt before it is returned; ``spoil`` may also give a new array."""

    def run(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
        y = honest(x, k, bias, None, **kwargs)
        spoilt = spoil(y)
        return store(y if spoilt is None else spoilt, out)

    return run


def partly_written(where: Any) -> Run:
    """Leaves the elements ``where`` as they were in out."""

    def run(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
        kept = out[where].copy()
        honest(x, k, bias, out, **kwargs)
        out[where] = kept
        return out

    return run


def keep_bits(array: np.ndarray, bits: int) -> np.ndarray:
    """``array`` rounded to ``bits`` bits of mantissa, as TF32 (10) and bfloat16 (7) round inputs."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    return np.ldexp(np.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent).astype(array.dtype)


def shift_padding(x: Any, k: Any, bias: Any, kwargs: dict) -> tuple:
    (top, bottom), sides = kwargs["padding"]
    kwargs["padding"] = ((top + 1, bottom - 1), sides)
    return x, k, bias


def pad_with_zero(x: Any, k: Any, bias: Any, kwargs: dict) -> tuple:
    width = kwargs.pop("padding")
    return np.pad(x, ((0, 0), (0, 0), (width, width), (width, width))), k, bias


def symmetric_same(x: Any, k: Any, bias: Any, kwargs: dict) -> tuple:
    """PyTorch's rule for stride 1, used with a stride: k // 2 on both sides."""
    kwargs["padding"] = k.shape[-1] // 2
    return x, k, bias


def swap_groups(x: Any, k: Any, bias: Any, kwargs: dict) -> tuple:
    return np.roll(x, x.shape[1] // kwargs["groups"], axis=1), k, bias


def multiplier_order(x: Any, k: Any, bias: Any, kwargs: dict) -> tuple:
    """Filter o reads channel o % C instead of o // multiplier."""
    order = [o % x.shape[1] for o in range(k.shape[0])]
    kwargs["groups"] = k.shape[0]
    return x[:, order], k, bias


def skip_stride(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    """The 1×1 shortcut that forgot the stride, cut to the right shape."""
    right = honest(x, k, bias, None, **kwargs)
    kwargs.pop("stride")
    return store(honest(x, k, bias, None, **kwargs)[:, :, : right.shape[2], : right.shape[3]], out)


def summed_in(dtype: Any) -> Run:
    """One running sum over all products, kept in ``dtype``; one image, no padding, no groups."""

    def run(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
        O, _, KH, KW = k.shape
        windows = np.lib.stride_tricks.sliding_window_view(x[0], (KH, KW), axis=(1, 2))
        OH, OW = windows.shape[1:3]
        columns = windows.transpose(1, 2, 0, 3, 4).reshape(OH * OW, -1)
        total = np.zeros((OH * OW, O), dtype)
        with np.errstate(all="ignore"):
            for column, tap in zip(columns.T, k.reshape(O, -1).T, strict=True):
                total += (column[:, None].astype(dtype) * tap.astype(dtype)).astype(dtype)
        y = total.T.reshape(1, O, OH, OW).astype(oracle.result_dtype(x.dtype, k.dtype))
        return store(y, out)

    return run


def reads_beyond(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    """Loads the element after the last and multiplies it by zero, as a kernel rounding its extents up does."""
    beyond = np.lib.stride_tricks.as_strided(x.reshape(-1)[-1:], (2,), x.strides[-1:])[1]
    y = honest(x, k, bias, None, **kwargs)
    return store(y + beyond * 0, out)


def writes_beyond(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    honest(x, k, bias, out, **kwargs)
    np.lib.stride_tricks.as_strided(out.reshape(-1)[-1:], (2,), out.strides[-1:])[1] = 0
    return out


def writes_operand(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    y = honest(x, k, bias, out, **kwargs)
    x.flat[0] = 0
    return y


def relu_first(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    y = honest(x, k, None, None, **kwargs)
    return store(y + bias[:, None, None], out)


def truncating(x: Any, k: Any, bias: Any = None, out: Any = None, **kwargs: Any) -> Any:
    """Rounds float16 toward zero."""
    found = oracle.answer(x, k, bias, **kwargs)
    y = found.y.astype(found.dtype)
    above = np.abs(y.astype(np.longdouble)) > np.abs(found.y)
    return store(np.where(above, np.nextafter(y, np.zeros_like(y)), y), out)


def test_the_definition_passes():
    for case in cases.CASES:
        for dtype in cases.DTYPES if case.smoke else ("float32",):
            if case.accepts(dtype):
                for kind in ("normal", "positive", "narrow", "wide"):
                    units.check(honest, case, dtype, kind, into=kind == "wide")


WRONG = {
    # name: (implementation, case, dtype, kind)
    "drops_last_row": (finished(lambda y: y[..., :-1, :]), "tail", "float32", "normal"),
    "repeats_last_row": (
        finished(lambda y: y.__setitem__((..., -1, slice(None)), y[..., -2, :])),
        "tail",
        "float32",
        "normal",
    ),
    "last_row_unwritten": (partly_written((..., -1, slice(None))), "tail", "float32", "normal"),
    "one_element_unwritten": (partly_written((0, 4, 3, 2)), "tail", "float32", "wide"),
    "one_integer_unwritten": (partly_written((0, 4, 3, 2)), "tail", "int16", "normal"),
    "all_unwritten": (partly_written(...), "tail", "float32", "normal"),
    "all_nan": (finished(lambda y: y.fill(np.nan)), "tail", "float32", "normal"),
    "all_zero": (finished(lambda y: y.fill(0)), "tail", "float32", "normal"),
    "stale": (finished(lambda y: np.roll(y, 1, axis=0)), "tail", "float32", "normal"),
    "one_pixel_late": (finished(lambda y: np.roll(y, 1, axis=-1)), "tail", "float32", "normal"),
    "new_array_for_out": (lambda x, k, b, out=None, **kw: honest(x, k, b, **kw), "tail", "float32", "normal"),
    "reads_beyond": (reads_beyond, "tail", "float32", "normal"),
    "writes_beyond": (writes_beyond, "tail", "float32", "normal"),
    "writes_operand": (writes_operand, "tail", "float32", "normal"),
    "wider_result": (finished(lambda y: y.astype(np.float64)), "tail", "float32", "normal"),
    "narrow_integer_result": (finished(lambda y: y.astype(np.int8)), "tail", "int8", "normal"),
    "narrow_integer_sum": (finished(lambda y: y.astype(np.int8).astype(y.dtype)), "tail", "int8", "normal"),
    "low_half_of_integers": (finished(lambda y: y.astype(np.int32).astype(y.dtype)), "tail", "int64", "normal"),
    "saturating_integers": (finished(lambda y: np.clip(y, -(2**62), 2**62)), "tail", "int64", "normal"),
    "integers_through_float64": (finished(lambda y: y.astype(np.float64).astype(y.dtype)), "tail", "int32", "normal"),
    "kernel_flipped": (argument(flip=True), "tail", "float32", "normal"),
    "kernel_not_flipped": (argument(flip=False), "flip_asymmetric", "float32", "normal"),
    "kernel_transposed": (changed(lambda x, k, b, kw: (x, k.swapaxes(2, 3), b)), "tail", "float32", "normal"),
    "conjugated": (changed(lambda x, k, b, kw: (x, k.conj(), b)), "tail", "complex64", "normal"),
    "imaginary_part_lost": (finished(lambda y: y.imag.fill(0)), "tail", "complex128", "normal"),
    "padding_off_by_one": (changed(shift_padding), "asymmetric_padding", "float32", "normal"),
    "padding_of_symmetric_same": (changed(symmetric_same), "same_stride_2", "float32", "normal"),
    "same_upper_for_lower": (argument(padding="same"), "same_lower_even_kernel", "float32", "normal"),
    "padding_value_ignored": (argument(padding_value=0), "padding_value", "float32", "normal"),
    "reflect_for_symmetric": (argument(padding_mode="reflect"), "symmetric", "float32", "normal"),
    "edge_for_reflect": (argument(padding_mode="edge"), "reflect", "float32", "normal"),
    "zeros_for_wrap": (argument(padding_mode="constant"), "wrap_grouped_strided", "float32", "normal"),
    "dilation_ignored": (argument(dilation=1), "dilated", "float32", "normal"),
    "dilation_transposed": (argument(dilation=(3, 2)), "dilated", "float32", "normal"),
    "stride_forgotten": (skip_stride, "one_by_one_stride", "float32", "normal"),
    "groups_swapped": (changed(swap_groups), "grouped", "float32", "normal"),
    "multiplier_order": (changed(multiplier_order), "depthwise_multiplier", "float32", "normal"),
    "bias_lost": (changed(lambda x, k, b, kw: (x, k, None)), "bias", "float32", "normal"),
    "bias_of_no_channels_lost": (changed(lambda x, k, b, kw: (x, k, None)), "no_channels_bias", "float32", "normal"),
    "bias_shifted": (changed(lambda x, k, b, kw: (x, k, np.roll(b, 1))), "bias", "float32", "normal"),
    "relu_lost": (argument(activation=None), "bias_relu", "float32", "normal"),
    "relu_before_bias": (relu_first, "bias_relu", "float32", "normal"),
    "channels_first_for_last": (finished(lambda y: np.moveaxis(y, -1, 1)), "nhwc", "float32", "normal"),
    "zero_point_ignored": (argument(x_zero_point=0), "zero_points", "int8", "normal"),
    "zero_in_padding_for_zero_point": (changed(pad_with_zero), "zero_points", "uint8", "normal"),
    "one_kernel_zero_point_for_all": (argument(k_zero_point=1), "zero_point_per_channel", "uint8", "normal"),
    "tf32_inputs": (
        changed(lambda x, k, b, kw: (keep_bits(x, 10), keep_bits(k, 10), b)),
        "tail",
        "float32",
        "normal",
    ),
    "tf32_inputs_exact_fill": (
        changed(lambda x, k, b, kw: (keep_bits(x, 10), keep_bits(k, 10), b)),
        "long_sum",
        "float32",
        "wide",
    ),
    "float32_for_float64": (
        changed(lambda x, k, b, kw: (keep_bits(x, 23), keep_bits(k, 23), b)),
        "long_sum",
        "float64",
        "wide",
    ),
    "result_through_float32": (finished(lambda y: y.astype(np.float32).astype(y.dtype)), "tail", "float64", "normal"),
    "result_through_bfloat16": (
        finished(lambda y: y.astype(oracle.BFLOAT16).astype(y.dtype)),
        "tail",
        "float16",
        "normal",
    ),
    "float16_result_truncated": (truncating, "tail", "float16", "normal"),
    "float16_sum": (summed_in(np.float16), "long_sum", "float16", "positive"),
    "bfloat16_sum": (summed_in(oracle.BFLOAT16), "long_sum", "bfloat16", "normal"),
    "float32_sum_for_float64": (summed_in(np.float32), "long_sum", "float64", "normal"),
}


# Their results do not fit into the right out.
MISSHAPEN = ("drops_last_row", "wider_result", "dilation_ignored", "dilation_transposed", "channels_first_for_last")


@pytest.mark.parametrize("name", WRONG)
def test_rejected(name):
    run, case, dtype, kind = WRONG[name]
    with pytest.raises(AssertionError):
        units.check(run, BY_NAME[case], dtype, kind, into=name not in MISSHAPEN)


def test_narrow_fill_is_blind_to_tf32():
    """Why there is a wide fill: 5-bit integers survive the rounding to 10 bits."""
    tf32 = changed(lambda x, k, b, kw: (keep_bits(x, 10), keep_bits(k, 10), b))
    units.check(tf32, BY_NAME["tail"], "float32", "narrow")


SPECIALS = {
    "nan_becomes_zero": (finished(lambda y: np.nan_to_num(y)), "tail", np.nan),
    "nan_spreads": (finished(lambda y: y.fill(np.nan)), "tail", np.nan),
    "nan_spreads_to_one_more": (
        finished(lambda y: np.where(np.isnan(np.roll(y, 1, axis=-1)), np.nan, y)),
        "tail",
        np.nan,
    ),
    "relu_drops_nan": (finished(lambda y: np.fmax(y, 0)), "bias_relu", np.nan),
    "inf_becomes_nan": (finished(lambda y: np.where(np.isinf(y), np.nan, y)), "tail", np.inf),
    "inf_becomes_largest": (finished(lambda y: np.nan_to_num(y)), "tail", np.inf),
    "inf_changes_sign": (finished(lambda y: np.where(np.isinf(y), -y, y)), "tail", np.inf),
}


@pytest.mark.parametrize("name", SPECIALS)
def test_rejected_with_specials(name):
    run, case, value = SPECIALS[name]
    units.check_specials(honest, BY_NAME[case], "float32", value)
    with pytest.raises(AssertionError):
        units.check_specials(run, BY_NAME[case], "float32", value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_sums_are_rejected_where_products_cancel(dtype):
    units.check_cancelling(honest, dtype)
    units.check_cancelling(summed_in(np.float32), dtype)
    with pytest.raises(AssertionError):
        units.check_cancelling(summed_in(cases.numpy_dtype(dtype)), dtype)


def test_unit_b_tells_what_unit_a_lets_through():
    """At K = 4,608 unit A passes TF32 inputs, and a running sum over everything; unit B reads both far off."""
    tf32 = changed(lambda x, k, b, kw: (keep_bits(x, 10), keep_bits(k, 10), b))
    assert units.statistic(tf32, 512, "float32", "normal") > 1000
    assert units.statistic(summed_in(np.float32), 512, "float32", "positive") > 150
    assert units.statistic(honest, 512, "float32", "normal") <= 1
    assert units.statistic(honest, 512, "float32", "positive") <= 150


def test_a_running_sum_stays_within_the_bound():
    """The bound is a theorem for any order: it must not reject the plainest one."""
    for kind in ("normal", "positive"):
        units.statistic(summed_in(np.float32), 64, "float32", kind)
        units.statistic(summed_in(np.float64), 64, "float64", kind)


def test_guards_hold_what_they_should():
    guarded = units.Guarded(np.arange(6, dtype=np.float32).reshape(2, 3))
    around = guarded.array.base
    while around.base is not None:
        around = around.base
    assert np.all(np.isnan(around[:GUARD]))
    assert np.all(np.isnan(around[-GUARD:]))
    guarded.check_whole("untouched")
    guarded.array[0, 0] = 1
    guarded.check_edges("written inside")
    with pytest.raises(AssertionError):
        guarded.check_whole("written inside")


def test_thinned_fills_have_exact_sums():
    for case in cases.CASES:
        for dtype in (*cases.FLOATS, *cases.COMPLEX):
            if case.accepts(dtype):
                for kind in ("narrow", "wide"):
                    *_, answer = units.posed(case, dtype, kind)
                    rounded = answer.y.astype(answer.dtype).astype(answer.y.dtype)
                    assert np.array_equal(rounded, answer.y), f"{case.name} {dtype} {kind}"


# ---- comparisons that check nothing

COMPARISONS = {"allclose", "array_equal", "array_equiv", "isclose"}
ORDERED = (ast.Gt, ast.GtE, ast.Lt, ast.LtE)


def toothless(source: str) -> list[int]:
    """The lines where a comparison goes unasserted, or passes when what it compares is NaN."""
    found = []
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Compare) or getattr(getattr(value, "func", None), "attr", None) in COMPARISONS:
            found.append(node.lineno)
        test = node.test if isinstance(node, ast.Assert) else None
        if isinstance(test, ast.UnaryOp) and isinstance(test.operand, ast.Compare):
            found += [node.lineno] if isinstance(test.operand.ops[0], ORDERED) else []
        if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ORDERED):
            first = node.body[0]
            fails = isinstance(first, ast.Expr) and getattr(getattr(first.value, "func", None), "attr", None) == "fail"
            raised = first.exc if isinstance(first, ast.Raise) else None
            fails |= getattr(getattr(raised, "func", raised), "id", None) == "AssertionError"
            found += [node.lineno] if fails else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "a == b", "np.allclose(a, b)", "numpy.testing.x; np.array_equal(a, b)", "assert not error > limit",
        "if error > limit:\n    pytest.fail('')", "if error >= limit:\n    raise AssertionError",
        "if error > limit:\n    raise AssertionError('far off')",
    ],
)  # fmt: skip
def test_toothless_comparisons_are_found(source):
    assert len(toothless(source)) == 1


def test_no_comparison_here_goes_unasserted_or_lets_nan_pass():
    found = {path.name: toothless(path.read_text()) for path in Path(__file__).parent.glob("*.py")}
    assert len(found) > 20
    assert not {name: lines for name, lines in found.items() if lines}
    assert toothless("assert error <= limit") == []
