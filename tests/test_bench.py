"""The benchmark's machinery on tiny problems: what it times is right, and what it writes can be read."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpuconv
from gpuconv.problem import Conv2dProblem

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench is no part of the installed package

CliRunner = pytest.importorskip("click.testing").CliRunner
pytest.importorskip("rich")

from bench import check, cpu, drive, layers, peers, plot, record, timing  # noqa: E402
from bench.__main__ import _progress, main  # noqa: E402

FILTER = "n1c1h9w8_o1kh3kw3_p1_f32"  # every peer can serve it
PROBLEMS = (
    FILTER,
    "n2c4h7w6_o6kh3kw2_s2x1p1.0x0.1g2_f32",
    "n1c3h8w8_o2kh3kw3_d2p2_reflect_bias_relu_f32",
    "n2c3h6w5_o4kh3kw3_p1_flip_nhwc_hwio_f32",
    "n1c5h6w6_o3kh1kw1_f64",
    "n1c2h6w6_o3kh3kw3_ohwi_f16",
    "n1c2h6w6_o3kh3kw3_p1_fill1.5_bf16",
)


def plain(problem: Conv2dProblem, given: check.Arrays) -> np.ndarray:
    y = gpuconv.conv2d(given.x, given.k, given.bias, **check.arguments(problem))
    return peers.to_nchw(problem)(y)


def here(enter):
    return drive.here(enter, timing.WallClock(), timing.QUICK)


def alone(call, name="gpuconv"):
    """A field of one contender of ours, whose call gets the problem and its operands."""

    def enter(problem, given):
        contender = peers.Contender("test", partial(call, problem, given), lambda y: y)
        return drive.Field({name: drive.Ours("test", contender)}, {})

    return enter


def book(path, rows):
    return record.Record(path, "test", {}, rows)


@pytest.mark.parametrize("line", PROBLEMS)
def test_truth_agrees_with_conv2d_and_with_the_reference(line):
    problem = Conv2dProblem.parse(line)
    given = check.operands(problem)
    assert all(np.count_nonzero(array) > 0.9 * array.size for array in (given.x, given.k))
    truth = check.Truth(problem, given)
    accuracy = truth.require(plain(problem, given))
    assert accuracy.unit_a <= 1
    assert accuracy.checked == 1
    if problem.x_dtype == "float32":
        wide = gpuconv.conv2d(
            given.x, given.k, given.bias, **check.arguments(problem), dtype=np.float64, backend="numpy.reference"
        )
        expected = peers.to_nchw(problem)(wide).reshape(truth.y.shape)
        np.testing.assert_allclose(truth.y, expected, rtol=1e-13, atol=1e-14)


def test_large_problems_are_checked_on_random_planes_with_the_ends():
    problem = Conv2dProblem.parse("n4c2h6w6_o25kh3kw3_f32")
    given = check.operands(problem)
    truth = check.Truth(problem, given, affordable=10 * 16 * 18)
    assert 10 <= len(truth.planes) <= 12
    assert truth.planes[0].tolist() == [0, 0]
    assert truth.planes[-1].tolist() == [3, 24]
    accuracy = truth.require(plain(problem, given))
    assert 0.1 <= accuracy.checked <= 0.12


def wrong_answers():
    def with_nan(y):
        y[0, 0, 0, 0] = np.nan
        return y

    return {
        "nothing written": np.zeros_like,
        "one element off by a thousandth": lambda y: y + 1e-3 * (np.arange(y.size).reshape(y.shape) == y.size - 1),
        "rounded to 16 bits": lambda y: y.astype(np.float16).astype(y.dtype),
        "shifted by a pixel": lambda y: np.roll(y, 1, axis=-1),
        "one NaN": with_nan,
        "an image missing": lambda y: y[1:],
    }


@pytest.mark.parametrize("name", wrong_answers())
def test_a_wrong_answer_is_refused_and_never_timed(name, tmp_path):
    spoil = wrong_answers()[name]
    calls = []

    def call(problem, given):
        calls.append(1)
        return spoil(plain(problem, given))

    rows = layers.from_lines(["n2c3h9w8_o4kh3kw3_p1_f32"])
    kept = book(tmp_path / "rows.json", rows)
    assert drive.run(rows, here(alone(call)), kept, 1) is None
    assert len(calls) == 1, "it was called again, to be timed"
    (row,) = json.loads(kept.path.read_text())["rows"]
    assert row["gpuconv"]["gpuconv"]["refused"].startswith("its answer is wrong: ")
    assert row["ratios"] == {}
    assert len(kept.refusals()) == 1


def test_a_wrong_peer_is_refused_and_the_others_race():
    problem = Conv2dProblem.parse(FILTER)

    def enter(problem, given):
        right = peers.Contender("right", partial(plain, problem, given), lambda y: y)
        wrong = peers.Contender("wrong", lambda: -plain(problem, given), lambda y: y)

        def fail():
            raise RuntimeError("no such algorithm")

        fails = peers.Contender("fails", fail, lambda y: y)
        others = {"mixed": [wrong, fails, right], "wrong": [wrong]}
        return drive.Field({"gpuconv": drive.Ours("test", right)}, others)

    measured = drive.measure(problem, enter, timing.WallClock(), 1, timing.QUICK)
    assert measured["peers"]["mixed"]["setting"] == "right"
    assert "its answer is wrong" in measured["peers"]["mixed"]["tried_s"]["wrong"]
    assert measured["peers"]["mixed"]["tried_s"]["fails"] == "RuntimeError: no such algorithm"
    assert "its answer is wrong" in measured["peers"]["wrong"]["reason"]
    assert measured["ratios"]["gpuconv"].keys() == {"mixed"}


def test_precision_decides_what_is_required_of_gpuconv():
    problem = Conv2dProblem.parse("n1c2h9w8_o4kh3kw3_p1_f32")
    given = check.operands(problem)
    rough = plain(problem, given) * np.float32(1 + 1e-5)
    with pytest.raises(check.Wrong, match="a-priori bounds"):
        check.Truth(problem, given).require(rough)
    check.Truth(problem, given).accept(rough)  # a peer may use Winograd or a Fourier transform
    relaxed = Conv2dProblem.parse("n1c2h9w8_o4kh3kw3_p1_high_f32")
    check.Truth(relaxed, given).require(rough)
    with pytest.raises(check.Wrong, match="the promise is 2e-05"):
        check.Truth(relaxed, given).require(rough * np.float32(1 + 1e-4))


def test_an_interrupted_run_leaves_every_finished_row(tmp_path):
    rows = layers.from_lines(PROBLEMS[:4])
    kept = book(tmp_path / "new" / "rows.json", rows)
    first = json.loads(kept.path.read_text())
    assert (first["complete"], first["rows"], len(first["not_reached"])) == (False, [], 4)

    seen = []

    def call(problem, given):
        if str(problem) == PROBLEMS[2]:
            seen.append(json.loads(kept.path.read_text()))
            raise KeyboardInterrupt
        return plain(problem, given)

    assert drive.run(rows, here(alone(call)), kept, 1) == "interrupted"
    last = json.loads(kept.path.read_text())
    assert [row["problem"] for row in last["rows"]] == list(PROBLEMS[:2]) == [r["problem"] for r in seen[0]["rows"]]
    assert (last["complete"], last["stopped"]) == (False, "interrupted")
    assert last["not_reached"] == [f"given: {line}" for line in PROBLEMS[2:4]]
    assert [path.name for path in kept.path.parent.iterdir()] == ["rows.json"]
    for row in last["rows"]:
        assert Conv2dProblem.parse(row["problem"]).flops == row["flops"]


def test_out_of_time_says_what_was_not_reached(tmp_path):
    rows = layers.from_lines(PROBLEMS)
    kept = book(tmp_path / "rows.json", rows)
    assert "out of time" in drive.run(rows, here(alone(plain)), kept, 0)
    assert len(kept.data["not_reached"]) == len(PROBLEMS)


def test_race_takes_turns_and_counts():
    log = []
    contenders = {"a": partial(log.append, "a"), "b": partial(log.append, "b")}
    effort = timing.Effort(rounds=4, repeats=12, least=3, shortest=0, pause=0)
    timed = timing.race(contenders, timing.WallClock(), 1, effort)
    assert timed["a"].repeats == timed["b"].repeats == 12
    assert timed["a"].min <= timed["a"].median <= timed["a"].max
    turns = [name for name, before in zip(log, [None, *log], strict=False) if name != before]
    assert "".join(turns) == "abababa"  # rough times; then A B, B A, A B, B A, where equal neighbours join


def test_time_spent_elsewhere_is_noticed():
    watching = timing.busy_elsewhere()
    assert watching() is None, "too short to say"
    time.sleep(0.3)
    share = watching()
    assert share is None or 0 <= share <= 1


def test_pause_waits_for_threads_that_still_run(monkeypatch):
    slept = []
    used = iter([0.00, 0.02, 0.02, 0.03, 0.03, 0.03])  # CPU seconds before and after three slices
    fake = SimpleNamespace(sleep=slept.append, process_time=lambda: next(used))
    monkeypatch.setattr(timing, "time", fake)
    timing.WallClock().pause(0.05)
    assert slept == pytest.approx([0.05, 0.01, 0.01, 0.01])


def test_summary_is_the_geometric_mean_of_the_ratios():
    rows = [
        {"suite": "s", "name": name, "ratios": {"gpuconv": {"peer": ratio}}} for name, ratio in (("p", 0.5), ("q", 8.0))
    ]
    rows[1]["unsteady"] = ["peers peer"]
    facts = record.summary([*rows, {"suite": "t", "name": "r", "ratios": {}}])
    expected = {"geometric_mean": 2.0, "rows": 2, "unsteady": 1, "lowest": ["p", 0.5], "highest": ["q", 8.0]}
    assert facts == {"s": {"gpuconv": {"peer": expected, "best peer": expected}}}


def test_best_peer_is_the_fastest_of_each_row():
    ratios = ({"a": 2.0, "b": 8.0}, {"a": 9.0, "b": 4.5}, {"b": 3.0})
    rows = [{"suite": "s", "name": str(i), "ratios": {"plain call": found}} for i, found in enumerate(ratios)]
    against = record.summary(rows)["s"]["plain call"]
    assert list(against) == ["a", "b", "best peer"]
    assert against["best peer"]["geometric_mean"] == 3.0
    assert (against["best peer"]["lowest"], against["best peer"]["highest"]) == (["0", 2.0], ["1", 4.5])
    assert record.best_ratio(rows[2], "prepared") is None


def test_every_layer_of_the_table_is_a_problem():
    rows = layers.load(layers.suites(), batch=2, dtype="float16", layout="NHWC")
    assert len(rows) >= 50
    assert all(row.problem.N == 2 and Conv2dProblem.parse(str(row.problem)) == row.problem for row in rows)
    small = [layers.tiny(row).problem for row in layers.load(layers.suites())]
    assert all(problem.flops < 10**7 for problem in small)
    with pytest.raises(ValueError, match="no suite nets"):
        layers.load(["nets"])


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize(
    "line", [FILTER, "n1c1h9w8_o1kh3kw3_f32", "n2c3h9w70_o6kh5kw3_p2x1g3_f32", "n1c1h80w70_o2kh9kw3_f64"]
)
def test_peers_agree_in_every_setting(name, line):
    peer, problem = peers.PEERS[name], Conv2dProblem.parse(line)
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    if name in ("onnxruntime", "torch-ahead") and problem.x_dtype == "float64":
        (reason,) = peer.unsupported(problem)
        assert "float32" in reason
        return
    assert peer.unsupported(problem) == []
    given = check.operands(problem)
    truth = check.Truth(problem, given)
    with peers.torch_restored():
        for contender in peer.contenders(problem, given, 1):
            contender.activate()
            truth.accept(contender.to_numpy(contender.call()))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("torch-ahead", "n2c4h9w8_o6kh3kw2_s2x1p1g2_bias_relu_f32"),
        ("torch-ahead", "n2c4h9w8_o6kh3kw2_s2x1p1g2_nhwc_bias_relu_f32"),
        ("onnxruntime", "n2c4h9w8_o6kh3kw2_s2x1d1x2p1.0x0.1g2_bias_relu_f32"),
    ],
)
def test_a_network_layer_agrees_in_every_setting(name, line):
    peer, problem = peers.PEERS[name], Conv2dProblem.parse(line)
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    assert peer.unsupported(problem) == []
    given = check.operands(problem)
    truth = check.Truth(problem, given)
    settings = []
    with peers.torch_restored():
        for contender in peer.contenders(problem, given, 1):
            contender.activate()
            for _ in range(2):  # the first call may prepare what the second uses
                truth.accept(contender.to_numpy(contender.call()))
            settings.append(contender.setting)
    assert any("ahead" in setting for setting in settings)
    if name == "torch-ahead":
        layout = "channels_last" if problem.layout == "NHWC" else "contiguous"
        assert all(layout in setting for setting in settings)


def test_a_peer_says_everything_that_it_cannot_do():
    problem = Conv2dProblem.parse("n1c4h9w8_o2kh4kw3_s2p1_edge_flip_bias_f16")
    reasons = "; ".join(peers.PEERS["opencv"].unsupported(problem))
    for part in ("zeros", "flip", "sum over channels", "stride", "half an odd kernel", "bias", "float32"):
        assert part in reasons
    assert "both sides" in peers.PEERS["torch"].unsupported(Conv2dProblem.parse("n1c1h9w8_o1kh2kw2_p0.1x0.1_f32"))[0]


def test_missing_peers_are_named(monkeypatch, tmp_path):
    for peer in peers.PEERS.values():
        monkeypatch.setattr(type(peer), "library", "no_such_library")
    rows = layers.from_lines([FILTER])
    kept = book(tmp_path / "rows.json", rows)
    drive.run(rows, here(cpu.field(list(peers.PEERS), 1, None)), kept, 1)
    (row,) = json.loads(kept.path.read_text())["rows"]
    assert all(row["gpuconv"][label]["median_s"] > 0 for label in ("plain call", "prepared"))
    assert "best_peer" not in row
    for name, peer in peers.PEERS.items():
        assert row["peers"][name]["reason"] == f"no_such_library is not installed; pip install {peer.install}"


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_cpu_command(tmp_path, monkeypatch):
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")  # put back afterwards
    monkeypatch.setenv("VECLIB_MAXIMUM_THREADS", "1")
    path = tmp_path / "cpu.json"
    result = invoke(
        "cpu", "--problem", FILTER, "--peers", "scipy", "--threads", 1, "--minutes", 0.02, "--json", path,
        "--backend", "numpy.reference",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    kept = json.loads(path.read_text())
    assert kept["complete"] is True
    assert kept["settings"]["threads"] == 1
    assert {"python", "numpy", "gpuconv"} <= kept["versions"].keys()
    assert kept["machine"]["cpus"] >= 1
    (row,) = kept["rows"]
    assert row["gpuconv"].keys() == {"plain call", "prepared"}
    assert all(entry["implementation"] == "numpy.reference" for entry in row["gpuconv"].values())
    if "reason" not in row["peers"]["scipy"]:
        assert row["best_peer"] == "scipy"
        for label, entry in row["gpuconv"].items():
            ratio = row["peers"]["scipy"]["median_s"] / entry["median_s"]
            assert row["ratios"][label]["scipy"] == pytest.approx(ratio, rel=1e-2)


def test_quick_goes_through_everything_and_judges_no_time(tmp_path, monkeypatch):
    for name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        monkeypatch.setenv(f"{name}_NUM_THREADS", "1")
    monkeypatch.setenv("VECLIB_MAXIMUM_THREADS", "1")
    path, picture = tmp_path / "cpu.json", tmp_path / "plots" / "cpu.png"
    result = invoke(
        "cpu", "--quick", "--threads", 1, "--peers", "scipy", "--suites", "depthwise,imaging", "--batch", 2,
        "--json", path, "--plot", picture, "--backend", "numpy.reference",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "rehearsal" in result.output
    kept = json.loads(path.read_text())
    assert kept["complete"] is True
    assert (kept["bench"], kept["settings"]["quick"]) == ("cpu rehearsal", True)
    assert {row["suite"] for row in kept["rows"]} == {"depthwise", "imaging"}
    assert all(Conv2dProblem.parse(row["problem"]).N == 2 for row in kept["rows"])
    if plot.missing() is None and peers.PEERS["scipy"].missing() is None:
        assert picture.read_bytes().startswith(b"\x89PNG")
        again = tmp_path / "again.png"
        assert invoke("plot", path, "--plot", again).exit_code == 0
        assert again.stat().st_size == pytest.approx(picture.stat().st_size, rel=0.01)
    else:
        assert "no plot: " in result.output


def test_quick_fails_where_it_did_not_reach_the_end(tmp_path):
    result = invoke("cpu", "--quick", "--minutes", 0, "--peers", "", "--json", tmp_path / "cpu.json")
    assert result.exit_code == 1
    assert "not reached" in result.output


def drawn(rows, **more):
    facts = {"cpu": "a processor", "vector": "AVX2"}
    settings = {"threads": 2, "dtype": "float32", "layout": "NCHW", "precision": "highest", "device": "cpu"}
    data = {"bench": "cpu", "rows": rows, "settings": settings, "machine": facts, "versions": {"numpy": "2.0"}}
    return data | {"date": "2026-01-02T03:04:05+00:00", "not_reached": []} | more


@pytest.mark.parametrize("count", [1, 7, 60])
def test_plot_of_any_number_of_rows_and_labels(count, tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(count)
    rows = [
        {
            "suite": f"suite {i * 4 // count}",
            "name": f"layer {i}",
            "ratios": {label: {"torch": float(rng.lognormal()), "x": 90.0} for label in ("plain call", "prepared")},
            "best_peer": "torch",
        }
        for i in range(count)
    ]
    rows[0]["ratios"].pop("prepared")  # it was refused
    rows.append({"suite": "suite 0", "name": "nobody", "ratios": {"plain call": {}}})
    path = tmp_path / "plot.png"
    assert plot.draw(drawn(rows), path) is None
    assert path.read_bytes().startswith(b"\x89PNG")


def test_why_there_is_no_plot(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    if plot.missing() is None:
        assert "no row has both" in plot.draw(drawn([]), path)
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert plot.draw(drawn([]), path) == "no plot: matplotlib is not installed; pip install matplotlib"
    assert not path.exists()


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    row = layers.from_lines([FILTER])[0]
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
        with _progress(3) as (begin, say):
            begin(row)
            say("given: one row: torch 1.5")
        shown = capsys.readouterr().err
        assert "given: one row: torch 1.5" in shown
        assert ("/3" in shown) == terminal


def test_gpu_rehearsal(tmp_path):
    path = tmp_path / "gpu.json"
    result = invoke("gpu", "--dry-run", "--suites", "grouped", "--layout", "NHWC", "--json", path)
    assert result.exit_code == 0, result.output
    assert "rehearsal" in result.output
    kept = json.loads(path.read_text())
    assert kept["complete"] is True
    assert kept["bench"] == "gpu rehearsal"
    assert len(kept["rows"]) == 2
    for row in kept["rows"]:
        assert row["gpuconv"].keys() >= {"numpy.gemm", "numpy.reference"}
        assert all(entry["median_s"] > 0 for entry in row["gpuconv"].values())
        assert row["peers"].keys() == {"stand-in for cudnn"}


def test_event_clock_queues_idle_work_first():
    log = []

    class Event:
        def record(self):
            log.append("event")

    clock = timing.EventClock(
        Event, lambda start, stop: 6.0, lambda: log.append("wait"), lambda: log.append("idle work")
    )
    assert clock.sample(lambda: log.append("call"), 3) == pytest.approx(0.002)
    assert log == ["idle work", "event", "call", "call", "call", "event", "wait"]
    timed = timing.race({"a": lambda: None}, clock, 0, timing.Effort(rounds=2, least=2, shortest=0, pause=0))
    assert timed["a"].median == pytest.approx(0.006)
    assert timed["a"].wall is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu", "--suites", "nets"], "no suite nets"),
        (["cpu", "--peers", "matlab"], "no peer matlab"),
        (["cpu", "--backend", "jax"], "backend must be one of"),
        (["cpu", "--problem", "7x7"], "no problem line"),
        (["cpu", "--problem", "n1c1h4w4_o1kh3kw3_f32", "--precision", "high"], "a problem line has its own"),
    ],
)
def test_wrong_options_are_explained(arguments, message, monkeypatch):
    monkeypatch.setattr("os.environ", {})
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_without_a_gpu_the_gpu_command_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("gpuconv.dispatch.gpu_missing", lambda: [("cupy.gemm", "CuPy is not installed")])
    result = invoke("gpu")
    assert result.exit_code == 1
    assert "no usable GPU: cupy.gemm: CuPy is not installed" in result.output
