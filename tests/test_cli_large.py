"""`gpuconv filter` on images of numbers: .npy, Zarr and TIFF, from any to any, with the numbers kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")
pytest.importorskip("rich", reason="the command line needs the extra `cli`")
pytest.importorskip("PIL", reason="the command line needs the extra `cli`")

from cli_tools import assert_ran, assert_refused, filtered, pixels, run, save
from PIL import Image

import gpuconv
from gpuconv.cli import large
from gpuconv.filters import KERNELS
from gpuconv.tiling import storage

zarr = pytest.importorskip("zarr", reason="images of numbers need the extra `zarr`")
tifffile = pytest.importorskip("tifffile", reason="images of numbers need the extra `zarr`")

KINDS = ("npy", "zarr", "tif")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, values, **options):
    if name.endswith(".npy"):
        np.save(name, values)
    elif name.endswith(".zarr"):
        options.setdefault("chunks", tuple(min(extent, 16) for extent in values.shape))
        zarr.create_array(name, shape=values.shape, dtype=values.dtype, **options)[...] = values
    else:
        tifffile.imwrite(name, values, **options)
    return name


def read(name):
    if name.endswith(".npy"):
        return np.load(name)
    return zarr.open_array(name, mode="r")[...] if name.endswith(".zarr") else tifffile.imread(name)


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(3).standard_normal(shape).astype(dtype)


def wanted(values, kernel="gaussian-5"):
    """In float64, channels last."""
    return filtered(values, KERNELS[kernel].weights)


def as_integers(y, dtype):
    info = np.iinfo(dtype)
    return np.clip(np.rint(y), info.min, info.max)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_from_any_to_any(source, target):
    x = noise(60, 70)
    write(f"x.{source}", x)
    result = run("filter", f"x.{source}", "--kernel", "gaussian-5", "-o", f"y.{target}", "--workspace-limit", "300k")
    if (source, target) == ("tif", "tif"):
        assert_ran(result)  # a small TIFF is a picture unless an option for numbers is given, as here
    assert_ran(result)
    assert result.stdout == f"60 × 70 float32 with a 5 × 5 kernel in {result.stdout.split()[-4]} s → y.{target}\n"
    y = read(f"y.{target}")
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, wanted(x), atol=1e-5)
    assert sorted(os.listdir()) == sorted({f"x.{source}", f"y.{target}"})


@pytest.mark.parametrize(
    ("shape", "last"),
    [((40, 44, 3), True), ((40, 44, 4), True), ((7, 40, 44), False), ((3, 40, 44), False), ((2, 5, 40, 44), False),
     ((2, 40, 44, 3), True)],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_channels_and_planes_are_filtered_each(kind, shape, last):
    x = noise(*shape)
    write(f"x.{kind}", x)
    assert_ran(run("filter", f"x.{kind}", "--kernel", "gaussian-5", "-o", f"y.{kind}"))
    planes = x if last else np.moveaxis(x, (-2, -1), (0, 1))
    if last and x.ndim == 4:
        y = np.stack([wanted(image) for image in x])
    else:
        y = wanted(planes)
        y = y if last else np.moveaxis(y, (0, 1), (-2, -1))
    np.testing.assert_allclose(read(f"y.{kind}"), y, atol=1e-5)


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_integers_stay_integers(self, kind, dtype):
        info = np.iinfo(dtype)
        x = np.random.default_rng(0).integers(info.min, info.max, (40, 44), dtype, endpoint=True)
        write(f"x.{kind}", x)
        command = "filter", f"x.{kind}", "--kernel", "gaussian-5", "-o", f"y.{kind}", "--backend", "numpy"
        result = run(*command, "--workspace-limit", "1M")
        assert_ran(result)
        assert result.stderr == ""  # a mean clips nothing
        y = read(f"y.{kind}")
        assert y.dtype == dtype
        assert np.abs(y - wanted(x)).max() <= 0.51

    def test_what_is_clipped_is_said(self):
        x = pixels(40, 44)
        write("x.npy", x)
        result = run("filter", "x.npy", "--kernel", "sobel-x", "-o", "y.npy")
        assert_ran(result)
        y = wanted(x, "sobel-x")
        assert np.array_equal(np.load("y.npy"), as_integers(y, np.uint8))
        clipped = int(((y < 0) | (y > 255)).sum())
        assert f"warning: y.npy: {clipped} responses (" in result.stderr
        assert "--dtype float32 keeps them" in result.stderr

    @pytest.mark.parametrize("dtype", ["float32", "float64", "int16"])
    def test_asked_for(self, dtype):
        x = pixels(40, 44)
        write("x.npy", x)
        result = run("filter", "x.npy", "--kernel", "sobel-x", "-o", "y.npy", "--dtype", dtype)
        assert_ran(result)
        assert result.stderr == ""
        assert np.load("y.npy").dtype == dtype
        assert np.array_equal(np.load("y.npy"), wanted(x, "sobel-x"))

    @pytest.mark.parametrize(
        ("given", "stored"),
        [("float16", "float32"), ("float64", "float64"), ("bool", "float32"), ("int64", "float64"),
         ("complex64", "complex64"), (">f4", "float32")],
    )  # fmt: skip
    def test_of_other_images(self, given, stored):
        x = (4 * noise(40, 44)).astype(given)
        write("x.npy", x)
        assert_ran(run("filter", "x.npy", "--kernel", "gaussian-5", "-o", "y.npy", "--backend", "numpy"))
        assert np.load("y.npy").dtype == stored
        part = np.load("y.npy").real
        np.testing.assert_allclose(part, wanted(x.real), atol=1e-5)

    def test_nan_becomes_0_in_integers_and_is_counted(self):
        x = np.full((9, 9), 7.4, np.float32)
        x[4, 4] = np.nan
        write("x.npy", x)
        result = run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy", "--dtype", "uint8")
        assert_ran(result)
        assert "9 responses" in result.stderr
        assert (np.load("y.npy") == 0).sum() == 9

    def test_gain(self):
        write("x.npy", noise(20, 20))
        assert_ran(run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy", "--gain", "2"))
        np.testing.assert_allclose(np.load("y.npy"), 2 * wanted(np.load("x.npy"), "box-3"), atol=1e-5)


class TestTiff:
    def test_a_photo_stays_a_photo(self):
        """A zero-sum kernel's response is shown as its magnitude in pictures, and kept as it is in numbers."""
        save("x.tif", pixels(40, 44))
        assert_ran(run("filter", "x.tif", "--kernel", "sobel-x", "-o", "photo.tif"))
        assert_ran(run("filter", "x.tif", "--kernel", "sobel-x", "-o", "y.tif", "--dtype", "float32"))
        y = wanted(pixels(40, 44), "sobel-x")
        assert np.array_equal(read("photo.tif"), as_integers(np.abs(y), np.uint8))
        assert np.array_equal(read("y.tif"), y)

    def test_a_large_one_is_numbers(self, monkeypatch):
        monkeypatch.setattr(large, "_LARGE", 1000)
        write("x.tif", pixels(40, 44))
        assert_ran(run("filter", "x.tif", "--kernel", "sobel-x", "-o", "y.tif"))
        assert np.array_equal(read("y.tif"), as_integers(wanted(pixels(40, 44), "sobel-x"), np.uint8))

    @pytest.mark.parametrize(
        "options",
        [
            {"tile": (16, 16), "compression": "zlib"},
            {"rowsperstrip": 8, "compression": "zlib", "predictor": True},
            {"byteorder": ">"},
            {"tile": (16, 16)},
            {"rowsperstrip": 8},
            {"bigtiff": True},
        ],
    )
    def test_every_way_to_store_one(self, options):
        x = pixels(40, 44, dtype=np.uint16)
        write("x.tif", x, **options)
        assert_ran(run("filter", "x.tif", "--kernel", "box-3", "-o", "y.zarr", "--workspace-limit", "200k"))
        assert np.abs(read("y.zarr") - wanted(x, "box-3")).max() <= 0.51

    @pytest.mark.parametrize("compressed", [{}, {"compression": "zlib", "tile": (16, 16)}])
    def test_colour_and_the_size_of_a_pixel(self, compressed):
        x = pixels(40, 44, 3)
        write("x.tif", x, resolution=(4000, 5000), resolutionunit="CENTIMETER", photometric="rgb", **compressed)
        assert_ran(run("filter", "x.tif", "--kernel", "gaussian-5", "-o", "y.tif", "--resume"))
        with tifffile.TiffFile("y.tif") as tiff:
            assert tiff.series[0].axes == "YXS"
            assert tiff.pages.first.resolution == (4000, 5000)
            assert tiff.pages.first.resolutionunit.name == "CENTIMETER"
        assert np.abs(read("y.tif") - wanted(x)).max() <= 0.51
        with Image.open("y.tif") as image:
            assert image.mode == "RGB"

    def test_a_stack(self):
        x = pixels(5, 40, 44)
        write("x.tif", x)
        assert_ran(run("filter", "x.tif", "--kernel", "gaussian-5", "-o", "y.tif", "--resume"))
        y = read("y.tif")
        assert y.shape == x.shape
        assert all(np.abs(plane - wanted(image)).max() <= 0.51 for plane, image in zip(y, x, strict=True))


