"""``numba_cuda.winograd`` without a GPU: its plans and transforms, its kernels in the simulator, its machine code.

The general bodies of tests ask for ``precision="highest"``, where it refuses.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import ARCHITECTURES, SIMULATED

if SIMULATED:
    pytest.skip("this process is the simulator", allow_module_level=True)

import gpuconv
from bench import kernels, machine_code
from gpuconv import dispatch
from gpuconv.backends.numba_cuda import gpus, tiles, winograd, winograd_kernels, winograd_transforms
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.winograd"
GPU, LIMIT = Target("cuda", 0), 2**28
LINE = "n{}c64h56w56_o64kh3kw3_p1_high_f32"


# ---- who may choose it, and what it refuses


def test_it_runs_only_when_its_name_is_given(monkeypatch):
    monkeypatch.setattr(winograd, "unavailable", lambda: None)
    monkeypatch.setattr(dispatch.implementation("numba_cuda.direct"), "unavailable", lambda: "gone")
    problem = Conv2dProblem.parse(LINE.format(1))
    for backend in (None, "numba_cuda"):
        with pytest.raises(gpuconv.NoBackendError, match=r"numba_cuda.winograd: experimental: .* asks for it"):
            dispatch.choose.__wrapped__("test", problem, GPU, backend, LIMIT)
    assert dispatch.choose.__wrapped__("test", problem, GPU, NAME, LIMIT).name == NAME


def test_explain_says_that_it_is_experimental():
    told = str(gpuconv.explain((1, 8, 6, 6), (8, 8, 3, 3), precision="high"))
    assert re.search(rf"{NAME} +cuda  experimental: no hardware has run it yet; backend='{NAME}' asks for it", told)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("n1c8h9w9_o8kh3kw3_f32", "precision='highest'"),
        ("n1c8h9w9_o8kh3kw3_s2_high_f32", "without stride"),
        ("n1c8h9w9_o8kh3kw3_d2_high_f32", "without stride"),
        ("n1c8h9w9_o8kh5kw3_high_f32", "3×3"),
        ("n1c8h9w9_o8kh3kw3_f64", "float64 × float64 → float64; convert them"),
        ("n1c8h9w9_o8kh3kw3_f16", "float16"),
        (f"n1c8h9w{2**30 + 1}_o8kh3kw3_high_f32", f"extents up to {2**30}"),
        (f"n{2**30}c1h9w9_o1kh3kw3_high_f32", "tiles of 4 × 4 up to"),
        (f"n1c{2**22 + 1}h9w9_o1kh3kw3_high_f32", f"channels up to {2**22}"),
    ],
)
def test_what_it_refuses(line, reason):
    for op in ("forward", "input_grad"):
        found = winograd.unsupported(replace(Conv2dProblem.parse(line), op=op), GPU)
        assert [text for text in found if reason in text]


def test_what_it_serves():
    for change in ("_high", "_medium", "_p7_high", "_p1_reflect_high", "_g4_high", "_nhwc_high"):
        problem = Conv2dProblem.parse(f"n1c8h9w9_o8kh3kw3{change}_f32")
        assert winograd.unsupported(problem, GPU) == []


# ---- plans

sizes = st.tuples(
    st.integers(1, 40), st.integers(1, 5), st.integers(0, 700), st.integers(1, 300), st.integers(1, 90),
    st.integers(1, 90), st.integers(0, 3),
)  # fmt: skip


@given(sizes, st.sampled_from(["forward", "input_grad"]), st.sampled_from([2**20, 2**24, 2**28]))
def test_a_plan_covers_the_problem_within_its_limit(given_sizes, op, limit):
    N, groups, C, O, H, W, pad = given_sizes
    pad = max(pad, 1)
    problem = Conv2dProblem(
        N, C * groups, H, W, O * groups, 3, 3, padding=((pad, pad), (1, pad)), groups=groups, op=op, precision="high",
        padding_mode="edge" if op == "forward" and pad == 2 else "constant",
    )  # fmt: skip
    try:
        made = winograd.plan(problem, GPU, limit)
    except MemoryError as error:
        needed = int(re.search(r"needs (\d+) bytes", str(error))[1])
        assert needed > limit
        assert winograd.plan(problem, GPU, needed).workspace <= needed
        return
    assert made.workspace <= limit
    (cut,) = made.config["launches"]
    allocated = cut.weights_size + cut.image_size + cut.parts * cut.part_size
    assert 4 * allocated <= made.workspace
    assert cut.chunk % 4 == 0 and 4 <= cut.chunk < cut.tiles + 4
    assert cut.pitch % 4 == 0 and 0 <= cut.pitch - cut.outputs < 4
    # Every output channel once.
    outputs = cut.problem.O // groups
    made = [
        (group + g) * outputs + output + o
        for block, group, output in cut.blocks()
        for g in range(block.groups)
        for o in range(block.outputs)
    ]
    assert made == list(range(cut.problem.O))
    assert all(block.groups == 1 or block.outputs == outputs for block, _, _ in cut.blocks())
    # Parts of whole slices, none of them empty, none longer than 256 channels.
    assert cut.slices * 8 >= cut.inputs
    assert (cut.parts - 1) * cut.part_slices < max(cut.slices, 1) <= max(cut.parts * cut.part_slices, 1)
    assert cut.part_slices * 8 <= 256
    # What the kernels count in 32 bits.
    assert 8 * max(cut.pitch, cut.chunk) < 2**31 and cut.tiles + cut.chunk < 2**31


@pytest.mark.parametrize(
    ("line", "most", "parts"),
    [
        ("n1c2048h7w7_o2048kh3kw3_p1_high_f32", 512, "512 of 2048 output channels at a time"),
        ("n8c2048h64w64_o4096kh3kw3_p1_high_f32", 512, "512 of 4096 output channels at a time"),
        ("n1c4096h7w7_o4096kh3kw3_p1_g2_high_f32", 512, "512 of 4096 output channels at a time"),
        ("n1c8192h7w7_o8192kh3kw3_p1_g32_high_f32", 4096, "4096 of 8192 output channels at a time"),
    ],
)
def test_weights_too_large_for_the_workspace_are_transformed_in_turn(line, most, parts):
    """Those of all channels, 36 floats for each weight of nine, are more than the 256 MiB of the default."""
    problem = Conv2dProblem.parse(line)
    made = winograd.plan(problem, GPU, LIMIT)
    (cut,) = made.config["launches"]
    assert 4 * 36 * problem.C // problem.groups * problem.O > LIMIT
    assert cut.groups * cut.outputs == most and parts in made.detail
    assert 4 * (cut.weights_size + cut.image_size + cut.parts * cut.part_size) <= made.workspace <= LIMIT
    assert cut.chunk >= min(128, cut.tiles)
    assert winograd.pack_key(made) is None, "a Conv2d keeps the weights themselves"
    assert winograd.pack_key(winograd.plan(problem, GPU, 2**33)) == "transformed"


@pytest.mark.parametrize("channels", [1, 64, 256, 257, 1000])
def test_how_a_sum_is_cut_depends_on_its_length_alone(channels):
    found = set()
    for N, H, limit in ((1, 7, LIMIT), (3, 56, LIMIT), (256, 56, LIMIT), (256, 56, 2**25)):
        problem = Conv2dProblem(N, channels, H, H, 64, 3, 3, padding=((1, 1), (1, 1)), precision="high")
        (cut,) = winograd.plan(problem, GPU, limit).config["launches"]
        found.add((cut.parts, cut.part_slices))
    assert len(found) == 1
    assert found.pop()[0] == -(-channels // 256)


def test_chunks_are_small_and_the_tile_suits_them():
    """Transforms and sums stay near the size of a large GPU's second-level cache, and fill the GPU."""
    for gpu in gpus.KNOWN.values():
        for line, wanted in ((LINE, tiles.FEW_OUTPUTS), ("n{}c256h56w56_o256kh3kw3_p1_high_f32", tiles.WIDE)):
            (cut,) = winograd.plan(Conv2dProblem.parse(line.format(32)), Target("cuda", gpu=gpu), LIMIT).config[
                "launches"
            ]
            assert cut.chunk % 128 == 0
            assert 2**24 <= 4 * (cut.image_size + cut.part_size) <= 2**25
            assert cut.tile.outputs == wanted.outputs or cut.tile.outputs < cut.outputs


