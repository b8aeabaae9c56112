"""Where a call runs, what explain says about it, and that both agree; without a GPU too."""

from __future__ import annotations

import gc
import sys
import tracemalloc
import warnings
from typing import Any

import numpy as np
import oracle
import pytest
import units
from hypothesis import given
from hypothesis import strategies as st
from running import SERVE_EVERYTHING, skip_costly

import gpuconv
from gpuconv import Conv2dProblem, conv2d, dispatch, dtypes, explain, request

GPU_NAMES = tuple(name for name in dispatch.serving("forward") if dispatch.DEVICES[dispatch.library_of(name)] == "cuda")
PROVEN = tuple(name for name in GPU_NAMES if not dispatch.is_experimental(name))
CPU_NAMES = tuple(name for name in dispatch.serving("forward") if name not in GPU_NAMES)
# What NumPy's own casting and indexing loops buffer: 8,192 elements for each of two or three operands.
LOOP_BUFFERS = 192 * 1024

without_gpu = pytest.mark.skipif(not dispatch.gpu_missing(), reason="a GPU, or a simulated one, is usable here")

RNG = np.random.default_rng(7)
X = RNG.integers(-9, 9, (2, 4, 9, 8)).astype(np.float32)
K = RNG.integers(-9, 9, (16, 4, 3, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def no_policy(monkeypatch):
    monkeypatch.delenv("GPUCONV_FALLBACK", raising=False)


# ---- a GPU that is not there


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_falling_back_warns_once_at_the_callers_line(device):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = conv2d(X, K, padding=1, device=device)
        line = sys._getframe().f_lineno - 1
    assert [warning.category for warning in caught] == [gpuconv.DeviceFallbackWarning]
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)
    text = str(caught[0].message)
    assert text.startswith(f"conv2d: device={device!r}") and "CPU" in text
    for name in PROVEN:
        assert name in text, "the warning says why each implementation is unusable"
    assert type(y) is np.ndarray and y.tobytes() == conv2d(X, K, padding=1, device="cpu").tobytes()


@without_gpu
def test_the_policy_on_falling_back(monkeypatch):
    wanted = conv2d(X, K)
    monkeypatch.setenv("GPUCONV_FALLBACK", "silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(conv2d(X, K, device="cuda"), wanted)
    for policy in ("warn", ""):
        monkeypatch.setenv("GPUCONV_FALLBACK", policy)
        with pytest.warns(gpuconv.DeviceFallbackWarning):
            assert np.array_equal(conv2d(X, K, device="cuda"), wanted)
    monkeypatch.setenv("GPUCONV_FALLBACK", "error")
    with pytest.raises(gpuconv.NoBackendError, match="GPUCONV_FALLBACK=error") as raised:
        conv2d(X, K, device="cuda")
    assert all(name in str(raised.value) for name in PROVEN)
    monkeypatch.setenv("GPUCONV_FALLBACK", "nonsense")
    with pytest.raises(ValueError, match="GPUCONV_FALLBACK must be warn, error or silent; got 'nonsense'"):
        conv2d(X, K, device="cuda")


@pytest.mark.parametrize("policy", ["error", "nonsense"])
def test_the_policy_is_not_asked_where_no_gpu_was(policy, monkeypatch):
    monkeypatch.setenv("GPUCONV_FALLBACK", policy)
    for where in ({}, {"device": "cpu"}, {"backend": "numpy"}):
        conv2d(X, K, **where)
    if dispatch.gpu_missing():
        conv2d(X, K, device="auto")


@without_gpu
def test_explain_knows_the_policy(monkeypatch):
    assert "warn" in explain(X, K, device="cuda").note
    monkeypatch.setenv("GPUCONV_FALLBACK", "silent")
    assert "warn" not in explain(X, K, device="cuda").note
    monkeypatch.setenv("GPUCONV_FALLBACK", "error")
    report = explain(X, K, device="cuda")
    assert report.implementation is None and "GPUCONV_FALLBACK" in str(report), "conv2d raises a NoBackendError here"


@without_gpu
@pytest.mark.parametrize("device", [None, "auto", "cuda"])
@pytest.mark.parametrize("backend", ["cupy", "cupy.gemm", "numba_cuda", "numba_cuda.direct"])
def test_a_forced_backend_never_falls_back(backend, device, monkeypatch):
    monkeypatch.setenv("GPUCONV_FALLBACK", "silent")
    with pytest.raises(gpuconv.NoBackendError) as raised:
        conv2d(X, K, backend=backend, device=device)
    first, *reasons = str(raised.value).splitlines()
    assert first.startswith("conv2d: nothing can run n2c4h9w8_o16kh3kw3_f32")
    assert len(reasons) == len([name for name in GPU_NAMES if name.startswith(backend)])
    for line in reasons:
        assert line.strip().startswith(backend) and "install" in line, f"no remedy in {line!r}"
    report = explain(X, K, backend=backend, device=device)
    assert report.implementation is None and "install" in report.note


def test_a_forced_implementation_that_cannot_says_what_can():
    x = np.full((1, 1, 3, 3), 2**40)
    with pytest.raises(gpuconv.NoBackendError, match=r"numpy\.gemm: .*numpy\.reference"):
        conv2d(x, x, backend="numpy.gemm")
    assert conv2d(x, x, backend="numpy").item() == (9 * 2**80 + 2**63) % 2**64 - 2**63


@without_gpu
def test_auto_takes_the_cpu_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(conv2d(X, K, device="auto"), conv2d(X, K))
        assert explain(X, K, device="auto").target.device == "cpu"


# ---- explain


def test_explain_from_shapes_arrays_and_a_line_agree():
    answers = [
        explain((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3),
        explain(np.broadcast_to(np.float32(0), (8, 3, 224, 224)), (64, 3, 7, 7), stride=2, padding=3),
        explain("n8c3h224w224_o64kh7kw7_s2p3_f32"),
    ]
    for report in answers:
        assert report == answers[0] and str(report) == str(answers[0])
    report = answers[0]
    assert report.output_shape == (8, 64, 112, 112)
    assert report.padding == ((3, 3), (3, 3))
    assert report.flops == 2 * 8 * 64 * 112 * 112 * 3 * 49
    assert report.bytes == 4 * (8 * 3 * 224 * 224 + 64 * 3 * 49 + 8 * 64 * 112 * 112)
    assert report.accumulation == "float32" and 0 < report.workspace <= 256 * 2**20
    assert [verdict.name for verdict in report.table if verdict.chosen] == [report.implementation]
    assert {verdict.name for verdict in report.table} == set(dispatch.serving("forward"))
    assert all(verdict.reasons for verdict in report.table)
    text = str(report)
    for piece in (
        "n8c3h224w224_o64kh7kw7_s2p3_f32",
        report.implementation,
        "1.888 GFLOP",
        *dispatch.serving("forward"),
    ):
        assert piece in text


def test_explain_takes_the_dtypes_from_arrays_and_the_rest_from_input_dtype():
    assert explain(X.astype(np.float16), K).problem.x_dtype == "float16"
    assert explain((5, 5), (3, 3), input_dtype=np.int8).problem.y_dtype == "int32"
    assert explain(np.ones((5, 5)), (3, 3), input_dtype="int8").problem.k_dtype == "int8"
    assert explain((5, 5), (3, 3), True).problem.bias
    assert not explain((5, 5), (3, 3), False).problem.bias
    assert explain((4, 2, 5, 5), (3, 2, 1, 1), np.ones(3)).problem.bias


@pytest.mark.parametrize(
    "extra", [{"stride": 2}, {"bias": True}, {"dtype": "float64"}, {"padding": "same"}, {"layout": "zz"}], ids=str
)
def test_a_line_stands_for_every_argument(extra):
    """What would be ignored is refused: the answer would be about another problem."""
    with pytest.raises((TypeError, ValueError), match=r"^explain: .*line"):
        explain("n1c1h5w5_o1kh3kw3_f32", **extra)


@pytest.mark.parametrize("line", ["", "abc", "n1c1h5w5", "n1c1h5w5_o1kh3kw3_zz_f32", "n1c1h2w2_o1kh3kw3_f32"])
def test_explain_refuses_what_is_no_line(line):
    with pytest.raises(ValueError) as raised:
        explain(line)
    assert str(raised.value).startswith("explain: ")


@without_gpu
def test_explain_lists_what_a_gpu_would_take():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = explain(X, K, device="cuda")
    assert report.implementation in CPU_NAMES
    rows = {verdict.name: " ".join(verdict.reasons) for verdict in report.table}
    for name in GPU_NAMES:
        assert "install" in rows[name], f"no remedy for {name}"
    assert "conv2d would warn" in report.note and any(name in report.note for name in GPU_NAMES)


def test_explain_computes_nothing(monkeypatch):
    for name in dispatch.serving("forward"):
        monkeypatch.setattr(dispatch.implementation(name), "run", None)
    huge = np.broadcast_to(np.float32(1), (64, 256, 4096, 4096))
    arguments = (huge, np.broadcast_to(np.float32(1), (512, 256, 3, 3)), np.zeros(512))
    explain(*arguments, padding="same")
    tracemalloc.start()
    try:
        report = explain(*arguments, padding="full")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.implementation is not None and peak < 256 * 1024


# ---- what explain announces, conv2d keeps

KEPT = {
    "plain": ((2, 8, 90, 90), (8, 8, 3, 3), "float32", {}),
    "nhwc": ((2, 80, 80, 16), (12, 16, 3, 3), "float32", {"layout": "NHWC", "padding": 1}),
    "grouped": ((2, 16, 70, 70), (16, 4, 3, 3), "float32", {"groups": 4, "stride": 2, "padding": 2}),
    "depthwise": ((1, 16, 90, 90), (16, 1, 3, 3), "float32", {"groups": 16, "padding": "same"}),
    "reflect": ((1, 8, 120, 120), (4, 8, 3, 3), "float64",
                {"padding": 50, "dilation": 20, "padding_mode": "reflect", "stride": 3}),
    "wrap_nhwc": ((2, 60, 60, 8), (8, 8, 3, 3), "float32", {"layout": "NHWC", "padding": 9, "padding_mode": "wrap"}),
    "one_by_one": ((2, 32, 60, 60), (16, 32, 1, 1), "float32", {}),
    "float16": ((2, 8, 80, 80), (8, 8, 3, 3), "float16", {"activation": "relu"}),
    "int8": ((2, 8, 80, 80), (8, 8, 3, 3), "int8", {"padding": 1, "x_zero_point": 3, "k_zero_point": 2}),
    "int64": ((2, 8, 60, 60), (4, 8, 3, 3), "int64", {"padding": 1, "padding_mode": "edge"}),
    "complex64": ((2, 8, 60, 60), (8, 8, 3, 3), "complex64", {}),
    "foreign": ((2, 8, 160, 160), (8, 8, 3, 3), ">f4", {}),
    "many_weights": ((1, 128, 6, 6), (160, 128, 3, 3), "float16", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CPU_NAMES)
@pytest.mark.parametrize("case", KEPT)
def test_scratch_stays_within_what_explain_announces(case, name, monkeypatch):
    x_shape, k_shape, dtype, options = KEPT[case]
    x, k = np.ones(x_shape, dtype), np.ones(k_shape, dtype)
    skip_costly(name, x)
    bias = np.ones(k_shape[0], x.dtype.newbyteorder("=")) if dtype != "int8" else None
    module, ran = dispatch.implementation(name), []
    run = module.run
    monkeypatch.setattr(module, "run", lambda plan, *rest: (ran.append(plan), run(plan, *rest))[1])
    wanted, served = None, 0
    for limit in (None, 400_000, 800_000, 1_600_000, 6_400_000):
        arguments: dict[str, Any] = {**options, "backend": name, "workspace_limit": limit}
        report = explain(x, k, bias, **arguments)
        if report.implementation is None:
            with pytest.raises((MemoryError, gpuconv.NoBackendError)):
                conv2d(x, k, bias, **arguments)
            continue
        wanted = conv2d(x, k, bias, **arguments) if wanted is None else wanted
        conv2d(x, k, bias, **arguments)  # what is compiled or read from a cache is no scratch
        out = np.full_like(wanted, 77)
        ran.clear()
        tracemalloc.start()
        try:
            conv2d(x, k, bias, out=out, **arguments)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # Operands in another byte order are copied before an implementation sees them, where the limit has room.
        copies = request.copied_to_swap((x, k), request.workspace("conv2d", limit)) or 0
        assert [(plan.workspace + copies, plan.detail) for plan in ran] == [(report.workspace, report.plan.detail)]
        assert report.implementation == name
        assert limit is None or report.workspace <= limit
        assert peak <= report.workspace + LOOP_BUFFERS, f"{peak} bytes for {report.workspace} with limit {limit}"
        assert np.array_equal(out, wanted)
        served += 1
    if served == 0:
        assert name not in SERVE_EVERYTHING, "no limit served at all"
        refused = [verdict for verdict in explain(x, k, bias, **options).table if verdict.name == name]
        assert "can run" not in refused[0].reasons[0], "no limit served at all"


@pytest.mark.parametrize("case", KEPT)
def test_explain_names_what_conv2d_runs(case, monkeypatch):
    x_shape, k_shape, dtype, options = KEPT[case]
    x, k = np.ones(x_shape, dtype), np.ones(k_shape, dtype)
    ran = []
    for name in CPU_NAMES:
        monkeypatch.setattr(dispatch.implementation(name), "run", lambda plan, *rest, name=name: ran.append(name))
    conv2d(x, k, device="cpu", **options)
    assert ran == [explain(x, k, device="cpu", **options).implementation]


def test_a_problem_beyond_any_address_space_is_an_answer():
    """A line can describe what no machine holds, and implementations count in machine integers."""
    for line, size in (
        ("n9999999999999999999c1h5w5_o1kh3kw3_f32", 9999999999999999999 * 25 * 4),
        ("n9999999999999999999c1h5w5_o1kh3kw3_dgrad_f32", 9999999999999999999 * 25 * 4),
        ("n1c1h1w9999999999999999999_o1kh1kw9999999999999999999_f64", 9999999999999999999 * 8),
    ):
        for device in ("cpu", "auto"):
            report = explain(line, device=device)
            assert report.implementation is None
            assert f"{size} bytes, beyond any address space" in report.note
            assert report.to_dict()["implementations"]


def test_more_taps_than_one_can_go_through_are_an_answer():
    report = explain("n1c1h1w1000000000_o1kh1kw1000000000_f32", device="cpu")
    assert "more than 65536 taps" in str(report)


# ---- problem lines


@st.composite
def problems(draw: st.DrawFn) -> Conv2dProblem:
    groups, I, per_group = draw(st.integers(1, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 4))
    steps = st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 2**31 - 1)))
    pads = st.integers(0, 9) | st.tuples(*[st.tuples(st.integers(0, 9), st.integers(0, 2**31 - 1))] * 2)
    kernel_layout, layout = draw(st.sampled_from(["OIHW", "HWIO", "OHWI"])), draw(st.sampled_from(["NCHW", "NHWC"]))
    x_dtype, k_dtype = (draw(st.sampled_from(sorted(dtypes.CODES))) for _ in range(2))
    default = dtypes.promoted(x_dtype, k_dtype)
    results = [name for name in ("int64", *dtypes._FLOATS, *dtypes._COMPLEX) if dtypes.castable(default, name)]
    O, KH, KW = groups * per_group, draw(st.integers(1, 7)), draw(st.integers(1, 7))
    N, C, H, W = draw(st.integers(0, 9)), groups * I, draw(st.integers(0, 99)), draw(st.integers(1, 10**12))
    options: dict[str, Any] = {"padding": draw(pads | st.sampled_from(["same", "same_lower", "full"]))}
    options["padding_mode"] = draw(st.sampled_from(["constant", "reflect", "symmetric", "edge", "wrap"]))
    if options["padding_mode"] == "constant" and draw(st.booleans()):
        if dtypes.is_integer(x_dtype):
            options["padding_value"] = draw(st.integers(*dtypes.RANGES[x_dtype]))
        else:
            values = st.floats(-6e4, 6e4) | st.sampled_from([float("inf"), float("-inf"), float("nan"), 1e-30])
            options["padding_value"] = draw(values)
            if dtypes.is_complex(x_dtype) and draw(st.booleans()):
                options["padding_value"] += 1j * draw(st.floats(-9, 9))
    elif x_dtype in ("int8", "uint8"):
        options["x_zero_point"] = draw(st.integers(*dtypes.RANGES[x_dtype]))
    if k_dtype in ("int8", "uint8") and not options.get("padding_value"):
        options["k_zero_point"] = draw(st.booleans())
    result = draw(st.sampled_from([None, *results]))
    if not dtypes.is_complex(result or default):
        options["activation"] = draw(st.sampled_from([None, "relu"]))
    x = (N, C, H, W) if layout == "NCHW" else (N, H, W, C)
    k = {"OIHW": (O, I, KH, KW), "HWIO": (KH, KW, I, O), "OHWI": (O, KH, KW, I)}[kernel_layout]
    try:
        return Conv2dProblem.of(
            x, k, x_dtype=x_dtype, k_dtype=k_dtype, dtype=result, bias=draw(st.booleans()), stride=draw(steps),
            dilation=draw(steps), groups=groups, flip=draw(st.booleans()), layout=layout, kernel_layout=kernel_layout,
            precision=draw(st.sampled_from(["highest", "high", "medium"])), **options,
        )  # fmt: skip
    except ValueError as error:  # a window that does not fit
        assert any(word in str(error) for word in ("larger than", "empty axis", "padding must be below"))
        return Conv2dProblem(1, 1, 5, 5, 1, 3, 3)


@given(problem=problems())
def test_a_problem_prints_and_parses_back(problem):
    line = str(problem)
    assert line.isascii() and not any(character.isspace() for character in line)
    assert str(Conv2dProblem.parse(line)) == line
    assert Conv2dProblem.parse(line) == problem, line


def test_defaults_are_left_out_of_a_line():
    plain = {"x_shape": (1, 2, 9, 9), "k_shape": (4, 2, 3, 3)}
    assert str(Conv2dProblem.of(**plain)) == "n1c2h9w9_o4kh3kw3_f32"
    for options, line in {
        "stride=2": "n1c2h9w9_o4kh3kw3_s2_f32",
        "dilation=(1, 2)": "n1c2h9w9_o4kh3kw3_d1x2_f32",
        "padding=((1, 0), (2, 3))": "n1c2h9w9_o4kh3kw3_p1.0x2.3_f32",
        "padding=1, padding_value=0.5": "n1c2h9w9_o4kh3kw3_p1_fill0.5_f32",
        "padding=0, padding_mode='edge', padding_value=0": "n1c2h9w9_o4kh3kw3_f32",
        "padding=1, padding_mode='circular'": "n1c2h9w9_o4kh3kw3_p1_wrap_f32",
        "flip=True, bias=True, activation='relu'": "n1c2h9w9_o4kh3kw3_flip_bias_relu_f32",
        "dtype='float64', precision='medium'": "n1c2h9w9_o4kh3kw3_medium_f32-f64",
        "x_dtype='uint8', k_dtype='int8', dtype='int32'": "n1c2h9w9_o4kh3kw3_u8*i8",
    }.items():
        assert str(Conv2dProblem.of(**plain, **eval(f"dict({options})"))) == line


@pytest.mark.parametrize(
    "line",
    ["n1c1h9w9_o1kh3kw3_f32_f64", "n1c1h9w9_o1kh3kw3_s1_s2_f32", "n1c1h9w9_o1kh3kw3_kz_f32", "n\u0661c1h9w9_o1kh3kw3"],
    ids=["two dtypes", "two strides", "zero point of float32", "digits of another script"],
)
def test_a_line_that_no_problem_prints_is_refused(line):
    with pytest.raises((TypeError, ValueError)):
        Conv2dProblem.parse(line)


# ---- what is kept


def test_plans_are_kept_and_bounded():
    gpuconv.clear()
    info = dispatch.choose.cache_info
    assert info().currsize == 0
    conv2d(X, K, device="cpu")
    conv2d(X, K, device="cpu")
    assert (info().hits, info().misses) == (1, 1)
    bound = info().maxsize
    assert bound is not None and bound <= 4096
    for width in range(3, bound + 53):
        explain((3, width), (3, 3))
    assert info().currsize == bound
    gpuconv.clear()
    assert info().currsize == 0
    assert np.array_equal(conv2d(X, K), oracle.answer(X, K).y)


@pytest.mark.parametrize("calls", [400, pytest.param(10_000, marks=pytest.mark.full)])
def test_varied_calls_do_not_make_the_process_grow(calls):
    """Neither plans nor arrays pile up: every call is another problem, served or refused, as shapes come and go."""
    rng = np.random.default_rng(0)

    def varied(count: int) -> None:
        for _ in range(count):
            C, O, H, W = map(int, rng.integers(1, 9, 4))
            x, k = np.ones((1, C, H + 3, W + 3), rng.choice(["f4", "f2", "i1"])), np.ones((O, C, 3, 3), np.float32)
            arguments = {"stride": int(rng.integers(1, 4)), "padding": int(rng.integers(3)), "bias": np.ones(O)}
            backend = str(rng.choice(["numba_cpu.strip", "numpy.gemm", "numpy.reference"]))
            conv2d(x, k, **arguments, backend="numpy" if x.dtype == "i1" else backend)
            with pytest.raises(ValueError, match="channels"):
                conv2d(x, np.ones((O, C + 1, 3, 3)), **arguments)

    def objects() -> int:
        gpuconv.clear()
        gc.collect()
        return sys.getallocatedblocks()

    for dtype in ("f4", "f2"):  # a compiled kernel, and what Numba remembers of it, stays
        for count in (1, 40):
            conv2d(np.ones((count, 5, 9, 9), dtype), np.ones((3, 5, 3, 3), np.float32), backend="numba_cpu.strip")
    varied(calls // 2)
    before = objects()
    varied(calls)
    grown = objects() - before
    assert grown < 1000, f"{grown} objects more after {calls} calls"


def test_a_problem_with_nan_padding_is_found_again():
    line = "n1c1h9w9_o1kh3kw3_p1_fillnan_f32"
    assert Conv2dProblem.parse(line) == Conv2dProblem.parse(line)
    for _ in range(2):
        misses = dispatch.choose.cache_info().misses
        conv2d(X, K, padding=1, padding_value=float("nan"))
    assert dispatch.choose.cache_info().misses == misses


def test_info_lists_every_implementation():
    report = gpuconv.info()
    assert set(report.implementations) == set(dispatch.TABLE)
    assert all(report.implementations[name] is None for name in CPU_NAMES)
    assert report.versions["numpy"] == np.__version__
    text = str(report)
    assert all(name in text for name in dispatch.TABLE) and gpuconv.__version__ in text
    for name, reason in report.implementations.items():
        assert reason is None or "install" in reason or "nvidia-smi" in reason, f"no remedy for {name}"


def test_units_agree_with_the_plain_answer():
    """The operands of this file, against the oracle."""
    units.assert_exact(conv2d(X, K, padding=1), oracle.answer(X, K, padding=1))
