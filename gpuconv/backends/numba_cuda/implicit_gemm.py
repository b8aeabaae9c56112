"""Convolution as a matrix product whose large matrix is never in memory, on a GPU's float32 or float64 units.

Here are the choices and the scratch they take. ``implicit_gemm_run`` launches the kernels: ``panels`` packs weights,
``implicit_gemm_kernel`` multiplies, and ``partials`` adds up where sums were cut into parts.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import cost, direct, gpus, launch, replay, tiles, tuned
from gpuconv.backends.numba_cuda.cost import Candidate
from gpuconv.backends.numba_cuda.replay import Kept
from gpuconv.backends.numba_cuda.tiles import Tile
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad", "weight_grad"))
EXPERIMENTAL = True

# What the kernel counts in 32 bits: slots, channels, entries of the tables; less what rounding up to slices may add.
_MOST = 2**31 - 2**20
# Elements of packed weights of one part of a weight gradient, about: 32 MiB of float32.
_PANELS = 2**23
# A slice of channels may be this much longer than the channels it holds; with more waste, products of all taps share
# slices, which costs two table look-ups per element instead of two per slice.
_WASTE = 1.25
# Products of a part of a sum, at least: an output leaves 4 bytes per part to be written and read once more.
_SHORTEST = 256

unavailable = launch.unavailable


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Other element types than float32 and float64, and sums or tables longer than 32 bits can count."""
    reasons = []
    kinds = (problem.x_dtype, problem.k_dtype, problem.y_dtype)
    if kinds not in ((name,) * 3 for name in tiles.TILES):
        got = " × ".join(kinds[:2]) + f" → {kinds[2]}"
        reasons.append(f"computes in float32 or in float64, all operands alike; got {got}; convert them")
    for what, count in direct.counts(problem, direct.parts(problem)):
        if count > _MOST:
            reasons.append(f"counts up to {_MOST} {what}; got {count}; use backend='numba_cuda.direct'")
    return reasons + launch.too_many(direct.blocks(part.problem, tiles.SMALL) for part in direct.parts(problem))


