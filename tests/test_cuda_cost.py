"""The cost model of the matrix products on a GPU: no GPU has confirmed its figures, but what must hold, holds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuconv.backends.numba_cuda import (
    convert,
    cost,
    gpus,
    implicit_gemm,
    implicit_gemm_mma,
    launch,
    tensor_shape,
    tiles,
)
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

GPUS = list(gpus.KNOWN.values())
of_every_gpu = pytest.mark.parametrize("gpu", GPUS, ids=list(gpus.KNOWN))
MODULES = {"f32": implicit_gemm, "f16": implicit_gemm_mma}


def chosen(line: str, gpu: gpus.Gpu, most: int = 1) -> list[cost.Candidate]:
    module = MODULES[line.rpartition("_")[2]]
    return [ways[0] for ways in module.configurations(Conv2dProblem.parse(line), Target("cuda", gpu=gpu), most)]


def work(**facts: int) -> cost.Work:
    given_facts = {"outputs": 256, "pixels": 196, "images": 8, "groups": 1, "slices": 72, "depth": 32, "itemsize": 2}
    return cost.Work("float16", **given_facts | facts, image_bytes=200_000, weight_bytes=1_000_000)


@of_every_gpu
@pytest.mark.parametrize("dtype", MODULES)
def test_small_late_layers_are_split_and_large_early_ones_are_not(gpu, dtype):
    (late,) = chosen(f"n1c512h7w7_o512kh3kw3_p1_{dtype}", gpu)
    (early,) = chosen(f"n32c64h224w224_o128kh3kw3_p1_{dtype}", gpu)
    assert late.parts >= 4
    assert early.parts == 1
    assert early.tile.outputs * early.tile.pixels >= max(128 * 64, late.tile.outputs * late.tile.pixels)


@of_every_gpu
@pytest.mark.parametrize("dtype", MODULES)
def test_the_parts_are_those_of_any_batch(gpu, dtype):
    found = {chosen(f"n{N}c256h14w14_o256kh3kw3_p1_{dtype}", gpu)[0].parts for N in (1, 2, 7, 32, 256)}
    assert len(found) == 1


@of_every_gpu
@given(
    outputs=st.integers(1, 2048), pixels=st.integers(1, 50_000), images=st.integers(1, 64), groups=st.integers(1, 32),
    slices=st.integers(1, 2000), tile=st.sampled_from(tensor_shape.TILES), parts=st.integers(1, 64),
)  # fmt: skip
def test_what_must_hold_of_every_prediction(gpu, outputs, pixels, images, groups, slices, tile, parts):
    of = work(outputs=outputs, pixels=pixels, images=images, groups=groups, slices=slices)
    parts = cost.whole(slices, parts)
    seconds = cost.seconds(of, tile, parts, gpu)
    assert seconds >= cost.floor(of, gpu), "nothing is faster than the data sheet"
    assert seconds >= cost.LAUNCH + cost.BLOCK
    # More of anything takes no less time.
    more = replace(of, images=images + 1), replace(of, outputs=outputs + 1), replace(of, groups=groups + 1)
    assert all(cost.seconds(other, tile, parts, gpu) >= seconds for other in more)
    assert cost.seconds(replace(of, launches=2), tile, parts, gpu) > seconds
    faster = replace(gpu, clock=2 * gpu.clock, bandwidth=2 * gpu.bandwidth)
    assert cost.seconds(of, tile, parts, faster) <= seconds


def test_waves_are_whole():
    """One block more than the multiprocessors hold costs another wave; up to there blocks cost little."""
    gpu, tile = gpus.KNOWN["a100"], tensor_shape.LARGE
    full = gpu.multiprocessors * gpu.resident(tile.threads, tile.registers, tile.shared_bytes)
    times = [cost.seconds(work(outputs=128, pixels=128 * count, images=1), tile, 1, gpu) for count in (full, full + 1)]
    assert times[1] > times[0] + 0.5 * (times[0] - cost.LAUNCH) / 2


def test_equal_times_go_to_the_smallest_tile():
    tied = cost.ranked(work(outputs=1, pixels=1, images=1), tiles.TILES["float32"], [1], gpus.KNOWN["h200"])
    same = [found.tile for found in tied if found.seconds == tied[0].seconds]
    assert same == sorted(same, key=lambda tile: tile.outputs * tile.pixels)


@given(st.integers(0, 5000), st.integers(1, 200), st.integers(1, 64))
def test_divisions_leave_no_part_empty(slices, least, shortest):
    least = max(1, min(least, slices))
    counts = cost.divisions(slices, least, shortest)
    assert counts == sorted(set(counts))
    for count in counts:
        part_slices = -(-slices // count)
        assert (count - 1) * part_slices < max(slices, 1)
        assert count >= least or -(-slices // count) == -(-slices // least), "as many as are needed, or as good as that"
        assert count <= max(least, cost.MOST_PARTS)


def test_configurations_begin_with_the_choice_and_differ():
    problem = Conv2dProblem.parse("n8c256h14w14_o256kh3kw3_p1_f16")
    target = Target("cuda", gpu=gpus.KNOWN["h100"])
    found = implicit_gemm_mma.configurations(problem, target, 3)
    assert len(found) == 3
    assert found[0] == implicit_gemm_mma.configurations(problem, target, 1)[0]
    assert len({(ways[0].tile, ways[0].parts) for ways in found}) == 3
    assert found[1][0].seconds <= found[2][0].seconds
    plans = [implicit_gemm_mma.plan(problem, target, 2**28, ways) for ways in found]
    assert [(plan.config["launches"][0].tile, plan.config["launches"][0].parts) for plan in plans] == [
        (ways[0].tile, ways[0].parts) for ways in found
    ]


def test_a_strided_input_gradient_has_a_configuration_for_every_phase():
    problem = Conv2dProblem.parse("n8c64h28w28_o64kh3kw3_s2p1_dgrad_f16")
    found = implicit_gemm_mma.configurations(problem, Target("cuda", gpu=gpus.KNOWN["h100"]), 3)
    assert [len(ways) for ways in found] == [4, 4, 4]


@of_every_gpu
def test_explain_tells_the_prediction_and_the_floor(gpu):
    plan = implicit_gemm_mma.plan(Conv2dProblem.parse("n8c64h56w56_o64kh3kw3_p1_f16"), Target("cuda", gpu=gpu), 2**28)
    assert f"µs predicted on {gpu.name}, where the floor is" in plan.detail
    assert plan.detail.endswith("not measured")


def test_unknown_capabilities_are_those_of_the_last_one_known():
    newer, older = (replace(gpus.KNOWN["h200"], capability=cc) for cc in ((12, 0), (7, 5)))
    assert newer.rate("float16") == gpus.KNOWN["h200"].rate("float16")
    assert older.rate("float32") == 2 * 64 * older.clock
    assert newer.rate("3xtf32") == newer.rate("tf32") / 3
    assert newer.resident(1024, 255, 10_000) == 1, "a block runs, however much it takes"


def test_what_a_driver_does_not_tell_is_taken_from_the_usual_gpu(monkeypatch):
    """Newer drivers may say that a clock is 0; times are divided by it."""
    from numba import cuda

    device = SimpleNamespace(
        name="GPU", compute_capability=(9, 0), MULTIPROCESSOR_COUNT=100, CLOCK_RATE=0, MEMORY_CLOCK_RATE=0,
        GLOBAL_MEMORY_BUS_WIDTH=0,
    )  # fmt: skip
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    monkeypatch.setattr(convert, "simulated", lambda: False)
    monkeypatch.setattr(cuda, "list_devices", lambda: [device], raising=False)
    found = gpus.gpu.__wrapped__(0)
    assert found == gpus.Gpu("GPU", (9, 0), 100, gpus.USUAL.clock, gpus.USUAL.bandwidth)
    assert chosen("n1c64h8w8_o64kh3kw3_p1_f32", found)
