"""The blocks of code in a Markdown file, and how they are run."""

import doctest
import re
from dataclasses import dataclass

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


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
