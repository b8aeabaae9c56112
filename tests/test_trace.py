"""What traces with channels and other paddings hold, `gpuconv trace`, and the HTML of notebooks as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("click", reason="the command line needs the extra `cli`")

from cli_tools import assert_ran, assert_refused, run, run_program

import gpuconv
from gpuconv import conv2d, notebook, trace, trace_page
from gpuconv.explanation import Verdict

RAMP = np.arange(10, 251, 10).reshape(5, 5)
EDGES = [[1, 0, -1]] * 3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Channels and padding


@pytest.mark.parametrize("mode", ["constant", "reflect", "symmetric", "edge", "wrap", "zeros", "replicate", "circular"])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), ((2, 1), ((1, 2), (3, 0)), 2), (1, "same", 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_padding_agree_with_conv2d(mode, stride, padding, dilation, channels):
    rng = np.random.default_rng(4)
    x, k = rng.integers(-9, 10, (channels, 6, 7)), rng.integers(-9, 10, (channels, 3, 2))
    steps = trace(x, k, stride, padding, dilation, padding_mode=mode)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    np.testing.assert_array_equal(steps.output, conv2d(x, k[None], **options)[0])
    padded = np.pad(x, ((0, 0), *steps.padding), mode="constant" if mode == "zeros" else _numpy_name(mode))
    (s, t), (d, e) = steps.stride, steps.dilation
    for step in steps:
        i, j = step.position
        window = padded[:, i * s :: d, j * t :: e][:, :3, :2]
        np.testing.assert_array_equal(step.patch, window)
        np.testing.assert_array_equal(step.products, window * k)
        np.testing.assert_array_equal(step.running.ravel(), np.cumsum(step.products))
        np.testing.assert_array_equal(step.channel_sums, step.products.sum(axis=(1, 2)))
        assert step.sum == step.channel_sums.sum() == step.running.ravel()[-1]
    np.testing.assert_array_equal(trace(x, k[None], stride, padding, dilation, padding_mode=mode).output, steps.output)


def _numpy_name(mode):
    return {"replicate": "edge", "circular": "wrap"}.get(mode, mode)


def test_the_running_sum_ends_in_the_output_to_the_bit():
    rng = np.random.default_rng(5)
    for step in trace(rng.normal(size=(4, 9, 9)), rng.normal(size=(4, 5, 5)) * 1e8):
        total = 0.0
        for product, running in zip(step.products.ravel().tolist(), step.running.ravel().tolist(), strict=True):
            total += product
            assert running == total
        assert step.sum == total


def test_two_channels_in_print():
    steps = trace([RAMP, RAMP], [EDGES, [[0, 0.5, 0]] * 3], 2)
    assert str(steps).splitlines() == [
        "Input 2×5×5, kernel 2×3×3, stride 2, no padding: output 2×2",
        "",
        "| Position | Channel 0                           | Channel 1                         | Output |",
        "|----------|-------------------------------------|-----------------------------------|--------|",
        "| (0,0)    | (10−30)+(60−80)+(110−130) = −60     | 0.5·20 + 0.5·70 + 0.5·120 = 105   | 45     |",
        "| (0,1)    | (30−50)+(80−100)+(130−150) = −60    | 0.5·40 + 0.5·90 + 0.5·140 = 135   | 75     |",
        "| (1,0)    | (110−130)+(160−180)+(210−230) = −60 | 0.5·120 + 0.5·170 + 0.5·220 = 255 | 195    |",
        "| (1,1)    | (130−150)+(180−200)+(230−250) = −60 | 0.5·140 + 0.5·190 + 0.5·240 = 285 | 225    |",
    ]
    first = str(steps.step(0, 0)).splitlines()
    assert first[:2] == ["Position (0,0)", "Channel 0"] and first[7] == "Channel 1"
    assert first[-2:] == ["Sum of channels = (−60) + 105 = 45", "Output[0,0] = 45"]
    assert steps.step(0, 0).calculation == "[(10−30)+(60−80)+(110−130)] + [0.5·20 + 0.5·70 + 0.5·120]"
    edge = trace(RAMP, EDGES, padding=1, padding_mode="replicate")
    assert edge.caption == "Input 5×5, kernel 3×3, stride 1, edge padding 1: output 5×5"
    assert "padding=((1, 1), (1, 1)), dilation=(1, 1), padding_mode='edge'" in repr(edge)


@pytest.mark.parametrize(
    ("x", "k", "options", "said"),
    [
        (np.ones((2, 3, 3)), np.ones((3, 3)), {}, r"k must have three axes, \(C, KH, KW\), or four, \(1, C, KH, KW\)"),
        (np.ones((2, 3, 3)), np.ones((3, 3, 3)), {}, "k has 3 channels .* but x has 2"),
        (np.ones((2, 3, 3)), np.ones((4, 2, 3, 3)), {}, r"k has 4 filters .*k\[0\]"),
        (np.ones((0, 3, 3)), np.ones((0, 3, 3)), {}, "at least one"),
        (np.ones((1, 1, 3, 3)), np.ones((3, 3)), {}, "x must have two axes"),
        (RAMP, EDGES, {"padding_mode": "mirror"}, "padding_mode must be one of .*; got 'mirror'"),
        (RAMP, EDGES, {"padding_mode": None}, "padding_mode must be one of"),
        (np.ones((0, 3)), [[1]], {"padding": 1, "padding_mode": "edge"}, "cannot extend an empty axis"),
    ],
)
def test_refusals(x, k, options, said):
    with pytest.raises(ValueError, match=f"trace: .*{said}"):
        trace(x, k, **options)


def test_an_empty_input_is_all_padding():
    steps = trace(np.ones((0, 2)), [[3]], padding=1)
    assert steps.shape == (2, 4) and not steps.output.any()
    assert "0×2" in steps.to_html()


# The page as text


class Outline(HTMLParser):
    """Tags that are opened and closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        assert len(dict(attrs)) == len(attrs)
        if tag not in ("meta", "br", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_one_file():
    page = Outline(trace(RAMP, EDGES).to_html())
    assert page.tags.count("script") == 2 and page.tags.count("style") == 1
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "srcset", "style"} and not any(name.startswith("on") for name in names)
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    assert "http" not in "".join(page.words)
    assert len({value for name, value in page.attributes if name == "id"}) == sum(n == "id" for n, _ in page.attributes)


