"""What a matrix product should cost on a GPU, for every tile shape and every number of parts of its sums.

The constants are predictions: no measurement has confirmed one of them. They need only put the choices in the right
order; ``gpuconv.autotune`` measures the first few.

A block's time is the largest of three: its arithmetic, shared with the other blocks of its multiprocessor; its turns,
one per slice, none shorter than the memory's latency over the slices that are under way; and what it takes to begin and
end. Blocks run in waves over the multiprocessors, and the last wave takes as long as a full one does with fewer blocks.
The launch takes the largest of its waves and of its traffic, from memory and from the cache, and something for itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from gpuconv.backends.numba_cuda.gpus import Gpu

LATENCY = 0.6e-6  # s, from asking for a slice to having it
BLOCK = 1.5e-6  # s to begin and end a block: indices, the first slices, the results
LAUNCH = 3e-6  # s of a kernel that follows another
WARPS = 8  # on a multiprocessor, that keep its arithmetic units busy
MOST_PARTS = 64


class Shape(Protocol):
    """What is asked of a tile shape."""

    @property
    def outputs(self) -> int:
        """Output channels."""

    @property
    def pixels(self) -> int:
        """Pixels."""

    @property
    def threads(self) -> int:
        """Threads of a block."""

    @property
    def registers(self) -> int:
        """Registers of a thread."""

    @property
    def stages(self) -> int:
        """Slices on their way or in use."""

    @property
    def worth(self) -> float:
        """Speed of a full tile against the best one's."""

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory of a block."""


@dataclass(frozen=True)
class Work:
    """A product of ``groups`` pairs of matrices: [outputs, slices·depth] · [slices·depth, images·pixels]."""

    way: str  # of multiplying, as ``Gpu.rate`` knows it
    outputs: int
    pixels: int  # of one image
    images: int
    groups: int
    slices: int
    depth: int  # products of a slice
    itemsize: int  # of weights and window
    image_bytes: int  # read and written of memory for each image, each once
    weight_bytes: int
    launches: int = 1  # of kernels, besides the one that adds parts up

    @property
    def flops(self) -> int:
        """Operations, with those that fill up the last slice of each tap."""
        return 2 * self.outputs * self.pixels * self.images * self.groups * self.slices * self.depth


@dataclass(frozen=True)
class Candidate:
    """One way to do a piece of work, and the seconds that it should take."""

    tile: Any
    parts: int
    seconds: float


def floor(work: Work, gpu: Gpu) -> float:
    """The least seconds that the GPU's data sheet allows."""
    arithmetic = work.flops / (gpu.rate(work.way) * gpu.multiprocessors)
    return max(arithmetic, (work.images * work.image_bytes + work.weight_bytes) / gpu.bandwidth)


