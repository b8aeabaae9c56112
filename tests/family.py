"""The small awkward problems of conv2d's relatives, most of them derived from conv2d's own, and the check they pass.

A gradient's problem is a forward problem seen from the other side: same geometry, same layouts, other operands.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import cases
import numpy as np
import oracle
import oracle_family
import units
from cases import CASES, COMPLEX, DTYPES, HUGE, Case
from oracle import Answer
from units import Guarded, Run

import gpuconv

GRADIENTS = ("conv2d_input", "conv2d_weight")
# The public call, what an implementation's OPS calls the work, and which of the arrays is thinned in an exact fill:
# the one that plays the kernel.
CALLS = {
    "conv2d_input": ("input_grad", 0),
    "conv2d_weight": ("weight_grad", 1),
    "conv_transpose2d": ("input_grad", 1),
    "unfold": ("unfold", 0),
    "fold": ("fold", 0),
    "conv1d": ("forward", 1),
    "conv2d_bias": ("weight_grad", 0),  # of an image of ones
}
GEOMETRY = ("stride", "padding", "dilation", "groups", "flip", "layout", "kernel_layout")


def public(call: str) -> Run:
    """The public function called ``call``."""
    return getattr(gpuconv.grad if call in (*GRADIENTS, "conv2d_bias") else gpuconv, call)


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """One call: the shapes of its arrays and its other positional arguments, both in the call's order."""

    call: str
    name: str
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    bias: int = 0  # its channels, where there is one
    work: int = 0  # about as many products as an implementation that skips none computes
    smoke: bool = False
    derived: bool = False  # from a forward problem of cases.CASES
    only: tuple[str, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.call}-{self.name}"

    def accepts(self, dtype: str) -> bool:
        return dtype in self.only and not (dtype in COMPLEX and self.kwargs.get("activation"))

    def arguments(self, operands: list[Any]) -> tuple[Any, ...]:
        """The positional arguments, sizes between the arrays."""
        if self.call == "conv2d_input":
            return (*self.sizes, *operands)
        return (operands[0], *self.sizes, *operands[1:])

    def answer(self, operands: list[Any], **more: Any) -> Answer:
        return getattr(oracle_family, self.call)(*self.arguments(operands), **self.kwargs, **more)


# ---- problems


@dataclass(frozen=True)
class Shapes:
    """A forward problem's shapes, as the caller gives them and as (N, C, H, W) and (O, I, KH, KW)."""

    y: tuple[int, ...]
    nchw: tuple[int, ...]
    oihw: tuple[int, ...]
    outputs: tuple[int, int]  # OH and OW
    pads: oracle_family.Pads
    left_over: tuple[int, int]  # rows and columns after the last window

    @classmethod
    def of(cls, case: Case) -> Shapes:
        kwargs, layout = case.kwargs, case.kwargs.get("layout", "NCHW")
        x = oracle.image_to_nchw(np.empty(case.x_shape, np.int8), layout).shape
        k = case.oihw(np.empty(case.k_shape, np.int8)).shape
        strides, dilations = (oracle.pair(kwargs.get(name, 1)) for name in ("stride", "dilation"))
        pads = oracle.resolve_padding(kwargs.get("padding", 0), x[2:], k[2:], strides, dilations)
        axes = list(zip(x[2:], k[2:], pads, strides, dilations, strict=True))
        outputs = tuple(oracle_family.windows(*axis) for axis in axes)
        left_over = tuple(
            n + sum(pad) - d * (t - 1) - 1 - (m - 1) * s for (n, t, pad, s, d), m in zip(axes, outputs, strict=True)
        )
        y: tuple[int, ...] = (x[0], k[0], *outputs)
        if (len(case.x_shape), len(case.k_shape)) == (2, 2):
            y = outputs
        else:
            y = (y[0], *outputs, y[1]) if layout == "NHWC" else y
            y = y if len(case.x_shape) == 4 else y[1:]
        return cls(y, x, k, outputs, pads, left_over)


