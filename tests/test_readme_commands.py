"""The commands in the README's section on the command line, as printed, in an empty folder with a photograph."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from cli_tools import run_program

from gpuconv import pictures

README = Path(__file__).parent.parent / "README.md"
if not README.exists():
    pytest.skip("there is no README.md beside the tests", allow_module_level=True)


def commands():
    """The lines of the section's blocks, without their comments."""
    section = README.read_text(encoding="utf-8").partition("\n## The command line\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\w*\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [words for block in blocks for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def slow(words):
    return words[1:2] == ["warmup"]  # it compiles everything there is


@pytest.mark.parametrize(
    "words", [pytest.param(w, id=" ".join(w), marks=[pytest.mark.full] if slow(w) else []) for w in commands()]
)
def test_it_runs_as_printed(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures.photograph().save("photo.jpg")
    assert words[0] == "gpuconv"
    done = run_program(*words[1:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for option, value in itertools.pairwise(words):
        assert option != "-o" or Path(value).stat().st_size > 0


def test_the_section_has_commands():
    assert {words[1] for words in commands()} >= {"filter", "explain", "info", "warmup"}
