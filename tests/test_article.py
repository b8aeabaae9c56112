"""Everything an introduction to the operation says: its worked example, its code, its tables and its questions.

The example is a 5×5 ramp under a 3×3 vertical edge detector, worked out position by position.
"""

import inspect
import re

import numpy as np
import pytest
from calls import affordable

import gpuconv
from gpuconv import conv2d, output_size, parameter_count, receptive_field, trace

X = 10.0 * np.arange(1, 26).reshape(5, 5)
K = np.array([[1.0, 0.0, -1.0]] * 3)

TABLE = """
| Position | Patch (col 0, col 2) | Calculation | Output |
|---|---|---|---|
| (0,0) | col0=[10,60,110], col2=[30,80,130] | (10−30)+(60−80)+(110−130) | −60 |
| (0,1) | col1=[20,70,120], col3=[40,90,140] | (20−40)+(70−90)+(120−140) | −60 |
| (0,2) | col2=[30,80,130], col4=[50,100,150] | (30−50)+(80−100)+(130−150) | −60 |
| (1,0) | col0=[60,110,160], col2=[80,130,180] | (60−80)+(110−130)+(160−180) | −60 |
| (1,1) | col1=[70,120,170], col3=[90,140,190] | (70−90)+(120−140)+(170−190) | −60 |
| (1,2) | col2=[80,130,180], col4=[100,150,200] | (80−100)+(130−150)+(180−200) | −60 |
| (2,0) | col0=[110,160,210], col2=[130,180,230] | (110−130)+(160−180)+(210−230) | −60 |
| (2,1) | col1=[120,170,220], col3=[140,190,240] | (120−140)+(170−190)+(220−240) | −60 |
| (2,2) | col2=[130,180,230], col4=[150,200,250] | (130−150)+(180−200)+(230−250) | −60 |
"""

CODE = """
import numpy as np
# Anchor
X = np.array([
    [ 10, 20, 30, 40, 50],
    [ 60, 70, 80, 90, 100],
    [110, 120, 130, 140, 150],
    [160, 170, 180, 190, 200],
    [210, 220, 230, 240, 250],
], dtype=float)
K = np.array([
    [ 1, 0, -1],
    [ 1, 0, -1],
    [ 1, 0, -1],
], dtype=float)
def conv2d(X, K, stride=1):
    n, k = X.shape[0], K.shape[0]
    out_size = (n - k) // stride + 1
    out = np.zeros((out_size, out_size))
    for i in range(out_size):
        for j in range(out_size):
            patch = X[i*stride:i*stride+k, j*stride:j*stride+k]
            out[i, j] = np.sum(patch * K)
    return out
output = conv2d(X, K)
print("Input shape:", X.shape)
print("Kernel shape:", K.shape)
print(f"Output shape: {output.shape}")
print("\\nOutput feature map:")
print(output)
print(f"\\nOutput size formula: ({X.shape[0]} - {K.shape[0]}) / 1 + 1 = {output.shape[0]}")
# Manual position (0,0)
patch_00 = X[:3, :3]
val_00 = np.sum(patch_00 * K)
print(f"\\nManual check position (0,0): {val_00}")
"""

PRINTED = """\
Input shape: (5, 5)
Kernel shape: (3, 3)
Output shape: (3, 3)

Output feature map:
[[-60. -60. -60.]
 [-60. -60. -60.]
 [-60. -60. -60.]]

Output size formula: (5 - 3) / 1 + 1 = 3

Manual check position (0,0): -60.0
"""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


# The worked example


def test_the_anchor_by_conv2d():
    y = conv2d(X, K)
    assert (y.shape, y.dtype) == ((3, 3), np.float64)
    np.testing.assert_array_equal(y, np.full((3, 3), -60.0))
    np.testing.assert_array_equal(conv2d(X.tolist(), K.tolist()), y)


@pytest.mark.parametrize(("i", "j"), list(np.ndindex(3, 3)))
def test_each_of_the_nine_positions(i, j):
    patch = X[i : i + 3, j : j + 3]
    step = trace(X, K).step(i, j)
    assert step.position == (i, j)
    assert (step.rows, step.columns) == (tuple(range(i, i + 3)), tuple(range(j, j + 3)))
    np.testing.assert_array_equal(step.patch, patch)
    np.testing.assert_array_equal(step.products, [[row[0], 0, -row[2]] for row in patch])
    np.testing.assert_array_equal(step.products.sum(axis=1), [-20, -20, -20])
    assert step.sum == conv2d(X, K)[i, j] == -60


