"""Which implementation suits which problem on the CPU: the rules, each with what was measured for it.

Ratios are times of ``numba_cpu.strip`` or of the peers over the implementation's, on two cores, with AVX-512 where
nothing else is said.
"""

from __future__ import annotations

from gpuconv import dtypes
from gpuconv.problem import Conv2dProblem

Rule = tuple[str, bool, str]


def on_cpu(problem: Conv2dProblem) -> list[Rule]:
    """(implementation, whether it suits ``problem``, why), in the order in which they are to be tried."""
    if dtypes.is_complex(problem.y_dtype):
        return _complex(problem)
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
    apart = problem.KH > 1 and problem.dilation[0] > 1  # kernel rows, each of which takes planes a call
    transformed = _transformed(problem, channels, outputs)
    return [
        (
            "numba_cpu.separable",
            first and channels == 1 and _separable(problem) and not (transformed and problem.KH + problem.KW > 90),
            "an outer product of a column and a row, at less than the highest precision: one after the other",
        ),
        ("numba_cpu.fft", transformed, "a large kernel: Fourier transforms"),
        (
            "numba_cpu.fft_lines",
            _transformed_lines(problem, channels, outputs),
            "a long kernel of one row: Fourier transforms",
        ),
        (
            "numpy.fft",
            _fft(problem, channels, outputs),
            "a large kernel at less than the highest precision: Fourier transforms",
        ),
        (
            "numba_cpu.winograd",
            problem.precision != "highest" and _winograd(channels, outputs, rows, columns),
            "3×3 at less than the highest precision: fewer multiplications",
        ),
        (
            "numba_cpu.spread",
            first and not forward and channels == 1 and problem.stride[1] == 2,
            "the gradient of a stride of 2: even and odd columns together",
        ),
        (
            "numba_cpu.lanes",
            first and depthwise and problem.groups >= 16 and _narrow(problem, columns),
            "depthwise on small planes: channels in the lanes of a register",
        ),
        # 1 to many outputs, numba_cpu.strip over it. Stride 1, 3×3: 1 to 16 of 48×480 1.6, 1 to 32 of 112² 1.2, of 512²
        # 1.4; 7×7: 1 to 16 of 512² 1.2, 1 to 64 1.7; 28² 1.0 to 1.1. Stride 2: 1 to 32 of 224², 3×3 0.86, 7×7 0.6.
        (
            "numba_cpu.planes",
            first
            and channels == 1
            and problem.KH <= 7
            and outputs <= (8 if forward and problem.stride[1] > 1 else 64)
            and not (apart and depthwise and problem.groups >= 16 and columns <= 56),
            "one channel per output, and few rows of taps: planes in place",
        ),
        # Kernel rows two apart, AVX2, planes over strip: 5×5 of 2048² 3.9, of 512² 3.1; depthwise 3×3 of 28² 1.4,
        # of 56² 2.0, where lanes has 2.5 and 2.5; of 112² 3.6, lanes 2.8.
        # What planes does not serve, or not as well. 14²: 0.3 of the time of numba_cpu.rows; 112²: five times as
        # much.
        (
            "numba_cpu.lanes",
            first and depthwise and problem.groups >= 16 and columns <= 56,
            "depthwise on small planes: channels in the lanes of a register",
        ),
        ("numba_cpu.rows", first and channels == 1 and outputs <= 8, "one channel per output: rows of a plane"),
        (
            "numba_cpu.interleaved",
            not first and _interleaved(problem, channels, outputs),
            "few channels side by side, one per output: a row of pixels as one row of numbers",
        ),
        ("numba_cpu.channels", not first and depthwise, "depthwise, channels last: pixel by pixel"),
        (
            "numba_cpu.pixels",
            not first and outputs >= 8 and problem.sum_dtype == problem.x_dtype == problem.y_dtype,
            "channels last: output channels in the lanes of a register",
        ),
        (
            "numba_cpu.pixels",
            first
            and problem.sum_dtype == problem.x_dtype == problem.y_dtype
            and _turned(channels, outputs, taps, pixels),
            "many channels on small planes: output channels in the lanes of a register",
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


def _interleaved(problem: Conv2dProblem, channels: int, outputs: int) -> bool:
    # AVX2, one output per channel. numba_cpu.channels over it, 2048² of three: bytes, 3×3 6.1, 5×5 8.5; float32 3.0 to
    # 3.1; four: bytes 4.6 to 5.9, float32 1.4 to 2.0; eight 1.0 to 1.4; 16 and 64: 0.6 to 1.7. With reflected borders,
    # bytes, numba_cpu.strip over it: three 4.5, 16 6.5, 64 5.8. It does not serve several outputs per channel: two
    # had 0.4 to 0.9, eight 0.7.
    zeros = problem.padding_mode == "constant" and problem.fill == 0
    return channels == outputs == 1 and (problem.groups <= 4 or not zeros)


def _complex(problem: Conv2dProblem) -> list[Rule]:
    # Over numpy.gemm, with AVX2. One channel: 5×5 of 512² 8, of 2048² 11, real times complex 11 to 16. 3×3: 16 to 16
    # channels at 128² 4.7, 64 to 64 at 56² 1.3, at 14² 1.0; 8 to 8, 5×5 of 256² 8. Weight gradients: 16 to 16 channels
    # at 64² 2.0, one 8. 1×1: 8 to 8 at 512² 0.8, 16 to 16 at 128² 1.1, 256 to 256 at 14² 0.66.
    dense = problem.C > problem.groups and dtypes.is_complex(problem.x_dtype) and dtypes.is_complex(problem.k_dtype)
    return [
        ("numpy.gemm", dense and problem.KH * problem.KW == 1 and problem.op != "weight_grad", "1×1: a matrix product"),
        ("numba_cpu.complex", problem.op not in ("unfold", "fold"), "complex numbers: their parts are real"),
    ]


def _narrow(problem: Conv2dProblem, columns: int) -> bool:
    # numba_cpu.lanes over numba_cpu.planes, by the columns of outputs. Stride 1, 3×3: 3 0.90, 4 0.86, 7 1.0, 9 1.4,
    # 14 1.7, 17 0.84, 28 1.25, 33 1.02, 56 1.5; 7×7: 4 0.97, 9 1.7, 14 1.9, 17 0.98, 56 1.8. Stride 2, 3×3: 4 0.5,
    # 7 0.63, 10 0.98, 14 1.2, 17 0.75, 20 0.85, 28 1.1. numba_cpu.rows takes 1.4 to 4 times as long as planes.
    # AVX2, stride 2: 14 columns 0.83, 28 0.81, 5×5 0.5.
    if problem.op == "forward" and problem.stride[1] == 2:
        return columns <= 28 if 0 < _vector_bits() < 512 else columns <= 8 or 16 < columns <= 22
    return columns <= 4


def _vector_bits() -> int:
    """Of the machine's registers; 0 where nothing that is compiled can run."""
    try:
        from gpuconv.backends.numba_cpu import runtime
    except ModuleNotFoundError:
        return 0
    return runtime.vector_bits()


def _turned(channels: int, outputs: int, taps: int, pixels: int) -> bool:
    if _vector_bits() < 512:
        return _turned_in_short(channels, outputs, taps, pixels)
    # Channels-first images are turned over, block by block, for numba_cpu.pixels. Against the best of the others,
    # weights as they are / prepared:
    #   3×3: 512 to 512 channels at 7² 0.9 / 1.65, at 14² 1.06 / 1.23, at 28² 0.98 / 1.02    256 to 256, 14² 1.06 / 1.20
    #        64 to 64 at 14² 0.91 / 1.18, at 56² 0.99 / 1.01, at 112² 0.98 / 0.99    64 to 16, 28² 0.77 / 0.83
    #   3×3, stride 2: 128 to 128 at 28² 1.10 / 1.14    5×5: 192 to 32 at 28² 1.17 / 1.05
    #   1×1: 512 to 2048 at 7² 1.17 / 1.35, 2048 to 512 1.18 / 1.32    256 to 256 at 28² 1.04 / 1.05
    #        64 to 256 at 28² 0.94 / 0.96, at 56² 0.89 / 0.89    24 to 144 at 28² 0.81 / 0.80
    # Panels of one register's outputs, and outputs that leave much of a panel empty, are not worth it.
    filled = outputs >= 32 and outputs % 32 in (0, *range(28, 32))
    return filled and pixels <= 784 and channels * outputs * taps >= (1 << 15 if taps == 1 else 100_000)


def _turned_in_short(channels: int, outputs: int, taps: int, pixels: int) -> bool:
    # The same with panels of 16 outputs, which leave less empty. AVX2, weights prepared:
    #   3×3: 64 to 64 channels at 56² 1.1 to 1.5, at 224² 1.0 to 1.35, at 14² 1.0 to 1.25    64 to 128 at 112² 1.15
    #        256 to 256 at 56² 1.0 to 1.15    512 to 512 at 28² 1.0 to 1.15    32 to 64 at 56² 1.3, at 12×120 0.86
    #        64 to 16 at 28² 1.35    16 to 16 at 56² 0.9 to 1.25    8 to 16 at 56² 0.97    3 to 64 at 224² 0.6
    #   3×3, stride 2: 128 to 128 at 28² 1.25    7×7, stride 2: 3 to 64 at 112² 0.88    5×10: 32 to 32 1.05
    #   1×1: 256 to 1024 at 14² 1.06, 1024 to 256 1.03, to 512 1.1    512 to 2048 at 7² 1.7    512 to 128 at 28² 0.93,
    #        to 256 0.9    256 to 64 at 56² 0.92, 64 to 64 0.87, 64 to 256 0.85    128 to 64 at 14² 0.9
    # A third of a panel empty, 32 to 24 channels at 56²: 0.55.
    panels = -(-outputs // 16)
    if outputs < 16 or 8 * outputs < 7 * 16 * panels:
        return False
    if taps > 1:
        return channels >= 16 and channels * outputs * taps >= 4096
    # Sums are turned back at a higher price than pixels are turned over.
    return pixels <= 400 and channels * outputs >= 1 << 15 and (outputs <= channels or pixels <= 200)


def _separable(problem: Conv2dProblem) -> bool:
    # numba_cpu.rows over it, all of a call. 2048²: 5×5 0.87, 7×7 1.07, 9×9 1.5, 11×11 1.7, 15×15 2.3, 31×31 5.3,
    # 63×63 11.6, 127×127 33; 512²: 9×9 0.5, 15×15 0.9, 31×31 3.0; 128²: 31×31 0.5. OpenCV's sepFilter2D over it, 2048²:
    # 1.6 to 1.9 up to 31×31, 2.1 for 63×63, 3.7 for 127×127. Small planes of many channels are for numba_cpu.lanes.
    taps, both = problem.KH * problem.KW, problem.KH + problem.KW
    saved = problem.O * problem.OH * problem.OW * (taps - 3 * both)
    return problem.op == "forward" and problem.precision != "highest" and problem.OW > 56 and saved >= 5e7


def _transformed(problem: Conv2dProblem, channels: int, outputs: int) -> bool:
    # In products of one image, so that a batch runs as its images do, of which a thread with AVX2 makes 40 in a
    # nanosecond: what is saved, less what the transforms of the images and of the kernels cost, and a call.
    # The next best over it, weights as they are / transformed ahead, AVX2. One channel, 2048²: 9×9 0.59 / 0.61, 13×13
    # 1.03 / 1.06, 15×15 1.29 / 1.34, 31×31 4, 127×127 60; 512²: 15×15 0.72 / 1.06, 21×21 1.4 / 2.1; 256²: 21×21 0.85 /
    # 2.0, 31×31 1.1 / 2.8; 128²: 31×31 0.48 / 1.6. 3 to 3, 1024², 9×9: 1.45 / 1.47; 512², 15×15: 2.2 / 2.5. 16 to 16,
    # 256², 9×9: 1.6 / 1.6, 128²: 0.89 / 1.16, 15×15 1.5 / 2.2; 64², 9×9 0.41 / 0.85, 15×15 1.1 / 1.7. 64 depthwise
    # channels, 56²: 31×31 1.02 / 1.75, 21×21 0.63 / 0.91.
    taps, kernels = problem.KH * problem.KW, channels * outputs
    rows, columns = problem.result_shape[2:]
    saved = problem.groups * rows * columns * (kernels * (taps - 10) - 90 * (channels + outputs))
    saved -= problem.groups * kernels * (2000 * taps + 120_000)
    served = problem.stride == problem.dilation == (1, 1) and 8 <= problem.KH <= 256 and problem.KW <= 256
    served = served and (problem.sum_dtype == "float32" or dtypes.is_integer(problem.y_dtype))
    return served and kernels * problem.groups <= 256 and saved >= 2e7


def _transformed_lines(problem: Conv2dProblem, channels: int, outputs: int) -> bool:
    # As above. Products take twice as long where there is one row, a signal, and one channel.
    # A signal of 10⁶ pixels: 128 taps 1.0 / 1.1, 256 1.9 / 2.2, 512 3.1 / 3.4, 4096 13 / 13. 2048 rows of 2048:
    # 127 taps 0.83 / 0.87, 255 1.8 / 1.8. 16 to 16 channels of 16,000: 64 taps 1.4 / 2.1, 31 1.05 / 1.5.
    taps, kernels = problem.KW, channels * outputs
    rows, columns = problem.result_shape[2:]
    waste = 2 if rows == channels == 1 else 1
    saved = problem.groups * rows * columns * (waste * kernels * (taps - 12) - 100 * (channels + outputs))
    saved -= problem.groups * kernels * (3000 * taps + 200_000)
    return problem.KH == 1 and kernels * problem.groups <= 256 and saved >= 2e7


def _fft(problem: Conv2dProblem, channels: int, outputs: int) -> bool:
    # numba_cpu.rows or .strip over it. One channel, 2048²: 25×25 0.57, 31×31 0.76, 41×41 1.4, 63×63 2.9, 127×127 11.8;
    # 512²: 41×41 0.64, 63×63 0.86, 127×127 2.9. 3 to 16 channels, 512²: 21×21 0.85, 31×31 2.1;
    # 3 to 3, 1024², 31×31: 4.6; 16 to 16, 256²: 15×15 0.37, 21×21 0.65; 64 to 64, 128²: 31×31 0.84.
    # In products of one image, so that a batch runs as its images do: what is saved, less what the transforms and those
    # of the kernels cost.
    taps, kernels = problem.KH * problem.KW, channels * outputs
    planes = problem.groups * problem.OH * problem.OW
    saved = planes * (kernels * (taps - 400) - 400 * (channels + outputs))
    saved -= problem.groups * kernels * (6000 * taps + 3_000_000)
    return problem.op == "forward" and problem.precision != "highest" and kernels <= 256 and saved >= 8e8


def _weight_grad(problem: Conv2dProblem) -> list[Rule]:
    # Against PyTorch: 1.0 to 4.0 dense, where numpy.gemm has 0.1 to 1.0; depthwise 1.0 to 3.0, where it has 0.1 to 0.2.
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
    # With AVX2, 64 to 512 channels, 14² to 224²: 1.8 to 4.8 / 2.0 to 5.0. Channels last, over PyTorch's channels_last:
    # 1.6 to 2.9 / 1.6 to 3.0; 14²: 64 channels 1.4 / 1.5; 12²: 1.1 / 1.9; 16 to 64, 56²: 1.7 / 1.8.
    # 7², 512 channels: 0.75 / 0.7, channels last 1.6 / 1.8, where direct sums have 1.7 / 2.3.
    # The last tile of a row or column is often cut: what is made must not be much more than what is wanted.
    tiles = -(-rows // _TILE) * -(-columns // _TILE) * _TILE**2
    return (
        min(channels, outputs) >= 16
        and channels * outputs >= 1024
        and rows * columns >= 144
        and 10 * rows * columns >= 7 * tiles
    )
