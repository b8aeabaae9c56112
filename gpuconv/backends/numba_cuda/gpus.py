"""What a GPU can do at most, from what its driver says; what the cost model and the tuning ask of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from gpuconv.backends.numba_cuda import convert, launch
from gpuconv.backends.protocol import Target

# Multiply-adds per multiprocessor and clock: "CUDA C++ Programming Guide", "Arithmetic Instructions", and for tensor
# cores the architectures' white papers, dense, sums in float32. On GeForce cards 16-bit products run at half of that.
_FMA = {
    (8, 0): {"float32": 64, "float64": 32, "float16": 1024, "tf32": 512},
    (8, 6): {"float32": 128, "float64": 2, "float16": 512, "tf32": 256},
    (8, 9): {"float32": 128, "float64": 2, "float16": 512, "tf32": 256},
    # mma.sync reaches some 60 % of what wgmma does.
    (9, 0): {"float32": 128, "float64": 64, "float16": 1229, "tf32": 614},
}
# Without tensor cores that these kernels know, or newer than the table: the nearest older entry, or the first.
_SHARED = {(8, 0): 164, (8, 6): 100, (8, 9): 100, (9, 0): 228}  # KiB per multiprocessor
_THREADS = {(8, 0): 2048, (8, 6): 1536, (8, 9): 1536, (9, 0): 2048}


@dataclass(frozen=True)
class Gpu:
    """Plain data, so that predictions can be made for a GPU that is not here."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # of its memory, bytes/s

    @property
    def _row(self) -> tuple[int, int]:
        """The row of the tables above: this capability's, or the last before it."""
        return max((row for row in _FMA if row <= self.capability), default=(8, 0))

    def rate(self, way: str) -> float:
        """FLOP/s of one multiprocessor; ``way`` is a dtype of its plain units or a way of ``tensor_tile``."""
        kind = {"bfloat16": "float16", "3xtf32": "tf32"}.get(way, way)
        return 2 * _FMA[self._row][kind] * self.clock / (3 if way == "3xtf32" else 1)

    @property
    def cache_bandwidth(self) -> float:
        """Bytes/s from the level-2 cache, about: 64 bytes per multiprocessor and clock, of which half was measured."""
        return 32 * self.multiprocessors * self.clock

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that one multiprocessor holds at once, at least one."""
        # Registers are given out to warps in units of 256; a block takes 1 KiB more than it asks for.
        by_registers = 65536 // (-(-registers * 32 // 256) * 256) // -(-threads // 32)
        by_shared = _SHARED[self._row] * 1024 // (shared + 1024)
        return max(1, min(16, _THREADS[self._row] // threads, by_registers, by_shared))


# Data sheets, without sparsity; the H200's bandwidth as measured.
KNOWN = {
    "a100": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41e9, 1.555e12),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.695e9, 0.936e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52e9, 1.008e12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.83e9, 3.35e12),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.83e9, 4.3e12),
}
USUAL = KNOWN["a100"]  # where no GPU can be asked


def of(target: Target) -> Gpu:
    """The GPU that a problem is to run on, or is said to."""
    return target.gpu if target.gpu is not None else gpu(target.ordinal)


@lru_cache(maxsize=64)
def gpu(ordinal: int | None) -> Gpu:
    """The GPU ``ordinal``; an A100 where there is none to ask."""
    if ordinal is None or launch.unavailable() is not None or convert.simulated():
        return USUAL
    from numba import cuda

    device = cuda.list_devices()[ordinal]
    name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
    major, minor = device.compute_capability
    # kHz and bits; two transfers per clock. 0 where a driver no longer tells.
    bandwidth = 2 * device.MEMORY_CLOCK_RATE * 1e3 * device.GLOBAL_MEMORY_BUS_WIDTH / 8
    return Gpu(
        name, (int(major), int(minor)), int(device.MULTIPROCESSOR_COUNT),
        device.CLOCK_RATE * 1e3 or USUAL.clock, bandwidth or USUAL.bandwidth,
    )  # fmt: skip
