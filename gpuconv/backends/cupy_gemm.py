"""im2col + GEMM on CuPy: the primitives that ``gemm`` needs, on cuBLAS.

GEMMs go to cuBLAS directly, because CuPy's own products follow ``CUPY_TF32`` and round 16-bit sums to 16 bits. Here the
compute type is part of the call: pedantic float32 or float64, whatever the environment says, TF32 at precision
"medium" only; 16-bit operands are multiplied exactly and summed in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from gpuconv import arrays, debug, diagnosis, dtypes
from gpuconv.backends import gemm as orchestration
from gpuconv.backends import gemm_gradients
from gpuconv.backends.protocol import Operands, Plan, Target
from gpuconv.geometry import IndexTable
from gpuconv.problem import Conv2dProblem

NAME = "cupy.gemm"
DEVICE = "cuda"
OPS = frozenset(("forward", "input_grad", "weight_grad"))
ARRAYS = "cupy"

LONGEST_SUM = orchestration.BLAS_LIMIT  # cuBLAS keeps one sum per element anyway, and launches cost

_REMEDY = 'pip install "gpuconv[cuda13]" (or [cuda12], by the driver)'


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why CuPy cannot be used here, with the remedy; None when it can."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return f"{diagnosis.broken_import('CuPy', error)}; {_REMEDY}"
        return f"CuPy is not installed; {_REMEDY}"
    except Exception as error:
        return f"{diagnosis.broken_import('CuPy', error)}; {_REMEDY}"
    try:
        problem = "" if cupy.cuda.runtime.getDeviceCount() > 0 else "no GPU"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        problem = str(error)
    if not problem:
        try:
            from cupy_backends.cuda.libs import cublas  # noqa: F401  # loaded when first imported
        except ImportError as error:
            return f"CuPy finds no cuBLAS ({str(error).splitlines()[0]}); {_REMEDY}"
        return None
    too_old = diagnosis.driver_too_old(diagnosis.facts({}))
    return too_old or f"CuPy finds no usable GPU ({problem}); {diagnosis.remedy(_cause(problem))}"


def _cause(problem: str) -> str:
    """The error's words; without a driver its version is 0, and CUDA finds that insufficient."""
    missing = diagnosis.facts({}).driver is None and "InsufficientDriver" in problem
    return "driver cannot be found" if missing else problem


def __getattr__(name: str) -> Any:
    if name == "xp":  # the array namespace, imported when an array of it arrives
        import cupy

        return cupy
    raise AttributeError(name)


def unsupported(problem: Conv2dProblem, target: Target) -> list[str]:
    """cuBLAS multiplies floating point only, and takes 32-bit dimensions."""
    found = []
    if dtypes.is_integer(problem.y_dtype) and problem.largest_sum() >= 2**53:
        found.append(
            f"no cuBLAS product is exact for sums of {problem.x_dtype} and {problem.k_dtype} beyond 2**53; "
            "numba_cuda.direct serves them"
        )
    return found + orchestration.too_large(problem, "cuBLAS")


def columns_and_sums(problem: Conv2dProblem) -> tuple[str, str]:
    """The dtypes of the columns and of their product.

    Integers are multiplied in float64, exactly; 16-bit floats stay as they are and are summed in float32.
    """
    if dtypes.is_integer(problem.y_dtype):
        return "float64", "float64"
    if problem.x_dtype == problem.k_dtype and problem.x_dtype in ("float16", "bfloat16"):
        if problem.sum_dtype == "float32":
            return problem.x_dtype, "float32"
    return problem.sum_dtype, problem.sum_dtype


def plan(problem: Conv2dProblem, target: Target, limit: int) -> Plan:
    """Choose the chunk."""
    columns, sums = columns_and_sums(problem)
    raw = dtypes.itemsize(problem.x_dtype) if columns != problem.x_dtype else 0
    made = gemm_gradients.plan(
        NAME, problem, limit, columns, sums, raw, False, LONGEST_SUM, _half_cache(target.ordinal), _PRODUCTS,
        _balance(target.ordinal, columns),
    )  # fmt: skip
    return replace(made, detail=f"{made.detail}; by estimate, not measured")


