"""One body for every implementation, case and dtype of conv2d's relatives, and what each must hold beyond the cases.

As in ``test_implementations``: what this machine cannot run is skipped with the implementation's own sentence, every
second check stands on the GPU where there is one, and everything is compared with the oracle.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import family
import numpy as np
import oracle
import oracle_family
import pytest
import units
from calls import is_costly
from cases import DTYPES, Case
from family import CALLS, FAMILY, FamilyCase
from running import (
    LONG,
    SERVE_EVERYTHING,
    SIMULATED,
    STAND_IN,
    home,
    is_usable,
    simulated,
    skip_costly,
    skip_in_simulator,
    skip_unless_usable,
)  # fmt: skip

import gpuconv
from gpuconv import dispatch

if SIMULATED:
    pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in (scalar|cast):RuntimeWarning")

# Products of one case that the simulator computes in about a second.
SIMULATED_WORK = 3000
QUICK_DTYPES = ("float16", "bfloat16", "float64", "complex64", "uint8", "int64")


def serving(call: str) -> list[str]:
    """The implementations that serve ``call``, in the table's order."""
    return [name for name in dispatch.TABLE if CALLS[call][0] in dispatch.implementation(name).OPS]


def every_implementation_of(*calls: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "call"), [(name, call) for call in calls for name in serving(call)])


SUMS = ("conv2d_input", "conv2d_weight", "conv_transpose2d", "fold")
EVERY = (*SUMS, "unfold", "conv1d")


def runner(name: str, call: str) -> units.Run:
    """The public ``call`` on one implementation; a refusal by one that need not serve everything skips the test."""
    skip_unless_usable(name)

    def run(*operands: Any, **kwargs: Any) -> Any:
        for operand in operands:
            if hasattr(operand, "dtype"):
                skip_costly(name, operand, kwargs.get("dtype"))
        try:
            return family.public(call)(*operands, backend=name, **kwargs)
        except gpuconv.NoBackendError as refusal:
            if name in SERVE_EVERYTHING or name.endswith(".patches"):
                raise
            pytest.skip(str(refusal).partition("\n")[2].strip())

    return run


def chosen(name: str, found: Any, step: int) -> list[Any]:
    """All of ``found``; in the simulator every ``step``-th, of cases those that are small."""
    if not simulated(name):
        return list(found)
    return [item for item in found if getattr(item, "work", 0) <= SIMULATED_WORK][::step]


def is_quick(name: str, case: FamilyCase, dtype: str) -> bool:
    """As in test_implementations; in the simulator what is not a forward problem seen from the other side."""
    main = dtype == ("float32" if "float32" in case.only else case.only[0])
    if simulated(name):
        return main and case.work <= SIMULATED_WORK and (case.smoke or not case.derived) and case.call != "conv1d"
    return main or (case.smoke and dtype in QUICK_DTYPES)


def agreements() -> list[Any]:
    params, absent = [], set()
    for case, dtype in itertools.product(FAMILY, DTYPES):
        if case.accepts(dtype):
            for name in serving(case.call):
                quick = is_quick(name, case, dtype) and not is_costly(name, dtype)
                if (quick or LONG) and name not in absent:
                    marks = () if quick else pytest.mark.full
                    params.append(pytest.param(name, case, dtype, id=f"{name}-{case}-{dtype}", marks=marks))
                    absent |= set() if is_usable(name) else {name}  # one skipped test says why
    return params


@pytest.mark.parametrize(("name", "case", "dtype"), agreements())
def test_agrees(name, case, dtype):
    run, xp = runner(name, case.call), home(name, dtype)
    family.check(run, case, dtype, "normal", into=True)
    if simulated(name):
        return
    family.check(run, case, dtype, "narrow", xp=xp)
    if LONG or not STAND_IN:  # whose sums are NumPy's
        family.check(run, case, dtype, "wide", into=True, xp=xp)
        family.check(run, case, dtype, "positive")


# ---- NaN and Inf


