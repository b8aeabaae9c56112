"""The tour of a GPU: the right answers of gradients, what it measures in which order, and what happens to a row that
fails. On the CPU, which stands in for the GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gpuconv
from bench import adjoints, apart, check, drive, gpu, layers, peers, record, rules, timing, tour, verify
from bench.__main__ import main
from gpuconv import cutting
from gpuconv.backends.protocol import Target
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
    assert {problem.precision for problem in problems} == {"highest", "high", "medium"}
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
    measuring = drive.here(failing, timing.WallClock(), timing.QUICK)
    assert drive.run(rows, measuring, book, 1, forgiving=True) is None
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
    done = {"outcome": "passed", "said": "7 passed"}
    monkeypatch.setattr(verify, "_timed", lambda command, seconds: asked.append(command) or done)
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


def test_the_rules_of_thumb_are_measured_one_value_against_another(monkeypatch):
    """Each row's plan is made and run under the value, which is gone afterwards; on NumPy in the GPU's stead."""
    seen = []
    numpy_gemm = gpuconv.dispatch.implementation("numpy.gemm")
    for rule in rules.rules():
        module = importlib.import_module(f"gpuconv.{rule.module}")
        kept = getattr(module, rule.attribute)
        assert rule.host or rule.attribute in ("block", "choose_tile") or kept in rule.values.values()
        with monkeypatch.context() as patch:
            for name in ("plan", "run"):
                real = getattr(numpy_gemm, name)

                def noted(*given, name=name, real=real, module=module, rule=rule):
                    seen.append((name, getattr(module, rule.attribute)))
                    return real(*given)

                patch.setattr(numpy_gemm, name, noted)
            row = rule.rows(tiny=True)[0]
            seen.clear()
            measured = drive.measure(row.problem, rules.field(gpu.Rig(), rule), timing.WallClock(), 0.1, timing.QUICK)
        assert list(measured["gpuconv"]) == list(rule.values)
        assert all(entry["median_s"] > 0 for entry in measured["gpuconv"].values())
        assert getattr(module, rule.attribute) is kept
        if not rule.host:
            expected = {(name, value) for value in rule.values.values() for name in ("plan", "run")}
            assert set(seen) == expected


# What says it was not measured, and the suite of the tour that measures it.
MEASURED_BY = {
    "dispatch": "rule of thumb: thin, direct or a matrix product",
    "backends.numba_cuda.cost": "forward float32 highest NCHW N=32",  # the plan's prediction beside the time
    "backends.numba_cuda.depthwise": "rule of thumb: backends.numba_cuda.depthwise_shape.block",
    "backends.numba_cuda.winograd": "forward float32 high NCHW N=32",
}


def test_whatever_was_not_measured_on_a_gpu_has_a_step_of_the_tour():
    suites = {section.rows[0].suite for section in tour.sections()}
    assert suites >= {*MEASURED_BY.values(), *(rule.title for rule in rules.rules())}
    known = {*MEASURED_BY, *(rule.module for rule in rules.rules())}
    root = verify.ROOT / "gpuconv"
    unmeasured = {
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if "numba_cpu" not in path.parts and re.search(r"[Nn]ot measured( on a GPU)?( yet)?\b", path.read_text())
    }
    assert unmeasured <= known, "no step of the tour measures them"
    assert unmeasured >= {"cutting", "dispatch", "backends.cupy_gemm"}


@pytest.mark.parametrize(
    ("line", "name"),
    [("n32c64h56w56_o2kh3kw3_p1_f32", "numba_cuda.direct"), ("n64c32h56w56_o32kh3kw3_g32_f32", "numba_cuda.depthwise"),
     ("n32c64h56w56_o64kh3kw3_f32", "cupy.gemm"), ("n32c64h56w56_o64kh3kw3_f32", "numba_cuda.implicit_gemm")],
)  # fmt: skip
def test_explain_says_what_was_not_measured(line, name):
    problem = Conv2dProblem.parse(line)
    target = Target("cuda", 0)
    assert "not measured" in gpuconv.dispatch.implementation(name).plan(problem, target, 2**28).detail
    rules_of = gpuconv.dispatch.preferred(problem, "cuda")[1]
    assert all("not measured" in why for why in rules_of.values()) and bool(rules_of) == (
        problem.O // problem.groups < 8
    )
    pieces = cutting.cut(name, problem, target, 2**28)
    assert "not measured" in cutting.described(pieces)


def stumbling(tmp_path: Path) -> apart.Ways:
    """NumPy's own under four names: who raises, dies, hangs or breaks the GPU, each from so many columns on."""

    def fail():
        raise MemoryError("no room")

    ways = {"raises": (9, fail), "dies": (10, partial(os._exit, 7)), "hangs": (11, partial(time.sleep, 600)),
            "breaks": (12, partial((tmp_path / "broken").touch))}  # fmt: skip

    def enter(problem, given):
        plain = partial(gpu.calling(problem, backend="numpy.reference"), given.x, given.k, given.bias)
        ours = {}
        for name, (columns, stumble) in ways.items():
            call = (lambda stumble=stumble: stumble() or plain()) if problem.W >= columns else plain
            ours[name] = drive.Ours(name, peers.Contender("plain call", call, peers.to_nchw(problem)))
        return drive.Field(ours, {})

    def broken() -> str:
        if not (tmp_path / "broken").exists():
            return ""
        (tmp_path / "broken").unlink()
        return "cudaErrorIllegalAddress"

    return (lambda row: (enter, timing.WallClock())), broken