def gradients(case: Case) -> Iterator[FamilyCase]:
    """The two gradients of a forward problem."""
    shapes = Shapes.of(case)
    kwargs = {name: value for name, value in case.kwargs.items() if name in GEOMETRY}
    N, _, *pixels = shapes.nchw
    work = N * max(int(np.prod(pixels)), int(np.prod(shapes.outputs))) * int(np.prod(shapes.oihw))
    marks = {"work": work, "smoke": case.smoke, "derived": case in CASES, "only": case.only}
    yield FamilyCase("conv2d_input", case.name, (case.k_shape, shapes.y), (case.x_shape,), kwargs, **marks)
    yield FamilyCase("conv2d_weight", case.name, (case.x_shape, shapes.y), (case.k_shape,), kwargs, **marks)


def bias_of(case: Case) -> FamilyCase:
    """The gradient of a forward problem's bias."""
    kwargs = {name: value for name, value in case.kwargs.items() if name == "layout"}
    return FamilyCase("conv2d_bias", case.name, (Shapes.of(case).y,), (), kwargs, smoke=True)


def transposed(case: Case) -> Iterator[FamilyCase]:
    """The transpose of a forward problem, where conv_transpose2d can say it: no flip, and kernels of OIHW."""
    kwargs, shapes = case.kwargs, Shapes.of(case)
    ranks = (len(case.x_shape), len(case.k_shape))
    if kwargs.get("flip") or kwargs.get("kernel_layout", "OIHW") != "OIHW" or ranks == (2, 3) or 0 in shapes.nchw[1:]:
        return
    given = {name: value for name, value in kwargs.items() if name in ("stride", "dilation", "groups", "layout")}
    if any(map(any, shapes.pads)):
        given["padding"] = shapes.pads
    if any(shapes.left_over):
        given["output_padding"] = shapes.left_over
    channels = shapes.nchw[1] if case.bias else 0
    work = int(np.prod(shapes.nchw)) * int(np.prod(shapes.oihw)) // shapes.oihw[1]
    yield FamilyCase(
        "conv_transpose2d", case.name, (shapes.y, case.k_shape), (), given, channels, work, case.smoke, case in CASES
    )


def suits_gradients(case: Case) -> bool:
    """Constant zero borders, and nothing that is not part of the sum; a bias is left away."""
    kwargs = case.kwargs
    others = ("padding_value", "activation", "x_zero_point", "k_zero_point")
    return kwargs.get("padding_mode", "zeros") == "zeros" and not any(name in kwargs for name in others)


def _extra(name: str, x: tuple, k: tuple, *marks: str, **kwargs: Any) -> Case:
    return Case(name, x, k, kwargs, "bias" in marks, "smoke" in marks)


