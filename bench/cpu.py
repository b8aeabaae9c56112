"""The CPU's field: gpuconv's plain call, as a caller would write it, and the libraries of ``peers``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import gpuconv
from bench import drive, peers
from bench.check import Arrays, arguments
from gpuconv.problem import Conv2dProblem


def field(names: Sequence[str], threads: int, backend: str | None) -> drive.Enter:
    """Who takes part, for ``drive.run``."""
    absent = {name: peers.PEERS[name].missing() for name in names}

    def enter(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        others: dict[str, list[peers.Contender] | str] = {}
        for name in names:
            peer = peers.PEERS[name]
            why = absent[name] or "; ".join(peer.unsupported(problem))
            others[name] = why or list(peer.contenders(problem, given, threads))
        return drive.Field({"gpuconv": plain_call(problem, given, backend)}, others)

    return enter


def plain_call(problem: Conv2dProblem, given: Arrays, backend: str | None) -> drive.Ours | str:
    """``conv2d`` on NumPy arrays, and the implementation that it chooses."""
    told = gpuconv.explain(str(problem), backend=backend)
    if told.implementation is None:
        return told.note or "nothing can run it"
    options = arguments(problem) | ({"backend": backend} if backend else {})
    call = partial(gpuconv.conv2d, given.x, given.k, given.bias, **options)
    return drive.Ours(told.implementation, peers.Contender("plain call", call, peers.to_nchw(problem)))
