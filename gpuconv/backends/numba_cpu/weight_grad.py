"""The gradient of a convolution in its kernel, without im2col: output channels in the lanes, a sum over pixels.

    dK[o,c,p,q] = Σ_nij dy[n,o,i,j] · x[n,c, i·s+p·d-pad, j·s+q·d-pad]

The pixels (n,i,j) are cut in *chunks* of at most one sum of the micro-kernel. For a chunk, dy is packed with its output
channels side by side, and x is read in place or, where it has a border, from a padded copy of what the chunk reads. A
row of the result is a channel and a tap; each thread keeps a block of rows in its cache, and writes it when all pixels
are summed.

How the sum is split depends on the problem alone, on no thread and no workspace: the sums of chunks are added up in
float32 for a *lot* of about 4096 pixels, those of lots in float64; and where the result is small the chunks are divided
into a few *parts*, which threads may sum apart, and which are added in their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import schedule
from gpuconv.backends.numba_cpu import dense, runtime, strip, weight_grad_work
from gpuconv.backends.numba_cpu.microkernel import BLOCK
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, vectors_of
from gpuconv.backends.numba_cpu.vectors import Lanes
from gpuconv.backends.numba_cpu.weight_grad_work import ENDING, PARTIAL, SUMS
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import NO_PADS, Conv2dProblem

NAME = "numba_cpu.weight_grad"
DEVICE = "cpu"
ARRAYS = "numpy"
OPS = frozenset(("weight_grad",))

unavailable = runtime.unavailable
unsupported = dense.unsupported_as_they_are

# Pixels whose sums are added up in float32, and chunks from which on a part is worth its memory.
_LOT, _PART = 4096, 8
_PARTS = 16
# Elements of a result that is summed in parts.
_SMALL = 1 << 15
# Bytes of a thread's block of the result, and of its copy of x; output channels of a block.
_SUMS, _INPUTS, _OUTPUTS = 512 << 10, 512 << 10, 256
_ALONE = 1 << 19  # products below which starting threads costs more than it gives

# The most taps that lists of their own are kept for.
_LISTED = 128


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the chunks, which decide the sums, and the blocks of the result."""
    lanes = dense.lanes_of(problem, target)
    vectors = vectors_of(problem.O // problem.groups, lanes)
    most, width, size = PIXELS[lanes.bits][vectors], vectors * lanes.count, lanes.size
    all_rows = problem.C // problem.groups * problem.KH * problem.KW
    all_panels = -(-(problem.O // problem.groups) // width)
    chunk = _chunk(problem)
    pixels = chunk[0] * chunk[1] * chunk[2]
    chunks = 1
    for extent, share in zip((problem.N, problem.OH, problem.OW), chunk, strict=True):
        chunks *= -(-extent // max(share, 1))
    lot = max(1, _LOT // max(pixels, 1))
    parts = 1
    while problem.result_size <= _SMALL and 2 * parts <= min(_PARTS, chunks // _PART):
        parts *= 2
    whole = parts == 1 and chunks <= lot  # all of the sum is one lot
    threads = target.threads if problem.result_size * problem.products >= _ALONE else 1
    base = strip.geometry_of(problem, lanes)
    lists = problem.KH * problem.KW if _by_taps(problem, most) else 1

    def geometry_of(block: int) -> tuple[strip.Geometry, strip.Shape]:
        taps = problem.KH * problem.KW
        geometry = replace(base, kc=min(max(problem.C // problem.groups, 1), (block - 1) // taps + 2))
        return geometry, geometry.shape(chunk[1], chunk[2], 1)

    def padded(block: int) -> int:
        """Rows of a block, in whole tiles."""
        return -(-block // lists // most) * most * lists

    def copied(block: int) -> int:
        geometry, shape = geometry_of(block)
        return chunk[0] * geometry.kc * shape.channel * size + 64

    def each(block: int, panels: int) -> int:
        """Bytes of a thread."""
        held = panels * width * padded(block)
        tables = 8 * (2 * pixels * lists + lists + padded(block))
        packed = (panels * width + lanes.count) * pixels * size
        sums = held * size + (0 if whole else 16 * held)
        return packed + sums + copied(block) + tables + 8 * 64

    def apart_bytes(block: int, panels: int) -> int:
        blocks = -(-all_rows // block) * problem.groups * -(-all_panels // panels)
        return 8 * parts * blocks * panels * width * padded(block) if parts > 1 else 0

    def scratch(threads: int, block: int, panels: int) -> int:
        tables = 8 * (base.down.phases * base.down.extent + base.across.phases * base.across.extent)
        offsets = 8 * geometry_of(block)[0].kc * problem.KH * problem.KW
        return threads * each(block, panels) + tables + offsets + 4096

    panels = max(1, min(all_panels, _OUTPUTS // width))

    def cached(share: int) -> bool:
        return share * lists * panels * width * size <= _SUMS and copied(share * lists) <= _INPUTS

    # In shares of the rows that a list serves: channels where there is a list for each tap.
    shares = max(all_rows // lists, 1)
    share = schedule.halved(shares, cached, at_least=most)
    threads, share, panels = schedule.fit(
        (threads, share, panels), lambda t, s, p: scratch(t, s * lists, p), limit, f"{NAME} on {problem}"
    )
    block = share * lists
    in_place = (lists > 1 or problem.padding == NO_PADS) and problem.x_dtype == lanes.dtype
    apart = threads > 1 and parts >= min(threads, max(shares // most * all_panels, 2))
    apart = apart and scratch(threads, block, panels) + apart_bytes(block, panels) <= limit
    if not apart:
        if in_place and all_panels % threads == 0:
            panels = min(panels, all_panels // threads)
        outer = problem.groups * -(-all_panels // panels)
        blocks = -(-shares // share)
        while outer * blocks % threads and shares // (blocks + 1) >= most:
            blocks += 1
        if blocks > 1:
            even, tile = -(-shares // blocks), most // 2
            block = min(share, -(-even // tile) * tile) * lists
    partial = apart_bytes(block, panels) if apart else 0
    workspace = scratch(threads, block, panels) + partial
    detail = (
        f"chunks of {pixels} pixels, blocks of {block} rows × {panels * width} output channels, {lanes}"
        + f", in {parts} parts" * (parts > 1)
    )
    geometry, shape = geometry_of(block)
    config = {
        "lanes": lanes, "vectors": vectors, "threads": threads, "geometry": geometry, "shape": shape, "chunk": chunk,
        "lot": lot, "sums": parts, "apart": apart, "block": block, "panels": panels, "extra": 0,
        "lists": lists, "each": (each(block, panels) + 63) // 64 * 64, "partial": partial,
    }  # fmt: skip
    return Plan(problem, workspace, lanes.dtype, detail, config)


def _chunk(problem: Conv2dProblem) -> tuple[int, int, int]:
    """Images, output rows and columns whose pixels one call of the micro-kernel sums, in equal shares."""

    def share(extent: int, most: int) -> int:
        return -(-extent // -(-extent // most)) if extent else 1

    N_, OH_, OW_ = problem.N, problem.OH, problem.OW
    if OW_ > BLOCK:
        return 1, 1, share(OW_, BLOCK)
    if OH_ * OW_ > BLOCK:
        return 1, share(OH_, BLOCK // OW_), OW_
    return share(N_, BLOCK // max(OH_ * OW_, 1)), max(OH_, 1), max(OW_, 1)


def _by_taps(problem: Conv2dProblem, most: int) -> bool:
    """Whether the rows of a tile are channels of one tap, for which only the pixels that it reaches are summed. With
    fewer channels than a tile has rows, taps are mixed in one, and what lies outside of x is multiplied as zeros.
    """
    return (
        problem.padding != NO_PADS
        and problem.C // problem.groups >= most
        and problem.KH * problem.KW <= _LISTED
    )  # fmt: skip


def _reached(problem: Conv2dProblem, by_taps: bool) -> np.ndarray[Any, Any]:
    """The first and the end of the output rows, and of the columns, that each tap reaches; all where taps are mixed."""
    found = []
    axes = zip(
        (problem.H, problem.W), (problem.KH, problem.KW), (problem.OH, problem.OW), problem.padding, problem.stride,
        problem.dilation, strict=True,
    )  # fmt: skip
    for n, taps, outputs, (before, _), stride, dilation in axes:
        for tap in range(taps if by_taps else 1):
            first = min(max(-(-(before - tap * dilation) // stride), 0), outputs)
            last = min(max(-(-(n + before - tap * dilation) // stride), first), outputs)
            found.append((first, last) if by_taps else (0, outputs))
    return np.array(found, np.int64)


def kernel_name(plan: Plan) -> str:
    """The name of the kernel that runs it."""
    problem = plan.problem
    return (
        f"weight_grad_{plan.config['lanes']}_{plan.config['vectors']}_{problem.x_dtype}_{problem.k_dtype}_"
        f"{problem.y_dtype}"
    )


def pack_key(plan: Plan) -> Any:
    """Nothing is kept for later: neither operand is a kernel."""
    return None


def pack(plan: Plan, operands: Operands) -> Any:
    """Nothing."""
    return None


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the weight gradient of NumPy operands into ``out``, (G, O/G, C/G, KH, KW)."""
    if plan.problem.products == 0:
        out[...] = 0
        return
    Bound(plan, operands.x, operands.k, out)(operands.x, operands.k, None, None, out)


class Bound:
    """A plan for arrays of certain strides: what is left of a call is to run it."""

    def __init__(self, plan: Plan, x: Any, dy: Any, out: Any) -> None:
        """For arrays like ``x``, ``dy`` and ``out``."""
        problem, config = plan.problem, plan.config
        lanes: Lanes = config["lanes"]
        self.alone = problem.result_size * problem.products < _ALONE
        by_taps = config["lists"] > 1
        in_place = (
            (by_taps or problem.padding == NO_PADS)
            and x.dtype == lanes.dtype
            and all(step % lanes.size == 0 for step in x.strides)
        )
        entries, kept = strip.table_of(plan, x, out, dy)
        entries[strip.PER_THREAD - runtime.ARRAYS] = config["each"]
        (top, _), (left, _) = problem.padding
        (down, across), (tap_down, tap_across) = problem.stride, problem.dilation
        sxh, sxw = x.strides[3:]
        reached = _reached(problem, by_taps)
        entries += [
            in_place, -top * sxh - left * sxw, down * sxh, across * sxw, tap_down * sxh, tap_across * sxw, by_taps,
            reached.ctypes.data, config["chunk"][0], config["lot"], config["sums"], config["block"], config["panels"],
        ]  # fmt: skip
        kernel = runtime.kernel(kernel_name(plan), lambda: weight_grad_work.kernel(problem, lanes, config["vectors"]))
        steps = (PARTIAL, ENDING) if config["apart"] else (SUMS,)
        self.tasks = [runtime.Task(kernel, [*entries, what], config["threads"], (kept, reached)) for what in steps]
        self.scratch = config["threads"] * config["each"] + config["partial"] + 64
        self.fill = dense.constant(problem, lanes)

    def __call__(self, x: Any, dy: Any, packed: Any | None, bias: Any | None, out: Any) -> None:
        """Write the gradient into ``out``."""
        scratch = np.empty(self.scratch, np.uint8)
        for task in self.tasks:
            task(x, out, dy, scratch, None, self.fill)
