"""Whose array is it, and where does it live: the edge between gpuconv and the caller's libraries.

Everything arrives here as what the caller holds (NumPy, CuPy, PyTorch, DLPack, ``__cuda_array_interface__``, a list)
and becomes an ``Operand``: a NumPy array in host memory or a CuPy array on a GPU, with a note of where it came from.
Whole arrays are copied between host and device here alone; ``streaming`` and ``pinned`` copy large ones piece by piece.
No library is imported unless an array of it is at hand, or a GPU is asked for.
"""

from __future__ import annotations

import ctypes
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gpuconv import dtypes
from gpuconv.geometry import as_integer

Array = Any  # numpy.ndarray or cupy.ndarray; CuPy has no stubs

_HOST_DLPACK = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA_DLPACK = (2, 13)  # kDLCUDA, kDLCUDAManaged
_NOT_HOST_MEMORY = ("__cuda_array_interface__", "__dask_graph__")  # what classes have whose arrays may live elsewhere


@dataclass(frozen=True)
class Operand:
    """An argument as gpuconv sees it: ``array`` shares memory with what the caller passed wherever it can."""

    array: Array
    library: str  # "numpy", "cupy" or "torch": what the result comes back as
    device: int | None  # CUDA ordinal, or None for host memory
    dtype: str
    stream: int | None = None  # the current stream of a library other than CuPy, as a pointer

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)


def output(call: str, out: Any) -> Operand:
    """``out=`` as an Operand over the caller's own memory; refused where gpuconv would have to write to a copy."""
    if isinstance(out, Operand):
        return out
    shares = isinstance(out, np.ndarray) or hasattr(out, "__cuda_array_interface__") or hasattr(out, "__dlpack__")
    if not shares:
        raise TypeError(f"{call}: out must be an array to write the result to; got {type(out).__name__}")
    interface = None if _is_torch(out) else getattr(out, "__cuda_array_interface__", None)
    if interface is not None and (interface.get("data") or (0, False))[1]:
        raise ValueError(f"{call}: out is read-only")
    if _is_torch(out) and (out.is_conj() or out.is_neg()):
        raise ValueError(f"{call}: out is a conjugate or negative view; pass the tensor it is a view of")
    if isinstance(out, np.ndarray) and not out.dtype.isnative:
        raise TypeError(f"{call}: out has dtype {out.dtype.str}; its byte order must be the machine's own")
    return operand(call, "out", out)