@pytest.mark.parametrize("dtype", cases.FLOATS)
@every_implementation_of(*EVERY)
def test_nan_and_inf_reach_what_reads_them(name, call, dtype):
    """Not what lies between: neither the zeros that a transpose may be computed with, nor the padding."""
    run = runner(name, call)
    found = [case for case in FAMILY if case.call == call and (case.smoke or dtype == "float32")]
    for number, case in enumerate(chosen(name, found, 20)):
        if case.accepts(dtype):
            values = (np.nan, np.inf, -np.inf) if LONG else (np.nan, (np.inf, -np.inf)[number % 2])
            for value, operand in itertools.product(chosen(name, values, 3), read(case)):
                family.check_specials(run, case, dtype, value, operand, home(name, dtype))


def read(case: FamilyCase) -> list[int]:
    """The operands whose every element meets nothing but elements of the other: of one that meets constant zeros in
    the border, a non-finite element may give NaN there or be skipped.
    """
    padded = case.kwargs.get("padding", 0) not in (0, "valid")
    operands = [0] if padded and case.call in ("conv2d_weight", "conv1d") else range(len(case.shapes))
    return [operand for operand in operands if np.prod(case.shapes[operand])]


@every_implementation_of("conv2d_input", "conv_transpose2d")
def test_what_no_product_reaches_is_zero_or_the_bias(name, call):
    """Exactly, whatever the operands hold: a sum over nothing does not multiply a NaN with a zero."""
    run = runner(name, call)
    weight, y = (np.full(shape, np.nan, np.float32) for shape in ((2, 3, 2, 1), (1, 2, 3, 2)))
    out = np.full((1, 3, 11, 7), np.nan, np.float32)
    touched = np.zeros((11, 7), bool)
    touched[[row for start in (0, 4, 8) for row in (start, start + 1)]] = True
    touched[:, [1, 2, 3, 5, 6]] = False
    if call == "conv2d_input":
        run(out.shape, weight, y, stride=4, out=out)
        wanted = np.zeros((3, 1), np.float32)
    else:
        bias = np.array([0.1, -7, 3e30], np.float32)
        run(y, weight, bias, stride=4, output_padding=(1, 2), out=out)
        wanted = bias[:, None]
    assert np.all(np.isnan(out[:, :, touched]))
    assert np.all(out[0][:, ~touched] == wanted)


@every_implementation_of("conv2d_weight")
def test_taps_that_see_only_padding_are_zero(name, call):
    run = runner(name, call)
    x, y = np.ones((2, 1, 1, 1), np.float32), np.ones((2, 1, 1, 1), np.float32)
    out = np.full((1, 1, 3, 3), np.nan, np.float32)
    run(x, (1, 1, 3, 3), y, padding=1, out=out)
    assert out.tolist() == [[[[0, 0, 0], [0, 2, 0], [0, 0, 0]]]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "complex64"])
@every_implementation_of("conv2d_weight")
def test_the_weight_gradient_of_no_images_is_zero(name, call, dtype):
    run, xp = runner(name, call), home(name)
    x, y = xp.empty((0, 4, 5, 6), dtype), xp.empty((0, 6, 2, 2), dtype)
    out = np.full((6, 2, 3, 3), 77, oracle.result_dtype(dtype, dtype))
    run(x, out.shape, y, stride=2, groups=2, out=xp.asarray(out) if xp is np else None)
    found = units.to_host(run(x, out.shape, y, stride=2, groups=2))
    assert found.shape == out.shape and found.dtype == out.dtype
    assert not found.any()
    assert xp is not np or not out.any()


# ---- 16-bit sums


def cancelling(call: str, dtype: Any) -> tuple[tuple[Any, ...], Any, int]:
    """Arguments whose running sum passes what float16 holds (65,504) and comes back; where it does, and to what."""
    signs = np.where(np.arange(599) < 300, 16, -16).astype(dtype)
    same = np.full(599, 16, dtype)
    if call == "conv2d_input":
        return ((1, 1, 2, 2), signs.reshape(599, 1, 1, 1), np.full((1, 599, 2, 2), 16, dtype)), ..., 256
    if call == "conv_transpose2d":
        return (np.full((1, 599, 2, 2), 16, dtype), signs.reshape(599, 1, 1, 1)), ..., 256
    if call == "conv2d_weight":
        return (same.reshape(1, 1, 1, 599), (1, 1, 1, 1), signs.reshape(1, 1, 1, 599)), ..., 256
    # one pixel that every window gives one of seven numbers to
    taps = np.diag(np.array([29952] * 3 + [8] + [-29952] * 3))[:, ::-1].astype(dtype)
    return (taps[None], (1, 13), (1, 7)), (0, 0, 0, 6), 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_implementation_of(*SUMS)
