"""The shortest way to an answer: a call like one that has been checked and planned before.

Checking some twenty arguments and choosing among implementations takes Python about a hundred microseconds, many times
what a small convolution takes. So a call on NumPy arrays that succeeded is remembered by everything that its checks
and its plan depend on (shapes, strides, dtypes, arguments, never values), and the next one like it goes straight to
the kernel. Only implementations that offer ``Bound`` take part.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, request
from gpuconv.backends.phases import fill_with_bias
from gpuconv.backends.protocol import Operands
from gpuconv.problem import Conv2dProblem

_MOST = 256  # calls remembered

_ready: dict[Hashable, Ready] = {}


class Ready:
    """A checked and planned call, for arrays like those it was made for."""

    __slots__ = ("alone", "bound", "dtype", "packed", "shape", "threads")

    def __init__(self, bound: Any, shape: tuple[int, ...], dtype: Any, packed: Any | None, threads: int) -> None:
        self.bound, self.shape, self.dtype, self.packed, self.threads = bound, shape, dtype, packed, threads
        # Work for one thread stays so, however many there are; other plans hold for a number of threads.
        self.alone = bound.alone

    def __call__(self, x: Any, k: Any, bias: Any | None, out: Any | None = None) -> Any:
        """The result, in a new array where there is no ``out``."""
        y = arrays.empty(self.shape, self.dtype, x) if out is None else out
        self.bound(x, k, self.packed, bias, y)
        return y

    def holds(self) -> bool:
        """Whether the plan is still for this number of threads."""
        return bool(self.alone or _runtime().thread_count() == self.threads)


def _runtime() -> Any:
    return sys.modules["gpuconv.backends.numba_cpu.runtime"]


def find(key: Hashable) -> Ready | None:
    """The call remembered under ``key``, if there is one and it still holds."""
    try:
        ready = _ready.get(key)
    except TypeError:  # an argument that cannot be hashed, a list for example
        return None
    return ready if ready is not None and ready.holds() else None


def repeated(
    key: Hashable | None, first: Any, second: Any, bias: Any | None = None, out: Any | None = None
) -> Any | None:
    """The result of the call remembered under ``key``, or None: the long way has it, or what takes less memory."""
    ready = None if key is None else find(key)
    if ready is None:
        return None
    try:
        return ready(first, second, bias, out)
    except MemoryError:
        return None


def remember(key: Hashable, ready: Ready | None) -> None:
    """Keep a call for the next one like it."""
    if ready is None:
        return
    if len(_ready) >= _MOST:
        _ready.clear()
    try:
        _ready[key] = ready
    except TypeError:
        return


def clear() -> None:
    """Forget every call."""
    _ready.clear()


def form(out: Any | None) -> Hashable:
    """What a key has of a NumPy array for the result, if there is one; the rest is a matter of ``may_be_written``."""
    return None if out is None else (out.shape, out.strides, out.dtype)


def may_be_written(out: Any, *inputs: Any) -> bool:
    """Whether nothing but its form speaks against ``out``; if not, the long way says what."""
    # By the ends of the arrays alone, as the long way looks.
    return bool(out.flags.writeable) and not any(
        np.may_share_memory(out, other) for other in inputs if other is not None
    )


# Types whose values their representations tell.
_TOLD = (bool, float, complex, str, type(None), type, np.generic, np.dtype)


def token(value: Any) -> Hashable:
    """``value`` for a key: 1, True and 1.0 are equal and not the same argument. An object of another type may change
    while it looks the same, so that what comes back for it cannot be hashed.
    """
    if type(value) is int:
        return value
    if type(value) in (tuple, list):
        return tuple(map(token, value))
    return repr(value) if isinstance(value, _TOLD) else _UNTOLD


_UNTOLD: Any = []


def key_of(
    call: str, first: Any, second: Any, options: tuple[Any, ...], unset: tuple[Any, ...], bias: Any | None = None,
    out: Any | None = None,
) -> Hashable | None:  # fmt: skip
    """The key of a call of a gradient, a transposed convolution or one of signals; None where its arrays are not
    NumPy's own, ``out`` may not be written, or one of ``unset`` is set.
    """
    if type(first) is not np.ndarray or type(second) is not np.ndarray or any(value is not None for value in unset):
        return None
    if not all(other is None or type(other) is np.ndarray for other in (bias, out)):
        return None
    if out is not None and not may_be_written(out, first, second, bias):
        return None
    arrays_of = first.shape, first.strides, first.dtype, second.shape, second.strides, second.dtype
    return call, arrays_of, None if bias is None else (bias.shape, bias.dtype), form(out), tuple(map(token, options))


class _Phases:
    """An input gradient: its forward convolutions, each bound to its part of the operands and of the result."""

    def __init__(self, implementation: Any, plan: Any, x: Any, k: Any, out: Any) -> None:
        self.problem = plan.problem
        self.complete = plan.config["complete"]
        self.parts = []
        for phase, part in plan.config["parts"]:
            taps, outputs = (phase.rows.taps, phase.columns.taps), (phase.rows.outputs, phase.columns.outputs)
            of_k, of_out = k.swapaxes(1, 2)[(..., *taps)], out[(..., *outputs)]
            self.parts.append((implementation.Bound(part, x, of_k, of_out), (..., *taps), (..., *outputs)))
        self.alone = all(bound.alone for bound, _, _ in self.parts)

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        x, k, out = (request.view(self.problem, which, array) for which, array in enumerate((x, k, out)))
        if not self.complete:
            fill_with_bias(self.problem, bias, out)
        k = k.swapaxes(1, 2)
        for bound, taps, outputs in self.parts:
            bound(x, k[taps], packed, bias, out[outputs])


def of_request(
    asked: request.Request, choice: dispatch.Choice, keeper: request.Keeper | None, out: Any | None = None
) -> Ready | None:
    """The call that ``choice`` has just carried out, into ``out`` if there is one, ready to be repeated; None where it
    cannot be.
    """
    implementation: Any = dispatch.implementation(choice.name)
    problem, second = asked.problem, asked.second
    if not hasattr(implementation, "Bound") or second is None or not _plain(asked, problem):
        return None
    x, k = request.view(problem, 0, asked.first.array), request.view(problem, 1, second.array)
    dtype = dtypes.numpy_dtype(problem.y_dtype)
    if out is not None and not out.dtype.isnative:
        return None
    out = np.empty(asked.shape, dtype) if out is None else out
    out = request.view(problem, 2, out if asked.lift is None else asked.lift(out))
    packed = None
    if "parts" in choice.plan.config:
        phased = _Phases(implementation, choice.plan, x, k, out)
        return Ready(phased, asked.shape, dtype, None, _runtime().thread_count())
    if keeper is not None:
        key = (choice.name, implementation.pack_key(choice.plan)), None, None
        packed = keeper.kept(key, lambda: implementation.pack(choice.plan, Operands(x, k)), None)
    bound = implementation.Bound(choice.plan, x, k if packed is None else None, out)
    return Ready(bound, asked.shape, dtype, packed, _runtime().thread_count())


def _plain(asked: request.Request, problem: Conv2dProblem) -> bool:
    """Whether addresses and steps are all that a repetition needs to know of its arrays."""
    arrays = [operand.array for operand in (asked.first, asked.second, asked.bias) if operand is not None]
    return (
        problem.op in ("forward", "input_grad", "weight_grad")
        # Of a signal, which is no image, they are; but complex kernels look at the axes.
        and (asked.lift is None or (problem.op == "forward" and not dtypes.is_complex(problem.y_dtype)))
        and not problem.flip
        and bool(problem.result_size and problem.products)
        and all(type(array) is np.ndarray and array.dtype.isnative for array in arrays)
        and problem.k_dtype == problem.sum_dtype
        and (asked.bias is None or asked.bias.dtype == problem.y_dtype)
    )
