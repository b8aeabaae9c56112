"""From a caller's arrays to the caller's result: what every public operator does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Number
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gpuconv import arrays, debug, dispatch, dtypes, geometry, layouts, magnitudes, schedule, separability
from gpuconv.arrays import Array, Operand
from gpuconv.backends.phases import fill_with_bias
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.errors import NoBackendError
from gpuconv.problem import Conv2dProblem, check_choice
from gpuconv.zero_points import check_zero_point

if TYPE_CHECKING:
    from gpuconv.cutting import Piece


@dataclass
class Request:
    """A valid call: the problem, its operands as the caller holds them, and the result's shape in the caller's form."""

    problem: Conv2dProblem
    shape: tuple[int, ...]
    first: Operand
    second: Operand | None = None
    bias: Operand | None = None
    k_zero_point: np.ndarray[Any, Any] | None = None
    names: tuple[str, str] = ("x", "k")  # of the operands, as the caller knows them
    lift: Callable[[Array], Array] | None = None  # the view of a result of this shape that is an image or a kernel

    @property
    def hosts(self) -> tuple[int, ...]:
        """Numbers of the operands in host memory that are cut where a call is cut into pieces."""
        cut = (self.first, self.second) if self.problem.op == "weight_grad" else (self.first,)
        return tuple(n for n, operand in enumerate(cut) if operand is not None and operand.device is None)


def forward(
    call: str, x: Any, k: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: Any,
    padding_value: Any, flip: Any, layout: Any, kernel_layout: Any, activation: Any, x_zero_point: Any,
    k_zero_point: Any, dtype: Any, precision: Any,
) -> Request:  # fmt: skip
    """Check every argument that describes the convolution; nothing is computed or moved."""
    image, kernel = arrays.operand(call, "x", x), arrays.operand(call, "k", k)
    offset = None if bias is None else as_bias(call, bias)
    return of_operands(
        call, image, kernel, offset, as_zero_points(call, k_zero_point), stride=stride, padding=padding,
        dilation=dilation, groups=groups, padding_mode=padding_mode, padding_value=padding_value, flip=flip,
        layout=layout, kernel_layout=kernel_layout, activation=activation, x_zero_point=x_zero_point, dtype=dtype,
        precision=precision,
    )  # fmt: skip


def of_operands(
    call: str,
    image: Operand,
    kernel: Operand,
    bias: Operand | None,
    zero_points: np.ndarray[Any, Any],
    **options: Any,
) -> Request:
    """A forward convolution of operands, with the other arguments of ``Conv2dProblem.of`` as ``options``."""
    problem = Conv2dProblem.of(
        image.shape, kernel.shape, call=call, x_dtype=image.dtype, k_dtype=kernel.dtype, bias=bias is not None,
        k_zero_point=bool(zero_points.any()), **options,
    )  # fmt: skip
    check_zero_points(call, zero_points, problem)
    if bias is not None:
        check_bias(call, bias, problem)
    shape = image_shape(problem, problem.y_shape, len(image.shape), len(kernel.shape))
    return Request(problem, shape, image, kernel, bias, zero_points if problem.k_zero_point else None)


def kernel_shape(call: str, shape: tuple[int, ...], kernel_layout: Any) -> tuple[int, ...]:
    """(O, I, KH, KW) of a kernel alone."""
    check_choice(call, "kernel_layout", kernel_layout, layouts.KERNEL_LAYOUTS)
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"{call}: k must have shape (KH, KW), (O, KH, KW) or (O, C/groups, KH, KW); got {shape}")
    if len(shape) == 2:
        return (1, 1, *shape)
    given = tuple(shape[axis] for axis in layouts.kernel_axes(kernel_layout, len(shape)))
    return given if len(given) == 4 else (given[0], 1, *given[1:])


def image_shape(problem: Conv2dProblem, nchw: tuple[int, ...], x_rank: int, k_rank: int) -> tuple[int, ...]:
    """The shape ``nchw`` of a result in the caller's layout and rank."""
    shape = nchw[1:] if x_rank < 4 else nchw
    shape = shape[-2:] if k_rank == 2 else shape
    if problem.layout == "NHWC" and len(shape) > 2:
        shape = (*shape[:-3], *shape[-2:], shape[-3])
    return shape


