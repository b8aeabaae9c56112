"""The CPU's field: gpuconv in the two ways a caller would write it, and the libraries of ``peers``.

``plain call`` is ``conv2d(x, k)``, which gets its weights as they are on each call; ``prepared`` is a ``Conv2d``, made
and called once beforehand, which keeps what it made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpuconv
from bench import drive, peers
from bench.check import Arrays, arguments
from gpuconv.problem import Conv2dProblem

PLAIN, PREPARED = "plain call", "prepared"


def field(names: Sequence[str], threads: int, backend: str | None) -> drive.Enter:
    """Who takes part, for ``drive.run``."""
    absent = {name: peers.PEERS[name].missing() for name in names}

    def enter(problem: Conv2dProblem, given: Arrays) -> drive.Field:
        others: dict[str, list[peers.Contender] | str] = {}
        for name in names:
            peer = peers.PEERS[name]
            why = absent[name] or "; ".join(peer.unsupported(problem))
            others[name] = why or list(peer.contenders(problem, given, threads))
        ways = {PLAIN: plain_call, PREPARED: prepared}
        return drive.Field({label: way(problem, given, backend) for label, way in ways.items()}, others)

    return enter


def plain_call(problem: Conv2dProblem, given: Arrays, backend: str | None) -> drive.Ours | str:
    """``conv2d`` on NumPy arrays, and the implementation that it chooses."""
    options = arguments(problem) | ({"backend": backend} if backend else {})
    call = partial(gpuconv.conv2d, given.x, given.k, given.bias, **options)
    return _chosen(problem, backend, PLAIN, call)


def prepared(problem: Conv2dProblem, given: Arrays, backend: str | None) -> drive.Ours | str:
    """A ``Conv2d`` on NumPy arrays; its first call, the one that is checked, makes what the timed calls reuse."""
    options = arguments(problem) | ({"backend": backend} if backend else {})
    layer = gpuconv.Conv2d(given.k, given.bias, **options)
    return _chosen(problem, backend, PREPARED, partial(layer, given.x))


def _chosen(problem: Conv2dProblem, backend: str | None, label: str, call: Callable[[], Any]) -> drive.Ours | str:
    told = gpuconv.explain(str(problem), backend=backend)
    if told.implementation is None:
        return told.note or "nothing can run it"
    return drive.Ours(told.implementation, peers.Contender(label, call, peers.to_nchw(problem)))
