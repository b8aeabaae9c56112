"""Convolution as a matrix product on tensor cores (``mma.sync``), from compute capability 8.0 on.

float16 and bfloat16 at any precision: their products are exact and are summed in float32. float32 at ``"medium"`` with
both operands rounded to TF32, and at ``"high"`` with each as the sum of two TF32 numbers, three products for one; at
``"highest"`` never.

The kernel is in ``implicit_gemm_mma_kernel``, its instructions in ``ptx`` and ``tensor_tile``. It wants channels side
by side: ``channels_last`` copies x where they are not. ``panels`` and ``partials`` are those of ``implicit_gemm``.

No GPU has run this yet: it runs when asked for by name, and ``explain`` says so.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from gpuconv import dtypes
from gpuconv.backends.numba_cuda import convert, direct, launch, tiles
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
DEVICE = "cuda"
ARRAYS = "any"
OPS = frozenset(("forward", "input_grad"))
EXPERIMENTAL = True

_MOST = 2**31 - 1  # what the kernel counts in 32 bits: channels, slots, entries of the tables


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
    entries = max((part.problem.table_bytes() // 8 for part in direct.parts(problem)), default=0)
    for what, count in (("products per output", problem.products), ("table entries", entries)):
        if count > _MOST // 32:  # a slice of up to 32 may hold a single channel
            reasons.append(f"counts up to {_MOST // 32} {what}; got {count}; use backend='numba_cuda.direct'")
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


@dataclass(frozen=True)
class Launch:
    """One forward convolution of the plan, and how it is cut up."""

    part: direct.Part
    way: str
    slices: int  # of the whole sum, each of one tap
    parts: int  # that the sum is cut into
    images: int  # of x at a time, so that its copy and what the parts leave fit the scratch
    # Output channels and pixels of a tile, products of a slice, channels of a copy of 16 bytes.
    outputs: int
    pixels: int
    depth: int
    lanes: int

    @property
    def part_slices(self) -> int:
        """Slices of a part; the last one may have fewer."""
        return -(-self.slices // self.parts)

    @property
    def channels(self) -> int:
        """Channels of a group, rounded up to whole vectors."""
        return -(-(self.part.problem.C // self.part.problem.groups) // self.lanes) * self.lanes

    @property
    def tiles_o(self) -> int:
        """Tiles that cover the output channels of a group."""
        return -(-(self.part.problem.O // self.part.problem.groups) // self.outputs)

    @property
    def panel_size(self) -> int:
        """Elements of the packed weights."""
        slots = self.parts * self.part_slices * self.depth
        return self.part.problem.groups * self.tiles_o * slots * self.outputs

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

    def scratch(self, images: int) -> int:
        """Bytes of scratch for so many images at a time, and of 16 times the padding's value."""
        itemsize = dtypes.itemsize(self.part.problem.x_dtype)
        return itemsize * (self.panel_size + self.copy_size(images)) + 4 * self.partial_size(images) + 16


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Cut sums, and batches so that packed weights, the copy of x and partial sums fit ``limit``."""
    lowered = direct.parts(problem)
    fixed = sum(part.problem.table_bytes() for part in lowered)
    fixed += problem.result_channels * dtypes.itemsize(problem.sum_dtype)
    launches = tuple(_cut(problem, part, limit - fixed, fixed) for part in lowered)
    scratch = fixed + max((cut.scratch(cut.images) for cut in launches), default=0)
    return Plan(problem, scratch, "float32", _told(launches), {"launches": launches})


def _cut(problem: Conv2dProblem, part: direct.Part, room: int, fixed: int) -> Launch:
    """The launch of ``part`` within ``room`` bytes; how a sum is cut depends on the problem of one image alone."""
    from gpuconv.backends.numba_cuda import tensor_shape as shape

    forward = part.problem
    C, O = forward.C // forward.groups, forward.O // forward.groups
    itemsize = dtypes.itemsize(forward.x_dtype)
    depth = shape.SLICE_BYTES // itemsize
    slices = forward.KH * forward.KW * -(-C // depth)
    # A slice here is as many bytes as two or four of ``implicit_gemm``.
    wanted = tiles.choose_parts(O, forward.OH * forward.OW, forward.groups, slices * depth // tiles.SMALL.depth)
    part_slices = -(-slices // min(wanted, max(slices, 1)))
    parts = -(-slices // part_slices) if slices else 1  # none of them empty
    made = way(problem) or ""
    cut = Launch(part, made, slices, parts, forward.N, shape.OUTPUTS, shape.PIXELS, depth, 16 // itemsize)
    while cut.images > 1 and cut.scratch(cut.images) > room:
        cut = replace(cut, images=cut.images // 2)
    if cut.scratch(cut.images) > room:
        needed = fixed + cut.scratch(1)
        raise MemoryError(f"{NAME} on {problem} needs {needed} bytes of scratch, and workspace_limit leaves too few")
    return cut


def _told(launches: tuple[Launch, ...]) -> str:
    """The choices in a few words, for explain."""
    if not launches:
        return "nothing to compute"
    first = launches[0]
    told = f"tensor cores, {first.way}, tile {first.outputs} outputs × {first.pixels} pixels × {first.depth} deep"
    told += f", sums in {first.parts} parts" if first.parts > 1 else ""
    told += (
        f", {first.images} of {first.part.problem.N} images at a time" if first.images < first.part.problem.N else ""
    )
    return told + (f", {len(launches)} convolutions" if len(launches) > 1 else "")


def pack_key(plan: Plan) -> Any:
    """The form of the panels."""
    return tuple((cut.depth, cut.parts) for cut in plan.config["launches"])


def pack(plan: Plan, operands: Operands) -> Any:
    """The panels of a forward convolution, one per launch, in device memory."""
    from gpuconv.backends.numba_cuda import implicit_gemm_mma_run

    with launch.on_gpu(operands.ordinal):
        stream = launch.stream(operands.stream, operands.x)
        k = launch.flat(implicit_gemm_mma_run.bits(operands.k), stream)
        made = [implicit_gemm_mma_run.packed(cut, k, operands.x, stream) for cut in plan.config["launches"]]
        if stream:
            stream.synchronize()  # other streams will read it
        return made


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Launch the kernels on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    from gpuconv.backends.numba_cuda import implicit_gemm_mma_run

    problem, like = plan.problem, operands.x
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        y = stack.enter_context(launch.output(out, stream))
        x = launch.flat(implicit_gemm_mma_run.bits(like), stream)
        packed = operands.packed
        bias = launch.vector(like, operands.bias, dtypes.numpy_dtype("float32"), 1, stream)
        held = []  # until the stack unwinds: what was uploaded must outlive the kernels
        for number, cut in enumerate(plan.config["launches"]):
            if packed is not None:  # of a forward convolution, which sees x and y as they are
                of_x, weights, of_y = x, packed[number], y
            else:
                k = launch.flat(implicit_gemm_mma_run.bits(operands.k), stream)
                of_x, of_k, of_y = direct.views(problem, cut.part, x, k, y)
                weights = implicit_gemm_mma_run.packed(cut, of_k, like, stream)
            has_bias = operands.bias is not None
            held.append(implicit_gemm_mma_run.run(cut, of_x, weights, of_y, bias, has_bias, like, stream))
