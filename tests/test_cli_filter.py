"""`gpuconv filter`: what it computes is checked against plain NumPy, a refusal is one line and exit code 2."""

import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")
pytest.importorskip("rich", reason="the command line needs the extra `cli`")
pytest.importorskip("PIL", reason="the command line needs the extra `cli`")

from cli_tools import (
    assert_ran,
    assert_refused,
    filtered,
    load,
    pixels,
    png,
    run,
    save,
    shown,
)
from PIL import Image

import gpuconv
from gpuconv import files
from gpuconv.filters import KERNELS, kernel_from

LINE = "n8c3h224w224_o64kh7kw7_s2p3_f32"
DEMO_PICTURE = Path(__file__).parent.parent / "docs" / "images" / "demo.png"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestNamedKernels:
    def test_the_textbook_s_edge_detectors(self):
        assert KERNELS["vertical-edges"].weights.tolist() == [[1, 0, -1]] * 3
        assert KERNELS["horizontal-edges"].weights.tolist() == [[1, 1, 1], [0, 0, 0], [-1, -1, -1]]

    @pytest.mark.parametrize("name", KERNELS)
    def test_a_flat_picture_stays_flat_or_vanishes(self, name):
        zero_sum = any(part in name for part in ("edges", "sobel", "scharr", "prewitt", "laplacian"))
        assert KERNELS[name].weights.sum() == pytest.approx(0 if zero_sum else 1, abs=1e-15)

    @pytest.mark.parametrize("stem", ["sobel", "scharr", "prewitt"])
    def test_gradients_are_positive_where_the_values_grow(self, stem):
        ramp = np.tile(np.arange(5.0), (5, 1))
        for name, x in ((f"{stem}-x", ramp), (f"{stem}-y", ramp.T)):
            assert np.all(gpuconv.conv2d(x, KERNELS[name].weights) > 0)
            assert np.all(gpuconv.conv2d(x.T, KERNELS[name].weights) == 0)

    def test_diagonal_edges_ignore_an_edge_of_the_other_direction(self):
        i, j = np.mgrid[:9, :9]
        down, up = KERNELS["diagonal-edges-down"].weights, KERNELS["diagonal-edges-up"].weights
        runs_down = np.where(i > j, 0.0, 1.0)
        assert np.abs(gpuconv.conv2d(runs_down, down)).max() > 2 * np.abs(gpuconv.conv2d(runs_down, up)).max()

    def test_the_list_shows_every_name(self):
        result = run("kernels")
        assert_ran(result)
        assert all(f" {name} " in result.stdout for name in KERNELS)


