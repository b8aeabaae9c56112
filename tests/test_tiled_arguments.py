"""What ``conv2d_tiled`` refuses, before it reads anything, and which implementation it runs."""

from __future__ import annotations

import calls
import fake_cupy
import numpy as np
import pytest
from test_tiled import noise, storage

import gpuconv
from gpuconv import conv2d_tiled, dispatch

# ---- arguments

X, K, Y = np.zeros((9, 9), np.float32), np.ones((3, 3), np.float32), np.zeros((7, 7), np.float32)
READ_ONLY = Y.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (X, K, np.zeros((7, 8), np.float32)),
            {},
            ValueError,
            r"out has shape \(7, 8\); the result has shape \(7, 7\)",
        ),
        ((X, K, Y.astype(np.float64)), {}, TypeError, "out has dtype float64; the result has dtype float32"),
        ((X, K, Y.tolist()), {}, TypeError, "out must be an array that is read by slices .*got list"),
        ((X.tolist(), K, Y), {}, TypeError, "source must be an array that is read by slices .*got list"),
        ((X, K, None), {}, TypeError, "out must be an array"),
        ((X, K, READ_ONLY), {}, ValueError, "out is read-only"),
        ((X, K, X[:7, :7]), {}, ValueError, "out and source are the same data"),
        ((X.astype("U1"), K, Y), {}, TypeError, "source has dtype"),
        ((np.ma.masked_array(X), K, Y), {}, TypeError, "source is a masked array"),
        ((X, np.ones((10, 10), np.float32), Y), {}, ValueError, "dilated kernel"),
        ((X[None, None, None], K, Y), {}, ValueError, "source of shape"),
        ((X, K, Y, 2), {}, TypeError, "did you mean stride"),
        ((X, K, Y), {"progress": "yes"}, TypeError, "progress must be True or False"),
        ((X, K, Y), {"resume": True}, ValueError, "out in memory"),
        ((X, K, Y), {"resume": 1}, TypeError, "resume must be True, False or the path"),
        ((X, K, Y), {"workspace_limit": 1.0}, TypeError, "workspace_limit must be an integer"),
        ((X, K, Y), {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of"),
        ((X, K, Y), {"backend": "numba_cpu.rows", "layout": "NHWC"}, gpuconv.NoBackendError, "numba_cpu.rows"),
    ],
)
def test_arguments_are_refused(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        conv2d_tiled(*arguments, **options)
    assert str(caught.value).startswith("conv2d_tiled: ")
    assert not Y.any()


def test_outputs_that_cannot_be_written(tmp_path):
    storage("memmap", tmp_path, "y", (7, 7)).flush()
    for mode, message in (("c", "never reach its file"), ("r", "read-only memory map")):
        with pytest.raises(ValueError, match=message):
            conv2d_tiled(X, K, np.load(tmp_path / "y.npy", mmap_mode=mode))
    zarr = pytest.importorskip("zarr", reason="Zarr arrays need the extra `zarr`")
    storage("zarr", tmp_path, "y", (7, 7))
    with pytest.raises(ValueError, match="opened for reading"):
        conv2d_tiled(X, K, zarr.open_array(tmp_path / "y.zarr", mode="r"))
    h5py = pytest.importorskip("h5py", reason="HDF5 datasets need h5py")
    storage("hdf5", tmp_path, "y", (7, 7)).file.close()
    with h5py.File(tmp_path / "y.h5") as file, pytest.raises(ValueError, match="opened for reading"):
        conv2d_tiled(X, K, file["image"])


@pytest.mark.parametrize("kind", ["memmap", "zarr", "hdf5"])
def test_one_file_opened_twice_is_one_array(kind, tmp_path):
    """In place every tile would read what the one before has written."""
    source = storage(kind, tmp_path, "x", (64, 64), noise(64, 64))
    if kind == "memmap":
        again = np.load(tmp_path / "x.npy", mmap_mode="r+")
    elif kind == "zarr":
        again = __import__("zarr").open_array(tmp_path / "x.zarr", mode="r+")
    else:
        again = source.file["image"]
    with pytest.raises(ValueError, match="out and source are the same data"):
        conv2d_tiled(source, K, again, padding=1)


def test_a_gpu_that_is_not_there_is_said_once(monkeypatch):
    if not dispatch.gpu_missing():
        pytest.skip("this machine has a GPU")
    monkeypatch.delenv("GPUCONV_FALLBACK", raising=False)
    with pytest.warns(gpuconv.DeviceFallbackWarning) as caught:
        conv2d_tiled(noise(99, 99), noise(3, 3), np.zeros((97, 97), np.float32), device="cuda", workspace_limit=50_000)
    assert len(caught) == 1
    assert caught[0].filename == __file__


ON_A_GPU = """
import fake_cupy, numpy as np
from gpuconv import conv2d, conv2d_tiled, explain
rng = np.random.default_rng(0)
x, k = (rng.integers(-3, 4, shape).astype("f") for shape in ((3, 90, 101), (16, 3, 3, 3)))
options = {"padding": "same", "padding_mode": "reflect", "device": "cuda"}
out = np.full((16, 90, 101), np.nan, "f")
conv2d_tiled(x, k, out, workspace_limit=400_000, **options)
assert np.array_equal(out, conv2d(x, k, **options))
print(explain(x, k, **options).implementation)
"""


@pytest.mark.full
@pytest.mark.skipif(fake_cupy.compiler() is None, reason="no C++ compiler to run the CUDA C++ with")
def test_tiles_on_a_stand_in_for_a_gpu():
    """Every tile goes up and comes down by itself."""
    assert calls.child(ON_A_GPU, GPUCONV_TEST_FAKE_CUPY="1", NUMBA_ENABLE_CUDASIM="1").strip() == "cupy.gemm"