def seconds(work: Work, tile: Shape, parts: int, gpu: Gpu) -> float:
    """What the work should take with blocks of ``tile``, its sums in ``parts`` parts."""
    resident = gpu.resident(tile.threads, tile.registers, tile.shared(work.itemsize))
    part_slices = -(-work.slices // parts)
    pixels = work.pixels * work.images
    blocks = -(-work.outputs // tile.outputs) * -(-pixels // tile.pixels) * work.groups * parts
    flops = 2 * tile.outputs * tile.pixels * part_slices * work.depth

    def wave(count: int) -> float:
        """The time of ``count`` blocks on one multiprocessor."""
        busy = min(1.0, count * tile.threads / (32 * WARPS))
        arithmetic = count * flops / (gpu.rate(work.way) * tile.worth * busy)
        return max(arithmetic, part_slices * LATENCY / (tile.stages - 1)) + BLOCK

    waves, rest = divmod(blocks, gpu.multiprocessors * resident)
    time = waves * wave(resident) + (wave(-(-rest // gpu.multiprocessors)) if rest else 0)
    memory = work.images * work.image_bytes + work.weight_bytes
    cache = blocks * (tile.outputs + tile.pixels) * part_slices * work.depth * work.itemsize
    # Written once and read once, in float32 or wider.
    left = 2 * parts * max(4, work.itemsize) * work.groups * work.outputs * pixels
    adding = LAUNCH + left / gpu.bandwidth if parts > 1 else 0
    return max(time, memory / gpu.bandwidth, cache / gpu.cache_bandwidth) + adding + work.launches * LAUNCH


def ranked(work: Work, tiles: Iterable[Shape], counts: Iterable[int], gpu: Gpu) -> list[Candidate]:
    """Every tile with every number of parts, the one that should be fastest first; of equal ones the smallest tile."""
    found = [Candidate(tile, count, seconds(work, tile, count, gpu)) for tile in tiles for count in counts]
    return sorted(found, key=lambda candidate: (candidate.seconds, candidate.tile.outputs * candidate.tile.pixels))


def divisions(slices: int, least: int, shortest: int) -> list[int]:
    """Numbers of parts to think of: at least ``least``, none empty, and none shorter than ``shortest`` without need."""
    most = max(least, min(slices // shortest, MOST_PARTS))
    wanted = {least} | {count for step in range(7) for count in (2**step, 3 * 2**step) if least < count <= most}
    return sorted({whole(slices, count) for count in wanted})


def whole(slices: int, parts: int) -> int:
    """How many parts of equally many slices, but for the last, there are of about ``parts``; none of them is empty."""
    return -(-slices // -(-slices // min(parts, slices))) if slices else 1


def parts(work: Work, tiles: Sequence[Shape], counts: Sequence[int], gpu: Gpu, batches: Sequence[int]) -> int:
    """How many parts to cut the sums into, whatever the batch: the least regret over ``batches``.

    The same image has to give the same bits in every batch, so one number must do for all of them.
    """
    regrets = [0.0] * len(counts)
    for images in batches:
        times = [ranked(replace(work, images=images), tiles, [count], gpu)[0].seconds for count in counts]
        regrets = [regret + math.log(time / min(times)) for regret, time in zip(regrets, times, strict=True)]
    return counts[regrets.index(min(regrets))]


# What a forward convolution is cut up for: one image, where the parts of sums fill the GPU, and a batch that does.
BATCHES = (1, 32)


def configurations(
    work: Work, tiles: Sequence[Shape], counts: Sequence[int], gpu: Gpu, batches: Sequence[int], most: int
) -> list[Candidate]:
    """The configuration to use, and then those that should come next, ``most`` in all."""
    chosen = ranked(work, tiles, [parts(work, tiles, counts, gpu, batches)], gpu)[0]
    if most == 1:
        return [chosen]
    others = [found for found in ranked(work, tiles, counts, gpu) if found != chosen]
    return [chosen, *others][:most]


def of_launches(
    works: Sequence[Work],
    fewest: Sequence[int],
    tiles: Sequence[Shape],
    shortest: int,
    batches: Sequence[int] | None,
    gpu: Gpu,
    most: int,
) -> list[tuple[Candidate, ...]]:
    """The ways to run several launches that should be fastest, the choice first: a tile and parts for each of them.

    Of each the sum has at least as many parts as ``fewest`` says, but none of fewer products than ``shortest``; with
    ``batches`` of None they are chosen for its own batch.
    """
    found = []
    for work, least in zip(works, fewest, strict=True):
        counts = divisions(work.slices, least, shortest // work.depth)
        found.append(configurations(work, tiles, counts, gpu, batches or (work.images,), most))
    # The r-th best of every launch together.
    return [tuple(ways[min(rank, len(ways) - 1)] for ways in found) for rank in range(max(map(len, found), default=1))]


def told_cut(what: str, launches: Sequence[Any]) -> str:
    """What the first of some launches does, and how it is cut up, in a few words for explain."""
    first, N = launches[0], launches[0].part.problem.N
    told = what + (f", sums in {first.parts} parts" if first.parts > 1 else "")
    told += f", {first.images} of {N} images at a time" if first.images < N else ""
    return told + (f", {len(launches)} convolutions" if len(launches) > 1 else "")


def told(works: Iterable[Work], chosen: Iterable[Candidate], gpu: Gpu, measured: float | None) -> str:
    """The prediction, or the measurement, in a few words, for explain."""
    least = f"on {gpu.name}, where the floor is {sum(floor(work, gpu) for work in works) * 1e6:.3g} µs"
    if measured is not None:
        return f"; tuned: {measured * 1e6:.3g} µs measured {least}"
    return f"; {sum(found.seconds for found in chosen) * 1e6:.3g} µs predicted {least}; not measured"