def test_the_plan_tells_how():
    told = winograd.plan(Conv2dProblem.parse("n8c512h14w14_o512kh3kw3_p1_high_f32"), GPU, LIMIT).detail
    assert told.startswith("F(4×4, 3×3), 128 of 128 tiles at a time, then 36 matrix products in tiles of ")
    assert told.endswith(", sums in 2 parts; not measured")


# ---- the transforms


def along_both(name: str, values: np.ndarray) -> np.ndarray:
    """The transform of the last two axes."""
    transform = getattr(winograd_transforms, name).py_func
    columns = np.stack(transform(*np.moveaxis(values, -2, 0)), -2)
    return np.stack(transform(*np.moveaxis(columns, -1, 0)), -1)


def test_the_transforms_make_a_correlation():
    """Of every pixel with every weight, which is enough: all three are linear."""
    x, k = np.eye(36, dtype=np.float32).reshape(36, 6, 6), np.eye(9, dtype=np.float32).reshape(9, 3, 3)
    products = along_both("image", x)[:, None] * along_both("kernel", k)
    y = along_both("result", products)
    assert y.dtype == np.float32 and y.shape == (36, 9, 4, 4)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    wanted = np.einsum("xijpq,kpq->xkij", windows, k)
    assert np.abs(y - wanted).max() < 1e-5
    assert np.count_nonzero(wanted) == 16 * 9