def test_the_data_cannot_leave_their_element():
    text = trace_page._json({"a": "</script><!--<script>&", "b": "\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!--<script>&", "b": "\u2028"}


@pytest.mark.parametrize(
    ("x", "k", "options", "said"),
    [
        (np.ones((49, 5)), EDGES, {}, "48 rows of padded input, and here are 49"),
        (np.ones((5, 40)), EDGES, {"padding": (0, 5)}, "48 columns of padded input, and here are 50"),
        (np.ones((3, 40, 40)), np.ones((3, 1, 1)), {}, "4096 pixels of padded input, and here are 4800"),
        (np.ones((17, 17)), np.ones((17, 17)), {}, "256 weights, and here are 289"),
        (np.ones((48, 48)), np.ones((5, 5)), {}, "30000 products, and here are 48400"),
    ],
)
def test_pages_that_would_be_too_large(x, k, options, said):
    steps = trace(x, k, **options)
    with pytest.raises(ValueError, match=f"Trace.to_html: a page shows at most {said}; crop x"):
        steps.to_html()
    fragment = Outline(steps._repr_html_())
    assert "iframe" not in fragment.tags and steps.caption in fragment.words


def test_the_template_is_part_of_the_package():
    data = resources.files("gpuconv") / "data"
    for name in ("trace.html", "trace.css", "trace.js"):
        assert (data / name).read_text(encoding="utf-8")


# Notebooks


def test_fragments_are_well_formed_and_escaped():
    hostile = "<script>alert('1')</script>&\"'>"
    explanation = gpuconv.explain((1, 3, 9, 9), (4, 3, 3, 3), device="cpu")
    told = gpuconv.Explanation(
        explanation.problem, explanation.target, hostile, None, (Verdict(hostile, "cpu", True, (hostile,)),), hostile
    )
    layer = gpuconv.Conv2d(np.ones((2, 1, 3, 3), np.float32), np.ones(2), padding="same", backend="numpy.gemm")
    kernel = gpuconv.Conv2d([[0.5, -1j]])
    for value, words in (
        (explanation, ["numpy.reference", str(explanation.problem), "why"]),
        (told, [hostile]),
        (gpuconv.info(), ["numpy.reference", "CPU kernels"]),
        (layer, ["2×1×3×3, float32", "2, float64", "same", "numpy.gemm", repr(layer)]),
        (kernel, ["0.5", "0−1j"]),
        (gpuconv.Conv2d(np.ones((1, 1), np.int8), dtype=np.int64, k_zero_point=3), ["1×1, int8", "int64", "3"]),
        (trace(RAMP, EDGES), ["(10−30)+(60−80)+(110−130)"]),
        (trace(np.ones((12, 12)), [[1]]), ["… and 104 more"]),
    ):
        fragment = Outline(value._repr_html_())
        assert "script" not in fragment.tags
        for word in words:
            assert word in fragment.words, (word, fragment.words)
    assert Outline(notebook.fields([(hostile, hostile)])).words == [hostile] * 2
    assert Outline(notebook.numbers([[hostile]])).words == [hostile]
    framed = Outline(notebook.page(f"<p>{hostile}</p>\n", hostile, 9))
    assert framed.tags == ["iframe"]
    assert dict(framed.attributes)["srcdoc"] == f"<p>{hostile}</p>\n"
    assert dict(framed.attributes)["sandbox"] == "allow-scripts"


# The command


class TestCommand:
    def test_the_table(self):
        result = run("trace")
        assert_ran(result)
        assert result.stdout == f"{trace(RAMP, EDGES)}\n"

    def test_every_option(self):
        np.save("k.npy", np.array([[1, 2], [3, 4]]))
        Path("x.csv").write_text("1,2.5,3\n4,5,nan\n")
        options = ("--stride", "2,1", "--padding", "0:1,2:0", "--dilation", "1,2", "--padding-mode", "edge")
        result = run("trace", "--x", "x.csv", "--k", "k.npy", *options)
        assert_ran(result)
        expected = trace(
            [[1, 2.5, 3], [4, 5, np.nan]], [[1, 2], [3, 4]], (2, 1), ((0, 1), (2, 0)), (1, 2), padding_mode="edge"
        )
        assert result.stdout == f"{expected}\n"

    @pytest.mark.parametrize(
        ("arguments", "x", "k"),
        [
            (("--size", "3,4"), np.arange(10, 121, 10).reshape(3, 4), EDGES),
            (("--size", "2,3,3", "--k", "box-3"), np.arange(10, 181, 10).reshape(2, 3, 3), np.full((2, 3, 3), 1 / 9)),
            (("--x", "1 2 3; 4 5 6", "--k", "1, -1"), [[1, 2, 3], [4, 5, 6]], [[1, -1]]),
            (("--x", "1 2;3 4 | 5 6;7 8;", "--k", "-1j|0.5"), [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[[-1j]], [[0.5]]]),
        ],
    )
    def test_rows_and_ramps(self, arguments, x, k):
        result = run("trace", *arguments)
        assert_ran(result)
        assert result.stdout == f"{trace(x, k)}\n"

    def test_the_page(self):
        result = run("trace", "--html", "out.html", "--size", "4")
        assert_ran(result)
        assert "Input 4×4, kernel 3×3, stride 1, no padding: output 2×2; 4 steps → out.html (" in result.stdout
        assert Path("out.html").read_text(encoding="utf-8") == trace(RAMP.ravel()[:16].reshape(4, 4), EDGES).to_html()

    def test_a_browser_is_opened_when_asked_for(self, monkeypatch):
        opened = []
        monkeypatch.setattr("webbrowser.open", opened.append)
        assert_ran(run("trace", "-o", "a page.html", "--open"))
        assert opened == [Path("a page.html").resolve().as_uri()]

    def test_json(self):
        result = run("trace", "--json", "--x", "1 2;3 nan", "--k", "2 -1", "--padding", "0,1")
        assert_ran(result)
        answer = json.loads(result.stdout, parse_constant=pytest.fail)
        assert answer["output"] == [[-1, 0, 4], [-3, "nan", "nan"]]
        assert answer["padding"] == [[0, 0], [1, 1]]
        assert answer["steps"][1] == {
            "position": [0, 1], "rows": [0], "columns": [0, 1], "patch": [[1, 2]], "products": [[2, -2]],
            "running": [[2, 0]], "sum": 0, "calculation": "2·1 − 1·2",
        }  # fmt: skip
        assert answer["steps"][0]["columns"] == [-1, 0]
        answer = json.loads(run("trace", "--json", "--x", "1", "--k", "1j").stdout)
        assert answer["output"] == [["1j"]]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("--x", "1 2; 3"), "row 1 has 1 numbers where the first has 2"),
            (("--x", "1 2 | 3"), "row 0 of channel 1 has 1 numbers"),
            (("--x", "1 | 2; 3"), "channel 1 has 2 rows where the first has 1"),
            (("--x", "1 two"), "'two' is not a number"),
            (("--x", "1; ;2"), "row 1 has 0 numbers"),
            (("--x", ""), "--x is empty; give rows"),
            (("--x", ".txt"), "input file"),
            (("--x", "none.npy"), "cannot read input file none.npy: No such file or directory"),
            (("--x", "picture.png"), "the extension must be one of"),
            (("--k", "sobel"), "did you mean sobel-"),
            (("--k", "none.csv"), "cannot read kernel file none.csv"),
            (("--size", "0"), "--size must be N, H,W or C,H,W"),
            (("--size", "1,2,3,4"), "--size must be"),
            (("--size", "100000"), "--size must be"),
            (("--size", "five"), "'five' is not a shape"),
            (("--size", "3", "--x", "1"), "--size is for the ramp"),
            (("--stride", "0"), "trace: stride must be at least 1"),
            (("--size", "2"), "3×3"),
            (("--open",), "--open needs a page to open"),
            (("--json", "--html", "y.html"), "ask for one"),
            (("--html", "y.html", "--size", "60"), "a page shows at most 48 rows"),
            (("--html", "none/y.html"), "cannot write none/y.html"),
            (("--html", "."), "it is a directory"),
        ],
    )
    def test_refusals_are_one_line(self, arguments, said, capsys):
        from gpuconv.cli import cli

        with pytest.raises(SystemExit) as stopped:
            cli.main(["trace", *arguments], prog_name="gpuconv")
        printed = capsys.readouterr()
        assert printed.out == ""
        assert_refused(stopped.value.code, printed.err, said)
        assert not list(Path().glob("*.html"))

    def test_it_needs_click_alone(self):
        program = (
            "import sys\n"
            "class Absent:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name in ('rich', 'PIL'):\n"
            "            raise ModuleNotFoundError(name, name=name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            "sys.argv = ['gpuconv', 'trace', '-o', 'page.html']\n"
            "from gpuconv.__main__ import main\n"
            "main()\n"
        )
        result = run_program(program=("-c", program))
        assert result.returncode == 0, result.stderr
        assert Path("page.html").exists()
