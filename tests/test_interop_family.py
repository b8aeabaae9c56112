"""The relatives of conv2d with the arrays of other libraries: what comes in is what comes back, in shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpuconv

RNG = np.random.default_rng(5)
X = RNG.integers(-4, 5, (2, 3, 5, 6)).astype(np.float32)
K = RNG.integers(-4, 5, (4, 3, 2, 3)).astype(np.float32)
DY = RNG.integers(-4, 5, (2, 4, 4, 4)).astype(np.float32)  # the shape of conv2d(X, K)
B = RNG.integers(-4, 5, 3).astype(np.float32)
COLUMNS = gpuconv.unfold(X, (2, 3))

CALLS = {
    "conv_transpose2d": lambda wrap, **where: gpuconv.conv_transpose2d(wrap(DY), wrap(K), wrap(B), **where),
    "conv2d_input": lambda wrap, **where: gpuconv.grad.conv2d_input(X.shape, wrap(K), wrap(DY), **where),
    "conv2d_weight": lambda wrap, **where: gpuconv.grad.conv2d_weight(wrap(X), K.shape, wrap(DY), **where),
    "conv2d_bias": lambda wrap, **where: gpuconv.grad.conv2d_bias(wrap(DY), **where),
    "conv1d": lambda wrap, **where: gpuconv.conv1d(wrap(X[:, :, 0]), wrap(K[:, :, 0]), **where),
    "unfold": lambda wrap, **where: gpuconv.unfold(wrap(X), (2, 3), **where),
    "fold": lambda wrap, **where: gpuconv.fold(wrap(COLUMNS), (5, 6), (2, 3), **where),
    "Conv2d": lambda wrap, **where: gpuconv.Conv2d(wrap(K))(wrap(X), **where),
}
every_call = pytest.mark.parametrize("name", CALLS)


class OnlyDlpack:
    """An array of a library that nobody has heard of."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def plain(array: np.ndarray) -> np.ndarray:
    return array


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@every_call
def test_every_form_of_a_host_array_gives_the_same(name):
    expected = CALLS[name](plain)
    assert expected.dtype == np.float32 and expected.flags.c_contiguous
    for wrap in (
        OnlyDlpack,
        read_only,
        np.asfortranarray,
        lambda array: array.astype(">f4"),
        lambda array: np.flip(np.flip(array).copy()),
        lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
        lambda array: array.tolist(),
    ):
        found = CALLS[name](wrap)
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)


@every_call
def test_a_result_goes_into_out_of_any_strides(name):
    expected = CALLS[name](plain)
    wide = np.full((*expected.shape[:-1], 2 * expected.shape[-1]), 77, np.float32)
    out = np.flip(wide[..., ::2])
    assert CALLS[name](plain, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert (wide[..., 1::2] == 77).all(), "between the elements of out"


@every_call
def test_an_out_that_is_an_input_is_refused(name):
    held = []

    def hold(array: np.ndarray) -> np.ndarray:
        held.append(array.copy())
        return held[-1]

    shape = CALLS[name](hold).shape
    inputs, held[:] = list(held), []
    # a result of the right shape in the memory of an operand, where that is large enough
    memory = max(inputs, key=lambda array: array.size)
    if memory.size < np.prod(shape):
        grown = np.zeros(int(np.prod(shape)) + memory.size, np.float32)
        view = grown[: memory.size].reshape(memory.shape)
        out = grown[: int(np.prod(shape))].reshape(shape)
    else:
        view, out = memory, memory.reshape(-1)[: int(np.prod(shape))].reshape(shape)
    if name == "Conv2d" and memory.shape == K.shape:
        pytest.skip("the kernel was copied, so nothing is shared with it")
    with pytest.raises(ValueError, match="overlap"):
        CALLS[name](lambda array: view if array.shape == memory.shape else array, out=out)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is not installed")


@every_call
def test_torch_in_torch_out(torch, name):
    expected = CALLS[name](plain)
    for view in (torch.from_numpy, lambda array: torch.from_numpy(np.flip(array).copy()).flip(*range(array.ndim))):
        found = CALLS[name](view)
        assert type(found) is torch.Tensor and found.is_contiguous()
        np.testing.assert_array_equal(found.numpy(), expected)
    out = torch.zeros(expected.shape)
    assert CALLS[name](torch.from_numpy, out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected)
    brain = CALLS[name](lambda array: torch.from_numpy(array).bfloat16())
    assert brain.dtype == torch.bfloat16
    half = CALLS[name](lambda array: torch.from_numpy(array).half())
    np.testing.assert_array_equal(half.float().numpy(), expected)  # integers below 2048


@every_call
def test_torch_gradients_are_refused(torch, name):
    with pytest.raises(TypeError, match=r"detach\(\)"):
        CALLS[name](lambda array: torch.from_numpy(array).requires_grad_())


def test_complex_gradients_are_those_of_torch(torch):
    """Adjoint under the complex inner product, as autograd has it."""

    def complexes(shape: tuple[int, ...]) -> Any:
        parts = RNG.integers(-4, 5, (2, *shape)).astype(np.float64)
        return torch.from_numpy(parts[0] + 1j * parts[1])

    x, k = complexes(X.shape).requires_grad_(), complexes(K.shape).requires_grad_()
    y = torch.nn.functional.conv2d(x, k, stride=2, padding=1)
    dy = complexes(tuple(y.shape))
    y.backward(dy)
    image, kernel = x.detach(), k.detach()
    assert torch.equal(gpuconv.grad.conv2d_input(X.shape, kernel, dy, 2, 1), x.grad)
    assert torch.equal(gpuconv.grad.conv2d_weight(image, K.shape, dy, 2, 1), k.grad)
