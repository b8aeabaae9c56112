"""``explain``: what would run, what would not and why, and what it costs; from shapes alone."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np

from gpuconv import arrays, dispatch, dtypes, geometry, request, transpose
from gpuconv.backends.protocol import Target
from gpuconv.errors import NoBackendError
from gpuconv.explanation import Explanation, Verdict
from gpuconv.problem import Conv2dProblem, check_choice


def explain(
    x: Any,
    k: Any = None,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    padding_mode: str = "constant",
    padding_value: complex = 0,
    flip: bool = False,
    layout: str = "NCHW",
    kernel_layout: str = "OIHW",
    activation: str | None = None,
    x_zero_point: Any = 0,
    k_zero_point: Any = 0,
    dtype: Any = None,
    precision: str = "highest",
    out: Any = None,
    device: str | None = None,
    backend: str | None = None,
    workspace_limit: int | None = None,
    stream: Any = None,
    input_dtype: Any = "float32",
    op: str = "forward",
    output_padding: Any = 0,
) -> Explanation:
    """Say what ``conv2d`` would run with the same arguments, and why; nothing is computed.

    Parameters
    ----------
    x, k : array_like, or tuple of int
        As for ``conv2d``; a tuple of integers stands for an array of that shape and of ``input_dtype``. Or ``x`` alone,
        as a problem line such as ``"n8c3h224w224_o64kh7kw7_s2p3_f32"``. Of a dask array, one of the
        largest blocks is explained.
    bias : array_like or bool, optional
        As for ``conv2d``; True stands for a bias that is not at hand.
    stride, padding, dilation, groups, padding_mode, padding_value, flip, layout, kernel_layout, activation, \
