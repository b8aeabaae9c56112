"""What docs/command-line.md promises to a script: the fields of ``--json``, the exit codes, and where colours are."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")
pytest.importorskip("rich", reason="the command line needs the extra `cli`")
pytest.importorskip("PIL", reason="the command line needs the extra `cli`")

from cli_tools import assert_ran, assert_refused, pixels, run, run_program, save

import gpuconv
from gpuconv.cli import cli
from gpuconv.cli.base import EPILOG
from gpuconv.filters import KERNELS

PAGE = Path(__file__).parent.parent / "docs" / "command-line.md"
LINE = "n8c3h224w224_o64kh7kw7_s2p3_f32"
needs_the_page = pytest.mark.skipif(not PAGE.exists(), reason="docs/command-line.md is not beside the tests")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented():
    """Command -> the fields that the page lists for its object, in order."""
    sections = re.split(r"^### `gpuconv ([\w-]+) --json`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    fields = {}
    for command, text in zip(sections[1::2], sections[2::2], strict=True):
        rows = re.findall(r"^\| (`.*?) \|", re.split(r"^##? ", text, flags=re.MULTILINE)[0], re.MULTILINE)
        fields[command] = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    return fields


def parsed(text):
    """The one JSON object that ``text`` is, on one line of ASCII and without NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert text.isascii() and text.count("\n") == 1, text
    return json.loads(text, parse_constant=refuse)


def answer(*arguments):
    result = run(*arguments, "--json")
    assert_ran(result)
    return parsed(result.stdout)


@needs_the_page
class TestFields:
    def test_every_command_that_has_it_is_documented(self):
        have = {name for name, command in cli.commands.items() if any(p.name == "as_json" for p in command.params)}
        assert have == set(documented()) >= {"info", "explain", "kernels", "filter", "warmup", "demo"}

    def test_info(self):
        found = answer("info")
        assert list(found) == documented()["info"]
        assert found == gpuconv.info().to_dict()
        rows = {row["name"]: row for row in found["implementations"]}
        assert rows["numpy.reference"] == {
            "name": "numpy.reference", "device": "cpu", "usable": True, "experimental": False, "reason": None,
        }  # fmt: skip
        assert all(row["usable"] is (row["reason"] is None) for row in rows.values())

    @pytest.mark.parametrize("more", [(), ("--backend", "numpy.gemm"), ("--device", "cuda")])
    def test_explain(self, more):
        found = answer("explain", LINE, *more)
        assert list(found) == documented()["explain"]
        explanation = gpuconv.explain(LINE, **{name[2:]: value for name, value in zip(*[iter(more)] * 2, strict=True)})
        assert found == explanation.to_dict()
        assert found["output_shape"] == [8, 64, 112, 112] and found["padding"] == [[3, 3], [3, 3]]
        assert [row["name"] for row in found["implementations"] if row["chosen"]] == [found["implementation"]]

    def test_explain_where_nothing_can_run(self):
        found = answer("explain", "n1c1h9w9_o1kh3kw3_i32", "--backend", "numba_cpu.strip")
        nothing = ["implementation", "workspace", "accumulation", "how", "compiled"]
        assert list(found) == documented()["explain"] and [found[name] for name in nothing] == [None] * 5
        assert "numba_cpu.strip" in found["note"]

    def test_explain_of_a_relative(self):
        found = answer(*"explain --x 1,8,5,5 --k 8,2,3,3 --op transpose --stride 2 --output-padding 1".split())
        assert found["op"] == "input_grad" and found["output_shape"] == [1, 2, 12, 12]
        found = answer(*"explain --x 1,8,5,5 --k 4,8,3,3 --op weight_grad".split())
        assert found["output_shape"] == [4, 8, 3, 3] and found["layout"] == "OIHW"

    def test_kernels(self):
        found = answer("kernels")
        assert list(found) == documented()["kernels"]
        for row in found["kernels"]:
            kernel = KERNELS[row["name"]]
            assert list(row) == ["name", "rows", "about", "divisor"] and row["about"] == kernel.about
            assert np.array_equal(np.array(row["rows"]) / row["divisor"], kernel.weights)
        assert len(found["kernels"]) == len(KERNELS)

    def test_filter(self):
        save("x.png", pixels(6, 8, 3))
        found = answer(*"filter x.png --kernel sobel-x -o y.png --backend numpy.gemm".split())
        assert list(found) == documented()["filter"]
        assert 0 < found.pop("seconds") < 100
        assert found == {
            "photo": "x.png", "output": "y.png", "width": 8, "height": 6, "channels": 3, "kernel_size": [3, 3],
            "shown": "magnitude", "implementation": "numpy.gemm",
        }  # fmt: skip
        assert Path("y.png").exists()

    def test_demo(self):
        found = answer("demo", "-o", "sheet.png", "--backend", "numpy.gemm")
        assert list(found) == documented()["demo"]
        assert found["example"]["y"] == [[-60.0] * 3] * 3
        assert len(found["filters"]) == 7 and {row["implementation"] for row in found["filters"]} == {"numpy.gemm"}
        assert found["sheet"]["bytes"] == Path("sheet.png").stat().st_size

    def test_warmup(self):
        done = run_program("-c", WARMUP_OF_NOTHING, "warmup", "--json", program=())
        assert done.returncode == 0, done.stderr
        found = parsed(done.stdout)
        assert list(found) == documented()["warmup"]
        assert found["dtypes"] == ["float32"] and (found["folder"] is None) is (found["not_kept"] is not None)

    def test_the_examples_of_the_page_run(self):
        commands = re.findall(r"^gpuconv .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        assert commands
        for command in commands:
            script = command.replace("gpuconv", f"{sys.executable} -m gpuconv", 1).replace("python3", sys.executable)
            done = subprocess.run(script, shell=True, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.5, 7, True])
