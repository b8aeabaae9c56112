"""What an implementation is: a module with declared facts and a few functions.

``NAME`` is ``library.algorithm``. ``unavailable()`` answers once for the machine, ``unsupported()`` for one problem;
both answer with sentences, so that a refusal says what would help. ``plan()`` decides everything that can be decided
without data, ``run()`` does it. Operands arrive in one form whatever the caller's layout: x as N C H W, the kernel as
O I KH KW already flipped, the result as N O OH OW, all as strided views.
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

    x: Any
    k: Any
    bias: Any | None = None
    k_zero_point: Any | None = None  # one integer per output channel
    ordinal: int | None = None  # the GPU to run on
    stream: int | None = None  # CUDA stream address; None is the current one


class Implementation(Protocol):
    """The interface that every module in ``gpuconv.backends`` offers."""

    @property
    def NAME(self) -> str:
        """``library.algorithm``."""

    @property
    def DEVICE(self) -> str:
        """``"cpu"`` or ``"cuda"``."""

    @property
    def ARRAYS(self) -> str:
        """The arrays that ``run`` takes: ``"numpy"``, ``"cupy"`` or ``"any"``."""

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, with the remedy; None when it can."""

    def unsupported(self, problem: Conv2dProblem, target: Target) -> list[str]:
        """Every reason why ``problem`` cannot be served; empty when it can."""

    def plan(self, problem: Conv2dProblem, target: Target, limit: int) -> Plan:
        """Chunks and configuration within ``limit`` bytes of scratch, or a MemoryError with the bytes needed."""

    def run(self, plan: Plan, operands: Operands, out: Any) -> None:
        """Write the result into ``out``, a view of shape (N, O, OH, OW)."""
