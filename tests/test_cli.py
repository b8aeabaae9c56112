"""The command line: what it computes is checked against plain NumPy, a refusal must be one line and exit code 2."""

import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")
pytest.importorskip("rich", reason="the command line needs the extra `cli`")
pytest.importorskip("PIL", reason="the command line needs the extra `cli`")

from cli_tools import (
    assert_ran,
    assert_refused,
    load,
    pixels,
    run,
    run_program,
    save,
)
from PIL import Image

import gpuconv
from gpuconv import pictures
from gpuconv.cli import cli
from gpuconv.filters import KERNELS, kernel_from

LINE = "n8c3h224w224_o64kh7kw7_s2p3_f32"
DEMO_PICTURE = Path(__file__).parent.parent / "docs" / "images" / "demo.png"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestExplainAndInfo:
    def test_a_problem_line(self):
        result = run("explain", LINE, "--backend", "numpy.reference")
        assert_ran(result)
        assert result.stdout == f"{gpuconv.explain(LINE, backend='numpy.reference')}\n"

    def test_shapes(self):
        result = run("explain", "--x", "8,3,224,224", "--k", "64x3x7x7", "--stride", "2", "--padding", "3")
        assert_ran(result)
        assert result.stdout == f"{gpuconv.explain((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)}\n"

    def test_shapes_without_their_options(self):
        result = run("explain", "9,9", "3,3")
        assert_refused(result.exit_code, result.stderr, "--x", "--k")

    def test_every_option(self):
        result = run(
            *("explain", "--x", "2,9,9,4", "--k", "3,3,2,6", "--groups", "2", "--bias", "--flip"),
            *("--stride", "2,1", "--dilation", "1,2", "--padding", "0:1,2:0", "--padding-mode", "reflect"),
            *("--layout", "NHWC", "--kernel-layout", "HWIO", "--activation", "relu", "--precision", "high"),
            *("--dtype", "float16", "--result-dtype", "float32", "--workspace-limit", "1000000", "--device", "cpu"),
        )
        assert_ran(result)
        explanation = gpuconv.explain(
            (2, 9, 9, 4), (3, 3, 2, 6), True, (2, 1), ((0, 1), (2, 0)), (1, 2), 2, flip=True, padding_mode="reflect",
            layout="NHWC", kernel_layout="HWIO", activation="relu", precision="high", input_dtype="float16",
            dtype="float32", workspace_limit=1_000_000, device="cpu",
        )  # fmt: skip
        assert result.stdout == f"{explanation}\n"

    def test_padding_by_name(self):
        result = run("explain", "--x", "9,9", "--k", "3,3", "--padding", "same_lower")
        assert_ran(result)
        assert str(gpuconv.explain((9, 9), (3, 3), padding="same_lower").problem) in result.stdout

    def test_info(self):
        result = run("info")
        assert_ran(result)
        assert "numpy.reference" in result.stdout

    def test_version_and_help(self):
        assert run("--version").stdout == f"gpuconv {gpuconv.__version__}\n"
        for arguments in ([], ["--help"], *([command, "--help"] for command in cli.commands)):
            result = run(*arguments)
            assert_ran(result)
            assert "Exit codes:" in result.stdout


class TestDemo:
    def test_everything(self):
        result = run("demo", "-o", "sheet.png")
        assert_ran(result)
        assert str(gpuconv.trace(np.arange(10, 251, 10.0).reshape(5, 5), [[1, 0, -1]] * 3)) in result.stdout
        assert "output, 3 × 3\n−60 −60 −60\n−60 −60 −60\n−60 −60 −60\n" in result.stdout
        assert "⌊(n − k + 2p) / s⌋ + 1" in result.stdout
        assert "contact sheet: sheet.png (" in result.stdout
        named = [name for name in KERNELS if f" {name} " in result.stdout]
        assert len(named) == 7

        sheet = load("sheet.png")
        with Image.open(DEMO_PICTURE) as documented:
            assert documented.size == sheet.shape[1::-1], "docs/images/demo.png is what `gpuconv demo` writes"
        width, height = pictures.PANEL
        photo = pictures.photograph().resize(pictures.PANEL, Image.Resampling.BICUBIC)
        top, left = 100, 36  # of the first panel, which shows the photograph itself
        assert np.array_equal(sheet[top : top + height, left : left + width], np.asarray(photo))
        across, down = (sheet.shape[1] - 2 * left + 24) // 4, (sheet.shape[0] - top - 44) // 2
        panels = [
            sheet[y : y + height, x : x + width].astype(int)
            for y, x in itertools.product((top, top + down), range(left, left + 4 * across, across))
        ]
        assert len(panels) == 8
        for one, other in itertools.combinations(panels, 2):
            assert np.abs(one - other).mean() > 3

    def test_the_documented_picture_is_small(self):
        assert DEMO_PICTURE.stat().st_size < 1_200_000

    def test_two_inks(self):
        y = np.array([[-1000, -170, -5, 0, 5, 170, 1000]])
        inks = np.asarray(pictures.in_two_inks(y, faint=14, full=170)).astype(int)[0]
        assert np.all(inks[2:5] == 255)
        assert np.array_equal(inks[0], inks[1]) and np.array_equal(inks[5], inks[6])
        assert inks[0, 2] > inks[0, 0] and inks[6, 0] > inks[6, 2]  # blue below zero, orange above