x_zero_point, k_zero_point, dtype, precision, out
        As for ``conv2d``. ``out`` changes nothing.
    device : str, optional
        As for ``conv2d``. With ``"cuda"`` on a machine without a GPU the report lists what is missing, and still says
        what every CUDA implementation thinks of the problem.
    backend, workspace_limit, stream
        As for ``conv2d``. ``stream`` changes nothing.
    input_dtype : dtype, default "float32"
        Of arguments given as shapes.
    op : {"forward", "transpose", "input_grad", "weight_grad"}
        What is to be computed: ``conv2d``, or ``grad.conv2d_input`` or ``grad.conv2d_weight`` of that convolution. With
        ``"transpose"`` the arguments are those of ``conv_transpose2d``.
    output_padding : int or (rows, columns), default 0
        As for ``conv_transpose2d``.

    Returns
    -------
    Explanation
        Problem line, chosen implementation, every other one with its reasons, resolved padding, output shape, FLOPs,
        bytes, workspace, accumulation dtype and precision, as attributes and in print.

    Raises
    ------
    TypeError, ValueError
        As ``conv2d``, for arguments that it would refuse.

    Examples
    --------
    >>> report = explain((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    >>> report.output_shape, report.flops
    ((8, 64, 112, 112), 1888223232)
    >>> print(report)
    problem    n8c3h224w224_o64kh7kw7_s2p3_f32
    runs       ... on cpu
    ...
    """
    call = "explain"
    home, blocks, copies = None, None, None
    if isinstance(x, str):
        given = {
            "k": k, "bias": bias, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
            "padding_mode": padding_mode, "padding_value": padding_value, "flip": flip, "layout": layout,
            "kernel_layout": kernel_layout, "activation": activation, "x_zero_point": x_zero_point,
            "k_zero_point": k_zero_point, "dtype": dtype, "precision": precision, "input_dtype": input_dtype,
            "op": op, "output_padding": output_padding,
        }  # fmt: skip
        for name, value in given.items():
            if value is not (default := _DEFAULTS[name]) and not (isinstance(value, (int, str)) and value == default):
                raise TypeError(f"{call}: a problem line stands for all of the problem, so leave out {name}={value!r}")
        problem = Conv2dProblem.parse(x, call)
    else:
        if k is None:
            raise TypeError(f"{call}: k is missing; pass both x and k, or one problem line")
        lazy = arrays.is_dask(x) and op in ("forward", "transpose")
        x_shape, x_dtype, home = _described(call, "x", x, input_dtype, lazy)
        k_shape, k_dtype, _ = _described(call, "k", k, input_dtype, lazy)
        zero_points = request.as_zero_points(call, k_zero_point)
        has_bias = bias is not None and bias is not False
        _check_op(call, op, locals())
        if op == "transpose":
            problem = transpose.problem_of(
                call, x_shape, k_shape, x_dtype, k_dtype, has_bias, stride, padding, output_padding, groups, dilation,
                layout, activation, dtype, precision,
            )  # fmt: skip
        else:
            problem = Conv2dProblem.of(
                x_shape, k_shape, call=call, x_dtype=x_dtype, k_dtype=k_dtype, dtype=dtype, bias=has_bias,
                stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=padding_mode,
                padding_value=padding_value, flip=flip, layout=layout, kernel_layout=kernel_layout,
                activation=activation, x_zero_point=x_zero_point, k_zero_point=bool(zero_points.any()),
                precision=precision, op=op, conjugate=op != "forward",
            )  # fmt: skip
        request.check_zero_points(call, zero_points, problem)
        zeros = np.zeros((), dtypes.numpy_dtype("float32" if "float" in x_dtype else "int8"))
        stands_for = np.broadcast_to(zeros, bias) if arrays.is_shape(bias) else bias
        if stands_for is not None and not isinstance(stands_for, bool):
            request.check_bias(call, _bias(call, stands_for, lazy), problem)
    whole = problem
    if not isinstance(x, str) and lazy:
        from gpuconv import blocked

        rank = len(request.image_shape(problem, problem.result_shape, len(x_shape), len(k_shape)))
        problem, blocks = blocked.typical(problem, x, rank)
    limit = request.workspace(call, workspace_limit)
    kind, _ = dispatch.parse_device(call, device)
    dispatch.check_backend(call, backend)

    wants_gpu = (kind == "cuda" or (kind is None and home is not None)) and backend is None
    missing = dispatch.gpu_missing() if wants_gpu else []
    note = None
    if missing:
        target = Target("cpu")
        policy = dispatch.fallback_policy()
        outcome = {
            "warn": "conv2d would warn and run on the CPU",
            "silent": "conv2d would run on the CPU without a word (GPUCONV_FALLBACK=silent)",
            "error": "conv2d would raise NoBackendError (GPUCONV_FALLBACK=error)",
        }[policy]
        note = f"device={device!r} finds no usable GPU here, so {outcome}. "
        names, rules = dispatch.preferred(problem, "cuda")
        able = [
            name
            for name in names
            if not dispatch.held_back(name, backend) and not dispatch.unsupported(name, problem, Target("cuda", 0))
        ]
        if able:
            why = rules.get(able[0], "first in the table that can run" if able[0] == names[0] else "the first that can")
            note += f"On a GPU machine {able[0]} would run ({why})."
        if policy == "error":
            note = _joined(blocks, note)
            return Explanation(problem, target, None, None, _table(problem, target, backend, limit, None), note)
    else:
        target = dispatch.resolve(call, device, backend, home)
        if target.device == "cpu":
            copies = request.copied_to_swap((x, k), limit)
            target, limit = replace(target, swapped=copies is None), limit - (copies or 0)
        image, kernel, offset = (arrays.at_hand(call, *named) for named in (("x", x), ("k", k), ("bias", bias)))
        image = None if op == "input_grad" else image  # for which x is not what is convolved
        target, _ = request.told_by_values(problem, target, backend, kernel, None, whole, image, offset)
    try:
        choice = dispatch.choose(call, problem, target, backend, limit)
    except (NoBackendError, MemoryError) as error:
        note = _joined(blocks, str(error))
        return Explanation(problem, target, None, None, _table(problem, target, backend, limit, None), note)
    table = _table(problem, target, backend, limit, choice)
    pieces = request.pieces_of(problem, (0, 1) if home is None else (), choice, target, limit)
    if pieces is not None:
        from gpuconv import cutting

        note = cutting.described(pieces)
    plan = replace(choice.plan, workspace=choice.plan.workspace + copies) if copies else choice.plan
    return Explanation(problem, target, choice.name, plan, table, _joined(blocks, note))


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(explain).parameters.items()}


# What an op has no meaning for, besides what every op takes.
_FOREIGN = {
    "forward": ("output_padding",),
    "transpose": ("padding_mode", "padding_value", "flip", "kernel_layout", "x_zero_point", "k_zero_point"),
    "input_grad": (
        "output_padding", "bias", "activation", "padding_mode", "padding_value", "x_zero_point", "k_zero_point",
    ),
}  # fmt: skip
_FOREIGN["weight_grad"] = _FOREIGN["input_grad"]


def _check_op(call: str, op: Any, given: dict[str, Any]) -> None:
    """Refuse an unknown op, and arguments that its operator does not have."""
    check_choice(call, "op", op, tuple(_FOREIGN))
    for name in _FOREIGN[op]:
        value, default = given[name], _DEFAULTS[name]
        if value is not default and not (isinstance(value, (int, str)) and value == default):
            raise ValueError(f"{call}: {name} has no meaning with op={op!r}; got {value!r}")


def _joined(*notes: str | None) -> str | None:
    """The notes that there are, one after the other."""
    return "\n".join(note for note in notes if note) or None


def _bias(call: str, bias: Any, lazy: bool) -> arrays.Operand:
    """A bias to check; a dask array beside a dask array only."""
    if lazy and arrays.is_dask(bias):
        from gpuconv import blocked

        return blocked.stand_in(call, "bias", bias)
    return request.as_bias(call, bias)


def _described(
    call: str, name: str, value: Any, input_dtype: Any, lazy: bool
) -> tuple[tuple[int, ...], str, int | None]:
    """Shape, dtype and GPU of an argument that may be a shape."""
    if arrays.is_shape(value):
        if any(extent < 0 for extent in value):
            raise ValueError(f"{call}: {name} has a negative extent, {value}")
        return tuple(map(int, value)), dtypes.name_of(call, "input_dtype is", input_dtype), None
    if lazy and arrays.is_dask(value):
        from gpuconv import blocked

        operand = blocked.stand_in(call, name, value)
        return operand.shape, operand.dtype, arrays.operand(call, name, value._meta).device
    operand = arrays.operand(call, name, value)
    if isinstance(value, (list, tuple)) and len(operand.shape) == 1:
        said = geometry.said(value)
        raise ValueError(f"{call}: {name}={said} is data of one axis; a shape is a tuple of integers")
    return operand.shape, operand.dtype, operand.device


def _table(
    problem: Conv2dProblem, target: Target, backend: str | None, limit: int, choice: dispatch.Choice | None
) -> tuple[Verdict, ...]:
    """Every implementation with its verdict: the asked device's first, in order of preference."""
    rejected = dict(choice.rejected) if choice is not None else {}
    devices = (target.device, "cuda" if target.device == "cpu" else "cpu")
    verdicts = []
    for device in devices:
        for name in dispatch.preferred(problem, device)[0]:
            here = target if device == target.device else Target(device, 0 if device == "cuda" else None)
            chosen = choice is not None and choice.name == name
            if chosen and choice is not None:
                found: tuple[str, ...] = (choice.why,)
                if dispatch.is_experimental(name):
                    found = (*found, "experimental: no hardware has run it yet")
            else:
                found = rejected.get(name) or _reasons(name, problem, here, limit, backend)
                # What is missing on the machine hides what the problem needs: say both.
                if dispatch.implementation(name).unavailable() is not None:
                    found = (*found, *dispatch.unsupported(name, problem, here))
                # Said beside whatever else stands in the way.
                held = tuple(dispatch.held_back(name, backend))
                found = (*held, *(reason for reason in found if reason not in held))
            if not found and device != target.device:
                found = (f"can run; not asked for (device={target.device!r})",)
            elif not found and backend is not None and name not in (dispatch.candidates(backend) or ()):
                found = (f"can run; backend={backend!r} was forced",)
            elif not found:
                found = ("can run; comes later in the order",)
            verdicts.append(Verdict(name, device, chosen, found))
    return tuple(verdicts)


def _reasons(name: str, problem: Conv2dProblem, target: Target, limit: int, backend: str | None) -> tuple[str, ...]:
    try:
        return tuple(dispatch.attempt(name, problem, target, limit, backend)[1])
    except MemoryError as error:
        return (str(error),)