def as_bias(call: str, bias: Any) -> Operand:
    """The bias as an operand; a number is refused, most kindly when a stride was meant."""
    if isinstance(bias, (Number, np.generic)):
        hint = "; the third argument is the bias, did you mean stride=?" if isinstance(bias, (int, np.integer)) else ""
        if isinstance(bias, (bool, np.bool_)):
            hint = "; None is for no bias"
        raise TypeError(
            f"{call}: bias must be an array of shape (O,), one number per output channel; got {bias!r}{hint}"
        )
    return arrays.operand(call, "bias", bias)


def check_bias(call: str, bias: Operand, problem: Conv2dProblem) -> None:
    """Refuse a bias of the wrong shape, or one that the result cannot hold."""
    check_bias_shape(call, bias, problem)
    if not dtypes.castable(bias.dtype, problem.y_dtype):
        raise TypeError(f"{call}: bias of dtype {bias.dtype} cannot be cast to the result's dtype {problem.y_dtype}")
    if problem.y_dtype == "int32" and bias.dtype != "bool":
        # A GPU's bias is judged by its dtype, because reading its values would wait for the GPU.
        low, high = dtypes.RANGES[bias.dtype]
        if bias.device is None:
            low, high = int(bias.array.min()), int(bias.array.max())
        problem.check_overflow(call, max(abs(low), abs(high)))


def check_bias_shape(call: str, bias: Operand, problem: Conv2dProblem) -> None:
    """Refuse a bias that has not one number per channel of the result."""
    if bias.shape != (problem.result_channels,):
        hint = "; the third argument is the bias, did you mean stride=?" if bias.array.size <= 2 else ""
        raise ValueError(
            f"{call}: bias must have shape ({problem.result_channels},), one number per output channel of k; "
            f"got shape {bias.shape}{hint}"
        )


def as_zero_points(call: str, value: Any) -> np.ndarray[Any, Any]:
    """k's zero points as a host array of integers."""
    if isinstance(value, (Number, np.generic, str, bytes)) or value is None:
        return np.asarray(geometry.as_integer(call, "k_zero_point", value, -(2**62), 2**62))
    given = arrays.operand(call, "k_zero_point", value)
    with arrays.on_stream(given.device, given.stream):
        points = arrays.to_host(given.array)
    if points.dtype.kind not in "iu":
        raise TypeError(f"{call}: k_zero_point must be integers; got dtype {points.dtype}")
    return points


def check_zero_points(call: str, points: np.ndarray[Any, Any], problem: Conv2dProblem) -> None:
    """Refuse zero points of a shape that fits no kernel, or beyond the range of k's dtype."""
    if points.shape not in ((), (1,), (problem.O,)):
        raise ValueError(
            f"{call}: k_zero_point must be one integer or one per output channel, shape ({problem.O},); "
            f"got shape {points.shape}"
        )
    check_zero_point(call, "k_zero_point", int(points.min()), int(points.max()), problem.k_dtype)


def workspace(call: str, limit: Any) -> int:
    """``workspace_limit`` in bytes."""
    if limit is None:
        return schedule.DEFAULT_WORKSPACE
    return geometry.as_integer(call, "workspace_limit", limit, 0, None)


def check_where(call: str, device: Any, backend: Any) -> None:
    """Refuse a device or a backend that does not exist by name, or two that contradict each other."""
    kind, _ = dispatch.parse_device(call, device)
    dispatch.check_backend(call, backend)
    dispatch.check_agreement(call, kind, device, backend)


class Keeper(Protocol):
    """Who keeps what was moved to a device or packed, for the next call."""

    def kept(self, key: Any, make: Callable[[], Any], ordinal: int | None) -> Any:
        """What ``make`` gave the first time it was asked for under ``key``, on CuPy's current stream of GPU ``ordinal``
        or with None on the host; there for what that stream is asked for next.
        """