def test_the_first_position_prints_as_it_is_worked_out():
    lines = str(trace(X, K).step(0, 0)).splitlines()
    assert lines[0] == "Position (0,0)"
    assert [line.split() for line in lines[1:5]] == [
        ["Patch:", "Kernel:", "Product:"],
        "10 20 30 1 0 −1 10 0 −30".split(),
        "60 70 80 × 1 0 −1 = 60 0 −80".split(),
        "110 120 130 1 0 −1 110 0 −130".split(),
    ]
    assert lines[5:] == [
        "Sum = 10 + 0 + (−30) + 60 + 0 + (−80) + 110 + 0 + (−130) = −60",
        "Output[0,0] = −60",
    ]


def test_the_table_of_the_nine_steps():
    title, rule, *steps = table(str(trace(X, K)))
    expected_title, _, *expected = table(TABLE)
    assert title == expected_title
    assert all(set(cell) == {"-"} for cell in rule)
    for (position, patch, *rest), (i, j) in zip(expected, np.ndindex(3, 3), strict=True):
        # The labels count the patch's columns, as the title does; the printed rows count the input's.
        patch = re.sub(r"col(\d)", lambda label, j=j: f"col{int(label[1]) - j}", patch)
        assert steps.pop(0) == [position, patch, *rest] == [f"({i},{j})", patch, *rest]
    assert not steps


def test_the_table_is_aligned():
    lines = [line for line in str(trace(X, K)).splitlines() if line.startswith("|")]
    bars = {tuple(i for i, sign in enumerate(line) if sign == "|") for line in lines}
    assert len(bars) == 1


def test_the_code_as_printed_and_the_same_code_with_gpuconv(capsys):
    article: dict[str, object] = {}
    exec(CODE, article)
    assert capsys.readouterr().out == PRINTED

    definition = inspect.cleandoc(CODE)
    start, end = definition.index("def conv2d"), definition.index("output = conv2d")
    ours: dict[str, object] = {}
    exec(definition[:start] + "from gpuconv import conv2d\n" + definition[end:], ours)
    assert capsys.readouterr().out == PRINTED
    assert ours["conv2d"] is conv2d
    np.testing.assert_array_equal(ours["output"], article["output"])


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_code_beside_gpuconv_on_other_operands(stride, capsys):
    article: dict = {}
    exec(CODE, article)
    rng = np.random.default_rng(7)
    x = rng.integers(-9, 10, (9, 9)).astype(float)
    for size in (1, 3, 9):
        k = rng.integers(-9, 10, (size, size)).astype(float)
        np.testing.assert_array_equal(conv2d(x, k, stride=stride), article["conv2d"](x, k, stride))


@pytest.mark.parametrize("stride", [1, 2, np.int64(2)])
def test_the_stride_in_third_place_is_explained(stride):
    # The printed function's own signature is conv2d(X, K, stride).
    with pytest.raises((TypeError, ValueError), match="stride"):
        conv2d(X, K, stride)


def test_the_sign_of_an_edge():
    falling = np.repeat([[9.0, 9.0, 0.0, 0.0, 0.0, 9.0, 9.0]], 3, axis=0)
    np.testing.assert_array_equal(conv2d(falling, K), [[27, 27, 0, -27, -27]])


# Sizes


@pytest.mark.parametrize(
    ("n", "k", "padding", "stride", "size"), [(5, 3, 0, 1, 3), (5, 3, 1, 1, 5), (6, 3, 0, 1, 4), (224, 7, 3, 2, 112)]
)
def test_the_size_table(n, k, padding, stride, size):
    assert output_size(n, k, padding, stride) == (n - k + 2 * padding) // stride + 1 == size
    y = conv2d(np.ones((n, n), np.float32), np.ones((k, k), np.float32), stride=stride, padding=padding)
    assert y.shape == (size, size)
    assert y.max() == k * k, "a window inside the image sees all of the kernel"