class TestKernelFiles:
    WEIGHTS = ((0.5, -1.0), (2.0, 3e-3), (0.0, 7.0))

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("k.txt", "# a comment\n0.5 -1\n\n2 3e-3  # another\n0 7\n"),
            ("k.csv", "0.5, -1\r\n2, 3e-3\r\n0, 7"),
            ("K.CSV", "\ufeff0.5;-1\n2;3e-3\n0;7\n"),
            ("k.json", "[[0.5, -1], [2, 3e-3], [0, 7]]"),
        ],
    )
    def test_text(self, name, text):
        Path(name).write_text(text, encoding="utf-8")
        assert kernel_from(name).tolist() == np.array(self.WEIGHTS).tolist()

    @pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, ">f4"])
    def test_npy(self, dtype):
        weights = np.array([[1, 2], [-3, 4]], dtype=dtype)
        np.save("k.npy", np.asfortranarray(weights))
        assert kernel_from("k.npy").tolist() == weights.tolist()

    def test_one_row_of_text_is_a_kernel(self):
        Path("k.txt").write_text("1 0 -1")
        assert kernel_from("k.txt").shape == (1, 3)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("k.txt", b"", "holds no numbers"),
            ("k.txt", b"# only a comment\n", "holds no numbers"),
            ("k.txt", b"1 2\n3 four\n", "line 2: 'four' is not a number"),
            ("k.csv", b"1,2\n3\n", "line 2: has 1 numbers where the first row has 2"),
            ("k.txt", b"1 nan", "holds NaN"),
            ("k.txt", b"1e300", "too large for float32"),
            ("k.txt", bytes(range(256)), "k.txt"),
            ("k.json", b"", "k.json"),
            ("k.json", b"[[1, 2], [3", "k.json"),
            ("k.json", b'{"rows": [[1]]}', "a list of rows"),
            ("k.json", b"[]", "a list of rows"),
            ("k.json", b"[[]]", "holds no numbers"),
            ("k.json", b"[1, 2]", "a list of rows"),
            ("k.json", b"[[1, 2], [3]]", "a row has 1 numbers"),
            ("k.json", b"[[[1]]]", "[1] is not a number"),
            ("k.json", b"[[true]]", "true is not a number"),
            ("k.json", b"[[1" + b"0" * 400 + b"]]", "k.json"),
            ("k.json", b"[" * 100_000, "k.json"),
            ("k.npy", b"", "k.npy"),
            ("k.npy", b"\x93NUMPY", "k.npy"),
            ("k.npy", b"PK\x03\x04", "k.npy"),
            ("k.mat", b"1", "the extension must be one of .npy, .txt, .csv, .json"),
        ],
    )
    def test_damaged(self, name, content, message):
        save("x.png", pixels(4, 4))
        Path(name).write_bytes(content)
        result = run("filter", "x.png", "--kernel", name, "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, name, message)
        assert not Path("y.png").exists()

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((2, 3, 3)), "shape (2, 3, 3)"),
            (np.zeros(3), "shape (3,)"),
            (np.float64(1), "shape ()"),
            (np.zeros((0, 3)), "holds no numbers"),
            (np.zeros((2, 2), complex), "complex128"),
            (np.array([["a"]]), "<U1"),
            (np.array([[np.inf]]), "infinity"),
            (np.array([[print]], dtype=object), "allow_pickle=False"),
        ],
    )
    def test_unsuitable_arrays(self, array, message):
        save("x.png", pixels(4, 4))
        np.save("k.npy", array)
        result = run("filter", "x.png", "--kernel", "k.npy", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "k.npy", message)

    def test_a_header_that_promises_terabytes(self):
        save("x.png", pixels(4, 4))
        header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 10000000), }".ljust(117) + "\n"
        Path("k.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        result = run("filter", "x.png", "--kernel", "k.npy", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "k.npy")

    def test_missing(self):
        save("x.png", pixels(4, 4))
        for name in ("none.txt", "folder/none.npy"):
            result = run("filter", "x.png", "--kernel", name, "-o", "y.png")
            assert_refused(result.exit_code, result.stderr, f"cannot read kernel file {name}: No such file")

    def test_an_unknown_name_is_told_near_ones_and_all(self):
        save("x.png", pixels(4, 4))
        result = run("filter", "x.png", "--kernel", "sobel", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "did you mean sobel-", *KERNELS)
        result = run("filter", "x.png", "--kernel", "qqq", "-o", "y.png")
        assert "did you mean" not in result.stderr


class TestFilter:
    @pytest.mark.parametrize("name", KERNELS)
    def test_colour_is_filtered_per_channel(self, name):
        x = pixels(17, 23, 3)
        assert_ran(run("filter", save("x.png", x), "--kernel", name, "-o", "y.png"))
        weights = KERNELS[name].weights
        direct = gpuconv.conv2d(
            x.astype(np.float32),
            np.broadcast_to(weights.astype(np.float32), (3, 1, *weights.shape)),
            groups=3,
            layout="NHWC",
            padding="same",
            padding_mode="edge",
        )
        for y in (direct, filtered(x, weights)):
            expected = shown(np.abs(y) if abs(weights.sum()) < 1e-9 else y)
            # Where the exact response lies half-way between two values, float32 may fall to either side.
            off = np.abs(load("y.png") - expected)
            assert off.max() <= 1 and np.all(np.abs(y % 1 - 0.5)[off > 0] < 1e-3)

    def test_grey_stays_grey(self):
        x = pixels(9, 11)
        assert_ran(run("filter", save("x.png", x), "--kernel", "laplacian", "-o", "y.png"))
        assert np.array_equal(load("y.png"), shown(np.abs(filtered(x, KERNELS["laplacian"].weights))))

    def test_signed_and_gain(self):
        x = pixels(9, 11)
        y = filtered(x, KERNELS["sobel-x"].weights)
        assert_ran(run("filter", save("x.png", x), "--kernel", "sobel-x", "-o", "y.png", "--signed", "--gain", "0.25"))
        assert np.array_equal(load("y.png"), shown((255 + 0.25 * y) / 2))

    def test_signed_leaves_a_blur_alone(self):
        x = pixels(9, 11)
        for options in ([], ["--signed"]):
            assert_ran(run("filter", save("x.png", x), "--kernel", "identity", "-o", "y.png", *options))
            assert np.array_equal(load("y.png"), x)

    def test_an_even_kernel_keeps_the_size(self):
        x = pixels(9, 11)
        Path("k.txt").write_text("0 0.25\n0.5 0.25\n")
        assert_ran(run("filter", save("x.png", x), "--kernel", "k.txt", "-o", "y.png"))
        off = np.abs(load("y.png") - filtered(x, [[0, 0.25], [0.5, 0.25]]))
        assert off.max() <= 0.5

    @pytest.mark.parametrize(
        ("mode", "numpy_mode"), [("wrap", "wrap"), ("replicate", "edge"), ("constant", "constant")]
    )
    def test_padding_mode(self, mode, numpy_mode):
        x = pixels(6, 5)
        Path("k.txt").write_text("1 0 0")
        assert_ran(run("filter", save("x.png", x), "--kernel", "k.txt", "-o", "y.png", "--padding-mode", mode))
        assert np.array_equal(load("y.png"), np.pad(x, 1, mode=numpy_mode)[1:-1, :-2])

    def test_alpha_is_kept(self):
        x = pixels(9, 11, 4)
        assert_ran(run("filter", save("x.png", x), "--kernel", "horizontal-edges", "-o", "y.png"))
        y = load("y.png")
        assert np.array_equal(y[..., 3], x[..., 3])
        assert np.array_equal(y[..., :3], shown(np.abs(filtered(x[..., :3], KERNELS["horizontal-edges"].weights))))

    def test_grey_with_alpha(self):
        x = pixels(9, 11, 2)
        assert_ran(run("filter", save("x.png", x), "--kernel", "identity", "-o", "y.png"))
        assert np.array_equal(load("y.png"), x)

    def test_alpha_that_the_format_cannot_hold_is_a_warning(self):
        result = run("filter", save("x.png", pixels(9, 11, 4)), "--kernel", "identity", "-o", "y.jpg")
        assert_ran(result)
        assert result.stderr == "gpuconv: warning: y.jpg: JPEG cannot hold the transparency, which was left out\n"
        assert load("y.jpg").shape == (9, 11, 3)

    @pytest.mark.parametrize("extension", ["png", "tif"])
    def test_16_bits(self, extension):
        x = pixels(9, 11, dtype=np.uint16)
        assert_ran(run("filter", save("x.png", x), "--kernel", "vertical-edges", "-o", f"y.{extension}"))
        expected = shown(np.abs(filtered(x, KERNELS["vertical-edges"].weights)), 65535)
        assert np.array_equal(load(f"y.{extension}"), expected)
        assert expected.max() > 255

    def test_16_bits_to_8(self):
        x = pixels(9, 11, dtype=np.uint16)
        result = run("filter", save("x.png", x), "--kernel", "identity", "-o", "y.bmp")
        assert_ran(result)
        assert "BMP holds 8 bits per pixel, not 16" in result.stderr
        assert np.array_equal(load("y.bmp"), np.rint(x / 257))

    def test_16_bit_colour_is_a_warning(self):
        Path("x.png").write_bytes(png(2, 1, 16, b"\0" + struct.pack(">6H", *(257 * value for value in range(1, 7)))))
        result = run("filter", "x.png", "--kernel", "identity", "-o", "y.png")
        assert_ran(result)
        assert result.stderr == "gpuconv: warning: x.png: 16-bit colour is read as 8-bit\n"
        assert load("y.png").tolist() == [[[1, 2, 3], [4, 5, 6]]]

    def test_palette(self):
        image = Image.fromarray(pixels(9, 11, 3)).quantize(8)
        image.save("x.png")
        assert_ran(run("filter", "x.png", "--kernel", "identity", "-o", "y.png"))
        assert np.array_equal(load("y.png"), np.asarray(image.convert("RGB")))

    def test_palette_with_a_transparent_colour(self):
        image = Image.fromarray(pixels(9, 11, 3)).quantize(8)
        image.save("x.png", transparency=3)
        assert_ran(run("filter", "x.png", "--kernel", "identity", "-o", "y.png"))
        assert np.array_equal(load("y.png")[..., 3] == 0, np.asarray(image) == 3)

    def test_black_and_white(self):
        x = pixels(9, 11) > 128
        assert_ran(run("filter", save("x.png", x), "--kernel", "identity", "-o", "y.png"))
        assert np.array_equal(load("y.png"), 255 * x.astype(np.uint8))

    def test_cmyk(self):
        Image.fromarray(pixels(9, 11, 3)).convert("CMYK").save("x.tif")
        assert_ran(run("filter", "x.tif", "--kernel", "identity", "-o", "y.png"))
        assert load("y.png").shape == (9, 11, 3)

    def test_the_first_frame_of_an_animation(self):
        frames = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (40, 200)]
        frames[0].save("x.gif", save_all=True, append_images=frames[1:])
        assert_ran(run("filter", "x.gif", "--kernel", "identity", "-o", "y.png"))
        assert np.all(load("y.png") == 40)

    def test_a_photo_on_its_side_is_turned_upright(self):
        x = pixels(9, 11)
        exif = Image.Exif()
        exif[0x0112] = 6  # the top of the scene is at the right of the stored pixels
        assert_ran(run("filter", save("x.png", x, exif=exif), "--kernel", "identity", "-o", "y.png"))
        assert np.array_equal(load("y.png"), np.rot90(x, -1))

    def test_the_colour_profile_is_kept(self):
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        save("x.png", pixels(4, 5, 3), icc_profile=profile)
        assert_ran(run("filter", "x.png", "--kernel", "box-3", "-o", "y.jpg"))
        with Image.open("y.jpg") as image:
            assert image.info["icc_profile"] == profile

    @pytest.mark.parametrize("extension", ["jpg", "jpeg", "tiff", "webp", "bmp", "gif", "ppm", "tga", "PNG"])
    def test_formats(self, extension):
        assert_ran(run("filter", save("x.png", pixels(9, 11, 3)), "--kernel", "box-3", "-o", f"y.{extension}"))
        with Image.open(f"y.{extension}") as image:
            assert image.size == (11, 9)

    def test_the_line_says_what_ran(self):
        save("x.png", pixels(9, 11, 3))
        result = run("filter", "x.png", "--kernel", "gaussian-5", "-o", "y.png", "--backend", "numpy.reference")
        assert_ran(result)
        assert re.fullmatch(
            r"numpy\.reference: 11 × 9 × 3 pixels with a 5 × 5 kernel in \d+\.\d ms \(first call\) → y\.png\n",
            result.stdout,
        )

    def test_in_place(self):
        x = pixels(9, 11)
        assert_ran(run("filter", save("x.png", x), "--kernel", "laplacian", "-o", "x.png"))
        assert np.array_equal(load("x.png"), shown(np.abs(filtered(x, KERNELS["laplacian"].weights))))