def test_who_hangs_dies_or_breaks_the_gpu_costs_its_own_figures_alone(tmp_path, monkeypatch):
    """And, here after a single row, it takes part in no other; each row is on file before the next begins."""
    monkeypatch.setattr(apart, "_STRIKES", 1)
    rows = layers.from_lines([f"n1c1h9w{columns}_o1kh3kw3" for columns in (8, 9, 10, 11, 12, 13)])
    book = record.Record(tmp_path / "rows.json", "test", {}, rows)
    measuring = apart.Apart(stumbling, (tmp_path,), timing.QUICK, patience=8)
    kept = []
    try:
        assert drive.run(rows, measuring, book, 10, lambda line: kept.append(book.path.read_text())) is None
    finally:
        measuring.close()
    assert [len(json.loads(text)["rows"]) for text in kept] == list(range(1, 7))
    found = []
    for row in json.loads(book.path.read_text())["rows"]:
        said = {label: entry.get("refused", "") for label, entry in row["gpuconv"].items()}
        assert all(said[label] or row["gpuconv"][label]["median_s"] > 0 for label in said)
        found.append(said)
    names = "raises", "dies", "hangs", "breaks"
    expected = ["", "r", "rd", "rdh", "rdhb", "rdhb"]
    assert ["".join(name[0] for name in names if said[name]) for said in found] == expected
    assert found[1]["raises"] == "MemoryError: no room"
    assert found[2]["dies"] == "its process died with exit code 7"
    assert "hung: nothing came of it in 8 s" in found[3]["hangs"]
    assert found[4]["breaks"] == "it left the device broken: cudaErrorIllegalAddress"
    assert found[5]["hangs"].startswith("left out, because of n1c1h9w11")
    assert measuring.strikes == {"dies": 1, "hangs": 1, "breaks": 1}


def no_ways() -> apart.Ways:
    raise RuntimeError("the GPU is lost")


def test_where_no_process_can_measure_any_more_the_run_ends(tmp_path):
    rows = layers.from_lines(["n1c1h9w9_o1kh3kw3", "n1c1h9w9_o1kh3kw3_p1"])
    book = record.Record(tmp_path / "rows.json", "test", {}, rows)
    stopped = drive.run(rows, apart.Apart(no_ways, (), timing.QUICK), book, 1, forgiving=True)
    assert stopped == "no process can measure any more; the last ended with code 1"
    assert json.loads(book.path.read_text())["stopped"] == stopped


@pytest.mark.full
def test_rehearsal_of_the_whole_tour(tmp_path):
    """One thread each, because libraries that wait for one another's take minutes on a busy machine."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--minutes", "60", "--json", str(path)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=verify.ROOT, env=os.environ | threads, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads(path.read_text())["complete"] is True


def test_checks_that_fail_or_take_too_long_say_so():
    def python(script: str) -> list[str]:
        return [sys.executable, "-c", script]

    assert verify._timed(python("print('fine')"), 60) == {"outcome": "passed", "said": "fine"}
    failed = verify._timed(python("import sys; print('ERROR SUMMARY: 1 error'); sys.exit(9)"), 60)
    assert failed == {"outcome": "failed with exit code 9", "said": "ERROR SUMMARY: 1 error"}
    assert verify._timed(python("import time; time.sleep(60)"), 0.5)["stopped"] == "after 0.5 s"
    # Its child holds the pipes, and would hold the GPU.
    grandchild = python("import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])")
    start = time.monotonic()
    assert verify._timed(grandchild, 1).keys() == {"stopped", "said"}
    assert time.monotonic() - start < 30
    assert verify._timed(["/no/such/program"], 60).keys() == {"skipped"}
    assert verify._timed(python("1"), 0) == {"skipped": "out of time"}


def test_what_is_missing_has_a_remedy():
    for line in verify.missing():
        assert "install" in line or "comes with" in line or "nvidia-smi" in line, line
