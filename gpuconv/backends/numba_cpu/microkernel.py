"""The dense micro-kernel: a tile of sums in registers, MR output channels × NV vectors of pixels.

    C[i, j] = (C[i, j] +) Σ_k A[k, i] · B[off[k] + j]          0 ≤ i < MR, 0 ≤ j < NV·lanes

A is packed, MR numbers per k. B is read where it lies: row k begins at element ``off[k]``, and this one table makes the
kernel a convolution of any kernel size, stride or dilation over a padded copy of x, or a plain matrix product. Each
call sums its K products from zero and only then adds what was in C, so that rounding errors stay those of short sums.
"""

from __future__ import annotations

import functools
from typing import Any

from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, routine

# (MR, NV) by the bits of a register: as many sums as the register file holds beside NV of B and one of A. Of AVX2's 16,
# 4×3 reads 7 operands for 12 products and leaves no channel of 32, 64, … over; 6×2 reads 8.
TILES = {512: (8, 3), 256: (4, 3), 128: (8, 3)}

# Products that one call of the micro-kernel sums, at most: 35 channels of a 3×3 kernel.
BLOCK = 320


@functools.lru_cache(maxsize=64)
def tile(lanes: Lanes, rows: int, vectors: int, ahead: int = 0) -> Any:
    """The micro-kernel for ``rows`` × ``vectors``: a function of (A, B, off, C, K, ldc, accumulate, last, next, bias,
    floor).

    ``last`` lanes of the last vector of a row exist in C. ``bias`` are ``rows`` numbers to add at the end, ``floor`` is
    the address of the least value of a result; both are 0 where the sums go on. With ``ahead`` = 1 the memory at
    ``next`` + off[k] is fetched into the cache, with 2 that at ``next`` + off[K + k].
    """

    def emit(e: Emitter, a: Value, b: Value, off: Value, c: Value, K: Value, ldc: Value, accumulate: Value,
             last: Value, following: Value, bias: Value, floor: Value) -> None:  # fmt: skip
        builder = e.builder
        entry, loop = builder.block, e.block("loop")
        mask = e.mask(last) if e.lanes.bits == 512 else None

        def place(i: int, j: int) -> Value:
            return e.at(c, e.times(ldc, i), j * e.lanes.count)

        if e.lanes.bits < 512:
            # What is added to at the end is seldom in the first-level cache.
            for i in range(rows):
                for j in range(0, vectors, 64 // e.lanes.size // e.lanes.count):
                    e.prefetch(place(i, j))
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(I64(0), entry)
        sums = e.sums(rows, vectors, [(entry, None)])
        offset = builder.load(e.at(off, k))
        if ahead:
            e.prefetch(e.at(following, builder.load(e.at(off, K, k)) if ahead == 2 else offset))
        pixels = [e.load(e.at(b, offset, j * e.lanes.count)) for j in range(vectors)]
        weights = e.at(a, e.times(k, rows))
        new = []
        for i in range(rows):
            weight = e.splat(builder.load(e.at(weights, i)))
            new.append([e.fma(weight, pixels[j], sums[i][j]) for j in range(vectors)])
        following_k = builder.add(k, I64(1))
        k.add_incoming(following_k, loop)
        for i in range(rows):
            for j in range(vectors):
                sums[i][j].add_incoming(new[i][j], loop)
        after = e.block("after")
        builder.cbranch(builder.icmp_signed("<", following_k, K), loop, after)

        def end(mask: Value | None) -> None:
            """Add what was in C, or the bias, and write; with ``mask`` not all lanes of the last vector."""
            before, add, finish = builder.block, e.block("add"), e.block("finish")

            def masked(j: int) -> bool:
                return mask is not None and j == vectors - 1

            builder.cbranch(builder.icmp_signed("!=", accumulate, I64(0)), add, finish)
            builder.position_at_end(add)
            more = [
                [
                    builder.fadd(e.masked_load(place(i, j), mask) if masked(j) else e.load(place(i, j)), new[i][j])
                    for j in range(vectors)
                ]
                for i in range(rows)
            ]  # fmt: skip
            builder.branch(finish)

            builder.position_at_end(finish)
            totals = e.sums(rows, vectors, [(before, new), (add, more)])
            last_block, write = e.block("last"), e.block("write")
            going_on = builder.icmp_signed("==", builder.ptrtoint(bias, I64), I64(0))
            builder.cbranch(going_on, write, last_block)
            builder.position_at_end(last_block)
            least = e.splat(builder.load(floor))
            done = []
            for i in range(rows):
                offset_i = e.splat(builder.load(e.at(bias, i)))
                values = [builder.fadd(totals[i][j], offset_i) for j in range(vectors)]
                done.append([builder.select(builder.fcmp_ordered("<", v, least), least, v) for v in values])
            builder.branch(write)

            builder.position_at_end(write)
            results = e.sums(rows, vectors, [(finish, totals), (last_block, done)])
            for i in range(rows):
                for j in range(vectors):
                    if masked(j):
                        e.masked_store(results[i][j], place(i, j), mask)
                    else:
                        e.store(results[i][j], place(i, j))

        builder.position_at_end(after)
        if e.lanes.bits == 512:
            end(mask)
        else:  # without AVX-512, to store the first lanes of a vector takes as long as a dozen whole ones
            with builder.if_else(builder.icmp_signed("==", last, I64(e.lanes.count))) as (whole, cut):
                with whole:
                    end(None)
                with cut:
                    end(e.mask(last))

    return routine(f"tile_{lanes}_{rows}x{vectors}_{ahead}", lanes, "eeteiiiieee", emit)