class TestRefusals:
    @pytest.fixture(autouse=True)
    def photo(self, folder):
        save("x.png", pixels(16, 16, 3))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "No such file"),
            (b"", "not a picture"),
            (b"hello", "not a picture"),
            (png(30_000, 30_000, 8, b""), "decompression bomb"),
            (png(10_000, 10_000, 8, b""), "decompression bomb"),  # Pillow alone would only warn
        ],
        ids=["missing", "empty", "text", "bomb", "half a bomb"],
    )
    def test_no_picture(self, content, message):
        if content is not None:
            Path("in.png").write_bytes(content)
        result = run("filter", "in.png", "--kernel", "box-3", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "cannot read in.png", message)

    @pytest.mark.parametrize("extension", ["png", "jpg", "tif", "gif", "webp", "bmp"])
    def test_truncated(self, extension):
        name = save(f"in.{extension}", pixels(40, 40, 3))
        Path(name).write_bytes(Path(name).read_bytes()[:300])
        result = run("filter", name, "--kernel", "box-3", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, f"cannot read {name}")
        assert not Path("y.png").exists()

    def test_floating_point_pixels(self):
        save("in.tif", np.zeros((4, 4), np.float32))
        result = run("filter", "in.tif", "--kernel", "box-3", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "floating-point")

    def test_folder_as_picture(self):
        result = run("filter", ".", "--kernel", "box-3", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "cannot read .")

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("folder", "it is a directory"),
            ("folder.png", "it is a directory"),
            ("none/y.png", "No such file"),
            ("x.png/y.png", "cannot write x.png/y.png"),
            ("y.xyz", "the extension .xyz"),
            ("y.pdf", "the extension .pdf"),
            ("y", "a name without an extension"),
        ],
    )
    def test_no_output(self, output, message):
        Path("folder").mkdir()
        Path("folder.png").mkdir()
        result = run("filter", "x.png", "--kernel", "box-3", "-o", output)
        assert_refused(result.exit_code, result.stderr, message)
        assert sorted(os.listdir()) == ["folder", "folder.png", "x.png"]

    def test_the_demonstration_checks_its_output_first(self):
        for output in (".", "y.xyz"):
            result = run("demo", "-o", output)
            assert_refused(result.exit_code, result.stderr, f"cannot write {output}")
            assert result.stdout == ""

    def test_a_failed_write_leaves_the_old_file(self, monkeypatch):
        def full(source, target):
            raise OSError(28, "No space left on device")

        Path("y.png").write_text("old")
        monkeypatch.setattr(files.os, "replace", full)
        result = run("filter", "x.png", "--kernel", "box-3", "-o", "y.png")
        assert_refused(result.exit_code, result.stderr, "cannot write y.png: No space left on device")
        assert Path("y.png").read_text() == "old"
        assert sorted(os.listdir()) == ["x.png", "y.png"]

    @pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need a privilege there")
    def test_a_link_stays_a_link(self):
        Path("link.png").symlink_to("real.png")
        assert_ran(run("filter", "x.png", "--kernel", "box-3", "-o", "link.png"))
        assert Path("link.png").is_symlink() and load("real.png").shape == (16, 16, 3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--device", "tpu"], "device must be"),
            (["--backend", "fortran"], "backend must be"),
            (["--backend", "numpy", "--device", "cuda"], "numpy"),
            (["--padding-mode", "mirror"], "padding_mode must be one of"),
            (["--gain", "nan"], "--gain"),
            (["--gain", "much"], "--gain"),
            (["--colour"], "--colour"),
        ],
    )
    def test_options(self, options, message):
        result = run("filter", "x.png", "--kernel", "box-3", "-o", "y.png", *options)
        assert_refused(result.exit_code, result.stderr, message)
        assert not Path("y.png").exists()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["filter"],
            ["filter", "x.png"],
            ["nonsense"],
            ["--nonsense"],
            ["explain"],
            ["explain", "nonsense"],
            ["explain", LINE, "--stride", "2"],
            ["explain", LINE, "--x", "5,5"],
            ["explain", "--x", "5,5"],
            ["explain", "--x", "5,five", "--k", "3,3"],
            ["explain", "--x", "5,5", "--k", "3,3", "--stride", "0"],
            ["explain", "--x", "5,5", "--k", "3,3", "--stride", "1.5"],
            ["explain", "--x", "5,5", "--k", "3,3", "--groups", "0"],
            ["explain", "--x", "5,5", "--k", "7,7"],
            ["explain", "--x", "3,5,5", "--k", "3,3"],  # the library's message has several lines
            ["explain", "--x", "5,5", "--k", "3,3", "--dtype", "float128"],
            ["explain", "--x", "5,5", "--k", "3,3", "--padding", "1,1,1,1"],
        ],
    )
    def test_arguments(self, arguments):
        result = run(*arguments)
        assert_refused(result.exit_code, result.stderr)
        assert result.stdout == ""