def compute(
    call: str,
    request: Request,
    out: Any = None,
    device: Any = None,
    backend: Any = None,
    workspace_limit: Any = None,
    stream: Any = None,
    keeper: Keeper | None = None,
    done: Callable[[dispatch.Choice], None] | None = None,
) -> Any:
    """Check what says where and how to compute, choose an implementation, run it, and give the caller the result.

    ``done`` is told what ran, unless the next call like it may have values for which that is another implementation.
    """
    limit = workspace(call, workspace_limit)
    given = check_result(call, request, out)
    problem, home = request.problem, request.first.device
    pointer = arrays.stream_pointer(call, stream)
    target = dispatch.resolve(call, device, backend, home, stacklevel=4)
    if target.device == "cpu":
        operands = request.first.array, None if request.second is None else request.second.array
        copies = copied_to_swap(operands, limit)
        if copies is None:
            target = replace(target, swapped=True)
        elif copies:
            first, second = arrays.unswapped(request.first), arrays.unswapped(request.second)
            request, limit = replace(request, first=first, second=second), limit - copies
    target, by_value = told_by_values(
        problem, target, backend, request.second, keeper, image=request.first, bias=request.bias
    )
    choice = dispatch.choose(call, problem, target, backend, limit)
    shortage = ""
    while True:
        try:
            y = execute(request, choice, target, given, pointer, keeper, limit)
            if done is not None and not by_value:
                done(choice)
            return arrays.deliver(y, request.first) if out is None else out
        except MemoryError as error:
            shortage = shortage or str(error)
        less = _with_less(call, request, choice, target, backend, limit)
        if less is None:
            raise MemoryError(f"{call}: {shortage}")
        choice, limit = less