class TestResume:
    def interrupted(self, monkeypatch, *options):
        """A run that fails in the middle; what it says."""
        write("x.npy", noise(200, 210))
        store, calls = storage.Mapped.write, iter(range(10_000))

        def full(self, at, values):
            if next(calls) == 12:
                raise OSError(28, "No space left on device")
            store(self, at, values)

        with monkeypatch.context() as patch:
            patch.setattr(storage.Mapped, "write", full)
            result = run(
                "filter", "x.npy", "--kernel", "gaussian-5", "-o", "y.npy", "--workspace-limit", "250k", *options
            )
        assert_refused(result.exit_code, result.stderr, "No space left on device", "while writing tile", "out[")
        assert not Path("y.npy").exists()

    def test_goes_on(self, monkeypatch):
        self.interrupted(monkeypatch, "--resume")
        assert sorted(os.listdir()) == ["x.npy", "y.npy.partial", "y.npy.partial.tiles.json"]
        result = run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy", "--workspace-limit", "250k", "--resume")
        assert_refused(result.exit_code, result.stderr, "what differs:", "the weights of k")
        assert sorted(os.listdir()) == ["x.npy", "y.npy.partial", "y.npy.partial.tiles.json"]
        command = "filter", "x.npy", "--kernel", "gaussian-5", "-o", "y.npy", "--workspace-limit", "250k", "--resume"
        assert_ran(run(*command))
        np.testing.assert_allclose(np.load("y.npy"), wanted(np.load("x.npy")), atol=1e-5)
        assert sorted(os.listdir()) == ["x.npy", "y.npy"]

    def test_without_it_nothing_is_left(self, monkeypatch):
        self.interrupted(monkeypatch)
        assert os.listdir() == ["x.npy"]

    def test_a_partial_output_without_a_record_is_made_anew(self):
        write("x.npy", noise(20, 20))
        Path("y.zarr.partial").mkdir()
        Path("y.npy.partial").write_text("rubbish")
        for name in ("y.npy", "y.zarr"):
            assert_ran(run("filter", "x.npy", "--kernel", "gaussian-5", "-o", name, "--resume"))
            np.testing.assert_allclose(read(name), wanted(np.load("x.npy")), atol=1e-5)


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_links():
    write("x.npy", noise(20, 20))
    Path("link.npy").symlink_to("real.npy")
    assert_ran(run("filter", "x.npy", "--kernel", "box-3", "-o", "link.npy"))
    assert Path("link.npy").is_symlink() and np.load("real.npy").shape == (20, 20)
    Path("precious").write_text("data")
    Path("y.npy.partial").symlink_to("precious")
    result = run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy")
    assert_refused(result.exit_code, result.stderr, "cannot write y.npy", "is a link; delete it")
    assert Path("precious").read_text() == "data"


