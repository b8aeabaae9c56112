"""Two units for rounding errors, and the checks that every implementation has to pass.

Unit A is an error in units of its a-priori bound: a correct sum, in any order, reads at most 1. Unit B compares the
typical error with that of an ideal summation, and tells rounded inputs and long running sums where A is slack.

A check takes ``run(x, k, bias, out=None, **kwargs)``, so that the same code judges the library and, in
``test_teeth.py``, implementations that are wrong on purpose. Comparisons are written so that a NaN fails them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import cases
import ml_dtypes
import numpy as np
import oracle
from cases import Case
from oracle import Answer

Run = Callable[..., Any]

# Elements of poison on each side of an array. Odd, so that the array is aligned to its element and to nothing wider.
GUARD = 67


def finfo(dtype: np.dtype) -> Any:
    return ml_dtypes.finfo(dtype)


def roundoff(dtype: np.dtype) -> np.longdouble:
    """u, half the distance from 1 to the next number; of a complex type, its component's."""
    return np.longdouble(finfo(dtype).eps) / 2


def half_subnormal(dtype: np.dtype) -> np.longdouble:
    """The most that rounding a product below the normal range loses."""
    return np.longdouble(finfo(dtype).smallest_subnormal) / 2


def sum_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype("float32") if dtype in oracle.SIXTEEN_BIT else dtype


def components(array: np.ndarray) -> np.ndarray:
    """Real numbers in extended precision; the parts of a complex array along a new first axis."""
    if oracle.is_complex(array.dtype):
        return np.stack([array.real.astype(np.longdouble), array.imag.astype(np.longdouble)])
    return array.astype(np.longdouble)


def bound(answer: Answer) -> np.ndarray:
    """γ_K·Σ|x||k|, u·|y| for a 16-bit result, and half a subnormal per product and rounding."""
    summed = sum_dtype(answer.dtype)
    products = answer.products * (2 if oracle.is_complex(answer.dtype) else 1)
    terms = (products + answer.bias) * roundoff(summed)
    limit = terms / (1 - terms) * components(answer.magnitude) + products * half_subnormal(summed)
    if answer.dtype in oracle.SIXTEEN_BIT:
        limit = limit + roundoff(answer.dtype) * np.abs(components(answer.y)) + half_subnormal(answer.dtype)
    return limit


def to_host(array: Any) -> np.ndarray:
    """A NumPy array from NumPy's or CuPy's, without accepting a list or a scalar for one."""
    array = array.get() if hasattr(array, "get") else array
    assert isinstance(array, np.ndarray), f"the result is a {type(array).__name__}, not an array"
    return array


def _check_form(actual: np.ndarray, answer: Answer, context: str) -> None:
    assert actual.dtype == answer.dtype, f"{context}: dtype {actual.dtype}, not {answer.dtype}"
    assert actual.shape == answer.y.shape, f"{context}: shape {actual.shape}, not {answer.y.shape}"


def assert_exact(actual: Any, answer: Answer, context: str = "") -> None:
    """Every element equal; integers modulo the width of the result."""
    actual = to_host(actual)
    _check_form(actual, answer, context)
    wanted = answer.y.astype(answer.dtype) if oracle.is_integer(answer.dtype) else answer.y
    same = actual.astype(wanted.dtype) == wanted
    assert np.all(same), f"{context}: {np.sum(~same)} of {same.size} elements differ, first at {_first(~same)}"


def _first(where: np.ndarray) -> tuple:
    return tuple(int(index) for index in np.argwhere(where)[0])


def unit_a(actual: np.ndarray, answer: Answer) -> float:
    """The largest error of the finite elements in units of the bound."""
    finite = np.isfinite(answer.y)
    wanted, limit = components(answer.y[finite]), bound(answer)[..., finite]
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(components(actual[finite]) - wanted)
    ratio = np.where(error == 0, np.longdouble(0), error / np.where(limit > 0, limit, np.finfo(np.longdouble).tiny))
    return float(np.max(ratio, initial=0))  # NaN wherever an element is: maximum propagates it


