"""The tour of a GPU: the right answers of gradients, what it measures in which order, and what happens to a row that
fails. On the CPU, which stands in for the GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner

import gpuconv
from bench import adjoints, check, drive, gpu, layers, record, timing, tour, verify
from bench.__main__ import main
from gpuconv.problem import Conv2dProblem

GRADIENTS = (
    "n2c4h9w8_o6kh3kw3_p1",
    "n2c4h9w8_o6kh3kw3_s2p1",
    "n1c4h10w11_o6kh3kw2_s3x2",
    "n2c4h9w8_o6kh3kw3_p4",
    "n2c4h12w13_o6kh3kw3_d2p2g2",
    "n3c2h7w7_o4kh1kw1_s2",
    "n2c4h9w8_o6kh3kw3_s2p1_nhwc",
)


@pytest.mark.parametrize("op", ["dgrad", "wgrad"])
@pytest.mark.parametrize("line", GRADIENTS)
def test_right_answers_of_gradients(line, op):
    """Those of gpuconv, which other tests compare with other oracles; and nothing else."""
    problem = Conv2dProblem.parse(f"{line}_{op}")
    given = adjoints.operands(problem)
    truth = adjoints.truth(problem, given, 10**9)
    y = np.asarray(gpu.calling(problem, backend="numpy.reference")(given.x, given.k, None))
    if op == "dgrad" and problem.layout == "NHWC":
        y = y.transpose(0, 3, 1, 2)
    assert truth.require(y).unit_a <= 1
    wrong = y.copy()
    wrong[-1, -1, -1, -1] += 1e-3
    with pytest.raises(check.Wrong):
        truth.require(wrong)
    with pytest.raises(check.Wrong):
        truth.require(y[::-1].copy() if len(y) > 1 else y[..., ::-1].copy())


@pytest.mark.parametrize("op", ["dgrad", "wgrad"])
@pytest.mark.parametrize("layout", ["", "_nhwc"])
def test_gradients_race_against_torch(op, layout):
    pytest.importorskip("torch")
    problem = Conv2dProblem.parse(f"n2c4h9w8_o6kh3kw3_s2p1{layout}_{op}")
    measured = drive.measure(problem, gpu.field(gpu.Rig(), "numpy"), timing.WallClock(), 0.1, timing.QUICK)
    assert measured["peers"]["stand-in for cudnn"]["median_s"] > 0
    assert all(entry["median_s"] > 0 for entry in measured["gpuconv"].values())
    assert len(measured["gpuconv"]) >= 2


def test_the_tour_begins_with_the_most_telling_rows():
    sections = list(tour.sections())
    first = sections[0].rows[0].problem
    assert (first.op, first.x_dtype, first.precision, first.N) == ("forward", "float32", "highest", 32)
    problems = [row.problem for section in sections for row in section.rows]
    assert {problem.op for problem in problems} == {"forward", "input_grad", "weight_grad"}
    assert {problem.N for problem in problems} >= {1, 32, 256}
    assert {problem.layout for problem in problems} == {"NCHW", "NHWC"}
    assert {problem.x_dtype for problem in problems} == {"float32", "float16", "bfloat16"}
    assert {problem.precision for problem in problems} == {"highest", "medium"}
    assert any(section.host for section in sections)
    assert any(problem.bias and problem.activation for problem in problems)
    every = {(row.suite, row.name) for row in layers.load(layers.suites())}
    assert {(row.suite, row.name) for row in sections[-1].rows} == every
    titles = [section.rows[0].suite for section in sections]
    assert len(set(titles)) == len(titles), "the summary is by title"


def test_a_row_that_fails_is_noted_and_the_next_is_measured(tmp_path):
    rows = layers.from_lines(["n1c1h9w9_o1kh3kw3", "n1c1h9w9_o1kh3kw3_p1"])
    enter = gpu.field(gpu.Rig(), "numpy.reference")

    def failing(problem, given):
        if problem == rows[0].problem:
            raise MemoryError("no room for the operands")
        return enter(problem, given)

    book = record.Record(tmp_path / "rows.json", "test", {}, rows)
    assert drive.run(rows, failing, book, timing.WallClock(), 1, timing.QUICK, forgiving=True) is None
    first, second = json.loads(book.path.read_text())["rows"]
    assert first["gpuconv"]["row"]["refused"] == "MemoryError: no room for the operands"
    assert second["gpuconv"]["numpy.reference"]["median_s"] > 0
    assert book.refusals()


def test_an_implementation_without_room_for_its_operands_leaves_the_others(monkeypatch):
    problem = Conv2dProblem.parse("n1c1h9w9_o1kh3kw3")
    rig, asked = gpu.Rig(), []

    def array(self, problem, values):
        asked.append(1)
        if len(asked) == 1:
            raise MemoryError("the first")
        return values.copy()

    monkeypatch.setattr(gpu.Rig, "array", array)
    measured = drive.measure(problem, gpu.field(rig, "numpy"), timing.WallClock(), 0.1, timing.QUICK)
    assert measured["gpuconv"]["numpy.gemm"] == {"refused": "MemoryError: the first"}
    assert measured["gpuconv"]["numpy.reference"]["median_s"] > 0


def test_a_record_is_complete_when_nothing_waits(tmp_path):
    rows = layers.from_lines(["n1c1h9w9_o1kh3kw3", "n1c1h9w9_o1kh3kw3_p1"])
    book = record.Record(tmp_path / "rows.json", "test", {}, rows)
    empty = {"gpuconv": {}, "peers": {}, "ratios": {}}
    book.add(rows[0], empty)
    book.close()
    assert not book.data["complete"]
    book.add(rows[1], empty)
    book.close()
    assert book.data["complete"]


def test_rehearsal_of_a_short_tour(tmp_path, monkeypatch):
    wanted = [list(tour.sections(tiny=True))[index] for index in (0, 2, 6)]
    short = [tour.Section(section.rows[:1], section.host) for section in wanted]
    monkeypatch.setattr(tour, "sections", lambda tiny: iter(short))
    asked = []
    done = types.SimpleNamespace(returncode=0, stdout="7 passed\n", stderr="")
    monkeypatch.setattr(verify.subprocess, "run", lambda command, **options: asked.append(command) or done)
    monkeypatch.setattr(record, "commit", lambda: None)
    path = tmp_path / "gpu.json"
    result = CliRunner().invoke(main, ["gpu", "--dry-run", "--backend", "numpy", "--minutes", "2", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "missing: cupy.gemm" in result.output or gpuconv.info().implementations["cupy.gemm"] is None
    assert f"rehearsal on the CPU: python {sys.version.split()[0]}, gpuconv" in result.output
    kept = json.loads(path.read_text())
    assert kept["complete"] is True
    assert [row["suite"] for row in kept["rows"]] == [section.rows[0].suite for section in short]
    assert "device=cpu" in kept["rows"][1]["gpuconv"]
    assert kept["verified"]["tests"] == {"outcome": "passed", "said": "7 passed"}
    assert len(asked) == 2


@pytest.mark.full
def test_rehearsal_of_the_whole_tour(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--minutes", "10", "--json", str(path)]
    done = subprocess.run(command, cwd=verify.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(path.read_text())["complete"] is True


def test_checks_that_fail_or_take_too_long_say_so():
    def python(script: str) -> list[str]:
        return [sys.executable, "-c", script]

    assert verify._timed(python("print('fine')"), 60) == {"outcome": "passed", "said": "fine"}
    failed = verify._timed(python("import sys; print('ERROR SUMMARY: 1 error'); sys.exit(9)"), 60)
    assert failed == {"outcome": "failed with exit code 9", "said": "ERROR SUMMARY: 1 error"}
    assert verify._timed(python("import time; time.sleep(60)"), 0.5)["stopped"] == "after 0.5 s"
    assert verify._timed(["/no/such/program"], 60).keys() == {"skipped"}
    assert verify._timed(python("1"), 0) == {"skipped": "out of time"}


def test_what_is_missing_has_a_remedy():
    for line in verify.missing():
        assert "install" in line or "comes with" in line or "nvidia-smi" in line, line
