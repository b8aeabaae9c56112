"""Which implementation runs: the table, the rules of preference, and the choice.

Three questions stay apart. *Valid?* is the problem's own. *Can?* is what each implementation answers, with reasons.
*Should?* is the order of the table and the rules beside it.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from gpuconv import dtypes, geometry, magnitudes, preference
from gpuconv.backends.protocol import Implementation, Plan, Target
from gpuconv.errors import DeviceFallbackWarning, NoBackendError
from gpuconv.problem import Conv2dProblem

# Best first, per device.
TABLE = (
    "cupy.gemm",
    "cupy.patches",
    "numba_cuda.direct",
    "numba_cuda.depthwise",
    "numba_cuda.implicit_gemm",
    "numba_cuda.implicit_gemm_mma",
    "numba_cuda.winograd",
    "numba_cuda.patches",
    "numba_cpu.complex",
    "numba_cpu.separable",
    "numba_cpu.winograd",
    "numba_cpu.spread",
    "numba_cpu.planes",
    "numba_cpu.lanes",
    "numba_cpu.fft",
    "numba_cpu.fft_lines",
    "numba_cpu.rows",
    "numba_cpu.interleaved",
    "numba_cpu.channels",
    "numba_cpu.pixels",
    "numba_cpu.pointwise",
    "numba_cpu.merged",
    "numba_cpu.strip",
    "numba_cpu.weight_planes",
    "numba_cpu.weight_grad",
    "numpy.gemm",
    "numpy.patches",
    "numpy.fft",
    "numpy.reference",
)


def module_of(name: str) -> str:
    """The module of gpuconv.backends that is the implementation ``name``: a library with one file each, or a folder."""
    library = library_of(name)
    return name if library.startswith("numba") else name.replace(".", "_")


DEVICES = {"cupy": "cuda", "numba_cuda": "cuda", "numba_cpu": "cpu", "numpy": "cpu"}


def preferred(problem: Conv2dProblem, device: str) -> tuple[list[str], dict[str, str]]:
    """The table's names for ``device``, best first for this problem, and the rules that put some of them there."""
    names = list(serving(problem.op, device))
    if device == "cuda":
        names.sort(key=is_experimental)
        thin = problem.op in ("forward", "input_grad") and problem.result_channels // problem.groups < 8
        if not thin:
            return names, {}
        # A GEMM this thin reads far more than it computes, and im2col writes all of it first. Not measured yet.
        names.sort(key=lambda name: (is_experimental(name), name != "numba_cuda.direct"))
        return names, {names[0]: "fewer than 8 output channels per group: too thin for a matrix product, not measured"}
    wanted = {name: why for name, holds, why in preference.on_cpu(problem) if holds}
    # What is made for such problems, ending with what is for all; then what is made for others.
    place = {name: index for index, name in enumerate(wanted)}
    names.sort(key=lambda name: (library_of(name) == "numpy" and name not in place, place.get(name, len(place))))
    return names, wanted


def values_matter(problem: Conv2dProblem, target: Target, backend: str | None) -> bool:
    """Whether what runs depends on the values of k: where ``numba_cpu.separable`` would come first, were it able to."""
    name = "numba_cpu.separable"
    if target.device != "cpu" or problem.precision == "highest" or problem.op != "forward":
        return False
    first = backend == name or (backend in (None, library_of(name)) and preferred(problem, "cpu")[0][0] == name)
    return first and not reasons(name, problem, replace(target, separable=True))


def digits_matter(problem: Conv2dProblem, target: Target, backend: str | None) -> bool:
    """Whether what runs depends on how large the integers of k are: ``numba_cpu`` sums them in floating point."""
    return (
        target.device == "cpu"
        and problem.op in ("forward", "input_grad")
        and dtypes.is_integer(problem.y_dtype)
        and (backend is None or library_of(backend) == "numba_cpu")
    )


def sums_matter(problem: Conv2dProblem, target: Target) -> bool:
    """Whether the values of x decide that, too: where by its type, or a bias, 64-bit sums may be too large for it."""
    return (
        problem.y_dtype == "int64"
        and not (problem.x_zero_point or problem.k_zero_point)
        and (problem.bias or problem.largest_sum(0, target.k_digits) > 1 << magnitudes.DIGITS)
    )