def _root(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def operand(call: str, name: str, value: Any) -> Operand:
    """``value`` as an Operand; a TypeError that names ``name`` when it is no array of numbers."""
    if isinstance(value, type):
        raise TypeError(f"{call}: {name} must be an array of numbers; got the class {value.__name__}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{call}: {name} is a masked array; fill or drop its masked elements first ({name}.filled(0))")
    if isinstance(value, Operand):
        return value
    if isinstance(value, np.ndarray):
        return _host(call, name, np.asarray(value))
    if _is_torch(value):
        return _from_torch(call, name, value)
    if _root(value) == "cupy" and hasattr(value, "__cuda_array_interface__"):
        return _on_gpu(call, name, value)
    if is_dask(value) or (getattr(value, "__dask_graph__", None) is not None and value.__dask_graph__() is not None):
        raise TypeError(f"{call}: {_lazy(name, value)}")
    if isinstance(value, (str, bytes)) or value is None:
        raise TypeError(f"{call}: {name} must be an array of numbers; got {value!r}")
    # DLPack first: it orders two streams by an event, where CuPy reads the other protocol by waiting for the GPU.
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _from_dlpack(call, name, value)
    if hasattr(value, "__cuda_array_interface__"):
        return _from_interface(call, name, value)
    if isinstance(value, (list, tuple)):
        _check_items(call, name, value, set())
    numbers = isinstance(value, (list, tuple, range)) or np.isscalar(value)
    if not (numbers or hasattr(value, "__array__") or hasattr(value, "__array_interface__")):
        try:
            value = memoryview(value)
        except TypeError:
            hint = f"; {name}.toarray() makes one of it" if hasattr(value, "toarray") else ""
            raise TypeError(f"{call}: {name} must be an array of numbers; got {type(value).__name__}{hint}") from None
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{call}: {name} cannot become an array: {error}") from None
    return _host(call, name, array)


def _check_items(call: str, name: str, items: Any, seen: set[int]) -> None:
    """Refuse in a list, at any depth, the arrays that are refused outside of one, and those on a GPU: NumPy would drop
    a mask and compute what is lazy.
    """
    seen.add(id(items))  # a list may be in it many times, or even in itself
    for kind in set(map(type, items)):
        nested = issubclass(kind, (list, tuple))
        named = issubclass(kind, np.ma.MaskedArray) or any(hasattr(kind, protocol) for protocol in _NOT_HOST_MEMORY)
        for position, item in enumerate(items) if nested or named else ():
            if type(item) is kind and nested and id(item) not in seen:
                _check_items(call, f"{name}[{position}]", item, seen)
            elif type(item) is kind and named and operand(call, f"{name}[{position}]", item).device is not None:
                raise TypeError(f"{call}: {name} is a list of arrays on a GPU; stack them to one array first")


def _lazy(name: str, value: Any) -> str:
    """Why a lazy ``value`` is refused, and what to do."""
    if not is_dask(value):
        inside = f", or pass the dask array in it, {name}.data" if is_dask(getattr(value, "data", None)) else ""
        return f"{name} is a lazy dask collection, which is never computed silently; compute() it first{inside}"
    return (
        f"{name} is a dask array, which is never computed silently; compute() it first, or apply the call to its "
        "blocks with dask.array.map_blocks (conv2d, Conv2d, conv1d and conv_transpose2d take a dask array as x, and "
        "beside it as k and bias)"
    )


def _from_interface(call: str, name: str, value: Any) -> Operand:
    if value.__cuda_array_interface__.get("mask") is not None:
        raise TypeError(f"{call}: {name} is a masked array; fill or drop its masked elements first")
    library = _cupy(call, name)
    try:
        array = library.asarray(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TypeError(f"{call}: {name} cannot be read through __cuda_array_interface__: {error}") from error
    return _on_gpu(call, name, array)


def _from_dlpack(call: str, name: str, value: Any) -> Operand:
    kind = int(value.__dlpack_device__()[0])
    if kind not in (*_CUDA_DLPACK, *_HOST_DLPACK):
        raise TypeError(f"{call}: {name} lives on DLPack device type {kind}; gpuconv takes host memory and CUDA")
    on_gpu = kind in _CUDA_DLPACK
    library = _cupy(call, name) if on_gpu else np
    try:
        array = library.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{call}: {name} cannot be read through DLPack: {error}") from error
    return _on_gpu(call, name, array) if on_gpu else _host(call, name, array)


def _host(call: str, name: str, array: np.ndarray[Any, Any]) -> Operand:
    return Operand(array, "numpy", None, dtypes.name_of(call, f"{name} has dtype", array.dtype))


def _on_gpu(call: str, name: str, array: Array) -> Operand:
    _require_alignment(call, name, array)
    return Operand(array, "cupy", int(array.device.id), dtypes.name_of(call, f"{name} has dtype", array.dtype))


def _require_alignment(call: str, name: str, array: Array) -> None:
    """Refuse GPU memory that no kernel can read: a misaligned address ends every later call of the process too."""
    align = array.dtype.alignment
    steps = [step for step, extent in zip(array.strides, array.shape, strict=True) if extent > 1]
    if array.size and (int(array.data.ptr) % align or any(step % align for step in steps)):
        raise ValueError(f"{call}: {name} is not aligned to its dtype {array.dtype} in GPU memory; copy it first")


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_dask(value: Any) -> bool:
    """Whether ``value`` is a dask array; where nobody has imported dask, nothing is."""
    library = sys.modules.get("dask.array")
    return library is not None and isinstance(value, getattr(library, "Array", ()))


def is_shape(value: Any) -> bool:
    """Whether an argument is a shape that stands for an array."""
    integers = (int, np.integer)
    return isinstance(value, tuple) and all(isinstance(n, integers) and not isinstance(n, bool) for n in value)


def at_hand(call: str, name: str, value: Any) -> Operand | None:
    """An argument that is an array, as an operand; None where something stands for one."""
    stands = value is None or isinstance(value, (bool, str)) or is_shape(value) or is_dask(value)
    return None if stands else operand(call, name, value)


def _cupy(call: str, name: str) -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        raise TypeError(
            f"{call}: {name} lives on a GPU, and reading it takes CuPy, which is not installed; "
            'pip install "gpuconv[cuda13]" (or [cuda12])'
        ) from None
    return cupy


def _from_torch(call: str, name: str, tensor: Any) -> Operand:
    if tensor.requires_grad:
        raise TypeError(f"{call}: {name} requires grad, and gpuconv does not record gradients; detach() it")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{call}: {name} is a tensor of layout {tensor.layout}; convert it with to_dense()")
    kind_of_number = dtypes.name_of(call, f"{name} has dtype", str(tensor.dtype).removeprefix("torch."))
    tensor = tensor.resolve_conj().resolve_neg()
    kind, ordinal = tensor.device.type, tensor.device.index
    if kind not in ("cpu", "cuda"):
        raise TypeError(f"{call}: {name} lives on torch device {tensor.device}; gpuconv takes cpu and cuda tensors")
    # DLPack has no bfloat16 for NumPy, so it travels as its bits.
    brain = kind_of_number == "bfloat16"
    if brain:
        tensor = tensor.view(sys.modules["torch"].int16)
    if kind == "cpu":
        try:
            array = tensor.numpy()
        except RuntimeError as error:  # a tensor that has no memory of its own, as while PyTorch traces a function
            raise TypeError(f"{call}: {name} cannot be read as an array: {error}") from error
        array = array.view(dtypes.numpy_dtype("bfloat16")) if brain else array
        return Operand(array, "torch", None, kind_of_number)
    cupy = _cupy(call, name)
    stream = int(sys.modules["torch"].cuda.current_stream(ordinal).cuda_stream)
    with on_stream(int(ordinal), stream):  # so that no other stream is made to wait for this one
        array = cupy.from_dlpack(tensor)
    array = array.view(dtypes.numpy_dtype("bfloat16")) if brain else array
    _require_alignment(call, name, array)
    return Operand(array, "torch", int(ordinal), kind_of_number, stream)


def deliver(array: Array, like: Operand) -> Any:
    """``array`` in the library of ``like``, sharing its memory."""
    if like.library != "torch":
        return array
    torch = sys.modules["torch"]
    brain = array.dtype.name == "bfloat16"
    bits = array.view(np.int16) if brain else array
    with on_stream(like.device, like.stream):
        tensor = torch.from_numpy(bits) if isinstance(array, np.ndarray) else torch.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if brain else tensor


# Results from this many bytes on begin at a cache line, as NumPy's own large arrays do not: kernels then write whole
# lines, which made 1×1 layers 3 to 9 % faster and small depthwise ones up to 40 %.
_LINED, _LINE = 1 << 15, 64
_Byte = ctypes.c_char


# Results from this many bytes on begin apart from the image they are made of, by so many bytes, as far as the last
# twelve bits of addresses go. Only these does a processor compare before it reads what may still wait to be written.
# NumPy's large arrays all begin at the same place of a page, so that an image whose rows are some pages apart (1024,
# 2048 or 4096 float32) has each row of results meet all its rows. From the worst distance to this one, 512 rows of 2048
# or 1024: 3×3 2.4 times as fast, 5×5 1.7, 7×7 1.4 (Zen 3). It suits rows of half and quarter pages as well.
_APART, _APART_BY = 1 << 18, 1536
_PAGE = 4096


def empty(shape: tuple[int, ...], dtype: Any, image: Any = None) -> np.ndarray[Any, Any]:
    """An uninitialised host array for a result, made of ``image``."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _LINED:
        return np.empty(shape, dtype)
    place = None
    if size >= _APART and isinstance(image, np.ndarray):
        place = image.__array_interface__["data"][0] + _APART_BY
    return lined(shape, dtype, place)


def lined(shape: tuple[int, ...], dtype: np.dtype[Any], place: int | None = None) -> np.ndarray[Any, Any]:
    """An uninitialised host array from the start of a cache line on, the first after ``place`` within a page."""
    # In few steps: after a convolution, Python's own code has left the caches, and each step takes microseconds.
    spare = _LINE if place is None else _LINE + _PAGE
    raw: Any = np.empty(math.prod(shape) * dtype.itemsize + spare, np.uint8)
    address = ctypes.addressof(_Byte.from_buffer(raw))
    first = 0 if place is None else (place - address) % _PAGE
    return np.ndarray(shape, dtype, raw, first + -(address + first) % _LINE)


def ones(shape: tuple[int, ...], dtype: str, like: Operand) -> Operand:
    """An array of ``shape`` that is 1 everywhere, one element in memory where ``like`` is."""
    if like.device is None:
        return Operand(np.broadcast_to(np.ones((), dtypes.numpy_dtype(dtype)), shape), like.library, None, dtype)
    import cupy

    with on_stream(like.device, like.stream):
        one = cupy.broadcast_to(cupy.ones((), dtypes.numpy_dtype(dtype)), shape)
    return Operand(one, like.library, like.device, dtype, like.stream)


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """A host copy of a GPU array (a NumPy array comes back as it is)."""
    host: np.ndarray[Any, Any] = array if isinstance(array, np.ndarray) else array.get()
    return host


def to_device(array: Array, ordinal: int) -> Array:
    """``array`` on the GPU ``ordinal``, copied there unless it is there."""
    import cupy

    if not isinstance(array, np.ndarray) and int(array.device.id) == ordinal:
        return array
    with cupy.cuda.Device(ordinal):
        if isinstance(array, np.ndarray):
            # Blocking: a copy from pinned memory would go on after the caller has the buffer back.
            return cupy.asarray(native(array), blocking=True)
        # From one GPU to another no stream's order holds at both ends.
        array.device.synchronize()
        moved = cupy.asarray(array)
        cupy.cuda.get_current_stream().synchronize()
        return moved


def unswapped(operand: Any) -> Any:
    """An operand, if there is one, with a copy of a host array that is in another byte order than the machine's."""
    if operand is None or operand.device is not None or operand.array.dtype.isnative:
        return operand
    return replace(operand, array=native(operand.array))


def native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``array`` in the machine's own byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def on_stream(ordinal: int | None, stream: int | None) -> AbstractContextManager[Any]:
    """Make GPU ``ordinal`` and the stream at address ``stream`` current for CuPy; None leaves what is current."""
    if ordinal is None or "cupy" not in sys.modules:
        return nullcontext()
    import cupy

    device = cupy.cuda.Device(ordinal)
    if stream is None:
        return device  # type: ignore[no-any-return]
    return _DeviceAndStream(device, cupy.cuda.ExternalStream(stream, ordinal))


def stream_of(operand: Operand | None) -> Any | None:
    """The stream that ``operand`` is made on: its library's current one on its GPU; None for host memory."""
    if operand is None or operand.device is None:
        return None
    import cupy

    if operand.stream is not None:
        return cupy.cuda.ExternalStream(operand.stream, operand.device)
    with cupy.cuda.Device(operand.device):
        return cupy.cuda.get_current_stream()


def wait_for(stream: Any, device: int) -> None:
    """Make CuPy's current stream wait, on the GPU, for what ``stream`` of ``device`` has been given so far."""
    import cupy

    current = cupy.cuda.get_current_stream()
    if _differ(stream, device, current):
        with cupy.cuda.Device(device):
            event = stream.record(cupy.cuda.Event(disable_timing=True))
        current.wait_event(event)


def hand_back(stream: Any, device: int) -> None:
    """Make ``stream`` of ``device`` wait, on the GPU, for what CuPy's current stream has been given so far."""
    import cupy

    current = cupy.cuda.get_current_stream()
    if _differ(stream, device, current):
        event = current.record(cupy.cuda.Event(disable_timing=True))
        with cupy.cuda.Device(device):
            stream.wait_event(event)


def _differ(stream: Any, device: int, current: Any) -> bool:
    """Whether ``stream`` of ``device`` is another one than the current one; every GPU has its default stream at 0."""
    import cupy

    return stream.ptr != current.ptr or device != int(cupy.cuda.Device().id)


class _DeviceAndStream:
    """Two context managers as one: a CuPy stream belongs to the device that is current."""

    def __init__(self, device: Any, stream: Any) -> None:
        self.device, self.stream = device, stream

    def __enter__(self) -> None:
        self.device.__enter__()
        self.stream.__enter__()

    def __exit__(self, *details: Any) -> None:
        self.stream.__exit__(*details)
        self.device.__exit__(*details)


def stream_pointer(call: str, stream: Any) -> int | None:
    """The address of a CUDA stream given as CuPy, PyTorch, Numba or ``__cuda_stream__`` object, or as an integer."""
    if stream is None:
        return None
    address: Any = stream
    if hasattr(stream, "__cuda_stream__"):
        protocol = stream.__cuda_stream__
        answer = protocol() if callable(protocol) else protocol
        if not (isinstance(answer, tuple) and len(answer) == 2):
            raise TypeError(f"{call}: stream's __cuda_stream__ must give (version, address); got {answer!r}")
        address = answer[1]
    elif hasattr(stream, "ptr"):
        address = stream.ptr
    elif hasattr(stream, "cuda_stream"):
        address = stream.cuda_stream
    try:
        return as_integer(call, "stream", address, 0, 2**64)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{call}: stream must be a CUDA stream object or its address, an integer; got {stream!r}"
        ) from None


def address(array: Array) -> int:
    """Where the first element of a NumPy or CuPy array lies in memory."""
    return int(array.ctypes.data) if isinstance(array, np.ndarray) else int(array.data.ptr)


def byte_bounds(array: Array) -> tuple[int, int]:
    """First address of ``array``'s elements, and the address after the last (equal when it is empty)."""
    start = address(array)
    if array.size == 0:
        return start, start
    reach = [(extent - 1) * step for extent, step in zip(array.shape, array.strides, strict=True)]
    return start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach) + int(array.itemsize)


