"""Write docs/reference.md, everything public with its docstring, as Markdown.

    python docs/make_reference.py           # writes the page
    python docs/make_reference.py --check   # exit code 1 where the page is not what the docstrings say

A script, and no documentation tool: what is wanted is one page that a code host shows and a reviewer reads in the same
diff as the code. pdoc writes HTML; Sphinx with numpydoc and a Markdown builder is three packages and a configuration.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpuconv

PAGE = Path(__file__).with_name("reference.md")

# The order of the page. A public name that is in no group comes last, so that none can be forgotten.
GROUPS = {
    "Convolutions": ("conv2d", "conv1d", "conv_transpose2d", "Conv2d", "conv2d_tiled"),
    "Gradients": ("grad.conv2d_input", "grad.conv2d_weight", "grad.conv2d_bias"),
    "Windows": ("unfold", "fold"),
    "What would run, and what can": (
        "explain",
        "Explanation",
        "info",
        "Info",
        "autotune",
        "Tuning",
        "clear",
        "Conv2dProblem",
    ),
    "Sizes": ("output_size", "receptive_field", "parameter_count"),
    "One convolution by hand": ("trace", "Trace"),
    "Errors and warnings": ("NoBackendError", "DeviceFallbackWarning"),
}
# What the answers above are made of; found through them, not in the package.
PARTS = {
    "Trace": "gpuconv.tracing.Step",
    "Explanation": "gpuconv.explanation.Verdict",
    "Tuning": "gpuconv.tuning.Measured",
}
# A method that only gpuconv itself calls, on what it was given as somebody who keeps things.
INTERNAL = {"Conv2d.kept", "Conv2d.on_window"}
# What an object of the class is called in the examples; its own name in lower case otherwise.
INSTANCES = {"Conv2d": "layer", "Conv2dProblem": "problem"}
SPECIAL = ("__call__",)  # the methods of two underscores that are documented

HEAD = """\
# Reference

Everything public in gpuconv, from its docstrings. Written by `python docs/make_reference.py`; do not edit.