# Forward problems whose other side is awkward.
EXTRAS = (
    _extra("rows_between_windows", (1, 2, 10, 11), (2, 2, 2, 2), "smoke", stride=(3, 4)),  # no window reads them
    _extra("rows_between_taps", (1, 2, 12, 11), (3, 2, 2, 3), "bias", stride=4, dilation=(6, 2)),  # one phase in two
    _extra("stride_2_dilation_4", (1, 2, 13, 12), (2, 2, 3, 2), "bias", stride=2, dilation=4),
    _extra("stride_3_dilation_2", (1, 2, 11, 12), (2, 2, 3, 3), stride=3, dilation=2, padding=2),
    _extra("stride_2_dilation_3_padded", (1, 3, 9, 8), (2, 3, 3, 2), "smoke", stride=2, dilation=3, padding=(3, 2)),
    _extra("one_output_channel", (2, 3, 6, 5), (1, 3, 3, 3), "bias", stride=2),
    _extra("one_by_one_stride_3", (2, 3, 7, 8), (4, 3, 1, 1), "bias", stride=3),
    _extra("one_by_one_stride_padded", (1, 2, 5, 4), (3, 2, 1, 1), stride=(2, 3), padding=((1, 2), (2, 0))),
    _extra("crop_with_stride", (1, 2, 4, 5), (3, 2, 2, 2), stride=2, padding=((3, 2), (4, 3))),
    _extra("crop_beyond_a_window", (1, 1, 3, 2), (2, 1, 2, 3), padding=((6, 1), (0, 7)), dilation=(2, 1)),
    _extra("patches", (2, 3, 8, 12), (6, 3, 4, 4), "smoke", "bias", stride=4),
    _extra("patches_with_a_rest", (1, 3, 10, 7), (5, 3, 4, 3), stride=(4, 3)),
    _extra("overlap_by_one", (1, 2, 9, 10), (3, 2, 3, 3), padding=1, stride=2),
    _extra("asymmetric_stride_dilation", (1, 2, 8, 9), (3, 2, 3, 2), padding=((2, 0), (1, 3)), stride=(2, 3),
           dilation=(1, 2)),
    _extra("depthwise_stride", (2, 4, 7, 6), (4, 1, 3, 3), "smoke", "bias", groups=4, stride=2, padding=1),
    _extra("depthwise_multiplier_stride", (1, 3, 7, 6), (9, 1, 2, 3), groups=3, stride=(2, 1)),
    _extra("grouped_stride_3", (1, 4, 8, 7), (6, 2, 3, 3), "bias", groups=2, stride=3, padding=2),
    _extra("long_sum_of_outputs", (1, 2, 3, 3), (300, 2, 3, 3)),  # the input gradient's sum, of 2,700 products
    _extra("long_sum_of_pixels", (3, 2, 20, 21), (2, 2, 3, 3)),  # the weight gradient's, of 1,026
    _extra("flip_stride", (1, 2, 7, 8), (3, 2, 3, 2), stride=2, padding=((1, 0), (0, 2)), flip=True),
    _extra("nhwc_ohwi_stride", (2, 6, 7, 4), (6, 3, 2, 2), groups=2, stride=(3, 2), layout="NHWC",
           kernel_layout="OHWI"),
    _extra("huge_stride_padded", (2, 2, 3, 4), (3, 2, 2, 3), "bias", stride=(HUGE, 2), padding=1),
    _extra("empty_batch_stride", (0, 4, 5, 6), (2, 2, 3, 3), "bias", stride=2, groups=2),
    _extra("rank_3_nhwc_stride", (6, 5, 2), (3, 2, 2, 3), stride=2, layout="NHWC", padding=1),
)  # fmt: skip


def _transpose(name: str, x: tuple, k: tuple, *marks: str, bias: int = 0, **kwargs: Any) -> FamilyCase:
    work = int(np.prod(x)) * int(np.prod(k[-3:])) * 4
    return FamilyCase("conv_transpose2d", name, (x, k), (), kwargs, bias, work, "smoke" in marks)