# Products of a chunk, at least: about 100 µs of the fastest GPUs' float32 units, which hide the 50 µs or so that Python
# takes to ask for a chunk. Not measured yet.
_PRODUCTS = 2 * 10**9


@lru_cache(maxsize=64)
def _half_cache(ordinal: int | None) -> int:
    """Half the L2 cache of a GPU, in bytes: columns of that size are still there when the product reads them."""
    if ordinal is None or unavailable() is not None:
        return 25 << 20  # of an H100, for who asks without a GPU
    import cupy

    return int(cupy.cuda.Device(ordinal).attributes["L2CacheSize"]) // 2


# Floating-point operations of float32, float64 and 16 bits, the last on tensor cores with sums in float32, while a
# multiprocessor reads a byte of the cache, of which it gets half of 64 in a clock: by the white papers of the A100 and
# the H100. Of other GPUs what the slowest do: too few make the kernel's rows look slow, and columns are made.
_BALANCES = {"80": (4, 2, 64), "90": (8, 4, 128)}
_SLOWEST = 4, 1 / 8, 16


@lru_cache(maxsize=256)
def _balance(ordinal: int | None, dtype: str) -> float | None:
    """Floating-point operations of a GPU per byte from its cache, for products of ``dtype``; None where not known."""
    kinds = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 2}
    if dtype not in kinds:
        return None
    capability = "90"  # of an H100, as above
    if ordinal is not None and unavailable() is None:
        import cupy

        capability = str(cupy.cuda.Device(ordinal).compute_capability)
    return _BALANCES.get(capability, _SLOWEST)[kinds[dtype]]


pack_key = orchestration.pack_key


def pack(plan: Plan, operands: Operands) -> Any:
    """The kernel as the matrices that cuBLAS takes."""
    return orchestration.pack(sys.modules[__name__], plan, operands)


def run(plan: Plan, operands: Operands, out: Any) -> None:
    """Write the result of CuPy operands into ``out``, on the current stream."""
    gemm_gradients.run(sys.modules[__name__], plan, operands, out)


# One thread per element of x's windows' first tap, looping over the taps: the divisions that find its place are paid
# once for all of them. `given` holds, for the axes n g c i j in the order of out's memory (slowest first): extent and
# steps in out and x; then the tap steps and the tables' steps. It comes by value, as `fill` does: nothing is uploaded
# for a launch. Elements move as bits of their size: no arithmetic touches them, NaN payloads included.
IM2COL_SOURCE = r"""
struct pair { unsigned long long a, b; };
struct numbers { long long of[35]; };
extern "C" __global__ void im2col(
    const WORD* x, WORD* out, const long long* row_table, const long long* column_table, const WORD fill,
    const numbers given, long long total)
{
    const long long *facts = given.of;
    const long long *extent = facts, *out_step = facts + 5, *n_step = facts + 10, *i_step = facts + 15,
                    *j_step = facts + 20;
    const long long KH = facts[25], KW = facts[26], p_step = facts[27], q_step = facts[28];
    const long long row_inner = facts[29], column_inner = facts[30], row_step = facts[31], column_step = facts[32];
    for (long long t = blockIdx.x * (long long)blockDim.x + threadIdx.x; t < total;
         t += (long long)gridDim.x * blockDim.x) {
        long long rest = t, to = 0, from = 0, row = facts[33], column = facts[34];
        #pragma unroll
        for (int axis = 4; axis >= 0; --axis) {
            long long index = rest % extent[axis];
            rest /= extent[axis];
            to += index * out_step[axis];
            from += index * n_step[axis];
            row += index * i_step[axis];
            column += index * j_step[axis];
        }
        for (long long p = 0; p < KH; ++p) {
            long long r = row_table[row + p * row_inner];
            for (long long q = 0; q < KW; ++q) {
                long long c = column_table[column + q * column_inner];
                out[to + p * p_step + q * q_step] =
                    r < 0 || c < 0 ? fill : x[from + r * row_step + c * column_step];
            }
        }
    }
}
"""
WORDS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long", 16: "pair"}


