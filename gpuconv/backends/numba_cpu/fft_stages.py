"""Fourier transforms of several lines at once: a line in each lane of a register, so that nothing crosses lanes.

A complex number of all lanes is two registers, side by side in memory: the real parts, then the imaginary ones. The way
there goes from whole lines to ever shorter parts of them (decimation in frequency), and leaves frequencies in an order
of their own; the way back takes them in that order. Products of two transforms need no other, and nobody sorts.

The stages are those of radix 4, and one of radix 2 for lines of twice a power of four. A stage of radix 4 takes numbers
a quarter of a part apart:

    there   y[0], y[2] = (a[0] + a[2]) ± (a[1] + a[3])        y[1], y[3] = (a[0] - a[2]) ∓ i·(a[1] - a[3])
            y[m] ·= w^(j·m),  w = exp(-2πi / length of the part), j the number within the quarter
    back    the same, backwards, with conjugate w; a line comes back multiplied by its length

Twiddle factors are off by about a unit of rounding at most. By Higham, Accuracy and Stability of Numerical Algorithms,
theorem 24.2, a transform's error is at most 7·log2(length) such units, relative to its Euclidean norm.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine

Complex = tuple[Value, Value]

# Bytes that stay in the first-level cache.
_CACHED = 32 << 10


def twiddles(length: int) -> np.ndarray[Any, Any]:
    """w^j, w^2j and w^3j for each j of each stage but its first, in the order of the stages of the way there."""
    factors = [np.zeros(1)]
    while length >= 4:
        factors.insert(-1, _powers(np.outer(np.arange(1, length // 4), (1, 2, 3)), length).ravel())
        length //= 4
    return np.concatenate(factors)


def _powers(exponents: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Real and imaginary parts of exp(-2πi / length) to the ``exponents``, from angles of at most 45 degrees: off by
    little more than half a unit of rounding.
    """
    quarter = length // 4
    turns, rest = exponents // quarter % 4, exponents % quarter
    angle = 2 * np.pi * np.minimum(rest, quarter - rest) / length
    beyond = 2 * rest > quarter
    cosine = np.where(beyond, np.sin(angle), np.cos(angle))
    sine = np.where(beyond, np.cos(angle), np.sin(angle))
    # A quarter of a turn makes (c, s) of (s, -c).
    real = np.choose(turns, (cosine, -sine, -cosine, sine))
    imaginary = np.choose(turns, (-sine, -cosine, sine, cosine))
    return np.stack((real, imaginary), axis=-1)


