"""The integers against enumeration: windows are counted one by one, and padding is what numpy.pad makes of indices."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gpuconv import geometry

extents = st.integers(1, 12)
steps = st.integers(1, 4)
sides = st.tuples(st.integers(0, 30), st.integers(0, 30))


def windows(padded: int, k: int, stride: int, dilation: int) -> list[list[int]]:
    """Positions read by each window that lies wholly inside an axis of ``padded`` elements."""
    taps = [[start + p * dilation for p in range(k)] for start in range(0, padded, stride)]
    return [window for window in taps if window[-1] < padded]


def padded_index(n: int, pads: tuple[int, int], mode: str) -> np.ndarray:
    """Where each element of a padded axis comes from, by padding the indices themselves; -1 is the constant."""
    constant = {"constant_values": -1} if mode == "constant" else {}
    return np.pad(np.arange(n), pads, mode=mode, **constant)


# output_size


@given(n=st.integers(0, 30), k=extents, pads=sides, stride=steps, dilation=steps)
@example(n=5, k=3, pads=(0, 0), stride=1, dilation=1)
@example(n=1, k=1, pads=(0, 0), stride=4, dilation=4)
def test_output_size_counts_the_windows(n, k, pads, stride, dilation):
    count = len(windows(n + sum(pads), k, stride, dilation))
    if count:
        assert geometry.output_size(n, k, pads, stride, dilation) == count
        assert geometry.output_extent(n, k, pads, stride, dilation) == count
    else:
        assert geometry.output_extent(n, k, pads, stride, dilation) < 1
        with pytest.raises(ValueError, match="larger than the padded input") as refusal:
            geometry.output_size(n, k, pads, stride, dilation)
        assert f"({dilation * (k - 1) + 1})" in str(refusal.value), "quotes the kernel's size"
        assert f"({n + sum(pads)})" in str(refusal.value), "quotes the input's size"


@given(n=extents, k=extents, padding=st.integers(0, 9), stride=steps, dilation=steps)
def test_an_integer_pads_both_sides(n, k, padding, stride, dilation):
    assume(n + 2 * padding > dilation * (k - 1))
    both = geometry.output_size(n, k, (padding, padding), stride, dilation)
    assert geometry.output_size(n, k, padding, stride, dilation) == both


@pytest.mark.parametrize("exponent", [31, 53, 62, 63, 64, 100])
def test_output_size_is_exact_where_floats_and_64_bits_are_not(exponent):
    n = 2**exponent
    assert geometry.output_size(n + 1, 2) == n
    assert geometry.output_size(n + 1, 3, padding=1, stride=3) == n // 3 + 1
    assert geometry.output_size(n, n) == 1


# Named padding


def named(name: str, n: int, k: int, stride: int, dilation: int) -> tuple[int, int]:
    rows, columns = geometry.resolve_padding("test", name, (n, n), (k, k), (stride, stride), (dilation, dilation))
    assert rows == columns
    return rows


@given(n=extents, k=extents, stride=steps, dilation=steps)
@example(n=4, k=3, stride=2, dilation=1)
@example(n=1, k=1, stride=4, dilation=1)
def test_same_is_the_least_padding_that_gives_ceil_outputs(n, k, stride, dilation):
    wanted = math.ceil(n / stride)
    least = next(total for total in itertools.count() if len(windows(n + total, k, stride, dilation)) >= wanted)
    upper, lower = (named(name, n, k, stride, dilation) for name in ("same_upper", "same_lower"))
    assert sum(upper) == sum(lower) == least
    assert upper == lower[::-1], "the two differ in where the odd element goes, and in nothing else"
    assert upper[1] - upper[0] == least % 2, "the odd element goes to the end"
    assert named("same", n, k, stride, dilation) == upper
    for name in ("same", "same_upper", "same_lower"):
        assert geometry.output_size(n, k, name, stride, dilation) == wanted


def test_same_is_asymmetric_where_the_total_is_odd():
    assert named("same", 4, 3, 2, 1) == (0, 1)
    assert named("same_lower", 4, 3, 2, 1) == (1, 0)
    assert named("same", 5, 3, 1, 2) == (2, 2)
    assert named("same", 5, 1, 3, 1) == (0, 0), "never negative, although the last window ends before the axis does"


@given(n=extents, k=extents, dilation=steps)
def test_full_gives_every_overlap_of_input_and_kernel(n, k, dilation):
    reach = {i + p * dilation for i in range(n) for p in range(k)}
    before, after = named("full", n, k, 1, dilation)
    assert before == after == dilation * (k - 1)
    assert geometry.output_size(n, k, "full", dilation=dilation) == max(reach) + 1


@given(n=extents, k=extents, stride=steps, dilation=steps)
def test_valid_is_no_padding(n, k, stride, dilation):
    assert named("valid", n, k, stride, dilation) == (0, 0)


def test_each_axis_is_resolved_by_its_own_sizes():
    pads = geometry.resolve_padding("test", "same", (4, 7), (3, 5), (2, 1), (1, 2))
    assert pads == ((0, 1), (4, 4))


@pytest.mark.parametrize(
    ("padding", "resolved"),
    [
        (2, ((2, 2), (2, 2))),
        (np.int64(2), ((2, 2), (2, 2))),
        ((1, 2), ((1, 1), (2, 2))),
        ([1, 2], ((1, 1), (2, 2))),
        (np.array([1, 2]), ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([[1, 2], [3, 4]], ((1, 2), (3, 4))),
        (np.array([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
        (((2**31 - 1, 0), (0, 0)), ((2**31 - 1, 0), (0, 0))),
    ],
    ids=repr,
)
def test_padding_forms(padding, resolved):
    result = geometry.resolve_padding("test", padding, (9, 9), (3, 3), (1, 1), (1, 1))
    assert result == resolved
    assert all(type(value) is int for pair in result for value in pair), "Python integers, which cannot overflow"


# Receptive field and parameters


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), max_size=4))
@example([])
@example([(3, 1, 1), (3, 1, 1)])
def test_receptive_field_is_the_span_of_what_one_output_reads(layers):
    positions = {0}
    for k, stride, dilation in reversed(layers):
        positions = {position * stride + p * dilation for position in positions for p in range(k)}
    assert geometry.receptive_field(layers) == max(positions) - min(positions) + 1


def test_receptive_field_takes_short_layers():
    assert geometry.receptive_field([3, (3,), (3, 1), [3, 1, 1]]) == 9
    assert geometry.receptive_field(iter([(7, 2), (3, 2)])) == 7 + 2 * 2
    assert geometry.receptive_field([(2, 2)] * 100) == 2**100, "exact at any depth"


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_parameter_count_is_the_size_of_the_arrays(per_group_out, per_group_in, kh, kw, groups, bias):
    o, c = per_group_out * groups, per_group_in * groups
    weights = np.empty((o, c // groups, kh, kw))
    expected = weights.size + (o if bias else 0)
    assert geometry.parameter_count(o, c, (kh, kw), groups, bias) == expected


@pytest.mark.parametrize(("o", "c", "named"), [(6, 4, "out_channels"), (4, 6, "in_channels")])
def test_groups_must_divide_the_channels(o, c, named):
    with pytest.raises(ValueError, match=f"groups must divide {named}; got groups=4, {named}=6"):
        geometry.parameter_count(o, c, 3, groups=4)


# Index tables


@pytest.mark.parametrize("mode", geometry.PADDING_MODES)
@given(n=extents, pads=sides)
@example(n=1, pads=(7, 7))
@example(n=2, pads=(30, 29))
def test_source_index_is_numpy_pad_of_the_indices(mode, n, pads):
    before, after = pads
    position = np.arange(-before, n + after)
    np.testing.assert_array_equal(geometry.source_index(position, n, mode), padded_index(n, pads, mode))


def test_an_axis_without_elements_is_all_constant():
    np.testing.assert_array_equal(geometry.source_index(np.arange(-2, 3), 0, "constant"), [-1] * 5)


@pytest.mark.parametrize("mode", geometry.PADDING_MODES)
@given(n=extents, k=st.integers(1, 5), pads=sides, stride=st.integers(1, 9), dilation=st.integers(1, 9))
@example(n=1, k=3, pads=(9, 9), stride=1, dilation=1)
@example(n=4, k=1, pads=(0, 0), stride=9, dilation=9)
def test_index_table_reads_what_the_windows_of_the_padded_axis_read(mode, n, k, pads, stride, dilation):
    expected = padded_index(n, pads, mode)[windows(n + sum(pads), k, stride, dilation)]
    assume(len(expected))
    outputs = len(expected)
    table = geometry.index_table(n, k, outputs, pads[0], stride, dilation, mode)
    for p in range(k):
        np.testing.assert_array_equal(table.tap(p, 0, outputs), expected[:, p])
    for i, p in np.ndindex(outputs, k):
        assert table.index[i * table.outer + p * table.inner] == expected[i, p]
    assert len(table.index) == min((outputs - 1) * stride + dilation * (k - 1) + 1, outputs * k)


@given(st.data(), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_a_tap_can_be_read_in_chunks(data, k, outputs, stride, dilation):
    n = (outputs - 1) * stride + dilation * (k - 1) + 1
    table = geometry.index_table(n, k, outputs, 0, stride, dilation, "constant")
    start = data.draw(st.integers(0, outputs))
    stop = data.draw(st.integers(start, outputs))
    for p in range(k):
        np.testing.assert_array_equal(table.tap(p, start, stop), table.tap(p, 0, outputs)[start:stop])


HUGE = 2**31 - 1


@pytest.mark.parametrize("mode", geometry.PADDING_MODES)
@pytest.mark.parametrize(
    ("n", "k", "pads", "stride", "dilation"),
    [
        (5, 3, (HUGE, HUGE), HUGE, HUGE),
        (5, 3, (HUGE, HUGE), 1, HUGE),
        (5, 3, (HUGE, 0), HUGE, 1),
        (7, 1, (3, 3), HUGE, 1),
    ],
    ids=["all huge", "huge dilation", "huge stride", "one window"],
)
def test_tables_stay_small_where_steps_are_huge(mode, n, k, pads, stride, dilation):
    outputs = min(10, geometry.output_size(n, k, pads, stride, dilation))
    table = geometry.index_table(n, k, outputs, pads[0], stride, dilation, mode)
    assert len(table.index) <= outputs * k
    for i, p in itertools.product(range(outputs), range(k)):
        # Python's integers cannot overflow, so this is what 64-bit positions have to agree with.
        position = i * stride + p * dilation - pads[0]
        assert table.tap(p, i, i + 1)[0] == source(position, n, mode)


def source(position: int, n: int, mode: str) -> int:
    """One index, by the picture of each mode: the axis in a row of copies of itself, every other one mirrored."""
    forward = list(range(n))
    period = {
        "wrap": forward,
        "symmetric": forward + forward[::-1],
        "reflect": forward + forward[-2:0:-1],
    }
    if mode in period:
        return period[mode][position % len(period[mode])]
    if mode == "edge":
        return min(max(position, 0), n - 1)
    return position if position in range(n) else -1


# Refusals


def refused(call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], *said: str) -> None:
    with pytest.raises(error) as refusal:
        call()
    for text in said:
        assert text in str(refusal.value)


NOT_INTEGERS = [True, False, np.True_, 1.0, np.float64(2), "3", b"3", None, {1, 2}, 1j]


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
@pytest.mark.parametrize("argument", ["n", "k", "stride", "dilation"])
def test_output_size_refuses_what_is_not_an_integer(argument, value):
    arguments = {"n": 9, "k": 3, argument: value}
    refused(lambda: geometry.output_size(**arguments), TypeError, "output_size: ", argument, repr(value))


@pytest.mark.parametrize("value", [value for value in NOT_INTEGERS if not isinstance(value, str)], ids=repr)
def test_padding_refuses_what_is_not_an_integer(value):
    refused(lambda: geometry.output_size(9, 3, value), TypeError, "output_size: padding", repr(value))
    refused(lambda: geometry.output_size(9, 3, (0, value)), TypeError, "output_size: padding[1]", repr(value))
    refused(lambda: resolve(value), TypeError, "test: padding", repr(value))
    refused(lambda: resolve((1, value)), TypeError, "test: padding[1]", repr(value))
    refused(lambda: resolve(((1, 1), (1, value))), TypeError, "test: padding[1][1]", repr(value))


@pytest.mark.parametrize("value", [2**31, 2**55, 2**62, 2**63, 2**200])
def test_steps_of_2_to_the_31_are_refused(value):
    for argument in ("stride", "dilation", "padding"):
        arguments = {"n": 9, "k": 1, argument: value}
        refused(
            partial(geometry.output_size, **arguments), ValueError, f"output_size: {argument}", f"{value}", f"{2**31}"
        )
    refused(lambda: resolve((0, value)), ValueError, "test: padding[1]", str(value))
    refused(lambda: resolve(((0, 0), (value, 0))), ValueError, "test: padding[1][0]", str(value))
    refused(lambda: geometry.receptive_field([3, (3, value)]), ValueError, "layers[1][1]", str(value))
    refused(lambda: geometry.as_pair("test", "stride", (1, value), 1), ValueError, "test: stride[1]", str(value))


@pytest.mark.parametrize("value", [-1, -(2**62)])
def test_negative_values_are_refused(value):
    for argument in ("n", "k", "stride", "dilation", "padding"):
        arguments = {"n": 9, "k": 3, argument: value}
        refused(partial(geometry.output_size, **arguments), ValueError, f"output_size: {argument}", f"{value}")
    refused(lambda: resolve(((0, 0), (0, value))), ValueError, "test: padding[1][1]", str(value))


@pytest.mark.parametrize("argument", ["k", "stride", "dilation"])
def test_zero_is_refused_where_it_means_nothing(argument):
    refused(lambda: geometry.output_size(**{"n": 9, "k": 3, argument: 0}), ValueError, argument, "at least 1", "got 0")


def resolve(padding: Any) -> Any:
    return geometry.resolve_padding("test", padding, (9, 9), (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize("padding", [(1, 2, 3, 4), [1, 2, 3, 4], np.array([1, 2, 3, 4])], ids=repr)
def test_a_flat_four_is_refused_with_the_form_to_write(padding):
    refused(
        lambda: resolve(padding),
        ValueError,
        "test: padding",
        "ambiguous",
        "((top, bottom), (left, right))",
        repr(padding),
    )


def test_padding_of_four_axes_and_none_are_told_what_is_taken():
    four = [[0, 0], [1, 1], [2, 2], [0, 0]]  # TensorFlow's, numpy.pad's
    refused(
        lambda: resolve(four), ValueError, "test: padding", "((top, bottom), (left, right))", "channels", repr(four)
    )
    for call, pair in (
        (lambda: resolve(None), "(rows, columns)"),
        (lambda: geometry.output_size(9, 3, None), "(before"),
    ):
        refused(call, TypeError, "padding", pair, "'same'", "got None")
    for name in ("SAME", None):
        with pytest.raises((TypeError, ValueError)) as caught:
            geometry.output_size(9, 3, name)
        assert "(top, bottom)" not in str(caught.value)


def test_a_value_that_is_an_array_is_shown_by_its_shape():
    many = np.zeros((3, 40, 50))
    refused(lambda: geometry.as_pair("test", "stride", many, 1), ValueError, "stride", "an array of shape (3, 40, 50)")
    refused(lambda: geometry.as_integer("test", "groups", many, 1), TypeError, "groups", "shape (3, 40, 50)", "ndarray")
    with pytest.raises(ValueError, match="stride") as caught:
        geometry.as_pair("test", "stride", [1] * 10_000, 1)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "padding", [(), (1,), (1, 2, 3), (1, 2, 3, 4, 5), ((1, 2),), ((1, 2), (3, 4, 5)), ((1,), (2,))]
)
def test_other_lengths_are_refused(padding):
    refused(lambda: resolve(padding), ValueError, "test: padding")


@pytest.mark.parametrize("padding", [(1, (2, 3)), ((2, 3), 1), [1, [2, 3]], (np.array([1, 2]), 3)], ids=repr)
def test_mixed_nesting_is_refused(padding):
    refused(lambda: resolve(padding), ValueError, "test: padding", "both axes", repr(padding))


@pytest.mark.parametrize("value", [(1, (2, 3)), ((1, 2), 3), (1,), (1, 2, 3), ()], ids=repr)
def test_a_pair_is_two_integers(value):
    for name in ("stride", "dilation", "kernel_size"):
        refused(partial(geometry.as_pair, "test", name, value, 1), (TypeError, ValueError), f"test: {name}")


def test_the_pair_of_one_axis_is_called_before_and_after():
    refused(lambda: geometry.output_size(9, 3, (1, 2, 3)), ValueError, "(before, after)", "(1, 2, 3)")


@pytest.mark.parametrize("name", ["SAME", "same ", "", "reflect", "zeros", "causal"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    for call in (lambda: resolve(name), lambda: geometry.output_size(9, 3, name)):
        refused(call, ValueError, "padding", repr(name), *map(repr, geometry.PADDING_NAMES))


@pytest.mark.parametrize("layer", [(), (3, 1, 1, 1), "333", 0, (3, 0), (3, 1, 0), (3, True), (3.0,), None], ids=repr)
def test_receptive_field_refuses_a_layer_and_says_which(layer):
    refused(lambda: geometry.receptive_field([3, layer]), (TypeError, ValueError), "receptive_field: layers[1]")


def test_receptive_field_takes_a_list_and_says_so():
    refused(lambda: geometry.receptive_field(3), TypeError, "receptive_field: layers", "3")


@pytest.mark.parametrize("value", [*NOT_INTEGERS, -1], ids=repr)
@pytest.mark.parametrize("argument", ["out_channels", "in_channels", "kernel_size", "groups"])
def test_parameter_count_refuses(argument, value):
    arguments = {"out_channels": 4, "in_channels": 4, "kernel_size": 3, argument: value}
    refused(
        lambda: geometry.parameter_count(**arguments),
        (TypeError, ValueError),
        f"parameter_count: {argument}",
        repr(value),
    )


@pytest.mark.parametrize("value", ["no", 1, None, np.ones(3)], ids=repr)
def test_parameter_count_takes_no_other_truth(value):
    refused(lambda: geometry.parameter_count(4, 4, 3, bias=value), TypeError, "parameter_count: bias", "True or False")


@pytest.mark.parametrize(
    ("value", "hint"),
    [("nhwc", "; did you mean 'NHWC'?"), ("NHW", "; did you mean 'NHWC'?"), ("CHWN", ""), ("gelu", ""), (3, "")],
)
def test_a_slip_is_pointed_out(value, hint):
    assert geometry.meant(value, ("NCHW", "NHWC", None, "relu")) == hint


def test_require_fit_quotes_both_sizes():
    refused(
        lambda: geometry.require_fit("test", (5, 6), (3, 3), ((0, 1), (2, 2)), (3, 5)),
        ValueError,
        "test: the dilated kernel (7×11) is larger than the padded input (6×10)",
    )
