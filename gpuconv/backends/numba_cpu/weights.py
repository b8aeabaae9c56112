"""Weights in the order in which the dense micro-kernel reads them: panels of MR output channels, product by product.

    packed[g][block][panel][k][i] = weights[g, panel·MR + i, c, p, q]        k = (c - block·kc)·KH·KW + p·KW + q

A block is ``kc`` input channels. Channels beyond the last are zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpuconv.backends.numba_cpu import runtime
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, get, routine, scalar

# The table of arguments of the kernel that packs.
K, PACKED = range(2)
G, O, C, KH, KW, KC, SG, SO, SC, SP, SQ = range(runtime.ARRAYS, runtime.ARRAYS + 11)


def size(groups: int, outputs: int, products: int, rows: int) -> int:
    """Elements of the packed weights."""
    return groups * -(-outputs // rows) * rows * products


@functools.lru_cache(maxsize=64)
def panel(lanes: Lanes, rows: int) -> Any:
    """A function of (to, source, ld, count, present): to[k·rows + i] = source[i·ld + k], zero from i = present on."""
    if rows & (rows - 1) or lanes.count < 2:
        return None  # the shuffles below want a power of two
    return routine(f"panel_{lanes}_{rows}", lanes, "eeiii", functools.partial(_panel, rows=rows))


def _panel(e: Emitter, to: Value, source: Value, ld: Value, count: Value, present: Value, rows: int) -> None:
    builder, n = e.builder, e.lanes.count
    low = [lane // 2 + n * (lane % 2) for lane in range(n)]
    high = [n // 2 + lane // 2 + n * (lane % 2) for lane in range(n)]

    def interleaved(columns: list[list[Value]]) -> list[Value]:
        """rows sequences of vectors, merged element by element: first each with its partner half the rows away."""
        while len(columns) > 1:
            half = len(columns) // 2
            merged = []
            for a, b in zip(columns[:half], columns[half:], strict=True):
                both = []
                for u, v in zip(a, b, strict=True):
                    both += [e.shuffle(u, v, low), e.shuffle(u, v, high)]
                merged.append(both)
            columns = merged
        return columns[0]

    def body(k: Value, masked: bool) -> None:
        left = builder.sub(count, k)
        given = []
        for i in range(rows):
            lanes_left = left if masked else I64(n)
            there = builder.select(builder.icmp_signed("<", I64(i), present), lanes_left, I64(0))
            given.append([e.masked_load(e.at(source, e.times(ld, i), k), e.mask(there))])
        for part, value in enumerate(interleaved(given)):
            place = e.at(to, e.times(k, rows), part * n)
            if masked:
                e.masked_store(value, place, e.mask(builder.sub(builder.mul(left, I64(rows)), I64(part * n))))
            else:
                e.store(value, place)

    k = e.loop(0, count, n, lambda k: body(k, False))
    with builder.if_then(builder.icmp_signed("<", k, count)):
        body(k, True)


def packer(lanes: Lanes, rows: int) -> int:
    """The kernel that packs: panels are shared out over the threads."""
    return runtime.kernel(f"weights_{lanes}_{rows}", lambda: _packer(lanes, rows))


@functools.lru_cache(maxsize=64)
def block(lanes: Lanes, rows: int) -> Any:
    """A function for compiled code: block(to, source, present, channels, KH, KW, so, sc, sp, sq) packs one panel of one
    block from ``source``; steps in bytes, the first ``present`` of the panel's outputs exist.
    """
    wide = lanes.size
    load, store = scalar(lanes.dtype)
    shuffled = panel(lanes, rows)
    has_shuffles = shuffled is not None
    shuffled = shuffled or routine(f"no_panel_{lanes}", lanes, "eeiii", lambda *arguments: None)

    @compiled
    def pack_block(to, source, present, channels, KH, KW, so, sc, sp, sq):
        contiguous = (sq == wide or KW == 1) and (sp == KW * wide or KH == 1) and sc == KH * KW * wide
        if has_shuffles and contiguous and so % wide == 0:
            shuffled((to, source, so // wide, channels * KH * KW, present))
            return
        for c in range(channels):
            for p in range(KH):
                for q in range(KW):
                    at = source + c * sc + p * sp + q * sq
                    for i in range(present):
                        store(to + i * wide, load(at + i * so))
                    for i in range(present, rows):
                        store(to + i * wide, 0.0)
                    to += rows * wide

    return pack_block


def _packer(lanes: Lanes, rows: int) -> Callable[..., None]:
    wide = lanes.size
    pack_block = block(lanes, rows)

    def pack(arguments, thread, threads):
        O_, C_, KH_, KW_, kc = (
            get(arguments, O), get(arguments, C), get(arguments, KH), get(arguments, KW), get(arguments, KC),
        )  # fmt: skip
        so, sc, sp, sq = get(arguments, SO), get(arguments, SC), get(arguments, SP), get(arguments, SQ)
        taps = KH_ * KW_
        panels = (O_ + rows - 1) // rows
        tasks = get(arguments, G) * panels
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            g, o = task // panels, task % panels
            start = get(arguments, PACKED) + g * panels * rows * C_ * taps * wide
            source = get(arguments, K) + g * get(arguments, SG) + o * rows * so
            c0 = 0
            while c0 < C_:
                channels = min(kc, C_ - c0)
                to = start + (c0 * panels + o * channels) * rows * taps * wide
                pack_block(to, source + c0 * sc, min(rows, O_ - o * rows), channels, KH_, KW_, so, sc, sp, sq)
                c0 += kc

    return pack


class Packing:
    """The packing of weights of one shape and strides."""

    def __init__(self, k: Any, lanes: Lanes, rows: int, kc: int, threads: int) -> None:
        """For views like ``k`` (G, O, C, KH, KW), of any strides."""
        G_, O_, C_, KH_, KW_ = k.shape
        self.lanes, self.count = lanes, size(G_, O_, C_ * KH_ * KW_, rows)
        self.converted = k.dtype != lanes.dtype or not k.dtype.isnative
        strides = np.empty_like(k, lanes.dtype).strides if self.converted else k.strides
        # Starting threads costs more than packing little.
        threads = threads if self.count >= 1 << 16 else 1
        self.task = runtime.Task(packer(lanes, rows), [G_, O_, C_, KH_, KW_, kc, *strides], threads)

    def __call__(self, k: Any) -> np.ndarray[Any, Any]:
        """The packed form of ``k``."""
        if self.converted:
            with np.errstate(all="ignore"):
                k = k.astype(self.lanes.dtype)
        packed = runtime.aligned(self.count, self.lanes.dtype)
        self.task(k, packed, packed)
        return packed
