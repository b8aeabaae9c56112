"""Convolution as a matrix product on tensor cores (``mma.sync``), from compute capability 8.0 on.

float16 and bfloat16 at any precision: their products are exact and are summed in float32. float32 at ``"medium"`` with
both operands rounded to TF32, and at ``"high"`` with each as the sum of two TF32 numbers, three products for one; at
``"highest"`` never.

The kernel is in ``implicit_gemm_mma_kernel``, its instructions in ``ptx`` and ``tensor_tile``. It wants channels side
by side: ``channels_last`` copies x where they are not. ``panels`` and ``partials`` are those of ``implicit_gemm``.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import (
    columns_together,
    convert,
    cost,
    direct,
    gpus,
    launch,
    replay,
    tensor_tile,
    tuned,
)
from gpuconv.backends.numba_cuda.columns_together import Together
from gpuconv.backends.numba_cuda.cost import Candidate
from gpuconv.backends.numba_cuda.replay import Kept
from gpuconv.backends.numba_cuda.tensor_shape import SIDE, SLICE_BYTES, SMALL, TALL, TensorTile
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad", "weight_grad"))
EXPERIMENTAL = True

_MOST = 2**31 - 1  # what the kernel counts in 32 bits: channels, slots, entries of the tables
# Products of a part, at most: tensor cores round sums towards zero, which after so many costs up to 2e-4 of the sum.
_LONGEST = 2**16
# Elements of packed weights of one part of a weight gradient, about: 32 MiB of 16 bits.
_PANELS = 2**24
# Products of a part of a sum, at least: an output leaves 4 bytes per part to be written and read once more.
_SHORTEST = 256


def unavailable() -> str | None:
    """As for every kernel here; the simulator has no tensor cores."""
    missing = launch.unavailable()
    if missing is None and convert.simulated():
        return "Numba's CUDA simulator has no tensor cores; run on a GPU, or use backend='numba_cuda.direct'"
    return missing


def way(problem: Conv2dProblem) -> str | None:
    """How products are made, of ``tensor_tile``'s four ways; None where tensor cores may not make them."""
    if problem.x_dtype in ("float16", "bfloat16"):
        return problem.x_dtype
    return {"medium": "tf32", "high": "3xtf32", "highest": None}[problem.precision]


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """What its precision, its types, its sizes or the GPU stand against."""
    reasons = []
    kinds = (problem.x_dtype, problem.k_dtype, problem.y_dtype)
    if kinds not in ((name,) * 3 for name in ("float16", "bfloat16", "float32")):
        got = " × ".join(kinds[:2]) + f" → {kinds[2]}"
        reasons.append(f"takes float16, bfloat16 or float32, all operands alike; got {got}; convert them")
    elif way(problem) is None:
        reasons.append(
            "tensor cores round float32, which precision='highest' forbids; pass precision='high' or 'medium', or use "
            "backend='numba_cuda.implicit_gemm'"
        )
    for what, count in direct.counts(problem, _parts(problem)):
        if count > _MOST // 32:  # a slice of up to 32 may hold a single channel
            reasons.append(f"counts up to {_MOST // 32} {what}; got {count}; use backend='numba_cuda.direct'")
    forwards = [part.problem for part in _parts(problem)]
    reasons += launch.too_many(max(direct.blocks(forward, SMALL), _turning_blocks(forward, 1)) for forward in forwards)
    capability = _capability(target.ordinal)
    if capability is not None and capability < (8, 0):
        had = ".".join(map(str, capability))
        reasons.append(f"needs a GPU of compute capability 8.0 or later; this one has {had}; use 'numba_cuda.direct'")
    return reasons


def _capability(ordinal: int | None) -> tuple[int, int] | None:
    """The compute capability of a GPU; None where there is none to ask."""
    if ordinal is None or launch.unavailable() is not None or convert.simulated():
        return None
    from numba import cuda

    major, minor = cuda.list_devices()[ordinal].compute_capability
    return int(major), int(minor)