TRANSPOSES = (
    _transpose("output_padding", (1, 2, 3, 4), (2, 3, 3, 3), "smoke", bias=3, stride=2, padding=1, output_padding=1),
    _transpose("output_padding_per_axis", (1, 2, 3, 4), (2, 1, 2, 3), stride=(3, 2), output_padding=(2, 0)),
    # rows that no product reaches, past the last window's last tap
    _transpose("output_padding_of_bias", (2, 2, 3, 2), (2, 2, 1, 2), bias=2, stride=(4, 3), output_padding=(3, 2)),
    _transpose("output_padding_beyond_stride", (1, 2, 4, 5), (2, 2, 3, 2), bias=2, dilation=3, output_padding=2),
    _transpose("output_padding_beyond_one_stride", (1, 2, 4, 3), (2, 2, 3, 2), stride=2, dilation=(3, 1), padding=1,
               output_padding=(2, 1)),
    _transpose("output_padding_crop", (1, 3, 4, 3), (3, 2, 3, 3), stride=2, padding=((3, 2), (0, 3)), output_padding=1),
    _transpose("doubling", (1, 4, 5, 3), (4, 2, 2, 2), "smoke", bias=2, stride=2),
    _transpose("crop_alone", (1, 2, 5, 6), (2, 3, 1, 1), padding=((1, 2), (0, 3))),
    _transpose("crop_to_one", (2, 2, 3, 3), (2, 2, 3, 3), padding=2),
    _transpose("crop_of_zeros", (1, 1, 2, 2), (1, 2, 1, 1), bias=2, stride=7, padding=((1, 1), (2, 1))),
    _transpose("relu", (1, 2, 3, 4), (2, 3, 2, 2), stride=2, activation="relu"),
    _transpose("bias_relu", (2, 3, 3, 4), (3, 2, 3, 2), "smoke", bias=2, stride=(2, 3), activation="relu"),
    _transpose("nhwc_bias_relu", (2, 3, 4, 4), (4, 1, 3, 2), bias=2, groups=2, stride=2, layout="NHWC",
               activation="relu"),
    _transpose("no_channels", (2, 0, 3, 4), (0, 2, 2, 3), stride=2),
    _transpose("no_channels_bias", (2, 0, 3, 4), (0, 2, 2, 3), "smoke", bias=2, stride=2, output_padding=1),
    _transpose("depthwise_upsampling", (1, 5, 3, 4), (5, 1, 4, 4), bias=5, groups=5, stride=2, padding=1),
    _transpose("grouped_wider", (1, 4, 3, 3), (4, 3, 2, 2), bias=6, groups=2, stride=(1, 2)),
    _transpose("rank_2_more", (4, 5), (3, 2), bias=1, stride=2, output_padding=(0, 1)),
    _transpose("rank_3_upsampling", (3, 4, 5), (3, 2, 3, 3), bias=2, stride=2, padding=1),
    _transpose("rank_3_nhwc_upsampling", (4, 5, 3), (3, 2, 2, 3), stride=(2, 1), layout="NHWC"),
)  # fmt: skip


def windows(name: str, x: tuple, kernel: Any, *marks: str, **kwargs: Any) -> tuple[FamilyCase, FamilyCase]:
    """unfold of an image of shape ``x``, and fold of its columns."""
    """unfold of an x, and fold of its columns."""
    columns = oracle_family.unfold(np.empty(x, np.int8), kernel, **kwargs).y.shape
    smoke, work = "smoke" in marks, int(np.prod(columns))
    return (
        FamilyCase("unfold", name, (x,), (kernel,), kwargs, 0, work, smoke),
        FamilyCase("fold", name, (columns,), (x[-2:], kernel), kwargs, 0, work, smoke),
    )


PATCHES = (
    *windows("tail", (2, 3, 7, 9), 3, "smoke"),
    *windows("stride", (1, 2, 8, 9), (3, 2), "smoke", stride=2),
    *windows("stride_beyond_kernel", (1, 2, 11, 12), (2, 3), stride=(4, 5)),
    *windows("stride_is_kernel", (2, 3, 8, 12), 4, stride=4),
    *windows("dilated", (1, 2, 9, 8), (3, 2), "smoke", dilation=(2, 3)),
    *windows("stride_2_dilation_3", (1, 2, 13, 12), 3, stride=2, dilation=3),
    *windows("padded", (2, 2, 4, 5), (3, 3), "smoke", padding=1),
    *windows("padded_per_axis", (1, 2, 4, 5), (2, 3), padding=(2, 1), stride=(1, 2)),
    *windows("padded_asymmetrically", (1, 2, 4, 5), (3, 2), padding=((0, 2), (3, 1)), stride=2),
    *windows("padding_beyond_kernel", (1, 1, 2, 3), 2, padding=(5, 4)),
    *windows("everything", (2, 3, 9, 8), (3, 2), dilation=(2, 1), padding=(2, 1), stride=(3, 2)),
    *windows("one_by_one", (2, 3, 4, 5), 1),
    *windows("one_by_one_stride", (1, 2, 5, 6), 1, stride=(2, 3)),
    *windows("kernel_as_large_as_input", (1, 2, 3, 4), (3, 4)),
    *windows("row_kernel_huge_dilation", (1, 2, 4, 5), (1, 3), dilation=(HUGE, 1)),
    *windows("huge_stride", (2, 2, 4, 5), 2, stride=HUGE),
    *windows("rank_3", (3, 5, 6), (2, 3), "smoke", padding=1),
    *windows("rank_3_stride", (1, 7, 6), 3, stride=2),
    *windows("empty_batch", (0, 2, 4, 4), 3),
    *windows("one_more_than_a_tile", (1, 1, 35, 34), 3),
)


