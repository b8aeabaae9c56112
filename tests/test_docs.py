"""What the documentation shows is run: the examples in the docstrings, and the README's code from top to bottom."""

import ast
import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import FLAGS, Block, python_blocks, run_blocks

import gpuconv

README = Path(__file__).parent.parent / "README.md"
# Only these may be missing: an import error of anything else is a mistake in gpuconv.
OPTIONAL = {"cupy", "click", "rich", "PIL", "ml_dtypes", "torch", "cv2"}
# An example may ask for a GPU on a machine that has none.
pytestmark = pytest.mark.filterwarnings("ignore::gpuconv.DeviceFallbackWarning")


def public_modules(folders: list[str], prefix: str) -> Iterator[str]:
    """Names of the modules below ``folders``, found without importing any."""
    for module in pkgutil.iter_modules(folders):
        if module.name.startswith("_"):
            continue
        yield prefix + module.name
        if module.ispkg:
            yield from public_modules([f"{folder}/{module.name}" for folder in folders], f"{prefix}{module.name}.")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder: an example may write files."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["gpuconv", *public_modules(list(gpuconv.__path__), "gpuconv.")])
def test_docstring_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    failed, _ = doctest.testmod(module, optionflags=FLAGS)
    assert not failed, "the comparison is in the captured output"


def test_every_module_is_found():
    names = set(public_modules(list(gpuconv.__path__), "gpuconv."))
    assert {"gpuconv.geometry", "gpuconv.tracing", "gpuconv.backends.numpy_reference"} <= names


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    for name in ("gpuconv.geometry", "gpuconv.tracing", "gpuconv.api"):
        assert any(test.examples for test in finder.find(importlib.import_module(name))), name


# The README


def test_the_readme_runs():
    if not README.exists():
        pytest.skip("there is no README.md beside the tests")
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "README.md shows no Python"
    assert any(not block.not_run for block in blocks), "README.md runs none of its Python"
    assert all(block.not_run != "" for block in blocks), "a block that is not run says why"
    run_blocks(blocks, str(README))


SAMPLE = """\
# Title

```python
a = 1
```

```bash
exit 1
```
<!-- not run: needs a camera -->
```python
a = 2
```

```python
>>> a
1
>>> b = a + 1
```

<!-- not run: -->

```python
b += 1
```
"""


def test_blocks_are_found_and_run_in_order():
    blocks = python_blocks(SAMPLE)
    assert [(block.line, block.not_run) for block in blocks] == [
        (4, None),
        (12, "needs a camera"),
        (16, None),
        (24, ""),
    ]
    run_blocks(blocks[:3], "SAMPLE")


def test_a_wrong_block_is_noticed_with_its_line(capsys):
    with pytest.raises(AssertionError, match="line 16"):
        run_blocks([Block(15, "a = 2", None), Block(16, ">>> a\n1\n", None)], "SAMPLE")
    with pytest.raises(ZeroDivisionError) as error:
        run_blocks([Block(40, "\n1 / 0\n", None)], "SAMPLE")
    assert error.traceback[-1].lineno + 1 == 41


def test_security_promise_that_nothing_is_evaluated_or_unpickled():
    forbidden = {"eval", "exec", "compile", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    sources = sorted(Path(gpuconv.__file__).parent.rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            used = {alias.name for alias in node.names} if isinstance(node, (ast.Import, ast.ImportFrom)) else set()
            used |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
            used |= {node.func.id} if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else set()
            found = {name.partition(".")[0] for name in used} & forbidden
            if path.name == "kernel_cache.py":
                found -= {"pickle"}  # gpuconv's own compiled code, from a folder that is this user's alone
            assert not found, f"{path.name}:{node.lineno} uses {found}"
