"""Every specialisation of every CUDA kernel becomes machine code, with no GPU: no spills, no stack, launchable.

Numba writes PTX for each architecture, NVIDIA's assembler turns it into machine code and reports what it took.
"""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import LONG

from bench import machine_code
from gpuconv import dtypes
from gpuconv.backends import cupy_gemm
from gpuconv.backends.numba_cuda import convert, direct

# 8.6 and 8.9 differ from 8.0 in how much fits a multiprocessor: the long profile has them.
ARCHITECTURES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0)) if LONG else ((7, 5), (8, 0), (9, 0))

# One specialisation per dtype and tile. The quick profile has float32 in every tile, and of the dtypes that differ most
# the tile with the most sums, where registers run short; the long one adds the other tiles, the other dtypes and pairs
# of two, which differ in the conversion of what is loaded and in nothing else.
QUICK = ("float32", "float16", "bfloat16", "float64", "complex64", "int8")
SAME = [(name, name) for name in QUICK]
OTHERS = [(name, name) for name in dtypes.CODES if name not in (*QUICK, "bool")]  # bool travels as uint8
MIXED = [
    ("uint8", "int8"),
    ("float32", "int8"),
    ("uint8", "float32"),
    ("bfloat16", "float32"),
    ("float16", "bfloat16"),
    ("float32", "complex64"),
    ("int64", "float64"),
]
ZERO_POINTS = [("uint8", "int8")]


@lru_cache(maxsize=1)
def ptxas() -> str | None:
    """The assembler from NVIDIA's wheel, whose folder is named by the toolkit's major version."""
    try:
        import nvidia
    except ModuleNotFoundError:
        return None
    found = [path for root in nvidia.__path__ for path in Path(root).glob("*/bin/ptxas")]
    return str(found[0]) if found else None


needs_ptxas = pytest.mark.skipif(ptxas() is None, reason="NVIDIA's assembler is not installed (nvidia-cuda-nvcc)")


