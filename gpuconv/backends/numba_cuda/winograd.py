"""3×3 convolution in a quarter of the products on a GPU: Winograd's F(4×4, 3×3), where its rounding errors may be.

    y = Aᵀ [ Σ_c (G k Gᵀ) ⊙ (Bᵀ x B) ] A

The result is cut in tiles of 4 × 4. ``winograd_kernels`` transforms the weights, which a ``Conv2d`` keeps, and for a
chunk of tiles after the other the image; ``winograd_multiply`` sums over the channels, at each of 36 points a matrix
product; and the sums are transformed to the result. ``winograd_run`` launches them. Transformed weights are four times
as large as weights: where those of all output channels are too large for the workspace, channels are made in turn.

What is between these kernels has 36 numbers where x and y have 16. A tile's channels of x and y, C and O of them, move

    4 · (2·36 + 16) · (C + O) bytes       transforms and sums written and read once, x and y once
    2 · 36 · C·O operations               instead of 2 · 144 · C·O

which are 26 operations per byte at C = O = 256, and 6 at 64. An H200's float32 units and its memory balance at 15. So
the chunks are small enough for the second-level cache. One kernel for everything would move no more than x and y, but
has to transform a window again for every tile of output channels, and registers and shared memory only for the 16
points of F(2×2, 3×3), in 64 products instead of 144; from 64 channels on the smaller number should win. Not measured.

Values are added before they are multiplied: NaN or infinity in one of them reaches all outputs of its tiles, and
rounding errors are some ten times those of a direct sum, relative to the largest results. Sums of more than 256
channels are cut into parts, so that they stay those of short sums.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpuconv.backends.numba_cuda import cost, depthwise_shape, direct, gpus, launch, replay, tiles
from gpuconv.backends.numba_cuda.replay import Kept
from gpuconv.backends.numba_cuda.tiles import Tile
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.winograd"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad"))
EXPERIMENTAL = True

TILE, POINTS = 4, 36  # of ``winograd_transforms``, which Numba has to be there for
# Channels in one running sum.
_SUM = 256
# Bytes of a chunk's transforms and sums: about half of the second-level cache of an A100 or an H100, by rule of thumb.
_CHUNK = 24 << 20
# Tiles of a chunk: whole tiles of any matrix product, and as many for the widest.
_UNIT = 128
# What the kernels count in 32 bits: tiles, extents and, times the blocks that each takes, channels.
_MOST, _MOST_CHANNELS = 2**30, 2**22

unavailable = launch.unavailable


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """Other kernels and types, the highest precision, and more tiles or channels than 32 bits can count."""
    reasons = []
    if (problem.KH, problem.KW) != (3, 3) or problem.stride != (1, 1) or problem.dilation != (1, 1):
        reasons.append("is for 3×3 kernels without stride and dilation; use backend='numba_cuda.implicit_gemm'")
    kinds = (problem.x_dtype, problem.k_dtype, problem.y_dtype)
    if set(kinds) != {"float32"}:
        got = " × ".join(kinds[:2]) + f" → {kinds[2]}"
        reasons.append(f"computes in float32, all operands alike; got {got}; convert them")
    elif problem.precision == "highest":
        reasons.append("its rounding errors are larger than precision='highest' allows; pass precision='high'")
    extents = max(*problem.x_shape[1:], *problem.y_shape[1:])
    counts = (
        ("tiles of 4 × 4", problem.N * -(-problem.H // TILE) * -(-problem.W // TILE), _MOST),
        ("tiles of 4 × 4", problem.N * -(-problem.OH // TILE) * -(-problem.OW // TILE), _MOST),
        ("channels", max(problem.C, problem.O), _MOST_CHANNELS),
        ("extents", extents, _MOST),
    )
    for what, count, most in dict.fromkeys(counts):
        if count > most:
            reasons.append(f"counts {what} up to {most}; got {count}; use backend='numba_cuda.direct'")
    return reasons


@dataclass(frozen=True)
class Launch:
    """A forward convolution of stride 1, and how it is cut up; sizes are of what is made at a time."""

    part: direct.Part
    tile: Tile  # of the matrix products
    chunk: int  # tiles of 4 × 4 at a time, a multiple of a vector
    groups: int  # at a time
    outputs: int  # output channels of each of these at a time; all, where there are several groups

    @property
    def problem(self) -> Conv2dProblem:
        """The convolution."""
        return self.part.problem

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.problem.C // self.problem.groups

    @property
    def whole(self) -> bool:
        """Whether all output channels are made at a time."""
        return self.groups * self.outputs == self.problem.O

    @property
    def tiles(self) -> int:
        """Tiles of 4 × 4 of the whole batch."""
        return self.problem.N * -(-self.problem.OH // TILE) * -(-self.problem.OW // TILE)

    @property
    def products(self) -> int:
        """Matrix products: one for each point and group."""
        return POINTS * self.groups

    @property
    def slices(self) -> int:
        """Slices of the sum over channels."""
        return -(-self.inputs // self.tile.depth)

    @property
    def parts(self) -> int:
        """Parts that the sum is cut into: by its length alone."""
        return parts_of(self.inputs)

    @property
    def part_slices(self) -> int:
        """Slices of a part; the last one may have fewer."""
        return -(-self.slices // self.parts)

    @property
    def pitch(self) -> int:
        """Elements of a row of the transformed weights: the outputs, rounded up to vectors."""
        return _whole(self.outputs, 4)

    @property
    def weights_size(self) -> int:
        """Elements of the transformed weights."""
        return self.products * self.inputs * self.pitch

    @property
    def image_size(self) -> int:
        """Elements of a chunk's transformed image."""
        return self.products * self.inputs * self.chunk

    @property
    def part_size(self) -> int:
        """Elements of a chunk's sums of one part."""
        return self.products * self.outputs * self.chunk

    @property
    def tile_bytes(self) -> int:
        """Bytes of the transformed image and the sums of one tile."""
        return 4 * self.products * (self.inputs + self.parts * self.outputs)

    def blocks(self) -> Iterator[tuple[Launch, int, int]]:
        """What is made one after the other; of each the first group, and the first output channel in it."""
        outputs = self.problem.O // self.problem.groups
        for group in range(0, self.problem.groups, self.groups):
            for output in range(0, outputs, self.outputs):
                count = min(self.groups, self.problem.groups - group), min(self.outputs, outputs - output)
                yield replace(self, groups=count[0], outputs=count[1]), group, output