def _rounded(forward: Conv2dProblem) -> int:
    """Input channels of a group, rounded up to whole copies of 16 bytes."""
    lanes = 16 // dtypes.itemsize(forward.x_dtype)
    return -(-(forward.C // forward.groups) // lanes) * lanes


def _turning_blocks(forward: Conv2dProblem, images: int) -> int:
    """Blocks that copy so many images with their channels side by side, each a square of channels and pixels."""
    return images * forward.groups * -(-_rounded(forward) // SIDE) * -(-forward.H * forward.W // SIDE)


@dataclass(frozen=True)
class Launch:
    """One forward convolution of the plan, and how it is cut up."""

    part: direct.Part
    way: str
    tile: TensorTile
    slices: int  # of the whole sum, each of one tap
    parts: int  # that the sum is cut into
    images: int  # of x at a time, so that its copy and what the parts leave fit the scratch
    parts_packed: int  # parts whose weights are packed at a time
    together: Together | None  # columns that a weight gradient's slices take beside images

    @property
    def itemsize(self) -> int:
        """Bytes of an element of x and of the weights."""
        return dtypes.itemsize(self.part.problem.x_dtype)

    @property
    def depth(self) -> int:
        """Products of a slice."""
        return SLICE_BYTES // self.itemsize

    @property
    def part_slices(self) -> int:
        """Slices of a part; the last one may have fewer."""
        return -(-self.slices // self.parts)

    @property
    def channels(self) -> int:
        """Channels of a group, rounded up to whole copies of 16 bytes."""
        return _rounded(self.part.problem)

    def turning_blocks(self, images: int) -> int:
        """Blocks that copy so many images with their channels side by side."""
        return _turning_blocks(self.part.problem, images)

    def blocks(self, images: int, parts: int) -> int:
        """Blocks that multiply so many images and parts at a time."""
        return direct.blocks(self.part.problem, self.tile, images) * parts

    @property
    def tiles_o(self) -> int:
        """Tiles that cover the output channels of a group."""
        return -(-(self.part.problem.O // self.part.problem.groups) // self.tile.outputs)

    @property
    def panel_size(self) -> int:
        """Elements of the packed weights of one part."""
        return self.part.problem.groups * self.tiles_o * self.part_slices * self.depth * self.tile.outputs

    @property
    def panel_bytes(self) -> int:
        """The same in bytes."""
        return self.itemsize * self.panel_size

    def copy_size(self, images: int) -> int:
        """Elements of the copy of x, where one is needed."""
        problem = self.part.problem
        return images * problem.H * problem.W * problem.groups * self.channels

    def plane(self, images: int) -> int:
        """Elements that a part leaves for one output channel."""
        return images * self.part.problem.OH * self.part.problem.OW

    def partial_size(self, images: int) -> int:
        """Elements that all parts leave for ``images`` images, in float32; none when one part writes y."""
        return self.parts * self.part.problem.O * self.plane(images) if self.parts > 1 else 0

    def beside(self, images: int) -> int:
        """Bytes of scratch besides packed weights: x's copy, what the parts leave, 16 times the padding's value."""
        return self.itemsize * self.copy_size(images) + 4 * self.partial_size(images) + 16

    @property
    def scratch(self) -> int:
        """Bytes of scratch."""
        return self.parts_packed * self.panel_bytes + self.beside(self.images)


def plan(problem: Conv2dProblem, target: Target, limit: int, configuration: Sequence[Candidate] | None = None) -> Plan:
    """Choose tiles, and cut sums and batches so that packed weights, the copy of x and partial sums fit ``limit``.

    ``configuration`` is one of ``configurations``; without it what was tuned, or else the first of them.
    """
    lowered = _parts(problem)
    works = [_work(problem, part.problem) for part in lowered]
    remembered = None
    if configuration is None:
        fewest = [_least(problem, work) for work in works]
        known = tensor_tile.tiles(way(problem) or "tf32")
        remembered = tuned.find(tuned.key(NAME, problem, target, limit), known, works, fewest)
    if remembered is not None:
        configuration = remembered.configuration
    chosen = configuration or configurations(problem, target, 1)[0]
    fixed = sum(part.problem.table_bytes() for part in lowered)
    fixed += problem.result_channels * dtypes.itemsize(problem.sum_dtype)
    wholes = [
        Launch(part, work.way, candidate.tile, work.slices, candidate.parts, part.problem.N, candidate.parts,
               columns_together.of(problem, work.depth))
        for part, work, candidate in zip(lowered, works, chosen, strict=True)
    ]  # fmt: skip
    # The launches of a call are made together, each with scratch of its own.
    count = max(len(wholes), 1)
    least = count * max((whole.panel_bytes + whole.beside(1) for whole in wholes), default=0)
    if fixed + least > limit:
        raise MemoryError(
            f"{NAME} on {problem} needs {fixed + least} bytes of scratch, and workspace_limit leaves too few"
        )
    launches = tuple(_cut(problem, whole, (limit - fixed) // count) for whole in wholes)
    scratch = fixed + sum(cut.scratch for cut in launches)
    told = _told(launches) + cost.told(works, chosen, gpus.of(target), remembered.seconds if remembered else None)
    return Plan(problem, scratch, "float32", told, {"launches": launches})


def _parts(problem: Conv2dProblem) -> tuple[direct.Part, ...]:
    """The forward convolutions that ``problem`` is."""
    return columns_together.parts(problem, SLICE_BYTES // dtypes.itemsize(problem.x_dtype))


def configurations(problem: Conv2dProblem, target: Target, most: int) -> list[tuple[Candidate, ...]]:
    """The ways to run the problem that should be fastest, the choice first: a tile and parts for every launch.

    How a sum is cut depends on the problem of one image alone; that of a weight gradient goes over the batch.
    """
    works = [_work(problem, part.problem) for part in _parts(problem)]
    fewest = [_least(problem, work) for work in works]
    batches = None if problem.op == "weight_grad" else cost.BATCHES
    return cost.of_launches(
        works, fewest, tensor_tile.tiles(way(problem) or "tf32"), _SHORTEST, batches, gpus.of(target), most
    )


def _least(problem: Conv2dProblem, work: cost.Work) -> int:
    """The fewest parts: none too long, and the weights of a gradient are dy, of which one has to fit any workspace."""
    slots = work.slices * work.depth
    least = -(-slots // _LONGEST)
    if problem.op == "weight_grad":
        least = max(least, slots * max(work.outputs, TALL.outputs) * work.groups // _PANELS)
    return max(1, min(least, work.slices))


def _work(problem: Conv2dProblem, forward: Conv2dProblem) -> cost.Work:
    """What one launch computes."""
    C, O, plane = forward.C // forward.groups, forward.O // forward.groups, forward.OH * forward.OW
    itemsize = dtypes.itemsize(forward.x_dtype)
    depth = SLICE_BYTES // itemsize
    copied = problem.layout != "NHWC" or problem.op == "weight_grad"
    x = itemsize * forward.C * forward.H * forward.W
    return cost.Work(
        way=way(problem) or "tf32",
        outputs=O,
        pixels=plane,
        images=forward.N,
        groups=forward.groups,
        slices=forward.KH * forward.KW * -(-C // depth),
        depth=depth,
        itemsize=itemsize,
        image_bytes=(3 if copied else 1) * x + itemsize * forward.O * plane,  # the copy is written and read
        weight_bytes=itemsize * forward.O * C * forward.KH * forward.KW,
        launches=2 if copied else 1,
    )


def _cut(problem: Conv2dProblem, whole: Launch, room: int) -> Launch:
    """The launch within ``room`` bytes and a grid; how many images and parts are under way at once depends on it."""
    parts, images, panel = whole.parts, whole.images, whole.panel_bytes
    # All images at once for a gradient, whose weights are packed anew for others; all weights at once otherwise.
    together = 1 if problem.op == "weight_grad" else parts

    def fits(images: int) -> bool:
        grid = max(whole.blocks(images, 1), whole.turning_blocks(images))
        return whole.beside(images) + panel * together <= room and grid <= launch.MAX_GRID_X

    while images > 1 and not fits(images):
        images //= 2
    packed = min(parts, (room - whole.beside(images)) // panel) if panel else parts
    packed = min(packed, launch.MAX_GRID_X // max(whole.blocks(images, 1), 1))
    return replace(whole, images=images, parts_packed=packed)


def _told(launches: tuple[Launch, ...]) -> str:
    """The choices in a few words, for explain."""
    if not launches:
        return "nothing to compute"
    first = launches[0]
    told = f"tensor cores, {first.way}, tile {first.tile}, {first.depth} deep"
    told += f", {first.together.columns} columns of an image in a slice" if first.together is not None else ""
    return cost.told_cut(told, launches)


def pack_key(plan: Plan) -> Any:
    """The form of the panels; None where the kernel is kept as it is.

    Because its panels are made piece by piece, or of views of it, as those of a gradient are.
    """
    launches = plan.config["launches"]
    if plan.problem.op != "forward" or any(cut.parts_packed < cut.parts for cut in launches):
        return None
    return tuple((cut.tile.outputs, cut.depth, cut.parts) for cut in launches)


def pack(plan: Plan, operands: Operands) -> Kept:
    """The panels, one per launch, or the kernel; in device memory."""
    from gpuconv.backends.numba_cuda import implicit_gemm_mma_run

    how = None if pack_key(plan) is None else implicit_gemm_mma_run.packed
    return replay.pack(plan, implicit_gemm_mma_run.in_words(operands), how)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernels on NumPy operands or on CuPy ones; see ``replay``."""
    from gpuconv.backends.numba_cuda import implicit_gemm_mma_run

    replay.run(plan, implicit_gemm_mma_run.in_words(operands), out, implicit_gemm_mma_run.steps)
