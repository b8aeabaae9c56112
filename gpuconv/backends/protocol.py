"""What an implementation is: a module with declared facts and a few functions.

``NAME`` is ``library.algorithm``. ``unavailable()`` answers once for the machine, ``unsupported()`` for one problem;
both answer with sentences, so that a refusal says what would help. ``plan()`` decides everything that can be decided
without data, ``run()`` does it, and ``pack()`` what it does with a kernel alone, for who keeps one.

A module may also declare ``EXPERIMENTAL = True``: no hardware has run it yet, and it runs only when asked for by name.

Operands and result arrive as strided views in one form, whatever the caller's layout, with the groups as an axis:

    x and its gradient (N, G, C/G, H, W)    kernel and its gradient (G, O/G, I, KH, KW), flipped where asked
    y and its gradient (N, G, O/G, OH, OW)  unfolded windows (N, G = C, KH·KW, OH, OW)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from gpuconv.problem import Conv2dProblem


@dataclass(frozen=True)
class Target:
    """Where a problem is to run: plain data, so that ``explain`` can speak of a machine that is not here."""

    device: str  # "cpu" or "cuda"
    ordinal: int | None = None
    threads: int = 1  # of the CPU
    vector_bits: int | None = None  # of the CPU's vector registers; None: what this machine has
    swapped: bool = False  # whether an operand is in another byte order than the machine's
    # What the values of k tell, where they were read: whether it is an outer product of a column and a row, and, of
    # integers, the binary digits of the largest magnitude; and those of k, x and bias: d, where no sum is above 2^d.
    separable: bool = False
    k_digits: int | None = None
    sum_digits: int | None = None
    gpu: Any = None  # numba_cuda's facts of a GPU that is not here; None: of the one at ordinal

    def __str__(self) -> str:
        return self.device if self.ordinal is None else f"{self.device}:{self.ordinal}"


@dataclass(frozen=True)
class Plan:
    """What ``run`` will do: chunks, configuration and the scratch it takes, in bytes."""

    problem: Conv2dProblem
    workspace: int
    sums_in: str  # the dtype of the accumulators
    detail: str = ""  # the algorithm's choices in a few words, for explain
    config: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Operands:
    """The arrays of one call, as strided views in the implementation's library."""

    x: Any  # the first operand of the problem's op
    k: Any = None  # the second
    bias: Any | None = None  # (channels of the result,)
    k_zero_point: Any | None = None  # one integer per output channel
    packed: Any | None = None  # what pack() made of k
    ordinal: int | None = None  # the GPU to run on
    stream: int | None = None  # CUDA stream address; None is the current one
    again: bool = False  # whether more calls with ``packed`` are to come, for which launches may be kept beside it


class Implementation(Protocol):
    """The interface that every module in ``gpuconv.backends`` offers."""

    @property
    def NAME(self) -> str:
        """``library.algorithm``."""

    @property
    def DEVICE(self) -> str:
        """``"cpu"`` or ``"cuda"``."""

    @property
    def OPS(self) -> frozenset[str]:
        """The ops of ``problem.OPS`` that it serves."""

    @property
    def ARRAYS(self) -> str:
        """The arrays that ``run`` takes: ``"numpy"``, ``"cupy"`` or ``"any"``."""

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, with the remedy; None when it can."""

    def unsupported(self, problem: Conv2dProblem, target: Target) -> list[str]:
        """Every reason why ``problem`` cannot be served; empty when it can."""

    def plan(self, problem: Conv2dProblem, target: Target, limit: int) -> Plan:
        """Chunks and configuration within ``limit`` bytes of scratch, or a MemoryError with the bytes needed."""

    def pack(self, plan: Plan, operands: Operands) -> Any:
        """The kernel of a forward convolution as ``run`` wants it, for any plan of equal ``pack_key``."""

    def pack_key(self, plan: Plan) -> Any:
        """What ``pack`` depends on besides the kernel."""

    def run(self, plan: Plan, operands: Operands, out: Any) -> None:
        """Write the result into ``out``."""
