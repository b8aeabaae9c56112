"""``autotune`` and what it remembers, with a clock that is made up: no GPU is needed, and none is timed."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from running import SIMULATED

if SIMULATED:
    pytest.skip("plans are remembered for real GPUs", allow_module_level=True)

import gpuconv
from gpuconv import dispatch, tuning
from gpuconv.backends.numba_cuda import gpus, implicit_gemm, implicit_gemm_mma, tuned
from gpuconv.backends.protocol import Target
from gpuconv.errors import NoBackendError
from gpuconv.problem import Conv2dProblem

NAME = "numba_cuda.implicit_gemm_mma"
LINE = "n8c64h28w28_o64kh3kw3_p1_f16"
LIMIT = 2**28


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that Numba could use, as far as plans can tell; its clock gives the times that a test sets."""
    place = tmp_path / "cache"
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(place))
    for module in (implicit_gemm, implicit_gemm_mma, tuned.launch):
        monkeypatch.setattr(module, "unavailable", lambda: None)
    monkeypatch.setattr(gpus, "gpu", lambda ordinal: gpus.KNOWN["h100"])
    monkeypatch.setattr(tuned, "software", lambda: "software 1")
    monkeypatch.setattr(dispatch, "_gpus", lambda: (1, 0))
    monkeypatch.setattr(implicit_gemm_mma, "_capability", lambda ordinal: (9, 0))
    monkeypatch.setitem(dispatch._cuda, "used", False)
    dispatch.choose.cache_clear()
    times = [3e-5, 1e-5, 2e-5]

    def measure(module: Any, problem: Any, ordinal: Any, plans: list) -> list:
        return [None if plan is None else times[index] for index, plan in enumerate(plans)]

    monkeypatch.setattr(tuning, "_measure", measure)
    yield place / tuned.FILE
    dispatch.choose.cache_clear()


def plan_of(line: str = LINE, limit: int = LIMIT, module: Any = implicit_gemm_mma) -> Any:
    return module.plan(Conv2dProblem.parse(line), Target("cuda", 0), limit)


def shape(plan: Any) -> list[tuple[str, int]]:
    return [(cut.tile.name, cut.parts) for cut in plan.config["launches"]]


def ways(line: str = LINE) -> list[list[tuple[str, int]]]:
    found = implicit_gemm_mma.configurations(Conv2dProblem.parse(line), Target("cuda", 0), 3)
    return [[(candidate.tile.name, candidate.parts) for candidate in way] for way in found]


def test_the_fastest_is_remembered_and_used_by_the_next_plan(gpu):
    first = gpuconv.explain(LINE, backend=NAME, device="cuda")
    assert "predicted" in str(first)
    report = gpuconv.autotune(LINE, backend=NAME)
    assert [row.seconds for row in report.measured] == [1e-5, 2e-5, 3e-5]
    assert str(gpu) in report.note
    assert "10.0 µs" in str(report)
    assert shape(plan_of()) == ways()[1]
    again = gpuconv.explain(LINE, backend=NAME, device="cuda")
    assert "tuned: 10 µs measured on NVIDIA H100 80GB HBM3" in str(again)
    # What is another call has another choice.
    for other in ("n9c64h28w28_o64kh3kw3_p1_f16", "n8c64h28w28_o64kh3kw3_p1_relu_f16"):
        assert "predicted" in plan_of(other).detail
    assert "predicted" in plan_of(limit=LIMIT - 1).detail


def test_it_takes_what_explain_takes(gpu):
    kernel = np.zeros((64, 64, 3, 3), np.float16)
    gpuconv.autotune((8, 64, 28, 28), kernel, padding=1, input_dtype="float16", backend=NAME)
    gpuconv.autotune(LINE, backend=NAME, workspace_limit=2**27)
    entries = json.loads(gpu.read_text())["entries"]
    assert [key.rpartition("_")[2] for key in entries] == ["f16 | workspace 268435456", "f16 | workspace 134217728"]
    with pytest.raises(TypeError, match="leave out padding"):
        gpuconv.autotune(LINE, padding=1)


def test_gradients_in_several_launches(gpu):
    line = "n8c64h28w28_o64kh3kw3_s2p1_dgrad_f16"
    gpuconv.autotune(line, backend=NAME)
    assert shape(plan_of(line)) == ways(line)[1]
    assert len(shape(plan_of(line))) == 4