def _with_less(
    call: str, request: Request, choice: dispatch.Choice, target: Target, backend: Any, limit: int
) -> tuple[dispatch.Choice, int] | None:
    """What to try, and with which limit, where memory is shorter than ``limit`` says: smaller pieces or chunks, or an
    implementation that needs less; None where there is nothing.
    """
    smaller_pieces = [pieces_of(request.problem, request.hosts, choice, target, room) for room in (limit, limit // 4)]
    if limit and None not in smaller_pieces:
        return choice, limit // 4
    limit = choice.plan.workspace // 4
    try:
        smaller = dispatch.choose(call, request.problem, target, backend, limit)
    except (MemoryError, NoBackendError):
        return None
    return (smaller, limit) if smaller.plan.workspace < choice.plan.workspace else None


def copied_to_swap(operands: Iterable[Any], limit: int) -> int | None:
    """Bytes of the copies of host ``operands`` that are in another byte order than the machine's: half of ``limit`` at
    most, or None, where few implementations read them as they are.
    """
    foreign = (array for array in operands if isinstance(array, np.ndarray) and not array.dtype.isnative)
    copies = sum(array.nbytes for array in foreign)
    return copies if copies <= limit // 2 else None


# Weights of a kernel whose values are looked through for the largest: a few tens of microseconds.
_LOOKED_THROUGH = 1 << 16


def told_by_values(
    problem: Conv2dProblem,
    target: Target,
    backend: str | None,
    kernel: Operand | None,
    keeper: Keeper | None = None,
    whole: Conv2dProblem | None = None,
    image: Operand | None = None,
    bias: Operand | None = None,
) -> tuple[Target, bool]:
    """``target`` with what the values of ``kernel`` tell, and where these alone do not, those of ``image`` too: where
    they may decide what runs, and no GPU holds them. Also whether the next call like it may have others, which the
    ``kernel`` of a ``keeper`` has not. ``problem`` may be of a part of the channels of ``whole``, whose kernel it is.
    """
    if kernel is None or kernel.device is not None:
        return target, False
    array = kernel.array

    def kept(fact: str, made: Callable[[], Any]) -> Any:
        return made() if keeper is None else keeper.kept(fact, made, None)

    if dispatch.values_matter(problem, target, backend):
        factors = kept("separable", lambda: separability.factors(view(whole or problem, 1, array)) is not None)
        return replace(target, separable=factors), keeper is None
    if not 0 < array.size <= _LOOKED_THROUGH or not dispatch.digits_matter(problem, target, backend):
        return target, False
    target = replace(target, k_digits=kept("k_digits", lambda: magnitudes.largest(array).bit_length()))
    known = problem.bias == (bias is not None) and (bias is None or bias.device is None)
    if image is None or image.device is not None or not known or not dispatch.sums_matter(problem, target):
        return target, keeper is None
    weights = kept("weights", lambda: magnitudes.largest_weights(problem, view(problem, 1, array)))
    digits = magnitudes.sum_digits(problem, weights, image.array, None if bias is None else bias.array)
    return replace(target, sum_digits=digits), True


def check_result(call: str, request: Request, out: Any) -> Operand | None:
    """``out`` as an operand, if there is one; refused where it is not what the result needs."""
    problem = request.problem
    given = None if out is None else arrays.output(call, out)
    needed = problem.result_size * dtypes.itemsize(problem.y_dtype)
    if needed > sys.maxsize:
        raise MemoryError(
            f"{call}: the result, of shape {request.shape}, needs {needed} bytes, beyond any address space"
        )
    if given is not None:
        inputs = {request.names[0]: request.first, request.names[1]: request.second, "bias": request.bias}
        arrays.require_output(call, given, request.shape, problem.y_dtype, request.first.device, inputs)
    return given


def result(call: str, request: Request, out: Any) -> Operand:
    """``out``, or a new array for the result, as an operand."""
    given = check_result(call, request, out)
    first, dtype = request.first, request.problem.y_dtype
    if given is not None:
        return given
    with arrays.on_stream(first.device, first.stream):
        return replace(first, array=_empty(request.shape, dtypes.numpy_dtype(dtype), first.device), dtype=dtype)


def execute(
    request: Request,
    choice: dispatch.Choice,
    target: Target,
    given: Operand | None,
    stream: int | None,
    keeper: Keeper | None,
    limit: int,
) -> Array:
    """Move the operands where the implementation wants them, run it, and bring the result to the first one's device.

    Large host arrays go through a GPU in pieces, each made within ``limit`` bytes of scratch.
    """
    problem, home = request.problem, request.first.device
    implementation = dispatch.implementation(choice.name)
    pieces = pieces_of(problem, request.hosts, choice, target, limit)
    # A kernel of our own takes host arrays as they are, in pieces too where there is no CuPy; everything else on a GPU
    # takes CuPy arrays.
    ordinal = target.ordinal
    takes_hosts = implementation.ARRAYS == "any" and home is None and (pieces is None or not dispatch.has_cupy())
    if target.device == "cpu" or takes_hosts:
        ordinal = None
    place = home if ordinal is None else ordinal
    if stream is None and place == home:
        stream = request.first.stream
    out = None if given is None else given.array
    # What a keeper has copied is nobody else's: it sees to its order itself.
    theirs = (request.first, given) if keeper is not None else (request.first, request.second, request.bias, given)
    sources = [(operand, arrays.stream_of(operand)) for operand in theirs]
    with arrays.on_stream(place, stream):
        for operand, source in sources:
            if operand is not None and operand.device is not None:
                arrays.wait_for(source, operand.device)

        def moved(operand: Operand | None, number: int | None = None) -> Array | None:
            if operand is None:
                return None
            if pieces is not None and number in request.hosts:
                return operand.array
            return arrays.to_host(operand.array) if ordinal is None else arrays.to_device(operand.array, ordinal)

        def kept(key: Any, make: Callable[[], Any]) -> Any:
            return make() if keeper is None else keeper.kept((key, ordinal, target.ordinal), make, ordinal)

        held = None if pieces is not None and home is None else ordinal  # where the result is written
        in_place = out is not None and home == held
        y = out if in_place else _empty(request.shape, dtypes.numpy_dtype(problem.y_dtype), held, request.first.array)
        result = view(problem, 2, y if request.lift is None else request.lift(y))
        bias = kept(("bias", problem.y_dtype), lambda: _cast_bias(moved(request.bias), problem))
        points = request.k_zero_point
        if points is not None:
            points = np.broadcast_to(points, (problem.O,)).astype(np.int64)
        if problem.result_size and problem.products:
            second = kept("second", lambda: moved(request.second, 1))
            operands = Operands(
                view(problem, 0, moved(request.first, 0)),
                None if second is None else view(problem, 1, second),
                bias,
                points if ordinal is None or points is None else arrays.to_device(points, ordinal),
                None,
                target.ordinal,
                stream,
            )

            def packed(plan: Plan, operands: Operands) -> Any:
                key = choice.name, implementation.pack_key(plan)
                return kept(key, lambda: implementation.pack(plan, operands))

            if pieces is not None:
                from gpuconv import streaming  # with its threads, slow to import

                streaming.compute(choice.name, problem, pieces, operands, result, packed)
            else:
                if keeper is not None:
                    operands.packed, operands.again = packed(choice.plan, operands), True
                implementation.run(choice.plan, operands, result)
            if target.device == "cuda":
                debug.launched(choice.name, problem)
        elif problem.result_size:
            fill_with_bias(problem, bias, result)
        for operand, source in sources:
            if operand is not None and operand.device is not None and place is not None:
                # The caller may free an operand on its own stream as soon as the call returns.
                arrays.hand_back(source, operand.device)
        if home == held:
            return y
        y = arrays.to_host(y) if home is None else arrays.to_device(y, home)
        if out is None:
            return y
        out[...] = y
        return out


def pieces_of(
    problem: Conv2dProblem, hosts: tuple[int, ...], choice: dispatch.Choice, target: Target, limit: int
) -> list[Piece] | None:
    """The pieces in which the operands ``hosts`` go through a GPU; None where they are moved whole."""
    if target.device == "cpu" or not hosts or not problem.products:
        return None
    from gpuconv import cutting

    return cutting.cut(choice.name, problem, target, limit, hosts)


def _cast_bias(bias: Array | None, problem: Conv2dProblem) -> Array | None:
    """The bias rounded to the result's dtype; sums convert it on to their own."""
    if bias is None or dtypes.is_integer(problem.y_dtype):
        return bias
    with np.errstate(all="ignore"):
        return bias.astype(dtypes.numpy_dtype(problem.y_dtype), copy=False)


# What the first operand, the second and the result of each op are.
_FORMS = {
    "forward": ("image", "kernel", "image"),
    "input_grad": ("image", "kernel", "image"),
    "weight_grad": ("image", "image", "kernel"),
    "unfold": ("image", "", "windows"),
    "fold": ("windows", "", "image"),
}


def shape_of(problem: Conv2dProblem, which: int) -> tuple[int, ...]:
    """The four-dimensional shape, in the caller's layout, of an image or kernel: operand 0 or 1, or the result, 2."""
    shape = problem.result_shape if which == 2 else problem.operand_shapes[which] or ()
    kernel = _FORMS[problem.op][which] == "kernel"
    axes = layouts.kernel_axes(problem.kernel_layout, 4) if kernel else layouts.image_axes(problem.layout, 4)
    return tuple(shape[axes.index(axis)] for axis in range(4))


def view(problem: Conv2dProblem, which: int, array: Array) -> Array:
    """An operand (0, 1) or the result (2) as implementations see it: a view with the groups as an axis."""
    form = _FORMS[problem.op][which]
    if form == "kernel":
        return layouts.kernels(array, problem.kernel_layout, problem.flip, problem.groups)
    if form == "windows":
        return array.reshape((problem.N, problem.C, problem.KH * problem.KW, problem.OH, problem.OW))
    return layouts.images(array, problem.layout, problem.groups)


def _empty(shape: tuple[int, ...], dtype: Any, ordinal: int | None, image: Array | None = None) -> Array:
    if ordinal is None:
        return arrays.empty(shape, dtype, image)
    import cupy

    with cupy.cuda.Device(ordinal):
        return cupy.empty(shape, dtype)