def serving(op: str, device: str | None = None) -> tuple[str, ...]:
    """The table's names that are for ``op``, on ``device`` or on any."""
    names = [name for name in TABLE if device is None or DEVICES[library_of(name)] == device]
    return tuple(name for name in names if op in implementation(name).OPS)


def is_experimental(name: str) -> bool:
    """Whether ``name`` waits for the hardware that proves it: it runs only where ``backend`` is its very name."""
    return getattr(implementation(name), "EXPERIMENTAL", False)


def held_back(name: str, backend: str | None) -> list[str]:
    """Why ``name`` is not chosen for a caller who asked for ``backend``, though it may be able to run."""
    if backend == name or not is_experimental(name):
        return []
    return [f"experimental: no hardware has run it yet; backend={name!r} asks for it"]


def library_of(name: str) -> str:
    """The library of an implementation's name."""
    return name.partition(".")[0]


def implementation(name: str) -> Implementation:
    """The implementation called ``name``, imported when first asked for."""
    try:
        module: Any = importlib.import_module(f"gpuconv.backends.{module_of(name)}")
    except ModuleNotFoundError as error:
        if library_of(name) != "numba_cpu" or error.name not in ("numba", "llvmlite"):
            raise
        ops = {"weight_grad"} if ".weight_" in name else {"forward", "input_grad"}
        ops -= {"forward"} if name == "numba_cpu.spread" else set()
        ops |= {"weight_grad"} if name == "numba_cpu.complex" else set()
        return Absent(name, f"Numba is not installed ({error.name} is missing); pip install numba", frozenset(ops))
    return module  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Absent:
    """Stands for an implementation whose library is not installed."""

    NAME: str
    reason: str
    OPS: frozenset[str]
    DEVICE: str = "cpu"
    ARRAYS: str = "numpy"

    def unavailable(self) -> str:
        """What is missing."""
        return self.reason

    def unsupported(self, problem: Conv2dProblem, target: Target) -> list[str]:
        """What is missing."""
        return [self.reason]

    def _never(self, *arguments: Any) -> Any:
        raise NoBackendError(f"{self.NAME}: {self.reason}")

    plan = pack = pack_key = run = _never


@dataclass(frozen=True)
class Choice:
    """What runs, and why nothing else does."""

    name: str
    plan: Plan
    why: str
    rejected: tuple[tuple[str, tuple[str, ...]], ...]


def candidates(backend: str | None) -> tuple[str, ...] | None:
    """The implementations that ``backend`` names, or None when it names none."""
    if backend is None:
        return TABLE
    return tuple(name for name in TABLE if backend in (name, library_of(name))) or None


def check_backend(call: str, backend: Any) -> None:
    """Refuse a ``backend`` that names neither a library nor an implementation."""
    if backend is not None and (not isinstance(backend, str) or candidates(backend) is None):
        known = (*dict.fromkeys(map(library_of, TABLE)), *TABLE)
        hint = geometry.meant(backend, known)
        raise ValueError(f"{call}: backend must be one of {', '.join(known)}; got {backend!r}{hint}")


def check_agreement(call: str, kind: str | None, device: Any, backend: str | None) -> None:
    """Refuse a ``backend`` that runs on another kind of device than ``device`` asks for."""
    implied = None if backend is None else DEVICES[library_of(backend)]
    if implied is not None and kind not in (None, "auto", implied):
        raise ValueError(f"{call}: backend={backend!r} runs on the {implied}; it contradicts device={device!r}")


def _largest_array(problem: Conv2dProblem) -> int:
    """Bytes of the largest of the operands and the result."""
    arrays = zip(
        (*problem.operand_shapes, problem.result_shape),
        (problem.x_dtype, problem.k_dtype, problem.y_dtype),
        strict=True,
    )
    return max(math.prod(shape) * dtypes.itemsize(dtype) for shape, dtype in arrays if shape is not None)