@pytest.mark.parametrize(("which", "value"), [("gpu", "a100"), ("software", "software 2"), ("precision", "high")])
def test_the_key_holds_every_fact(gpu, monkeypatch, which, value):
    line = "n8c64h28w28_o64kh3kw3_p1_medium_f32" if which == "precision" else LINE
    gpuconv.autotune(line, backend=NAME)
    assert "tuned" in plan_of(line).detail
    if which == "gpu":
        monkeypatch.setattr(gpus, "gpu", lambda ordinal: gpus.KNOWN[value])
    elif which == "software":
        monkeypatch.setattr(tuned, "software", lambda: value)
    assert "tuned" not in plan_of(line.replace("medium", value) if which == "precision" else line).detail


def test_float32_units_are_tuned_too(gpu):
    line = LINE.replace("f16", "f32")
    gpuconv.autotune(line, backend="numba_cuda.implicit_gemm")
    assert "tuned" in plan_of(line, module=implicit_gemm).detail


def test_what_has_one_way_to_run_is_told(gpu):
    report = gpuconv.autotune("n1c3h8w8_o4kh3kw3_f32", device="cpu")
    assert "has one way to run" in report.note
    assert report.measured == ()
    assert not gpu.exists()


def test_empty_problems_are_told(gpu):
    assert "nothing to compute" in gpuconv.autotune((0, 4, 8, 8), (4, 4, 3, 3), backend=NAME, precision="high").note


def test_nothing_can_run(gpu):
    with pytest.raises(NoBackendError, match="tensor cores round float32"):
        gpuconv.autotune("n1c3h8w8_o4kh3kw3_f32", backend=NAME)


# ---- the file


def test_the_file_is_private_and_can_be_read(gpu):
    gpuconv.autotune(LINE, backend=NAME)
    assert stat.S_IMODE(gpu.stat().st_mode) == 0o600
    assert stat.S_IMODE(gpu.parent.stat().st_mode) == 0o700
    content = json.loads(gpu.read_text())
    ((key, entry),) = content["entries"].items()
    assert key == f"NVIDIA H100 80GB HBM3 | software 1 | {NAME} | {Conv2dProblem.parse(LINE)} | workspace {LIMIT}"
    assert entry == {"configuration": [list(way) for way in ways()[1]], "seconds": 1e-5}
    assert not [path for path in gpu.parent.iterdir() if path.name.startswith(".part")]


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "not json": lambda text: "\x00\xff",
    "another format": lambda text: text.replace("tuning 1", "tuning 2"),
    "not a table": lambda text: "[1, 2]",
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_not_used_and_is_replaced(gpu, damage):
    gpuconv.autotune(LINE, backend=NAME)
    gpu.write_text(DAMAGE[damage](gpu.read_text()))
    with pytest.warns(RuntimeWarning, match="is damaged, or of another version"):
        assert "predicted" in plan_of().detail
    with pytest.warns(RuntimeWarning, match="is damaged"):
        tuned.remember(str(tuned.key(NAME, Conv2dProblem.parse(LINE), Target("cuda", 0), LIMIT)), *best())
    assert "tuned" in plan_of().detail


def best() -> tuple[Any, float]:
    return implicit_gemm_mma.configurations(Conv2dProblem.parse(LINE), Target("cuda", 0), 1)[0], 1e-5


def test_a_damaged_file_is_complained_of_once_while_it_stays_as_it_is(gpu):
    gpu.parent.mkdir(mode=0o700)
    gpu.write_text("{")
    with pytest.warns(RuntimeWarning, match="damaged"):
        plan_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of()


ENTRIES = {
    "unknown tile": [["7x7x7", 1]],
    "no parts": [["128x64x3", 0]],
    "a part left empty": [["128x64x3", 13]],
    "a number that is none": [["128x64x3", True]],
    "too many launches": [["128x64x3", 1], ["128x64x3", 1]],
    "not a list": 5,
    "not pairs": ["128x64x3"],
    "unhashable": [[["128x64x3"], 1]],
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_does_not_fit_is_not_used(gpu, name):
    gpuconv.autotune(LINE, backend=NAME)
    content = json.loads(gpu.read_text())
    (key,) = content["entries"]
    content["entries"][key]["configuration"] = ENTRIES[name]
    gpu.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="is not one of this version's"):
        assert "predicted" in plan_of().detail


