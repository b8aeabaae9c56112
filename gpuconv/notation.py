"""Numbers and sums as one would write them by hand: a true minus sign, brackets round what is negative."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

MINUS = "−"


def by(extents: tuple[int, ...]) -> str:
    """``3×5``."""
    return "×".join(map(str, extents))


def number(value: Any) -> str:
    """Whole numbers in full, others with six significant digits."""
    if isinstance(value, complex):
        if value.imag == 0:
            return number(value.real)
        sign = MINUS if math.copysign(1, value.imag) < 0 else "+"
        return f"{number(value.real)}{sign}{number(abs(value.imag))}j"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e16:
        value = int(value)
    return (str(value) if isinstance(value, int) else format(value, ".6g")).replace("-", MINUS)


def bracketed(value: Any) -> str:
    """``number``, in brackets where a sign in front of it would need them."""
    text = number(value)
    return f"({text})" if text.startswith(MINUS) or text.endswith("j") else text


def grid(array: npt.NDArray[Any]) -> list[str]:
    """The rows of a matrix, its columns aligned."""
    cells = [[number(value) for value in row] for row in array.tolist()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.rjust, row, widths)) for row in cells]


def weighted_sum(patch: npt.NDArray[Any], kernel: npt.NDArray[Any], products: npt.NDArray[Any]) -> str:
    """``Σ patch·kernel`` in signs: a bracket per kernel row, without the taps whose weight is zero."""
    plain = bool(np.isin(kernel, (-1, 0, 1)).all())
    plus = "+" if plain else " + "
    brackets = []
    for values, weights, terms_of_row in zip(patch, kernel, products, strict=True):
        # Only zero·inf and zero·nan leave a zero weight something to say.
        said = (weights != 0) | (terms_of_row != 0)
        taps = enumerate(zip(values[said].tolist(), weights[said].tolist(), strict=True))
        terms = [_signed(value, weight, plain, at == 0) for at, (value, weight) in taps]
        if terms:
            brackets.append((len(terms), _chain(terms, plain)))
    if len(brackets) <= 1:
        return brackets[0][1] if brackets else "0"
    return plus.join(
        f"({text})" if terms > 1 or (i > 0 and text.startswith(MINUS)) else text
        for i, (terms, text) in enumerate(brackets)
    )


def _signed(value: Any, weight: Any, plain: bool, first: bool) -> tuple[str, str]:
    """One tap as its sign and the rest; weights of 1 and -1 are signs alone where all weights are ``plain``."""
    if plain and weight:
        sign = MINUS if weight == -1 else ""
        return sign, number(value) if first and not sign else bracketed(value)
    sign = MINUS if not isinstance(weight, complex) and weight < 0 else ""
    return sign, f"{bracketed(-weight if sign else weight)}·{bracketed(value)}"


def _chain(terms: list[tuple[str, str]], plain: bool) -> str:
    first, *rest = terms
    space = "" if plain else " "
    return "".join(first) + "".join(f"{space}{sign or '+'}{space}{text}" for sign, text in rest)