def test_eight_filters_give_eight_maps():
    vertical, diagonal = K, np.array([[0.0, 1, 1], [-1, 0, 1], [-1, -1, 0]])
    filters = np.stack([np.rot90(kernel, turn) for kernel in (vertical, diagonal) for turn in range(4)])
    maps = conv2d(X, filters)
    assert maps.shape == (8, 3, 3)
    for one, kernel in zip(maps, filters, strict=True):
        np.testing.assert_array_equal(one, conv2d(X, kernel))
    stacked = conv2d(X, filters, layout="NHWC")
    assert stacked.shape == (3, 3, 8)
    np.testing.assert_array_equal(stacked, np.moveaxis(maps, 0, -1))


# Receptive field


def what_each_output_reads(n: int, layers: int, padding: int) -> np.ndarray:
    """(outputs, outputs, n, n): whether an output of stacked 3×3 layers depends on an input pixel."""
    y = np.eye(n * n).reshape(n * n, 1, n, n)  # an image per pixel, with that pixel alone lit
    for _ in range(layers):
        y = conv2d(y, np.ones((1, 1, 3, 3)), padding=padding)
    return np.moveaxis(y[:, 0] != 0, 0, -1).reshape(*y.shape[2:], n, n)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_receptive_field_of_stacked_layers(layers):
    field = receptive_field([(3, 1, 1)] * layers)
    assert field == 2 * layers + 1
    reads = what_each_output_reads(7, layers, padding=0)
    for i, j in np.ndindex(reads.shape[:2]):
        expected = np.zeros((7, 7), bool)
        expected[i : i + field, j : j + field] = True
        np.testing.assert_array_equal(reads[i, j], expected)


def test_the_receptive_field_grows_until_it_spans_the_input():
    n = 7
    # The middle sees everything once the field is as wide as the input, a corner once it reaches the far corner.
    for layers in range(1, n):
        field = receptive_field([3] * layers)
        reads = what_each_output_reads(n, layers, padding=1)
        assert reads[n // 2, n // 2].all() == (field >= n)
        assert reads.all() == (field >= 2 * n - 1)
    assert receptive_field([3] * (n - 1)) == 2 * n - 1


# One 5×5 or two 3×3


def test_a_5x5_window_takes_25_products_and_a_3x3_window_9():
    assert [trace(X, np.ones((k, k))).step(0, 0).products.size for k in (5, 3)] == [25, 9]
    assert [parameter_count(1, 1, k, bias=False) for k in (5, 3)] == [25, 9]


@pytest.mark.parametrize("channels", [1, 2, 64, 512])
def test_two_3x3_layers_see_as_far_as_one_5x5_with_fewer_parameters(channels):
    assert receptive_field([(3, 1, 1), (3, 1, 1)]) == receptive_field([(5, 1, 1)]) == 5
    two, one = 2 * parameter_count(channels, channels, 3), parameter_count(channels, channels, 5)
    assert (two, one) == (18 * channels**2 + 2 * channels, 25 * channels**2 + channels)
    assert two < one


def test_two_3x3_kernels_compose_to_one_5x5():
    rng = np.random.default_rng(3)
    x, a, b = (rng.integers(-9, 10, shape).astype(float) for shape in ((11, 12), (3, 3), (3, 3)))
    composed = conv2d(a, b, padding="full", flip=True)
    assert composed.shape == (5, 5)
    np.testing.assert_array_equal(conv2d(conv2d(x, a), b), conv2d(x, composed))


# Translation


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 1), (2, 3)])
def test_a_shifted_input_gives_a_shifted_output(down, right):
    rng = np.random.default_rng(5)
    x, k = rng.integers(-9, 10, (10, 11)).astype(float), rng.integers(-9, 10, (3, 3)).astype(float)
    y = conv2d(x, k)
    shifted = conv2d(np.pad(x, ((down, 0), (right, 0)))[:10, :11], k)
    np.testing.assert_array_equal(shifted[down:, right:], y[: y.shape[0] - down, : y.shape[1] - right])
    # On a torus there is no border to lose anything at.
    around = {"padding": 1, "padding_mode": "wrap"}
    rolled = conv2d(np.roll(x, (down, right), (0, 1)), k, **around)
    np.testing.assert_array_equal(rolled, np.roll(conv2d(x, k, **around), (down, right), (0, 1)))


