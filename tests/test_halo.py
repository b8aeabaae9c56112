"""Which elements of an array in blocks each block of a result reads: those that the whole array's geometry names."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gpuconv import geometry, halo


@st.composite
def chunks_of(draw: st.DrawFn, n: int) -> tuple[int, ...]:
    """A cut of ``n`` elements into blocks, some of nothing."""
    ends = draw(st.lists(st.integers(0, n), max_size=6))
    ends = [0, *sorted(ends), n]
    return tuple(stop - start for start, stop in itertools.pairwise(ends))


@st.composite
def axes(draw: st.DrawFn) -> tuple[Any, ...]:
    mode = draw(st.sampled_from(geometry.PADDING_MODES))
    n = draw(st.integers(0 if mode == "constant" else 1, 30))
    k, dilation = draw(st.integers(1, 5)), draw(st.sampled_from((1, 1, 2, 3, 9, 40)))
    side = st.sampled_from((0, 1, 2, 7, 50))
    padding = draw(side), draw(side)
    stride = draw(st.sampled_from((1, 1, 2, 3, 7, 50, 2**31 - 1)))
    outputs = geometry.output_extent(n, k, padding, stride, dilation)
    if outputs < 1:
        n, outputs = n + geometry.window(k, dilation), outputs + geometry.window(k, dilation)
        outputs = geometry.output_extent(n, k, padding, stride, dilation)
    return draw(chunks_of(n)), k, outputs, padding, stride, dilation, mode


def windows_read(chunks: tuple[int, ...], k: int, reach: halo.Reach) -> np.ndarray:
    """Which element each tap of each output reads, -1 for the constant, when it is found as a task finds it."""
    starts = np.cumsum((0, *chunks))
    window = np.concatenate([np.arange(*(starts[block] + part)) for block, *part in map(np.array, reach.parts)])
    if reach.table is not None:
        index = reach.gathered()
        window = np.where(index < 0, -1, window[index] if window.size else -1)
    outputs = geometry.output_extent(len(window), k, reach.padding, reach.stride, reach.dilation)
    assert outputs == reach.outputs
    first = np.arange(outputs)[:, None] * reach.stride + np.arange(k) * reach.dilation - reach.padding[0]
    inside = (first >= 0) & (first < len(window))
    return np.where(inside, window[np.where(inside, first, 0)] if window.size else -1, -1)


@given(axis=axes())
@example(axis=((2, 1), 1, 2, (50, 50), 60, 1, "constant"))  # far apart, and nothing but padding
@example(axis=((0,), 1, 2, (50, 50), 60, 1, "constant"))
def test_every_output_reads_what_the_whole_says(axis):
    chunks, k, outputs, padding, stride, dilation, mode = axis
    blocks, reaches = halo.forward(*axis)
    assert sum(blocks) == sum(chunks) and sum(reach.outputs for reach in reaches) == outputs
    assert all(reach.outputs for reach in reaches)
    position = np.arange(outputs)[:, None] * stride + np.arange(k) * dilation - padding[0]
    wanted = geometry.source_index(position, sum(chunks), mode)
    assert np.array_equal(np.concatenate([windows_read(blocks, k, reach) for reach in reaches]), wanted)


def test_as_many_outputs_as_elements_lie_in_blocks_like_them():
    for padding in ((1, 1), (2, 0), (0, 2)):
        _, reaches = halo.forward((5, 1, 10), 3, 16, padding, 1, 1, "edge")
        assert [reach.outputs for reach in reaches] == [5, 1, 10]
        assert [block for reach in reaches for block, _, _ in reach.parts if block > 2] == []


def test_a_block_reads_few_blocks_and_only_what_it_needs():
    chunks = (100,) * 50
    for stride, mode in ((1, "constant"), (2, "reflect"), (3, "wrap")):
        blocks, reaches = halo.forward(chunks, 7, geometry.output_extent(5000, 7, (3, 3), stride, 1), (3, 3), stride, 1,
                                       mode)  # fmt: skip
        assert blocks == chunks and max(len(reach.parts) for reach in reaches) == 3
        assert max(stop - start for reach in reaches for _, start, stop in reach.parts) <= 100
        assert max(sum(stop - start for _, start, stop in reach.parts) for reach in reaches) <= 106
    # Blocks of 2 elements and windows of 101: larger blocks are made of them.
    blocks, reaches = halo.forward((2,) * 1000, 101, 2000, (50, 50), 1, 1, "constant")
    assert set(blocks) == {100} and max(len(reach.parts) for reach in reaches) == 3
    # Taps far apart: what is between them is not read.
    blocks, reaches = halo.forward(chunks, 2, 2000, (0, 0), 1, 3000, "constant")
    assert blocks == chunks and max(len(reach.parts) for reach in reaches) <= 4


def test_a_large_border_is_cut_into_blocks_too():
    _, reaches = halo.forward((100,) * 4, 3, 10_398, (10_000, 0), 1, 1, "constant")
    assert max(reach.outputs for reach in reaches) <= 200 and sum(reach.outputs for reach in reaches) == 10_398
    _, reaches = halo.forward((5,), 1, 2**31, (2**30, 2**30 - 5), 1, 1, "constant")
    assert len(reaches) < 2000 and sum(reach.outputs for reach in reaches) == 2**31
