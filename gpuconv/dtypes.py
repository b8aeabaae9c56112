"""Which element types a convolution takes, what it returns, and what it sums in.

Types go by name (``"float32"``, ``"bfloat16"``), so that a problem can be described where the array library that
holds such a type is not installed.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

# name -> the code that a problem line shows
CODES = {
    "bool": "bool",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "uint32": "u32",
    "int64": "i64",
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "complex64": "c64",
    "complex128": "c128",
}
NAMES = {code: name for name, code in CODES.items()}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
_BYTE_INTEGERS = ("bool", "int8", "uint8")
SMALL_INTEGERS = (*_BYTE_INTEGERS, "int16", "uint16")
_RESULTS = ("int32", "int64", *_FLOATS, *_COMPLEX)

# np.iinfo by name, with bool as the integers 0 and 1
RANGES: dict[str, tuple[int, int]] = {"bool": (0, 1)} | {
    name: (int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in CODES if "int" in name
}


def is_integer(name: str) -> bool:
    """Whether ``name`` is an integer type or bool."""
    return name in RANGES


def is_complex(name: str) -> bool:
    """Whether ``name`` is a complex type."""
    return name in _COMPLEX


def itemsize(name: str) -> int:
    """Bytes of one element."""
    return 2 if name == "bfloat16" else int(np.dtype(name).itemsize)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype called ``name``; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    result: np.dtype[Any] = np.dtype(name)
    return result


def rounded(value: complex, name: str) -> complex:
    """``value`` as a number that ``name`` holds; bfloat16 by its bits, so that it takes no other library."""
    if is_integer(name) or value == 0 or name in ("float64", "complex128"):
        return value
    if name == "bfloat16":
        if value != value or abs(value) == float("inf"):
            return value
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # to nearest, ties to even
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    result: complex = np.dtype(name).type(value).item()
    return result


def name_of(call: str, subject: str, dtype: Any) -> str:
    """The name of ``dtype`` (NumPy's, PyTorch's, a scalar type or a string), or a TypeError saying what is accepted.

    ``subject`` begins the message: "x has dtype", "dtype is".
    """
    if isinstance(dtype, str) and dtype in CODES:
        return dtype  # "bfloat16" is no dtype of NumPy's own
    try:
        name = str(np.dtype(dtype).name)
    except (TypeError, ValueError):
        name = str(dtype) if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in CODES:
        hint = "; convert it to float64" if name in ("longdouble", "float128", "float96") else ""
        hint = "; values below 2**63 fit int64" if name == "uint64" else hint
        if name == "object" and subject.endswith("has dtype"):
            hint = "; make numbers of it first, with astype(float) perhaps"
        raise TypeError(f"{call}: {subject} {name}, which is not one of {', '.join(CODES)}{hint}")
    return name


def promoted(x: str, k: str) -> str:
    """Result type of a convolution of ``x`` and ``k`` when none is asked for."""
    x_integer, k_integer = is_integer(x), is_integer(k)
    if x_integer and k_integer:
        return "int32" if x in _BYTE_INTEGERS and k in _BYTE_INTEGERS else "int64"
    if x_integer or k_integer:
        return k if x_integer else x
    if x == k:
        return x
    if "bfloat16" in (x, k):
        other = k if x == "bfloat16" else x
        return "float32" if other == "float16" else other
    return str(np.result_type(x, k).name)


def result_dtype(call: str, x: str, k: str, dtype: Any) -> str:
    """The result type: ``dtype`` as the caller asked for it, where it can hold the products, or the default."""
    default = promoted(x, k)
    if dtype is None:
        return default
    result = name_of(call, "dtype is", dtype)
    if result not in _RESULTS:
        raise TypeError(
            f"{call}: dtype must be one of {', '.join(_RESULTS)} (integers are summed in 32 or 64 bits); got {result}"
        )
    if _kind(default) > _kind(result):
        raise TypeError(
            f"{call}: dtype={result} cannot hold the product of {x} and {k}: "
            f"casting {default} to {result} is not allowed by the rule 'same_kind'"
        )
    return result


def _kind(name: str) -> int:
    return 2 if is_complex(name) else 0 if is_integer(name) else 1


def castable(source: str, result: str) -> bool:
    """Whether ``source`` may be cast to ``result`` under NumPy's rule ``same_kind``."""
    return _kind(source) <= _kind(result)
