"""What a tile reads: its window, filled from pieces of the source, padded pixels through the border of the whole image.

    window[n, c, p, q] = source[n, c, rows[p], columns[q]]        the constant where an index is -1

Every source element that a window needs is read once, in blocks of neighbouring rows and columns: under "wrap" a tile
at the border reads both ends of an axis, and nothing in between.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from gpuconv import layouts
from gpuconv.geometry import IntArray
from gpuconv.tiling import tiles
from gpuconv.tiling.storage import Storage

Array = np.ndarray[Any, Any]
Interval = tuple[int, int]
Runs = list[tuple[slice, slice]]  # places in the window and, of the same number of elements, in a block that was read

# A window of more runs than this (a huge dilation makes them) is gathered element by element.
_MOST_RUNS = 64
_GAP = 16  # elements that are read over rather than begin another block


def fill(
    window: Array,
    layout: str,
    source: Storage,
    planes: tuple[slice, slice],
    rows: IntArray,
    columns: IntArray,
    constant: complex,
    most: int,
) -> None:
    """Fill ``window`` from the images and channels ``planes`` of ``source``, both in ``layout``.

    About ``most`` bytes are read at a time.
    """
    target, medium = _four(window, layout), source.reading(layout)
    if (rows < 0).any() or (columns < 0).any():
        window[...] = constant
    down, across = _intervals(rows, medium.chunks[2]), _intervals(columns, medium.chunks[3])
    if not down or not across:
        return
    height, width = (max(stop - start for start, stop in axis) for axis in (down, across))
    piece = medium.piece(layout, (target.shape[0], target.shape[1], height, width), window.itemsize, most)
    whole = [[(part.start, part.stop)] for part in planes] + [down, across]
    parts = [
        [small for large in axis for small in tiles.cut(*large, chunk, size)]
        for axis, chunk, size in zip(whole, medium.chunks, piece, strict=True)
    ]
    image, channel = (part.start for part in planes)
    for at in itertools.product(*parts):
        n, c, i, j = (slice(*interval) for interval in at)
        block = _four(source.read(tiles.placed(layout, window.ndim, (n, c, i, j))), layout)
        some = target[n.start - image : n.stop - image, c.start - channel : c.stop - channel]
        _copy(block, some, _within(rows, *at[2]), _within(columns, *at[3]))
        source.release()


def _four(array: Array, layout: str) -> Array:
    """``array`` as N C H W."""
    view: Array = array.transpose(layouts.image_axes(layout, array.ndim))[(None,) * (4 - array.ndim)]
    return view


def _intervals(index: IntArray, chunk: int) -> list[Interval]:
    """The source elements that ``index`` needs, as intervals; gaps of a chunk, or of a few elements, are read over."""
    needed = np.unique(index[index >= 0])
    cuts = np.flatnonzero(np.diff(needed) > max(chunk, _GAP)) + 1
    return [(int(some[0]), int(some[-1]) + 1) for some in np.split(needed, cuts) if len(some)]


def _within(index: IntArray, start: int, stop: int) -> tuple[IntArray, IntArray]:
    """Places of ``index`` that lie in [start, stop), and what they are there."""
    places = np.flatnonzero((index >= start) & (index < stop))
    return places, index[places] - start


def _copy(block: Array, target: Array, rows: tuple[IntArray, IntArray], columns: tuple[IntArray, IntArray]) -> None:
    """``target[..., places of rows, places of columns] = block[..., rows, columns]``."""
    down, across = _runs(*rows), _runs(*columns)
    if len(down) * len(across) > _MOST_RUNS:
        target[..., rows[0][:, None], columns[0]] = block[..., rows[1][:, None], columns[1]]
        return
    for i, p in down:
        for j, q in across:
            target[..., i, j] = block[..., p, q]


def _runs(places: IntArray, index: IntArray) -> Runs:
    """Runs of neighbouring places whose indices rise, fall or stay in equal steps."""
    if not len(places):
        return []
    steps = np.diff(index)
    broken = np.diff(places) != 1
    changed = np.zeros(len(places), bool)  # where a run begins
    changed[1:] = broken
    changed[2:] |= steps[1:] != steps[:-1]
    starts = np.flatnonzero(changed)
    found: Runs = []
    for first, last in zip([0, *starts], [*starts, len(places)], strict=True):
        low, step = int(index[first]), int(steps[first]) if last - first > 1 else 1
        end = low + step * (int(last - first) - 1)
        if step == 0:
            source = slice(low, low + 1)  # of one element, which fills them all
        else:
            end += 1 if step > 0 else -1
            source = slice(low, None if end < 0 else end, step)
        found.append((slice(int(places[first]), int(places[last - 1]) + 1), source))
    return found