def test_a_link_and_an_open_folder_are_not_used(gpu, tmp_path):
    gpuconv.autotune(LINE, backend=NAME)
    elsewhere = tmp_path / "elsewhere.json"
    gpu.rename(elsewhere)
    gpu.symlink_to(elsewhere)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert "predicted" in plan_of().detail
    gpu.unlink()
    elsewhere.rename(gpu)
    assert "tuned" in plan_of().detail
    gpu.parent.chmod(0o755)
    assert "predicted" in plan_of().detail
    report = gpuconv.autotune(LINE, backend=NAME)
    assert "nothing is remembered" in report.note and "open to others" in report.note


def test_many_writers_lose_nothing(gpu):
    found = best()[0]
    keys = [f"key {index}" for index in range(24)]
    threads = [threading.Thread(target=tuned.remember, args=(key, found, 1e-6)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads(gpu.read_text())["entries"]) == set(keys)


def test_the_oldest_entries_make_room(gpu, monkeypatch):
    monkeypatch.setattr(tuned, "_ENTRIES", 3)
    for index in range(5):
        tuned.remember(f"key {index}", *best())
    tuned.remember("key 2", *best())
    assert list(json.loads(gpu.read_text())["entries"]) == ["key 3", "key 4", "key 2"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(gpu):
    gpu.parent.mkdir(mode=0o500)
    assert "cannot be written" in str(tuned.remember("key", *best()))


# ---- the measurement


def test_runs_are_timed_in_turn_and_the_median_counts():
    calls: list[str] = []
    scripted = {"a": iter([9, 1, 2, 3, 4, 5, 99]), "b": iter([7] * 7)}
    runs = [lambda: calls.append("a"), None, lambda: calls.append("b")]

    def clock(run: Any) -> float:
        run()
        return float(next(scripted[calls[-1]]))

    assert tuning.rounds(runs, clock) == [4.0, None, 7.0]
    assert calls == ["a", "b"] * 7


def test_launches_are_timed_as_a_graph(monkeypatch):
    """As many as make a measurement long enough, and nothing of what the host takes to launch them."""
    told: list[str] = []
    now = {"ms": 0.0}

    class Event:
        at = 0.0

        def record(self, stream: Any) -> None:
            self.at = now["ms"]

        def synchronize(self) -> None:
            told.append("wait")

    class Graph:
        def launch(self, stream: Any) -> None:
            told.append("replay")
            now["ms"] += 0.5

    class Stream:
        def begin_capture(self) -> None:
            told.append("begin")

        def end_capture(self) -> Any:
            told.append("end")
            return Graph()

    def run() -> None:
        told.append("run")
        now["ms"] += 100

    events = SimpleNamespace(Event=Event, get_elapsed_time=lambda begin, end: end.at - begin.at)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=events))
    seconds = tuning.clock(Stream())
    assert seconds(run) == seconds(run) == 0.5e-3
    once = ["run", "begin", "run", "end", *["replay", "wait"] * 2]
    assert told == once + ["replay"] * 4 + ["wait"] + ["replay"] * 4 + ["wait"]


@pytest.mark.parametrize("line", [LINE, "n2c6h5w4_o4kh3kw2_p1g2_nhwc_hwio_f32", "n2c6h5w4_o4kh3kw2_wgrad_f32"])
def test_made_up_operands_have_the_form_of_real_ones(line, monkeypatch):
    """Of every op and layout, as implementations are given them."""
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(asarray=np.asarray))
    problem = Conv2dProblem.parse(line)
    rng = np.random.default_rng(0)
    first, second, out = (tuning._operand(problem, which, given) for which, given in enumerate((rng, rng, None)))
    groups, per_group = problem.groups, problem.C // problem.groups
    image = (problem.N, groups, per_group, problem.H, problem.W)
    kernel = (groups, problem.O // groups, per_group, problem.KH, problem.KW)
    result = (problem.N, groups, problem.O // groups, problem.OH, problem.OW)
    assert first.shape == image
    assert (second.shape, out.shape) == ((result, kernel) if problem.op == "weight_grad" else (kernel, result))
    assert first.astype(float).std() > 0.5
    if problem.layout == "NHWC":
        assert first.strides[2] == first.itemsize


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("GPUCONV_CACHE_DIR", str(tmp_path / "cache"))
    dispatch.choose.cache_clear()
    report = gpuconv.autotune(LINE, backend=NAME)
    assert report.measured[0].seconds is not None
    assert "tuned" in gpuconv.explain(LINE, backend=NAME, device="cuda").plan.detail
    dispatch.choose.cache_clear()
