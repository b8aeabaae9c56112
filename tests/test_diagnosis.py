"""What ``info`` says of CUDA libraries that do not fit together, and ``GPUCONV_DEBUG``; on facts and fakes."""

from __future__ import annotations

import importlib.abc
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import calls
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


# What CUDA's two interfaces say, with the word that its remedy must have.
CAUSES = [
    ("cudaErrorNoDevice: no CUDA-capable device is detected", "mig -lgi"),
    ("Error at driver init: Call to cuInit results in CUDA_ERROR_NO_DEVICE (100)", "mig -lgi"),
    ("cudaErrorInsufficientDriver: CUDA driver version is insufficient", "newer NVIDIA driver"),
    ("cudaErrorSystemDriverMismatch: system has unsupported display driver", "reboot"),
    ("Call to cuInit results in CUDA_ERROR_SYSTEM_NOT_READY", "fabricmanager"),
    ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "LD_LIBRARY_PATH"),
    ("cudaErrorDevicesUnavailable: all CUDA-capable devices are busy, CUDA_ERROR_DEVICE_UNAVAILABLE", "nvidia-smi -c"),
    ("cudaErrorUnknown: unknown error", "nvidia_uvm"),
    ("CUDA driver library cannot be found", "--gpus all"),
    ("something new", "install NVIDIA's driver"),
]


@pytest.mark.parametrize(("cause", "word"), CAUSES)
def test_each_error_of_the_driver_has_its_remedy(monkeypatch, cause, word):
    """For Numba and for CuPy; a variable that hides the GPUs is named where it may be the cause, and nowhere else."""
    from gpuconv.backends.numba_cuda import launch

    def refuse(*given):
        raise RuntimeError(cause)

    monkeypatch.setattr(launch.convert, "simulated", lambda: False)
    monkeypatch.setattr(launch, "_no_gpu", refuse)
    monkeypatch.setitem(sys.modules, "cupy", stand_in(13000, 13000, cause))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pytest.importorskip("numba.cuda")
    for reason in (launch.unavailable(), cupy_gemm.unavailable.__wrapped__()):
        assert cause in reason and word in reason.partition(cause)[2]
        assert "CUDA_VISIBLE_DEVICES" not in reason
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for reason in (launch.unavailable(), cupy_gemm.unavailable.__wrapped__()):
        hidden = "CUDA_VISIBLE_DEVICES='' names no GPU" in reason and "unset it" in reason
        assert hidden == ("no_device" in cause.lower() or "nodevice" in cause.lower())


def test_without_a_driver_cupy_asks_for_one_rather_than_for_a_newer_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", stand_in(0, 13020, INSUFFICIENT))
    assert "install NVIDIA's driver" in cupy_gemm.unavailable.__wrapped__()


class Unimportable(importlib.abc.MetaPathFinder):
    """Says of one module what a broken installation says."""

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self.error = name, error

    def find_spec(self, name, *rest):
        if name == self.name:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [ImportError("libnvrtc.so.13: cannot open shared object file"), ModuleNotFoundError("No module named 'cuda'")],
)
def test_libraries_that_cannot_be_imported(monkeypatch, error):
    """A broken installation is a reason, not an error of every call; with its own words and a remedy."""
    from gpuconv.backends.numba_cuda import launch

    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy" or name == "numba.cuda"]:
        monkeypatch.delitem(sys.modules, name)
    finders = [Unimportable("cupy", error), Unimportable("numba.cuda", error)]
    monkeypatch.setattr(sys, "meta_path", [*finders, *sys.meta_path])
    for library, reason in (("CuPy", cupy_gemm.unavailable.__wrapped__()), ("numba-cuda", launch.unavailable())):
        assert f"{library} is installed and cannot be imported ({type(error).__name__}: {error})" in reason
        assert 'pip install "gpuconv[cuda13]"' in reason


def test_numba_without_its_compiler(monkeypatch):
    pytest.importorskip("numba.cuda")
    from gpuconv.backends.numba_cuda import launch

    if launch.convert.simulated():
        pytest.skip("the simulator needs none")
    from numba.cuda.cudadrv import nvvm

    monkeypatch.setattr(launch, "_no_gpu", lambda *given: None)
    monkeypatch.setattr(nvvm, "is_available", lambda: False)
    assert "NVVM" in launch.unavailable() and 'pip install "gpuconv[cuda13]"' in launch.unavailable()


NO_DEVICE = r"""
#include <string.h>
int cuInit(unsigned flags) { return 100; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuGetErrorName(int error, const char** name) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "no CUDA-capable device is detected"; return 0; }
int cuGetProcAddress_v2(const char* name, void** found, int version, unsigned long long flags, int* state) {
    *found = !strcmp(name, "cuInit") ? (void*)cuInit : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
           : !strcmp(name, "cuGetErrorName") ? (void*)cuGetErrorName
           : !strcmp(name, "cuGetErrorString") ? (void*)cuGetErrorString
           : !strncmp(name, "cuGetProcAddress", 16) ? (void*)cuGetProcAddress_v2 : 0;
    if (state) *state = *found == 0;
    return *found ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** found, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

WITHOUT_A_DEVICE = """
import warnings, numpy as np, gpuconv
report = gpuconv.info()
assert report.gpus == ()
print(report.implementations["numba_cuda.direct"])
x, k = np.ones((1, 1, 4, 4), "f"), np.ones((1, 1, 3, 3), "f")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert (gpuconv.conv2d(x, k, device="cuda") == 9).all()
    assert (gpuconv.conv2d(x, k, device="auto") == 9).all()
assert [type(warning.message).__name__ for warning in caught] == ["DeviceFallbackWarning"]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a libcuda.so of Linux")
def test_a_driver_without_a_device(tmp_path):
    """As with an empty CUDA_VISIBLE_DEVICES: Numba raises where it is asked whether it is available."""
    pytest.importorskip("numba_cuda")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(NO_DEVICE)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-w", "-o", str(library), str(tmp_path / "driver.c")], check=True)
    said = calls.child(
        WITHOUT_A_DEVICE, limit=120, LD_LIBRARY_PATH=str(tmp_path), NUMBA_CUDA_DRIVER=str(library),
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert "CUDA_ERROR_NO_DEVICE" in said
    assert "CUDA_VISIBLE_DEVICES='' names no GPU that is there; unset it" in said


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