def test_16_bit_sums_are_kept_in_float32(name, call, dtype):
    if dtype == "bfloat16":
        skip_in_simulator(name)
    arguments, where, total = cancelling(call, cases.numpy_dtype(dtype))
    found = units.to_host(runner(name, call)(*arguments))
    assert found.dtype == cases.numpy_dtype(dtype)
    assert np.all(found.astype(np.float64)[where] == total), f"{found.ravel()}, not {total}"


# ---- memory: any strides of the operands and of out

FORWARD_FORMS = (
    Case("forms", (2, 4, 4, 5), (4, 2, 2, 3), {"groups": 2, "padding": ((0, 1), (1, 0)), "stride": (2, 1)}, bias=True),
    Case("forms_last", (2, 4, 5, 4), (2, 3, 2, 4), {"groups": 2, "layout": "NHWC", "kernel_layout": "HWIO"}),
    Case("forms_1x1", (2, 4, 3, 4), (3, 4, 1, 1)),
)
FORMS = {
    call: [case for forward in FORWARD_FORMS for case in family.gradients(forward) if case.call == call]
    for call in family.GRADIENTS
} | {
    "conv_transpose2d": [case for forward in FORWARD_FORMS for case in family.transposed(forward)],
    "unfold": [family.BY_NAME["unfold", "everything"]],
    "fold": [family.BY_NAME["fold", "everything"]],
    "conv1d": [family.BY_NAME["conv1d", "grouped"], family.BY_NAME["conv1d", "nlc_kio"]],
}


def placed(operands: list[Any], xp: Any) -> list[Any]:
    return [None if operand is None else xp.asarray(operand) for operand in operands]


@every_implementation_of(*EVERY)
def test_memory_forms_of_inputs(name, call):
    """Real values, so that a kernel of our own must also give the same bits for every form."""
    run, xp = runner(name, call), home(name)
    for case in chosen(name, FORMS[call], 3):
        operands, answer = family.posed(case, "float32", "normal")
        on_device = placed(operands, xp)
        plain = units.to_host(run(*case.arguments(on_device), **case.kwargs))
        for which, shape in enumerate(case.shapes):
            for text, *form in chosen(name, units.forms(len(shape)), 23):
                context = f"{case.name} operand {which} with {text}"
                view, _ = units.arranged(operands[which], *form, xp)
                given = [*on_device[:which], view, *on_device[which + 1 :]]
                found = run(*case.arguments(given), **case.kwargs)
                family.compare(found, answer, case, "normal", context)
                if name.startswith("numba"):
                    assert units.to_host(found).tobytes() == plain.tobytes(), f"{context} gave other bits"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "complex64"])
@every_implementation_of(*EVERY)
def test_memory_forms_of_out(name, call, dtype):
    run, xp = runner(name, call), home(name)
    if dtype != "float32":
        skip_in_simulator(name)
    for case in chosen(name, FORMS[call], 3):
        operands, answer = family.posed(case, dtype, "narrow")
        arguments = case.arguments(placed(operands, xp))
        blank = family.unwritten(answer).array
        for text, *form in chosen(name, units.forms(answer.y.ndim)[:: 1 if dtype == "float32" else 5], 23):
            context = f"{case.name} {dtype} out with {text}"
            out, memory = units.arranged(blank, *form, xp)
            before = units.to_host(memory).tobytes()
            assert run(*arguments, out=out, **case.kwargs) is out
            family.compare(out, answer, case, "narrow", context)
            out[...] = xp.asarray(blank)
            assert units.to_host(memory).tobytes() == before, f"{context}: the gaps changed"