def test_every_factor_but_those_of_weights_is_exact():
    """Of integers nothing is rounded, and whether a compiler fuses a product with an addition changes no bit."""
    rng = np.random.default_rng(0)
    for name, count in (("image", 6), ("result", 6)):
        values = rng.integers(-100, 100, (50, count, 6))
        found = along_both(name, values.astype(np.float32))
        assert np.array_equal(found, along_both(name, values.astype(np.float64)))
        assert np.array_equal(found, np.round(found))


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive"])
@pytest.mark.parametrize("channels", [16, 256, 2048])
def test_a_tenth_of_the_promised_error(channels, positive):
    """Summed as the kernels do, in parts; without them 2048 positive channels have four times the error."""
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((channels, 4, 6, 6)).astype(np.float32)
    k = rng.standard_normal((channels, 3, 3, 3)).astype(np.float32)
    if positive:
        x, k = abs(x), abs(k)
    U, V = along_both("kernel", k), along_both("image", x)

    def error(longest: int) -> float:
        total: Any = 0
        for first in range(0, channels, longest):
            part = np.zeros((3, 4, 6, 6), np.float32)
            for c in range(first, min(first + longest, channels)):
                part += U[c, :, None] * V[c]
            total = total + part
        windows = np.lib.stride_tricks.sliding_window_view(x.astype(float), (3, 3), (2, 3))
        wanted, most = (np.einsum("ctijpq,copq->otij", a, b) for a, b in ((windows, k), (abs(windows), abs(k))))
        return float(np.linalg.norm(along_both("result", total) - wanted) / np.linalg.norm(most))

    assert error(winograd._SUM) <= 2e-5 / 10
    if positive and channels == 2048:
        assert error(channels) > 4 * error(winograd._SUM)


# ---- the simulator

QUICK = (
    "planes or any_sizes or four_kernels and NCHW or matrix_products and 16 or sums_in_parts or limit "
    "or gradients or prepared or nan or wrong_transform"
)


