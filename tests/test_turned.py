"""Channels-first images for the kernel of channels side by side: blocks turned over, and when that is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from gpuconv import dispatch, preference
from gpuconv.backends.numba_cpu import runtime, turns
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.problem import Conv2dProblem

pytestmark = pytest.mark.skipif(runtime.unavailable() is not None, reason=str(runtime.unavailable()))

WIDTHS = [bits for bits in (128, 256, 512) if bits <= runtime.vector_bits()]

# Fewer than a square's side, one more and one less than it, pairs of squares with and without a rest.
COUNTS = (1, 3, 7, 8, 9, 15, 16, 17, 33, 49)


@pytest.mark.parametrize("bits", WIDTHS)
def test_blocks_of_any_size_are_turned_over_and_back(bits):
    """Nothing beside them is written; steps of one and two elements have code of their own."""
    lanes = Lanes.of("float32", bits)
    gather, scatter = turns.turns(lanes, "float32")

    @njit
    def there(*arguments):
        gather(*arguments)

    @njit
    def back(*arguments):
        scatter(*arguments)

    buffer = np.empty(turns.BUFFER, np.uint8)
    for channels in COUNTS:
        for pixels in COUNTS:
            for step in (1, 2, 3):
                planes = np.arange(channels * (pixels * step + 2), dtype=np.float32).reshape(channels, -1)
                beside = np.full((pixels, channels + 5), -1, np.float32)
                sizes = channels, pixels, planes.strides[0], 4 * step, buffer.ctypes.data
                there(beside.ctypes.data, channels + 5, planes.ctypes.data, *sizes)
                where = slice(0, pixels * step, step)
                assert (beside[:, :channels] == planes[:, where].T).all(), (channels, pixels, step)
                assert (beside[:, channels:] == -1).all()
                found = np.full_like(planes, -2)
                back(found.ctypes.data, channels + 5, beside.ctypes.data, *sizes)
                wanted = np.full_like(planes, -2)
                wanted[:, where] = planes[:, where]
                assert (found == wanted).all(), (channels, pixels, step)


@pytest.mark.parametrize(
    ("line", "wide", "narrow"),
    [
        ("n1c64h56w56_o64kh3kw3_p1", "strip", "pixels"),  # a large plane
        ("n1c64h28w28_o16kh3kw3_p1", "strip", "pixels"),  # few outputs, which fill a panel of 16
        ("n1c32h56w56_o24kh3kw3_p1", "strip", "strip"),  # half a panel empty
        ("n1c3h56w56_o64kh3kw3_p1", "strip", "strip"),  # few channels
        ("n1c128h28w28_o512kh1kw1", "pixels", "pointwise"),  # more sums than pixels to turn
        ("n1c512h28w28_o128kh1kw1", "pixels", "pointwise"),
        ("n1c512h14w14_o128kh1kw1", "pixels", "pixels"),
        ("n1c256h56w56_o64kh1kw1", "pointwise", "pointwise"),
        ("n1c512h7w7_o512kh3kw3_p1", "pixels", "pixels"),
    ],
)
def test_what_is_turned_over_depends_on_the_registers(line, wide, narrow, monkeypatch):
    """A panel of outputs is 64 or 48 or 32 with AVX-512, and 16 or 8 without."""
    for bits, name in ((512, wide), (256, narrow)):
        monkeypatch.setattr(preference, "_vector_bits", lambda bits=bits: bits)
        assert dispatch.preferred(Conv2dProblem.parse(line), "cpu")[0][0] == f"numba_cpu.{name}"
