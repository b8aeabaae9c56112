"""Launches that are made once and asked for again: what a warmed-up ``Conv2d`` does on a GPU.

The first call with arrays of some shape and strides makes its tables, scratch and arguments, and keeps them beside the
packed weights. Later ones differ in where x and y begin, so that they are nothing but launches: no allocation, no copy,
nothing waited for, and they can be captured in a CUDA graph. What is kept belongs to one thread and one stream, whose
calls are in order: two of them never share scratch, nor does a new stream with the address of one that is gone, whose
kernels may still be running. A capture needs a first call on its own stream, because what it would allocate is not the
graph's. A graph goes on using the scratch of what it captured, which is kept for as long as the ``Conv2d`` keeps its
weights.

``pack`` and ``run`` are those of every implementation that lists its launches: it says how weights are packed for one
of its plan's, and what the steps of one are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

from gpuconv import arrays, dtypes, marks
from gpuconv.backends.numba_cuda import convert, direct, launch, ptx, uploads
from gpuconv.backends.numba_cuda.launch import Flat
from gpuconv.backends.protocol import Operands, Plan

_CALLS = 16  # forms of calls that are kept for one kernel, each with its scratch


class Memory:
    """Where an operand's elements are, in a call like an earlier one."""

    def __init__(self, array: Any) -> None:
        self.array = array

    @cached_property
    def address(self) -> int:
        """Of the first byte."""
        return arrays.byte_bounds(self.array)[0]

    @cached_property
    def vector(self) -> Any:
        """What Numba hands to a kernel; it takes some 30 µs to make, where an address takes one."""
        return launch.flat(self.array).vector


@dataclass(frozen=True)
class Step:
    """A kernel's launch."""

    function: launch.Kernel
    grid: int
    threads: int
    arguments: tuple[Any, ...]

    def __post_init__(self) -> None:
        launch.check_grid(self.grid)

    def run(self, stream: Any) -> None:
        """Launch it."""
        self.function[self.grid, self.threads, stream](*self.arguments)

    def kept(self, x: Any, y: Any) -> Bound | Slotted:
        """The launch for memory in the places of the vectors ``x`` and ``y``, which it lets go of."""
        if _can_bind():
            return bind(self, x, y)
        slots = {id(x): 0, id(y): 1}
        places = tuple((place, slots[id(given)]) for place, given in enumerate(self.arguments) if id(given) in slots)
        kept = tuple(None if id(given) in slots else given for given in self.arguments)
        return Slotted(replace(self, arguments=kept), places)


@dataclass(frozen=True)
class Slotted:
    """A launch through Numba, with places among its arguments for the vectors of x (0) and y (1)."""

    step: Step
    places: tuple[tuple[int, int], ...]

    def launch(self, stream: Any, memory: Sequence[Memory]) -> None:
        """Launch it on this memory."""
        arguments = list(self.step.arguments)
        for place, which in self.places:
            arguments[place] = memory[which].vector
        replace(self.step, arguments=tuple(arguments)).run(stream)


@dataclass(frozen=True)
class Bound:
    """A launch with its arguments as the driver takes them, and the places of the addresses of x (0) and y (1).

    Numba takes some 4 µs to take an array apart, at every launch. This is done with it once.
    """

    config: Any
    kernel: Any
    values: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    held: tuple[Any, ...]  # the other arrays, whose addresses are among the values

    def launch(self, stream: Any, memory: Sequence[Memory]) -> None:
        """Launch it on this memory."""
        from numba.cuda.cudadrv import driver
        from numba.cuda.dispatcher import launch as start

        values = list(self.values)
        for place, which in self.places:
            values[place] = memory[which].address
        start(driver._to_core_stream(stream), self.config, self.kernel, *values)


@lru_cache(maxsize=1)
def _can_bind() -> bool:
    """Whether this Numba launches kernels the way that ``bind`` knows; the simulator does not."""
    if convert.simulated():
        return False
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import driver

    inside = (dispatcher, "launch"), (dispatcher, "LaunchConfig"), (driver, "_to_core_stream")
    return all(hasattr(*name) for name in inside) and hasattr(dispatcher._Kernel, "_prepare_args")


def bind(step: Step, x: Any, y: Any) -> Bound:
    """Let Numba compile the step's kernel for its arguments, and take them apart."""
    from numba.cuda.dispatcher import LaunchConfig

    dynamic = step.function.dynamic
    if dynamic:
        step.function.ask(step.arguments)
    compiled = step.function.compiled(step.arguments)
    values, places, held = taken_apart(compiled, step.arguments, x, y)
    config = LaunchConfig(grid=step.grid, block=step.threads, shmem_size=dynamic)
    return Bound(config, compiled._codelibrary.get_cufunc().kernel, values, places, held)


def taken_apart(
    compiled: Any, arguments: tuple[Any, ...], x: Any, y: Any
) -> tuple[tuple[Any, ...], tuple[tuple[int, int], ...], tuple[Any, ...]]:
    """The arguments as the driver takes them, where the addresses of x and y are among them, and the other arrays."""
    values: list[Any] = []
    places, held = [], []
    for kind, argument in zip(compiled.argument_types, arguments, strict=True):
        first = len(values)
        compiled._prepare_args(kind, argument, 0, [], values)
        if argument is x or argument is y:
            # No other of an array's values, its sizes and nulls, is an address.
            address = launch.address(argument)
            (place,) = (first + index for index, value in enumerate(values[first:]) if value == address)
            places.append((place, 0 if argument is x else 1))
        elif hasattr(argument, "__cuda_array_interface__"):
            held.append(argument)
    return tuple(values), tuple(places), tuple(held)


