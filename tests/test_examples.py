"""The examples in docs/examples: they run, they learn, and the gradients they are built on are right."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the examples need the extra `examples`")
pytest.importorskip("sklearn", reason="the examples need the extra `examples`")

from cli_tools import run_program
from click.testing import CliRunner
from PIL import Image

import gpuconv

DOCS = Path(__file__).parent.parent / "docs"
SCRIPT = DOCS / "examples" / "train_digits.py"
if not SCRIPT.exists():
    pytest.skip("there is no docs folder beside the tests", allow_module_level=True)


def load_script():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_script()


def run(*arguments):
    result = CliRunner().invoke(example.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    last = result.output.splitlines()[-1]
    found = re.fullmatch(r"test accuracy: (\d+\.\d\d) % \((\d+) of 360 pictures\)", last)
    assert found, last
    assert float(found[1]) == pytest.approx(100 * int(found[2]) / 360, abs=0.005)
    return float(found[1]), result.output


def trained(epochs, seed=0, xp=np):
    rng = np.random.default_rng(seed)
    network = [example.Parameters(*map(xp.asarray, parameters)) for parameters in example.new_network(rng)]
    training, validation, _ = example.load()
    return network, list(example.train(network, training, validation, epochs, rng, xp))


def test_it_learns():
    network, history = trained(2)
    losses = [np.mean(epoch.losses) for epoch in history]
    assert 1 < losses[0] < 3, "ten digits guessed blindly cost log 10 = 2.3"
    assert losses[1] < 0.8 * losses[0]
    assert history[1].validation_loss < history[0].validation_loss
    assert history[1].validation_accuracy > 0.75
    assert all(value.dtype == np.float32 for parameters in network for value in parameters)


def test_a_short_run(tmp_path):
    accuracy, output = run("--epochs", 2, "--plot", tmp_path / "digits.png")
    assert accuracy > 75
    assert "validation accuracy" in output
    with Image.open(tmp_path / "digits.png") as image, Image.open(DOCS / "images" / "digits.png") as documented:
        assert image.size == documented.size, "docs/images/digits.png is what the script draws"
        shades = np.asarray(image.convert("RGB")).astype(int)
    half = shades.shape[1] // 2
    for part in (shades[:, :half], shades[:, half:]):  # the loss and the hardest pictures; the kernels
        red, _, blue = np.moveaxis(part, -1, 0)
        assert (blue - red > 60).sum() > 300 and (red - blue > 60).sum() > 300, "both inks"
        assert len(np.unique(part.reshape(-1, 3), axis=0)) > 100
    assert (shades[:, half:] == 255).all(axis=-1).mean() > 0.05, "white where a kernel sees nothing"


def test_quiet_and_seed(monkeypatch):
    networks = []
    monkeypatch.setattr(example, "plot", lambda path, title, history, network, *others: networks.append(network))
    for seed in (5, 5, 6):
        _, output = run("--epochs", 1, "--seed", seed, "--quiet")
        assert len(output.splitlines()) == 1
    one, same, other = (network[-1].weight for network in networks)
    assert np.allclose(one, same, rtol=1e-3, atol=1e-4)
    assert not np.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_the_documented_picture_is_small():
    assert (DOCS / "images" / "digits.png").stat().st_size < 150_000


def test_the_gradients_are_those_of_the_loss():
    """Against central differences, in float64, where they agree to many more digits than a wrong term would leave."""
    rng = np.random.default_rng(0)
    # Biases that are not zero: no output is then zero by itself, where ReLU has no derivative.
    network = [
        example.Parameters(weight.astype(np.float64), rng.normal(0, 0.1, bias.shape))
        for weight, bias in example.new_network(rng)
    ]
    training = example.load()[0]
    few = example.Pictures(training.images[:6].astype(np.float64), training.digits[:6])
    wanted = few.wanted.astype(np.float64)

    def loss():
        return example.cross_entropy(example.forward(network, few.images)[-1], wanted)[0]

    values = example.forward(network, few.images)
    gradients = example.backward(network, values, example.cross_entropy(values[-1], wanted)[1])
    for layer, (parameters, slopes) in enumerate(zip(network, gradients, strict=True)):
        for name, value, slope in zip(parameters._fields, parameters, slopes, strict=True):
            assert slope.shape == value.shape and slope.dtype == np.float64
            for place in map(tuple, rng.integers(0, value.shape, size=(12, value.ndim))):
                kept, step = value[place], 1e-5
                ends = []
                for value[place] in (kept + step, kept - step):
                    ends.append(loss())
                value[place] = kept
                measured = (ends[0] - ends[1]) / (2 * step)
                assert slope[place] == pytest.approx(measured, rel=1e-6, abs=1e-9), (layer, name, place)


def test_the_pictures_are_always_divided_alike():
    parts = example.load()
    assert [len(part.digits) for part in parts] == [1197, 240, 360]
    for part in parts:
        assert part.images.shape == (len(part.digits), 1, 8, 8) and part.images.dtype == np.float32
        assert part.images.min() == 0 and part.images.max() == 1
        assert np.array_equal(part.wanted[:, :, 0, 0].argmax(axis=1), part.digits)
        assert np.all(np.bincount(part.digits) > 0.09 * len(part.digits))
    for part, again in zip(parts, example.load(), strict=True):
        assert np.array_equal(part.images, again.images)


def test_half_of_the_images_are_moved_by_a_pixel():
    images = np.random.default_rng(1).random((4000, 1, 8, 8))
    moved = example.moved(images, np.random.default_rng(2))
    assert moved.shape == images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    same = {(i, j): (moved == padded[:, :, i : i + 8, j : j + 8]).all((1, 2, 3)) for i in range(3) for j in range(3)}
    assert np.array_equal(sum(same.values()), np.ones(4000)), "each is one of nine"
    assert same[1, 1].mean() == pytest.approx(0.49, abs=0.04)
    assert same[0, 2].mean() == pytest.approx(0.0225, abs=0.01)


# The script where some module is not installed.
WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("missing", ["click", "sklearn", "matplotlib"])
def test_without_the_extra(missing):
    result = run_program(program=("-c", WITHOUT.format(missing=missing, script=str(SCRIPT))))
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(rf"train_digits: No module named '{missing}'; .*\n", result.stderr)
    assert 'pip install ".[examples]"' in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--device", "cuda"], "CuPy is away"), (["--plot", "nowhere/digits.png"], "no folder nowhere")],
)
def test_refusals_come_before_the_training(monkeypatch, arguments, reason):
    monkeypatch.setattr(gpuconv, "info", lambda: SimpleNamespace(implementations={"cupy.gemm": "CuPy is away"}))
    monkeypatch.setattr(example, "load", None)
    result = CliRunner().invoke(example.main, arguments)
    assert result.exit_code == 2 and reason in result.output


def test_the_name_that_the_script_asks_info_for():
    assert "cupy.gemm" in gpuconv.info().implementations


@pytest.mark.full
def test_the_full_run(tmp_path):
    assert run("--plot", tmp_path / "digits.png")[0] >= 97


@pytest.mark.gpu
def test_on_a_gpu():
    import cupy

    network, history = trained(2, xp=cupy)
    assert all(isinstance(value, cupy.ndarray) for parameters in network for value in parameters)
    _, expected = trained(2)
    # The first steps alone: rounding errors grow with every step.
    assert np.allclose(history[0].losses[:3], expected[0].losses[:3], rtol=1e-3)
    assert history[1].validation_accuracy > 0.75
