"""Every operator as a named call on small integers, answered by plain loops, and the processes that run them.

The children of the tests import this file too. A new operator is one ``add`` in ``make``.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy knows "bfloat16" by it
import numpy as np

import gpuconv
from gpuconv import dispatch

# bfloat16 holds the answers below exactly: no sum passes 256.
DTYPES = (
    "float32", "float16", "bfloat16", "float64", "complex64", "complex128", "int8", "uint8", "int16", "int64",
)  # fmt: skip
# These serve every valid problem; the others may refuse one, with reasons.
SERVE_EVERYTHING = ("numba_cuda.direct", "numpy.reference")


# For which types of x the quick profile compiles a kernel, which takes five seconds.
CHEAP = {
    "numba_cpu.strip": ("float32", "float64", "float16", "uint8", "int64"),
    "numba_cpu.complex": ("complex64",),  # whose parts are float32
    "numba_cpu.weight_grad": ("float32", "float64"),
}
# Whether the long profile is asked for. Without it, what is only its own is not even listed: that alone took minutes.
LONG = os.environ.get("GPUCONV_TEST_LONG") == "1"


def is_costly(name: str, dtype: str, result: str | None = None) -> bool:
    """As in running.py: specialised kernels for other dtypes of x, or another floating-point dtype of the result, are
    compiled in the long profile only.
    """
    types = {dtype, result if result is not None and result.startswith(("float", "bfloat")) else dtype}
    served = types <= set(CHEAP.get(name, ("float32",))) and (len(types) == 1 or "float32" in types)
    return not LONG and name.startswith("numba_cpu.") and not served


def affordable(*dtypes: str) -> dict[str, Any]:
    """Options for a call on operands of ``dtypes`` that is about the operator, whatever computes it: none, so that
    gpuconv chooses; but NumPy where the quick profile does not compile a kernel for every shape.
    """
    return {} if LONG or set(dtypes) in ({"float32"}, {"float64"}) else {"backend": "numpy"}


Index = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """A forward convolution without its arrays; every operator of the family is made of its products."""

    N: int = 2
    groups: int = 2
    I: int = 2  # channels of x per group
    outputs: int = 2  # channels of y per group
    H: int = 5
    W: int = 6
    KH: int = 3
    KW: int = 2
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def reach(self) -> tuple[int, int]:
        """How far the window's first tap can move, in pixels of each axis."""
        axes = zip((self.H, self.W), (self.KH, self.KW), self.padding, self.dilation, strict=True)
        rows, columns = (n + 2 * pad - d * (k - 1) - 1 for n, k, pad, d in axes)
        return rows, columns

    @property
    def shapes(self) -> tuple[Index, Index, Index]:
        """Of x, k and y."""
        C, O = self.groups * self.I, self.groups * self.outputs
        extents = (most // step + 1 for most, step in zip(self.reach, self.stride, strict=True))
        return (self.N, C, self.H, self.W), (O, self.I, self.KH, self.KW), (self.N, O, *extents)

    def reads(self, i: int, j: int, p: int, q: int) -> tuple[int, int] | None:
        """The pixel that tap (p, q) of output (i, j) reads; None beside the image."""
        row = i * self.stride[0] + p * self.dilation[0] - self.padding[0]
        column = j * self.stride[1] + q * self.dilation[1] - self.padding[1]
        return (row, column) if 0 <= row < self.H and 0 <= column < self.W else None

    def products(self) -> Iterator[tuple[Index, Index, Index]]:
        """Indices into x, k and y of every product."""
        _, (_, *taps), y_shape = self.shapes
        for (n, o, i, j), (c, p, q) in itertools.product(np.ndindex(y_shape), np.ndindex(*taps)):
            pixel = self.reads(i, j, p, q)
            if pixel is not None:
                yield (n, o // self.outputs * self.I + c, *pixel), (o, c, p, q), (n, o, i, j)

    def taps(self) -> Iterator[tuple[Index, Index]]:
        """Indices into x and into its columns (N, C·KH·KW, OH·OW) of every pixel that a window reads."""
        (N, C, _, _), _, (_, _, OH, OW) = self.shapes
        for n, i, j, c, p, q in np.ndindex(N, OH, OW, C, self.KH, self.KW):
            pixel = self.reads(i, j, p, q)
            if pixel is not None:
                yield (n, c, *pixel), (n, (c * self.KH + p) * self.KW + q, i * OW + j)

    def one_row(self) -> Geometry:
        """The convolution of conv1d: along the columns of one row."""
        ones = {"H": 1, "KH": 1, "stride": (1, self.stride[1]), "dilation": (1, self.dilation[1])}
        same = {name: getattr(self, name) for name in ("N", "groups", "I", "outputs", "W", "KW")}
        return Geometry(**same, **ones, padding=(0, self.padding[1]))


GEOMETRIES = (
    Geometry(),
    Geometry(groups=1, I=3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    Geometry(N=1, groups=3, I=1, outputs=1, H=7, W=4, KW=3, stride=(2, 2), padding=(1, 1)),
    Geometry(N=3, groups=1, I=4, outputs=3, H=4, W=4, KH=1, KW=1),
)


class Operands:
    """Arrays of one dtype for a geometry: small integers, or random reals."""

    def __init__(self, g: Geometry, dtype: str, seed: int, exact: bool) -> None:
        self.kind, self._exact, self._rng = np.dtype(dtype), exact, np.random.default_rng(seed)
        x, k, y = g.shapes
        self.x, self.k, self.y = self._draw(0, 3, x), self._draw(-2, 2, k), self._draw(-1, 1, y)
        self.bias, self.offset = self._draw(-4, 4, k[:1]), self._draw(-4, 4, x[1:2])
        self.columns = self._draw(0, 3, (g.N, x[1] * g.KH * g.KW, y[2] * y[3]))

    def _draw(self, low: int, high: int, shape: Index) -> np.ndarray:
        def real() -> np.ndarray:
            least = max(low, 0) if self.kind.kind == "u" else low
            if not self._exact:
                return self._rng.standard_normal(shape)
            return self._rng.integers(least, high, shape, endpoint=True)

        return (real() + 1j * real() if self.kind.kind == "c" else real()).astype(self.kind)

    def sum(self, shape: Index, terms: Iterable[tuple[Index, np.ndarray, Index, np.ndarray, Index]]) -> np.ndarray:
        """Σ a[i]·b[j] at each index of the result, in a type that holds it exactly."""
        total = np.zeros(shape, np.int64 if self.integer else np.result_type(self.kind, np.float64))
        for at, a, i, b, j in terms:
            total[at] += total.dtype.type(a[i]) * total.dtype.type(b[j])
        return self.rounded(total)

    def rounded(self, total: np.ndarray) -> np.ndarray:
        narrow = np.int32 if self.kind.itemsize == 1 else np.int64
        return total.astype(narrow if self.integer else self.kind)

    @property
    def integer(self) -> bool:
        return self.kind.kind in "iu"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one operator: ``run`` takes the options all of them have (backend, device, workspace_limit, ...)."""

    name: str
    op: str | None  # what an implementation must serve for it; None where none can be asked for
    run: Callable[..., Any]
    wanted: Callable[[], np.ndarray]

    def check(self, **options: Any) -> bool:
        """Whether it was served, after its answer was found right; only some implementations may refuse."""
        try:
            y = self.run(**options)
        except gpuconv.NoBackendError:
            if options.get("backend") in (None, *SERVE_EVERYTHING):
                raise
            return False
        y, wanted = host(y), self.wanted()
        assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape), f"{self.name}, {options}: {y.dtype} {y.shape}"
        assert np.array_equal(y, wanted), f"{self.name}, {options}: a wrong answer"
        return True


Job = tuple[Call, dict[str, Any]]


def host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def make(g: Geometry, dtype: str = "float32", *, seed: int = 0, exact: bool = True, xp: Any = np) -> list[Call]:
    """Every operator that gpuconv has, on the geometry ``g``; ``exact=False`` gives reals, which have no ``wanted``."""
    own = Operands(g, dtype, seed, exact)
    line = g.one_row()
    (x_shape, k_shape, y_shape), found = g.shapes, []
    x, k, y, bias, offset, columns = map(xp.asarray, (own.x, own.k, own.y, own.bias, own.offset, own.columns))
    steps: dict[str, Any] = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
    grouped = {**steps, "groups": g.groups}
    along = {"stride": g.stride[1], "padding": g.padding[1], "dilation": g.dilation[1], "groups": g.groups}
    # The rows and columns at the end of x that the stride never reads.
    rest = tuple(most % step for most, step in zip(g.reach, g.stride, strict=True))

    def add(name: str, op: str | None, run: Callable[..., Any], wanted: Callable[[], np.ndarray]) -> None:
        found.append(Call(f"{name} {dtype} {g}", op, run, functools.cache(wanted)))

    def forward(g: Geometry, x: np.ndarray, k: np.ndarray) -> np.ndarray:
        return own.sum(g.shapes[2], ((o, x, i, k, w) for i, w, o in g.products())) + offset_of(own.bias)

    def offset_of(bias: np.ndarray) -> np.ndarray:
        return own.rounded(bias.reshape(-1, 1, 1))

    def input_gradient(k: np.ndarray) -> np.ndarray:
        return own.sum(x_shape, ((i, k, w, own.y, o) for i, w, o in g.products()))

    def weight_gradient() -> np.ndarray:
        return own.sum(k_shape, ((w, own.x.conj(), i, own.y, o) for i, w, o in g.products()))

    def bias_gradient() -> np.ndarray:
        one = np.ones((), own.kind)
        return own.sum(y_shape[1:2], (((at[1],), own.y, at, one, ()) for at in np.ndindex(y_shape)))

    def unfolded() -> np.ndarray:
        found = np.zeros_like(own.columns)
        for i, at in g.taps():
            found[at] = own.x[i]
        return found

    def folded() -> np.ndarray:
        one = np.ones((), own.kind)
        return own.sum(x_shape, ((i, own.columns, at, one, ()) for i, at in g.taps()))

    def prepared(out: Any = None, stream: Any = None, **options: Any) -> Any:
        return gpuconv.Conv2d(k, bias, **grouped, **options)(x, out=out, stream=stream)

    add("conv2d", "forward", lambda **o: gpuconv.conv2d(x, k, bias, **grouped, **o), lambda: forward(g, own.x, own.k))
    add("Conv2d", "forward", prepared, lambda: forward(g, own.x, own.k))
    add(
        "conv1d", "forward",
        lambda **o: gpuconv.conv1d(x[:, :, 0], k[:, :, 0], bias, **along, **o),
        lambda: forward(line, own.x[:, :, :1], own.k[:, :, :1])[:, :, 0],
    )  # fmt: skip
    add(
        "conv_transpose2d", "input_grad",
        lambda **o: gpuconv.conv_transpose2d(y, k, offset, output_padding=rest, **grouped, **o),
        lambda: input_gradient(own.k) + offset_of(own.offset),
    )  # fmt: skip
    add(
        "grad.conv2d_input", "input_grad",
        lambda **o: gpuconv.grad.conv2d_input(x_shape, k, y, **grouped, **o),
        lambda: input_gradient(own.k.conj()),
    )  # fmt: skip
    add(
        "grad.conv2d_weight", "weight_grad",
        lambda **o: gpuconv.grad.conv2d_weight(x, k_shape, y, **grouped, **o),
        weight_gradient,
    )  # fmt: skip
    add("grad.conv2d_bias", None, lambda **o: gpuconv.grad.conv2d_bias(y, **o), bias_gradient)
    add("unfold", "unfold", lambda **o: gpuconv.unfold(x, (g.KH, g.KW), **steps, **o), unfolded)
    add("fold", "fold", lambda **o: gpuconv.fold(columns, (g.H, g.W), (g.KH, g.KW), **steps, **o), folded)
    return found


def knows(name: str, op: str | None) -> bool:
    """Whether the implementation ``name`` is one of the operator ``op``."""
    return op in getattr(dispatch.implementation(name), "OPS", ("forward",))


def usable(device: str | None = None, op: str | None = None) -> list[str]:
    """The implementations that this process can run: of one device, or of one operator, or all."""
    names = [name for name in dispatch.TABLE if device in (None, dispatch.DEVICES[dispatch.library_of(name)])]
    names = [name for name in names if op is None or knows(name, op)]
    return [name for name in names if dispatch.implementation(name).unavailable() is None]


def serving(call: Call, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that know the operator of ``call`` and do not refuse it."""
    return [name for name in names if knows(name, call.op) and not refuses(name, call)]


def refuses(name: str, call: Call) -> bool:
    """Whether ``name`` is one of those that need not serve everything, and does not serve ``call``."""
    chosen_few = name == "numpy.fft" or dispatch.library_of(name) == "numba_cpu" or dispatch.is_experimental(name)
    if name in SERVE_EVERYTHING or not chosen_few:
        return False
    if is_costly(name, "float32" if " float32 " in call.name else "another"):
        return True
    try:
        call.run(backend=name)
    except gpuconv.NoBackendError:
        return True
    return False


def jobs(
    names: Sequence[str], dtypes: Sequence[str] = DTYPES, geometries: Sequence[Geometry] = GEOMETRIES
) -> list[Job]:
    """Every operator on every one of ``names`` that knows it, and on the one that gpuconv chooses for NumPy arrays, or
    NumPy's own (``affordable``).
    """
    found: list[Job] = []
    for seed, (g, dtype) in enumerate(itertools.product(geometries, dtypes)):
        for call in make(g, dtype, seed=seed):
            found += [(call, {"backend": name}) for name in serving(call, names)] + [(call, affordable(dtype))]
    return found


def run_all(todo: Iterable[Job]) -> int:
    """How many were served, after all of them were found right."""
    return sum(call.check(**options) for call, options in todo)


def on_threads(threads: int, todo: Sequence[Job], each: int) -> int:
    """``each`` jobs on every one of ``threads``, which start together, four in each of several places."""
    for call, _ in todo:
        call.wanted()
    barrier = threading.Barrier(threads)

    def work(thread: int) -> int:
        start = thread // 4 * 4 * len(todo) // threads
        turn = [todo[(start + index) % len(todo)] for index in range(each)]
        barrier.wait(60)
        return run_all(turn)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # calls as small as these would seldom meet otherwise
    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(interval)


def child(script: str, *, limit: float = 120, **environment: str) -> str:
    """What ``script`` prints in a fresh Python that finds these files; it has to end in order in ``limit`` seconds."""
    if environment.get("NUMBA_ENABLE_CUDASIM") == "1":
        script = "import simulator\nsimulator.install()\n" + script
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
        text=True, timeout=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def forked(task: Callable[[], Any], limit: int = 60) -> str:
    """What ``task`` returns in a forked child, as text, or its exception; an alarm ends a child that hangs."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(limit)
        try:
            text = str(task())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text if status == 0 else f"the child ended with {status}"
