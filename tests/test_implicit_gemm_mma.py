"""``numba_cuda.implicit_gemm_mma`` without a GPU: what it serves, its machine code, and its proof in the simulator."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simulated_warp
from hypothesis import assume, given
from hypothesis import strategies as st
from running import ARCHITECTURES, SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from bench import kernels, machine_code
from gpuconv.backends.numba_cuda import (
    channels_last,
    columns_together,
    implicit_gemm_mma,
    tensor_shape,
    tensor_tile,
    tiles,
)
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
GPU = Target("cuda", 0)
needs_ptxas = pytest.mark.skipif(
    machine_code.ptxas() is None, reason="NVIDIA's assembler is not installed (nvidia-cuda-nvcc)"
)


# ---- what it serves


def test_highest_precision_of_float32_never_meets_a_tensor_core():
    problem = Conv2dProblem.parse("n1c8h6w6_o8kh3kw3_f32")
    (reason,) = implicit_gemm_mma.unsupported(problem, GPU)
    assert "precision='highest' forbids; pass precision='high' or 'medium'" in reason
    assert implicit_gemm_mma.way(replace(problem, precision="high")) == "3xtf32"
    assert implicit_gemm_mma.way(replace(problem, precision="medium")) == "tf32"
    for dtype in ("float16", "bfloat16"):
        for precision in ("highest", "high", "medium"):
            given_types = {"x_dtype": dtype, "k_dtype": dtype, "y_dtype": dtype, "precision": precision}
            assert implicit_gemm_mma.unsupported(replace(problem, **given_types), GPU) == []
            assert implicit_gemm_mma.way(replace(problem, **given_types)) == dtype


def test_it_refuses_with_every_reason(monkeypatch):
    monkeypatch.setattr(implicit_gemm_mma, "_capability", lambda ordinal: (7, 5))
    reasons = implicit_gemm_mma.unsupported(Conv2dProblem(1, 2**28, 2, 2, 1, 1, 1, y_dtype="float64"), GPU)
    assert [re.split(r"[;,]", reason)[-1].strip() for reason in reasons] == [
        "convert them",
        "use backend='numba_cuda.direct'",
        "use 'numba_cuda.direct'",
    ]
    wide = Conv2dProblem(1, 1, 2, 2, 2**31, 1, 1, x_dtype="float16", k_dtype="float16", y_dtype="float16")
    assert f"output channels; got {2**31}" in implicit_gemm_mma.unsupported(wide, GPU)[0]


def test_explain_says_that_it_is_experimental():
    told = str(gpuconv.explain((1, 8, 6, 6), (8, 8, 3, 3), input_dtype="float16"))
    assert re.search(rf"{NAME} +cuda  experimental: no hardware has run it yet; backend='{NAME}' asks for it", told)


@given(
    st.integers(1, 30), st.integers(1, 3), st.integers(1, 200), st.integers(1, 200), st.sampled_from([1, 3, 5]),
    st.sampled_from(["forward", "input_grad", "weight_grad"]), st.sampled_from([2**18, 2**22, 2**28]),
)  # fmt: skip
def test_a_plan_covers_the_sum_within_its_limit(N, groups, C, O, K, op, limit):
    kinds = {"x_dtype": "float16", "k_dtype": "float16", "y_dtype": "float16"}
    problem = Conv2dProblem(N, C * groups, 9, 8, O * groups, K, K, stride=(2, 2), groups=groups, op=op, **kinds)
    try:
        made = implicit_gemm_mma.plan(problem, GPU, limit)
    except MemoryError as error:
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > limit
        assert implicit_gemm_mma.plan(problem, GPU, needed).workspace <= needed
        return
    assert made.workspace <= limit
    alone = implicit_gemm_mma.plan(replace(problem, N=1), GPU, 2**30)
    for cut, single in zip(made.config["launches"], alone.config["launches"], strict=True):
        forward = cut.part.problem
        assert cut.slices * cut.depth >= forward.C // groups * forward.KH * forward.KW
        # A launch of no products at all is one that writes the bias.
        assert (cut.parts - 1) * cut.part_slices < max(cut.slices, 1)
        assert cut.slices <= cut.parts * cut.part_slices
        assert 1 <= cut.images <= forward.N
        assert 1 <= cut.parts_packed <= cut.parts
        if op != "weight_grad":  # whose sums go over the batch
            assert (cut.slices, cut.parts, cut.part_slices) == (single.slices, single.parts, single.part_slices)


@pytest.mark.parametrize("line", ["n256c64h112w112_o64kh3kw3_p1_wgrad_f16", "n64c512h256w256_o512kh1kw1_wgrad_f16"])
def test_a_large_weight_gradient_packs_its_weights_in_turn(line):
    """dy is larger than the workspace; no part is longer than a tensor core's sums should be."""
    made = implicit_gemm_mma.plan(Conv2dProblem.parse(line), GPU, 2**28)
    (cut,) = made.config["launches"]
    assert cut.parts_packed < cut.parts
    assert cut.part_slices * cut.depth <= 2**16
    assert made.workspace <= 2**28
    assert implicit_gemm_mma.pack_key(made) is None


