"""The libraries gpuconv is measured against: what each can serve, and every setting in which it may do its best.

Nothing is imported before it is asked for; a library that is not here, and a problem that a library has no function
for, are reasons in a table's row. Operands are brought into each library's own arrays beforehand, untimed, and so are
weights where a setting's name says that they are reordered or prepared ahead; every call allocates its result, as
gpuconv's calls do. The input keeps the problem's layout: where the row says NCHW, nobody gets it channels last.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from bench.check import Arrays
from gpuconv.problem import Conv2dProblem


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contender:
    """Something to time: a call without arguments, and how its result becomes a NumPy array (N, O, OH, OW)."""

    setting: str
    call: Callable[[], Any]
    to_numpy: Callable[[Any], np.ndarray]
    threads: int | None = None
    activate: Callable[[], None] = _nothing  # settings that a library keeps for the whole process


def to_nchw(problem: Conv2dProblem) -> Callable[[Any], np.ndarray]:
    """From a result in the problem's layout, as a NumPy array, to (N, O, OH, OW)."""
    return (lambda y: y.transpose(0, 3, 1, 2)) if problem.layout == "NHWC" else (lambda y: y)


class Peer:
    """A library: its import name, and what to install."""

    library = ""
    install = ""

    def missing(self) -> str | None:
        """Why the library cannot be had here, with the remedy."""
        try:
            importlib.import_module(self.library)
        except ModuleNotFoundError as error:
            if error.name != self.library:
                raise
            return f"{self.library} is not installed; pip install {self.install}"
        return None

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        """Why the library has no function for ``problem``."""
        raise NotImplementedError

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        """The settings to try, likeliest first."""
        raise NotImplementedError


def _plain(problem: Conv2dProblem) -> list[str]:
    """What no peer has a call for: it would take a second pass over the data, and time that pass."""
    reasons = []
    if problem.padding_mode != "constant" or problem.padding_value != 0:
        reasons.append("its convolution pads with zeros only")
    if problem.flip:
        reasons.append("flipping the kernel is a copy of its own")
    if problem.y_dtype != problem.x_dtype:
        reasons.append("it has no result type other than the operands'")
    return reasons