@dataclass(frozen=True)
class Call:
    """The launches of one call, and the vectors of x and y that other calls have others for."""

    steps: list[Step]
    x: Any
    y: Any
    bias: Any  # held until all is launched, because steps may have pieces of it


@dataclass
class Kept:
    """What a ``Conv2d`` keeps on a GPU: its packed weights, and the launches of the calls that were made of them."""

    weights: Any
    calls: OrderedDict[Any, tuple[Plan, list[Bound | Slotted]]] = field(default_factory=OrderedDict)
    captured: dict[Any, tuple[Plan, list[Bound | Slotted]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, plan: Plan, x: Any, y: Any, address: int, stream: Any, make: Callable[[], Call]) -> None:
        """Launch what was made for a call like this one, or make it; ``address`` is the stream's.

        Raises
        ------
        RuntimeError
            When it would have to be made within the capture of a graph.
        """
        memory = Memory(x), Memory(y)
        captured = marks.captures(address)
        key = (
            id(plan), x.strides, y.strides, *(of.address % ptx.VECTOR_BYTES for of in memory),
            launch.stream_number(address), threading.get_ident(),
        )  # fmt: skip
        with self.lock:
            found = self.calls.get(key)
            if found is not None:
                self.calls.move_to_end(key)
                if captured:
                    self.captured[key] = found
            else:
                found = self.captured.get(key)
        if found is None:
            if captured:
                raise RuntimeError(
                    "Conv2d: a CUDA graph is being captured, and this is the first call of its kind on this stream and "
                    "thread, whose scratch would not be the graph's; make one like it before the capture"
                )
            call = make()
            # The plan is held, so that no other one gets its id.
            found = plan, [step.kept(call.x, call.y) for step in call.steps]
            with self.lock:
                self.calls[key] = found
                if len(self.calls) > _CALLS:
                    self.calls.popitem(last=False)
        for launched in found[1]:
            launched.launch(stream, memory)


def in_place(array: Any) -> bool:
    """Whether kernels read or write the array where it is, whatever call it comes with."""
    return launch.resident(array) and array.size > 0 and launch.in_elements(array)


class Pack(Protocol):
    """Packs the weights ``k`` for the launch ``cut``, on the stream."""

    def __call__(self, cut: Any, k: Flat, like: Any, stream: Any) -> Any:
        """The packed weights, in device memory."""


class Steps(Protocol):
    """Lists what the launch ``cut`` does."""

    def __call__(
        self, cut: Any, x: Flat, k: Any, y: Flat, bias: Any, has_bias: bool, like: Any, stream: Any
    ) -> list[Step]:
        """The steps that make y of x and k, a Flat or what was packed of it."""


def pack(plan: Plan, operands: Operands, pack: Pack | None) -> Kept:
    """The weights in device memory: packed for each of the plan's launches, or, with None, as they are."""
    with launch.on_gpu(operands.ordinal):
        stream = launch.stream(operands.stream, operands.x)
        k: Any = launch.flat(operands.k, stream)
        if pack is not None:
            k = [pack(cut, k, operands.x, stream) for cut in plan.config["launches"]]
        launch.packed_on(stream, operands.x)
        return Kept(k)


def run(plan: Plan, operands: Operands, out: Any, steps: Steps) -> None:
    """Launch the kernels on NumPy operands (uploaded and downloaded here) or on CuPy ones, on the given stream."""
    like, kept = operands.x, operands.packed
    with ExitStack() as stack:
        stack.enter_context(launch.on_gpu(operands.ordinal))
        stream = launch.stream(operands.stream, like)
        if operands.again and kept is not None and in_place(like) and in_place(out):
            address = launch.stream_address(operands.stream, like)
            kept.run(plan, like, out, address, stream, lambda: _call(plan, operands, launch.flat(out), stream, steps))
            return
        y = stack.enter_context(launch.output(out, stream))
        # Held until the stack unwinds, because what was uploaded must outlive the kernels.
        call = _call(plan, operands, y, stream, steps)
        for step in call.steps:
            step.run(stream)


def _call(plan: Plan, operands: Operands, y: Flat, stream: Any, steps: Steps) -> Call:
    """The launches of a call into y."""
    like, kept = operands.x, operands.packed
    x = launch.flat(like, stream)
    k: Any = launch.flat(operands.k, stream) if kept is None else kept.weights
    bias = uploads.vector(like, operands.bias, dtypes.numpy_dtype(plan.sums_in), 1, stream)
    has_bias = operands.bias is not None
    made: list[Step] = []
    for number, cut in enumerate(plan.config["launches"]):
        # Packed weights are of a forward convolution, which sees x and y as they are.
        packed = isinstance(k, list)
        of_x, of_k, of_y = (x, k[number], y) if packed else direct.views(plan.problem, cut.part, x, k, y)
        made += steps(cut, of_x, of_k, of_y, bias, has_bias, like, stream)
    return Call(made, x.vector, y.vector, bias)
