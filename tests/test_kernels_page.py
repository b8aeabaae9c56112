"""The figures of docs/kernels.md are those of bench/results, and the constants it names those of the code."""

import json
import re
from pathlib import Path

import pytest

from gpuconv import Conv2dProblem, dispatch
from gpuconv.backends.numba_cpu import microkernel, pixels_kernel
from gpuconv.backends.numba_cuda import tensor_shape, tiles, winograd

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "kernels.md"
if not PAGE.exists() or not (ROOT / "bench" / "results").exists():
    pytest.skip("docs/kernels.md or bench/results is not beside the tests", allow_module_level=True)
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_figure_was_measured():
    rows = {}
    for name in ("n1", "high", "nhwc"):
        for file in sorted((ROOT / "bench" / "results").glob(f"cpu-*-{name}.json")):
            rows |= {row["problem"]: row for row in json.loads(file.read_text())["rows"]}
    pattern = r"^\| `(\w+)` \| [^|]* \| `([\w.]+)` \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$"
    shown = re.findall(pattern, TEXT, re.MULTILINE)
    assert len(shown) == 7
    for line, ran, intensity, speed, traffic in shown:
        problem, call = Conv2dProblem.parse(line), rows[line]["gpuconv"]["plain call"]
        assert ran == call["implementation"]
        assert float(intensity) == round(problem.flops / problem.bytes, 1)
        assert int(speed) == round(problem.flops / call["median_s"] / 1e9)
        assert float(traffic) == round(problem.bytes / call["median_s"] / 1e9, 1)


def test_every_constant_is_that_of_the_code():
    rows, vectors = microkernel.TILES[512]
    assert f"{rows} output channels × {vectors} vectors of 16" in TEXT and rows * vectors == 24
    assert f"at most {microkernel.BLOCK} products" in TEXT
    assert f"each of {pixels_kernel.PIXELS[512][4]} pixels of a tile (with 4 vectors)" in TEXT
    assert f"{tiles.WIDE.outputs} output channels × {tiles.WIDE.pixels} pixels, {tiles.WIDE.rows} × 8 sums" in TEXT
    words = " ".join(TEXT.split())
    assert f"in chunks of {winograd._CHUNK >> 20} MiB" in words
    assert f"Sums of more than {winograd._SUM} channels" in words
    found = tensor_shape.TILES
    stages = f"{min(tile.stages for tile in found)} to {max(tile.stages for tile in found)}"
    largest = max(found, key=lambda tile: tile.outputs * tile.pixels)
    assert len(found) == 10 and "one of ten tiles" in words
    assert f"up to {largest.outputs} output channels × {largest.pixels} pixels with {stages} slices" in words


def test_every_convolution_of_the_table_is_explained():
    for name in dispatch.serving("forward"):
        assert name in TEXT or f"`{name.partition('.')[2]}`" in TEXT, name
