"""A child process in which every array that a compiled kernel is given touches memory that nobody may touch.

``python guard_pages.py FIRST COUNT SECONDS SIDE DTYPES BITS`` runs random problems on the compiled CPU kernels. With
``SIDE`` end or begin, operands, bias, result, scratch, packed weights and tables end or begin exactly at a page without
any permission, so that an access one byte outside is a segmentation fault. The line of each problem is printed before
it runs: the last one names what crashed. Answers are compared with ``numpy.reference``, in float64, in units of the
bound. With ``end!0`` the kernels are given their first array one byte too far, to show that this is found, with
``begin!2`` their third one byte too early. With ``memory`` nothing is fenced in, and the scratch is compared with what
the plan announced.

Linux only. What a kernel allocates is placed by standing in for ``np`` in its modules, and by ``Task``, which copies
what is left.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import math
import mmap
import random
import sys
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from guard_answers import KERNEL_AXES, check, held

import gpuconv
from gpuconv import arrays, dispatch, dtypes, request
from gpuconv.backends import numba_cpu
from gpuconv.backends.numba_cpu import runtime, strip
from gpuconv.backends.protocol import Operands, Target
from gpuconv.problem import Conv2dProblem

PAGE, NO_PERMISSION = mmap.PAGESIZE, 0
NAMES = [name for name in dispatch.TABLE if dispatch.library_of(name) == "numba_cpu"]
# What NumPy's own casting loops buffer: 8,192 elements for each of three operands.
SLACK = 3 * 8192 * 8
# Elements times products: what NumPy's reference does in a moment.
MOST = 3_000_000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


@dataclass(frozen=True)
class Form:
    """How an array lies in memory: the order of its axes, outermost first, the step of each axis, and the axis behind
    whose elements lies a byte that is nobody's (-1: none), as in fields of structured arrays.
    """

    order: tuple[int, ...] = (0, 1, 2, 3)
    steps: tuple[int, ...] = (1, 1, 1, 1)
    apart: int = -1

    def __str__(self) -> str:
        return "/".join("".join(map(str, part)) for part in (self.order, self.steps, (self.apart,)))


class Fence:
    """Gives memory that ends, or begins, at a page that may not be touched."""

    def __init__(self, side: str) -> None:
        self.side = side

    def empty(self, shape: Any, dtype: Any = float) -> np.ndarray:
        """An array of bytes 0xFF: NaN, or -1."""
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        dtype = np.dtype(dtype)
        size = math.prod(map(int, shape)) * dtype.itemsize
        inner = -(-size // PAGE) * PAGE
        if self.side == "none":
            return np.full(shape, np.frombuffer(b"\xff" * dtype.itemsize, dtype)[0], dtype)
        memory = mmap.mmap(-1, inner + 2 * PAGE)
        whole = np.frombuffer(memory, np.uint8)
        for page in (0, PAGE + inner):
            if _libc.mprotect(whole.ctypes.data + page, PAGE, NO_PERMISSION):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = PAGE if self.side == "begin" else PAGE + inner - size
        found = whole[start : start + size]
        found[...] = 0xFF
        return found.view(dtype).reshape(shape)

    def copy(self, array: Any) -> Any:
        """A copy with the same strides; of a dictionary of arrays, one of each."""
        if isinstance(array, dict):
            return {key: self.copy(part) for key, part in array.items()}
        if array.size == 0:
            return self.empty(array.shape, array.dtype)
        low, high = np.lib.array_utils.byte_bounds(array)
        memory = self.empty(high - low, np.uint8)
        start = array.__array_interface__["data"][0] - low
        found: np.ndarray = np.ndarray(array.shape, array.dtype, memory, start, array.strides)
        found[...] = array
        return found

    def room(self, shape: tuple[int, ...], dtype: np.dtype, form: Form) -> np.ndarray:
        """A view of this shape whose outermost elements are those of its memory, NaN in the gaps."""
        span, start, strides = dtype.itemsize, 0, [0] * len(shape)
        for axis in reversed(form.order):
            span += axis == form.apart
            step = form.steps[axis] * span
            strides[axis], reach = step, max(shape[axis] - 1, 0) * abs(step)
            start += reach if step < 0 else 0
            span += reach
        span -= form.apart >= 0  # the last such byte is not part of the array
        memory = self.empty(span if 0 not in shape else 0, np.uint8)
        return np.ndarray(shape, dtype, memory, start if 0 not in shape else 0, strides)

    def laid(self, values: np.ndarray, form: Form) -> np.ndarray:
        """``values`` in such memory; where a step is 0, the first of them for all."""
        view = self.room(values.shape, values.dtype, form)
        first = [slice(1 if step == 0 else None) for step in form.steps]
        view[tuple(first)] = values[tuple(first)]
        return view


def is_fenced(array: np.ndarray) -> bool:
    base: Any = array
    while base is not None:
        if isinstance(base, mmap.mmap):
            return True
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return False


class FencedNumpy:
    """NumPy, with what it makes inside the fence; it stands for ``np`` in the kernels' modules."""

    def __init__(self, fence: Fence) -> None:
        self._fence = fence

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if name == "empty":
            return self._fence.empty
        if name in ("zeros", "full", "array", "arange", "ascontiguousarray", "concatenate"):
            return lambda *args, **kwargs: self._fence.copy(found(*args, **kwargs))
        return found