@every_implementation_of(*EVERY)
def test_stepped_and_broadcast_operands(name, call):
    """A gradient most often begins with ones that are all the same number."""
    run = runner(name, call)
    for case in chosen(name, FORMS[call], 3):
        operands, _ = family.posed(case, "float32", "normal")
        for which, shape in enumerate(case.shapes):
            values = operands[which]
            doubled = np.repeat(np.repeat(values, 2, axis=-1), 2, axis=-2)
            views = {
                "one number": np.broadcast_to(np.float32(3), shape),
                "one image or filter": np.broadcast_to(values[:1], shape),
                "one last row": np.broadcast_to(values[..., :1, :], shape),
                "Fortran order": np.asfortranarray(values),
                "[..., ::2, 1::2]": doubled[..., ::2, 1::2],
                "[..., ::-2, ::2]": doubled[..., ::-2, ::2],
                "read-only": values.copy(),
            }
            views["read-only"].flags.writeable = False
            for text, view in chosen(name, views.items(), 4):
                given = [*operands[:which], view, *operands[which + 1 :]]
                answer = case.answer([*operands[:which], view.copy(), *operands[which + 1 :]])
                found = run(*case.arguments(given), **case.kwargs)
                family.compare(found, answer, case, "normal", f"{case.name} operand {which}: {text}")


# ---- the same bits

SAME_BITS = {
    "conv2d_input": ("grouped_everything", "long_sum_of_outputs", "patches"),
    "conv2d_weight": ("grouped_everything", "long_sum_of_pixels", "batch"),
    "conv_transpose2d": ("grouped_everything", "batch", "output_padding"),
    "unfold": ("everything",),
    "fold": ("everything", "tail"),
    "conv1d": ("plain", "grouped"),
}


@every_implementation_of(*EVERY)
def test_same_bits_from_run_to_run(name, call):
    run = runner(name, call)
    for case in chosen(name, [family.BY_NAME[call, found] for found in SAME_BITS[call]], 2):
        operands, _ = family.posed(case, "float32", "normal")
        first = units.to_host(run(*case.arguments(operands), **case.kwargs)).tobytes()
        for _ in range(3):
            assert units.to_host(run(*case.arguments(operands), **case.kwargs)).tobytes() == first, case.name


@pytest.mark.parametrize("runs", [24, pytest.param(1000, marks=pytest.mark.full)])
@every_implementation_of(*EVERY)
def test_same_bits_on_eight_threads(name, call, runs):
    skip_in_simulator(name)
    run, case = runner(name, call), family.BY_NAME[call, SAME_BITS[call][0]]
    operands, _ = family.posed(case, "float32", "normal")
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: units.to_host(run(*case.arguments(operands), **case.kwargs)).tobytes(), range(runs))
        assert len(set(found)) == 1


@every_implementation_of("conv2d_input", "conv_transpose2d", "fold")
def test_same_bits_in_a_batch(name, call):
    """The n-th image is that of a batch of one: of our own kernels. GEMM libraries are near."""
    run, which = runner(name, call), 1 if call == "conv2d_input" else 0
    for case in chosen(name, [family.BY_NAME[call, found] for found in SAME_BITS[call]], 2):
        operands, answer = family.posed(case, "float32", "normal")
        whole = units.to_host(run(*case.arguments(operands), **case.kwargs))
        for n in range(len(whole)):
            given = list(operands)
            given[which] = given[which][n : n + 1]
            arguments = case.arguments(given)
            if call == "conv2d_input":
                arguments = ((1, *arguments[0][1:]), *arguments[1:])
            alone = units.to_host(run(*arguments, **case.kwargs))
            if name.startswith("numba"):
                assert alone[0].tobytes() == whole[n].tobytes(), f"{case.name}, image {n}"
            units.assert_close(np.concatenate([whole[:n], alone, whole[n + 1 :]]), answer, f"{case.name}, image {n}")


