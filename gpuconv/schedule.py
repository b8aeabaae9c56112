"""Chunks: how a problem is cut so that its scratch stays inside the workspace limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

DEFAULT_WORKSPACE = 256 * 2**20


def fit(extents: Sequence[int], scratch: Callable[..., int], limit: int, what: str) -> tuple[int, ...]:
    """Block extents, at most ``extents``, whose ``scratch(*block)`` bytes stay within ``limit``.

    Earlier axes are cut first: an axis is cut only when those before it are down to 1. Raises a MemoryError with the
    number of bytes when even a block of ones does not fit.
    """
    block = [1] * len(extents)
    if scratch(*block) > limit:
        raise shortage(what, scratch(*block), limit)
    for axis in reversed(range(len(extents))):
        low, high = 1, max(extents[axis], 1)  # the largest extent that fits, by bisection
        while low < high:
            middle = (low + high + 1) // 2
            block[axis] = middle
            low, high = (middle, high) if scratch(*block) <= limit else (low, middle - 1)
        block[axis] = low
        if low < extents[axis]:
            break
    # Even shares: 10 rows in blocks of 9 would be 9 and 1.
    shares = [-(-extent // -(-extent // size)) if extent else 1 for extent, size in zip(extents, block, strict=True)]
    return tuple(shares)


class Shortage(MemoryError):
    """Too little scratch; ``needed`` bytes would do."""

    needed: int


def shortage(what: str, needed: int, limit: int) -> Shortage:
    """The error of a problem that ``limit`` bytes are too few for."""
    error = Shortage(f"{what} needs at least {needed} bytes of scratch and workspace_limit is {limit}; raise it")
    error.needed = needed
    return error


def halved(extent: int, fits: Callable[[int], bool], at_least: int = 1) -> int:
    """``extent``, cut in half until it fits or is no more than ``at_least``."""
    while extent > at_least and not fits(extent):
        extent = -(-extent // 2)
    return extent


def blocks(extents: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The slices that cut ``extents`` into blocks of at most ``block``, the last axis fastest."""
    if not extents:
        yield ()
        return
    for start in range(0, extents[0], block[0]):
        first = slice(start, min(start + block[0], extents[0]))
        for rest in blocks(extents[1:], block[1:]):
            yield first, *rest