def _row(name: str, x: tuple, k: tuple, *marks: str, bias: int = 0, only: Any = DTYPES, **kwargs: Any) -> FamilyCase:
    work = int(np.prod(x)) * int(np.prod(k))
    return FamilyCase("conv1d", name, (x, k), (), kwargs, bias, work, "smoke" in marks, only=only)


ROWS = (
    _row("plain", (2, 3, 9), (4, 3, 3), "smoke", bias=4),
    _row("rank_2", (3, 9), (2, 3, 4), bias=2, padding="same"),
    _row("rank_1", (9,), (4,), bias=1, padding=2),
    _row("rank_1_flip", (9,), (4,), padding="full", flip=True),
    _row("stride_dilation", (1, 2, 17), (3, 2, 3), stride=3, dilation=2, padding=(4, 1)),
    _row("huge_stride", (2, 2, 5), (3, 2, 2), stride=HUGE),
    _row("grouped", (2, 6, 8), (4, 3, 3), "smoke", bias=4, groups=2, padding=1),
    _row("depthwise_causal", (1, 5, 9), (5, 1, 4), bias=5, groups=5, padding=(3, 0)),
    _row("same_stride_2", (1, 2, 7), (2, 2, 4), stride=2, padding="same"),
    _row("same_lower", (1, 2, 8), (2, 2, 4), stride=3, padding="same_lower"),
    _row("padding_value", (1, 2, 5), (2, 2, 3), padding=(0, 3), padding_value=1),
    _row("reflect", (1, 2, 5), (2, 2, 3), padding=(3, 1), padding_mode="reflect"),
    _row("circular", (1, 2, 3), (2, 2, 3), padding=5, padding_mode="circular"),
    _row("nlc_kio", (2, 9, 3), (3, 3, 4), "smoke", bias=4, layout="NLC", kernel_layout="KIO", stride=2),
    _row("nlc_oki_grouped", (1, 7, 4), (6, 3, 2), groups=2, layout="NLC", kernel_layout="OKI", flip=True),
    _row("nlc_rank_2", (7, 3), (4, 3, 2), bias=4, layout="NLC"),
    _row("oki", (1, 3, 7), (2, 4, 3), kernel_layout="OKI"),
    _row("bias_relu", (2, 3, 6), (5, 3, 2), bias=5, activation="relu"),
    _row("no_channels_bias", (2, 0, 6), (3, 0, 2), bias=3),
    _row("empty_batch", (0, 2, 6), (3, 2, 2), bias=3),
    _row("zero_points", (2, 3, 7), (2, 3, 3), only=cases.BYTES, padding=1, x_zero_point=3, k_zero_point=(2, 5)),
    _row("long", (1, 1, 200), (1, 1, 31), padding="same"),
)
FORWARD = (*(case for case in CASES if suits_gradients(case)), *EXTRAS)
BY_FORWARD = {case.name: case for case in FORWARD}
FAMILY = (
    *(found for case in FORWARD for found in gradients(case)),
    *(found for case in FORWARD for found in transposed(case)),
    *(bias_of(BY_FORWARD[name]) for name in ("tail", "nhwc_hwio_strided", "rank_3", "rank_2", "empty_batch")),
    *TRANSPOSES,
    *PATCHES,
    *ROWS,
)
BY_NAME = {(case.call, case.name): case for case in FAMILY}
assert len(BY_NAME) == len(FAMILY)


# ---- what their arrays hold