def reasons(name: str, problem: Conv2dProblem, target: Target) -> list[str]:
    """Every reason why ``name`` cannot run ``problem`` here."""
    missing = implementation(name).unavailable()
    return [missing] if missing is not None else unsupported(name, problem, target)


def unsupported(name: str, problem: Conv2dProblem, target: Target) -> list[str]:
    """What of ``problem`` the implementation ``name`` does not serve."""
    largest = _largest_array(problem)
    if largest > sys.maxsize:  # only a line can describe such a problem; implementations count in machine integers
        return [f"it has an array of {largest} bytes, beyond any address space"]
    return implementation(name).unsupported(problem, target)


def attempt(
    name: str, problem: Conv2dProblem, target: Target, limit: int, backend: str | None
) -> tuple[Plan | None, list[str]]:
    """The plan of ``name``, or None and the reasons; a MemoryError when only ``limit`` stands in the way."""
    found = reasons(name, problem, target) or held_back(name, backend)
    return (None, found) if found else (implementation(name).plan(problem, target, limit), [])


@lru_cache(maxsize=1024)
def choose(call: str, problem: Conv2dProblem, target: Target, backend: str | None, limit: int) -> Choice:
    """The first implementation, in order of preference, that can run ``problem`` on ``target`` within ``limit``.

    Raises
    ------
    NoBackendError
        When none can; it lists every candidate with its reasons.
    MemoryError
        When one could, had it more than ``limit`` bytes of scratch.
    """
    names, rules = preferred(problem, target.device)
    if backend is not None:
        named = candidates(backend) or ()
        names = [name for name in names if name in named]
        if not names:
            ops = ", ".join(sorted({op for name in named for op in implementation(name).OPS}))
            raise NoBackendError(f"{call}: {backend} has no implementation of {problem.op}; it serves {ops}")
    rejected: list[tuple[str, tuple[str, ...]]] = []
    # Of whoever needs least, the bytes and the text: the error itself would hold this frame, and the caller's arrays.
    shortages: list[tuple[float, str]] = []
    for name in names:
        try:
            plan, found = attempt(name, problem, target, limit, backend)
        except MemoryError as error:
            found = [str(error)]
            shortages.append((getattr(error, "needed", math.inf), found[0]))
        else:
            if plan is not None:
                if backend is not None and not rejected:
                    why = f"backend={backend!r} asked for it"
                else:
                    why = rules.get(name, "the first that can run" if rejected else "first in the table that can run")
                return Choice(name, plan, why, tuple(rejected))
        rejected.append((name, tuple(found)))
    if shortages:
        raise MemoryError(f"{call}: {min(shortages, key=lambda shortage: shortage[0])[1]}")
    lines = [f"    {name}: {reason}" for name, found in rejected for reason in found]
    raise NoBackendError("\n".join([f"{call}: nothing can run {problem} on {target}", *lines]))


def has_cupy() -> bool:
    """Whether CuPy can use a GPU here."""
    return implementation("cupy.gemm").unavailable() is None


def gpu_missing() -> list[tuple[str, str]]:
    """The first implementation of each CUDA library with the reason why it is unusable; empty if one is usable."""
    found: dict[str, tuple[str, str]] = {}
    for name in TABLE:
        library = library_of(name)
        if DEVICES[library] == "cuda" and library not in found:
            reason = implementation(name).unavailable()
            if reason is None:
                return []
            found[library] = name, reason
    return list(found.values())


_DEVICE = r"cpu|auto|cuda(:[0-9]{1,4})?"


def parse_device(call: str, device: Any) -> tuple[str | None, int | None]:
    """``device`` as (None, "cpu", "cuda" or "auto"; ordinal)."""
    if device is None or (isinstance(device, str) and device in ("cpu", "cuda", "auto")):
        return device, None
    match = re.fullmatch(r"cuda:([0-9]{1,4})", device) if isinstance(device, str) else None
    if match is None:
        text = f"cuda:{device}" if type(device) is int else str(device).lower().replace("gpu", "cuda")
        # A number, another case, or a device of PyTorch's.
        hint = f"; did you mean {text!r}?" if re.fullmatch(_DEVICE, text) else ""
        known = "None, 'cpu', 'cuda', 'cuda:<ordinal>' or 'auto'"
        raise ValueError(f"{call}: device must be {known}; got {device!r}{hint}")
    return "cuda", int(match[1])


