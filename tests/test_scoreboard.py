"""The scoreboard: how large the rounding errors of every implementation, operator and dtype really are.

``python -m pytest -n 0 -s tests/test_scoreboard.py`` prints it. Unit A is the largest error in units of its a-priori
bound, at most 1 (½ from 16 products on, in float32 and float64). Unit B is the typical error in units of an ideal
summation's: ``rms(err) / (u·√K·rms·rms)``, at most 10 on normal data, and on a CPU at most 150 on positive data.
"""

from __future__ import annotations

import cases
import family
import numpy as np
import pytest
import units
from calls import is_costly
from cases import CASES, Case
from family import FAMILY, FamilyCase
from running import runner, simulated

from gpuconv import dispatch

OPERATORS = ("conv2d", "conv_transpose2d", "conv2d_input", "conv2d_weight", "fold")
# Products per sum of the problems that unit B is read on.
LENGTHS = (9, 576, 4608, 9216)


def long_sum(call: str, products: int) -> Case | FamilyCase:
    """A problem of ``call`` that sums ``products`` products for every element of its result."""
    channels, name = products // 9, f"scoreboard_{products}"
    if call == "conv2d":
        return Case(name, (1, channels, 10, 10), (8, channels, 3, 3))
    if call == "conv2d_weight":
        images = products // 9
        return FamilyCase(call, name, ((images, 4, 5, 5), (images, 4, 3, 3)), ((4, 4, 3, 3),))
    # Every pixel of the result is reached by all taps: the border is cropped.
    shapes = (channels, 4, 3, 3), (1, channels, 8, 8)
    if call == "conv2d_input":
        return FamilyCase(call, name, shapes, ((1, 4, 6, 6),), {"padding": 2})
    return FamilyCase(call, name, shapes[::-1], (), {"padding": 2})


def read(run: units.Run, case: Case | FamilyCase, dtype: str, kind: str) -> tuple[float, float]:
    """Units A and B of one problem; A within its limit."""
    if isinstance(case, Case):
        *operands, answer = units.posed(case, dtype, kind)
        y = run(*operands, **case.kwargs)
    else:
        operands, answer = family.posed(case, dtype, kind)
        y = run(*case.arguments(operands), **case.kwargs)
    reading = units.assert_close(y, answer, f"{case.name} {dtype} {kind}", units.limit_of(answer))
    if dtype not in ("float32", "float64"):
        return reading, 0.0
    return reading, units.unit_b(y, answer, *operands[:2])


def worst_small(run: units.Run, call: str, dtype: str) -> float:
    """Unit A over the small awkward problems."""
    worst = 0.0
    for case in CASES if call == "conv2d" else FAMILY:
        if case.smoke and case.accepts(dtype) and getattr(case, "call", call) == call:
            check = units.check if call == "conv2d" else family.check
            worst = max(worst, *(check(run, case, dtype, kind) for kind in ("normal", "positive")))
    return worst


@pytest.mark.parametrize("name", dispatch.TABLE)
def test_scoreboard(name):
    if simulated(name):
        pytest.skip("sums of thousands of products are too much for the CUDA simulator")
    if name == "numba_cpu.spread":
        pytest.skip("it sums over the taps of one channel: no sum is long")
    ops = dispatch.implementation(name).OPS
    lines = [f"\n{name:<18} {'dtype':<9} {'A small':>8} {'A long':>9} {'B normal':>9} {'B positive':>10}"]
    floats = [dtype for dtype in cases.FLOATS if not is_costly(name, dtype)]
    if not floats:
        pytest.skip(f"{name} is for complex numbers")
    for call in OPERATORS:
        if ("forward" if call == "conv2d" else family.CALLS[call][0]) not in ops:
            continue
        run = (
            runner(name) if call == "conv2d" else lambda *a, call=call, **k: family.public(call)(*a, backend=name, **k)
        )
        runner(name)  # skips with its reason what this machine has not
        for dtype in floats:
            small, long, normal, positive = worst_small(run, call, dtype), 0.0, 0.0, 0.0
            for products in LENGTHS if call != "fold" else ():
                case = long_sum(call, products)
                a, b = read(run, case, dtype, "normal")
                a_positive, b_positive = read(run, case, dtype, "positive")
                long, normal, positive = max(long, a, a_positive), max(normal, b), max(positive, b_positive)
            lines.append(f"{call:<18} {dtype:<9} {small:8.2g} {long:9.2g} {normal:9.2g} {positive:10.2g}")
            assert small <= 1 and long <= 1
            assert normal <= 10
            if dispatch.DEVICES[dispatch.library_of(name)] == "cpu":
                # A GPU's products keep one running sum per element: reported, not judged.
                assert positive <= 150
    print("\n".join(lines))
    assert len(lines) > 1


def test_positive_data_tells_one_running_sum_from_short_ones():
    """The scoreboard can fail: one float32 sum over thousands of products reads far above 150."""

    def running(x: np.ndarray, k: np.ndarray, bias: None, **kwargs: object) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(x[0], (3, 3), axis=(1, 2)).transpose(1, 2, 0, 3, 4)
        products = windows.reshape(8, 8, 1, -1) * k.reshape(1, 1, len(k), -1)
        sums = np.zeros(products.shape[:3], np.float32)
        for index in range(products.shape[-1]):
            sums += products[..., index]
        return np.ascontiguousarray(sums.transpose(2, 0, 1)[None])

    assert read(running, long_sum("conv2d", 9216), "float32", "positive")[1] > 150
