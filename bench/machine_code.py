"""CUDA kernels as machine code, with no GPU: what the assembler says that they take, and which instructions they are.

NVIDIA's assembler comes as a wheel (``nvidia-cuda-nvcc``, of the toolkit that numba-cuda uses). Its disassembler need
not be there: the instructions counted here are told by their operation codes, which were read beside ``nvdisasm`` 13.5.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

# From sm_70 on an instruction is 16 bytes; the low 12 bits of the first 8 tell the operation and its operands' kinds.
# On sm_75 an address in global memory that differs from thread to thread has codes of its own.
_OPERATIONS = {
    0x223: "FFMA", 0x22B: "DFMA", 0x23C: "HMMA",
    0x381: "LDG", 0x981: "LDG", 0xFAE: "LDGSTS", 0x984: "LDS", 0x83B: "LDSM", 0x983: "LDL",
    0x386: "STG", 0x986: "STG", 0x388: "STS", 0x988: "STS", 0x387: "STL", 0xB1D: "BAR",
}  # fmt: skip
# Of loads and stores, bits 9 to 11 of the other 8 bytes are how much one thread moves.
_WIDTHS = {4: "", 5: ".64", 6: ".128"}
_SIZED = ("LDG", "LDS", "STG", "STS", "LDL", "STL")


@dataclass(frozen=True)
class Figures:
    """What one kernel takes on one architecture."""

    registers: int
    stack: int
    spills: int  # bytes stored and loaded
    shared: int
    instructions: Counter[str] = field(hash=False)

    @property
    def clean(self) -> bool:
        """No stack frame and no spill."""
        return self.stack == self.spills == 0


@lru_cache(maxsize=1)
def ptxas() -> str | None:
    """The assembler from NVIDIA's wheel, whose folder is named by the toolkit's major version."""
    try:
        import nvidia
    except ModuleNotFoundError:
        return None
    found = [path for root in nvidia.__path__ for path in Path(root).glob("*/bin/ptxas")]
    return str(found[0]) if found else None


def lowered(body: Any, arguments: tuple[Any, ...]) -> Any:
    """A kernel's Python function in NVVM's language, which is the same for every architecture and takes the longest."""
    from numba.cuda import compiler, types

    return compiler._compile_pyfunc_with_fixup(body, types.void(*arguments), device=False, abi="numba", cc=(8, 0))[0]


def assembled(library: Any, cc: tuple[int, int], registers: int | None = None) -> Figures:
    """What the assembler makes of a lowered kernel, a thread of which may use so many registers."""
    (ptx,) = library.get_asm_strs(cc=cc)
    limit = [] if registers is None else [f"-maxrregcount={registers}"]
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx if isinstance(ptx, str) else ptx.decode())
        command = [str(ptxas()), "-v", *limit, f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(cubin)]
        report = subprocess.run(command, capture_output=True, text=True, check=False)
        if report.returncode:
            raise RuntimeError(report.stderr)
        return figures(report.stderr, cubin.read_bytes())


def figures(report: str, cubin: bytes) -> Figures:
    """The assembler's report on one kernel, and the kernel's instructions."""

    def number(pattern: str) -> int:
        found = re.findall(pattern, report)
        if len(found) != 1:
            raise RuntimeError(f"the assembler's report has {len(found)} times {pattern!r}: {report}")
        return int(found[0])

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    shared = re.search(r"(\d+) bytes smem", report)
    return Figures(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        spills,
        int(shared[1]) if shared else 0,
        instructions(cubin),
    )


def instructions(cubin: bytes) -> Counter[str]:
    """How often each instruction of ``_OPERATIONS`` stands in the code of a 64-bit ELF file."""
    found: Counter[str] = Counter()
    for name, start, size in _sections(cubin):
        if not name.startswith(".text."):
            continue
        for at in range(start, start + size, 16):
            low, high = struct.unpack_from("<QQ", cubin, at)
            operation = _OPERATIONS.get(low & 0xFFF)
            if operation is not None:
                found[operation + (_WIDTHS.get(high >> 9 & 7, "") if operation in _SIZED else "")] += 1
    return found


def _sections(elf: bytes) -> list[tuple[str, int, int]]:
    """Name, offset and size of every section."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * entry) for index in range(count)]
    text = headers[names][4]

    def name(at: int) -> str:
        return elf[text + at : elf.index(b"\0", text + at)].decode()

    return [(name(header[0]), header[4], header[5]) for header in headers]