def moved(array: np.ndarray, by: int) -> np.ndarray:
    """``array`` as if it began some bytes further."""
    memory = (ctypes.c_char * array.itemsize).from_address(array.ctypes.data + by)
    return np.lib.stride_tricks.as_strided(np.frombuffer(memory, array.dtype), array.shape, array.strides)


def modules() -> list[Any]:
    folder = Path(numba_cpu.__file__).parent
    return [importlib.import_module(f"{numba_cpu.__name__}.{path.stem}") for path in sorted(folder.glob("[a-z]*.py"))]


def fence_in(side: str) -> Fence:
    """From here on this process allocates for kernels inside a fence."""
    side, _, victim = side.partition("!")
    fence = Fence(side)
    for module in modules():
        if hasattr(module, "np"):
            module.np = FencedNumpy(fence)
    runtime.aligned = lambda count, dtype: fence.empty(count, dtype)
    arrays.empty = lambda shape, dtype, image=None: fence.empty(shape, dtype)
    whole = strip.Geometry.tables
    strip.Geometry.tables = lambda *given: tuple(fence.copy(table) for table in whole(*given))
    run = runtime.Task.__call__

    def call(task: Any, *given: Any) -> None:
        # What another function of NumPy made, a conversion for example, is only read.
        placed = [a if a is None or is_fenced(a) else fence.copy(a) for a in given]
        if victim:
            placed[int(victim)] = moved(placed[int(victim)], 1 if side == "end" else -1)
        run(task, *placed)

    runtime.Task.__call__ = call
    return fence


# ---- problems

# By the module: what its plans divide work by. Tiny, they cut a small problem into many blocks.
BUDGETS: dict[str, dict[str, tuple[Any, ...]]] = {
    "strip": {"_SUMS": (1, 4096), "_INPUTS": (1, 8192), "_OUTPUTS": (8, 16), "REPACKED": (0, 1000), "ALONE": (0,)},
    "lanes": {"ALONE": (0,), "_WAITING": (1, 40)},
    "winograd": {"ALONE": (0,), "_SUM": (3, 8), "_WEIGHTS": (1, 64), "_REPEATED": (0, 1000), "_STRIP": (1, 9000),
                 "_MANY": (2, 7, 30), "_FEW": (0, 128)},
    "channels": {"_ALONE": (0,)},
    "interleaved": {"ALONE": (0,), "_LINE": (1, 400, 3000)},
    "pixels": {"_ALONE": (0,), "_INPUTS": (1, 3000), "_PRODUCTS": (40, 400), "_PIXELS": (1, 7, 50),
               "_CACHED": tuple(dict.fromkeys((512, 256, 128), (size, size)) for size in (0, 1 << 30))},
    "fft": {"_SIZES": ((64,), (32, 64, 512), (128, 256, 512))},
    "fft_lines": {"_LENGTHS": ((128,), (256, 4096), tuple(1 << digits for digits in range(6, 17)))},
    "rows": {"_IN_PLACE": (1, 20), "_WINDOW": (1, 9000)},
    "planes": {"_LINE": (1, 400), "_STREAM": (0,), "_APART": (1, 1000), "ALONE": (0,)},
    "spread": {"_LINES": (1, 400), "ALONE": (0,)},
    "merged": {"_PIXELS": (70,)},
    "pointwise": {"_WEIGHTS": (1, 2000)},
    "separable": {"_WINDOW": (1, 9000), "_HIGH": (4, 8), "_WIDE": (20, 90)},
    "weight_grad": {"_ALONE": (0,), "_SUMS": (1, 4096), "_INPUTS": (1, 4096), "_OUTPUTS": (8, 64), "_LOT": (1, 100),
                    "_PART": (1,)},
    "weight_planes": {"_ALONE": (0,)},
    "complex": {"_TERMS": (1, 4096)},
}  # fmt: skip
EXTENTS = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 17, 20, 28, 31, 32, 33)
WIDE = (47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 145, 200, 258, 300)
CHANNELS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33)