def _terms(case: FamilyCase) -> np.ndarray:
    """Indices into the thinned array: sums kept apart × terms of a sum × places that one choice is for."""
    shape = case.shapes[CALLS[case.call][1]]
    index = np.arange(int(np.prod(shape))).reshape(shape)
    groups, layout = case.kwargs.get("groups", 1), case.kwargs.get("layout", "NCHW")
    if case.call == "fold":
        KH, KW = oracle.pair(case.sizes[1])
        return index.reshape(-1, KH * KW, shape[-1])
    if case.call in ("conv2d_weight", "conv2d_bias"):
        index = oracle.image_to_nchw(index, layout)
        return index.swapaxes(0, 1).reshape(index.shape[1], -1, 1)
    if case.call == "conv1d":
        index = np.moveaxis(index, -1, 0) if case.kwargs.get("kernel_layout") == "KIO" else index
        return index.reshape(len(index) if index.ndim == 3 else 1, -1, 1)
    oihw = oracle.kernel_to_oihw(index, case.kwargs.get("kernel_layout", "OIHW"))
    O, I, KH, KW = oihw.shape
    apart = oihw.reshape(groups, O // groups, I, KH, KW).swapaxes(1, 2)
    return apart.reshape(groups * I, O // groups * KH * KW, 1)


def fill(case: FamilyCase, dtype: str, kind: str, seed: int = 0) -> list[np.ndarray | None]:
    """The arrays of a case, a bias last where the call takes one; kinds as those of ``cases.fill``."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{case.call} {case.name}".encode())])
    numpy_type = cases.numpy_dtype(dtype)
    bias: list[np.ndarray | None] = [None] if case.call in ("conv_transpose2d", "conv1d") else []
    if oracle.is_integer(numpy_type):
        if case.bias:
            bias = [rng.integers(-1000, 1000, case.bias).astype(oracle.result_dtype(numpy_type, numpy_type))]
        return [cases.integer_fill(rng, shape, numpy_type, kind) for shape in case.shapes] + bias
    thinned = CALLS[case.call][1]
    wide, light = cases.largest(dtype, kind)

    def draw(shape: tuple[int, ...], most: int) -> np.ndarray:
        values = cases.real_fill(rng, shape, kind, most)
        if dtype in COMPLEX:
            values = values + 1j * cases.real_fill(rng, shape, kind, most)
        return values.astype(numpy_type)

    alone = len(case.shapes) == 1
    arrays = [draw(shape, light if i == thinned and not alone else wide) for i, shape in enumerate(case.shapes)]
    if case.bias:
        bias = [draw((case.bias,), cases.LARGEST_BIAS)]
    if kind in ("narrow", "wide") and case.call != "unfold" and arrays[thinned].size:
        budget = (cases.EXACT[dtype] - cases.LARGEST_BIAS) // (wide if alone else wide * light)
        for terms in _terms(case):
            arrays[thinned].flat[terms[rng.permutation(len(terms))[budget:]]] = 0
    return arrays + bias


# ---- the check


def unwritten(answer: Answer, xp: Any = np) -> Guarded:
    """An output that shows the elements nobody wrote: NaN, or an integer with every bit wrong."""
    if oracle.is_integer(answer.dtype):
        return Guarded(np.invert(answer.y.astype(answer.dtype)), xp)
    return units.unwritten(answer, xp)


@functools.lru_cache(maxsize=4096)
def posed(case: FamilyCase, dtype: str, kind: str) -> tuple[list[np.ndarray | None], Answer]:
    """Operands of a case and their answer. Shared: not to be written to."""
    operands = fill(case, dtype, kind)
    return operands, case.answer(operands)


def compare(result: Any, answer: Answer, case: FamilyCase, kind: str, context: str) -> float:
    """The comparison that fits: copies keep every bit, exact fills every value, real ones the bound."""
    if case.call == "unfold":
        result = units.to_host(result)
        units.assert_exact(result, answer, context)
        assert result.tobytes() == answer.y.astype(answer.dtype).tobytes(), f"{context}: a copy changed a bit"
        return 0.0
    if kind in ("narrow", "wide"):
        units.assert_exact(result, answer, context)
        return 0.0
    return units.assert_close(result, answer, context, units.limit_of(answer))


def check(run: Run, case: FamilyCase, dtype: str, kind: str, *, into: bool = False, xp: Any = np) -> float:
    """``run`` on guarded operands, with a poisoned ``out=`` where ``into``. Returns unit A."""
    operands, answer = posed(case, dtype, kind)
    context = f"{case.call} {case.name} {dtype} {kind}{' out=' if into else ''}"
    guarded = [None if operand is None else Guarded(operand, xp) for operand in operands]
    out = unwritten(answer, xp) if into else None
    arguments = case.arguments([None if g is None else g.array for g in guarded])
    result = run(*arguments, **(dict(out=out.array) if out else {}), **case.kwargs)
    for g in guarded:
        if g is not None:
            g.check_whole(context)
    if out:
        assert result is out.array, f"{context}: the result is not out"
        out.check_edges(context)
    return compare(result, answer, case, kind, context)


def _beyond_the_ends(case: FamilyCase, operands: list[Any], answer: Answer) -> Answer:
    """The answer with the gradient (or the transpose's x) continued by zeros, which its weights may be multiplied with
    as conv2d's may be with padding: not with zeros between two rows.
    """
    which, weight = (1, 0) if case.call == "conv2d_input" else (0, 1)
    layout, values = case.kwargs.get("layout", "NCHW"), operands[which]
    k = oracle.kernel_to_oihw(np.empty(case.shapes[weight], np.int8), case.kwargs.get("kernel_layout", "OIHW"))
    strides, dilations = (oracle.pair(case.kwargs.get(name, 1)) for name in ("stride", "dilation"))
    size, rows = (oracle.image_to_nchw(array, layout).shape[2:] for array in (answer.y, values))
    pads = oracle.resolve_padding(case.kwargs.get("padding", 0), size, k.shape[2:], strides, dilations)
    # rows before the first and after the last that a tap can still bring to a pixel
    more = [
        max(d * (t - 1) // s, (n - 1 + pad[0]) // s - (m - 1))
        for d, t, s, n, pad, m in zip(dilations, k.shape[2:], strides, size, pads, rows, strict=True)
    ]
    first = values.ndim - (3 if layout == "NHWC" and values.ndim > 2 else 2)
    around = [(more[axis - first],) * 2 if axis in (first, first + 1) else (0, 0) for axis in range(values.ndim)]
    given = list(operands)
    given[which] = np.pad(values, around)
    wider = tuple((low + m * s, high + m * s) for (low, high), m, s in zip(pads, more, strides, strict=True))
    return replace(case, kwargs={**case.kwargs, "padding": wider}).answer(given)


def check_specials(run: Run, case: FamilyCase, dtype: str, value: float, operand: int, xp: Any = np) -> None:
    """One ``value`` (NaN or Inf) in an operand reaches exactly the elements that it is a factor of."""
    operands = fill(case, dtype, "positive", seed=1)
    spoilt = operands[operand]
    assert spoilt is not None
    spoilt.flat[np.random.default_rng(spoilt.size).integers(spoilt.size)] = value
    answer = case.answer(operands)
    guarded = [None if array is None else Guarded(array, xp).array for array in operands]
    result = units.to_host(run(*case.arguments(guarded), **case.kwargs))
    context = f"{case} {dtype} with one {value} in operand {operand}"
    if case.call == "unfold":  # copies: no bound to compare with
        assert np.array_equal(result.astype(np.float64), answer.y.astype(np.float64), equal_nan=True), context
        return
    if (case.call, operand) in (("conv2d_input", 0), ("conv_transpose2d", 1)):
        either = np.isnan(_beyond_the_ends(case, operands, answer).y) & np.isnan(result) & ~np.isnan(answer.y)
        result = np.where(either, answer.y.astype(answer.dtype), result)
    units.assert_close(result, answer, context)