class TestZarr:
    def test_an_array_in_a_group(self):
        group = zarr.create_group("image.zarr")
        group.create_array("0", shape=(40, 44), chunks=(16, 16), dtype="float32")[...] = noise(40, 44)
        result = run("filter", "image.zarr", "--kernel", "gaussian-5", "-o", "y.zarr")
        assert_refused(result.exit_code, result.stderr, "cannot read image.zarr: it is a group", "image.zarr/0")
        assert_ran(run("filter", "image.zarr/0", "--kernel", "gaussian-5", "-o", "y.zarr"))
        np.testing.assert_allclose(read("y.zarr"), wanted(noise(40, 44)), atol=1e-5)

    def test_chunks_and_shards_are_those_of_the_source(self):
        write("x.zarr", noise(100, 100), chunks=(10, 20), shards=(50, 40))
        assert_ran(run("filter", "x.zarr", "--kernel", "gaussian-5", "-o", "y.zarr"))
        made = zarr.open_array("y.zarr", mode="r")
        assert (made.chunks, made.shards) == ((10, 20), (50, 40))

    def test_a_damaged_chunk_is_named(self):
        write("x.zarr", noise(64, 64))
        chunk = Path("x.zarr/c/2/1")
        chunk.write_bytes(chunk.read_bytes()[:20])
        result = run("filter", "x.zarr", "--kernel", "gaussian-5", "-o", "y.zarr", "--workspace-limit", "200k")
        assert_refused(result.exit_code, result.stderr, "while reading tile", "out[")
        assert os.listdir() == ["x.zarr"]

    def test_a_folder_is_never_replaced(self):
        write("x.npy", noise(20, 20))
        Path("y.zarr").mkdir()
        Path("y.zarr/precious").write_text("data")
        result = run("filter", "x.npy", "--kernel", "gaussian-5", "-o", "y.zarr")
        assert_refused(result.exit_code, result.stderr, "cannot write y.zarr: it exists and is a folder")
        assert Path("y.zarr/precious").read_text() == "data"