def sizes(rng: random.Random, name: str) -> dict[str, Any]:
    """Sizes that the implementation ``name`` may serve."""
    kind = name.partition(".")[2]
    one_by_one = kind == "pointwise" or (kind == "pixels" and rng.random() < 0.4)
    taps = (1, 1, 2, 3, 3, 3, 4, 5, 7) if rng.random() < 0.93 else (9, 11, 15, 31, 330)
    KH, KW = (1, 1) if one_by_one else (3, 3) if kind == "winograd" else (rng.choice(taps), rng.choice(taps))
    if kind == "separable":
        KH, KW = rng.choice((4, 5, 7, 9, 15, 31)), rng.choice((4, 5, 7, 9, 15, 31))
    if kind == "fft":
        KH = rng.choice((8, 9, 11, 12, 15, 31))
    elif kind == "fft_lines":
        KH, KW = 1, rng.choice((8, 9, 11, 15, 31, 100))
    plain = kind in ("winograd", "separable", "fft", "fft_lines")
    stride = (1, 1) if plain or rng.random() < 0.5 else (rng.randint(1, 3), rng.randint(1, 3))
    dilation = (1, 1) if plain or rng.random() < 0.6 else (rng.randint(1, 3), rng.randint(1, 3))
    if kind in ("rows", "interleaved") or (kind == "planes" and stride[0] > 1):
        dilation = (1, dilation[1])
    N = rng.choice((0, 1, 1, 1, 2, 2, 3, 4, 5))
    groups = rng.choice((1, 1, 1, 2, 3))
    C, O = rng.choice(CHANNELS), rng.choice(CHANNELS)
    if rng.random() < 0.12:
        C = rng.choice((0, 100, 128, 131, 150, 257, 300, 330))
    if kind in ("fft", "fft_lines"):
        C, O = rng.choice((1, 1, 2, 3, 5)), rng.choice((1, 1, 2, 3, 5))
    if kind == "interleaved":
        stride = (stride[0], 1)
    one_channel = ("channels", "interleaved", "lanes", "planes", "rows", "separable")
    if kind in one_channel or (kind == "weight_planes" and rng.random() < 0.5):
        groups, C = C if C else 3, 1
        O = 1 if kind in ("channels", "interleaved", "lanes") else rng.choice((1, 1, 2, 3))
    if kind == "spread":
        groups, C, O = C or 3, rng.choice((1, 1, 2, 3)), 1
        stride, dilation = (stride[0], 2), (dilation[0], rng.choice((1, 1, 3)))
    H, W = rng.choice(EXTENTS), rng.choice(EXTENTS + WIDE)
    if rng.random() < 0.1:
        H, W = W, H
    if kind == "merged":
        H, W = rng.choice(EXTENTS[:12]), rng.choice(EXTENTS[:12])
    pads = [(0, 0), (0, 0)]
    if kind != "pointwise" and not one_by_one and rng.random() < 0.75:
        pads = [(rng.randint(0, 4), rng.randint(0, 4)) for _ in range(2)]
        if rng.random() < 0.1:
            pads[rng.randrange(2)] = rng.choice(((40, 0), (0, 37), (20, 21)))
    return {"N": N, "C": C * groups, "H": H, "W": W, "O": O * groups, "KH": KH, "KW": KW, "stride": stride,
            "dilation": dilation, "padding": tuple(pads), "groups": groups}  # fmt: skip


FLOATS = ("float16", "bfloat16", "float32", "float64")


