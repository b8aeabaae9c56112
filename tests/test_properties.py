"""Any call at all, drawn over the whole space of conv2d's arguments, on every implementation that can serve it.

Valid calls are compared with the oracle in units of the bound; arbitrary ones may only be refused, by name and before
anything runs, or be right. The quick profile tries a few dozen of each; the long one, split in shares, as many as
``GPUCONV_TEST_EXAMPLES`` says:

    GPUCONV_TEST_EXAMPLES=50000 python -m pytest -m full tests/test_properties.py
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import cases
import numpy as np
import oracle
import pytest
import units
from calls import is_costly
from hypothesis import event, given
from hypothesis import strategies as st
from running import SERVE_EVERYTHING, SIMULATOR_MARKS, home, usable
from strategies import ANYTHING, ARRAYS, Call, calls

import gpuconv
from gpuconv import conv2d, dispatch, explain

pytestmark = SIMULATOR_MARKS

# Two shares of the long run, for two processes.
shares = pytest.mark.parametrize("share", ["quick", *(pytest.param(f"long_{n}", marks=pytest.mark.full) for n in "12")])


def judge(y: Any, answer: oracle.Answer, call: Call, context: str) -> None:
    """The promise of the call's precision: the bound for every element, or for float32 a norm."""
    precision = call.options["precision"]
    if answer.dtype != np.float32 or precision == "highest" or not np.all(np.isfinite(answer.y)):
        slack = call.slack(answer.dtype)
        units.assert_close(y, replace(answer, products=answer.products + slack), context)
        return
    y = units.to_host(y)
    assert (y.dtype, y.shape) == (answer.dtype, answer.y.shape), context
    error = np.linalg.norm((y.astype(np.longdouble) - answer.y).ravel())
    allowed = {"high": 2e-5, "medium": 1e-3}[precision] * np.linalg.norm(answer.magnitude.ravel())
    assert error <= allowed + 1e-40, f"{context}: {error} with {allowed} allowed"


def check(call: Call, name: str, operands: Any, answer: oracle.Answer) -> None:
    xp = home(name, "bfloat16" if "bfloat16" in (call.x_dtype, call.k_dtype, answer.dtype.name) else "float32")
    xp = xp if call.at_home else np
    laid = [
        (None, None) if values is None else form.lay(values, xp)
        for values, form in zip(operands, (call.x_form, call.k_form, call.bias_form), strict=True)
    ]
    given, memories = [array for array, _ in laid], [memory for _, memory in laid if memory is not None]
    images = [units.to_host(memory).tobytes() for memory in memories]
    options = dict(call.options)
    if call.out_form is not None:
        blank = units.unwritten(answer).array
        out, memory = call.out_form.lay(blank, xp)
        before = units.to_host(memory).tobytes()
        options["out"] = out
    try:
        y = conv2d(*given, backend=name, **call.kwargs, **options)
    except gpuconv.NoBackendError as refusal:
        assert name not in SERVE_EVERYTHING and name in str(refusal)
        event(f"{name} refuses")
        return
    except MemoryError as shortage:
        assert "workspace_limit" in call.options and "bytes" in str(shortage)
        event(f"{name} has too little workspace")
        return
    finally:
        assert [units.to_host(memory).tobytes() for memory in memories] == images, "an operand was written to"
    event(name)
    if call.out_form is not None:
        assert y is out
    else:
        assert y.flags.c_contiguous and isinstance(y, xp.ndarray), "not C-contiguous in x's own library"
    judge(y, answer, call, name)
    if call.out_form is not None:
        out[...] = xp.asarray(blank)
        assert units.to_host(memory).tobytes() == before, "memory beside out was written to"


@shares
@given(call=calls())
def test_any_valid_call(share, call):
    x, k, bias = call.operands()
    dtype = cases.numpy_dtype(call.kwargs["dtype"]) if "dtype" in call.kwargs else None
    answer = oracle.answer(x, k, bias, **call.kwargs | {"dtype": dtype})
    for name in usable():
        if is_costly(name, call.x_dtype, call.kwargs.get("dtype")):
            continue
        check(call, name, (x, k, bias), answer)


# ---- arguments of every kind

NUMBERS = ("stride", "padding", "dilation", "groups", "x_zero_point", "k_zero_point", "padding_value")
CHOICES = ("padding_mode", "layout", "kernel_layout", "activation", "precision", "dtype", "flip")
PLACES = ("device", "backend", "workspace_limit")
MOST_OUTPUTS = 10_000  # of a call that is carried out


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """One to three arguments as no strategy for valid calls would have them."""
    found: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from((*NUMBERS, *NUMBERS, *CHOICES, *PLACES, "x", "k", "bias", "out")))
        found[name] = draw(ARRAYS if name in ("x", "k", "bias", "out") else ANYTHING)
    return found


@contextlib.contextmanager
def entered() -> Iterator[list[str]]:
    """The names of the implementations that were started."""
    names: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in dispatch.TABLE:
            module = dispatch.implementation(name)

            def run(*arguments: Any, name: str = name, run: Any = module.run) -> None:
                names.append(name)
                run(*arguments)

            stack.enter_context(mock.patch.object(module, "run", run))
        yield names


def outcome(function: Any, *operands: Any, **arguments: Any) -> tuple[type[Exception] | None, Any]:
    """(None, result), or the refusal's type and text."""
    try:
        return None, function(*operands, **arguments)
    except (ValueError, TypeError, MemoryError, gpuconv.NoBackendError) as refusal:
        text = str(refusal)
        assert text.startswith(f"{function.__name__}: "), text
        return type(refusal), text


def shape_of(report: Any, x: np.ndarray, k: np.ndarray) -> tuple[int, ...]:
    """What explain gives as (N, O, OH, OW), in the rank and layout of the call."""
    N, O, OH, OW = report.output_shape
    if k.ndim == 2:
        return OH, OW
    shape = (O, OH, OW) if report.problem.layout == "NCHW" else (OH, OW, O)
    return shape if x.ndim < 4 else (N, *shape)


@pytest.mark.filterwarnings("ignore::gpuconv.DeviceFallbackWarning")
@shares
@given(call=calls(), changed=changes())
def test_any_arguments_are_refused_or_served(share, call, changed):
    """A ValueError or a TypeError that names what was wrong, before anything runs; else what explain announced."""
    x, k, bias = call.operands()
    arguments = {"x": x, "k": k, "bias": bias, **call.kwargs, **call.options, **changed}
    asked = {name: value for name, value in arguments.items() if name not in ("x", "k", "bias", "out")}
    operands = [arguments[name] for name in ("x", "k", "bias")]
    refusal, report = outcome(explain, *operands, **asked)
    if refusal is None and np.prod([float(n) for n in report.output_shape]) > MOST_OUTPUTS:
        event("too large to carry out")
        return
    out = {"out": arguments["out"]} if "out" in arguments else {}
    with entered() as names:
        error, y = outcome(conv2d, *operands, **asked, **out)
    event(f"{error.__name__ if error else 'served'}")
    if error is not None:
        assert not names, f"{names} had been started before {y}"
        if refusal is None and "out" not in changed:
            assert error in (MemoryError, gpuconv.NoBackendError), f"explain has no objection; conv2d says {y}"
        return
    assert refusal is None, f"explain refuses what conv2d does: {report}"
    assert (y.shape, y.dtype.name) == (shape_of(report, *operands[:2]), report.problem.y_dtype)
    assert not names or names == [report.implementation]
