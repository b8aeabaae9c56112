"""``python -m bench kernels``: what the CUDA kernels promise on paper, on a machine with or without a GPU.

Two tables. One is of the kernels' configurations, each compiled to machine code: registers, spills, shared memory, how
many warps a multiprocessor can hold, and the instructions that matter. The other is of layers: the least time that a
device's data sheet allows for one, and the configuration that gpuconv would pick.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import machine_code
from bench.layers import Row
from gpuconv.backends.protocol import Target

ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0))


@dataclass(frozen=True)
class Multiprocessor:
    """What an architecture's multiprocessor holds: CUDA C++ Programming Guide, "Compute Capabilities"."""

    threads: int
    blocks: int
    shared: int  # bytes, of which each block takes 1024 more than it asks for

    def warps(self, threads: int, registers: int, shared: int) -> int:
        """Warps that run at once, of blocks of so many threads."""
        block_warps = -(-threads // 32)
        # Registers are given out to warps in units of 256.
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // block_warps
        by_shared = self.shared // (shared + 1024)
        return min(self.blocks, self.threads // threads, by_registers, by_shared) * block_warps


MULTIPROCESSORS = {
    (8, 0): Multiprocessor(2048, 32, 164 * 1024),
    (8, 6): Multiprocessor(1536, 16, 100 * 1024),
    (8, 9): Multiprocessor(1536, 24, 100 * 1024),
    (9, 0): Multiprocessor(2048, 32, 228 * 1024),
}


@dataclass(frozen=True)
class Device:
    """Peak rates: of data sheets, without sparsity, except where measured."""

    name: str
    flops: dict[str, float]  # by element type; of 16 bits on tensor cores, summed in float32
    bandwidth: float  # bytes/s

    def floor(self, row: Row) -> tuple[float, str]:
        """The least seconds for a layer, and what sets them."""
        problem = row.problem
        rate = self.flops["float16" if problem.x_dtype == "bfloat16" else problem.x_dtype]
        arithmetic, traffic = problem.flops / rate, problem.bytes / self.bandwidth
        return (arithmetic, "arithmetic") if arithmetic >= traffic else (traffic, "memory")


DEVICES = {
    "a100": Device("A100 SXM 40 GB", {"float32": 19.5e12, "float64": 9.7e12, "float16": 312e12}, 1.555e12),
    "rtx3090": Device("GeForce RTX 3090", {"float32": 35.6e12, "float64": 0.556e12, "float16": 71e12}, 0.936e12),
    "rtx4090": Device("GeForce RTX 4090", {"float32": 82.6e12, "float64": 1.29e12, "float16": 165e12}, 1.008e12),
    "h200": Device(
        "H200 SXM (bandwidth and 16-bit rate as measured)",
        {"float32": 67e12, "float64": 34e12, "float16": 790e12},
        4.3e12,
    ),
}


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel, ready to be compiled."""

    kernel: str
    name: str
    body: Any
    arguments: tuple[Any, ...]  # their Numba types
    threads: int
    registers: int | None  # that a thread may use
    dynamic: int = 0  # bytes of shared memory that a launch asks for, beyond what the machine code says


def depthwise(line: str, load: str, reader: str = "inside") -> Configuration:
    """What ``numba_cuda.depthwise`` makes of a problem whose image it reads in one of its ways."""
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import convert, depthwise_kernel, depthwise_shape
    from gpuconv.problem import Conv2dProblem

    problem = Conv2dProblem.parse(line)
    across, vectors = load.startswith("across"), load == "along_columns"
    block = depthwise_shape.block(problem, depthwise_shape.SIDE if across else 1)
    if block is None:
        raise ValueError(f"{line}: its groups fit no shared memory side by side")
    element, number = convert.numba_type(problem.x_dtype), convert.numba_type(problem.sum_dtype)
    wide, narrow = types.int64, types.int32
    view = types.Array(element, 1, "C"), *[wide] * 6
    table = narrow if reader == "inside" else types.Array(wide, 1, "C")
    arguments = (
        *(*view, *view, types.Array(number, 1, "C"), types.boolean, types.boolean, *view),
        *(*[narrow] * 9, number, table, *[narrow if block.shape.stride else wide] * 12, *[narrow] * 33),
    )
    body = depthwise_kernel.build(block.shape, problem.x_dtype, reader, load, vectors)
    name = f"{problem.x_dtype} {problem.KH}×{problem.KW}, {block.shape} {load}"
    registers = depthwise_shape.REGISTERS
    return Configuration("depthwise", name, body, arguments, block.threads, registers, block.shared_bytes)


def implicit_gemm(dtype: str, tile: Any, gather: str, scatter: str) -> Configuration:
    """A specialisation of ``numba_cuda.implicit_gemm``."""
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import convert, implicit_gemm_kernel

    element = convert.numba_type(dtype)
    vector, wide, narrow = types.Array(element, 1, "C"), types.int64, types.int32
    table = types.Array(wide, 1, "C"), narrow, narrow
    arguments = (
        *(vector, *[wide] * 4, *table, *table),
        *(vector, vector, types.boolean, types.boolean),
        *(vector, *[wide] * 7),
        *(wide, *[narrow] * 4, wide, wide, narrow),
        *(element, *[narrow] * 4),
    )
    name = f"{dtype} {tile.outputs}×{tile.pixels} {gather} {scatter}"
    body = implicit_gemm_kernel.build(tile, dtype, gather, scatter)
    return Configuration("implicit_gemm", name, body, arguments, tile.threads, tile.registers)


def implicit_gemm_mma(tile: Any, way: str, dtype: str, y_dtype: str) -> Configuration:
    """A specialisation of ``numba_cuda.implicit_gemm_mma``."""
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import convert, implicit_gemm_mma_kernel

    copied = types.Array(types.float32 if dtype == "float32" else types.uint16, 1, "C")
    sums, wide, narrow = types.Array(types.float32, 1, "C"), types.int64, types.int32
    table = types.Array(wide, 1, "C"), narrow, narrow
    arguments = (
        *(copied, *[wide] * 3, *table, *table, copied, copied),
        *(sums, types.boolean, types.boolean),
        *(types.Array(convert.numba_type(y_dtype), 1, "C"), *[wide] * 7),
        *(wide, *[narrow] * 4, wide, wide, narrow, *[narrow] * 4),
    )
    name = f"{way} {tile.outputs}×{tile.pixels}, {tile.stages} stages → {y_dtype}"
    body = implicit_gemm_mma_kernel.build(tile, way, dtype, y_dtype)
    return Configuration("implicit_gemm_mma", name, body, arguments, tile.threads, tile.registers, tile.dynamic_bytes)


def winograd(kernel: str, *ways: Any) -> Configuration:
    """A kernel of ``numba_cuda.winograd`` and what its ``build`` takes: weights, image, result or multiply."""
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import winograd_kernels, winograd_multiply

    vector, wide, narrow, flag = types.Array(types.float32, 1, "C"), types.int64, types.int32, types.boolean
    view = vector, *[wide] * 6
    table = types.Array(wide, 1, "C") if ways[:1] == ("tabled",) else narrow
    arguments = {
        "weights": (*view, vector, *[wide] * 4),
        "image": (*view, vector, wide, *[narrow] * 8, table, *[narrow] * 4, types.float32),
        "result": (vector, wide, narrow, wide, narrow, narrow, vector, flag, flag, *view, *[narrow] * 4),
        "multiply": (vector, narrow, vector, narrow, vector, *[narrow] * 6),
    }[kernel]
    if kernel == "multiply":
        (tile,) = ways
        body = winograd_multiply.build(tile)
        return Configuration("winograd", f"multiply {tile}", body, arguments, tile.threads, tile.registers)
    body = getattr(winograd_kernels, f"build_{kernel}")(*ways)
    name = " ".join(map(str, (kernel, *ways)))
    return Configuration("winograd", name, body, arguments, winograd_kernels.threads(), None)


# What each element type is multiplied as on tensor cores.
WAYS = {"float32": ("3xtf32", "tf32"), "float16": ("float16",), "bfloat16": ("bfloat16",)}

# Networks' depthwise layers, and image filters of one channel and of several; the ways that NCHW and NHWC take.
FILTERS = (
    *(("n64c128h56w56_o128kh3kw3_p1g128_", load) for load in ("along_columns", "across_groups_in_vectors")),
    ("n64c128h56w56_o128kh3kw3_s2p1g128_", "along_columns"),
    ("n64c96h56w56_o96kh7kw7_p3g96_", "along_columns"),
    ("n1c1h2048w2048_o1kh31kw31_p15_", "along_columns"),
    ("n1c3h1024w1024_o8kh5kw5_p2_", "along_columns"),
    ("n64c128h56w56_o128kh3kw3_d2p2g128_", "by_element"),
)

# The kernels of Winograd's convolution as NCHW and NHWC take them: how x is read, and y written.
TRANSFORMS = (
    ("weights",), ("image", "inside", False), ("image", "inside", True), ("result", False, True),
    ("result", False, False), ("result", True, False),
)  # fmt: skip

# How x is read and y written: NCHW, NHWC, and sums over the batch, which leave parts.
PATHS = (("across_pixels", "one_by_one"), ("along_channels", "along_outputs"), ("mixed", "along_pixels"))


def configurations(dtype: str) -> Iterator[Configuration]:
    """The specialisations that the layers of a network use."""
    from gpuconv import dtypes
    from gpuconv.backends.numba_cuda import depthwise as filters
    from gpuconv.backends.numba_cuda import tensor_tile, tiles

    if dtype in filters.DTYPES:
        for line, load in FILTERS:
            yield depthwise(line + dtypes.CODES[dtype], load)
    for tile in tiles.TILES.get(dtype, ()):
        for gather, scatter in PATHS:
            yield implicit_gemm(dtype, tile, gather, scatter)
    if dtype == "float32":
        for kernel, *ways in TRANSFORMS:
            yield winograd(kernel, *ways)
        for tile in tiles.TILES[dtype]:
            yield winograd("multiply", tile)
    for way in WAYS.get(dtype, ()):
        for tile in tensor_tile.tiles(way):
            for y_dtype in dict.fromkeys((dtype, "float32")):  # the result, and what parts leave
                yield implicit_gemm_mma(tile, way, dtype, y_dtype)


def show_configurations(found: Iterable[Configuration], console: Console) -> None:
    """Compile each for every architecture, and print what came of it."""
    table = Table(title="configurations")
    for column in ("kernel", "configuration", "sm", "registers", "stack+spill", "shared", "warps", "instructions"):
        table.add_column(column, no_wrap=column != "instructions")
    for configuration in found:
        library = machine_code.lowered(configuration.body, configuration.arguments)
        for cc in ARCHITECTURES:
            figures = machine_code.assembled(library, cc, configuration.registers)
            processor = MULTIPROCESSORS[cc]
            shared = figures.shared + configuration.dynamic
            warps = processor.warps(configuration.threads, figures.registers, shared)
            table.add_row(
                configuration.kernel,
                configuration.name,
                f"{cc[0]}{cc[1]}",
                str(figures.registers),
                f"{figures.stack}+{figures.spills}",
                str(shared),
                f"{warps} of {processor.threads // 32}",
                " ".join(f"{name}:{count}" for name, count in sorted(figures.instructions.items())),
            )
    console.print(table)


def show_layers(rows: Iterable[Row], device: Device, console: Console) -> None:
    """Print each layer's floor on ``device``, and how the kernels above would cut it up."""
    from gpuconv.backends.numba_cuda import depthwise, gpus, implicit_gemm, implicit_gemm_mma

    target = Target("cuda", gpu=gpus.KNOWN[next(key for key, known in DEVICES.items() if known is device)])
    table = Table(title=f"least times on {device.name}")
    for column in ("suite", "layer", "GFLOP", "FLOP/B", "floor, µs", "set by", "configuration"):
        table.add_column(column, no_wrap=column != "configuration")
    for row in rows:
        seconds, what = device.floor(row)
        problem = row.problem
        chosen: Any = implicit_gemm if problem.sum_dtype == problem.x_dtype else implicit_gemm_mma
        chosen = chosen if depthwise.unsupported(problem, target) else depthwise
        plan = chosen.plan(problem, target, 2**28)
        intensity = problem.flops / problem.bytes
        figures = f"{problem.flops / 1e9:.3g}", f"{intensity:.3g}", f"{seconds * 1e6:.3g}"
        table.add_row(row.suite, row.name, *figures, what, plan.detail)
    console.print(table)
