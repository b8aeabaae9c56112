"""Every block of docs/coming-from.md runs, and its ``theirs`` equals its ``ours`` wherever that library is installed.

A statement that needs a library which is not here is left out, and so is what needs its result: the rest still runs.
"""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from documents import python_blocks

PAGE = Path(__file__).parent.parent / "docs" / "coming-from.md"
if not PAGE.exists():
    pytest.skip("docs/coming-from.md is not beside the tests", allow_module_level=True)


def examples():
    """(id, line, code): each block that compares, after the blocks of the page and of its section that only prepare."""
    text = PAGE.read_text(encoding="utf-8")
    headings = [(text.count("\n", 0, found.start()) + 1, found[1]) for found in re.finditer(r"^## (.*)$", text, re.M)]
    common, section, prepared = "", "", ""
    for block in python_blocks(text):
        heading = next((name for line, name in reversed(headings) if line < block.line), "")
        if heading != section:
            section, prepared = heading, ""
        if re.search(r"^ours = ", block.code, re.MULTILINE):
            yield pytest.param(common + prepared, block.code, id=f"{section}-{block.line}")
        elif heading:
            prepared += block.code
        else:
            common += block.code


def run(code, namespace, missing):
    """Run what does not need any of the ``missing`` names; what is left out adds its own."""
    for statement in ast.parse(code).body:
        nodes = list(ast.walk(statement))
        needed = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        if not needed & missing:
            try:
                exec(compile(ast.Module([statement], []), str(PAGE), "exec"), namespace)
                continue
            except ImportError:
                if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                    raise
                made = {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        missing |= made


@pytest.mark.parametrize(("prepared", "code"), list(examples()))
def test_theirs_is_ours(prepared, code):
    namespace, missing = {}, set()
    run(prepared + code, namespace, missing)
    assert "ours" in namespace, "the half that needs no other library runs everywhere"
    if "theirs" in missing:
        pytest.skip(f"only gpuconv's half has run; not installed here: {', '.join(sorted(missing - {'theirs'}))}")
    theirs, ours = (np.asarray(namespace[name]) for name in ("theirs", "ours"))
    assert theirs.shape == ours.shape
    if ours.dtype.kind in "iu":
        assert np.array_equal(theirs, ours)
    else:
        assert np.linalg.norm(theirs - ours) <= 3e-6 * np.linalg.norm(ours)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


@pytest.mark.full
@pytest.mark.parametrize(("prepared", "code"), list(examples()))
def test_our_half_needs_no_other_library(prepared, code, monkeypatch):
    for name in ("scipy", "cv2", "torch", "cupy", "tensorflow", "jax", "onnx"):
        monkeypatch.setitem(sys.modules, name, None)
    namespace = {}
    run(prepared + code, namespace, set())
    assert np.isfinite(np.asarray(namespace["ours"])).all()


def test_a_wrong_block_is_noticed():
    with pytest.raises(AssertionError):
        test_theirs_is_ours("import numpy as np\n", "theirs = np.ones(3)\nours = np.array([1, 1, 1.001])\n")
    with pytest.raises(AssertionError):
        test_theirs_is_ours("", "theirs = [[1.0]]\nours = [1.0]\n")


def test_without_the_other_library_our_half_runs():
    code = "theirs = nothing.like(x)\nmore = theirs + 1\nours = 2 * x\nassert more\nassert ours == 6\n"
    namespace, missing = {}, set()
    run("import no_such_library as nothing\nfrom no_such_library import other\nx = 3\n" + code, namespace, missing)
    assert missing == {"nothing", "other", "theirs", "more"} and namespace["ours"] == 6
    with pytest.raises(pytest.skip.Exception, match="nothing"):
        test_theirs_is_ours("import no_such_library as nothing\nx = 3\n", code)


def test_the_table_of_borders():
    """Its letters are those that numpy.pad gives, in the row of that name."""
    rows = re.findall(r"^\| `([^`]*)` \| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 5
    for shown, mode in rows:
        expected = np.pad([1, 2, 3, 4], 3, mode=mode)
        letters = "".join("0abcd"[value] for value in expected)
        assert "".join(re.findall(r"\w", shown)) == letters, mode
