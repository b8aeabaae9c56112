"""``numba_cuda.implicit_gemm`` without a GPU: its choices, and its machine code.

The general bodies (``test_implementations`` and the others) run it too, and ``test_implicit_gemm_simulated`` its kernel
at every tile's edges, both in Numba's simulator.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import ARCHITECTURES, SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from bench import kernels, layers, machine_code
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import implicit_gemm, tiles
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm"
EVERY_TILE = [(dtype, tile) for dtype, found in tiles.TILES.items() for tile in found]
GPU = Target("cuda", 0)
LIMIT = 2**28


# ---- choices


@pytest.mark.parametrize(("dtype", "tile"), EVERY_TILE, ids=str)
def test_tile_shapes_suit_the_kernel(dtype, tile):
    lanes = 16 // np.dtype(dtype).itemsize
    assert tile.faults(lanes) == []
    assert tile.registers * tile.threads * tile.blocks <= 65536
    # Each of these breaks a rule.
    for change in ({"rows": 1}, {"pixels": 16}, {"columns": tile.pixels}, {"depth": 1}, {"depth": 512}):
        assert replace(tile, **change).faults(lanes), change


LINES = (
    "n{}c64h56w56_o64kh3kw3_p1_f32", "n{}c3h224w224_o64kh7kw7_s2p3_f32", "n{}c512h7w7_o512kh3kw3_p1_f32",
    "n{}c1024h14w14_o256kh1kw1_f64", "n{}c128h56w56_o128kh3kw3_s2p1_dgrad_f32", "n{}c32h9w9_o32kh3kw3_p1g32_f32",
)  # fmt: skip


@pytest.mark.parametrize("line", [line.replace("_dgrad", "") for line in LINES])
@pytest.mark.parametrize("op", ["forward", "input_grad"])
def test_how_a_sum_is_cut_depends_on_one_image(line, op):
    """Not on the batch, nor on the workspace: conv2d(x)[0] and conv2d(x[:1]) have the same bits."""

    def cuts(batch: int, limit: int) -> list[tuple]:
        problem = replace(Conv2dProblem.parse(line.format(batch)), op=op)
        launches = implicit_gemm.plan(problem, GPU, limit).config["launches"]
        return [(cut.by_tap, cut.slices, cut.parts, cut.part_slices) for cut in launches]

    assert cuts(1, LIMIT) == cuts(3, LIMIT) == cuts(256, LIMIT) == cuts(256, 2**25)


sizes = st.tuples(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 300), st.integers(1, 3), st.integers(1, 300),
    st.sampled_from([1, 3, 7]), st.sampled_from([2, 9, 60]), st.sampled_from([1, 2]), st.sampled_from([1, 3]),
)  # fmt: skip


@given(sizes, st.sampled_from(["forward", "input_grad", "weight_grad"]), st.sampled_from([2**20, 2**24, 2**28]))
def test_a_plan_covers_the_sum_within_its_limit(given_sizes, op, limit):
    N, groups, C, multiplier, O, K, H, stride, dilation = given_sizes
    extent = H + dilation * (K - 1)
    problem = Conv2dProblem(
        N, C * groups, extent, extent, O * groups * multiplier, K, K, stride=(stride, stride),
        dilation=(dilation, dilation), groups=groups, op=op,
    )  # fmt: skip
    try:
        made = implicit_gemm.plan(problem, GPU, limit)
    except MemoryError as error:
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > limit
        assert implicit_gemm.plan(problem, GPU, needed).workspace <= needed
        return
    assert made.workspace <= limit
    for cut in made.config["launches"]:
        forward = cut.part.problem
        products = forward.C // forward.groups * forward.KH * forward.KW
        assert cut.tile.depth * cut.slices >= products
        # A launch of no products at all is one that writes the bias.
        assert (cut.parts - 1) * cut.part_slices < max(cut.slices, 1)
        assert cut.slices <= cut.parts * cut.part_slices
        assert 1 <= cut.images <= forward.N
        assert 1 <= cut.parts_packed <= cut.parts
        assert cut.plane(1) % 4 == 0


def test_it_refuses_with_every_reason():
    huge = Conv2dProblem(1, 2**27, 4, 4, 1, 4, 4, x_dtype="float16", k_dtype="float16", y_dtype="float16")
    reasons = implicit_gemm.unsupported(huge, GPU)
    assert len(reasons) == 2
    assert "float16 × float16 → float16; convert them" in reasons[0]
    assert f"products per output; got {2**31}" in reasons[1]
    for op in ("forward", "input_grad"):
        wide = Conv2dProblem(1, 2**31, 2, 2, 2**31, 1, 1, groups=2**31, op=op)
        channels, blocks = implicit_gemm.unsupported(wide, GPU)
        assert f"output channels; got {2**31}" in channels
        assert f"a grid has up to {2**31 - 1} blocks; one image takes {2**31}" in blocks


def test_it_runs_only_when_its_name_is_given(monkeypatch):
    """It is experimental: on a machine whose GPU could run it, the direct kernel is chosen before it."""
    monkeypatch.setattr(implicit_gemm, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.implementation("numba_cuda.direct"), "unavailable", lambda: "gone")
    problem = Conv2dProblem.parse("n1c8h6w6_o8kh3kw3_f32")
    for backend in (None, "numba_cuda"):
        with pytest.raises(gpuconv.NoBackendError, match=r"implicit_gemm: experimental: .* asks for it"):
            dispatch.choose.__wrapped__("test", problem, GPU, backend, LIMIT)
    assert dispatch.choose.__wrapped__("test", problem, GPU, NAME, LIMIT).name == NAME
    names = dispatch.preferred(problem, "cuda")[0]
    assert [dispatch.is_experimental(name) for name in names] == sorted(map(dispatch.is_experimental, names))


def test_explain_says_that_it_is_experimental():
    told = str(gpuconv.explain((1, 8, 6, 6), (8, 8, 3, 3)))
    assert re.search(rf"{NAME} +cuda  experimental: no hardware has run it yet; backend='{NAME}' asks for it", told)


@pytest.mark.parametrize(
    ("part", "at_least"),
    [
        ("not one_beyond and not small_tile", 15),
        ("small_tile and (15-1 or 16-4 or 17-3)", 6),
        pytest.param("small_tile", 12, marks=pytest.mark.full),
        pytest.param("one_beyond", 16, marks=pytest.mark.full),
    ],
    ids=["rules", "small_tile", "small_tile_more", "every_tile"],
)
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_implicit_gemm_simulated.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", part]
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= at_least, child.stdout[-2000:]


# ---- machine code

needs_ptxas = pytest.mark.skipif(
    machine_code.ptxas() is None, reason="NVIDIA's assembler is not installed (nvidia-cuda-nvcc)"
)
WAYS = list(
    itertools.product(("across_pixels", "along_channels", "mixed"), ("one_by_one", "along_pixels", "along_outputs"))
)
# The tile with the least registers to spare in the ways that networks use; the long profile has all tiles and ways.
SPECIALISATIONS = [
    pytest.param(
        dtype, tile, gather, scatter, id=f"{dtype}-{tile.outputs}x{tile.pixels}-{gather}-{scatter}",
        marks=() if tile is tiles.WIDE and (gather, scatter) in kernels.PATHS else pytest.mark.full,
    )
    for dtype, tile in EVERY_TILE
    for gather, scatter in WAYS
]  # fmt: skip


@needs_ptxas
@pytest.mark.parametrize(("dtype", "tile", "gather", "scatter"), SPECIALISATIONS)
def test_machine_code(dtype, tile, gather, scatter):
    lanes = 16 // np.dtype(dtype).itemsize
    configuration = kernels.implicit_gemm(dtype, tile, gather, scatter)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ARCHITECTURES:
        figures = machine_code.assembled(library, cc, configuration.registers)
        assert figures.clean, (cc, figures)
        assert figures.registers <= tile.registers
        assert figures.shared == tile.shared_bytes(lanes) <= tiles.STATIC_SHARED_BYTES
        warps = kernels.MULTIPROCESSORS[cc].warps(tile.threads, figures.registers, figures.shared)
        assert warps * 32 >= min(tile.blocks, kernels.MULTIPROCESSORS[cc].blocks) * tile.threads
        found = figures.instructions
        # One multiply-add per product and sum of a thread, none twice; every vector of shared memory read once.
        assert found["FFMA" if dtype == "float32" else "DFMA"] == tile.rows * tile.columns * tile.depth
        assert found["LDS.128"] == (tile.rows + tile.columns) // lanes * tile.depth
        weights = tile.outputs * tile.depth // lanes // tile.threads
        window = tile.pixels * tile.depth // lanes // tile.threads
        assert found["LDG.128"] == weights + (window if gather == "along_channels" else 0)
        stored = {"one_by_one": 0}.get(scatter, tile.rows * tile.columns // lanes)
        assert found["STG.128"] == stored
        assert found["STS.128"] == weights
        assert found["LDL"] == found["STL"] == 0


@needs_ptxas
def test_a_spill_and_a_missing_vector_are_seen():
    """The test above can fail: with a quarter of the registers, and where y is written one by one."""
    configuration = kernels.implicit_gemm("float32", tiles.WIDE, "across_pixels", "one_by_one")
    library = machine_code.lowered(configuration.body, configuration.arguments)
    figures = machine_code.assembled(library, (8, 0), 64)
    assert not figures.clean
    assert figures.instructions["STL"] + figures.instructions["STL.128"] > 0
    assert figures.instructions["STG.128"] == 0


# What counts elements or pixels; channels, taps, slots and a thread's own numbers may be narrow.
COUNTERS = {"pixel", "pixels", "block", "tiles_p", "first_p", "group", "part", "panel_at", "n", "i", "j"}


def test_offsets_are_counted_in_64_bits():
    from numba.cuda import compiler, types

    configuration = kernels.implicit_gemm("float32", tiles.WIDE, "across_pixels", "one_by_one")
    made = compiler.compile_cuda(configuration.body, types.void, configuration.arguments, cc=(8, 0))
    integers = {
        name.partition(".")[0]: str(kind)
        for name, kind in made.type_annotation.typemap.items()
        if isinstance(kind, types.Integer) and name[0] != "$"
    }
    assert integers.keys() >= COUNTERS
    assert {integers[name] for name in COUNTERS} <= {"int64", "uint64"}


@needs_ptxas
def test_the_helpers_become_machine_code():
    from numba.cuda import types

    from gpuconv.backends.numba_cuda import panels, partials

    i64, vector, flag = types.int64, types.Array(types.float32, 1, "C"), types.boolean
    view = (vector, *[i64] * 6)
    ways = ((True, False, False), (False, False, False), (True, True, True))  # the last a weight gradient's
    bodies = [(panels.build("float32", 64, 8, *way), (*view, vector, *[i64] * 9)) for way in ways]
    bodies.append((partials.build("float32", "float32"), (vector, i64, i64, vector, flag, flag, *view, *[i64] * 6)))
    for body, arguments in bodies:
        library = machine_code.lowered(body, arguments)
        for cc in ARCHITECTURES:
            figures = machine_code.assembled(library, cc)
            assert figures.clean
            assert figures.registers <= 128


# ---- what is printed


@needs_ptxas
def test_bench_kernels_prints_both_tables():
    import click.testing

    from bench.__main__ import main

    found = [kernels.implicit_gemm("float64", tiles.SMALL_64, *kernels.PATHS[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "configurations", lambda dtype: found)
        result = click.testing.CliRunner().invoke(main, ["kernels", "--dtype", "float64", "--suites", "resnet50"])
    assert result.exit_code == 0, result.output
    assert result.output.count("0+0") == len(kernels.ARCHITECTURES)
    assert "DFMA:128" in result.output
    assert all(row.name.split()[0] in result.output for row in layers.load(["resnet50"]))


def test_floors_are_the_larger_of_two():
    device = kernels.Device("test", {"float32": 1e12}, 1e12)
    thin, dense = layers.from_lines(["n1c1h100w100_o1kh1kw1_f32", "n1c64h56w56_o64kh3kw3_p1_f32"])
    assert device.floor(thin) == (thin.problem.bytes / 1e12, "memory")
    assert device.floor(dense) == (dense.problem.flops / 1e12, "arithmetic")


def test_occupancy_is_that_of_the_scarcest():
    processor = kernels.MULTIPROCESSORS[8, 0]
    assert processor.warps(256, 128, 19712) == 16, "registers: two blocks"
    assert processor.warps(256, 32, 50_000) == 24, "shared memory: three blocks"
    assert processor.warps(32, 32, 0) == 32, "blocks"
    assert processor.warps(1024, 32, 0) == 64, "threads"
