"""The GPU's field: every usable CUDA implementation of gpuconv, and cuDNN through PyTorch.

Operands are on the GPU. As many sets of them as exceed the L2 cache twice are used in turn, and as many results are
kept alive, so that neither side reads or writes what the call before left in the cache. A first version: no prepared
weights, and no separate account of a fused epilogue.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import gpuconv
from bench import drive, peers
from bench.check import Arrays, arguments
from bench.timing import Clock, EventClock, WallClock
from gpuconv import dispatch
from gpuconv.problem import Conv2dProblem

_SETS = 64  # at most; small problems would otherwise want thousands


class Rig:
    """Where the arrays live, how they are timed, and which implementations run on them.

    This one is the rehearsal: NumPy arrays and gpuconv's CPU implementations stand in for the GPU's, so that every
    line but the GPU's own runs on any machine.
    """

    name = "rehearsal on the CPU"
    cache = 1 << 16

    def clock(self) -> Clock:
        return WallClock()

    def implementations(self) -> list[str]:
        return list(dispatch.serving("forward", "cpu"))

    def array(self, problem: Conv2dProblem, values: np.ndarray) -> Any:
        return values.copy()

    def host(self, y: Any) -> np.ndarray:
        return y

    def peers(self, problem: Conv2dProblem, given: Arrays) -> dict[str, list[peers.Contender] | str]:
        return {"stand-in for cudnn": cudnn(self, problem, given, "cpu")}


class _Gpu(Rig):
    def implementations(self) -> list[str]:
        names = list(dispatch.serving("forward", "cuda"))
        return [name for name in names if dispatch.implementation(name).unavailable() is None]


class TorchRig(_Gpu):
    """PyTorch's tensors, which gpuconv takes as they are: one stream and one clock for both."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        properties = torch.cuda.get_device_properties(0)
        self.name, self.cache = properties.name, properties.L2_cache_size

    def clock(self) -> Clock:
        cuda = self.torch.cuda
        cycles = 1_500_000  # about a millisecond, in which the host queues what is to be timed
        sleep = getattr(cuda, "_sleep", None)
        delay = partial(sleep, cycles) if sleep else lambda: None
        make = partial(cuda.Event, enable_timing=True)
        return EventClock(make, lambda start, stop: start.elapsed_time(stop), cuda.synchronize, delay)

    def array(self, problem: Conv2dProblem, values: np.ndarray) -> Any:
        if problem.x_dtype == "bfloat16":
            return self.torch.from_numpy(values.view(np.int16)).view(self.torch.bfloat16).cuda()
        return self.torch.from_numpy(values).cuda()

    def host(self, y: Any) -> np.ndarray:
        return peers.from_tensor(y)

    def peers(self, problem: Conv2dProblem, given: Arrays) -> dict[str, list[peers.Contender] | str]:
        return {"cudnn": cudnn(self, problem, given, "cuda")}


class CuPyRig(_Gpu):
    """CuPy's arrays, where there is no PyTorch with CUDA; gpuconv's times stand alone."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        facts = cupy.cuda.runtime.getDeviceProperties(0)
        self.name, self.cache = facts["name"].decode(), facts["l2CacheSize"]

    def clock(self) -> Clock:
        cuda = self.cupy.cuda
        wait = cuda.runtime.deviceSynchronize
        return EventClock(cuda.Event, cuda.get_elapsed_time, wait, lambda: None)

    def array(self, problem: Conv2dProblem, values: np.ndarray) -> Any:
        return self.cupy.asarray(values)

    def host(self, y: Any) -> np.ndarray:
        return y.get()

    def peers(self, problem: Conv2dProblem, given: Arrays) -> dict[str, list[peers.Contender] | str]:
        return {"cudnn": "PyTorch with CUDA is not installed; pip install torch"}


def rig(dry_run: bool) -> Rig | str:
    """The rig of this machine, or why there is none."""
    if dry_run:
        return Rig()
    missing = dispatch.gpu_missing()
    if missing:
        return "no usable GPU: " + "; ".join(f"{name}: {reason}" for name, reason in missing)
    if dispatch.simulated():
        return "Numba's CUDA simulator is no GPU to time; unset NUMBA_ENABLE_CUDASIM"
    if peers.PEERS["torch"].missing() is None:
        import torch

        if torch.cuda.is_available():
            return TorchRig()
    if dispatch.implementation("cupy.gemm").unavailable() is None:
        return CuPyRig()
    return "neither PyTorch nor CuPy with CUDA is here to hold the arrays and the clock"


def field(rig: Rig, backend: str | None) -> drive.Enter:
    """Who takes part, for ``drive.run``."""
    wanted = dispatch.candidates(backend) or ()

    def enter(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        ours: dict[str, drive.Ours | str] = {}
        to_nchw = peers.to_nchw(problem)
        for name in rig.implementations():
            if name not in wanted:
                continue
            if name != backend and gpuconv.explain(str(problem), backend=name).implementation is None:
                continue  # one for other shapes, which nobody asked for by its name
            call = partial(gpuconv.conv2d, **arguments(problem), backend=name)
            turning = rotating(rig, problem, call, lambda: tuple(_arrays(rig, problem, given)))
            contender = peers.Contender("plain call", turning, lambda y: to_nchw(rig.host(y)))
            ours[name] = drive.Ours(name, contender)
        return drive.Field(ours, rig.peers(problem, given))

    return enter


def _arrays(rig: Rig, problem: Conv2dProblem, given: Arrays) -> list[Any]:
    return [None if values is None else rig.array(problem, values) for values in (given.x, given.k, given.bias)]


def rotating(
    rig: Rig, problem: Conv2dProblem, call: Callable[..., Any], make: Callable[[], tuple[Any, ...]]
) -> Callable[[], Any]:
    """``call`` on one set of operands after the other; old results live on, so that new ones lie elsewhere."""
    count = min(2 * rig.cache // max(problem.bytes, 1) + 2, _SETS)
    turn = itertools.cycle([make() for _ in range(count)])
    kept: deque[Any] = deque(maxlen=count)

    def step() -> Any:
        y = call(*next(turn))
        kept.append(y)
        return y

    return step


def cudnn(rig: Rig, problem: Conv2dProblem, given: Arrays, device: str) -> list[peers.Contender] | str:
    """PyTorch's convolution in both memory formats, each with the algorithm that cuDNN finds fastest."""
    peer = peers.PEERS["torch"]
    why = peer.missing() or "; ".join(peer.unsupported(problem))
    if why:
        return why
    import torch

    tf32 = problem.precision == "medium"

    def activate() -> None:
        torch.set_grad_enabled(False)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0  # every algorithm, not the first ten
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32

    found = []
    for name, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):

        def make(form: Any = form) -> tuple[Any, ...]:
            x, k, bias = peers.tensors(problem, given, device)
            # clone(): on the CPU a tensor made from an array shares its memory, and sets must not.
            return x.clone(memory_format=form), k.clone(memory_format=form), bias

        call = rotating(rig, problem, lambda x, k, bias: peers.convolution(problem, x, k, bias)(), make)
        setting = f"{name}, benchmark, TF32 {'allowed' if tf32 else 'not allowed'}"
        found.append(peers.Contender(setting, call, peers.from_tensor, None, activate))
    return found
