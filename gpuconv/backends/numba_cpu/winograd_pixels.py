"""The compiled part of ``winograd`` for channels-last images: channels in the lanes of a register.

A tile's 36 pixels are read where they lie, each by an address of its own; those outside of the image are a row of
constants. At each point, tiles × channels are multiplied with channels × output channels, and results are written in
place, but for what is cut at the border. Transforms and sums are those of ``winograd_planes``, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from gpuconv.backends.numba_cpu import winograd_transforms, winograd_work
from gpuconv.backends.numba_cpu.copies import rows
from gpuconv.backends.numba_cpu.parts import compiled
from gpuconv.backends.numba_cpu.pixels_kernel import PIXELS, put
from gpuconv.backends.numba_cpu.vectors import I64, Emitter, Lanes, Value, get, routine
from gpuconv.backends.numba_cpu.winograd_transforms import POINTS, TILE, WINDOW
from gpuconv.backends.numba_cpu.winograd_work import (
    FILL,
    FINISH,
    INPUT_STEP,
    KC,
    LEFT,
    OH,
    OW,
    OWN,
    SUM_STEP,
    SXC,
    SXH,
    SXW,
    SYH,
    SYO,
    SYW,
    TOP,
    C,
    H,
    W,
)  # fmt: skip

# The table of arguments goes on: elements of the channels of a tile, of its sums, and of the copy of a pixel.
CHANNELS, SUMS, PIXEL = range(OWN, OWN + 3)


@functools.lru_cache(maxsize=64)
def product(lanes: Lanes, vectors: int) -> Any:
    """A function of (V, U, M, tiles, K, ldv, ldu, ldm, accumulate): M[t·ldm + j·lanes + i] = (M +) Σ_k V[t·ldv + k] ·
    U[j·ldu + k·lanes + i], for any number of tiles that the registers have room for, and j < vectors.
    """
    most = PIXELS[lanes.bits][vectors]

    def emit(e: Emitter, v: Value, u: Value, m: Value, tiles: Value, K: Value, ldv: Value, ldu: Value, ldm: Value,
             accumulate: Value) -> None:  # fmt: skip
        builder = e.builder
        done, blocks = e.block("done"), [e.block("tiles") for _ in range(most)]
        switch = builder.switch(tiles, blocks[-1])
        for count, block in enumerate(blocks, 1):
            if count < most:
                switch.add_case(I64(count), block)
            builder.position_at_end(block)
            _product(e, count, vectors, v, u, m, K, ldv, ldu, ldm, accumulate)
            builder.branch(done)
        builder.position_at_end(done)

    return routine(f"winograd_product_{lanes}_{vectors}", lanes, "eeeiiiiii", emit)


def _product(e: Emitter, tiles: int, vectors: int, v: Value, u: Value, m: Value, K: Value, ldv: Value, ldu: Value,
             ldm: Value, accumulate: Value) -> None:  # fmt: skip
    """The sums of ``tiles`` tiles."""
    builder, n = e.builder, e.lanes.count
    entry, loop, after, add, write = builder.block, *(e.block(name) for name in ("loop", "after", "add", "write"))
    rows = [e.at(v, e.times(ldv, t)) for t in range(tiles)]
    panels = [e.at(u, e.times(ldu, j)) for j in range(vectors)]
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    sums = e.sums(tiles, vectors, [(entry, None)])
    weights = [e.load(e.at(panel, e.times(k, n))) for panel in panels]
    new = []
    for row, before in zip(rows, sums, strict=True):
        value = e.splat(builder.load(e.at(row, k)))
        new.append([e.fma(value, weight, total) for weight, total in zip(weights, before, strict=True)])
    following = builder.add(k, I64(1))
    k.add_incoming(following, loop)
    for t in range(tiles):
        for j in range(vectors):
            sums[t][j].add_incoming(new[t][j], loop)
    builder.cbranch(builder.icmp_signed("<", following, K), loop, after)

    builder.position_at_end(after)
    places = [[e.at(m, e.times(ldm, t), j * n) for j in range(vectors)] for t in range(tiles)]
    builder.cbranch(builder.icmp_signed("!=", accumulate, I64(0)), add, write)
    builder.position_at_end(add)
    more = [[builder.fadd(e.load(places[t][j]), new[t][j]) for j in range(vectors)] for t in range(tiles)]
    builder.branch(write)
    builder.position_at_end(write)
    totals = e.sums(tiles, vectors, [(after, new), (add, more)])
    for t in range(tiles):
        for j in range(vectors):
            e.store(totals[t][j], places[t][j])


def kernel(lanes: Lanes, vectors: int) -> Callable[..., None]:
    """The kernel for ``vectors`` of output channels at once."""
    size, count, most = lanes.size, lanes.count, PIXELS[lanes.bits][vectors]
    multiplied = product(lanes, vectors)
    image, result = winograd_transforms.pixels(lanes), winograd_transforms.outputs(lanes)
    read, write, fill = rows(lanes, "float32")

    @compiled
    def transform(arguments, mine, inputs, source, i0, i1, j0, j1):
        """The channels of all tiles, transformed; ``mine`` is places, two rows of constants, and copies of pixels."""
        C_, sxc, pixel, channels = (
            get(arguments, C),
            get(arguments, SXC),
            get(arguments, PIXEL),
            get(arguments, CHANNELS),
        )
        H_, W_, OH_, OW_ = get(arguments, H), get(arguments, W), get(arguments, OH), get(arguments, OW)
        zeros = mine + 8 * POINTS
        constants = zeros + size * pixel
        copies = constants + size * pixel
        fill(zeros, get(arguments, FINISH) + 2 * size, C_)
        fill(constants, get(arguments, FILL), C_)
        for i in range(i0, i1):
            for j in range(j0, j1):
                for point in range(POINTS):
                    row, column = TILE * i + point // WINDOW, TILE * j + point % WINDOW
                    place = zeros  # where no output reads
                    if row < OH_ + WINDOW - TILE and column < OW_ + WINDOW - TILE:
                        row -= get(arguments, TOP)
                        column -= get(arguments, LEFT)
                        if row < 0 or row >= H_ or column < 0 or column >= W_:
                            place = constants
                        else:
                            place = source + row * get(arguments, SXH) + column * get(arguments, SXW)
                            if sxc != size:
                                read(copies + size * point * pixel, place, C_, sxc)
                                place = copies + size * point * pixel
                    put(mine, point, place)
                image((inputs, mine, get(arguments, INPUT_STEP), C_))
                inputs += size * channels

    @compiled
    def multiply(arguments, sums, weight, step, inputs, panels, tiles):
        """The sums over the channels at every point, for some vectors of output channels."""
        C_, kc, ldv, ldm = get(arguments, C), get(arguments, KC), get(arguments, CHANNELS), get(arguments, SUMS)
        shares = (tiles + most - 1) // most
        for point in range(POINTS):
            v = inputs + size * point * get(arguments, INPUT_STEP)
            m = sums + size * point * get(arguments, SUM_STEP)
            for c in range(0, C_, kc):
                K_, more = min(kc, C_ - c), c > 0
                for o in range(0, panels, vectors):
                    u, to = weight + size * (point * step + count * (o * C_ + c)), m + size * count * o
                    for share in range(shares):
                        t = share * tiles // shares
                        these = (share + 1) * tiles // shares - t
                        multiplied(
                            (v + size * (t * ldv + c), u, to + size * t * ldm, these, K_, ldv, count * C_, ldm, more)
                        )

    @compiled
    def finish(arguments, mine, sums, target, bias, outputs, i0, i1, j0, j1):
        """The pixels of the result, tile by tile."""
        OH_, OW_, ldm = get(arguments, OH), get(arguments, OW), get(arguments, SUMS)
        syo, syh, syw, floor = (
            get(arguments, SYO), get(arguments, SYH), get(arguments, SYW), get(arguments, FINISH) + size,
        )  # fmt: skip
        made = mine + 8 * POINTS
        step = get(arguments, SUM_STEP)
        in_place = syo == size and syh % size == 0 and syw % size == 0
        for i in range(TILE * i0, TILE * i1, TILE):
            for j in range(TILE * j0, TILE * j1, TILE):
                to = target + i * syh + j * syw
                if in_place and i + TILE <= OH_ and j + TILE <= OW_:
                    result((to, sums, step, syh // size, syw // size, outputs, bias, floor))
                else:
                    result((made, sums, step, TILE * ldm, ldm, outputs, bias, floor))
                    for row in range(min(TILE, OH_ - i)):
                        for column in range(min(TILE, OW_ - j)):
                            at = made + size * (row * TILE + column) * ldm
                            write(to + row * syh + column * syw, at, outputs, syo)
                sums += size * ldm

    return winograd_work.kernel(lanes, count, vectors * count, winograd_work.Steps(transform, multiply, finish))
