"""The GPU's field: every usable CUDA implementation of gpuconv, and cuDNN through PyTorch.

Operands are on the GPU. As many sets of them as exceed the L2 cache twice are used in turn, and as many results are
kept alive, so that neither side reads or writes what the call before left in the cache. Gradients take part as the
forward convolution does; ``from_host`` is the field of NumPy arrays, copies to the GPU and back included.
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
from gpuconv import dispatch, dtypes
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

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array for a result, of the library that implementations take."""
        return np.empty(shape, dtypes.numpy_dtype(dtype))

    def broken(self) -> str:
        """What has become of the device, if it is of no use any more."""
        return ""

    def peers(self, problem: Conv2dProblem, given: Arrays) -> dict[str, list[peers.Contender] | str]:
        return {"stand-in for cudnn": cudnn(self, problem, given, "cpu")}


class _Gpu(Rig):
    synchronize: Callable[[], None]

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import cupy

        return cupy.empty(shape, dtypes.numpy_dtype(dtype))

    def broken(self) -> str:
        """An error that a kernel left behind comes back from every later call, so the context is lost."""
        try:
            self.synchronize()
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ""

    def implementations(self) -> list[str]:
        names = list(dispatch.serving("forward", "cuda"))
        return [name for name in names if dispatch.implementation(name).unavailable() is None]


class TorchRig(_Gpu):
    """PyTorch's tensors, which gpuconv takes as they are: one stream and one clock for both."""

    def __init__(self) -> None:
        import torch

        self.torch, self.synchronize = torch, torch.cuda.synchronize
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

        self.cupy, self.synchronize = cupy, cupy.cuda.runtime.deviceSynchronize
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
        to_nchw = peers.to_nchw(problem) if problem.op != "weight_grad" else lambda y: y
        for name in rig.implementations():
            if name not in wanted:
                continue
            planned = gpuconv.explain(str(problem), backend=name).plan
            if planned is None and name != backend:
                continue  # one for other shapes, which nobody asked for by its name
            call = calling(problem, backend=name)
            try:
                turning = rotating(rig, problem, call, lambda: tuple(_arrays(rig, problem, given)))
            except Exception as error:  # no memory for the operands: the next implementation may need none
                ours[name] = f"{type(error).__name__}: {error}"
                continue
            contender = peers.Contender("plain call", turning, lambda y: to_nchw(rig.host(y)))
            ours[name] = drive.Ours(name, contender, "" if planned is None else planned.detail)
        return drive.Field(ours, rig.peers(problem, given))

    return enter


def _arrays(rig: Rig, problem: Conv2dProblem, given: Arrays) -> list[Any]:
    return [None if values is None else rig.array(problem, values) for values in (given.x, given.k, given.bias)]


def calling(problem: Conv2dProblem, **where: Any) -> Callable[[Any, Any, Any], Any]:
    """gpuconv's operator for the problem's op, of its first operand, its second and the bias."""
    options = arguments(problem) | where
    if problem.op == "input_grad":
        N, C, H, W = problem.x_shape
        size = (N, C, H, W) if problem.layout == "NCHW" else (N, H, W, C)
        return lambda dy, k, bias: gpuconv.grad.conv2d_input(size, k, dy, **_of_gradient(options))
    if problem.op == "weight_grad":
        return lambda x, dy, bias: gpuconv.grad.conv2d_weight(x, problem.k_shape, dy, **_of_gradient(options))
    return partial(gpuconv.conv2d, **options)


def _of_gradient(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("activation", "padding_mode")}