def require_output(
    call: str, out: Operand, shape: tuple[int, ...], dtype: str, device: int | None, inputs: dict[str, Operand | None]
) -> None:
    """Refuse an ``out=`` of another shape, dtype or device, read-only, or whose memory meets an input's."""
    if out.shape != shape:
        raise ValueError(f"{call}: out has shape {out.shape}; the result has shape {shape}")
    if out.dtype != dtype:
        raise TypeError(f"{call}: out has dtype {out.dtype}; the result has dtype {dtype}")
    if out.device != device:
        raise ValueError(f"{call}: out lives on {place(out.device)}; the result belongs on {place(device)}, as x does")
    if isinstance(out.array, np.ndarray) and not out.array.flags.writeable:
        raise ValueError(f"{call}: out is read-only")
    reach = out.array.itemsize
    for step, extent in sorted((abs(step), extent) for step, extent in zip(out.array.strides, shape, strict=True)):
        if out.array.size and extent > 1 and step < reach:
            raise ValueError(f"{call}: out has elements that share memory (strides {out.array.strides}); pass another")
        reach += (extent - 1) * step
    low, high = byte_bounds(out.array)
    for name, other in inputs.items():
        if other is None or other.device != out.device:
            continue
        other_low, other_high = byte_bounds(other.array)
        if low < other_high and other_low < high:
            raise ValueError(f"{call}: out and {name} overlap in memory; pass an out of its own")


def place(device: int | None) -> str:
    """A device in words."""
    return "the CPU" if device is None else f"cuda:{device}"
