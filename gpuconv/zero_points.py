"""Zero points of 8-bit data: which there are."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuconv import dtypes, geometry


def as_zero_point(call: str, name: str, value: Any, dtype: str | None) -> int:
    """``value`` as a zero point of ``dtype``, or for None, of an 8-bit type that holds it."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    integer = geometry.as_integer(call, name, value, -(2**62), 2**62)
    check_zero_point(call, name, integer, integer, dtype or ("int8" if integer < 0 else "uint8"))
    return integer


def check_zero_point(call: str, name: str, low: int, high: int, dtype: str) -> None:
    """Refuse zero points (from ``low`` to ``high``) that ``dtype`` cannot hold, or that are not for 8-bit data."""
    if low == high == 0:
        return
    if dtype not in ("int8", "uint8"):
        raise TypeError(f"{call}: {name} is for int8 and uint8 operands; the operand has dtype {dtype}")
    bottom, top = dtypes.RANGES[dtype]
    if low < bottom or high > top:
        raise ValueError(
            f"{call}: {name} must lie in {dtype}'s range {bottom} to {top}; got {low if low < bottom else high}"
        )