def from_host(rig: Rig) -> drive.Enter:
    """Who takes part from NumPy to NumPy: gpuconv with ``device="cuda"``, and PyTorch with copies both ways."""
    device = "cpu" if type(rig) is Rig else "cuda"

    def enter(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        call = partial(calling(problem, device=device), given.x, given.k, given.bias)
        label = f"device={device}"
        ours = drive.Ours(label, peers.Contender("plain call", call, peers.to_nchw(problem)))
        return drive.Field({label: ours}, {"torch": _torch_from_host(problem, given, device)})

    return enter


def _torch_from_host(problem: Conv2dProblem, given: Arrays, device: str) -> list[peers.Contender] | str:
    """PyTorch from ordinary memory, and from and to memory that was page-locked ahead."""
    why = _cudnn_refuses(problem)
    if why:
        return why
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return "this PyTorch finds no GPU"
    x, k, bias = peers.tensors(problem, given, "cpu")
    weights = k.to(device), None if bias is None else bias.to(device)

    def plain() -> Any:
        return peers.convolution(problem, x.to(device), *weights)().cpu()

    found = [peers.Contender(".to(device), .cpu()", plain, peers.from_tensor, None, _activate(problem))]
    if device == "cuda":
        locked = x.pin_memory()
        place = torch.empty_like(plain(), pin_memory=True)

        def pinned() -> Any:
            y = peers.convolution(problem, locked.to(device, non_blocking=True), *weights)()
            place.copy_(y, non_blocking=True)
            torch.cuda.synchronize()
            return place

        setting = "operand and result page-locked ahead"
        found.append(peers.Contender(setting, pinned, peers.from_tensor, None, _activate(problem)))
    return found


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
    why = _cudnn_refuses(problem)
    if why:
        return why
    import torch

    tf32 = problem.precision == "medium"
    activate = _activate(problem)
    found, failed = [], []
    for name, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):

        def make(form: Any = form) -> tuple[Any, ...]:
            x, k, bias = peers.tensors(problem, given, device)
            if problem.op == "weight_grad" and problem.layout == "NHWC":
                k = k.permute(0, 3, 1, 2)
            # clone(): on the CPU a tensor made from an array shares its memory, and sets must not.
            return x.clone(memory_format=form), k.clone(memory_format=form), bias

        try:
            call = rotating(rig, problem, _torch_call(problem, device, form), make)
        except Exception as error:  # no memory for its operands, for example; the other format may take less
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        setting = f"{name}, benchmark, TF32 {'allowed' if tf32 else 'not allowed'}"
        found.append(peers.Contender(setting, call, peers.from_tensor, None, activate))
    return found or "; ".join(failed)


def _cudnn_refuses(problem: Conv2dProblem) -> str:
    peer = peers.PEERS["torch"]
    return peer.missing() or "; ".join(peer.unsupported(problem))


def _activate(problem: Conv2dProblem) -> Callable[[], None]:
    """Let cuDNN choose among all its algorithms, in the arithmetic that the problem's precision allows."""
    import torch

    def activate() -> None:
        torch.set_grad_enabled(False)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0  # every algorithm, not the first ten
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = problem.precision == "medium"

    return activate


def _torch_call(problem: Conv2dProblem, device: str, form: Any) -> Callable[[Any, Any, Any], Any]:
    """PyTorch's function for the problem's op, of the first operand, the second and the bias."""
    import torch

    if problem.op == "forward":
        return lambda x, k, bias: peers.convolution(problem, x, k, bias)()
    pads = (problem.padding[0][0], problem.padding[1][0])
    rest = (None, problem.stride, pads, problem.dilation, False, (0, 0), problem.groups)
    dtype = getattr(torch, problem.x_dtype)

    def empty(shape: tuple[int, ...]) -> Any:  # of an operand that it asks for and does not read
        return torch.empty(shape, dtype=dtype, device=device).contiguous(memory_format=form)

    backward = torch.ops.aten.convolution_backward
    if problem.op == "input_grad":
        x = empty(problem.x_shape)
        return lambda dy, k, bias: backward(dy, x, k, *rest, (True, False, False))[0]
    k = empty(problem.k_shape)
    return lambda x, dy, bias: backward(dy, x, k, *rest, (False, True, False))[1]