@pytest.mark.parametrize(
    ("part", "at_least"), [(QUICK, 40), pytest.param(f"not ({QUICK})", 30, marks=pytest.mark.full)], ids=["some", "all"]
)
def test_in_the_simulator(part, at_least):
    file = str(Path(__file__).with_name("test_cuda_winograd_simulated.py"))
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
TRANSFORMS = [*kernels.TRANSFORMS, ("image", "tabled", False), ("image", "tabled", True)]


@needs_ptxas
@pytest.mark.parametrize(
    "tile",
    [pytest.param(tile, marks=() if tile is tiles.WIDE else pytest.mark.full) for tile in tiles.TILES["float32"]],
    ids=str,
)
def test_machine_code_of_the_matrix_products(tile):
    configuration = kernels.winograd("multiply", tile)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ARCHITECTURES:
        figures = machine_code.assembled(library, cc, configuration.registers)
        assert figures.clean, (cc, figures)
        assert figures.registers <= tile.registers
        assert figures.shared == 2 * tile.depth * (tile.outputs + tile.pixels + 4) * 4
        found = figures.instructions
        # One multiply-add per product and sum of a thread; everything moves 16 bytes at a time.
        assert found["FFMA"] == tile.rows * tile.columns * tile.depth
        assert found["LDS.128"] == (tile.rows + tile.columns) // 4 * tile.depth
        assert found["LDG.128"] == found["STS.128"] == (tile.outputs + tile.pixels) * tile.depth // 4 // tile.threads
        assert found["STG.128"] == tile.rows * tile.columns // 4
        assert sum(found[name] for name in ("LDG", "STG", "LDS", "STS", "LDL", "STL")) == 0


@needs_ptxas
@pytest.mark.parametrize(
    "facts",
    [
        pytest.param(
            facts, id="-".join(map(str, facts)),
            marks=() if facts in (("image", "inside", False), ("result", False, True)) else pytest.mark.full,
        )
        for facts in TRANSFORMS
    ],
)  # fmt: skip
def test_machine_code_of_the_transforms(facts):
    configuration = kernels.winograd(*facts)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    for cc in ARCHITECTURES:
        figures = machine_code.assembled(library, cc)
        assert figures.clean, (cc, figures)
        assert figures.registers <= 96
        warps = kernels.MULTIPROCESSORS[cc].warps(winograd_kernels.threads(), figures.registers, 0)
        assert warps >= 16, "of which each thread has six to 36 loads under way"
        found = figures.instructions
        if facts[0] == "result":
            assert (found["STG.128"], found["STG"]) == ((4, 0) if facts[2] else (0, 16)), "each output once"
        else:
            assert found["STG"] == 36, "each point once"
            assert found["LDG"] == (9 if facts[0] == "weights" else 36), "each number once"


@needs_ptxas
def test_a_spill_is_seen():
    """The tests above can fail: with half of the registers."""
    configuration = kernels.winograd("multiply", tiles.WIDE)
    library = machine_code.lowered(configuration.body, configuration.arguments)
    assert not machine_code.assembled(library, (8, 0), 64).clean


# Where elements are in x, U, V, M and y; what is inside a product is bounded by the plan.
COUNTERS = {
    ("multiply", tiles.SMALL): {"z", "at_k", "at_x", "to"},
    ("image", "inside", False): {"at", "to", "step"},
    ("result", False, True): {"at", "to", "step", "channel"},
    ("weights",): {"at", "to", "step", "o", "c", "group"},
}


@pytest.mark.parametrize("facts", COUNTERS, ids=lambda facts: facts[0])
def test_offsets_are_counted_in_64_bits(facts):
    from numba.cuda import compiler, types

    configuration = kernels.winograd(*facts)
    made = compiler.compile_cuda(configuration.body, types.void, configuration.arguments, cc=(8, 0))
    integers = {
        name.partition(".")[0]: str(kind)
        for name, kind in made.type_annotation.typemap.items()
        if isinstance(kind, types.Integer) and name[0] != "$"
    }
    assert integers.keys() >= COUNTERS[facts]
    assert {integers[name] for name in COUNTERS[facts]} <= {"int64", "uint64"}