def problem_of(rng: random.Random, name: str, kinds: Sequence[str]) -> Conv2dProblem | None:
    """A random problem, or none if the draw has no result."""
    given = sizes(rng, name)
    kind = rng.choice(kinds)
    if name.endswith("complex"):
        kind = rng.choice(("complex64", "complex64", "complex64*float32", "float32*complex64"))
    kind, _, of_k = kind.partition("*")  # the type of x, or those of x and k
    if not of_k:
        of_k = "float32" if kind in ("float16", "bfloat16") and rng.random() < 0.3 else kind
    last = {"channels": 1.0, "interleaved": 1.0, "pixels": 0.4, "winograd": 0.4, "separable": 0.0}
    layout = "NHWC" if rng.random() < last.get(name.rpartition(".")[2], 0.2) else "NCHW"
    weights = ".weight_" in name or (name.endswith("complex") and rng.random() < 0.2)
    rectified = not weights and not name.endswith("complex") and rng.random() < 0.3
    forward = not weights and (name.endswith("separable") or rng.random() < 0.75) and not name.endswith("spread")
    mode = rng.choice(("constant", "constant", "constant", "reflect", "symmetric", "edge", "wrap"))
    if not forward or name.endswith(("channels", "pixels", "lanes", "winograd")):
        mode = "constant"
    filled = forward and mode == "constant" and not name.endswith("channels") and rng.random() < 0.3
    x = (given["N"], given["C"], given["H"], given["W"])
    k = (given["O"], given["C"] // given["groups"], given["KH"], given["KW"])
    order = rng.choice(("OIHW", "OIHW", "HWIO", "OHWI"))
    try:
        problem = Conv2dProblem.of(
            x if layout == "NCHW" else tuple(x[axis] for axis in (0, 2, 3, 1)),
            tuple(k[axis] for axis in KERNEL_AXES[order]),
            x_dtype=kind, k_dtype=of_k, dtype=kind if kind in FLOATS and of_k in (kind, "float32") else None,
            bias=not weights and rng.random() < 0.5,
            stride=given["stride"], padding=given["padding"], dilation=given["dilation"],
            groups=given["groups"], padding_mode=mode, padding_value=filled and 1, flip=rng.random() < 0.2,
            layout=layout, kernel_layout=order, activation="relu" if rectified else None,
            precision="high" if name.endswith(("winograd", "separable")) else "highest",
            op="weight_grad" if weights else "forward" if forward else "input_grad", conjugate=not forward,
        )  # fmt: skip
    except ValueError:
        return None
    outputs = problem.result_size * max(problem.products, 1)
    return problem if outputs <= MOST else None


class Case:
    """One problem with everything else that is drawn: threads, registers, limit, blocks, memory forms."""

    def __init__(self, number: int, kinds: Sequence[str], bits: Sequence[int], names: Sequence[str] = ()) -> None:
        rng = random.Random(number)
        self.number, self.name = number, rng.choice(names or NAMES)
        self.implementation: Any = dispatch.implementation(self.name)
        self.target = Target("cpu", None, rng.randint(1, 3), rng.choice(bits), separable=True)
        while True:
            problem = problem_of(rng, self.name, kinds)
            if problem is not None and not self.implementation.unsupported(problem, self.target):
                break
        self.problem = problem
        self.least = rng.random() < 0.3  # scratch: the least that there is a plan for
        self.budgets: dict[str, Any] = {}
        if rng.random() < 0.6:
            for module in dict.fromkeys(("strip", self.name.partition(".")[2])):
                for name, values in BUDGETS[module].items():
                    if rng.random() < 0.6:
                        self.budgets[f"{module}.{name}"] = rng.choice(values)
        first, second = problem.operand_shapes
        weights = problem.op == "weight_grad"
        self.shapes = (
            held(problem, first, True), held(problem, second, weights), held(problem, problem.result_shape, not weights)
        )  # fmt: skip
        self.kinds = problem.x_dtype, problem.k_dtype, problem.y_dtype
        self.forms = [form_of(rng, repeats) for repeats in (True, True, False)]
        self.prepared = rng.random() < 0.4

    def __str__(self) -> str:
        return (
            f"{self.number} {self.name} {self.problem} threads={self.target.threads} bits={self.target.vector_bits} "
            f"least={self.least} prepared={self.prepared} {' '.join(map(str, self.forms))} {self.budgets}"
        )

    def plan(self) -> Any:
        """A plan with blocks by this case's budgets."""
        with ExitStack() as stack:
            for name, value in self.budgets.items():
                stack.enter_context(mock.patch(f"{numba_cpu.__name__}.{name}", value))
            plan = self.implementation.plan(self.problem, self.target, 1 << 28)
            low, high = 0, plan.workspace if self.least else 0
            while high - low > 256:  # bisection
                middle = (low + high) // 2
                try:
                    plan = self.implementation.plan(self.problem, self.target, middle)
                    high = middle
                except MemoryError:
                    low = middle
            return plan

    def operands(self, fence: Fence) -> tuple[list[np.ndarray], np.ndarray | None]:
        """x, k and the result as their callers hold them, and the bias."""
        source = np.random.default_rng(self.number)
        types = [dtypes.numpy_dtype(kind) for kind in self.kinds]
        found = []
        for shape, dtype, form in zip(self.shapes[:2], types, self.forms, strict=False):
            values = source.standard_normal(shape)
            if found and self.name.endswith("separable"):  # a column times a row
                axes = KERNEL_AXES[self.problem.kernel_layout]
                down, across = (
                    [slice(None) if axis in kept else slice(1) for axis in axes] for kept in ((0, 2), (0, 3))
                )
                values = values[tuple(down)] * values[tuple(across)] * np.ones(shape)
            found.append(fence.laid(_rounded(values, dtype), form))
        found.append(fence.room(self.shapes[2], types[2], self.forms[2]))
        bias = _rounded(source.standard_normal(self.problem.result_channels), types[2])
        return found, fence.copy(bias) if self.problem.bias else None


def _rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "c":
        values = values + 1j * values[..., ::-1]
    return (99 * values).astype(np.int64).astype(dtype) if dtype.kind in "biu" else values.astype(dtype)


def form_of(rng: random.Random, repeats: bool) -> Form:
    if rng.random() < 0.5:
        return Form()
    order = [0, 1, 2, 3]
    if rng.random() < 0.5:
        rng.shuffle(order)
    steps = [rng.choice((1, 1, 1, -1, 2, -2, 3, 0 if repeats else 1)) if rng.random() < 0.7 else 1 for _ in order]
    return Form(tuple(order), tuple(steps), rng.choice((-1, -1, -1, 0, 1, 2, 3)))


# ---- judging


def run(case: Case, fence: Fence) -> None:
    """Run a case, and judge it."""
    problem, implementation = case.problem, case.implementation
    plan = case.plan()
    if not (problem.result_size and problem.products):  # a result without products takes no implementation
        return
    (x, k, out), bias = case.operands(fence)
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, out))]
    operands = Operands(views[0], views[1], bias)
    if case.prepared and problem.op == "forward":
        packed = implementation.pack(plan, operands)
        operands.packed = packed if is_fenced(packed) else fence.copy(packed)
    implementation.run(plan, operands, views[2])
    check(problem, views[2], x, k, bias)
    if case.number % 4 == 0 and problem.op == "forward" and problem.x_dtype == problem.k_dtype and not case.budgets:
        same_by_call(case, out, x, k, bias)