def assemble(ptx: str, cc: tuple[int, int], folder: Path) -> dict[str, int]:
    """Registers, stack frame, spill and shared-memory bytes of the one kernel in ``ptx``."""
    source, cubin = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    command = [str(ptxas()), "-v", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stderr
    patterns = {
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "registers": r"Used (\d+) registers",
    }
    figures = {name: [int(n) for n in re.findall(pattern, report.stderr)] for name, pattern in patterns.items()}
    assert all(len(found) == 1 for found in figures.values()), report.stderr
    shared = re.search(r"(\d+) bytes smem", report.stderr)
    return {name: found[0] for name, found in figures.items()} | {"shared": int(shared[1]) if shared else 0}


def lowered(body: Any, *arguments: Any) -> Any:
    """The kernel lowered to NVVM's language, which is the same for every architecture and takes the longest."""
    from numba.cuda import compiler, types

    signature = types.void(*arguments)
    return compiler._compile_pyfunc_with_fixup(body, signature, device=False, abi="numba", cc=ARCHITECTURES[0])[0]


def vector(name: str) -> Any:
    from numba.cuda import types

    return types.Array(convert.numba_type(name), 1, "C")


def direct_arguments(x: str, k: str, y: str) -> tuple[Any, ...]:
    """The Numba types of the direct kernel's arguments."""
    from numba.cuda import types

    sums = "float32" if y in ("float16", "bfloat16") else y
    i64, number = types.int64, convert.numba_type(sums)
    return (
        *(vector(x), *[i64] * 6),
        *(vector(k), *[i64] * 6),
        *(vector(sums), types.boolean, types.boolean),
        *(vector(y), *[i64] * 6),
        *(vector("int64"), i64, i64),
        *(vector("int64"), i64, i64),
        *[i64] * 8,
        *(number, number, vector(sums)),
    )


def direct_library(tile: direct.Tile, x: str, k: str, y: str, zero_points: bool, conjugate: str | None = None) -> Any:
    from gpuconv.backends.numba_cuda import direct_kernel

    return lowered(direct_kernel.build(tile, x, k, y, zero_points, conjugate), *direct_arguments(x, k, y))


def ptx_of(library: Any, cc: tuple[int, int]) -> str:
    (ptx,) = library.get_asm_strs(cc=cc)
    return ptx if isinstance(ptx, str) else ptx.decode()


def tiles_for(y: str) -> list[direct.Tile]:
    wide = direct.WIDE_COMPLEX128 if y == "complex128" else direct.WIDE
    return [wide if tile is direct.WIDE else tile for tile in direct.TILES]


SPECIALISATIONS = [
    pytest.param(
        tile, x, k, dtypes.promoted(x, k), zero_points,
        marks=pytest.mark.full if number and x != "float32" else marks,
        id=f"{x}-{k}-{tile.outputs}x{tile.pixels}{'-zero_points' * zero_points}",
    )
    for pairs, zero_points, marks in (
        (SAME, False, ()),
        (ZERO_POINTS, True, ()),
        (OTHERS + MIXED, False, pytest.mark.full),
    )
    for x, k in pairs
    for number, tile in enumerate(tiles_for(dtypes.promoted(x, k)))
]  # fmt: skip


@needs_ptxas
@pytest.mark.parametrize(("tile", "x", "k", "y", "zero_points"), SPECIALISATIONS)
def test_direct_kernel_fits_in_registers(tile, x, k, y, zero_points, tmp_path):
    library = direct_library(tile, x, k, y, zero_points)
    for cc in ARCHITECTURES:
        figures = assemble(ptx_of(library, cc), cc, tmp_path)
        assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0, (cc, figures)
        assert figures["registers"] * tile.threads <= 65536, "a block must fit a multiprocessor's registers"
        assert figures["shared"] <= 48 * 1024, "what a launch may use without asking"


@needs_ptxas
@pytest.mark.parametrize("conjugate", ["x", "k"])
@pytest.mark.parametrize("dtype", ["complex64", pytest.param("complex128", marks=pytest.mark.full)])
def test_conjugating_kernel_fits_in_registers(dtype, conjugate, tmp_path):
    for tile in tiles_for(dtype)[:1]:  # the one with the most sums
        library = direct_library(tile, dtype, dtype, dtype, False, conjugate)
        for cc in ARCHITECTURES:
            figures = assemble(ptx_of(library, cc), cc, tmp_path)
            assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0, (tile, cc, figures)


WINDOWS = [("unfold", size, size) for size in (1, 2, 4, 8, 16)] + [
    pytest.param("fold", name, dtypes.promoted(name, name), marks=() if name in QUICK else pytest.mark.full)
    for name in dtypes.CODES
    if name != "bool"
]


def patches_body(op: str, x: Any, y: Any) -> tuple[Any, ...]:
    """The kernel of unfold or fold, and the Numba types of its arguments."""
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import patches_kernel

    i64 = types.int64
    table = vector("int64"), i64, i64
    if op == "unfold":
        elements = vector(patches_kernel.WORDS[x])
        return patches_kernel.build_unfold(x), elements, *[i64] * 5, elements, *[i64] * 7, *table, *table, *[i64] * 6
    return patches_kernel.build_fold(x, y), vector(x), *[i64] * 7, vector(y), *[i64] * 19


@needs_ptxas
@pytest.mark.parametrize(("op", "x", "y"), WINDOWS)
def test_patches_kernels_fit_in_registers(op, x, y, tmp_path):
    library = lowered(*patches_body(op, x, y))
    for cc in ARCHITECTURES:
        figures = assemble(ptx_of(library, cc), cc, tmp_path)
        assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0, (cc, figures)
        assert figures["registers"] <= 128, "two blocks of 256 threads on each multiprocessor, at least"


@needs_ptxas
@pytest.mark.parametrize(
    ("summand", "total"),
    [("float32", "float64"), ("complex64", "complex128"), ("complex128", "complex128"), ("int64", "int64")],
)
def test_the_kernel_that_adds_up_pieces_fits_in_registers(summand, total, tmp_path):
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import ring

    for first in (True, False):
        library = lowered(ring.build(first), vector(summand), vector(total), types.int64)
        for cc in ARCHITECTURES:
            figures = assemble(ptx_of(library, cc), cc, tmp_path)
            assert figures["stack"] == figures["spill_stores"] == figures["spill_loads"] == 0, (cc, figures)
            assert figures["registers"] <= 64


@needs_ptxas
def test_a_spill_is_seen(tmp_path):
    """The test above can fail: a tile too large for the registers is caught."""
    greedy = direct.Tile(threads_o=16, threads_p=16, rows=16, columns=16, depth=8)
    library = direct_library(greedy, "float64", "float64", "float64", False)
    assert assemble(ptx_of(library, (8, 0)), (8, 0), tmp_path)["stack"] > 0


@pytest.mark.parametrize("tile", [*direct.TILES, direct.WIDE_COMPLEX128], ids=str)
def test_tile_shapes_suit_the_loads(tile):
    assert tile.threads % tile.pixels == 0
    assert tile.threads % tile.depth == 0
    assert tile.depth % (tile.threads // tile.pixels) == 0
    assert tile.threads % 32 == 0, "whole warps"
    assert tile.threads <= 1024


@pytest.mark.parametrize("itemsize", cupy_gemm.WORDS)
@pytest.mark.parametrize("cc", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_im2col_kernel_compiles(itemsize, cc, tmp_path):
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with the cuda extras")
    source = cupy_gemm.im2col_source(itemsize).encode()
    _, program = nvrtc.nvrtcCreateProgram(source, b"im2col.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{cc[0]}{cc[1]}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()


# ---- 64-bit offsets, for arrays of more than 2^31 elements


def direct_body() -> tuple[Any, ...]:
    from gpuconv.backends.numba_cuda import direct_kernel

    body = direct_kernel.build(direct.WIDE, "float32", "float32", "float32", False, None)
    return body, *direct_arguments("float32", "float32", "float32")


# What counts elements or pixels, and what may be narrow: a thread's number in its block.
COUNTERS = {
    "direct": {"at", "pixel", "pixels", "products", "x_base", "row", "column", "tile"},
    "unfold": {"element", "row", "column", "n", "c"},
    "fold": {"element", "down", "across", "n", "c"},
}


@needs_ptxas
@pytest.mark.parametrize("op", COUNTERS)
def test_kernels_count_in_64_bits(op):
    from numba.cuda import compiler, types

    makers = {"direct": direct_body, "unfold": lambda: patches_body("unfold", 4, 4)}
    body, *arguments = makers.get(op, lambda: patches_body("fold", "float32", "float32"))()
    typemap = compiler.compile_cuda(body, types.void, tuple(arguments), cc=(8, 0)).type_annotation.typemap
    integers = {name: str(kind) for name, kind in typemap.items() if isinstance(kind, types.Integer) and name[0] != "$"}
    assert COUNTERS[op] <= integers.keys()
    narrow = {name.partition(".")[0] for name, kind in integers.items() if kind not in ("int64", "uint64")}
    assert narrow <= {"t"} if op == "direct" else narrow <= {"ZERO", "value"}


def test_the_im2col_kernel_counts_in_64_bits():
    source = cupy_gemm.IM2COL_SOURCE
    declared = re.findall(r"\b(?:(?:unsigned|long|short|char|int)\s+)+\*?\w+\s*[=,;)]", source)
    assert len(declared) > 5
    assert not [text for text in declared if "long long" not in text and "axis" not in text]
    assert "blockIdx.x * (long long)blockDim.x" in source
    assert "(long long)gridDim.x * blockDim.x" in source


# ---- the instructions that bench.machine_code counts

MOVES = """
.version 8.0
.target sm_{cc}
.address_size 64
.visible .entry moves(.param .u64 from, .param .u64 to)
{{
    .reg .u64 %from, %to, %own; .reg .u32 %t, %near, %far; .reg .f32 %f, %v<4>;
    .shared .align 16 .b8 memory[4096];
    ld.param.u64 %from, [from];
    ld.param.u64 %to, [to];
    cvta.to.global.u64 %from, %from;
    cvta.to.global.u64 %to, %to;
    mov.u32 %t, %tid.x;
    mul.wide.u32 %own, %t, {step};
    add.u64 %from, %from, %own;
    add.u64 %to, %to, %own;
    ld.global.f32 %f, [%from];
    st.global.f32 [%to], %f;
    ld.global.v2.f32 {{%v0, %v1}}, [%from + 16];
    st.global.v2.f32 [%to + 16], {{%v0, %v1}};
    ld.global.v4.f32 {{%v0, %v1, %v2, %v3}}, [%from + 32];
    st.global.v4.f32 [%to + 32], {{%v0, %v1, %v2, %v3}};
    shl.b32 %near, %t, 2;
    mov.u32 %far, memory;
    add.u32 %near, %near, %far;
    xor.b32 %far, %near, 64;
    st.shared.f32 [%near], %f;
    bar.sync 0;
    ld.shared.f32 %f, [%far];
    st.global.f32 [%to + 48], %f;
    ret;
}}
"""


@needs_ptxas
@pytest.mark.parametrize("step", [64, 0], ids=["by thread", "all alike"])
@pytest.mark.parametrize("cc", ARCHITECTURES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_loads_and_stores_are_counted_on_every_architecture(cc, step):
    """Their operation codes differ: on sm_75 also with whether an address is the same for all threads."""
    ptx = MOVES.format(cc=f"{cc[0]}{cc[1]}", step=step)
    figures = machine_code.assembled(SimpleNamespace(get_asm_strs=lambda cc: [ptx]), cc)
    assert figures.clean and figures.shared == 4096
    sized = {f"{name}{width}": 1 for name in ("LDG", "STG") for width in ("", ".64", ".128")}
    assert figures.instructions == sized | {"STG": 2, "LDS": 1, "STS": 1, "BAR": 1}
