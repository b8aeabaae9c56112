"""Complex convolutions as real ones, of the real and imaginary parts, which are views of the arrays.

    Re y = Re x ∗ Re k − Im x ∗ Im k      Im y = Re x ∗ Im k + Im x ∗ Re k

Where both operands are complex, the parts are channels: a real convolution of twice as many, with four times the
weights, by ``strip``, which reads and writes parts as it does channels.

    ( Re y )   ( Re k  −Im k )   ( Re x )
    ( Im y ) = ( Im k   Re k ) ∗ ( Im x )

Where one operand is real, and for what has few channels, the *terms* of the sums are real problems of their own, each
for the implementation that suits it best. A part of one term is written where it lies; two are made in scratch, block
by block, and added. So are gradients, with the signs that the adjoint's conjugate asks for.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuconv import dispatch, dtypes, request, schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip, weight_grad
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.geometry import window
from gpuconv.problem import Conv2dProblem

NAME = "numba_cpu.complex"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("forward", "input_grad", "weight_grad"))

unavailable = runtime.unavailable

# Bytes of the terms of a block, which are to stay in the last-level cache until they are added.
_TERMS = 8 << 20

_REAL = {"complex64": "float32", "complex128": "float64"}
_PARTS = ("real", "imag")
_AXES = 5  # of the views that implementations are given


@dataclass(frozen=True)
class Term:
    """A real problem: what it reads of the two operands, and the sign it has in a part of the result."""

    first: str
    second: str
    sign: int
    problem: Conv2dProblem
    name: str  # of its implementation


def _real(dtype: str) -> str:
    return _REAL.get(dtype, dtype)


def _part_of(problem: Conv2dProblem, part: str) -> Conv2dProblem:
    """The real problem that reads ``part`` of the first operand."""
    fill = problem.padding_value
    if dtypes.is_complex(problem.x_dtype):
        fill = getattr(complex(fill), part)
    return replace(
        problem, x_dtype=_real(problem.x_dtype), k_dtype=_real(problem.k_dtype), y_dtype=_real(problem.y_dtype),
        padding_value=fill, conjugate=False, precision="highest",
    )  # fmt: skip


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Why this cannot run ``problem``."""
    if not any(map(dtypes.is_complex, (problem.x_dtype, problem.k_dtype))):
        return ["it is for complex numbers"]
    general = weight_grad.unsupported if problem.op == "weight_grad" else strip.unsupported
    return general(_part_of(problem, "real"), target)