def _planes(problem: Conv2dProblem, name: str) -> list[str]:
    """What a filter of single planes cannot do."""
    reasons = _plain(problem)
    same = tuple(((extent - 1) // 2,) * 2 for extent in (problem.KH, problem.KW))
    if problem.C // problem.groups != 1:
        reasons.append(f"{name} filters planes and does not sum over channels")
    if problem.stride != (1, 1) or problem.dilation != (1, 1):
        reasons.append(f"{name} has neither stride nor dilation")
    if problem.KH % 2 == 0 or problem.KW % 2 == 0 or problem.padding not in (same, ((0, 0), (0, 0))):
        reasons.append(f"{name} pads by half an odd kernel or, cropped, not at all")
    if problem.layout == "NHWC" and (problem.C, problem.O) != (1, 1):
        reasons.append(f"{name} filters planes, which NHWC does not keep together")
    if problem.kernel_layout != "OIHW":
        reasons.append(f"{name} wants the taps of a kernel together, as in OIHW")
    if problem.bias or problem.activation:
        reasons.append(f"{name} has no bias and no activation")
    if problem.x_dtype not in ("float32", "float64"):
        reasons.append(f"{name} is asked for float32 and float64 only")
    return reasons


def _plane_by_plane(
    problem: Conv2dProblem, given: Arrays, function: Callable[[np.ndarray, np.ndarray], np.ndarray], crops: bool
) -> Callable[[], np.ndarray]:
    """A call that filters every plane; ``crops`` says that ``function`` itself leaves out the border."""
    x, k = given.x.reshape(problem.x_shape), given.k.reshape(problem.k_shape)
    H, W, outputs = problem.H, problem.W, problem.O // problem.groups
    crop = (slice(None), slice(None))
    if problem.padding == ((0, 0), (0, 0)) and not crops:
        top, left = problem.KH // 2, problem.KW // 2
        crop = (slice(top, H - top), slice(left, W - left))
    if (problem.N, problem.C, problem.O) == (1, 1, 1):  # no result to gather planes in: what the function returns
        plane, kernel = x[0, 0], k[0, 0]
        return lambda: function(plane, kernel)[crop]

    def call() -> np.ndarray:
        y = np.empty(problem.y_shape, x.dtype)
        for n in range(problem.N):
            for o in range(problem.O):
                y[n, o] = function(x[n, o // outputs], k[o, 0])[crop]
        return y

    return call


class SciPy(Peer):
    library = "scipy"
    install = "scipy"

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        return _planes(problem, "SciPy")

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        from scipy import fft, ndimage, signal

        valid = problem.padding == ((0, 0), (0, 0)) and (problem.KH, problem.KW) != (1, 1)
        mode = "valid" if valid else "same"

        def shaped(y: np.ndarray) -> np.ndarray:
            return y.reshape(problem.y_shape)

        def correlate(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            return ndimage.correlate(x, k, mode="constant")

        def fast(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            with fft.set_workers(threads):
                return signal.correlate(x, k, mode, method="fft")

        def blocks(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            with fft.set_workers(threads):
                return signal.oaconvolve(x, k[::-1, ::-1], mode)

        def direct(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            return signal.correlate2d(x, k, mode)

        found = [("ndimage.correlate", correlate, False, 1)]
        if problem.products <= 49:  # beyond, seconds of loops that ndimage does faster
            found.append(("signal.correlate2d", direct, True, 1))
        if problem.H * problem.W >= 64 * 64:  # below, a transform costs more than the sum it replaces
            transforms = [("signal.correlate fft", fast, True, threads), ("signal.oaconvolve", blocks, True, threads)]
            found = transforms + found if problem.products > 49 else found + transforms
        for name, function, crops, used in found:
            call = _plane_by_plane(problem, given, function, crops=crops and valid)
            yield Contender(f"{name}, plane by plane", call, shaped, used)


class OpenCV(Peer):
    library = "cv2"
    install = "opencv-python-headless"

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        return _planes(problem, "OpenCV's filter2D")

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        import cv2

        def function(x: np.ndarray, k: np.ndarray) -> np.ndarray:
            return cv2.filter2D(x, -1, k, borderType=cv2.BORDER_CONSTANT)

        call = _plane_by_plane(problem, given, function, crops=False)
        x, k = given.x.reshape(problem.x_shape), given.k.reshape(problem.k_shape)
        outputs = problem.O // problem.groups
        if problem.padding != ((0, 0), (0, 0)) and (problem.N, problem.C, problem.O) != (1, 1, 1):

            def call() -> np.ndarray:
                y = np.empty(problem.y_shape, x.dtype)
                for n in range(problem.N):
                    for o in range(problem.O):  # straight into the result, which spares a copy
                        cv2.filter2D(x[n, o // outputs], -1, k[o, 0], y[n, o], borderType=cv2.BORDER_CONSTANT)
                return y

        yield Contender(
            "filter2D, plane by plane",
            call,
            lambda y: y.reshape(problem.y_shape),
            threads,
            lambda: cv2.setNumThreads(threads),
        )


class Torch(Peer):
    """PyTorch on the CPU as it is called: weights as they are, with oneDNN or with its own kernels."""

    library = "torch"
    install = "torch"

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        reasons = _plain(problem)
        if any(before != after for before, after in problem.padding):
            reasons.append("its convolution pads both sides alike")
        if problem.kernel_layout != "OIHW":
            reasons.append("its kernels are OIHW")
        return reasons

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        import torch

        x, k, bias, layout = _in_layout(problem, given)
        call = convolution(problem, x, k, bias)
        if torch.backends.mkldnn.is_available():
            yield Contender(f"oneDNN, {layout}", call, from_tensor, threads, partial(_activate_torch, threads, True))
        # Its own kernels write out a matrix of all windows. Past a gigabyte they were far behind on every layer.
        if problem.products * problem.OH * problem.OW * given.x.itemsize <= 2**30:
            activate = partial(_activate_torch, threads, False)
            yield Contender(f"without oneDNN, {layout}", call, from_tensor, threads, activate)


class TorchAhead(Torch):
    """PyTorch with weights in oneDNN's own order, made ahead: what a ``Conv2d`` is to ``conv2d``."""

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        import torch

        reasons = super().unsupported(problem)
        if problem.x_dtype not in ("float32", "bfloat16"):
            reasons.append("it reorders weights of float32 and bfloat16 only")
        if not torch.backends.mkldnn.is_available() or not hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight"):
            reasons.append("this PyTorch has no oneDNN")
        return reasons

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        x, k, bias, layout = _in_layout(problem, given)
        call, activate = reordered_ahead(problem, x, k, bias), partial(_activate_torch, threads, True)
        yield Contender(f"oneDNN, {layout}, weights reordered ahead", call, from_tensor, threads, activate)
        # oneDNN is often as fast, and at times faster, when it reorders by itself.
        call = convolution(problem, x, k, bias)
        yield Contender(f"oneDNN, {layout}", call, from_tensor, threads, activate)


def _in_layout(problem: Conv2dProblem, given: Arrays) -> tuple[Any, Any, Any, str]:
    """Operands as tensors, and the name of their memory format."""
    import torch

    x, k, bias = tensors(problem, given, "cpu")
    if problem.layout != "NHWC":
        return x, k, bias, "contiguous"
    # Channels-last data bring channels-last weights with them: oneDNN then reorders neither.
    return x, k.contiguous(memory_format=torch.channels_last), bias, "channels_last"


def _activate_torch(threads: int, onednn: bool) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    torch.backends.mkldnn.set_flags(onednn)


class OnnxRuntime(Peer):
    """ONNX Runtime on the CPU: a model of one node, its weights constants that the session packs when it is made."""

    library = "onnxruntime"
    install = "onnxruntime onnx"

    def missing(self) -> str | None:
        reason = super().missing()
        if reason is None and importlib.util.find_spec("onnx") is None:
            return "onnx, which builds its model, is not installed; pip install onnx"
        return reason

    def unsupported(self, problem: Conv2dProblem) -> list[str]:
        reasons = _plain(problem)
        if problem.layout != "NCHW":
            reasons.append("ONNX's Conv is NCHW")
        if problem.kernel_layout != "OIHW":
            reasons.append("ONNX's kernels are OIHW")
        if problem.x_dtype != "float32":
            reasons.append("ONNX Runtime is asked for float32 only")
        return reasons

    def contenders(self, problem: Conv2dProblem, given: Arrays, threads: int) -> Iterator[Contender]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; what it thinks of the machine is no line of ours
        session = onnxruntime.InferenceSession(_onnx_model(problem, given), options, ["CPUExecutionProvider"])
        feed = {"x": given.x}
        yield Contender(
            "session prepared ahead, run", lambda: session.run(None, feed), lambda results: results[0], threads
        )
        binding = session.io_binding()
        binding.bind_cpu_input("x", given.x)
        binding.bind_output("y")  # in memory that it allocates in each run

        def run_bound() -> Any:
            session.run_with_iobinding(binding)
            return binding

        def fetch(binding: Any) -> np.ndarray:
            return binding.copy_outputs_to_cpu()[0]

        yield Contender("session prepared ahead, bound input", run_bound, fetch, threads)


def _onnx_model(problem: Conv2dProblem, given: Arrays) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    (top, bottom), (left, right) = problem.padding
    weights = {"k": given.k} | ({} if given.bias is None else {"bias": given.bias})
    result = "y" if problem.activation is None else "before"
    node = helper.make_node(
        "Conv", ["x", *weights], [result], kernel_shape=[problem.KH, problem.KW], strides=problem.stride,
        pads=[top, left, bottom, right], dilations=problem.dilation, group=problem.groups,
    )  # fmt: skip
    nodes = [node] if problem.activation is None else [node, helper.make_node("Relu", [result], ["y"])]
    ends = {"x": problem.x_shape, "y": problem.y_shape}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items())
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "convolution", [x], [y], constants)
    # Versions that ONNX Runtime has read since 2021: the newest onnx may write what it does not know yet.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return model.SerializeToString()


PEERS: dict[str, Peer] = {
    "torch": Torch(), "torch-ahead": TorchAhead(), "onnxruntime": OnnxRuntime(), "opencv": OpenCV(), "scipy": SciPy(),
}  # fmt: skip


def from_tensor(y: Any) -> np.ndarray:
    """A tensor (logically N, O, OH, OW whatever its strides) as a NumPy array; bfloat16, which is unknown to NumPy,
    becomes float32."""
    y = y.cpu()
    return y.float().numpy() if y.element_size() == 2 else y.numpy()


def tensors(problem: Conv2dProblem, given: Arrays, device: str) -> tuple[Any, Any, Any]:
    """Operands as tensors on ``device``; x is logically N C H W, with the strides of the problem's layout."""
    import torch

    def tensor(array: np.ndarray | None) -> Any:
        if array is None:
            return None
        if problem.x_dtype == "bfloat16":  # travels as its bits
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    x = tensor(given.x)
    return x.permute(0, 3, 1, 2) if problem.layout == "NHWC" else x, tensor(given.k), tensor(given.bias)


def convolution(problem: Conv2dProblem, x: Any, k: Any, bias: Any) -> Callable[[], Any]:
    """PyTorch's convolution, and its activation in place, as a call without arguments."""
    import torch

    pads = (problem.padding[0][0], problem.padding[1][0])
    rest = (problem.stride, pads, problem.dilation, problem.groups)
    if problem.activation == "relu":
        return lambda: torch.relu_(torch.conv2d(x, k, bias, *rest))
    return lambda: torch.conv2d(x, k, bias, *rest)


def reordered_ahead(problem: Conv2dProblem, x: Any, k: Any, bias: Any) -> Callable[[], Any]:
    """``convolution`` with the weights in the order that oneDNN asks for, which the first call makes and keeps."""
    import torch

    pads = (problem.padding[0][0], problem.padding[1][0])
    rest = (pads, problem.stride, problem.dilation, problem.groups)

    @cache
    def reordered() -> Any:
        return torch._C._nn.mkldnn_reorder_conv2d_weight(k.to_mkldnn(), *rest, list(x.shape))

    if problem.activation == "relu":
        return lambda: torch.relu_(torch.mkldnn_convolution(x, reordered(), bias, *rest))
    return lambda: torch.mkldnn_convolution(x, reordered(), bias, *rest)


@contextlib.contextmanager
def torch_restored() -> Iterator[None]:
    """What the contenders set for the whole process is put back."""
    try:
        import torch
    except ModuleNotFoundError:
        yield
        return
    threads, grad, onednn = torch.get_num_threads(), torch.is_grad_enabled(), torch.backends.mkldnn.enabled
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)
        torch.backends.mkldnn.set_flags(onednn)