@dataclass(frozen=True)
class Launch:
    """One forward convolution of the plan, and how it is cut up."""

    part: direct.Part
    tile: Tile
    by_tap: bool
    slices: int  # of the whole sum
    parts: int  # that the sum is cut into
    images: int  # of x at a time, so that what the parts leave fits the scratch
    parts_packed: int  # parts whose weights are packed at a time

    @property
    def part_slices(self) -> int:
        """Slices of a part; the last one may have fewer."""
        return -(-self.slices // self.parts)

    @property
    def tiles_o(self) -> int:
        """Tiles that cover the output channels of a group."""
        return -(-(self.part.problem.O // self.part.problem.groups) // self.tile.outputs)

    @property
    def panel_size(self) -> int:
        """Elements of the packed weights of one part."""
        return self.part.problem.groups * self.part_slices * self.tile.depth * self.tiles_o * self.tile.outputs

    def blocks(self, images: int, parts: int) -> int:
        """Blocks that multiply so many images and parts at a time."""
        return direct.blocks(self.part.problem, self.tile, images) * parts

    def plane(self, images: int) -> int:
        """Elements that a part leaves for one output channel: its pixels, rounded up to whole vectors."""
        problem = self.part.problem
        return -(-images * problem.OH * problem.OW // 4) * 4

    def partial_size(self, images: int) -> int:
        """Elements that all parts leave for ``images`` images; none when there is but one part, which writes y."""
        return self.parts * self.part.problem.O * self.plane(images) if self.parts > 1 else 0


def plan(problem: Conv2dProblem, target: Target, limit: int, configuration: Sequence[Candidate] | None = None) -> Plan:
    """Choose the tiles, and cut sums and batches so that packed weights and partial sums fit ``limit``.

    ``configuration`` is one of ``configurations``; without it what was tuned, or else the first of them.
    """
    gpu = gpus.of(target)
    lowered = direct.parts(problem)
    works = [_work(problem, part.problem) for part in lowered]
    remembered = None
    if configuration is None:
        fewest = [_least(problem, work) for work in works]
        remembered = tuned.find(tuned.key(NAME, problem, target, limit), tiles.TILES[problem.sum_dtype], works, fewest)
    if remembered is not None:
        configuration = remembered.configuration
    chosen = configuration or configurations(problem, target, 1)[0]
    fixed = sum(part.problem.table_bytes() for part in lowered)
    itemsize = dtypes.itemsize(problem.sum_dtype)
    fixed += problem.result_channels * itemsize
    wholes = [
        Launch(part, candidate.tile, _by_tap(problem, part.problem), work.slices, candidate.parts, part.problem.N,
               candidate.parts)
        for part, work, candidate in zip(lowered, works, chosen, strict=True)
    ]  # fmt: skip
    # The launches of a call are made together, each with scratch of its own.
    count = max(len(wholes), 1)
    least = count * max((whole.panel_size + whole.partial_size(1) for whole in wholes), default=0)
    room = (limit - fixed) // itemsize
    if least > room:
        needed = fixed + itemsize * least
        raise MemoryError(f"{NAME} on {problem} needs {needed} bytes of scratch, and workspace_limit leaves too few")
    launches = tuple(_cut(whole, room // count) for whole in wholes)
    scratch = fixed + itemsize * sum(map(_scratch, launches))
    told = _told(launches) + cost.told(works, chosen, gpu, remembered.seconds if remembered else None)
    return Plan(problem, scratch, problem.sum_dtype, told, {"launches": launches})


def _scratch(part: Launch) -> int:
    """Elements of scratch of one launch."""
    return part.parts_packed * part.panel_size + part.partial_size(part.images)


def configurations(problem: Conv2dProblem, target: Target, most: int) -> list[tuple[Candidate, ...]]:
    """The ways to run the problem that should be fastest, the choice first: a tile and parts for every launch.

    What is summed together, and in which order, depends on the problem of one image alone: not on the workspace, nor
    on the number of images. The sum of a weight gradient goes over the batch.
    """
    works = [_work(problem, part.problem) for part in direct.parts(problem)]
    fewest = [_least(problem, work) for work in works]
    batches = None if problem.op == "weight_grad" else cost.BATCHES
    return cost.of_launches(works, fewest, tiles.TILES[problem.sum_dtype], _SHORTEST, batches, gpus.of(target), most)


def _least(problem: Conv2dProblem, work: cost.Work) -> int:
    """The fewest parts: the weights of a gradient are dy, of which a part has to fit in any workspace."""
    if problem.op != "weight_grad":
        return 1
    panels = work.slices * work.depth * max(work.outputs, tiles.SMALL.outputs) * work.groups
    return max(1, min(work.slices, panels // _PANELS))


def _by_tap(problem: Conv2dProblem, forward: Conv2dProblem) -> bool:
    """Whether slices are of one tap each; not where that wastes too much of them, nor for the images of a batch."""
    C, depth = forward.C // forward.groups, tiles.SMALL.depth
    return problem.op != "weight_grad" and -(-C // depth) * depth <= _WASTE * C


def _work(problem: Conv2dProblem, forward: Conv2dProblem) -> cost.Work:
    """What one launch computes."""
    C, O, depth = forward.C // forward.groups, forward.O // forward.groups, tiles.SMALL.depth
    taps, plane = forward.KH * forward.KW, forward.OH * forward.OW
    by_tap = _by_tap(problem, forward)
    itemsize = dtypes.itemsize(problem.sum_dtype)
    return cost.Work(
        way=problem.sum_dtype,
        outputs=O,
        pixels=plane,
        images=forward.N,
        groups=forward.groups,
        slices=taps * -(-C // depth) if by_tap else -(-C * taps // depth),
        depth=depth,
        itemsize=itemsize,
        image_bytes=itemsize * (forward.C * forward.H * forward.W + forward.O * plane),
        weight_bytes=itemsize * forward.O * C * taps,
    )


def _cut(whole: Launch, room: int) -> Launch:
    """The launch within ``room`` elements and a grid; how many images and parts are under way at once depends on it."""
    parts, most = whole.parts, launch.MAX_GRID_X
    # All weights at once if there is room beside the partial sums of one image.
    packed = min(parts, (room - whole.partial_size(1)) // max(whole.panel_size, 1)) if whole.panel_size else parts
    packed = min(packed, most // max(whole.blocks(1, 1), 1))
    left = room - packed * whole.panel_size
    images = next(
        n
        for n in _halved(whole.part.problem.N)
        if n <= 1 or (whole.partial_size(n) <= left and whole.blocks(n, packed) <= most)
    )
    return replace(whole, images=images, parts_packed=packed)


def _halved(most: int) -> Iterator[int]:
    """``most``, then half of it, and so on to 1 and for ever."""
    while True:
        yield most
        most = max(1, most // 2)


def _told(launches: tuple[Launch, ...]) -> str:
    """The choices in a few words, for explain."""
    if not launches:
        return "nothing to compute"
    first = launches[0]
    told = f"tile {first.tile}, slices {'of one tap' if first.by_tap else 'across taps'}"
    return cost.told_cut(told, launches)


def pack_key(plan: Plan) -> Any:
    """The form of the panels; None where the kernel is kept as it is.

    Because its panels are made piece by piece, or of views of it, as those of a gradient are.
    """
    launches = plan.config["launches"]
    if plan.problem.op != "forward" or any(part.parts_packed < part.parts for part in launches):
        return None
    return tuple((part.tile.outputs, part.tile.depth, part.by_tap, part.parts) for part in launches)


def pack(plan: Plan, operands: Operands) -> Kept:
    """The panels, one per launch, or the kernel; in device memory."""
    from gpuconv.backends.numba_cuda import implicit_gemm_run

    how = None if pack_key(plan) is None else implicit_gemm_run.packed
    return replay.pack(plan, operands, how)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernels on NumPy operands or on CuPy ones; see ``replay``."""
    from gpuconv.backends.numba_cuda import implicit_gemm_run

    replay.run(plan, operands, out, implicit_gemm_run.steps)