def limit_of(answer: Answer) -> float:
    """What unit A may read: from 16 products on the errors of a correct sum no longer conspire up to the bound."""
    return 0.5 if answer.dtype in (np.float32, np.float64) and answer.products >= 16 else 1.0


def assert_close(actual: Any, answer: Answer, context: str = "", limit: float = 1.0) -> float:
    """Type, shape, the place of every NaN and Inf, and unit A at most ``limit``; integers exactly. Returns unit A."""
    if oracle.is_integer(answer.dtype):
        assert_exact(actual, answer, context)
        return 0.0
    actual = to_host(actual)
    _check_form(actual, answer, context)
    misplaced = np.isnan(actual) != np.isnan(answer.y)
    assert not np.any(misplaced), f"{context}: {np.sum(misplaced)} misplaced NaN, first at {_first(misplaced)}"
    for part, wanted in zip(_parts(actual), _parts(answer.y), strict=True):
        endless = np.isinf(wanted)
        assert np.all(part[endless].astype(np.longdouble) == wanted[endless]), (
            f"{context}: an Inf is not where it belongs"
        )
    reading = unit_a(actual, answer)
    assert reading <= limit, f"{context}: error of {reading:.3g} bounds (limit {limit}); K = {answer.products}"
    return reading


def _parts(array: np.ndarray) -> tuple[np.ndarray, ...]:
    return (array.real, array.imag) if oracle.is_complex(array.dtype) else (array,)


def unit_b(actual: Any, answer: Answer, x: np.ndarray, k: np.ndarray) -> float:
    """rms(err) / (u·√K·rms(x)·rms(k)), for float32 and float64."""

    def rms(array: np.ndarray) -> np.longdouble:
        return np.sqrt(np.mean(np.square(array.astype(np.longdouble))))

    error = to_host(actual).astype(np.longdouble) - answer.y
    scale = roundoff(answer.dtype) * np.sqrt(np.longdouble(answer.products)) * rms(x) * rms(k)
    return float(rms(error) / scale)


def poison(dtype: np.dtype) -> Any:
    """NaN, or an integer's largest value."""
    if dtype.kind == "b":
        return True
    return np.iinfo(dtype).max if oracle.is_integer(dtype) else np.nan


class Guarded:
    """An array inside a larger, poisoned one: what is read or written beyond its ends shows."""

    def __init__(self, values: np.ndarray, xp: Any = np) -> None:
        buffer = np.full(values.size + 2 * GUARD, poison(values.dtype), values.dtype)
        buffer[GUARD : GUARD + values.size] = values.ravel()
        self._image = buffer.tobytes()
        self._edge = GUARD * values.dtype.itemsize
        self._buffer = xp.asarray(buffer)
        self.array = self._buffer[GUARD : GUARD + values.size].reshape(values.shape)

    def check_whole(self, context: str) -> None:
        """Nothing was written, inside or around."""
        assert to_host(self._buffer).tobytes() == self._image, f"{context}: an operand was written to"

    def check_edges(self, context: str) -> None:
        """Nothing was written around the array."""
        found = to_host(self._buffer).tobytes()
        intact = found[: self._edge] == self._image[: self._edge] and found[-self._edge :] == self._image[-self._edge :]
        assert intact, f"{context}: written beyond the ends of out"


def unwritten(answer: Answer, xp: Any = np) -> Guarded:
    """An output that shows the elements nobody wrote: NaN, or an integer no sum here comes to."""
    value = -0x5A5A5A5 if oracle.is_integer(answer.dtype) else np.nan
    return Guarded(np.full(answer.y.shape, value, answer.dtype), xp)


def arranged(
    values: np.ndarray, order: tuple[int, ...], steps: tuple[int, ...], offset: int = 0, xp: Any = np
) -> tuple[Any, Any]:
    """``values`` as a view and its whole memory: axes in ``order``, each walked in ``steps``, poison in the gaps."""
    extents = [values.shape[axis] * abs(steps[axis]) for axis in order]
    covered = tuple(slice(offset, offset + n, abs(steps[axis])) for n, axis in zip(extents, order, strict=True))
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    turned = tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)
    memory = np.full([n + offset for n in extents], poison(values.dtype), values.dtype)
    memory[covered].transpose(inverse)[turned][...] = values
    memory = xp.asarray(memory)
    return memory[covered].transpose(inverse)[turned], memory