def same_by_call(case: Case, out: np.ndarray, x: np.ndarray, k: np.ndarray, bias: np.ndarray | None) -> None:
    """The public calls, a second time by the short way, give the bits that the implementation gave."""
    problem = case.problem
    if case.target.vector_bits != runtime.vector_bits():
        return
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "padding_value", "flip", "layout",
             "kernel_layout", "activation", "precision")  # fmt: skip
    options = {name: getattr(problem, name) for name in names} | {"backend": case.name}
    layer = gpuconv.Conv2d(k, bias, **options)
    for call in (lambda: gpuconv.conv2d(x, k, bias, **options), lambda: layer(x)):
        for which in ("first", "second"):
            y = call()
            same = y.tobytes() == out.tobytes()
            assert same, f"the {which} public call gives other bits"
    gpuconv.clear()


def scratch(case: Case) -> None:
    """A case takes no more memory than its plan announces."""
    problem, implementation = case.problem, case.implementation
    plan = case.plan()
    if not (problem.result_size and problem.products):
        return
    (x, k, out), bias = case.operands(Fence("none"))
    views = [request.view(problem, which, array) for which, array in enumerate((x, k, out))]
    operands = Operands(views[0], views[1], bias)
    packs = case.prepared and problem.op == "forward"
    for traced in (False, True):  # what is compiled or read from a cache is no scratch
        strip.tables_of.cache_clear()
        gc.collect()
        if traced:
            tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0] if traced else 0
            if packs:
                operands.packed = implementation.pack(plan, operands)
            implementation.run(plan, operands, views[2])
            taken = tracemalloc.get_traced_memory()[1] - before if traced else 0
        finally:
            tracemalloc.stop()
    assert taken <= plan.workspace + SLACK, f"{taken} bytes are taken and {plan.workspace} were announced"


def main(first: int, count: int, seconds: float, side: str, kinds: list[str], bits: list[int]) -> None:
    faulthandler.enable()
    fence = None if side == "memory" else fence_in(side)
    end, done, wrong = time.monotonic() + seconds, 0, 0
    for number in range(first, first + count):
        if time.monotonic() > end:
            break
        case = Case(number, kinds, bits)
        print(case, flush=True)
        try:
            if fence is None:
                scratch(case)
            else:
                run(case, fence)
        except AssertionError as error:
            wrong += 1
            print(f"WRONG {error}", flush=True)
        done += 1
    print(f"ran {done}, {wrong} wrong", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5].split(","),
         [int(bits) for bits in sys.argv[6].split(",")])  # fmt: skip
