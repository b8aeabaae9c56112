"""Small convolutions with zero borders, drawn for the relatives of conv2d, and their gradients through conv2d itself.

input gradient   a convolution, at stride 1, of the gradient spread by the stride, with the kernel turned around
weight gradient  a convolution of the input with the gradient for a kernel, stride and dilation exchanged
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import oracle
from hypothesis import strategies as st
from strategies import Form, forms, geometries, kind_of

from gpuconv import conv2d

DTYPES = ("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "int8", "uint8", "int64", "bool")
HOW = ("plain", "plain", "arranged", "arranged", "broadcast", "foreign", "Fortran", "read-only")


@dataclass(frozen=True)
class Forward:
    """A convolution with zero borders, and how its relatives are asked for."""

    sizes: tuple[int, int, int, int]  # N, C, H, W
    kernel: tuple[int, int, int, int]  # O, I, KH, KW
    kwargs: dict[str, Any]
    rank: int
    layout: str
    kernel_layout: str
    flip: bool
    dtypes: tuple[str, str]
    exact: bool
    seed: int
    image_forms: tuple[Form, Form]
    kernel_form: Form
    into: bool
    limit: int | None

    @property
    def pads(self) -> tuple:
        kw = self.kwargs
        pads = oracle.resolve_padding(kw["padding"], self.sizes[2:], self.kernel[2:], self.stride, self.dilation)
        return tuple((int(low), int(high)) for low, high in pads)

    @property
    def stride(self) -> tuple[int, int]:
        return oracle.pair(self.kwargs["stride"])

    @property
    def dilation(self) -> tuple[int, int]:
        return oracle.pair(self.kwargs["dilation"])

    @property
    def groups(self) -> int:
        return self.kwargs["groups"]

    @property
    def outputs(self) -> tuple[int, int, int, int]:
        spans = zip(self.sizes[2:], self.kernel[2:], self.pads, self.stride, self.dilation, strict=True)
        OH, OW = ((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, pad, s, d in spans)
        return self.sizes[0], self.kernel[0], OH, OW

    @property
    def output_padding(self) -> tuple[int, int]:
        """What the transposed convolution needs to give this input's size: the pixels at the end that nothing reads."""
        steps = zip(
            self.sizes[2:], self.outputs[2:], self.kernel[2:], self.stride, self.dilation, self.pads, strict=True
        )
        rows, columns = (n + sum(pad) - ((o - 1) * s + d * (k - 1) + 1) for n, o, k, s, d, pad in steps)
        return rows, columns

    @property
    def asked(self) -> dict[str, Any]:
        options = self.kwargs | {"flip": self.flip, "layout": self.layout, "kernel_layout": self.kernel_layout}
        return options | ({} if self.limit is None else {"workspace_limit": self.limit})

    def image(self, array: np.ndarray) -> np.ndarray:
        """An (N, C, H, W) array in the caller's rank and layout."""
        array = array if self.rank == 4 else array[0] if self.rank == 3 else array[0, 0]
        return np.moveaxis(array, -3, -1) if self.layout == "NHWC" and self.rank > 2 else array

    def weights(self, k: np.ndarray) -> np.ndarray:
        """An (O, I, KH, KW) array as the caller has it: turned around, in the kernel's layout."""
        k = k[..., ::-1, ::-1] if self.flip else k
        if self.rank == 2:
            return k[0, 0]
        return k.transpose({"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}[self.kernel_layout])


@st.composite
def forwards(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> Forward:
    (H, W), (KH, KW), kwargs = draw(geometries(("constant",)))
    del kwargs["padding_mode"]
    rank = draw(st.sampled_from((4, 4, 4, 3, 2)))
    N, groups = draw(st.sampled_from((1, 2, 3, 0))) if rank == 4 else 1, draw(st.sampled_from((1, 1, 2, 3)))
    I, per_group = draw(st.sampled_from((1, 2, 4, 0))), draw(st.integers(1, 3))
    if rank == 2:
        groups = I = per_group = 1
    first = draw(st.sampled_from(dtypes))
    second = first if draw(st.booleans()) else draw(st.sampled_from(dtypes))
    exact = draw(st.booleans()) or kind_of(cases.numpy_dtype(first)) != 1 or kind_of(cases.numpy_dtype(second)) != 1
    return Forward(
        (N, groups * I, H, W), (groups * per_group, I, KH, KW), kwargs | {"groups": groups}, rank,
        draw(st.sampled_from(("NCHW", "NHWC"))), draw(st.sampled_from(("OIHW", "HWIO", "OHWI"))), draw(st.booleans()),
        (first, second), exact, draw(st.integers(0, 2**16)), (draw(forms(rank, HOW)), draw(forms(rank, HOW))),
        draw(forms(4 if rank > 2 else 2, HOW)),
        draw(st.booleans()), draw(st.sampled_from((None, None, None, None, 0, 1000, 10_000, 2**70))),
    )  # fmt: skip


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, exact: bool) -> np.ndarray:
    """Real numbers, or integers so small that bfloat16 holds every sum here."""
    numpy_type = cases.numpy_dtype(dtype)
    if not exact:
        return rng.standard_normal(shape).astype(numpy_type)
    low, high = (0, 1) if dtype in ("bool", "uint8") else (-1, 1)
    array = rng.integers(low, high + 1, shape)
    if kind_of(numpy_type) == 2:
        array = array + 1j * rng.integers(low, high + 1, shape)
    return array.astype(numpy_type)


def wide(array: np.ndarray) -> np.ndarray:
    """The same numbers where products of them are exact, or nearly so."""
    return array.astype(np.complex128 if kind_of(array.dtype) == 2 else np.float64)


def reference(*operands: Any, **kwargs: Any) -> np.ndarray:
    return conv2d(*operands, backend="numpy.reference", **kwargs)


def backwards(problem: Forward, k: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The input gradient, not conjugated, of NCHW and OIHW arrays, as a full convolution of the spread gradient."""
    (N, C, H, W), (O, I, KH, KW), groups = problem.sizes, problem.kernel, problem.groups
    if 0 in (N, C):
        return np.zeros(problem.sizes, np.result_type(k, g))
    (sh, sw), (top, _), (left, _) = problem.stride, *problem.pads
    spread = np.zeros((*g.shape[:2], (g.shape[2] - 1) * sh + 1, (g.shape[3] - 1) * sw + 1), g.dtype)
    spread[:, :, ::sh, ::sw] = g
    turned = k.reshape(groups, O // groups, I, KH, KW).swapaxes(1, 2).reshape(groups * I, O // groups, KH, KW)
    full = reference(spread, turned, padding="full", dilation=problem.dilation, groups=groups, flip=True)
    result = np.zeros((N, C, max(H + top, full.shape[2]), max(W + left, full.shape[3])), full.dtype)
    result[:, :, : full.shape[2], : full.shape[3]] = full  # pixels that no window reaches stay zero
    return result[:, :, top : top + H, left : left + W]


def across(problem: Forward, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The weight gradient, not conjugated: images take the place of channels, the gradient that of the kernel."""
    (N, _, _, _), (O, I, KH, KW), groups = problem.sizes, problem.kernel, problem.groups
    found = np.zeros(problem.kernel, np.result_type(x, g))
    if 0 in (N, I):
        return found
    for group in range(groups):
        channels, filters = slice(group * I, (group + 1) * I), slice(group * (O // groups), (group + 1) * (O // groups))
        swapped = x[:, channels].swapaxes(0, 1), g[:, filters].swapaxes(0, 1)
        taps = reference(*swapped, stride=problem.dilation, dilation=problem.stride, padding=problem.pads)
        found[filters] = taps[:, :, :KH, :KW].swapaxes(0, 1)
    return found


def plain(sizes: tuple[int, int, int, int], kernel: tuple[int, int, int, int], **kwargs: Any) -> Forward:
    """A convolution by its extents and steps alone."""
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | kwargs
    return Forward(
        sizes, kernel, given, 4, "NCHW", "OIHW", False, ("float32", "float32"), True, 0, (Form(), Form()), Form(),
        False, None,
    )  # fmt: skip