# The program on a machine where some modules are not installed.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["gpuconv", {command!r}]
from gpuconv.__main__ import main
main()
"""


class TestProgram:
    """In a process of its own, as a user meets it."""

    def test_refusals_are_one_line(self):
        save("x.png", pixels(8, 8, 3))
        for arguments in (["filter", "none.png"], ["filter", "x.png", "--device", "tpu"]):
            result = run_program(*arguments, "--kernel", "box-3", "-o", "y.png")
            assert_refused(result.returncode, result.stderr)
            assert result.stdout == ""

    def test_a_forced_backend_that_is_missing(self):
        save("x.png", pixels(8, 8, 3))
        result = run_program("filter", "x.png", "--kernel", "box-3", "-o", "y.png", "--backend", "cupy")
        assert_refused(result.returncode, result.stderr, "cupy.gemm")

    @pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
    def test_a_disk_that_is_full_and_an_output_that_is_closed(self):
        program = "import os, sys\n{}\nsys.argv = ['gpuconv', 'trace']\nfrom gpuconv.__main__ import main\nmain()"
        full = program.format("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
        result = run_program(program=("-c", full))
        assert_refused(result.returncode, result.stderr, "cannot write the output: No space left on device")
        result = run_program(program=("-c", program.format("sys.stdout = None")))
        assert (result.returncode, result.stderr) == (0, "")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
    def test_a_pipe_is_written_to_and_not_replaced(self):
        os.mkfifo("page.html")
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(Path("page.html").read_text)
            assert_ran(run("trace", "-o", "page.html"))
            assert read.result(timeout=60).startswith("<!doctype html>")
        assert Path("page.html").is_fifo()

    def test_the_fall_back_to_the_cpu_is_one_warning(self):
        save("x.png", pixels(8, 8, 3))
        arguments = ("filter", "x.png", "--kernel", "box-3", "-o", "y.png", "--device", "cuda")
        result = run_program(*arguments)
        assert result.returncode == 0
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("gpuconv: warning: ")
        assert run_program(*arguments, GPUCONV_FALLBACK="silent").stderr == ""
        result = run_program(*arguments, GPUCONV_FALLBACK="error")
        assert_refused(result.returncode, result.stderr)
        result = run_program(*arguments, PYTHONWARNINGS="error::UserWarning")
        assert_refused(result.returncode, result.stderr)

    def test_no_escape_codes_in_a_pipe(self):
        result = run_program("kernels")
        assert result.returncode == 0 and "\x1b" not in result.stdout
        result = run_program("kernels", NO_COLOR="1", FORCE_COLOR="1")
        assert result.returncode == 0 and not re.search(r"\x1b\[[0-9;]*[34][0-7]m", result.stdout)

    @pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
    def test_a_terminal_without_our_signs(self, encoding):
        result = run_program("explain", LINE, "--device", "cpu", PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        result = run_program("kernels", PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert "-1  0  1" in result.stdout

    @pytest.mark.parametrize(("missing", "command"), [("click", "info"), ("rich", "kernels"), ("PIL", "demo")])
    def test_without_the_extra(self, missing, command):
        result = run_program(program=("-c", WITHOUT.format(missing=(missing,), command=command)))
        assert result.returncode == 2
        assert result.stderr == 'gpuconv: the command line needs the cli extra: pip install "gpuconv[cli]"\n'
        assert result.stdout == ""

    def test_info_needs_click_alone(self):
        result = run_program(program=("-c", WITHOUT.format(missing=("rich", "PIL"), command="info")))
        assert result.returncode == 0 and "numpy.reference" in result.stdout

    def test_any_other_missing_module_surfaces(self):
        result = run_program(program=("-c", WITHOUT.format(missing=("rich.table",), command="kernels")))
        assert result.returncode == 1 and "ModuleNotFoundError" in result.stderr


def test_the_photograph_comes_with_its_licence():
    data = Path(gpuconv.__file__).parent / "data"
    assert pictures.photograph().size == (600, 400)
    assert all(part in (data / "README.md").read_text() for part in ("Rachel Michetti", "CC0", "Pikolo Espresso Bar"))


def test_json_and_text_agree():
    Path("k.json").write_text(json.dumps(KERNELS["gaussian-3"].weights.tolist()))
    Path("k.txt").write_text("\n".join(" ".join(map(str, row)) for row in KERNELS["gaussian-3"].weights.tolist()))
    assert np.array_equal(kernel_from("k.json"), kernel_from("k.txt"))
