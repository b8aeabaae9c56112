"""``info``: what this machine can run, and what is missing for the rest; ``clear``: release what is kept."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from gpuconv import diagnosis, dispatch, quick
from gpuconv._version import __version__

_PACKAGES = (
    "numpy", "numba", "numba-cuda", *diagnosis.CUPY_PACKAGES, *diagnosis.NVVM_PACKAGES, "ml_dtypes", "torch",
)  # fmt: skip


@dataclass(frozen=True)
class Info:
    """The answer of ``info``; printing it gives the report, ``to_dict`` the same for a program.

    Attributes
    ----------
    versions : dict of str to str
        The packages found that matter here, and their versions.
    gpus : tuple of str
        The usable GPUs, each with its ordinal, name and compute capability.
    kernels : str
        The CPU's compiled kernels: for which registers, on how many threads, and where they are kept.
    implementations : dict of str to str or None
        Each implementation by its name: None where it is usable, else why not and the remedy.
    mismatches : tuple of str
        What does not fit together on a CUDA machine, each with its remedy.
    """

    versions: dict[str, str]
    gpus: tuple[str, ...]
    kernels: str
    implementations: dict[str, str | None]
    mismatches: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report for a program: what ``gpuconv info --json`` prints.

        Returns
        -------
        dict
            Of strings, numbers, booleans, None, lists and dicts: ``json.dumps`` takes it as it is. Its keys are listed
            in ``docs/command-line.md``; later versions may add keys, and keep these.

        Examples
        --------
        >>> [row["usable"] for row in info().to_dict()["implementations"] if row["name"] == "numpy.reference"]
        [True]
        """
        import platform

        return {
            "gpuconv": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "cpu_threads": os.cpu_count(),
            "cpu_kernels": self.kernels,
            "gpus": list(self.gpus),
            "mismatches": list(self.mismatches),
            "packages": dict(self.versions),
            "implementations": [
                {
                    "name": name,
                    "device": dispatch.DEVICES[dispatch.library_of(name)],
                    "usable": reason is None,
                    "experimental": dispatch.is_experimental(name),
                    "reason": reason,
                }
                for name, reason in self.implementations.items()
            ],
        }

    def __str__(self) -> str:
        lines = [_programs(), *(f"{name}: {value}" for name, value in self._fields())]
        lines += ["", "Packages"]
        lines += [f"  {name:<21} {version}" for name, version in self.versions.items()]
        lines += ["", "Implementations, best first per device"]
        width = max(map(len, self.implementations))
        lines += [f"  {name:<{width}}  {device:<4}  {state}" for name, device, state in self._states()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from gpuconv import notebook

        return notebook.block(
            notebook.paragraph(_programs()),
            notebook.fields(self._fields()),
            notebook.table(("implementations, best first per device", "device", "state"), self._states()),
            notebook.folded("Packages", notebook.fields(self.versions.items())),
        )

    def _fields(self) -> list[tuple[str, str]]:
        import platform

        processor = platform.processor() or platform.machine()
        rows = [("CPU", f"{processor}, {os.cpu_count()} threads"), ("CPU kernels", self.kernels)]
        rows += [("GPU", gpu) for gpu in self.gpus or ("none usable",)]
        return rows + [("Mismatch", sentence) for sentence in self.mismatches]

    def _states(self) -> list[tuple[str, str, str]]:
        """Name, device and state of each implementation."""
        rows = []
        for name, reason in self.implementations.items():
            device = dispatch.DEVICES[dispatch.library_of(name)]
            ready = "ready, by its name only: experimental" if dispatch.is_experimental(name) else "ready"
            rows.append((name, device, ready if reason is None else reason))
        return rows


def _programs() -> str:
    import platform

    return f"gpuconv {__version__}, Python {platform.python_version()}, {platform.platform()}"


def info() -> Info:
    """What is usable on this machine, and for everything else why not and what to do about it.

    Returns
    -------
    Info
        Versions of the libraries found, the GPUs, what does not fit together, and each implementation with its state.
        ``print`` it.

    Examples
    --------
    >>> print(info())
    gpuconv ...
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
    """Release cached plans, compiled kernels' handles, every ``Conv2d``'s packed and uploaded kernels, index tables on
    GPUs, the page-locked memory through which NumPy arrays reach them, and what CuPy's pools hold free.

    Nothing but time is lost: the next call makes again what it needs. Arrays that are in use stay as they are.

    Examples
    --------
    >>> clear()
    """
    dispatch.choose.cache_clear()
    quick.clear()
    kernels = {
        "direct": ("kernel",),
        "depthwise_shape": ("block",),
        "depthwise_run": ("kernel",),
        "patches": ("kernel",),
        "uploads": ("KEPT",),
        "implicit_gemm_run": ("kernel", "packer", "adder"),
        "implicit_gemm_mma_run": ("kernel", "turner"),
        "ring": ("adder",),
        "winograd_run": ("weights_kernel", "image_kernel", "result_kernel", "multiply_kernel"),
    }
    for name, caches in kernels.items():
        module = sys.modules.get(f"gpuconv.backends.numba_cuda.{name}")
        for cache in caches if module is not None else ():
            getattr(module, cache).cache_clear()
    for name, cache in (("strip", "tables_of"), ("fft_bound", "factors"), ("fft_lines", "halves")):
        module = sys.modules.get(f"gpuconv.backends.numba_cpu.{name}")
        if module is not None:
            getattr(module, cache).cache_clear()
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