@pytest.mark.parametrize(
    ("photo", "output", "options", "message"),
    [
        ("none.npy", "y.npy", [], "cannot read none.npy: No such file"),
        ("none.zarr", "y.npy", [], "cannot read none.zarr: No such file"),
        ("none.tif", "y.npy", [], "cannot read none.tif: No such file"),
        ("text.npy", "y.npy", [], "cannot read text.npy"),
        ("text.tif", "y.npy", [], "cannot read text.tif"),
        ("objects.npy", "y.npy", [], "cannot read objects.npy"),
        ("line.npy", "y.npy", [], "cannot read line.npy: has shape (5,)"),
        ("x.npy", "y.png", [], "cannot write y.png: an image of numbers goes to .zarr, .npy or .tif"),
        ("x.png", "y.npy", [], "cannot read x.png: an image of numbers is read from .zarr, .npy or .tif"),
        ("x.png", "y.png", ["--resume"], "are for .zarr, .npy or .tif"),
        ("x.npy", "y.npy", ["--signed"], "--signed is for pictures"),
        ("x.npy", "y.npy", ["--workspace-limit", "lots"], "is not a size such as 512MiB"),
        ("x.npy", "y.npy", ["--workspace-limit", "1k"], "workspace_limit is 1024; raise it"),
        ("x.npy", "y.npy", ["--dtype", "float128"], "--dtype"),
        ("x.npy", "y.npy", ["--padding-mode", "mirror"], "padding_mode must be one of"),
        ("x.npy", "none/y.npy", [], "cannot write none/y.npy: No such file"),
        ("x.npy", "x.npy/y.npy", [], "cannot write x.npy/y.npy"),
        ("complex.npy", "y.npy", ["--dtype", "float32"], "complex64"),
    ],
)
def test_refusals(photo, output, options, message):
    write("x.npy", noise(20, 20))
    write("line.npy", noise(5))
    write("complex.npy", noise(20, 20).astype(np.complex64))
    np.save("objects.npy", np.array([[1, None]], dtype=object))
    Path("text.npy").write_text("hello")
    Path("text.tif").write_text("hello")
    save("x.png", pixels(20, 20))
    before = sorted(os.listdir())
    result = run("filter", photo, "--kernel", "box-3", "-o", output, *options)
    assert_refused(result.exit_code, result.stderr, message)
    assert sorted(os.listdir()) == before


def test_an_old_file_is_replaced_only_by_a_whole_one():
    write("x.npy", noise(20, 20))
    Path("y.npy").write_text("old")
    assert run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy", "--padding-mode", "mirror").exit_code == 2
    assert Path("y.npy").read_text() == "old"
    assert_ran(run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy"))
    assert np.load("y.npy").shape == (20, 20)


def test_in_place():
    """The output is another file until all is done."""
    x = noise(60, 70)
    write("x.npy", x)
    assert_ran(run("filter", "x.npy", "--kernel", "gaussian-5", "-o", "x.npy", "--workspace-limit", "300k"))
    np.testing.assert_allclose(np.load("x.npy"), wanted(x), atol=1e-5)


@pytest.mark.parametrize(("name", "file"), [("zarr", "x.zarr"), ("tifffile", "x.tif")])
def test_a_missing_library_is_named(name, file, monkeypatch):
    write(file, noise(20, 20))
    monkeypatch.setitem(__import__("sys").modules, name, None)
    result = run("filter", file, "--kernel", "box-3", "-o", "y.npy")
    assert_refused(result.exit_code, result.stderr, f"takes {name}, which is not installed", "gpuconv[zarr]")


def test_the_limit_is_passed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(gpuconv, "conv2d_tiled", lambda *_, **options: seen.append(options["workspace_limit"]))
    write("x.npy", noise(20, 20))
    for text in ("1000", "2k", "3MiB", "1 GB"):
        run("filter", "x.npy", "--kernel", "box-3", "-o", "y.npy", "--workspace-limit", text)
    assert seen == [1000, 2 << 10, 3 << 20, 1 << 30]
