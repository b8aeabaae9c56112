"""Small awkward problems, each named by why it is there, and what their arrays are filled with.

Small because they also run in a simulator of the GPU, which manages some 150,000 products a second.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle

FLOATS = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
INTEGERS = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
DTYPES = ("float32", *(name for name in FLOATS if name != "float32"), *COMPLEX, *INTEGERS)
BYTES = ("int8", "uint8")

HUGE = 2**31 - 1  # the largest stride and dilation that the public call takes


@dataclass(frozen=True, eq=False)
class Case:
    """One call: shapes as the caller gives them, and the keyword arguments."""

    name: str
    x_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    bias: bool = False
    smoke: bool = False
    only: tuple[str, ...] = DTYPES

    @property
    def out_channels(self) -> int:
        return self.oihw(np.empty(self.k_shape, np.int8)).shape[0]

    def oihw(self, k: np.ndarray) -> np.ndarray:
        return oracle.kernel_to_oihw(k, self.kwargs.get("kernel_layout", "OIHW"))

    def accepts(self, dtype: str) -> bool:
        return dtype in self.only and not (dtype in COMPLEX and self.kwargs.get("activation"))


def _case(name: str, x: tuple, k: tuple, *marks: str, only: tuple[str, ...] = DTYPES, **kwargs: Any) -> Case:
    return Case(name, x, k, kwargs, "bias" in marks, "smoke" in marks, only)


CASES = (
    # extents that divide no tile
    _case("tail", (2, 3, 7, 9), (5, 3, 3, 3), "smoke"),
    _case("stride_tail", (1, 2, 8, 9), (3, 2, 3, 3), "smoke", stride=2),  # the last row and column are never read
    _case("one_more_than_a_tile", (1, 1, 34, 35), (1, 1, 3, 3)),  # 32×33 outputs
    _case("channels_17_to_33", (1, 17, 4, 3), (33, 17, 2, 2)),
    _case("channels_33_to_5", (1, 33, 4, 4), (5, 33, 3, 3), "bias"),
    _case("channels_3_to_65", (1, 3, 3, 3), (65, 3, 2, 2)),
    _case("long_sum", (1, 300, 3, 3), (2, 300, 3, 3)),  # one output pixel, 2,700 products
    _case("batch", (7, 2, 4, 4), (3, 2, 2, 2), "bias"),
    _case("one_pixel", (1, 1, 1, 1), (1, 1, 3, 3), padding="same"),
    _case("tall", (1, 2, 40, 2), (2, 2, 7, 1)),
    _case("wide", (1, 2, 2, 40), (2, 2, 1, 7)),
    _case("row_kernel", (1, 1, 6, 20), (2, 1, 1, 9), padding="same"),
    _case("even_kernel", (1, 2, 6, 7), (3, 2, 2, 4)),
    _case("kernel_as_large_as_input", (2, 3, 4, 5), (4, 3, 4, 5), "bias"),
    _case("kernel_as_large_as_padded_input", (1, 2, 3, 2), (2, 2, 5, 5), padding=((1, 1), (2, 1))),
    # strides and dilations
    _case("stride_per_axis", (1, 2, 7, 11), (2, 2, 3, 3), stride=(1, 3)),
    _case("stride_beyond_kernel", (1, 2, 11, 12), (2, 2, 2, 3), stride=(4, 5)),  # rows between windows are not read
    _case("huge_stride", (2, 2, 4, 5), (3, 2, 2, 2), "smoke", stride=HUGE),
    _case("dilated", (1, 2, 9, 8), (3, 2, 3, 2), "smoke", dilation=(2, 3)),
    _case("stride_2_dilation_3", (1, 2, 13, 12), (2, 2, 3, 3), stride=2, dilation=3),
    _case("one_by_one_dilation_5", (1, 2, 4, 3), (2, 2, 1, 1), dilation=5),
    _case("one_by_one_huge_dilation", (1, 2, 4, 3), (2, 2, 1, 1), dilation=HUGE),
    _case("row_kernel_huge_row_dilation", (1, 2, 4, 5), (2, 2, 1, 3), dilation=(HUGE, 1)),
    # 1×1, which implementations take a shortcut for
    _case("one_by_one", (2, 5, 4, 3), (7, 5, 1, 1), "smoke"),
    _case("one_by_one_stride", (1, 1, 3, 3), (1, 1, 1, 1), stride=2),
    _case("one_by_one_stride_batch", (3, 4, 5, 6), (2, 4, 1, 1), "bias", stride=(2, 3)),
    _case("one_by_one_padded", (1, 3, 3, 4), (2, 3, 1, 1), "bias", padding=1),
    _case("one_by_one_grouped", (2, 6, 3, 3), (4, 3, 1, 1), groups=2),
    _case("one_by_one_flip", (1, 3, 3, 3), (2, 3, 1, 1), flip=True),
    # groups
    _case("grouped", (2, 6, 5, 6), (4, 3, 3, 3), "smoke", groups=2),
    _case("grouped_one_output_each", (1, 9, 4, 5), (3, 3, 3, 2), groups=3),
    _case(
        "grouped_everything", (2, 6, 8, 7), (9, 2, 3, 2), "bias", groups=3, stride=(2, 1), padding=(1, 2), dilation=2
    ),
    _case("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), "smoke", groups=5, padding=1),
    _case("depthwise_multiplier", (1, 3, 6, 5), (6, 1, 3, 3), groups=3),
    _case("depthwise_stride_flip", (1, 17, 5, 5), (17, 1, 3, 2), groups=17, stride=2, padding="same", flip=True),
    # padding
    _case("asymmetric_padding", (1, 2, 5, 4), (3, 2, 3, 3), "smoke", padding=((0, 3), (2, 1))),
    _case("same_stride_2", (1, 1, 4, 4), (1, 1, 3, 3), stride=2, padding="same"),  # pads (0, 1), not (1, 1)
    _case("same_even_kernel", (1, 2, 5, 6), (2, 2, 4, 2), padding="same"),
    _case("same_lower_even_kernel", (1, 2, 5, 6), (2, 2, 4, 2), padding="same_lower"),
    _case("same_lower_stride_2", (1, 2, 6, 5), (2, 2, 3, 4), stride=(2, 3), padding="same_lower"),
    _case("same_stride_beyond_kernel", (1, 2, 7, 8), (2, 2, 1, 2), stride=3, padding="same"),
    _case("same_dilated", (1, 2, 6, 5), (2, 2, 3, 2), padding="same_upper", dilation=(2, 3)),
    _case("full", (1, 2, 3, 4), (3, 2, 3, 2), padding="full"),
    _case("full_flip_dilated", (1, 2, 4, 3), (2, 2, 2, 3), padding="full", dilation=2, flip=True),
    _case("padding_100", (1, 1, 2, 2), (1, 1, 3, 3), padding=100, stride=23),  # no window but one sees the input
    _case("padding_beyond_kernel", (2, 2, 2, 3), (2, 2, 2, 2), "bias", padding=((5, 4), (3, 6))),
    _case("padding_value", (1, 2, 4, 3), (3, 2, 3, 3), padding=((1, 2), (2, 0)), padding_value=1),
    _case(
        "padding_value_negative",
        (1, 2, 4, 3),
        (2, 2, 3, 3),
        only=(*FLOATS, *COMPLEX, "int8", "int64"),
        padding=2,
        padding_value=-3,
    ),
    _case("reflect", (1, 2, 4, 5), (2, 2, 3, 3), "smoke", padding=((1, 2), (3, 1)), padding_mode="reflect"),
    _case("symmetric", (1, 2, 4, 5), (2, 2, 3, 3), padding=((1, 2), (3, 1)), padding_mode="symmetric"),
    _case("edge", (1, 2, 4, 5), (2, 2, 3, 3), padding=((1, 2), (3, 1)), padding_mode="edge"),
    _case("wrap", (1, 2, 4, 5), (2, 2, 3, 3), padding=((1, 2), (3, 1)), padding_mode="wrap"),
    _case("reflect_beyond_input", (1, 1, 3, 4), (2, 1, 3, 2), padding=((7, 5), (9, 4)), padding_mode="reflect"),
    _case("symmetric_beyond_input", (1, 1, 3, 4), (2, 1, 3, 2), padding=((7, 5), (9, 4)), padding_mode="symmetric"),
    _case("replicate_beyond_input", (1, 1, 3, 4), (2, 1, 3, 2), padding=((7, 5), (9, 4)), padding_mode="replicate"),
    _case("circular_beyond_input", (1, 1, 3, 4), (2, 1, 3, 2), padding=((7, 5), (9, 4)), padding_mode="circular"),
    _case("reflect_one_row", (1, 2, 1, 5), (2, 2, 3, 3), padding=((2, 1), (1, 1)), padding_mode="reflect"),
    _case("zeros_by_name", (1, 2, 3, 3), (2, 2, 3, 3), padding=1, padding_mode="zeros"),
    _case(
        "wrap_grouped_strided", (2, 4, 5, 6), (6, 2, 3, 3), "bias", groups=2, stride=2, padding=2, padding_mode="wrap"
    ),
    _case(
        "reflect_grouped_strided",
        (1, 4, 5, 6),
        (4, 2, 3, 2),
        groups=2,
        stride=(2, 3),
        dilation=(1, 2),
        padding=(2, 3),
        padding_mode="reflect",
    ),
    # ranks and layouts
    _case("rank_2", (6, 7), (3, 3)),
    _case("rank_2_bias_stride", (6, 7), (3, 2), "bias", stride=2, padding=1),
    _case("rank_2_filters", (5, 6), (4, 3, 3), "bias"),
    _case("rank_2_filters_nhwc", (4, 5), (3, 3, 8), layout="NHWC", kernel_layout="HWIO"),
    _case("rank_2_filters_ohwi", (4, 5), (3, 2, 3), layout="NHWC", kernel_layout="OHWI"),
    _case("rank_3", (3, 5, 6), (4, 3, 3, 2), "smoke", "bias"),
    _case("nhwc", (2, 5, 6, 3), (4, 3, 3, 2), "bias", layout="NHWC"),
    _case("nhwc_rank_3", (5, 6, 3), (4, 3, 2, 3), layout="NHWC"),
    _case(
        "nhwc_hwio_strided",
        (2, 6, 5, 3),
        (3, 2, 3, 4),
        "smoke",
        stride=2,
        padding=1,
        layout="NHWC",
        kernel_layout="HWIO",
    ),
    _case("nhwc_ohwi_grouped", (1, 5, 4, 6), (4, 2, 3, 3), "bias", groups=2, layout="NHWC", kernel_layout="OHWI"),
    _case("nhwc_wrap", (1, 4, 3, 2), (3, 2, 3, 3), padding=2, padding_mode="wrap", layout="NHWC"),
    _case("hwio_depthwise_flip", (1, 4, 5, 4), (3, 2, 1, 8), groups=4, flip=True, kernel_layout="HWIO"),
    _case("ohwi", (1, 3, 5, 4), (2, 3, 2, 3), flip=True, kernel_layout="OHWI"),
    # epilogue
    _case("flip_asymmetric", (1, 2, 5, 6), (3, 2, 2, 3), "bias", padding=((1, 0), (0, 2)), flip=True),
    _case("bias", (2, 2, 4, 5), (5, 2, 2, 2), "bias"),
    _case("relu", (1, 2, 5, 5), (4, 2, 3, 3), activation="relu"),
    _case("bias_relu", (2, 3, 4, 5), (5, 3, 2, 3), "smoke", "bias", activation="relu"),
    _case("nhwc_bias_relu_depthwise", (1, 4, 5, 3), (3, 1, 2, 2), "bias", groups=3, layout="NHWC", activation="relu"),
    # nothing to sum, nothing to write
    _case("empty_batch", (0, 2, 4, 4), (3, 2, 3, 3), "bias"),
    _case("no_channels_bias", (2, 0, 4, 4), (3, 0, 3, 3), "smoke", "bias"),
    _case("no_channels", (1, 0, 3, 4), (2, 0, 2, 2), stride=2, padding=1),
    _case("no_rows_padded", (1, 2, 0, 4), (2, 2, 3, 3), "bias", padding=2),
    # quantised
    _case("zero_points", (1, 3, 4, 5), (2, 3, 3, 3), "bias", only=BYTES, padding=1, x_zero_point=3, k_zero_point=2),
    _case(
        "zero_point_per_channel",
        (2, 4, 4, 3),
        (4, 2, 2, 3),
        only=BYTES,
        groups=2,
        x_zero_point=7,
        k_zero_point=(0, 1, 5, 9),
    ),
    _case(
        "zero_point_reflect", (1, 2, 4, 3), (2, 2, 3, 3), only=BYTES, padding=2, padding_mode="reflect", x_zero_point=5
    ),
)
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)


def numpy_dtype(name: str) -> np.dtype:
    return oracle.BFLOAT16 if name == "bfloat16" else np.dtype(name)


# Exact fills: the largest |x| and |k|, and the largest sum that the result type holds exactly. 16-bit types are
# summed in float32 and limited by the rounding of the result; complex sums have twice the products, and half the
# room is kept for the sums of components that a three-product complex multiplication forms.
NARROW = {"float16": (4, 2), "bfloat16": (4, 2)}
WIDE = {"float16": (255, 1), "bfloat16": (31, 1), "float64": (2**30 - 1, 1), "complex128": (2**30 - 1, 1)}
EXACT = {
    "float16": 2**11,
    "bfloat16": 2**8,
    "float32": 2**24,
    "float64": 2**53,
    "complex64": 2**22,
    "complex128": 2**51,
}
LARGEST_BIAS = 4


def largest(dtype: str, kind: str) -> tuple[int, int]:
    """The largest values of the two operands of an exact fill."""
    return {"narrow": NARROW, "wide": WIDE}.get(kind, {}).get(dtype, (4095, 1) if kind == "wide" else (32, 32))


def integer_fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, kind: str) -> np.ndarray:
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if kind == "narrow":
        low, high = max(low, -8), 8
    return rng.integers(max(low, 0) if kind == "positive" else low, high, shape, dtype, endpoint=True)


def real_fill(rng: np.random.Generator, shape: tuple[int, ...], kind: str, most: int) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "positive":
        return rng.random(shape)
    values = rng.integers(1, most, shape, endpoint=True)
    return np.where(rng.random(shape) < 0.5, values, -values).astype(np.float64)


def _thin(rng: np.random.Generator, k: np.ndarray, budget: int) -> None:
    """Zero weights of the OIHW view ``k`` until every filter has at most ``budget`` left."""
    taps = k[0].size
    for o in range(k.shape[0]):
        dropped = rng.permutation(taps)[budget:]
        k[(o, *np.unravel_index(dropped, k.shape[1:]))] = 0


def fill(case: Case, dtype: str, kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x, k and bias of a case. Kinds: ``normal``, ``positive`` (uniform in [0, 1)), and two whose sums are exact in any
    order: ``narrow`` (small integers) and ``wide`` (integers of 12 bits and more, which a rounding of the inputs to
    10 bits changes). Integers are drawn from their whole range, except ``narrow``: |x| ≤ 8.
    """
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    numpy_type, bias = numpy_dtype(dtype), None
    if oracle.is_integer(numpy_type):
        x, k = (integer_fill(rng, shape, numpy_type, kind) for shape in (case.x_shape, case.k_shape))
        if case.bias:
            bias = rng.integers(-1000, 1000, case.out_channels).astype(oracle.result_dtype(numpy_type, numpy_type))
        return x, k, bias
    x_largest, k_largest = largest(dtype, kind)

    def draw(shape: tuple[int, ...], most: int) -> np.ndarray:
        values = real_fill(rng, shape, kind, most)
        if dtype in COMPLEX:
            values = values + 1j * real_fill(rng, shape, kind, most)
        return values.astype(numpy_type)

    x, k = draw(case.x_shape, x_largest), draw(case.k_shape, k_largest)
    if case.bias:
        bias = draw((case.out_channels,), LARGEST_BIAS)
    if kind in ("narrow", "wide") and k.size:
        _thin(rng, case.oihw(k), (EXACT[dtype] - LARGEST_BIAS) // (x_largest * k_largest))
    return x, k, bias
