"""What the documentation shows is run: the examples in the docstrings, and the README's code from top to bottom."""

import ast
import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import gpuconv

README = Path(__file__).parent.parent / "README.md"
# Only these may be missing: an import error of anything else is a mistake in gpuconv.
OPTIONAL = {"cupy", "click", "rich", "PIL", "ml_dtypes", "torch", "cv2"}
# An example may ask for a GPU on a machine that has none.
pytestmark = pytest.mark.filterwarnings("ignore::gpuconv.DeviceFallbackWarning")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


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


@dataclass(frozen=True)
class Block:
    """One fenced block of Python: its first line's number in the file, and why it is not run, if it is not."""

    line: int
    code: str
    not_run: str | None


def python_blocks(text: str) -> list[Block]:
    pattern = r"(?:<!-- not run:(?P<reason>[^>]*)-->\s*\n)?^```python[^\S\n]*\n(?P<code>.*?)^```[^\S\n]*$"
    return [
        Block(text.count("\n", 0, found.start("code")) + 1, found["code"], found["reason"] and found["reason"].strip())
        for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    ]


def run_blocks(blocks: list[Block], file: str) -> None:
    """Run the blocks in order in one namespace; a block of ``>>>`` lines is compared with what it prints."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        if block.not_run:
            continue
        if block.code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(block.code, namespace, "README", file, block.line - 1)
            result = doctest.DocTestRunner(optionflags=FLAGS).run(test, clear_globs=False)
            namespace.update(test.globs)
            assert not result.failed, f"{file}, line {block.line}: the comparison is in the captured output"
        else:
            # The empty lines make a traceback name the file's own line.
            exec(compile("\n" * (block.line - 1) + block.code, file, "exec"), namespace)


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