def forms(ndim: int = 4) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    """Every permutation, every choice of signs, and steps, with the name that a failure shows."""
    plain, ones, turned = tuple(range(ndim)), (1,) * ndim, tuple(axis for axis in (3, 1, 0, 2) if axis < ndim)
    found = [(f"order {order}", order, ones, 0) for order in itertools.permutations(plain)]
    found += [(f"signs {signs}", plain, signs, 0) for signs in itertools.product((1, -1), repeat=ndim)]
    steps = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 3, 2, 3), (1, -2, 3, -1), (-3, 1, -2, -2)]
    for step in dict.fromkeys(step[:ndim] for step in steps):
        found += [(f"steps {step} in {order}", order, step, 1) for order in (plain, turned)]
    return found


@functools.lru_cache(maxsize=2048)
def posed(case: Case, dtype: str, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, Answer]:
    """Operands of a case and their answer. Shared: not to be written to."""
    x, k, bias = cases.fill(case, dtype, kind)
    return x, k, bias, oracle.answer(x, k, bias, **case.kwargs)


def check(run: Run, case: Case, dtype: str, kind: str, *, into: bool = False, xp: Any = np) -> float:
    """``run`` on guarded operands, with a poisoned ``out=`` where ``into``. Returns unit A."""
    x, k, bias, answer = posed(case, dtype, kind)
    context = f"{case.name} {dtype} {kind}{' out=' if into else ''}"
    operands = [None if operand is None else Guarded(operand, xp) for operand in (x, k, bias)]
    out = unwritten(answer, xp) if into else None
    result = run(
        *(None if g is None else g.array for g in operands), **(dict(out=out.array) if out else {}), **case.kwargs
    )
    for operand in operands:
        if operand is not None:
            operand.check_whole(context)
    if out:
        assert result is out.array, f"{context}: the result is not out"
        out.check_edges(context)
    if kind in ("narrow", "wide"):
        assert_exact(result, answer, context)
        return 0.0
    return assert_close(result, answer, context, limit_of(answer))


def check_specials(run: Run, case: Case, dtype: str, value: float, xp: Any = np) -> None:
    """One ``value`` (NaN or Inf) among x reaches exactly the outputs whose window reads it."""
    x, k, bias = cases.fill(case, dtype, "positive", seed=1)
    rng = np.random.default_rng(x.size)
    x.flat[rng.integers(x.size)] = value
    answer = oracle.answer(x, k, bias, **case.kwargs)
    guarded = Guarded(x, xp)
    result = run(guarded.array, xp.asarray(k), None if bias is None else xp.asarray(bias), **case.kwargs)
    assert_close(result, answer, f"{case.name} {dtype} with one {value}")


def check_cancelling(run: Run, dtype: str) -> None:
    """±256 products whose running sum passes what float16 holds (65,504) and comes back to exactly 256."""
    x = np.full((1, 599, 2, 2), 16, cases.numpy_dtype(dtype))
    k = np.where(np.arange(599) < 300, 16, -16).reshape(1, 599, 1, 1).astype(x.dtype)
    y = to_host(run(x, k, None)).astype(np.float64)
    assert np.all(y == 256), f"{dtype} sums to {y.ravel()}, not 256"


def statistic(run: Run, channels: int, dtype: str, kind: str, kernel: int = 3) -> float:
    """Unit B of a convolution over ``channels`` channels, after unit A was found within its limit."""
    case = Case(f"statistic_{channels}_{kernel}", (1, channels, 7 + kernel, 7 + kernel), (8, channels, kernel, kernel))
    x, k, bias, answer = posed(case, dtype, kind)
    y = run(x, k, bias)
    assert_close(y, answer, f"{case.name} {dtype} {kind}", limit_of(answer))
    return unit_b(y, answer, x, k)