Shapes are written in one alphabet: N images of C channels, H rows and W columns; kernels of O output channels and I
input channels per group, KH rows and KW columns; results of OH rows and OW columns. In formulas s is the stride, d the
dilation, i and j the position of an output, p and q that of a tap. Lengths are in pixels, memory in bytes, times in
seconds. "Convolution" is cross-correlation; `flip=True` gives the other.
"""


# ---- what is public


def public() -> Iterator[tuple[str, Any]]:
    """(name, object) for every public name, those of ``grad`` with its name before them."""
    for name in gpuconv.__all__:
        value = getattr(gpuconv, name)
        if inspect.ismodule(value):
            yield from ((f"{name}.{inner}", getattr(value, inner)) for inner in value.__all__)
        elif not name.startswith("__"):
            yield name, value


def members(name: str, value: type) -> Iterator[tuple[str, Any]]:
    """(name, function or property) for what a class defines and shows, in the order of the source."""
    for attribute, found in vars(value).items():
        if attribute.startswith("_") and attribute not in SPECIAL:
            continue
        if f"{name}.{attribute}" in INTERNAL:
            continue
        if isinstance(found, (classmethod, staticmethod)):
            yield attribute, getattr(value, attribute)
        elif isinstance(found, property) or inspect.isfunction(found):
            yield attribute, found


def part_of(name: str) -> tuple[str, Any] | None:
    """The class that the answer ``name`` is made of."""
    if name not in PARTS:
        return None
    module, _, inner = PARTS[name].rpartition(".")
    return inner, getattr(importlib.import_module(module), inner)


def grouped() -> dict[str, list[tuple[str, Any]]]:
    """Heading -> its names and objects."""
    left = dict(public())
    groups = {title: [(name, left.pop(name)) for name in names] for title, names in GROUPS.items()}
    return groups | ({"More": sorted(left.items())} if left else {})


# ---- docstrings in NumPy's style


@dataclasses.dataclass
class Entry:
    """One entry of a section: some names of one type, and what is said of them."""

    names: list[str]
    kind: str
    text: str


SECTIONS = (
    "Parameters", "Attributes", "Returns", "Yields", "Raises", "Warns", "Notes", "References", "See Also", "Examples",
)  # fmt: skip
LISTS = SECTIONS[:6]


def sections(docstring: str) -> dict[str, str]:
    """Heading -> text; what comes before the first heading is under the empty one."""
    titles = "|".join(SECTIONS)
    parts = re.split(rf"^({titles})\n-+$\n", inspect.cleandoc(docstring), flags=re.MULTILINE)
    return {"": parts[0].strip()} | {
        title: text.strip("\n") for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def entries(text: str) -> list[Entry]:
    """The entries of a section that is a list."""
    found: list[Entry] = []
    for block in re.split(r"\n(?=\S)", text):
        head, _, body = block.partition("\n")
        names, _, kind = head.partition(" : ")
        several = [names] if "(" in names else names.split(",")
        found.append(Entry([name.strip() for name in several], kind.strip(), textwrap.dedent(body).strip()))
    return found


# ---- Markdown


def markdown(text: str) -> str:
    """The text of a docstring: examples and tables as blocks of code, links to what is on the page."""
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        dedented = textwrap.dedent(block)
        if dedented.startswith(">>>"):
            if blocks and blocks[-1].startswith("```python\n"):  # examples go on after what a blank line parts
                blocks[-1] = f"{blocks[-1][:-4]}\n\n{dedented}\n```"
            else:
                blocks.append(f"```python\n{dedented}\n```")
        elif blocks and "<BLANKLINE>" in blocks[-1] and dedented.startswith("|"):
            blocks[-1] = f"{blocks[-1][:-4]}\n{dedented}\n```"
        elif dedented.startswith("==="):
            plain = re.sub(r"``(\w+)``", r"\1    ", dedented)  # as wide as it was
            blocks.append(f"```\n{plain}\n```")
        elif block.startswith("    "):
            blocks.append(f"```\n{dedented}\n```")
        else:
            blocks.append(linked(" ".join(block.split())))
    return "\n\n".join(blocks)


def linked(text: str) -> str:
    """``name`` as Markdown writes it, and as a link where the name is on the page."""
    names = dict(public())

    def code(found: re.Match[str]) -> str:
        written = found[1]
        name = next((known for known in (written, f"grad.{written}", written[8:]) if known in names), None)
        return f"[`{written}`](#{anchor(name)})" if name else f"`{written}`"

    return re.sub(r"(?::\w+:)?``?([^`]+)``?", code, text)


def anchor(name: str) -> str:
    """The target of a link to ``name``; a class and a function may differ in one capital alone."""
    return ("class-" if name[0].isupper() else "") + name.replace(".", "-").lower()


def signature(name: str, value: Callable[..., Any], skip_first: bool = False) -> str:
    """The call, without annotations, as a block of code; long ones wrapped under the bracket."""
    parameters = list(inspect.signature(value).parameters.values())[skip_first:]
    words = []
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        words.append(str(parameter.replace(annotation=parameter.empty)).replace("'", '"'))
    lines = textwrap.wrap(", ".join(word.replace(" ", "\0") for word in words) + ")", 100 - len(name))
    indent = "\n" + " " * (len(name) + 1)
    return f"```python\n{name}({indent.join(lines)}\n```".replace("\0", " ")


def rendered(docstring: str) -> str:
    """The body of one object: its text and its sections."""
    out = []
    for title, text in sections(docstring).items():
        if title:
            out.append(f"**{title}**")
        if title in LISTS:
            out.append("\n".join(_item(entry) for entry in entries(text)))
        elif text:
            out.append(markdown(text))
    return "\n\n".join(out)


def _item(entry: Entry) -> str:
    names = ", ".join(linked(f"`{name}`") for name in entry.names)
    kind = f" : {linked(f'`{entry.kind}`')}" if entry.kind else ""
    return f"- {names}{kind}" + (f" — {linked(' '.join(entry.text.split()))}" if entry.text else "")


def described(name: str, value: Any) -> Iterator[str]:
    """The blocks of one public object."""
    yield f'<a id="{anchor(name)}"></a>\n\n### `{name}`'
    made_by_hand = inspect.isclass(value) and not dataclasses.is_dataclass(value) and not issubclass(value, Exception)
    if made_by_hand or not inspect.isclass(value):
        yield signature(name, value)
    yield rendered(value.__doc__)
    if not inspect.isclass(value):
        return
    properties = [(attribute, member) for attribute, member in members(name, value) if isinstance(member, property)]
    if properties:
        told = (f"- `{attribute}` — {linked(' '.join(member.__doc__.split()))}" for attribute, member in properties)
        yield "**Properties**\n\n" + "\n".join(told)
    for attribute, member in members(name, value):
        if isinstance(member, property):
            continue
        bound = inspect.ismethod(member)
        owner = name if bound else INSTANCES.get(name, name.lower())
        shown = owner if attribute == "__call__" else f"{owner}.{attribute}"
        yield f"#### `{name}.{attribute}`\n\n{signature(shown, member, not bound)}\n\n{rendered(member.__doc__)}"


def page() -> str:
    """The whole page."""
    groups = grouped()
    contents = [
        f"- {title}: " + ", ".join(f"[`{name}`](#{anchor(name)})" for name, _ in rows) for title, rows in groups.items()
    ]
    blocks = [HEAD.strip(), "\n".join(contents)]
    for title, rows in groups.items():
        blocks.append(f"## {title}")
        for name, value in rows:
            blocks += described(name, value)
            if part := part_of(name):
                blocks += described(*part)
    return "\n\n".join(blocks) + "\n"


def main() -> int:
    """Write the page, or check it."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        sys.stderr.write("" if current else f"{PAGE.name} is out of date: run python docs/make_reference.py\n")
        return 0 if current else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
