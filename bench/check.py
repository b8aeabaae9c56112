"""Check, then time: random operands, the answer by plain loops in float64, and what an answer may be off by.

The loops share no code with gpuconv. Beside each sum they keep the sum of its products' magnitudes, from which the
a-priori bound of a float32 (or other) sum follows; ``unit_a`` is an error in units of that bound, so that a correct
sum in any order reads at most 1.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit

from gpuconv import dtypes
from gpuconv.problem import Conv2dProblem

# Half the distance from 1 to the next number, and half the smallest number.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
_SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150, "float64": 2.0**-1075}

# Relative L2 error that "high" and "medium" permit. In 16 bits the rounding of the result alone is near the last two.
_PROMISED = {"high": 2e-5, "medium": 1e-3}
_ROUNDED = {"float16": 2e-3, "bfloat16": 1.6e-2, "float32": 2e-5, "float64": 1e-13}

# Products that the loops may take, some seconds' worth; above it, a random choice of planes (n, o) is checked.
AFFORDABLE = 10**10


class Wrong(Exception):
    """An answer that is not the convolution asked for."""


@dataclass(frozen=True)
class Accuracy:
    unit_a: float
    relative_l2: float
    checked: float  # fraction of the result's elements that were compared; all of them are tested for being finite

    def facts(self) -> dict[str, float]:
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Arrays:
    """Operands in the problem's layouts, as NumPy arrays."""

    x: np.ndarray
    k: np.ndarray
    bias: np.ndarray | None


def operands(problem: Conv2dProblem) -> Arrays:
    """Normal random numbers, the same for the same problem line; zeros would let hardware and libraries save work."""
    if problem.x_dtype not in _ROUNDOFF or problem.k_dtype != problem.x_dtype:
        raise ValueError(f"the benchmarks take floating-point operands of one dtype; got {problem}")
    rng = np.random.default_rng(zlib.crc32(str(problem).encode()))
    dtype = dtypes.numpy_dtype(problem.x_dtype)
    x = rng.standard_normal(problem.x_shape, np.float32).astype(dtype)
    # Results of about unit size, which float16 can hold however many products there are.
    k = (rng.standard_normal(problem.k_shape, np.float32) / np.sqrt(max(problem.products, 1))).astype(dtype)
    bias = rng.standard_normal(problem.O, np.float32).astype(dtype) if problem.bias else None
    x = x.transpose(0, 2, 3, 1) if problem.layout == "NHWC" else x
    order = {"OIHW": (0, 1, 2, 3), "HWIO": (2, 3, 1, 0), "OHWI": (0, 2, 3, 1)}[problem.kernel_layout]
    return Arrays(np.ascontiguousarray(x), np.ascontiguousarray(k.transpose(order)), bias)


def arguments(problem: Conv2dProblem) -> dict[str, Any]:
    """The keyword arguments of ``conv2d`` for this problem, only those a caller would write."""
    (top, bottom), (left, right) = problem.padding
    pads: Any = problem.padding if (top, left) != (bottom, right) else top if top == left else (top, left)
    steps = {name: getattr(problem, name) for name in ("stride", "dilation")}
    given = {
        **{name: pair[0] if pair[0] == pair[1] else pair for name, pair in steps.items()},
        "padding": pads,
        "groups": problem.groups,
        "padding_mode": problem.padding_mode,
        "padding_value": problem.padding_value,
        "flip": problem.flip,
        "layout": problem.layout,
        "kernel_layout": problem.kernel_layout,
        "activation": problem.activation,
        "precision": problem.precision,
    }
    usual = {
        "stride": 1, "dilation": 1, "padding": 0, "groups": 1, "padding_mode": "constant", "padding_value": 0,
        "flip": False, "layout": "NCHW", "kernel_layout": "OIHW", "activation": None, "precision": "highest",
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value != usual[name]}
    return given | ({"dtype": problem.y_dtype} if problem.y_dtype != problem.x_dtype else {})


@njit
def _add(row, weight, total, size):
    for j in range(total.size):
        product = weight * row[j]
        total[j] += product
        size[j] += abs(product)