def _terms(problem: Conv2dProblem, target: Target) -> dict[str, list[Term]]:
    """The terms of each part of the result, those that are added first."""
    found: dict[str, list[Term]] = {part: [] for part in _PARTS}
    conjugated = (problem.conjugate and problem.op == "weight_grad", problem.conjugate and problem.op != "weight_grad")
    for first in _PARTS[: 1 + dtypes.is_complex(problem.x_dtype)]:
        for second in _PARTS[: 1 + dtypes.is_complex(problem.k_dtype)]:
            imaginary = (first == "imag", second == "imag")
            sign = -1 if all(imaginary) else 1
            for which in range(2):
                if imaginary[which] and conjugated[which]:
                    sign = -sign
            part = _part_of(problem, first)
            # By the problem alone: another implementation, for want of scratch, would split the sums otherwise.
            name = dispatch.choose(NAME, part, target, "numba_cpu", sys.maxsize).name
            found["imag" if sum(imaginary) == 1 else "real"].append(Term(first, second, sign, part, name))
    for terms in found.values():
        terms.sort(key=lambda term: -term.sign)
        terms[1:] = [replace(term, problem=replace(term.problem, bias=False)) for term in terms[1:]]
    return found


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose an implementation for each term, and the blocks."""
    return dense.plan(_plan, problem, target, limit)


def _plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    if not (problem.result_size and problem.products):  # a result without products takes no implementation
        return Plan(problem, 0, _real(problem.sum_dtype), "no products")
    return (_plan_channels if _as_channels(problem) else _plan_terms)(problem, target, limit)


def _as_channels(problem: Conv2dProblem) -> bool:
    """Whether the parts are channels of one real convolution, rather than terms of several."""
    fill = complex(problem.padding_value)
    return (
        problem.op == "forward"
        and dtypes.is_complex(problem.x_dtype)
        and dtypes.is_complex(problem.k_dtype)
        and problem.C > problem.groups
        and fill.real == fill.imag  # strips are filled with one number
    )


def _plan_channels(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    # The weights of the real convolution, and a part with its sign changed.
    weights = 5 * math.prod(problem.k_shape) * dtypes.itemsize(_real(problem.k_dtype)) + 4096
    real = replace(_part_of(problem, "real"), C=2 * problem.C, O=2 * problem.O)
    inner = _within(problem, limit, weights, 1, lambda room: strip.plan_of_parts(real, target, room))
    detail = f"parts as channels, {inner.detail}"
    return Plan(problem, inner.workspace + weights, inner.sums_in, detail, {"inner": inner})


def _plan_terms(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    terms, most = _terms(problem, target), min(limit // 2, _TERMS)
    while True:  # smaller blocks leave more to the implementations of the terms
        try:
            return _plan_blocks(problem, target, limit, terms, most)
        except schedule.Shortage:
            if most == 0:
                raise
            most //= 2


def _plan_blocks(problem: Conv2dProblem, target: Target, limit: int, terms: dict[str, list[Term]], most: int) -> Plan:
    """The plan whose blocks take at most ``most`` bytes, or are the least there are."""
    every = [*terms["real"], *terms["imag"]]
    extents = block = (problem.N, problem.groups, problem.OH)
    size, row = 2 * dtypes.itemsize(_real(problem.y_dtype)), problem.O // problem.groups * problem.OW
    apart = len(every) > 2
    if apart and problem.op != "weight_grad":
        least = 1 if _by_rows(problem, every) else problem.OH
        most = max(most, size * least * row)
        n, g, rows = schedule.fit(
            (problem.N, problem.groups, problem.OH // least),
            lambda n, g, rows: size * n * g * rows * least * row, most, f"{NAME} on {problem}",
        )  # fmt: skip
        block = n, g, rows * least
    elements = problem.result_size if problem.op == "weight_grad" else math.prod(block) * row
    taken = 4096 + (size * elements if apart else 0)
    # Each implementation makes something of each part of k, which all may be kept.
    most_of: dict[tuple[str, str], int] = {}
    kinds = len({(term.name, term.second) for term in every})
    for term in every:
        for place in _corners(extents, block):
            planned = functools.partial(_inner, term, place, target)
            inner = _within(problem, limit, taken, kinds, planned)
            key = term.name, term.second
            most_of[key] = max(most_of.get(key, 0), inner.workspace)
    workspace = taken + sum(most_of.values())
    if workspace > limit:
        raise schedule.shortage(f"{NAME} on {problem}", workspace, limit)
    detail = f"{len(every)} real convolutions, by {' and '.join(dict.fromkeys(term.name for term in every))}"
    if block != extents:
        detail += f", {block[0]} image(s) × {block[1]} group(s) × {block[2]} row(s) at a time"
    config = {
        "terms": terms, "extents": extents, "block": block, "target": target,
        "limit": _share(limit, taken, kinds),
        "scratch": 2 * elements if apart else 0,
    }  # fmt: skip
    return Plan(problem, workspace, _real(problem.sum_dtype), detail, config)


def _share(limit: int, taken: int, kinds: int) -> int:
    return max(limit - taken, 0) // kinds


def _within(problem: Conv2dProblem, limit: int, taken: int, kinds: int, make: Callable[[int], Plan]) -> Plan:
    """What ``make`` plans in one of ``kinds`` equal shares of what is left of ``limit``."""
    try:
        return make(_share(limit, taken, kinds))
    except schedule.Shortage as error:
        raise schedule.shortage(f"{NAME} on {problem}", taken + kinds * error.needed, limit) from None


def _by_rows(problem: Conv2dProblem, terms: list[Term]) -> bool:
    """Whether some rows of outputs get the same bits as all at once: of ``rows``, which adds up lines by their position
    modulo the stride, only without one. Of the others it is not known.
    """
    plain = problem.stride[0] == problem.dilation[0] == 1
    served = {"numba_cpu.planes", "numba_cpu.strip", *(["numba_cpu.rows"] if plain else [])}
    return served.issuperset(term.name for term in terms)


Place = tuple[slice, slice, slice]  # images, groups and rows of outputs


def _corners(extents: tuple[int, ...], block: tuple[int, ...]) -> Iterator[Place]:
    """One of the blocks of each kind: there are no more than the first, the second and the last along each axis."""
    axes = [list(schedule.blocks((extent,), (size,))) for extent, size in zip(extents, block, strict=True)]
    for n, g, i in itertools.product(*(dict.fromkeys((0, min(1, len(axis) - 1), len(axis) - 1)) for axis in axes)):
        yield axes[0][n][0], axes[1][g][0], axes[2][i][0]


def _inner(term: Term, place: Place, target: Target, limit: int) -> Plan:
    """The plan of a term for one block."""
    n, g, i = place
    problem, rows = term.problem, i.stop - i.start
    groups = g.stop - g.start
    if rows != problem.OH:
        (top, _), across = problem.padding
        top -= i.start * problem.stride[0]
        bottom = (rows - 1) * problem.stride[0] + window(problem.KH, problem.dilation[0]) - top - problem.H
        problem = replace(problem, padding=((top, bottom), across))
    C, O = problem.C // problem.groups * groups, problem.O // problem.groups * groups
    return _planned(term.name, replace(problem, N=n.stop - n.start, C=C, O=O, groups=groups), target, limit)


@functools.lru_cache(maxsize=256)
def _planned(name: str, problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    return dispatch.implementation(name).plan(problem, target, limit)


def _packings(plan: Plan) -> dict[tuple[str, str], Plan]:
    """The plan by which each implementation packs each part of k."""
    config, found = plan.config, {}
    first = next(_corners(config["extents"], config["block"]))
    for term in (*config["terms"]["real"], *config["terms"]["imag"]):
        found[term.name, term.second] = _inner(term, first, config["target"], config["limit"])
    return found


def pack_key(plan: Plan) -> Any:
    """What the packed weights depend on besides the weights."""
    if "inner" in plan.config:
        return strip.pack_key(plan.config["inner"])
    return tuple((key, dispatch.implementation(key[0]).pack_key(inner)) for key, inner in _packings(plan).items())


def pack(plan: Plan, operands: Operands) -> Any:
    """The weights of the channels; or each part of the weights, as each of the implementations has it."""
    if "inner" in plan.config:
        return strip.pack(plan.config["inner"], replace(operands, k=_doubled(plan, operands.k)))
    return {
        (name, part): dispatch.implementation(name).pack(inner, replace(operands, k=_view(operands.k, part)))
        for (name, part), inner in _packings(plan).items()
    }


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the convolution, or a gradient, of NumPy operands into ``out``."""
    dense.run(_run, plan, operands, out)


