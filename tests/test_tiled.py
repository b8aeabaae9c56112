"""Images larger than memory: the answer is that of ``conv2d``, whatever the tiles, the kinds of arrays and the limit.

What happens when a run is killed or fails is in test_tiled_resume.py.
"""

from __future__ import annotations

import gc
import itertools
import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import strategies
from calls import affordable
from hypothesis import given
from hypothesis import strategies as st

import gpuconv
from gpuconv import conv2d, conv2d_tiled
from gpuconv.tiling import windows

MODES = ("constant", "reflect", "symmetric", "edge", "wrap")


def tiled(x: Any, k: Any, bias: Any = None, limit: int = 150_000, out: Any = None, **options: Any) -> np.ndarray:
    """What conv2d_tiled writes into an array of NaN, or of a number that no result has."""
    if out is None:
        y = conv2d(np.asarray(x), k, bias, **options)
        out = np.full_like(y, np.nan if y.dtype.kind in "fcV" else 77)
    assert conv2d_tiled(x, k, out, bias, workspace_limit=limit, **options) is out
    return out


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def noise(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """(implementation, shape of the window) of every tile that is computed."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    call = gpuconv.Conv2d.__call__

    def spy(self: Any, x: Any, **arguments: Any) -> Any:
        seen.append((self._where["backend"], x.shape))
        return call(self, x, **arguments)

    monkeypatch.setattr(gpuconv.Conv2d, "__call__", spy)
    return seen


class Sliced:
    """An array with nothing but what is asked of one, that notes what is read and written."""

    def __init__(self, array: np.ndarray, chunks: tuple[int, ...] | None = None) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        if chunks is not None:
            self.chunks = chunks
        self.read: list[tuple[slice, ...]] = []
        self.written: list[tuple[slice, ...]] = []

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        assert all(part.step is None and 0 <= part.start < part.stop for part in at)
        self.read.append(at)
        return self.array[at].copy()

    def __setitem__(self, at: tuple[slice, ...], values: np.ndarray) -> None:
        self.written.append(at)
        self.array[at] = values


def pixels(regions: list[tuple[slice, ...]]) -> int:
    return sum(int(np.prod([part.stop - part.start for part in at])) for at in regions)


# ---- the answer


@given(strategies.calls(), st.sampled_from((600, 2000, 10_000, 50_000, 2**28)))
def test_any_call_gives_what_conv2d_gives(call, limit):
    call = replace(call, fill="integers", special=False)
    options = {name: value for name, value in call.kwargs.items() if "zero_point" not in name}
    fill = options.get("padding_value", 0)
    exact = fill != fill or np.isinf(fill) or fill == int(np.real(fill))
    x, k, bias = call.operands()
    laid = call.x_form.lay(x)[0]
    options |= affordable(call.x_dtype, options.get("dtype", call.k_dtype))
    y = conv2d(x, k, bias, **options)
    out = np.full_like(y, 77)
    while True:
        try:
            conv2d_tiled(x if isinstance(laid, list) else laid, k, out, bias, workspace_limit=limit, **options)
            break
        except MemoryError as error:
            assert "workspace_limit" in str(error) or "scratch" in str(error)
            limit *= 4
    if exact:
        assert np.array_equal(out, y, equal_nan=y.dtype.kind in "fcV")
    else:
        wide = np.complex128
        np.testing.assert_allclose(out.astype(wide), y.astype(wide), rtol=2e-2, atol=1e-5 * np.abs(y).max(initial=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("stride", "dilation", "padding"),
    [
        (1, 1, "same"),
        (2, 1, ((7, 3), (0, 12))),
        ((3, 1), (1, 2), "same_lower"),
        (1, (2, 3), "full"),
        (50, 1, 300),  # steps over most of the image, padding as large as it is
    ],
)
def test_borders_and_steps_are_those_of_the_whole_image(mode, stride, dilation, padding, counted):
    x, k = noise(261, 303), noise(5, 4)
    options = {"stride": stride, "dilation": dilation, "padding": padding, "padding_mode": mode}
    y = conv2d(x, k, **options)
    counted.clear()
    out = np.full_like(y, np.nan)
    conv2d_tiled(x, k, out, workspace_limit=280_000, **options)
    assert len(counted) > 2 or stride == 50
    assert np.array_equal(bits(out), bits(y))  # the same bits


FORMS = {
    "one plane": ((240, 281), (3, 4), {}),
    "several filters": ((120, 141), (4, 3, 3), {}),
    "several filters, NHWC": ((120, 141), (3, 3, 4), {"layout": "NHWC", "kernel_layout": "HWIO"}),
    "colour": ((3, 120, 141), (4, 3, 3, 3), {}),
    "colour, NHWC": ((120, 141, 3), (4, 3, 3, 3), {"layout": "NHWC"}),
    "depthwise, NHWC": ((120, 141, 3), (3, 3, 1, 3), {"layout": "NHWC", "kernel_layout": "HWIO", "groups": 3}),
    "a stack": ((40, 60, 64), (40, 1, 3, 3), {"groups": 40}),
    "groups": ((2, 6, 60, 64), (4, 3, 3, 3), {"groups": 2}),
    "images": ((5, 3, 40, 41), (8, 3, 3, 3), {}),
    "images, NHWC": ((5, 40, 41, 3), (8, 3, 3, 3), {"layout": "NHWC", "kernel_layout": "OHWI"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_shape_and_layout(form, counted):
    x_shape, k_shape, options = FORMS[form]
    if options.get("kernel_layout") == "OHWI":
        k_shape = (k_shape[0], *k_shape[2:], k_shape[1])
    x, k = noise(*x_shape), noise(*k_shape)
    outputs = k_shape[-1] if options.get("kernel_layout") == "HWIO" else k_shape[0]
    bias = noise(outputs) if len(k_shape) > 2 else None
    options |= {"padding": "same", "padding_mode": "reflect", "activation": "relu", "backend": "numba_cpu"}
    y = conv2d(x, k, bias, **options)
    counted.clear()
    out = np.full_like(y, np.nan)
    conv2d_tiled(x, k, out, bias, workspace_limit=300_000, **options)
    assert len(counted) > 2
    assert len({name for name, _ in counted}) == 1  # one implementation, borders or not
    assert np.array_equal(bits(out), bits(y))


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "int64", "float16", "float64", "complex64"])
def test_every_kind_of_number(dtype):
    rng = np.random.default_rng(0)
    x, k = (rng.integers(0, 2 if dtype == "bool" else 7, shape).astype(dtype) for shape in ((70, 80), (3, 3)))
    options = {"padding": 2, "padding_mode": "edge", "backend": "numpy"}
    assert np.array_equal(tiled(x, k, limit=30_000, **options), conv2d(x, k, **options))


def test_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    x, k = (noise(*shape).astype(ml_dtypes.bfloat16) for shape in ((70, 80), (3, 3)))
    options = {"padding": 1, "padding_value": 0.3, "backend": "numpy.reference"}
    assert np.array_equal(bits(tiled(x, k, limit=40_000, **options)), bits(conv2d(x, k, **options)))


@pytest.mark.full
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("size", [3, 9, 31, 61])
def test_every_precision_keeps_its_promise(precision, size):
    x, k = noise(700, 900), np.outer(np.hanning(size + 2)[1:-1], np.hanning(size + 2)[1:-1]).astype(np.float32)
    options = {"padding": "same", "padding_mode": "symmetric"}
    exact = conv2d(x.astype(np.float64), k.astype(np.float64), **options)
    scale = np.linalg.norm(conv2d(np.abs(x).astype(np.float64), k.astype(np.float64), **options))
    y = tiled(x, k, limit=8_000_000, precision=precision, **options)
    promise = {"highest": 2e-6, "high": 2e-5, "medium": 1e-3}
    assert np.linalg.norm(y - exact) <= promise[precision] * scale


def test_nothing_to_compute():
    for shape, wanted in (((0, 3, 8, 8), (0, 2, 6, 6)), ((1, 0, 8, 8), (1, 2, 6, 6))):
        out = np.full(wanted, np.nan, np.float32)
        conv2d_tiled(np.zeros(shape, np.float32), np.ones((2, shape[1], 3, 3), np.float32), out, np.float32([1, 2]))
        assert (out == np.float32([1, 2])[:, None, None]).all()


def test_weights_and_images_of_the_other_byte_order(tmp_path):
    x, k = noise(60, 70), noise(3, 3)
    swapped = np.memmap(tmp_path / "x", dtype=">f4", mode="w+", shape=x.shape)
    swapped[...] = x
    out = np.memmap(tmp_path / "y", dtype=">f4", mode="w+", shape=(58, 68))
    conv2d_tiled(swapped, k.astype(">f4"), out, workspace_limit=30_000, resume=True, backend="numpy.reference")
    assert np.array_equal(out, conv2d(x, k, backend="numpy.reference"))


# ---- every kind of array


def storage(
    kind: str, folder: Any, name: str, shape: tuple[int, ...], values: np.ndarray | None = None, scale: int = 1
) -> Any:
    """An array of float32 in a file, or in memory."""
    if kind == "array":
        made: Any = np.zeros(shape, np.float32)
    elif kind == "memmap":
        made = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)
    elif kind.startswith("zarr"):
        zarr = pytest.importorskip("zarr", reason="Zarr arrays need the extra `zarr`")
        more = {"shards": (60 * scale, 64 * scale)} if kind == "zarr shards" else {}
        more = {"zarr_format": 2} if kind == "zarr 2" else more
        made = zarr.create_array(
            folder / f"{name}.zarr", shape=shape, chunks=(30 * scale, 32 * scale), dtype="float32", **more
        )
    else:
        h5py = pytest.importorskip("h5py", reason="HDF5 datasets need h5py")
        chunks = (25, 40) if kind == "hdf5 chunks" else None
        made = h5py.File(folder / f"{name}.h5", "w").create_dataset("image", shape, "float32", chunks=chunks)
    if values is not None:
        made[...] = values
    return made


KINDS = ("array", "memmap", "zarr", "zarr 2", "zarr shards", "hdf5", "hdf5 chunks")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_array(kind, tmp_path):
    x, k = noise(150, 170), noise(5, 5)
    y = conv2d(x, k, padding="same", padding_mode="wrap")
    source, out = storage(kind, tmp_path, "x", x.shape, x), storage(kind, tmp_path, "y", y.shape)
    conv2d_tiled(source, k, out, padding="same", padding_mode="wrap", workspace_limit=200_000, resume=kind != "array")
    assert np.array_equal(bits(out[...]), bits(y))
    assert not list(tmp_path.glob("*.tiles.json*"))  # a finished run leaves no record


def test_a_view_of_a_memory_map(tmp_path):
    x, k = storage("memmap", tmp_path, "x", (150, 170), noise(150, 170)), noise(3, 3)
    out = storage("memmap", tmp_path, "y", (150, 170))
    part = np.asarray(x)[10:130:2, ::-1]
    conv2d_tiled(part, k, out[:60, ::-1], padding=1, workspace_limit=60_000)
    assert np.array_equal(out[:60, ::-1], conv2d(part, k, padding=1))
    assert not out[60:].any()


def test_changes_to_a_private_map_are_kept(tmp_path):
    storage("memmap", tmp_path, "x", (150, 170), noise(150, 170)).flush()
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    x[70:90] = 5  # in memory only: releasing these pages would bring the file's back
    out = np.zeros((150, 170), np.float32)
    conv2d_tiled(x, np.float32([[1]]), out, workspace_limit=60_000)
    assert (out[70:90] == 5).all()
    assert (x[70:90] == 5).all()


# ---- what is read and written


def test_only_whole_chunks_are_written_and_each_once():
    x, k = noise(3, 130, 150), noise(4, 3, 3, 3)
    y = conv2d(x, k, padding=1)
    out = Sliced(np.zeros_like(y), chunks=(3, 32, 50))
    conv2d_tiled(x, k, out, padding=1, workspace_limit=400_000)
    assert np.array_equal(out.array, y)
    assert len(out.written) > 4
    assert pixels(out.written) == y.size
    for at in out.written:
        for part, chunk, extent in zip(at, out.chunks, y.shape, strict=True):
            assert part.start % chunk == 0
            assert part.stop % chunk == 0 or part.stop == extent


def test_a_chunk_larger_than_the_limit_is_refused():
    out = Sliced(np.zeros((500, 500), np.float32), chunks=(500, 500))
    with pytest.raises(MemoryError, match=r"whole chunks of out.*workspace_limit is 1000000.*smaller chunks"):
        conv2d_tiled(noise(500, 500), noise(3, 3), out, padding=1, workspace_limit=1_000_000)
    assert not out.written


@pytest.mark.parametrize("mode", MODES)
def test_a_border_reads_no_more_than_it_needs(mode):
    """Under "wrap" a tile at the border reads both ends of the image and nothing between them."""
    source = Sliced(noise(300, 400))
    tiled(source, noise(5, 5), limit=300_000, padding="same", padding_mode=mode, out=np.zeros((300, 400), np.float32))
    assert pixels(source.read) < 1.5 * 300 * 400


def test_a_large_stride_reads_no_more_than_it_needs():
    source = Sliced(noise(1000, 1000))
    y = conv2d(source.array, np.ones((3, 3), np.float32), stride=100)
    out = np.zeros_like(y)
    conv2d_tiled(source, np.ones((3, 3), np.float32), out, stride=100)
    assert np.array_equal(out, y)
    assert pixels(source.read) == 30 * 30


def test_chunks_of_the_source_are_not_decoded_over_and_over():
    source = Sliced(noise(512, 512), chunks=(128, 128))
    tiled(source, noise(3, 3), limit=3_000_000, padding=1, out=np.zeros((512, 512), np.float32))
    chunks = [
        list(itertools.product(*(range(part.start // 128, -(-part.stop // 128)) for part in at))) for at in source.read
    ]
    assert sum(map(len, chunks)) <= 3 * 16


@pytest.mark.parametrize("index", [[2, 1, 0, 1, 2, 3, 2, 1], [0, 0, 0, 1, 2, 3, 3, 3], [-1, -1, 4, 5, -1], [7], []])
def test_runs(index):
    index = np.array(index, dtype=np.int64)
    places, inside = windows._within(index, 0, 8)
    found = np.full(len(index), -1)
    for to, of in windows._runs(places, inside):
        found[to] = np.arange(8)[of]
    assert found.tolist() == index.tolist()


# ---- memory


@pytest.mark.parametrize("kind", ["array", "memmap", "zarr", "zarr shards", "hdf5 chunks"])
def test_memory_stays_within_the_limit(kind, tmp_path):
    x, k, limit = noise(1500, 1600), noise(5, 5), 4_000_000
    source, out = storage(kind, tmp_path, "x", x.shape, x, scale=5), storage(kind, tmp_path, "y", x.shape, scale=5)
    options: dict[str, Any] = {"padding": "same", "padding_mode": "reflect", "workspace_limit": limit}
    conv2d_tiled(x[:300, :300], k, np.zeros((300, 300), np.float32), **options)  # what is compiled and cached
    out[:1, :1] = source[:1, :1]
    gc.collect()
    tracemalloc.start()
    try:
        conv2d_tiled(source, k, out, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= limit + 400_000  # Python's own objects, and Zarr's
    assert np.array_equal(out[...], conv2d(x, k, padding="same", padding_mode="reflect"))


def test_the_smallest_limit_is_told():
    with pytest.raises(MemoryError, match=r"conv2d_tiled: the smallest tile .* needs \d+ bytes in all"):
        conv2d_tiled(noise(50, 50), noise(3, 3), np.zeros((48, 48), np.float32), workspace_limit=0)


# ---- three things at once


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("gpuconv")}


def test_reading_computing_and_writing_overlap():
    """A reader that waits until a tile has been written would wait forever if they took turns."""
    written, array = threading.Event(), noise(300, 300)

    class Slow(Sliced):
        def __setitem__(self, at: Any, values: Any) -> None:
            super().__setitem__(at, values)
            written.set()

    class Waiting(Sliced):
        def __getitem__(self, at: Any) -> Any:
            last = at[0].stop == 300 and at[1].stop == 300
            assert not last or written.wait(60)
            return super().__getitem__(at)

    out = Slow(np.zeros((298, 298), np.float32))
    conv2d_tiled(Waiting(array), noise(3, 3), out, workspace_limit=300_000)
    assert np.array_equal(out.array, conv2d(array, noise(3, 3)))
    assert len(out.written) > 4
    assert not threads()


def test_progress(capsys):
    pytest.importorskip("rich", reason="the bar is rich's")
    conv2d_tiled(noise(100, 100), noise(3, 3), np.zeros((98, 98), np.float32), workspace_limit=50_000, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tiles" in shown.err


def test_progress_without_rich(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    with pytest.raises(ModuleNotFoundError, match=r"progress=True needs rich .*gpuconv\[zarr\]"):
        conv2d_tiled(noise(9, 9), noise(3, 3), np.zeros((7, 7), np.float32), progress=True)


def test_the_implementation_is_the_one_of_the_whole_image(counted):
    """A tile of the border is of another size, for which another implementation might come first."""
    x, k = noise(64, 121, 127), noise(64, 64, 1, 1)
    y = conv2d(x, k)
    counted.clear()
    out = np.zeros_like(y)
    conv2d_tiled(x, k, out, workspace_limit=1_100_000)
    whole = gpuconv.explain(x, k).implementation
    assert {name for name, _ in counted} == {whole}
    assert len({shape for _, shape in counted}) > 1
    assert np.array_equal(bits(out), bits(y))
