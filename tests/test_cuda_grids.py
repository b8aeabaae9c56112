"""Grids of CUDA launches, which have at most 2^31 - 1 blocks: cut, or refused with the reason.

The kernels' own arithmetic at that end is tested in the simulator, beside the rest of each.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv.backends.numba_cuda import gpus, implicit_gemm, implicit_gemm_mma, launch, replay
from gpuconv.backends.protocol import Target
from gpuconv.problem import Conv2dProblem

GPU = Target("cuda", gpu=gpus.KNOWN["h200"])
AMPLE = 2**62  # bytes of workspace
MODULES = (("float32", implicit_gemm), ("float16", implicit_gemm_mma))


def grids(cut: Any) -> list[int]:
    """Of a launch of a plan, the grids whose blocks take no second tile."""
    turning = [cut.turning_blocks(cut.images)] if isinstance(cut, implicit_gemm_mma.Launch) else []
    return [cut.blocks(cut.images, cut.parts_packed), *turning]


sizes = st.tuples(
    st.integers(1, 10**6), st.integers(1, 4), st.integers(1, 700), st.integers(1, 300), st.integers(1, 60)
)


@pytest.mark.parametrize(("dtype", "module"), MODULES)
@given(sizes, st.sampled_from(["forward", "input_grad", "weight_grad"]), st.integers(300, 10**6))
def test_no_plan_has_a_larger_grid(dtype, module, given_sizes, op, most):
    """With an end that is nearer, so that many problems meet it; how sums are cut is the same with and without."""
    N, groups, C, O, H = given_sizes
    problem = Conv2dProblem(
        N, C * groups, H + 2, H + 2, O * groups, 3, 3, groups=groups, op=op, x_dtype=dtype, k_dtype=dtype,
        y_dtype=dtype, precision="high",
    )  # fmt: skip
    far = module.plan(problem, GPU, AMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "MAX_GRID_X", most)
        if any("blocks" in reason for reason in module.unsupported(problem, GPU)):
            return
        near = module.plan(problem, GPU, AMPLE)
        for cut in near.config["launches"]:
            assert max(grids(cut)) <= most
    assert [cut.parts for cut in near.config["launches"]] == [cut.parts for cut in far.config["launches"]]


@pytest.mark.parametrize("module", [implicit_gemm, implicit_gemm_mma])
def test_batches_are_cut_where_the_real_grid_ends(module):
    """One image more than whole tiles of 2^31 - 1 blocks hold; as few times as need be."""
    dtype = "float16" if module is implicit_gemm_mma else "float32"
    problem = Conv2dProblem(1, 8, 1, 1, 8, 1, 1, x_dtype=dtype, k_dtype=dtype, y_dtype=dtype)
    (way,) = module.configurations(problem, GPU, 1)
    ends = launch.MAX_GRID_X * way[0].tile.pixels
    for N in (launch.MAX_GRID_X, launch.MAX_GRID_X + 1, ends, ends + 1):
        (cut,) = module.plan(replace(problem, N=N), GPU, AMPLE, way).config["launches"]
        assert max(grids(cut)) <= launch.MAX_GRID_X
        if cut.images < N:
            assert max(grids(replace(cut, images=2 * cut.images + 1))) > launch.MAX_GRID_X


def test_one_image_with_too_many_tiles_is_refused():
    line = "n1c1h2097152w2097152_o1kh1kw1"
    for name, code in (("implicit_gemm", "f32"), ("implicit_gemm_mma", "f16")):
        told = gpuconv.explain(f"{line}_{code}", backend=f"numba_cuda.{name}")
        assert told.implementation is None
        assert "a grid has up to 2147483647 blocks; one image takes 137438953472" in str(told), told


@pytest.mark.parametrize("blocks", [0, 2**31, 2**32 + 5])
def test_what_is_no_grid_is_never_launched(blocks):
    """CUDA's launch would take 2^32 + 5 as 5."""
    launched: list[Any] = []
    kernel = launch.Kernel(SimpleNamespace(__getitem__=launched.append))
    with pytest.raises(ValueError, match=f"{blocks} blocks"):
        kernel[blocks, 32, 0]
    with pytest.raises(ValueError, match=f"{blocks} blocks"):
        replay.Step(kernel, blocks, 32, ())
    assert launched == []