@given(
    st.integers(1, 70), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3),
    st.sampled_from([16, 32]),
)  # fmt: skip
def test_columns_fill_slices_of_small_batches(N, W, KW, stride, dilation, pad, depth):
    """Of each image as many; never more slices than of single pixels; of the copy all that the windows read."""
    OW = (W + 2 * pad - dilation * (KW - 1) - 1) // stride + 1
    assume(OW >= 1)
    problem = Conv2dProblem(
        N, 2, 5, W, 3, 1, KW, stride=(1, stride), dilation=(1, dilation), padding=((0, 0), (pad, pad)),
        op="weight_grad", x_dtype="float16", k_dtype="float16", y_dtype="float16",
    )  # fmt: skip
    together = columns_together.of(problem, depth)
    m = 1 if together is None else together.columns
    assert OW % m == 0
    slices = OW // m * -(-m * N // depth)
    assert slices <= OW * -(-N // depth)
    if N == 1 and OW == depth:
        assert slices == 1
    (part,) = columns_together.parts(problem, depth)
    forward = part.problem
    assert (forward.C, forward.KW, forward.OW, forward.OH) == (N * m, OW // m, KW, 1)
    if together is not None:
        _, columns = forward.tables()
        for q in range(KW):
            for J in range(OW // m):
                at = columns.index[q * columns.outer + J * columns.inner]
                assert 0 <= at < forward.W, "not a border: the copy has it"
                for r in range(m):
                    assert at - together.left + r * together.step == (J * m + r) * stride + q * dilation - pad


def test_columns_of_networks_layers():
    """7 of 8 products of a slice used where 1 of 32 were; the copy of a large image stays small."""
    for line, columns in {
        "n1c64h56w56_o64kh3kw3_p1_wgrad_f16": 28, "n4c64h56w56_o64kh3kw3_p1_wgrad_f16": 8,
        "n8c64h56w56_o64kh3kw3_p1_wgrad_f16": 4, "n1c512h7w7_o512kh3kw3_p1_wgrad_f16": 7,
        "n32c64h56w56_o64kh3kw3_p1_wgrad_f16": None, "n1c64h56w56_o64kh3kw3_p1_f16": None,
        "n1c1h4096w4096_o1kh3kw3_p1_wgrad_f16": None,
    }.items():  # fmt: skip
        found = columns_together.of(Conv2dProblem.parse(line), 32)
        assert (found and found.columns) == columns, line
    told = str(implicit_gemm_mma.plan(Conv2dProblem.parse("n1c64h56w56_o64kh3kw3_p1_wgrad_f16"), GPU, 2**28).detail)
    assert "28 columns of an image in a slice" in told


# ---- shapes

every_tile = pytest.mark.parametrize("tile", tensor_shape.TILES, ids=lambda tile: tile.name)


@every_tile
def test_tile_shapes_suit_the_kernel(tile):
    assert tile.faults() == []
    assert tile.registers * tile.threads * tile.blocks <= 65536
    for change in ({"columns": 3}, {"warps_o": 3}, {"stages": 1}, {"stages": 99}, {"rows": 16, "columns": 16}):
        assert replace(tile, **change).faults(), change


def test_names_of_tiles_are_unique():
    assert len({tile.name for tile in tensor_shape.TILES}) == len(tensor_shape.TILES)
    for found in tiles.TILES.values():
        assert len({tile.name for tile in found}) == len(found)


@every_tile
def test_rows_of_shared_memory_meet_no_bank_twice(tile):
    """Eight rows that ldmatrix reads, and the 32 pairs of sums that a warp parks, in banks of 4 bytes."""
    banks = [(row * tensor_shape.PITCH + word) % 32 for row in range(8) for word in range(4)]
    assert len(set(banks)) == 32
    # Two words per thread go out in two halves of the warp.
    for half in range(2):
        parked = [g * tile.parking_pitch + 2 * q + word for g in range(4) for q in range(4) for word in range(2)]
        assert len({(at + half * 4 * tile.parking_pitch) % 32 for at in parked}) == 32


@every_tile
def test_every_sum_is_parked_once(tile):
    places = set()
    for warp in range(tile.warps_p):
        for lane in range(32):
            first = lane // 4 * tile.parking_pitch + warp * tile.warp_pixels + lane % 4 * 2
            for number in range(tile.sums // 4):
                for element in range(4):
                    places.add(first + tensor_tile.parking(tile, *divmod(number, tile.columns), element))
    assert places == {o * tile.parking_pitch + p for o in range(tile.warp_outputs) for p in range(tile.pixels)}
    assert max(places) < tile.words


# ---- rounding


def dots(way: str, left: np.ndarray, right: np.ndarray, promoted: int) -> np.ndarray:
    """``left · rightᵀ`` of 32 rows each, as one warp of the smallest tile adds it up."""
    tile, lane = tensor_shape.SMALL, np.arange(32)
    at_o = lane % 16 * tensor_shape.PITCH + lane // 16 * 4
    at_p = (32 + lane // 16 * 8 + lane % 8) * tensor_shape.PITCH + lane // 8 % 2 * 4
    sums, totals = ([np.zeros(32, np.float32)] * tile.sums for _ in range(2))
    words = tensor_shape.WORDS
    for turn in range(left.shape[1] // words):
        memory = np.zeros((64, tensor_shape.PITCH), np.float32)
        for first, operand in ((0, left), (32, right)):
            memory[first : first + 32, :words] = operand[:, turn * words :][:, :words]
        tensor_tile.add_slice(tile, way, simulated_warp.Core(memory, at_o), simulated_warp.Core(memory, at_p), sums)
        if promoted and turn % promoted == promoted - 1:
            totals = [total + value for total, value in zip(totals, sums, strict=True)]
            sums = [np.zeros(32, np.float32)] * tile.sums
    made = np.zeros((32, 32), np.float32)
    for index, values in enumerate(total + value for total, value in zip(totals, sums, strict=True)):
        (row, column), element = divmod(index // 4, tile.columns), index % 4
        made[16 * row + element // 2 * 8 + lane // 4, 8 * column + lane % 4 * 2 + element % 2] = values
    return made


def test_long_positive_sums_of_3xtf32_keep_their_promise():
    """With sums rounded towards zero, as tensor cores do: 2e-5 would be missed without the totals."""
    rng = np.random.default_rng(1)
    left, right = (rng.random((32, 4096), np.float32) for _ in range(2))
    exact = left.astype(float) @ right.astype(float).T
    errors = [
        np.linalg.norm(dots("3xtf32", left, right, promoted) - exact)
        for promoted in (0, tensor_tile.PROMOTED["3xtf32"])
    ]
    without, with_totals = (error / np.linalg.norm(exact) for error in errors)
    assert with_totals < 3e-6
    assert without > 2e-5


# ---- the proofs


QUICK = (
    "value or float32 or in_place or missing or nan_reaches or 33-5-7 or exact-float16 or 32x32x4 or exact-bfloat16 "
    "or (gradient and (3-padded or integers or empty)) or are_put_beside or 3-10 or largest_grid"
)


@pytest.mark.parametrize(
    ("part", "at_least"),
    [(QUICK, 14), pytest.param(f"not ({QUICK})", 25, marks=pytest.mark.full)],
    ids=["quick", "long"],
)
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_implicit_gemm_mma_simulated.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file, "-k", part]
    env = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed is not None and int(passed[1]) >= at_least, child.stdout[-2000:]


# The tiles with the least registers and the most shared memory to spare are in the quick profile, in one way each.
QUICK_MADE = {("float16", "128x256x3"), ("3xtf32", "128x128x4"), ("bfloat16", "64x64x4"), ("tf32", "32x32x4")}
MADE = [
    pytest.param(
        tile, way, dtype, y_dtype, id=f"{way}-{tile.name}-{y_dtype}",
        marks=() if (way, tile.name) in QUICK_MADE and y_dtype == dtype else pytest.mark.full,
    )
    for dtype, ways in kernels.WAYS.items()
    for way in ways
    for y_dtype in dict.fromkeys((dtype, "float32"))
    for tile in tensor_tile.tiles(way)
]  # fmt: skip


@needs_ptxas
@pytest.mark.parametrize(("tile", "way", "dtype", "y_dtype"), MADE)
def test_machine_code(tile, way, dtype, y_dtype):
    configuration = kernels.implicit_gemm_mma(tile, way, dtype, y_dtype)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ARCHITECTURES:
        figures = machine_code.assembled(library, cc, configuration.registers)
        assert figures.clean, (cc, figures)
        assert figures.registers <= tile.registers
        shared = figures.shared + tile.dynamic_bytes
        assert shared == tile.shared_bytes
        assert figures.shared <= tiles.STATIC_SHARED_BYTES
        processor = kernels.MULTIPROCESSORS[cc]
        assert shared + 1024 <= processor.shared, "what a block may have at most is 1 KiB less than there is"
        warps = processor.warps(tile.threads, figures.registers, shared)
        by_shared = processor.shared // (shared + 1024)
        assert warps * 32 >= min(tile.blocks, by_shared, processor.blocks) * tile.threads
        found = figures.instructions
        steps = tensor_shape.WORDS // tensor_shape.STEP
        products = {"3xtf32": 3}.get(way, 1)
        assert found["HMMA"] == steps * tile.rows * tile.columns * products
        assert found["LDSM"] == steps * (tile.rows + tile.columns // 2)
        # Rows of weights, and rows of the window once from x and once from the border.
        rows = tile.threads * 16 // tensor_shape.SLICE_BYTES
        assert found["LDGSTS"] == (tile.outputs + 2 * tile.pixels) // rows
        assert found["FFMA"] == found["LDL"] == found["STL"] == 0


@needs_ptxas
@pytest.mark.parametrize(("dtype", "together"), [("uint16", False), ("float32", False), ("uint16", True)])
def test_the_copy_becomes_machine_code(dtype, together):
    from numba.cuda import types

    vector, i64 = types.Array(getattr(types, dtype), 1, "C"), types.int64
    library = machine_code.lowered(channels_last.build(dtype, together), (vector, *[i64] * 6, vector, *[i64] * 10))
    for cc in ARCHITECTURES:
        figures = machine_code.assembled(library, cc)
        assert figures.clean
        assert figures.registers <= 128
