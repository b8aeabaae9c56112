"""What ``info`` says of CUDA libraries that do not fit together, and ``GPUCONV_DEBUG``; on facts and fakes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import gpuconv
from gpuconv import debug, diagnosis, dispatch, machine
from gpuconv.backends import cupy_gemm
from gpuconv.diagnosis import Facts, mismatches

NEW = {"cupy-cuda13x": "14.2.0", "nvidia-nvvm": "13.0.88"}
OLD = {"cupy-cuda12x": "14.2.0", "nvidia-cuda-nvcc-cu12": "12.4.131"}


@pytest.mark.parametrize(
    "facts",
    [
        Facts(),
        Facts(None, (13, 0), NEW),
        Facts((13, 0), (13, 0), NEW),
        Facts((13, 0), (13, 2), NEW),  # CUDA keeps to its promise within a major version
        Facts((13, 1), None, {"nvidia-nvvm": "13.1.5"}),
        Facts((12, 4), (12, 9), OLD),
        Facts((13, 0), None, {"nvidia-nvvm": "unknown"}),
    ],
)
def test_what_fits_is_not_mentioned(facts):
    assert mismatches(facts) == []


def test_cupy_for_a_newer_cuda_than_the_drivers():
    (found,) = mismatches(Facts((12, 4), (13, 0), {"cupy-cuda13x": "14.2.0"}))
    assert "built for CUDA 13" in found
    assert "serves CUDA 12.4 at most" in found
    assert 'pip uninstall -y cupy-cuda13x and pip install "gpuconv[cuda12]"' in found


def test_cupy_for_an_older_cuda_than_the_drivers():
    (found,) = mismatches(Facts((13, 0), (12, 9), OLD))
    assert "this works" in found
    assert 'pip uninstall -y cupy-cuda12x and pip install "gpuconv[cuda13]"' in found


def test_both_cupys():
    (found,) = mismatches(Facts((13, 0), (13, 0), NEW | {"cupy-cuda12x": "14.0.0"}))
    assert "pip uninstall -y cupy-cuda13x cupy-cuda12x" in found


@pytest.mark.parametrize("packages", [{"nvidia-nvvm": "13.5.27"}, {"nvidia-cuda-nvcc": "13.5.27"}])
def test_a_compiler_newer_than_the_driver(packages):
    (found,) = mismatches(Facts((13, 0), (13, 0), packages))
    assert "NVVM is of CUDA 13.5" in found
    assert "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" in found
    assert 'pip install "cuda-toolkit==13.0.*"' in found


def test_versions_as_cuda_counts_them():
    assert diagnosis.of_integer(13020) == (13, 2)
    assert diagnosis.of_integer(12090) == (12, 9)
    assert diagnosis.of_integer(0) is None, "no driver"


def stand_in(driver: int, runtime: int, count: int | str) -> ModuleType:
    class CUDARuntimeError(RuntimeError):
        pass

    def devices() -> int:
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=devices,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: runtime,
        )
    )
    return cupy


INSUFFICIENT = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"


@pytest.mark.parametrize(
    ("driver", "runtime", "count", "said"),
    [
        (0, 13020, INSUFFICIENT, "finds no usable GPU (cudaErrorInsufficientDriver"),
        (12040, 13020, INSUFFICIENT, "serves CUDA 12.4 at most"),
        (13000, 13020, 0, "finds no usable GPU (no GPU)"),
        (13000, 12090, 0, "finds no usable GPU (no GPU)"),
    ],
)
def test_why_cupy_is_not_usable(monkeypatch, driver, runtime, count, said):
    monkeypatch.setitem(sys.modules, "cupy", stand_in(driver, runtime, count))
    reason = cupy_gemm.unavailable.__wrapped__()
    assert reason is not None
    assert said in reason
    assert "install" in reason


def test_cupy_without_cublas(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", stand_in(13000, 13000, 1))
    broken = ModuleType("cupy_backends.cuda.libs")
    monkeypatch.setitem(sys.modules, "cupy_backends", ModuleType("cupy_backends"))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda", ModuleType("cupy_backends.cuda"))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", broken)
    reason = cupy_gemm.unavailable.__wrapped__()
    assert reason is not None
    assert "no cuBLAS" in reason
    assert 'pip install "gpuconv[cuda13]"' in reason


def test_info_prints_each_mismatch_on_a_line(monkeypatch):
    monkeypatch.setattr(diagnosis, "facts", lambda packages: Facts((13, 0), (13, 0), {"nvidia-nvvm": "13.5.27"}))
    report = machine.info()
    assert len(report.mismatches) == 1
    assert f"\nMismatch: {report.mismatches[0]}\n" in str(report)


def test_info_of_this_machine_names_none_or_true_ones():
    for sentence in gpuconv.info().mismatches:
        assert "install" in sentence


# ---- GPUCONV_DEBUG


class Stream:
    waited = 0

    def synchronize(self) -> None:
        Stream.waited += 1
        if Stream.waited == 2:
            raise RuntimeError("cudaErrorIllegalAddress")


@pytest.fixture
def faulty_gpu(monkeypatch):
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(get_current_stream=Stream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(Stream, "waited", 0)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_waits_without_the_variable(monkeypatch, faulty_gpu, value):
    monkeypatch.delenv("GPUCONV_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("GPUCONV_DEBUG", value)
    for _ in range(3):
        debug.launched("im2col", "n1c1h9w9_o1kh3kw3_f32")
    assert Stream.waited == 0


def test_an_error_surfaces_at_its_launch(monkeypatch, faulty_gpu):
    monkeypatch.setenv("GPUCONV_DEBUG", "1")
    debug.launched("im2col", "n1c1h9w9_o1kh3kw3_f32")
    with pytest.raises(RuntimeError, match=r"a product of n1c1h9w9_o1kh3kw3_f32 failed on the GPU: cudaErrorIllegal"):
        debug.launched("a product", "n1c1h9w9_o1kh3kw3_f32")


def test_the_cpu_knows_nothing_of_it(monkeypatch, faulty_gpu):
    monkeypatch.setenv("GPUCONV_DEBUG", "1")
    assert dispatch.resolve("test", "cpu", None, None).device == "cpu"
    gpuconv.conv2d(np.ones((3, 3)), np.ones((2, 2)), backend="numpy")
    assert Stream.waited == 0
