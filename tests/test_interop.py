"""Arrays as callers have them: lists, views of any memory, other libraries' objects, and many threads at once."""

from __future__ import annotations

import array
import collections
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cases
import ml_dtypes
import numpy as np
import oracle
import pytest
import units
from calls import affordable

from gpuconv import Conv2d, conv2d, explain

X = np.random.default_rng(3).integers(-9, 9, (2, 3, 6, 7)).astype(np.float32)
K = np.random.default_rng(4).integers(-9, 9, (4, 3, 3, 2)).astype(np.float32)
B = np.array([1, -2, 3, 4], np.float32)
ANSWER = oracle.answer(X, K, B, stride=2, padding=1)


def check(x: Any, k: Any = K, bias: Any = B, **kwargs: Any) -> Any:
    """The answer in whatever carries X, K and B; the result in what came back."""
    y = conv2d(x, k, bias, stride=2, padding=1, **kwargs)
    units.assert_exact(np.asarray(y), ANSWER)
    return y


class DLPack:
    """Nothing but the two methods of the DLPack protocol."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def __dlpack__(self, **options: Any) -> Any:
        return self._owner.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._owner.__dlpack_device__()


class OldDLPack(DLPack):
    """The protocol before version 1: no keyword but the stream."""

    def __dlpack__(self, stream: Any = None) -> Any:
        return self._owner.__dlpack__()


class ElsewhereDLPack(DLPack):
    """On a device that is neither the host nor CUDA (8 is kDLMetal)."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 8, 0


class Interface:
    """Nothing but ``__array_interface__``."""

    def __init__(self, owner: np.ndarray) -> None:
        self._owner = owner
        self.__array_interface__ = owner.__array_interface__


class Converts:
    """Nothing but ``__array__``, with the signature of NumPy 1."""

    def __init__(self, owner: np.ndarray) -> None:
        self._owner = owner

    def __array__(self) -> np.ndarray:
        return self._owner