def test_a_stride_keeps_shifts_by_its_multiples():
    rng = np.random.default_rng(6)
    x, k = rng.integers(-9, 10, (8, 8)).astype(float), rng.integers(-9, 10, (3, 3)).astype(float)
    options = {"stride": 2, "padding": 1, "padding_mode": "wrap"}
    y = conv2d(x, k, **options)
    np.testing.assert_array_equal(conv2d(np.roll(x, 2, 0), k, **options), np.roll(y, 1, 0))
    assert not np.array_equal(conv2d(np.roll(x, 1, 0), k, **options), y)


# The five questions


def test_question_1_the_middle_column():
    k = np.array([[0, 1, 0]] * 3)
    steps = trace(X, k)
    first = steps.step(0, 0)
    np.testing.assert_array_equal(first.patch, X[:3, :3])
    np.testing.assert_array_equal(first.products, [[0, 20, 0], [0, 70, 0], [0, 120, 0]])
    assert first.sum == conv2d(X, k)[0, 0] == 20 + 70 + 120 == 210
    assert first.calculation == "20+70+120"
    assert table(str(steps))[0][1] == "Patch (col 1)"
    # It detects a vertical line: of three lit pixels, the column gets the whole answer and the row a third of it.
    column, row = np.zeros((3, 3)), np.zeros((3, 3))
    column[:, 1] = row[1] = 1
    assert (conv2d(column, k).item(), conv2d(row, k).item()) == (3, 1)


def test_question_2_the_horizontal_edge_detector():
    k = np.array([[1, 1, 1], [0, 0, 0], [-1, -1, -1]])
    steps = trace(X, k)
    assert steps.step(0, 0).sum == (10 + 20 + 30) - (110 + 120 + 130) == -300
    assert steps.step(1, 0).sum == (60 + 70 + 80) - (160 + 170 + 180) == -300
    assert steps.step(0, 0).calculation == "(10+20+30)+(−110−120−130)"
    # A row down adds 50 as a column to the right adds 10, so the answer is constant: 3 columns · 2 rows · −50.
    np.testing.assert_array_equal(conv2d(X, k), np.full((3, 3), -300.0))


def test_question_3_three_layers_on_a_32x32_image():
    sizes, y = [], np.ones((32, 32))
    for _ in range(3):
        y = conv2d(y, np.ones((3, 3)))
        sizes.append(y.shape)
        assert y.shape == (output_size(sizes[-2][0] if len(sizes) > 1 else 32, 3),) * 2
    assert sizes == [(30, 30), (28, 28), (26, 26)]
    field = receptive_field([(3, 1, 1)] * 3)
    assert (field, field**2) == (7, 49)
    np.testing.assert_array_equal(what_each_output_reads(9, 3, padding=0).sum(axis=(2, 3)), np.full((3, 3), 49))


def test_question_4_the_first_layer_of_resnet():
    assert (224 - 7 + 2 * 3) // 2 + 1 == output_size(224, 7, padding=3, stride=2) == 112


def test_question_5_parameters():
    assert parameter_count(64, 1, 3) == 64 * (1 * 3 * 3 + 1) == 640
    assert parameter_count(64, 3, 3) == 64 * (3 * 3 * 3 + 1) == 1792
    x, k, bias = np.ones((3, 5, 5)), np.ones((64, 3, 3, 3)), np.ones(64)
    assert conv2d(x, k, bias).shape == (64, 3, 3)
    assert k.size + bias.size == parameter_count(64, 3, 3)


# What trace says where the example ends


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"),
    [(1, 0, 1), (2, 1, 1), ((1, 3), (0, 4), (2, 1)), (1, "same", 2), (2, "same_lower", 1), (1, "full", 2), (3, 20, 1)],
)
@pytest.mark.parametrize(("x_dtype", "k_dtype"), [("int64", "int8"), ("float64", "int64"), ("float64", "complex128")])
def test_trace_agrees_with_conv2d(stride, padding, dilation, x_dtype, k_dtype):
    rng = np.random.default_rng(9)
    x, k = rng.integers(-9, 10, (7, 8)).astype(x_dtype), rng.integers(-9, 10, (2, 3)).astype(k_dtype)
    steps = trace(x, k, stride, padding, dilation)
    expected = conv2d(x, k, stride=stride, padding=padding, dilation=dilation, **affordable(x_dtype, k_dtype))
    np.testing.assert_array_equal(steps.output, expected)
    assert steps.output.dtype == expected.dtype
    assert (steps.shape, len(steps)) == (expected.shape, expected.size)
    for step, position in zip(steps, np.ndindex(expected.shape), strict=True):
        assert step is steps.step(*position)
        assert (step.position, step.sum) == (position, expected[position])
        taken = [[0 if -1 in (r, c) else x[r, c] for c in step.columns] for r in step.rows]
        np.testing.assert_array_equal(step.patch, taken)


def test_trace_shows_padding_as_zeros_and_weights_as_factors():
    steps = trace([[1, -2], [3, 4]], [[2, 1], [0, -0.5]], stride=2, padding=((1, 0), (0, 2)), dilation=(2, 1))
    assert steps.step(0, 0).rows == (-1, 1)
    assert steps.step(0, 1).columns == (-1, -1)
    caption, _, *lines = str(steps).splitlines()
    assert caption == "Input 2×2, kernel 2×2, stride 2, padding (1, 0) by (0, 2), dilation 2×1: output 1×2"
    assert table("\n".join(lines))[2:] == [
        ["(0,0)", "col0=[0,3], col1=[0,4]", "(2·0 + 1·0) + (−0.5·4)", "−2"],
        ["(0,1)", "col0=[0,0], col1=[0,0]", "(2·0 + 1·0) + (−0.5·0)", "0"],
    ]
    assert trace([[-1, -2]], [[1, -1]]).step(0, 0).calculation == "−1−(−2)"
    assert trace([[-1, -2]], [[3, -4]]).step(0, 0).calculation == "3·(−1) − 4·(−2)"
    assert trace([[1, 2]], [[0, 0]]).step(0, 0).calculation == "0"
    assert repr(steps).startswith("Trace(x=(2, 2), k=(2, 2), stride=(2, 2), padding=((1, 0), (0, 2))")


def test_trace_is_read_only():
    steps = trace(X, K)
    for array in (steps.x, steps.k, steps.output, steps.step(0, 0).patch, steps.step(0, 0).products):
        assert not array.flags.writeable
    assert X.flags.writeable, "the caller's own array stays the caller's"
    assert isinstance(steps, gpuconv.Trace)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((X[0], K), ValueError, r"x must have two axes, \(H, W\), or three, \(C, H, W\); got shape \(5,\)"),
        ((X, K[None]), ValueError, r"k must have two axes, \(KH, KW\); got shape \(1, 3, 3\)"),
        ((X, [[1, 2], [3]]), ValueError, r"k must be .* \(KH, KW\)"),
        ((X, [[]]), ValueError, r"k .* got shape \(1, 0\)"),
        (([["a"]], K), TypeError, "x has dtype str"),
        ((X, [[None]]), TypeError, "k has dtype object"),
        ((np.ma.array(X), K), TypeError, "x is a masked array"),
        (([np.ma.array(row) for row in X], K), TypeError, r"x\[0\] is a masked array"),
        ((K, X), ValueError, "exchange the two: x comes before k"),
        ((X, K, 0), ValueError, "stride must be at least 1; got 0"),
        ((X, K, 1.0), TypeError, r"stride must be an integer or a pair \(rows, columns\); got 1.0"),
        ((X, np.ones((6, 6))), ValueError, "6×6.*5×5"),
        ((np.ones((200, 200)), [[1]]), ValueError, "40000 windows.*small examples"),
        ((X, K, 1, 2**30), ValueError, "windows.*small examples"),
        ((np.ones((500, 500)), np.ones((450, 450))), ValueError, "products.*small examples"),
    ],
)
def test_trace_refuses(arguments, error, said):
    with pytest.raises(error, match=f"trace: .*{said}"):
        trace(*arguments)


def test_a_step_outside_the_output_is_refused():
    with pytest.raises(ValueError, match="i must be below 3; got 3"):
        trace(X, K).step(3, 0)
