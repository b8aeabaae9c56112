"""The constant of a padding: a number that x's dtype can hold."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import dtypes, geometry

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LARGEST = {
    "float16": 65504.0,
    "bfloat16": float.fromhex("0x1.fep127"),
    "float32": _FLOAT32_MAX,
    "complex64": _FLOAT32_MAX,
}


def checked(call: str, value: Any, x_dtype: str) -> complex:
    """``value`` as a Python number that x's dtype can hold."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:  # NumPy would make an object of it
        if dtypes.is_integer(x_dtype) or value.bit_length() > 1023:
            raise ValueError(f"{call}: padding_value is beyond the range of {x_dtype}; got {_shown(value)}")
        value = float(value)
    try:
        scalar = np.asarray(value)
    except ValueError:  # ragged lists
        scalar = np.asarray(None)
    kind = scalar.dtype.kind
    if kind not in "biufc" or scalar.ndim != 0 or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{call}: padding_value must be a number; got {_shown(value)} of type {type(value).__name__}")
    if dtypes.is_integer(x_dtype):
        low, high = dtypes.RANGES[x_dtype]
        if kind in "fc":
            raise TypeError(f"{call}: padding_value must be an integer for x of dtype {x_dtype}; got {value!r}")
        if not low <= int(scalar) <= high:
            raise ValueError(f"{call}: padding_value must lie in {x_dtype}'s range {low} to {high}; got {value!r}")
        return int(scalar)
    if kind == "c" and not dtypes.is_complex(x_dtype):
        raise TypeError(f"{call}: padding_value must be real for x of dtype {x_dtype}; got {value!r}")
    number = complex(scalar)
    largest = _LARGEST.get(x_dtype, np.inf)
    if any(np.isfinite(part) and abs(part) > largest for part in (number.real, number.imag)):
        raise ValueError(f"{call}: padding_value is beyond the range of x's dtype {x_dtype}; got {value!r}")
    if dtypes.is_complex(x_dtype):
        return _one_nan(repr(number)) if number != number else number
    real = number.real
    if real != real:
        return math.nan  # this one object: NaN equals nothing else, and equal problems must be equal
    return int(real) if real.is_integer() and abs(real) < 2**53 else real


def check_meaning(call: str, given: Any, value: complex, padding_mode: Any) -> None:
    """Refuse a constant, ``value`` as it was ``given``, with a mode that has none."""
    if value != 0 and (geometry.as_padding_mode(call, padding_mode) != "constant" or padding_mode == "zeros"):
        raise ValueError(
            f"{call}: padding_value={given!r} has no meaning with padding_mode={padding_mode!r}; "
            "leave it at 0 or use padding_mode='constant'"
        )


def _shown(value: Any) -> str:
    return geometry.shown(value) if isinstance(value, int) else repr(value)


@lru_cache(maxsize=64)
def _one_nan(text: str) -> complex:
    """One object for each complex number with a NaN in it, so that equal problems are equal."""
    return complex(text)
