"""``info``: what this machine can run, and what is missing for the rest; ``clear``: release what is kept."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from gpuconv import diagnosis, dispatch, quick
from gpuconv._version import __version__

_PACKAGES = (
    "numpy", "numba", "numba-cuda", *diagnosis.CUPY_PACKAGES, *diagnosis.NVVM_PACKAGES, "ml_dtypes", "torch",
)  # fmt: skip


@dataclass(frozen=True)
class Info:
    """The answer of ``info``; printing it gives the report."""

    versions: dict[str, str]
    gpus: tuple[str, ...]
    kernels: str  # the CPU's compiled kernels: for which registers, on how many threads, kept where
    implementations: dict[str, str | None]  # name -> None when usable, else why not and the remedy
    mismatches: tuple[str, ...] = ()  # what does not fit together on a CUDA machine, each with its remedy

    def __str__(self) -> str:
        import platform

        lines = [f"gpuconv {__version__}, Python {platform.python_version()}, {platform.platform()}"]
        lines += ["CPU: " + (platform.processor() or platform.machine()) + f", {os.cpu_count()} threads"]
        lines += ["CPU kernels: " + self.kernels]
        lines += [f"GPU: {gpu}" for gpu in self.gpus] or ["GPU: none usable"]
        lines += [f"Mismatch: {sentence}" for sentence in self.mismatches]
        lines += ["", "Packages"]
        lines += [f"  {name:<21} {version}" for name, version in self.versions.items()]
        lines += ["", "Implementations, best first per device"]
        width = max(map(len, self.implementations))
        for name, reason in self.implementations.items():
            device = dispatch.DEVICES[dispatch.library_of(name)]
            ready = "ready, by its name only: experimental" if dispatch.is_experimental(name) else "ready"
            lines.append(f"  {name:<{width}}  {device:<4}  {ready if reason is None else reason}")
        return "\n".join(lines)


def info() -> Info:
    """What is usable on this machine, and for everything else why not and what to do about it.

    Returns
    -------
    Info
        Versions of the libraries found, the GPUs, what does not fit together, and each implementation with its state.
        ``print`` it.
    """
    from importlib import metadata  # slow to import, and needed here alone

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    implementations = {name: dispatch.implementation(name).unavailable() for name in dispatch.TABLE}
    mismatches = tuple(diagnosis.mismatches(diagnosis.facts(versions)))
    return Info(versions, tuple(_gpus()), _cpu_kernels(), implementations, mismatches)


def _cpu_kernels() -> str:
    missing = dispatch.implementation("numba_cpu.strip").unavailable()
    if missing is not None:
        return missing
    from gpuconv.backends.numba_cpu import kernel_cache, runtime

    place, said = kernel_cache.usable()
    kept = f"kept in {place}" if place is not None else f"compiled in each process, because {said}"
    return f"{runtime.vector_bits()}-bit registers, {runtime.thread_count()} thread(s), {kept}"


def _gpus() -> list[str]:
    if dispatch.gpu_missing():
        return []
    if dispatch.implementation("cupy.gemm").unavailable() is None:
        import cupy

        names = []
        for ordinal in range(cupy.cuda.runtime.getDeviceCount()):
            facts = cupy.cuda.runtime.getDeviceProperties(ordinal)
            memory = facts["totalGlobalMem"] / 2**30
            capability = f"sm_{facts['major']}{facts['minor']}"
            names.append(f"cuda:{ordinal} {facts['name'].decode()}, {capability}, {memory:.0f} GiB")
        return names
    if dispatch.simulated():
        return ["Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1): correct, and very slow"]
    from numba import cuda

    names = []
    for device in cuda.list_devices():
        name = device.name.decode() if isinstance(device.name, bytes) else device.name
        major, minor = device.compute_capability
        names.append(f"cuda:{device.id} {name}, sm_{major}{minor}")
    return names


def clear() -> None:
    """Release cached plans, compiled kernels' handles, every ``Conv2d``'s packed and uploaded kernels, the page-locked
    memory through which NumPy arrays reach a GPU, and what CuPy's pools hold free.
    """
    dispatch.choose.cache_clear()
    quick.clear()
    kernels = {
        "direct": ("kernel",),
        "depthwise_shape": ("block",),
        "depthwise_run": ("kernel",),
        "patches": ("kernel",),
        "implicit_gemm_run": ("kernel", "packer", "adder"),
        "implicit_gemm_mma_run": ("kernel", "turner"),
    }
    for name, caches in kernels.items():
        module = sys.modules.get(f"gpuconv.backends.numba_cuda.{name}")
        for cache in caches if module is not None else ():
            getattr(module, cache).cache_clear()
    strip = sys.modules.get("gpuconv.backends.numba_cpu.strip")
    if strip is not None:
        strip.tables_of.cache_clear()
    prepared = sys.modules.get("gpuconv.prepared")
    if prepared is not None:
        prepared.release()
    pinned = sys.modules.get("gpuconv.pinned")
    if pinned is not None:
        pinned.release()
    if "cupy" in sys.modules and dispatch.implementation("cupy.gemm").unavailable() is None:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
