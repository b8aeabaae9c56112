"""Every public name is documented, completely and in the order of its arguments; docs/reference.md says the same.

What is public is read from the package, so that a new name is held to this from its first day.
"""

import ast
import dataclasses
import importlib.util
import inspect
import re
import sys
import textwrap
from pathlib import Path

import pytest

import gpuconv

SCRIPT = Path(__file__).parent.parent / "docs" / "make_reference.py"
if not SCRIPT.exists():
    pytest.skip("docs/make_reference.py is not beside the tests", allow_module_level=True)
_spec = importlib.util.spec_from_file_location("make_reference", SCRIPT)
reference = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)  # dataclasses look there
_spec.loader.exec_module(reference)


def functions():
    """(name, function) of everything public that can be called: functions, methods, classes made by hand."""
    for name, value in classes():
        if not dataclasses.is_dataclass(value) and not issubclass(value, Exception):
            yield name, value
        for attribute, member in reference.members(name, value):
            if not isinstance(member, property):
                yield f"{name}.{attribute}", member
    yield from ((name, value) for name, value in reference.public() if not inspect.isclass(value))


def classes():
    for name, value in reference.public():
        if inspect.isclass(value):
            yield name, value
            if part := reference.part_of(name):
                yield part


each_function = pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in functions()])
each_class = pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in classes()])


def parameters(value):
    """The names of the arguments, ``*`` and ``**`` before them as a docstring has it."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = [stars.get(p.kind, "") + p.name for p in inspect.signature(value).parameters.values()]
    return found[1:] if found[:1] == ["self"] else found


def named(text):
    return [name for entry in reference.entries(text) for name in entry.names]


def refuses(value):
    """Whether the code raises, or asks one of the functions that check an argument."""
    code = value.__init__ if inspect.isclass(value) else value
    # "if True" holds an indented method; dedent would not, where a docstring has a line that begins at the margin.
    for node in ast.walk(ast.parse("if True:\n" + textwrap.indent(inspect.getsource(code), " "))):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Name) and node.id in ("call", "_CALL")):
            return True
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if re.match(r"_?(as|check|require|resolve)_", called):
                return True
    return False


@each_function
def test_every_parameter_is_documented_in_order(name, value):
    documented = named(reference.sections(value.__doc__).get("Parameters", ""))
    assert [entry for entry in documented if entry] == parameters(value)


@each_function
def test_what_is_said_of_a_parameter_says_something(name, value):
    for title, text in reference.sections(value.__doc__).items():
        if title in reference.LISTS:
            for entry in reference.entries(text):
                assert entry.text.endswith((".", ":")), f"{title}: {entry}"


@each_function
def test_results_and_errors_are_documented(name, value):
    sections = reference.sections(value.__doc__)
    if not inspect.isclass(value):
        nothing = inspect.signature(value).return_annotation in (None, "None", "NoReturn")
        assert nothing or sections.get("Returns"), "no Returns"
    assert not refuses(value) or sections.get("Raises"), "no Raises"


@each_class
def test_every_field_and_property_is_documented(name, value):
    sections = reference.sections(value.__doc__)
    assert sections[""].endswith(".")
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    assert named(sections.get("Attributes", "")) == fields or not fields
    for attribute, member in reference.members(name, value):
        assert re.search(r"[.:]$", reference.sections(member.__doc__ or "")[""]), attribute


@each_function
def test_every_function_has_an_example(name, value):
    is_method = "." in name and not name.startswith("grad.")
    assert is_method or ">>>" in reference.sections(value.__doc__).get("Examples", "")


@each_function
def test_docstrings_are_indented_as_they_should_be(name, value):
    """A heading that is not one, a section twice or out of order."""
    titles = re.findall(r"^(\w[\w ]*)\n-{3,}$", inspect.getdoc(value), re.MULTILINE)
    assert titles == [title for title in reference.SECTIONS if title in titles]


def test_something_is_public():
    names = {name for name, _ in reference.public()}
    assert {"conv2d", "Conv2d", "grad.conv2d_input", "Trace", "NoBackendError"} <= names
    assert {name.partition(".")[0] for name in names} | {"__version__"} == set(gpuconv.__all__)
    assert {"Conv2d.__call__", "Trace.step", "Info.to_dict", "Conv2dProblem.of"} <= {name for name, _ in functions()}


def test_the_internal_methods_exist():
    for name in reference.INTERNAL:
        owner, method = name.split(".")
        assert getattr(getattr(gpuconv, owner), method).__doc__


def test_the_reference_is_up_to_date():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python docs/make_reference.py"


def test_every_link_of_the_reference_has_a_target():
    text = reference.page()
    targets = set(re.findall(r'<a id="([^"]+)">', text))
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links <= targets and {reference.anchor(name) for name, _ in reference.public()} <= targets


# The checks have teeth


def sloppy(x, stride=1, *, padding=0):
    """Do something.

    Parameters
    ----------
    x : array
        An image.
    padding : int
    stride : int
        Step.
    """
    if stride < 1:
        raise ValueError
    return x


def test_a_sloppy_docstring_is_refused():
    for check in (
        test_every_parameter_is_documented_in_order,
        test_what_is_said_of_a_parameter_says_something,
        test_results_and_errors_are_documented,
        test_every_function_has_an_example,
    ):
        with pytest.raises(AssertionError):
            check("sloppy", sloppy)


def test_a_new_name_is_seen(monkeypatch):
    monkeypatch.setattr(gpuconv, "sloppy", sloppy, raising=False)
    monkeypatch.setattr(gpuconv, "__all__", [*gpuconv.__all__, "sloppy"])
    assert ("sloppy", sloppy) in list(functions())
    assert "## More" in reference.page() and "### `sloppy`" in reference.page()


def test_sections_and_entries():
    sections = reference.sections(inspect.getdoc(sloppy))
    assert list(sections) == ["", "Parameters"] and sections[""] == "Do something."
    entries = reference.entries(
        "a, b : int, default 1\n    Two\n    lines.\n(int, int)\n    A pair.\n**options\n    More."
    )
    assert [(entry.names, entry.kind) for entry in entries] == [
        (["a", "b"], "int, default 1"),
        (["(int, int)"], ""),
        (["**options"], ""),
    ]
    assert entries[0].text == "Two\nlines."