class _Emitter:
    """Complex arithmetic on an emitter's registers."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.builder, self.step = e, e.builder, 2 * e.lanes.count

    def load(self, z: Value, j: Value) -> Complex:
        place = self.e.at(z, self.builder.mul(j, I64(self.step)))
        return self.e.load(place), self.e.load(self.e.at(place, self.e.lanes.count))

    def store(self, value: Complex, z: Value, j: Value) -> None:
        place = self.e.at(z, self.builder.mul(j, I64(self.step)))
        self.e.store(value[0], place)
        self.e.store(value[1], self.e.at(place, self.e.lanes.count))

    def add(self, a: Complex, b: Complex) -> Complex:
        return self.builder.fadd(a[0], b[0]), self.builder.fadd(a[1], b[1])

    def sub(self, a: Complex, b: Complex) -> Complex:
        return self.builder.fsub(a[0], b[0]), self.builder.fsub(a[1], b[1])

    def mul(self, a: Complex, b: Complex, conjugate: bool = False) -> Complex:
        """a·b, or a times the conjugate of b."""
        builder, e = self.builder, self.e
        if conjugate:  # (ar·br + ai·bi), (ai·br - ar·bi)
            real = e.fma(a[0], b[0], builder.fmul(a[1], b[1]))
            return real, e.fma(a[1], b[0], builder.fneg(builder.fmul(a[0], b[1])))
        real = e.fma(a[0], b[0], builder.fneg(builder.fmul(a[1], b[1])))
        return real, e.fma(a[1], b[0], builder.fmul(a[0], b[1]))

    def factor(self, table: Value, index: Value) -> Complex:
        """A single complex number, in every lane; ``index`` in elements."""
        place = self.e.at(table, index)
        return self.e.splat(self.builder.load(place)), self.e.splat(self.builder.load(self.e.at(place, 1)))

    def factors(self, table: Value, j: Value) -> list[Complex]:
        """The three twiddle factors of j ≥ 1."""
        place = self.builder.mul(self.builder.sub(j, I64(1)), I64(6))
        return [self.factor(table, self.builder.add(place, I64(2 * i))) for i in range(3)]


def _stage(e: Emitter, z: Value, table: Value, quarter: Value, parts: Value, back: bool) -> None:
    """A stage of radix 4, in place."""
    c, builder = _Emitter(e), e.builder
    length = builder.mul(quarter, I64(4))

    def numbers(j: Value, factors: list[Complex] | None) -> None:
        def part(b: Value) -> None:
            first = builder.add(builder.mul(b, length), j)
            places = [first]
            for _ in range(3):
                places.append(builder.add(places[-1], quarter))
            a = [c.load(z, place) for place in places]
            if back:
                if factors:
                    a[1:] = [c.mul(value, factor, True) for value, factor in zip(a[1:], factors, strict=True)]
                a[1], a[2] = a[2], a[1]
                sums, differences = [c.add(a[0], a[1]), c.add(a[2], a[3])], [c.sub(a[0], a[1]), c.sub(a[2], a[3])]
                (ur, ui), (vr, vi) = differences
                made = [
                    c.add(*sums), (builder.fsub(ur, vi), builder.fadd(ui, vr)),
                    c.sub(*sums), (builder.fadd(ur, vi), builder.fsub(ui, vr)),
                ]  # fmt: skip
            else:
                sums, differences = [c.add(a[0], a[2]), c.add(a[1], a[3])], [c.sub(a[0], a[2]), c.sub(a[1], a[3])]
                (ur, ui), (vr, vi) = differences
                made = [
                    c.add(*sums), (builder.fadd(ur, vi), builder.fsub(ui, vr)),
                    c.sub(*sums), (builder.fsub(ur, vi), builder.fadd(ui, vr)),
                ]  # fmt: skip
                if factors:
                    made[1:] = [c.mul(value, factor) for value, factor in zip(made[1:], factors, strict=True)]
            for value, place in zip(made, places, strict=True):
                c.store(value, z, place)

        e.loop(0, parts, 1, part)

    numbers(I64(0), None)
    e.loop(1, quarter, 1, lambda j: numbers(j, c.factors(table, j)))


def _pairs(e: Emitter, z: Value, count: Value) -> None:
    """The stage of radix 2, which is its own way back."""
    c = _Emitter(e)

    def pair(b: Value) -> None:
        first = e.builder.mul(b, I64(2))
        second = e.builder.add(first, I64(1))
        a, b = c.load(z, first), c.load(z, second)
        c.store(c.add(a, b), z, first)
        c.store(c.sub(a, b), z, second)

    e.loop(0, count, 1, pair)


@functools.lru_cache(maxsize=16)
def transforms(lanes: Lanes) -> tuple[Any, Any]:
    """(there, back): functions of (z, table, length), in place on ``length`` numbers of all lanes at z."""
    there4 = routine(f"fft4_{lanes}", lanes, "eeii", functools.partial(_stage, back=False))
    back4 = routine(f"ifft4_{lanes}", lanes, "eeii", functools.partial(_stage, back=True))
    pairs = routine(f"fft2_{lanes}", lanes, "ei", _pairs)

    n = lanes.count
    most = _CACHED // (16 * n)

    @compiled
    def there(z, table, length):
        # Stages of long parts go through memory; of the short ones all are done with a part while it is in the cache.
        part = length
        while part > most:
            there4((z, table, part // 4, length // part))
            table += 48 * (part // 4 - 1)
            part //= 4
        for start in range(0, length, part):
            at, factors, rest = z + 16 * n * start, table, part
            while rest >= 4:
                there4((at, factors, rest // 4, part // rest))
                factors += 48 * (rest // 4 - 1)
                rest //= 4
            if rest == 2:
                pairs((at, part // 2))

    @compiled
    def back(z, table, length):
        part = length
        while part > most:
            table += 48 * (part // 4 - 1)
            part //= 4
        for start in range(0, length, part):
            at, factors, rest = z + 16 * n * start, table, part
            while rest >= 4:
                factors += 48 * (rest // 4 - 1)
                rest //= 4
            if rest == 2:
                pairs((at, part // 2))
            while rest < part:
                rest *= 4
                factors -= 48 * (rest // 4 - 1)
                back4((at, factors, rest // 4, part // rest))
        while part < length:
            part *= 4
            table -= 48 * (part // 4 - 1)
            back4((z, table, part // 4, length // part))

    return there, back


def _turned(e: Emitter, to: Value, source: Value, step_to: Value, step: Value, count: Value) -> None:
    """Squares of numbers, turned over: ``count`` of them, ``step`` elements from one to the next."""
    n = e.lanes.count

    def square(g: Value) -> None:
        here, there = e.at(source, e.builder.mul(g, step)), e.at(to, e.builder.mul(g, step_to))
        for part in (0, n):
            lines = [e.load(e.at(here, 2 * n * i + part)) for i in range(n)]
            for i, line in enumerate(e.transposed(lines)):
                e.store(line, e.at(there, 2 * n * i + part))

    e.loop(0, count, 1, square)


def _laid(e: Emitter, to: Value, source: Value, step: Value, count: Value) -> None:
    n = e.lanes.count

    def square(g: Value) -> None:
        here, there = e.at(source, e.builder.mul(g, I64(2 * n * n))), e.at(to, e.builder.mul(g, step))
        for i in range(0, 2 * n * n, n):
            e.store(e.load(e.at(here, i)), e.at(there, i))

    e.loop(0, count, 1, square)


@functools.lru_cache(maxsize=16)
def laid(lanes: Lanes) -> Any:
    """A function of (to, source, step, count): squares of complex numbers, one after the other at ``source``, laid
    ``step`` elements apart.
    """
    return routine(f"fft_lay_{lanes}", lanes, "eeii", _laid)


@functools.lru_cache(maxsize=16)
def turned(lanes: Lanes) -> Any:
    """A function of (to, source, step_to, step, count): squares of as many complex numbers as a register has lanes,
    turned over, ``step`` elements apart.
    """
    return routine(f"fft_turn_{lanes}", lanes, "eeiii", _turned)


def _product(e: Emitter, z: Value, k: Value, count: Value) -> None:
    c = _Emitter(e)
    e.loop(0, count, 1, lambda j: c.store(c.mul(c.load(z, j), c.load(k, j)), z, j))


def _products(e: Emitter, to: Value, z: Value, k: Value, step: Value, count: Value, more: bool) -> None:
    c, n = _Emitter(e), e.lanes.count

    def square(g: Value) -> None:
        here = e.at(z, e.builder.mul(g, step))
        for i in range(n):
            j = e.builder.add(e.builder.mul(g, I64(n)), I64(i))
            value = c.mul(c.load(here, I64(i)), c.load(k, j))
            c.store(c.add(c.load(to, j), value) if more else value, to, j)

    e.loop(0, count, 1, square)


class Products(NamedTuple):
    """Functions that multiply transforms; ``count`` of ``product`` are numbers, of the others squares."""

    product: Any  # product(z, k, count): z ·= k
    first: Any  # first(to, z, k, step, count): to = z · k, of z in squares ``step`` elements apart
    more: Any  # more(to, z, k, step, count): to += z · k


@functools.lru_cache(maxsize=16)
def products(lanes: Lanes) -> Products:
    """Products of the transforms of an image and of a kernel."""
    first, more = (
        routine(f"fft_products{more:d}_{lanes}", lanes, "eeeii", functools.partial(_products, more=more))
        for more in (False, True)
    )
    return Products(routine(f"fft_product_{lanes}", lanes, "eei", _product), first, more)


def _conjugate(e: Emitter, to: Value, z: Value, scale: Value, count: Value) -> None:
    c, factor = _Emitter(e), e.splat(e.builder.load(scale))

    def one(j: Value) -> None:
        real, imaginary = c.load(z, j)
        c.store((e.builder.fmul(real, factor), e.builder.fneg(e.builder.fmul(imaginary, factor))), to, j)

    e.loop(0, count, 1, one)


@functools.lru_cache(maxsize=16)
def conjugate(lanes: Lanes) -> Any:
    """A function of (to, z, scale, count): the conjugate of z times the number at ``scale``."""
    return routine(f"fft_conjugate_{lanes}", lanes, "eeei", _conjugate)


def order(length: int) -> np.ndarray[Any, Any]:
    """The frequency of each number of a transform."""
    if length < 4:
        return np.arange(length)
    part = 4 * order(length // 4)
    return np.concatenate([part + m for m in range(4)])


def _scale(e: Emitter, to: Value, z: Value, k: Value, count: Value, more: bool) -> None:
    c, builder = _Emitter(e), e.builder

    def one(j: Value) -> None:
        value = c.mul(c.load(z, j), c.factor(k, builder.mul(j, I64(2))))
        c.store(c.add(c.load(to, j), value) if more else value, to, j)

    e.loop(0, count, 1, one)


def _scale_in_place(e: Emitter, z: Value, k: Value, count: Value) -> None:
    c = _Emitter(e)
    e.loop(0, count, 1, lambda j: c.store(c.mul(c.load(z, j), c.factor(k, e.builder.mul(j, I64(2)))), z, j))


@functools.lru_cache(maxsize=16)
def scaled(lanes: Lanes) -> Products:
    """Products of all lanes of an image with single numbers k: product(z, k, count), and of (to, z, k, count) first and
    more.
    """
    first, more = (
        routine(f"fft_scale{more:d}_{lanes}", lanes, "eeei", functools.partial(_scale, more=more))
        for more in (False, True)
    )
    return Products(routine(f"fft_scale_{lanes}", lanes, "eei", _scale_in_place), first, more)