@every_implementation_of(*EVERY)
def test_small_workspaces_give_the_same_answer_or_a_memory_error(name, call):
    run = runner(name, call)
    for case in chosen(name, [family.BY_NAME[call, found] for found in SAME_BITS[call]], 2):
        operands, answer = family.posed(case, "float32", "normal")
        arguments = case.arguments(operands)
        plain = units.to_host(run(*arguments, **case.kwargs))
        served = []
        for limit in chosen(name, (0, 500, 2000, 5000, 10_000, 50_000, 10**6), 3):
            out = family.unwritten(answer)
            try:
                run(*arguments, out=out.array, workspace_limit=limit, **case.kwargs)
            except MemoryError as error:
                assert any(character.isdigit() for character in str(error)), f"{error} names no number of bytes"
                continue
            served.append(limit)
            family.compare(out.array, answer, case, "normal", f"{case.name} in {limit} bytes")
            if name.startswith("numba"):
                assert out.array.tobytes() == plain.tobytes(), f"{case.name} in {limit} bytes gave other bits"
        assert 10**6 in served, f"{case.name} does not fit a megabyte"


# ---- accuracy


def statistical(call: str, terms: int) -> FamilyCase:
    """A problem each of whose sums has ``terms`` products, none of them with the border."""
    if call == "conv2d_weight":
        forward = Case(f"statistic_{terms}", (terms // 64, 3, 10, 10), (4, 3, 3, 3))
    else:  # with full padding every pixel is read by every tap
        forward = Case(f"statistic_{terms}", (1, 8, 8, 8), (terms // 9, 8, 3, 3), {"padding": 2})
    found = family.transposed(forward) if call == "conv_transpose2d" else family.gradients(forward)
    return next(case for case in found if case.call == call)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("terms", [576, 4608])
@every_implementation_of("conv2d_input", "conv2d_weight", "conv_transpose2d")
def test_unit_b(name, call, terms, dtype, record_property):
    skip_in_simulator(name)
    run, case, found = runner(name, call), statistical(call, terms), {}
    for kind in ("normal", "positive"):
        operands, answer = family.posed(case, dtype, kind)
        assert answer.products == terms
        result = run(*case.arguments(operands), **case.kwargs)
        units.assert_close(result, answer, f"{case.name} {dtype} {kind}", units.limit_of(answer))
        found[kind] = units.unit_b(result, answer, *operands[:2])
        record_property(f"unit_b_{kind}", found[kind])
    assert found["normal"] <= 10
    if dispatch.DEVICES[dispatch.library_of(name)] == "cpu":
        assert found["positive"] <= 150


# ---- extents


@every_implementation_of("conv2d_input", "conv2d_weight", "conv_transpose2d", "unfold", "fold")
def test_more_images_and_channels_than_a_grid_axis_holds(name, call):
    skip_in_simulator(name)
    run, many = runner(name, call), 70_000
    ramp, two = np.arange(many, dtype=np.float32), np.full((1, 1, 1, 1), 2, np.float32)
    images, channels = ramp.reshape(-1, 1, 1, 1), ramp.reshape(1, -1, 1, 1)
    twos = np.broadcast_to(two, images.shape)
    if call == "conv2d_input":
        found = run(images.shape, two, images), run(channels.shape, twos, channels, groups=many)
    elif call == "conv_transpose2d":
        found = run(images, two), run(channels, twos, groups=many)
    elif call == "conv2d_weight":
        found = (
            run(images, (1, 1, 1, 1), twos) / np.float32(ramp.sum(dtype=np.float64)) * ramp,
            run(channels, images.shape, np.broadcast_to(two, channels.shape), groups=many),
        )
    elif call == "unfold":
        found = run(images * 2, 1), run(channels * 2, 1)
    else:
        found = run(2 * ramp.reshape(-1, 1, 1), 1, 1), run(2 * ramp.reshape(1, -1, 1), (1, 1), 1)
    for array in found:
        assert np.allclose(units.to_host(array).ravel(), 2 * ramp, rtol=1e-5 if call == "conv2d_weight" else 0, atol=0)


def test_every_call_has_an_implementation_on_every_device():
    for call in EVERY:
        devices = {dispatch.DEVICES[dispatch.library_of(name)] for name in serving(call)}
        assert devices == {"cpu", "cuda"}, call


def test_the_oracle_knows_every_call():
    assert set(CALLS) == {case.call for case in FAMILY}
    assert all(hasattr(oracle_family, call) for call in CALLS)
