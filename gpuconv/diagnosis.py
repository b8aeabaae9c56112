"""What does not fit together on a CUDA machine: driver, CuPy, the compiler behind Numba, and the remedy for each."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from typing import Any

Version = tuple[int, int]

# Where pip's NVVM comes from, newest packaging first; its version is the toolkit's.
NVVM_PACKAGES = ("nvidia-nvvm", "nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


@dataclass(frozen=True)
class Facts:
    """What is installed; None for what is not there or does not say."""

    driver: Version | None = None  # the newest CUDA that the driver serves
    cupy: Version | None = None  # the CUDA that CuPy was built for
    packages: dict[str, str] = field(default_factory=dict)  # name -> version


def mismatches(facts: Facts) -> list[str]:
    """A sentence with its remedy for each two things that do not fit."""
    found = []
    installed = [name for name in CUPY_PACKAGES if name in facts.packages]
    if len(installed) > 1:
        found.append(
            f"{' and '.join(installed)} are both installed, and each overwrites files of the other; "
            f"pip uninstall -y {' '.join(installed)}, then pip install one of them"
        )
    if facts.driver is None:
        return found
    driver = _text(facts.driver)
    refused = driver_too_old(facts)
    if refused is not None:
        found.append(refused)
    elif facts.cupy is not None and facts.cupy[0] < facts.driver[0]:
        found.append(
            f"CuPy is built for CUDA {facts.cupy[0]} and the driver serves CUDA {driver}: this works, with the "
            f"libraries of CUDA {facts.cupy[0]}; for those of the driver, {_instead(installed, facts.driver[0])}"
        )
    for name in NVVM_PACKAGES:
        version = parse(facts.packages.get(name, ""))
        if version is None:
            continue
        if version > facts.driver:
            found.append(
                f"NVVM is of CUDA {_text(version)} and writes PTX that a driver for CUDA {driver} refuses "
                f'(CUDA_ERROR_UNSUPPORTED_PTX_VERSION); pip install "cuda-toolkit=={driver}.*", or install a newer '
                "driver"
            )
        break
    return found


def driver_too_old(facts: Facts) -> str | None:
    """Why the driver cannot serve CuPy at all, with the remedy; None where it can, or is not there."""
    if facts.driver is None or facts.cupy is None or facts.cupy[0] <= facts.driver[0]:
        return None
    installed = [name for name in CUPY_PACKAGES if name in facts.packages]
    return (
        f"CuPy is built for CUDA {facts.cupy[0]} and the driver serves CUDA {_text(facts.driver)} at most; "
        f"{_instead(installed, facts.driver[0])}, or install a newer driver"
    )


# What an error of the driver's says, in any spelling of CUDA's two interfaces, and what to do.
_REMEDIES = (
    ("nodevice", "see nvidia-smi -L, and where it lists none install NVIDIA's driver; a GPU in MIG mode needs an "
     "instance (nvidia-smi mig -lgi), a container --gpus all"),
    ("invaliddevice", "see nvidia-smi -L for the GPUs that there are"),
    ("insufficientdriver", "install a newer NVIDIA driver"),
    ("systemdrivermismatch", "the driver's library and its kernel module are of two versions, as after an update; "
     "reboot, or install NVIDIA's driver again"),
    ("systemnotready", "NVIDIA's fabric manager is not running; install it, or systemctl start nvidia-fabricmanager"),
    ("compatnotsupported", "the libcuda.so of a cuda-compat package is not for this GPU; take it off LD_LIBRARY_PATH, "
     "and install a newer NVIDIA driver"),
    ("deviceunavailable", "another process has the GPU to itself; see nvidia-smi, and nvidia-smi -c DEFAULT"),
    ("cudaerrorunknown", "the driver's state is broken; see nvidia-smi, and reboot or reload nvidia_uvm"),
    ("cannotbefound", "install NVIDIA's driver, or run on a machine with a GPU; a container needs --gpus all"),
)  # fmt: skip
_USUAL_REMEDY = "install NVIDIA's driver, or run on a machine with a GPU"


def remedy(cause: str) -> str:
    """What to do where no GPU is usable for ``cause``, an error's words."""
    words = "".join(filter(str.isalpha, cause.lower())).replace("nogpu", "nodevice")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and ("nodevice" in words or "invaliddevice" in words):
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU that is there; unset it, or name some as nvidia-smi -L "
            "lists them (those of MIG by their UUIDs)"
        )
    return next((advice for known, advice in _REMEDIES if known in words), _USUAL_REMEDY)


def broken_import(library: str, error: Exception) -> str:
    """That a library is installed and cannot be imported, on a line."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{library} is installed and cannot be imported ({type(error).__name__}: {said})"


def _instead(installed: list[str], major: int) -> str:
    remove = f"pip uninstall -y {' '.join(installed)} and " if installed else ""
    return f'{remove}pip install "gpuconv[cuda{major}]"'


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def parse(version: str) -> Version | None:
    """Major and minor of "13.0.88"; None for what is no version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2]))


def of_integer(version: int) -> Version | None:
    """13020 as CUDA counts its versions; None for 0, which stands for none."""
    return (version // 1000, version % 1000 // 10) if version > 0 else None


def facts(packages: dict[str, str]) -> Facts:
    """What this machine has; no CUDA context is made."""
    return Facts(_driver(), _cupy(), packages)


def _driver() -> Version | None:
    cupy = _imported_cupy()
    if cupy is not None:
        return of_integer(int(cupy.cuda.runtime.driverGetVersion()))
    try:
        from numba.cuda.cudadrv import driver
    except Exception:  # Numba's CUDA target is not there, cannot be imported, or is the simulator
        return None
    try:
        if not getattr(driver.driver, "is_available", False):
            return None
        major, minor = driver.driver.get_version()
    except Exception:  # Numba's way to say that there is no GPU, where there is a driver
        return None
    return int(major), int(minor)


def _cupy() -> Version | None:
    cupy = _imported_cupy()
    return None if cupy is None else of_integer(int(cupy.cuda.runtime.runtimeGetVersion()))


def _imported_cupy() -> Any | None:
    """CuPy, where asking what is available has imported it."""
    return sys.modules.get("cupy")
