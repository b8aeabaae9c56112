"""Which implementation suits which problem on the CPU: the rules, each with what was measured for it.

Ratios are times of ``numba_cpu.strip`` or of the peers over the implementation's, on two cores with AVX-512.
"""

from __future__ import annotations

from gpuconv.problem import Conv2dProblem

Rule = tuple[str, bool, str]


def on_cpu(problem: Conv2dProblem) -> list[Rule]:
    """(implementation, whether it suits ``problem``, why), in the order in which they are to be tried."""
    if problem.op == "weight_grad":
        return _weight_grad(problem)
    if problem.op not in ("forward", "input_grad"):
        return []
    # Of an input gradient, which is made of forward convolutions, x and y change places.
    forward = problem.op == "forward"
    C, O = (problem.C, problem.O) if forward else (problem.O, problem.C)
    channels, outputs = C // problem.groups, O // problem.groups
    rows, columns = problem.result_shape[2:]
    taps, pixels = problem.KH * problem.KW, rows * columns
    first = problem.layout == "NCHW"
    depthwise = channels == outputs == 1 and problem.groups > 1
    return [
        (
            "numba_cpu.winograd",
            problem.precision != "highest" and _winograd(channels, outputs, rows, columns),
            "3×3 at less than the highest precision: fewer multiplications",
        ),
        # 14²: 3.3 against PyTorch; 56²: 1.9. 112²: a fifth of numba_cpu.rows.
        (
            "numba_cpu.lanes",
            first and depthwise and columns <= 56 and problem.groups >= 16,
            "depthwise on small planes: channels in the lanes of a register",
        ),
        ("numba_cpu.rows", first and channels == 1 and outputs <= 8, "one channel per output: rows of a plane"),
        ("numba_cpu.channels", not first and depthwise, "depthwise, channels last: pixel by pixel"),
        (
            "numba_cpu.pixels",
            not first and outputs >= 8 and problem.sum_dtype == problem.x_dtype == problem.y_dtype,
            "channels last: output channels in the lanes of a register",
        ),
        ("numba_cpu.pointwise", first and taps == 1, "1×1: a matrix product with x itself"),
        # 7×7, 32 images: 0.66 of PyTorch's speed in strips, 0.89 merged.
        (
            "numba_cpu.merged",
            problem.N > 1 and (pixels <= 64 or (problem.N > 2 and pixels <= 200 and taps > 1 and outputs >= 128)),
            "small planes of several images: merged",
        ),
        ("numba_cpu.strip", True, "the general compiled convolution"),
    ]


def _weight_grad(problem: Conv2dProblem) -> list[Rule]:
    # Against PyTorch: 1.0 to 4.0 dense, where numpy.gemm has 0.1 to 1.0; depthwise 0.6 to 2.0, where it has 0.1 to 0.2.
    # Four channels per group: in planes 4.5 to 5.5, as a product 1.9 to 2.6.
    few = problem.O // problem.groups < 8
    return [
        ("numba_cpu.weight_planes", few, "fewer than 8 output channels per group: pixels in the lanes of a register"),
        ("numba_cpu.weight_grad", not few, "output channels in the lanes of a register, pixels summed in place"),
    ]


# Winograd's tile.
_TILE = 4


def _winograd(channels: int, outputs: int, rows: int, columns: int) -> bool:
    # Weights as they are / transformed ahead:
    #   64 to 256 channels, planes of 56² to 224²: 1.7 to 2.3 / 2.0 to 2.7    256 to 512, 28²: 1.4 to 2.0 / 1.6 to 2.2
    #   14²: 64 channels 1.06 / 1.16, 128: 1.07 / 1.35, 512: 1.18 / 1.55    10²: 0.67 / 0.93    8², 7²: 0.6 / 0.6 to 0.8
    #   32 channels, 28²: 1.11 / 1.12, 56²: 1.28 / 1.35    16 to 64, 56²: 1.46 / 1.47    16, 28²: 0.81 / 0.87
    #   8 to 64, 112²: 0.84 / 0.76    64 to 8: 0.63 / 0.97    3 to 64, 224²: 0.7 / 0.8
    # The last tile of a row or column is often cut: what is made must not be much more than what is wanted.
    tiles = -(-rows // _TILE) * -(-columns // _TILE) * _TILE**2
    return (
        min(channels, outputs) >= 16
        and channels * outputs >= 1024
        and rows * columns >= 144
        and 10 * rows * columns >= 7 * tiles
    )
