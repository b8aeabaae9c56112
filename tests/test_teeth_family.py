"""Relatives of conv2d that are wrong on purpose: each must be rejected by the checks that the library's pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import family
import numpy as np
import oracle
import pytest
import units
from family import FamilyCase
from test_family import cancelling, read
from test_teeth import store
from units import Run

Wrong = Callable[[FamilyCase], Run]


def honest(case: FamilyCase) -> Run:
    """The definition, rounded once."""
    return spoilt_result(lambda y: y)(case)


def spoilt_result(spoil: Callable[[np.ndarray], Any]) -> Wrong:
    """The definition whose result is spoilt before it is returned; ``spoil`` may also give a new array."""

    def made(case: FamilyCase) -> Run:
        def run(*arguments: Any, out: Any = None, **kwargs: Any) -> Any:
            found = getattr(family.oracle_family, case.call)(*arguments, **kwargs)
            with np.errstate(over="ignore", invalid="ignore"):
                y = found.y.astype(found.dtype)
                spoilt = spoil(y)
            return store(y if spoilt is None else spoilt, out)

        return run

    return made


def spoilt_call(change: Callable[..., tuple]) -> Wrong:
    """The definition of arguments that ``change`` spoilt."""

    def made(case: FamilyCase) -> Run:
        def run(*arguments: Any, out: Any = None, **kwargs: Any) -> Any:
            changed = change(*arguments, options=kwargs)
            return honest(case)(*changed, out=out, **kwargs)

        return run

    return made


def option(**replaced: Any) -> Wrong:
    """The definition with an option ignored."""

    def change(*arguments: Any, options: dict[str, Any]) -> tuple:
        options.update(replaced)
        return arguments

    return spoilt_call(change)


def operand(which: int, change: Callable[[np.ndarray], np.ndarray]) -> Wrong:
    """The definition of an operand that ``change`` spoilt."""
    return spoilt_call(lambda *given, options: (*given[:which], change(given[which]), *given[which + 1 :]))


def partly_written(where: Any) -> Wrong:
    """Leaves the elements ``where`` as they were in out."""

    def made(case: FamilyCase) -> Run:
        def run(*arguments: Any, out: Any = None, **kwargs: Any) -> Any:
            kept = out[where].copy()
            honest(case)(*arguments, out=out, **kwargs)
            out[where] = kept
            return out

        return run

    return made


def output_padding_at_the_start(*given: Any, options: dict[str, Any]) -> tuple:
    """The output padding given to the start instead of the end."""
    more, pad = options.pop("output_padding"), options["padding"]
    options["padding"] = ((pad - more, pad),) * 2
    return given


def phase(by: int) -> Wrong:
    """Every product one pixel from where it belongs."""
    return spoilt_result(lambda y: np.roll(y, by, axis=-1))


def last_row_of_the_gradient_ignored(*given: Any, options: dict[str, Any]) -> tuple:
    x, size, y = given
    y = y.copy()
    y[:, :, -1] = 0
    return x, size, y


def zero_stuffed(*arguments: Any, out: Any = None, stride: Any = 1, **kwargs: Any) -> Any:
    """The transpose as a convolution of x with zeros between its pixels, which a NaN among the weights multiplies."""
    x, k, *bias = arguments
    s = oracle.pair(stride)
    more = oracle.pair(kwargs.pop("output_padding", 0))
    N, C, H, W = x.shape
    stuffed = np.zeros((N, C, (H - 1) * s[0] + 1, (W - 1) * s[1] + 1), x.dtype)
    stuffed[:, :, :: s[0], :: s[1]] = x
    pads = oracle.resolve_padding(kwargs.pop("padding", 0), None, None, None, None)
    d, taps = oracle.pair(kwargs.pop("dilation", 1)), k.shape[2:]
    around = [(d[a] * (taps[a] - 1) - pads[a][0], d[a] * (taps[a] - 1) - pads[a][1] + more[a]) for a in (0, 1)]
    groups = kwargs.get("groups", 1)
    turned = k.reshape(groups, C // groups, -1, *taps).swapaxes(1, 2).reshape(-1, C // groups, *taps)
    found = oracle.conv2d(stuffed, turned, *bias, 1, around, d, groups, flip=True)
    return store(found.y.astype(found.dtype), out)


def summed_in(dtype: Any) -> Wrong:
    """One running sum per result, kept in ``dtype``: whole problems without padding, strides or groups."""

    def made(case: FamilyCase) -> Run:
        def run(*arguments: Any, out: Any = None, **kwargs: Any) -> Any:
            if case.call == "fold":
                columns, (H, W), kernel = arguments
                KH, KW = oracle.pair(kernel)
                windows = columns.reshape(*columns.shape[:-2], -1, KH, KW, H - KH + 1, W - KW + 1)
                total = np.zeros((*windows.shape[:-4], H, W), dtype)
                with np.errstate(all="ignore"):
                    for p in range(KH):
                        for q in range(KW):
                            total[..., p : p + H - KH + 1, q : q + W - KW + 1] += windows[..., p, q, :, :].astype(dtype)
                    return store(total.astype(columns.dtype), out)
            if case.call == "conv2d_weight":
                x, size, y = arguments
                # terms first: every window of x, and what it gave to
                taps = np.lib.stride_tricks.sliding_window_view(x, y.shape[2:], (2, 3))
                terms = np.einsum("ncpqij,noij->nijocpq", taps.astype(np.float64), y.astype(np.float64))
                terms = terms.reshape(-1, *size)
            else:
                k, y = arguments[1:] if case.call == "conv2d_input" else arguments[1::-1]
                KH, KW = k.shape[2:]
                around = np.pad(y, ((0, 0), (0, 0), (KH - 1, KH - 1), (KW - 1, KW - 1)))
                windows = np.lib.stride_tricks.sliding_window_view(around, (KH, KW), (2, 3))
                turned = k[:, :, ::-1, ::-1].astype(np.float64)
                terms = np.einsum("noijpq,ocpq->opqncij", windows.astype(np.float64), turned)
                terms = terms.reshape(-1, *terms.shape[3:])
            total = np.zeros(terms.shape[1:], dtype)
            with np.errstate(all="ignore"):  # half precision overflows
                for term in terms:
                    total += term.astype(dtype)
                return store(total.astype(y.dtype), out)

        return run

    return made


def test_the_definitions_pass():
    for case in family.FAMILY:
        for dtype in cases.DTYPES if case.smoke else ("float32",):
            if case.accepts(dtype):
                for kind in ("normal", "positive", "narrow", "wide") if case.smoke else ("normal", "wide"):
                    family.check(honest(case), case, dtype, kind, into=kind == "wide")


INPUT, WEIGHT, TRANSPOSE = "conv2d_input", "conv2d_weight", "conv_transpose2d"
WRONG: dict[str, tuple[Wrong, str, str, str, str]] = {
    # name: (implementation, call, case, dtype, kind)
    "input_conjugate_forgotten": (operand(1, np.conj), INPUT, "tail", "complex64", "normal"),
    "weight_conjugate_forgotten": (operand(0, np.conj), WEIGHT, "tail", "complex64", "normal"),
    "weight_conjugates_the_gradient": (
        lambda case: spoilt_call(lambda x, size, y, options: (x.conj(), size, y.conj()))(case),
        WEIGHT, "tail", "complex128", "normal",
    ),
    "transpose_conjugated": (operand(1, np.conj), TRANSPOSE, "doubling", "complex64", "normal"),
    "kernel_not_flipped": (operand(1, lambda k: k[:, :, ::-1, ::-1]), INPUT, "tail", "float32", "normal"),
    "flip_ignored_by_input": (option(flip=False), INPUT, "flip_asymmetric", "float32", "normal"),
    "flip_ignored_by_weight": (option(flip=False), WEIGHT, "flip_stride", "float32", "normal"),
    "transpose_flipped": (operand(1, lambda k: k[:, :, ::-1, ::-1]), TRANSPOSE, "doubling", "float32", "normal"),
    "kernel_transposed": (operand(1, lambda k: k.swapaxes(2, 3)), INPUT, "tail", "float32", "normal"),
    "output_padding_at_the_start": (spoilt_call(output_padding_at_the_start), TRANSPOSE, "output_padding", "float32",
                                    "normal"),
    "output_padding_forgotten": (option(output_padding=0), TRANSPOSE, "output_padding", "float32", "normal"),
    "output_padding_unwritten": (partly_written((..., -1)), TRANSPOSE, "output_padding_of_bias", "float32", "normal"),
    "bias_only_where_products_are": (
        spoilt_result(lambda y: y.__setitem__((..., slice(-2, None)), 0)),
        TRANSPOSE, "output_padding_of_bias", "float32", "normal",
    ),
    "bias_lost": (spoilt_call(lambda x, k, b, options: (x, k)), TRANSPOSE, "bias_relu", "float32", "normal"),
    "bias_of_no_channels_lost": (spoilt_call(lambda x, k, b, options: (x, k)), TRANSPOSE, "no_channels_bias", "float32",
                                 "normal"),
    "relu_lost": (option(activation=None), TRANSPOSE, "bias_relu", "float32", "normal"),
    "phase_too_late": (phase(1), INPUT, "rows_between_windows", "float32", "normal"),
    "phase_too_early": (phase(-1), INPUT, "stride_2_dilation_3_padded", "float32", "normal"),
    "phase_of_a_transpose": (phase(1), TRANSPOSE, "doubling", "float32", "normal"),
    "padding_off_by_one": (option(padding=((0, 3), (1, 2))), INPUT, "asymmetric_padding", "float32", "normal"),
    "crop_off_by_one": (option(padding=((2, 3), (0, 3))), TRANSPOSE, "output_padding_crop", "float32", "normal"),
    "stride_transposed": (option(stride=(4, 3)), INPUT, "rows_between_windows", "float32", "normal"),
    "dilation_ignored": (option(dilation=1), WEIGHT, "dilated", "float32", "normal"),
    "groups_shuffled": (operand(1, lambda k: np.roll(k, 2, axis=0)), INPUT, "grouped", "float32", "normal"),
    "weight_groups_shuffled": (operand(0, lambda x: np.roll(x, 3, axis=1)), WEIGHT, "grouped", "float32", "normal"),
    "last_row_ignored": (spoilt_call(last_row_of_the_gradient_ignored), WEIGHT, "tail", "float32", "normal"),
    "last_row_ignored_exact_fill": (spoilt_call(last_row_of_the_gradient_ignored), WEIGHT, "tail", "float32", "narrow"),
    "last_image_ignored": (
        spoilt_call(lambda x, size, y, options: (x[:-1], size, y[:-1])), WEIGHT, "batch", "float32", "normal",
    ),
    "untouched_rows_unwritten": (partly_written((..., slice(2, None, 3), slice(None))), INPUT, "rows_between_windows",
                                 "float32", "normal"),
    "one_weight_unwritten": (partly_written((4, 2, 2, 2)), WEIGHT, "tail", "float32", "normal"),
    "one_integer_unwritten": (partly_written((1, 2, 6, 8)), INPUT, "tail", "int16", "normal"),
    "no_images_unwritten": (partly_written(...), WEIGHT, "empty_batch", "float32", "normal"),
    "narrow_integer_sum": (spoilt_result(lambda y: y.astype(np.int8).astype(y.dtype)), WEIGHT, "tail", "int8",
                           "normal"),
    "low_half_of_integers": (
        spoilt_result(lambda y: y.astype(np.int32).astype(y.dtype)), INPUT, "tail", "int64", "normal",
    ),
    "channels_first_for_last": (spoilt_result(lambda y: np.moveaxis(y, -1, 1)), INPUT, "nhwc", "float32", "normal"),
    "kernel_layout_ignored": (spoilt_result(lambda y: y.swapaxes(0, 1)), WEIGHT, "nhwc_hwio_strided", "float32",
                              "normal"),
    "float16_sum_of_input": (summed_in(np.float16), INPUT, "long_sum_of_outputs", "float16", "positive"),
    "float16_sum_of_weight": (summed_in(np.float16), WEIGHT, "long_sum_of_pixels", "float16", "positive"),
    "bfloat16_sum_of_input": (summed_in(oracle.BFLOAT16), INPUT, "long_sum_of_outputs", "bfloat16", "normal"),
    "bfloat16_sum_of_fold": (summed_in(oracle.BFLOAT16), "fold", "tail", "bfloat16", "positive"),
    "float32_sum_of_float64": (summed_in(np.float32), WEIGHT, "long_sum_of_pixels", "float64", "normal"),
    "unfold_of_taps_before_channels": (
        spoilt_result(lambda y: y.reshape(2, 3, 9, -1).swapaxes(1, 2).reshape(y.shape)),
        "unfold", "tail", "float32", "normal",
    ),
    "unfold_of_padding_unwritten": (partly_written((0, 0, 0)), "unfold", "padded", "float32", "normal"),
    "unfold_through_float32": (
        spoilt_result(lambda y: y.astype(np.float32).astype(y.dtype)), "unfold", "tail", "float64", "normal",
    ),
    "fold_overwrites": (
        lambda case: lambda columns, size, kernel, out=None, **kwargs: store(overwriting(columns, size), out),
        "fold", "tail", "float32", "normal",
    ),
    "row_kernel_flipped": (option(flip=True), "conv1d", "plain", "float32", "normal"),
    "row_padding_swapped": (option(padding=(0, 3)), "conv1d", "depthwise_causal", "float32", "normal"),
    "row_layout_ignored": (spoilt_result(lambda y: y.swapaxes(-1, -2)), "conv1d", "nlc_rank_2", "float32", "normal"),
}  # fmt: skip


def overwriting(columns: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Each window of 3×3 instead of the sum over all."""
    H, W = size
    y = np.zeros((*columns.shape[:-2], columns.shape[-2] // 9, H, W), columns.dtype)
    taps = columns.reshape(*y.shape[:-2], 3, 3, H - 2, W - 2)
    for p in range(3):
        for q in range(3):
            y[..., p : p + H - 2, q : q + W - 2] = taps[..., p, q, :, :]
    return y


# Their results do not fit into the right out.
MISSHAPEN = ("output_padding_forgotten", "channels_first_for_last", "kernel_layout_ignored", "row_layout_ignored",
             "dilation_ignored", "stride_transposed")  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_rejected(name):
    wrong, call, found, dtype, kind = WRONG[name]
    case = family.BY_NAME[call, found]
    family.check(honest(case), case, dtype, kind, into=True)
    with pytest.raises(AssertionError):
        family.check(wrong(case), case, dtype, kind, into=name not in MISSHAPEN)


def test_zeros_between_pixels_are_right_until_a_weight_is_nan():
    """What a transpose by zero-stuffing gets wrong, and nothing else does."""
    case = family.BY_NAME["conv_transpose2d", "doubling"]
    family.check(zero_stuffed, case, "float32", "normal", into=True)
    family.check_specials(honest(case), case, "float32", np.nan, 1)
    assert read(case) == [0, 1]
    with pytest.raises(AssertionError):
        family.check_specials(zero_stuffed, case, "float32", np.nan, 1)


SPECIALS: dict[str, tuple[Wrong, str, str, float, int]] = {
    "nan_becomes_zero": (spoilt_result(np.nan_to_num), INPUT, "tail", np.nan, 1),
    "nan_spreads": (spoilt_result(lambda y: y.fill(np.nan)), WEIGHT, "stride_tail", np.nan, 0),
    "inf_becomes_nan": (
        spoilt_result(lambda y: np.where(np.isinf(y), np.nan, y)), TRANSPOSE, "doubling", np.inf, 0,
    ),
    "nan_spreads_in_a_fold": (
        spoilt_result(lambda y: np.where(np.isnan(np.roll(y, 1, axis=-1)), np.nan, y)), "fold", "tail", np.nan, 0,
    ),
    "nan_of_an_unfold_becomes_zero": (spoilt_result(np.nan_to_num), "unfold", "tail", np.nan, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIALS)
def test_rejected_with_specials(name):
    wrong, call, found, value, which = SPECIALS[name]
    case = family.BY_NAME[call, found]
    family.check_specials(honest(case), case, "float32", value, which)
    with pytest.raises(AssertionError):
        family.check_specials(wrong(case), case, "float32", value, which)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("call", ["conv2d_input", "conv2d_weight", "conv_transpose2d", "fold"])
def test_16_bit_sums_are_rejected_where_products_cancel(call, dtype):
    case = FamilyCase(call, "cancelling", ())
    arguments, where, total = cancelling(call, cases.numpy_dtype(dtype))
    for made, good in ((honest, True), (summed_in(np.float32), True), (summed_in(cases.numpy_dtype(dtype)), False)):
        y = units.to_host(made(case)(*arguments)).astype(np.float64)
        assert np.all(y[where] == total) == good


def test_unit_b_of_gradients_tells_rounded_inputs():
    from test_family import statistical
    from test_teeth import keep_bits

    for call in ("conv2d_input", "conv2d_weight"):
        case = statistical(call, 4608)
        operands, answer = family.posed(case, "float32", "normal")
        rounded = [keep_bits(array, 10) for array in operands]
        y = honest(case)(*case.arguments(rounded), **case.kwargs)
        assert units.unit_b(y, answer, *operands) > 1000
        y = honest(case)(*case.arguments(operands), **case.kwargs)
        assert units.unit_b(y, answer, *operands) <= 1


def test_thinned_fills_have_exact_sums():
    for case in family.FAMILY:
        for dtype in (*cases.FLOATS, *cases.COMPLEX) if case.smoke else ("float16", "complex64"):
            if case.accepts(dtype):
                for kind in ("narrow", "wide"):
                    _, answer = family.posed(case, dtype, kind)
                    rounded = answer.y.astype(answer.dtype).astype(answer.y.dtype)
                    assert np.array_equal(rounded, answer.y), f"{case} {dtype} {kind}"
                    if case.call != "unfold" and answer.y.size:
                        assert np.max(units.components(answer.magnitude)) <= cases.EXACT[dtype] * 2, f"{case} {dtype}"