def im2col_source(itemsize: int) -> str:
    """CUDA C++ of the gather for elements of ``itemsize`` bytes."""
    return IM2COL_SOURCE.replace("WORD", WORDS[itemsize])


def im2col_facts(
    x: Any, rows: IndexTable, columns: IndexTable, i: slice, j: slice, out: Any
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The integers that the gather runs by, from shapes and strides alone."""
    item = x.itemsize
    steps = [step // item for step in out.strides]
    # axes n g c . . i j of out; c comes last where the channels are fastest
    order = sorted((0, 1, 2, 5, 6), key=lambda axis: -steps[axis])
    zeros = dict.fromkeys(range(7), 0)
    in_x = zeros | {axis: step // item for axis, step in enumerate(x.strides[:3])}
    facts = [[out.shape[axis] for axis in order], [steps[axis] for axis in order], [in_x[axis] for axis in order]]
    facts += [[rows.outer if axis == 5 else 0 for axis in order], [columns.outer if axis == 6 else 0 for axis in order]]
    facts += [[out.shape[3], out.shape[4], steps[3], steps[4], rows.inner, columns.inner]]
    facts += [[x.strides[3] // item, x.strides[4] // item, i.start * rows.outer, j.start * columns.outer]]
    return np.array([fact for group in facts for fact in group], np.int64)


@lru_cache(maxsize=len(WORDS))
def _im2col_kernel(itemsize: int) -> Any:
    import cupy

    return cupy.RawKernel(im2col_source(itemsize), "im2col")


def index_tables(problem: Conv2dProblem) -> orchestration.Tables:
    """The index tables in GPU memory."""
    import cupy

    rows, columns = (replace(table, index=cupy.asarray(table.index)) for table in problem.tables())
    return rows, columns


def im2col(problem: Conv2dProblem, tables: orchestration.Tables, x: Any, i: slice, j: slice, out: Any) -> None:
    """Gather windows: x (n, g, C, H, W) into out (n, g, C, KH, KW, rows, columns), dense in some order of axes."""
    import cupy

    if any(step % x.itemsize for step in x.strides):
        x = x.copy()
    raw = out
    if out.dtype != x.dtype:
        # Dense in the same order of axes as out.
        order = sorted(range(out.ndim), key=lambda axis: -out.strides[axis])
        raw = cupy.empty([out.shape[axis] for axis in order], x.dtype).transpose(np.argsort(order).tolist())
    threads = out.size // (problem.KH * problem.KW)
    # CuPy passes a NumPy array of one element, a structure too, by value.
    facts = im2col_facts(x, *tables, i, j, raw).view([("of", np.int64, 35)])
    fill = np.full(1, problem.fill).astype(x.dtype)
    indices = [table.index for table in tables]
    grid, block = (min(-(-threads // 256), 2**31 - 1),), (256,)
    _im2col_kernel(x.itemsize)(grid, block, (x, raw, *indices, fill, facts, np.int64(threads)))
    debug.launched("im2col", problem)
    if raw is not out:
        out[...] = raw


# cudaDataType_t and cublasComputeType_t, by their values in CUDA's library_types.h and cublas_api.h.
_DATA_TYPES = {"float16": 2, "bfloat16": 14, "float32": 0, "float64": 1, "complex64": 4, "complex128": 5}
COMPUTE_32F_PEDANTIC, COMPUTE_32F_FAST_TF32, COMPUTE_64F_PEDANTIC = 69, 77, 71
_DEFAULT_ALGORITHM = -1


def gemm(problem: Conv2dProblem, a: Any, b: Any, out: Any, accumulate: bool = False) -> None:
    """Multiply a (g, M, K) by b (n, g, K, P) into out (n, g, M, P), or add the product to it."""
    import cupy
    from cupy_backends.cuda.libs import cublas

    handle = cupy.cuda.device.get_cublas_handle()
    for arguments in gemm_calls(problem.precision, a, b, out, accumulate):
        cublas.gemmStridedBatchedEx(handle, *arguments)
        debug.launched("a product by cuBLAS", problem)


def gemm_calls(precision: str, a: Any, b: Any, out: Any, accumulate: bool = False) -> Iterator[tuple[int, ...]]:
    """The arguments of cublasGemmStridedBatchedEx behind the handle: one call per image or per group, the fewer.

    cuBLAS is column-major. A row-major out = a·b is, to it, outᵀ = bᵀ·aᵀ; a column-major out is out = a·b.
    """
    images, groups = out.shape[:2]
    (a_rows, a_ld), (b_rows, b_ld), (out_rows, out_ld) = map(_blas_layout, (a, b, out))
    M, P, K = out.shape[2], out.shape[3], a.shape[2]
    complex_ = out.dtype.kind == "c"
    if out.dtype.name in ("float64", "complex128"):
        compute = COMPUTE_64F_PEDANTIC
    else:
        tf32 = precision == "medium" and a.dtype.name == "float32"
        compute = COMPUTE_32F_FAST_TF32 if tf32 else COMPUTE_32F_PEDANTIC
    one, zero = _scalars(("complex" if complex_ else "float") + str(out.itemsize * 8))
    beta = one if accumulate else zero  # in the type of the sums, which out has
    batch_images = images >= groups
    a_step, b_step, out_step = (
        (0, b.strides[0], out.strides[0]) if batch_images else (a.strides[0], b.strides[1], out.strides[1])
    )
    for index in range(groups if batch_images else images):
        at = (slice(None), index) if batch_images else (index, slice(None))
        left, right, result = (a[index] if batch_images else a), b[at], out[at]
        a_call = (arrays.address(left), _DATA_TYPES[a.dtype.name], a_ld, a_step // a.itemsize)
        b_call = (arrays.address(right), _DATA_TYPES[b.dtype.name], b_ld, b_step // b.itemsize)
        out_call = (arrays.address(result), _DATA_TYPES[out.dtype.name], out_ld, out_step // out.itemsize)
        batch = images if batch_images else groups
        if out_rows:
            # To cuBLAS a row-major matrix is its transpose: it goes in as it is (0), a column-major one turned (1).
            yield (int(not b_rows), int(not a_rows), P, M, K, one, *b_call, *a_call, beta, *out_call, batch, compute,
                   _DEFAULT_ALGORITHM)  # fmt: skip
        else:
            yield (int(a_rows), int(b_rows), M, P, K, one, *a_call, *b_call, beta, *out_call, batch, compute,
                   _DEFAULT_ALGORITHM)  # fmt: skip


def _blas_layout(array: Any) -> tuple[bool, int]:
    rows, columns = array.shape[-2:]
    layout = orchestration.blas_layout((rows, columns), tuple(step // array.itemsize for step in array.strides[-2:]))
    if layout is None:
        raise AssertionError(f"no BLAS layout for shape {array.shape} and strides {array.strides}")
    return layout


@lru_cache(maxsize=8)
def _scalar_arrays(dtype: str) -> tuple[Any, Any]:
    return np.ones(1, dtype), np.zeros(1, dtype)


def _scalars(dtype: str) -> tuple[int, int]:
    """Addresses of 1 and 0 in host memory, kept for the life of the process."""
    one, zero = _scalar_arrays(dtype)
    return int(one.ctypes.data), int(zero.ctypes.data)


@lru_cache(maxsize=8)
def _epilogue_kernel(integer: bool, bias: bool, relu: bool) -> Any:
    import cupy

    lines = ["long long v = (long long)sums;" if integer else "S v = sums;"]
    lines += ["v += bias;"] if bias else []
    lines += ["if (v < 0) v = 0;"] if relu else []  # false for NaN, which passes through
    lines += ["y = (Y)v;"]
    given = "S sums, B bias" if bias else "S sums"
    return cupy.ElementwiseKernel(given, "Y y", " ".join(lines), "gpuconv_epilogue")


def epilogue(problem: Conv2dProblem, sums: Any, bias: Any | None, out: Any) -> None:
    """Finish sums (n, g, O, rows, columns) into out of the same shape, in one pass; bias is (g, O, 1, 1)."""
    integer, relu = dtypes.is_integer(problem.y_dtype), problem.activation == "relu"
    kernel = _epilogue_kernel(integer, bias is not None, relu)
    kernel(*(array for array in (sums, bias, out) if array is not None))
    debug.launched("the pass that finishes the result", problem)