def resolve(call: str, device: Any, backend: Any, home: int | None, stacklevel: int = 3) -> Target:
    """Where to run: from what was asked for and the GPU ``home`` that holds x (None for host memory).

    A GPU that was asked for and is not there gives the CPU and a DeviceFallbackWarning, or what
    ``GPUCONV_FALLBACK`` says.
    """
    kind, ordinal = parse_device(call, device)
    check_backend(call, backend)
    if backend is not None:
        check_agreement(call, kind, device, backend)
        if DEVICES[library_of(backend)] == "cpu":
            return _cpu()
        if all(implementation(name).unavailable() is not None for name in candidates(backend) or ()):
            return Target("cuda", ordinal)  # a forced backend never falls back: choose() refuses it with its reasons
        return _gpu(call, ordinal, home)
    if kind == "cpu" or (kind is None and home is None):
        return _cpu()
    missing = gpu_missing()
    if kind == "auto" and home is None and (missing or simulated()):
        return _cpu()
    if not missing:
        return _gpu(call, ordinal, home)
    details = "; ".join(f"{name}: {reason}" for name, reason in missing)
    message = f"{call}: device={device!r} finds no usable GPU ({details})"
    policy = fallback_policy()
    if policy == "error":
        raise NoBackendError(f"{message}; GPUCONV_FALLBACK=error forbids the CPU")
    if policy == "warn":
        warnings.warn(f"{message}; running on the CPU", DeviceFallbackWarning, stacklevel=stacklevel)
    return _cpu()


def fallback_policy() -> str:
    """What a missing GPU leads to: ``GPUCONV_FALLBACK``, one of warn, error and silent."""
    policy = os.environ.get("GPUCONV_FALLBACK") or "warn"
    if policy not in ("warn", "error", "silent"):
        raise ValueError(f"GPUCONV_FALLBACK must be warn, error or silent; got {policy!r}")
    return policy


# Whether this process has used CUDA, and whether it is the child of one that had: CUDA does not survive a fork.
_cuda = {"used": False, "lost": False}


def _after_fork() -> None:
    _cuda.update(used=False, lost=_cuda["used"] or _cuda["lost"])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@lru_cache(maxsize=1)
def _runtime() -> Any | None:
    """What runs compiled kernels, None without Numba. Asked once: where threads try an import that fails all the time,
    one of them meets what another has half imported.
    """
    try:
        return importlib.import_module("gpuconv.backends.numba_cpu.runtime")
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        return None


def _cpu() -> Target:
    """The CPU, with the threads that a call may use."""
    runtime = _runtime()
    return Target("cpu") if runtime is None else Target("cpu", None, runtime.thread_count())


def _gpu(call: str, ordinal: int | None, home: int | None) -> Target:
    if _cuda["lost"]:
        raise NoBackendError(
            f"{call}: this process was forked from one that had used CUDA, and CUDA does not survive a fork; start "
            "processes with multiprocessing's 'spawn' or 'forkserver', or pass device='cpu'"
        )
    count, current = _gpus()
    if ordinal is not None and ordinal >= count:
        raise ValueError(f"{call}: device='cuda:{ordinal}' does not exist; this machine has {count} GPU(s)")
    return Target("cuda", ordinal if ordinal is not None else home if home is not None else current)


def _gpus() -> tuple[int, int]:
    """Number of GPUs, and the ordinal of the current one."""
    if has_cupy():
        import cupy

        _cuda["used"] = True
        return int(cupy.cuda.runtime.getDeviceCount()), int(cupy.cuda.Device().id)
    from numba import cuda

    _cuda["used"] = not simulated()
    return len(cuda.gpus), 0 if simulated() else int(cuda.get_current_device().id)


def simulated() -> bool:
    """Whether Numba's simulator stands in for a GPU."""
    from gpuconv.backends.numba_cuda import convert

    return convert.simulated()