@njit
def _loops(x, k, planes, outputs, stride, dilation, total, size):
    """total[t,i,j] = Σ_cpq x[n, c, i·s + p·d, j·s + q·d] · k[o,c,p,q] for each (n, o) of planes; x is padded."""
    channels, rows, columns = k.shape[1], total.shape[1], total.shape[2]
    for t in range(planes.shape[0]):
        n, o = planes[t, 0], planes[t, 1]
        for i in range(rows):
            for c in range(channels):
                for p in range(k.shape[2]):
                    line = x[n, o // outputs * channels + c, i * stride[0] + p * dilation[0]]
                    for q in range(k.shape[3]):
                        first = q * dilation[1]
                        if stride[1] == 1:  # apart, because only a contiguous row becomes vector instructions
                            row = line[first : first + columns]
                            _add(row, k[o, c, p, q], total[t, i], size[t, i])
                        else:
                            steps = line[first : first + (columns - 1) * stride[1] + 1 : stride[1]]
                            _add(steps, k[o, c, p, q], total[t, i], size[t, i])


class Truth:
    """The right answer for the operands of a problem, wholly or, where that takes too long, on random planes."""

    def __init__(self, problem: Conv2dProblem, given: Arrays, affordable: int = AFFORDABLE) -> None:
        self.problem = problem
        x = given.x.transpose(0, 3, 1, 2) if problem.layout == "NHWC" else given.x
        order = {"OIHW": (0, 1, 2, 3), "HWIO": (3, 2, 0, 1), "OHWI": (0, 3, 1, 2)}[problem.kernel_layout]
        k = given.k.transpose(order)
        k = k[:, :, ::-1, ::-1] if problem.flip else k
        fill = {"constant_values": problem.padding_value} if problem.padding_mode == "constant" else {}
        padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), *problem.padding), problem.padding_mode, **fill)
        self.planes = self._planes(affordable)
        total, size = (np.zeros((len(self.planes), problem.OH, problem.OW)) for _ in range(2))
        weights = np.ascontiguousarray(k.astype(np.float64))
        steps = (np.array(problem.stride), np.array(problem.dilation))
        _loops(padded, weights, self.planes, problem.O // problem.groups, *steps, total, size)
        if given.bias is not None:
            values = given.bias.astype(np.float64)[self.planes[:, 1], None, None]
            total, size = total + values, size + np.abs(values)
        self.y = np.maximum(total, 0) if problem.activation == "relu" else total
        self.bound = self._bound(size)

    def _planes(self, affordable: int) -> np.ndarray:
        problem = self.problem
        count = problem.N * problem.O
        cost = max(problem.OH * problem.OW * problem.products, 1)
        chosen = np.arange(count)
        if count * cost > affordable:
            rng = np.random.default_rng(count)
            few = rng.choice(count, min(count, max(affordable // cost, 2)), replace=False)
            chosen = np.unique([0, count - 1, *few])
        return np.stack(np.divmod(chosen, problem.O), axis=1)

    def _bound(self, size: np.ndarray) -> np.ndarray:
        problem, summed = self.problem, self.problem.sum_dtype
        terms = (problem.products + problem.bias) * _ROUNDOFF[summed]
        bound = terms / (1 - terms) * size + problem.products * _SMALLEST[summed]
        if problem.y_dtype != summed:
            bound += _ROUNDOFF[problem.y_dtype] * np.abs(self.y) + _SMALLEST[problem.y_dtype]
        # In float64 the loops' own error is of the same size as the answer's.
        return bound * 2 if summed == "float64" else bound

    def judge(self, y: np.ndarray) -> Accuracy:
        """How far y (N, O, OH, OW) is off; ``Wrong`` when it is no such array or not finite."""
        problem = self.problem
        if y.shape != problem.y_shape:
            raise Wrong(f"the result has shape {y.shape}, not {problem.y_shape}")
        if not np.isfinite(y.astype(np.float32) if y.dtype.itemsize == 2 else y).all():
            raise Wrong("the result is not finite everywhere")
        picked = y[self.planes[:, 0], self.planes[:, 1]].astype(np.float64)
        error = np.abs(picked - self.y)
        scale = float(np.linalg.norm(self.y))
        return Accuracy(
            float(np.max(error / self.bound, initial=0)),
            float(np.linalg.norm(error)) / (scale or 1.0),
            len(self.planes) / max(problem.N * problem.O, 1),
        )

    def require(self, y: np.ndarray) -> Accuracy:
        """The accuracy of gpuconv's answer, which must keep the promise of the problem's ``precision``."""
        accuracy = self.judge(y)
        limit = _PROMISED.get(self.problem.precision)
        if limit is None or self.problem.y_dtype != "float32":
            if not accuracy.unit_a <= 1:
                raise Wrong(f"an error of {accuracy.unit_a:.3g} a-priori bounds; 1 is the most a correct sum can have")
        elif not accuracy.relative_l2 <= limit:
            raise Wrong(f"a relative L2 error of {accuracy.relative_l2:.3g}; the promise is {limit:g}")
        return accuracy

    def accept(self, y: np.ndarray) -> Accuracy:
        """The accuracy of a peer's answer. A peer may have promised less (Winograd, FFT): it must still be right."""
        accuracy = self.judge(y)
        limit = max(_ROUNDED[self.problem.y_dtype], _PROMISED.get(self.problem.precision, 0.0))
        if not (accuracy.unit_a <= 1 or accuracy.relative_l2 <= limit):
            raise Wrong(f"a relative L2 error of {accuracy.relative_l2:.3g}, {accuracy.unit_a:.3g} a-priori bounds")
        return accuracy