def test_a_border_that_json_has_no_number_for(value):
    explanation = gpuconv.explain((9, 9), (3, 3), padding=1, padding_value=value)
    written = parsed(json.dumps(explanation.to_dict()) + "\n")["padding_value"]
    assert written == (value if np.isfinite(value) else str(float(value)))


def test_a_complex_border():
    options = {"padding": 1, "padding_value": 1 + 2j, "input_dtype": "complex64"}
    assert gpuconv.explain((9, 9), (3, 3), **options).to_dict()["padding_value"] == "(1+2j)"


class TestExitCodes:
    @pytest.mark.parametrize(
        "command",
        ["explain", "explain nonsense", "explain --x 3,3 --k 5,5", "filter none.png --kernel box-3 -o y.png",
         "demo -o sheet.doc", "warmup --dtype int8", "kernels --colour", "info --device cpu"],
    )  # fmt: skip
    def test_2_with_nothing_on_stdout(self, command):
        result = run(*command.split(), "--json")
        assert_refused(result.exit_code, result.stderr)
        assert result.stdout == ""

    def test_a_warning_leaves_the_object_whole(self):
        save("x.png", pixels(6, 8, 3))
        done = run_program(*"filter x.png --kernel box-3 -o y.png --device cuda --json".split())
        assert done.returncode == 0 and done.stderr.startswith("gpuconv: warning: ")
        assert parsed(done.stdout)["output"] == "y.png"

    @pytest.mark.skipif(os.name != "posix", reason="pipes and signals as POSIX has them")
    def test_1_when_the_reader_goes_away(self):
        script = f"{sys.executable} -m gpuconv kernels; echo $? >&2"
        reader = subprocess.Popen("exec 0<&-", shell=True, stdin=subprocess.PIPE)
        reader.wait()
        done = subprocess.run(script, shell=True, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, timeout=120)
        reader.stdin.close()
        assert done.stderr == "1\n"

    def test_130_when_interrupted(self):
        script = "from gpuconv import __main__, machine\ndef info(): raise KeyboardInterrupt\nmachine.info = info\n"
        done = run_program("-c", script + "__main__.main()", "info", "--json", program=())
        assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "gpuconv: interrupted")

    @needs_the_page
    def test_the_page_and_the_help_list_the_same(self):
        section = PAGE.read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
        assert re.findall(r"^\| (\d+) \|", section, re.MULTILINE) == re.findall(r"\b(\d+) ", EPILOG)


@needs_the_page
def test_every_variable_of_the_environment_is_documented():
    sources = Path(gpuconv.__file__).parent.rglob("*.py")
    read = {name for path in sources for name in re.findall(r"environ.*?\"(GPUCONV_\w+)\"", path.read_text("utf-8"))}
    assert len(read) >= 4
    assert not {name for name in read if f"`{name}`" not in PAGE.read_text(encoding="utf-8")}


# A progress bar over steps that take no time to compile.
WARMUP_OF_NOTHING = """
from gpuconv.backends.numba_cpu import warm
warm.steps = lambda wanted: [("nothing", lambda: None)] * 3
from gpuconv.__main__ import main
main()
"""

COLOUR = re.compile(r"\x1b\[(?:\d*;)*(?:3\d|4\d|9\d|10\d)(?:;\d*)*m")


def in_a_terminal(*arguments, **environment):
    """What the program writes when stdout and stderr are a terminal."""
    pty = pytest.importorskip("pty", reason="pseudo terminals are POSIX's")
    ours, theirs = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    environment = inherited | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 65536):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=120) == 0, written
    return written.decode()


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals are POSIX's")
class TestColours:
    """no-color.org: "prevents the addition of ANSI color" by any value but the empty one; other styles may stay."""

    def test_the_pattern(self):
        assert COLOUR.search("\x1b[31m") and COLOUR.search("\x1b[1;38;5;197m") and COLOUR.search("\x1b[97;1m")
        assert not COLOUR.search("\x1b[1mbold\x1b[0m \x1b[3m \x1b[2K\x1b[1A \x1b[?25l")

    def test_a_terminal_has_them_and_no_color_takes_them_away(self):
        assert COLOUR.search(in_a_terminal("-c", WARMUP_OF_NOTHING, "warmup"))
        assert COLOUR.search(in_a_terminal("-c", WARMUP_OF_NOTHING, "warmup", NO_COLOR=""))
        without = in_a_terminal("-c", WARMUP_OF_NOTHING, "warmup", NO_COLOR="1")
        assert "kernels compiled in" in without and not COLOUR.search(without)

    def test_tables(self):
        without = in_a_terminal("-m", "gpuconv", "kernels", NO_COLOR="0")
        assert "sobel-x" in without and not COLOUR.search(without)

    def test_a_dumb_terminal_gets_no_escape_sequence(self):
        for arguments in (("-m", "gpuconv", "kernels"), ("-c", WARMUP_OF_NOTHING, "warmup")):
            assert "\x1b" not in in_a_terminal(*arguments, TERM="dumb")

    def test_json_is_plain_even_in_a_terminal(self):
        assert "\x1b" not in in_a_terminal("-m", "gpuconv", "kernels", "--json")

    def test_a_pipe_gets_no_escape_sequence(self):
        done = run_program("-c", WARMUP_OF_NOTHING, "warmup", program=())
        assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr
