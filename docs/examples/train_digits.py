"""Train a small convolutional network to read handwritten digits, with NumPy (or CuPy) and gpuconv alone.

    python docs/examples/train_digits.py

The 1797 pictures of 8 × 8 pixels come with scikit-learn. Every layer of the network is a convolution, and all but the
last end in a ReLU, ``max(y, 0)``:

    1 × 8 × 8    the picture
    16 × 8 × 8   after 3×3 kernels
    32 × 4 × 4   after 3×3 kernels with stride 2
    64 × 2 × 2   after 3×3 kernels with stride 2
    10 × 1 × 1   after 2×2 kernels, which cover all that is left: a score for each digit

Training repeats three steps on a few pictures at a time. ``forward`` computes the scores, and ``cross_entropy`` how
wrong they are: a single number, the loss. ``backward`` finds the gradient of the loss in every weight: by how much the
loss would grow if that weight grew a little. It goes from the last layer to the first, by the chain rule; hence its
name, back-propagation. ``step`` then moves every weight a little against its gradient.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpuconv

try:
    import click
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as error:
    sys.stderr.write(f'train_digits: {error}; the examples need the extra of that name: pip install ".[examples]"\n')
    sys.exit(2)

# The network


class Layer(NamedTuple):
    """A convolution: how many kernels of how many pixels, by what step they move, and the border of zeros."""

    kernels: int
    size: int
    stride: int
    padding: int


LAYERS = (Layer(16, 3, 1, 1), Layer(32, 3, 2, 1), Layer(64, 3, 2, 1), Layer(10, 2, 1, 0))


class Parameters(NamedTuple):
    """What one layer learns; their gradients come in the same shape, so they are kept in the same class."""

    weight: Any  # kernels, channels, rows, columns
    bias: Any  # kernels


def new_network(rng: np.random.Generator) -> list[Parameters]:
    """Random weights, no biases."""
    network, channels = [], 1
    for layer in LAYERS:
        shape = (layer.kernels, channels, layer.size, layer.size)
        # Each output sums this many products, and ReLU drops half of them: this spread keeps the numbers about as
        # large after the layer as they were before it (He et al., 2015).
        spread = math.sqrt(2 / (channels * layer.size**2))
        weight = spread * rng.standard_normal(shape, dtype=np.float32)
        network.append(Parameters(weight, np.zeros(layer.kernels, dtype=np.float32)))
        channels = layer.kernels
    return network


def forward(network: list[Parameters], images: Any) -> list[Any]:
    """The images, then the output of each layer; the last one holds the scores, (N, 10, 1, 1)."""
    values = [images]
    for layer, (weight, bias) in zip(LAYERS, network, strict=True):
        activation = "relu" if layer is not LAYERS[-1] else None
        values.append(gpuconv.conv2d(values[-1], weight, bias, layer.stride, layer.padding, activation=activation))
    return values


def cross_entropy(scores: Any, wanted: Any) -> tuple[float, Any]:
    """The loss and its gradient in the scores; ``wanted`` has a 1 at each image's digit and 0 elsewhere.

    Softmax makes probabilities of the scores, ``p = exp(score) / Σ exp(scores)``. The loss is the mean over the images
    of −log p of the right digit: 0 if the network is sure and right, large if it is sure and wrong.
    """
    scores = scores - scores.max(axis=1, keepdims=True)  # leaves p as it is, and exp cannot overflow
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    loss = -(wanted * log_p).sum() / len(scores)
    # The derivative is as simple as it looks: raise the right score by what its p lacks, lower the others by their p.
    return float(loss), (np.exp(log_p) - wanted) / len(scores)


def backward(network: list[Parameters], values: list[Any], gradient: Any) -> list[Parameters]:
    """The gradients of the loss in all parameters.

    ``values`` is what ``forward`` gave, ``gradient`` the gradient in its scores. On the way back, ``gradient`` is
    always that in the output of the layer at hand. The output is the sum over kernel taps of weight · input, so:

    - a weight has met many pixels of the input: its gradient sums input · gradient over all of them (conv2d_weight);
    - the bias was added to every pixel: its gradient sums the gradient (conv2d_bias);
    - a pixel of the input went into several outputs, each time with another weight: its gradient sums
      weight · gradient over them (conv2d_input). It is what the layer before needs to go on.
    """
    gradients = []
    for number in reversed(range(len(LAYERS))):
        layer, weight = LAYERS[number], network[number].weight
        x, y = values[number], values[number + 1]
        if layer is not LAYERS[-1]:
            gradient = gradient * (y > 0)  # where ReLU gave 0, a small change of its input changes nothing
        gradients.append(
            Parameters(
                gpuconv.grad.conv2d_weight(x, weight.shape, gradient, layer.stride, layer.padding),
                gpuconv.grad.conv2d_bias(gradient),
            )
        )
        if number > 0:  # nobody asks how the loss depends on the picture
            gradient = gpuconv.grad.conv2d_input(x.shape, weight, gradient, layer.stride, layer.padding)
    return gradients[::-1]


# Training: stochastic gradient descent with momentum

# Chosen by the accuracy on validation pictures; the test pictures had no part in it.
BATCH = 64
RATE = 0.1
MOMENTUM = 0.9


def step(network: list[Parameters], velocities: list[Parameters], gradients: list[Parameters], rate: float) -> None:
    """Move every parameter against its gradient, in place."""
    for parameters, memory, slopes in zip(network, velocities, gradients, strict=True):
        for value, velocity, slope in zip(parameters, memory, slopes, strict=True):
            # A velocity averages the gradients of many batches, and so forgets what was peculiar to each.
            velocity *= MOMENTUM
            velocity -= rate * slope
            value += velocity


def moved(images: Any, rng: np.random.Generator) -> Any:
    """Copies of the images, half of them moved by a pixel in some direction: a 7 stays a 7 wherever it stands."""
    rows, columns = rng.choice(3, p=(0.15, 0.7, 0.15), size=(2, len(images)))
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return np.stack([image[:, i : i + 8, j : j + 8] for image, i, j in zip(padded, rows, columns, strict=True)])


class Pictures(NamedTuple):
    """Images (N, 1, 8, 8) from 0 to 1, and the digits they show."""

    images: Any
    digits: Any

    @property
    def wanted(self) -> Any:
        """The scores' shape, (N, 10, 1, 1), with a 1 at each image's digit and 0 elsewhere."""
        return np.eye(10, dtype=np.float32)[self.digits][:, :, None, None]


class Epoch(NamedTuple):
    """What there is to know after all training pictures have been seen once more."""

    losses: list[float]  # one for each batch
    validation_loss: float
    validation_accuracy: float


def train(
    network: list[Parameters], training: Pictures, validation: Pictures, epochs: int, rng: np.random.Generator, xp: Any
) -> Iterator[Epoch]:
    """Train the network in place; ``xp`` is NumPy or CuPy, whichever the network's arrays are of."""
    velocities = [Parameters(np.zeros_like(weight), np.zeros_like(bias)) for weight, bias in network]
    wanted = training.wanted
    for epoch in range(epochs):
        batches = np.array_split(rng.permutation(len(wanted)), math.ceil(len(wanted) / BATCH))
        losses = []
        for number, batch in enumerate(batches):
            values = forward(network, xp.asarray(moved(training.images[batch], rng)))
            loss, gradient = cross_entropy(values[-1], xp.asarray(wanted[batch]))
            # Large steps at first, ever smaller ones towards the end: half a cosine wave from RATE to 0.
            done = (epoch + number / len(batches)) / epochs
            step(network, velocities, backward(network, values, gradient), RATE * (1 + math.cos(math.pi * done)) / 2)
            losses.append(loss)
        scores = forward(network, xp.asarray(validation.images))[-1]
        loss, _ = cross_entropy(scores, xp.asarray(validation.wanted))
        yield Epoch(losses, loss, accuracy(scores, validation.digits))


def accuracy(scores: Any, digits: Any) -> float:
    """The share of the images whose highest score is that of their digit."""
    return float(np.mean(on_host(scores).argmax(axis=1).ravel() == digits))


def on_host(array: Any) -> Any:
    """As a NumPy array."""
    return array if isinstance(array, np.ndarray) else array.get()


# Pictures in, picture out


def load() -> tuple[Pictures, Pictures, Pictures]:
    """1197 pictures to train with, 240 to validate and 360 to test: always these, with the same share of each digit.

    They were divided at random, so all three parts have digits by each of the 13 writers. A stranger's would be harder.
    """
    bunch = load_digits()
    images, digits = (bunch.images[:, None] / 16).astype(np.float32), bunch.target
    images, test_images, digits, test_digits = train_test_split(
        images, digits, test_size=360, stratify=digits, random_state=0
    )
    images, validation_images, digits, validation_digits = train_test_split(
        images, digits, test_size=240, stratify=digits, random_state=0
    )
    return (
        Pictures(images, digits),
        Pictures(validation_images, validation_digits),
        Pictures(test_images, test_digits),
    )


PAPER, INK, SOFT, LINE, BLUE, ORANGE = "#faf9f6", "#212126", "#706e6c", "#d6d2ca", "#2166ac", "#c4500a"
TWO_INKS = LinearSegmentedColormap.from_list("two inks", [BLUE, "white", ORANGE])
ONE_INK = LinearSegmentedColormap.from_list("one ink", ["white", ORANGE])


def plot(path: Path, title: str, history: list[Epoch], network: list[Parameters], test: Pictures, scores: Any) -> None:
    """Draw the loss, the hardest pictures, and the kernels of the first layer with what they make of two pictures."""
    inside = ConstrainedLayoutEngine(rect=(0.015, 0.02, 0.97, 0.9))  # of a margin, and below the title
    figure: Any = Figure(figsize=(12.2, 6.2), dpi=110, layout=inside, facecolor=PAPER)
    figure.suptitle(title, x=0.025, y=0.97, ha="left", color=INK, fontsize=15)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1), wspace=0.04)
    upper, lower = left.subfigures(2, 1, height_ratios=(3.2, 1))
    for part in (left, right, upper, lower):
        part.set_facecolor(PAPER)
    draw_loss(upper, history)

    # Hard is what some other digit's score comes close to, or exceeds.
    right_digit = np.arange(10) == test.digits[:, None]
    lead = scores[right_digit] - np.where(right_digit, -np.inf, scores).max(axis=1)
    heading(lower, f"The hardest of the {len(lead)} test pictures ({np.sum(lead < 0)} were misread)")
    for axes, index in zip(lower.subplots(1, 8), np.argsort(lead), strict=False):
        misread = f" as {scores[index].argmax()}" if lead[index] < 0 else ""
        tile(axes, test.images[index, 0], f"{test.digits[index]}{misread}", cmap="gray_r")

    examples = np.concatenate([test.images[test.digits == digit][:1] for digit in (3, 0)])
    heading(
        right,
        "First layer: its 16 kernels, orange where positive and blue where negative,\n"
        "and under each what it makes of the two pictures on the left",
    )
    weights = network[0].weight[:, 0]
    seen = forward(network, examples)[1]
    grid = right.subplots(7, 9, height_ratios=(1, 1, 1, 0.1, 1, 1, 1))
    for axes in grid.flat:
        axes.set_axis_off()
    for index, (kernel, *responses) in enumerate(zip(weights, *seen, strict=True)):
        top, column = 4 * (index // 8), 1 + index % 8
        tile(grid[top, column], kernel, cmap=TWO_INKS, vmin=-np.abs(weights).max(), vmax=np.abs(weights).max())
        for below, response in enumerate(responses, start=1):
            tile(grid[top + below, column], response, cmap=ONE_INK, vmin=0, vmax=np.quantile(seen, 0.995))
    for top in (0, 4):
        for below, example in enumerate(examples[:, 0], start=1):
            tile(grid[top + below, 0], example, cmap="gray_r")
    figure.savefig(path, format="png")


def draw_loss(figure: Any, history: list[Epoch]) -> None:
    """The loss against the epoch."""
    losses = np.concatenate([epoch.losses for epoch in history])
    epochs = np.arange(1, len(history) + 1)
    batches = np.arange(1, len(losses) + 1) * len(history) / len(losses)
    heading(figure, "Loss")
    axes = figure.subplots()
    axes.semilogy(batches, losses, color=BLUE, alpha=0.3, linewidth=0.8, label="training, each batch")
    axes.semilogy(epochs, [np.mean(epoch.losses) for epoch in history], color=BLUE, label="training, mean of an epoch")
    axes.semilogy(epochs, [epoch.validation_loss for epoch in history], color=ORANGE, label="validation")
    axes.set_xlabel("epoch", color=SOFT)
    axes.set_facecolor(PAPER)
    axes.tick_params(which="both", color=LINE, labelcolor=SOFT)
    axes.spines[:].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.5)
    axes.legend(frameon=False, labelcolor=INK)


def heading(figure: Any, text: str) -> None:
    """Above the left edge of a part of the figure."""
    figure.suptitle(text, x=0.02, ha="left", color=INK, fontsize=11)


def tile(axes: Any, picture: Any, caption: str = "", **options: Any) -> None:
    """A few pixels, drawn large."""
    axes.set_axis_on()
    axes.imshow(picture, **options)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, color=SOFT, fontsize=9)
    axes.spines[:].set_color(LINE)


# The command line


def array_library(device: str) -> Any:
    """NumPy, or CuPy for a GPU."""
    if device == "cpu":
        return np
    missing = gpuconv.info().implementations["cupy.gemm"]
    if missing is not None:
        raise click.UsageError(f"--device cuda: {missing}")
    import cupy

    return cupy


@click.command()
@click.option("--epochs", type=click.IntRange(1), default=30, show_default=True, help="How often to see each picture.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="cuda needs CuPy.")
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("digits.png"),
    show_default=True,
    help="Where to write the picture.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the weights and the batches.")
@click.option("--quiet", is_flag=True, help="Print the last line alone.")
def main(epochs: int, device: str, picture: Path, seed: int, quiet: bool) -> None:
    """Train a small convolutional network to read handwritten digits."""
    if not picture.parent.is_dir():  # before any work
        raise click.UsageError(f"--plot: there is no folder {picture.parent}")
    xp = array_library(device)
    rng = np.random.default_rng(seed)
    training, validation, test = load()
    network = [Parameters(*map(xp.asarray, parameters)) for parameters in new_network(rng)]
    count = sum(value.size for parameters in network for value in parameters)

    console = Console(quiet=quiet)
    console.print(
        f"{count} parameters; pictures: {len(training.digits)} to train, {len(validation.digits)} to validate, "
        f"{len(test.digits)} to test"
    )
    columns = (
        TextColumn("epoch"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    start = time.perf_counter()
    history = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=epochs, figures="")
        for epoch in train(network, training, validation, epochs, rng, xp):
            history.append(epoch)
            figures = f"loss {np.mean(epoch.losses):.4f}, validation accuracy {epoch.validation_accuracy:.1%}"
            progress.update(task, advance=1, figures=figures)
    seconds = time.perf_counter() - start

    scores = on_host(forward(network, xp.asarray(test.images))[-1])
    share = accuracy(scores, test.digits)
    result = f"test accuracy: {100 * share:.2f} % ({share * len(scores):.0f} of {len(scores)} pictures)"
    on_cpu = [Parameters(*map(on_host, parameters)) for parameters in network]
    plot(picture, f"Handwritten digits, {result}", history, on_cpu, test, scores[:, :, 0, 0])
    console.print(f"trained in {seconds:.1f} s; the loss and the kernels are in {picture}")
    click.echo(result)


if __name__ == "__main__":
    main()