class Tagged(np.ndarray):
    """A subclass whose arithmetic must not take part."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the subclass computed")


# ---- what becomes an array


def test_sequences_of_numbers():
    for x in ([[1, 2, 3], [4, 5, 6]], ((1, 2, 3), (4, 5, 6)), [(1, 2, 3), range(4, 7)], [[1.0, 2, True], [4, 5, 6]]):
        y = conv2d(x, [[1, 0], [0, 1]])
        assert type(y) is np.ndarray and y.dtype == np.asarray(x).dtype
        assert y.tolist() == [[x[0][0] + x[1][1], x[0][1] + x[1][2]]]
    assert conv2d([[1, 2]], [[1j]]).tolist() == [[1j, 2j]]
    assert conv2d([[True, True]], [[True, True]]).tolist() == [[2]]
    assert conv2d([[1, 2]], [[[3]], [[4]]], bias=(1, 2), stride=[1, 1]).tolist() == [[[4, 7]], [[6, 10]]]
    assert conv2d([[1, 2]], [[1]], bias=range(5, 6)).tolist() == [[6, 7]]


def test_buffers():
    """What exports memory, on every Python alike: 3.11 has no ``__buffer__`` to tell them by."""
    flat = array.array("f", range(6))
    for x in (memoryview(flat).cast("B").cast("f", (2, 3)), memoryview(np.arange(6.0).reshape(2, 3))):
        assert conv2d(x, [[1]]).tolist() == [[0, 1, 2], [3, 4, 5]]
    y = conv2d(np.zeros((1, 1), np.float32), np.ones((6, 1, 1), np.float32), flat)
    assert y.ravel().tolist() == list(range(6))
    assert conv2d([[0]], np.ones((2, 1, 1), np.uint8), bytearray([1, 2])).ravel().tolist() == [1, 2]


@pytest.mark.parametrize("scalar", [3, 2.5, 1j, True, np.float32(2), np.array(2.0)], ids=repr)
def test_scalars_are_no_images(scalar):
    for x, k in ((scalar, [[1]]), ([[1]], scalar)):
        with pytest.raises(ValueError, match=r"^conv2d: .*do not pair"):
            conv2d(x, k)


def test_a_deque_is_no_array():
    with pytest.raises(TypeError, match="deque"):
        conv2d(collections.deque([[1, 2]]), [[1]])


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_subclasses_come_back_as_plain_arrays():
    for kind in (Tagged, np.recarray):
        assert type(check(X.view(kind), K.view(kind), B.view(kind))) is np.ndarray
    square = np.matrix(np.arange(9.0).reshape(3, 3))
    y = conv2d(square, np.matrix(np.eye(2)))
    assert type(y) is np.ndarray and y.tolist() == [[4, 6], [10, 12]]
    out = np.matrix(np.zeros((2, 2)))
    assert conv2d(square, np.matrix(np.eye(2)), out=out) is out and np.array_equal(out, y)
    memory = np.zeros(ANSWER.y.shape, np.float32).view(Tagged)
    assert check(X, out=memory) is memory


@pytest.mark.parametrize("wrap", [DLPack, OldDLPack, Interface, Converts])
def test_foreign_objects(wrap):
    assert type(check(wrap(X), wrap(K), wrap(B))) is np.ndarray
    read_only = X.view()
    read_only.flags.writeable = False
    if wrap is not OldDLPack:  # which cannot say that it is read-only, so NumPy does not export it
        check(wrap(read_only))
    for axes in itertools.permutations(range(4)):
        view = X.transpose(axes).copy().transpose(np.argsort(axes))
        check(wrap(view))
    assert explain(wrap(X), wrap(K), wrap(B)).problem.bias


@pytest.mark.parametrize("wrap", [DLPack, Interface, Converts])
def test_foreign_objects_as_out(wrap):
    """The result is in the memory behind it, or it is refused: what NumPy makes of it might be a copy."""
    memory = np.full(ANSWER.y.shape, np.nan, np.float32)
    out = wrap(memory)
    try:
        assert conv2d(X, K, B, stride=2, padding=1, out=out) is out
    except TypeError as error:
        assert str(error).startswith("conv2d: out ")
    else:
        units.assert_exact(memory, ANSWER)


def test_foreign_zero_points():
    x, k = X.astype(np.int8), K.astype(np.int8)
    points = np.array([1, 2, 3, -4])
    wanted = conv2d(x, k, k_zero_point=points)
    for given in (tuple(points), points.tolist(), points.astype(np.int8), Interface(points), DLPack(points)):
        assert np.array_equal(conv2d(x, k, k_zero_point=given), wanted)


def test_an_unknown_device_is_named():
    with pytest.raises(TypeError, match=r"conv2d: x .*device type 8"):
        conv2d(ElsewhereDLPack(X), K)


# ---- memory of every kind


def foreign_order(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder())


def packed_field(a: np.ndarray) -> np.ndarray:
    """A field of a packed record of five bytes: neither its address nor its steps are those of its type."""
    record = np.zeros(a.shape, [("odd", "u1"), ("value", a.dtype)])
    record["value"] = a
    return record["value"]


def odd_address(a: np.ndarray) -> np.ndarray:
    """Contiguous, one byte off its alignment."""
    memory = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    memory[...] = a
    return memory


def read_only(a: np.ndarray) -> np.ndarray:
    frozen = a.copy()
    frozen.flags.writeable = False
    return frozen


def test_a_foreign_byte_order_costs_one_copy():
    """FITS files and many TIFFs are big-endian: what they hold takes the same way, and gives the same bits."""
    rng = np.random.default_rng(3)
    for dtype in (np.float32, np.uint16):
        x, k = (100 * rng.random((40, 50))).astype(dtype), rng.random((3, 3), np.float32)
        wanted, plain = conv2d(x, k, padding=1), explain(x, k, padding=1)
        for image, kernel in ((foreign_order(x), k), (x, foreign_order(k)), (foreign_order(x), foreign_order(k))):
            report = explain(image, kernel, padding=1)
            copied = sum(array.nbytes for array in (image, kernel) if not array.dtype.isnative)
            assert report.implementation == plain.implementation
            assert report.workspace == plain.workspace + copied
            assert conv2d(image, kernel, padding=1).tobytes() == wanted.tobytes()
            assert Conv2d(kernel, padding=1)(image).tobytes() == wanted.tobytes()
            few = explain(image, kernel, padding=1, workspace_limit=2 * copied - 1)
            assert few.implementation is None or few.implementation.startswith("numpy.")


FORMS = {
    "Fortran": np.asfortranarray,
    "reversed": lambda a: a[::-1, ::-1].copy()[::-1, ::-1] if a.ndim > 1 else a[::-1].copy()[::-1],
    "stepped": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "foreign byte order": foreign_order,
    "packed field": packed_field,
    "odd address": odd_address,
    "read-only": read_only,
    "foreign and unaligned": lambda a: packed_field(foreign_order(a)),
}


@pytest.mark.parametrize("backend", ["numpy.gemm", "numpy.reference"])
@pytest.mark.parametrize("form", FORMS)
def test_memory_forms(form, backend):
    arrange = FORMS[form]
    before = [a.tobytes() for a in (X, K, B)]
    for x, k, b in ((arrange(X), K, B), (X, arrange(K), B), (X, K, arrange(B)), (arrange(X), arrange(K), arrange(B))):
        images = [a.tobytes() for a in (x, k, b)]
        y = check(x, k, b, backend=backend)
        assert y.flags.c_contiguous and y.flags.owndata and y.flags.writeable and y.flags.aligned
        assert y.dtype.isnative
        assert [a.tobytes() for a in (x, k, b)] == images, "an operand was written to"
    assert [a.tobytes() for a in (X, K, B)] == before


@pytest.mark.parametrize("form", [form for form in FORMS if form != "read-only"])
def test_memory_forms_of_out_hold_the_result(form):
    out = FORMS[form](np.full(ANSWER.y.shape, 77, np.float32))
    try:
        returned = conv2d(X, K, B, stride=2, padding=1, out=out)
    except (TypeError, ValueError) as error:
        # A byte order that is not written to may be refused; nothing may be lost in silence.
        assert "foreign" in form and "byte order" in str(error)
        return
    assert returned is out
    assert np.array_equal(out, ANSWER.y), "the result is not in out"


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float16", "float64", "complex64", "bfloat16"])
def test_foreign_and_unaligned_memory_of_other_types(dtype):
    case = cases.BY_NAME["grouped"]
    x, k, _ = cases.fill(case, dtype, "narrow")
    options = case.kwargs | ({} if dtype == "float16" else affordable(dtype))
    wanted = conv2d(x, k, **options)
    arrangements = [packed_field, odd_address] + ([foreign_order] if dtype != "bfloat16" else [])
    for arrange in arrangements:
        assert conv2d(arrange(x), arrange(k), **options).tobytes() == wanted.tobytes(), arrange.__name__


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_results_are_contiguous_in_the_asked_layout(layout):
    for rank, x_shape in ((4, (2, 3, 6, 7)), (3, (3, 6, 7)), (2, (6, 7))):
        x = np.ones(x_shape if layout == "NCHW" or rank == 2 else (*x_shape[:-3], *x_shape[-2:], 3))
        k = np.ones((4, 3, 2, 2) if rank > 2 else (4, 2, 2))
        y = conv2d(np.asfortranarray(x), k, layout=layout)
        wanted = (2,) * (rank == 4) + ((4, 5, 6) if layout == "NCHW" else (5, 6, 4))
        assert y.shape == wanted and y.flags.c_contiguous and y.flags.owndata


def test_nothing_of_a_result_is_shared():
    x = np.ones((1, 1, 3, 3))
    first = conv2d(x, x[..., :1, :1])
    first += 5
    assert x.max() == 1 and conv2d(x, x[..., :1, :1]).max() == 1
    empty = conv2d(np.ones((1, 0, 3, 3)), np.ones((2, 0, 1, 1)), np.array([1.0, 2.0]))
    empty += 5
    assert empty.ravel().tolist() == [6.0] * 9 + [7.0] * 9


def test_empty_and_broadcast_arrays():
    assert conv2d(np.empty((0, 3, 6, 7), np.float32), K).shape == (0, 4, 4, 6)
    assert conv2d(np.empty((0, 6, 7, 3)), np.empty((5, 3, 1, 1)), layout="NHWC").shape == (0, 6, 7, 5)
    out = np.empty((0, 4, 4, 6), np.float32)
    assert conv2d(np.empty((0, 3, 6, 7), np.float32), K, out=out) is out
    assert np.all(conv2d(np.broadcast_to(np.float32(2), X.shape), np.broadcast_to(np.float32(3), K.shape)) == 108)


# ---- PyTorch


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def tensors(torch: Any, *given: np.ndarray) -> list[Any]:
    return [torch.from_numpy(a.copy()) for a in given]


def test_torch_in_torch_out(torch):
    x, k, b = tensors(torch, X, K, B)
    for given in ((x, k, b), (x, K, B)):
        y = check(*given)
        assert type(y) is torch.Tensor and y.is_contiguous() and not y.requires_grad
    assert type(check(X, k, b)) is np.ndarray
    assert torch.equal(x, torch.from_numpy(X)), "x was written to"
    y += 1
    check(x, k, b)
    assert explain(x, k).problem.x_dtype == "float32"


def test_torch_views(torch):
    x, k, b = tensors(torch, X, K, B)
    wide = torch.zeros(2, 3, 12, 7)
    wide[:, :, ::2] = x
    views = [
        x.contiguous(memory_format=torch.channels_last), x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        wide[:, :, ::2], torch.nn.Parameter(x, requires_grad=False),
    ]  # fmt: skip
    for view in views:
        assert type(check(view, k, b)) is torch.Tensor
    ones = torch.ones(()).expand(1, 3, 6, 7)
    assert torch.equal(conv2d(ones, torch.ones(()).expand(2, 3, 2, 2)), torch.full((1, 2, 5, 6), 12.0))


def test_torch_conjugates_and_negatives(torch):
    z, w = X + 1j * X[:, :, ::-1], K - 2j * K
    x, k = tensors(torch, z.astype(np.complex64), w.astype(np.complex64))
    wanted = conv2d(z.conj().astype(np.complex64), w.conj().astype(np.complex64))
    assert np.array_equal(conv2d(x.conj(), k.conj()).numpy(), wanted)
    assert np.array_equal(conv2d(x.conj().imag, k.real).numpy(), conv2d(z.conj().imag.astype(np.float32), K))


@pytest.mark.parametrize("view", ["conj", "negative"])
def test_torch_out_with_a_pending_operation(torch, view):
    """Such a view cannot share plain memory with NumPy: it is written to or refused, never left as it was."""
    out = torch.zeros(2, 4, 4, 6, dtype=torch.complex64).conj()
    out = out.imag if view == "negative" else out
    x, k = tensors(torch, X, K)
    if view == "conj":
        x, k = x.to(torch.complex64), k.to(torch.complex64)
    try:
        conv2d(x, k, out=out)
    except (TypeError, ValueError) as error:
        assert "out" in str(error)
    else:
        assert torch.equal(out.resolve_conj().resolve_neg(), conv2d(x, k)), "the result is not in out"


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "complex64", "int8", "uint8", "int64", "bool"])
def test_torch_dtypes(torch, name):
    case = cases.BY_NAME["grouped"]
    x, k, _ = cases.fill(case, name, "narrow")
    wanted = conv2d(x, k, **case.kwargs)

    def tensor(a: np.ndarray) -> Any:
        if name == "bfloat16":
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    for given in (tensor(x), tensor(x.transpose(3, 2, 1, 0).copy()).permute(3, 2, 1, 0)):
        y = conv2d(given, tensor(k), **case.kwargs)
        assert str(y.dtype) == f"torch.{wanted.dtype.name}"
        assert np.array_equal(y.to(torch.complex128).numpy(), wanted.astype(np.complex128))
        out = torch.zeros_like(y)
        assert conv2d(given, tensor(k), out=out, **case.kwargs) is out and torch.equal(out, y)
        if name == "bfloat16":
            held = conv2d(given, k, **case.kwargs)
            assert torch.equal(held, y) and conv2d(x, tensor(k), **case.kwargs).dtype == ml_dtypes.bfloat16


def test_torch_out(torch):
    x, k, b = tensors(torch, X, K, B)
    wide = torch.full((2, 4, 6, 10), 77.0)
    out = wide[:, :, ::2, 1:9:2]
    assert check(x, k, b, out=out) is out
    assert (wide[:, :, 1::2] == 77).all()
    shared = torch.zeros(2, 1, 3, 4).expand(2, 4, 3, 4)
    for bad, error in ((x, ValueError), (shared, ValueError), (torch.zeros(2, 4, 3, 4).double(), TypeError)):
        with pytest.raises(error, match=r"^conv2d: out "):
            conv2d(x, k, b, stride=2, padding=1, out=bad)
    with pytest.raises(ValueError, match="overlap"):
        conv2d(x, k[:3, :, :1, :1], out=x)


def test_a_torch_dtype_names_the_result(torch):
    x, k = torch.ones(4, 4), torch.ones(2, 2)
    for image, kernel in ((x, k), (x.numpy(), k.numpy())):
        y = conv2d(image, kernel, dtype=torch.float64)
        assert str(y.dtype).removeprefix("torch.") == "float64" and y[0, 0] == 4
    with pytest.raises(TypeError, match="dtype"):
        conv2d(x, k, dtype=torch.float8_e5m2)
    with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
        conv2d(x, k, dtype="torch.float64")


def test_torch_refusals(torch):
    x, k, b = tensors(torch, X, K, B)
    for position, name in enumerate(("x", "k", "bias")):
        given = [x, k, b]
        given[position] = given[position].clone().requires_grad_()
        with pytest.raises(TypeError, match=rf"^conv2d: {name} requires grad.*detach\(\)"):
            conv2d(*given)
    with pytest.raises(TypeError, match=r"^conv2d: x .*to_dense"):
        conv2d(x.to_sparse(), k)
    with pytest.raises(TypeError, match=r"^conv2d: x .*meta"):
        conv2d(x.to("meta"), k)
    for dtype in (torch.float8_e5m2, torch.uint64):
        with pytest.raises(TypeError, match=r"^conv2d: x .*dtype"):
            conv2d(torch.zeros(2, 3, 6, 7, dtype=dtype), k)
    for flag in (torch.tensor(True), torch.tensor(1.0), torch.tensor([1, 1])):
        with pytest.raises(TypeError, match=r"^conv2d: stride"):
            conv2d(x, k, stride=flag)


def test_torch_subclasses_stay_torch(torch):
    class Mine(torch.Tensor):
        pass

    x, k, b = tensors(torch, X, K, B)
    assert isinstance(check(x.as_subclass(Mine), k, b), torch.Tensor)
    with pytest.raises(TypeError, match=r"^conv2d: x requires grad"):
        conv2d(x.clone().requires_grad_().as_subclass(Mine), k)


def test_dlpack_of_torch(torch):
    x, k, b = tensors(torch, X, K, B)
    assert type(check(DLPack(x), DLPack(k), DLPack(b))) is np.ndarray
    for tensor in (x.bfloat16(), x.clone().requires_grad_(), x.to(torch.complex64).conj()):
        # NumPy has no word for these; they may be served or refused by name.
        try:
            conv2d(DLPack(tensor), k)
        except TypeError as error:
            assert str(error).startswith("conv2d: x ")


# ---- many at once


def test_sixteen_threads_with_mixed_types():
    jobs = []
    for name, dtype in itertools.product(("grouped", "nhwc_hwio_strided", "reflect", "one_by_one"), cases.DTYPES):
        x, k, bias, answer = units.posed(cases.BY_NAME[name], dtype, "narrow")
        jobs.append((x, k, bias, cases.BY_NAME[name].kwargs | affordable(dtype), answer))
    barrier = threading.Barrier(16)

    def work(thread: int) -> int:
        barrier.wait(30)
        order = np.random.default_rng(thread).permutation(len(jobs))
        for index in order:
            x, k, bias, kwargs, answer = jobs[index]
            units.assert_exact(conv2d(x, k, bias, **kwargs), answer)
        return len(order)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [len(jobs)] * 16
