"""Pixels beside images in the slices of a weight gradient, for small batches on tensor cores.

    dk[o,c,p,q] = Σ_nij dy[n,o,i,j] · x[n,c, row(i,p), column(j,q)]

is summed slice by slice, each of one pixel (i, j) and as many images as an instruction takes products; of one image it
would hold one product of 32. Here a slice takes some neighbouring columns j = J·m + r of each image too, as if these
were images:

    x'[c, h, w, r·N + n] = x[n, c, h, w - left + r·stride]       dy'[o, i, J, r·N + n] = dy[n, o, i, J·m + r]

with zeros where x ends, so that w begins at the padding, and m a divisor of dy's columns: with a rest of them, a weight
of zero would meet numbers that no window reads, and a NaN among them would show. x' is the copy that has the images
side by side anyway; dy' is never made, but read so when its panels are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import direct
from gpuconv.problem import Conv2dProblem

# Bytes of the copy of one channel, about: it is m times as large as without, and has to fit in any workspace.
_COPY = 1 << 23


@dataclass(frozen=True)
class Together:
    """How many columns, and where the copy has them from."""

    columns: int
    width: int  # of x
    left: int  # columns of the copy before those of x
    step: int  # columns of x from one of dy to the next


def of(problem: Conv2dProblem, depth: int) -> Together | None:
    """The columns that a slice of ``depth`` products should take; None where a single one is best."""
    if problem.op != "weight_grad" or problem.N == 0:
        return None
    row = problem.H * dtypes.itemsize(problem.x_dtype)

    def slices(m: int) -> int:
        return problem.OW // m * -(-m * problem.N // depth)

    def fits(m: int) -> bool:
        return row * _width(problem, m) * m * problem.N * problem.groups <= _COPY

    most = min(problem.OW, max(2 * depth // problem.N, 1))
    fitting = [m for m in range(2, most + 1) if problem.OW % m == 0 and fits(m)]
    m = min([1, *fitting], key=slices)
    return Together(m, problem.W, problem.padding[1][0], problem.stride[1]) if m > 1 else None


def _width(problem: Conv2dProblem, m: int) -> int:
    """Columns of the copy: from those that the first windows begin at to those that the last ones do."""
    return (problem.KW - 1) * problem.dilation[1] + (problem.OW - m) * problem.stride[1] + 1


def parts(problem: Conv2dProblem, depth: int) -> tuple[direct.Part, ...]:
    """``direct.parts``, of a weight gradient with columns together that of x' and dy'."""
    lowered, together = direct.parts(problem), of(problem, depth)
    if together is None:
        return lowered
    m = together.columns
    taps = problem.OW // m
    forward = lowered[0].problem
    swapped = replace(
        forward, C=forward.C * m, W=_width(problem, m), KW=taps, padding=(forward.padding[0], (0, 0)),
        dilation=(forward.dilation[0], m * problem.stride[1] if taps > 1 else 1),
    )  # fmt: skip
    return (replace(lowered[0], problem=swapped),)