def _run(plan: Plan, operands: Operands, out: Any) -> None:
    Bound(plan, operands.x, operands.k, out).run(operands, out)


class Bound:
    """A plan for arrays of certain strides, with what it has bound of the real convolutions that it is made of."""

    def __init__(self, plan: Plan, x: Any, k: Any | None, out: Any) -> None:
        """For arrays like ``x``, ``k`` and ``out``, which are seen at the first run."""
        self.plan = plan
        self.alone = False  # as far as is known: what it is made of is bound later
        self.inner: dict[Any, Any] = {}

    def __call__(self, x: Any, k: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Run on the caller's own arrays, or on views with the groups as an axis."""
        x, k, out = (
            array if array.ndim == _AXES else request.view(self.plan.problem, which, array)
            for which, array in enumerate((x, k, out))
        )
        self.run(Operands(x, k, bias, packed=packed), out)

    def run(self, operands: Operands, out: Any) -> None:
        """Write the convolution, or a gradient, of views into ``out``."""
        if "inner" in self.plan.config:
            self._channels(operands, out)
        else:
            _run_terms(self, operands, out)

    def _channels(self, operands: Operands, out: Any) -> None:
        plan, bias = self.plan, operands.bias
        k = None if operands.packed is not None else _doubled(plan, operands.k)
        if bias is not None:
            bias = np.stack((bias.real, bias.imag), axis=-1).ravel()
        x, y = operands.x.real, out.real
        ready = self.inner.get("channels")
        if ready is None:
            ready = self.inner["channels"] = strip.Bound(plan.config["inner"], x, k, y)
        ready(x, k, operands.packed, bias, y)


def _doubled(plan: Plan, k: Any) -> Any:
    """The weights of the real convolution whose channels are the parts, in the order that ``strip`` has them in."""
    problem, channels = plan.problem, plan.config["inner"].config["kc"] // 2
    groups, O, C, *taps = k.shape
    doubled = np.empty((groups, O, 2, 2 * C, *taps), k.real.dtype)
    for c in range(0, C, channels):
        block = k[:, :, c : c + channels]
        first, second = 2 * c, 2 * c + block.shape[2]
        real, imaginary = slice(first, second), slice(second, 2 * second - first)
        doubled[:, :, 0, real] = doubled[:, :, 1, imaginary] = block.real
        doubled[:, :, 1, real] = -block.imag if problem.conjugate else block.imag
        doubled[:, :, 0, imaginary] = block.imag if problem.conjugate else -block.imag
    return doubled.reshape((groups, 2 * O, 2 * C, *taps))


def _run_terms(bound: Bound, operands: Operands, out: Any) -> None:
    plan, problem, config = bound.plan, bound.plan.problem, bound.plan.config
    scratch = np.empty(config["scratch"], plan.sums_in)
    with np.errstate(all="ignore"):  # infinities and NaN are results here, not accidents
        for n, g, i in schedule.blocks(config["extents"], config["block"]):
            place = n, g, i
            for part, terms in config["terms"].items():
                y = _view(out, part)
                if problem.op != "weight_grad":
                    y = y[n, g, :, i]
                if len(terms) == 1:
                    _term(bound, terms[0], place, operands, part, y)
                    if terms[0].sign < 0:
                        # np.negative in place is wrong where elements lie 16 bytes apart (NumPy 2.4).
                        np.multiply(y, y.dtype.type(-1), out=y)
                else:
                    made = [_like(y, half, problem.layout) for half in np.split(scratch, 2)]
                    for term, sums in zip(terms, made, strict=True):
                        _term(bound, term, place, operands, part, sums)
                    (np.add if terms[1].sign > 0 else np.subtract)(made[0], made[1], out=y)


def _term(bound: Bound, term: Term, place: Place, operands: Operands, part: str, out: Any) -> None:
    """Write the block of a term, without its sign, into ``out``."""
    n, g, i = place
    plan, packed, bias = bound.plan, None, None
    x, k = _view(operands.x, term.first), _view(operands.k, term.second)
    if plan.problem.op == "weight_grad":
        x, k = x[n, g], k[n, g]
    else:
        x, k = x[n, g], k[g]
        if operands.packed is not None and g == slice(0, plan.problem.groups):
            packed = operands.packed[term.name, term.second]
    if term.problem.bias:
        bias = _view(operands.bias, part).reshape(plan.problem.groups, -1)[g].ravel()
        bias = bias if term.sign > 0 else -bias
    # Images and groups all look the same: without them in the key, what is kept does not grow with a batch.
    key = term.first, term.second, n.stop - n.start, g.stop - g.start, i.start, i.stop
    ready = bound.inner.get(key)
    if ready is None:
        inner = _inner(term, place, plan.config["target"], plan.config["limit"])
        made: Any = dispatch.implementation(term.name)
        ready = bound.inner[key] = made.Bound(inner, x, k if packed is None else None, out)
    ready(x, k, packed, bias, out)


def _view(array: Any, part: str) -> Any:
    """The real or the imaginary part of an array, where it lies."""
    return getattr(array, part) if array.dtype.kind == "c" else array


def _like(y: Any, memory: Any, layout: str) -> Any:
    """An array of the shape of ``y`` in ``memory``, in the order of ``layout``."""
    dense = memory[: y.size]
    if y.ndim == 5 and layout == "NHWC":
        n, g, o, rows, columns = y.shape
        return dense.reshape((n, rows, columns, g, o)).transpose(0, 3, 4, 1, 2)
    return dense.reshape(y.shape)
