"""What ``explain`` returns, as a value, as text, as JSON and in a notebook."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gpuconv import dispatch, dtypes
from gpuconv.backends.protocol import Plan, Target
from gpuconv.problem import Conv2dProblem

_PROMISES = {
    "highest": "every element within the a-priori bound of a direct sum",
    "high": "relative L2 error at most 2e-5 (float32)",
    "medium": "relative L2 error at most 1e-3 (float32)",
}


_READY = "compiled"
_NOT_READY = "to be compiled by the first call, which takes some seconds; `gpuconv warmup` does it ahead"


@dataclass(frozen=True)
class Verdict:
    """One row of the table of implementations.

    Attributes
    ----------
    name : str
        The implementation, as ``"library.algorithm"``.
    device : str
        ``"cpu"`` or ``"cuda"``.
    chosen : bool
        Whether it is the one that would run.
    reasons : tuple of str
        Why it does not run, or of the chosen one, why it does.
    """

    name: str
    device: str
    chosen: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """The answer of ``explain``; printing it gives the report, ``to_dict`` the same for a program.

    Attributes
    ----------
    problem : Conv2dProblem
        The problem with names resolved; ``str(problem)`` is its line.
    target : Target
        Where it would run: ``target.device`` is ``"cpu"`` or ``"cuda"``, ``target.ordinal`` the number of the GPU.
    implementation : str or None
        What would run, as ``"library.algorithm"``; None when nothing can run the problem as asked.
    plan : Plan or None
        Its chunks and scratch: ``plan.detail`` says in words how it would go about it.
    table : tuple of Verdict
        Every implementation, best first: its ``name``, its ``device``, whether it is ``chosen``, and the ``reasons``
        why it does not run (of the chosen one, why it does).
    note : str or None
        A fallback to the CPU, why nothing can run, how host arrays reach the GPU, or what a dask array's blocks are.
    """

    problem: Conv2dProblem
    target: Target
    implementation: str | None
    plan: Plan | None
    table: tuple[Verdict, ...]
    note: str | None = None

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, O, OH, OW), whatever the layout; of a gradient, the shape of x or k."""
        return self.problem.result_shape

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)), names resolved."""
        return self.problem.padding

    @property
    def flops(self) -> int:
        """Operations of the direct algorithm."""
        return self.problem.flops

    @property
    def bytes(self) -> int:
        """Bytes of operands and result, each once."""
        return self.problem.bytes

    @property
    def workspace(self) -> int | None:
        """Bytes of scratch, at most; None when nothing can run."""
        return None if self.plan is None else self.plan.workspace

    @property
    def accumulation(self) -> str | None:
        """The dtype that products are summed in; None when nothing can run."""
        return None if self.plan is None else self.plan.sums_in

    def to_dict(self) -> dict[str, Any]:
        """The report for a program: what ``gpuconv explain --json`` prints.

        Returns
        -------
        dict
            Of strings, numbers, booleans, None, lists and dicts: ``json.dumps`` takes it as it is. Its keys are listed
            in ``docs/command-line.md``; later versions may add keys, and keep these.

        Examples
        --------
        >>> import gpuconv
        >>> gpuconv.explain((8, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3).to_dict()["output_shape"]
        [8, 64, 112, 112]
        """
        p = self.problem
        return {
            "problem": str(p),
            "op": p.op,
            "implementation": self.implementation,
            "device": str(self.target),
            "output_shape": list(p.result_shape),
            "output_dtype": p.y_dtype,
            "layout": p.kernel_layout if p.op == "weight_grad" else p.layout,
            "padding": [list(pads) for pads in p.padding],
            "padding_mode": p.padding_mode,
            "padding_value": _as_json(p.fill),
            "flops": p.flops,
            "products": p.products,
            "bytes": p.bytes,
            "workspace": self.workspace,
            "accumulation": self.accumulation,
            "how": None if self.plan is None else self.plan.detail,
            "compiled": None
            if self.plan is None or self.implementation is None
            else _compiled(self.implementation, self.plan),
            "precision": p.precision,
            "promise": _PROMISES[p.precision],
            "implementations": [
                {"name": row.name, "device": row.device, "chosen": row.chosen, "reasons": list(row.reasons)}
                for row in self.table
            ],
            "note": self.note,
        }

    def _fields(self) -> list[tuple[str, str]]:
        p = self.problem
        pads = f"rows {p.padding[0]}, columns {p.padding[1]}, {p.padding_mode}"
        fill = p.x_zero_point or p.padding_value
        pads += f" {fill}" if p.padding_mode == "constant" and p.padding != ((0, 0), (0, 0)) else ""
        rows = [
            ("problem", str(p)),
            ("runs", f"{self.implementation} on {self.target}" if self.implementation else "nothing"),
            ("output", _sizes(p)),
            ("padding", pads),
            ("work", f"{_scaled(p.flops, 'FLOP', 1000)}, {p.products} products per output"),
            ("traffic", f"{_scaled(p.bytes, 'B', 1024)} in and out, {p.flops / max(p.bytes, 1):.1f} FLOP/B"),
        ]
        if self.plan is not None:
            rows += [
                ("workspace", f"at most {_scaled(self.plan.workspace, 'B', 1024)}"),
                ("sums in", self.plan.sums_in + (", exactly" if dtypes.is_integer(p.y_dtype) else "")),
                ("how", self.plan.detail),
            ]
            if self.implementation is not None and (ready := _compiled(self.implementation, self.plan)) is not None:
                rows.append(("kernel", _READY if ready else _NOT_READY))
        rows.append(("precision", f"{p.precision}: {_PROMISES[p.precision]}"))
        return rows

    def __str__(self) -> str:
        lines = [f"{name:<10} {value}" for name, value in self._fields()]
        lines += ["", "implementations, best first"]
        width = max((len(verdict.name) for verdict in self.table), default=0)
        for verdict in self.table:
            mark = "→" if verdict.chosen else " "
            for reason in verdict.reasons:
                lines.append(f"{mark} {verdict.name:<{width}}  {verdict.device:<4}  {reason}")
        if self.note:
            lines += ["", self.note]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from gpuconv import notebook

        rows = [(verdict.name, verdict.device, "\n".join(verdict.reasons)) for verdict in self.table]
        chosen = next((at for at, verdict in enumerate(self.table) if verdict.chosen), None)
        parts = [
            notebook.fields(self._fields()),
            notebook.table(("implementations, best first", "device", "why"), rows, strong=chosen),
        ]
        return notebook.block(*parts, *([notebook.paragraph(self.note)] if self.note else []))


def _as_json(value: complex) -> int | float | str:
    """A number as JSON has it; text for NaN, infinities and complex numbers, which it has not."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def _compiled(name: str, plan: Plan) -> bool | None:
    """Whether the kernels are compiled already; None where there are none to compile."""
    implementation: Any = dispatch.implementation(name)
    if not hasattr(implementation, "kernel_name"):
        return None
    from gpuconv.backends.numba_cpu import runtime

    parts = [part for _, part in plan.config["parts"]] if "parts" in plan.config else [plan]
    return all(runtime.is_ready(implementation.kernel_name(part)) for part in parts)


def _sizes(p: Conv2dProblem) -> str:
    """The result's axes with their extents, dtype and layout."""
    names = {
        "forward": "N O OH OW", "input_grad": "N C H W", "weight_grad": "O I KH KW", "unfold": "N C·KH·KW OH OW",
        "fold": "N C H W",
    }[p.op]  # fmt: skip
    axes = " × ".join(f"{name} {extent}" for name, extent in zip(names.split(), p.result_shape, strict=True))
    return f"{axes}, {p.y_dtype}, {p.kernel_layout if p.op == 'weight_grad' else p.layout}"


def _scaled(value: int, unit: str, base: int) -> str:
    """``value`` with a prefix: 1.2 GFLOP, 3.4 MiB."""
    infix = "i" if base == 1024 else ""
    number, prefix = float(value), ""
    for prefix_next in "kMGTPE" if base == 1000 else "KMGTPE":
        if number < base:
            break
        number, prefix = number / base, prefix_next + infix
    return f"{value} {unit}" if not prefix else f"{number:.4g} {prefix}{unit}"