def parts_of(channels: int) -> int:
    """Parts of a sum over so many channels, whatever the batch: each of whole slices, but perhaps the last."""
    slices = -(-channels // tiles.SMALL.depth)
    return cost.whole(slices, -(-channels // _SUM))


def _whole(count: int, unit: int) -> int:
    """``count``, rounded up to whole units."""
    return -(-count // unit) * unit


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the tiles, and how many of the image's are transformed at a time so that all fits ``limit``."""
    gpu = gpus.of(target)
    lowered = direct.parts(problem)
    launches: list[Launch] = []
    scratch = 4 * problem.result_channels
    for part in lowered:
        if not depthwise_shape.arithmetic(part.problem):
            scratch += part.problem.table_bytes()
        cut = _cut(part, limit - scratch)
        needed = 4 * cut.weights_size + cut.chunk * cut.tile_bytes
        if needed > limit - scratch:
            raise MemoryError(
                f"{NAME} on {problem} needs {scratch + needed} bytes of scratch, of them {4 * cut.weights_size} for "
                f"transformed weights of {cut.outputs} output channel(s), and workspace_limit is {limit}"
            )
        scratch += needed
        launches.append(replace(cut, tile=_tile(cut, gpu)))
    return Plan(problem, scratch, "float32", _told(launches), {"launches": tuple(launches)})


def _cut(part: direct.Part, room: int) -> Launch:
    """As many output channels and tiles at a time as fit ``room`` bytes; where none do, the fewest."""
    whole = Launch(part, tiles.SMALL, TILE, part.problem.groups, part.problem.O // part.problem.groups)
    every = _whole(max(whole.tiles, 1), TILE)
    for groups, outputs in _shares(whole.groups, whole.outputs):
        cut = replace(whole, groups=groups, outputs=outputs)
        most = (room - 4 * cut.weights_size) // cut.tile_bytes // TILE * TILE
        if most >= min(_UNIT, every):  # rather fewer channels than tiles too few for a matrix product
            break
    cached = max(_UNIT, _CHUNK // cut.tile_bytes // _UNIT * _UNIT)
    return replace(cut, chunk=max(TILE, min(most, cached, every)))


def _shares(groups: int, outputs: int) -> Iterator[tuple[int, int]]:
    """Ever fewer groups, and then output channels of one, to be made at a time."""
    yield groups, outputs
    while groups > 1:
        groups = -(-groups // 2)
        yield groups, outputs
    while outputs > TILE:
        outputs = _whole(-(-outputs // 2), TILE)
        yield groups, outputs


def _tile(cut: Launch, gpu: gpus.Gpu) -> Tile:
    """The tile of the matrix products of a chunk; whichever it is, the sums have the same bits."""
    work = cost.Work(
        way="float32",
        outputs=cut.outputs,
        pixels=cut.chunk,
        images=1,
        groups=cut.products,
        slices=cut.slices,
        depth=cut.tile.depth,
        itemsize=4,
        image_bytes=4 * cut.products * cut.chunk * (cut.inputs + cut.outputs),
        weight_bytes=4 * cut.weights_size,
    )
    found: Tile = cost.ranked(work, tiles.TILES["float32"], [cut.parts], gpu)[0].tile
    return found


def _told(launches: list[Launch]) -> str:
    """The choices in a few words, for explain."""
    if not launches:
        return "nothing to compute"
    first = launches[0]
    told = (
        f"F(4×4, 3×3), {min(first.chunk, first.tiles)} of {first.tiles} tiles at a time, then {first.products} matrix "
    )
    told += f"products in tiles of {first.tile}"
    if not first.whole:
        told += f", {first.groups * first.outputs} of {first.problem.O} output channels at a time"
    return told + (f", sums in {first.parts} parts" if first.parts > 1 else "") + "; not measured"


def pack_key(plan: Plan) -> Any:
    """The form of the packed weights; None where they are kept as they are: of a gradient, or too large at once."""
    whole = all(cut.whole for cut in plan.config["launches"])
    return "transformed" if plan.problem.op == "forward" and whole else None


def pack(plan: Plan, operands: Operands) -> Kept:
    """The transformed weights, or the kernel; in device memory."""
    from gpuconv.backends.numba_cuda import winograd_run

    how = None if pack_key(plan) is None else winograd_run.transformed
    return replay.pack(plan, operands, how)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernels on NumPy operands or on CuPy ones; see ``replay``."""
    from gpuconv.backends.numba_cuda import winograd_run

    replay.run(plan, operands, out, winograd_run.steps)
